//! The command line of a QEMU process. Boot and clone must describe the same machine, device for device, or device state does not load.

use std::path::Path;

use serde_json::json;

use super::Accelerator;
use crate::network::GUEST_MAC;

/// Everything a QEMU process is told.
#[derive(Debug)]
pub struct Hardware<'a> {
    pub id: &'a str,
    pub accelerator: Accelerator,
    pub cpu_model: &'a str,
    pub vcpus: u8,
    pub memory_mib: u32,
    /// Paths that the process can open.
    pub kernel: String,
    pub initramfs: String,
    pub memory: String,
    /// Written by this machine only, then what the layers below it hold: nearest first, the last one raw.
    pub overlay: String,
    pub layers: Vec<String>,
    /// Disks beside that one.
    pub disks: Vec<RawDisk>,
    /// Numbers of inherited descriptors.
    pub tap: i32,
    pub channel: i32,
    pub monitor: i32,
    pub life: Life<'a>,
}

/// A disk that is a file's bytes.
#[derive(Debug)]
pub struct RawDisk {
    pub serial: String,
    pub path: String,
    pub writable: bool,
}

/// What differs between the boot of an image and its clones.
#[derive(Debug)]
pub enum Life<'a> {
    /// Memory is written through to its file; the console goes to a file.
    Boot {
        /// Where the console is written.
        console: &'a str,
        /// Host's time-stamp counter rate, in kHz, for emulated processors.
        tsc_khz: Option<u64>,
    },
    /// Memory is a private copy; the machine waits for device state.
    Clone,
}

impl Hardware<'_> {
    /// The arguments, without the program's name.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            "-name".into(),
            format!("{},debug-threads=on", self.id),
            "-nodefaults".into(),
            "-no-user-config".into(),
            "-no-reboot".into(),
            "-sandbox".into(),
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into(),
            // suppress-vmdesc and send-configuration=off: device state without memory then loads through migrate-incoming.
            "-machine".into(),
            "microvm,memory-backend=ram,suppress-vmdesc=on".into(),
            "-global".into(),
            "migration.send-configuration=off".into(),
            "-accel".into(),
            match self.accelerator {
                Accelerator::Kvm => "kvm".into(),
                Accelerator::Tcg => "tcg,tb-size=256".into(),
            },
            "-cpu".into(),
            self.cpu_model.into(),
            "-smp".into(),
            self.vcpus.to_string(),
            "-m".into(),
            format!("{}M", self.memory_mib),
            "-display".into(),
            "none".into(),
        ];
        let share = matches!(self.life, Life::Boot { .. });
        let memory = json!({
            "qom-type": "memory-backend-file", "id": "ram", "mem-path": self.memory, "size": u64::from(self.memory_mib) << 20, "share": share,
        });
        for (option, value) in [
            ("-kernel", self.kernel.clone()),
            ("-initrd", self.initramfs.clone()),
            ("-append", self.kernel_command_line()),
            ("-object", memory.to_string()),
            ("-blockdev", self.disk().to_string()),
            // The guest is told that its disk failed. QEMU would stop the machine instead when the host's disk is full.
            ("-device", "virtio-blk-device,drive=disk,werror=report,rerror=report".into()),
            ("-netdev", format!("tap,id=net,fd={},vhost=off", self.tap)),
            ("-device", format!("virtio-net-device,netdev=net,mac={GUEST_MAC}")),
            ("-object", "rng-builtin,id=rng".into()),
            ("-device", "virtio-rng-device,rng=rng".into()),
            ("-device", "virtio-serial-device,max_ports=2".into()),
            ("-chardev", format!("socket,id=channel,fd={}", self.channel)),
            ("-device", format!("virtserialport,chardev=channel,name={}", hearth_guest_protocol::PORT_NAME)),
            ("-chardev", self.console()),
            ("-serial", "chardev:console".into()),
            ("-chardev", format!("socket,id=monitor,fd={}", self.monitor)),
            ("-mon", "chardev=monitor,mode=control".into()),
        ] {
            arguments.extend([option.to_owned(), value]);
        }
        for disk in &self.disks {
            let backend = json!({
                "driver": "raw", "node-name": disk.serial, "read-only": !disk.writable, "discard": "unmap", "detect-zeroes": "unmap",
                "cache": {"no-flush": true},
                "file": {"driver": "file", "filename": disk.path, "locking": "off", "discard": "unmap"},
            });
            let device = format!("virtio-blk-device,drive={0},serial={0},werror=report,rerror=report", disk.serial);
            arguments.extend(["-blockdev".to_owned(), backend.to_string(), "-device".to_owned(), device]);
        }
        if matches!(self.life, Life::Clone) {
            arguments.extend(["-incoming", "defer", "-S"].map(str::to_owned));
        }
        arguments
    }

    fn kernel_command_line(&self) -> String {
        // The console's driver allocates 8 MiB of buffers that are never used. Zeroed as they are allocated, they are holes in a snapshot.
        let mut line = "console=ttyS0 quiet panic=-1 init_on_alloc=1 random.trust_cpu=on".to_owned();
        if self.accelerator == Accelerator::Tcg {
            // The flaws that they mend are a processor's, and no emulated one has them. Their page tables for programs alone would have the
            // emulator forget its own translations of addresses at each system call, fault and interrupt.
            line.push_str(" mitigations=off");
        }
        if let Life::Boot { tsc_khz: Some(rate), .. } = self.life {
            // microvm has no timer to calibrate the emulated counter against; on a busy host a guest that tries may hang.
            line.push_str(&format!(" tsc_early_khz={rate}"));
        }
        line
    }

    fn console(&self) -> String {
        match self.life {
            Life::Boot { console, .. } => format!("file,id=console,path={console}"),
            // A tenant that writes to its console must not fill the host's disk.
            Life::Clone => "null,id=console".into(),
        }
    }

    /// The chain of the disk, described in full: nothing is probed and no path inside an image is followed.
    fn disk(&self) -> serde_json::Value {
        let mut chain = serde_json::Value::Null;
        for (depth, layer) in self.layers.iter().rev().enumerate() {
            let file = json!({"driver": "file", "filename": layer, "locking": "off"});
            chain = match depth {
                0 => json!({"driver": "raw", "read-only": true, "file": file}),
                _ => json!({"driver": "qcow2", "read-only": true, "file": file, "backing": chain}),
            };
        }
        json!({
            "driver": "qcow2", "node-name": "disk", "discard": "unmap", "detect-zeroes": "unmap",
            // The guest's flushes reach the host's page cache; the host's crash loses running machines anyway.
            "cache": {"no-flush": true},
            "file": {"driver": "file", "filename": self.overlay, "discard": "unmap"},
            "backing": chain,
        })
    }
}

/// Rate of the host's time-stamp counter in kHz, as the kernel measured it.
pub fn tsc_khz(cpuinfo: &str) -> Option<u64> {
    let line = cpuinfo.lines().find(|line| line.starts_with("cpu MHz"))?;
    let mhz: f64 = line.split(':').nth(1)?.trim().parse().ok()?;
    // Rates of processors fit easily; the fraction is below the kernel's own resolution.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let khz = (mhz * 1000.0) as u64;
    (khz > 0).then_some(khz)
}

/// Version from `qemu-system-x86_64 --version` or `qemu-img --version`.
pub fn parse_version(output: &str) -> Option<&str> {
    let (_, rest) = output.lines().next()?.split_once(" version ")?;
    rest.split_whitespace().next()
}

/// Name that a program is looked for under in the directories of `PATH`.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok() && path.is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hardware(life: Life<'_>) -> Vec<String> {
        Hardware {
            id: "vm",
            accelerator: Accelerator::Tcg,
            cpu_model: "Nehalem",
            vcpus: 1,
            memory_mib: 512,
            kernel: "k".into(),
            initramfs: "i".into(),
            memory: "m".into(),
            overlay: "o".into(),
            layers: vec!["boot".into(), "rootfs".into()],
            disks: vec![RawDisk { serial: "store".into(), path: "s".into(), writable: false }],
            tap: 5,
            channel: 6,
            monitor: 7,
            life,
        }
        .arguments()
    }

    fn devices(arguments: &[String]) -> Vec<&String> {
        arguments.iter().skip_while(|argument| *argument != "-device").filter(|argument| argument.contains("virt")).collect()
    }

    #[test]
    fn boot_and_clone_have_the_same_devices() {
        let boot = hardware(Life::Boot { console: "c", tsc_khz: Some(2_600_000) });
        let clone = hardware(Life::Clone);
        assert_eq!(devices(&boot), devices(&clone));
        assert!(boot.iter().any(|argument| argument.ends_with("tsc_early_khz=2600000")));
        assert!(clone.iter().any(|argument| argument.contains("\"share\":false")));
        assert!(boot.iter().any(|argument| argument.contains("\"share\":true")));
    }

    #[test]
    fn the_disk_is_a_chain_down_to_a_raw_file() {
        let clone = hardware(Life::Clone);
        let disk = clone.iter().find(|argument| argument.contains("node-name")).unwrap();
        let disk: serde_json::Value = serde_json::from_str(disk).unwrap();
        assert_eq!(disk["file"]["filename"], "o");
        assert_eq!(disk["backing"]["file"]["filename"], "boot");
        assert_eq!(disk["backing"]["backing"]["driver"], "raw");
        assert_eq!(disk["backing"]["backing"]["file"]["filename"], "rootfs");
    }

    #[test]
    fn a_further_disk_is_found_by_its_serial_number() {
        let boot = hardware(Life::Boot { console: "c", tsc_khz: None });
        assert!(boot.iter().any(|argument| argument.contains("drive=store,serial=store")), "{boot:?}");
        let disk = boot.iter().find(|argument| argument.contains("\"node-name\":\"store\"")).unwrap();
        let disk: serde_json::Value = serde_json::from_str(disk).unwrap();
        assert_eq!((&disk["read-only"], &disk["file"]["filename"]), (&true.into(), &"s".into()));
    }

    #[test]
    fn versions_and_rates_are_read() {
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright"), Some("7.2.22"));
        assert_eq!(parse_version("nonsense"), None);
        assert_eq!(tsc_khz("processor : 0\ncpu MHz\t\t: 2596.126\n"), Some(2_596_126));
    }
}
