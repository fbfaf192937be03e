//! Why the kernel did not execute a program, in words that say what to do about it. The program is looked at where it is, in the container.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use nix::errno::Errno;

/// The host's architecture, by the service's name and by Docker's.
const HOST: (&str, &str) = if cfg!(target_arch = "aarch64") { ("ARM_64", "linux/arm64") } else { ("X86_64", "linux/amd64") };
/// As much of a file as tells what it is: an ELF header, or a script's first line as the kernel reads it.
const HEAD: usize = 256;
/// `e_machine` of the ELF specification, and what it is called.
const MACHINES: [(u16, &str); 7] =
    [(3, "i386"), (21, "PowerPC"), (22, "s390x"), (40, "32-bit ARM"), (62, "X86_64"), (183, "ARM_64"), (243, "RISC-V")];

/// What is to be said beside the error; nothing when the error says it all.
pub fn advice(program: &Path, error: Errno) -> Option<String> {
    match error {
        Errno::EACCES if program.is_dir() => Some("It is a directory.".to_owned()),
        Errno::EACCES => Some("It must be a file that the image's user may execute: RUN chmod +x, or COPY --chmod=755.".to_owned()),
        Errno::ENOEXEC => not_executable(&head(program).ok()?),
        Errno::ENOENT => missing_interpreter(&head(program).ok()?),
        _ => None,
    }
}

/// A file that the kernel does not know how to execute.
fn not_executable(head: &[u8]) -> Option<String> {
    match Kind::of(head) {
        Kind::Script(interpreter) => {
            let machine = self::head(&interpreter).ok().and_then(|head| foreign(&head))?;
            Some(format!("Its interpreter {} is a program for {machine}, and this host's processor is {}.", interpreter.display(), host()))
        }
        Kind::Elf => {
            let machine = foreign(head)?;
            Some(format!("It is a program for {machine}, and this host's processor is {}: build it for that.", host()))
        }
        Kind::Foreign(system) => Some(format!("It is a program for {system}: build it for {}.", HOST.1)),
        Kind::Empty => Some("The file is empty.".to_owned()),
        Kind::Unknown => Some("It is neither a program nor a script whose first line names its interpreter, as #!/bin/sh does.".to_owned()),
    }
}

/// A file that is there, while what the kernel needs to execute it is not.
fn missing_interpreter(head: &[u8]) -> Option<String> {
    match Kind::of(head) {
        Kind::Script(_) if first_line(head).ends_with(b"\r") => {
            Some("Its first line ends with a carriage return: save it with the line ends of Unix.".to_owned())
        }
        Kind::Script(interpreter) => Some(format!("Its first line names {}, which is not in the image.", interpreter.display())),
        Kind::Elf => Some(
            "It is linked for a loader that is not in the image: build it in an image like this one, or link it statically.".to_owned(),
        ),
        Kind::Foreign(_) | Kind::Empty | Kind::Unknown => None,
    }
}

/// What a file is, by its first bytes.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Elf,
    /// Of another operating system.
    Foreign(&'static str),
    /// With its interpreter.
    Script(PathBuf),
    Empty,
    Unknown,
}

impl Kind {
    fn of(head: &[u8]) -> Self {
        match head {
            [] => Self::Empty,
            [0x7f, b'E', b'L', b'F', ..] => Self::Elf,
            [b'M', b'Z', ..] => Self::Foreign("Windows"),
            [0xcf | 0xce, 0xfa, 0xed, 0xfe, ..] | [0xca, 0xfe, 0xba, 0xbe, ..] => Self::Foreign("macOS"),
            [b'#', b'!', ..] => {
                let line = String::from_utf8_lossy(&first_line(head)[2..]).into_owned();
                Self::Script(PathBuf::from(line.split_whitespace().next().unwrap_or_default()))
            }
            _ => Self::Unknown,
        }
    }
}

fn first_line(head: &[u8]) -> &[u8] {
    head.split(|byte| *byte == b'\n').next().unwrap_or_default()
}

/// The machine that an ELF file is for, unless it is the host's.
fn foreign(head: &[u8]) -> Option<String> {
    let (order, field) = (*head.get(5)?, [*head.get(18)?, *head.get(19)?]);
    let machine = if order == 2 { u16::from_be_bytes(field) } else { u16::from_le_bytes(field) };
    let name = MACHINES.iter().find(|(number, _)| *number == machine).map(|(_, name)| *name);
    let name = name.map_or_else(|| format!("another machine (ELF {machine})"), str::to_owned);
    (Kind::of(head) == Kind::Elf && name != HOST.0).then_some(name)
}

fn host() -> String {
    format!("{} ({})", HOST.0, HOST.1)
}

fn head(path: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(HEAD);
    File::open(path)?.take(HEAD as u64).read_to_end(&mut head)?;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first bytes of an ELF file of 64 bits.
    fn elf(order: u8, machine: [u8; 2]) -> Vec<u8> {
        let mut head = b"\x7fELF\x02".to_vec();
        head.push(order);
        head.resize(18, 0);
        head.extend(machine);
        head.resize(64, 0);
        head
    }

    fn said(contents: &[u8], error: Errno) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        std::fs::write(&program, contents).unwrap();
        advice(&program, error)
    }

    #[test]
    fn advice_exec_format_names_the_other_architecture_and_the_host_s() {
        let other = if HOST.0 == "ARM_64" { ([62, 0], "X86_64") } else { ([183, 0], "ARM_64") };
        for (contents, machine) in
            [(elf(1, other.0), other.1), (elf(1, [243, 0]), "RISC-V"), (elf(2, [0, 22]), "s390x"), (elf(1, [1, 1]), "ELF 257")]
        {
            let said = said(&contents, Errno::ENOEXEC).unwrap();
            assert!(said.contains(machine) && said.contains(HOST.0) && said.contains(HOST.1), "{said}");
        }
        let own = if HOST.0 == "ARM_64" { [183, 0] } else { [62, 0] };
        assert_eq!(said(&elf(1, own), Errno::ENOEXEC), None, "the kernel knows better");
        assert_eq!(said(b"\x7fELF", Errno::ENOEXEC), None, "it is cut off");
    }

    #[test]
    fn advice_exec_format_tells_what_is_no_program_of_this_system() {
        for (contents, part) in [
            (&b"MZ\x90"[..], "for Windows"),
            (b"\xcf\xfa\xed\xfe\x07", "for macOS"),
            (b"", "empty"),
            (b"echo hello\n", "as #!/bin/sh does"),
        ] {
            let said = said(contents, Errno::ENOEXEC).unwrap();
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn advice_exec_format_of_a_script_looks_at_its_interpreter() {
        let dir = tempfile::tempdir().unwrap();
        let interpreter = dir.path().join("python");
        std::fs::write(&interpreter, elf(1, [243, 0])).unwrap();
        let said = said(format!("#! {} -u\n", interpreter.display()).as_bytes(), Errno::ENOEXEC).unwrap();
        assert!(said.contains(&interpreter.display().to_string()) && said.contains("RISC-V"), "{said}");
    }

    #[test]
    fn advice_not_found_tells_what_is_missing_beside_the_file() {
        for (contents, part) in [
            (&b"#!/bin/sh\r\necho hello\r\n"[..], "carriage return"),
            (b"#!/usr/bin/ruby -w\n", "names /usr/bin/ruby,"),
            (&elf(1, [62, 0]), "link it statically"),
        ] {
            let said = said(contents, Errno::ENOENT).unwrap();
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn advice_permission_denied_tells_directories_apart() {
        assert!(said(b"#!/bin/sh\n", Errno::EACCES).unwrap().contains("chmod +x"));
        assert_eq!(advice(&std::env::temp_dir(), Errno::EACCES).unwrap(), "It is a directory.");
        assert_eq!(said(b"", Errno::ENOMEM), None);
    }
}
