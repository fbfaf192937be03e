//! Judges the facts about a host. One function for each prerequisite.

use std::time::{Duration, SystemTime};

use hearth_machine::{probe::KvmProbe, qemu::Accelerator};

use super::{
    Facts, Finding,
    Verdict::{Fail, Ok as Good, Warn},
};
use crate::config::{EngineChoice, ServeConfig};

const GIB: u64 = 1 << 30;
/// Less than this many free bytes hold no image.
const LEAST_DISK: u64 = GIB;
/// Less than this many free bytes fill up with a few images.
const GOOD_DISK: u64 = 8 * GIB;
/// Less than this much memory runs no MicroVM of the smallest size beside the build of another.
const GOOD_MEMORY: u64 = 3 * GIB / 2;

/// Programs, with what each is for and the Debian package that has it.
const PROGRAMS: &[(&str, &str, &str)] = &[
    ("qemu-system-x86_64", "it runs the MicroVMs", "qemu-system-x86"),
    ("qemu-img", "it makes the MicroVMs' disks", "qemu-utils"),
    ("runc", "it isolates image builds from this host", "runc"),
    ("nft", "it keeps the MicroVMs' networks apart", "nftables"),
    ("ip", "it makes the MicroVMs' networks", "iproute2"),
];

/// Judges everything, in the order in which a person would put things right.
pub fn judge(facts: &Facts, config: &ServeConfig) -> Vec<Finding> {
    let mut findings = vec![platform(facts), root(facts), engine(facts, config)];
    findings.extend(PROGRAMS.iter().map(|&(name, why, package)| program(facts, name, why, package)));
    findings.extend(qemu_versions(facts));
    findings.extend([tun(facts), namespaces(facts), ip_forward(facts), kit(facts), disk(facts)]);
    findings.push(build_isolation(facts, config));
    findings.extend(build_cache(facts, config));
    findings.extend([memory(facts), forwarding(facts, config), endpoint_name(facts, config)]);
    findings.extend(certificates(facts, SystemTime::now()));
    findings.extend(https(facts));
    findings.extend(ports(facts));
    findings
}

fn platform(facts: &Facts) -> Finding {
    let good = facts.arch == "x86_64" && facts.kernel.starts_with("Linux");
    Finding {
        name: "platform",
        verdict: if good { Good } else { Fail },
        found: format!("{} on {}", facts.kernel, facts.arch),
        why: "the MicroVMs' kernel and the images are for Linux on x86_64",
        fix: "run hearth on an x86_64 Linux host".to_owned(),
    }
}

fn root(facts: &Facts) -> Finding {
    Finding {
        name: "root",
        verdict: if facts.root { Good } else { Fail },
        found: if facts.root { "runs as root" } else { "does not run as root" }.to_owned(),
        why: "network namespaces, image builds and giving each MicroVM a user of its own need it",
        fix: "run this with sudo".to_owned(),
    }
}

fn engine(facts: &Facts, config: &ServeConfig) -> Finding {
    let kvm = &facts.kvm;
    let native = matches!(kvm, KvmProbe::Native(_));
    let finding = |verdict, found: String, why, fix: &str| Finding { name: "engine", verdict, found, why, fix: fix.to_owned() };
    let emulation = "software emulation is slow, and QEMU does not call it a security boundary: a hostile guest may break out";
    let for_own_code = "for code that you trust, nothing; for other code, a host whose /dev/kvm runs kernels natively (bare metal or nested virtualisation)";
    match config.engine {
        EngineChoice::Tcg => {
            finding(Warn, "tcg: the configuration says so".to_owned(), emulation, "engine = \"auto\" in the configuration")
        }
        EngineChoice::Auto | EngineChoice::Kvm if native => finding(Good, format!("kvm: {kvm}"), "", ""),
        EngineChoice::Auto => finding(Warn, format!("tcg: {kvm}"), emulation, for_own_code),
        EngineChoice::Kvm => finding(
            Fail,
            format!("kvm cannot be used: {kvm}"),
            "the configuration demands kvm",
            "engine = \"auto\" in the configuration, or a host whose /dev/kvm runs kernels natively",
        ),
    }
}

/// What MicroVMs run with, given that [`judge`] found no failure.
pub fn accelerator(facts: &Facts, config: &ServeConfig) -> Accelerator {
    match config.engine {
        EngineChoice::Kvm => Accelerator::Kvm,
        EngineChoice::Auto if matches!(facts.kvm, KvmProbe::Native(_)) => Accelerator::Kvm,
        EngineChoice::Auto | EngineChoice::Tcg => Accelerator::Tcg,
    }
}

fn program(facts: &Facts, name: &'static str, why: &'static str, package: &str) -> Finding {
    let version = facts.programs.get(name);
    Finding {
        name,
        verdict: if version.is_some() { Good } else { Fail },
        found: version.cloned().unwrap_or_else(|| "not found on the PATH".to_owned()),
        why,
        fix: format!("apt-get install {package} (and have /usr/sbin on the PATH)"),
    }
}

/// Snapshots depend on QEMU's version, and its parts come in several packages that can be of different ones.
fn qemu_versions(facts: &Facts) -> Option<Finding> {
    let version = |program| facts.programs.get(program).and_then(|said| version_number(said));
    let (system, image) = (version("qemu-system-x86_64")?, version("qemu-img")?);
    (system != image).then(|| Finding {
        name: "qemu versions",
        verdict: Fail,
        found: format!("qemu-system-x86_64 is {system}, qemu-img is {image}"),
        why: "disks made by one version are meant to be used by the same",
        fix: "apt-get install qemu-system-x86 qemu-utils".to_owned(),
    })
}

/// The first word that begins with a digit.
fn version_number(said: &str) -> Option<&str> {
    said.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()))
}

fn tun(facts: &Facts) -> Finding {
    Finding {
        name: "/dev/net/tun",
        verdict: if facts.tun.is_ok() { Good } else { Fail },
        found: facts.tun.clone().err().unwrap_or_else(|| "can be opened".to_owned()),
        why: "each MicroVM has a network device of this kind",
        fix: "modprobe tun; in a container, give it the device /dev/net/tun".to_owned(),
    }
}

fn namespaces(facts: &Facts) -> Finding {
    Finding {
        name: "namespaces",
        verdict: if facts.namespaces.is_ok() { Good } else { Fail },
        found: facts.namespaces.clone().err().unwrap_or_else(|| "network namespaces can be made".to_owned()),
        why: "each MicroVM has a network namespace of its own",
        fix: "run as root with CAP_SYS_ADMIN; in a container, run it privileged".to_owned(),
    }
}

fn ip_forward(facts: &Facts) -> Finding {
    let (verdict, found) = match facts.ip_forward {
        Some(true) => (Good, "IPv4 forwarding is on"),
        Some(false) => (Warn, "IPv4 forwarding is off; the server turns it on when it starts"),
        None => (Warn, "whether IPv4 forwarding is on cannot be told"),
    };
    Finding {
        name: "ip_forward",
        verdict,
        found: found.to_owned(),
        why: "the MicroVMs' way to the network leads through this host",
        fix: "sysctl -w net.ipv4.ip_forward=1".to_owned(),
    }
}

fn kit(facts: &Facts) -> Finding {
    let (verdict, found) = match &facts.kit {
        Ok(kit) => (Good, kit.clone()),
        Err(error) => (Fail, error.clone()),
    };
    Finding {
        name: "guest kit",
        verdict,
        found,
        why: "the MicroVMs' kernel, their first process and the base image are in it",
        fix: "cargo xtask kit, or name the kit's directory: `kit` in the configuration, or HEARTH_KIT".to_owned(),
    }
}

fn disk(facts: &Facts) -> Finding {
    let (verdict, found) = match facts.disk_free {
        Some(free) if free < LEAST_DISK => (Fail, gib(free)),
        Some(free) if free < GOOD_DISK => (Warn, gib(free)),
        Some(free) => (Good, gib(free)),
        None => (Warn, "cannot be told".to_owned()),
    };
    let place = facts.data_dir.display();
    Finding {
        name: "disk space",
        verdict,
        found: format!("{found} free for {place}"),
        why: "an image takes 0.5 to 2 GiB, a suspended MicroVM what it changed; below 1 GiB nothing can be built",
        fix: format!("free space where {place} is, or choose another --data-dir"),
    }
}

/// Says what builds run in.
fn build_isolation(facts: &Facts, config: &ServeConfig) -> Finding {
    let microvm = config.build_isolation.is_microvm(accelerator(facts, config));
    Finding {
        name: "image builds",
        verdict: Good,
        found: if microvm { "run in a MicroVM of their own" } else { "run in namespaces of this host" }.to_owned(),
        why: "",
        fix: String::new(),
    }
}

/// Says what is there; it is kept within its limits by itself.
fn build_cache(facts: &Facts, config: &ServeConfig) -> Option<Finding> {
    let (place, usage) = facts.build_cache.as_ref()?;
    let (mib, most, days) = (usage.bytes >> 20, config.build_cache.max_mib, config.build_cache.max_days);
    Some(Finding {
        name: "build cache",
        verdict: Good,
        found: format!("{mib} of {most} MiB, {} stores of layers in {}, used for {days} days", usage.stores, place.display()),
        why: "",
        fix: String::new(),
    })
}

fn memory(facts: &Facts) -> Finding {
    let verdict = if facts.memory_available.is_some_and(|bytes| bytes >= GOOD_MEMORY) { Good } else { Warn };
    Finding {
        name: "memory",
        verdict,
        found: facts.memory_available.map_or_else(|| "cannot be told".to_owned(), |bytes| format!("{} available", gib(bytes))),
        why: "each running MicroVM takes what its app touches, up to its size; a build takes its image's size",
        fix: "stop something, or run fewer and smaller MicroVMs".to_owned(),
    }
}

fn forwarding(facts: &Facts, config: &ServeConfig) -> Finding {
    let slots = config.network.slots;
    Finding {
        name: "forwarding",
        verdict: if facts.forward_drop.is_some() { Warn } else { Good },
        found: match &facts.forward_drop {
            Some(chain) => format!("the packet filter's chain {chain} drops what it does not accept"),
            None => "no packet filter of the host drops what it forwards".to_owned(),
        },
        why: "unless a rule in it accepts them, the MicroVMs' packets to the network end there; Docker makes such a chain",
        fix: format!(
            "iptables -I FORWARD -s {slots} -j ACCEPT; iptables -I FORWARD -d {slots} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT \
             (with Docker, in the chain DOCKER-USER)"
        ),
    }
}

/// Certificates are renewed by then, or nobody renews them.
const SOON: Duration = Duration::from_secs(14 * DAY);
const DAY: u64 = 24 * 3600;

fn certificates(facts: &Facts, now: SystemTime) -> impl Iterator<Item = Finding> {
    let many = facts.certificates.len() > 1;
    facts.certificates.iter().map(move |(path, found)| {
        let finding = |verdict, found: String, fix: &str| Finding {
            name: "certificate",
            verdict,
            found,
            why: "clients talk to no endpoint whose certificate they do not accept",
            fix: fix.to_owned(),
        };
        let place = path.display();
        let renew = "renew it; the server reads the files again when they change";
        let certificate = match found {
            Ok(certificate) => certificate,
            Err(error) => return finding(Fail, error.clone(), "put the right files there, or correct [[tls.certificates]]"),
        };
        let names = certificate.names.join(", ");
        if certificate.until <= now {
            return finding(Warn, format!("{place} for {names} has ended"), renew);
        }
        if certificate.from > now {
            return finding(Warn, format!("{place} for {names} is not valid yet"), "wait, or set this host's clock");
        }
        let left = certificate.until.duration_since(now).unwrap_or_default();
        let found = format!("{place} for {names}: {} days left", left.as_secs() / DAY);
        if left < SOON {
            return finding(Warn, found, renew);
        }
        // Another one may cover them.
        if !certificate.lacks.is_empty() && !many {
            let lacks = certificate.lacks.join(", ");
            let fix =
                "a certificate with a name *.lambda-microvm.<region>.<domain> for each region; what none covers has the local authority's";
            return finding(Warn, format!("{found}, but not for endpoints in {lacks}"), fix);
        }
        finding(Good, found, "")
    })
}

fn https(facts: &Facts) -> Option<Finding> {
    let free = facts.https.as_ref()?;
    Some(Finding {
        name: "https port",
        verdict: if free.is_ok() { Good } else { Warn },
        found: match free {
            Ok(()) => "127.0.0.1:443 can be had".to_owned(),
            Err(error) => format!("127.0.0.1:443 cannot be had: {error}"),
        },
        why: "without it, clients of endpoints write the port 8443",
        fix: "stop what listens there (ss -ltnp 'sport = :443'), or live with the port".to_owned(),
    })
}

fn endpoint_name(facts: &Facts, config: &ServeConfig) -> Finding {
    let (name, resolves) = &facts.endpoint_name;
    let local = config.domain == "localhost" || config.domain.ends_with(".localhost");
    Finding {
        name: "endpoint names",
        verdict: if *resolves { Good } else { Warn },
        found: if *resolves { format!("*.{} resolves", config.domain) } else { format!("{name} does not resolve") },
        why: if local {
            "curl and browsers know *.localhost themselves; other programs ask the system's resolver"
        } else {
            "clients reach a MicroVM by its endpoint's name"
        },
        fix: if local {
            "apt-get install libnss-myhostname".to_owned()
        } else {
            format!("a wildcard DNS record *.lambda-microvm.{}.{} that leads to this host", config.region, config.domain)
        },
    }
}

fn ports(facts: &Facts) -> impl Iterator<Item = Finding> {
    facts.ports.iter().map(|(name, address, free)| Finding {
        name: if *name == "api" { "api port" } else { "endpoint port" },
        verdict: if free.is_ok() { Good } else { Fail },
        found: match free {
            Ok(()) => format!("{address} can be had"),
            Err(error) => format!("{address} cannot be had: {error}"),
        },
        why: "clients reach the server there",
        fix: format!(
            "stop what listens there (ss -ltnp 'sport = :{}'), or choose another address with --{name}; port 0 picks a free one",
            address.port()
        ),
    })
}

fn gib(bytes: u64) -> String {
    // One decimal is all that is shown: u64 tenths lose nothing that matters.
    let tenths = bytes / (GIB / 10);
    format!("{}.{} GiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, facts::Certificate};

    fn certificate() -> Certificate {
        let (from, until) = (SystemTime::UNIX_EPOCH, SystemTime::now() + 2 * SOON);
        Certificate { names: vec!["*.x".to_owned()], lacks: Vec::new(), from, until }
    }

    fn good() -> Facts {
        let programs = PROGRAMS.iter().map(|&(name, ..)| (name, format!("{name} version 7.2.22 (Debian)"))).collect();
        Facts {
            root: true,
            arch: "x86_64",
            kernel: "Linux 6.1.0".to_owned(),
            kvm: KvmProbe::Native(1.0),
            programs,
            tun: Ok(()),
            namespaces: Ok(()),
            ip_forward: Some(true),
            kit: Ok("0123456789ab".to_owned()),
            data_dir: "/data".into(),
            disk_free: Some(100 * GIB),
            build_cache: None,
            memory_available: Some(8 * GIB),
            certificates: vec![("/tls/chain.pem".into(), Ok(certificate()))],
            https: Some(Ok(())),
            forward_drop: None,
            endpoint_name: ("x.localhost".to_owned(), true),
            ports: vec![("api", ([127, 0, 0, 1], 8470).into(), Ok(()))],
        }
    }

    fn spoil_certificate(facts: &mut Facts, spoil: impl FnOnce(&mut Certificate)) {
        spoil(facts.certificates[0].1.as_mut().unwrap());
    }

    /// The one finding that is not good once `spoil` has been at a good host.
    fn spoilt(config: &ServeConfig, spoil: impl FnOnce(&mut Facts)) -> Finding {
        let mut facts = good();
        spoil(&mut facts);
        let bad: Vec<Finding> = judge(&facts, config).into_iter().filter(|finding| finding.verdict != Verdict::Ok).collect();
        let [finding] = bad.as_slice() else { panic!("expected one finding: {bad:?}") };
        assert!(!finding.why.is_empty() && !finding.fix.is_empty(), "{finding:?}");
        finding.clone()
    }

    #[test]
    fn a_host_with_everything_is_good() {
        let findings = judge(&good(), &ServeConfig::default());
        assert!(findings.iter().all(|finding| finding.verdict == Verdict::Ok), "{findings:?}");
    }

    #[test]
    fn each_missing_thing_is_one_failure() {
        type Spoil = fn(&mut Facts);
        let cases: &[(&str, Spoil)] = &[
            ("platform", |facts| facts.arch = "aarch64"),
            ("root", |facts| facts.root = false),
            ("runc", |facts| drop(facts.programs.remove("runc"))),
            ("qemu-system-x86_64", |facts| drop(facts.programs.remove("qemu-system-x86_64"))),
            ("qemu versions", |facts| drop(facts.programs.insert("qemu-img", "qemu-img version 8.0.0".to_owned()))),
            ("/dev/net/tun", |facts| facts.tun = Err("No such file or directory".to_owned())),
            ("namespaces", |facts| facts.namespaces = Err("Operation not permitted".to_owned())),
            ("guest kit", |facts| facts.kit = Err("no guest kit in /kit".to_owned())),
            ("disk space", |facts| facts.disk_free = Some(LEAST_DISK - 1)),
            ("certificate", |facts| facts.certificates[0].1 = Err("key.pem is not the key of chain.pem".to_owned())),
            ("api port", |facts| facts.ports[0].2 = Err("Address already in use".to_owned())),
        ];
        for (name, spoil) in cases {
            let finding = spoilt(&ServeConfig::default(), spoil);
            assert_eq!((finding.name, finding.verdict), (*name, Verdict::Fail));
        }
    }

    #[test]
    fn what_the_server_can_live_with_is_a_warning() {
        type Spoil = fn(&mut Facts);
        let cases: &[(&str, Spoil)] = &[
            ("disk space", |facts| facts.disk_free = Some(GOOD_DISK - 1)),
            ("memory", |facts| facts.memory_available = Some(GIB)),
            ("ip_forward", |facts| facts.ip_forward = Some(false)),
            ("endpoint names", |facts| facts.endpoint_name.1 = false),
            ("https port", |facts| facts.https = Some(Err("Address already in use".to_owned()))),
            ("forwarding", |facts| facts.forward_drop = Some("ip filter FORWARD".to_owned())),
            ("certificate", |facts| spoil_certificate(facts, |found| found.until = SystemTime::now())),
            ("certificate", |facts| spoil_certificate(facts, |found| found.until = SystemTime::now() + SOON)),
            ("certificate", |facts| spoil_certificate(facts, |found| found.from = SystemTime::now() + SOON)),
            ("certificate", |facts| spoil_certificate(facts, |found| found.lacks = vec!["eu-west-1".to_owned()])),
        ];
        for (name, spoil) in cases {
            let finding = spoilt(&ServeConfig::default(), spoil);
            assert_eq!((finding.name, finding.verdict), (*name, Verdict::Warn));
        }
    }

    #[test]
    fn emulation_is_chosen_where_kvm_is_no_good_and_called_no_security_boundary() {
        let unusable = |facts: &mut Facts| facts.kvm = KvmProbe::Emulated(150.0);
        let finding = spoilt(&ServeConfig::default(), unusable);
        assert_eq!((finding.verdict, finding.found.as_str()), (Verdict::Warn, format!("tcg: {}", KvmProbe::Emulated(150.0)).as_str()));
        assert!(finding.why.contains("security boundary"));
        let forced = ServeConfig { engine: EngineChoice::Kvm, ..ServeConfig::default() };
        assert_eq!(spoilt(&forced, unusable).verdict, Verdict::Fail);
        let forced = ServeConfig { engine: EngineChoice::Tcg, ..ServeConfig::default() };
        assert!(spoilt(&forced, |_| {}).why.contains("security boundary"));
    }
}
