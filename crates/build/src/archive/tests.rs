//! Archives that try to get out, grow too large or lie.

use std::{collections::BTreeSet, time::Duration};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const LINK: u32 = 0o120_000;

/// A zip written byte by byte, because no zip library writes what these tests need.
#[derive(Default)]
struct RawZip {
    local: Vec<u8>,
    central: Vec<u8>,
    count: u16,
}

/// What an entry's headers say of it.
#[derive(Clone, Copy)]
struct Header<'a> {
    name: &'a [u8],
    /// System that it was made on.
    system: u8,
    flags: u16,
    /// Way of compression.
    method: u16,
    attributes: u32,
    /// Bytes after unpacking; those of the content unless given.
    declared: Option<u32>,
}

impl<'a> Header<'a> {
    const UTF8: u16 = 1 << 11;
    const ENCRYPTED: u16 = 1;

    fn unix(name: &'a str, mode: u32) -> Self {
        Self { name: name.as_bytes(), system: 3, flags: Self::UTF8, method: 0, attributes: mode << 16, declared: None }
    }

    /// As Windows' tools write it.
    fn dos(name: &'a [u8], directory: bool) -> Self {
        Self { name, system: 0, flags: 0, method: 0, attributes: if directory { 0x10 } else { 0x20 }, declared: None }
    }
}

impl RawZip {
    fn with(self, name: &str, mode: u32, content: &[u8]) -> Self {
        self.with_header(Header::unix(name, mode), content)
    }

    fn with_header(mut self, header: Header<'_>, content: &[u8]) -> Self {
        self.add(header, content);
        self
    }

    fn add(&mut self, header: Header<'_>, content: &[u8]) {
        let offset = self.local.len() as u32;
        let mut fields = Vec::new();
        fields.extend(20u16.to_le_bytes()); // version needed
        fields.extend(header.flags.to_le_bytes());
        fields.extend(header.method.to_le_bytes());
        fields.extend([0, 0, 0x21, 0]); // 1980-01-01
        fields.extend(crc32(content).to_le_bytes());
        fields.extend((content.len() as u32).to_le_bytes());
        fields.extend(header.declared.unwrap_or(content.len() as u32).to_le_bytes());
        fields.extend((header.name.len() as u16).to_le_bytes());
        fields.extend([0; 2]); // extra field
        self.local.extend(b"PK\x03\x04");
        self.local.extend(&fields);
        self.local.extend(header.name);
        self.local.extend(content);
        self.central.extend(b"PK\x01\x02");
        self.central.extend([20, header.system]); // made by version 2.0
        self.central.extend(&fields);
        self.central.extend([0; 6]); // comment, disk, internal attributes
        self.central.extend(header.attributes.to_le_bytes());
        self.central.extend(offset.to_le_bytes());
        self.central.extend(header.name);
        self.count += 1;
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.local.clone();
        let start = bytes.len() as u32;
        bytes.extend(&self.central);
        bytes.extend(b"PK\x05\x06\0\0\0\0");
        bytes.extend(self.count.to_le_bytes());
        bytes.extend(self.count.to_le_bytes());
        bytes.extend((self.central.len() as u32).to_le_bytes());
        bytes.extend(start.to_le_bytes());
        bytes.extend([0; 2]);
        bytes
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes
        .iter()
        .fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 }))
}

fn dockerfile() -> RawZip {
    RawZip::default().with("Dockerfile", REGULAR | 0o644, b"FROM scratch\n")
}

const LIMITS: ArchiveLimits = ArchiveLimits { unpacked_bytes: 1 << 20, entries: 100 };

struct Unpacked {
    dir: TempDir,
    result: Result<(), ArchiveError>,
}

impl Unpacked {
    fn context(&self) -> PathBuf {
        self.dir.path().join("context")
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.context().join(path)).unwrap()
    }

    fn mode(&self, path: &str) -> u32 {
        fs::metadata(self.context().join(path)).unwrap().permissions().mode() & 0o7777
    }
}

fn unpack_bytes(bytes: &[u8]) -> Unpacked {
    unpack_within(bytes, LIMITS)
}

fn unpack_within(bytes: &[u8], limits: ArchiveLimits) -> Unpacked {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("archive.zip"), bytes).unwrap();
    let stop = Stop::after(Duration::from_secs(60));
    let result = unpack(&dir.path().join("archive.zip"), &dir.path().join("context"), limits, &stop);
    Unpacked { dir, result }
}

fn refusal(zip: &RawZip) -> String {
    match unpack_bytes(&zip.bytes()).result {
        Err(ArchiveError::Invalid(reason)) => reason,
        other => panic!("not refused as invalid: {other:?}"),
    }
}

#[test]
fn a_context_arrives_as_it_was() {
    let zip = dockerfile()
        .with("app/", DIRECTORY | 0o750, b"")
        .with("app/run.sh", REGULAR | 0o4755, b"#!/bin/sh\n")
        .with("./app/data/deep.txt", REGULAR | 0o600, b"deep")
        .with("no-mode", 0, b"")
        .with("link", LINK | 0o777, b"app/run.sh")
        .with("app/up", LINK | 0o777, b"../Dockerfile")
        .with("dangling", LINK | 0o777, b"nowhere");
    let unpacked = unpack_bytes(&zip.bytes());
    unpacked.result.as_ref().unwrap();
    assert_eq!(unpacked.read("app/data/deep.txt"), "deep");
    assert_eq!(unpacked.read("link"), "#!/bin/sh\n");
    assert_eq!(unpacked.read("app/up"), "FROM scratch\n");
    let modes = ["Dockerfile", "app", "app/run.sh", "app/data", "app/data/deep.txt", "no-mode"].map(|path| unpacked.mode(path));
    assert_eq!(modes, [0o644, 0o750, 0o755, 0o755, 0o600, 0o644]);
    assert_eq!(fs::read_link(unpacked.context().join("dangling")).unwrap(), Path::new("nowhere"));
}

#[test]
fn ordinary_tools_archives_work() {
    let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    zip.start_file("Dockerfile", options.compression_method(zip::CompressionMethod::Deflated)).unwrap();
    zip.write_all(b"FROM scratch\n").unwrap();
    zip.start_file("big", options.large_file(true).unix_permissions(0o755)).unwrap();
    zip.write_all(&[7; 100_000]).unwrap();
    let unpacked = unpack_bytes(&zip.finish().unwrap().into_inner());
    unpacked.result.as_ref().unwrap();
    assert_eq!(fs::metadata(unpacked.context().join("big")).unwrap().len(), 100_000);
    assert_eq!(unpacked.mode("big"), 0o755);
}

#[test]
fn the_dockerfile_must_be_at_the_root() {
    let elsewhere = RawZip::default().with("app/Dockerfile", REGULAR | 0o644, b"FROM scratch\n");
    let directory = RawZip::default().with("Dockerfile/", DIRECTORY | 0o755, b"");
    let other_case = RawZip::default().with("dockerfile", REGULAR | 0o644, b"FROM scratch\n");
    for zip in [RawZip::default(), elsewhere, directory, other_case] {
        assert!(matches!(unpack_bytes(&zip.bytes()).result, Err(ArchiveError::DockerfileNotFound)));
    }
    let linked = RawZip::default().with("docker/File", REGULAR | 0o644, b"FROM a\n").with("Dockerfile", LINK | 0o777, b"docker/File");
    assert_eq!(unpack_bytes(&linked.bytes()).read("Dockerfile"), "FROM a\n");
}

#[test]
fn unpack_dockerfile_of_too_many_bytes_is_refused() {
    let unpack = |bytes: u64| {
        let lines = vec![b'\n'; usize::try_from(bytes).unwrap()];
        let zip = RawZip::default().with("Dockerfile", REGULAR | 0o644, &lines);
        unpack_within(&zip.bytes(), ArchiveLimits { unpacked_bytes: 4 * MAX_DOCKERFILE, ..LIMITS }).result
    };
    unpack(MAX_DOCKERFILE).unwrap();
    let refused = unpack(MAX_DOCKERFILE + 1).unwrap_err().to_string();
    assert_eq!(refused, "the Dockerfile is 1048577 bytes; this server allows 1048576 bytes");
}

#[test]
fn unpack_name_that_escapes_is_refused() {
    let long = "a/".repeat(MAX_PATH);
    let wide = "a".repeat(MAX_COMPONENT + 1);
    for name in ["../evil", "a/../../evil", "a/..", "/etc/passwd", "//evil", "nul\0", &long, &wide] {
        refusal(&dockerfile().with(name, REGULAR | 0o644, b"evil"));
    }
    for name in ["..\\evil", "\\evil", "\\\\host\\share\\evil", "a\\..\\..\\evil", "C:\\evil", "c:evil", "C:/evil"] {
        refusal(&dockerfile().with_header(Header::dos(name.as_bytes(), false), b"evil"));
    }
}

#[test]
fn unpack_backslash_separates_as_for_unzip() {
    let zip = dockerfile()
        .with_header(Header::dos(b"app\\src\\main.py", false), b"main")
        .with_header(Header::dos(b"app\\empty\\", true), b"")
        .with_header(Header::dos(b"mixed/a\\b", false), b"mixed")
        .with("dev-disk\\x2dlabel.swap", REGULAR | 0o644, b"unit");
    let unpacked = unpack_bytes(&zip.bytes());
    unpacked.result.as_ref().unwrap();
    assert_eq!(unpacked.read("app/src/main.py"), "main");
    assert!(unpacked.context().join("app/empty").is_dir());
    assert_eq!(unpacked.read("mixed/a\\b"), "mixed");
    assert_eq!(unpacked.read("dev-disk\\x2dlabel.swap"), "unit");
    let modes = ["app", "app/src", "app/empty", "app/src/main.py"].map(|path| unpacked.mode(path));
    assert_eq!(modes, [0o755, 0o755, 0o755, 0o644]);
}

#[test]
fn unpack_name_is_read_in_its_encoding() {
    let flagged = |name: &'static [u8]| Header { name, flags: Header::UTF8, ..Header::dos(b"", false) };
    let zip = dockerfile()
        .with_header(flagged("größe".as_bytes()), b"1")
        .with_header(Header::dos("naïve".as_bytes(), false), b"2")
        .with_header(Header::dos(b"caf\x82", false), b"3")
        .with_header(Header { name: b"stra\xe1e", flags: 0, ..Header::unix("", REGULAR | 0o600) }, b"4");
    let unpacked = unpack_bytes(&zip.bytes());
    unpacked.result.as_ref().unwrap();
    assert_eq!(["größe", "naïve", "café", "straße"].map(|name| unpacked.read(name)), ["1", "2", "3", "4"]);
    assert!(refusal(&dockerfile().with_header(flagged(b"caf\x82"), b"")).contains("not UTF-8"));
}

#[test]
fn unpack_link_that_leads_out_is_kept_and_not_followed() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let absolute = outside.path().join("secret").into_os_string().into_string().unwrap();
    let zip = dockerfile()
        .with(".venv/bin/python", LINK | 0o777, b"/usr/bin/python3")
        .with("shared", LINK | 0o777, b"../shared")
        .with("d/up", LINK | 0o777, b"../../..")
        .with("secret", LINK | 0o777, absolute.as_bytes())
        // Each target's text stays inside; together they do not.
        .with("sub/up", LINK | 0o777, b"..")
        .with("relay", LINK | 0o777, b"sub/up/..")
        .with("not-text", LINK | 0o777, b"\xff\xfe")
        .with("longest", LINK | 0o777, &[b'x'; MAX_TARGET]);
    let unpacked = unpack_bytes(&zip.bytes());
    unpacked.result.as_ref().unwrap();
    let target = |path: &str| fs::read_link(unpacked.context().join(path)).unwrap().into_os_string().into_vec();
    assert_eq!(target(".venv/bin/python"), b"/usr/bin/python3");
    assert_eq!(target("shared"), b"../shared");
    assert_eq!(target("d/up"), b"../../..");
    assert_eq!(target("secret"), absolute.as_bytes());
    assert_eq!(target("relay"), b"sub/up/..");
    assert_eq!(target("not-text"), b"\xff\xfe");
    assert_eq!(target("longest").len(), MAX_TARGET);
}

#[test]
fn unpack_link_without_a_usable_target_is_refused() {
    for (target, why) in [(&b""[..], "no target"), (b"nul\0", "zero byte"), (&[b'x'; MAX_TARGET + 1], "more than 4095 bytes")] {
        let reason = refusal(&dockerfile().with("link", LINK | 0o777, target));
        assert!(reason.contains("\"link\"") && reason.contains(why), "{reason}");
    }
}

#[test]
fn unpack_nothing_is_written_through_a_link() {
    let outside = tempfile::tempdir().unwrap();
    let elsewhere = outside.path().as_os_str().as_encoded_bytes();
    let absolute = dockerfile().with("dir", LINK | 0o777, elsewhere).with("dir/evil", REGULAR | 0o644, b"evil");
    let before = dockerfile().with("dir", LINK | 0o777, b"..").with("dir/evil", REGULAR | 0o644, b"evil");
    let after = dockerfile().with("dir/evil", REGULAR | 0o644, b"evil").with("dir", LINK | 0o777, b"..");
    let replaced = dockerfile().with("x", LINK | 0o777, b"../evil").with("./x", REGULAR | 0o644, b"evil");
    let directory = dockerfile().with("dir/", DIRECTORY | 0o755, b"").with("./dir", LINK | 0o777, b"..");
    for zip in [absolute, before, after, replaced, directory] {
        let unpacked = unpack_bytes(&zip.bytes());
        assert!(matches!(unpacked.result, Err(ArchiveError::Invalid(_))), "{:?}", unpacked.result);
        assert!(!unpacked.dir.path().join("evil").exists());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}

#[test]
fn unpack_links_of_the_build_s_own_files_must_stay_inside() {
    let file = || RawZip::default().with("docker/File", REGULAR | 0o644, b"FROM a\n");
    for target in ["/etc/passwd", "../File", "docker/../../File", "docker/out"] {
        let zip = file().with("docker/out", LINK | 0o777, b"../../File");
        let reason = refusal(&zip.with("Dockerfile", LINK | 0o777, target.as_bytes()));
        assert!(reason.contains("\"Dockerfile\" leads out of the archive"), "{reason}");
    }
    for name in IGNORE_FILES {
        let reason = refusal(&dockerfile().with(name, LINK | 0o777, b"/etc/hosts"));
        assert!(reason.contains(name) && reason.contains("leads out of the archive"), "{reason}");
    }
    for target in ["nowhere", "Dockerfile", "docker", "docker/File/x"] {
        let zip = file().with("Dockerfile", LINK | 0o777, target.as_bytes());
        assert!(matches!(unpack_bytes(&zip.bytes()).result, Err(ArchiveError::DockerfileNotFound)), "{target}");
    }
    // They are unpacked with all that is on the way, although they are ignored.
    let zip = file()
        .with("Dockerfile", LINK | 0o777, b"here/../again")
        .with("here", DIRECTORY | 0o755, b"")
        .with("again", LINK | 0o777, b"./docker/File")
        .with(".dockerignore", LINK | 0o777, b"docker/ignore")
        .with("docker/ignore", REGULAR | 0o644, b"*\n")
        .with("docker/other", REGULAR | 0o644, b"");
    let unpacked = unpack_bytes(&zip.bytes());
    unpacked.result.as_ref().unwrap();
    assert_eq!((unpacked.read("Dockerfile").as_str(), unpacked.read(".dockerignore").as_str()), ("FROM a\n", "*\n"));
    assert!(!unpacked.context().join("docker/other").exists());
}

#[test]
fn unpack_entry_that_is_there_twice_is_the_last_one() {
    let zip = dockerfile()
        .with("app", REGULAR | 0o600, b"first")
        .with("./app", REGULAR | 0o755, b"second")
        .with("README", REGULAR | 0o644, b"upper")
        .with("readme", REGULAR | 0o644, b"lower")
        .with("dir/", DIRECTORY | 0o750, b"")
        .with("dir//", DIRECTORY | 0o711, b"");
    let unpacked = unpack_bytes(&zip.bytes());
    unpacked.result.as_ref().unwrap();
    assert_eq!((unpacked.read("app").as_str(), unpacked.mode("app"), unpacked.mode("dir")), ("second", 0o755, 0o711));
    assert_eq!((unpacked.read("README").as_str(), unpacked.read("readme").as_str()), ("upper", "lower"));

    let file_and_link = dockerfile().with("a", REGULAR | 0o644, b"").with("./a", LINK | 0o777, b"b");
    assert!(refusal(&file_and_link).contains("\"a\" is there twice, as a file and as a link"));
    assert!(refusal(&dockerfile().with("a", REGULAR | 0o644, b"").with("a/b", REGULAR | 0o644, b"")).contains("below"));
}

#[test]
fn unpack_entry_that_cannot_be_unpacked_is_named_with_its_reason() {
    for (kind, word) in [(0o010_000, "named pipe"), (0o020_000, "device"), (0o060_000, "device"), (0o140_000, "socket")] {
        let reason = refusal(&dockerfile().with("a/special", kind | 0o644, b""));
        assert!(reason.contains("\"a/special\" is a ") && reason.contains(word), "{reason}");
    }
    let encrypted = Header { flags: Header::ENCRYPTED, ..Header::unix("secret", REGULAR | 0o644) };
    assert_eq!(refusal(&dockerfile().with_header(encrypted, b"x")), "\"secret\" is encrypted");
    for (method, word) in [(9, "deflate64"), (12, "bzip2"), (14, "LZMA"), (93, "zstd"), (77, "method 77")] {
        let reason = refusal(&dockerfile().with_header(Header { method, ..Header::unix("big", REGULAR | 0o644) }, b"x"));
        assert!(reason.starts_with(&format!("\"big\" is compressed with {word},")), "{reason}");
    }
}

#[test]
fn unpack_ignored_entries_are_neither_made_nor_judged() {
    let wide = format!("tmp/{}", "a".repeat(MAX_COMPONENT + 1));
    let mut zip = dockerfile()
        .with(".dockerignore", REGULAR | 0o644, b"tmp\n.venv\n**/*.log\n*ignore\nDockerfile\nkept\n!kept/yes\n")
        .with(".venv/bin/python", LINK | 0o777, b"/usr/bin/python3")
        .with("tmp/pipe", 0o010_644, b"")
        .with(&wide, REGULAR | 0o644, b"")
        .with("tmp/as-file", REGULAR | 0o644, b"")
        .with("tmp/as-file/and-directory", REGULAR | 0o644, b"")
        .with_header(Header { flags: Header::ENCRYPTED, ..Header::unix("tmp/secret", REGULAR | 0o644) }, b"x")
        .with_header(Header { method: 14, ..Header::unix("a/b/big.log", REGULAR | 0o644) }, b"x")
        .with("tmp/link", LINK | 0o777, b"")
        .with("kept/", DIRECTORY | 0o711, b"")
        .with("kept/yes", REGULAR | 0o644, b"yes")
        .with("kept/no", REGULAR | 0o644, b"no")
        .with("empty/", DIRECTORY | 0o755, b"")
        .with("app.py", REGULAR | 0o644, b"app");
    for index in 0..2 * LIMITS.entries {
        zip = zip.with(&format!("tmp/{index}"), REGULAR | 0o644, &[0; 16 << 10]);
    }
    let unpacked = unpack_bytes(&zip.bytes());
    unpacked.result.as_ref().unwrap();
    let context = unpacked.context();
    let made: Vec<String> = tree(&context).iter().map(|path| path.strip_prefix(&context).unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(made, ["", ".dockerignore", "Dockerfile", "app.py", "empty", "kept", "kept/yes"]);
    assert_eq!(unpacked.mode("kept"), 0o711);

    // Names that lead out are no part of the context, so no pattern can name them.
    let escapes = RawZip::default().with("../evil", REGULAR | 0o644, b"").with(".dockerignore", REGULAR | 0o644, b"*\n**\n");
    refusal(&escapes.with("Dockerfile", REGULAR | 0o644, b"FROM a\n"));
    let deep = dockerfile().with(".dockerignore", REGULAR | 0o644, b"a\n");
    assert!(refusal(&deep.with(&"a/".repeat(MAX_PATH), DIRECTORY | 0o755, b"")).contains("too long"));
}

#[test]
fn unpack_dockerfile_dockerignore_wins() {
    let zip = dockerfile()
        .with(".dockerignore", REGULAR | 0o644, b"a\n")
        .with("Dockerfile.dockerignore", REGULAR | 0o644, b"b\nDockerfile*\n")
        .with("a", REGULAR | 0o644, b"")
        .with("b", REGULAR | 0o644, b"");
    let unpacked = unpack_bytes(&zip.bytes());
    unpacked.result.as_ref().unwrap();
    let there = ["a", "b", "Dockerfile", ".dockerignore", "Dockerfile.dockerignore"].map(|path| unpacked.context().join(path).exists());
    assert_eq!(there, [true, false, true, true, true]);
}

#[test]
fn unpack_malformed_dockerignore_is_refused_with_its_line() {
    let reason = refusal(&dockerfile().with(".dockerignore", REGULAR | 0o644, b"ok\n[a-\n"));
    assert_eq!(reason, ".dockerignore: line 2: the pattern \"[a-\" is malformed");
    let large = dockerfile().with(".dockerignore", REGULAR | 0o644, &vec![b'\n'; ignore::MAX_BYTES + 1]);
    assert_eq!(refusal(&large), ".dockerignore: it is larger than 256 KiB");
}

#[test]
fn unpack_zip64_with_many_ignored_entries_is_accepted() {
    let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    for (name, content) in [("Dockerfile", "FROM scratch\n"), (".dockerignore", "node_modules\n")] {
        zip.start_file(name, options).unwrap();
        zip.write_all(content.as_bytes()).unwrap();
    }
    for index in 0..70_000 {
        zip.start_file(format!("node_modules/{index}"), options.compression_method(zip::CompressionMethod::Stored)).unwrap();
    }
    let unpacked = unpack_bytes(&zip.finish().unwrap().into_inner());
    unpacked.result.as_ref().unwrap();
    assert!(!unpacked.context().join("node_modules").exists());
}

#[test]
fn unpack_more_bytes_than_allowed_are_refused_with_limit_count_and_setting() {
    let content = vec![0; LIMITS.unpacked_bytes as usize];
    // What is declared is judged before anything is written, what is there as it is unpacked.
    let honest = refusal(&dockerfile().with("big", REGULAR | 0o644, &content));
    assert!(
        honest.starts_with("its files are 1048589 bytes in all; this server allows 1048576 bytes (its setting build_context_mib)"),
        "{honest}"
    );
    let modest = Header { declared: Some(1), ..Header::unix("bomb", REGULAR | 0o644) };
    let modest = refusal(&dockerfile().with_header(modest, &content));
    assert!(
        modest.contains("more bytes than their headers declare; this server allows 1048576 bytes (its setting build_context_mib)"),
        "{modest}"
    );

    let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    zip.start_file("Dockerfile", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(&content).unwrap();
    zip.write_all(b"\n").unwrap();
    let bytes = zip.finish().unwrap().into_inner();
    assert!(bytes.len() < content.len() / 100);
    assert!(matches!(unpack_bytes(&bytes).result, Err(ArchiveError::Invalid(_))));
}

#[test]
fn unpack_more_entries_than_allowed_are_refused_with_limit_count_and_setting() {
    let mut many = dockerfile().with(".dockerignore", REGULAR | 0o644, b"*.tmp\n");
    for index in 0..150 {
        many = many.with(&format!("{index}"), REGULAR | 0o644, b"").with(&format!("{index}.tmp"), REGULAR | 0o644, b"");
    }
    let reason = refusal(&many);
    let expected = "it holds 152 files and directories; this server allows 100 (its setting build_context_entries), and does not count what .dockerignore names";
    assert_eq!(reason, expected);
    let implied = dockerfile().with(&"a/".repeat(LIMITS.entries as usize), DIRECTORY | 0o755, b"");
    assert!(refusal(&implied).contains("it holds 101 files and directories"));
}

#[test]
fn entries_that_share_bytes_are_refused() {
    let mut zip = dockerfile();
    zip.add(Header::unix("a", REGULAR | 0o644), &[0; 4096]);
    let entry = zip.central[zip.central.len() - 47..].to_vec();
    for name in b"bcdefgh" {
        zip.central.extend(&entry[..46]);
        zip.central.push(*name);
        zip.count += 1;
    }
    assert!(refusal(&zip).contains("overlap"));
}

#[test]
fn damaged_archives_are_refused() {
    let good = dockerfile().with("file", REGULAR | 0o644, b"content").bytes();
    let mut wrong_checksum = good.clone();
    let content = good.windows(7).position(|window| window == b"content").unwrap();
    wrong_checksum[content] ^= 1;
    for bytes in [&b""[..], b"not a zip", &good[..good.len() / 2], &good[30..], &wrong_checksum] {
        assert!(matches!(unpack_bytes(bytes).result, Err(ArchiveError::Invalid(_))));
    }
}

#[test]
fn a_cancelled_build_stops_unpacking() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("archive.zip"), dockerfile().bytes()).unwrap();
    let stop = Stop::after(Duration::from_secs(60));
    stop.cancel.cancel();
    let result = unpack(&dir.path().join("archive.zip"), &dir.path().join("context"), LIMITS, &stop);
    assert!(matches!(result, Err(ArchiveError::Stopped(Stopped::Cancelled))), "{result:?}");
}

/// Everything below a directory, without following links.
fn tree(root: &Path) -> BTreeSet<PathBuf> {
    walkdir::WalkDir::new(root).into_iter().map(|entry| entry.unwrap().into_path()).collect()
}

fn nasty_path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "link", "..", ".", "", "C:", "Dockerfile"]), 1..5)
        .prop_map(|components| components.join("/"))
}

fn nasty_entry() -> impl Strategy<Value = (String, u32, String)> {
    let kind = prop::sample::select(vec![0, REGULAR | 0o600, DIRECTORY, DIRECTORY | 0o755, LINK | 0o777, 0o010_644]);
    let content = prop_oneof![
        nasty_path(),
        Just("/etc".to_owned()),
        Just("../archive.zip".to_owned()),
        Just("../target".to_owned()),
        Just("*\n!a\n".to_owned()),
    ];
    (prop_oneof![4 => nasty_path(), 1 => Just(".dockerignore".to_owned())], kind, content)
}

proptest! {
    #[test]
    fn nothing_ever_lands_outside(entries in prop::collection::vec(nasty_entry(), 0..12)) {
        let mut zip = dockerfile();
        for (name, mode, content) in &entries {
            zip.add(Header::unix(name, *mode), content.as_bytes());
        }
        let unpacked = unpack_bytes(&zip.bytes());
        let root = unpacked.dir.path();
        let context = unpacked.context();
        let outside: Vec<_> = tree(root).into_iter().filter(|path| path != root && !path.starts_with(&context)).collect();
        prop_assert_eq!(outside, [root.join("archive.zip")]);
        prop_assert_eq!(fs::read(root.join("archive.zip")).unwrap(), zip.bytes());
        if unpacked.result.is_ok() {
            // What the build reads is of the archive.
            let dockerfile = context.join("Dockerfile").canonicalize().unwrap();
            prop_assert!(dockerfile.starts_with(context.canonicalize().unwrap()), "{}", dockerfile.display());
        }
    }

    #[test]
    fn harmless_archives_are_accepted(
        names in prop::collection::btree_set("[a-z]{1,3}\\.txt", 0..8), dirs in prop::collection::vec("[a-z]{1,3}/([A-Z]/)?", 0..4),
    ) {
        let mut zip = dockerfile();
        for dir in &dirs {
            zip.add(Header::unix(dir, DIRECTORY | 0o755), b"");
        }
        for name in &names {
            zip.add(Header::unix(name, REGULAR | 0o644), name.as_bytes());
        }
        let unpacked = unpack_bytes(&zip.bytes());
        prop_assert!(unpacked.result.is_ok(), "{:?}", unpacked.result);
        for name in &names {
            prop_assert_eq!(&unpacked.read(name), name);
        }
    }

    #[test]
    fn damage_is_an_error_not_a_panic(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut bytes = dockerfile().with("a/b", REGULAR | 0o644, b"content").with("l", LINK | 0o777, b"a/b").bytes();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let unpacked = unpack_bytes(&bytes);
        let root = unpacked.dir.path();
        for path in tree(root) {
            prop_assert!(path == root || path == root.join("archive.zip") || path.starts_with(unpacked.context()));
        }
    }
}
