//! Connections of the app to the API of its own server: the machine's network has no way there.

use tokio::{io::copy_bidirectional, net::TcpStream};

use super::host::Host;

/// Carries one connection. It is reset when the host refuses it, and when its session ends: whoever is at its other end is another one then.
pub async fn serve(mut connection: TcpStream, host: Host) {
    let carried = async {
        let (mut stream, over) = host.api().await.ok()?;
        connection.set_nodelay(true).ok()?;
        tokio::select! {
            copied = copy_bidirectional(&mut connection, &mut stream) => copied.ok(),
            () = over => None,
        }
    };
    if carried.await.is_none() {
        // Fails if the app is gone, which is as well.
        let _ = connection.set_zero_linger();
    }
}
