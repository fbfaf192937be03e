//! From a request to one call of apt-get: pure, so that it can be tested without packages.

use std::collections::BTreeSet;

use crate::{
    arguments::Options,
    glob,
    resolve::{Found, Missing, Resolver},
};

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What is said first.
    pub lines: Vec<String>,
    /// Arguments of apt-get. Empty: nothing is to be done.
    pub apt: Vec<String>,
    /// What is asked for: links, locales and files of these are seen to afterwards.
    pub found: Vec<Found>,
}

/// Nothing can be done.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("Unable to find a match: {}", names(.0))]
    Missing(Vec<Missing>),
    #[error("No packages marked for {verb}.")]
    NotInstalled { verb: &'static str, names: Vec<String> },
}

fn names(missing: &[Missing]) -> String {
    missing.iter().map(|missing| missing.asked.as_str()).collect::<Vec<_>>().join(" ")
}

/// `dnf install`.
pub fn install(resolver: &Resolver<'_>, options: &Options, names: &[String]) -> Result<Plan, PlanError> {
    let (found, missing) = resolve(resolver, names);
    if !missing.is_empty() && options.strict {
        return Err(PlanError::Missing(missing));
    }
    let mut plan = Plan { lines: missing.iter().map(no_match).collect(), ..Plan::default() };
    plan.lines.extend(found.iter().filter_map(|found| told(resolver, found)));
    let packages = packages(&found);
    if !packages.is_empty() {
        plan.apt = arguments("install", options);
        plan.apt.extend(packages);
    }
    plan.found = found;
    Ok(plan)
}

/// `dnf reinstall`: what is not installed is not installed by it either.
pub fn reinstall(resolver: &Resolver<'_>, options: &Options, names: &[String]) -> Result<Plan, PlanError> {
    present(resolver, options, names, "reinstall", "--reinstall")
}

/// `dnf upgrade`, of everything or of these.
pub fn upgrade(resolver: &Resolver<'_>, options: &Options, names: &[String]) -> Result<Plan, PlanError> {
    if !names.is_empty() {
        return present(resolver, options, names, "upgrade", "--only-upgrade");
    }
    let mut apt = arguments(if options.erase { "dist-upgrade" } else { "upgrade" }, options);
    apt.push("--with-new-pkgs".to_owned());
    Ok(Plan { apt, ..Plan::default() })
}

fn present(resolver: &Resolver<'_>, options: &Options, names: &[String], verb: &'static str, option: &str) -> Result<Plan, PlanError> {
    let (found, missing) = resolve(resolver, names);
    let installed = |package: &String| resolver.suite.installed(package).is_some();
    let mut plan = Plan { lines: missing.iter().map(no_match).collect(), ..Plan::default() };
    let mut absent: Vec<_> = missing.into_iter().map(|missing| missing.asked).collect();
    let mut packages = Vec::new();
    for found in &found {
        let there: Vec<_> = found.packages.iter().filter(|package| installed(package)).cloned().collect();
        if there.is_empty() && !found.packages.is_empty() {
            plan.lines.push(format!("Package {} available, but not installed.", found.asked));
            plan.lines.push(format!("No match for argument: {}", found.asked));
            absent.push(found.asked.clone());
        } else {
            plan.lines.extend(told(resolver, found));
            packages.extend(there);
        }
    }
    if packages.is_empty() && !absent.is_empty() {
        return Err(PlanError::NotInstalled { verb, names: absent });
    }
    if !packages.is_empty() {
        plan.apt = arguments("install", options);
        plan.apt.push(option.to_owned());
        plan.apt.extend(packages);
    }
    Ok(plan)
}

/// `dnf remove`: of several packages that stand for one, only the first is what was meant.
pub fn remove(resolver: &Resolver<'_>, options: &Options, names: &[String]) -> Plan {
    let mut plan = Plan::default();
    let packages = removed(resolver, names, &mut plan.lines);
    if packages.is_empty() {
        plan.lines.push("No packages marked for removal.".to_owned());
    } else {
        plan.apt = removal(options);
        plan.apt.extend(packages);
    }
    plan
}

/// `dnf autoremove` without names.
pub fn autoremove() -> Plan {
    Plan { apt: vec!["autoremove".to_owned()], ..Plan::default() }
}

/// `dnf swap`. Two names that Debian has one package for are swapped already.
pub fn swap(resolver: &Resolver<'_>, options: &Options, out: &str, into: &str) -> Result<Plan, PlanError> {
    let mut plan = install(resolver, options, &[into.to_owned()])?;
    let comes = packages(&plan.found);
    let goes = removed(resolver, &[out.to_owned()], &mut plan.lines);
    let goes: Vec<_> = goes.into_iter().filter(|package| !comes.contains(package)).collect();
    if !goes.is_empty() {
        plan.apt.retain(|argument| argument != NO_REMOVE);
        plan.apt.extend(goes.into_iter().map(|package| format!("{package}-")));
    }
    Ok(plan)
}

/// Installed packages that these names mean.
fn removed(resolver: &Resolver<'_>, names: &[String], lines: &mut Vec<String>) -> Vec<String> {
    let mut packages = Vec::new();
    for name in names {
        let matching =
            resolver.suite.all_installed().into_iter().filter(|installed| glob::is_pattern(name) && glob::matches(name, installed));
        let mut meant: Vec<_> = matching.collect();
        match resolver.resolve(name) {
            Ok(found) => {
                if found.iter().all(|found| found.packages.is_empty()) {
                    lines.extend(found.iter().filter_map(|found| told(resolver, found)));
                    continue;
                }
                let first = found.into_iter().filter_map(|found| found.packages.into_iter().next());
                meant.extend(first.filter(|package| resolver.suite.installed(package).is_some()));
            }
            Err(_) if resolver.suite.installed(name).is_some() => meant.push(name.clone()),
            Err(_) => {}
        }
        if meant.is_empty() {
            lines.push(format!("No match for argument: {name}"));
        }
        packages.extend(meant);
    }
    unique(packages)
}

fn removal(options: &Options) -> Vec<String> {
    let keep = if options.keep_dependencies { "--no-auto-remove" } else { "--auto-remove" };
    vec!["remove".to_owned(), keep.to_owned()]
}

const NO_REMOVE: &str = "--no-remove";

fn arguments(verb: &str, options: &Options) -> Vec<String> {
    let recommends = if options.weak_dependencies { "--install-recommends" } else { "--no-install-recommends" };
    let mut arguments = vec![verb.to_owned(), recommends.to_owned()];
    if !options.erase {
        arguments.push(NO_REMOVE.to_owned());
    }
    arguments
}

fn resolve(resolver: &Resolver<'_>, names: &[String]) -> (Vec<Found>, Vec<Missing>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for name in names {
        match resolver.resolve(name) {
            Ok(mut some) => found.append(&mut some),
            Err(none) => missing.push(none),
        }
    }
    (found, missing)
}

fn packages(found: &[Found]) -> Vec<String> {
    unique(found.iter().flat_map(|found| found.packages.clone()).collect())
}

/// In the order in which they come first.
fn unique(packages: Vec<String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    packages.into_iter().filter(|package| seen.insert(package.clone())).collect()
}

fn no_match(missing: &Missing) -> String {
    format!("No match for argument: {} ({})", missing.asked, missing.reason)
}

/// How a package that was asked for is met, unless Debian's has the same name.
fn told(resolver: &Resolver<'_>, found: &Found) -> Option<String> {
    let note = found.note.as_ref().map(|note| format!(" ({note})")).unwrap_or_default();
    match &found.packages[..] {
        [] if found.file.is_some() => Some(format!("stand-in: {} is there", found.asked)),
        [] => Some(format!("stand-in: {} means nothing on Debian{note}", found.asked)),
        [package] if *package == found.asked && note.is_empty() => None,
        packages => {
            let version = |package: &String| match resolver.suite.candidate(package) {
                Some(version) => format!("{package} {version}"),
                None => package.clone(),
            };
            let packages: Vec<_> = packages.iter().map(version).collect();
            Some(format!("stand-in: {} is Debian's {}{note}", found.asked, packages.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{suite::testing::Fake, table::Table};

    const TABLE: &str = "python3-pip\tpython3-pip python3\n\
        nodejs\tnodejs npm\n\
        curl-minimal curl\tcurl\n\
        gnupg2-minimal\tgpgv\n\
        gnupg2-full\tgnupg\n\
        epel-release\t-\n";

    fn suite() -> Fake {
        Fake::new(&[
            ("python3-pip", "23*"),
            ("python3", "3.11*"),
            ("nodejs", "18"),
            ("npm", "9"),
            ("curl", "7*"),
            ("gpgv", "2*"),
            ("gnupg", "2"),
            ("jq", "1"),
            ("tar", "1*"),
        ])
    }

    fn with<T>(look: impl FnOnce(&Resolver<'_>) -> T) -> T {
        let (table, suite) = (Table::parse(TABLE).unwrap(), suite());
        look(&Resolver { table: &table, suite: &suite })
    }

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn options() -> Options {
        Options::default()
    }

    #[test]
    fn install_known_names_become_one_call() {
        let plan = with(|resolver| install(resolver, &options(), &words("python3-pip jq epel-release nodejs python3"))).unwrap();
        assert_eq!(plan.apt.join(" "), "install --no-install-recommends --no-remove python3-pip python3 jq nodejs npm");
        assert_eq!(
            plan.lines,
            [
                "stand-in: python3-pip is Debian's python3-pip 23, python3 3.11",
                "stand-in: epel-release means nothing on Debian",
                "stand-in: nodejs is Debian's nodejs 18, npm 9"
            ]
        );
    }

    #[test]
    fn install_unknown_name_installs_nothing() {
        let error = with(|resolver| install(resolver, &options(), &words("jq no-such other-thing"))).unwrap_err();
        assert_eq!(error.to_string(), "Unable to find a match: no-such other-thing");
    }

    #[test]
    fn install_not_strict_leaves_unknown_names_out() {
        let options = Options { strict: false, weak_dependencies: true, erase: true, ..options() };
        let plan = with(|resolver| install(resolver, &options, &words("jq no-such"))).unwrap();
        assert_eq!(plan.apt.join(" "), "install --install-recommends jq");
        assert!(plan.lines[0].starts_with("No match for argument: no-such"), "{:?}", plan.lines);
    }

    #[test]
    fn install_what_means_nothing_calls_nothing() {
        let plan = with(|resolver| install(resolver, &options(), &words("epel-release"))).unwrap();
        assert!(plan.apt.is_empty());
    }

    #[test]
    fn upgrade_and_reinstall_take_what_is_installed() {
        let all = with(|resolver| upgrade(resolver, &options(), &[])).unwrap();
        assert_eq!(all.apt.join(" "), "upgrade --no-install-recommends --no-remove --with-new-pkgs");
        let some = with(|resolver| upgrade(resolver, &options(), &words("curl-minimal nodejs"))).unwrap();
        assert_eq!(some.apt.join(" "), "install --no-install-recommends --no-remove --only-upgrade curl");
        assert!(some.lines.contains(&"No match for argument: nodejs".to_owned()));
        let again = with(|resolver| reinstall(resolver, &options(), &words("tar"))).unwrap();
        assert_eq!(again.apt.join(" "), "install --no-install-recommends --no-remove --reinstall tar");
        let error = with(|resolver| upgrade(resolver, &options(), &words("jq no-such"))).unwrap_err();
        assert_eq!(error.to_string(), "No packages marked for upgrade.");
    }

    #[test]
    fn remove_takes_the_package_that_is_meant() {
        let plan = with(|resolver| remove(resolver, &options(), &words("python3-pip jq epel-release")));
        assert_eq!(plan.apt.join(" "), "remove --auto-remove python3-pip");
        assert_eq!(plan.lines, ["No match for argument: jq", "stand-in: epel-release means nothing on Debian"]);
        let plan = with(|resolver| remove(resolver, &options(), &words("python3*")));
        assert_eq!(plan.apt.join(" "), "remove --auto-remove python3 python3-pip");
        let plan = with(|resolver| remove(resolver, &options(), &words("no-such")));
        assert!(plan.apt.is_empty());
        assert_eq!(plan.lines, ["No match for argument: no-such", "No packages marked for removal."]);
    }

    #[test]
    fn swap_of_one_package_for_itself_removes_nothing() {
        let plan = with(|resolver| swap(resolver, &options(), "curl-minimal", "curl")).unwrap();
        assert_eq!(plan.apt.join(" "), "install --no-install-recommends --no-remove curl");
        let plan = with(|resolver| swap(resolver, &options(), "gnupg2-minimal", "gnupg2-full")).unwrap();
        assert_eq!(plan.apt.join(" "), "install --no-install-recommends gnupg gpgv-");
        assert!(with(|resolver| swap(resolver, &options(), "tar", "no-such")).is_err());
    }
}
