//! `hearth env`: the server's `connect.json` as lines for a shell's `eval`.

use std::{io::Write, process::ExitCode};

use crate::{connect::Connect, data_dir::DataDir};

/// Variables of other set-ups that would win over ours.
const STALE: &[&str] = &[
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL_LAMBDA_MICROVMS",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
];

/// Prints the lines.
pub fn run(dir: &DataDir) -> anyhow::Result<ExitCode> {
    let connect = Connect::read(dir)?;
    let absolute = DataDir::new(std::path::absolute(dir.path())?);
    std::io::stdout().write_all(exports(&connect, &absolute).as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// The lines, each value quoted for a POSIX shell.
pub fn exports(connect: &Connect, dir: &DataDir) -> String {
    let bundle = dir.ca_bundle().display().to_string();
    let variables = [
        ("AWS_ENDPOINT_URL", connect.api.clone()),
        ("AWS_ACCESS_KEY_ID", connect.access_key_id.clone()),
        ("AWS_SECRET_ACCESS_KEY", connect.secret_access_key.clone()),
        ("AWS_REGION", connect.region.clone()),
        ("AWS_DEFAULT_REGION", connect.region.clone()),
        ("CURL_CA_BUNDLE", bundle.clone()),
        ("NODE_EXTRA_CA_CERTS", bundle.clone()),
        ("REQUESTS_CA_BUNDLE", bundle.clone()),
        ("AWS_CA_BUNDLE", bundle.clone()),
        ("SSL_CERT_FILE", bundle),
        ("HEARTH_DATA_DIR", dir.path().display().to_string()),
        ("HEARTH_ENDPOINT", connect.endpoint.to_string()),
        ("HEARTH_CA", connect.ca.display().to_string()),
    ];
    let mut lines = format!("unset {}\n", STALE.join(" "));
    for (name, value) in variables {
        lines.push_str(&format!("export {name}={}\n", quote(&value)));
    }
    lines
}

/// Quotes a word for a POSIX shell, where it needs it.
pub fn quote(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:@%+=,".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::tests::example;

    #[test]
    fn words_are_quoted_where_a_shell_would_read_more_into_them() {
        assert_eq!(quote("http://127.0.0.1:8470"), "http://127.0.0.1:8470");
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("~root"), "'~root'");
    }

    #[test]
    fn a_shell_reads_back_what_was_meant() {
        let lines = exports(&example(), &DataDir::new("/data dir/it's".into()));
        let script = format!(
            "export AWS_PROFILE=other\n{lines}\nprintf '%s\\n' \"$AWS_SECRET_ACCESS_KEY\" \"$CURL_CA_BUNDLE\" \"$HEARTH_ENDPOINT\" \"${{AWS_PROFILE-unset}}\""
        );
        let output = std::process::Command::new("sh").args(["-eu", "-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "it's\n/data dir/it's/ca-bundle.pem\n127.0.0.1:8443\nunset\n");
    }
}
