//! The life of a machine with the real engine: boot, capture, clone, suspend, resume. Needs root, QEMU and the guest kit (`cargo xtask kit`).

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use hearth_guest_protocol::{Activity, App, LogSource};
use hearth_machine::{
    BootSpec, DialError, Engine, GuestError, LaunchError, LaunchSource, LaunchSpec, Machine, MachineEvent, NoServices, Snapshot,
    SuspendOutcome, Suspended, Target,
    kit::Kit,
    network::{Egress, EgressPolicy, Links, Slots},
    qemu::{Accelerator, Qemu},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);
/// How far a guest's clock may be off, in nanoseconds.
const CLOCK_ERROR: u64 = 50_000_000;
/// Bytes that the dirty set may grow by from the second quarter of many suspends to the last, however many they are. It does grow at first:
/// the driver of the port to the host has a thousand buffers and uses them in turn.
const MOST_GROWTH: u64 = 384 << 10;
/// How often the test of many suspends suspends its machine, unless `HEARTH_TEST_CYCLES` says how often.
const CYCLES: u64 = 100;

/// Counts its visitors in memory and on disk, and makes memory dirty when told to.
const SERVER: &str = r#"
use IO::Socket;
$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 5000, Listen => 5, ReuseAddr => 1) or die "listen: $!";
$| = 1; print "listening\n"; print STDERR "to stderr\n";
while ($c = $s->accept) {
    $line = <$c>; chomp $line;
    exit 7 if $line eq "exit";
    if ($line eq "fill") { $filled = rand() x (4 << 20); print $c "filled\n"; close $c; next; }
    $n++;
    open(F, "+<", "/count") or open(F, "+>", "/count"); $d = <F> + 1; seek(F, 0, 0); print F $d; close F;
    open(R, "<", "/dev/urandom"); read(R, $r, 8); close R;
    open(G, "<", "/dev/hearth/generation"); chomp($g = <G>); close G;
    $t = "\0" x 16; syscall(228, 0, $t); ($seconds, $nanoseconds) = unpack("qq", $t);
    print $c "$n $d ", unpack("H*", $r), " $g ", $seconds * 1000000000 + $nanoseconds, "\n"; close $c;
}
"#;

/// Says what its resolvers are, what becomes of a name and what of a connection; or sends 64 kB to where nobody answers.
const EXPLORER: &str = r#"
use IO::Socket;
$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 5000, Listen => 5, ReuseAddr => 1) or die "listen: $!";
while ($c = $s->accept) {
    if (<$c> eq "send\n") {
        $u = IO::Socket::INET->new(Proto => "udp", PeerAddr => "198.51.100.10", PeerPort => 9) or die; $u->send("x" x 1000) for 1..64;
        print $c "sent"; close $c; next;
    }
    open(R, "<", "/etc/resolv.conf"); @lines = <R>; close R; chomp @lines;
    $name = gethostbyname("www.example.com") ? "found" : "unknown";
    $t = IO::Socket::INET->new(PeerAddr => "198.51.100.10", PeerPort => 80, Timeout => 20); $said = $t ? "connected" : "$!";
    print $c join(",", @lines), "; $name; $said"; close $c;
}
"#;

/// Tells how large its machine is; reserves all that its disk has and more, or writes 64 MiB, and tells how that went.
const WRITER: &str = r#"
use IO::Socket; use IO::Handle;
$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 5000, Listen => 5, ReuseAddr => 1) or die "listen: $!";
while ($c = $s->accept) {
    $line = <$c>; chomp $line;
    if ($line eq "size") { print $c `nproc; awk '/MemTotal/ { print \$2 }' /proc/meminfo; df --output=size -B1M / | tail -1`; }
    if ($line eq "reserve") { print $c `fallocate -l 4G /all 2>&1; head -c 64M /dev/zero 2>&1 > /extra`; }
    if ($line eq "write") {
        open(F, ">", "/filler"); binmode F;
        for (1..64) { last unless print F rand() x (1 << 17) and F->flush; }
        print $c F->sync ? "written" : "failed: $!"; close F;
    }
    print $c "."; close $c;
}
"#;

/// Uses much memory before it listens, and none of it afterwards: 96 MiB of a file, 96 MiB of its own.
const SPENDER: &str = r#"
use IO::Socket; use IO::Handle;
open(F, "+>", "/large") or die; for (1..96) { print F "f" x (1 << 20) or die } F->sync; seek(F, 0, 0);
while (read(F, $part, 1 << 20)) { $read += length($part) } close F; $read == 96 << 20 or die;
$size = 96 << 20; { my $own = "m" x $size; $sum += ord(substr($own, 12345, 1)); undef $own; }
$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 5000, Listen => 5, ReuseAddr => 1) or die "listen: $!";
while ($c = $s->accept) { $line = <$c>; print $c $read >> 20, " ", chr($sum), "."; close $c; }
"#;
/// Most bytes of memory in its snapshot: a system that has done nothing of the kind has half of it, and a part of the file may stay.
const SPENDER_BYTES: u64 = 128 << 20;

/// Has a large file. For each visitor it reads that, runs a program, and says how many sectors of its disk have been read since the boot.
const READER: &str = r#"
use IO::Socket; use IO::Handle;
open(F, ">", "/large") or die; for (1..8) { print F "f" x (1 << 20) or die } F->sync; close F;
$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 5000, Listen => 5, ReuseAddr => 1) or die "listen: $!";
while ($c = $s->accept) {
    <$c>; $read = 0; open(F, "<", "/large"); while (read(F, $part, 1 << 20)) { $read += length($part) } close F; $read == 8 << 20 or die;
    system("perl", "-MPOSIX", "-e", "exit 0") and die;
    open(S, "<", "/sys/block/vda/stat"); @stat = split(" ", <S>); close S; print $c $stat[2]; close $c;
}
"#;
/// Most bytes that a clone of it reads from its disk for its first visitor.
const READER_BYTES: u64 = 1 << 20;

/// Says much, and then that it has.
const TALKER: &str = r#"
use IO::Socket;
$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 5000, Listen => 5, ReuseAddr => 1) or die "listen: $!";
while ($c = $s->accept) { <$c>; syswrite(STDOUT, join("", map { "line $_\n" } 1..5000)); print $c "said"; close $c; }
"#;

struct Bench {
    dir: TempDir,
    engine: Qemu,
}

impl Bench {
    /// Nothing, and a word on why, where the machine cannot run.
    async fn new(name: &str) -> Option<Self> {
        let kit =
            std::env::var_os("HEARTH_KIT").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/kit"), PathBuf::from);
        let kit = match Kit::open(&kit) {
            Ok(kit) => kit,
            Err(error) => {
                eprintln!("skipped: {error}");
                return None;
            }
        };
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: network slots need root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        make_rootfs(&kit.base_image().0, dir.path());
        let slots = Slots::start(&format!("{name}-{}", std::process::id()), Links::default(), Vec::new(), 1).await.unwrap();
        let engine = Qemu::start(kit, Accelerator::Tcg, slots).await.unwrap();
        Some(Self { dir, engine })
    }

    fn boot_spec(&self, id: &str) -> BootSpec {
        BootSpec {
            id: id.to_owned(),
            dir: self.dir.path().join(id),
            rootfs: self.dir.path().join("rootfs.img"),
            disks: Vec::new(),
            vcpus: 1,
            memory_mib: 512,
            egress: Egress::Internet,
            services: Arc::new(NoServices),
            timeout: PATIENCE,
        }
    }

    async fn boot(&self, id: &str) -> Box<dyn Machine> {
        self.engine.boot(self.boot_spec(id)).await.unwrap()
    }

    fn spec(&self, id: &str, snapshot: &Arc<Snapshot>, source: LaunchSource, generation: u64) -> LaunchSpec {
        LaunchSpec {
            id: id.to_owned(),
            dir: self.dir.path().join(id),
            snapshot: snapshot.clone(),
            source,
            egress: Egress::Internet,
            services: Arc::new(NoServices),
            generation,
        }
    }

    async fn clone_of(&self, id: &str, snapshot: &Arc<Snapshot>) -> Box<dyn Machine> {
        self.engine.launch(self.spec(id, snapshot, LaunchSource::Snapshot, 1)).await.unwrap()
    }

    async fn end(self) {
        self.engine.shutdown().await;
        self.dir.close().unwrap();
    }
}

fn make_rootfs(base: &Path, dir: &Path) {
    let tree = dir.join("tree");
    std::fs::create_dir_all(&tree).unwrap();
    let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
    run(Command::new("tar").arg("-xf").arg(base).arg("-C").arg(&tree));
    let image = dir.join("rootfs.img");
    std::fs::File::create(&image).unwrap().set_len(2 << 30).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&tree).arg(&image));
    std::fs::remove_dir_all(&tree).unwrap();
}

fn app(argv: &[&str]) -> App {
    App {
        argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
        env: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
        cwd: "/".to_owned(),
        user: String::new(),
        stop_signal: 15,
        all_capabilities: false,
        hostname: "localhost".to_owned(),
    }
}

/// What the counting server answers.
struct Visit {
    memory: u32,
    disk: u32,
    random: String,
    generation: u64,
    /// Nanoseconds since the Unix epoch.
    clock: u64,
    /// When the server was asked, and when it had answered, by the host's clock.
    asked: [u64; 2],
}

impl Visit {
    /// Nanoseconds by which the guest's clock is off, whatever part of the time between question and answer it was read at.
    fn clock_error(&self) -> u64 {
        self.asked[0].saturating_sub(self.clock).max(self.clock.saturating_sub(self.asked[1]))
    }
}

fn wall_clock_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    u64::try_from(now.as_nanos()).unwrap()
}

async fn visit(machine: &dyn Machine) -> Visit {
    let talk = async {
        let mut stream = machine.dialer().dial(5000).await.unwrap();
        let asked = wall_clock_ns();
        stream.write_all(b"hello\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let asked = [asked, wall_clock_ns()];
        let mut words = answer.split_whitespace();
        let mut word = || words.next().unwrap_or_else(|| panic!("a short answer: {answer:?}"));
        let (memory, disk) = (word().parse().unwrap(), word().parse().unwrap());
        let random = word().to_owned();
        let (generation, clock) = (word().parse().unwrap(), word().parse().unwrap());
        Visit { memory, disk, random, generation, clock, asked }
    };
    timeout(PATIENCE, talk).await.expect("the server answers")
}

async fn suspend(machine: Box<dyn Machine>) -> Suspended {
    match machine.suspend(CancellationToken::new()).await.unwrap() {
        SuspendOutcome::Suspended(suspended) => suspended,
        SuspendOutcome::Cancelled(_) => panic!("nobody cancelled"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_keeps_its_memory_and_disk_through_its_life() {
    let Some(bench) = Bench::new("life").await else { return };
    let mut machine = bench.boot("image").await;
    let mut events = machine.take_events().unwrap();
    machine.start_app(app(&["perl", "-e", SERVER])).await.unwrap();
    let (mut lines, mut port) = (Vec::new(), None);
    while port.is_none() || lines.len() < 2 {
        match timeout(PATIENCE, events.recv()).await.expect("the server listens and logs").unwrap() {
            MachineEvent::Listening(listening) => port = Some(listening),
            MachineEvent::Log(record) if record.source != LogSource::System => {
                lines.push(String::from_utf8(record.line).unwrap());
            }
            MachineEvent::Log(_) | MachineEvent::Activity(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(port, Some(5000));
    lines.sort();
    assert_eq!(lines, ["listening", "to stderr"]);
    assert_eq!(visit(&*machine).await.memory, 1);
    let snapshot = Arc::new(machine.capture(bench.dir.path().join("snapshot")).await.unwrap());
    let manifest = &snapshot.manifest;
    eprintln!(
        "memory {} kB, device state {} B, disk {} kB",
        manifest.memory_bytes >> 10,
        manifest.device_state_bytes,
        manifest.disk_bytes >> 10
    );
    Snapshot::open(&snapshot.dir).unwrap();

    let (one, two) = (bench.clone_of("one", &snapshot).await, bench.clone_of("two", &snapshot).await);
    let (first, second) = (visit(&*one).await, visit(&*two).await);
    assert_eq!((first.memory, first.disk), (2, 2));
    assert_eq!((second.memory, second.disk), (2, 2), "clones do not see each other's writes");
    assert_ne!(first.random, second.random, "clones draw different random bytes");
    assert!(matches!(one.dialer().dial(5001).await, Err(DialError::Refused(Target::Port(5001)))));
    two.kill().await;

    let mut machine = one;
    for life in 2..5_u32 {
        let dialer = machine.dialer();
        let begun = Instant::now();
        let suspended = suspend(machine).await;
        eprintln!("suspended in {} ms, {} kB dirty", begun.elapsed().as_millis(), suspended.dirty_bytes >> 10);
        assert!(matches!(dialer.dial(5000).await, Err(DialError::Gone(_))));
        let begun = Instant::now();
        let spec = bench.spec("one", &snapshot, LaunchSource::Suspended, u64::from(life));
        machine = bench.engine.launch(spec).await.unwrap();
        eprintln!("resumed in {} ms", begun.elapsed().as_millis());
        let now = visit(&*machine).await;
        assert_eq!((now.memory, now.disk), (life + 1, life + 1));
        assert_eq!(now.generation, u64::from(life));
        assert!(now.clock_error() < 20 * CLOCK_ERROR, "the guest's clock is off by {} us", now.clock_error() / 1000);
    }

    let mut events = machine.take_events().unwrap();
    let mut stream = machine.dialer().dial(5000).await.unwrap();
    stream.write_all(b"exit\n").await.unwrap();
    let status = loop {
        match timeout(PATIENCE, events.recv()).await.expect("the exit is reported").unwrap() {
            MachineEvent::AppExited(status) => break status,
            MachineEvent::Log(_) | MachineEvent::Activity(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(status.code, 7);
    machine.kill().await;

    let spec = bench.spec("one", &snapshot, LaunchSource::Suspended, 9);
    assert!(matches!(bench.engine.launch(spec).await, Err(LaunchError::Snapshot(_))), "a suspended state is used once");
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_has_no_room_for_memory_that_was_used_once() {
    let Some(bench) = Bench::new("spent").await else { return };
    let mut image = bench.boot("image").await;
    let mut events = image.take_events().unwrap();
    image.start_app(app(&["perl", "-e", SPENDER])).await.unwrap();
    while !matches!(timeout(PATIENCE, events.recv()).await.expect("the app listens"), Some(MachineEvent::Listening(5000))) {}
    let snapshot = Arc::new(image.capture(bench.dir.path().join("snapshot")).await.unwrap());
    let bytes = snapshot.manifest.memory_bytes;
    eprintln!("memory {} kB", bytes >> 10);
    assert!(bytes < SPENDER_BYTES, "{bytes} bytes of memory are in the snapshot");
    let machine = bench.clone_of("one", &snapshot).await;
    assert_eq!(ask(&*machine, "hello").await, "96 m.", "it has lost nothing");
    machine.kill().await;
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn capture_keeps_the_files_that_were_used_last() {
    let Some(bench) = Bench::new("files").await else { return };
    let mut image = bench.boot("image").await;
    let mut events = image.take_events().unwrap();
    image.start_app(app(&["perl", "-e", READER])).await.unwrap();
    let sectors = async |machine: &dyn Machine| ask(machine, "hello").await.parse::<u64>().unwrap();
    let (mut listens, mut rests) = (false, false);
    while !(listens && rests) {
        match timeout(PATIENCE, events.recv()).await.expect("the app listens and comes to rest").unwrap() {
            MachineEvent::Listening(port) => listens = port == 5000,
            MachineEvent::Activity(activity) => rests = activity == Activity::AtRest,
            MachineEvent::Log(_) => {}
            other => panic!("{other:?}"),
        }
    }
    let before = sectors(&*image).await;
    let snapshot = Arc::new(image.capture(bench.dir.path().join("snapshot")).await.unwrap());
    let machine = bench.clone_of("one", &snapshot).await;
    let read = (sectors(&*machine).await - before) * 512;
    eprintln!("{} kB read from the disk, memory {} kB", read >> 10, snapshot.manifest.memory_bytes >> 10);
    assert!(read < READER_BYTES, "a clone read {read} bytes from its disk");
    machine.kill().await;
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_suspend_that_is_cancelled_is_no_more_than_a_pause() {
    let Some(bench) = Bench::new("cancel").await else { return };
    let mut image = bench.boot("image").await;
    let mut events = image.take_events().unwrap();
    image.start_app(app(&["perl", "-e", SERVER])).await.unwrap();
    while !matches!(timeout(PATIENCE, events.recv()).await.expect("the app listens"), Some(MachineEvent::Listening(5000))) {}
    let snapshot = Arc::new(image.capture(bench.dir.path().join("snapshot")).await.unwrap());
    let mut machine = bench.clone_of("one", &snapshot).await;
    assert_eq!(visit(&*machine).await.memory, 1);

    // Before anything was written.
    let cancelled = CancellationToken::new();
    cancelled.cancel();
    let dialer = machine.dialer();
    let SuspendOutcome::Cancelled(running) = machine.suspend(cancelled).await.unwrap() else { panic!("it was cancelled at once") };
    machine = running;
    assert!(matches!(dialer.dial(5000).await, Err(DialError::Gone(_))), "the old session is over");
    let now = visit(&*machine).await;
    assert_eq!((now.memory, now.disk), (2, 2));

    // While the changes are being written. Whoever is too late for that has a suspended machine, and tries again.
    let mut visits = 2;
    let mut generation = 1;
    loop {
        assert!(generation < 10, "a suspend was never seen at its work");
        let mut stream = machine.dialer().dial(5000).await.unwrap();
        stream.write_all(b"fill\n").await.unwrap();
        timeout(PATIENCE, stream.read_to_string(&mut String::new())).await.expect("memory is filled").unwrap();
        let (cancel, changes) = (CancellationToken::new(), bench.dir.path().join("one/suspended.draft/changes"));
        let watcher = tokio::spawn({
            let cancel = cancel.clone();
            async move {
                while !std::fs::metadata(&changes).is_ok_and(|changes| changes.len() > 0) {
                    tokio::task::yield_now().await;
                }
                cancel.cancel();
            }
        });
        let outcome = machine.suspend(cancel).await.unwrap();
        watcher.abort();
        visits += 1;
        match outcome {
            SuspendOutcome::Cancelled(running) => {
                machine = running;
                break;
            }
            SuspendOutcome::Suspended(_) => {
                generation += 1;
                machine = bench.engine.launch(bench.spec("one", &snapshot, LaunchSource::Suspended, generation)).await.unwrap();
                assert_eq!(visit(&*machine).await.memory, visits);
            }
        }
    }
    let now = visit(&*machine).await;
    assert_eq!((now.memory, now.disk), (visits, visits));
    assert!(!bench.dir.path().join("one/suspended").exists() && !bench.dir.path().join("one/suspended.draft").exists());

    // It says what happens to it, and its next suspend and resume are like any other.
    suspend(machine).await;
    let mut machine = bench.engine.launch(bench.spec("one", &snapshot, LaunchSource::Suspended, generation + 1)).await.unwrap();
    assert_eq!(visit(&*machine).await.disk, visits + 1);
    let mut events = machine.take_events().unwrap();
    machine.dialer().dial(5000).await.unwrap().write_all(b"exit\n").await.unwrap();
    while !matches!(timeout(PATIENCE, events.recv()).await.expect("the exit is reported"), Some(MachineEvent::AppExited(_))) {}
    machine.kill().await;
    bench.end().await;
}

async fn ask(machine: &dyn Machine, what: &str) -> String {
    let talk = async {
        let mut stream = machine.dialer().dial(5000).await.unwrap();
        stream.write_all(format!("{what}\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    timeout(PATIENCE, talk).await.expect("the app answers")
}

/// A small file system of its own, over a directory.
struct Small(PathBuf);

impl Small {
    fn mount(dir: &Path, mib: u32) -> Self {
        std::fs::create_dir(dir).unwrap();
        let options = format!("size={mib}m,mode=0711");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "hearth-full"]).arg(dir).status().unwrap();
        assert!(mounted.success());
        Self(dir.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_is_an_error_in_the_guest_and_nothing_worse() {
    let Some(bench) = Bench::new("full").await else { return };
    let spec = BootSpec { vcpus: 2, memory_mib: 1024, ..bench.boot_spec("image") };
    let mut image = bench.engine.boot(spec).await.unwrap();
    let mut events = image.take_events().unwrap();
    image.start_app(app(&["perl", "-e", WRITER])).await.unwrap();
    while !matches!(timeout(PATIENCE, events.recv()).await.expect("the app listens"), Some(MachineEvent::Listening(5000))) {}
    let snapshot = Arc::new(image.capture(bench.dir.path().join("snapshot")).await.unwrap());

    // The guest's own file system is full.
    let machine = bench.clone_of("guest", &snapshot).await;
    let size = ask(&*machine, "size").await;
    let numbers: Vec<u64> = size.trim_end_matches('.').split_whitespace().map(|number| number.parse().unwrap()).collect();
    let [cpus, memory_kib, disk_mib] = numbers[..] else { panic!("{size:?}") };
    assert_eq!(cpus, 2);
    assert!((900 << 10..1024 << 10).contains(&memory_kib), "{memory_kib} KiB");
    assert!((1900..2048).contains(&disk_mib), "{disk_mib} MiB");
    let said = ask(&*machine, "reserve").await;
    assert_eq!(said.matches("No space left on device").count(), 2, "{said}");
    let usage = machine.usage().unwrap();
    assert!(usage.cpu > Duration::ZERO);
    machine.kill().await;

    // The host's is.
    let small = Small::mount(&bench.dir.path().join("host"), 16);
    let mut machine = bench.clone_of("host", &snapshot).await;
    let mut events = machine.take_events().unwrap();
    let said = ask(&*machine, "write").await;
    assert!(said.starts_with("failed: "), "{said}");
    loop {
        match timeout(PATIENCE, events.recv()).await.expect("the operator is told") {
            Some(MachineEvent::DiskFailed { full }) => break assert!(full, "and why"),
            Some(MachineEvent::Log(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(ask(&*machine, "size").await.starts_with("2\n"), "it lives on");
    machine.kill().await;
    drop(small);
    bench.end().await;
}

/// The one in the middle.
fn median<T: Copy + Ord>(values: &[T]) -> T {
    let mut values = values.to_vec();
    values.sort_unstable();
    values[values.len() / 2]
}

/// What this process, which is the machines' host, holds: descriptors, threads, children.
fn holdings() -> [usize; 3] {
    let entries = |path: &str| std::fs::read_dir(path).unwrap().count();
    let children = |task: std::io::Result<std::fs::DirEntry>| {
        // A thread may have ended in the meantime.
        std::fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default().split_whitespace().count()
    };
    [entries("/proc/self/fd"), entries("/proc/self/task"), std::fs::read_dir("/proc/self/task").unwrap().map(children).sum()]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_is_suspended_again_and_again_stays_as_it_is() {
    let Some(bench) = Bench::new("cycles").await else { return };
    let cycles = std::env::var("HEARTH_TEST_CYCLES").map_or(CYCLES, |number| number.parse().unwrap());
    let mut machine = bench.boot("image").await;
    let mut events = machine.take_events().unwrap();
    machine.start_app(app(&["perl", "-e", SERVER])).await.unwrap();
    while !matches!(timeout(PATIENCE, events.recv()).await.expect("the server listens"), Some(MachineEvent::Listening(5000))) {}
    let snapshot = Arc::new(machine.capture(bench.dir.path().join("snapshot")).await.unwrap());

    let mut machine = bench.clone_of("one", &snapshot).await;
    let mut randoms = HashSet::from([visit(&*machine).await.random]);
    let (mut dirty, mut took, mut held, mut clock_errors) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for cycle in 1..=cycles {
        let begun = Instant::now();
        dirty.push(suspend(machine).await.dirty_bytes);
        took.push(begun.elapsed());
        machine = bench.engine.launch(bench.spec("one", &snapshot, LaunchSource::Suspended, cycle + 1)).await.unwrap();
        let now = visit(&*machine).await;
        assert_eq!((u64::from(now.memory), now.generation), (cycle + 1, cycle + 1));
        clock_errors.push(now.clock_error());
        assert!(randoms.insert(now.random), "random bytes came twice");
        held.push(holdings());
    }
    machine.kill().await;
    // On a busy host a single exchange may come late; a clock that drifts, or is not set, is wrong in most cycles.
    clock_errors.sort_unstable();
    let (off, worst) = (median(&clock_errors) / 1000, clock_errors[clock_errors.len() - 1] / 1000);
    eprintln!("clock off by {off} us, {worst} us at most; suspends took {} ms", median(&took).as_millis());
    assert!(off * 1000 < CLOCK_ERROR, "the guest's clock was off by {off} us");
    // Other tests of this process may have ended in the meantime.
    let (first, last) = (held[0], held[held.len() - 1]);
    assert!(last.iter().zip(first).all(|(last, first)| *last <= first), "descriptors, threads, children: {first:?}, then {last:?}");
    let quarter = dirty.len() / 4;
    let (before, after) = (median(&dirty[quarter..2 * quarter]), median(&dirty[3 * quarter..]));
    eprintln!("dirty {} kB at first, {} kB in the second quarter, {} kB in the last", dirty[0] >> 10, before >> 10, after >> 10);
    assert!(after < before + MOST_GROWTH, "the dirty set grew from {before} to {after} bytes: {dirty:?}");
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_has_the_egress_of_its_launch_and_not_of_its_snapshot() {
    let Some(bench) = Bench::new("reach").await else { return };
    let mut machine = bench.boot("image").await;
    let mut events = machine.take_events().unwrap();
    machine.start_app(app(&["perl", "-e", EXPLORER])).await.unwrap();
    while !matches!(timeout(PATIENCE, events.recv()).await.expect("the app listens"), Some(MachineEvent::Listening(5000))) {}
    let snapshot = Arc::new(machine.capture(bench.dir.path().join("snapshot")).await.unwrap());
    let policy = EgressPolicy::parse("example.org", "").unwrap();
    for (egress, expected) in
        [(Egress::None, "; unknown; Connection refused"), (Egress::Policy(policy), "nameserver 10.0.2.2; unknown; Connection refused")]
    {
        let mut spec = bench.spec("explorer", &snapshot, LaunchSource::Snapshot, 1);
        spec.egress = egress;
        let machine = bench.engine.launch(spec).await.unwrap();
        let explore = async {
            let mut stream = machine.dialer().dial(5000).await.unwrap();
            stream.write_all(b"go\n").await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let begun = Instant::now();
        assert_eq!(timeout(PATIENCE, explore).await.expect("the app answers"), expected);
        assert!(begun.elapsed() < Duration::from_secs(5), "refusals are answers, not silence");
        machine.kill().await;
    }

    // What it sends of its own accord is counted.
    let mut spec = bench.spec("sender", &snapshot, LaunchSource::Snapshot, 1);
    spec.egress = Egress::Internet;
    let machine = bench.engine.launch(spec).await.unwrap();
    let before = machine.usage().unwrap().sent_bytes;
    assert!(before < 10_000, "{before} bytes before it was told to send any");
    assert_eq!(ask(&*machine, "send").await, "sent");
    let counted = async {
        while machine.usage().unwrap().sent_bytes - before < 60_000 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, counted).await.expect("64 kB of datagrams are counted");
    machine.kill().await;
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_carries_thousands_of_connections() {
    let Some(bench) = Bench::new("crowd").await else { return };
    let mut machine = bench.boot("image").await;
    let mut events = machine.take_events().unwrap();
    let server = "use IO::Socket; $s = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => 5000, Listen => 4096) or die $!; sleep";
    machine.start_app(app(&["perl", "-e", server])).await.unwrap();
    while !matches!(timeout(PATIENCE, events.recv()).await.expect("the server listens"), Some(MachineEvent::Listening(5000))) {}
    let dialer = machine.dialer();
    let mut connections = Vec::new();
    for number in 1..=2000 {
        let connection = timeout(PATIENCE, dialer.dial(5000)).await.expect("a port that listens connects");
        connections.push(connection.unwrap_or_else(|error| panic!("connection {number}: {error}")));
    }
    machine.kill().await;
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_app_says_just_before_it_is_killed_is_known() {
    let Some(bench) = Bench::new("words").await else { return };
    let mut machine = bench.boot("image").await;
    let mut events = machine.take_events().unwrap();
    machine.start_app(app(&["perl", "-e", TALKER])).await.unwrap();
    while !matches!(timeout(PATIENCE, events.recv()).await.expect("the app listens"), Some(MachineEvent::Listening(5000))) {}
    let reader = tokio::spawn(async move {
        let mut lines = Vec::new();
        while let Some(event) = events.recv().await {
            if let MachineEvent::Log(record) = event {
                assert_eq!(record.dropped, 0);
                lines.push(String::from_utf8(record.line).unwrap());
            }
        }
        lines
    });
    assert_eq!(ask(&*machine, "talk").await, "said");
    machine.kill().await;
    let lines = timeout(PATIENCE, reader).await.expect("the machine's events end").unwrap();
    assert_eq!(lines, (1..=5000).map(|number| format!("line {number}")).collect::<Vec<_>>());
    bench.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_run_says_why() {
    let Some(bench) = Bench::new("refused").await else { return };
    let mut machine = bench.boot("refused").await;
    let mut events = machine.take_events().unwrap();
    let error = machine.start_app(app(&["/no/such/program"])).await.unwrap_err();
    assert!(matches!(&error, GuestError::App(reason) if reason.contains("/no/such/program")), "{error}");
    let pids = Command::new("pgrep").args(["-f", "qemu-system.*-name refused,"]).output().unwrap();
    let pid = String::from_utf8(pids.stdout).unwrap();
    let pid = pid.lines().find(|pid| {
        std::fs::read_to_string(format!("/proc/{pid}/status"))
            .is_ok_and(|status| status.contains(&format!("PPid:\t{}\n", std::process::id())))
    });
    let pid = nix::unistd::Pid::from_raw(pid.expect("QEMU runs").parse().unwrap());
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "QEMU is confined:\n{status}");
    assert!(!status.contains("Uid:\t0\t"), "QEMU is not root:\n{status}");
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let reason = loop {
        match timeout(PATIENCE, events.recv()).await.expect("the death is reported").unwrap() {
            MachineEvent::Died { reason } => break reason,
            _ => continue,
        }
    };
    assert!(reason.contains("SIGKILL"), "{reason}");
    bench.end().await;
}
