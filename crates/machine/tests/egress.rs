//! What leaves a slot, with real namespaces and packets. The test is its own host: it runs itself again in a network namespace, where slots
//! and routes bother nobody. A "world" namespace has servers and a resolver on addresses for documentation (RFC 5737); a "guest" namespace has
//! a device with a guest's address, whose frames go to and from the slot's tap as a machine's monitor would pass them.
//!
//! Needs root, /dev/net/tun, ip(8), nft(8) and unshare(1).

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use hearth_machine::network::{Egress, EgressPolicy, GUEST_MAC, Slot, Slots};
use hickory_proto::{
    op::{Message, OpCode, Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, CNAME},
    },
};
use nix::{
    libc,
    sched::{CloneFlags, setns, unshare},
};

/// Set in the process that runs inside the namespace.
const INSIDE: &str = "HEARTH_TEST_EGRESS_INSIDE";
/// The host's address on the world's link.
const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// A server.
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// Another.
const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// One on a private network.
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
/// The world's resolver.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 53);
/// The slot.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The host's end of the first slot's link.
const LINK: Ipv4Addr = Ipv4Addr::new(192, 168, 200, 1);
/// How long a client waits. What is refused must not take that long.
const PATIENCE: Duration = Duration::from_secs(3);

/// Runs a test in a network namespace of its own, unless that cannot be.
fn alone(test: &str, run: impl AsyncFnOnce(World)) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        return runtime.block_on(async { run(World::new().await).await });
    }
    if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("skipped: network slots need root and /dev/net/tun");
        return;
    }
    let mut again = Command::new("unshare");
    again.arg("--net").arg(std::env::current_exe().unwrap()).args([test, "--exact", "--nocapture"]).env(INSIDE, "1");
    assert!(again.status().unwrap().success(), "{test} failed in its namespace");
}

/// A network namespace in which work is done on threads of its own.
struct Namespace(OwnedFd);

impl Namespace {
    fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Self(File::open("/proc/thread-self/ns/net").unwrap().into())
        };
        thread::spawn(make).join().unwrap()
    }

    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = self.0.try_clone().unwrap();
        let inside = move || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        thread::spawn(inside).join().unwrap()
    }

    fn ip(&self, lines: &str) {
        let lines = lines.to_owned();
        self.run(move || ip(&lines));
    }
}

fn ip(lines: &str) {
    let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{lines}");
}

/// The world beyond the host, and the host's slots.
struct World {
    slots: Slots,
    _namespace: Namespace,
}

impl World {
    async fn new() -> Self {
        let namespace = Namespace::new();
        namespace.ip(&format!("link add world type veth peer name host netns {}\n", std::process::id()));
        ip("link set lo up
addr add 198.51.100.1/24 dev host
link set host up
route add 203.0.113.0/24 dev host
route add 10.77.0.0/24 dev host
");
        namespace.ip("link set lo up
addr add 198.51.100.10/24 dev world
addr add 198.51.100.53/24 dev world
addr add 203.0.113.10/24 dev world
addr add 10.77.0.10/24 dev world
link set world up
route add default via 198.51.100.1
");
        for port in [53, 80, 443] {
            namespace.run(move || serve_tcp(port));
        }
        namespace.run(|| serve_udp(9000, |question| Some(question.to_vec())));
        namespace.run(|| serve_udp(53, |question| Some(resolve(question))));
        // Services of the host that no guest may reach.
        serve_tcp(80);
        let links = "192.168.200.0/24".parse().unwrap();
        let slots = Slots::start("egress", links, vec![RESOLVER], 1).await.unwrap();
        Self { slots, _namespace: namespace }
    }

    async fn guest(&self, egress: &Egress) -> Guest {
        let slot = self.slots.take(egress).await.unwrap();
        Guest::new(slot)
    }

    async fn guest_with(&self, allow: &str, deny: &str) -> Guest {
        self.guest(&Egress::Policy(EgressPolicy::parse(allow, deny).unwrap())).await
    }
}

/// Says "hello" to whoever connects.
fn serve_tcp(port: u16) {
    let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(b"hello");
        }
    });
}

/// One socket for each address, so that answers come from where the questions went.
fn serve_udp(port: u16, answer: fn(&[u8]) -> Option<Vec<u8>>) {
    for address in [SERVER, OTHER, RESOLVER] {
        let socket = UdpSocket::bind((address, port)).unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                if let Some(bytes) = answer(&buffer[..length]) {
                    let _ = socket.send_to(&bytes, peer);
                }
            }
        });
    }
}

/// The world's names.
fn resolve(question: &[u8]) -> Vec<u8> {
    let request = Message::from_vec(question).unwrap();
    let query = request.queries[0].clone();
    let name = query.name.to_ascii().to_lowercase();
    let a = |owner: &str, address| Record::from_rdata(Name::from_ascii(owner).unwrap(), 5, RData::A(A(address)));
    let mut response = Message::response(request.metadata.id, OpCode::Query);
    response.answers = match name.as_str() {
        "www.example.com." => vec![a(&name, SERVER)],
        "alias.example.com." => {
            let target = Name::from_ascii("other.example.net.").unwrap();
            vec![Record::from_rdata(query.name.clone(), 5, RData::CNAME(CNAME(target))), a("other.example.net.", OTHER)]
        }
        "private.example.com." => vec![a(&name, PRIVATE)],
        "host.example.com." => vec![a(&name, LINK), a(&name, HOST)],
        "metadata.example.com." => vec![a(&name, Ipv4Addr::new(169, 254, 169, 254))],
        _ => {
            response.metadata.response_code = ResponseCode::NXDomain;
            Vec::new()
        }
    };
    response.add_query(query);
    response.to_vec().unwrap()
}

/// What came of an attempt.
#[derive(Debug, PartialEq, Eq)]
enum Reached {
    Yes,
    /// An answer said no.
    Refused,
    /// Nothing came back.
    Silence,
}

/// A guest on a slot.
struct Guest {
    namespace: Namespace,
    slot: Slot,
}

impl Guest {
    fn new(slot: Slot) -> Self {
        let namespace = Namespace::new();
        let device = namespace.run(|| open_tap("eth0"));
        namespace.ip(&format!(
            "link set lo up
link set eth0 address {GUEST_MAC}
addr add 10.0.2.15/24 dev eth0
link set eth0 up
route add default via {GATEWAY}
"
        ));
        let tap = File::from(slot.tap().unwrap());
        for (mut from, mut to) in [(device.try_clone().unwrap(), tap.try_clone().unwrap()), (tap, device)] {
            thread::spawn(move || {
                let mut frame = vec![0; 65_536];
                while let Ok(length) = from.read(&mut frame) {
                    // A device that is not up takes no frames; the network repeats what matters.
                    let _ = to.write(&frame[..length]);
                }
            });
        }
        Self { namespace, slot }
    }

    fn tcp(&self, address: Ipv4Addr, port: u16) -> Reached {
        self.namespace.run(move || {
            let connected = TcpStream::connect_timeout(&(address, port).into(), PATIENCE).and_then(|mut stream| {
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.read_exact(&mut [0; 5])
            });
            judge(connected)
        })
    }

    fn udp(&self, address: Ipv4Addr, port: u16) -> Reached {
        self.namespace.run(move || judge(exchange((address, port).into(), b"hello").map(drop)))
    }

    /// Asks a resolver; the code of the answer and its addresses.
    fn ask(&self, server: Ipv4Addr, name: &str, kind: RecordType) -> (ResponseCode, Vec<Ipv4Addr>) {
        let mut request = Message::query();
        request.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let bytes = request.to_vec().unwrap();
        let answer = self.namespace.run(move || exchange((server, 53).into(), &bytes)).expect("the resolver answers");
        let answer = Message::from_vec(&answer).unwrap();
        assert_eq!(answer.metadata.id, request.metadata.id);
        let address = |record: &Record| match &record.data {
            RData::A(address) => Some(address.0),
            _ => None,
        };
        (answer.metadata.response_code, answer.answers.iter().filter_map(address).collect())
    }

    fn resolves(&self, name: &str) -> Vec<Ipv4Addr> {
        self.ask(GATEWAY, name, RecordType::A).1
    }
}

fn exchange(server: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(server)?;
    socket.send(bytes)?;
    let mut buffer = vec![0; 2048];
    let length = socket.recv(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

fn judge(result: io::Result<()>) -> Reached {
    match result.as_ref().map_err(io::Error::kind) {
        Ok(()) => Reached::Yes,
        Err(ErrorKind::TimedOut | ErrorKind::WouldBlock) => Reached::Silence,
        Err(ErrorKind::ConnectionRefused | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable) => Reached::Refused,
        Err(_) => panic!("{result:?}"),
    }
}

fn open_tap(name: &str) -> File {
    nix::ioctl_write_int!(tun_set_iff, b'T', 202);
    let tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
    // SAFETY: TUNSETIFF reads and writes the ifreq that it is given the address of, which outlives the call.
    unsafe { tun_set_iff(tun.as_raw_fd(), (&raw mut request) as libc::c_ulong) }.unwrap();
    tun
}

#[test]
fn internet_reaches_the_world_and_never_the_host() {
    alone("internet_reaches_the_world_and_never_the_host", async |world| {
        let guest = world.guest(&Egress::Internet).await;
        assert_eq!(guest.slot.network().nameservers, [RESOLVER]);
        assert_eq!(guest.tcp(SERVER, 80), Reached::Yes);
        assert_eq!(guest.udp(OTHER, 9000), Reached::Yes);
        assert_eq!(guest.ask(RESOLVER, "www.example.com.", RecordType::A).1, [SERVER]);
        assert_eq!(guest.tcp(HOST, 80), Reached::Refused, "an address of the host");
        assert_eq!(guest.tcp(LINK, 80), Reached::Refused, "the host's end of a slot's link");
        assert_eq!(guest.tcp(Ipv4Addr::new(169, 254, 169, 254), 80), Reached::Refused);
        assert_eq!(guest.tcp(GATEWAY, 53), Reached::Refused, "there is no resolver in the slot");
        world.slots.shutdown().await;
    });
}

#[test]
fn none_reaches_nothing_and_says_so_at_once() {
    alone("none_reaches_nothing_and_says_so_at_once", async |world| {
        let guest = world.guest(&Egress::None).await;
        assert!(guest.slot.network().nameservers.is_empty());
        let begun = Instant::now();
        for port in [53, 80] {
            assert_eq!(guest.tcp(SERVER, port), Reached::Refused);
        }
        for address in [SERVER, RESOLVER, GATEWAY] {
            assert_eq!(guest.udp(address, 53), Reached::Refused, "{address}");
        }
        assert!(begun.elapsed() < PATIENCE);
    });
}

#[test]
fn networks_and_ports_are_let_out_as_the_rules_say() {
    alone("networks_and_ports_are_let_out_as_the_rules_say", async |world| {
        let guest = world.guest_with("198.51.100.0/24:80,9000 203.0.113.0/24:9000/udp 203.0.113.10:440-450/tcp", "198.51.100.53").await;
        assert_eq!(guest.tcp(SERVER, 80), Reached::Yes);
        assert_eq!(guest.udp(SERVER, 9000), Reached::Yes);
        assert_eq!(guest.udp(OTHER, 9000), Reached::Yes);
        assert_eq!(guest.tcp(OTHER, 443), Reached::Yes);
        assert_eq!(guest.tcp(SERVER, 443), Reached::Refused, "a port that is not allowed");
        assert_eq!(guest.tcp(OTHER, 80), Reached::Refused, "a port that is not allowed");
        assert_eq!(guest.tcp(RESOLVER, 80), Reached::Refused, "an address that is denied");
        assert_eq!(guest.tcp(PRIVATE, 80), Reached::Refused, "an address that no rule covers");
    });
}

#[test]
fn everything_but_the_private_networks() {
    alone("everything_but_the_private_networks", async |world| {
        let guest = world.guest_with("*", "10.0.0.0/8 198.51.100.53 *:443 www.example.com").await;
        assert_eq!(guest.tcp(SERVER, 80), Reached::Yes);
        assert_eq!(guest.tcp(SERVER, 443), Reached::Refused);
        assert_eq!(guest.tcp(PRIVATE, 80), Reached::Refused);
        assert_eq!(guest.tcp(HOST, 80), Reached::Refused, "no rule opens the host");
        assert_eq!(guest.tcp(LINK, 80), Reached::Refused, "no rule opens a link");
        assert_eq!(guest.resolves("alias.example.com."), [OTHER]);
        assert_eq!(guest.ask(GATEWAY, "www.example.com.", RecordType::A).0, ResponseCode::NXDomain);
    });
}

#[test]
fn a_name_opens_its_addresses_once_it_is_resolved() {
    alone("a_name_opens_its_addresses_once_it_is_resolved", async |world| {
        let guest = world.guest_with("*.example.com:80", "denied.example.com").await;
        assert_eq!(guest.slot.network().nameservers, [GATEWAY]);
        assert_eq!(guest.tcp(SERVER, 80), Reached::Refused, "nobody has asked for its name yet");
        assert_eq!(guest.resolves("WWW.example.com."), [SERVER]);
        assert_eq!(guest.tcp(SERVER, 80), Reached::Yes);
        assert_eq!(guest.tcp(SERVER, 443), Reached::Refused, "the rule is for port 80");
        assert_eq!(guest.tcp(OTHER, 80), Reached::Refused);
        assert_eq!(guest.resolves("alias.example.com."), [OTHER], "through an alias beyond the rule");
        assert_eq!(guest.tcp(OTHER, 80), Reached::Yes);
        assert_eq!(guest.resolves("www.example.com."), [SERVER], "again, while it is open");
        assert_eq!(guest.tcp(SERVER, 80), Reached::Yes);
    });
}

#[test]
fn a_name_opens_nothing_private_and_nothing_of_the_host() {
    alone("a_name_opens_nothing_private_and_nothing_of_the_host", async |world| {
        let guest = world.guest_with("*.example.com", "").await;
        assert_eq!(guest.resolves("private.example.com."), [PRIVATE]);
        assert_eq!(guest.tcp(PRIVATE, 80), Reached::Refused);
        assert_eq!(guest.resolves("host.example.com.").len(), 2);
        assert_eq!(guest.tcp(LINK, 80), Reached::Refused);
        assert_eq!(guest.tcp(HOST, 80), Reached::Refused);
        guest.resolves("metadata.example.com.");
        assert_eq!(guest.tcp(Ipv4Addr::new(169, 254, 169, 254), 80), Reached::Refused);
        let both = world.guest_with("*.example.com 10.77.0.0/24:80", "").await;
        assert_eq!(both.resolves("private.example.com."), [PRIVATE]);
        assert_eq!(both.tcp(PRIVATE, 80), Reached::Yes, "a rule says its address");
    });
}

#[test]
fn the_resolver_refuses_other_names_and_there_is_no_other_resolver() {
    alone("the_resolver_refuses_other_names_and_there_is_no_other_resolver", async |world| {
        let guest = world.guest_with("www.example.com", "").await;
        let begun = Instant::now();
        for name in ["example.com.", "alias.example.com.", "example.org.", "."] {
            assert_eq!(guest.ask(GATEWAY, name, RecordType::A), (ResponseCode::NXDomain, Vec::new()), "{name}");
        }
        assert_eq!(guest.ask(GATEWAY, "www.example.com.", RecordType::AAAA), (ResponseCode::NoError, Vec::new()));
        assert_eq!(guest.udp(SERVER, 53), Reached::Refused, "another resolver");
        assert_eq!(guest.tcp(SERVER, 53), Reached::Refused, "another resolver");
        assert_eq!(guest.tcp(GATEWAY, 80), Reached::Refused, "only the resolver's port is open");
        assert!(begun.elapsed() < PATIENCE);
        let remembered = guest.ask(RESOLVER, "example.org.", RecordType::A);
        assert_eq!(remembered.0, ResponseCode::NXDomain, "what the guest remembers as its resolver is the slot's");
        assert_eq!(guest.ask(RESOLVER, "www.example.com.", RecordType::A).1, [SERVER]);
        assert_eq!(guest.tcp(SERVER, 443), Reached::Yes);
    });
}

#[test]
fn the_resolver_takes_what_is_no_question_and_many_questions_on_one_connection() {
    alone("the_resolver_takes_what_is_no_question_and_many_questions_on_one_connection", async |world| {
        let guest = world.guest_with("www.example.com", "").await;
        let answers = guest.namespace.run(|| {
            let garbage = exchange((GATEWAY, 53).into(), b"\x12\x34\x00garbage").unwrap();
            assert_eq!(Message::from_vec(&garbage).unwrap().metadata.response_code, ResponseCode::FormErr);
            let mut request = Message::query();
            request.add_query(Query::query(Name::from_ascii("www.example.com.").unwrap(), RecordType::A));
            let bytes = request.to_vec().unwrap();
            let framed = [&u16::try_from(bytes.len()).unwrap().to_be_bytes(), bytes.as_slice()].concat();
            let mut stream = TcpStream::connect((GATEWAY, 53)).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(&framed.repeat(3)).unwrap();
            let mut answers = Vec::new();
            for _ in 0..3 {
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut answer).unwrap();
                answers.push(Message::from_vec(&answer).unwrap().answers.len());
            }
            answers
        });
        assert_eq!(answers, [1, 1, 1]);
        assert_eq!(guest.tcp(SERVER, 80), Reached::Yes);
    });
}
