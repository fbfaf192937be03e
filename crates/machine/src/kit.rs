//! The guest kit: kernel, initramfs with the guest's PID 1, the managed base image's stand-in, and the image builder, as `cargo xtask kit` makes them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::memory::data_ranges;

/// Version of the kit's layout.
pub const FORMAT: u32 = 2;

const KERNEL: &str = "vmlinuz";
const INITRAMFS: &str = "initramfs.cpio";
const BASE_IMAGE: &str = "base.tar";
const BUILDER: &str = "builder.tar";

/// A guest kit on disk.
#[derive(Debug, Clone)]
pub struct Kit {
    /// The kit's directory.
    pub dir: PathBuf,
    /// SHA-256 of the manifest, in hexadecimal: names the kit's exact contents.
    pub checksum: String,
    /// Release of the kernel.
    pub kernel_release: String,
    files: BTreeMap<String, KitFile>,
}

#[derive(Debug, Clone, Deserialize)]
struct Manifest {
    format: u32,
    kernel_release: String,
    files: BTreeMap<String, KitFile>,
}

#[derive(Debug, Clone, Deserialize)]
struct KitFile {
    bytes: u64,
    sha256: String,
}

/// The guest kit cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KitError {
    /// there is no kit
    #[error("no guest kit in {path}: run `cargo xtask kit`, or name the kit's directory in the configuration ({source})")]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// Why it could not be read.
        source: io::Error,
    },
    /// the manifest is not one
    #[error("{path} is not a guest kit's manifest ({reason}): run `cargo xtask kit`")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// a file is not what the manifest says
    #[error("{path} is damaged ({reason}): delete the kit's directory and run `cargo xtask kit`")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What differs.
        reason: String,
    },
}

impl Kit {
    /// Reads the manifest and checks that the files are there with the sizes it says.
    pub fn open(dir: &Path) -> Result<Self, KitError> {
        let path = dir.join("manifest.json");
        let text = fs::read(&path).map_err(|source| KitError::Missing { path: dir.to_owned(), source })?;
        let malformed = |reason: String| KitError::Manifest { path: path.clone(), reason };
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if manifest.format != FORMAT {
            return Err(malformed(format!("its format is {}, this version of Hearth reads {FORMAT}", manifest.format)));
        }
        for name in [KERNEL, INITRAMFS, BASE_IMAGE, BUILDER] {
            let expected = manifest.files.get(name).ok_or_else(|| malformed(format!("it does not list {name}")))?.bytes;
            let path = dir.join(name);
            let found = fs::metadata(&path).map_err(|error| KitError::Damaged { path: path.clone(), reason: error.to_string() })?.len();
            if found != expected {
                return Err(KitError::Damaged { path, reason: format!("{found} bytes instead of {expected}") });
            }
        }
        let checksum = hex(&Sha256::digest(&text));
        Ok(Self { dir: dir.to_owned(), checksum, kernel_release: manifest.kernel_release, files: manifest.files })
    }

    /// Checks the files that machines are booted with against their checksums. Reads some ten megabytes.
    pub fn verify(&self) -> Result<(), KitError> {
        for name in [KERNEL, INITRAMFS] {
            let path = self.dir.join(name);
            let damaged = |reason: String| KitError::Damaged { path: path.clone(), reason };
            let found = File::open(&path).and_then(sha256).map_err(|error| damaged(error.to_string()))?;
            if found != self.files[name].sha256 {
                return Err(damaged("its checksum differs".to_owned()));
            }
        }
        Ok(())
    }

    /// Kernel image.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(KERNEL)
    }

    /// Initial file system with the guest's PID 1.
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join(INITRAMFS)
    }

    /// Root file system of the managed base image's stand-in, and its checksum.
    pub fn base_image(&self) -> (PathBuf, &str) {
        self.archive(BASE_IMAGE)
    }

    /// Root file system of the image builder, and its checksum.
    pub fn builder(&self) -> (PathBuf, &str) {
        self.archive(BUILDER)
    }

    fn archive(&self, name: &str) -> (PathBuf, &str) {
        (self.dir.join(name), &self.files[name].sha256)
    }
}

/// SHA-256 of what a reader yields, in hexadecimal.
pub(crate) fn sha256(mut reader: impl io::Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut reader, &mut hasher)?;
    Ok(hex(&hasher.finalize()))
}

/// SHA-256 of the parts of a file that are not holes, each with its offset before it, in hexadecimal: a sparse file of many gigabytes costs
/// only what it holds.
pub(crate) fn sha256_data(file: &File) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for (start, end) in data_ranges(file)? {
        hasher.update(start.to_le_bytes());
        let mut position = start;
        while position < end {
            let wanted = usize::try_from(end - position).unwrap_or(usize::MAX).min(buffer.len());
            let read = file.read_at(&mut buffer[..wanted], position)?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            position += read as u64;
        }
    }
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kit(dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        let mut files = serde_json::Map::new();
        for name in [KERNEL, INITRAMFS, BASE_IMAGE, BUILDER] {
            fs::write(dir.join(name), name).unwrap();
            let entry = serde_json::json!({"bytes": name.len(), "sha256": sha256(name.as_bytes()).unwrap()});
            files.insert(name.to_owned(), entry);
        }
        let manifest = serde_json::json!({"format": FORMAT, "kernel_release": "6.1.0", "files": files});
        fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
    }

    #[test]
    fn a_damaged_kit_is_noticed() {
        let dir = std::env::temp_dir().join(format!("hearth-kit-{}", uuid::Uuid::new_v4()));
        assert!(matches!(Kit::open(&dir), Err(KitError::Missing { .. })));
        kit(&dir);
        Kit::open(&dir).unwrap().verify().unwrap();
        fs::write(dir.join(KERNEL), "vmlinux").unwrap();
        assert!(matches!(Kit::open(&dir).unwrap().verify(), Err(KitError::Damaged { .. })));
        fs::write(dir.join(KERNEL), "short").unwrap();
        assert!(matches!(Kit::open(&dir), Err(KitError::Damaged { .. })));
        fs::write(dir.join("manifest.json"), "{}").unwrap();
        assert!(matches!(Kit::open(&dir), Err(KitError::Manifest { .. })));
        fs::remove_dir_all(&dir).unwrap();
    }
}
