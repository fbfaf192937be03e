//! Carries the frames of one [`hearth_guest_protocol::StreamHeader::Exec`] stream. Output is read no faster than the host takes it. Input
//! is bounded by the window, so that the host is heard at any time, also when the process does not read.

use std::{convert::Infallible, io, sync::atomic::AtomicU32, sync::atomic::Ordering};

use hearth_guest_protocol::{EXEC_WINDOW_BYTES, ExecInput, ExecOutput, Stream, WireError, read_message, write_message};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    net::unix::pipe,
    sync::mpsc,
};

use super::process::{Control, End, Ends, Process};

/// Read at once from the process.
const CHUNK: usize = 16 << 10;
/// No pipe holds more than this: what is beyond was not written by a process that has ended.
const LAST_WORDS: usize = 1 << 20;
/// Ends the input of whoever reads a terminal.
const END_OF_TRANSMISSION: &[u8] = &[4];

/// Input on its way to the process.
enum Feed {
    Bytes(Vec<u8>),
    End,
}

/// Serves until the process has ended and all is told, or the host has gone. The process is hung up on then.
pub async fn hold(stream: Stream, mut process: Process) -> Result<(), WireError> {
    let (reader, mut writer) = tokio::io::split(stream);
    let Some(Ends { input, output, error }) = process.ends.take() else { return Ok(()) };
    let waiting = AtomicU32::new(0);
    let (feed, fed) = mpsc::unbounded_channel();
    let (taken, mut all_taken) = mpsc::unbounded_channel();
    let hear = hear(reader, &process.control, &waiting, feed);
    let pass_on = pass_on(fed, input, &waiting, taken, process.control.has_terminal());
    let tell = tell(&mut writer, output, error, &mut all_taken, &mut process.end);
    tokio::select! {
        told = tell => told?,
        ended = hear => return ended,
        never = pass_on => match never {},
    }
    writer.shutdown().await?;
    Ok(())
}

/// Takes the host's messages until it goes.
async fn hear(
    mut reader: ReadHalf<Stream>,
    control: &Control,
    waiting: &AtomicU32,
    feed: mpsc::UnboundedSender<Feed>,
) -> Result<(), WireError> {
    loop {
        let fed = match read_message(&mut reader).await? {
            ExecInput::Stdin(bytes) => {
                let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                if waiting.fetch_add(length, Ordering::Relaxed).saturating_add(length) > EXEC_WINDOW_BYTES {
                    return Err(WireError::TooLong(bytes.len()));
                }
                Feed::Bytes(bytes)
            }
            ExecInput::StdinEnd => Feed::End,
            ExecInput::Resize(size) => {
                control.resize(size);
                continue;
            }
            ExecInput::Signal(signal) => {
                control.signal(signal);
                continue;
            }
        };
        // The other end lives as long as this one.
        let _ = feed.send(fed);
    }
}

/// Writes input to the process as it takes it. What it does not want any more counts as taken.
async fn pass_on(
    mut fed: mpsc::UnboundedReceiver<Feed>,
    input: pipe::Sender,
    waiting: &AtomicU32,
    taken: mpsc::UnboundedSender<u32>,
    terminal: bool,
) -> Infallible {
    let mut input = Some(input);
    while let Some(fed) = fed.recv().await {
        match fed {
            Feed::Bytes(bytes) => {
                if let Some(open) = &mut input
                    && open.write_all(&bytes).await.is_err()
                {
                    input = None;
                }
                let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                waiting.fetch_sub(length, Ordering::Relaxed);
                let _ = taken.send(length);
            }
            Feed::End if terminal => {
                if let Some(open) = &mut input {
                    let _ = open.write_all(END_OF_TRANSMISSION).await;
                }
            }
            Feed::End => input = None,
        }
    }
    std::future::pending().await
}

/// Tells the host what the process writes, and its end.
async fn tell(
    writer: &mut WriteHalf<Stream>,
    output: pipe::Receiver,
    error: Option<pipe::Receiver>,
    taken: &mut mpsc::UnboundedReceiver<u32>,
    end: &mut End,
) -> Result<(), WireError> {
    write_message(writer, &ExecOutput::Started).await?;
    let (mut output, mut error) = (Some(output), error);
    let (mut from_output, mut from_error) = (vec![0; CHUNK], vec![0; CHUNK]);
    let status = loop {
        tokio::select! {
            count = read(&mut output, &mut from_output) => match count {
                Some(count) => write_message(writer, &ExecOutput::Stdout(from_output[..count].to_vec())).await?,
                None => output = None,
            },
            count = read(&mut error, &mut from_error) => match count {
                Some(count) => write_message(writer, &ExecOutput::Stderr(from_error[..count].to_vec())).await?,
                None => error = None,
            },
            Some(length) = taken.recv() => write_message(writer, &ExecOutput::StdinTaken(length)).await?,
            status = end.wait() => break status,
        }
    };
    // All that the process has written is there by now; others that have its output may go on, but not here.
    for (source, wrap) in [(output, ExecOutput::Stdout as fn(Vec<u8>) -> ExecOutput), (error, ExecOutput::Stderr)] {
        let mut left = LAST_WORDS;
        while let Some(source) = &source
            && left > 0
            && let Some(count) = read_now(source, &mut from_output)
        {
            left = left.saturating_sub(count);
            write_message(writer, &wrap(from_output[..count].to_vec())).await?;
        }
    }
    write_message(writer, &ExecOutput::Exited(status)).await
}

/// The next bytes; nothing at the end, which is an error with a terminal; waits for ever where there is nothing to read from.
async fn read(source: &mut Option<pipe::Receiver>, into: &mut [u8]) -> Option<usize> {
    match source {
        Some(source) => source.read(into).await.ok().filter(|&count| count > 0),
        None => std::future::pending().await,
    }
}

/// What is there without waiting. Not by tokio's idea of readiness, which may be behind.
fn read_now(source: &pipe::Receiver, into: &mut [u8]) -> Option<usize> {
    let result: io::Result<usize> = nix::unistd::read(source, into).map_err(io::Error::from);
    result.ok().filter(|&count| count > 0)
}
