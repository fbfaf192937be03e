//! The server's listeners, bound before anything is started that would have to be stopped again.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::net::TcpListener;

use crate::config::{DEFAULT_ENDPOINT, ServeConfig, reachable};

/// Port that `https` means.
const HTTPS: u16 = 443;

/// The listeners of the network. The administrator's socket is [`crate::data_dir::DataDir::listen`]'s.
#[derive(Debug)]
pub struct Listeners {
    pub api: TcpListener,
    /// At least one.
    pub endpoints: Vec<TcpListener>,
    /// URL of the API for clients on this host.
    pub api_url: String,
    /// Where clients on this host find the endpoints.
    pub endpoint: SocketAddr,
}

/// An address cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("listening on {address}: {source}; choose another address with --{flag}, port 0 picks a free one")]
pub struct BindError {
    flag: &'static str,
    address: SocketAddr,
    source: io::Error,
}

impl Listeners {
    /// Binds them.
    pub async fn bind(config: &ServeConfig) -> Result<Self, BindError> {
        let (api, api_address) = bind("api", config.api).await?;
        let (endpoint, address) = bind("endpoint", config.endpoint.unwrap_or(DEFAULT_ENDPOINT)).await?;
        let mut listeners = Self { api, endpoints: vec![endpoint], api_url: format!("http://{api_address}"), endpoint: address };
        if config.endpoint.is_none() {
            // Nobody asked for it: without it, clients write the port.
            match bind("endpoint", SocketAddr::new(DEFAULT_ENDPOINT.ip(), HTTPS)).await {
                Ok((https, address)) => {
                    listeners.endpoints.push(https);
                    listeners.endpoint = address;
                }
                Err(error) => tracing::info!(%error, "endpoints' URLs need the port {}", listeners.endpoint.port()),
            }
        }
        listeners.add_other_loopbacks().await;
        Ok(listeners)
    }

    /// Names below `localhost` resolve to `::1` too, and some clients try nothing else.
    async fn add_other_loopbacks(&mut self) {
        let addresses: Vec<SocketAddr> = self.endpoints.iter().filter_map(|listener| listener.local_addr().ok()).collect();
        for address in addresses.into_iter().filter(|address| address.ip() == Ipv4Addr::LOCALHOST) {
            match bind("endpoint", SocketAddr::new(Ipv6Addr::LOCALHOST.into(), address.port())).await {
                Ok((listener, _)) => self.endpoints.push(listener),
                Err(error) => tracing::info!(%error, "clients that take ::1 for localhost will not find the endpoints"),
            }
        }
    }
}

async fn bind(flag: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), BindError> {
    let error = |source| BindError { flag, address, source };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    Ok((listener, reachable(bound)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn port_0_becomes_a_port_that_clients_can_be_told() {
        let any: SocketAddr = "0.0.0.0:0".parse().unwrap();
        let config = ServeConfig { api: any, endpoint: Some(any), ..ServeConfig::default() };
        let listeners = Listeners::bind(&config).await.unwrap();
        let port = listeners.api.local_addr().unwrap().port();
        assert_ne!(port, 0);
        assert_eq!(listeners.api_url, format!("http://127.0.0.1:{port}"));
        assert_eq!(listeners.endpoint.ip().to_string(), "127.0.0.1");
        assert_eq!(listeners.endpoints.len(), 1);
    }

    #[tokio::test]
    async fn endpoints_on_loopback_are_found_by_both_protocols() {
        let config =
            ServeConfig { api: "127.0.0.1:0".parse().unwrap(), endpoint: Some("127.0.0.1:0".parse().unwrap()), ..ServeConfig::default() };
        let listeners = Listeners::bind(&config).await.unwrap();
        assert_eq!(listeners.endpoint.ip().to_string(), "127.0.0.1");
        if TcpListener::bind("[::1]:0").await.is_err() {
            eprintln!("skipped: this host has no IPv6 loopback");
            return;
        }
        let other = listeners.endpoints.iter().filter_map(|listener| listener.local_addr().ok()).find(SocketAddr::is_ipv6);
        assert_eq!(other.map(|address| address.to_string()), Some(format!("[::1]:{}", listeners.endpoint.port())));
    }

    #[tokio::test]
    async fn an_address_in_use_is_named_with_the_flag_that_changes_it() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = ServeConfig { api: taken.local_addr().unwrap(), ..ServeConfig::default() };
        let error = Listeners::bind(&config).await.unwrap_err().to_string();
        assert!(error.contains(&taken.local_addr().unwrap().to_string()) && error.contains("--api"), "{error}");
    }
}
