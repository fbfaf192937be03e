//! The project's chores: `cargo xtask setup`, `kit`, `demo`, `test`, `model`, `bench`.

#![deny(unsafe_code)]

mod bench;
mod checks;
mod demo;
mod host;
mod kit;
mod leftovers;
mod model;
mod node;
mod process;
mod python;
mod server;
mod shell;
mod story;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

use crate::workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's chores", max_term_width = 100)]
enum Chore {
    /// Install and make everything that building, testing and running need.
    Setup,
    /// Make the guest kit: kernel, initramfs and base image.
    Kit,
    /// Play the whole story with the AWS CLI and curl, each command shown with its answer and its time.
    Demo,
    /// Formatting, lints, unit tests, then whole-system tests with real MicroVMs, without the long ones.
    Test {
        /// Only this part of the whole-system tests, with its long ones.
        part: Option<checks::Part>,
        /// Only the whole-system tests, with these arguments for pytest.
        #[arg(last = true, value_name = "PYTEST ARGUMENTS")]
        system: Option<Vec<String>>,
    },
    /// Say what the newest published model of the service has that Hearth does not serve.
    Model,
    /// Measure how long launch, suspend and resume take, or what the endpoint proxy adds.
    Bench {
        /// What is measured.
        #[arg(default_value = "lifecycle")]
        subject: bench::Subject,
        /// Times each path is measured: 20 of the lifecycle, 50 wakes of the ingress, unless given.
        #[arg(long)]
        rounds: Option<u32>,
    },
}

fn main() -> ExitCode {
    let chore = Chore::parse();
    match carry_out(&chore) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(chore: &Chore) -> anyhow::Result<()> {
    let workspace = Workspace::find()?;
    match chore {
        Chore::Setup => workspace.set_up().map(|_| ()),
        Chore::Kit => {
            host::ensure()?;
            let kit = kit::ensure(&workspace.target.join("kit"))?;
            println!("{}: kernel {}", kit.dir.display(), kit.kernel_release);
            Ok(())
        }
        Chore::Demo => demo::run(&workspace),
        Chore::Test { part: None, system: None } => checks::run(&workspace),
        Chore::Test { part: None, system: Some(arguments) } => checks::run_system(&workspace, arguments),
        Chore::Test { part: Some(part), system } => checks::run_part(&workspace, *part, system.as_deref().unwrap_or_default()),
        Chore::Model => model::run(&workspace),
        Chore::Bench { subject, rounds } => bench::run(&workspace, *subject, *rounds),
    }
}
