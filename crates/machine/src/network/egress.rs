//! What a guest may reach: policies, the text their rules are written in, and what they say of a name.
//!
//! A rule is written `TARGET[:PORTS[/PROTOCOL]]`:
//!
//! ```text
//! 10.0.0.0/8              every port of a network
//! 192.0.2.4:443           one port of one address, TCP and UDP
//! 192.0.2.4:53/udp        the same, UDP only
//! example.com:80,443      a name, two ports
//! example.com:*/tcp       a name, every TCP port
//! *.example.com           every name below example.com, not itself (also `.example.com`)
//! *:8000-8999             a range of ports, everywhere
//! *                       everything
//! ```
//!
//! A rule without ports holds for every protocol, one with ports for TCP and UDP unless it names one. What a deny rule covers is refused, also
//! if an allow rule covers it; what no rule covers is refused.
//!
//! Names are judged when they are resolved: the slot's resolver answers for the names that are allowed, and the addresses of its answers are
//! open from then on for a while. So a denied name is one that is not answered; its address stays reachable if another rule allows it. A name
//! never opens an address of a private network: that takes a rule that says the address, or else whoever runs a name's servers could let the
//! guest into the operator's networks.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// Most rules of a policy.
pub const MAX_RULES: usize = 256;

/// What a machine's slot lets out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// Whatever the host routes.
    #[default]
    Internet,
    /// Nothing, and no name is answered.
    None,
    /// What a policy allows.
    Policy(EgressPolicy),
}

/// Rules that were checked against each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Rules", into = "Rules")]
pub struct EgressPolicy {
    allow: Vec<EgressRule>,
    deny: Vec<EgressRule>,
}

/// A policy as it is kept.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    #[serde(default)]
    allow: Vec<EgressRule>,
    #[serde(default)]
    deny: Vec<EgressRule>,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EgressRule {
    /// Whom it is about.
    pub to: Target,
    /// Which of its ports; all when there are none.
    pub ports: Vec<PortRange>,
    /// Which protocols; with [`Protocol::Any`] and ports, TCP and UDP.
    pub protocol: Protocol,
}

/// Whom a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Every address and every name.
    Any,
    /// Addresses.
    Network(Ipv4Net),
    /// A name, in lower case without a dot at its end.
    Name(String),
    /// The names below this one.
    Below(String),
}

/// Ports from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    /// The first, at least 1.
    pub first: u16,
    /// The last, at least the first.
    pub last: u16,
}

/// Protocols of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// All of them.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A rule or a policy makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EgressError {
    /// the target is neither address nor name
    #[error("\"{0}\" is neither an IPv4 address, a network such as 10.0.0.0/8, a domain name, *.DOMAIN nor *")]
    Target(String),
    /// IPv6
    #[error("\"{0}\" is an IPv6 address: MicroVMs reach IPv4 addresses only")]
    Ipv6(String),
    /// a network that does not begin where its prefix does
    #[error("\"{found}\" is inside the network {network}: write the network, or {address}/32 for the one address")]
    HostBits {
        /// The offending text.
        found: String,
        /// The network it is in.
        network: Ipv4Net,
        /// Its address.
        address: Ipv4Addr,
    },
    /// the ports cannot be read
    #[error("\"{ports}\" in \"{rule}\" are no ports: write such as 443, 80,443, 8000-8999 or *")]
    Ports {
        /// The offending text.
        ports: String,
        /// The rule it is in.
        rule: String,
    },
    /// the protocol is unknown
    #[error("\"{protocol}\" in \"{rule}\" is no protocol: write tcp or udp")]
    Protocol {
        /// The offending text.
        protocol: String,
        /// The rule it is in.
        rule: String,
    },
    /// a denied name with ports
    #[error("\"{0}\" denies ports of a name: a name is denied as a whole, because its addresses may be other names' too")]
    DeniedPorts(String),
    /// more rules than a policy may have
    #[error("{0} rules are more than the {MAX_RULES} that a policy may have")]
    TooMany(usize),
}

impl EgressPolicy {
    /// Rules to allow, and rules to deny whatever those say.
    pub fn new(allow: Vec<EgressRule>, deny: Vec<EgressRule>) -> Result<Self, EgressError> {
        if allow.len() + deny.len() > MAX_RULES {
            return Err(EgressError::TooMany(allow.len() + deny.len()));
        }
        match deny.iter().find(|rule| rule.to.is_name() && !rule.is_for_all_traffic()) {
            Some(rule) => Err(EgressError::DeniedPorts(rule.to_string())),
            None => Ok(Self { allow, deny }),
        }
    }

    /// Rules as text, separated by white space.
    pub fn parse(allow: &str, deny: &str) -> Result<Self, EgressError> {
        let rules = |text: &str| text.split_whitespace().map(str::parse).collect::<Result<Vec<_>, _>>();
        Self::new(rules(allow)?, rules(deny)?)
    }

    /// What is allowed.
    pub fn allow(&self) -> &[EgressRule] {
        &self.allow
    }

    /// What is denied.
    pub fn deny(&self) -> &[EgressRule] {
        &self.deny
    }

    /// Whether there is any name that is answered.
    pub(super) fn answers_names(&self) -> bool {
        self.allow.iter().any(|rule| rule.to == Target::Any || rule.to.is_name())
    }

    /// Whether a name is answered. It must be in lower case, without a dot at its end.
    pub(super) fn allows_name(&self, name: &str) -> bool {
        self.allow.iter().any(|rule| rule.to.covers(name)) && !self.denies_name(name)
    }

    /// Whether a deny rule covers a name.
    pub(super) fn denies_name(&self, name: &str) -> bool {
        self.deny.iter().any(|rule| rule.is_for_all_traffic() && rule.to.covers(name))
    }

    /// What the addresses of names may be reached at, each combination once. An index into it is a door's number.
    pub(super) fn doors(&self) -> Vec<Door<'_>> {
        let mut doors = Vec::new();
        for rule in self.allow.iter().filter(|rule| rule.to.is_name()) {
            if !doors.contains(&rule.door()) {
                doors.push(rule.door());
            }
        }
        doors
    }

    /// Numbers of the doors that a name's addresses are let through.
    pub(super) fn doors_of(&self, name: &str) -> Vec<usize> {
        let open = |door: &Door<'_>| self.allow.iter().any(|rule| rule.to.is_name() && rule.to.covers(name) && rule.door() == *door);
        self.doors().iter().enumerate().filter(|(_, door)| open(door)).map(|(number, _)| number).collect()
    }
}

/// Ports and protocols under which addresses of names are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Door<'a> {
    pub ports: &'a [PortRange],
    pub protocol: Protocol,
}

impl EgressRule {
    pub(super) fn door(&self) -> Door<'_> {
        Door { ports: &self.ports, protocol: self.protocol }
    }

    fn is_for_all_traffic(&self) -> bool {
        self.ports.is_empty() && self.protocol == Protocol::Any
    }
}

impl Target {
    fn is_name(&self) -> bool {
        matches!(self, Self::Name(_) | Self::Below(_))
    }

    fn covers(&self, name: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Network(_) => false,
            Self::Name(own) => own == name,
            Self::Below(parent) => name.strip_suffix(parent.as_str()).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
        }
    }
}

impl FromStr for EgressRule {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Self, EgressError> {
        if text.bytes().filter(|byte| *byte == b':').count() > 1 || text.starts_with('[') {
            return Err(EgressError::Ipv6(text.to_owned()));
        }
        let (target, rest) = text.split_once(':').map_or((text, None), |(target, rest)| (target, Some(rest)));
        let to = target.parse()?;
        let Some(rest) = rest else { return Ok(Self { to, ports: Vec::new(), protocol: Protocol::Any }) };
        let (ports, protocol) = match rest.split_once('/') {
            None => (rest, Protocol::Any),
            Some((ports, "tcp")) => (ports, Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some((_, protocol)) => return Err(EgressError::Protocol { protocol: protocol.to_owned(), rule: text.to_owned() }),
        };
        match read_ports(ports) {
            Some(ports) => Ok(Self { to, ports, protocol }),
            None => Err(EgressError::Ports { ports: ports.to_owned(), rule: text.to_owned() }),
        }
    }
}

/// Ranges in ascending order without overlap, as nftables wants them. No range stands for all ports.
fn read_ports(text: &str) -> Option<Vec<PortRange>> {
    if text == "*" {
        return Some(Vec::new());
    }
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u16>().ok()).flatten();
        let range = PortRange { first: number(first)?, last: number(last)? };
        (range.first > 0 && range.first <= range.last).then_some(range)
    };
    let mut ranges = text.split(',').map(range).collect::<Option<Vec<_>>>()?;
    ranges.sort_unstable();
    ranges.dedup_by(|next, merged| {
        let joins = u32::from(next.first) <= u32::from(merged.last) + 1;
        if joins {
            merged.last = merged.last.max(next.last);
        }
        joins
    });
    Some(ranges)
}

impl FromStr for Target {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Self, EgressError> {
        let wrong = || EgressError::Target(text.to_owned());
        if text == "*" {
            return Ok(Self::Any);
        }
        if text.contains('/') {
            let network: Ipv4Net = text.parse().map_err(|_| wrong())?;
            if network.network() != network.addr() {
                return Err(EgressError::HostBits { found: text.to_owned(), network: network.trunc(), address: network.addr() });
            }
            return Ok(if network.prefix_len() == 0 { Self::Any } else { Self::Network(network) });
        }
        if let Ok(address) = text.parse::<Ipv4Addr>() {
            return Ok(Self::Network(address.into()));
        }
        let below = text.strip_prefix("*.").or_else(|| text.strip_prefix('.'));
        let name = below.unwrap_or(text);
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if !is_name(&name) {
            return Err(wrong());
        }
        Ok(if below.is_some() { Self::Below(name) } else { Self::Name(name) })
    }
}

/// Letters, digits, hyphens and underscores in labels. A last label of digits would be a mistyped address.
pub(super) fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    let digits = text.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    text.len() <= 253 && !digits && text.split('.').all(label)
}

impl fmt::Display for EgressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.to {
            Target::Any => f.write_str("*")?,
            Target::Network(network) if network.prefix_len() == 32 => write!(f, "{}", network.addr())?,
            Target::Network(network) => write!(f, "{network}")?,
            Target::Name(name) => f.write_str(name)?,
            Target::Below(parent) => write!(f, "*.{parent}")?,
        }
        if self.is_for_all_traffic() {
            return Ok(());
        }
        f.write_str(":")?;
        if self.ports.is_empty() {
            f.write_str("*")?;
        }
        for (position, range) in self.ports.iter().enumerate() {
            write!(f, "{}{range}", if position == 0 { "" } else { "," })?;
        }
        f.write_str(match self.protocol {
            Protocol::Any => "",
            Protocol::Tcp => "/tcp",
            Protocol::Udp => "/udp",
        })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl TryFrom<Rules> for EgressPolicy {
    type Error = EgressError;

    fn try_from(rules: Rules) -> Result<Self, EgressError> {
        Self::new(rules.allow, rules.deny)
    }
}

impl From<EgressPolicy> for Rules {
    fn from(policy: EgressPolicy) -> Self {
        Self { allow: policy.allow, deny: policy.deny }
    }
}

impl TryFrom<String> for EgressRule {
    type Error = EgressError;

    fn try_from(text: String) -> Result<Self, EgressError> {
        text.parse()
    }
}

impl From<EgressRule> for String {
    fn from(rule: EgressRule) -> Self {
        rule.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert_eq, proptest};

    use super::*;

    fn rule(text: &str) -> EgressRule {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn every_form_of_a_rule_is_read_and_written_back() {
        for (text, canonical) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("192.0.2.4/32", "192.0.2.4"),
            ("192.0.2.4:443", "192.0.2.4:443"),
            ("10.0.0.0/8:53/udp", "10.0.0.0/8:53/udp"),
            ("Example.COM.:443/tcp", "example.com:443/tcp"),
            (".example.com", "*.example.com"),
            ("*.example.com:*", "*.example.com"),
            ("*.example.com:*/tcp", "*.example.com:*/tcp"),
            ("_dmarc.example.com", "_dmarc.example.com"),
            ("0.0.0.0/0", "*"),
            ("*:443,80,8000-8999,81", "*:80-81,443,8000-8999"),
        ] {
            assert_eq!(rule(text).to_string(), canonical, "{text}");
            assert_eq!(rule(canonical), rule(text));
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_written_so_that_it_is_read_the_same(text in "[*.a-z0-9_-]{0,12}(/[0-9]{1,2})?(:[0-9,*-]{1,12}(/(tcp|udp))?)?|\\PC*") {
            if let Ok(read) = text.parse::<EgressRule>() {
                prop_assert_eq!(read.to_string().parse::<EgressRule>(), Ok(read));
            }
        }
    }

    #[test]
    fn a_rule_that_makes_no_sense_is_refused_with_its_text() {
        for (text, part) in [
            ("", "\"\" is neither"),
            ("1.2.3", "\"1.2.3\" is neither"),
            ("1.2.3.256", "\"1.2.3.256\" is neither"),
            ("10.0.0.0/33", "\"10.0.0.0/33\" is neither"),
            ("10.1.2.3/8", "\"10.1.2.3/8\" is inside the network 10.0.0.0/8"),
            ("a..b", "\"a..b\" is neither"),
            ("a*.example.com", "\"a*.example.com\" is neither"),
            ("*.*.example.com", "is neither"),
            ("exa mple.com", "is neither"),
            ("2001:db8::1", "\"2001:db8::1\" is an IPv6 address"),
            ("[::1]:80", "IPv6"),
            ("example.com:", "\"\" in \"example.com:\" are no ports"),
            ("example.com:0", "\"0\" in"),
            ("example.com:+80", "\"+80\" in"),
            ("example.com:65536", "\"65536\" in"),
            ("example.com:90-80", "\"90-80\" in"),
            ("example.com:80/icmp", "\"icmp\" in \"example.com:80/icmp\" is no protocol"),
        ] {
            let error = text.parse::<EgressRule>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_policy_is_refused_when_it_denies_ports_of_a_name_or_grows_too_large() {
        let error = EgressPolicy::parse("*", "example.com:25").unwrap_err();
        assert_eq!(error, EgressError::DeniedPorts("example.com:25".to_owned()));
        let many = "192.0.2.1 ".repeat(MAX_RULES + 1);
        assert_eq!(EgressPolicy::parse(&many, ""), Err(EgressError::TooMany(MAX_RULES + 1)));
        assert!(EgressPolicy::parse("*", "*:25 example.com").is_ok());
    }

    #[test]
    fn deny_wins_over_allow_and_names_cover_what_they_say() {
        let policy = EgressPolicy::parse("*.example.com:443 example.org 10.0.0.0/8", "secret.example.com *.org *:25").unwrap();
        for (name, allowed) in [
            ("www.example.com", true),
            ("a.b.example.com", true),
            ("example.com", false),
            ("notexample.com", false),
            (".example.com", false),
            ("secret.example.com", false),
            ("deep.secret.example.com", true),
            ("example.org", false),
            ("example.net", false),
        ] {
            assert_eq!(policy.allows_name(name), allowed, "{name}");
        }
        let open = EgressPolicy::parse("*:443", "bad.example.com").unwrap();
        assert!(open.allows_name("example.net") && !open.allows_name("bad.example.com"));
        assert!(!EgressPolicy::parse("*", "*").unwrap().allows_name("example.net"));
        assert!(!EgressPolicy::parse("10.0.0.0/8", "").unwrap().answers_names());
    }

    #[test]
    fn names_with_the_same_ports_share_a_door() {
        let policy = EgressPolicy::parse("a.test:443 b.test:443 *.test:80 *.test:443/tcp *:25", "").unwrap();
        assert_eq!(policy.doors().len(), 3);
        assert_eq!(policy.doors_of("a.test"), [0, 1, 2]);
        assert_eq!(policy.doors_of("c.test"), [1, 2]);
        assert!(policy.doors_of("example.com").is_empty());
    }

    #[test]
    fn a_policy_is_kept_as_the_text_of_its_rules() {
        let egress = Egress::Policy(EgressPolicy::parse("example.com:443", "10.0.0.0/8").unwrap());
        let json = serde_json::to_string(&egress).unwrap();
        assert_eq!(json, r#"{"policy":{"allow":["example.com:443"],"deny":["10.0.0.0/8"]}}"#);
        assert_eq!(serde_json::from_str::<Egress>(&json).unwrap(), egress);
        assert_eq!(serde_json::from_str::<Egress>("\"internet\"").unwrap(), Egress::default());
        let error = serde_json::from_str::<Egress>(r#"{"policy":{"allow":["nowhere:0"]}}"#).unwrap_err();
        assert!(error.to_string().contains("\"0\" in \"nowhere:0\""), "{error}");
    }
}
