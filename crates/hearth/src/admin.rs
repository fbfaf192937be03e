//! Routes under `/hearth/v1` that AWS does not have: what the command line needs beside the AWS API. On the administrator's socket only.
//!
//! | route | answer |
//! |---|---|
//! | `GET microvms/<id>/wait?state=A,B&seconds=N` | `{state, stateReason}` as soon as the MicroVM is in one of the states, or after N seconds |
//! | `GET images/<name>/wait?seconds=N` | the same of an image, as soon as it is neither being built nor being deleted |
//! | `GET logs?microvm=<id>` or `?image=<name>`, `&follow=true` | lines of text; with `follow` until the MicroVM or the build is over |
//! | `PUT artifacts/<name>` | stores the body, `{uri}` |

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Path, Query, State},
    response::{IntoResponse, Response},
    routing::{get, put},
};
use bytes::Bytes;
use futures::StreamExt;
use hearth_control::{
    ControlError,
    arn::ImageArn,
    logs::{LogGroup, LogLine, LogStore, build_streams, stream_name},
    plane::ControlPlane,
    types::{Build, Caller, Image, ImageState, Microvm, MicrovmState, PageRequest},
};
use hearth_objects::Objects;
use http::StatusCode;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::AsyncWriteExt,
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// Bucket of what `hearth image build` sends.
const BUCKET: &str = "hearth-cli";
/// Longest wait of one call, whatever it asks for.
const LONGEST_WAIT: Duration = Duration::from_secs(50);
/// Lines that wait for a slow reader of a log.
const LINES_AHEAD: usize = 256;

/// What the routes work with.
#[derive(Clone)]
pub struct Admin {
    /// The domain.
    pub plane: Arc<dyn ControlPlane>,
    /// Ticks after each change of an image or a MicroVM.
    pub changes: watch::Receiver<u64>,
    /// The server stops: whoever waits is sent away.
    pub stop: CancellationToken,
    pub logs: Arc<LogStore>,
    pub objects: Arc<dyn Objects>,
    /// Whose images and MicroVMs these are.
    pub caller: Caller,
    /// Scratch space.
    pub tmp: PathBuf,
}

/// The routes.
pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/hearth/v1/microvms/{id}/wait", get(wait_for_microvm))
        .route("/hearth/v1/images/{name}/wait", get(wait_for_image))
        .route("/hearth/v1/logs", get(read_log))
        .route("/hearth/v1/artifacts/{name}", put(store_artifact).layer(DefaultBodyLimit::disable()))
        .with_state(admin)
}

/// A call that cannot be answered.
#[derive(Debug, thiserror::Error)]
enum AdminError {
    /// the domain refuses
    #[error(transparent)]
    Control(#[from] ControlError),
    /// the query makes no sense
    #[error("{0}")]
    Query(&'static str),
    /// the artifact could not be stored
    #[error("storing the artifact failed: {0}")]
    Store(String),
    /// the server stops
    #[error("the server is stopping")]
    Stopping,
}

impl IntoResponse for AdminError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Query(_) | Self::Control(ControlError::Invalid(_)) => StatusCode::BAD_REQUEST,
            Self::Control(ControlError::ImageNotFound(_) | ControlError::VersionNotFound { .. } | ControlError::MicrovmNotFound(_)) => {
                StatusCode::NOT_FOUND
            }
            Self::Control(_) | Self::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, Json(serde_json::json!({"message": self.to_string()}))).into_response()
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Reached<S> {
    state: S,
    state_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Wait {
    /// States, separated by commas.
    #[serde(default)]
    state: String,
    seconds: u64,
}

impl Wait {
    fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_secs(self.seconds).min(LONGEST_WAIT)
    }
}

async fn wait_for_microvm(
    State(admin): State<Admin>,
    Path(id): Path<String>,
    Query(wait): Query<Wait>,
) -> Result<Json<Reached<MicrovmState>>, AdminError> {
    let states: Option<Vec<MicrovmState>> = wait.state.split(',').map(parse).collect();
    let states = states.ok_or(AdminError::Query("`state` is not a list of states such as RUNNING,TERMINATED"))?;
    let read = || admin.plane.get_microvm(&admin.caller, &id);
    let microvm = watch(admin.changes.clone(), &admin.stop, wait.deadline(), read, |microvm| states.contains(&microvm.state)).await?;
    Ok(Json(Reached { state: microvm.state, state_reason: microvm.state_reason }))
}

async fn wait_for_image(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Query(wait): Query<Wait>,
) -> Result<Json<Reached<ImageState>>, AdminError> {
    let arn = admin.arn(&name);
    let read = || admin.plane.get_image(&admin.caller, &arn);
    let image = watch(admin.changes.clone(), &admin.stop, wait.deadline(), read, |image| is_settled(image.state)).await?;
    let build = admin.latest_build(&arn).await?;
    Ok(Json(Reached { state: image.state, state_reason: build.and_then(|build| build.state_reason) }))
}

/// Reads until what is read is `wanted`, once after each change, and returns what was read last when the deadline comes first.
async fn watch<T, F>(
    mut changes: watch::Receiver<u64>,
    stop: &CancellationToken,
    deadline: Instant,
    mut read: impl FnMut() -> F,
    wanted: impl Fn(&T) -> bool,
) -> Result<T, AdminError>
where
    F: Future<Output = Result<T, ControlError>>,
{
    loop {
        // Seen before it is read: a change during the read is not missed.
        changes.mark_unchanged();
        let read = read().await?;
        if wanted(&read) {
            return Ok(read);
        }
        tokio::select! {
            changed = changes.changed() => changed.map_err(|_closed| AdminError::Stopping)?,
            () = stop.cancelled() => return Err(AdminError::Stopping),
            () = tokio::time::sleep_until(deadline) => return Ok(read),
        }
    }
}

#[derive(Debug, Deserialize)]
struct LogQuery {
    microvm: Option<String>,
    image: Option<String>,
    #[serde(default)]
    follow: bool,
}

/// Whose log is read.
#[derive(Debug, Clone)]
enum Source {
    Microvm(String),
    /// ARN of the image.
    Image(String),
}

/// Streams of the log store, in the order in which they are written, and whether more can come.
struct Position {
    group: LogGroup,
    streams: Vec<String>,
    over: bool,
}

async fn read_log(State(admin): State<Admin>, Query(query): Query<LogQuery>) -> Result<Response, AdminError> {
    let source = match (query.microvm, query.image) {
        (Some(id), None) => Source::Microvm(id),
        (None, Some(name)) => Source::Image(admin.arn(&name)),
        _ => return Err(AdminError::Query("name either `microvm` or `image`")),
    };
    // What does not exist is refused here, before the answer begins.
    let position = admin.position(&source).await?;
    let (lines, output) = mpsc::channel(LINES_AHEAD);
    tokio::spawn(async move {
        let copied = match query.follow {
            true => admin.copy_growing(&source, &lines).await.map_err(|error| error.to_string()),
            false => admin.copy_kept(&position, &lines).await.map_err(|error| error.to_string()),
        };
        if let Err(reason) = copied {
            tracing::warn!(?source, reason, "a log was not copied to its end");
        }
    });
    let lines = futures::stream::unfold(output, async |mut output| output.recv().await.map(|line| (line, output)));
    let body = Body::from_stream(lines.map(|line| Ok::<Bytes, std::convert::Infallible>(text(&line))));
    Ok(([(http::header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response())
}

async fn store_artifact(State(admin): State<Admin>, Path(name): Path<String>, body: Body) -> Result<Json<serde_json::Value>, AdminError> {
    let failed = |error: &dyn std::fmt::Display| AdminError::Store(error.to_string());
    let file = tempfile::NamedTempFile::new_in(&admin.tmp).map_err(|error| failed(&error))?;
    let (copy, path) = file.into_parts();
    let mut copy = tokio::fs::File::from_std(copy);
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| failed(&error))?;
        copy.write_all(&chunk).await.map_err(|error| failed(&error))?;
    }
    copy.flush().await.map_err(|error| failed(&error))?;
    let key = format!("{name}/{}.zip", uuid::Uuid::new_v4());
    admin.objects.put(&admin.caller.account, BUCKET, &key, &path).await.map_err(|error| failed(&error))?;
    Ok(Json(serde_json::json!({"uri": format!("s3://{BUCKET}/{key}")})))
}

impl Admin {
    fn arn(&self, name: &str) -> String {
        ImageArn::of(&self.caller, name).to_string()
    }

    /// The build of the image's newest version.
    async fn latest_build(&self, arn: &str) -> Result<Option<Build>, ControlError> {
        let newest = || PageRequest { limit: Some(1), token: None };
        let versions = self.plane.list_image_versions(&self.caller, arn, newest()).await?;
        let Some(version) = versions.items.into_iter().next() else { return Ok(None) };
        let builds = self.plane.list_builds(&self.caller, arn, &version.version, newest()).await?;
        Ok(builds.items.into_iter().next())
    }

    /// Where the log of a MicroVM, or of an image's latest build, is.
    async fn position(&self, source: &Source) -> Result<Position, ControlError> {
        match source {
            Source::Microvm(id) => {
                let microvm: Microvm = self.plane.get_microvm(&self.caller, id).await?;
                let name = ImageArn::parse(&microvm.image_arn)?.name;
                let stream = stream_name(microvm.started_at, &microvm.version, &microvm.id);
                let group = self.logs.own_copy(&self.group(&name), &stream).await;
                Ok(Position { group, streams: vec![stream], over: microvm.state == MicrovmState::Terminated })
            }
            Source::Image(arn) => {
                let image: Image = self.plane.get_image(&self.caller, arn).await?;
                let build = self.latest_build(arn).await?;
                let Some(build) = build else {
                    return Ok(Position { group: self.group(&image.name), streams: Vec::new(), over: is_settled(image.state) });
                };
                let streams = build_streams(build.created_at, &build.version, &build.id);
                let group = self.logs.own_copy(&self.group(&image.name), &streams[0]).await;
                Ok(Position { group, streams: streams.into(), over: is_settled(image.state) })
            }
        }
    }

    fn group(&self, image_name: &str) -> LogGroup {
        LogGroup::of_image(&self.caller.account, &self.caller.region, image_name)
    }

    /// Copies what a log holds.
    async fn copy_kept(&self, position: &Position, lines: &mpsc::Sender<LogLine>) -> io::Result<()> {
        for stream in &position.streams {
            let mut from = 0;
            loop {
                let chunk = self.logs.read(&position.group, stream, from).await?;
                if chunk.lines.is_empty() {
                    break;
                }
                from = chunk.next;
                for line in chunk.lines {
                    if lines.send(line).await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Copies a log until its end, or until nobody reads any more. The log of a MicroVM that sleeps, and of a build that has yet to begin, goes
    /// on later: the next change tells.
    async fn copy_growing(&self, source: &Source, lines: &mpsc::Sender<LogLine>) -> Result<(), ControlError> {
        let mut changes = self.changes.clone();
        let mut copied = 0;
        loop {
            changes.mark_unchanged();
            // Whether more can come must be known from before the last look at the log.
            let position = self.position(source).await?;
            let logs = Arc::clone(&self.logs);
            let group = position.group.clone();
            let all = futures::stream::iter(position.streams.clone()).flat_map(move |stream| logs.follow(&group, &stream, 0));
            let mut log = all.skip(copied);
            loop {
                tokio::select! {
                    line = log.next() => match line {
                        Some(line) => match lines.send(line).await {
                            Ok(()) => copied += 1,
                            Err(_gone) => return Ok(()),
                        },
                        None => break,
                    },
                    () = lines.closed() => return Ok(()),
                    () = self.stop.cancelled() => return Ok(()),
                }
            }
            if position.over {
                return Ok(());
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return Ok(()) },
                () = lines.closed() => return Ok(()),
                () = self.stop.cancelled() => return Ok(()),
            }
        }
    }
}

fn is_settled(state: ImageState) -> bool {
    !matches!(state, ImageState::Creating | ImageState::Updating | ImageState::Deleting)
}

fn parse<T: DeserializeOwned>(name: &str) -> Option<T> {
    serde_json::from_value(name.into()).ok()
}

fn text(line: &LogLine) -> Bytes {
    format!("{}\n", line.text).into()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_change_that_was_waited_for() {
        let (tick, changes) = watch::channel(0);
        let state = Arc::new(AtomicU32::new(0));
        let shared = Arc::clone(&state);
        let read = move || {
            let state = shared.load(Ordering::SeqCst);
            async move { Ok(state) }
        };
        let waiting = tokio::spawn(async move { watch(changes, &CancellationToken::new(), soon(), read, |state| *state == 2).await });
        for next in 1..=2 {
            tokio::task::yield_now().await;
            state.store(next, Ordering::SeqCst);
            tick.send_modify(|ticks| *ticks += 1);
        }
        assert_eq!(waiting.await.unwrap().unwrap(), 2);
    }

    #[tokio::test]
    async fn a_wait_ends_at_its_deadline_with_what_there_is() {
        let (_tick, changes) = watch::channel(0);
        let read = || async { Ok(7) };
        assert_eq!(watch(changes, &CancellationToken::new(), Instant::now(), read, |_| false).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_server() {
        let (_tick, changes) = watch::channel(0);
        let stop = CancellationToken::new();
        stop.cancel();
        let ended = watch(changes, &stop, soon(), || async { Ok(7) }, |_| false).await;
        assert!(matches!(ended, Err(AdminError::Stopping)));
    }

    #[test]
    fn states_are_read_by_their_names() {
        assert_eq!(parse::<MicrovmState>("RUNNING"), Some(MicrovmState::Running));
        assert_eq!(parse::<MicrovmState>("running"), None);
    }
}
