//! The addresses between host and slots.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use ipnet::Ipv4Net;
use serde::Deserialize;

use super::GATEWAY;

/// Addresses of one link.
const LINK: u32 = 4;

/// A range of addresses for the links between host and slots, four for each. Guests never see them, and can never reach them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Links(Ipv4Net);

/// A range is not fit for links.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinksError {
    /// not a network
    #[error("\"{0}\" is no network: write such as 10.201.0.0/16")]
    Network(String),
    /// too large or too small
    #[error("{0} is too large or too small: its prefix must be from /12 to /28, and each slot takes four addresses")]
    Size(Ipv4Net),
    /// not for private use
    #[error("{0} is not a range for private use: take one within 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 or 100.64.0.0/10")]
    Public(Ipv4Net),
    /// where the guests are
    #[error("{0} has addresses of the guests' own link, 10.0.2.0/24")]
    Guests(Ipv4Net),
}

impl Links {
    /// The range.
    pub fn network(self) -> Ipv4Net {
        self.0
    }

    pub(super) fn count(self) -> u32 {
        (1 << (32 - u32::from(self.0.prefix_len()))) / LINK
    }

    /// The host's and the slot's address on a link.
    pub(super) fn ends(self, index: u32) -> (Ipv4Addr, Ipv4Addr) {
        let link = u32::from(self.0.network()) + index * LINK;
        (Ipv4Addr::from(link + 1), Ipv4Addr::from(link + 2))
    }
}

impl Default for Links {
    fn default() -> Self {
        Self(Ipv4Net::new_assert(Ipv4Addr::new(10, 201, 0, 0), 16))
    }
}

impl FromStr for Links {
    type Err = LinksError;

    fn from_str(text: &str) -> Result<Self, LinksError> {
        let network: Ipv4Net = text.parse().map_err(|_| LinksError::Network(text.to_owned()))?;
        if network.addr() != network.network() {
            return Err(LinksError::Network(text.to_owned()));
        }
        if !(12..=28).contains(&network.prefix_len()) {
            return Err(LinksError::Size(network));
        }
        let private = [([10, 0, 0, 0], 8), ([172, 16, 0, 0], 12), ([192, 168, 0, 0], 16), ([100, 64, 0, 0], 10)];
        if !private.into_iter().any(|(address, prefix)| Ipv4Net::new_assert(address.into(), prefix).contains(&network)) {
            return Err(LinksError::Public(network));
        }
        let guests = Ipv4Net::new_assert(GATEWAY, 24).trunc();
        if network.contains(&guests) || guests.contains(&network) {
            return Err(LinksError::Guests(network));
        }
        Ok(Self(network))
    }
}

impl TryFrom<String> for Links {
    type Error = LinksError;

    fn try_from(text: String) -> Result<Self, LinksError> {
        text.parse()
    }
}

impl fmt::Display for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_link_has_four_addresses() {
        let links: Links = "192.168.7.0/24".parse().unwrap();
        assert_eq!(links.count(), 64);
        assert_eq!(links.ends(63), (Ipv4Addr::new(192, 168, 7, 253), Ipv4Addr::new(192, 168, 7, 254)));
        assert_eq!(Links::default().count(), 1 << 14);
    }

    #[test]
    fn a_range_that_is_not_fit_is_refused_with_the_reason() {
        for (text, part) in [
            ("10.201.0.0", "\"10.201.0.0\" is no network"),
            ("10.201.0.1/16", "\"10.201.0.1/16\" is no network"),
            ("10.0.0.0/8", "too large"),
            ("10.9.0.0/30", "too small"),
            ("192.0.2.0/24", "private use"),
            ("10.0.0.0/16", "guests' own link"),
            ("10.0.2.16/28", "guests' own link"),
        ] {
            let error = text.parse::<Links>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
