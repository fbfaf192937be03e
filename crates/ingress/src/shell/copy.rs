//! Files of the MicroVM behind a WebSocket: `hearth.copy.v1`. One request each: what is at a path, files in, or files out.

use hearth_guest_protocol::{CopyInput, CopyOutput, FileCopy, FileKind, read_message, write_message};
use hearth_machine::Target;
use serde::{Deserialize, Serialize};
use tokio::io::{ReadHalf, WriteHalf};
use tokio_tungstenite::tungstenite::Message;

use super::{
    GuestIo, Opener, Stopped, farewell,
    socket::{Farewell, Inbound, Out, Socket},
};

/// Bytes of a tar stream in one message to the guest.
const CHUNK: usize = 32 << 10;

/// First text from a client.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum First {
    Look {
        path: String,
    },
    Into {
        directory: String,
        #[serde(default)]
        archive: bool,
    },
    OutOf {
        path: String,
        name: String,
    },
}

/// Later text from a client.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Said {
    End,
}

/// Text to a client.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Told {
    Found { kind: &'static str, link: bool },
    Skipped { what: String },
    Done,
    Failed { reason: String },
}

/// Serves one request.
pub(super) async fn run(socket: &mut Socket, opener: &Opener) -> Farewell {
    let first = match socket.first().await {
        Ok(first) => first,
        Err(farewell) => return farewell,
    };
    let copy = match serde_json::from_str(&first) {
        Ok(First::Look { path }) => FileCopy::Look { path },
        Ok(First::Into { directory, archive }) => FileCopy::Into { directory, archive },
        Ok(First::OutOf { path, name }) => FileCopy::OutOf { path, name },
        Err(_) => return Farewell::protocol("the first message must be of type look, into or out_of"),
    };
    let guest = match opener.open(&Target::Files(copy)).await {
        Ok(guest) => guest,
        Err(error) => {
            let _ = socket.out.text(&Told::Failed { reason: error.to_string() }).await;
            return Farewell::failed("the copy failed");
        }
    };
    let (mut reader, mut writer) = tokio::io::split(guest);
    let (inbound, outbound) = (inbound(&mut socket.inbound, &mut writer), outbound(&mut reader, &mut socket.out));
    tokio::pin!(inbound, outbound);
    let stopped = tokio::select! {
        stopped = &mut inbound => match stopped {
            // The guest may have said why before it stopped listening.
            Err(Stopped::Guest) => outbound.await,
            other => other,
        },
        stopped = &mut outbound => stopped,
    };
    farewell(stopped)
}

async fn inbound(from: &mut Inbound, guest: &mut WriteHalf<GuestIo>) -> Result<(), Stopped> {
    while let Some(message) = from.next().await {
        match message {
            Message::Binary(bytes) => {
                for chunk in bytes.chunks(CHUNK) {
                    write_message(guest, &CopyInput::Data(chunk.to_vec())).await?;
                }
            }
            Message::Text(text) if matches!(serde_json::from_str(&text), Ok(Said::End)) => write_message(guest, &CopyInput::End).await?,
            _ => return Err(Stopped::Ended(Farewell::protocol("a text message is not understood"))),
        }
    }
    Ok(())
}

async fn outbound(from: &mut ReadHalf<GuestIo>, client: &mut Out) -> Result<(), Stopped> {
    loop {
        match read_message(from).await? {
            CopyOutput::Data(bytes) => client.binary(bytes).await?,
            CopyOutput::Found { kind, link } => client.text(&Told::Found { kind: name(kind), link }).await?,
            CopyOutput::Skipped { what } => client.text(&Told::Skipped { what }).await?,
            CopyOutput::Done => {
                client.text(&Told::Done).await?;
                return Err(Stopped::Ended(Farewell::normal("")));
            }
            CopyOutput::Failed { reason } => {
                client.text(&Told::Failed { reason }).await?;
                return Err(Stopped::Ended(Farewell::failed("the copy failed")));
            }
        }
    }
}

fn name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Missing => "missing",
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Special => "special",
    }
}
