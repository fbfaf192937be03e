//! The server's listeners, bound before anything is started that would have to be stopped again.

use std::{io, net::SocketAddr};

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
        Ok(listeners)
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
    async fn an_address_in_use_is_named_with_the_flag_that_changes_it() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = ServeConfig { api: taken.local_addr().unwrap(), ..ServeConfig::default() };
        let error = Listeners::bind(&config).await.unwrap_err().to_string();
        assert!(error.contains(&taken.local_addr().unwrap().to_string()) && error.contains("--api"), "{error}");
    }
}
