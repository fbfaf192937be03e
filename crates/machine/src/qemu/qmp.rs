//! QEMU's monitor protocol, as far as this driver speaks it.

use std::{io, os::unix::net::UnixStream as StdUnixStream, time::Duration};

use futures::StreamExt;
use qapi::{
    futures::{QapiService, QmpStreamTokio},
    qmp::{self, Event, MigrationCapability, MigrationCapabilityStatus, MigrationStatus, QmpCommand},
};
use tokio::{io::WriteHalf, net::UnixStream, sync::watch, task::JoinHandle, time::timeout};

/// How long QEMU may take for one command. All of them take milliseconds; a busy host makes them take longer.
const ANSWER: Duration = Duration::from_secs(30);

/// QEMU did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// the command was refused
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// Name of the command.
        command: &'static str,
        /// QEMU's words.
        reason: String,
    },
    /// no answer in time
    #[error("QEMU did not answer {command} within {} s", ANSWER.as_secs())]
    Timeout {
        /// Name of the command.
        command: &'static str,
    },
    /// the state did not load
    #[error("QEMU did not load the device state: migration {0:?}")]
    Load(MigrationStatus),
}

/// The C library's text for ENOSPC: QEMU has no environment, so that it speaks the C locale.
const NO_SPACE: &str = "No space left on device";

/// A request of the guest to its disk failed on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskFailure {
    /// Because the host's disk is full.
    pub full: bool,
}

/// A connection to one QEMU's monitor.
pub struct Qmp {
    service: QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>,
    migration: watch::Receiver<Option<MigrationStatus>>,
    disk_failure: watch::Receiver<Option<DiskFailure>>,
    reader: JoinHandle<()>,
}

impl Qmp {
    /// Waits for QEMU's greeting, which it sends when all its devices are there.
    pub async fn connect(socket: StdUnixStream) -> Result<Self, QmpError> {
        let refused = |error: io::Error| QmpError::Refused { command: "the connection", reason: error.to_string() };
        let greet = async {
            socket.set_nonblocking(true)?;
            let (reader, writer) = tokio::io::split(UnixStream::from_std(socket)?);
            QmpStreamTokio::open_split(reader, writer).await?.negotiate().await
        };
        let stream = timeout(ANSWER, greet).await.map_err(|_| QmpError::Timeout { command: "the greeting" })?.map_err(refused)?;
        let (service, mut events) = stream.into_parts();
        let (report, migration) = watch::channel(None);
        let (report_failure, disk_failure) = watch::channel(None);
        let reader = tokio::spawn(async move {
            while let Some(Ok(event)) = events.next().await {
                match event {
                    Event::MIGRATION { data, .. } => drop(report.send_replace(Some(data.status))),
                    Event::BLOCK_IO_ERROR { data, .. } => {
                        // It says so by itself only when a full disk would stop the machine.
                        report_failure.send_replace(Some(DiskFailure { full: data.reason == NO_SPACE }));
                    }
                    _ => {}
                }
            }
        });
        Ok(Self { service, migration, disk_failure, reader })
    }

    /// Loads device state from a descriptor that QEMU inherited.
    pub async fn load(&self, descriptor: i32) -> Result<(), QmpError> {
        let events = MigrationCapabilityStatus { capability: MigrationCapability::events, state: true };
        self.execute(qmp::migrate_set_capabilities { capabilities: vec![events] }).await?;
        let mut migration = self.migration.clone();
        self.execute(qmp::migrate_incoming { uri: Some(format!("fd:{descriptor}")), channels: None, exit_on_error: None }).await?;
        let over = |status: &Option<MigrationStatus>| matches!(status, Some(MigrationStatus::completed | MigrationStatus::failed));
        let status = timeout(ANSWER, migration.wait_for(over)).await.map_err(|_| QmpError::Timeout { command: "migrate-incoming" })?;
        match status.as_deref() {
            Ok(Some(MigrationStatus::completed)) => Ok(()),
            Ok(Some(status)) => Err(QmpError::Load(*status)),
            Ok(None) | Err(_) => Err(QmpError::Load(MigrationStatus::failed)),
        }
    }

    /// Writes device state to a file.
    pub async fn save(&self, path: String) -> Result<(), QmpError> {
        self.execute(qmp::xen_save_devices_state { live: None, filename: path }).await
    }

    /// Stops the virtual processors and flushes the disks.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.execute(qmp::stop {}).await
    }

    /// Lets the virtual processors run.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.execute(qmp::cont {}).await
    }

    /// The first failure of the disk from now on; never, if QEMU ends before. Does not keep the connection.
    pub fn disk_failure(&self) -> impl Future<Output = DiskFailure> + Send + 'static {
        let mut failure = self.disk_failure.clone();
        async move {
            let seen = failure.wait_for(Option::is_some).await.ok().and_then(|seen| *seen);
            match seen {
                Some(failure) => failure,
                None => std::future::pending().await,
            }
        }
    }

    /// Ends QEMU.
    pub async fn quit(&self) -> Result<(), QmpError> {
        self.execute(qmp::quit {}).await
    }

    async fn execute<C: QmpCommand + 'static>(&self, command: C) -> Result<(), QmpError> {
        let answer = timeout(ANSWER, self.service.execute(command)).await.map_err(|_| QmpError::Timeout { command: C::NAME })?;
        answer.map(drop).map_err(|error| QmpError::Refused { command: C::NAME, reason: error.to_string() })
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qmp").finish_non_exhaustive()
    }
}
