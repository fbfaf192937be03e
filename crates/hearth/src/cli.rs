//! The command line: what can be typed, and which verb it leads to.

use std::{future::Future, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};

use crate::{
    client::Client,
    config::{Flags, ServeConfig},
    data_dir::DataDir,
    doctor, serve, verbs,
};

/// A self-hosted AWS Lambda MicroVMs: stateful sandboxes that start from snapshots, sleep when idle and wake on the next request.
#[derive(Debug, Parser)]
#[command(name = "hearth", version, about, max_term_width = 120)]
struct Cli {
    /// Directory where the server keeps its state, and where the other verbs find it.
    #[arg(long, global = true, value_name = "DIR", env = "HEARTH_DATA_DIR", default_value = "/var/lib/hearth")]
    data_dir: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the server in the foreground.
    Serve(ServeArgs),
    /// Print what AWS clients and curl need to reach the server, as `export` lines for `eval`.
    Env,
    /// Check everything that the server needs, and say how to get what is missing.
    Doctor(ServeArgs),
    /// Have this host trust the endpoints' local authority: the system's store and browsers.
    Trust(verbs::trust::TrustArgs),
    /// Build, list and remove images.
    #[command(subcommand)]
    Image(ImageVerb),
    /// Make, list and remove users, their keys, and roles.
    #[command(subcommand)]
    Iam(verbs::iam::IamVerb),
    /// Run a MicroVM from an image.
    Run(verbs::microvm::RunArgs),
    /// List MicroVMs.
    Ps(verbs::microvm::PsArgs),
    /// Suspend MicroVMs: their memory goes to disk, their processes end.
    Suspend(IdsArgs),
    /// Resume suspended MicroVMs.
    Resume(IdsArgs),
    /// Terminate MicroVMs.
    Terminate(IdsArgs),
    /// Print what a MicroVM's app wrote, or the build log of an image.
    Logs(verbs::logs::LogsArgs),
    /// Print a curl command that reaches a MicroVM, with a token made for it.
    Open(verbs::endpoint::OpenArgs),
    /// Run curl against a MicroVM's endpoint, with a token made for it.
    Curl(verbs::endpoint::CurlArgs),
    /// Open a shell in a MicroVM.
    Shell(verbs::exec::ShellArgs),
    /// Run a program in a MicroVM, beside its app.
    Exec(verbs::exec::ExecArgs),
    /// Copy files into a MicroVM and out of it.
    Cp(verbs::cp::CpArgs),
    /// Listen here for connections to ports of a MicroVM.
    Forward(verbs::forward::ForwardArgs),
}

#[derive(Debug, Subcommand)]
enum ImageVerb {
    /// Build an image from a directory with a Dockerfile, and follow the build.
    Build(verbs::image::BuildArgs),
    /// List images.
    Ls,
    /// Remove an image that has no MicroVMs.
    Rm {
        /// Name or ARN.
        #[arg(value_name = "NAME")]
        image: String,
    },
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Configuration file in TOML; flags win over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Debug, Args)]
struct IdsArgs {
    /// Ids, or beginnings of ids that fit one MicroVM only.
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

/// Parses the command line and runs the verb. Exit code 0: done; 1: failed, with the reason on standard error; 2: not understood.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("hearth: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let data_dir = DataDir::new(cli.data_dir);
    let client = Client::new(data_dir.clone());
    match cli.verb {
        Verb::Serve(args) => {
            let config = ServeConfig::load(args.config.as_deref(), args.flags)?;
            run(tokio::runtime::Builder::new_multi_thread(), serve::serve(config, data_dir))
        }
        Verb::Doctor(args) => {
            let config = ServeConfig::load(args.config.as_deref(), args.flags)?;
            small(doctor::run(config, data_dir))
        }
        Verb::Env => verbs::env::run(&data_dir),
        Verb::Trust(args) => verbs::trust::run(&data_dir, &args),
        Verb::Image(ImageVerb::Build(args)) => small(verbs::image::build(client, args)),
        Verb::Image(ImageVerb::Ls) => small(verbs::image::list(client)),
        Verb::Image(ImageVerb::Rm { image }) => small(verbs::image::remove(client, image)),
        Verb::Iam(verb) => small(verbs::iam::run(client, verb)),
        Verb::Run(args) => small(verbs::microvm::run(client, args)),
        Verb::Ps(args) => small(verbs::microvm::list(client, args)),
        Verb::Suspend(args) => small(verbs::microvm::change(client, verbs::microvm::Change::Suspend, args.ids)),
        Verb::Resume(args) => small(verbs::microvm::change(client, verbs::microvm::Change::Resume, args.ids)),
        Verb::Terminate(args) => small(verbs::microvm::change(client, verbs::microvm::Change::Terminate, args.ids)),
        Verb::Logs(args) => small(verbs::logs::run(client, args)),
        Verb::Open(args) => small(verbs::endpoint::open(client, args)),
        Verb::Curl(args) => small(verbs::endpoint::curl(client, args)),
        Verb::Shell(args) => small(verbs::exec::shell(client, args)),
        Verb::Exec(args) => small(verbs::exec::exec(client, args)),
        Verb::Cp(args) => small(verbs::cp::run(client, args)),
        Verb::Forward(args) => small(verbs::forward::run(client, args)),
    }
}

/// The client verbs wait for one thing at a time: one thread does.
fn small(verb: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    run(tokio::runtime::Builder::new_current_thread(), verb)
}

fn run(mut runtime: tokio::runtime::Builder, verb: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let runtime = runtime.enable_all().build()?;
    let result = runtime.block_on(verb);
    // A blocking read of standard input or of a slow disk must not hold the exit up.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_data_directory_may_stand_before_or_after_the_verb() {
        for line in [["hearth", "--data-dir", "/d", "ps"], ["hearth", "ps", "--data-dir", "/d"]] {
            assert_eq!(Cli::try_parse_from(line).unwrap().data_dir, PathBuf::from("/d"));
        }
    }

    #[test]
    fn what_follows_two_dashes_is_curl_s() {
        let cli = Cli::try_parse_from(["hearth", "curl", "mvm", "/x", "--port", "5000", "--", "-X", "POST"]).unwrap();
        let Verb::Curl(args) = cli.verb else { panic!("not curl") };
        assert_eq!(args.curl, ["-X", "POST"]);
        assert_eq!(args.path, "/x");
    }
}
