//! The program as a person meets it, where no server is needed.

use std::process::{Command, Output};

fn hearth(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    command.env_remove("HEARTH_DATA_DIR").args(arguments).output().expect("the program starts")
}

fn complaint(output: &Output) -> String {
    assert!(!output.status.success(), "it must fail: {output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn help_names_the_verbs() {
    let output = hearth(&["--help"]);
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    for verb in ["serve", "env", "doctor", "image", "run", "ps", "suspend", "resume", "terminate", "logs", "open", "curl"] {
        assert!(text.lines().any(|line| line.trim_start().starts_with(verb)), "{verb} is missing from:\n{text}");
    }
}

#[test]
fn without_a_server_a_verb_says_how_to_get_one() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().to_str().unwrap();
    for verb in ["env", "ps"] {
        let text = complaint(&hearth(&[verb, "--data-dir", data]));
        assert!(text.contains("hearth serve"), "{verb} says: {text}");
    }
}

#[test]
fn a_wrong_setting_is_named_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let (data, file) = (dir.path().join("data"), dir.path().join("hearth.toml"));
    std::fs::write(&file, "wake_timeout_secs = 5\n").unwrap();
    let text = complaint(&hearth(&["serve", "--data-dir", data.to_str().unwrap(), "--config", file.to_str().unwrap()]));
    assert!(text.contains("wake_timeout_secs"), "{text}");
    assert!(!data.exists());
}
