//! The guest on a real kernel: boots the kit under QEMU and plays the host's part. Needs QEMU, mkfs.ext4 and the guest kit
//! (`cargo xtask kit`); skipped where there is none.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hearth_guest_protocol::{
    App, BOOT_MARKER, Carrier, DialReply, ExitStatus, GuestMessage, Hello, HostMessage, LogRecord, LogSource, Marker, MarkerTrigger,
    MarkerWatch, Mux, Network, PORT_NAME, Parting, Stream, StreamHeader, VERSION, read_message, write_message,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixListener, UnixStream},
    process::{Child, Command},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};

const PATIENCE: Duration = Duration::from_secs(120);
const DETACH_MARKER: Marker = *b"0123456789abcdef";
/// 2033: a clock that no test machine has by itself.
const LATER: u64 = 2_000_000_000;

/// Tells what a container looks like from within, keeps the longest time for which it did not run, then serves: `exit N` ends it, anything else is echoed after the end of the request.
const APPLICATION: &str = r#"
printf 'pid %s\n' $$
printf 'user %s:%s %s\n' "$(id -u)" "$(id -g)" "$(id -G | tr ' ' ,)"
printf 'files %s %s\n' "$(ulimit -Sn)" "$(ulimit -Hn)"
printf 'cwd %s\n' "$PWD"
printf 'home %s\n' "$HOME"
printf 'greeting %s\n' "$GREETING"
printf 'host %s %s\n' "$(uname -n)" "$(cat /etc/hostname)"
printf 'bounding %s\n' "$(sed -n 's/CapBnd:\t//p' /proc/self/status)"
printf 'effective %s\n' "$(sed -n 's/CapEff:\t//p' /proc/self/status)"
printf 'dev %s\n' "$(ls /dev | tr '\n' ,)"
printf 'shm %s\n' "$(df -k --output=size /dev/shm | tail -n 1 | tr -d ' ')"
printf 'processes %s\n' "$(ls /proc | grep -c '^[0-9]*$')"
printf 'resolver %s\n' "$(cat /etc/resolv.conf)"
printf 'routes %s\n' "$(awk '/^eth0/{print $2 "-" $3 "-" $8}' /proc/net/route | tr '\n' ,)"
printf 'mounts %s\n' "$(awk '{print $2}' /proc/mounts | sort -u | tr '\n' ,)"
echo x 2>/dev/null > /proc/sys/kernel/hostname && echo 'sysctl writable' || echo 'sysctl read-only'
echo x > /dev/stdout
echo 'to stderr' >&2
(longest=0; last=
while :; do
    read up _ < /proc/uptime; now=${up%.*}${up#*.}
    [ $((now - ${last:-$now})) -gt $longest ] && longest=$((now - last)) && echo $longest > /longest
    last=$now; sleep 0.05
done) &
exec perl -e '
use IO::Socket; $| = 1; $SIG{CHLD} = "IGNORE";
$s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 80, Listen => 5) or die "listen: $!";
open(G, "<", "/dev/hearth/generation") or die "generation: $!";
while (1) {
    $c = $s->accept or next;
    $r = join "", <$c>;
    exit $1 if $r =~ /^exit (\d+)/;
    print "time ", time, "\n" if $r eq "time";
    if ($r eq "generation") { sysseek(G, 0, 0); sysread(G, $g, 16); print "generation $g" }
    if ($r eq "longest") { open(F, "<", "/longest"); print "longest ", <F>; close F }
    if ($r =~ /^connect (\d+)/) {
        $o = IO::Socket::INET->new(PeerAddr => "10.0.2.2", PeerPort => $1) or die "connect: $!";
        print defined($o->sysread($b, 5)) ? "outside $b\n" : "outside $!\n";
        if (!fork) { close $c; print defined($o->sysread($b, 5)) ? "outside $b\n" : "outside $!\n"; exit }
        close $o;
    }
    print $c $r; close $c;
}'
"#;

/// What a user without privileges sees, then an end by signal.
const UNPRIVILEGED: &str = r#"
printf 'user %s:%s %s\n' "$(id -u)" "$(id -g)" "$(id -G | tr ' ' ,)"
printf 'home %s\n' "$HOME"
printf 'bounding %s\n' "$(sed -n 's/CapBnd:\t//p' /proc/self/status)"
printf 'effective %s\n' "$(sed -n 's/CapEff:\t//p' /proc/self/status)"
echo opened > /dev/stderr
exec perl -e 'kill 9, $$; sleep 1; print "init ignores its own signals\n"; exit 3'
"#;

/// What every capability is good for.
const PRIVILEGED: &str = r#"
printf 'effective %s\n' "$(sed -n 's/CapEff:\t//p' /proc/self/status)"
test -c /dev/fuse && echo 'fuse there'
mount -t tmpfs none /mnt && echo 'mount works'
mkdir /sys/fs/cgroup/mine && echo 'cgroup writable'
echo renamed > /proc/sys/kernel/hostname && echo 'sysctl writable'
"#;

struct Vm {
    _dir: TempDir,
    qemu: Child,
    console: PathBuf,
    channel: PathBuf,
}

impl Vm {
    /// Nothing, and a word on why, where machines cannot run.
    async fn boot() -> Option<Self> {
        let kit =
            std::env::var_os("HEARTH_KIT").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/kit"), PathBuf::from);
        if !kit.join("manifest.json").exists() {
            eprintln!("skipped: no guest kit in {}", kit.display());
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let disk = make_disk(&kit.join("base.tar"), dir.path()).await;
        let (console, channel) = (dir.path().join("console"), dir.path().join("channel"));
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-M", "microvm", "-accel", "tcg", "-cpu", "max"])
            .args(["-m", "512M", "-device", "virtio-serial-device", "-device", "virtio-blk-device,drive=d"])
            .args(["-netdev", "user,id=n", "-device", "virtio-net-device,netdev=n"])
            .arg("-kernel")
            .arg(kit.join("vmlinuz"))
            .arg("-initrd")
            .arg(kit.join("initramfs.cpio"))
            .arg("-append")
            .arg(format!("console=ttyS0 quiet panic=-1 tsc_early_khz={}", tsc_khz()))
            .arg("-drive")
            .arg(format!("id=d,file={},format=raw,if=none", disk.display()))
            .arg("-chardev")
            .arg(format!("socket,id=c,path={},reconnect=1", channel.display()))
            .args(["-device", &format!("virtserialport,chardev=c,name={PORT_NAME}"), "-serial"])
            .arg(format!("file:{}", console.display()))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Some(Self { _dir: dir, qemu, console, channel })
    }

    /// Waits for the machine to connect. Each listener takes one connection: the host of one session.
    fn host(&self) -> Host {
        let _ = std::fs::remove_file(&self.channel);
        Host { listener: UnixListener::bind(&self.channel).unwrap() }
    }

    fn console(&self) -> String {
        std::fs::read_to_string(&self.console).unwrap_or_default()
    }
}

struct Host {
    listener: UnixListener,
}

/// The host's side of a session.
struct Session {
    mux: Mux,
    control: Stream,
    logs: mpsc::UnboundedReceiver<LogRecord>,
    trigger: MarkerTrigger,
    driver: JoinHandle<()>,
}

impl Host {
    async fn connection(&self) -> UnixStream {
        timeout(PATIENCE, self.listener.accept()).await.expect("QEMU connects").unwrap().0
    }
}

impl Session {
    async fn open(mut io: UnixStream, marker: Marker, generation: u64, clock_seconds: u64) -> Self {
        // What an earlier session left in flight must not matter.
        io.write_all(b"left over").await.unwrap();
        io.write_all(&marker).await.unwrap();
        let (io, trigger) = MarkerWatch::new(io);
        let (mux, mut driver) = Mux::client(io);
        let mut control = mux.open().await.unwrap();
        write_message(&mut control, &StreamHeader::Control).await.unwrap();
        let network = Network {
            address: Ipv4Addr::new(10, 0, 2, 15),
            prefix: 24,
            gateway: Ipv4Addr::new(10, 0, 2, 2),
            nameservers: vec![Ipv4Addr::new(10, 0, 2, 3)],
            mtu: 1400,
        };
        let hello = Hello { protocol: VERSION, vm_id: "microvm-test".into(), generation, entropy: vec![7; 600], network: Some(network) };
        write_message(&mut control, &HostMessage::Hello(hello)).await.unwrap();
        loop {
            match timeout(PATIENCE, read_message(&mut control)).await.expect("the guest answers").unwrap() {
                GuestMessage::AskTime => {
                    let time = HostMessage::Time { wall_clock_ns: clock_seconds * 1_000_000_000 };
                    write_message(&mut control, &time).await.unwrap();
                }
                GuestMessage::Ready(ready) => {
                    assert_eq!((ready.protocol, ready.kernel.starts_with("6.")), (VERSION, true));
                    break;
                }
                other => panic!("{other:?} instead of Ready"),
            }
        }
        let (sender, logs) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut stream = driver.inbound.recv().await.expect("the guest opens its log");
            assert_eq!(read_message::<StreamHeader>(&mut stream).await.unwrap(), StreamHeader::Log);
            while let Ok(record) = read_message(&mut stream).await {
                let _ = sender.send(record);
            }
        });
        Self { mux, control, logs, trigger, driver: driver.task }
    }

    async fn start(&mut self, app: App) -> GuestMessage {
        write_message(&mut self.control, &HostMessage::Start(app)).await.unwrap();
        self.message().await
    }

    /// The next message but for those that tell of the container's activity, which come at any time.
    async fn message(&mut self) -> GuestMessage {
        loop {
            match timeout(PATIENCE, read_message(&mut self.control)).await.expect("the guest says something").unwrap() {
                GuestMessage::Activity(_) => {}
                message => return message,
            }
        }
    }

    async fn line(&mut self) -> LogRecord {
        timeout(PATIENCE, self.logs.recv()).await.expect("the application says something").unwrap()
    }

    async fn dial(&self, port: u16) -> (Carrier, DialReply) {
        let mut stream = self.mux.open().await.unwrap();
        write_message(&mut stream, &StreamHeader::Dial { port }).await.unwrap();
        let reply = timeout(PATIENCE, read_message(&mut stream)).await.expect("the guest dials").unwrap();
        (Carrier::new(stream), reply)
    }

    async fn ask(&self, request: &str) -> String {
        let (mut stream, reply) = self.dial(80).await;
        assert_eq!(reply, DialReply::Connected);
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("the application answers").unwrap();
        answer
    }

    async fn detach(mut self) {
        let seen = self.trigger.arm(DETACH_MARKER);
        write_message(&mut self.control, &HostMessage::Detach { marker: DETACH_MARKER, parting: Parting::Pause }).await.unwrap();
        timeout(PATIENCE, seen).await.expect("the guest answers Detach").unwrap();
    }
}

/// What the guest says of itself to a host of another version.
async fn refused_version(mut io: UnixStream) -> u32 {
    io.write_all(&BOOT_MARKER).await.unwrap();
    let (mux, driver) = Mux::client(io);
    let mut control = mux.open().await.unwrap();
    write_message(&mut control, &StreamHeader::Control).await.unwrap();
    let hello = Hello { protocol: VERSION + 1, vm_id: "microvm-test".into(), generation: 1, entropy: vec![7; 600], network: None };
    write_message(&mut control, &HostMessage::Hello(hello)).await.unwrap();
    let answer = timeout(PATIENCE, read_message(&mut control)).await.expect("the guest answers").unwrap();
    driver.task.abort();
    let GuestMessage::Ready(ready) = answer else { panic!("{answer:?}") };
    ready.protocol
}

impl Drop for Session {
    /// Closes the connection.
    fn drop(&mut self) {
        self.driver.abort();
    }
}

async fn make_disk(base: &Path, dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    let disk = dir.join("disk");
    std::fs::create_dir(&tree).unwrap();
    let run = async |command: &mut Command| assert!(command.status().await.unwrap().success(), "{command:?}");
    run(Command::new("tar").arg("-xf").arg(base).arg("-C").arg(&tree)).await;
    std::fs::write(tree.join("etc/resolv.conf"), "nameserver 9.9.9.9\n").unwrap();
    std::fs::create_dir(tree.join("app")).unwrap();
    for (name, text) in [("orphan", "#!/no/such/interpreter\n"), ("noise", "no magic number\n")] {
        let path = tree.join("app").join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    std::fs::File::create(&disk).unwrap().set_len(1 << 30).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&tree).arg(&disk)).await;
    std::fs::remove_dir_all(&tree).unwrap();
    disk
}

/// microvm has no timer that the guest's kernel could measure an emulated counter against.
fn tsc_khz() -> u64 {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = cpuinfo.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(": ").nth(1)?.split('.').next()?.parse::<u64>().ok());
    mhz.unwrap() * 1000
}

fn app(argv: &[&str]) -> App {
    App {
        argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
        env: vec![("GREETING".into(), "good morning".into())],
        cwd: "/srv/made/for/it".into(),
        user: String::new(),
        stop_signal: 15,
        all_capabilities: false,
        hostname: "box".into(),
    }
}

fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

async fn failure(session: &mut Session, app: App) -> String {
    match session.start(app).await {
        GuestMessage::StartFailed { reason } => reason,
        other => panic!("{other:?} instead of StartFailed"),
    }
}

#[tokio::test]
async fn a_guest_serves_one_host_after_another() {
    let Some(mut vm) = Vm::boot().await else { return };
    let host = vm.host();
    assert_eq!(refused_version(host.connection().await).await, VERSION);
    let mut session = Session::open(host.connection().await, BOOT_MARKER, 1, now_seconds()).await;

    // What cannot be started says why, and may be corrected.
    for (argv, reason) in [
        (&["/app/run"][..], "/app/run: no such file or directory"),
        (&["no-such-program"], "\"no-such-program\": executable file not found in PATH"),
        (&["/app"], "/app: permission denied. It is a directory."),
        (
            &["/app/orphan"],
            "/app/orphan: its interpreter or loader: no such file or directory. Its first line names /no/such/interpreter, which is not in the \
             image.",
        ),
        (
            &["/app/noise"],
            "/app/noise: exec format error. It is neither a program nor a script whose first line names its interpreter, as #!/bin/sh does.",
        ),
    ] {
        assert_eq!(failure(&mut session, app(argv)).await, reason);
    }
    let stranger = App { user: "stranger".into(), ..app(&["true"]) };
    assert_eq!(failure(&mut session, stranger).await, "USER stranger: there is no such user in /etc/passwd");

    let GuestMessage::Started { pid } = session.start(app(&["sh", "-c", APPLICATION])).await else { panic!("not started") };
    assert!(pid > 1);
    assert_eq!(failure(&mut session, app(&["true"])).await, "the application has already been started");
    assert_eq!(session.message().await, GuestMessage::Listening { port: 80 });

    let mut told = Vec::new();
    while told.len() < 18 {
        let record = session.line().await;
        assert_eq!(record.dropped, 0);
        assert!(record.time_ns.abs_diff(now_seconds() * 1_000_000_000) < 60_000_000_000, "the clock was set");
        told.push((record.source, String::from_utf8(record.line).unwrap()));
    }
    let say = |name: &str| {
        let prefix = format!("{name} ");
        told.iter().find_map(|(_, line)| line.strip_prefix(&prefix)).unwrap_or_else(|| panic!("no {name} in {told:?}"))
    };
    assert_eq!(say("pid"), "1");
    assert_eq!(say("user"), "0:0 0");
    assert_eq!(say("files"), "1024 524288");
    assert_eq!(say("cwd"), "/srv/made/for/it");
    assert_eq!(say("home"), "/root");
    assert_eq!(say("greeting"), "good morning");
    assert_eq!(say("host"), "box box");
    assert_eq!(say("bounding"), "00000000a80425fb");
    assert_eq!(say("effective"), "00000000a80425fb");
    assert_eq!(say("dev"), "fd,full,hearth,mqueue,null,ptmx,pts,random,shm,stderr,stdin,stdout,tty,urandom,zero,");
    assert_eq!(say("shm"), "65536");
    assert!(say("processes").parse::<u32>().unwrap() < 8, "only the container's processes are seen");
    assert_eq!(say("resolver"), "nameserver 10.0.2.3");
    assert_eq!(say("routes"), "00000000-0202000A-00000000,0002000A-00000000-00FFFFFF,");
    assert_eq!(say("sysctl"), "read-only");
    let mounts: BTreeSet<&str> = say("mounts").split(',').collect();
    for expected in ["/", "/proc", "/sys", "/sys/fs/cgroup", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/proc/kcore"] {
        assert!(mounts.contains(expected), "{expected} is not among {mounts:?}");
    }
    assert!(!mounts.iter().any(|mount| mount.contains("rootfs") || mount.contains("tracing")), "{mounts:?}");
    assert!(told.contains(&(LogSource::Stderr, "to stderr".into())), "{told:?}");
    assert!(told.contains(&(LogSource::Stdout, "x".into())), "/dev/stdout can be opened: {told:?}");

    assert_eq!(session.ask("hello").await, "hello");
    let much = "0123456789abcdef".repeat(1 << 16);
    assert!(session.ask(&much).await == much, "a mebibyte goes both ways");
    assert_eq!(session.dial(81).await.1, DialReply::Refused);
    assert_eq!(session.ask("generation").await, "generation");
    assert_eq!(session.line().await.line, b"generation 1");

    // A connection that is open when the session ends is closed towards the application, which else would never take another.
    let (_hanging, reply) = session.dial(80).await;
    assert_eq!(reply, DialReply::Connected);
    session.detach().await;

    // The machine runs on here, as it does for a moment in every clone, and the application does not.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut session = Session::open(host.connection().await, DETACH_MARKER, 1, LATER).await;
    let stood_still = async {
        // Its clock of pauses has to notice first.
        while session.ask("longest").await == "longest" {
            let longest = String::from_utf8(session.line().await.line).unwrap();
            if longest.strip_prefix("longest ").unwrap().trim().parse::<u64>().unwrap() >= 290 {
                return;
            }
        }
    };
    timeout(PATIENCE, stood_still).await.expect("the application was frozen for three seconds");
    assert_eq!(session.ask("time").await, "time");
    let time = String::from_utf8(session.line().await.line).unwrap();
    assert!(time.strip_prefix("time ").unwrap().parse::<u64>().unwrap() - LATER < 60, "{time}");

    // A connection to the world outside lasts as long as the life of the guest does.
    let outside = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = async {
        let (mut peer, _) = timeout(PATIENCE, outside.accept()).await.expect("the application connects").unwrap();
        peer.write_all(b"there").await.unwrap();
        peer
    };
    let request = format!("connect {}", outside.local_addr().unwrap().port());
    let (_peer, answer) = tokio::join!(peer, session.ask(&request));
    assert_eq!(answer, request);
    assert_eq!(session.line().await.line, b"outside there");

    // A host that dies, in a session and between sessions, is replaced by another that knows the marker.
    drop(session);
    drop(host.connection().await);
    let mut session = Session::open(host.connection().await, DETACH_MARKER, 2, now_seconds()).await;
    assert_eq!(String::from_utf8_lossy(&session.line().await.line), "outside Software caused connection abort");
    assert_eq!(session.ask("generation").await, "generation");
    assert_eq!(session.line().await.line, b"generation 2");
    assert_eq!(session.ask("exit 7").await, "");
    assert_eq!(session.message().await, GuestMessage::Exited(ExitStatus { code: 7, out_of_memory: false }));
    session.detach().await;
    let mut session = Session::open(host.connection().await, DETACH_MARKER, 2, now_seconds()).await;
    assert_eq!(session.message().await, GuestMessage::Exited(ExitStatus { code: 7, out_of_memory: false }));
    assert_eq!(session.dial(80).await.1, DialReply::Refused);

    let console = vm.console();
    let complaints = console.lines().filter(|line| line.contains("panic") || line.starts_with("hearth-guest: "));
    let complaints: Vec<&str> = complaints.filter(|line| !line.starts_with("hearth-guest: session: ")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    vm.qemu.kill().await.unwrap();
}

#[tokio::test]
async fn users_have_what_their_image_grants() {
    for (user, all_capabilities, script, expected, code) in [
        (
            "www-data",
            false,
            UNPRIVILEGED,
            vec![
                "user 33:33 33",
                "home /var/www",
                "bounding 00000000a80425fb",
                "effective 0000000000000000",
                "opened",
                "init ignores its own signals",
            ],
            3,
        ),
        ("", true, PRIVILEGED, vec!["effective 000001ffffffffff", "fuse there", "mount works", "cgroup writable", "sysctl writable"], 0),
    ] {
        let Some(mut vm) = Vm::boot().await else { return };
        let mut session = Session::open(vm.host().connection().await, BOOT_MARKER, 1, now_seconds()).await;
        let started = session.start(App { user: user.into(), all_capabilities, ..app(&["sh", "-c", script]) }).await;
        assert!(matches!(started, GuestMessage::Started { .. }), "{started:?}");
        assert_eq!(session.message().await, GuestMessage::Exited(ExitStatus { code, out_of_memory: false }));
        let mut told = Vec::new();
        while told.len() < expected.len() {
            told.push(String::from_utf8(session.line().await.line).unwrap());
        }
        // The two outputs are not ordered among each other.
        told.sort();
        let mut expected = expected;
        expected.sort_unstable();
        assert_eq!(told, expected);
        vm.qemu.kill().await.unwrap();
    }
}
