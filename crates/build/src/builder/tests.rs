//! Real builds with a real buildah, on a base image of a shell and little else: no network, a fraction of a second each.

use std::{collections::BTreeSet, fs, io::Write, path::Path, process::Output, sync::Arc};

use tempfile::TempDir;
use tokio::{sync::mpsc, time::timeout};

use super::*;

const BASE: &str = "registry.invalid/base:latest";
const DISK: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

struct Fixture {
    dir: TempDir,
    builder: Arc<Builder>,
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
    let dir = tempfile::tempdir().unwrap();
    write_base(&dir.path().join("base.tar"), "first");
    let builder = Arc::new(Builder::new(config(dir.path())));
    builder.prepare().await.unwrap();
    Some(Fixture { dir, builder })
}

fn config(dir: &Path) -> BuilderConfig {
    let config = BuilderConfig::new(dir.join("cache"), dir.join("base.tar"));
    BuilderConfig { base_names: vec![BASE.to_owned()], deadline: PATIENCE, ..config }
}

/// The host's shell and the libraries it is linked to, and a file that tells one base from another.
fn write_base(path: &Path, edition: &str) {
    let libraries = String::from_utf8(run("ldd", &["/bin/sh"]).stdout).unwrap();
    let mut files: BTreeSet<&str> = libraries.split_whitespace().filter(|word| word.starts_with('/')).collect();
    files.insert("/bin/sh");
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
        BuildRequest { id: id.to_owned(), archive, work_dir, rootfs, disk_bytes: DISK, log }
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
        for process in fs::read_dir("/proc").unwrap() {
            let arguments = fs::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
            let arguments = String::from_utf8_lossy(&arguments).into_owned();
            // Other builds of the same test may still run.
            assert!(!arguments.contains(&format!("{dir}/{id}/")), "still running: {arguments}");
        }
    }

    async fn containers(&self) -> Vec<String> {
        self.builder.workshop.get().unwrap().storage.containers().await
    }
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
    assert!(second.log.iter().any(|line| line.contains("Using cache")), "{:?}", second.log);
    let same = !fixture.builder.workshop.get().unwrap().storage.is_reproducible()
        || fs::read(fixture.rootfs("first")).unwrap() == fs::read(fixture.rootfs("second")).unwrap();
    assert!(same, "the disks differ");
    assert!(fixture.containers().await.is_empty());
}

#[tokio::test]
async fn a_failing_step_is_in_the_log() {
    let Some(fixture) = fixture().await else { return };
    let failed = fixture.build("failed", "RUN echo about to fail; exit 7\nCMD [\"/bin/sh\"]").await;
    assert_eq!(failed.state_reason(), "The container image build failed.");
    assert!(failed.log.iter().any(|line| line == "about to fail"), "{:?}", failed.log);
    assert!(failed.log.iter().any(|line| line.contains("exit status 7")), "{:?}", failed.log);
    assert!(!fixture.rootfs("failed").exists());
    assert!(fixture.containers().await.is_empty());

    let unknown = fixture.build("unknown", "NONSENSE\n").await;
    assert_eq!(unknown.state_reason(), "The container image build failed.");
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
    assert!(fixture.containers().await.is_empty());
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
    assert!(fixture.containers().await.is_empty());
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
    assert!(fixture.containers().await.is_empty());
}

#[tokio::test]
async fn the_base_image_follows_its_archive() {
    let Some(fixture) = fixture().await else { return };
    let storage = &fixture.builder.workshop.get().unwrap().storage;
    let first = storage.image_id(BASE).await.unwrap().expect("the base image is there");
    fixture.builder.prepare().await.unwrap();
    assert_eq!(storage.image_id(BASE).await.unwrap().as_ref(), Some(&first));

    write_base(&fixture.dir.path().join("base.tar"), "another");
    let others: Vec<Builder> = (0..2).map(|_| Builder::new(config(fixture.dir.path()))).collect();
    let (one, two) = tokio::join!(others[0].prepare(), others[1].prepare());
    one.and(two).unwrap();
    assert_ne!(storage.image_id(BASE).await.unwrap().as_ref(), Some(&first));
    let built = fixture.build("edition", "CMD [\"/bin/sh\"]").await;
    assert!(built.result.is_ok(), "{:?}", built.result);
    assert_eq!(fixture.debugfs("edition", "cat /edition"), "another");
}

#[tokio::test]
async fn what_a_killed_server_left_is_removed() {
    let Some(mut fixture) = fixture().await else { return };
    let context = fixture.dir.path().join("context");
    let scratch = fixture.dir.path().join("scratch");
    fs::create_dir(&context).unwrap();
    fs::create_dir(&scratch).unwrap();
    fs::write(context.join("Dockerfile"), format!("FROM {BASE}\nRUN echo endless; while :; do :; done")).unwrap();
    let workshop = Arc::clone(fixture.builder.workshop.get().unwrap());
    let storage = workshop.storage.clone();
    let (sender, mut receiver) = mpsc::channel(4);
    let surroundings = Surroundings { scratch, lock: workshop.begin().await.unwrap() };
    let id_file = fixture.dir.path().join("id");
    // A build that belongs to no server, as after `kill -9`: nobody will cancel it, and its own lock is all that speaks for it.
    let orphan = tokio::spawn(async move {
        let stop = Stop::after(PATIENCE);
        storage.run_dockerfile(&context, &id_file, &surroundings, &stop, &sender).await.map(|run| run.status)
    });
    while receiver.recv().await.expect("the step begins") != "endless" {}
    assert_eq!(fixture.containers().await.len(), 1);

    // While its server lives, another one leaves the build alone.
    let neighbour = Builder::new(config(fixture.dir.path()));
    neighbour.prepare().await.unwrap();
    assert_eq!(fixture.containers().await.len(), 1);
    drop((neighbour, workshop));

    fixture.builder = Arc::new(Builder::new(config(fixture.dir.path())));
    fixture.builder.prepare().await.unwrap();
    let status = timeout(PATIENCE, orphan).await.expect("the orphan is gone").unwrap().unwrap();
    assert!(!status.success());
    assert!(fixture.containers().await.is_empty());
    assert!(fixture.build("after", "CMD [\"/bin/sh\"]").await.result.is_ok());
}
