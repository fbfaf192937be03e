//! Real builds with the real BuildKit, on a base image of a shell and little else. Needs root, runc and the guest kit (`cargo xtask kit`).

use std::{collections::BTreeSet, fs, io::Write, net::SocketAddr, os::unix::fs::MetadataExt, path::PathBuf, process::Output};

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::sync::mpsc;

use tokio::time::timeout;

use super::*;
use crate::{
    CacheLimits, KitFile,
    process::Captured,
    uplink::{Connection, Uplink, UplinkError},
};

/// A name of the managed base image whose registry cannot be reached: there is no network here.
const BASE: &str = "registry.invalid/base:latest";
const DISK: u64 = 64 << 20;
/// Longest time for what should take a moment.
const PATIENCE: Duration = Duration::from_secs(120);

/// A network of nothing.
#[derive(Debug)]
struct Nowhere;

#[async_trait]
impl Uplink for Nowhere {
    fn connection(&self) -> Connection {
        Connection { nameservers: Vec::new(), mtu: 1500 }
    }

    async fn connect(&mut self, _pid: u32) -> Result<(), UplinkError> {
        Ok(())
    }

    async fn share(&mut self, _address: SocketAddr) -> Result<(), UplinkError> {
        Ok(())
    }

    async fn restrict(&mut self) -> Result<(), UplinkError> {
        Ok(())
    }
}

struct Fixture {
    dir: TempDir,
    builder: Arc<Builder>,
}

#[derive(Deserialize)]
struct Manifest {
    files: std::collections::BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    sha256: String,
}

/// The builder of the guest kit.
fn kit_builder() -> Option<KitFile> {
    let dir = std::env::var_os("HEARTH_KIT").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/kit"), PathBuf::from);
    let manifest: Manifest = serde_json::from_slice(&fs::read(dir.join("manifest.json")).ok()?).ok()?;
    Some(KitFile { path: fs::canonicalize(dir.join("builder.tar")).ok()?, sha256: manifest.files.get("builder.tar")?.sha256.clone() })
}

/// A prepared builder, or `None` (and the reason on screen) where there cannot be one.
async fn fixture() -> Option<Fixture> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: builds need root");
        return None;
    }
    for tool in TOOLS {
        if let Err(error) = check_tool(tool).await {
            eprintln!("SKIPPED: {error}");
            return None;
        }
    }
    if kit_builder().is_none() {
        eprintln!("SKIPPED: the guest kit has no builder: run `cargo xtask kit`");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    write_base(&dir.path().join("base.tar"), "first");
    let builder = Arc::new(Builder::new(config(dir.path())));
    builder.prepare().await.unwrap();
    Some(Fixture { dir, builder })
}

fn config(dir: &Path) -> BuilderConfig {
    let base = dir.join("base.tar");
    let sha256 = format!("{:x}", Sha256::digest(fs::read(&base).unwrap()));
    let config = BuilderConfig::new(dir.join("cache"), KitFile { path: base, sha256 }, kit_builder().unwrap());
    // Unpacked once for all tests.
    let builder_dir = Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/build-tests/builder"));
    BuilderConfig { builder_dir, base_names: vec!["registry.invalid/base".to_owned()], deadline: PATIENCE, ..config }
}

/// The host's shell, a few tools, the libraries they are linked to, and a file that tells one base from another.
fn write_base(path: &Path, edition: &str) {
    let tools = ["/bin/sh", "/bin/cat", "/bin/cp", "/bin/ls", "/bin/mkdir", "/bin/stat"];
    let libraries = String::from_utf8(run("ldd", &tools).stdout).unwrap();
    let mut files: BTreeSet<&str> = libraries.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':')).collect();
    files.extend(tools);
    let mut tar = tar::Builder::new(fs::File::create(path).unwrap());
    for file in files {
        tar.append_path_with_name(fs::canonicalize(file).unwrap(), file.trim_start_matches('/')).unwrap();
    }
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(edition.len() as u64);
    tar.append_data(&mut header, "edition", edition.as_bytes()).unwrap();
    tar.finish().unwrap();
}

fn run(program: &str, arguments: &[&str]) -> Output {
    std::process::Command::new(program).args(arguments).output().unwrap()
}

struct Outcome {
    result: Result<Built, BuildError>,
    log: Vec<String>,
}

impl Outcome {
    fn state_reason(&self) -> String {
        self.result.as_ref().expect_err("the build should have failed").state_reason()
    }
}

impl Fixture {
    fn request(&self, id: &str, files: &[(&str, &str)], log: mpsc::Sender<String>) -> BuildRequest {
        let archive = self.dir.path().join(format!("{id}.zip"));
        let mut zip = zip::ZipWriter::new(fs::File::create(&archive).unwrap());
        for (name, content) in files {
            zip.start_file(*name, zip::write::SimpleFileOptions::default().unix_permissions(0o755)).unwrap();
            zip.write_all(content.as_bytes()).unwrap();
        }
        zip.finish().unwrap();
        let (work_dir, rootfs) = (self.dir.path().join(id), self.rootfs(id));
        BuildRequest {
            id: format!("{}-{id}", std::process::id()),
            account: "000000000000".to_owned(),
            no_cache: false,
            room: Some(Room::Namespaces(Box::new(Nowhere))),
            logins: None,
            archive,
            work_dir,
            rootfs,
            disk_bytes: DISK,
            log,
        }
    }

    async fn build_with(&self, id: &str, files: &[(&str, &str)], change: impl FnOnce(&mut BuildRequest)) -> Outcome {
        let (sender, mut receiver) = mpsc::channel(4);
        let mut request = self.request(id, files, sender);
        change(&mut request);
        let collect = async {
            let mut log = Vec::new();
            while let Some(line) = receiver.recv().await {
                log.push(line);
            }
            log
        };
        let (result, log) = tokio::join!(self.builder.build(request, CancellationToken::new()), collect);
        if let Err(error @ (BuildError::Platform(_) | BuildError::Io { .. })) = &result {
            eprintln!("{id}: {error}");
        }
        self.expect_clean(id);
        Outcome { result, log }
    }

    async fn build(&self, id: &str, dockerfile: &str) -> Outcome {
        self.build_with(id, &[("Dockerfile", &format!("FROM {BASE}\n{dockerfile}"))], |_| {}).await
    }

    fn rootfs(&self, id: &str) -> PathBuf {
        self.dir.path().join(format!("{id}.ext4"))
    }

    /// What `debugfs` says about the disk that a build made.
    fn debugfs(&self, id: &str, request: &str) -> String {
        let output = run("debugfs", &["-R", request, self.rootfs(id).to_str().unwrap()]);
        String::from_utf8(output.stdout).unwrap()
    }

    /// Nothing of a build is left on the host.
    fn expect_clean(&self, id: &str) {
        assert!(!self.dir.path().join(id).exists(), "the work directory is still there");
        let dir = self.dir.path().to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(dir), "something is still mounted");
        assert_eq!(processes_of(&format!("{}-{id}", std::process::id())), Vec::<String>::new(), "still running");
    }
}

/// Processes in the control group of a build's sandbox.
fn processes_of(id: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let ours = processes
        .filter(|process| fs::read_to_string(process.join("cgroup")).is_ok_and(|group| group.contains(&format!("hearth-build-{id}"))));
    ours.map(|process| fs::read_to_string(process.join("cmdline")).unwrap_or_default().replace('\0', " ")).collect()
}

#[tokio::test]
async fn an_archive_becomes_a_disk_and_its_layers_are_kept() {
    let Some(fixture) = fixture().await else { return };
    let dockerfile = format!(
        "FROM {BASE} AS first\nRUN echo made by the shell > /made; printf 'no newline'\n\
         FROM {BASE}\nCOPY --from=first /made /made\nCOPY data /data\nENV NAME=value\nWORKDIR /data\nEXPOSE 8080\n\
         STOPSIGNAL SIGINT\nUSER 1000\nENTRYPOINT [\"/bin/sh\"]\nCMD [\"-c\", \"true\"]\n"
    );
    let files = [("Dockerfile", dockerfile.as_str()), ("data/file", "from the context")];
    let first = fixture.build_with("first", &files, |_| {}).await;
    let built = first.result.unwrap();
    assert_eq!(built.config.argv, ["/bin/sh", "-c", "true"]);
    assert!(built.config.env.contains(&("NAME".to_owned(), "value".to_owned())));
    assert!(built.config.env.iter().any(|(name, _)| name == "PATH"));
    let config = &built.config;
    assert_eq!((config.cwd.as_str(), config.user.as_str(), config.stop_signal), ("/data", "1000", 2));
    assert_eq!(config.exposed_ports, [8080]);
    assert!(built.content_bytes > 1 << 20 && built.content_bytes < DISK, "{}", built.content_bytes);
    assert!(first.log.iter().any(|line| line.contains("no newline")), "{:?}", first.log);

    assert_eq!(fixture.debugfs("first", "cat /made"), "made by the shell\n");
    assert_eq!(fixture.debugfs("first", "cat /data/file"), "from the context");
    assert!(fixture.debugfs("first", "stat /data/file").contains("Mode:  0755"));
    assert!(fixture.debugfs("first", "stat /tmp").contains("Mode:  01777"));
    assert!(fixture.debugfs("first", "stat /proc").contains("Type: directory"));
    assert_eq!(run("e2fsck", &["-fn", fixture.rootfs("first").to_str().unwrap()]).status.code(), Some(0));
    assert_eq!(fs::metadata(fixture.rootfs("first")).unwrap().len(), DISK);

    let second = fixture.build_with("second", &files, |_| {}).await;
    assert!(second.result.is_ok(), "{:?}", second.result);
    assert!(second.log.iter().any(|line| line.starts_with("CACHED [")), "{:?}", second.log);
    let same = fs::read(fixture.rootfs("first")).unwrap() == fs::read(fixture.rootfs("second")).unwrap();
    assert!(same, "the disks differ");
}

#[tokio::test]
async fn a_failing_step_is_in_the_log() {
    let Some(fixture) = fixture().await else { return };
    let failed = fixture.build("failed", "RUN echo about to fail; exit 7\nCMD [\"/bin/sh\"]").await;
    let reason = failed.state_reason();
    assert!(reason.starts_with("The container image build failed. RUN echo about to fail; exit 7: "), "{reason}");
    assert!(failed.log.iter().any(|line| line == "about to fail"), "{:?}", failed.log);
    assert!(failed.log.iter().any(|line| line.contains("ended with exit code 7")), "{:?}", failed.log);
    assert!(failed.log.iter().any(|line| line.contains(">>> RUN echo about to fail")), "{:?}", failed.log);
    assert!(!fixture.rootfs("failed").exists());

    let unknown = fixture.build("unknown", "NONSENSE\n").await;
    assert!(unknown.state_reason().contains("line 2: unknown instruction: NONSENSE"), "{}", unknown.state_reason());
}

#[tokio::test]
async fn what_is_wrong_has_a_code() {
    let Some(fixture) = fixture().await else { return };
    let nothing = fixture.build("nothing", "ENV A=b").await;
    assert!(nothing.state_reason().starts_with("CONTAINER_BUILD_FAILED: The image has neither"), "{}", nothing.state_reason());

    let missing = fixture.build_with("missing", &[("app/Dockerfile", "FROM scratch")], |_| {}).await;
    assert!(missing.state_reason().starts_with("ARCHIVE_DOCKERFILE_NOT_FOUND: "));

    let broken = fixture.build_with("broken", &[], |request| fs::write(&request.archive, "not a zip").unwrap()).await;
    assert!(broken.state_reason().starts_with("ARCHIVE_INVALID: "));

    let dockerfile = format!("FROM {BASE}\nCMD [\"/bin/sh\"]");
    let full = fixture.build_with("full", &[("Dockerfile", &dockerfile)], |request| request.disk_bytes = 1 << 20).await;
    assert!(full.state_reason().starts_with("DISK_STORAGE_FULL: "), "{:?}", full.result);
    assert!(!fixture.rootfs("full").exists());
}

#[tokio::test]
async fn a_cancelled_build_dies_with_everything_it_started() {
    let Some(fixture) = fixture().await else { return };
    let endless = format!("FROM {BASE}\nRUN echo endless; (while :; do :; done) & while :; do :; done");
    let (sender, mut receiver) = mpsc::channel(4);
    let request = fixture.request("endless", &[("Dockerfile", &endless)], sender);
    let cancel = CancellationToken::new();
    let build = fixture.builder.build(request, cancel.clone());
    let listen = async {
        while receiver.recv().await.expect("the step begins") != "endless" {}
        cancel.cancel();
        while receiver.recv().await.is_some() {}
    };
    let (result, ()) = timeout(PATIENCE, async { tokio::join!(build, listen) }).await.expect("the cancelled build ends");
    assert!(matches!(result, Err(BuildError::Cancelled)), "{result:?}");
    fixture.expect_clean("endless");
}

#[tokio::test]
async fn an_abandoned_build_is_cancelled() {
    let Some(fixture) = fixture().await else { return };
    let endless = format!("FROM {BASE}\nRUN echo endless; while :; do :; done");
    let (sender, mut receiver) = mpsc::channel(4);
    let request = fixture.request("abandoned", &[("Dockerfile", &endless)], sender);
    let builder = Arc::clone(&fixture.builder);
    let caller = tokio::spawn(async move { builder.build(request, CancellationToken::new()).await });
    while receiver.recv().await.expect("the step begins") != "endless" {}
    caller.abort();
    let log_ends = async { while receiver.recv().await.is_some() {} };
    timeout(PATIENCE, log_ends).await.expect("the build ends");
    fixture.expect_clean("abandoned");
}

#[tokio::test]
async fn a_build_has_a_deadline() {
    let Some(fixture) = fixture().await else { return };
    let hasty = BuilderConfig { deadline: Duration::from_secs(2), ..config(fixture.dir.path()) };
    let builder = Builder::new(hasty);
    builder.prepare().await.unwrap();
    let (sender, _receiver) = mpsc::channel(4);
    let request = fixture.request("late", &[("Dockerfile", &format!("FROM {BASE}\nRUN while :; do :; done"))], sender);
    let error = timeout(PATIENCE, builder.build(request, CancellationToken::new())).await.expect("the late build ends").unwrap_err();
    assert!(error.state_reason().starts_with("CONTAINER_BUILD_FAILED: The container image build did not finish within 2"));
    fixture.expect_clean("late");
}

#[tokio::test]
async fn builds_run_side_by_side() {
    let Some(fixture) = fixture().await else { return };
    let dockerfiles = ["a", "b", "c"].map(|name| format!("RUN echo {name} > /name\nCMD [\"/bin/sh\"]"));
    let [a, b, c] = &dockerfiles;
    let outcomes = tokio::join!(fixture.build("a", a), fixture.build("b", b), fixture.build("c", c));
    for outcome in [outcomes.0, outcomes.1, outcomes.2] {
        assert!(outcome.result.is_ok(), "{:?} {:?}", outcome.result, outcome.log);
    }
    for name in ["a", "b", "c"] {
        assert_eq!(fixture.debugfs(name, "cat /name"), format!("{name}\n"));
    }
}

#[tokio::test]
async fn base_image_follows_its_archive() {
    let Some(fixture) = fixture().await else { return };
    let built = fixture.build("before", "CMD [\"/bin/sh\"]").await;
    assert!(built.log.iter().any(|line| line.contains("stand-in, made of Debian packages")), "{:?}", built.log);
    assert_eq!(fixture.debugfs("before", "cat /edition"), "first");

    write_base(&fixture.dir.path().join("base.tar"), "another");
    let fixture = Fixture { builder: Arc::new(Builder::new(config(fixture.dir.path()))), ..fixture };
    fixture.builder.prepare().await.unwrap();
    let built = fixture.build("edition", "CMD [\"/bin/sh\"]").await;
    assert!(built.result.is_ok(), "{:?}", built.result);
    assert_eq!(fixture.debugfs("edition", "cat /edition"), "another");
}

#[tokio::test]
async fn build_of_a_digest_of_the_base_is_refused_without_its_registry() {
    let Some(fixture) = fixture().await else { return };
    let dockerfile = format!("FROM registry.invalid/base@sha256:{}\nCMD [\"/bin/sh\"]", "0".repeat(64));
    let refused = fixture.build_with("digest", &[("Dockerfile", &dockerfile)], |_| {}).await;
    assert!(refused.state_reason().contains("cannot be reached"), "{}", refused.state_reason());
}

#[tokio::test]
async fn sandbox_of_a_killed_server_ends_by_itself() {
    let Some(fixture) = fixture().await else { return };
    let endless = format!("FROM {BASE}\nRUN echo endless; while :; do :; done");
    let (sender, mut receiver) = mpsc::channel(4);
    let request = fixture.request("orphan", &[("Dockerfile", &endless)], sender);
    let id = request.id.clone();
    // A runtime of its own: when it goes, every descriptor of the build is closed, as after `kill -9`.
    let builder = Arc::clone(&fixture.builder);
    let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let build = server.spawn(async move { builder.build(request, CancellationToken::new()).await.map(drop) });
    while receiver.recv().await.expect("the step begins") != "endless" {}
    assert!(!processes_of(&id).is_empty());
    server.shutdown_background();
    drop(build);
    let gone = async {
        // Its processes have no parent of ours that would tell.
        while !processes_of(&id).is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the sandbox ends");
    let after = fixture.build_with("after", &[("Dockerfile", &format!("FROM {BASE}\nCMD [\"/bin/sh\"]"))], |_| {}).await;
    assert!(after.result.is_ok(), "{:?} {:?}", after.result, after.log);
}

#[tokio::test]
async fn step_sees_nothing_of_the_host() {
    let Some(fixture) = fixture().await else { return };
    let dockerfile = "RUN echo uid $(while read -r inside outside count; do echo $inside:$outside; done < /proc/self/uid_map); \\\n\
        for process in /proc/[0-9]*; do echo process; done; for device in /dev/*; do echo device $device; done; \\\n\
        if echo x > /proc/sysrq-trigger; then echo sysrq; fi; if (cat /proc/1/root/etc/shadow); then echo shadow; fi; true\n\
        RUN (while :; do :; done) & echo started\nRUN for process in /proc/[0-9]*; do echo later process; done\nCMD [\"/bin/sh\"]";
    let built = fixture.build("attack", dockerfile).await;
    assert!(built.result.is_ok(), "{:?} {:?}", built.result, built.log);
    let said = |line: &str| built.log.iter().filter(|said| said.contains(line)).count();
    assert!(built.log.iter().any(|line| line.starts_with("uid 0:0") || line.starts_with("uid 0:19")), "{:?}", built.log);
    assert!(said("process") < 8, "a step sees its own processes only: {:?}", built.log);
    assert_eq!(built.log.iter().filter(|line| *line == "later process").count(), 1, "background processes do not live on: {:?}", built.log);
    for device in ["/dev/kvm", "/dev/vda", "/dev/mem", "/dev/loop0", "/dev/net"] {
        assert_eq!(said(&format!("device {device}")), 0, "{:?}", built.log);
    }
    assert!(!built.log.iter().any(|line| line == "sysrq" || line == "shadow"), "{:?}", built.log);
}

/// A sandbox, and what runs in it as its root: more than a step is ever given.
struct Prison {
    build: Build,
    work: WorkDir,
    disk: tokio::fs::File,
    sandbox: Sandbox,
    _scratch: Scratch,
    _room: Room,
}

impl Prison {
    async fn start(fixture: &Fixture, id: &str) -> Self {
        let (sender, _receiver) = mpsc::channel(4);
        let request = fixture.request(id, &[("Dockerfile", "FROM scratch")], sender);
        let mut build = Build { workshop: Arc::clone(fixture.builder.workshop.get().unwrap()), request };
        let scratch = Scratch::make(&build.request.work_dir).unwrap();
        let work = WorkDir(build.request.work_dir.join("build"));
        make_private_directory(&work.0).unwrap();
        let disk = build.make_disk(work.disk()).await.unwrap();
        let store = build.workshop.stores.take(&build.request.account).await.unwrap();
        let mut room = build.request.room.take().unwrap();
        let sandbox = build.start(&store, &work, &mut room, &[], &Stop::after(PATIENCE)).await.unwrap();
        Self { build, work, disk, sandbox, _scratch: scratch, _room: room }
    }

    async fn root(&self, script: &str) -> Captured {
        self.sandbox.capture(Call::new("sh").args(["-c", script]), &Stop::after(PATIENCE)).await.unwrap()
    }
}

/// A 32-bit program in hexadecimal: ELF header, program header, code, arguments. It ends with 0 if `socketcall(SYS_SOCKET, {AF_VSOCK, 1, 0})` gives a
/// socket, else with 1.
const SOCKETCALL: &str = concat!(
    "7f454c46010101000000000000000000020003000100000054000100340000000000000000000000340020000100000000000000",
    "010000000000000000000100000001007d0000007d0000000500000000100000",
    "b866000000bb01000000b971000100cd8089c3c1eb1fb801000000cd80",
    "280000000100000000000000",
);

#[tokio::test]
async fn sandbox_root_cannot_change_what_the_server_or_other_builds_use() {
    let Some(fixture) = fixture().await else { return };
    let prison = Prison::start(&fixture, "prison").await;
    assert!(prison.root("id && cat /build/daemon.json && dd if=/dev/zero of=/build/disk bs=1 count=1 conv=notrunc").await.status.success());
    for attempt in [
        // Files of the server.
        "echo x > /build/resolv.conf",
        "mount -o remount,bind,rw /build && echo x > /build/resolv.conf",
        "mount -o remount,bind,rw /build && ln -s /etc/passwd /build/link",
        "mkdir /tmp/b && mount --bind /build /tmp/b && mount -o remount,bind,rw /tmp/b && touch /tmp/b/new",
        "rm /build/disk",
        "umount /build/disk; rm /build/disk",
        // The builder that all accounts use, and the base image.
        "mount -o remount,bind,rw / && touch /var/tmp/new",
        "mount -o remount,bind,rw / && touch /usr/bin/docker",
        "mount -o remount,bind,rw /hearth/base.tar && echo x >> /hearth/base.tar",
        // The host's kernel.
        "echo x > /proc/sys/kernel/core_pattern",
        "mount -t proc proc /mnt && echo x > /mnt/sys/kernel/core_pattern",
        "echo h > /proc/sysrq-trigger",
        "mount -t sysfs sysfs /mnt && echo x > /mnt/kernel/uevent_helper",
        "for group in /sys/fs/cgroup/*; do mount -o remount,bind,rw $group && echo /x > $group/release_agent && exit 0; done; exit 1",
        "mount -o remount,bind,rw /sys/fs/cgroup/pids; group=$(ls -d /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null) && echo max > $group",
        "mknod /tmp/disk b 254 0 && head -c 1 /tmp/disk",
        "mknod /var/lib/docker/disk b 254 0 && head -c 1 /var/lib/docker/disk",
        "mount -t ext4 /dev/vda /mnt",
        "mount -t devtmpfs devtmpfs /mnt",
        // Parts of the kernel that no build needs.
        "perl -e 'exit(syscall(425, 1, 0) < 0 && !$!{EFAULT})'",
        "perl -e 'exit(syscall(323, 0) < 0)'",
        "perl -e 'exit(syscall(321, 0, 0, 0) < 0 && !$!{EINVAL})'",
        "perl -e 'exit(syscall(298, 0, 0, -1, -1, 0) < 0 && !$!{EFAULT})'",
        "perl -e 'exit(syscall(250, 0, -3, 1) < 0)'",
        "perl -e 'exit(syscall(304, -1, 0, 0) < 0 && !$!{EFAULT} && !$!{EBADF})'",
        "perl -MSocket -e 'exit !socket(S, 38, 5, 0)'",
        "perl -MSocket -e 'exit !socket(S, 40, 1, 0)'",
        // The kernel reads 32 bits of a family, whatever the others are.
        "perl -e 'exit(syscall(41, (1 << 32) + 40, 1, 0) < 0)'",
        "perl -e '$pair = q(x) x 8; syscall(53, 40, 1, 0, $pair); exit !$!{EOPNOTSUPP}'",
        &format!("perl -e 'print pack(q(H*), q({SOCKETCALL}))' > /tmp/call && chmod 755 /tmp/call && /tmp/call"),
        // Processes and descriptors of the host.
        "[ -e /proc/1/fd/3 ]",
        "[ -e /proc/self/fd/3 ]",
        "for process in /proc/[0-9]*; do [ -e $process/root/etc/shadow ] && cat $process/root/etc/shadow && exit 0; done; exit 1",
    ] {
        let ran = prison.root(attempt).await;
        assert!(!ran.status.success(), "{attempt}: {ran:?}");
    }
    assert!(!fixture.builder.workshop.get().unwrap().root.dir.join("var/tmp/new").exists());
    let Prison { sandbox, .. } = prison;
    sandbox.end().await;
}

#[tokio::test]
async fn take_disk_of_another_size_or_owner_is_the_servers_again() {
    let Some(fixture) = fixture().await else { return };
    let prison = Prison::start(&fixture, "disk").await;
    assert!(prison.root("chmod 6777 /build/disk && chown 5:5 /build/disk && truncate -s 1T /build/disk").await.status.success());
    let refused = prison.build.take_disk(&prison.disk, prison.work.disk()).await.unwrap_err();
    assert!(refused.to_string().contains("bytes instead of"), "{refused}");
    prison.disk.set_len(DISK).await.unwrap();
    prison.build.take_disk(&prison.disk, prison.work.disk()).await.unwrap();
    let taken = fs::metadata(fixture.rootfs("disk")).unwrap();
    assert_eq!((taken.uid(), taken.gid(), taken.mode() & 0o7777, taken.len()), (0, 0, 0o644, DISK));
    assert!(!prison.root("echo x >> /build/disk").await.status.success());
    let Prison { sandbox, .. } = prison;
    sandbox.end().await;
}

#[tokio::test]
async fn build_of_endless_directories_and_files_leaves_the_server_alone() {
    let Some(fixture) = fixture().await else { return };
    let small = BuilderConfig { cache: CacheLimits { bytes: 1 << 20, ..CacheLimits::default() }, ..config(fixture.dir.path()) };
    let fixture = Fixture { builder: Arc::new(Builder::new(small)), ..fixture };
    fixture.builder.prepare().await.unwrap();
    let levels = "d/".repeat(1000);
    let step = format!("RUN for part in 1 2 3 4 5 6 7 8 9 10 11 12; do mkdir -p {levels}; cd -P {levels} 2>/dev/null; done; echo deep\n");
    let deep = fixture.build("deep", &step).await;
    assert!(deep.log.iter().any(|line| line.starts_with("deep")), "{:?}", deep.log);
    let data = fixture.dir.path().join("cache/accounts/000000000000/0/data");
    assert!(!data.exists(), "the store was over its limit");
    let after = fixture.build("after-deep", "CMD [\"/bin/sh\"]").await;
    assert!(after.result.is_ok(), "{:?}", after.result);
}

#[tokio::test]
async fn step_without_network_sees_no_device_but_its_loopback() {
    let Some(fixture) = fixture().await else { return };
    let look = "for device in /sys/class/net/*; do echo device ${device##*/}; done; [ -w /sys/kernel/uevent_helper ] && echo writable";
    let built = fixture.build("devices", &format!("RUN --network=none {look}; true\nRUN {look}; true\nCMD [\"/bin/sh\"]")).await;
    assert!(built.result.is_ok(), "{:?}", built.log);
    let seen: Vec<&str> = built.log.iter().filter_map(|line| line.strip_prefix("device ")).collect();
    assert!(seen == ["lo", "eth0", "lo"] || seen == ["lo", "lo", "eth0"], "{seen:?}");
    assert!(!built.log.iter().any(|line| line == "writable"));
}

#[tokio::test]
async fn prepare_deletes_what_killed_runtimes_left_and_nothing_that_runs() {
    let Some(fixture) = fixture().await else { return };
    let (left, lives) = (Prison::start(&fixture, "left").await, Prison::start(&fixture, "lives").await);
    let id = format!("hearth-build-{}", left.build.request.id);
    let Sandbox::Container(container) = left.sandbox else { unreachable!("these builds run in namespaces") };
    container.kill_runtime();
    while !processes_of(&left.build.request.id).is_empty() {
        tokio::task::yield_now().await;
    }
    let record = fixture.dir.path().join("cache/runtime").join(&id);
    assert!(record.exists(), "nobody has deleted it");
    Builder::new(config(fixture.dir.path())).prepare().await.unwrap();
    assert!(!record.exists());
    let groups = run("find", &["/sys/fs/cgroup", "-name", &id]);
    assert_eq!(String::from_utf8_lossy(&groups.stdout), "");
    assert!(lives.root("true").await.status.success());
    lives.sandbox.end().await;
}

#[tokio::test]
async fn step_that_speaks_of_a_full_disk_has_failed_for_its_own_reason() {
    let Some(fixture) = fixture().await else { return };
    let outcome = fixture.build("speaks", "RUN echo 'No space left on device'; printf 'no space left on device'; exit 3").await;
    let reason = outcome.state_reason();
    assert!(reason.starts_with("The container image build failed.") && reason.contains("exit code 3"), "{reason}");
    let killed = fixture.build("killed", "RUN exit 137").await;
    assert!(killed.log.iter().any(|line| line.contains("build_memory_mib")), "{:?}", killed.log);
    assert!(is_about_space("failed to copy files: write /var/lib/docker/x: no space left on device"));
}

#[tokio::test]
async fn build_that_would_fill_the_disk_is_ended_and_its_layers_are_given_up() {
    let Some(fixture) = fixture().await else { return };
    let found = nix::sys::statvfs::statvfs(fixture.dir.path()).unwrap();
    let free = found.blocks_available() * found.fragment_size();
    let careful = BuilderConfig { disk_reserve: free - (300 << 20), ..config(fixture.dir.path()) };
    let fixture = Fixture { builder: Arc::new(Builder::new(careful)), ..fixture };
    fixture.builder.prepare().await.unwrap();
    let outcome = fixture.build("filling", "RUN echo filling; cat /dev/zero > /file").await;
    assert!(outcome.state_reason().starts_with("DISK_STORAGE_FULL") && outcome.state_reason().contains("build_disk_reserve_mib"));
    assert!(!fixture.dir.path().join("cache/accounts/000000000000/0/data/overlay2").exists());
}

mod dockerfiles;
