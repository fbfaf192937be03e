//! The managed base image, brought into buildah's storage as an OCI layout around the guest kit's archive.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::storage::{Storage, StorageError};

/// Name of the layout's directory, and what buildah makes of it.
const LAYOUT: &str = "base";
const LAYOUT_NAME: &str = "localhost/base:latest";

const EPOCH: &str = "1970-01-01T00:00:00Z";
const SEARCH_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The base image cannot be imported.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BaseError {
    #[error("reading the base image {path}: {source}")]
    Read { path: String, source: io::Error },
    #[error("writing the base image's layout: {0}")]
    Layout(#[source] io::Error),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("buildah imported the base image as {found} instead of {expected}")]
    WrongImage { found: String, expected: String },
}

/// An archive's checksum, and how to see without reading it that the archive is still the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    /// SHA-256 in hexadecimal.
    sha256: String,
}

/// Makes each of `names` stand for the image in `archive`. Does nothing if they do already.
pub(crate) async fn ensure(storage: &Storage, cache_dir: &Path, archive: &Path, names: &[String]) -> Result<(), BaseError> {
    let (seen, cache) = (archive.to_owned(), cache_dir.join("base.json"));
    let seen = tokio::task::spawn_blocking(move || identify(&seen, &cache)).await.expect("hashing does not panic");
    let seen = seen.map_err(|source| BaseError::Read { path: archive.display().to_string(), source })?;
    let image = Image::of(&seen);
    let mut missing = Vec::new();
    for name in names {
        if storage.image_id(name).await?.as_deref() != Some(image.id.as_str()) {
            missing.push(name);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let started = std::time::Instant::now();
    let dir = tempfile::tempdir_in(storage.scratch()).map_err(BaseError::Layout)?;
    image.write_layout(&dir.path().join(LAYOUT), archive).map_err(BaseError::Layout)?;
    let found = storage.import(dir.path(), LAYOUT).await?;
    if found != image.id {
        return Err(BaseError::WrongImage { found, expected: image.id });
    }
    for name in missing {
        storage.tag(&image.id, name).await?;
    }
    storage.untag(LAYOUT_NAME).await?;
    tracing::info!(bytes = seen.bytes, ms = started.elapsed().as_millis(), "imported the managed base image");
    Ok(())
}

/// The archive's checksum, from `cache` while the archive has not changed. Blocks.
fn identify(archive: &Path, cache: &Path) -> io::Result<Seen> {
    let mut file = File::open(archive)?;
    let metadata = file.metadata()?;
    let (inode, bytes, modified) = (metadata.ino(), metadata.len(), (metadata.mtime(), metadata.mtime_nsec()));
    if let Some(seen) = fs::read(cache).ok().and_then(|text| serde_json::from_slice::<Seen>(&text).ok())
        && (seen.inode, seen.bytes, seen.modified) == (inode, bytes, modified)
    {
        return Ok(seen);
    }
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
    }
    let seen = Seen { inode, bytes, modified, sha256: format!("{:x}", hasher.finalize()) };
    fs::write(cache, serde_json::to_vec(&seen)?)?;
    Ok(seen)
}

/// The image: its documents follow from the archive alone, so the same archive always has the same id.
#[derive(Debug)]
struct Image {
    /// SHA-256 of the configuration, which is how buildah names an image.
    id: String,
    layer: String,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

impl Image {
    fn of(archive: &Seen) -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let layer = format!("sha256:{}", archive.sha256);
        // No command: a Dockerfile that forgets its own shall fail at build time.
        let config = document(&json!({
            "created": EPOCH, "architecture": architecture, "os": "linux", "config": { "Env": [SEARCH_PATH] },
            "rootfs": { "type": "layers", "diff_ids": [layer] },
            "history": [{ "created": EPOCH, "created_by": "managed base image" }],
        }));
        let id = sha256(&config);
        let manifest = document(&json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json", "digest": format!("sha256:{id}"), "size": config.len(),
            },
            "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": archive.bytes }],
        }));
        Self { id, layer: archive.sha256.clone(), config, manifest }
    }

    /// Writes an OCI layout whose one layer is a link to the archive.
    fn write_layout(&self, dir: &Path, archive: &Path) -> io::Result<()> {
        let blobs = dir.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        fs::write(blobs.join(&self.id), &self.config)?;
        let manifest = sha256(&self.manifest);
        fs::write(blobs.join(&manifest), &self.manifest)?;
        symlink(fs::canonicalize(archive)?, blobs.join(&self.layer))?;
        fs::write(dir.join("oci-layout"), document(&json!({ "imageLayoutVersion": "1.0.0" })))?;
        let index = json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": format!("sha256:{manifest}"), "size": self.manifest.len(),
            }],
        });
        fs::write(dir.join("index.json"), document(&index))
    }
}

fn document(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_remembered_until_the_archive_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (archive, cache) = (dir.path().join("base.tar"), dir.path().join("base.json"));
        fs::write(&archive, b"one").unwrap();
        let one = identify(&archive, &cache).unwrap();
        assert_eq!(one.sha256, sha256(b"one"));

        let remembered = Seen { sha256: "remembered".to_owned(), ..one };
        fs::write(&cache, serde_json::to_vec(&remembered).unwrap()).unwrap();
        assert_eq!(identify(&archive, &cache).unwrap(), remembered);

        fs::write(&archive, b"other").unwrap();
        assert_eq!(identify(&archive, &cache).unwrap().sha256, sha256(b"other"));
    }

    #[test]
    fn another_archive_is_another_image() {
        let seen = |sha256: &str| Seen { inode: 1, bytes: 2, modified: (3, 4), sha256: sha256.to_owned() };
        assert_eq!(Image::of(&seen("aa")).id, Image::of(&seen("aa")).id);
        assert_ne!(Image::of(&seen("aa")).id, Image::of(&seen("bb")).id);
    }
}
