//! The managed base image in an account's store: the real one where its registry can be reached, else the stand-in from the guest kit.

use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::{
    BuildError,
    process::{Captured, ProcessError, Stop},
    sandbox::{BASE_ARCHIVE, Sandbox},
};

/// For how long a registry that was not reached is not asked again.
const UNREACHABLE: Duration = Duration::from_secs(600);
/// How long a pull may take before the registry counts as unreachable.
const PULL: Duration = Duration::from_secs(600);

/// Name of the stand-in in stores, before its checksum.
const STAND_IN: &str = "hearth.invalid/stand-in";
const SEARCH_PATH: &str = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is said of an image that no registry has, in part.
const ANSWERS: [&str; 7] = [
    "manifest unknown",
    "not found: manifest",
    "no matching manifest",
    "repository does not exist",
    "name unknown",
    "no such manifest",
    "invalid reference format",
];

/// What is said when a registry is not reached, in part. Only that is remembered, because it is remembered for all accounts, and other
/// failures may be of one tenant's making.
const NOT_REACHED: [&str; 8] = [
    "dial tcp",
    "no such host",
    "connection refused",
    "i/o timeout",
    "Client.Timeout exceeded",
    "TLS handshake timeout",
    "context deadline exceeded",
    "connection reset by peer",
];

/// Registries that could not be reached lately, and why.
#[derive(Debug, Default)]
pub(crate) struct Unreachable(Mutex<HashMap<String, (Instant, String)>>);

/// The managed base image could not be provided.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BaseError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("docker {verb} failed: {stderr}")]
    Failed { verb: &'static str, stderr: String },
    #[error("the base image {image} is not to be had: {reason}")]
    Missing { image: String, reason: String },
}

impl From<BaseError> for BuildError {
    fn from(error: BaseError) -> Self {
        match error {
            BaseError::Missing { .. } => Self::ContainerBuildFailed(error.to_string()),
            error => Self::Platform(Box::new(error)),
        }
    }
}

/// Where stand-ins come from.
#[derive(Debug)]
pub(crate) struct Base<'a> {
    /// Names of the managed base image, without tag.
    pub(crate) repositories: &'a [String],
    /// Checksum of the stand-in's archive.
    pub(crate) checksum: &'a str,
    pub(crate) unreachable: &'a Unreachable,
    /// Repository to pull from instead.
    pub(crate) mirror: Option<&'a str>,
}

impl Base<'_> {
    /// Whether a name in a Dockerfile means the managed base image.
    pub(crate) fn is_managed(&self, image: &str) -> bool {
        self.repositories.iter().any(|name| name == repository_of(image))
    }

    /// Where an image is pulled from. A name with a digest is not given to what comes from elsewhere, so that is pulled under its own.
    fn source(&self, image: &str) -> String {
        match self.mirror {
            Some(mirror) if !image.contains('@') => format!("{mirror}{}", &image[repository_of(image).len()..]),
            _ => image.to_owned(),
        }
    }

    /// Makes sure that the store has what a managed base image's name stands for. `fresh` asks the registry even if it has. Returns a line
    /// that says which image it is.
    pub(crate) async fn provide(&self, sandbox: &Sandbox, image: &str, fresh: bool, stop: &Stop) -> Result<String, BaseError> {
        let pulled = find(sandbox, image, stop).await?.filter(|found| !found.is_stand_in).map(|found| found.id);
        if let Some(id) = pulled.as_ref().filter(|_| !fresh) {
            return Ok(format!("Base image {image}: {id}, pulled earlier."));
        }
        let source = self.source(image);
        let reason = match self.unreachable.recent(&source) {
            Some(reason) if !fresh => reason,
            _ => match pull(sandbox, &source, stop).await? {
                Ok(()) => {
                    if source != image {
                        succeed("tag", sandbox.docker(&["tag", &source, image], stop).await?)?;
                    }
                    let id = find(sandbox, image, stop).await?.map(|found| found.id).unwrap_or_default();
                    return Ok(format!("Base image {image}: {id}, pulled from its registry."));
                }
                Err(reason) if ANSWERS.iter().any(|answer| reason.contains(answer)) => {
                    return Err(BaseError::Missing { image: image.to_owned(), reason });
                }
                Err(reason) if NOT_REACHED.iter().any(|sign| reason.contains(sign)) => self.unreachable.note(&source, reason),
                Err(reason) => reason,
            },
        };
        if let Some(id) = pulled {
            return Ok(format!("Base image {image}: {id}, pulled earlier; its registry cannot be reached now ({reason})."));
        }
        if image.contains('@') {
            let reason = format!("its registry cannot be reached ({reason}), and only the image itself has that digest");
            return Err(BaseError::Missing { image: image.to_owned(), reason });
        }
        let stand_in = format!("{STAND_IN}:{}", &self.checksum[..12]);
        if find(sandbox, &stand_in, stop).await?.is_none() {
            let imported = sandbox.docker(&["import", "--change", SEARCH_PATH, BASE_ARCHIVE, &stand_in], stop).await?;
            succeed("import", imported)?;
        }
        succeed("tag", sandbox.docker(&["tag", &stand_in, image], stop).await?)?;
        Ok(format!("Base image {image}: Hearth's stand-in, made of Debian packages, because its registry cannot be reached ({reason})."))
    }
}

/// An image's name without tag and digest.
fn repository_of(image: &str) -> &str {
    let repository = image.split('@').next().unwrap_or(image);
    // A colon before a slash belongs to the registry's port.
    match repository.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => repository,
    }
}

/// An image that the store has.
struct Found {
    id: String,
    is_stand_in: bool,
}

async fn find(sandbox: &Sandbox, image: &str, stop: &Stop) -> Result<Option<Found>, ProcessError> {
    let inspected = sandbox.docker(&["image", "inspect", "--format", "{{.Id}} {{.RepoTags}}", image], stop).await?;
    let text = String::from_utf8_lossy(&inspected.stdout).into_owned();
    let found = text.trim().split_once(' ').map(|(id, names)| Found { id: id.to_owned(), is_stand_in: names.contains(STAND_IN) });
    Ok(found.filter(|_| inspected.status.success()))
}

/// Pulls an image, or says why not.
async fn pull(sandbox: &Sandbox, image: &str, stop: &Stop) -> Result<Result<(), String>, ProcessError> {
    let limit = Stop::after(PULL);
    let limit = Stop { cancel: stop.cancel.clone(), deadline: stop.deadline.min(limit.deadline) };
    let pulled = sandbox.docker(&["pull", "--quiet", image], &limit).await?;
    if pulled.status.success() {
        return Ok(Ok(()));
    }
    let reason = pulled.stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it gave no reason");
    let reason = reason.trim_start_matches("Error response from daemon: ").trim();
    Ok(Err(reason.to_owned()))
}

fn succeed(verb: &'static str, ran: Captured) -> Result<(), BaseError> {
    if ran.status.success() { Ok(()) } else { Err(BaseError::Failed { verb, stderr: ran.stderr }) }
}

impl Unreachable {
    fn registry(image: &str) -> &str {
        image.split('/').next().unwrap_or(image)
    }

    fn recent(&self, image: &str) -> Option<String> {
        let known = self.0.lock().expect("nothing panics while it is locked");
        known.get(Self::registry(image)).filter(|(since, _)| since.elapsed() < UNREACHABLE).map(|(_, reason)| reason.clone())
    }

    fn note(&self, image: &str, reason: String) -> String {
        let mut known = self.0.lock().expect("nothing panics while it is locked");
        known.insert(Self::registry(image).to_owned(), (Instant::now(), reason.clone()));
        reason
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_managed_any_tag_or_digest_of_the_repository() {
        let names = ["public.ecr.aws/lambda/microvms".to_owned(), "localhost:5000/base".to_owned()];
        let base = Base { repositories: &names, checksum: "0123456789abcdef", unreachable: &Unreachable::default(), mirror: Some("m:5/x") };
        assert_eq!(base.source("public.ecr.aws/lambda/microvms:al2023"), "m:5/x:al2023");
        assert_eq!(base.source("localhost:5000/base"), "m:5/x");
        assert_eq!(base.source("localhost:5000/base@sha256:1"), "localhost:5000/base@sha256:1");
        for image in [
            "public.ecr.aws/lambda/microvms",
            "public.ecr.aws/lambda/microvms:al2023",
            "public.ecr.aws/lambda/microvms:a@sha256:1",
            "localhost:5000/base",
        ] {
            assert!(base.is_managed(image), "{image}");
        }
        for image in ["public.ecr.aws/lambda/python:3.12", "microvms", "public.ecr.aws/lambda/microvms/x:1", "localhost:5000/other"] {
            assert!(!base.is_managed(image), "{image}");
        }
    }
}
