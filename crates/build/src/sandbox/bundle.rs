//! What a build's sandbox is made of, as an OCI runtime reads it.
//!
//! Root in the sandbox is an ordinary user of the host, with files of its own only: the builder's root file system and the build's directory
//! read-only, the account's store, the image's disk, and a few devices that everybody may open. It has its own processes, mounts, network, names and
//! control groups. Its rights are those of root in a user namespace, which the builder needs to mount layers and to run steps.

use serde_json::{Value, json};

use super::seccomp;

/// First of the host's user and group ids that stand for the sandbox's. Far above those that hosts give to users and containers.
pub(crate) const FIRST_ID: u32 = 1_900_000_000;
/// Number of them.
const IDS: u32 = 1 << 24;

/// Most processes and threads of a build. Hosts may have no more than 32768 numbers for all of theirs.
const PROCESSES: u32 = 8192;

/// The directory of a build, in the sandbox. What the server writes is there, and nothing that it reads again: the sandbox cannot change it.
pub(crate) const BUILD_DIR: &str = "/build";
/// The image's disk, in the sandbox. The only file that both write to.
pub(crate) const DISK: &str = "/build/disk";
/// The daemon's data, in the sandbox.
pub(crate) const STORE_DIR: &str = "/var/lib/docker";
/// The managed base image's archive, in the sandbox.
pub(crate) const BASE_ARCHIVE: &str = "/hearth/base.tar";

/// Where `enter.sh` puts what the sandbox gets of the host.
mod given {
    pub(super) const ROOT: &str = "/mnt/root";
    pub(super) const STORE: &str = "/mnt/store";
    pub(super) const BUILD: &str = "/mnt/build";
    pub(super) const DISK: &str = "/mnt/disk";
    pub(super) const BASE_ARCHIVE: &str = "/mnt/base.tar";
    pub(super) const CERTIFICATES: &str = "/mnt/certificates";
}

/// What differs from sandbox to sandbox.
#[derive(Debug)]
pub(crate) struct Bundle<'a> {
    /// The host has certificate authorities to share.
    pub(crate) certificates: bool,
    pub(crate) control_group: &'a str,
    /// Most memory of the build, in bytes.
    pub(crate) memory: Option<u64>,
    /// Further variables, such as proxies.
    pub(crate) environment: &'a [(String, String)],
}

/// Rights that root has in the sandbox, over what belongs to it.
const CAPABILITIES: [&str; 22] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RESOURCE",
];

/// The environment of the daemon and of the programs that talk to it. `further` variables are such as proxies.
pub(crate) fn daemon_environment(further: &[(String, String)]) -> Vec<(String, String)> {
    let ours = [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin".to_owned()),
        ("HOME", "/tmp".to_owned()),
        ("DOCKER_HOST", "unix:///run/docker.sock".to_owned()),
        ("DOCKER_CONFIG", format!("{BUILD_DIR}/docker")),
        ("BUILDX_CONFIG", "/tmp/buildx".to_owned()),
        ("DOCKER_BUILDKIT_RUNC_COMMAND", format!("{BUILD_DIR}/runtime.sh")),
        ("BUILDX_NO_DEFAULT_ATTESTATIONS", "1".to_owned()),
    ];
    let ours = ours.map(|(name, value)| (name.to_owned(), value));
    ours.into_iter().chain(further.iter().cloned()).collect()
}

impl Bundle<'_> {
    /// The `config.json` of the OCI runtime specification, 1.0.2.
    pub(crate) fn document(&self) -> Value {
        let ids = json!([{ "containerID": 0, "hostID": FIRST_ID, "size": IDS }]);
        let namespaces: Vec<Value> =
            ["user", "mount", "pid", "network", "ipc", "uts", "cgroup"].iter().map(|kind| json!({ "type": kind })).collect();
        let environment: Vec<String> = daemon_environment(self.environment).iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut resources = json!({ "pids": { "limit": PROCESSES } });
        if let Some(memory) = self.memory {
            resources["memory"] = json!({ "limit": memory });
        }
        json!({
            "ociVersion": "1.0.2",
            "hostname": "builder",
            "root": { "path": given::ROOT, "readonly": true },
            "process": {
                "terminal": false, "cwd": "/", "user": { "uid": 0, "gid": 0 },
                "args": ["/bin/sh", format!("{BUILD_DIR}/init.sh")],
                "env": environment,
                "capabilities": { "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES },
                // Steps may use sudo: what it gives is root of the sandbox.
                "noNewPrivileges": false,
            },
            "mounts": self.mounts(),
            "linux": {
                "uidMappings": ids, "gidMappings": ids, "namespaces": namespaces,
                "cgroupsPath": self.control_group, "resources": resources, "seccomp": seccomp::filter(),
                // The kernel lets a user namespace mount another /proc only where nothing of this one is hidden. What matters in it belongs to
                // the host's root, which nobody here is.
                "maskedPaths": [], "readonlyPaths": [],
            },
        })
    }

    fn mounts(&self) -> Vec<Value> {
        let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
        let bind = |source: &str, destination: &str, access: &str| json!({ "destination": destination, "type": "bind", "source": source, "options": ["bind", access, "nosuid", "nodev"] });
        let quiet = ["nosuid", "noexec", "nodev"];
        let mut mounts = vec![
            mount("/proc", "proc", &quiet),
            // Writable, because steps could have none of their own otherwise, and would see the sandbox's network devices in this one. What is in
            // it belongs to the host's root.
            mount("/sys", "sysfs", &quiet),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/dev", "tmpfs", &["nosuid", "mode=755", "size=64k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "nodev", "noexec", "mode=1777", "size=64m"]),
            mount("/run", "tmpfs", &["nosuid", "nodev", "mode=755", "size=256m"]),
            mount("/tmp", "tmpfs", &["nosuid", "nodev", "mode=1777", "size=256m"]),
            // Layers hold files that are executable, with the set-user-id bit as well: steps see them as they are.
            json!({ "destination": STORE_DIR, "type": "bind", "source": given::STORE, "options": ["bind", "rw"] }),
            bind(given::BUILD, BUILD_DIR, "ro"),
            bind(given::DISK, DISK, "rw"),
            bind(&format!("{}/resolv.conf", given::BUILD), "/etc/resolv.conf", "ro"),
            bind(given::BASE_ARCHIVE, BASE_ARCHIVE, "ro"),
        ];
        mounts.extend(self.certificates.then(|| bind(given::CERTIFICATES, "/etc/ssl/certs/ca-certificates.crt", "ro")));
        mounts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn document_gives_nothing_of_the_host() {
        let bundle = Bundle {
            certificates: true,
            control_group: "/group",
            memory: Some(1 << 30),
            environment: &[("HTTP_PROXY".to_owned(), "http://proxy".to_owned())],
        };
        let document = bundle.document();
        assert_eq!(document["root"]["readonly"], true);
        assert_eq!(document["linux"]["uidMappings"][0]["hostID"], FIRST_ID);
        assert_eq!(document["linux"]["resources"]["memory"]["limit"], 1 << 30);
        let namespaces = document["linux"]["namespaces"].as_array().unwrap();
        assert!(namespaces.iter().all(|namespace| namespace.get("path").is_none()), "every namespace is a new one");
        assert_eq!(namespaces.len(), 7);
        let sources: Vec<&str> = document["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|mount| mount["type"] == "bind")
            .map(|mount| mount["source"].as_str().unwrap())
            .collect();
        assert_eq!(sources, ["/mnt/store", "/mnt/build", "/mnt/disk", "/mnt/build/resolv.conf", "/mnt/base.tar", "/mnt/certificates"]);
    }
}
