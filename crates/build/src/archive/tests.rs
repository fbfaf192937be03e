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

impl RawZip {
    fn with(mut self, name: &str, mode: u32, content: &[u8]) -> Self {
        self.add(name.as_bytes(), mode, content, content.len() as u32);
        self
    }

    fn add(&mut self, name: &[u8], mode: u32, content: &[u8], declared: u32) {
        let offset = self.local.len() as u32;
        let mut fields = Vec::new();
        fields.extend(20u16.to_le_bytes()); // version needed
        fields.extend((1u16 << 11).to_le_bytes()); // names are UTF-8
        fields.extend([0; 2]); // stored
        fields.extend([0, 0, 0x21, 0]); // 1980-01-01
        fields.extend(crc32(content).to_le_bytes());
        fields.extend((content.len() as u32).to_le_bytes());
        fields.extend(declared.to_le_bytes());
        fields.extend((name.len() as u16).to_le_bytes());
        fields.extend([0; 2]); // extra field
        self.local.extend(b"PK\x03\x04");
        self.local.extend(&fields);
        self.local.extend(name);
        self.local.extend(content);
        self.central.extend(b"PK\x01\x02");
        self.central.extend([20, 3]); // made by version 2.0 on Unix
        self.central.extend(&fields);
        self.central.extend([0; 6]); // comment, disk, internal attributes
        self.central.extend((mode << 16).to_le_bytes());
        self.central.extend(offset.to_le_bytes());
        self.central.extend(name);
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
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("archive.zip"), bytes).unwrap();
    let stop = Stop::after(Duration::from_secs(60));
    let result = unpack(&dir.path().join("archive.zip"), &dir.path().join("context"), LIMITS, &stop);
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
fn names_that_escape_are_refused() {
    let long = "a/".repeat(MAX_PATH);
    let wide = "a".repeat(MAX_COMPONENT + 1);
    let names =
        ["../evil", "a/../../evil", "a/..", "/etc/passwd", "//evil", "C:/evil", "c:evil", "a\\b", "..\\evil", "nul\0", &long, &wide];
    for name in names {
        refusal(&dockerfile().with(name, REGULAR | 0o644, b"evil"));
    }
}

#[test]
fn links_that_escape_are_refused() {
    for target in ["/etc/passwd", "..", "../evil", "a/../../evil", "./..//", "", "nul\0"] {
        refusal(&dockerfile().with("a/", DIRECTORY | 0o755, b"").with("link", LINK | 0o777, target.as_bytes()));
    }
    // Each target's text stays inside; together they do not.
    let relay = dockerfile().with("sub/up", LINK | 0o777, b"..").with("out", LINK | 0o777, b"sub/up/..");
    assert!(refusal(&relay).contains("\"out\" leads out"));
}

#[test]
fn nothing_is_written_through_a_link() {
    let before = dockerfile().with("dir", LINK | 0o777, b"..").with("dir/evil", REGULAR | 0o644, b"evil");
    let after = dockerfile().with("dir/evil", REGULAR | 0o644, b"evil").with("dir", LINK | 0o777, b"..");
    let replaced = dockerfile().with("x", LINK | 0o777, b"../evil").with("./x", REGULAR | 0o644, b"evil");
    for zip in [before, after, replaced] {
        let unpacked = unpack_bytes(&zip.bytes());
        assert!(matches!(unpacked.result, Err(ArchiveError::Invalid(_))), "{:?}", unpacked.result);
        assert!(!unpacked.dir.path().join("evil").exists());
    }
}

#[test]
fn duplicates_and_special_files_are_refused() {
    assert!(refusal(&dockerfile().with("./Dockerfile", REGULAR | 0o644, b"FROM b\n")).contains("twice"));
    assert!(refusal(&dockerfile().with("a", REGULAR | 0o644, b"").with("a/b", REGULAR | 0o644, b"")).contains("below"));
    for kind in [0o010_000, 0o020_000, 0o060_000, 0o140_000] {
        assert!(refusal(&dockerfile().with("special", kind | 0o644, b"")).contains("neither"));
    }
}

#[test]
fn sizes_are_counted_not_believed() {
    let mut modest = dockerfile();
    let content = vec![0; LIMITS.unpacked_bytes as usize];
    modest.add(b"bomb", REGULAR | 0o644, &content, 1);
    assert!(refusal(&modest).contains("unpacks to more than"));

    let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    zip.start_file("Dockerfile", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(&content).unwrap();
    zip.write_all(b"\n").unwrap();
    let bytes = zip.finish().unwrap().into_inner();
    assert!(bytes.len() < content.len() / 100);
    assert!(matches!(unpack_bytes(&bytes).result, Err(ArchiveError::Invalid(_))));
}

#[test]
fn too_many_entries_are_refused_even_if_only_implied() {
    let deep = dockerfile().with(&"a/".repeat(LIMITS.entries as usize), DIRECTORY | 0o755, b"");
    assert!(refusal(&deep).contains("more than 100 files"));
}

#[test]
fn entries_that_share_bytes_are_refused() {
    let mut zip = dockerfile();
    zip.add(b"a", REGULAR | 0o644, &[0; 4096], 4096);
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
    (nasty_path(), kind, prop_oneof![nasty_path(), Just("/etc".to_owned()), Just("../archive.zip".to_owned())])
}

proptest! {
    #[test]
    fn nothing_ever_lands_outside(entries in prop::collection::vec(nasty_entry(), 0..12)) {
        let mut zip = dockerfile();
        for (name, mode, content) in &entries {
            zip.add(name.as_bytes(), *mode, content.as_bytes(), content.len() as u32);
        }
        let unpacked = unpack_bytes(&zip.bytes());
        let root = unpacked.dir.path();
        let context = unpacked.context();
        let outside: Vec<_> = tree(root).into_iter().filter(|path| path != root && !path.starts_with(&context)).collect();
        prop_assert_eq!(outside, [root.join("archive.zip")]);
        if unpacked.result.is_ok() {
            let context = context.canonicalize().unwrap();
            for path in tree(&context) {
                if let Ok(real) = path.canonicalize() {
                    prop_assert!(real.starts_with(&context), "{} is {}", path.display(), real.display());
                }
            }
        }
    }

    #[test]
    fn harmless_archives_are_accepted(
        names in prop::collection::btree_set("[a-z]{1,3}\\.txt", 0..8), dirs in prop::collection::vec("[a-z]{1,3}/([A-Z]/)?", 0..4),
    ) {
        let mut zip = dockerfile();
        for dir in &dirs {
            zip.add(dir.as_bytes(), DIRECTORY | 0o755, b"", 0);
        }
        for name in &names {
            zip.add(name.as_bytes(), REGULAR | 0o644, name.as_bytes(), name.len() as u32);
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
