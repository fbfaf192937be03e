//! `hearth-standin check`: whether the suite has what the table names.

use std::collections::BTreeSet;

use crate::{apt, apt::Apt, dnf, dnf::DnfError, resolve::Resolver};

/// Says which names of the table this suite cannot meet, and which of the others apt-get would refuse. Returns the exit code.
pub fn main(arguments: &[String]) -> u8 {
    match check(arguments.iter().any(|argument| argument == "--simulate")) {
        Ok(failed) => u8::from(failed > 0),
        Err(error) => {
            eprintln!("Error: {error}");
            1
        }
    }
}

fn check(simulate: bool) -> Result<usize, DnfError> {
    let (table, apt) = (dnf::table()?, Apt::read()?);
    let resolver = Resolver { table: &table, suite: &apt };
    let mut simulated = BTreeSet::new();
    let (mut met, mut unmet, mut failed) = (0, 0, 0);
    for name in table.names() {
        match resolver.resolve(name) {
            Ok(found) => {
                met += 1;
                let packages: Vec<_> = found.into_iter().flat_map(|found| found.packages).collect();
                if simulate && !packages.is_empty() && simulated.insert(packages.clone()) {
                    let arguments = [vec!["install".to_owned(), "--no-install-recommends".to_owned()], packages].concat();
                    if let Err(error) = apt::simulate(&arguments) {
                        failed += 1;
                        println!("{name}: {error}");
                    }
                }
            }
            Err(missing) => {
                unmet += 1;
                println!("{name}: {}", missing.reason);
            }
        }
    }
    println!("{met} names are met, {unmet} are not; {failed} of {} installations would fail", simulated.len());
    Ok(failed)
}
