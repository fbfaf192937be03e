//! `hearth image build`, `ls`, `rm`.

use std::{
    collections::{BTreeMap, HashSet},
    convert::Infallible,
    fs::File,
    io::{self, IsTerminal, Read, Seek},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use axum::body::Body;
use clap::Args;
use hearth_build::ignore::{self, IGNORE_FILES, Ignore, Judge};
use hearth_control::Architecture;
use http::Method;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::io::ReaderStream;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use super::{logs, names, printable::Printer, table};
use crate::{
    client::{Client, ClientError},
    connect::Connect,
};

/// Longest time that one call waits for a change of state, in seconds; the wait goes on with the next call.
const WAIT_SECONDS: u32 = 30;

/// Most links that lead to one file (MAXSYMLINKS).
const MAX_HOPS: usize = 40;

/// `hearth image build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// Directory with a Dockerfile. It is sent without what its .dockerignore names. Links are sent as links.
    dir: PathBuf,
    /// Name of the image [default: the directory's].
    #[arg(long)]
    name: Option<String>,
    /// Memory in MiB: 512, 1024, 2048, 4096 or 8192.
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u32,
    /// Platform to ask for, or several with commas between them: linux/amd64 or linux/arm64. A host builds for its own alone: its log says so,
    /// or it refuses another, as its setting `architectures` has it [default: the host's].
    #[arg(long, value_name = "PLATFORM", value_delimiter = ',', value_parser = architecture)]
    platform: Vec<Architecture>,
    /// Environment variable of the app, baked into the image.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    env: Vec<(String, String)>,
    /// Role that the build runs with. Any name will do until the account has roles of its own.
    #[arg(long, value_name = "NAME", default_value = "hearth-build")]
    role: String,
    /// Runs every instruction again and asks for the present base image, instead of using what earlier builds left.
    #[arg(long)]
    no_cache: bool,
}

/// Tag of an image whose builds use nothing that earlier ones left.
const NO_CACHE_TAG: &str = "hearth:no-cache";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Item {
    name: String,
    state: String,
    latest_active_image_version: Option<String>,
    created_at: f64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct List {
    items: Vec<Item>,
    next_token: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Created {
    image_arn: String,
    image_version: String,
}

/// Where an image's latest build ended.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Reached {
    state: String,
    state_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Stored {
    uri: String,
}

/// `hearth image build`: makes an image, or the next version of one that is there, and follows the build. Exit code 0 once the image can be run, 1 if the build failed.
pub async fn build(client: Client, args: BuildArgs) -> anyhow::Result<ExitCode> {
    let connect = Connect::read(client.dir())?;
    let dir = args.dir.canonicalize().with_context(|| format!("opening {}", args.dir.display()))?;
    check_dockerfile(&dir)?;
    let name =
        args.name.or_else(|| names::image_name_of(&dir)).context("the directory's name makes no image name: give one with --name")?;
    let started = std::time::Instant::now();
    let progress = progress();

    progress.set_message(format!("packing {}", dir.display()));
    let notes = progress.clone();
    let archive = tokio::task::spawn_blocking(move || pack(&dir, |note| notes.suspend(|| eprintln!("hearth: {note}")))).await??;
    progress.set_message("sending");
    let body = Body::from_stream(ReaderStream::with_capacity(tokio::fs::File::from_std(archive), 64 << 10));
    let stored: Stored = client.upload(&format!("/hearth/v1/artifacts/{}", names::escape(&name)), body).await?;

    let environment: BTreeMap<String, String> = args.env.into_iter().collect();
    let configurations: Vec<Value> = args.platform.iter().map(|architecture| json!({"architecture": architecture})).collect();
    let mut request = json!({
        "name": name,
        "baseImageArn": format!("arn:aws:lambda:{}:aws:microvm-image:al2023-1", connect.region),
        "buildRoleArn": format!("arn:aws:iam::{}:role/{}", connect.account, args.role),
        "codeArtifact": {"uri": stored.uri},
        "resources": [{"minimumMemoryInMiB": args.memory}],
        "environmentVariables": environment,
        "cpuConfigurations": if configurations.is_empty() { Value::Null } else { configurations.into() },
    });
    let path = format!("/2025-09-09/microvm-images/{}", names::escape(&names::image_arn(&connect, &name)));
    let (method, path) = match client.call::<Value>(Method::GET, &path, None).await {
        Ok(_) => (Method::PUT, path),
        Err(ClientError::Refused { status: http::StatusCode::NOT_FOUND, .. }) => (Method::POST, "/2025-09-09/microvm-images".to_owned()),
        Err(error) => return Err(error.into()),
    };
    let tags = format!("/2017-03-31/tags/{}", names::escape(&names::image_arn(&connect, &name)));
    if args.no_cache && method == Method::POST {
        request["tags"] = json!({ NO_CACHE_TAG: "true" });
    } else if args.no_cache {
        client.call::<Value>(Method::POST, &tags, Some(json!({ "Tags": { NO_CACHE_TAG: "true" } }))).await?;
    }
    let created: Created = client.call(method, &path, Some(request)).await?;
    progress.set_message(format!("building {name} {}", created.image_version));
    let mut printer = Printer::new();
    let print = |bytes: &[u8]| progress.suspend(|| printer.print(bytes));
    logs::copy(&client, &format!("image={}", names::escape(&name)), true, print).await?;
    let reached = settled(&client, &name).await;
    progress.finish_and_clear();
    let reached = match reached {
        Err(ClientError::Refused { status: http::StatusCode::NOT_FOUND, .. }) => bail!("{name} was deleted while it was built"),
        reached => reached?,
    };
    if args.no_cache {
        // For this build only.
        client.call::<Value>(Method::DELETE, &format!("{tags}?tagKeys={}", names::escape(NO_CACHE_TAG)), None).await?;
    }

    let seconds = started.elapsed().as_secs();
    match reached.state.as_str() {
        "CREATED" | "UPDATED" => {
            println!("{} {} is {} after {seconds} s: `hearth run {name}`", created.image_arn, created.image_version, reached.state);
            Ok(ExitCode::SUCCESS)
        }
        state => {
            let reason = reached.state_reason.unwrap_or_else(|| "no reason was given".to_owned());
            eprintln!("hearth: {name} is {state} after {seconds} s: {reason}\n  `hearth logs {name}` shows the build again");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// `hearth image ls`.
pub async fn list(client: Client) -> anyhow::Result<ExitCode> {
    let mut rows = Vec::new();
    let mut path = "/2025-09-09/microvm-images?maxResults=50".to_owned();
    loop {
        let page: List = client.call(Method::GET, &path, None).await?;
        rows.extend(page.items.into_iter().map(|item| {
            let version = item.latest_active_image_version.unwrap_or_else(|| "-".to_owned());
            [item.name, version, item.state, table::age(table::since(item.created_at))]
        }));
        match page.next_token {
            Some(token) => path = format!("/2025-09-09/microvm-images?maxResults=50&nextToken={}", names::escape(&token)),
            None => break,
        }
    }
    print!("{}", table::render(["NAME", "VERSION", "STATE", "AGE"], &rows));
    Ok(ExitCode::SUCCESS)
}

/// `hearth image rm`: returns once the image is gone.
pub async fn remove(client: Client, image: String) -> anyhow::Result<ExitCode> {
    let connect = Connect::read(client.dir())?;
    let arn = names::image_arn(&connect, &image);
    client.call::<Value>(Method::DELETE, &format!("/2025-09-09/microvm-images/{}", names::escape(&arn)), None).await?;
    let name = names::image_name(&arn);
    match settled(&client, name).await {
        Err(ClientError::Refused { status: http::StatusCode::NOT_FOUND, .. }) => {
            println!("{name} is gone");
            Ok(ExitCode::SUCCESS)
        }
        reached => {
            let reached = reached?;
            bail!("{name} is {}: {}", reached.state, reached.state_reason.unwrap_or_else(|| "the server's log says why".to_owned()))
        }
    }
}

/// Waits until an image is neither being built nor being deleted.
async fn settled(client: &Client, name: &str) -> Result<Reached, ClientError> {
    let path = format!("/hearth/v1/images/{}/wait?seconds={WAIT_SECONDS}", names::escape(name));
    loop {
        let reached: Reached = client.call(Method::GET, &path, None).await?;
        if !matches!(reached.state.as_str(), "CREATING" | "UPDATING" | "DELETING") {
            return Ok(reached);
        }
    }
}

/// A line at the end of the terminal; nothing where there is none.
fn progress() -> ProgressBar {
    let progress = ProgressBar::new_spinner();
    if !io::stderr().is_terminal() {
        progress.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})").expect("the template is constant and parses");
    progress.set_style(style);
    progress.enable_steady_tick(Duration::from_millis(120));
    progress
}

/// The Dockerfile must be in the directory that is sent, as must all links to it.
fn check_dockerfile(dir: &Path) -> anyhow::Result<()> {
    let path = dir.join("Dockerfile");
    if !path.is_file() {
        bail!("{} has no Dockerfile: name the directory that has it", dir.display());
    }
    let real = path.canonicalize().with_context(|| format!("opening {}", path.display()))?;
    if !real.starts_with(dir) {
        bail!("{} is a link to {}, which is not sent: links are sent as links; copy the file", path.display(), real.display());
    }
    Ok(())
}

/// Packs a directory into a zip archive in a file without a name, without what its `.dockerignore` names. Links are packed as links, and none
/// is followed. The same contents make the same archive: names are in order, and times are left out. `note` is told what is left out besides.
fn pack(dir: &Path, mut note: impl FnMut(&str)) -> anyhow::Result<File> {
    let ignore = patterns(dir)?;
    let always = always_sent(dir);
    let mut judge = Judge::new(&ignore);
    let mut archive = ZipWriter::new(tempfile::tempfile().context("making a temporary file")?);
    let plain = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated).last_modified_time(zip::DateTime::default());
    let mut walk = walkdir::WalkDir::new(dir).min_depth(1).sort_by_file_name().into_iter();
    while let Some(entry) = walk.next() {
        let entry = entry.with_context(|| format!("reading {}; `.dockerignore` can leave out what cannot be read", dir.display()))?;
        let path = entry.path();
        let what = || format!("packing {}", path.display());
        let relative = path.strip_prefix(dir).expect("what a walk finds is below where it began");
        // A name that is not UTF-8 may be ignored like any other.
        let Ok(ignored) = judge.ignores(&relative.to_string_lossy(), || Ok::<_, Infallible>(()));
        if ignored && !always.contains(path) {
            // A directory that may hold what is sent is sent too, for its mode.
            let needed = ignore.may_keep_below(&relative.to_string_lossy()) || always.iter().any(|kept| kept.starts_with(path));
            match (entry.file_type().is_dir(), needed) {
                (true, true) => {}
                (true, false) => {
                    walk.skip_current_dir();
                    continue;
                }
                (false, _) => continue,
            }
        }
        let name = std::str::from_utf8(relative.as_os_str().as_bytes()).with_context(what)?;
        let metadata = entry.metadata().with_context(what)?;
        let options = plain.unix_permissions(metadata.permissions().mode() & 0o7777).large_file(metadata.len() > u64::from(u32::MAX));
        let kind = metadata.file_type();
        if kind.is_dir() {
            archive.add_directory(name, options).with_context(what)?;
        } else if kind.is_symlink() {
            let target = std::fs::read_link(path).with_context(what)?;
            let target = target.to_str().with_context(|| format!("{}: the link's target is not UTF-8", what()))?;
            archive.add_symlink(name, target, options).with_context(what)?;
        } else if kind.is_file() {
            let mut file = File::open(path).with_context(|| format!("{}; `.dockerignore` can leave it out", what()))?;
            archive.start_file(name, options).with_context(what)?;
            io::copy(&mut file, &mut archive).with_context(what)?;
        } else if kind.is_socket() {
            note(&format!("{} is a socket and is not sent", path.display()));
        } else {
            let kind = if kind.is_fifo() { "named pipe" } else { "device" };
            bail!("{}: it is a {kind}, which cannot be sent; name it in .dockerignore", what());
        }
    }
    let mut file = archive.finish().context("finishing the archive")?;
    file.rewind().context("reading the archive")?;
    Ok(file)
}

/// The architecture of a platform as Docker writes it.
fn architecture(platform: &str) -> Result<Architecture, String> {
    match platform.strip_prefix("linux/").unwrap_or(platform) {
        "amd64" | "amd64/v1" | "x86_64" => Ok(Architecture::X86_64),
        "arm64" | "arm64/v8" | "aarch64" => Ok(Architecture::Arm64),
        _ => Err("MicroVMs are linux/amd64 or linux/arm64".to_owned()),
    }
}

/// What is sent even if it is ignored, because the build itself reads it: the Dockerfile, the files of patterns, and what they are links to.
fn always_sent(dir: &Path) -> HashSet<PathBuf> {
    let mut always = HashSet::new();
    for name in ["Dockerfile"].iter().chain(&IGNORE_FILES) {
        let mut path = dir.join(name);
        for _ in 0..MAX_HOPS {
            always.insert(path.clone());
            let Ok(target) = path.read_link() else { break };
            let target = path.with_file_name(target);
            let (Some(Ok(parent)), Some(name)) = (target.parent().map(Path::canonicalize), target.file_name()) else { break };
            path = parent.join(name);
        }
    }
    always
}

/// What a directory's `.dockerignore` says, or its `Dockerfile.dockerignore`, which comes first.
fn patterns(dir: &Path) -> anyhow::Result<Ignore> {
    for name in IGNORE_FILES {
        let path = dir.join(name);
        let what = || format!("reading {}", path.display());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(what),
        };
        let mut bytes = Vec::new();
        file.take(ignore::MAX_BYTES as u64 + 1).read_to_end(&mut bytes).with_context(what)?;
        return Ignore::parse(&bytes).with_context(what);
    }
    Ok(Ignore::default())
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::{fs::symlink, net::UnixListener},
    };

    use zip::HasZipMetadata;

    use super::*;

    fn packed(dir: &Path) -> anyhow::Result<(Vec<u8>, Vec<String>)> {
        let (mut bytes, mut notes) = (Vec::new(), Vec::new());
        pack(dir, |note| notes.push(note.to_owned()))?.read_to_end(&mut bytes)?;
        Ok((bytes, notes))
    }

    fn names(archive: &[u8]) -> Vec<String> {
        zip::ZipArchive::new(io::Cursor::new(archive)).unwrap().file_names().map(str::to_owned).collect()
    }

    fn refusal(dir: &Path) -> String {
        format!("{:#}", packed(dir).unwrap_err())
    }

    #[test]
    fn pack_directory_keeps_modes_and_links_and_is_the_same_twice() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        fs::write(dir.path().join("Dockerfile"), "FROM scratch\n").unwrap();
        fs::write(dir.path().join("bin/run"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(dir.path().join("bin/run"), Permissions::from_mode(0o755)).unwrap();
        symlink("bin/run", dir.path().join("start")).unwrap();
        symlink("/etc", dir.path().join("out")).unwrap();
        fs::write(dir.path().join("back\\slash"), "").unwrap();

        let (first, _) = packed(dir.path()).unwrap();
        File::open(dir.path().join("Dockerfile")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(packed(dir.path()).unwrap().0, first);

        assert_eq!(names(&first), ["Dockerfile", "back\\slash", "bin/", "bin/run", "out", "start"]);
        let mut archive = zip::ZipArchive::new(io::Cursor::new(first)).unwrap();
        assert_eq!(archive.by_name("bin/run").unwrap().unix_mode().unwrap() & 0o777, 0o755);
        assert!(archive.by_name("start").unwrap().is_symlink());
        // In names that were made on Unix, a backslash separates nothing.
        assert!(matches!(archive.by_name("back\\slash").unwrap().get_metadata().system, zip::System::Unix));
        let mut target = String::new();
        archive.by_name("out").unwrap().read_to_string(&mut target).unwrap();
        assert_eq!(target, "/etc");
    }

    #[test]
    fn pack_ignored_paths_are_not_sent_or_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".venv/lib", "doc/empty", "docs", "src/app", "src/other"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        for name in ["Dockerfile", ".venv/lib/x.py", "docs/README.md", "docs/other.md", "src/app/main.py", "src/other/x"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        symlink("/usr/bin/python3", dir.path().join(".venv/python")).unwrap();
        nix::unistd::mkfifo(&dir.path().join(".venv/pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let written = ".venv\nDockerfile\n.dockerignore\ndoc\nsrc\n!src/app\ndocs\n!docs/README.md\n";
        fs::write(dir.path().join(".dockerignore"), written).unwrap();
        let sent = names(&packed(dir.path()).unwrap().0);
        assert_eq!(sent, [".dockerignore", "Dockerfile", "docs/", "docs/README.md", "src/", "src/app/", "src/app/main.py"]);

        fs::write(dir.path().join("Dockerfile.dockerignore"), "*\n").unwrap();
        assert_eq!(names(&packed(dir.path()).unwrap().0), [".dockerignore", "Dockerfile", "Dockerfile.dockerignore"]);

        fs::create_dir(dir.path().join("docker")).unwrap();
        fs::rename(dir.path().join("Dockerfile"), dir.path().join("docker/File")).unwrap();
        symlink("docker/File", dir.path().join("Dockerfile")).unwrap();
        let sent = names(&packed(dir.path()).unwrap().0);
        assert_eq!(sent, [".dockerignore", "Dockerfile", "Dockerfile.dockerignore", "docker/", "docker/File"]);

        fs::write(dir.path().join("Dockerfile.dockerignore"), "\n[\n").unwrap();
        assert!(refusal(dir.path()).contains("Dockerfile.dockerignore: line 2: the pattern \"[\" is malformed"));
    }

    #[test]
    fn pack_special_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("Dockerfile"), "FROM scratch\n").unwrap();
        let _listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let (archive, notes) = packed(dir.path()).unwrap();
        assert_eq!(names(&archive), ["Dockerfile"]);
        assert!(notes.len() == 1 && notes[0].ends_with("/socket is a socket and is not sent"), "{notes:?}");

        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let refused = refusal(dir.path());
        assert!(refused.contains("/pipe: it is a named pipe") && refused.contains(".dockerignore"), "{refused}");
    }

    #[test]
    fn check_dockerfile_link_that_leads_out_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let context = dir.join("context");
        fs::create_dir(&context).unwrap();
        fs::write(dir.join("Dockerfile"), "FROM scratch\n").unwrap();
        assert!(check_dockerfile(&context).unwrap_err().to_string().contains("has no Dockerfile"));
        symlink("../Dockerfile", context.join("Dockerfile")).unwrap();
        assert!(check_dockerfile(&context).unwrap_err().to_string().contains("which is not sent"));
        fs::write(context.join("File"), "FROM scratch\n").unwrap();
        fs::remove_file(context.join("Dockerfile")).unwrap();
        symlink("File", context.join("Dockerfile")).unwrap();
        check_dockerfile(&context).unwrap();
    }

    #[test]
    fn architecture_platforms_have_the_names_that_docker_takes() {
        for (platform, expected) in
            [("linux/arm64", Architecture::Arm64), ("linux/arm64/v8", Architecture::Arm64), ("amd64", Architecture::X86_64)]
        {
            assert_eq!(architecture(platform), Ok(expected));
        }
        for platform in ["linux/arm/v7", "windows/amd64", "linux", ""] {
            assert!(architecture(platform).is_err(), "{platform}");
        }
    }

    #[test]
    fn environment_variables_are_split_at_the_first_equals_sign() {
        assert_eq!(key_value("A=b=c"), Ok(("A".to_owned(), "b=c".to_owned())));
        assert!(key_value("A").is_err());
        assert!(key_value("=b").is_err());
    }
}
