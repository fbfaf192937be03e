//! The host's side of a session with a guest: from the marker and `Hello` to `Detach` and the marker that answers it.

use std::{
    io,
    os::unix::net::UnixStream as StdUnixStream,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use hearth_guest_protocol::{
    self as protocol, App, Carrier, DialReply, GuestMessage, Hello, HookCall, HookReply, HostMessage, Marker, MarkerTrigger, MarkerWatch,
    Mux, MuxError, Network, Parting, Ready, Stream, StreamHeader, read_message, write_message,
};
use tokio::{
    io::{AsyncWriteExt, ReadHalf, WriteHalf},
    net::UnixStream,
    sync::{Mutex, mpsc, oneshot, watch},
    task::{AbortHandle, JoinHandle},
    time::timeout,
};

use crate::{
    engine::{Dial, DialError, GuestError, GuestServices, GuestStream, HookError, MachineEvent, Target},
    requests,
};

/// How long a guest may take to let go of a session, or to start a process.
const ANSWER: Duration = Duration::from_secs(10);
/// How long it may take to answer a connection. A port where nothing listens is refused at once; an app that has more connections waiting than
/// it takes is found by its kernel's next tries, after 1, 3, 7, 15 and 31 seconds.
const DIAL: Duration = Duration::from_secs(60);
/// How much longer than a hook may take the guest may take to say that it took too long.
const HOOK_MARGIN: Duration = Duration::from_secs(2);
/// How long it may take to let go of a session if it is to clear its memory first: some gigabytes, on a busy host, under emulation.
const TRIMMED: Duration = Duration::from_secs(90);

/// Who the guest is in this life.
#[derive(Debug)]
pub struct Identity {
    pub vm_id: String,
    pub generation: u64,
    pub network: Option<Network>,
    /// What it may ask of the host.
    pub services: Arc<dyn GuestServices>,
}

/// An open session.
#[derive(Debug)]
pub struct Session {
    control: Mutex<WriteHalf<Stream>>,
    started: watch::Receiver<Option<Result<(), String>>>,
    dialer: Arc<SessionDialer>,
    trigger: MarkerTrigger,
    driver: AbortHandle,
    /// Ends after the session's task, which then holds the channel no more.
    driven: JoinHandle<()>,
    ended: Mutex<Option<oneshot::Receiver<()>>>,
}

#[derive(Debug)]
struct SessionDialer {
    mux: Mux,
}

impl Session {
    /// Opens a session on a machine's channel. `marker` is [`protocol::BOOT_MARKER`] after boot, else the one that ended the last session.
    pub async fn open(
        channel: StdUnixStream,
        marker: Marker,
        identity: Identity,
        deadline: Duration,
        events: mpsc::Sender<MachineEvent>,
    ) -> Result<Self, GuestError> {
        let what = "say ready";
        timeout(deadline, Self::greet(channel, marker, identity, events))
            .await
            .map_err(|_| GuestError::Timeout { what, timeout: deadline })?
    }

    async fn greet(
        channel: StdUnixStream,
        marker: Marker,
        identity: Identity,
        events: mpsc::Sender<MachineEvent>,
    ) -> Result<Self, GuestError> {
        channel.set_nonblocking(true).map_err(broken)?;
        let mut io = UnixStream::from_std(channel).map_err(broken)?;
        io.write_all(&marker).await.map_err(broken)?;
        let (io, trigger) = MarkerWatch::new(io);
        let (mux, driver) = Mux::client(io);
        let mut control = mux.open().await.map_err(broken)?;
        write_message(&mut control, &StreamHeader::Control).await.map_err(broken)?;
        let hello = Hello {
            protocol: protocol::VERSION,
            vm_id: identity.vm_id,
            generation: identity.generation,
            entropy: entropy().map_err(broken)?,
            network: identity.network,
        };
        write_message(&mut control, &HostMessage::Hello(hello)).await.map_err(broken)?;
        loop {
            match read_message(&mut control).await.map_err(broken)? {
                GuestMessage::NotReady { reason } => return Err(GuestError::NotReady(reason)),
                GuestMessage::AskTime => {
                    write_message(&mut control, &HostMessage::Time { wall_clock_ns: wall_clock_ns() }).await.map_err(broken)?;
                }
                GuestMessage::Ready(Ready { protocol: guest, .. }) if guest != protocol::VERSION => {
                    return Err(GuestError::Protocol { guest, host: protocol::VERSION });
                }
                GuestMessage::Ready(_) => break,
                other => return Err(GuestError::Session(format!("the guest said {other:?} instead of ready"))),
            }
        }
        let (reader, writer) = tokio::io::split(control);
        let (report_start, started) = watch::channel(None);
        tokio::spawn(read_control(reader, report_start, events.clone()));
        tokio::spawn(requests::accept(driver.inbound, identity.services, events));
        let (report_end, ended) = oneshot::channel();
        let abort = driver.task.abort_handle();
        let driven = tokio::spawn(async move {
            // Aborted when the host drops the session: that is no news to anyone.
            if driver.task.await.is_ok() {
                let _ = report_end.send(());
            }
        });
        Ok(Self {
            control: Mutex::new(writer),
            started,
            dialer: Arc::new(SessionDialer { mux }),
            trigger,
            driver: abort,
            driven,
            ended: Mutex::new(Some(ended)),
        })
    }

    /// Resolves when the guest breaks the session off; with an error when the host ended it. Can be taken once.
    pub async fn take_end(&self) -> Option<oneshot::Receiver<()>> {
        self.ended.lock().await.take()
    }

    /// Starts the application.
    pub async fn start(&self, app: App) -> Result<(), GuestError> {
        let mut started = self.started.clone();
        let exchange = async {
            write_message(&mut *self.control.lock().await, &HostMessage::Start(app)).await.map_err(broken)?;
            let answer = started.wait_for(Option::is_some).await.map_err(broken)?;
            answer.clone().expect("waited until it is there").map_err(GuestError::App)
        };
        timeout(ANSWER, exchange).await.map_err(|_| GuestError::Timeout { what: "start the application", timeout: ANSWER })?
    }

    /// Sends the application its stop signal.
    pub async fn stop(&self) -> Result<(), GuestError> {
        let write = async { write_message(&mut *self.control.lock().await, &HostMessage::Stop).await.map_err(broken) };
        timeout(ANSWER, write).await.map_err(|_| GuestError::Timeout { what: "take the order to stop", timeout: ANSWER })?
    }

    /// Connects to ports of the guest.
    pub fn dialer(&self) -> Arc<dyn Dial> {
        self.dialer.clone()
    }

    /// Ends the session and returns the marker that begins the next one. When this returns, neither side reads or writes anything any more, and
    /// the application stands still.
    pub async fn detach(mut self, parting: Parting) -> Result<Marker, GuestError> {
        let random: [u8; 16] = entropy().map_err(broken)?[..16].try_into().expect("more than 16 bytes were drawn");
        let marker = protocol::new_marker(random);
        let seen = self.trigger.arm(marker);
        let deadline = if matches!(parting, Parting::Capture { .. }) { TRIMMED } else { ANSWER };
        let exchange = async {
            write_message(&mut *self.control.lock().await, &HostMessage::Detach { marker, parting }).await.map_err(broken)?;
            seen.await.map_err(|_| broken("it ended before the guest answered `Detach`"))
        };
        let unanswered = |_| GuestError::Timeout { what: "let go of its session", timeout: deadline };
        timeout(deadline, exchange).await.map_err(unanswered)??;
        self.driver.abort();
        // Its only failure would be a panic of the task, which ended it as well.
        let _ = (&mut self.driven).await;
        Ok(marker)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

#[async_trait]
impl Dial for SessionDialer {
    async fn open(&self, target: &Target) -> Result<Box<dyn GuestStream>, DialError> {
        let header = match target.clone() {
            Target::Port(port) => StreamHeader::Dial { port },
            Target::Process(exec) => StreamHeader::Exec(exec),
            Target::Files(copy) => StreamHeader::Copy(copy),
        };
        let gone = |error: &dyn std::fmt::Display| DialError::Gone(error.to_string());
        let failed = |reason| DialError::Failed { target: target.clone(), reason };
        let connect = async {
            let mut stream = self.mux.open().await.map_err(|error| match error {
                MuxError::Full => failed(error.to_string()),
                error => gone(&error),
            })?;
            write_message(&mut stream, &header).await.map_err(|error| gone(&error))?;
            let reply = read_message(&mut stream).await.map_err(|error| gone(&error))?;
            Ok((stream, reply))
        };
        let timed_out = |_| failed(format!("the guest did not answer within {} s", DIAL.as_secs()));
        match timeout(DIAL, connect).await.map_err(timed_out)?? {
            (stream, DialReply::Connected) if matches!(target, Target::Port(_)) => Ok(Box::new(Carrier::new(stream))),
            (stream, DialReply::Connected) => Ok(Box::new(stream)),
            (_, DialReply::Refused) => Err(DialError::Refused(target.clone())),
            (_, DialReply::Failed { reason }) => Err(failed(reason)),
        }
    }

    async fn call_hook(&self, call: HookCall) -> Result<HookReply, HookError> {
        let gone = |error: &dyn std::fmt::Display| HookError::Gone(error.to_string());
        let limit = Duration::from_millis(call.timeout_ms) + HOOK_MARGIN;
        let exchange = async {
            let mut stream = self.mux.open().await.map_err(|error| gone(&error))?;
            write_message(&mut stream, &StreamHeader::Hook(call)).await.map_err(|error| gone(&error))?;
            read_message(&mut stream).await.map_err(|error| gone(&error))
        };
        timeout(limit, exchange).await.unwrap_or(Ok(HookReply::TimedOut))
    }
}

async fn read_control(
    mut reader: ReadHalf<Stream>,
    started: watch::Sender<Option<Result<(), String>>>,
    events: mpsc::Sender<MachineEvent>,
) {
    while let Ok(message) = read_message(&mut reader).await {
        let event = match message {
            GuestMessage::Started { .. } => {
                started.send_replace(Some(Ok(())));
                continue;
            }
            GuestMessage::StartFailed { reason } => {
                started.send_replace(Some(Err(reason)));
                continue;
            }
            GuestMessage::Listening { port } => MachineEvent::Listening(port),
            GuestMessage::Activity(activity) => MachineEvent::Activity(activity),
            GuestMessage::Exited(status) => MachineEvent::AppExited(status),
            GuestMessage::Ready(_) | GuestMessage::NotReady { .. } | GuestMessage::AskTime => continue,
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

fn wall_clock_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

fn entropy() -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 64];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes)
}

fn broken(error: impl std::fmt::Display) -> GuestError {
    GuestError::Session(error.to_string())
}
