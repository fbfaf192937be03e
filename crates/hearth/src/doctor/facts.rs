//! Looks at the host. Every look has a deadline, and a look that fails is a fact too.

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, SystemTime},
};

use hearth_build::CacheUsage;
use hearth_ingress::{Chain, ChainFiles, any_endpoint};
use hearth_machine::{
    kit::Kit,
    probe::{KvmProbe, probe_kvm},
};

use crate::{config::ServeConfig, connect::Connect, data_dir::DataDir};

/// Longest time that one look may take: a program that asks a dead file server for its libraries must not hang the doctor.
const DEADLINE: Duration = Duration::from_secs(10);

/// Where `https://<endpoint>/` leads to on this host.
const HTTPS: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 443);

/// The programs that are looked for, with the argument that prints their version.
const PROGRAMS: &[(&str, &str)] =
    &[("qemu-system-x86_64", "--version"), ("qemu-img", "--version"), ("runc", "--version"), ("nft", "--version"), ("ip", "-V")];

/// What there is.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Runs as root.
    pub root: bool,
    /// Processor architecture, as Rust names it.
    pub arch: &'static str,
    /// Kernel name and release.
    pub kernel: String,
    /// What `/dev/kvm` is good for.
    pub kvm: KvmProbe,
    /// Programs on the `PATH` with the first line of what they say of their version.
    pub programs: BTreeMap<&'static str, String>,
    /// `/dev/net/tun` can be opened, or why not.
    pub tun: Result<(), String>,
    /// A network namespace can be made, or why not.
    pub namespaces: Result<(), String>,
    /// IPv4 forwarding is on; `None` if that cannot be told.
    pub ip_forward: Option<bool>,
    /// Checksum and kernel of the guest kit, or what is wrong with it.
    pub kit: Result<String, String>,
    /// Where the data directory is, or will be.
    pub data_dir: PathBuf,
    /// Bytes free there; `None` if that cannot be told.
    pub disk_free: Option<u64>,
    /// What the layer cache of image builds holds, and where it is; `None` if it was not looked at or cannot be told.
    pub build_cache: Option<(PathBuf, CacheUsage)>,
    /// Bytes of memory that programs can have; `None` if that cannot be told.
    pub memory_available: Option<u64>,
    /// The endpoints' certificates by their files, and what clients would find in them.
    pub certificates: Vec<(PathBuf, Result<Certificate, String>)>,
    /// `127.0.0.1:443` can be had, or why not; `None` if it is not wanted.
    pub https: Option<Result<(), String>>,
    /// A chain of the host's own packet filter that drops what no rule of it accepts, of all that the host forwards.
    pub forward_drop: Option<String>,
    /// An endpoint's name that was looked up, and whether it leads to this host.
    pub endpoint_name: (String, bool),
    /// Each listener's address, and why it cannot be had if it cannot.
    pub ports: Vec<(&'static str, SocketAddr, Result<(), String>)>,
}

/// Looks at everything.
pub async fn gather(config: &ServeConfig, dir: &DataDir) -> Facts {
    let kit = find_kit(config);
    let checked_kit = blocking(move || check_kit(kit));
    let kvm = blocking(probe_kvm);
    let looks = (programs(), namespaces(), endpoint_name(&config.domain, &config.region), forward_drop());
    let (kit, kvm, programs, namespaces, endpoint_name, forward_drop) = tokio::join!(checked_kit, kvm, looks.0, looks.1, looks.2, looks.3);
    Facts {
        root: nix::unistd::geteuid().is_root(),
        arch: std::env::consts::ARCH,
        kernel: kernel(),
        kvm,
        programs,
        tun: fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").map(drop).map_err(|error| error.to_string()),
        namespaces,
        ip_forward: fs::read_to_string("/proc/sys/net/ipv4/ip_forward").ok().map(|text| text.trim() == "1"),
        kit,
        data_dir: dir.path().to_owned(),
        disk_free: disk_free(dir.path()),
        build_cache: None,
        memory_available: fs::read_to_string("/proc/meminfo").ok().and_then(|text| parse_available(&text)),
        certificates: certificates(config, dir),
        https: https(config, dir),
        forward_drop,
        endpoint_name,
        ports: ports(config, dir),
    }
}

/// Measures the layer cache, which takes a moment where it holds many files.
pub async fn build_cache(config: &ServeConfig, dir: &DataDir) -> Option<(PathBuf, CacheUsage)> {
    let path = config.build_cache_dir.clone().unwrap_or_else(|| dir.build_cache());
    let place = path.clone();
    let usage =
        tokio::time::timeout(DEADLINE, tokio::task::spawn_blocking(move || hearth_build::cache_usage(&place))).await.ok()?.ok()?.ok()?;
    Some((path, usage))
}

/// A certificate as clients judge it.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// Names in it.
    pub names: Vec<String>,
    /// Regions whose endpoints it does not cover.
    pub lacks: Vec<String>,
    /// Valid from.
    pub from: SystemTime,
    /// Valid until.
    pub until: SystemTime,
}

/// Those of the operator, or of the authority that issues them by itself, or the local authority's own.
fn certificates(config: &ServeConfig, dir: &DataDir) -> Vec<(PathBuf, Result<Certificate, String>)> {
    let regions = config.served_regions();
    let found = |chain: &Chain| Certificate {
        names: chain.names().to_vec(),
        lacks: regions.iter().filter(|region| !chain.covers(&any_endpoint(region, &config.domain))).cloned().collect(),
        from: chain.not_before(),
        until: chain.not_after(),
    };
    let files = config.tls.chain_files();
    if let Some(acme) = config.tls.acme(&regions, &config.domain, dir.acme()) {
        let kept = hearth_ingress::kept_chain(&acme).transpose();
        return kept.map(|kept| (acme.dir, kept.map(|chain| found(&chain)).map_err(|error| error.to_string()))).into_iter().collect();
    }
    if !files.is_empty() {
        let read = |files: &ChainFiles| Chain::read(files).map(|chain| found(&chain)).map_err(|error| error.to_string());
        return files.iter().map(|files| (files.chain.clone(), read(files))).collect();
    }
    let path = dir.ca_certificate();
    let until = fs::read_to_string(&path).ok().and_then(|pem| hearth_ingress::ends(&pem));
    let authority =
        |until| Certificate { names: vec!["the local authority".to_owned()], lacks: Vec::new(), from: SystemTime::UNIX_EPOCH, until };
    until.map(|until| (path, Ok(authority(until)))).into_iter().collect()
}

/// Whether the port that `https` means can be had, where the settings leave it to the server.
fn https(config: &ServeConfig, dir: &DataDir) -> Option<Result<(), String>> {
    let wanted = config.endpoint.is_none() && Connect::read(dir).is_err();
    wanted.then(|| TcpListener::bind(HTTPS).map(drop).map_err(|error| error.to_string()))
}

/// A base chain that drops forwarded packets by policy, as Docker's does: accepting them elsewhere does not help.
async fn forward_drop() -> Option<String> {
    let mut command = tokio::process::Command::new("nft");
    command.args(["--json", "list", "chains"]).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(DEADLINE, command.output()).await.ok()?.ok()?;
    parse_forward_drop(&output.stdout)
}

fn parse_forward_drop(chains: &[u8]) -> Option<String> {
    let listed: serde_json::Value = serde_json::from_slice(chains).ok()?;
    let text = |chain: &serde_json::Value, key: &str| chain[key].as_str().unwrap_or_default().to_owned();
    let dropping = |chain: &&serde_json::Value| {
        chain["hook"] == "forward" && chain["policy"] == "drop" && ["ip", "inet"].contains(&text(chain, "family").as_str())
    };
    let chain = listed["nftables"].as_array()?.iter().filter_map(|object| object.get("chain")).find(dropping)?;
    Some(format!("{} {} {}", text(chain, "family"), text(chain, "table"), text(chain, "name")))
}

/// Where the guest kit is looked for; the last place if it is in none.
pub fn find_kit(config: &ServeConfig) -> PathBuf {
    let named = config.kit.clone().or_else(|| std::env::var_os("HEARTH_KIT").map(PathBuf::from));
    if let Some(kit) = named {
        return kit;
    }
    let program = std::env::current_exe().ok();
    let beside = program.as_deref().and_then(Path::parent).map(|dir| [dir.join("../kit"), dir.join("kit")]);
    let found = beside.into_iter().flatten().find(|kit| kit.join("manifest.json").exists());
    found.unwrap_or_else(|| PathBuf::from("/usr/lib/hearth/kit"))
}

fn check_kit(dir: PathBuf) -> Result<String, String> {
    let kit = Kit::open(&dir).map_err(|error| error.to_string())?;
    kit.verify().map_err(|error| error.to_string())?;
    Ok(format!("{} in {}, kernel {}", &kit.checksum[..12], dir.display(), kit.kernel_release))
}

async fn programs() -> BTreeMap<&'static str, String> {
    let looks = PROGRAMS.iter().map(|&(name, flag)| async move { Some((name, version(name, flag).await?)) });
    futures::future::join_all(looks).await.into_iter().flatten().collect()
}

/// First line of what a program says of its version; `None` if it cannot be run.
async fn version(program: &str, flag: &str) -> Option<String> {
    let mut command = tokio::process::Command::new(program);
    command.arg(flag).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(DEADLINE, command.output()).await.ok()?.ok()?;
    // Some say their version on standard error.
    let said = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    Some(String::from_utf8_lossy(&said).lines().next().unwrap_or_default().trim().to_owned())
}

async fn namespaces() -> Result<(), String> {
    let mut command = tokio::process::Command::new("unshare");
    command.args(["--net", "true"]).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(DEADLINE, command.output()).await.map_err(|_elapsed| "unshare did not end".to_owned())?;
    let output = output.map_err(|error| format!("unshare: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

async fn endpoint_name(domain: &str, region: &str) -> (String, bool) {
    let name = format!("00000000-0000-0000-0000-000000000000.lambda-microvm.{region}.{domain}");
    let looked_up = tokio::time::timeout(DEADLINE, tokio::net::lookup_host((name.clone(), 443))).await;
    let resolves = looked_up.is_ok_and(|found| found.is_ok_and(|mut addresses| addresses.next().is_some()));
    (name, resolves)
}

fn kernel() -> String {
    match nix::sys::utsname::uname() {
        Ok(name) => format!("{} {}", name.sysname().to_string_lossy(), name.release().to_string_lossy()),
        Err(error) => format!("unknown ({error})"),
    }
}

/// Free bytes of the file system that a directory is on, or would be on.
fn disk_free(dir: &Path) -> Option<u64> {
    let existing = dir.ancestors().find(|dir| dir.exists()).filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let stat = nix::sys::statvfs::statvfs(existing).ok()?;
    Some(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

fn parse_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The listeners that the server would make. One that a server of this very directory holds is not in the way.
fn ports(config: &ServeConfig, dir: &DataDir) -> Vec<(&'static str, SocketAddr, Result<(), String>)> {
    let serving = Connect::read(dir).is_ok();
    let endpoint = config.endpoint.unwrap_or(crate::config::DEFAULT_ENDPOINT);
    let wanted = [("api", config.api), ("endpoint", endpoint)];
    let free = |address| if serving { Ok(()) } else { TcpListener::bind(address).map(drop).map_err(|error| error.to_string()) };
    wanted.map(|(name, address)| (name, address, free(address))).into()
}

async fn blocking<T: Send + 'static>(look: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(look).await.expect("a look at the host does not panic")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn available_memory_is_read_in_bytes() {
        assert_eq!(parse_available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(parse_available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn free_space_is_known_for_a_directory_that_is_yet_to_be_made() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(disk_free(&root.path().join("a/b")).is_some(), disk_free(root.path()).is_some());
        assert!(disk_free(Path::new("not-made-yet")).is_some());
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_has_no_version() {
        assert_eq!(version("hearth-test-no-such-program", "--version").await, None);
        assert!(version("sh", "-c").await.is_some());
    }

    #[test]
    fn a_chain_that_drops_what_the_host_forwards_is_found() {
        let chains = |policy: &str| {
            let chain = json!({"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": policy});
            let input = json!({"family": "ip", "table": "filter", "name": "INPUT", "hook": "input", "policy": "drop"});
            json!({"nftables": [{"metainfo": {}}, {"chain": input}, {"chain": {"family": "ip", "name": "DOCKER"}}, {"chain": chain}]})
                .to_string()
        };
        assert_eq!(parse_forward_drop(chains("drop").as_bytes()), Some("ip filter FORWARD".to_owned()));
        assert_eq!(parse_forward_drop(chains("accept").as_bytes()), None);
        assert_eq!(parse_forward_drop(b""), None);
    }

    #[test]
    fn a_port_in_use_is_found() {
        let root = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = ServeConfig { api: taken.local_addr().unwrap(), endpoint: Some(([127, 0, 0, 1], 0).into()), ..ServeConfig::default() };
        let ports = ports(&config, &DataDir::new(root.path().to_owned()));
        assert!(ports[0].2.is_err());
        assert!(ports[1].2.is_ok());
    }
}
