//! One file with every certificate authority that a client needs: AWS clients take a single `AWS_CA_BUNDLE`, and must reach both the
//! endpoints and the rest of the world with it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{ca::LocalCa, files};

/// Where systems keep their bundle: Debian and Alpine, Fedora, SUSE, others.
const SYSTEM_BUNDLES: &[&str] =
    &["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem"];

/// The system's bundle, if it has one where it is usually kept.
pub fn system_bundle() -> Option<PathBuf> {
    SYSTEM_BUNDLES.iter().map(PathBuf::from).find(|path| path.is_file())
}

/// Writes the system's certificate authorities and ours into one file. Without a system bundle it holds only ours.
pub fn write_bundle(system: Option<&Path>, ca: &LocalCa, into: &Path) -> io::Result<()> {
    let mut bundle = system.map(fs::read).transpose()?.unwrap_or_default();
    if !bundle.is_empty() && !bundle.ends_with(b"\n") {
        bundle.push(b'\n');
    }
    bundle.extend_from_slice(ca.certificate_pem().as_bytes());
    files::replace(into, 0o644, &bundle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_follow_the_system_s() {
        let temp = tempfile::tempdir().unwrap();
        let ca = LocalCa::load_or_create(&temp.path().join("ca"), "localhost").unwrap();
        let system = temp.path().join("system.pem");
        fs::write(&system, "# without a last newline").unwrap();
        let into = temp.path().join("ca-bundle.pem");
        for _ in 0..2 {
            write_bundle(Some(&system), &ca, &into).unwrap();
            assert_eq!(fs::read_to_string(&into).unwrap(), format!("# without a last newline\n{}", ca.certificate_pem()));
        }
        write_bundle(None, &ca, &into).unwrap();
        assert_eq!(fs::read_to_string(&into).unwrap(), ca.certificate_pem());
    }
}
