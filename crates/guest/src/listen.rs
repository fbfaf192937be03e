//! Tells when a process begins to listen on a TCP port, from the kernel's tracepoint `sock:inet_sock_set_state`.
//!
//! The trace lives in a tracefs instance of its own with a small buffer, made when a watch begins and removed when it ends, so that neither
//! the events' cost nor the buffer's memory goes into a snapshot.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::libc;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
    time::MissedTickBehavior,
};

use crate::boot::TRACEFS;

/// How often the socket tables are read when the kernel cannot trace.
const FALLBACK_INTERVAL: Duration = Duration::from_millis(200);
/// `TCP_LISTEN` in the kernel's `tcp_states.h`.
const TCP_LISTEN: &str = "0A";

/// A watch that has begun: listeners from now on will be reported.
#[derive(Debug)]
pub struct Watch {
    trace: Option<Trace>,
    reported: BTreeSet<u16>,
}

impl Watch {
    /// Begins. Must come before the application starts.
    pub fn begin() -> Self {
        let trace = Trace::begin(Path::new(TRACEFS))
            .inspect_err(|error| eprintln!("hearth-guest: the kernel does not trace sockets, looking now and then instead: {error}"))
            .ok();
        Self { trace, reported: BTreeSet::new() }
    }

    /// Sends each port once, until the receiver is gone or the future is dropped.
    pub async fn run(mut self, ports: mpsc::Sender<u16>) -> io::Result<()> {
        for port in listening_now() {
            self.report(port, &ports).await?;
        }
        let Some(trace) = self.trace.take() else { return self.look_now_and_then(&ports).await };
        let mut text = TraceText::default();
        loop {
            for port in text.split(&trace.read().await?) {
                self.report(port, &ports).await?;
            }
        }
    }

    /// There is no event to wait for without the trace.
    async fn look_now_and_then(&mut self, ports: &mpsc::Sender<u16>) -> io::Result<()> {
        let mut interval = tokio::time::interval(FALLBACK_INTERVAL);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            for port in listening_now() {
                self.report(port, ports).await?;
            }
        }
    }

    async fn report(&mut self, port: u16, ports: &mpsc::Sender<u16>) -> io::Result<()> {
        if self.reported.insert(port) {
            ports.send(port).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Trace {
    /// Closed before the instance is removed: an open pipe keeps it busy.
    pipe: Option<AsyncFd<File>>,
    instance: PathBuf,
}

impl Trace {
    fn begin(tracefs: &Path) -> io::Result<Self> {
        let instance = tracefs.join("instances/hearth");
        fs::create_dir(&instance)?;
        let mut trace = Self { pipe: None, instance };
        let event = trace.instance.join("events/sock/inet_sock_set_state");
        fs::write(trace.instance.join("buffer_size_kb"), "16")?;
        fs::write(event.join("filter"), "newstate == 10")?;
        let pipe = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(trace.instance.join("trace_pipe"))?;
        // SAFETY: `File` owns its descriptor and always returns the same one.
        trace.pipe = Some(unsafe { AsyncFd::register_with_interest(pipe, Interest::READABLE) }?);
        fs::write(event.join("enable"), "1")?;
        Ok(trace)
    }

    async fn read(&self) -> io::Result<Vec<u8>> {
        let pipe = self.pipe.as_ref().expect("only `begin` and `drop` see a trace without its pipe");
        let mut buffer = [0; 4096];
        loop {
            match pipe.readable().await?.try_io(|pipe| pipe.get_ref().read(&mut buffer)) {
                Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(result) => return result.map(|count| buffer[..count].to_vec()),
                Err(_would_block) => {}
            }
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.pipe = None;
        if let Err(error) = fs::remove_dir(&self.instance) {
            eprintln!("hearth-guest: removing {}: {error}", self.instance.display());
        }
    }
}

/// Puts the trace's lines together from what each read returned.
#[derive(Debug, Default)]
struct TraceText {
    partial: Vec<u8>,
}

impl TraceText {
    fn split(&mut self, bytes: &[u8]) -> Vec<u16> {
        self.partial.extend_from_slice(bytes);
        let Some(end) = self.partial.iter().rposition(|&byte| byte == b'\n') else { return Vec::new() };
        let complete: Vec<u8> = self.partial.drain(..=end).collect();
        String::from_utf8_lossy(&complete).lines().filter_map(listener_in_trace).collect()
    }
}

/// The port of a trace line that tells of a new TCP listener.
fn listener_in_trace(line: &str) -> Option<u16> {
    let (_, event) = line.split_once(" inet_sock_set_state: ")?;
    let field = |name: &str| event.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    // A multipath listener is a TCP listener to everybody else.
    let tcp = matches!(field("protocol")?, "IPPROTO_TCP" | "IPPROTO_MPTCP");
    let port = field("sport")?.parse().ok()?;
    // A socket that listens unbound gets its port a moment later; nobody can have been told to dial it.
    (tcp && field("newstate")? == "TCP_LISTEN" && port != 0).then_some(port)
}

fn listening_now() -> BTreeSet<u16> {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|table| table.lines().filter_map(listener_in_table).collect::<Vec<_>>())
        .collect()
}

/// The port of a listener's line in `/proc/net/tcp` or `tcp6` (proc_pid_net(5)).
fn listener_in_table(line: &str) -> Option<u16> {
    let mut words = line.split_whitespace();
    let (local, state) = (words.nth(1)?, words.nth(1)?);
    let (_, port) = local.rsplit_once(':')?;
    (state == TCP_LISTEN).then(|| u16::from_str_radix(port, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "         python3-187     [000] ...1.     4.501234: inet_sock_set_state: family=AF_INET protocol=IPPROTO_TCP sport=5000 dport=0 saddr=0.0.0.0 daddr=0.0.0.0 saddrv6=::ffff:0.0.0.0 daddrv6=::ffff:0.0.0.0 oldstate=TCP_CLOSE newstate=TCP_LISTEN";

    #[test]
    fn listeners_are_found_in_the_trace() {
        assert_eq!(listener_in_trace(LINE), Some(5000));
        assert_eq!(listener_in_trace(&LINE.replace("IPPROTO_TCP", "IPPROTO_MPTCP")), Some(5000));
        assert_eq!(listener_in_trace(&LINE.replace("IPPROTO_TCP", "IPPROTO_SCTP")), None);
        assert_eq!(listener_in_trace(&LINE.replace("TCP_LISTEN", "TCP_SYN_SENT")), None);
        assert_eq!(listener_in_trace(&LINE.replace("sport=5000", "sport=0")), None);
        assert_eq!(listener_in_trace("CPU:0 [LOST 3 EVENTS]"), None);
        assert_eq!(listener_in_trace(""), None);
    }

    #[test]
    fn lines_of_the_trace_may_come_in_pieces() {
        let mut text = TraceText::default();
        let whole = format!("{LINE}\n{}\n", LINE.replace("5000", "8080"));
        let (first, second) = whole.as_bytes().split_at(LINE.len() - 4);
        assert!(text.split(first).is_empty());
        assert_eq!(text.split(second), [5000, 8080]);
    }

    #[test]
    fn listeners_are_found_in_the_socket_tables() {
        let four = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1234 1 0 100 0 0 10 0";
        assert_eq!(listener_in_table(four), Some(8080));
        assert_eq!(listener_in_table(&four.replace(" 0A ", " 01 ")), None);
        let six = "   0: 00000000000000000000000000000000:1388 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000";
        assert_eq!(listener_in_table(six), Some(5000));
        assert_eq!(listener_in_table("  sl  local_address rem_address   st tx_queue"), None);
    }

    #[tokio::test]
    async fn a_port_is_reported_once() {
        let (sender, mut receiver) = mpsc::channel(4);
        let mut watch = Watch { trace: None, reported: BTreeSet::new() };
        for port in [80, 81, 80] {
            watch.report(port, &sender).await.unwrap();
        }
        drop(sender);
        assert_eq!((receiver.recv().await, receiver.recv().await, receiver.recv().await), (Some(80), Some(81), None));
    }
}
