//! `hearth logs`: what a MicroVM's app wrote, or the log of an image's builds.

use std::process::ExitCode;

use clap::Args;

use super::{microvm, names, printable::Printer};
use crate::client::{Client, ClientError};

/// `hearth logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Id of a MicroVM, or its beginning; or the name of an image.
    #[arg(value_name = "ID|IMAGE")]
    what: String,
    /// Go on with what is written from now on, until the MicroVM or the build is over.
    #[arg(short, long)]
    follow: bool,
}

/// Prints the log.
pub async fn run(client: Client, args: LogsArgs) -> anyhow::Result<ExitCode> {
    let items = microvm::all(&client).await?;
    let source = match microvm::pick(&items, &args.what) {
        Ok(id) => format!("microvm={}", names::escape(id)),
        Err(names::NameError::Unknown(_)) => format!("image={}", names::escape(names::image_name(&args.what))),
        Err(ambiguous) => return Err(ambiguous.into()),
    };
    let mut printer = Printer::new();
    let print = |bytes: &[u8]| printer.print(bytes);
    match copy(&client, &source, args.follow, print).await {
        // The reader has seen enough: `hearth logs … | head`.
        Err(CopyError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        copied => {
            copied?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// A log could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// the server gave no more
    #[error(transparent)]
    Client(#[from] ClientError),
    /// the output took no more
    #[error("writing the log: {0}")]
    Output(std::io::Error),
}

/// Copies a log to `print` as it comes, until its end.
pub async fn copy(
    client: &Client,
    source: &str,
    follow: bool,
    mut print: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<(), CopyError> {
    let mut chunks = client.stream(&format!("/hearth/v1/logs?{source}&follow={follow}")).await?;
    while let Some(chunk) = chunks.next().await? {
        print(&chunk).map_err(CopyError::Output)?;
    }
    Ok(())
}
