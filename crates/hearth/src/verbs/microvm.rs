//! `hearth run`, `ps`, `suspend`, `resume`, `terminate`.

use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{names, table};
use crate::{
    client::{Client, ClientError},
    connect::Connect,
};

/// Longest time that one call waits for a change of state, in seconds; the wait goes on with the next call.
const WAIT_SECONDS: u32 = 30;

/// `hearth run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name or ARN of the image.
    image: String,
    /// Version of the image [default: the latest active one].
    #[arg(long, value_name = "N.0")]
    version: Option<String>,
    /// Seconds without traffic until the MicroVM is suspended.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    idle: u32,
    /// Seconds that it stays suspended until it is terminated.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    suspended: u32,
    /// Do not resume it when a request comes.
    #[arg(long)]
    no_auto_resume: bool,
    /// Let `hearth shell`, `exec` and `cp` in, and whoever has a token for shells.
    #[arg(long)]
    shell: bool,
    /// Seconds until it is terminated, whatever it does.
    #[arg(long, value_name = "SECONDS", default_value_t = 28_800)]
    max_duration: u32,
}

/// `hearth ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Terminated ones too.
    #[arg(short, long)]
    all: bool,
}

/// What can be asked of a MicroVM that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Suspend,
    Resume,
    Terminate,
}

/// A MicroVM as lists have it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Item {
    /// `microvm-<uuid>`.
    pub microvm_id: String,
    /// ARN of the image.
    pub image_arn: String,
    /// `"<n>.0"`.
    pub image_version: String,
    /// For example `RUNNING`.
    pub state: String,
    /// Seconds since the epoch.
    pub started_at: f64,
}

/// A MicroVM as a call for one has it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Microvm {
    /// `microvm-<uuid>`.
    pub microvm_id: String,
    /// Host name of the endpoint.
    pub endpoint: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct List {
    items: Vec<Item>,
    next_token: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Reached {
    state: String,
    state_reason: Option<String>,
}

/// `hearth run`: prints the id and the URL once the MicroVM runs.
pub async fn run(client: Client, args: RunArgs) -> anyhow::Result<ExitCode> {
    let connect = Connect::read(client.dir())?;
    let mut request = json!({
        "imageIdentifier": names::image_arn(&connect, &args.image),
        "idlePolicy": {
            "maxIdleDurationSeconds": args.idle,
            "suspendedDurationSeconds": args.suspended,
            "autoResumeEnabled": !args.no_auto_resume,
        },
        "maximumDurationInSeconds": args.max_duration,
    });
    if args.shell {
        request["ingressNetworkConnectors"] = json!([names::managed_connector(&connect, "ALL_INGRESS")]);
    }
    if let Some(version) = args.version {
        request["imageVersion"] = version.into();
    }
    let microvm: Microvm = client.call(Method::POST, "/2025-09-09/microvms", Some(request)).await?;
    println!("{}", microvm.microvm_id);
    reach(&client, &microvm.microvm_id, "RUNNING").await?;
    println!("https://{}{}/", microvm.endpoint, connect.url_port());
    Ok(ExitCode::SUCCESS)
}

/// `hearth ps`.
pub async fn list(client: Client, args: PsArgs) -> anyhow::Result<ExitCode> {
    let connect = Connect::read(client.dir())?;
    let mut rows = Vec::new();
    for item in all(&client).await?.into_iter().filter(|item| args.all || is_live(item)) {
        let endpoint = if is_live(&item) { get(&client, &item.microvm_id).await?.endpoint + &connect.url_port() } else { String::new() };
        let age = table::age(table::since(item.started_at));
        rows.push([item.microvm_id, names::image_name(&item.image_arn).to_owned(), item.image_version, item.state, age, endpoint]);
    }
    print!("{}", table::render(["ID", "IMAGE", "VERSION", "STATE", "AGE", "ENDPOINT"], &rows));
    Ok(ExitCode::SUCCESS)
}

/// `hearth suspend`, `resume` and `terminate`: each id is tried, also after one that failed.
pub async fn change(client: Client, change: Change, ids: Vec<String>) -> anyhow::Result<ExitCode> {
    let items = all(&client).await?;
    let mut code = ExitCode::SUCCESS;
    for prefix in ids {
        if let Err(error) = change_one(&client, change, &items, &prefix).await {
            eprintln!("hearth: {error:#}");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

async fn change_one(client: &Client, change: Change, items: &[Item], prefix: &str) -> anyhow::Result<()> {
    let id = pick(items, prefix)?;
    let path = format!("/2025-09-09/microvms/{}", names::escape(id));
    let (method, path, goal) = match change {
        Change::Suspend => (Method::POST, path + "/suspend", "SUSPENDED"),
        Change::Resume => (Method::POST, path + "/resume", "RUNNING"),
        Change::Terminate => (Method::DELETE, path, "TERMINATED"),
    };
    client.call::<Value>(method, &path, None).await?;
    reach(client, id, goal).await?;
    println!("{id} {goal}");
    Ok(())
}

/// Every MicroVM, the newest pages last as the server has them.
pub async fn all(client: &Client) -> Result<Vec<Item>, ClientError> {
    let mut items = Vec::new();
    let mut path = "/2025-09-09/microvms?maxResults=50".to_owned();
    loop {
        let page: List = client.call(Method::GET, &path, None).await?;
        items.extend(page.items);
        match page.next_token {
            Some(token) => path = format!("/2025-09-09/microvms?maxResults=50&nextToken={}", names::escape(&token)),
            None => return Ok(items),
        }
    }
}

/// The MicroVM whose id begins with `prefix`.
pub async fn find(client: &Client, prefix: &str) -> anyhow::Result<Microvm> {
    let items = all(client).await?;
    Ok(get(client, pick(&items, prefix)?).await?)
}

/// The id that begins with `prefix`.
pub fn pick<'a>(items: &'a [Item], prefix: &str) -> Result<&'a str, names::NameError> {
    names::resolve(prefix, items.iter().map(|item| (item.microvm_id.as_str(), is_live(item))))
}

async fn get(client: &Client, id: &str) -> Result<Microvm, ClientError> {
    client.call(Method::GET, &format!("/2025-09-09/microvms/{}", names::escape(id)), None).await
}

fn is_live(item: &Item) -> bool {
    item.state != "TERMINATED"
}

/// Waits until a MicroVM is in a state, or over.
async fn reach(client: &Client, id: &str, goal: &str) -> anyhow::Result<()> {
    let path = format!("/hearth/v1/microvms/{}/wait?state={goal},TERMINATED&seconds={WAIT_SECONDS}", names::escape(id));
    loop {
        let reached: Reached = client.call(Method::GET, &path, None).await?;
        match reached.state.as_str() {
            state if state == goal => return Ok(()),
            "TERMINATED" => {
                let reason = reached.state_reason.unwrap_or_else(|| "no reason was given".to_owned());
                bail!("{id} is TERMINATED: {reason}\n  `hearth logs {id}` shows what its app wrote");
            }
            _ => {}
        }
    }
}
