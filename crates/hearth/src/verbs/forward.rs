//! `hearth forward`: ports of a MicroVM on this machine, as raw TCP.

use std::{
    net::{IpAddr, Ipv4Addr},
    process::ExitCode,
    str::FromStr,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Args;
use http::HeaderValue;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::Mutex,
};

use super::tunnel::Endpoint;
use crate::client::Client;

/// Life of a token, and when another is asked for.
const TOKEN_MINUTES: u32 = 60;
const TOKEN_RENEWAL: Duration = Duration::from_secs(45 * 60);

/// `hearth forward`.
#[derive(Debug, Args)]
pub struct ForwardArgs {
    /// Id, or the beginning of one that fits one MicroVM only.
    id: String,
    /// Where to listen, and the MicroVM's port: `5000` for the same on both sides, 0 for a free one here.
    #[arg(required = true, value_name = "[[ADDRESS:]PORT:]PORT")]
    ports: Vec<Forward>,
}

/// One port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Forward {
    address: IpAddr,
    local: u16,
    remote: u16,
}

/// It is not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected PORT, LOCAL_PORT:PORT or ADDRESS:LOCAL_PORT:PORT")]
struct ForwardError;

impl FromStr for Forward {
    type Err = ForwardError;

    fn from_str(text: &str) -> Result<Self, ForwardError> {
        let mut parts = text.rsplitn(3, ':');
        let remote: u16 = parts.next().and_then(|port| port.parse().ok()).filter(|&port| port != 0).ok_or(ForwardError)?;
        let local = parts.next().map_or(Ok(remote), str::parse).map_err(|_| ForwardError)?;
        let address = match parts.next() {
            None => Ipv4Addr::LOCALHOST.into(),
            Some("localhost") => Ipv4Addr::LOCALHOST.into(),
            Some(address) => address.trim_start_matches('[').trim_end_matches(']').parse().map_err(|_| ForwardError)?,
        };
        Ok(Self { address, local, remote })
    }
}

/// A token for a port, renewed in time.
struct Door {
    endpoint: Endpoint,
    port: u16,
    token: Mutex<Option<(Instant, HeaderValue)>>,
}

impl Door {
    async fn token(&self) -> anyhow::Result<HeaderValue> {
        let mut token = self.token.lock().await;
        match &*token {
            Some((made, token)) if made.elapsed() < TOKEN_RENEWAL => Ok(token.clone()),
            _ => {
                let fresh = self.endpoint.port_token(self.port, TOKEN_MINUTES).await?;
                Ok(token.insert((Instant::now(), fresh)).1.clone())
            }
        }
    }

    async fn carry(&self, mut near: TcpStream) -> anyhow::Result<()> {
        near.set_nodelay(true)?;
        let mut far = self.endpoint.tcp(self.port, self.token().await?).await?;
        // Each direction ends on its own; a connection that breaks is everyday life.
        let _ = copy_bidirectional(&mut near, &mut far).await;
        Ok(())
    }
}

/// `hearth forward`: until it is interrupted.
pub async fn run(client: Client, args: ForwardArgs) -> anyhow::Result<ExitCode> {
    let endpoint = Endpoint::find(client, &args.id).await?;
    for forward in args.ports {
        let listener = TcpListener::bind((forward.address, forward.local)).await;
        let listener = listener.with_context(|| format!("listening on {}:{}", forward.address, forward.local))?;
        let door = Door { endpoint: endpoint.clone(), port: forward.remote, token: Mutex::new(None) };
        // Says at once what would else be said to every connection.
        door.token().await?;
        println!("{} -> {} port {}", listener.local_addr()?, endpoint.id, forward.remote);
        tokio::spawn(serve(listener, std::sync::Arc::new(door)));
    }
    tokio::signal::ctrl_c().await?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(listener: TcpListener, door: std::sync::Arc<Door>) {
    loop {
        match listener.accept().await {
            Ok((near, _)) => {
                let door = door.clone();
                tokio::spawn(async move {
                    if let Err(error) = door.carry(near).await {
                        eprintln!("hearth: {error:#}");
                    }
                });
            }
            Err(error) => {
                eprintln!("hearth: accepting a connection: {error}");
                // Out of file descriptors: nothing tells when there are some again.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_ssh_and_docker_write_them() {
        let forward = |address: &str, local, remote| Ok(Forward { address: address.parse().unwrap(), local, remote });
        assert_eq!("5000".parse(), forward("127.0.0.1", 5000, 5000));
        assert_eq!("80:5000".parse(), forward("127.0.0.1", 80, 5000));
        assert_eq!("0:5000".parse(), forward("127.0.0.1", 0, 5000));
        assert_eq!("0.0.0.0:80:5000".parse(), forward("0.0.0.0", 80, 5000));
        assert_eq!("[::1]:80:5000".parse(), forward("::1", 80, 5000));
        for wrong in ["", "x", "80:0", "0", "80:65536", "here:80:80", "1:2:3:4"] {
            assert_eq!(wrong.parse::<Forward>(), Err(ForwardError), "{wrong}");
        }
    }
}
