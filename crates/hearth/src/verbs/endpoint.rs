//! `hearth open` and `hearth curl`: a MicroVM's endpoint with a token made for it.

use std::{
    path::Path,
    process::{ExitCode, Stdio},
};

use anyhow::Context;
use clap::Args;
use http::Method;
use serde::Deserialize;
use serde_json::json;

use super::{env::quote, microvm, names};
use crate::{
    client::{Client, ClientError},
    connect::Connect,
};

/// Longest life that the service gives a token, in minutes.
const OPEN_MINUTES: u32 = 60;
/// `hearth curl` uses its token at once.
const CURL_MINUTES: u32 = 1;

/// `hearth open`.
#[derive(Debug, Args)]
pub struct OpenArgs {
    /// Id, or the beginning of one that fits one MicroVM only.
    id: String,
    /// Port of the app.
    #[arg(long, default_value_t = 8080, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
}

/// `hearth curl`.
#[derive(Debug, Args)]
pub struct CurlArgs {
    /// Id, or the beginning of one that fits one MicroVM only.
    id: String,
    /// Path and query on the endpoint.
    #[arg(default_value = "/")]
    pub path: String,
    /// Port of the app.
    #[arg(long, default_value_t = 8080, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// Arguments for curl, after `--`.
    #[arg(last = true, value_name = "CURL ARGUMENTS")]
    pub curl: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Token {
    /// Header by header.
    auth_token: std::collections::BTreeMap<String, String>,
}

/// `hearth open`: prints a command that works as it stands for an hour.
pub async fn open(client: Client, args: OpenArgs) -> anyhow::Result<ExitCode> {
    let command = command(&client, &args.id, args.port, "/", OPEN_MINUTES).await?;
    let words: Vec<String> = command.iter().map(|word| quote(word)).collect();
    println!("{}", words.join(" "));
    Ok(ExitCode::SUCCESS)
}

/// `hearth curl`: its exit code is curl's.
pub async fn curl(client: Client, args: CurlArgs) -> anyhow::Result<ExitCode> {
    let command = command(&client, &args.id, args.port, &args.path, CURL_MINUTES).await?;
    let (program, words) = command.split_first().expect("the command has a first word");
    let mut curl = tokio::process::Command::new(program);
    let curl = curl.args(words).args(args.curl).stdin(Stdio::inherit());
    let status = curl.status().await.context("running curl (apt-get install curl)")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

async fn command(client: &Client, id: &str, port: u16, path: &str, minutes: u32) -> anyhow::Result<Vec<String>> {
    let connect = Connect::read(client.dir())?;
    let microvm = microvm::find(client, id).await?;
    let token = mint(client, &microvm.microvm_id, port, minutes).await?;
    Ok(words(&connect, &client.dir().ca_bundle(), &microvm.endpoint, token, port, path))
}

async fn mint(client: &Client, id: &str, port: u16, minutes: u32) -> Result<Token, ClientError> {
    let request = json!({"expirationInMinutes": minutes, "allowedPorts": [{"port": port}]});
    client.call(Method::POST, &format!("/2025-09-09/microvms/{}/auth-token", names::escape(id)), Some(request)).await
}

/// The words of the command. The name in the URL is the endpoint's, wherever its listener is; its certificate may be the operator's, so all
/// authorities of the host count.
fn words(connect: &Connect, authorities: &Path, endpoint: &str, token: Token, port: u16, path: &str) -> Vec<String> {
    let slash = if path.starts_with('/') { "" } else { "/" };
    let mut words: Vec<String> = ["curl", "--no-progress-meter", "--cacert", &authorities.display().to_string()].map(str::to_owned).into();
    words.extend(["--connect-to".to_owned(), format!("::{}", connect.endpoint)]);
    for (name, value) in token.auth_token {
        words.extend(["--header".to_owned(), format!("{name}: {value}")]);
    }
    words.extend(["--header".to_owned(), format!("X-aws-proxy-port: {port}")]);
    words.push(format!("https://{endpoint}{slash}{path}"));
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::tests::example;

    #[test]
    fn the_command_reaches_the_listener_under_the_endpoint_s_name() {
        let token = Token { auth_token: [("X-aws-proxy-auth".to_owned(), "t".to_owned())].into() };
        let words = words(&example(), Path::new("/data/ca-bundle.pem"), "u.lambda-microvm.us-east-1.localhost", token, 5000, "x?y=1");
        assert_eq!(
            words,
            [
                "curl",
                "--no-progress-meter",
                "--cacert",
                "/data/ca-bundle.pem",
                "--connect-to",
                "::127.0.0.1:8443",
                "--header",
                "X-aws-proxy-auth: t",
                "--header",
                "X-aws-proxy-port: 5000",
                "https://u.lambda-microvm.us-east-1.localhost/x?y=1"
            ]
        );
    }
}
