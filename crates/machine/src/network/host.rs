//! What the host's own network is like.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
};

/// The host's resolvers: those that a guest can reach, and those that the host itself can.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Nameservers {
    /// Not those on the host's loopback.
    pub for_guests: Vec<Ipv4Addr>,
    /// All of them.
    pub for_host: Vec<IpAddr>,
}

impl Nameservers {
    /// Those that the operator names.
    pub fn fixed(servers: Vec<Ipv4Addr>) -> Self {
        Self { for_host: servers.iter().copied().map(IpAddr::V4).collect(), for_guests: servers }
    }

    /// Those in the host's configuration.
    pub fn of_host() -> Self {
        let found: Vec<_> = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"]
            .into_iter()
            .filter_map(|path| fs::read_to_string(path).ok())
            .map(|text| parse(&text))
            .collect();
        let for_guests = found.iter().map(|servers| reachable(servers)).find(|servers| !servers.is_empty()).unwrap_or_default();
        let for_host = found.into_iter().find(|servers| !servers.is_empty()).unwrap_or_default();
        Self { for_guests, for_host }
    }
}

fn parse(resolv_conf: &str) -> Vec<IpAddr> {
    resolv_conf.lines().filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok()).collect()
}

fn reachable(servers: &[IpAddr]) -> Vec<Ipv4Addr> {
    let ipv4 = |server: &IpAddr| match server {
        IpAddr::V4(address) if !address.is_loopback() => Some(*address),
        _ => None,
    };
    servers.iter().filter_map(ipv4).collect()
}

/// MTU of the device of the default route: a guest that believes in more would lose its large packets there.
pub fn uplink_mtu() -> u16 {
    let device = fs::read_to_string("/proc/net/route").ok().and_then(|table| default_device(&table).map(str::to_owned));
    device
        .and_then(|name| fs::read_to_string(format!("/sys/class/net/{name}/mtu")).ok())
        .and_then(|text| text.trim().parse::<u16>().ok())
        .map_or(1500, |mtu| mtu.min(1500))
}

fn default_device(route_table: &str) -> Option<&str> {
    route_table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        let (device, destination) = (fields.next()?, fields.next()?);
        (destination == "00000000").then_some(device)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_on_loopback_are_left_out_for_guests() {
        let servers = parse("# comment\nsearch lan\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver 2001:db8::1\n");
        assert_eq!(servers.len(), 3);
        assert_eq!(reachable(&servers), [Ipv4Addr::new(192, 0, 2, 1)]);
    }

    #[test]
    fn the_default_route_names_the_uplink() {
        let table = "Iface\tDestination\tGateway\nlan0\t000200C0\t00000000\neth0\t00000000\t010200C0\n";
        assert_eq!(default_device(table), Some("eth0"));
        assert_eq!(default_device("Iface\tDestination\n"), None);
    }
}
