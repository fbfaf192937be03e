//! Sessions with the host, one after another, for ever. Whatever goes wrong in one ends that session and nothing else.

use std::{
    convert::Infallible,
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use hearth_guest_protocol::{
    App, BOOT_MARKER, GuestMessage, Hello, HostMessage, LogSource, Marker, Mux, Parting, Ready, Stream, StreamHeader, VERSION, WireError,
    await_marker, mux::MuxDriver, read_message, write_message, write_messages,
};
use nix::unistd::Pid;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    app::{Application, StartError},
    boot::{Machine, ROOTFS},
    cgroup, connections, copy, dial, exec,
    freezer::Freezer,
    generation::{self, Counter},
    hook,
    identity::{self, Names},
    listen::Watch,
    logs::Logs,
    metadata::Metadata,
    network,
    port::Port,
    rest::Counters,
    trim,
};

/// A port that fails is tried again after this: nothing announces that the kernel has changed its mind.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// How long log lines may hold up other news, the end of the application or of the session, without the host taking one.
const LOGS_PATIENCE: Duration = Duration::from_millis(500);
/// An answer to the question for the time that comes within this is good: the clock is right to half of it.
const GOOD_ANSWER: Duration = Duration::from_millis(20);
/// How long to ask before the best answer has to do: the host is very busy.
const TIME_DEADLINE: Duration = Duration::from_secs(2);
/// How long the host may take to read why there is no session.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(5);
/// How long the host may take to read the marker that answers `Detach`.
const MARKER_DEADLINE: Duration = Duration::from_secs(10);

/// Why a session ended early.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("the host closed the session")]
    Closed,
    #[error("the first stream is for {0:?}, not for control")]
    NotControl(StreamHeader),
    #[error("the first message is {0:?}, not Hello")]
    NotHello(HostMessage),
    #[error("the host said {0:?} when asked for the time")]
    NotTime(HostMessage),
    #[error("the host speaks protocol {host}, this guest {VERSION}: the image must be built again")]
    Protocol { host: u32 },
    #[error("this life could not begin: {0}")]
    NotReady(String),
    #[error("the host did not read the answer to Detach in time")]
    MarkerUnread,
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// How the host ended a session.
struct Farewell {
    /// To be answered; it begins the next session.
    marker: Marker,
    parting: Parting,
}

/// What outlives a session.
struct Guest {
    kernel: String,
    application: Arc<Application>,
    logs: Logs,
    names: Names,
    freezer: Freezer,
    metadata: Metadata,
    counter: Counter,
    /// The MicroVM's id and generation, as the last session's host said.
    life: Option<(String, u64)>,
}

/// Serves the host until the machine stops.
pub async fn serve(machine: &Machine) -> anyhow::Result<Infallible> {
    let logs = Logs::default();
    let application = Arc::new(Application::new(logs.clone()));
    tokio::spawn({
        let application = Arc::clone(&application);
        async move { application.reap().await }
    });
    let mut guest = Guest {
        kernel: machine.kernel.clone(),
        application,
        logs,
        names: Names::new(Path::new(ROOTFS)),
        freezer: Freezer::new(Path::new(cgroup::APP)),
        metadata: Metadata::start(),
        counter: Counter::create(Path::new(generation::DIRECTORY)).context("making the generation counter")?,
        life: None,
    };
    let port = Port::open(&machine.port).with_context(|| format!("opening {}", machine.port.display()))?;
    // Begins the next session; stays the same when a session breaks off.
    let mut marker = BOOT_MARKER;
    loop {
        port.connected().await?;
        match await_marker(&mut port.clone(), &marker).await {
            Ok(()) => {
                if let Err(error) = guest.session(&port, &mut marker).await {
                    eprintln!("hearth-guest: session: {error}");
                }
            }
            // The host went away again.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(error) => {
                eprintln!("hearth-guest: reading {}: {error}", machine.port.display());
                sleep(RETRY_DELAY).await;
            }
        }
    }
}

impl Guest {
    /// One session. Nothing of it is left when this returns.
    async fn session(&mut self, port: &Port, marker: &mut Marker) -> Result<(), SessionError> {
        let (mux, mut driver) = Mux::server(port.clone());
        let mut tasks = JoinSet::new();
        let result = self.converse(&mux, &mut driver, &mut tasks).await;
        self.metadata.leave();
        // First the application's side of the connections that the proxy had, then the host's.
        tasks.shutdown().await;
        driver.task.abort();
        let _ = (&mut driver.task).await;
        let Farewell { marker: answer, parting } = result?;
        if let Parting::Capture { touched } = parting {
            self.tell_failure(trim::trim(touched));
        }
        *marker = answer;
        let answered = match timeout(MARKER_DEADLINE, port.clone().write_all(marker)).await {
            Ok(written) => written.map_err(SessionError::from),
            Err(_) => Err(SessionError::MarkerUnread),
        };
        if answered.is_err() {
            // The host that wanted the application to stand still is gone, and nothing has happened to the machine.
            self.tell_failure(self.freezer.thaw());
        }
        answered
    }

    /// Serves the host until `Detach`. The application is frozen then.
    async fn converse(&mut self, mux: &Mux, driver: &mut MuxDriver, tasks: &mut JoinSet<()>) -> Result<Farewell, SessionError> {
        let (reader, mut writer) = tokio::io::split(self.greet(driver).await?);
        let vm_id = self.life.as_ref().map_or("", |(vm_id, _)| vm_id);
        self.metadata.enter(mux.clone(), vm_id);
        let (shipper, stop_shipping) = ship_logs(mux.clone(), self.logs.clone());
        let shipper = tasks.spawn(shipper);

        let (news, mut outgoing) = mpsc::channel(64);
        let mut commands = read_commands(reader, tasks);
        tasks.spawn(announce_exit(self.application.clone(), self.logs.clone(), news.clone()));
        let farewell = loop {
            tokio::select! {
                stream = driver.inbound.recv() => {
                    tasks.spawn(serve_stream(stream.ok_or(SessionError::Closed)?, self.application.clone()));
                }
                Some(message) = outgoing.recv() => write_message(&mut writer, &message).await?,
                command = commands.recv() => match command.ok_or(SessionError::Closed)?? {
                    HostMessage::Start(app) => self.start(&app, &mut writer, &news, tasks).await?,
                    HostMessage::Detach { marker, parting } => break Farewell { marker, parting },
                    HostMessage::Stop => if let Err(error) = self.application.stop().await {
                        eprintln!("hearth-guest: stopping the application: {error}");
                    },
                    HostMessage::Time { .. } => {}
                    unexpected @ HostMessage::Hello(_) => return Err(SessionError::NotHello(unexpected)),
                },
            }
            // Streams and watches that have ended are of no interest.
            while tasks.try_join_next().is_some() {}
        };
        let frozen = self.freezer.freeze().await;
        self.tell_failure(frozen);
        if farewell.parting == Parting::End {
            self.logs.finish();
        }
        // What the application has written so far should be known before the machine stops.
        self.logs.drained(LOGS_PATIENCE).await;
        drop(stop_shipping);
        let shipped = async {
            while !shipper.is_finished() {
                if tasks.join_next().await.is_none() {
                    break;
                }
            }
        };
        let _ = timeout(LOGS_PATIENCE, shipped).await;
        Ok(farewell)
    }

    /// Everything up to `Ready`.
    async fn greet(&mut self, driver: &mut MuxDriver) -> Result<Stream, SessionError> {
        let mut control = driver.inbound.recv().await.ok_or(SessionError::Closed)?;
        match read_message(&mut control).await? {
            StreamHeader::Control => {}
            other => return Err(SessionError::NotControl(other)),
        }
        let hello = match read_message(&mut control).await? {
            HostMessage::Hello(hello) => hello,
            other => return Err(SessionError::NotHello(other)),
        };
        if hello.protocol == VERSION
            && let Err(error) = self.take_over(&hello, &mut control).await?
        {
            let reason = format!("{error:#}");
            refuse(&mut control, &GuestMessage::NotReady { reason: reason.clone() }).await?;
            return Err(SessionError::NotReady(reason));
        }
        let ready = GuestMessage::Ready(Ready { protocol: VERSION, kernel: self.kernel.clone() });
        if hello.protocol != VERSION {
            refuse(&mut control, &ready).await?;
            return Err(SessionError::Protocol { host: hello.protocol });
        }
        write_message(&mut control, &ready).await?;
        Ok(control)
    }

    /// Takes over what `Hello` says of this life, and lets the application run. If a part fails, it stays as it is: two clones that draw the
    /// same random numbers are worse than one that does not start.
    async fn take_over(&mut self, hello: &Hello, control: &mut Stream) -> Result<anyhow::Result<()>, SessionError> {
        if let Err(error) = self.renew(hello) {
            return Ok(Err(error));
        }
        let time = ask_time(control).await?;
        let run = || {
            identity::set_clock(time).context("setting the clock")?;
            Ok(self.freezer.thaw()?)
        };
        Ok(run())
    }

    /// Takes over this life's identity.
    fn renew(&mut self, hello: &Hello) -> anyhow::Result<()> {
        identity::reseed_random(&hello.entropy).context("reseeding the random number generator")?;
        if let Some(network) = &hello.network {
            network::apply(network).context("setting up the network")?;
            // An image may have made this impossible, and then does without.
            let resolvers = self.names.set_resolvers(&network.nameservers);
            self.tell_failure(resolvers);
        }
        // Another host in the same life changes nothing for the application's peers.
        let life = (hello.vm_id.clone(), hello.generation);
        if self.life.as_ref().is_some_and(|previous| *previous != life) {
            connections::end_outbound().context("ending connections")?;
        }
        self.counter.show(hello.generation).context("showing the generation")?;
        self.life = Some(life);
        Ok(())
    }

    /// Tells of what went wrong on the console and in the log.
    fn tell_failure<E: std::fmt::Display>(&self, result: Result<(), E>) {
        if let Err(error) = result {
            eprintln!("hearth-guest: {error}");
            self.logs.push(LogSource::System, error.to_string().into_bytes());
        }
    }

    async fn start(
        &self,
        app: &App,
        writer: &mut WriteHalf<Stream>,
        news: &mpsc::Sender<GuestMessage>,
        tasks: &mut JoinSet<()>,
    ) -> Result<(), WireError> {
        match self.launch(app).await {
            Ok((pid, watch)) => {
                write_message(writer, &GuestMessage::Started { pid: pid.as_raw().unsigned_abs() }).await?;
                tasks.spawn(announce_listeners(watch, news.clone()));
                tasks.spawn(announce_activity(news.clone()));
                Ok(())
            }
            Err(error) => write_message(writer, &GuestMessage::StartFailed { reason: error.to_string() }).await,
        }
    }

    async fn launch(&self, app: &App) -> anyhow::Result<(Pid, Watch)> {
        if self.application.has_started().await {
            return Err(StartError::AlreadyStarted.into());
        }
        self.names.set_hostname(&app.hostname)?;
        // Before the application runs, so that its first listener is seen.
        let watch = Watch::begin();
        Ok((self.application.start(app).await?, watch))
    }
}

/// Says why there is no session, and waits until the host has read it: what is on its way is lost when this side ends the session.
async fn refuse(control: &mut Stream, message: &GuestMessage) -> Result<(), WireError> {
    write_message(control, message).await?;
    let _ = timeout(REFUSAL_DEADLINE, control.read(&mut [0])).await;
    Ok(())
}

/// Asks the host for its wall clock, and again while the answer takes long: it is wrong by half of that at most. Returns the time that it is
/// now, in nanoseconds since the Unix epoch.
async fn ask_time(control: &mut Stream) -> Result<u64, SessionError> {
    let begun = Instant::now();
    let mut best: Option<(Duration, Instant, u64)> = None;
    let (took, asked, time) = loop {
        let asked = Instant::now();
        write_message(control, &GuestMessage::AskTime).await?;
        let time = match read_message(control).await? {
            HostMessage::Time { wall_clock_ns } => wall_clock_ns,
            other => return Err(SessionError::NotTime(other)),
        };
        let took = asked.elapsed();
        let shortest = best.filter(|(least, ..)| *least <= took).unwrap_or((took, asked, time));
        if took <= GOOD_ANSWER || begun.elapsed() > TIME_DEADLINE {
            break shortest;
        }
        best = Some(shortest);
    };
    // The host read its clock in the middle, as far as anybody knows.
    let since = asked.elapsed() - took / 2;
    Ok(time.saturating_add(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)))
}

/// Reads the host's messages in a task of their own: a half-read message must not be abandoned.
fn read_commands(mut reader: ReadHalf<Stream>, tasks: &mut JoinSet<()>) -> mpsc::Receiver<Result<HostMessage, WireError>> {
    let (sender, receiver) = mpsc::channel(4);
    tasks.spawn(async move {
        loop {
            let message = read_message(&mut reader).await;
            let last = message.is_err();
            if sender.send(message).await.is_err() || last {
                return;
            }
        }
    });
    receiver
}

async fn serve_stream(mut stream: Stream, application: Arc<Application>) {
    let result = match read_message(&mut stream).await {
        Ok(StreamHeader::Dial { port }) => dial::serve(stream, port).await,
        Ok(StreamHeader::Hook(call)) => hook::serve(stream, call).await,
        Ok(StreamHeader::Exec(exec)) => exec::serve(stream, exec, application).await,
        Ok(StreamHeader::Copy(copy)) => copy::serve(stream, copy, application).await,
        // Dropping the stream resets it.
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    };
    // A connection that breaks is everyday life for a proxy; both ends have noticed.
    drop(result);
}

/// Tells the end of the application, after its last words.
async fn announce_exit(application: Arc<Application>, logs: Logs, news: mpsc::Sender<GuestMessage>) {
    let mut exit = application.exit();
    // The application outlives every session, so the sender is there.
    let Ok(status) = exit.wait_for(Option::is_some).await.map(|status| *status) else { return };
    logs.drained(LOGS_PATIENCE).await;
    if let Some(status) = status {
        // The session may have ended in the meantime; the next one says it again.
        let _ = news.send(GuestMessage::Exited(status)).await;
    }
}

async fn announce_listeners(watch: Watch, news: mpsc::Sender<GuestMessage>) {
    let (sender, mut ports) = mpsc::channel(16);
    let forward = async {
        while let Some(port) = ports.recv().await {
            if news.send(GuestMessage::Listening { port }).await.is_err() {
                return;
            }
        }
    };
    let (watched, ()) = tokio::join!(watch.run(sender), forward);
    if let Err(error) = watched {
        eprintln!("hearth-guest: watching for listeners: {error}");
    }
}

async fn announce_activity(news: mpsc::Sender<GuestMessage>) {
    let (sender, mut changes) = mpsc::channel(1);
    let forward = async {
        while let Some(activity) = changes.recv().await {
            if news.send(GuestMessage::Activity(activity)).await.is_err() {
                return;
            }
        }
    };
    let (watched, ()) = tokio::join!(Counters::of_the_application().watch(sender), forward);
    if let Err(error) = watched {
        // The host then waits no longer than it has patience.
        eprintln!("hearth-guest: watching for rest: {error}");
    }
}

/// Sends log records until told to stop; then what is left, and the end of the stream.
fn ship_logs(mux: Mux, logs: Logs) -> (impl Future<Output = ()>, oneshot::Sender<Infallible>) {
    let (stop, mut stopped) = oneshot::channel();
    let ship = async move {
        let mut stream = match mux.open().await {
            Ok(stream) => stream,
            // The session is over before it began.
            Err(_) => return Ok(()),
        };
        write_message(&mut stream, &StreamHeader::Log).await?;
        loop {
            // The records that are there come before the order to stop.
            let records = tokio::select! {
                biased;
                records = logs.take() => records,
                _ = &mut stopped => break,
            };
            write_messages(&mut stream, &records).await?;
            logs.delivered();
        }
        stream.shutdown().await?;
        // The host closes its side when it has read everything.
        let _ = stream.read(&mut [0]).await;
        Ok::<_, WireError>(())
    };
    let task = async move {
        // The host has gone; records that follow are kept for the next session.
        let _ = ship.await;
    };
    (task, stop)
}

impl From<io::Error> for SessionError {
    fn from(error: io::Error) -> Self {
        Self::Wire(error.into())
    }
}
