//! Processes in the container beside the application: shells, and whatever `hearth exec` runs. PID 1's side: it has a [`helper`] start
//! the process, carries its bytes, and hangs up on it when nobody is at the other end any more.
//!
//! ```text
//! host ◀─ frames ─▶ PID 1 ◀─ pipes or a terminal ─▶ process
//!                     ▲                               │
//!                     └── started, exited ── helper ◀─┘ waits for it
//! ```

mod conversation;
pub mod helper;
mod process;

use std::sync::Arc;

use hearth_guest_protocol::{App, DialReply, Exec, ExecOutput, Stream, WireError, write_message};

use crate::app::Application;
use process::Process;

/// What clients of terminals are told when nobody says otherwise (SPEC 11).
const TERM: &str = "xterm";
/// The prompt of shells that read nothing else (SPEC 11).
const PROMPT: &str = "λ $ ";

/// Starts a process and serves its stream until either is over.
pub async fn serve(mut stream: Stream, exec: Exec, application: Arc<Application>) -> Result<(), WireError> {
    let Some((main, app)) = application.container().await else {
        return write_message(&mut stream, &DialReply::Refused).await;
    };
    write_message(&mut stream, &DialReply::Connected).await?;
    let order = helper::Order { main: main.as_raw(), terminal: exec.terminal, cwd_given: exec.cwd.is_some(), program: program(app, exec) };
    match Process::start(&order).await {
        Ok(process) => conversation::hold(stream, process).await,
        Err(error) => write_message(&mut stream, &ExecOutput::Failed { reason: error.to_string() }).await,
    }
}

/// The program as if it were the application: what is not said is the application's. Without arguments it is the container's shell.
fn program(app: App, exec: Exec) -> App {
    let mut env = app.env;
    if exec.terminal.is_some() {
        set(&mut env, "TERM", TERM);
    }
    if exec.argv.is_empty() {
        set(&mut env, "PS1", PROMPT);
    }
    for (name, value) in exec.env {
        set(&mut env, &name, &value);
    }
    App {
        argv: exec.argv,
        env,
        cwd: exec.cwd.unwrap_or(app.cwd),
        user: exec.user.unwrap_or(app.user),
        stop_signal: app.stop_signal,
        all_capabilities: app.all_capabilities,
        hostname: app.hostname,
    }
}

fn set(env: &mut Vec<(String, String)>, name: &str, value: &str) {
    env.retain(|(present, _)| present != name);
    env.push((name.to_owned(), value.to_owned()));
}

#[cfg(test)]
mod tests {
    use hearth_guest_protocol::TerminalSize;

    use super::*;

    #[test]
    fn what_is_not_said_is_the_application_s() {
        let app = App {
            argv: vec!["server".into()],
            env: vec![("A".into(), "app".into()), ("B".into(), "app".into()), ("TERM".into(), "dumb".into())],
            cwd: "/srv".into(),
            user: "web".into(),
            stop_signal: 15,
            all_capabilities: true,
            hostname: "box".into(),
        };
        let exec = Exec { argv: vec!["ls".into()], env: vec![("B".into(), "exec".into())], cwd: None, user: None, terminal: None };
        let merged = program(app.clone(), exec.clone());
        assert_eq!((merged.argv, merged.cwd.as_str(), merged.user.as_str()), (vec!["ls".to_owned()], "/srv", "web"));
        assert_eq!(merged.env, [("A".into(), "app".into()), ("TERM".into(), "dumb".into()), ("B".into(), "exec".into())]);

        let terminal = Some(TerminalSize { columns: 80, rows: 24 });
        let shell = Exec { argv: vec![], cwd: Some("/".into()), user: Some("0".into()), terminal, ..exec };
        let merged = program(app, shell);
        assert_eq!((merged.cwd.as_str(), merged.user.as_str()), ("/", "0"));
        assert!(
            merged.env.contains(&("TERM".into(), TERM.into())) && merged.env.contains(&("PS1".into(), PROMPT.into())),
            "{:?}",
            merged.env
        );
    }
}
