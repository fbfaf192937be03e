//! PID 1 of every MicroVM: mounts the disk, runs the image's application as a container, and serves the host over one virtio-serial port.
//!
//! ```text
//! boot ─▶ wait for a marker ─▶ session ─▶ answer with the next marker ─┐
//!               ▲                                                      │
//!               └──────────────────────────────────────────────────────┘
//! ```
//!
//! The binary is also its own helper: started as `hearth-guest container` it becomes the application (see [`app::container`]), as
//! `hearth-guest exec` it starts another process in the container ([`exec::helper`]), as `hearth-guest copy` it copies files ([`copy::helper`]).

mod app;
mod boot;
mod cgroup;
mod connections;
mod copy;
mod dial;
mod exec;
mod freezer;
mod generation;
mod hook;
mod identity;
mod listen;
mod logs;
mod metadata;
mod network;
mod port;
mod rest;
mod session;
mod splice;
mod trim;
mod uevent;

use std::{convert::Infallible, process::ExitCode};

use anyhow::Context;
use nix::sys::reboot::{RebootMode, reboot};

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some(app::container::ARGUMENT) => return app::container::main(),
        Some(exec::helper::ARGUMENT) => return exec::helper::main(),
        Some(copy::helper::ARGUMENT) => return copy::helper::main(),
        _ => {}
    }
    if std::process::id() != 1 {
        eprintln!("hearth-guest is the first process of a MicroVM; it has nothing to do elsewhere");
        return ExitCode::FAILURE;
    }
    let Err(error) = run();
    eprintln!("hearth-guest: cannot go on, powering off: {error:#}");
    // The disk's journal need not be replayed by whoever looks at it next.
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("hearth-guest: power off failed: {error}");
    ExitCode::FAILURE
}

fn run() -> anyhow::Result<Infallible> {
    let machine = boot::boot()?;
    // One thread: the guest mostly waits, and every thread would be part of every snapshot.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(session::serve(&machine))
}
