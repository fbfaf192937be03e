//! The story that the demo tells: from a directory with a Dockerfile to MicroVMs that sleep and wake.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{demo::Chapter, server::Server, shell::Shell};

const BUILD_LIMIT: Duration = Duration::from_secs(600);
const LIMIT: Duration = Duration::from_secs(60);

/// The chapters, in order.
pub const CHAPTERS: &[Chapter] = &[
    ("A directory with a Dockerfile becomes an S3 object", upload),
    ("The object becomes an image: built, booted, snapshotted", build),
    ("A MicroVM starts from the snapshot", launch),
    ("It answers on its own endpoint, to those who hold a token", talk),
    ("Three MicroVMs from one image do not share anything", three),
    ("Idle MicroVMs fall asleep, and wake on the next request", sleep),
    ("Suspended, resumed and terminated by hand, and by the clock", by_hand),
    ("The image is deleted", delete),
];

fn upload(shell: &mut Shell, _: &mut Server) -> Result<()> {
    shell.run("(cd $EXAMPLE && zip --quiet --recurse-paths - .) > flask-hello.zip")?;
    shell.run("aws s3 mb s3://artifacts")?;
    shell.run("aws s3 cp --no-progress flask-hello.zip s3://artifacts/flask-hello.zip")?;
    Ok(())
}

fn build(shell: &mut Shell, server: &mut Server) -> Result<()> {
    let image = shell.json(
        "aws lambda-microvms create-microvm-image --name flask-hello --code-artifact uri=s3://artifacts/flask-hello.zip \\\n    \
         --base-image-arn arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1 --build-role-arn arn:aws:iam::000000000000:role/build \\\n    \
         --resources minimumMemoryInMiB=512",
    )?;
    shell.assign("IMAGE", text(&image, "imageArn")?);
    shell.follow("hearth logs flask-hello --follow", BUILD_LIMIT)?;
    let state = "aws lambda-microvms get-microvm-image --image-identifier $IMAGE --query state --output text";
    shell.until(server, state, "CREATED", LIMIT)?;
    let image = shell.json("aws lambda-microvms get-microvm-image --image-identifier $IMAGE")?;
    ensure!(image["latestActiveImageVersion"] == "1.0", "the image has no active version 1.0");
    Ok(())
}

fn launch(shell: &mut Shell, server: &mut Server) -> Result<()> {
    run_microvm(shell, "MVM", r#"--idle-policy '{"maxIdleDurationSeconds":8,"suspendedDurationSeconds":600,"autoResumeEnabled":true}'"#)?;
    until_state(shell, server, "MVM", "RUNNING")?;
    shell.run("aws lambda-microvms get-microvm --microvm-identifier $MVM")?;
    shell.run("aws lambda-microvms list-microvms --output text")?;
    Ok(())
}

fn talk(shell: &mut Shell, _: &mut Server) -> Result<()> {
    mint(shell, "MVM", "TOKEN")?;
    for count in 1..=2 {
        count_is(shell, "TOKEN", "MVM_ENDPOINT", count)?;
    }
    let code = "curl --silent --output answer --write-out '%{http_code} ' ";
    shell.expect(&format!("{code} https://$MVM_ENDPOINT:$PORT/; cat answer"), "403 Request missing authentication")?;
    shell.expect(
        &format!("{code} -H \"X-aws-proxy-auth: $TOKEN\" -H 'X-aws-proxy-port: 22' https://$MVM_ENDPOINT:$PORT/; cat answer"),
        "403 Access to port denied",
    )
}

fn three(shell: &mut Shell, server: &mut Server) -> Result<()> {
    run_microvm(
        shell,
        "MVM2",
        r#"--idle-policy '{"maxIdleDurationSeconds":12,"suspendedDurationSeconds":600,"autoResumeEnabled":false}'"#,
    )?;
    run_microvm(shell, "MVM3", "")?;
    for (name, token) in [("MVM2", "TOKEN2"), ("MVM3", "TOKEN3")] {
        until_state(shell, server, name, "RUNNING")?;
        mint(shell, name, token)?;
        count_is(shell, token, &format!("{name}_ENDPOINT"), 1)?;
    }
    count_is(shell, "TOKEN", "MVM_ENDPOINT", 3)?;
    let other = "curl --silent --output answer --write-out '%{http_code} ' -H \"X-aws-proxy-auth: $TOKEN2\"";
    shell.expect(&format!("{other} https://$MVM_ENDPOINT:$PORT/; cat answer"), "403 Token authentication failed")
}

fn sleep(shell: &mut Shell, server: &mut Server) -> Result<()> {
    until_state(shell, server, "MVM", "SUSPENDED")?;
    shell.expect("pgrep --full \"qemu.*$MVM\" || echo its process is gone", "its process is gone")?;
    count_is(shell, "TOKEN", "MVM_ENDPOINT", 4)?;
    until_state(shell, server, "MVM", "RUNNING")?;

    until_state(shell, server, "MVM2", "SUSPENDED")?;
    let code = "curl --silent --output answer --write-out '%{http_code}'";
    let request = "-H \"X-aws-proxy-auth: $TOKEN2\" -H 'X-aws-proxy-port: 5000' https://$MVM2_ENDPOINT:$PORT/";
    shell.expect(&format!("{code} {request}"), "502")?;
    shell.run("aws lambda-microvms resume-microvm --microvm-identifier $MVM2")?;
    until_state(shell, server, "MVM2", "RUNNING")?;
    count_is(shell, "TOKEN2", "MVM2_ENDPOINT", 2)
}

fn by_hand(shell: &mut Shell, server: &mut Server) -> Result<()> {
    run_microvm(shell, "BRIEF", "--maximum-duration-in-seconds 15")?;
    run_microvm(shell, "DOZY", r#"--idle-policy '{"maxIdleDurationSeconds":600,"suspendedDurationSeconds":5,"autoResumeEnabled":true}'"#)?;
    until_state(shell, server, "DOZY", "RUNNING")?;
    shell.run("aws lambda-microvms suspend-microvm --microvm-identifier $DOZY")?;

    shell.run("aws lambda-microvms suspend-microvm --microvm-identifier $MVM3")?;
    until_state(shell, server, "MVM3", "SUSPENDED")?;
    shell.run("aws lambda-microvms resume-microvm --microvm-identifier $MVM3")?;
    until_state(shell, server, "MVM3", "RUNNING")?;
    count_is(shell, "TOKEN3", "MVM3_ENDPOINT", 2)?;

    until_state(shell, server, "DOZY", "TERMINATED")?;
    until_state(shell, server, "BRIEF", "TERMINATED")?;
    shell.expect(
        "aws lambda-microvms get-microvm --microvm-identifier $BRIEF --query stateReason --output text",
        "MicroVM exceeded maximum lifetime.",
    )?;
    for name in ["MVM3", "MVM3", "MVM2", "MVM"] {
        shell.run(&format!("aws lambda-microvms terminate-microvm --microvm-identifier ${name}"))?;
    }
    for name in ["MVM", "MVM2", "MVM3"] {
        until_state(shell, server, name, "TERMINATED")?;
    }
    Ok(())
}

fn delete(shell: &mut Shell, server: &mut Server) -> Result<()> {
    shell.run("aws lambda-microvms delete-microvm-image --image-identifier $IMAGE")?;
    shell.until(server, "aws lambda-microvms list-microvm-images --query 'length(items)' --output text", "0", LIMIT)
}

/// Runs a MicroVM and sets `name` to its id, `name_ENDPOINT` to its endpoint.
fn run_microvm(shell: &mut Shell, name: &str, options: &str) -> Result<()> {
    let microvm = shell.json(format!("aws lambda-microvms run-microvm --image-identifier $IMAGE {options}").trim_end())?;
    shell.assign(name, text(&microvm, "microvmId")?);
    shell.assign(&format!("{name}_ENDPOINT"), text(&microvm, "endpoint")?);
    Ok(())
}

fn until_state(shell: &Shell, server: &mut Server, name: &str, state: &str) -> Result<()> {
    let query = format!("aws lambda-microvms get-microvm --microvm-identifier ${name} --query state --output text");
    shell.until(server, &query, state, LIMIT)
}

fn mint(shell: &mut Shell, name: &str, token: &str) -> Result<()> {
    let answer = shell.json(&format!(
        "aws lambda-microvms create-microvm-auth-token --microvm-identifier ${name} --expiration-in-minutes 30 --allowed-ports port=5000"
    ))?;
    let value = answer["authToken"]["X-aws-proxy-auth"].as_str().context("the answer has no X-aws-proxy-auth")?;
    shell.assign(token, value);
    Ok(())
}

/// Asks the app, which must answer 200 and count this request, in memory and on disk, as the `count`th.
fn count_is(shell: &Shell, token: &str, endpoint: &str, count: u64) -> Result<()> {
    let answer = shell.json(&format!(
        "curl --silent --fail-with-body -H \"X-aws-proxy-auth: ${token}\" -H 'X-aws-proxy-port: 5000' https://${endpoint}:$PORT/"
    ))?;
    for counter in ["memory", "disk"] {
        ensure!(answer[counter] == count, "the {counter} counter is {}, expected {count}", answer[counter]);
    }
    Ok(())
}

fn text<'a>(answer: &'a Value, member: &str) -> Result<&'a str> {
    answer[member].as_str().with_context(|| format!("the answer has no {member}"))
}
