//! The service's model as data: every operation with its route, and every shape of its input with its constraints (SPEC appendix A).
//!
//! `model.json` beside this file is the extract of the published service models of API versions 2025-09-09 and 2026-04-30 that a server needs.

use std::{collections::HashMap, sync::LazyLock};

use percent_encoding::percent_decode_str;
use regex::Regex;
use serde::Deserialize;

/// The model that this build was made with.
pub(crate) static MODEL: LazyLock<Model> =
    LazyLock::new(|| serde_json::from_str(include_str!("model.json")).expect("model.json is part of the build and a test parses it"));

#[derive(Debug, Deserialize)]
pub(crate) struct Model {
    pub operations: Vec<Operation>,
    shapes: HashMap<String, Shape>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Operation {
    pub name: String,
    pub method: String,
    /// For example `/2025-09-09/microvms/{microvmIdentifier}/suspend`.
    pub uri: String,
    /// HTTP status of success.
    pub status: u16,
    /// Name of the input's shape.
    pub input: String,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(crate) enum Shape {
    Boolean,
    Integer(Bounds),
    String(StringShape),
    List {
        member: String,
        #[serde(flatten)]
        bounds: Bounds,
    },
    Map {
        key: String,
        value: String,
        #[serde(flatten)]
        bounds: Bounds,
    },
    Structure {
        members: Vec<Member>,
        #[serde(default)]
        union: bool,
    },
}

/// Least and greatest value, length in code points, or number of items.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(crate) struct Bounds {
    pub min: Option<i64>,
    pub max: Option<i64>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct StringShape {
    #[serde(flatten)]
    pub bounds: Bounds,
    pub pattern: Option<Pattern>,
    #[serde(rename = "enum", default)]
    pub values: Vec<String>,
    #[serde(default)]
    pub sensitive: bool,
}

/// A regular expression that must match all of a string.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Pattern {
    /// As the model writes it.
    pub text: String,
    regex: Regex,
}

impl TryFrom<String> for Pattern {
    type Error = regex::Error;

    fn try_from(text: String) -> Result<Self, regex::Error> {
        let regex = Regex::new(&format!(r"\A(?:{text})\z"))?;
        Ok(Self { text, regex })
    }
}

impl Pattern {
    pub fn matches(&self, text: &str) -> bool {
        self.regex.is_match(text)
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct Member {
    pub name: String,
    pub shape: String,
    #[serde(default)]
    pub required: bool,
    #[serde(rename = "in", default)]
    pub location: Location,
    /// Its name in the query string, if that is another one.
    wire: Option<String>,
}

impl Member {
    pub fn wire_name(&self) -> &str {
        self.wire.as_deref().unwrap_or(&self.name)
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Location {
    #[default]
    Body,
    Uri,
    QueryString,
}

/// Members that a path names, decoded.
pub(crate) type Labels<'m> = Vec<(&'m str, String)>;

/// Why a request leads to no operation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NoRoute {
    /// nothing has this method and path
    Unknown,
    /// an escape in the path is not UTF-8
    Malformed,
}

impl Model {
    /// The operation that answers `method` on a raw (not yet decoded) path.
    pub fn route(&self, method: &str, path: &str) -> Result<(&Operation, Labels<'_>), NoRoute> {
        self.operations
            .iter()
            .filter(|operation| operation.method == method)
            .find_map(|operation| operation.labels(path).map(|labels| (operation, labels)))
            .ok_or(NoRoute::Unknown)
            .and_then(|(operation, labels)| Ok((operation, decode(labels)?)))
    }

    /// A shape by its name.
    pub fn shape(&self, name: &str) -> &Shape {
        self.shapes.get(name).expect("a test looks every name in the model up")
    }

    /// The members of an operation's input.
    pub fn input(&self, operation: &Operation) -> &[Member] {
        match self.shape(&operation.input) {
            Shape::Structure { members, .. } => members,
            _ => &[],
        }
    }
}

impl Operation {
    fn labels<'m, 'p>(&'m self, path: &'p str) -> Option<Vec<(&'m str, &'p str)>> {
        let mut labels = Vec::new();
        let mut actual = path.split('/');
        for expected in self.uri.split('/') {
            let actual = actual.next()?;
            match expected.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
                Some(label) => labels.push((label, actual)),
                None if expected == actual => {}
                None => return None,
            }
        }
        actual.next().is_none().then_some(labels)
    }
}

fn decode<'m>(labels: Vec<(&'m str, &str)>) -> Result<Labels<'m>, NoRoute> {
    labels
        .into_iter()
        .map(|(label, raw)| percent_decode_str(raw).decode_utf8().map(|text| (label, text.into_owned())).map_err(|_| NoRoute::Malformed))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_whole() {
        assert_eq!(MODEL.operations.len(), 30);
        for operation in &MODEL.operations {
            assert!(matches!(MODEL.shape(&operation.input), Shape::Structure { .. }), "{}", operation.name);
        }
        for shape in MODEL.shapes.values() {
            let names: Vec<&String> = match shape {
                Shape::List { member, .. } => vec![member],
                Shape::Map { key, value, .. } => vec![key, value],
                Shape::Structure { members, .. } => members.iter().map(|member| &member.shape).collect(),
                Shape::Boolean | Shape::Integer(_) | Shape::String(_) => Vec::new(),
            };
            for name in names {
                assert!(MODEL.shapes.contains_key(name), "{name}");
            }
        }
    }

    #[test]
    fn every_label_of_a_route_is_a_member() {
        for operation in &MODEL.operations {
            let (found, labels) = MODEL.route(&operation.method, &operation.uri).unwrap();
            assert_eq!(found.name, operation.name);
            for (label, _) in labels {
                let members = MODEL.input(operation);
                assert!(members.iter().any(|m| m.name == label && m.location == Location::Uri), "{}: {label}", operation.name);
            }
        }
    }

    #[test]
    fn arns_in_paths_may_be_encoded_or_raw() {
        let arn = "arn:aws:lambda:us-east-1:000000000000:microvm-image:demo";
        for written in [arn.to_owned(), arn.replace(':', "%3A"), arn.replace(':', "%3a")] {
            let path = format!("/2025-09-09/microvm-images/{written}/versions/1.0");
            let (operation, labels) = MODEL.route("GET", &path).unwrap();
            assert_eq!(operation.name, "GetMicrovmImageVersion");
            assert_eq!(labels, [("imageIdentifier", arn.to_owned()), ("imageVersion", "1.0".to_owned())]);
        }
    }

    #[test]
    fn an_encoded_slash_stays_in_its_label() {
        let (operation, labels) = MODEL.route("GET", "/2025-09-09/microvm-images/a%2Fversions%2F1.0").unwrap();
        assert_eq!((operation.name.as_str(), labels[0].1.as_str()), ("GetMicrovmImage", "a/versions/1.0"));
    }

    #[test]
    fn other_routes_are_unknown() {
        for (method, path) in [
            ("GET", "/"),
            ("GET", "/2025-09-09"),
            ("PATCH", "/2025-09-09/microvms"),
            ("GET", "/2025-09-09/microvms/microvm-1/exec"),
            ("GET", "/2025-09-09/microvm-images/arn:aws:lambda:us-east-1:000000000000:microvm-image/demo"),
            ("GET", "/2015-03-31/functions"),
        ] {
            assert_eq!(MODEL.route(method, path).unwrap_err(), NoRoute::Unknown, "{method} {path}");
        }
        assert_eq!(MODEL.route("GET", "/2025-09-09/microvms/%ff").unwrap_err(), NoRoute::Malformed);
    }
}
