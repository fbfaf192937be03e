//! What there is: the packages of the Debian release that the image is made of, and those that are installed.

use std::path::Path;

/// Questions about packages and files. Names are Debian's.
pub trait Suite {
    /// Whether the suite has a real package of this name.
    fn has(&self, package: &str) -> bool;

    /// Names of the suite's packages that begin with this, sorted.
    fn starting_with(&self, prefix: &str) -> Vec<&str>;

    /// The version that an installation would give.
    fn candidate(&self, package: &str) -> Option<String>;

    /// The version that is installed.
    fn installed(&self, package: &str) -> Option<String>;

    /// Names of what is installed, sorted.
    fn all_installed(&self) -> Vec<String>;

    fn exists(&self, path: &Path) -> bool;
}

/// The architecture as RPM names it.
pub const ARCHITECTURE: &str = std::env::consts::ARCH;

/// A Debian version without epoch and revision: what the software itself calls its version.
pub fn upstream(version: &str) -> &str {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    let version = version.rsplit_once('-').map_or(version, |(version, _)| version);
    version.split(['+', '~']).next().unwrap_or(version)
}

/// The first number of a version.
pub fn major(version: &str) -> Option<u64> {
    let version = upstream(version);
    let digits = version.find(|character: char| !character.is_ascii_digit()).unwrap_or(version.len());
    version[..digits].parse().ok()
}

#[cfg(test)]
pub mod testing {
    use std::collections::BTreeMap;

    use super::*;

    /// A suite of these packages and versions; those with a `*` behind the version are installed.
    pub struct Fake(BTreeMap<String, (String, bool)>);

    impl Fake {
        pub fn new(packages: &[(&str, &str)]) -> Self {
            let package =
                |&(name, version): &(&str, &str)| (name.to_owned(), (version.trim_end_matches('*').to_owned(), version.ends_with('*')));
            Self(packages.iter().map(package).collect())
        }
    }

    impl Suite for Fake {
        fn has(&self, package: &str) -> bool {
            self.0.contains_key(package)
        }

        fn starting_with(&self, prefix: &str) -> Vec<&str> {
            self.0.keys().map(String::as_str).filter(|name| name.starts_with(prefix)).collect()
        }

        fn candidate(&self, package: &str) -> Option<String> {
            self.0.get(package).map(|(version, _)| version.clone())
        }

        fn installed(&self, package: &str) -> Option<String> {
            self.0.get(package).filter(|(_, installed)| *installed).map(|(version, _)| version.clone())
        }

        fn all_installed(&self) -> Vec<String> {
            self.0.iter().filter(|(_, (_, installed))| *installed).map(|(name, _)| name.clone()).collect()
        }

        fn exists(&self, path: &Path) -> bool {
            path == Path::new("/usr/bin/find")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_leaves_epoch_revision_and_repacking_out() {
        for (version, expected) in [
            ("1:3.1", "3.1"),
            ("18.20.4+dfsg-1~deb12u3", "18.20.4"),
            ("3.11.2-1+b1", "3.11.2"),
            ("2:8.2-1-2", "8.2-1"),
            ("9.2.0~ds1-1", "9.2.0"),
        ] {
            assert_eq!(upstream(version), expected);
        }
        assert_eq!(major("1:3.1"), Some(3));
        assert_eq!(major("17.0.21.1+2-1"), Some(17));
        assert_eq!(major("beta"), None);
    }
}
