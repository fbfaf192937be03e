//! The nftables rules of host and slots, as text for `nft -f -`.

use std::fmt::Write;

use ipnet::Ipv4Net;

use super::{
    GATEWAY, GUEST,
    egress::{Door, EgressPolicy, EgressRule, PortRange, Protocol, Target},
};

/// Addresses that are open at one door at a time, as far as the kernel is concerned. More than [`super::doors::MOST_OPEN`], because what
/// has expired is collected a little later.
const DOOR_SIZE: usize = 4 * super::doors::MOST_OPEN;

/// Nothing that comes out of a slot may reach the host itself or another slot; what it sends on leaves with the host's address. A refusal is an
/// answer, so that clients fail at once.
pub fn host(table: &str, links: Ipv4Net) -> String {
    format!(
        r#"table inet {table}
delete table inet {table}
table inet {table} {{
    chain refuse {{
        meta l4proto tcp reject with tcp reset
        reject with icmpx type admin-prohibited
    }}
    chain input {{
        type filter hook input priority filter - 10; policy accept;
        iifname "hth*" counter goto refuse
    }}
    chain forward {{
        type filter hook forward priority filter - 10; policy accept;
        iifname "hth*" oifname "hth*" counter goto refuse
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        iifname "hth*" ip saddr {links} masquerade
    }}
}}
"#
    )
}

/// The guest may open connections outwards, with its own address only, as far as `egress` lets it, and whatever that says not to link-local
/// addresses, the slot or other slots' links.
pub fn slot(links: Ipv4Net) -> String {
    format!(
        r#"table ip slot {{
    chain refuse {{
        meta l4proto tcp reject with tcp reset
        reject with icmp type admin-prohibited
    }}
    chain egress {{
        accept
    }}
    chain gateway {{
    }}
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "lo" accept
        iifname "tap0" ip saddr {GUEST} ip daddr {GATEWAY} jump gateway
        iifname "tap0" ip saddr {GUEST} goto refuse
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname "tap0" ip saddr {GUEST} ip daddr {{ 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, {links} }} goto refuse
        iifname "tap0" oifname "up0" ip saddr {GUEST} goto egress
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "up0" masquerade
    }}
}}
table ip6 slot {{
    chain forward {{
        type filter hook forward priority filter; policy drop;
    }}
}}
"#
    )
}

/// Lets nothing out of a slot any more.
pub fn nothing() -> &'static str {
    "flush chain ip slot egress\nadd rule ip slot egress goto refuse\n"
}

/// Makes a slot enforce a policy.
pub fn policy(policy: &EgressPolicy) -> String {
    let mut text = "flush chain ip slot egress\ntable ip slot {\n".to_owned();
    for number in 0..policy.doors().len() {
        let _ = writeln!(text, "set {} {{ type ipv4_addr; flags timeout; size {DOOR_SIZE}; }}", door_name(number));
    }
    text.push_str("chain egress {\n");
    let mut add = |to: &str, door: Door<'_>, verdict: &str| {
        let _ = writeln!(text, "{to}{}{verdict}", traffic(door));
    };
    for rule in policy.deny() {
        if let Some(to) = addresses(rule) {
            add(&to, rule.door(), "goto refuse");
        }
    }
    for rule in policy.allow() {
        if let Some(to) = addresses(rule) {
            add(&to, rule.door(), "accept");
        }
    }
    for (number, door) in policy.doors().into_iter().enumerate() {
        add(&format!("ip daddr @{} ", door_name(number)), door, "accept");
    }
    text.push_str("goto refuse\n}\n}\n");
    text
}

/// Lets the guest ask the slot's resolver. What it sends to the resolvers of the host, which it may remember from the life that its snapshot
/// was taken in, goes to the slot's too.
pub fn resolver(remembered: &[std::net::Ipv4Addr]) -> String {
    let mut text = "add rule ip slot gateway meta l4proto { tcp, udp } th dport 53 accept\n".to_owned();
    if !remembered.is_empty() {
        text.push_str("add chain ip slot prerouting { type nat hook prerouting priority dstnat; policy accept; }\n");
    }
    for address in remembered {
        let _ = writeln!(
            text,
            "add rule ip slot prerouting iifname \"tap0\" ip daddr {address} meta l4proto {{ tcp, udp }} th dport 53 redirect"
        );
    }
    text
}

/// Lets the guest reach a TCP port of its gateway.
pub fn shared(port: u16) -> String {
    format!("add rule ip slot gateway tcp dport {port} accept\n")
}

/// Name of the set of a door's open addresses.
pub fn door_name(number: usize) -> String {
    format!("door{number}")
}

fn addresses(rule: &EgressRule) -> Option<String> {
    match &rule.to {
        Target::Any => Some(String::new()),
        Target::Network(network) => Some(format!("ip daddr {network} ")),
        // Addresses of names are known only when they are resolved.
        Target::Name(_) | Target::Below(_) => None,
    }
}

fn traffic(door: Door<'_>) -> String {
    let protocols = match (door.protocol, door.ports.is_empty()) {
        (Protocol::Any, true) => return String::new(),
        (Protocol::Any, false) => "{ tcp, udp }",
        (Protocol::Tcp, _) => "tcp",
        (Protocol::Udp, _) => "udp",
    };
    if door.ports.is_empty() {
        return format!("meta l4proto {protocols} ");
    }
    let ports: Vec<_> = door.ports.iter().map(PortRange::to_string).collect();
    format!("meta l4proto {protocols} th dport {{ {} }} ", ports.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_denies_first_then_allows_then_refuses() {
        let parsed =
            EgressPolicy::parse("example.com:443 *.example.com:443 198.51.100.0/24:80,8000-8999/tcp *:53", "10.0.0.0/8 *:25").unwrap();
        let expected = "flush chain ip slot egress
table ip slot {
set door0 { type ipv4_addr; flags timeout; size 4096; }
chain egress {
ip daddr 10.0.0.0/8 goto refuse
meta l4proto { tcp, udp } th dport { 25 } goto refuse
ip daddr 198.51.100.0/24 meta l4proto tcp th dport { 80, 8000-8999 } accept
meta l4proto { tcp, udp } th dport { 53 } accept
ip daddr @door0 meta l4proto { tcp, udp } th dport { 443 } accept
goto refuse
}
}
";
        assert_eq!(policy(&parsed), expected);
    }
}
