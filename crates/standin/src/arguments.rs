//! The command line of dnf, microdnf and yum: one grammar, whose options may stand anywhere.

/// What is asked for, and how.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    pub options: Options,
    /// The command's words as they are written: its name, then its operands.
    pub words: Vec<String>,
}

/// Options that make a difference here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What the question whether to go on is answered with. `None`: it is asked.
    pub assume: Option<bool>,
    pub quiet: bool,
    pub help: bool,
    pub version: bool,
    /// Use the lists that are there.
    pub cache_only: bool,
    /// Fetch the lists again.
    pub refresh: bool,
    /// A package that cannot be found is an error.
    pub strict: bool,
    /// Install what packages recommend, too.
    pub weak_dependencies: bool,
    /// Packages that are in the way may be removed.
    pub erase: bool,
    /// Keep dependencies that nothing needs any more.
    pub keep_dependencies: bool,
    /// Patterns of packages that must not change.
    pub exclude: Vec<String>,
    /// What has no effect here, and ought to be said.
    pub remarks: Vec<String>,
    /// What `list` lists.
    pub listed: Option<Listed>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            assume: None,
            quiet: false,
            help: false,
            version: false,
            cache_only: false,
            refresh: false,
            strict: true,
            weak_dependencies: false,
            erase: false,
            keep_dependencies: false,
            exclude: Vec::new(),
            remarks: Vec::new(),
            listed: None,
        }
    }
}

/// What `list` lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listed {
    All,
    Installed,
    Available,
    Upgrades,
}

/// The command line cannot be carried out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    #[error("unrecognized arguments: {0}")]
    Unknown(String),
    #[error("argument {0}: expected one argument")]
    NoValue(String),
    #[error("argument {0}: ignored explicit argument")]
    UnwantedValue(String),
    #[error("{0} is not supported by the stand-in for dnf: {1}")]
    Refused(String, &'static str),
    #[error("{0}: expected true or false instead of {1}")]
    NoBoolean(String, String),
}

/// What an option does.
#[derive(Clone, Copy)]
enum Effect {
    /// Sets something.
    Set(fn(&mut Options)),
    /// Takes a value.
    Take(fn(&mut Options, &str) -> Result<(), ArgumentError>),
    /// Has no meaning here.
    Ignore,
    /// Takes a value that has no meaning here.
    IgnoreValue,
    Refuse(&'static str),
    /// Takes a value and is refused.
    RefuseValue(&'static str),
}

use Effect::{Ignore, IgnoreValue, Refuse, RefuseValue, Set, Take};

const NO_RPM: &str = "there are no RPM packages to keep";
const NO_ADVISORIES: &str = "Debian does not know Amazon Linux's advisories";

/// All options, with their short names.
const OPTIONS: &[(&[&str], Effect)] = &[
    (&["-y", "--assumeyes"], Set(|options| options.assume = Some(true))),
    (&["--assumeno"], Set(|options| options.assume = Some(false))),
    (&["-q", "--quiet"], Set(|options| options.quiet = true)),
    (&["-h", "--help", "--help-cmd"], Set(|options| options.help = true)),
    (&["--version"], Set(|options| options.version = true)),
    (&["-C", "--cacheonly"], Set(|options| options.cache_only = true)),
    (&["--refresh"], Set(|options| options.refresh = true)),
    (&["--skip-broken", "--skip-unavailable"], Set(|options| options.strict = false)),
    (&["--allowerasing"], Set(|options| options.erase = true)),
    (&["--noautoremove"], Set(|options| options.keep_dependencies = true)),
    (&["--installed"], Set(|options| options.listed = Some(Listed::Installed))),
    (&["--available"], Set(|options| options.listed = Some(Listed::Available))),
    (&["--all"], Set(|options| options.listed = Some(Listed::All))),
    (&["--upgrades", "--updates"], Set(|options| options.listed = Some(Listed::Upgrades))),
    (&["-x", "--exclude", "--excludepkgs"], Take(exclude)),
    (&["--setopt"], Take(set_option)),
    // Manual pages are left out anyhow. Packages are checked by their archive's signature anyhow. The newest version is taken anyhow.
    (
        &["--nodocs", "-v", "--verbose", "-b", "--best", "--nobest", "--no-best", "--nogpgcheck", "--no-gpgchecks", "--noplugins", "-t"],
        Ignore,
    ),
    (&["--security", "--sec", "--bugfix", "--enhancement", "--newpackage", "--obsoletes", "--showduplicates", "--debugsolver"], Ignore),
    (&["-4", "-6", "--changelogs", "--hidden", "--raw-filelist", "--nosignature"], Ignore),
    (&["--releasever", "--enablerepo", "--disablerepo", "--repo", "--repoid", "--enable-repo", "--disable-repo"], IgnoreValue),
    (&["--enableplugin", "--disableplugin", "--disableexcludes", "--color", "--comment", "--rpmverbosity", "--sec-severity"], IgnoreValue),
    (&["-d", "--debuglevel", "-e", "--errorlevel", "-R", "--randomwait", "--arch", "--secseverity"], IgnoreValue),
    (&["--add-repo"], RefuseValue("repositories of RPM packages cannot be used")),
    (&["--set-enabled", "--set-disabled", "--enable", "--disable", "--save", "--dump"], Ignore),
    (&["--installroot"], RefuseValue("packages are installed into this image only")),
    (&["--forcearch"], RefuseValue("packages are this machine's architecture")),
    (&["--repofrompath"], RefuseValue("repositories of RPM packages cannot be used")),
    (&["-c", "--config"], RefuseValue("only /etc/dnf/dnf.conf is read")),
    (&["--downloaddir", "--destdir"], RefuseValue(NO_RPM)),
    (&["--downloadonly"], Refuse(NO_RPM)),
    (&["--advisory", "--advisories", "--cve", "--cves", "--bz", "--bzs"], RefuseValue(NO_ADVISORIES)),
    (&["--test", "--dump-main-config"], Refuse("it has no counterpart")),
];

/// Reads a command line, on top of options from the configuration file.
pub fn parse(arguments: &[String], mut options: Options) -> Result<Arguments, ArgumentError> {
    let mut words: Vec<String> = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--" {
            words.extend(rest.cloned());
            break;
        }
        if let Some(long) = argument.strip_prefix("--") {
            let (name, value) = long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value.to_owned())));
            apply(&mut options, &format!("--{name}"), value, &mut rest)?;
        } else if argument.len() > 1 && argument.starts_with('-') {
            // Letters may stand together; one that takes a value takes the rest.
            let mut letters = argument[1..].chars();
            while let Some(letter) = letters.next() {
                let name = format!("-{letter}");
                let takes = matches!(effect(&name), Some(Take(_) | IgnoreValue | RefuseValue(_)));
                let value = (takes && !letters.as_str().is_empty()).then(|| letters.as_str().trim_start_matches('=').to_owned());
                if value.is_some() {
                    letters = "".chars();
                }
                apply(&mut options, &name, value, &mut rest).map_err(|error| match error {
                    ArgumentError::Unknown(_) => ArgumentError::Unknown(argument.clone()),
                    error => error,
                })?;
            }
        } else {
            words.push(argument.clone());
        }
    }
    Ok(Arguments { options, words })
}

fn effect(name: &str) -> Option<Effect> {
    OPTIONS.iter().find(|(names, _)| names.contains(&name)).map(|(_, effect)| *effect)
}

fn apply<'a>(
    options: &mut Options,
    name: &str,
    value: Option<String>,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<(), ArgumentError> {
    let effect = effect(name).ok_or_else(|| ArgumentError::Unknown(name.to_owned()))?;
    let takes = matches!(effect, Take(_) | IgnoreValue | RefuseValue(_));
    if !takes && value.is_some() {
        return Err(ArgumentError::UnwantedValue(name.to_owned()));
    }
    // A refusal names the option, with or without its value.
    let refused = |reason| Err(ArgumentError::Refused(name.to_owned(), reason));
    match effect {
        Set(set) => set(options),
        Ignore => {}
        Refuse(reason) | RefuseValue(reason) => return refused(reason),
        Take(_) | IgnoreValue => {
            let value = value.or_else(|| rest.next().cloned()).ok_or_else(|| ArgumentError::NoValue(name.to_owned()))?;
            if let Take(take) = effect {
                return take(options, &value);
            }
        }
    }
    Ok(())
}

fn exclude(options: &mut Options, value: &str) -> Result<(), ArgumentError> {
    options.exclude.extend(value.split([',', ' ']).filter(|pattern| !pattern.is_empty()).map(str::to_owned));
    Ok(())
}

/// Settings of dnf.conf that make no difference here.
const NO_EFFECT: &[&str] = &[
    "best",
    "clean_requirements_on_remove",
    "color",
    "deltarpm",
    "debuglevel",
    "errorlevel",
    "fastestmirror",
    "gpgcheck",
    "install_only_limit",
    "installonly_limit",
    "ip_resolve",
    "keepcache",
    "localpkg_gpgcheck",
    "logdir",
    "max_parallel_downloads",
    "metadata_expire",
    "minrate",
    "module_platform_id",
    "multilib_policy",
    "obsoletes",
    "override_install_langs",
    "plugins",
    "releasever",
    "repo_gpgcheck",
    "retries",
    "rpmverbosity",
    "skip_if_unavailable",
    "sslverify",
    "throttle",
    "timeout",
    "zchunk",
    "exactarch",
    "distroverpkg",
    "cachedir",
];

/// `--setopt=NAME=VALUE`, or a line of dnf.conf. A name with a repository before it is a setting of that repository.
pub fn set_option(options: &mut Options, setting: &str) -> Result<(), ArgumentError> {
    let (name, value) = setting.split_once('=').ok_or_else(|| ArgumentError::NoValue(format!("--setopt {setting}")))?;
    let (name, value) = (name.trim(), value.trim());
    let boolean = || match value.to_lowercase().as_str() {
        "1" | "yes" | "true" | "on" => Ok(true),
        "0" | "no" | "false" | "off" => Ok(false),
        _ => Err(ArgumentError::NoBoolean(name.to_owned(), value.to_owned())),
    };
    match name {
        "assumeyes" if boolean()? => options.assume = Some(true),
        "assumeno" if boolean()? => options.assume = Some(false),
        "assumeyes" | "assumeno" => {}
        "install_weak_deps" => options.weak_dependencies = boolean()?,
        "strict" => options.strict = boolean()?,
        "exclude" | "excludepkgs" => exclude(options, value)?,
        "tsflags" if value.split([',', ' ']).all(|flag| matches!(flag, "" | "nodocs" | "nocontexts" | "nocrypto")) => {}
        "installroot" => return Err(ArgumentError::Refused("installroot".to_owned(), "packages are installed into this image only")),
        _ if NO_EFFECT.contains(&name) || name.contains('.') => {}
        _ => options.remarks.push(format!("the setting {setting} has no effect")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Arguments, ArgumentError> {
        let arguments: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        parse(&arguments, Options::default())
    }

    #[test]
    fn parse_options_stand_anywhere() {
        let yes = Options { assume: Some(true), ..Options::default() };
        for line in [
            "install -y jq tar",
            "-y install jq tar",
            "install jq tar --assumeyes",
            "install --setopt=install_weak_deps=False --setopt tsflags=nodocs -y --nodocs jq tar",
            "install -y --releasever=latest --releasever latest --enablerepo=* --best --nogpgcheck jq -d1 -e 0 tar",
            "--setopt=assumeyes=1 install jq tar",
            "install -y --setopt=epel.gpgcheck=0 -- jq tar",
        ] {
            let found = parsed(line).unwrap();
            assert_eq!((found.options, found.words), (yes.clone(), vec!["install".into(), "jq".into(), "tar".into()]), "{line}");
        }
    }

    #[test]
    fn parse_settings_are_understood() {
        let options = |line: &str| parsed(line).unwrap().options;
        let together = options("-qy update");
        assert!(together.quiet && together.assume == Some(true));
        assert!(options("--setopt=install_weak_deps=True install x").weak_dependencies);
        assert!(!options("--setopt=strict=0 install x").strict);
        assert!(!options("install --skip-broken x").strict);
        assert_eq!(options("update -x kernel* --exclude=a,b").exclude, ["kernel*", "a", "b"]);
        assert_eq!(options("--setopt=color_theme=x update").remarks, ["the setting color_theme=x has no effect"]);
        assert_eq!(options("list --installed").listed, Some(Listed::Installed));
        assert_eq!(options("install x").assume, None);
    }

    #[test]
    fn parse_refusals_name_the_option() {
        for (line, expected) in [
            ("install --no-such-option x", "unrecognized arguments: --no-such-option"),
            ("install -yZ x", "unrecognized arguments: -yZ"),
            (
                "install --installroot=/mnt x",
                "--installroot is not supported by the stand-in for dnf: packages are installed into this image only",
            ),
            ("install --installroot /mnt x", "--installroot is not supported"),
            ("install --setopt=installroot=/mnt x", "installroot is not supported"),
            ("install --downloadonly x", "--downloadonly is not supported"),
            ("install x --setopt", "argument --setopt: expected one argument"),
            ("install --assumeyes=1 x", "argument --assumeyes: ignored explicit argument"),
            ("--setopt=strict=maybe install x", "strict: expected true or false instead of maybe"),
            ("update --advisory=ALAS2023-1", "--advisory is not supported"),
        ] {
            let error = parsed(line).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{line}: {error}");
        }
    }
}
