//! The server's log, on standard error: standard output is for what callers wait for.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// Starts logging. The first call wins.
pub fn start(config: &LogConfig) {
    let directives = std::env::var("HEARTH_LOG").unwrap_or_else(|_| config.level.clone());
    let filter = EnvFilter::try_new(&directives).unwrap_or_else(|error| {
        eprintln!("hearth: HEARTH_LOG={directives} is not understood ({error}), logging at info");
        EnvFilter::new("info")
    });
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Fails where a subscriber exists already, which then does.
    let _ = match config.format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().try_init(),
    };
}
