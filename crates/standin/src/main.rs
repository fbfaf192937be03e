//! What the stand-in base image understands of Amazon Linux: `dnf`, `microdnf`, `yum` and `rpm` on a Debian system.
//!
//! ```text
//! arguments ─▶ names ─▶ table, Debian's names, rules ─▶ plan ─▶ apt-get
//! ```
//!
//! One program under several names. It installs nothing by itself: names are translated, and Debian's own tools do the work.

#![forbid(unsafe_code)]

mod apt;
mod arguments;
mod check;
mod dnf;
mod glob;
mod image;
mod plan;
mod resolve;
mod rpm;
mod suite;
mod table;

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let program = if arguments.is_empty() { String::new() } else { arguments.remove(0) };
    let name = Path::new(&program).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    ExitCode::from(match name {
        "rpm" => rpm::main(&arguments),
        "yum-config-manager" => dnf::main(&[vec!["config-manager".to_owned()], arguments].concat()),
        "amazon-linux-extras" => {
            eprintln!(
                "amazon-linux-extras belongs to Amazon Linux 2: Amazon Linux 2023 has its packages under names of their own, use dnf"
            );
            1
        }
        _ if arguments.first().is_some_and(|first| first == "check") && name == "hearth-standin" => check::main(&arguments),
        _ => dnf::main(&arguments),
    })
}
