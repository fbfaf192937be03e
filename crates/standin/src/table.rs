//! The table of names: which Debian packages stand for a package of Amazon Linux. `packages.tsv` says how it is written.

use crate::glob;

/// Stands for a version, in names and in what they mean.
const VERSION: char = '%';

/// The table, in the file's order.
#[derive(Debug)]
pub struct Table {
    lines: Vec<Line>,
}

#[derive(Debug)]
struct Line {
    number: usize,
    names: Vec<String>,
    packages: String,
    note: Option<String>,
}

/// What the table says about a name.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    pub meaning: Meaning,
    /// What the reader of a build log should know.
    pub note: Option<String>,
}

/// What stands for the package.
#[derive(Debug, PartialEq, Eq)]
pub enum Meaning {
    /// It means nothing on Debian: asking for it succeeds.
    Nothing,
    /// Debian has nothing like it: asking for it fails.
    Unavailable,
    /// These packages together.
    Packages { items: Vec<Item>, links: Vec<Link> },
}

/// A package that is wanted: the first of the choices that the suite has.
#[derive(Debug, PartialEq, Eq)]
pub struct Item {
    pub choices: Vec<Choice>,
    /// A suite that has none of them does not matter.
    pub optional: bool,
}

/// A Debian package.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    pub name: String,
    /// Lowest first component of its version.
    pub at_least: Option<u64>,
}

/// A command under the name that Amazon Linux gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub path: String,
    pub target: String,
}

/// A line of the table cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    #[error("line {0} has no packages")]
    NoPackages(usize),
    #[error("line {0}: {1} is no number")]
    Version(usize, String),
}

impl Table {
    /// Reads the table's text.
    pub fn parse(text: &str) -> Result<Self, TableError> {
        let lines = text.lines().enumerate().map(|(index, line)| (index + 1, line));
        let lines = lines.filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
        let lines: Vec<_> = lines.map(|(number, line)| Line::parse(number, line)).collect::<Result<_, _>>()?;
        for line in &lines {
            line.entry("1")?;
        }
        Ok(Self { lines })
    }

    /// What a name means. A name that is written out wins over one with a version, and that over a pattern.
    pub fn find(&self, name: &str) -> Option<Entry> {
        let written = self.lines.iter().find(|line| line.names.iter().any(|known| known == name)).map(|line| (line, ""));
        let versioned = || {
            let mut names = self.lines.iter().flat_map(|line| line.names.iter().map(move |known| (line, known)));
            names.find_map(|(line, known)| Some((line, version(known, name)?)))
        };
        let pattern = || self.lines.iter().find(|line| line.names.iter().any(|known| glob::matches(known, name))).map(|line| (line, ""));
        let (line, version) = written.or_else(versioned).or_else(pattern)?;
        line.entry(version).ok()
    }

    /// Names that are written out.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.lines.iter().flat_map(|line| &line.names).map(String::as_str);
        names.filter(|name| !glob::is_pattern(name) && !name.contains(VERSION))
    }
}

/// The version in a name, if the name is the known one with a version in it.
fn version<'a>(known: &str, name: &'a str) -> Option<&'a str> {
    let (before, after) = known.split_once(VERSION)?;
    let version = name.strip_prefix(before)?.strip_suffix(after)?;
    let first = version.starts_with(|character: char| character.is_ascii_digit());
    (first && version.chars().all(|character| character.is_ascii_digit() || character == '.')).then_some(version)
}

impl Line {
    fn parse(number: usize, line: &str) -> Result<Self, TableError> {
        let mut columns = line.split('\t').map(str::trim).filter(|column| !column.is_empty());
        let names = columns.next().unwrap_or_default().split_whitespace().map(str::to_owned).collect();
        let packages = columns.next().ok_or(TableError::NoPackages(number))?.to_owned();
        Ok(Self { number, names, packages, note: columns.next().map(str::to_owned) })
    }

    /// What the line means with this version.
    fn entry(&self, version: &str) -> Result<Entry, TableError> {
        let meaning = match self.packages.replace(VERSION, version).as_str() {
            "-" => Meaning::Nothing,
            "!" => Meaning::Unavailable,
            packages => {
                let (mut items, mut links) = (Vec::new(), Vec::new());
                for word in packages.split_whitespace() {
                    match word.split_once('=') {
                        Some((path, target)) if path.starts_with('/') => {
                            links.push(Link { path: path.to_owned(), target: target.to_owned() });
                        }
                        _ => items.push(item(self.number, word)?),
                    }
                }
                Meaning::Packages { items, links }
            }
        };
        Ok(Entry { meaning, note: self.note.as_ref().map(|note| note.replace(VERSION, version)) })
    }
}

fn item(number: usize, word: &str) -> Result<Item, TableError> {
    let (word, optional) = word.strip_suffix('?').map_or((word, false), |word| (word, true));
    let choice = |word: &str| match word.split_once(">=") {
        None => Ok(Choice { name: word.to_owned(), at_least: None }),
        Some((name, version)) => match version.parse() {
            Ok(version) => Ok(Choice { name: name.to_owned(), at_least: Some(version) }),
            Err(_) => Err(TableError::Version(number, version.to_owned())),
        },
    };
    Ok(Item { choices: word.split('|').map(choice).collect::<Result<_, _>>()?, optional })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_lines_give_names_packages_links_and_notes() {
        let table = Table::parse("# comment\n\na b\t\tx|y>=20 z?\tnoted\nn-*\t-\nu\t!\nl\tx /usr/bin/c=/usr/bin/d\n").unwrap();
        let choice = |name: &str, at_least| Choice { name: name.to_owned(), at_least };
        let a = table.find("b").unwrap();
        assert_eq!(a.note.as_deref(), Some("noted"));
        let Meaning::Packages { items, links } = &a.meaning else { panic!("{a:?}") };
        assert_eq!(items[0], Item { choices: vec![choice("x", None), choice("y", Some(20))], optional: false });
        assert_eq!(items[1], Item { choices: vec![choice("z", None)], optional: true });
        assert!(links.is_empty());
        assert_eq!(table.find("n-thing").unwrap().meaning, Meaning::Nothing);
        assert_eq!(table.find("u").unwrap().meaning, Meaning::Unavailable);
        let Meaning::Packages { links, .. } = &table.find("l").unwrap().meaning else { panic!() };
        assert_eq!(links[..], [Link { path: "/usr/bin/c".into(), target: "/usr/bin/d".into() }]);
        assert!(table.find("other").is_none());
        assert_eq!(table.names().collect::<Vec<_>>(), ["a", "b", "u", "l"]);
    }

    #[test]
    fn find_written_name_wins_over_version_and_pattern() {
        let table = Table::parse("kernel*\t!\nkernel%\t-\nkernel6-tools\tlinux-perf\n").unwrap();
        assert_eq!(table.find("kernel-devel").unwrap().meaning, Meaning::Unavailable);
        assert_eq!(table.find("kernel6.12").unwrap().meaning, Meaning::Nothing);
        assert!(matches!(table.find("kernel6-tools").unwrap().meaning, Meaning::Packages { .. }));
    }

    #[test]
    fn find_version_is_put_into_packages_and_links() {
        let table = Table::parse("python3.%-pip\tpython3.% pip>=% /usr/bin/pip3.%=/usr/bin/pip3\n").unwrap();
        let Meaning::Packages { items, links } = table.find("python3.11-pip").unwrap().meaning else { panic!() };
        assert_eq!(items[0].choices[0].name, "python3.11");
        assert_eq!(items[1].choices[0].at_least, Some(11));
        assert_eq!(links[0].path, "/usr/bin/pip3.11");
        for other in ["python3-pip", "python3.-pip", "python3.x-pip", "python3.11-pip-wheel"] {
            assert!(table.find(other).is_none(), "{other}");
        }
    }

    #[test]
    fn parse_faulty_line_is_named() {
        assert_eq!(Table::parse("a\tb\nc\n").unwrap_err(), TableError::NoPackages(2));
        assert_eq!(Table::parse("a\tb>=x\n").unwrap_err(), TableError::Version(1, "x".into()));
    }

    #[test]
    fn shipped_table_has_each_name_once() {
        let table = Table::parse(include_str!("../packages.tsv")).unwrap();
        let mut names: Vec<_> = table.lines.iter().flat_map(|line| &line.names).collect();
        let count = names.len();
        names.sort();
        let doubled: Vec<_> = names.windows(2).filter(|pair| pair[0] == pair[1]).collect();
        assert!(doubled.is_empty(), "{doubled:?}");
        assert!(count > 200, "{count}");
        // A suite that had none of the packages would satisfy such a name with nothing.
        let empty = |line: &&Line| match line.entry("1").unwrap().meaning {
            Meaning::Packages { items, .. } => items.iter().all(|item| item.optional),
            _ => false,
        };
        assert!(!table.lines.iter().any(|line| empty(&line)));
    }
}
