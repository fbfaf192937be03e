//! `hearth forward`: ports of a MicroVM on this machine, as raw TCP.

use std::{
    net::{IpAddr, Ipv4Addr},
    process::ExitCode,
    str::FromStr,
    time::Duration,
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

/// Life of a token, as long as there are.
const TOKEN_MINUTES: u32 = 60;

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

/// A token that is good for a while: nobody knows for how long, since hosts sleep and change their clocks.
#[derive(Default)]
struct Pass(Mutex<Option<HeaderValue>>);

impl Pass {
    /// Enters with the present token, and if that is not good any more with a fresh one. `enter` says `None` to a token that is not good.
    async fn enter<T, M, E>(&self, make: impl Fn() -> M, enter: impl Fn(HeaderValue) -> E) -> anyhow::Result<T>
    where
        M: Future<Output = anyhow::Result<HeaderValue>>,
        E: Future<Output = anyhow::Result<Option<T>>>,
    {
        let token = self.other_than(None, &make).await?;
        if let Some(entered) = enter(token.clone()).await? {
            return Ok(entered);
        }
        let token = self.other_than(Some(&token), &make).await?;
        enter(token).await?.context("the endpoint refuses a fresh token: is the MicroVM still there, and does it let HTTP in?")
    }

    /// The present token, or a fresh one if that is the one that was refused. Several who find out together make one.
    async fn other_than<M>(&self, refused: Option<&HeaderValue>, make: impl Fn() -> M) -> anyhow::Result<HeaderValue>
    where
        M: Future<Output = anyhow::Result<HeaderValue>>,
    {
        let mut present = self.0.lock().await;
        match &*present {
            Some(token) if Some(token) != refused => Ok(token.clone()),
            _ => Ok(present.insert(make().await?).clone()),
        }
    }
}

/// A port, and the token for it.
struct Door {
    endpoint: Endpoint,
    port: u16,
    pass: Pass,
}

impl Door {
    async fn token(&self) -> anyhow::Result<HeaderValue> {
        self.endpoint.port_token(self.port, TOKEN_MINUTES).await
    }

    async fn carry(&self, mut near: TcpStream) -> anyhow::Result<()> {
        near.set_nodelay(true)?;
        let mut far = self.pass.enter(|| self.token(), |token| self.endpoint.tcp(self.port, token)).await?;
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
        let door = Door { endpoint: endpoint.clone(), port: forward.remote, pass: Pass::default() };
        // Says at once what would else be said to every connection.
        door.pass.other_than(None, || door.token()).await?;
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
    use std::{
        collections::BTreeSet,
        sync::{
            Mutex as StdMutex,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use super::*;

    #[tokio::test]
    async fn a_token_is_kept_until_it_is_refused_and_then_made_once() {
        let (made, good) = (AtomicUsize::new(0), StdMutex::new(BTreeSet::new()));
        let make = async || {
            let token = made.fetch_add(1, Ordering::Relaxed).to_string();
            good.lock().unwrap().insert(token.clone());
            tokio::task::yield_now().await;
            Ok(HeaderValue::try_from(token)?)
        };
        let enter = async |token: HeaderValue| {
            tokio::task::yield_now().await;
            Ok(good.lock().unwrap().contains(token.to_str()?).then(|| token.clone()))
        };
        let pass = Pass::default();
        for _ in 0..2 {
            assert_eq!(pass.enter(make, enter).await.unwrap(), "0");
        }
        good.lock().unwrap().clear();
        let (first, second) = tokio::join!(pass.enter(make, enter), pass.enter(make, enter));
        assert_eq!((first.unwrap(), second.unwrap()), (HeaderValue::from_static("1"), HeaderValue::from_static("1")));
        assert_eq!(
            pass.enter(make, async |_| Ok(None::<()>)).await.unwrap_err().to_string().split(':').next(),
            Some("the endpoint refuses a fresh token")
        );
    }

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
