//! Makes the guest kit: the distribution's kernel, an initramfs with the guest's PID 1 and the modules it needs, the
//! managed base image's stand-in, and the image builder's root file system.
//!
//! Each file is made again only when what it is made from has changed: the fingerprints of the inputs are kept beside the kit. A new kit
//! is put together in a directory of its own and takes the old one's place at once.

mod base;
mod builder;
mod cpio;
mod guest;
mod kernel;
mod modules;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    thread,
    time::Instant,
};

use anyhow::{Context, Result};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::kernel::{Kernel, Package};

/// Version of the kit's layout, as the manifest names it.
const FORMAT: u32 = 2;
/// Version of how the files are made: another number makes them all again.
const RECIPE: u32 = 1;

const VMLINUZ: &str = "vmlinuz";
const INITRAMFS: &str = "initramfs.cpio";
const BASE: &str = "base.tar";
const BUILDER: &str = "builder.tar";
const MANIFEST: &str = "manifest.json";
const INPUTS: &str = "inputs.json";

/// A kit that is there and complete.
#[derive(Debug)]
pub struct Kit {
    /// The kit's directory.
    pub dir: PathBuf,
    /// Release of its kernel.
    pub kernel_release: String,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    kernel_release: String,
    files: BTreeMap<String, Entry>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    sha256: String,
}

/// Fingerprint of what each file was made from.
type Inputs = BTreeMap<String, String>;

/// Makes the kit in `out` unless it is there. What was downloaded and compiled for it is kept beside it.
pub fn ensure(out: &Path) -> Result<Kit> {
    let target = out.parent().context("the kit's directory has no parent")?;
    fs::create_dir_all(target).with_context(|| format!("creating {}", target.display()))?;
    let _lock = lock(&target.join("kit.lock"))?;

    // Nearly all of the time of a run that finds everything made is spent here.
    let (package, sources, programs) = thread::scope(|scope| {
        let package = scope.spawn(Package::find);
        let sources = scope.spawn(base::Sources::find);
        let programs = guest::build(&target.join("kit-guest"));
        (package.join().expect("no panic in it"), sources.join().expect("no panic in it"), programs)
    });
    let (package, guest::Programs { guest, standin }) = (package?, programs?);
    // On a fresh machine, apt's lists have only just come with the search for the kernel.
    let sources = sources.or_else(|_| base::Sources::find())?;
    let builder = builder::Recipe::new(&sources)?;
    let wanted = Inputs::from([
        (VMLINUZ.to_owned(), fingerprint(&[&package.identity()])),
        (INITRAMFS.to_owned(), fingerprint(&[&package.identity(), &checksum(&guest)?.sha256, &modules::WANTED.join(" ")])),
        (BUILDER.to_owned(), fingerprint(&[&builder.identity(), &package.identity(), &modules::FOR_BUILDER.join(" ")])),
        (BASE.to_owned(), fingerprint(&[&sources.identity(&standin)?])),
    ]);
    let present = Present::read(out);
    if let Some(kit) = present.complete(&wanted) {
        return Ok(kit);
    }

    let new = tempfile::Builder::new().prefix(".kit-").tempdir_in(target).context("making a directory for the new kit")?;
    let mut unpacked = None;
    let mut kernel = || -> Result<Kernel> {
        match &unpacked {
            Some(kernel) => Ok(Kernel::clone(kernel)),
            None => Ok(unpacked.insert(package.unpack(&target.join("kit-cache"))?).clone()),
        }
    };
    for (name, inputs) in &wanted {
        let file = new.path().join(name);
        if present.keep(name, inputs, &file)? {
            continue;
        }
        let started = Instant::now();
        match name.as_str() {
            VMLINUZ => kernel()?.copy_image(&file)?,
            INITRAMFS => write_initramfs(&file, &guest, &kernel()?)?,
            BUILDER => builder.build(&file, &kernel()?)?,
            _ => sources.build(&file, &standin)?,
        }
        println!("made the kit's {name} in {:.1} s", started.elapsed().as_secs_f64());
    }
    let kernel_release = package.release().to_owned();
    let files = wanted.keys().map(|name| Ok((name.clone(), checksum(&new.path().join(name))?))).collect::<Result<_>>()?;
    write_json(&new.path().join(MANIFEST), &Manifest { format: FORMAT, kernel_release: kernel_release.clone(), files })?;
    write_json(&new.path().join(INPUTS), &wanted)?;
    replace(out, new)?;
    Ok(Kit { dir: out.to_owned(), kernel_release })
}

/// The kit that is there already, as far as it is sound.
struct Present {
    dir: PathBuf,
    manifest: Option<Manifest>,
    inputs: Inputs,
}

impl Present {
    fn read(dir: &Path) -> Self {
        let manifest = read_json(&dir.join(MANIFEST)).filter(|manifest: &Manifest| manifest.format == FORMAT);
        Self { dir: dir.to_owned(), manifest, inputs: read_json(&dir.join(INPUTS)).unwrap_or_default() }
    }

    /// The whole kit, if every file is what is wanted.
    fn complete(&self, wanted: &Inputs) -> Option<Kit> {
        let manifest = self.manifest.as_ref()?;
        let sound = wanted.iter().all(|(name, inputs)| self.sound(name, inputs));
        sound.then(|| Kit { dir: self.dir.clone(), kernel_release: manifest.kernel_release.clone() })
    }

    /// Whether a file was made from these inputs and has not changed since.
    fn sound(&self, name: &str, inputs: &str) -> bool {
        let entry = self.manifest.as_ref().and_then(|manifest| manifest.files.get(name));
        self.inputs.get(name).is_some_and(|present| present == inputs)
            && entry.is_some_and(|entry| checksum(&self.dir.join(name)).is_ok_and(|actual| actual == *entry))
    }

    /// Takes a file over into the new kit if it can stay.
    fn keep(&self, name: &str, inputs: &str, file: &Path) -> Result<bool> {
        let sound = self.sound(name, inputs);
        if sound {
            fs::hard_link(self.dir.join(name), file).with_context(|| format!("keeping the kit's {name}"))?;
        }
        Ok(sound)
    }
}

/// Two chores at a time would make the same kit twice.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    if file.try_lock().is_err() {
        println!("waiting for another chore that makes the guest kit");
        file.lock().with_context(|| format!("locking {}", path.display()))?;
    }
    Ok(file)
}

/// Puts the finished directory in the old one's place.
fn replace(out: &Path, new: tempfile::TempDir) -> Result<()> {
    let doing = || format!("moving the new kit to {}", out.display());
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(new.path(), mode).with_context(doing)?;
    if out.exists() {
        // The old kit is now the temporary directory, and goes with it.
        renameat2(AT_FDCWD, new.path(), AT_FDCWD, out, RenameFlags::RENAME_EXCHANGE).with_context(doing)
    } else {
        fs::rename(new.keep(), out).with_context(doing)
    }
}

/// The archive that the kernel unpacks into its first root: `/init`, `/modules/*.ko` and the order to insert them in.
fn write_initramfs(file: &Path, guest: &Path, kernel: &Kernel) -> Result<()> {
    let doing = || format!("writing {}", file.display());
    let mut archive = cpio::Writer::new(io::BufWriter::new(File::create(file).with_context(doing)?));
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    archive.file("init", 0o755, &read(guest)?).with_context(doing)?;
    archive.directory("modules").with_context(doing)?;
    let mut order = String::new();
    for module in kernel.modules(modules::WANTED)? {
        let name = module.file_name().and_then(|name| name.to_str()).context("a kernel module without a name")?;
        archive.file(&format!("modules/{name}"), 0o644, &read(&module)?).with_context(doing)?;
        order.push_str(name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes()).with_context(doing)?;
    archive.finish().and_then(|mut file| file.flush()).with_context(doing)
}

/// Names a set of inputs.
fn fingerprint(inputs: &[&str]) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("recipe {RECIPE}\n"));
    for input in inputs {
        // The length keeps neighbours apart.
        hash.update(format!("{}\n{input}\n", input.len()));
    }
    format!("{:x}", hash.finalize())
}

fn checksum(path: &Path) -> Result<Entry> {
    let doing = || format!("reading {}", path.display());
    let mut hash = Sha256::new();
    let bytes = io::copy(&mut File::open(path).with_context(doing)?, &mut hash).with_context(doing)?;
    Ok(Entry { bytes, sha256: format!("{:x}", hash.finalize()) })
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kit(dir: &Path, contents: &str) -> Inputs {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(BASE), contents).unwrap();
        let files = BTreeMap::from([(BASE.to_owned(), checksum(&dir.join(BASE)).unwrap())]);
        let inputs = Inputs::from([(BASE.to_owned(), "made from this".to_owned())]);
        write_json(&dir.join(MANIFEST), &Manifest { format: FORMAT, kernel_release: "6.1".into(), files }).unwrap();
        write_json(&dir.join(INPUTS), &inputs).unwrap();
        inputs
    }

    #[test]
    fn a_sound_kit_is_used_and_a_damaged_one_is_not() {
        let scratch = tempfile::tempdir().unwrap();
        let wanted = kit(scratch.path(), "base");
        assert_eq!(Present::read(scratch.path()).complete(&wanted).unwrap().kernel_release, "6.1");
        let other = Inputs::from([(BASE.to_owned(), "made from that".to_owned())]);
        assert!(Present::read(scratch.path()).complete(&other).is_none());
        fs::write(scratch.path().join(BASE), "bass").unwrap();
        assert!(Present::read(scratch.path()).complete(&wanted).is_none());
        assert!(Present::read(&scratch.path().join("nowhere")).complete(&wanted).is_none());
    }

    #[test]
    fn a_new_kit_takes_the_place_of_the_old() {
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("kit");
        for contents in ["first", "second"] {
            let new = tempfile::tempdir_in(scratch.path()).unwrap();
            kit(new.path(), contents);
            replace(&out, new).unwrap();
            assert_eq!(fs::read_to_string(out.join(BASE)).unwrap(), contents);
        }
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn fingerprints_keep_inputs_apart() {
        assert_ne!(fingerprint(&["ab", "c"]), fingerprint(&["a", "bc"]));
    }
}
