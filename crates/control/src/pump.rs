//! Takes a machine's events apart: its log lines go to the log, the rest to whoever drives it. A disk that fails is news for both.

use std::time::Duration;

use hearth_machine::{Machine, MachineEvent};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::logs::{LogLine, LogOrigin, LogWriter};

/// Events other than log lines that wait for the driver. There are a few in a machine's life; what a guest invents beyond that is lost.
const EVENT_QUEUE: usize = 256;
/// How long the last log lines of a machine that is gone are waited for: they are here already, and only the disk can keep them.
const LAST_LINES: Duration = Duration::from_secs(10);

/// Of a machine that ended before its guest had handed over all that its app wrote.
const UNDELIVERED: &str = "The MicroVM ended before all of its log was delivered: the last lines may be missing.";

/// A machine's events, without its log lines.
pub(crate) struct Pump {
    events: mpsc::Receiver<MachineEvent>,
    task: JoinHandle<()>,
    log: LogWriter,
}

impl Pump {
    pub fn start(events: Option<mpsc::Receiver<MachineEvent>>, log: LogWriter) -> Self {
        let (others, receiver) = mpsc::channel(EVENT_QUEUE);
        let copy = log.clone();
        let task = tokio::spawn(async move {
            let Some(mut events) = events else { return };
            while let Some(event) = events.recv().await {
                if let MachineEvent::DiskFailed { full } = event {
                    let why = if full { "the host's disk is full" } else { "the host's disk fails" };
                    let text = format!("The MicroVM's disk could not be read or written because {why}. Its programs see I/O errors.");
                    log.append(LogLine::now(LogOrigin::System, text)).await;
                }
                match event {
                    MachineEvent::Log(record) => log.append(LogLine::from(record)).await,
                    // Nobody may be waiting any more, and that must not keep the log back.
                    event => drop(others.try_send(event)),
                }
            }
        });
        Self { events: receiver, task, log: copy }
    }

    /// The next event; `None` when the machine has said everything.
    pub async fn next(&mut self) -> Option<MachineEvent> {
        self.events.recv().await
    }

    /// Ends a machine, and waits until its log is written, but not for ever.
    pub async fn kill(self, machine: Box<dyn Machine>) {
        let log = self.log.clone();
        let delivered = machine.kill().await;
        self.last_words().await;
        if !delivered {
            log.offer(LogLine::now(LogOrigin::System, UNDELIVERED.to_owned()));
        }
    }

    /// Waits until the log of a machine that is gone is written, but not for ever.
    pub async fn last_words(mut self) {
        if tokio::time::timeout(LAST_LINES, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}
