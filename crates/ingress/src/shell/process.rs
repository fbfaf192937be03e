//! A process of the MicroVM behind a WebSocket: as the service's shell (SPEC 11), or as `hearth.exec.v1`.

use std::collections::BTreeMap;

use hearth_guest_protocol::{
    EXEC_WINDOW_BYTES, Exec, ExecInput, ExecOutput, ExitStatus, TerminalSize, WireError, read_message, write_message,
};
use hearth_machine::Target;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{ReadHalf, WriteHalf},
    sync::Semaphore,
};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use super::{
    GuestIo, Opener, Stopped, farewell,
    socket::{Farewell, Inbound, Out, Socket},
};

/// Bytes of input in one message to the guest.
const CHUNK: usize = 16 << 10;

/// First byte of binary messages of `hearth.exec.v1`.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;

/// Which messages the client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Shell,
    Exec,
}

/// Text of the service's shell. Whatever else is text is typed.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ShellControl {
    Resize { cols: u16, rows: u16 },
}

/// Text from a client of `hearth.exec.v1`.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ExecControl {
    Resize { cols: u16, rows: u16 },
    StdinEnd,
    Signal { signal: i32 },
}

/// First text from a client of `hearth.exec.v1`.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum First {
    Start {
        #[serde(default)]
        argv: Vec<String>,
        #[serde(default)]
        env: BTreeMap<String, String>,
        cwd: Option<String>,
        user: Option<String>,
        terminal: Option<Size>,
    },
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Size {
    cols: u16,
    rows: u16,
}

/// Text to a client.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Told {
    SessionInit { session_id: Uuid },
    Started,
    Window { bytes: u32 },
    Exited { code: i32 },
    Failed { reason: String },
}

/// The service's shell.
pub(super) async fn shell(socket: &mut Socket, guest: GuestIo) -> Farewell {
    if socket.out.text(&Told::SessionInit { session_id: Uuid::new_v4() }).await.is_err() {
        return Farewell::client_left();
    }
    converse(socket, guest, Dialect::Shell).await
}

/// `hearth.exec.v1`.
pub(super) async fn exec(socket: &mut Socket, opener: &Opener) -> Farewell {
    let first = match socket.first().await {
        Ok(first) => first,
        Err(farewell) => return farewell,
    };
    let Ok(First::Start { argv, env, cwd, user, terminal }) = serde_json::from_str(&first) else {
        return Farewell::protocol("the first message must be {\"type\": \"start\", …}");
    };
    let terminal = terminal.map(size);
    let target = Target::Process(Exec { argv, env: env.into_iter().collect(), cwd, user, terminal });
    let opened = tokio::select! {
        opened = opener.open(&target) => opened,
        // It may not speak before it is told that the process runs.
        _ = socket.inbound.next() => return Farewell::client_left(),
    };
    match opened {
        Ok(guest) => converse(socket, guest, Dialect::Exec).await,
        Err(error) => {
            let _ = socket.out.text(&Told::Failed { reason: error.to_string() }).await;
            Farewell::failed("the process was not started")
        }
    }
}

async fn converse(socket: &mut Socket, guest: GuestIo, dialect: Dialect) -> Farewell {
    let (mut reader, mut writer) = tokio::io::split(guest);
    let window = Semaphore::new(EXEC_WINDOW_BYTES as usize);
    let stopped = tokio::select! {
        stopped = inbound(&mut socket.inbound, &mut writer, &window, dialect) => stopped,
        stopped = outbound(&mut reader, &mut socket.out, &window, dialect) => stopped,
    };
    farewell(stopped)
}

/// Passes on what the client says until it leaves.
async fn inbound(from: &mut Inbound, guest: &mut WriteHalf<GuestIo>, window: &Semaphore, dialect: Dialect) -> Result<(), Stopped> {
    while let Some(message) = from.next().await {
        match (dialect, message) {
            (Dialect::Shell, Message::Binary(bytes)) => stdin(guest, window, &bytes).await?,
            (Dialect::Shell, Message::Text(text)) => match serde_json::from_str(&text) {
                Ok(ShellControl::Resize { cols, rows }) => write_message(guest, &ExecInput::Resize(size(Size { cols, rows }))).await?,
                Err(_) => stdin(guest, window, text.as_bytes()).await?,
            },
            (Dialect::Exec, Message::Binary(bytes)) if bytes.first() == Some(&STDIN) => stdin(guest, window, &bytes[1..]).await?,
            (Dialect::Exec, Message::Text(text)) => {
                let input = match serde_json::from_str(&text) {
                    Ok(ExecControl::Resize { cols, rows }) => ExecInput::Resize(size(Size { cols, rows })),
                    Ok(ExecControl::StdinEnd) => ExecInput::StdinEnd,
                    Ok(ExecControl::Signal { signal }) => ExecInput::Signal(signal),
                    Err(_) => return Err(Stopped::Ended(Farewell::protocol("a text message is not understood"))),
                };
                write_message(guest, &input).await?;
            }
            (_, _) => return Err(Stopped::Ended(Farewell::protocol("a binary message must begin with the byte 0"))),
        }
    }
    Ok(())
}

/// Sends input as fast as the process takes it.
async fn stdin(guest: &mut WriteHalf<GuestIo>, window: &Semaphore, bytes: &[u8]) -> Result<(), WireError> {
    for chunk in bytes.chunks(CHUNK) {
        let length = u32::try_from(chunk.len()).expect("a chunk is small");
        window.acquire_many(length).await.expect("the window is never closed").forget();
        write_message(guest, &ExecInput::Stdin(chunk.to_vec())).await?;
    }
    Ok(())
}

/// Passes on what the guest says until the process's end.
async fn outbound(from: &mut ReadHalf<GuestIo>, client: &mut Out, window: &Semaphore, dialect: Dialect) -> Result<(), Stopped> {
    loop {
        match (dialect, read_message(from).await?) {
            (_, ExecOutput::StdinTaken(bytes)) => {
                window.add_permits(bytes as usize);
                if dialect == Dialect::Exec {
                    client.text(&Told::Window { bytes }).await?;
                }
            }
            (Dialect::Shell, ExecOutput::Started) => {}
            (Dialect::Shell, ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes)) => client.binary(bytes).await?,
            (Dialect::Shell, ExecOutput::Exited(_)) => return Err(Stopped::Ended(Farewell::normal("shell exited"))),
            (Dialect::Shell, ExecOutput::Failed { reason }) => return Err(Stopped::Ended(Farewell::failed(reason))),
            (Dialect::Exec, ExecOutput::Started) => client.text(&Told::Started).await?,
            (Dialect::Exec, ExecOutput::Stdout(bytes)) => client.binary(channel(STDOUT, &bytes)).await?,
            (Dialect::Exec, ExecOutput::Stderr(bytes)) => client.binary(channel(STDERR, &bytes)).await?,
            (Dialect::Exec, ExecOutput::Exited(ExitStatus { code, .. })) => {
                client.text(&Told::Exited { code }).await?;
                return Err(Stopped::Ended(Farewell::normal("the process exited")));
            }
            (Dialect::Exec, ExecOutput::Failed { reason }) => {
                client.text(&Told::Failed { reason }).await?;
                return Err(Stopped::Ended(Farewell::failed("the process was not started")));
            }
        }
    }
}

fn channel(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(1 + bytes.len());
    message.push(number);
    message.extend_from_slice(bytes);
    message
}

fn size(Size { cols, rows }: Size) -> TerminalSize {
    TerminalSize { columns: cols, rows }
}
