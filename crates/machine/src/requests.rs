//! The streams that a guest opens: its log, questions of its metadata service, connections to the host's API.

use std::{sync::Arc, time::Duration};

use hearth_guest_protocol::{Carrier, LogRecord, MetadataReply, Stream, StreamHeader, WireError, read_message, write_message};
use tokio::{io::copy_bidirectional, sync::mpsc, time::timeout};

use crate::engine::{GuestServices, MachineEvent};

/// How long a guest may take to say what it wants with a stream that it has opened.
const QUESTION: Duration = Duration::from_secs(10);
/// How long an answer may take. A guest waits a little longer.
const ANSWER: Duration = Duration::from_secs(20);

/// Serves what the guest opens until its session ends.
pub async fn accept(mut inbound: mpsc::Receiver<Stream>, services: Arc<dyn GuestServices>, events: mpsc::Sender<MachineEvent>) {
    while let Some(stream) = inbound.recv().await {
        let (services, events) = (Arc::clone(&services), events.clone());
        tokio::spawn(async move {
            // The guest has noticed as well: the stream is reset.
            if let Err(error) = serve(stream, services, events).await {
                tracing::trace!(%error, "a stream of a guest ended early");
            }
        });
    }
}

async fn serve(mut stream: Stream, services: Arc<dyn GuestServices>, events: mpsc::Sender<MachineEvent>) -> Result<(), WireError> {
    match within(QUESTION, read_message(&mut stream)).await? {
        StreamHeader::Log => {
            while let Ok(record) = read_message::<LogRecord>(&mut stream).await {
                if events.send(MachineEvent::Log(record)).await.is_err() {
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
    use hearth_guest_protocol::{MetadataRequest, Mux};
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
