//! Reading logs as from CloudWatch Logs, in the protocol AWS JSON 1.1: DescribeLogGroups, DescribeLogStreams, GetLogEvents, FilterLogEvents.
//!
//! A token is a place in the logs, which needs no secret: whoever makes one up reads no more than the group that the call names and that the
//! caller's own account and region have. Nothing can be written or set here: what MicroVMs write comes from inside, and how much is kept is
//! the operator's to say.

mod input;
mod pattern;
#[cfg(test)]
mod tests;

use std::time::SystemTime;

use axum::{body::Body, extract::Request, response::Response};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use http::{HeaderValue, header::CONTENT_TYPE, request::Parts};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use hearth_control::{
    logs::{Event, Filter, Limits, LogGroup, LogStore, Place, Position, ReadError, StreamInfo, Streams, Times, event_id},
    types::Caller,
};

use self::{
    input::{DescribeGroups, DescribeStreams, Faults, FilterEvents, GetEvents, MOST_DESCRIBED, MOST_EVENTS, invalid},
    pattern::Pattern,
};
use crate::{Api, authorize::Decider, error::ApiError, read_body};

/// What `X-Amz-Target` begins with.
pub(crate) const TARGET: &str = "Logs_20140328.";
/// Bytes of events in a page, as the service counts them.
const PAGE_BYTES: usize = 1 << 20;
/// Digits in a token of GetLogEvents.
const TOKEN_DIGITS: usize = 56;

/// Answers one call.
pub(crate) async fn answer<S>(api: &Api<S>, request: Request, request_id: &str) -> Response {
    let (parts, body) = request.into_parts();
    match call(api, &parts, body).await {
        Ok(output) => {
            let mut response = Response::new(Body::from(output.to_string()));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-amz-json-1.1"));
            response
        }
        Err(error) => error.into_aws_json(request_id),
    }
}

async fn call<S>(api: &Api<S>, parts: &Parts, body: Body) -> Result<Value, ApiError> {
    let body = read_body(body).await?;
    let who = api.auth.identify(parts, &body, "logs")?;
    if !api.settings.serves(&who.caller.region) {
        return Err(ApiError::access_denied(None));
    }
    let target = parts.headers.get("x-amz-target").and_then(|target| target.to_str().ok()).unwrap_or_default();
    let operation = target.strip_prefix(TARGET).unwrap_or_default();
    let decider = Decider { plane: api.plane.as_ref(), directory: api.auth.directory(), who: &who, source: crate::source(parts) };
    let reader = Reader { logs: &api.logs, caller: &who.caller, operation, decider };
    match operation {
        "DescribeLogGroups" => reader.describe_groups(read(&body)?).await,
        "DescribeLogStreams" => reader.describe_streams(read(&body)?).await,
        "GetLogEvents" => reader.get_events(read(&body)?).await,
        "FilterLogEvents" => reader.filter_events(read(&body)?).await,
        "StartLiveTail" => Err(ApiError::client(
            "InvalidOperationException",
            "StartLiveTail is not supported by Hearth. Follow a log with FilterLogEvents, as `aws logs tail --follow` does.",
        )),
        other => Err(ApiError::client(
            "UnknownOperationException",
            format!(
                "{other} is not supported by Hearth, which has DescribeLogGroups, DescribeLogStreams, GetLogEvents and FilterLogEvents of \
                 CloudWatch Logs."
            ),
        )),
    }
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let body = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(body).map_err(|error| ApiError::client("SerializationException", format!("The request cannot be read: {error}")))
}

impl From<ReadError> for ApiError {
    fn from(error: ReadError) -> Self {
        match &error {
            ReadError::NoGroup | ReadError::NoStream => Self::client("ResourceNotFoundException", error.to_string()),
            ReadError::Io(_) => Self::internal(error.to_string()),
        }
    }
}

fn failed(error: &std::io::Error) -> ApiError {
    ApiError::internal(format!("reading logs: {error}"))
}

/// One call, and whose it is.
struct Reader<'r> {
    logs: &'r LogStore,
    caller: &'r Caller,
    operation: &'r str,
    decider: Decider<'r>,
}

impl Reader<'_> {
    async fn describe_groups(&self, input: DescribeGroups) -> Result<Value, ApiError> {
        let mut faults = Faults::default();
        faults.limit(input.limit, MOST_DESCRIBED);
        faults.token(input.next_token.as_deref());
        faults.group("logGroupNamePrefix", input.log_group_name_prefix.as_deref());
        faults.group("logGroupNamePattern", input.log_group_name_pattern.as_deref().filter(|pattern| !pattern.is_empty()));
        faults.choice("logGroupClass", input.log_group_class.as_deref(), &["STANDARD", "INFREQUENT_ACCESS", "DELIVERY"]);
        faults.check()?;
        if input.log_group_name_prefix.is_some() && input.log_group_name_pattern.is_some() {
            return Err(invalid("LogGroup name prefix and LogGroup name pattern are mutually exclusive parameters."));
        }
        self.allow("", "")?;
        let after: Option<String> = input.next_token.as_deref().map(open).transpose()?;
        let prefix = input.log_group_name_prefix.unwrap_or_default();
        let part = input.log_group_name_pattern.unwrap_or_default();
        let standard = input.log_group_class.is_none_or(|class| class == "STANDARD");
        let mut names = self.logs.list_groups(&self.caller.account, &self.caller.region).await.map_err(|error| failed(&error))?;
        names.retain(|name| {
            standard && name.starts_with(&prefix) && name.contains(&part) && after.as_ref().is_none_or(|after| name > after)
        });
        let next = cut(&mut names, input.limit);
        let mut groups = Vec::new();
        for name in names {
            match self.logs.describe_group(&self.group(&name)).await {
                Ok(info) => groups.push(json!({
                    "logGroupName": info.name, "creationTime": info.created_ms, "metricFilterCount": 0, "storedBytes": info.bytes,
                    "retentionInDays": self.logs.retention().age.as_secs().div_ceil(24 * 3600), "logGroupClass": "STANDARD",
                    "arn": format!("{}:*", self.arn(&info.name)), "logGroupArn": self.arn(&info.name),
                })),
                // Its time has come since.
                Err(ReadError::NoGroup) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(page("logGroups", groups, next.map(|name| seal(&name))))
    }

    async fn describe_streams(&self, input: DescribeStreams) -> Result<Value, ApiError> {
        let mut faults = Faults::default();
        faults.limit(input.limit, MOST_DESCRIBED);
        faults.token(input.next_token.as_deref());
        faults.stream("logStreamNamePrefix", input.log_stream_name_prefix.as_deref());
        faults.choice("orderBy", input.order_by.as_deref(), &["LogStreamName", "LastEventTime"]);
        let group = self.named_group(input.log_group_name, input.log_group_identifier, faults)?;
        let by_time = input.order_by.as_deref() == Some("LastEventTime");
        if by_time && input.log_stream_name_prefix.is_some() {
            return Err(invalid("Cannot order by LastEventTime with a logStreamNamePrefix."));
        }
        self.allow(&group.name, "")?;
        let after: Option<(u64, String)> = input.next_token.as_deref().map(open).transpose()?;
        let prefix = input.log_stream_name_prefix.unwrap_or_default();
        let descending = input.descending.unwrap_or(false);
        let streams = self.logs.list_streams(&group).await?;
        let key = |(name, grown): (String, SystemTime)| (if by_time { millis(grown) } else { 0 }, name);
        let mut keys: Vec<(u64, String)> = streams.into_iter().map(key).filter(|(_, name)| name.starts_with(&prefix)).collect();
        keys.sort();
        if descending {
            keys.reverse();
        }
        keys.retain(|key| after.as_ref().is_none_or(|after| if descending { key < after } else { key > after }));
        let next = cut(&mut keys, input.limit);
        let mut streams = Vec::new();
        for (_, name) in keys {
            match self.logs.describe_stream(&group, &name).await {
                Ok(info) => streams.push(self.stream(&group, info)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        Ok(page("logStreams", streams, next.map(|key| seal(&key))))
    }

    async fn get_events(&self, input: GetEvents) -> Result<Value, ApiError> {
        let mut faults = Faults::default();
        faults.limit(input.limit, MOST_EVENTS);
        faults.token(input.next_token.as_deref());
        faults.time("startTime", input.start_time);
        faults.time("endTime", input.end_time);
        faults.stream("logStreamName", input.log_stream_name.as_deref());
        if input.log_stream_name.is_none() {
            faults.missing("logStreamName");
        }
        let group = self.named_group(input.log_group_name, input.log_group_identifier, faults)?;
        let stream = input.log_stream_name.unwrap_or_default();
        self.allow(&group.name, &stream)?;
        let place = match input.next_token.as_deref() {
            Some(token) => place(token).ok_or_else(|| invalid("The specified nextToken is invalid."))?,
            None if input.start_from_head == Some(true) => Place::Head,
            None => Place::Tail,
        };
        let times = Times { start: time(input.start_time, 0), end: time(input.end_time, u64::MAX) };
        let page = self.logs.events(&group, &stream, times, place, limits(input.limit)).await?;
        let events: Vec<Value> = page.events.into_iter().map(event).collect();
        Ok(json!({
            "events": events,
            "nextForwardToken": format!("f/{:0TOKEN_DIGITS$}/s", page.after),
            "nextBackwardToken": format!("b/{:0TOKEN_DIGITS$}/s", page.before),
        }))
    }

    async fn filter_events(&self, input: FilterEvents) -> Result<Value, ApiError> {
        let mut faults = Faults::default();
        faults.limit(input.limit, MOST_EVENTS);
        faults.token(input.next_token.as_deref());
        faults.time("startTime", input.start_time);
        faults.time("endTime", input.end_time);
        faults.text("filterPattern", input.filter_pattern.as_deref(), 1024);
        faults.stream("logStreamNamePrefix", input.log_stream_name_prefix.as_deref());
        for name in input.log_stream_names.iter().flatten() {
            faults.stream("logStreamNames", Some(name));
        }
        faults.count("logStreamNames", input.log_stream_names.as_deref(), 100);
        let group = self.named_group(input.log_group_name, input.log_group_identifier, faults)?;
        let streams = match (input.log_stream_names, input.log_stream_name_prefix) {
            (Some(_), Some(_)) => return Err(invalid("logStreamNames and logStreamNamePrefix are mutually exclusive parameters.")),
            (Some(names), None) => Streams::Names(names),
            (None, Some(prefix)) => Streams::Prefix(prefix),
            (None, None) => Streams::All,
        };
        let pattern = Pattern::parse(input.filter_pattern.as_deref().unwrap_or_default()).map_err(|error| invalid(error.to_string()))?;
        self.allow(&group.name, "")?;
        let after: Option<(u64, String, u64)> = input.next_token.as_deref().map(open).transpose()?;
        let filter = Filter {
            streams,
            // The end is part of it here, which it is not for GetLogEvents.
            times: Times { start: time(input.start_time, 0), end: time(input.end_time, u64::MAX).saturating_add(1) },
            after: after.map(|(time_ms, stream, offset)| Position { time_ms, stream, offset }),
            limits: limits(input.limit),
            wanted: Box::new(move |text| pattern.matches(text)),
        };
        let found = self.logs.filter(&group, filter).await?;
        let events = found.events.into_iter().map(|(stream, found)| {
            let id = event_id(&group.name, &stream, &found);
            let mut event = event(found);
            event["eventId"] = id.into();
            event["logStreamName"] = stream.into();
            event
        });
        let mut output = page("events", events.collect(), found.next.map(|next| seal(&(next.time_ms, next.stream, next.offset))));
        output["searchedLogStreams"] = json!([]);
        Ok(output)
    }

    fn group(&self, name: &str) -> LogGroup {
        LogGroup::new(&self.caller.account, &self.caller.region, name)
    }

    fn arn(&self, group: &str) -> String {
        format!("arn:aws:logs:{}:{}:log-group:{group}", self.caller.region, self.caller.account)
    }

    /// The group that a call names, one way or the other. Somebody else's does not exist.
    fn named_group(&self, name: Option<String>, identifier: Option<String>, mut faults: Faults) -> Result<LogGroup, ApiError> {
        faults.group("logGroupName", name.as_deref());
        faults.identifier(identifier.as_deref());
        faults.check()?;
        let name = match (name, identifier) {
            (Some(name), None) => name,
            (None, Some(identifier)) if identifier.starts_with("arn:") => {
                identifier.strip_prefix(&self.arn("")).filter(|name| !name.contains(':')).ok_or(ReadError::NoGroup)?.to_owned()
            }
            (None, Some(name)) => name,
            (Some(_), Some(_)) => return Err(invalid("LogGroup name and LogGroup identifier are mutually exclusive parameters.")),
            (None, None) => return Err(invalid("Either LogGroup name or LogGroup identifier must be given.")),
        };
        Ok(self.group(&name))
    }

    /// Gives leave, or refuses. Policies of CloudWatch Logs name a group's ARN with `:*` behind it.
    fn allow(&self, group: &str, stream: &str) -> Result<(), ApiError> {
        let context = self.decider.context(&Map::new());
        let resource = format!("{}:log-stream:{stream}", self.arn(group));
        Ok(self.decider.allow(&format!("logs:{}", self.operation), &resource, &context)?)
    }

    fn stream(&self, group: &LogGroup, info: StreamInfo) -> Value {
        let mut stream = json!({
            "logStreamName": info.name, "creationTime": info.created_ms, "storedBytes": 0,
            "arn": format!("{}:log-stream:{}", self.arn(&group.name), info.name),
        });
        let times = [("firstEventTimestamp", info.first_ms), ("lastEventTimestamp", info.last_ms), ("lastIngestionTime", info.ingested_ms)];
        for (member, time) in times {
            if let Some(time) = time {
                stream[member] = time.into();
            }
        }
        stream
    }
}

fn event(event: Event) -> Value {
    json!({"timestamp": event.time_ms, "message": event.text, "ingestionTime": event.ingested_ms})
}

fn page(member: &str, items: Vec<Value>, next: Option<String>) -> Value {
    let mut page = json!({member: items});
    if let Some(next) = next {
        page["nextToken"] = next.into();
    }
    page
}

/// Leaves a page's worth; returns where the next page begins, if there is one.
fn cut<T: Clone>(items: &mut Vec<T>, limit: Option<i64>) -> Option<T> {
    let limit = usize::try_from(limit.unwrap_or(MOST_DESCRIBED)).unwrap_or(1);
    let more = items.len() > limit;
    items.truncate(limit);
    items.last().filter(|_| more).cloned()
}

fn limits(events: Option<i64>) -> Limits {
    Limits { events: usize::try_from(events.unwrap_or(MOST_EVENTS)).unwrap_or(1), bytes: PAGE_BYTES }
}

fn time(time: Option<i64>, absent: u64) -> u64 {
    time.and_then(|time| u64::try_from(time).ok()).unwrap_or(absent)
}

fn millis(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// `f/<offset>/s` goes on from there, `b/<offset>/s` goes back.
fn place(token: &str) -> Option<Place> {
    let (direction, offset) = token.strip_suffix("/s")?.split_once('/')?;
    let offset = Some(offset).filter(|offset| offset.len() == TOKEN_DIGITS)?.parse().ok()?;
    match direction {
        "f" => Some(Place::From(offset)),
        "b" => Some(Place::Before(offset)),
        _ => None,
    }
}

fn seal<T: Serialize>(place: &T) -> String {
    BASE64.encode(json!(place).to_string())
}

fn open<T: DeserializeOwned>(token: &str) -> Result<T, ApiError> {
    let bytes = BASE64.decode(token).ok();
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).ok_or_else(|| invalid("The specified nextToken is invalid."))
}
