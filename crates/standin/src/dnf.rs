//! `dnf`, `microdnf` and `yum`: what a command does, and what is said about it.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, BufRead, Write},
    os::unix::fs::symlink,
    path::Path,
};

use crate::{
    apt::{self, Apt, AptError, Change},
    arguments::{self, ArgumentError, Arguments, Listed, Options},
    glob, image,
    plan::{self, Plan, PlanError},
    resolve::{Missing, Resolver},
    suite::{ARCHITECTURE, Suite},
    table::{Table, TableError},
};

const CONFIGURATION: &str = "/etc/dnf/dnf.conf";
const REPOSITORIES: &str = "/etc/yum.repos.d";

/// Exit code of `check-update` when there are updates.
const UPDATES: u8 = 100;

/// A command fails.
#[derive(Debug, thiserror::Error)]
pub enum DnfError {
    #[error(transparent)]
    Arguments(#[from] ArgumentError),
    #[error("This command has to be run with superuser privileges (under the root user on most systems).")]
    NotRoot,
    #[error("No such command: {0}. The stand-in for dnf knows: {COMMANDS}.")]
    Unknown(String),
    #[error("{0} is not supported by the stand-in for dnf: {1}")]
    Refused(String, &'static str),
    #[error("{0} requires {1}")]
    Operands(&'static str, &'static str),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("the table of names {path} cannot be read: {source}")]
    ReadTable { path: &'static str, source: io::Error },
    #[error("the table of names: {0}")]
    Table(#[from] TableError),
    #[error(transparent)]
    Apt(#[from] AptError),
    #[error("Operation aborted.")]
    Aborted,
    #[error("apt-get failed, see above")]
    Failed,
    #[error("{package} is excluded, but would change")]
    Excluded { package: String },
    #[error("No matching Packages to list")]
    NothingListed,
    #[error("No matches found.")]
    NothingFound,
    #[error("{} was not in the packages that seemed to have it", .0.display())]
    NoFile(std::path::PathBuf),
    #[error("linking {path}: {source}")]
    Link { path: String, source: io::Error },
    #[error("Debian has no locales of the language {0}")]
    NoLocale(String),
}

const COMMANDS: &str =
    "install, reinstall, remove, autoremove, upgrade, check-update, swap, clean, makecache, list, info, search, provides, repolist";

const NO_GROUPS: &str = "there are no groups in this stand-in: name the packages, for Development Tools for instance gcc, gcc-c++, make, automake, git and patch";
const NO_MODULES: &str = "Amazon Linux 2023 has no modules: versions are packages of their own there, such as nodejs20 and python3.11";
const NO_COUNTERPART: &str = "it has no counterpart on Debian";

/// Carries a command line out. Returns the exit code.
pub fn main(arguments: &[String]) -> u8 {
    match carry_out(arguments) {
        Ok(code) => code,
        Err(error) => {
            explain(&error);
            1
        }
    }
}

fn explain(error: &DnfError) {
    match error {
        DnfError::Plan(PlanError::Missing(missing)) => {
            for missing in missing {
                eprintln!("No match for argument: {}", missing.asked);
            }
            eprintln!("Error: {error}");
            let release = image::release();
            eprintln!("stand-in: this is {release} in place of Amazon Linux 2023, and nothing was installed.");
            for Missing { asked, reason } in missing {
                eprintln!("stand-in: {asked}: {reason}.");
            }
            eprintln!("stand-in: {} says which names are known.", image::TABLE);
            warn_of_repositories();
        }
        DnfError::Plan(PlanError::NotInstalled { names, .. }) => {
            for name in names {
                eprintln!("No match for argument: {name}");
            }
            eprintln!("Error: {error}");
        }
        DnfError::Aborted => eprintln!("{error}"),
        _ => eprintln!("Error: {error}"),
    }
}

/// A Dockerfile may have added repositories, and expect that packages are theirs.
fn warn_of_repositories() {
    let files = fs::read_dir(REPOSITORIES).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|extension| extension == "repo")).collect();
    files.sort();
    if !files.is_empty() {
        let files: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
        eprintln!("stand-in: repositories of RPM packages are not used: {}.", files.join(", "));
    }
}

/// Options that dnf.conf sets.
fn configured(text: &str) -> Result<Options, ArgumentError> {
    let mut options = Options::default();
    let settings = text.lines().map(str::trim).filter(|line| line.contains('=') && !line.starts_with(['#', ';', '[']));
    for setting in settings {
        arguments::set_option(&mut options, setting)?;
    }
    Ok(options)
}

fn carry_out(arguments: &[String]) -> Result<u8, DnfError> {
    let options = configured(&fs::read_to_string(CONFIGURATION).unwrap_or_default())?;
    let Arguments { options, words } = arguments::parse(arguments, options)?;
    if options.version {
        println!("4.14.0\n  the stand-in for dnf, on {}", image::release());
        return Ok(0);
    }
    let Some((command, operands)) = words.split_first() else {
        help();
        return Ok(if options.help { 0 } else { 1 });
    };
    if options.help {
        help();
        return Ok(0);
    }
    if !options.quiet {
        for remark in &options.remarks {
            eprintln!("stand-in: {remark}");
        }
    }
    let named = |verb: &'static str| if operands.is_empty() { Err(DnfError::Operands(verb, "the names of packages")) } else { Ok(()) };
    match command.as_str() {
        "install" | "in" | "localinstall" | "install-n" | "install-na" | "install-nevra" => {
            named("install")?;
            change(&options, |resolver| Ok(plan::install(resolver, &options, operands)?))
        }
        "reinstall" | "rei" => {
            named("reinstall")?;
            change(&options, |resolver| Ok(plan::reinstall(resolver, &options, operands)?))
        }
        "remove" | "rm" | "erase" => {
            named("remove")?;
            change(&options, |resolver| Ok(plan::remove(resolver, &options, operands)))
        }
        "autoremove" if operands.is_empty() => change(&options, |_| Ok(plan::autoremove())),
        "autoremove" => change(&options, |resolver| Ok(plan::remove(resolver, &options, operands))),
        "upgrade" | "update" | "up" | "upgrade-minimal" | "update-minimal" | "update-to" | "upgrade-to" | "distro-sync" | "dsync" => {
            if operands.iter().any(|name| name.starts_with('@')) {
                return Err(DnfError::Refused("group".to_owned(), NO_GROUPS));
            }
            change(&options, |resolver| Ok(plan::upgrade(resolver, &options, operands)?))
        }
        "swap" => match operands {
            [out, into] => change(&options, |resolver| Ok(plan::swap(resolver, &options, out, into)?)),
            _ => Err(DnfError::Operands("swap", "two packages")),
        },
        "check-update" | "check-upgrade" => check_update(&options, operands),
        "makecache" | "mc" => {
            root()?;
            apt::update(options.quiet)?;
            println!("Metadata cache created.");
            Ok(0)
        }
        "clean" => clean(operands),
        "list" | "ls" => list(&options, operands),
        "info" | "if" => info(&options, operands),
        "search" | "se" => search(&options, operands),
        "provides" | "whatprovides" | "prov" => provides(operands),
        "repolist" | "repoinfo" => {
            println!("{:<20} repo name", "repo id");
            println!("{:<20} {}, whose packages stand for those of Amazon Linux 2023", "debian", image::release());
            Ok(0)
        }
        "check" => Ok(u8::from(!apt::get(options.quiet, &["check".to_owned()])?.success())),
        "help" => {
            help();
            Ok(0)
        }
        "config-manager" => {
            eprintln!("stand-in: repositories of RPM packages are not used, their settings have no effect");
            Ok(0)
        }
        "check-release-update" | "release-notification" | "updateinfo" | "supportinfo" | "support-info" => {
            eprintln!("stand-in: this is {}, which has no releases of Amazon Linux", image::release());
            Ok(0)
        }
        "module" => Err(DnfError::Refused(words.join(" "), NO_MODULES)),
        "group" | "groups" | "grp" | "groupinstall" | "groupupdate" | "groupremove" | "grouplist" | "groupinfo" | "environment" => {
            Err(DnfError::Refused(words.join(" "), NO_GROUPS))
        }
        "builddep" | "build-dep" | "changelog" | "copr" | "debug-dump" | "debug-restore" | "debuginfo-install" | "deplist" | "download"
        | "downgrade" | "dg" | "history" | "hist" | "mark" | "needs-restarting" | "offline" | "playground" | "repoclosure" | "repodiff"
        | "repograph" | "repomanage" | "repoquery" | "rq" | "reposync" | "shell" | "sh" | "system-upgrade" | "versionlock" => {
            Err(DnfError::Refused(command.clone(), NO_COUNTERPART))
        }
        other => Err(DnfError::Unknown(other.to_owned())),
    }
}

fn help() {
    println!(
        "usage: dnf [options] COMMAND\n\nThis is {}, which stands for Amazon Linux 2023. dnf, microdnf and yum translate names of packages with the table\n{} and have apt-get do the work.\n\nCommands: {COMMANDS}",
        image::release(),
        image::TABLE
    );
}

fn root() -> Result<(), DnfError> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(DnfError::NotRoot) }
}

/// The table, and the suite with lists that are there and not old.
fn known(options: &Options) -> Result<(Table, Apt), DnfError> {
    let table = table()?;
    if options.refresh || (!options.cache_only && !apt::lists_are_fresh()) {
        root()?;
        apt::update(options.quiet)?;
    }
    Ok((table, Apt::read()?))
}

/// The table of this image.
pub fn table() -> Result<Table, DnfError> {
    let path = image::TABLE;
    let text = fs::read_to_string(path).map_err(|source| DnfError::ReadTable { path, source })?;
    Ok(Table::parse(&text)?)
}

/// Plans a change, asks whether it may be, and makes it.
fn change(options: &Options, plan: impl FnOnce(&Resolver<'_>) -> Result<Plan, DnfError>) -> Result<u8, DnfError> {
    root()?;
    let (table, apt) = known(options)?;
    let mut plan = plan(&Resolver { table: &table, suite: &apt })?;
    if !options.quiet {
        for line in &plan.lines {
            println!("{line}");
        }
        warn_of_repositories();
    }
    if plan.apt.is_empty() {
        println!("Nothing to do.\nComplete!");
        return finish(&plan).map(|()| 0);
    }
    if options.assume != Some(true) || !options.exclude.is_empty() {
        let changes = apt::simulate(&plan.apt)?;
        let excluded = |change: &&Change| options.exclude.iter().any(|pattern| glob::matches(pattern, &change.package));
        if let Some(change) = changes.iter().find(excluded) {
            return Err(DnfError::Excluded { package: change.package.clone() });
        }
        if changes.is_empty() {
            println!("Nothing to do.\nComplete!");
            return finish(&plan).map(|()| 0);
        }
        if options.assume != Some(true) {
            show(&changes);
            if options.assume == Some(false) || !agreed() {
                return Err(DnfError::Aborted);
            }
        }
    }
    plan.apt.insert(1, "--yes".to_owned());
    let changed = apt::get(options.quiet, &plan.apt)?;
    // What apt keeps for its own speed is large and would stay in the layer.
    apt::get(true, &["clean".to_owned()])?;
    if !changed.success() {
        return Err(DnfError::Failed);
    }
    finish(&plan)?;
    if !options.quiet {
        println!("Complete!");
    }
    Ok(0)
}

fn show(changes: &[Change]) {
    for change in changes {
        match &change.version {
            Some(version) => println!(" {} {version}", change.package),
            None => println!(" {} (removed)", change.package),
        }
    }
    println!("\nTransaction Summary: {} packages", changes.len());
}

/// Asks on standard input. Its end, which is what a build has there, means no.
fn agreed() -> bool {
    print!("Is this ok [y/N]: ");
    let mut answer = String::new();
    // The question is only a courtesy: an answer counts whether it could be shown or not.
    let _ = io::stdout().flush();
    let read = io::stdin().lock().read_line(&mut answer);
    if !answer.ends_with('\n') {
        println!();
    }
    read.is_ok() && matches!(answer.trim().to_lowercase().as_str(), "y" | "yes")
}

/// What Amazon Linux has and the packages alone do not bring: commands' names, locales. And a look at the files that were asked for.
fn finish(plan: &Plan) -> Result<(), DnfError> {
    for found in &plan.found {
        for link in &found.links {
            let (path, target) = (Path::new(&link.path), Path::new(&link.target));
            // A name that is taken is somebody's.
            if fs::symlink_metadata(path).is_err() && target.exists() {
                symlink(target, path).map_err(|source| DnfError::Link { path: link.path.clone(), source })?;
            }
        }
        if let Some(language) = &found.locales {
            locales(language)?;
        }
        if let Some(file) = &found.file
            && !file.exists()
        {
            return Err(DnfError::NoFile(file.clone()));
        }
    }
    Ok(())
}

/// Makes the UTF-8 locales of a language.
fn locales(language: &str) -> Result<(), DnfError> {
    let supported = fs::read_to_string("/usr/share/i18n/SUPPORTED").unwrap_or_default();
    let locales = utf8_locales(&supported, language);
    if locales.is_empty() {
        return Err(DnfError::NoLocale(language.to_owned()));
    }
    for (name, source) in locales {
        // The table of aliases is among the translations that the image leaves out.
        apt::output("localedef", &["-i", &source, "-c", "-f", "UTF-8", "-A", "/dev/null", &name])?;
    }
    Ok(())
}

/// Names of a language's UTF-8 locales and of their sources, from lines such as `de_DE.UTF-8 UTF-8` and `aa_DJ UTF-8`.
fn utf8_locales(supported: &str, language: &str) -> BTreeSet<(String, String)> {
    let names = supported.lines().filter_map(|line| line.trim().strip_suffix(" UTF-8"));
    let ours = names.filter(|name| name.strip_prefix(language).is_some_and(|rest| rest.starts_with(['_', '.', '@'])));
    ours.map(|name| (name.to_owned(), name.replace(".UTF-8", ""))).collect()
}

fn check_update(options: &Options, names: &[String]) -> Result<u8, DnfError> {
    let (table, apt) = known(options)?;
    let plan = plan::upgrade(&Resolver { table: &table, suite: &apt }, options, names)?;
    if plan.apt.is_empty() {
        return Ok(0);
    }
    let changes = apt::simulate(&plan.apt)?;
    let changes: Vec<_> = changes
        .iter()
        .filter(|change| !options.exclude.iter().any(|pattern| glob::matches(pattern, &change.package)))
        .filter_map(|change| Some((&change.package, change.version.as_ref()?)))
        .collect();
    for (package, version) in &changes {
        row(package, version, "debian");
    }
    Ok(if changes.is_empty() { 0 } else { UPDATES })
}

fn row(package: &str, version: &str, repository: &str) {
    println!("{:<42} {version:<32} {repository}", format!("{package}.{ARCHITECTURE}"));
}

fn clean(what: &[String]) -> Result<u8, DnfError> {
    const KINDS: &str = "one of: all, packages, metadata, dbcache, expire-cache";
    root()?;
    let (mut lists, mut packages) = (false, false);
    for kind in what {
        match kind.as_str() {
            "all" => (lists, packages) = (true, true),
            "packages" => packages = true,
            "metadata" | "dbcache" | "expire-cache" | "headers" | "rpmdb" => lists = true,
            _ => return Err(DnfError::Operands("clean", KINDS)),
        }
    }
    if !(lists || packages) {
        return Err(DnfError::Operands("clean", KINDS));
    }
    if !apt::get(true, &["clean".to_owned()])?.success() {
        return Err(DnfError::Failed);
    }
    let removed = if lists { apt::remove_lists()? } else { 0 };
    println!("{removed} files removed");
    Ok(0)
}

/// Debian packages that operands mean: by the table, and by their own names.
fn meant(resolver: &Resolver<'_>, operands: &[String], all: &[String]) -> BTreeSet<String> {
    let mut packages = BTreeSet::new();
    for operand in operands {
        packages.extend(all.iter().filter(|name| glob::matches(operand, name)).cloned());
        let found = resolver.resolve(operand).unwrap_or_default();
        packages.extend(found.into_iter().filter_map(|found| found.packages.into_iter().next()));
    }
    packages
}

fn list(options: &Options, operands: &[String]) -> Result<u8, DnfError> {
    let (listed, patterns) = match operands.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        Some(("installed", rest)) => (Listed::Installed, rest),
        Some(("available", rest)) => (Listed::Available, rest),
        Some(("all", rest)) => (Listed::All, rest),
        Some(("updates" | "upgrades", rest)) => (Listed::Upgrades, rest),
        _ => (options.listed.unwrap_or(Listed::All), operands),
    };
    if listed == Listed::Upgrades {
        return check_update(options, patterns).map(|_| 0);
    }
    // What is installed is known without lists.
    let (table, apt) = if listed == Listed::Installed { (table()?, Apt::read()?) } else { known(options)? };
    let resolver = Resolver { table: &table, suite: &apt };
    let installed = apt.all_installed();
    let every: Vec<String> = apt.starting_with("").into_iter().map(str::to_owned).collect();
    let chosen = |all: &[String]| if patterns.is_empty() { all.iter().cloned().collect() } else { meant(&resolver, patterns, all) };
    let here: Vec<_> = chosen(&installed).into_iter().filter_map(|name| apt.installed(&name).map(|version| (name, version))).collect();
    let mut any = false;
    if listed != Listed::Available && !here.is_empty() {
        any = true;
        println!("Installed Packages");
        for (name, version) in &here {
            row(name, version, "@debian");
        }
    }
    if listed != Listed::Installed {
        let others: Vec<_> = chosen(&every).into_iter().filter(|name| apt.installed(name).is_none() && apt.has(name)).collect();
        if !others.is_empty() {
            any = true;
            println!("Available Packages");
            for name in &others {
                // One question for each package would take an hour for all of them.
                let version = if patterns.is_empty() { None } else { apt.candidate(name) };
                row(name, version.as_deref().unwrap_or("-"), "debian");
            }
        }
    }
    if any || patterns.is_empty() { Ok(0) } else { Err(DnfError::NothingListed) }
}

fn info(options: &Options, operands: &[String]) -> Result<u8, DnfError> {
    let (table, apt) = known(options)?;
    let operands: Vec<_> = operands.iter().filter(|word| !matches!(word.as_str(), "installed" | "available" | "all")).cloned().collect();
    if operands.is_empty() {
        return Err(DnfError::Operands("info", "the names of packages"));
    }
    let packages = meant(&Resolver { table: &table, suite: &apt }, &operands, &[]);
    let packages: Vec<_> = packages.iter().map(String::as_str).collect();
    if packages.is_empty() {
        return Err(DnfError::NothingListed);
    }
    print!("{}", apt::output("apt-cache", &[&["show", "--no-all-versions", "--"], &packages[..]].concat())?);
    Ok(0)
}

fn search(options: &Options, operands: &[String]) -> Result<u8, DnfError> {
    if operands.is_empty() {
        return Err(DnfError::Operands("search", "words"));
    }
    let (table, _) = known(options)?;
    let mut any = false;
    let words: Vec<_> = operands.iter().map(String::as_str).collect();
    for name in table.names().filter(|name| words.iter().all(|word| name.contains(word))) {
        any = true;
        println!("{name} : in the table of names");
    }
    let found = apt::output("apt-cache", &[&["search", "--"], &words[..]].concat())?;
    print!("{found}");
    if any || !found.is_empty() { Ok(0) } else { Err(DnfError::NothingFound) }
}

/// Debian's lists do not say which files a package has; those that are installed are known.
fn provides(operands: &[String]) -> Result<u8, DnfError> {
    if operands.is_empty() {
        return Err(DnfError::Operands("provides", "files"));
    }
    for operand in operands {
        let found = apt::output("dpkg-query", &["--search", operand]);
        match found {
            Ok(found) => print!("{found}"),
            Err(_) => {
                eprintln!("stand-in: only files of installed packages are known, and none has {operand}");
                return Err(DnfError::NothingFound);
            }
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configured_settings_count() {
        let options = configured("[main]\n# assumeyes=0\ngpgcheck=True\nassumeyes=True\ninstall_weak_deps=True\n").unwrap();
        assert_eq!(options, Options { assume: Some(true), weak_dependencies: true, ..Options::default() });
        assert_eq!(configured("").unwrap(), Options::default());
        assert!(configured("strict=maybe").is_err());
    }

    #[test]
    fn locales_of_a_language_are_its_utf8_ones() {
        let supported = "de_DE.UTF-8 UTF-8\nde_DE ISO-8859-1\nde_AT.UTF-8 UTF-8\nden_XX UTF-8\naa_DJ UTF-8\nde_DE@euro ISO-8859-15\n";
        let found = utf8_locales(supported, "de");
        assert_eq!(found.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["de_AT.UTF-8", "de_DE.UTF-8"]);
        assert!(found.iter().all(|(_, source)| !source.contains("UTF")));
        assert!(utf8_locales(supported, "zz").is_empty());
    }

    #[test]
    fn commands_without_counterpart_are_refused_by_name() {
        for (line, expected) in [
            ("group install Development", "group install Development is not supported"),
            ("groupinstall Development", "groupinstall Development is not supported"),
            ("module enable nodejs:20", "Amazon Linux 2023 has no modules"),
            ("history", "history is not supported"),
            ("frobnicate", "No such command: frobnicate"),
            ("swap a", "swap requires two packages"),
            ("install", "install requires the names of packages"),
            ("install --frob x", "unrecognized arguments: --frob"),
            ("config-manager --add-repo https://example.com/x.repo", "--add-repo is not supported"),
        ] {
            let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
            let error = carry_out(&words).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
