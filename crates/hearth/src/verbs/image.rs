//! `hearth image build`, `ls`, `rm`.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, IsTerminal, Seek, Write},
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use axum::body::Body;
use clap::Args;
use hearth_control::Architecture;
use http::Method;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::io::ReaderStream;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use super::{logs, names, table};
use crate::{
    client::{Client, ClientError},
    connect::Connect,
};

/// Longest time that one call waits for a change of state, in seconds; the wait goes on with the next call.
const WAIT_SECONDS: u32 = 30;

/// `hearth image build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// Directory with a Dockerfile. All of it is sent; the build leaves out what its .dockerignore names.
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
    if !dir.join("Dockerfile").is_file() {
        bail!("{} has no Dockerfile: name the directory that has it", dir.display());
    }
    let name =
        args.name.or_else(|| names::image_name_of(&dir)).context("the directory's name makes no image name: give one with --name")?;
    let started = std::time::Instant::now();
    let progress = progress();

    progress.set_message(format!("packing {}", dir.display()));
    let archive = tokio::task::spawn_blocking(move || pack(&dir)).await??;
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
    let print = |bytes: &[u8]| progress.suspend(|| io::stdout().write_all(bytes));
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

/// Packs a directory into a zip archive in a file without a name. The same contents make the same archive: names are in order, and times are
/// left out.
fn pack(dir: &Path) -> anyhow::Result<File> {
    let mut archive = ZipWriter::new(tempfile::tempfile().context("making a temporary file")?);
    let plain = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated).last_modified_time(zip::DateTime::default());
    for entry in walkdir::WalkDir::new(dir).min_depth(1).sort_by_file_name() {
        let entry = entry.with_context(|| format!("reading {}", dir.display()))?;
        let path = entry.path();
        let what = || format!("packing {}", path.display());
        let relative = path.strip_prefix(dir).expect("what a walk finds is below where it began");
        let name = std::str::from_utf8(relative.as_os_str().as_bytes()).with_context(what)?;
        let metadata = entry.metadata().with_context(what)?;
        let options = plain.unix_permissions(metadata.permissions().mode() & 0o7777).large_file(metadata.len() > u64::from(u32::MAX));
        if metadata.is_dir() {
            archive.add_directory(name, options).with_context(what)?;
        } else if metadata.is_symlink() {
            let target = std::fs::read_link(path).with_context(what)?;
            archive.add_symlink(name, target.to_string_lossy(), options).with_context(what)?;
        } else if metadata.is_file() {
            archive.start_file(name, options).with_context(what)?;
            io::copy(&mut File::open(path).with_context(what)?, &mut archive).with_context(what)?;
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

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn bytes(mut file: File) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_directory_is_packed_with_modes_and_links_and_the_same_way_twice() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        std::fs::write(dir.path().join("Dockerfile"), "FROM scratch\n").unwrap();
        std::fs::write(dir.path().join("bin/run"), "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(dir.path().join("bin/run"), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("bin/run", dir.path().join("start")).unwrap();

        let first = bytes(pack(dir.path()).unwrap());
        File::open(dir.path().join("Dockerfile")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(bytes(pack(dir.path()).unwrap()), first);

        let mut archive = zip::ZipArchive::new(io::Cursor::new(first)).unwrap();
        let names: Vec<&str> = archive.file_names().collect();
        assert_eq!(names, ["Dockerfile", "bin/", "bin/run", "start"]);
        assert_eq!(archive.by_name("bin/run").unwrap().unix_mode().unwrap() & 0o777, 0o755);
        assert!(archive.by_name("start").unwrap().is_symlink());
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
