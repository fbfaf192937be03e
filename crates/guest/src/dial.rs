//! Carries one connection of the proxy to a TCP port of the application.

use std::{
    io::{self, ErrorKind},
    net::{Ipv4Addr, Ipv6Addr},
};

use hearth_guest_protocol::{Carrier, DialReply, Stream, WireError, write_message};
use tokio::net::TcpStream;

use crate::splice::splice;

/// Connects, answers, then copies until both directions have ended, or one side broke. Half-closes are passed on.
pub async fn serve(mut stream: Stream, port: u16) -> Result<(), WireError> {
    match connect(port).await {
        Ok(connection) => {
            write_message(&mut stream, &DialReply::Connected).await?;
            splice(Carrier::new(stream), connection).await?;
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => write_message(&mut stream, &DialReply::Refused).await?,
        Err(error) => write_message(&mut stream, &DialReply::Failed { reason: error.to_string() }).await?,
    }
    Ok(())
}

/// Loopback only: an application that listens on `::1` alone is found at the second try.
pub async fn connect(port: u16) -> io::Result<TcpStream> {
    let connection = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => match TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await {
            Ok(connection) => connection,
            // Without IPv6 the second answer says nothing about the port.
            Err(_) => return Err(error),
        },
        other => other?,
    };
    connection.set_nodelay(true)?;
    Ok(connection)
}

#[cfg(test)]
pub mod tests {
    use hearth_guest_protocol::{Mux, read_message};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// A stream between two muxes; the first item is the host's end, and the rest keeps the session alive.
    pub async fn stream_pair() -> (Stream, Stream, impl Sized) {
        let (near, far) = tokio::io::duplex(4096);
        let (host, host_driver) = Mux::client(near);
        let (guest, mut guest_driver) = Mux::server(far);
        let mut outbound = host.open().await.unwrap();
        // yamux announces a stream with its first bytes.
        outbound.write_all(b"!").await.unwrap();
        outbound.flush().await.unwrap();
        let mut inbound = guest_driver.inbound.recv().await.unwrap();
        inbound.read_u8().await.unwrap();
        (outbound, inbound, (host, host_driver, guest, guest_driver))
    }

    #[tokio::test]
    async fn a_half_close_reaches_the_application() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let application = tokio::spawn(async move {
            let (mut connection, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            connection.read_to_end(&mut request).await.unwrap();
            connection.write_all(&request).await.unwrap();
        });
        let (mut host, guest, _session) = stream_pair().await;
        let proxy = tokio::spawn(serve(guest, port));
        assert_eq!(read_message::<DialReply>(&mut host).await.unwrap(), DialReply::Connected);
        let mut host = Carrier::new(host);
        host.write_all(b"echo").await.unwrap();
        host.shutdown().await.unwrap();
        let mut answer = Vec::new();
        host.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"echo");
        application.await.unwrap();
        proxy.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_breaks_off_frees_an_application_that_still_writes_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mut host, guest, _session) = stream_pair().await;
        let proxy = tokio::spawn(serve(guest, port));
        let (mut connection, _) = listener.accept().await.unwrap();
        assert_eq!(read_message::<DialReply>(&mut host).await.unwrap(), DialReply::Connected);
        drop(host);
        proxy.await.unwrap().unwrap_err();
        assert_eq!(connection.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_client_that_is_done_and_leaves_frees_an_application_that_writes_on() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mut host, guest, _session) = stream_pair().await;
        let proxy = tokio::spawn(serve(guest, port));
        let (mut connection, _) = listener.accept().await.unwrap();
        assert_eq!(read_message::<DialReply>(&mut host).await.unwrap(), DialReply::Connected);
        let mut host = Carrier::new(host);
        host.shutdown().await.unwrap();
        assert_eq!(connection.read(&mut [0; 8]).await.unwrap(), 0, "the application knows");
        let endless = tokio::spawn(async move { while connection.write_all(&[0; 16 << 10]).await.is_ok() {} });
        host.read_exact(&mut [0; 64 << 10]).await.unwrap();
        drop(host);
        let long = std::time::Duration::from_secs(20);
        tokio::time::timeout(long, endless).await.expect("the application is told that nobody reads").unwrap();
        proxy.await.unwrap().unwrap_err();
    }

    #[tokio::test]
    async fn an_application_that_breaks_off_has_not_ended() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mut host, guest, _session) = stream_pair().await;
        let proxy = tokio::spawn(serve(guest, port));
        let (connection, _) = listener.accept().await.unwrap();
        assert_eq!(read_message::<DialReply>(&mut host).await.unwrap(), DialReply::Connected);
        connection.set_zero_linger().unwrap();
        drop(connection);
        proxy.await.unwrap().unwrap_err();
        Carrier::new(host).read_u8().await.unwrap_err();
    }

    #[tokio::test]
    async fn a_port_without_a_listener_refuses() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let (mut host, guest, _session) = stream_pair().await;
        let proxy = tokio::spawn(serve(guest, port));
        assert_eq!(read_message::<DialReply>(&mut host).await.unwrap(), DialReply::Refused);
        proxy.await.unwrap().unwrap();
    }
}
