//! The streams that a guest opens: its log, questions of its metadata service, connections to the host's API.

use std::{sync::Arc, time::Duration};

use hearth_guest_protocol::{
    Carrier, LogRecord, MAX_LINE_BYTES, MetadataReply, Stream, StreamHeader, WireError, read_message, write_message,
};
use tokio::{
    io::copy_bidirectional,
    sync::{Mutex, Semaphore, mpsc},
    time::timeout,
};

use crate::engine::{GuestServices, MachineEvent};

/// How long a guest may take to say what it wants with a stream that it has opened.
const QUESTION: Duration = Duration::from_secs(10);
/// How long an answer may take. A guest waits a little longer.
const ANSWER: Duration = Duration::from_secs(20);

/// Streams of one guest that are served at once. More are reset: a guest may be hostile, and each takes memory and descriptors of the host.
const AT_ONCE: usize = 256;

/// Serves what the guest opens until its session ends.
pub async fn accept(mut inbound: mpsc::Receiver<Stream>, services: Arc<dyn GuestServices>, events: mpsc::Sender<MachineEvent>) {
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let log = Arc::new(Mutex::new(Some(events)));
    while let Some(stream) = inbound.recv().await {
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
        let (services, log) = (Arc::clone(&services), Arc::clone(&log));
        tokio::spawn(async move {
            // The guest has noticed as well: the stream is reset.
            if let Err(error) = serve(stream, services, &log).await {
                tracing::trace!(%error, "a stream of a guest ended early");
            }
            drop(slot);
        });
    }
}

/// Serves one stream. The log is one stream in a session, and whoever serves that takes the sender.
async fn serve(
    mut stream: Stream,
    services: Arc<dyn GuestServices>,
    log: &Mutex<Option<mpsc::Sender<MachineEvent>>>,
) -> Result<(), WireError> {
    match within(QUESTION, read_message(&mut stream)).await? {
        StreamHeader::Log => {
            let Some(events) = log.lock().await.take() else { return Ok(()) };
            while let Ok(record) = read_message::<LogRecord>(&mut stream).await {
                if record.line.len() > MAX_LINE_BYTES || events.send(MachineEvent::Log(record)).await.is_err() {
                    break;
                }
            }
            Ok(())
        }
        StreamHeader::Metadata => {
            let request = within(QUESTION, read_message(&mut stream)).await?;
            let reply = timeout(ANSWER, services.metadata(request)).await;
            let late = |_| MetadataReply::Failed { reason: format!("the host had no answer within {} s", ANSWER.as_secs()) };
            write_message(&mut stream, &reply.unwrap_or_else(late)).await
        }
        StreamHeader::Api => {
            let mut api = services.api().await?;
            copy_bidirectional(&mut Carrier::new(stream), &mut api).await?;
            Ok(())
        }
        // The host's to open. Dropped, which resets it.
        StreamHeader::Control | StreamHeader::Dial { .. } | StreamHeader::Hook(_) | StreamHeader::Exec(_) | StreamHeader::Copy(_) => Ok(()),
    }
}

async fn within<T>(limit: Duration, reading: impl Future<Output = Result<T, WireError>>) -> Result<T, WireError> {
    timeout(limit, reading).await.unwrap_or_else(|elapsed| Err(std::io::Error::from(elapsed).into()))
}

#[cfg(test)]
mod tests {
    use std::io;

    use async_trait::async_trait;
    use hearth_guest_protocol::{LogSource, MetadataRequest, Mux};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::engine::{GuestStream, NoServices};

    /// Knows its region, and has an API that says everything back.
    #[derive(Debug)]
    struct Echo;

    #[async_trait]
    impl GuestServices for Echo {
        async fn metadata(&self, request: MetadataRequest) -> MetadataReply {
            match request {
                MetadataRequest::Region => MetadataReply::Region("here".to_owned()),
                _ => MetadataReply::Absent,
            }
        }

        async fn api(&self) -> io::Result<Box<dyn GuestStream>> {
            let (near, mut far) = tokio::io::duplex(64);
            tokio::spawn(async move {
                let mut request = Vec::new();
                far.read_to_end(&mut request).await.unwrap();
                far.write_all(&request).await.unwrap();
            });
            Ok(Box::new(near))
        }
    }

    /// A session with a host of these services: the guest's handle, and what keeps it alive.
    fn session(services: impl GuestServices + 'static) -> (Mux, impl Sized) {
        let (near, far) = tokio::io::duplex(4096);
        let (host, host_driver) = Mux::client(near);
        let (guest, guest_driver) = Mux::server(far);
        let (events, receiver) = mpsc::channel(1);
        tokio::spawn(accept(host_driver.inbound, Arc::new(services), events));
        (guest, (host, host_driver.task, guest_driver, receiver))
    }

    async fn open(guest: &Mux, header: StreamHeader) -> Stream {
        let mut stream = guest.open().await.unwrap();
        write_message(&mut stream, &header).await.unwrap();
        stream
    }

    #[tokio::test]
    async fn a_guest_has_one_log_and_so_many_streams() {
        let (near, far) = tokio::io::duplex(4096);
        let (_host, host_driver) = Mux::client(near);
        let (guest, _guest_driver) = Mux::server(far);
        let (events, mut receiver) = mpsc::channel(1);
        tokio::spawn(accept(host_driver.inbound, Arc::new(NoServices), events));
        let record = |bytes| LogRecord { source: LogSource::Stdout, time_ns: 1, line: vec![b'x'; bytes], dropped: 0 };
        let mut log = open(&guest, StreamHeader::Log).await;
        write_message(&mut log, &record(MAX_LINE_BYTES)).await.unwrap();
        assert_eq!(receiver.recv().await, Some(MachineEvent::Log(record(MAX_LINE_BYTES))));

        let mut silent = Vec::new();
        for _ in 1..AT_ONCE {
            silent.push(guest.open().await.unwrap());
            silent.last_mut().unwrap().write_all(&[0]).await.unwrap();
        }
        let mut refused = guest.open().await.unwrap();
        let _ = refused.write_all(&[0]).await;
        assert_eq!(refused.read(&mut [0]).await.unwrap_or(0), 0, "it is reset");
        silent.clear();

        // Longer than a line may be: the end of the log, and no other one takes its place.
        write_message(&mut log, &record(MAX_LINE_BYTES + 1)).await.unwrap();
        assert_eq!(receiver.recv().await, None);
    }

    #[tokio::test]
    async fn a_question_is_answered_on_its_own_stream() {
        let (guest, _alive) = session(Echo);
        for (request, reply) in
            [(MetadataRequest::Region, MetadataReply::Region("here".to_owned())), (MetadataRequest::Credentials, MetadataReply::Absent)]
        {
            let mut stream = open(&guest, StreamHeader::Metadata).await;
            write_message(&mut stream, &request).await.unwrap();
            assert_eq!(read_message::<MetadataReply>(&mut stream).await.unwrap(), reply);
        }
    }

    #[tokio::test]
    async fn a_connection_to_the_api_carries_bytes_and_half_closes() {
        let (guest, _alive) = session(Echo);
        let mut stream = Carrier::new(open(&guest, StreamHeader::Api).await);
        stream.write_all(b"request").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"request");
    }

    #[tokio::test]
    async fn what_a_guest_has_no_right_to_is_reset() {
        let (guest, _alive) = session(NoServices);
        for header in [StreamHeader::Api, StreamHeader::Dial { port: 80 }] {
            let mut stream = open(&guest, header).await;
            let mut answer = Vec::new();
            // A reset reads as the end; nothing was sent.
            let _ = stream.read_to_end(&mut answer).await;
            assert!(answer.is_empty());
        }
    }
}
