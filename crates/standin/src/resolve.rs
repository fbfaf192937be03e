//! From what a Dockerfile asks dnf for to Debian packages: the table first, then Debian's own names, then rules.

use std::path::{Path, PathBuf};

use crate::{
    glob,
    suite::{ARCHITECTURE, Suite, major, upstream},
    table::{Choice, Entry, Item, Link, Meaning, Table},
};

/// A pattern that matches more packages than this is not meant.
const MOST_MATCHES: usize = 100;

/// What stands for a package that was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// As it was asked for.
    pub asked: String,
    /// Debian packages, the most important first. Empty: there is nothing to do.
    pub packages: Vec<String>,
    pub links: Vec<Link>,
    /// Languages whose locales are wanted.
    pub locales: Option<String>,
    /// A file that was asked for by its path.
    pub file: Option<PathBuf>,
    pub note: Option<String>,
}

/// A package that is not to be had.
#[derive(Debug, PartialEq, Eq)]
pub struct Missing {
    pub asked: String,
    pub reason: Reason,
}

/// Why a package is not to be had.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    #[error("neither the table nor Debian has a package of this name")]
    Unknown,
    #[error("{0}")]
    Unavailable(String),
    #[error("it would be Debian's {wanted}, which this release does not have{}", hint(.note))]
    NotInSuite { wanted: String, note: Option<String> },
    #[error("Debian's {package} is version {has}")]
    Version { package: String, has: String },
    #[error("packages of this architecture are not to be had on {ARCHITECTURE}")]
    Architecture,
    #[error("there are no groups: name the packages, for Development Tools for instance gcc, gcc-c++ and make")]
    Group,
    #[error("RPM packages cannot be installed on Debian")]
    RpmFile,
    #[error("no package is known that has this file")]
    File,
    #[error("it matches more than {MOST_MATCHES} packages")]
    TooMany,
}

fn hint(note: &Option<String>) -> String {
    note.as_ref().map(|note| format!("; {note}")).unwrap_or_default()
}

/// Looks names up.
pub struct Resolver<'a> {
    pub table: &'a Table,
    pub suite: &'a dyn Suite,
}

impl Resolver<'_> {
    /// What stands for a package, its version, a file or a pattern.
    pub fn resolve(&self, asked: &str) -> Result<Vec<Found>, Missing> {
        let found = self.look_up(asked);
        let found = found.map_err(|reason| Missing { asked: asked.to_owned(), reason })?;
        Ok(found
            .into_iter()
            .map(|found| Found { asked: if found.asked.is_empty() { asked.to_owned() } else { found.asked }, ..found })
            .collect())
    }

    fn look_up(&self, asked: &str) -> Result<Vec<Found>, Reason> {
        if asked.starts_with('@') {
            return Err(Reason::Group);
        }
        if asked.contains("://") || asked.ends_with(".rpm") {
            return Err(Reason::RpmFile);
        }
        if asked.starts_with('/') {
            return self.file(Path::new(asked)).map(|found| vec![found]);
        }
        let (name, foreign) = without_architecture(asked);
        let unknown = match self.name(asked) {
            Err(Reason::Unknown) if name != asked => self.name(name),
            found => found,
        };
        let unknown = match unknown {
            Ok(_) | Err(Reason::NotInSuite { .. } | Reason::Unavailable(_)) if foreign => return Err(Reason::Architecture),
            Ok(found) => return Ok(vec![found]),
            Err(Reason::Unknown) => Reason::Unknown,
            Err(other) => return Err(other),
        };
        if let Some(found) = self.version(name) {
            return found.map(|found| vec![found]);
        }
        if glob::is_pattern(name) { self.pattern(name) } else { Err(unknown) }
    }

    /// A name without version and architecture.
    fn name(&self, name: &str) -> Result<Found, Reason> {
        if let Some(entry) = self.table.find(name) {
            return self.entry(entry);
        }
        if let Some(package) = self.debian(name) {
            return Ok(Found { packages: vec![package], ..Found::default() });
        }
        self.rules(name).ok_or(Reason::Unknown)
    }

    /// Debian's own name, also with the ending that its 64-bit time brought.
    fn debian(&self, name: &str) -> Option<String> {
        [name.to_owned(), format!("{name}t64")].into_iter().find(|name| self.suite.has(name))
    }

    fn entry(&self, entry: Entry) -> Result<Found, Reason> {
        let (note, otherwise) = match &entry.note {
            Some(note) => match note.strip_prefix("else: ") {
                Some(otherwise) => (None, Some(otherwise.to_owned())),
                None => (Some(note.clone()), None),
            },
            None => (None, None),
        };
        match entry.meaning {
            Meaning::Nothing => Ok(Found { note, ..Found::default() }),
            Meaning::Unavailable => Err(Reason::Unavailable(note.unwrap_or_else(|| "Debian does not have it".to_owned()))),
            Meaning::Packages { items, links } => {
                let mut packages = Vec::new();
                for item in &items {
                    match self.item(item) {
                        Some(package) if packages.contains(&package) => {}
                        Some(package) => packages.push(package),
                        None if item.optional => {}
                        None => return Err(self.absent(item, otherwise)),
                    }
                }
                Ok(Found { packages, links, note, ..Found::default() })
            }
        }
    }

    fn item(&self, item: &Item) -> Option<String> {
        item.choices.iter().find_map(|choice| self.choice(choice))
    }

    fn choice(&self, choice: &Choice) -> Option<String> {
        let name = self.debian(&choice.name)?;
        let recent = |least| self.suite.candidate(&name).and_then(|version| major(&version)).is_some_and(|major| major >= least);
        choice.at_least.is_none_or(recent).then_some(name)
    }

    fn absent(&self, item: &Item, note: Option<String>) -> Reason {
        let words = item.choices.iter().map(|choice| match choice.at_least {
            None => choice.name.clone(),
            Some(least) => match self.suite.candidate(&choice.name) {
                Some(version) => format!("{} {least} (it has {})", choice.name, upstream(&version)),
                None => format!("{} {least}", choice.name),
            },
        });
        Reason::NotInSuite { wanted: words.collect::<Vec<_>>().join(" or "), note }
    }

    /// What Fedora's and Debian's habits of naming have in common.
    fn rules(&self, name: &str) -> Option<Found> {
        let lower = name.to_lowercase();
        let found = |packages: Vec<String>| Some(Found { packages, ..Found::default() });
        let first = |names: &[String]| names.iter().find_map(|name| self.debian(name)).map(|name| vec![name]).and_then(found);
        if let Some(language) = name.strip_prefix("glibc-langpack-") {
            let locales = Some(language.to_owned());
            return Some(Found { packages: vec!["locales".to_owned()], locales, ..Found::default() });
        }
        if let Some((capability, argument)) = name.strip_suffix(')').and_then(|name| name.split_once('(')) {
            let argument = argument.to_lowercase();
            return match capability {
                "perl" => first(&[format!("lib{}-perl", argument.replace("::", "-"))]),
                _ if capability.starts_with("python3") && capability.ends_with("dist") => first(&[format!("python3-{argument}")]),
                _ => None,
            };
        }
        if let Some((python, module)) = lower.strip_prefix("python3.").and_then(|rest| rest.split_once('-')) {
            let python = format!("python3.{python}");
            let module = self.debian(&format!("python3-{module}"))?;
            return if self.suite.has(&python) { found(vec![module, python]) } else { None };
        }
        if let Some(module) = lower.strip_prefix("perl-") {
            return first(&[format!("lib{module}-perl"), format!("lib{}-perl", module.replace("perl-", ""))]);
        }
        if let Some(gem) = lower.strip_prefix("rubygem-") {
            return first(&[format!("ruby-{gem}"), gem.to_owned()]);
        }
        if let Some(base) = lower.strip_suffix("-devel").or_else(|| lower.strip_suffix("-static")) {
            let bare = base.strip_prefix("lib").unwrap_or(base);
            return first(&[format!("{base}-dev"), format!("lib{bare}-dev"), format!("{bare}-dev")]);
        }
        if let Some(fonts) = lower.strip_suffix("-fonts") {
            return first(&[format!("fonts-{fonts}")]);
        }
        if let Some(base) = lower.strip_suffix("-docs") {
            return first(&[format!("{base}-doc")]);
        }
        let library =
            lower.strip_suffix("-libs").map_or_else(|| lower.clone(), |base| format!("lib{}", base.strip_prefix("lib").unwrap_or(base)));
        if library.starts_with("lib") {
            return first(std::slice::from_ref(&library)).or_else(|| found(vec![self.shared_library(&library)?]));
        }
        // Fedora writes many names with capitals, Debian none.
        (lower != name).then(|| self.debian(&lower)).flatten().map(|name| vec![name]).and_then(found)
    }

    /// Debian's package of a shared library: its name ends with the version of its binary interface.
    fn shared_library(&self, library: &str) -> Option<String> {
        let version = |name: &str| -> Option<Vec<u64>> {
            let rest = name.strip_prefix(library)?;
            let rest = rest.strip_suffix("t64").unwrap_or(rest);
            let rest = rest.strip_prefix('-').unwrap_or(rest);
            rest.split(['.', '-']).map(|part| part.parse().ok()).collect()
        };
        let names = self.suite.starting_with(library);
        names.into_iter().filter_map(|name| Some((version(name)?, name))).max().map(|(_, name)| name.to_owned())
    }

    /// A name with a version behind it, such as `nodejs-18*` or `python3.11-3.11.6-1.amzn2023`. The version's first number must be
    /// Debian's; the rest differs between the two distributions anyhow.
    fn version(&self, asked: &str) -> Option<Result<Found, Reason>> {
        let splits = asked.char_indices().rev().filter(|(_, character)| *character == '-').map(|(at, _)| asked.split_at(at));
        for (name, version) in splits {
            let version = version.trim_start_matches('-');
            if !version.starts_with(|character: char| character.is_ascii_digit()) || glob::is_pattern(name) {
                continue;
            }
            let found = match self.name(name) {
                Err(Reason::Unknown) => continue,
                Err(reason) => return Some(Err(reason)),
                Ok(found) => found,
            };
            // What means nothing has no version.
            let Some(package) = found.packages.first() else { return Some(Ok(found)) };
            let has = self.suite.candidate(package).or_else(|| self.suite.installed(package)).unwrap_or_default();
            let wanted = version.split_once(':').map_or(version, |(_, version)| version);
            return Some(if major(wanted).is_some() && major(wanted) == major(&has) {
                let note = (!upstream(&has).starts_with(wanted.trim_end_matches(['*', '.']))).then(|| format!("{wanted} was asked for"));
                Ok(Found { note, ..found })
            } else {
                Err(Reason::Version { package: package.clone(), has: upstream(&has).to_owned() })
            });
        }
        None
    }

    /// Every package of the table, or else of Debian, that matches.
    fn pattern(&self, pattern: &str) -> Result<Vec<Found>, Reason> {
        let names: Vec<_> = self.table.names().filter(|name| glob::matches(pattern, name)).collect();
        let known = |name: &str| self.name(name).ok().map(|found| Found { asked: name.to_owned(), ..found });
        let mut found: Vec<_> = names.into_iter().filter_map(known).collect();
        if found.is_empty() {
            let prefix = pattern.split(['*', '?', '[']).next().unwrap_or_default();
            let names = self.suite.starting_with(prefix).into_iter().filter(|name| glob::matches(pattern, name));
            found = names.map(|name| Found { asked: name.to_owned(), packages: vec![name.to_owned()], ..Found::default() }).collect();
        }
        match found.len() {
            0 => Err(Reason::Unknown),
            count if count > MOST_MATCHES => Err(Reason::TooMany),
            _ => Ok(found),
        }
    }

    /// A file by its path. Debian's lists do not say which package has a file: a command's name is taken for its package's.
    fn file(&self, path: &Path) -> Result<Found, Reason> {
        let file = Some(path.to_owned());
        if self.suite.exists(path) {
            return Ok(Found { file, ..Found::default() });
        }
        let command = path.parent().is_some_and(|directory| directory.ends_with("bin") || directory.ends_with("sbin"));
        let name = path.file_name().and_then(|name| name.to_str()).filter(|_| command).ok_or(Reason::File)?;
        let found = self.name(name).map_err(|_| Reason::File)?;
        Ok(Found { file, ..found })
    }
}

/// The name without the architecture behind it, and whether that is another than this machine's.
fn without_architecture(asked: &str) -> (&str, bool) {
    match asked.rsplit_once('.') {
        Some((name, "noarch" | "src")) => (name, false),
        Some((name, architecture)) if architecture == ARCHITECTURE => (name, false),
        Some((name, "i386" | "i486" | "i586" | "i686" | "x86_64" | "aarch64" | "ppc64le" | "s390x")) => (name, true),
        _ => (asked, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::testing::Fake;

    const TABLE: &str = "python3-devel\tpython3 python3-dev\n\
        python3.%\tpython3.% python3\telse: ask for python3\n\
        python3.%-pip\tpython3.% python3-pip /usr/bin/pip3.%=/usr/bin/pip3\n\
        nodejs\tnodejs npm\n\
        nodejs%\tnodejs>=% npm\telse: ask for nodejs\n\
        openssl-libs\tlibssl3\n\
        docker\tdocker.io\n\
        epel-release\t-\tEPEL's packages are looked for in Debian\n\
        kernel-devel\t!\tno headers\n\
        google-noto-*\tfonts-noto-core\n\
        php8.%-cli\tphp8.%-cli|php-cli\n\
        php-cli php-xml\tphp8.2-cli\n";

    fn suite() -> Fake {
        Fake::new(&[
            ("python3", "3.11.2-1+b1"),
            ("python3.11", "3.11.2-6"),
            ("python3-dev", "3.11.2-1+b1"),
            ("python3-pip", "23.0"),
            ("python3-requests", "2.28"),
            ("nodejs", "18.20.4+dfsg-1"),
            ("npm", "9.2.0"),
            ("libssl3t64", "3.5"),
            ("docker", "1.5"),
            ("docker.io", "20.10"),
            ("fonts-noto-core", "1"),
            ("php8.2-cli", "8.2"),
            ("php-cli", "2:8.2"),
            ("libfoo-dev", "1"),
            ("libxcomposite1", "1"),
            ("libbar1", "1"),
            ("libbar12t64", "1"),
            ("libbar12-dbg", "1"),
            ("libhttp-tiny-perl", "1"),
            ("locales", "2"),
            ("jq", "1.6-2.1"),
            ("ruby-rack", "2"),
            ("strace", "6.1"),
            ("fonts-lato", "2"),
        ])
    }

    fn resolve(asked: &str) -> Result<Vec<Found>, Missing> {
        let (table, suite) = (Table::parse(TABLE).unwrap(), suite());
        Resolver { table: &table, suite: &suite }.resolve(asked)
    }

    fn packages(asked: &str) -> String {
        let found = resolve(asked).unwrap_or_else(|missing| panic!("{missing:?}"));
        found.iter().flat_map(|found| found.packages.clone()).collect::<Vec<_>>().join(" ")
    }

    fn reason(asked: &str) -> String {
        resolve(asked).unwrap_err().reason.to_string()
    }

    #[test]
    fn resolve_known_names_give_debian_packages() {
        for (asked, expected) in [
            ("python3-devel", "python3 python3-dev"),
            ("python3-devel.x86_64", "python3 python3-dev"),
            ("python3.11", "python3.11 python3"),
            ("python3.11-pip", "python3.11 python3-pip"),
            ("python3.11-requests", "python3-requests python3.11"),
            ("python3-requests", "python3-requests"),
            ("python3dist(requests)", "python3-requests"),
            ("nodejs18", "nodejs npm"),
            ("openssl-libs", "libssl3t64"),
            ("docker", "docker.io"),
            ("epel-release", ""),
            ("google-noto-sans-fonts", "fonts-noto-core"),
            ("php8.3-cli", "php-cli"),
            ("jq", "jq"),
            ("jq.noarch", "jq"),
            ("foo-devel", "libfoo-dev"),
            ("libfoo-devel", "libfoo-dev"),
            ("libXcomposite", "libxcomposite1"),
            ("bar-libs", "libbar12t64"),
            ("libbar", "libbar12t64"),
            ("perl-HTTP-Tiny", "libhttp-tiny-perl"),
            ("perl(HTTP::Tiny)", "libhttp-tiny-perl"),
            ("rubygem-rack", "ruby-rack"),
            ("lato-fonts", "fonts-lato"),
            ("/usr/bin/strace", "strace"),
            ("/usr/bin/find", ""),
        ] {
            assert_eq!(packages(asked), expected, "{asked}");
        }
    }

    #[test]
    fn resolve_unknown_names_say_why() {
        for (asked, expected) in [
            ("no-such-thing", "neither the table nor Debian"),
            ("no-such-thing-devel", "neither the table nor Debian"),
            ("python3.12", "Debian's python3.12, which this release does not have; ask for python3"),
            ("python3.12-requests", "neither"),
            ("nodejs20", "Debian's nodejs 20 (it has 18.20.4), which this release does not have; ask for nodejs"),
            ("kernel-devel", "no headers"),
            ("jq.i686", "architecture"),
            ("@development-tools", "groups"),
            ("@Development Tools", "groups"),
            ("./tool.rpm", "RPM packages"),
            ("https://example.com/tool", "RPM packages"),
            ("/etc/tool.conf", "no package is known"),
            ("/usr/bin/no-such-thing", "no package is known"),
            ("zz*", "neither"),
        ] {
            let reason = reason(asked);
            assert!(reason.contains(expected), "{asked}: {reason}");
        }
    }

    #[test]
    fn resolve_version_of_another_major_is_refused() {
        assert_eq!(packages("nodejs-18*"), "nodejs npm");
        assert_eq!(packages("nodejs-1:18.20.8-1.amzn2023.0.1.x86_64"), "nodejs npm");
        assert_eq!(packages("python3.11-3.11.6"), "python3.11 python3");
        let reason = reason("nodejs-20.*");
        assert_eq!(reason, "Debian's nodejs is version 18.20.4");
        let note = |asked: &str| resolve(asked).unwrap()[0].note.clone();
        assert_eq!(note("python3.11-3.11.6").as_deref(), Some("3.11.6 was asked for"));
        assert_eq!(note("jq-1.6"), None);
        assert_eq!(note("nodejs-18*"), None);
    }

    #[test]
    fn resolve_patterns_take_the_tables_names_first() {
        let names = |asked: &str| resolve(asked).unwrap().into_iter().map(|found| found.asked).collect::<Vec<_>>();
        assert_eq!(names("php-*"), ["php-cli", "php-xml"]);
        assert_eq!(names("libbar*"), ["libbar1", "libbar12-dbg", "libbar12t64"]);
    }

    #[test]
    fn resolve_links_locales_and_files_are_kept_for_later() {
        let pip = &resolve("python3.11-pip").unwrap()[0];
        assert_eq!(pip.links[..], [Link { path: "/usr/bin/pip3.11".into(), target: "/usr/bin/pip3".into() }]);
        assert_eq!(resolve("glibc-langpack-de").unwrap()[0].locales.as_deref(), Some("de"));
        assert_eq!(resolve("/usr/bin/strace").unwrap()[0].file.as_deref(), Some(Path::new("/usr/bin/strace")));
    }
}
