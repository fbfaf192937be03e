//! What the calls of CloudWatch Logs say, and the constraints on it. Members that change nothing here are read over.

use std::fmt::Display;

use serde::Deserialize;

use crate::error::ApiError;

/// Events of a page at most.
pub(super) const MOST_EVENTS: i64 = 10_000;
/// Groups or streams of a page at most.
pub(super) const MOST_DESCRIBED: i64 = 50;

const GROUP_PATTERN: &str = r"[\.\-_/#A-Za-z0-9]+";
const IDENTIFIER_PATTERN: &str = r"[\w#+=/:,.@-]*";
const STREAM_PATTERN: &str = "[^:*]*";

/// DescribeLogGroups.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct DescribeGroups {
    pub log_group_name_prefix: Option<String>,
    pub log_group_name_pattern: Option<String>,
    pub log_group_class: Option<String>,
    pub limit: Option<i64>,
    pub next_token: Option<String>,
}

/// DescribeLogStreams.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct DescribeStreams {
    pub log_group_name: Option<String>,
    pub log_group_identifier: Option<String>,
    pub log_stream_name_prefix: Option<String>,
    pub order_by: Option<String>,
    pub descending: Option<bool>,
    pub limit: Option<i64>,
    pub next_token: Option<String>,
}

/// GetLogEvents.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct GetEvents {
    pub log_group_name: Option<String>,
    pub log_group_identifier: Option<String>,
    pub log_stream_name: Option<String>,
    pub start_time: Option<i64>,
    pub end_time: Option<i64>,
    pub start_from_head: Option<bool>,
    pub limit: Option<i64>,
    pub next_token: Option<String>,
}

/// FilterLogEvents.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct FilterEvents {
    pub log_group_name: Option<String>,
    pub log_group_identifier: Option<String>,
    pub log_stream_names: Option<Vec<String>>,
    pub log_stream_name_prefix: Option<String>,
    pub start_time: Option<i64>,
    pub end_time: Option<i64>,
    pub filter_pattern: Option<String>,
    pub limit: Option<i64>,
    pub next_token: Option<String>,
}

/// Which constraints are broken, in the service's grammar.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<String>);

impl Faults {
    fn add(&mut self, value: &dyn Display, member: &str, constraint: &str) {
        self.0.push(format!("Value '{value}' at '{member}' failed to satisfy constraint: Member must {constraint}"));
    }

    pub fn missing(&mut self, member: &str) {
        self.0.push(format!("Value null at '{member}' failed to satisfy constraint: Member must not be null"));
    }

    pub fn limit(&mut self, limit: Option<i64>, most: i64) {
        match limit {
            Some(limit) if limit < 1 => self.add(&limit, "limit", "have value greater than or equal to 1"),
            Some(limit) if limit > most => self.add(&limit, "limit", &format!("have value less than or equal to {most}")),
            _ => {}
        }
    }

    pub fn time(&mut self, member: &str, time: Option<i64>) {
        if let Some(time) = time.filter(|time| *time < 0) {
            self.add(&time, member, "have value greater than or equal to 0");
        }
    }

    pub fn choice(&mut self, member: &str, value: Option<&str>, choices: &[&str]) {
        if let Some(value) = value.filter(|value| !choices.contains(value)) {
            self.add(&value, member, &format!("satisfy enum value set: [{}]", choices.join(", ")));
        }
    }

    pub fn token(&mut self, token: Option<&str>) {
        if token == Some("") {
            self.add(&"", "nextToken", "have length greater than or equal to 1");
        }
    }

    pub fn count(&mut self, member: &str, list: Option<&[String]>, most: usize) {
        match list {
            Some([]) => self.add(&"[]", member, "have length greater than or equal to 1"),
            Some(list) if list.len() > most => {
                self.add(&format!("[{}]", list.join(", ")), member, &format!("have length less than or equal to {most}"));
            }
            _ => {}
        }
    }

    pub fn text(&mut self, member: &str, value: Option<&str>, most: usize) {
        if let Some(value) = value.filter(|value| value.chars().count() > most) {
            self.add(&value, member, &format!("have length less than or equal to {most}"));
        }
    }

    pub fn group(&mut self, member: &str, name: Option<&str>) {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b".-_/#".contains(&byte);
        self.name(member, name, 512, |name| name.bytes().all(fits), GROUP_PATTERN);
    }

    pub fn identifier(&mut self, identifier: Option<&str>) {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_#+=/:,.@-".contains(&byte);
        self.name("logGroupIdentifier", identifier, 2048, |name| name.bytes().all(fits), IDENTIFIER_PATTERN);
    }

    pub fn stream(&mut self, member: &str, name: Option<&str>) {
        self.name(member, name, 512, |name| !name.contains([':', '*']), STREAM_PATTERN);
    }

    fn name(&mut self, member: &str, name: Option<&str>, most: usize, fits: impl Fn(&str) -> bool, pattern: &str) {
        let Some(name) = name else { return };
        if name.is_empty() {
            self.add(&name, member, "have length greater than or equal to 1");
        }
        self.text(member, Some(name), most);
        if !fits(name) {
            self.add(&name, member, &format!("satisfy regular expression pattern: {pattern}"));
        }
    }

    pub fn check(self) -> Result<(), ApiError> {
        let plural = match self.0.len() {
            0 => return Ok(()),
            1 => "",
            _ => "s",
        };
        Err(invalid(format!("{} validation error{plural} detected: {}", self.0.len(), self.0.join("; "))))
    }
}

pub(super) fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::client("InvalidParameterException", message)
}
