//! `hearth trust`: has this host trust the local authority, and says what to set for programs that ask no store.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use super::env::quote;
use crate::{
    data_dir::DataDir,
    trust::{self, Authority, Outcome, TrustError},
};

/// `hearth trust`.
#[derive(Debug, Args)]
pub struct TrustArgs {
    /// Remove what an earlier `hearth trust` added.
    #[arg(long)]
    undo: bool,
}

/// Adds the authority, or removes it, wherever there is a store for it.
pub fn run(dir: &DataDir, args: &TrustArgs) -> anyhow::Result<ExitCode> {
    let authority = Authority::read(dir.ca_certificate())?;
    if !nix::unistd::geteuid().is_root() {
        return Err(TrustError::NotRoot.into());
    }
    let store = trust::find_store().ok_or_else(|| TrustError::NoStore(authority.path.clone()))?;
    let outcome = if args.undo { store.undo(&authority)? } else { store.trust(&authority)? };
    println!("{outcome} the system's store: {}", store.file(&authority).display());

    let browsers = in_browsers(&authority, args.undo);
    if args.undo {
        println!("\nWhere you set NODE_EXTRA_CA_CERTS, REQUESTS_CA_BUNDLE, AWS_CA_BUNDLE or SSL_CERT_FILE for it, unset them.");
    } else {
        println!("\n{}", advice(hearth_ingress::system_bundle().as_deref()));
    }
    Ok(if browsers { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether all databases of browsers are as they should be now.
fn in_browsers(authority: &Authority, undo: bool) -> bool {
    let home = home();
    let databases = home.as_deref().map(trust::databases).unwrap_or_default();
    if databases.is_empty() {
        let home = home.map_or_else(|| "no home directory".to_owned(), |home| home.display().to_string());
        println!("no browser has a database in {home}: start the browser once, then run this again");
    }
    let change = if undo { trust::undo_browser } else { trust::trust_browser };
    let mut content = true;
    for database in databases {
        match change(&database, authority) {
            Ok(Outcome::AsItWas) => println!("{} {}", Outcome::AsItWas, database.display()),
            Ok(outcome) => println!("{outcome} {}; restart the browser", database.display()),
            Err(error) => {
                content = false;
                eprintln!("hearth: {}: {error} (apt-get install libnss3-tools has certutil)", database.display());
            }
        }
    }
    content
}

/// The home directory of who uses the browsers: with sudo, not root's.
fn home() -> Option<PathBuf> {
    let user = std::env::var("SUDO_USER").ok().filter(|user| user != "root");
    let sudo = user.and_then(|user| nix::unistd::User::from_name(&user).ok()).flatten().map(|user| user.dir);
    sudo.or_else(|| std::env::var_os("HOME").map(PathBuf::from))
}

/// Node and Python's requests, boto3 with it, bring authorities of their own.
fn advice(bundle: Option<&Path>) -> String {
    let Some(bundle) = bundle else { return "Node.js and Python's requests bring authorities of their own.".to_owned() };
    let bundle = quote(&bundle.display().to_string());
    let lines =
        ["NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "SSL_CERT_FILE"].map(|name| format!("export {name}={bundle}\n"));
    format!(
        "curl and programs that use the system's store trust the endpoints now. Node.js, Python's requests and boto3 bring authorities\nof their own; for them, set (`hearth env` does, too):\n\n{}",
        lines.concat()
    )
}
