//! `rpm`, as far as it asks about what is installed.

use std::{io::Write, path::Path};

use crate::{
    apt::{self, Apt},
    dnf, glob,
    resolve::Resolver,
    suite::{ARCHITECTURE, Suite, upstream},
};

/// What rpm is asked to do.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    Version,
    /// Expand macros.
    Evaluate(Vec<String>),
    /// Take keys for repositories.
    Import,
    Query {
        selection: Selection,
        shown: Shown,
        format: Option<String>,
        operands: Vec<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Selection {
    Named,
    All,
    File,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    Name,
    Files,
    Information,
}

/// A command line cannot be carried out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum RpmError {
    #[error("{0} is not supported: RPM packages cannot be installed, checked or removed on Debian; use dnf for packages of its own")]
    Refused(String),
    #[error("no arguments given for query")]
    NoOperands,
    #[error("{0}: option requires an argument")]
    NoValue(String),
}

/// Carries a command line out. Returns the exit code: for queries, how many packages are not installed.
pub fn main(arguments: &[String]) -> u8 {
    let request = match parse(arguments) {
        Ok(request) => request,
        Err(error) => {
            eprintln!("rpm: {error}");
            return 1;
        }
    };
    match request {
        Request::Version => println!("RPM version 4.16.1.3, the stand-in for rpm on {}", crate::image::release()),
        Request::Evaluate(expressions) => expressions.iter().for_each(|expression| println!("{}", expand(expression))),
        Request::Import => eprintln!("stand-in: keys of RPM repositories are not used"),
        Request::Query { selection, shown, format, operands } => return query(selection, shown, format.as_deref(), &operands),
    }
    0
}

fn parse(arguments: &[String]) -> Result<Request, RpmError> {
    let (mut selection, mut shown, mut format, mut operands) = (Selection::Named, Shown::Name, None, Vec::new());
    let (mut is_query, mut evaluated) = (false, None);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = |name: &str| rest.next().cloned().ok_or_else(|| RpmError::NoValue(name.to_owned()));
        match argument.as_str() {
            "--version" => return Ok(Request::Version),
            "--import" => return Ok(Request::Import),
            "--query" => is_query = true,
            "--all" => selection = Selection::All,
            "--file" => selection = Selection::File,
            "--list" => shown = Shown::Files,
            "--info" => shown = Shown::Information,
            "--quiet" | "--nosignature" | "--nodigest" => {}
            "--queryformat" | "--qf" => format = Some(value(argument)?),
            "-E" | "--eval" => evaluated.get_or_insert_with(Vec::new).push(value(argument)?),
            _ if argument.starts_with("--queryformat=") || argument.starts_with("--qf=") || argument.starts_with("--eval=") => {
                let (name, value) = argument.split_once('=').unwrap_or_default();
                if name == "--eval" {
                    evaluated.get_or_insert_with(Vec::new).push(value.to_owned());
                } else {
                    format = Some(value.to_owned());
                }
            }
            _ if argument.starts_with("-q") && argument[1..].chars().all(|letter| "qafliv".contains(letter)) => {
                is_query = true;
                for letter in argument[2..].chars() {
                    match letter {
                        'a' => selection = Selection::All,
                        'f' => selection = Selection::File,
                        'l' => shown = Shown::Files,
                        'i' => shown = Shown::Information,
                        _ => {}
                    }
                }
            }
            _ if is_query && argument.len() == 2 && ["-a", "-f", "-l", "-i", "-v"].contains(&argument.as_str()) => {
                match argument.as_str() {
                    "-a" => selection = Selection::All,
                    "-f" => selection = Selection::File,
                    "-l" => shown = Shown::Files,
                    "-i" => shown = Shown::Information,
                    _ => {}
                }
            }
            _ if argument.starts_with('-') => return Err(RpmError::Refused(argument.clone())),
            _ => operands.push(argument.clone()),
        }
    }
    if let Some(mut expressions) = evaluated {
        expressions.append(&mut operands);
        return Ok(Request::Evaluate(expressions));
    }
    if !is_query {
        return Err(RpmError::Refused(arguments.join(" ")));
    }
    if operands.is_empty() && selection != Selection::All {
        return Err(RpmError::NoOperands);
    }
    Ok(Request::Query { selection, shown, format, operands })
}

/// The macros that scripts ask for. Others stay as they are, as rpm leaves those that it does not know.
fn expand(expression: &str) -> String {
    let mut expanded = expression.replace("%%", "%");
    for (name, value) in [("_arch", ARCHITECTURE), ("_target_cpu", ARCHITECTURE), ("amzn", "2023"), ("dist", ".amzn2023")] {
        for form in [format!("%{{?{name}}}"), format!("%{{{name}}}"), format!("%{name}")] {
            expanded = expanded.replace(&form, value);
        }
    }
    expanded
}

fn query(selection: Selection, shown: Shown, format: Option<&str>, operands: &[String]) -> u8 {
    let (table, apt) = match (dnf::table(), Apt::read()) {
        (Ok(table), Ok(apt)) => (table, apt),
        (Err(error), _) => return failure(&error),
        (_, Err(error)) => return failure(&error),
    };
    let resolver = Resolver { table: &table, suite: &apt };
    let mut missing = 0u8;
    let mut packages: Vec<String> = Vec::new();
    match selection {
        Selection::All => {
            let chosen = |name: &String| operands.is_empty() || operands.iter().any(|pattern| glob::matches(pattern, name));
            packages.extend(apt.all_installed().into_iter().filter(chosen));
        }
        Selection::File => {
            for file in operands {
                let owner = apt::output("dpkg-query", &["--search", file]).ok();
                match owner.as_deref().and_then(|owner| owner.split([':', ',']).next()) {
                    Some(owner) => packages.push(owner.to_owned()),
                    None if Path::new(file).exists() => missing = report(missing, &format!("file {file} is not owned by any package")),
                    None => missing = report(missing, &format!("file {file}: No such file or directory")),
                }
            }
        }
        Selection::Named => {
            for name in operands {
                let found = resolver.resolve(name).unwrap_or_default();
                // What means nothing on Debian is not installed either.
                let mut here: Vec<_> = found.into_iter().filter_map(|found| found.packages.into_iter().next()).collect();
                here.retain(|package| apt.installed(package).is_some());
                if here.is_empty() && apt.installed(name).is_some() {
                    here.push(name.clone());
                }
                if here.is_empty() {
                    missing = report(missing, &format!("package {name} is not installed"));
                }
                packages.extend(here);
            }
        }
    }
    for package in packages {
        let version = apt.installed(&package).unwrap_or_default();
        let said = match (shown, format) {
            (Shown::Files, _) => apt::output("dpkg-query", &["--listfiles", &package]).unwrap_or_default(),
            (Shown::Information, _) => apt::output("dpkg-query", &["--status", &package]).unwrap_or_default(),
            (Shown::Name, Some(format)) => fill(format, &package, &version),
            (Shown::Name, None) => format!("{package}-{version}.{ARCHITECTURE}\n"),
        };
        // A reader who has enough, such as `head`, is no failure.
        if std::io::stdout().write_all(said.as_bytes()).is_err() {
            break;
        }
    }
    missing
}

fn report(missing: u8, message: &str) -> u8 {
    println!("{message}");
    missing.saturating_add(1)
}

fn failure(error: &dyn std::error::Error) -> u8 {
    eprintln!("rpm: {error}");
    1
}

/// A `--queryformat` with its tags filled in.
fn fill(format: &str, package: &str, version: &str) -> String {
    let without_epoch = version.split_once(':').map_or(version, |(_, version)| version);
    let release = without_epoch.rsplit_once('-').map_or("0", |(_, release)| release);
    let epoch = version.split_once(':').map_or("(none)", |(epoch, _)| epoch);
    let tags = [("NAME", package), ("VERSION", upstream(version)), ("RELEASE", release), ("ARCH", ARCHITECTURE), ("EPOCH", epoch)];
    let mut filled = format.replace("\\n", "\n").replace("\\t", "\t");
    for (tag, value) in tags {
        filled = filled.replace(&format!("%{{{tag}}}"), value).replace(&format!("%{{{}}}", tag.to_lowercase()), value);
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Request, RpmError> {
        parse(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    fn queried(selection: Selection, shown: Shown, operands: &[&str]) -> Result<Request, RpmError> {
        Ok(Request::Query { selection, shown, format: None, operands: operands.iter().map(|&operand| operand.to_owned()).collect() })
    }

    #[test]
    fn parse_queries_are_understood() {
        assert_eq!(parsed("-q jq tar"), queried(Selection::Named, Shown::Name, &["jq", "tar"]));
        assert_eq!(parsed("-qa"), queried(Selection::All, Shown::Name, &[]));
        assert_eq!(parsed("-q -a python*"), queried(Selection::All, Shown::Name, &["python*"]));
        assert_eq!(parsed("-ql jq"), queried(Selection::Named, Shown::Files, &["jq"]));
        assert_eq!(parsed("-qif /bin/sh"), queried(Selection::File, Shown::Information, &["/bin/sh"]));
        assert_eq!(parsed("--import https://example.com/key"), Ok(Request::Import));
        assert_eq!(parsed("-E %{_arch}"), Ok(Request::Evaluate(vec!["%{_arch}".into()])));
        assert_eq!(parsed("-q"), Err(RpmError::NoOperands));
    }

    #[test]
    fn parse_changes_are_refused() {
        for line in
            ["-ivh x.rpm", "-Uvh https://example.com/x.rpm", "-e jq", "-V jq", "--rebuilddb", "-K x.rpm", "-q --scripts jq", "x.rpm"]
        {
            assert!(matches!(parsed(line), Err(RpmError::Refused(_))), "{line}");
        }
    }

    #[test]
    fn formats_and_macros_are_filled() {
        assert_eq!(fill("%{NAME} %{version}-%{RELEASE}.%{ARCH}\\n", "jq", "1.6-2.1"), format!("jq 1.6-2.1.{ARCHITECTURE}\n"));
        assert_eq!(expand("%{_arch}"), ARCHITECTURE);
        assert_eq!(expand("%{?dist}"), ".amzn2023");
        assert_eq!(expand("%{rhel}"), "%{rhel}");
    }
}
