//! `hearth cp`: files into a MicroVM and out of it, by the rules of `docker cp`.

use std::{
    fs,
    io::{self, BufWriter, Read, Write},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use hearth_copy::{Found, pack, place, source_name, unpack};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::tunnel::{Endpoint, Received, Socket};
use crate::client::Client;

const PROTOCOL: &str = "hearth.copy.v1";
const CHUNK: usize = 32 << 10;

/// `hearth cp`.
#[derive(Debug, Args)]
#[command(after_help = "One of the two is ID:PATH, the other a path here, or - for a tar stream.\n\
    As with docker cp, a directory is copied into one that exists, and under the new name if there is none;\n\
    SOURCE/. means the directory's content. Symbolic links are copied, not followed.")]
pub struct CpArgs {
    /// Keep owners, groups and all mode bits.
    #[arg(short, long)]
    archive: bool,
    /// ID:PATH, a path, or -.
    source: String,
    /// A path, ID:PATH, or -.
    destination: String,
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Say<'a> {
    Look { path: &'a str },
    Into { directory: &'a str, archive: bool },
    OutOf { path: &'a str, name: &'a str },
    End,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Told {
    Found { kind: String, link: bool },
    Skipped { what: String },
    Done,
    Failed { reason: String },
}

/// `hearth cp`.
pub async fn run(client: Client, args: CpArgs) -> anyhow::Result<ExitCode> {
    match (remote(&args.source), remote(&args.destination)) {
        (None, Some((id, path))) => copy_in(&Endpoint::find(client, id).await?, &args.source, path, args.archive).await?,
        (Some((id, path)), None) => copy_out(&Endpoint::find(client, id).await?, path, &args.destination, args.archive).await?,
        _ => bail!("one of source and destination must be ID:PATH, and the other a path here or -"),
    }
    Ok(ExitCode::SUCCESS)
}

/// Id and path; a local path with a colon can be written with a slash before it.
fn remote(argument: &str) -> Option<(&str, &str)> {
    let (id, path) = argument.split_once(':')?;
    (!id.is_empty() && !id.contains(['/', '.'])).then_some((id, if path.is_empty() { "/" } else { path }))
}

async fn copy_in(endpoint: &Endpoint, source: &str, destination: &str, archive: bool) -> anyhow::Result<()> {
    if source == "-" {
        let mut socket = endpoint.websocket(PROTOCOL).await?;
        socket.text(&Say::Into { directory: destination, archive: true }).await?;
        return send(socket, |mut out| io::copy(&mut io::stdin().lock(), &mut out).map(drop).context("reading standard input")).await;
    }
    let metadata = fs::symlink_metadata(source).with_context(|| format!("looking at {source}"))?;
    let (found, _) = look(endpoint, destination).await?;
    let place = place(source, metadata.is_dir(), destination, found)?;
    let mut socket = endpoint.websocket(PROTOCOL).await?;
    socket.text(&Say::Into { directory: &place.directory, archive }).await?;
    let source = source.to_owned();
    send(socket, move |out| Ok(pack(Path::new(&source), Path::new(&place.name), BufWriter::with_capacity(CHUNK, out), &mut skipped)?)).await
}

async fn copy_out(endpoint: &Endpoint, source: &str, destination: &str, archive: bool) -> anyhow::Result<()> {
    let (found, link) = look(endpoint, source).await?;
    if found == Found::Missing && !link {
        bail!("{}: {source} is not there", endpoint.id);
    }
    let is_directory = found == Found::Directory && (!link || source.ends_with('/') || source.ends_with("/."));
    if destination == "-" {
        let socket = ask_for(endpoint, source, source_name(source)).await?;
        return receive(socket, |mut input| io::copy(&mut input, &mut io::stdout().lock()).map(drop).context("writing to standard output"))
            .await;
    }
    let here = match fs::metadata(destination) {
        Ok(metadata) if metadata.is_dir() => Found::Directory,
        Ok(_) => Found::File,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Found::Missing,
        Err(error) => return Err(error).with_context(|| format!("looking at {destination}")),
    };
    let place = place(source, is_directory, destination, here)?;
    if !Path::new(&place.directory).is_dir() {
        bail!("the directory {} is not there", place.directory);
    }
    let socket = ask_for(endpoint, source, &place.name).await?;
    receive(socket, move |input| Ok(unpack(input, Path::new(&place.directory), archive, &mut skipped)?)).await
}

async fn ask_for(endpoint: &Endpoint, path: &str, name: &str) -> anyhow::Result<Socket> {
    let mut socket = endpoint.websocket(PROTOCOL).await?;
    socket.text(&Say::OutOf { path, name }).await?;
    Ok(socket)
}

/// What is at a path of the MicroVM, and whether it is a link itself.
async fn look(endpoint: &Endpoint, path: &str) -> anyhow::Result<(Found, bool)> {
    let mut socket = endpoint.websocket(PROTOCOL).await?;
    socket.text(&Say::Look { path }).await?;
    match socket.next().await? {
        Received::Text(Told::Found { kind, link }) => Ok((
            match kind.as_str() {
                "missing" => Found::Missing,
                "directory" => Found::Directory,
                _ => Found::File,
            },
            link,
        )),
        Received::Text(Told::Failed { reason }) => bail!("{}: {reason}", endpoint.id),
        _ => bail!("the server is of another version"),
    }
}

fn skipped(what: String) {
    eprintln!("hearth: left out: {what}");
}

/// Sends what `write` writes, and waits for the guest's word.
async fn send(mut socket: Socket, write: impl FnOnce(Sender) -> anyhow::Result<()> + Send + 'static) -> anyhow::Result<()> {
    let (sender, mut chunks) = mpsc::channel(4);
    let mut writer = Some(tokio::task::spawn_blocking(move || write(Sender(sender))));
    loop {
        tokio::select! {
            chunk = chunks.recv(), if writer.is_some() => match chunk {
                Some(chunk) => socket.binary(chunk).await?,
                None => {
                    // Without an end, the guest knows that this was not all.
                    writer.take().expect("looked at above").await??;
                    socket.text(&Say::End).await?;
                }
            },
            received = socket.next() => match received? {
                Received::Text(Told::Done) => return Ok(()),
                Received::Text(Told::Failed { reason }) => bail!("{reason}"),
                Received::Text(Told::Skipped { what }) => skipped(what),
                Received::Text(Told::Found { .. }) | Received::Binary(_) => bail!("the server is of another version"),
            },
        }
    }
}

/// Has `read` read what the guest sends.
async fn receive(mut socket: Socket, read: impl FnOnce(Receiver) -> anyhow::Result<()> + Send + 'static) -> anyhow::Result<()> {
    let (chunks, receiver) = mpsc::channel(4);
    let reader = tokio::task::spawn_blocking(move || read(Receiver { chunks: receiver, left: Bytes::new() }));
    let received = async {
        loop {
            match socket.next().await? {
                Received::Binary(bytes) => {
                    if chunks.send(Ok(bytes)).await.is_err() {
                        // The reader knows why it stopped.
                        return Ok(());
                    }
                }
                Received::Text(Told::Done) => return Ok(()),
                Received::Text(Told::Failed { reason }) => bail!("{reason}"),
                Received::Text(Told::Skipped { what }) => skipped(what),
                Received::Text(Told::Found { .. }) => bail!("the server is of another version"),
            }
        }
    }
    .await;
    if received.is_err() {
        let _ = chunks.send(Err(io::ErrorKind::UnexpectedEof.into())).await;
    }
    drop(chunks);
    let read = reader.await?;
    received.and(read)
}

/// Writes to the session from a thread that may wait.
struct Sender(mpsc::Sender<Vec<u8>>);

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(CHUNK);
        self.0.blocking_send(bytes[..count].to_vec()).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads from the session on a thread that may wait.
struct Receiver {
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    left: Bytes,
}

impl Read for Receiver {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.left = chunk?,
                None => return Ok(0),
            }
        }
        let count = self.left.len().min(into.len());
        into[..count].copy_from_slice(&self.left.split_to(count));
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_an_id_before_its_colon_is_in_a_microvm() {
        assert_eq!(remote("microvm-0d2b:/etc"), Some(("microvm-0d2b", "/etc")));
        assert_eq!(remote("0d2b:"), Some(("0d2b", "/")));
        assert_eq!(remote("0d2b:a:b"), Some(("0d2b", "a:b")));
        for here in ["-", "file", "./a:b", "/a:b", ":x"] {
            assert_eq!(remote(here), None, "{here}");
        }
    }
}
