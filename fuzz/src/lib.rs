//! Fuzz targets: one function for each parser that reads what a guest or a client controls. A target takes any bytes and panics when the
//! parser breaks a promise. `fuzz_targets/` hands them to libFuzzer; the tests here drive them on stable Rust, in every run.

#![forbid(unsafe_code)]

use std::{
    convert::Infallible,
    fmt::Debug,
    fs,
    path::Path,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use futures::FutureExt;
use hearth_build::ignore::{Ignore, Judge};
use hearth_control::{
    arn::{ConnectorArn, ImageArn},
    token::{Claims, Keyring},
    types::PortSpec,
};
use hearth_guest_protocol::{
    BOOT_MARKER, CopyInput, CopyOutput, DialReply, ExecInput, ExecOutput, GuestMessage, HostMessage, LogRecord, MetadataReply,
    MetadataRequest, StreamHeader, await_marker, read_message, write_message,
};
use hearth_machine::network::EgressPolicy;
use http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use serde::{Serialize, de::DeserializeOwned};

/// Nobody but the keyring makes tokens that it opens, and no change to one goes unnoticed. The first two bytes say where good input is
/// overwritten by the rest.
pub fn token(data: &[u8]) {
    static KEYRING: OnceLock<(Keyring, String)> = OnceLock::new();
    let (keyring, good) = KEYRING.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let keyring = Keyring::load_or_create(dir.path()).expect("a keyring can be made");
        let claims = Claims::http("microvm-0", vec![PortSpec::All], SystemTime::now(), Duration::from_secs(60));
        let good = keyring.mint(claims);
        (keyring, good)
    });
    if let Ok(text) = std::str::from_utf8(data) {
        assert_eq!(keyring.open(text), None, "made by nobody");
    }
    if let Some(changed) = overwritten(good.as_bytes(), data).and_then(|changed| String::from_utf8(changed).ok()) {
        assert_eq!(keyring.open(&changed).is_some(), changed == *good, "{changed}");
    }
}

/// What a request says of its port, its token and its host. A line is a header; the first is the name that the TLS client asked for, if it is
/// one of DNS: rustls tells of no others.
pub fn request(data: &[u8]) {
    let mut lines = data.split(|&byte| byte == b'\n');
    let server_name = lines.next().and_then(|line| std::str::from_utf8(line).ok());
    let of_dns = |name: &&str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    let server_name = server_name.filter(of_dns);
    let mut headers = HeaderMap::new();
    for line in lines {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
        let (name, value) = (HeaderName::from_bytes(&line[..colon]), HeaderValue::from_bytes(&line[colon + 1..]));
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    let several = |name: &str| headers.get_all(name).iter().count() > 1;
    let (several_tokens, several_ports) = (several("x-aws-proxy-auth"), several("x-aws-proxy-port"));
    if let Some((token, port)) = hearth_ingress::fuzzing::credentials(&mut headers) {
        assert_ne!(port, 0);
        assert!(!several_ports);
        assert!(token.is_none_or(|token| !token.is_empty() && !several_tokens));
    }
    for value in headers.get_all(header::SEC_WEBSOCKET_PROTOCOL) {
        let left = value.to_str().expect("what is left is text");
        assert!(left.split(',').all(|item| !item.trim().starts_with("lambda-microvms.") && item.trim() != "lambda-microvms"), "{left}");
    }

    let mut whole = Request::new(());
    *whole.headers_mut() = headers;
    if let Some(host) = hearth_ingress::fuzzing::endpoint(&whole, server_name) {
        assert!(!host.contains('@') && !host.bytes().any(|byte| byte.is_ascii_uppercase()), "{host}");
        assert!(server_name.is_none_or(|name| name.strip_suffix('.').unwrap_or(name).eq_ignore_ascii_case(&host)), "{host}");
    }
}

/// Messages of the guest protocol: whatever decodes is encoded to something that decodes to the same.
pub fn wire(data: &[u8]) {
    message::<StreamHeader>(data);
    message::<HostMessage>(data);
    message::<GuestMessage>(data);
    message::<DialReply>(data);
    message::<ExecInput>(data);
    message::<ExecOutput>(data);
    message::<CopyInput>(data);
    message::<CopyOutput>(data);
    message::<LogRecord>(data);
    message::<MetadataRequest>(data);
    message::<MetadataReply>(data);
}

fn message<T: Serialize + DeserializeOwned + PartialEq + Debug>(mut data: &[u8]) {
    let Some(Ok(decoded)) = read_message::<T>(&mut data).now_or_never() else { return };
    let mut encoded = Vec::new();
    write_message(&mut encoded, &decoded).now_or_never().expect("memory is always ready").expect("what was read can be written");
    let again = read_message::<T>(&mut encoded.as_slice()).now_or_never().expect("memory is always ready").expect("it decodes");
    assert_eq!(decoded, again);
}

/// The marker is found where it is, and nowhere else; not a byte after it is read.
pub fn marker(data: &[u8]) {
    let mut rest = data;
    let found = await_marker(&mut rest, &BOOT_MARKER).now_or_never().expect("memory is always ready").is_ok();
    let ends = data.windows(BOOT_MARKER.len()).position(|window| window == BOOT_MARKER).map(|start| start + BOOT_MARKER.len());
    assert_eq!(found.then_some(data.len() - rest.len()), ends);
}

/// A zip is unpacked into its directory or not at all; nothing is ever written beside it.
pub fn archive(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let (zip, context) = (dir.path().join("archive.zip"), dir.path().join("context"));
    fs::write(&zip, data).expect("a file can be written");
    hearth_build::fuzzing::unpack(&zip, &context);
    assert_eq!(fs::read(&zip).expect("it is there"), data);
    let beside = fs::read_dir(dir.path()).expect("it is there").filter_map(|entry| Some(entry.ok()?.file_name()));
    assert!(beside.into_iter().all(|name| name == "archive.zip" || name == "context"));
}

/// The patterns of a `.dockerignore`; the first line is a path. What is ignored stays so below it, unless an exception may keep it.
pub fn ignore(data: &[u8]) {
    let Some(line) = data.iter().position(|&byte| byte == b'\n') else { return };
    let Ok(path) = std::str::from_utf8(&data[..line]) else { return };
    let Ok(ignore) = Ignore::parse(&data[line + 1..]) else { return };
    let mut judge = Judge::new(&ignore);
    let mut ignores = |path: &str| judge.ignores(path, || Ok::<_, Infallible>(())).unwrap_or_else(|never| match never {});
    let ignored = ignores(path);
    assert_eq!(ignores(path), ignored);
    if ignored && !ignore.may_keep_below(path) {
        assert!(ignores(&format!("{path}/below")), "{path}");
    }
}

/// A Dockerfile, read before BuildKit does: no line is lost, and what was rewritten is not rewritten again.
pub fn dockerfile(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let nowhere = Path::new("/nonexistent");
    if let Some(read) = hearth_build::fuzzing::read_dockerfile(text, nowhere) {
        assert!(read.matches('\n').count() >= text.matches('\n').count(), "{text:?}");
        if let Some(again) = hearth_build::fuzzing::read_dockerfile(&read, nowhere) {
            assert_eq!(again, read, "{text:?}");
        }
    }
    hearth_build::fuzzing::read_progress(text);
}

/// ARNs, and the rules of connectors, which come in tags.
pub fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(arn) = ImageArn::parse(text) {
        assert_eq!(ImageArn::parse(&arn.to_string()).ok(), Some(arn));
    }
    if let Some(ConnectorArn::User { account, version, .. }) = ConnectorArn::parse(text) {
        assert!(account.len() == 12 && version.is_none_or(|version| version > 0), "{text}");
    }
    let (allow, deny) = text.split_once('\n').unwrap_or((text, ""));
    if let Ok(policy) = EgressPolicy::parse(allow, deny) {
        let written = |rules: &[_]| rules.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let again = EgressPolicy::parse(&written(policy.allow()), &written(policy.deny()));
        assert_eq!(again.ok().as_ref(), Some(&policy), "{text}");
    }
}

/// Good input with a part overwritten: the first two bytes say where, the rest is written there.
fn overwritten(good: &[u8], data: &[u8]) -> Option<Vec<u8>> {
    let (place, patch) = data.split_at_checked(2)?;
    let mut changed = good.to_vec();
    let start = usize::from(u16::from_le_bytes([place[0], place[1]])) % (changed.len() + 1);
    let end = (start + patch.len()).min(changed.len());
    changed.splice(start..end, patch.iter().copied());
    Some(changed)
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use proptest::{prelude::*, test_runner::TestRunner};
    use zip::{ZipWriter, write::SimpleFileOptions};

    use super::*;

    /// Drives a target with good input, with good input that was changed a little, and with anything.
    fn drive(target: fn(&[u8]), good: &[Vec<u8>]) {
        good.iter().for_each(|good| target(good));
        let mut runner = TestRunner::default();
        let bytes = || proptest::collection::vec(any::<u8>(), 0..600);
        runner
            .run(&bytes(), |data| {
                target(&data);
                Ok(())
            })
            .unwrap();
        let few = proptest::collection::vec(any::<u8>(), 0..8);
        let changed = (proptest::sample::select(good.to_vec()), any::<u16>(), few).prop_map(|(good, place, patch)| {
            let data = [place.to_le_bytes().as_slice(), &patch].concat();
            overwritten(&good, &data).unwrap()
        });
        runner
            .run(&changed, |data| {
                target(&data);
                Ok(())
            })
            .unwrap();
        let text = proptest::string::string_regex("[ -~]{0,60}(\n[ -~]{0,60}){0,4}").unwrap();
        runner
            .run(&text, |data| {
                target(data.as_bytes());
                Ok(())
            })
            .unwrap();
    }

    fn frame<T: Serialize>(message: &T) -> Vec<u8> {
        let mut frame = Vec::new();
        write_message(&mut frame, message).now_or_never().unwrap().unwrap();
        frame
    }

    #[test]
    fn token_keeps_its_promises() {
        drive(token, &[vec![0, 0], vec![100, 0, b'A'], vec![0, 1, b'.', b'.']]);
    }

    #[test]
    fn request_keeps_its_promises() {
        let good = [
            "a.localhost\nhost:a.localhost:8443\nx-aws-proxy-auth:t\nx-aws-proxy-port:8080",
            "\nsec-websocket-protocol:lambda-microvms, lambda-microvms.authentication.t, lambda-microvms.port.80, app",
            "\nhost:a\nhost:b\nx-aws-proxy-port:1\nx-aws-proxy-port:2\nx-aws-proxy-auth:a\nx-aws-proxy-auth:b",
        ];
        drive(request, &good.map(|text| text.as_bytes().to_vec()));
    }

    #[test]
    fn wire_keeps_its_promises() {
        let dial = frame(&StreamHeader::Dial { port: 8080 });
        drive(wire, &[dial, frame(&DialReply::Connected), u32::MAX.to_le_bytes().to_vec()]);
    }

    #[test]
    fn marker_keeps_its_promises() {
        let embedded = [b"hearth-boot-hearth-boot-0001".as_slice(), &[0; 20]].concat();
        drive(marker, &[BOOT_MARKER.to_vec(), embedded, b"hhearth-boot-000".to_vec()]);
    }

    #[test]
    fn archive_keeps_its_promises() {
        let zip = |names: &[&str]| {
            let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
            for name in names {
                zip.start_file(*name, SimpleFileOptions::default()).unwrap();
                zip.write_all(b"FROM scratch").unwrap();
            }
            zip.add_symlink("link", "../../etc", SimpleFileOptions::default()).unwrap();
            zip.finish().unwrap().into_inner()
        };
        drive(archive, &[zip(&["Dockerfile", "a/b"]), zip(&["../escaped"]), zip(&["/etc/escaped", "link/escaped"])]);
    }

    #[test]
    fn ignore_keeps_its_promises() {
        let good = ["src/a.py\n**/*.py\n!src\n", "a/b\n[a-z]*/**\n!a/b\n# a\n", "x\n\\x?\n/x/../y/\n"];
        drive(ignore, &good.map(|text| text.as_bytes().to_vec()));
    }

    #[test]
    fn dockerfile_keeps_its_promises() {
        let good = [
            "# syntax=docker/dockerfile:1\nARG A=b\nFROM ${A:-c} AS d\nRUN --security=sandbox cat <<EOF > x \\\n  # y\n  && z\nEOF\nCOPY --chmod=0o7 a b\n",
            "# escape=`\nFROM --platform=linux/arm64 a`\n\nADD --parents --from=a [\"x y\", \"/./z\"]\nONBUILD COPY <<-'E' /\n\tE\n",
            r#"{"vertexes":[{"digest":"a","name":"[1/2] RUN x","started":"1","error":"y"}],"logs":[{"vertex":"a","data":"eAo="}]}"#,
        ];
        drive(dockerfile, &good.map(|text| text.as_bytes().to_vec()));
    }

    #[test]
    fn names_keeps_its_promises() {
        let good = [
            "arn:aws:lambda:us-east-1:000000000000:microvm-image:demo",
            "arn:aws:lambda:us-east-1:000000000000:network-connector:abc:1",
            "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:HTTP_INGRESS",
            "*.example.com:443 10.0.0.0/8 192.0.2.1:1-1024\nexample.com",
        ];
        drive(names, &good.map(|text| text.as_bytes().to_vec()));
    }
}
