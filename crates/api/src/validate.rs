//! Turns a request into the input of its operation and checks it against the model, in the service's words (SPEC 3.2).

use percent_encoding::percent_decode_str;
use serde_json::{Map, Number, Value};

use crate::model::{Bounds, Labels, Location, MODEL, Member, Operation, Shape, StringShape};

/// The integer whose minimum the server may be configured to lower.
const IDLE_SECONDS: &str = "IdlePolicyMaxIdleDurationSecondsInteger";

/// Why an input is refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Invalid {
    /// the request does not have the types of the model: 400 with a null message
    Malformed,
    /// a value that is no structure where the model has one: 400 with this text in a capital `Message`
    NotAStructure,
    /// constraints that are not met, in the service's grammar
    Constraints(String),
}

/// Collects the members of an operation's input from path, query string and body. Members that the model does not know and members that are
/// null are left out.
pub(crate) fn input(operation: &Operation, labels: Labels<'_>, query: &str, body: &[u8]) -> Result<Map<String, Value>, Invalid> {
    let members = MODEL.input(operation);
    let mut input = Map::new();
    if members.iter().any(|member| member.location == Location::Body) && !body.is_empty() {
        let Ok(Value::Object(mut sent)) = serde_json::from_slice(body) else { return Err(Invalid::Malformed) };
        for member in members.iter().filter(|member| member.location == Location::Body) {
            if let Some(value) = sent.remove(&member.name)
                && let Some(value) = typed(&member.shape, value)?
            {
                input.insert(member.name.clone(), value);
            }
        }
    }
    for (label, text) in labels {
        input.insert(label.to_owned(), Value::String(text));
    }
    let query = parameters(query)?;
    for member in members.iter().filter(|member| member.location == Location::QueryString) {
        let mut values = query.iter().filter(|(name, _)| name == member.wire_name()).map(|(_, value)| value.clone());
        let value = match MODEL.shape(&member.shape) {
            Shape::List { .. } => {
                Some(Value::Array(values.map(Value::String).collect())).filter(|list| list.as_array().is_some_and(|l| !l.is_empty()))
            }
            Shape::Integer(_) => {
                values.next().map(|text| text.parse().map(|n: i32| Value::Number(n.into()))).transpose().map_err(|_| Invalid::Malformed)?
            }
            _ => values.next().map(Value::String),
        };
        if let Some(value) = value {
            input.insert(member.name.clone(), value);
        }
    }
    Ok(input)
}

fn parameters(query: &str) -> Result<Vec<(String, String)>, Invalid> {
    let decode =
        |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8().map(|t| t.into_owned()).map_err(|_| Invalid::Malformed);
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            // SDKs escape the `=` of cursors; the service refuses one that is not.
            if value.contains('=') { Err(Invalid::Malformed) } else { Ok((decode(name)?, decode(value)?)) }
        })
        .collect()
}

/// Checks that a value has the type of its shape and drops what the model does not know.
fn typed(shape: &str, value: Value) -> Result<Option<Value>, Invalid> {
    let typed = match (MODEL.shape(shape), value) {
        (_, Value::Null) => return Ok(None),
        (Shape::Boolean, value @ Value::Bool(_)) | (Shape::String(_), value @ Value::String(_)) => value,
        (Shape::Integer(_), Value::Number(number)) => Value::Number(integer(&number)?),
        (Shape::List { member, .. }, Value::Array(items)) => {
            // A null item stays, so that the constraint check can name it.
            let items = items.into_iter().map(|item| Ok(typed(member, item)?.unwrap_or(Value::Null)));
            Value::Array(items.collect::<Result<_, Invalid>>()?)
        }
        (Shape::Map { value: of, .. }, Value::Object(entries)) => {
            let entries = entries.into_iter().map(|(key, item)| Ok((key, typed(of, item)?.unwrap_or(Value::Null))));
            Value::Object(entries.collect::<Result<_, Invalid>>()?)
        }
        (Shape::Structure { members, .. }, Value::Object(mut sent)) => {
            let mut kept = Map::new();
            for member in members {
                if let Some(value) = sent.remove(&member.name)
                    && let Some(value) = typed(&member.shape, value)?
                {
                    kept.insert(member.name.clone(), value);
                }
            }
            Value::Object(kept)
        }
        (Shape::Structure { .. }, Value::Bool(_)) => return Err(Invalid::NotAStructure),
        _ => return Err(Invalid::Malformed),
    };
    Ok(Some(typed))
}

fn integer(number: &Number) -> Result<Number, Invalid> {
    number.as_i64().and_then(|n| i32::try_from(n).ok()).map(Number::from).ok_or(Invalid::Malformed)
}

/// Checks every constraint of the model. `min_idle_seconds` replaces the model's minimum of `maxIdleDurationSeconds`.
pub(crate) fn check(operation: &Operation, input: &Map<String, Value>, min_idle_seconds: u32) -> Result<(), Invalid> {
    let mut checker = Checker { violations: Vec::new(), min_idle_seconds };
    checker.members(MODEL.input(operation), input, "");
    match checker.violations.len() {
        0 => Ok(()),
        count => Err(Invalid::Constraints(format!(
            "{count} validation error{} detected: {}",
            if count == 1 { "" } else { "s" },
            checker.violations.join("; ")
        ))),
    }
}

struct Checker {
    violations: Vec<String>,
    min_idle_seconds: u32,
}

impl Checker {
    fn violation(&mut self, value: &str, path: &str, constraint: &str) {
        self.violations.push(format!("Value {value}at '{path}' failed to satisfy constraint: {constraint}"));
    }

    fn members(&mut self, members: &[Member], values: &Map<String, Value>, path: &str) {
        for member in members {
            let path = join(path, &member.name);
            match values.get(&member.name) {
                Some(value) => self.value(&member.shape, value, &path),
                None if member.required => self.violation("null ", &path, "Member must not be null"),
                None => {}
            }
        }
    }

    fn value(&mut self, name: &str, value: &Value, path: &str) {
        let shape = MODEL.shape(name);
        match (shape, value) {
            (Shape::Structure { members, union }, Value::Object(values)) => {
                if *union && values.len() != 1 {
                    self.violation("", path, "Member must have exactly one of its members set");
                }
                self.members(members, values, path);
            }
            (Shape::List { member, bounds }, Value::Array(items)) => {
                self.all(quoted(shape, value), path, length_constraints(*bounds, items.len()));
                match MODEL.shape(member) {
                    Shape::Structure { .. } => {
                        for (index, item) in items.iter().enumerate() {
                            let path = format!("{path}.{}.member", index + 1);
                            match item {
                                Value::Null => self.violation("null ", &path, "Member must not be null"),
                                item => self.value(member, item, &path),
                            }
                        }
                    }
                    of => {
                        if items.iter().any(|item| fails(of, item)) {
                            self.violation(&quoted(shape, value), path, &format!("Member must satisfy constraint: [{}]", describe(of)));
                        }
                    }
                }
            }
            (Shape::Map { key, value: of, bounds }, Value::Object(entries)) => {
                let shown = quoted(shape, value);
                self.all(shown.clone(), path, length_constraints(*bounds, entries.len()));
                let (key, of) = (MODEL.shape(key), MODEL.shape(of));
                if entries.keys().any(|text| fails(key, &Value::String(text.clone()))) {
                    self.violation(&shown, path, &format!("Map keys must satisfy constraint: [{}]", describe(key)));
                }
                if entries.values().any(|value| fails(of, value)) {
                    self.violation(&shown, path, &format!("Map value must satisfy constraint: [{}]", describe(of)));
                }
            }
            (Shape::Integer(bounds), Value::Number(number)) => {
                let min = if name == IDLE_SECONDS { Some(i64::from(self.min_idle_seconds)) } else { bounds.min };
                let bounds = Bounds { min, ..*bounds };
                self.all(quoted(shape, value), path, value_constraints(bounds, number.as_i64().unwrap_or(i64::MAX)));
            }
            (Shape::String(string), Value::String(text)) => self.all(quoted(shape, value), path, string_constraints(string, text)),
            _ => {}
        }
    }

    fn all(&mut self, value: String, path: &str, constraints: Vec<String>) {
        for constraint in constraints {
            self.violation(&value, path, &constraint);
        }
    }
}

/// Paths begin with lower-case letters even where members do not.
fn join(path: &str, member: &str) -> String {
    let mut letters = member.chars();
    let first = letters.next().map(|letter| letter.to_ascii_lowercase()).into_iter();
    let member: String = first.chain(letters).collect();
    if path.is_empty() { member } else { format!("{path}.{member}") }
}

/// Whether a list item, map key or map value breaks a constraint of its shape.
fn fails(shape: &Shape, value: &Value) -> bool {
    match (shape, value) {
        (_, Value::Null) => true,
        (Shape::String(string), Value::String(text)) => !string_constraints(string, text).is_empty(),
        (Shape::Integer(bounds), Value::Number(number)) => !value_constraints(*bounds, number.as_i64().unwrap_or(i64::MAX)).is_empty(),
        _ => false,
    }
}

/// All constraints of a shape, as they are listed for members of collections.
fn describe(shape: &Shape) -> String {
    let mut constraints = Vec::new();
    if let Shape::String(string) = shape {
        constraints.extend(string.bounds.max.map(|max| format!("Member must have length less than or equal to {max}")));
        constraints.extend(string.bounds.min.map(|min| format!("Member must have length greater than or equal to {min}")));
        constraints.extend(string.pattern.as_ref().map(|p| format!("Member must satisfy regular expression pattern: {}", p.text)));
        constraints.extend(enumeration(string));
    }
    constraints.push("Member must not be null".to_owned());
    constraints.join(", ")
}

fn enumeration(string: &StringShape) -> Option<String> {
    (!string.values.is_empty()).then(|| format!("Member must satisfy enum value set: [{}]", string.values.join(", ")))
}

fn string_constraints(string: &StringShape, text: &str) -> Vec<String> {
    let mut broken = length_constraints(string.bounds, text.chars().count());
    broken.extend(
        string.pattern.as_ref().filter(|p| !p.matches(text)).map(|p| format!("Member must satisfy regular expression pattern: {}", p.text)),
    );
    broken.extend(enumeration(string).filter(|_| !string.values.iter().any(|value| value == text)));
    broken
}

fn length_constraints(bounds: Bounds, length: usize) -> Vec<String> {
    broken_bounds(bounds, i64::try_from(length).unwrap_or(i64::MAX), "length")
}

fn value_constraints(bounds: Bounds, value: i64) -> Vec<String> {
    broken_bounds(bounds, value, "value")
}

fn broken_bounds(bounds: Bounds, actual: i64, what: &str) -> Vec<String> {
    let low = bounds.min.filter(|min| actual < *min).map(|min| format!("Member must have {what} greater than or equal to {min}"));
    let high = bounds.max.filter(|max| actual > *max).map(|max| format!("Member must have {what} less than or equal to {max}"));
    low.into_iter().chain(high).collect()
}

/// A value as messages show it, with the space that follows; nothing for values that are secret.
fn quoted(shape: &Shape, value: &Value) -> String {
    if is_sensitive(shape) { String::new() } else { format!("'{}' ", shown(value)) }
}

fn is_sensitive(shape: &Shape) -> bool {
    match shape {
        Shape::String(string) => string.sensitive,
        Shape::List { member, .. } => is_sensitive(MODEL.shape(member)),
        Shape::Map { key, value, .. } => is_sensitive(MODEL.shape(key)) || is_sensitive(MODEL.shape(value)),
        Shape::Boolean | Shape::Integer(_) | Shape::Structure { .. } => false,
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(", ")),
        Value::Object(entries) => {
            format!("{{{}}}", entries.iter().map(|(key, value)| format!("{key}={}", shown(value))).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn operation(name: &str) -> &'static Operation {
        MODEL.operations.iter().find(|operation| operation.name == name).unwrap()
    }

    fn judge(name: &str, labels: &[(&'static str, &str)], query: &str, body: &Value) -> Result<Map<String, Value>, Invalid> {
        let labels = labels.iter().map(|(label, text)| (*label, (*text).to_owned())).collect();
        let input = input(operation(name), labels, query, body.to_string().as_bytes())?;
        check(operation(name), &input, 60)?;
        Ok(input)
    }

    fn message(result: Result<Map<String, Value>, Invalid>) -> String {
        match result {
            Err(Invalid::Constraints(message)) => message,
            other => panic!("no constraint was broken: {other:?}"),
        }
    }

    fn image() -> Value {
        json!({
            "name": "demo",
            "baseImageArn": "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1",
            "buildRoleArn": "arn:aws:iam::000000000000:role/build",
            "codeArtifact": {"uri": "s3://art/demo.zip"},
        })
    }

    fn image_with(member: &str, value: Value) -> Value {
        let mut image = image();
        image[member] = value;
        image
    }

    #[test]
    fn a_good_image_passes_and_unknown_members_and_nulls_are_dropped() {
        let mut sent = image_with("hooks", json!({"port": 8080, "new": 1, "microvmHooks": null}));
        sent["future"] = json!({"a": [1]});
        sent["description"] = Value::Null;
        let input = judge("CreateMicrovmImage", &[], "", &sent).unwrap();
        assert_eq!(Value::Object(input), image_with("hooks", json!({"port": 8080})));
    }

    #[test]
    fn a_missing_member_is_null() {
        let mut sent = image();
        sent.as_object_mut().unwrap().remove("baseImageArn");
        assert_eq!(
            message(judge("CreateMicrovmImage", &[], "", &sent)),
            "1 validation error detected: Value null at 'baseImageArn' failed to satisfy constraint: Member must not be null"
        );
    }

    #[test]
    fn patterns_match_whole_strings() {
        assert_eq!(
            message(judge("CreateMicrovmImage", &[], "", &image_with("name", json!("bad name!")))),
            "1 validation error detected: Value 'bad name!' at 'name' failed to satisfy constraint: \
             Member must satisfy regular expression pattern: [a-zA-Z0-9-_]+"
        );
        assert!(judge("CreateMicrovmImage", &[], "", &image_with("name", json!("good-name_1\n"))).is_err());
        judge("CreateMicrovmImage", &[], "", &image_with("name", json!("good-name_1"))).unwrap();
    }

    #[test]
    fn violations_are_counted_and_joined() {
        let sent =
            json!({"name": "", "codeArtifact": {"uri": "s3://art/demo.zip"}, "buildRoleArn": "arn:aws:iam::000000000000:role/build"});
        assert_eq!(
            message(judge("CreateMicrovmImage", &[], "", &sent)),
            "3 validation errors detected: Value null at 'baseImageArn' failed to satisfy constraint: Member must not be null; \
             Value '' at 'name' failed to satisfy constraint: Member must have length greater than or equal to 1; \
             Value '' at 'name' failed to satisfy constraint: Member must satisfy regular expression pattern: [a-zA-Z0-9-_]+"
        );
    }

    #[test]
    fn sensitive_values_are_not_shown_and_lengths_count_code_points() {
        let run = |payload: String| judge("RunMicrovm", &[], "", &json!({"imageIdentifier": "arn:x", "runHookPayload": payload}));
        run("漢".repeat(4096)).unwrap();
        assert_eq!(
            message(run("漢".repeat(4097))),
            "1 validation error detected: Value at 'runHookPayload' failed to satisfy constraint: \
             Member must have length less than or equal to 4096"
        );
        let secret = "s".repeat(4097);
        let message = message(judge("CreateMicrovmImage", &[], "", &image_with("environmentVariables", json!({"KEY": secret}))));
        assert_eq!(
            message,
            "1 validation error detected: Value at 'environmentVariables' failed to satisfy constraint: Map value must satisfy constraint: \
             [Member must have length less than or equal to 4096, Member must have length greater than or equal to 0, Member must not be null]"
        );
    }

    #[test]
    fn ranges_of_query_parameters() {
        let list = |query: &str| {
            let input = input(operation("ListMicrovms"), Vec::new(), query, b"")?;
            check(operation("ListMicrovms"), &input, 60).map(|()| input)
        };
        list("maxResults=50&nextToken=YQ%3D%3D").unwrap();
        assert_eq!(
            message(list("maxResults=100")),
            "1 validation error detected: Value '100' at 'maxResults' failed to satisfy constraint: Member must have value less than or equal to 50"
        );
        for malformed in ["maxResults=ten", "maxResults=", "maxResults=99999999999", "nextToken=YQ==", "nextToken=%ff"] {
            assert_eq!(list(malformed), Err(Invalid::Malformed), "{malformed}");
        }
    }

    #[test]
    fn nested_members_have_dotted_paths_and_the_idle_minimum_is_configured() {
        let run = json!({"imageIdentifier": "arn:x", "idlePolicy": {"maxIdleDurationSeconds": 5, "suspendedDurationSeconds": -1}});
        assert_eq!(
            message(judge("RunMicrovm", &[], "", &run)),
            "3 validation errors detected: Value '5' at 'idlePolicy.maxIdleDurationSeconds' failed to satisfy constraint: \
             Member must have value greater than or equal to 60; \
             Value '-1' at 'idlePolicy.suspendedDurationSeconds' failed to satisfy constraint: Member must have value greater than or equal to 0; \
             Value null at 'idlePolicy.autoResumeEnabled' failed to satisfy constraint: Member must not be null"
        );
        let idle = json!({"maxIdleDurationSeconds": 5, "suspendedDurationSeconds": 0, "autoResumeEnabled": false});
        let input =
            input(operation("RunMicrovm"), Vec::new(), "", json!({"imageIdentifier": "arn:x", "idlePolicy": idle}).to_string().as_bytes());
        check(operation("RunMicrovm"), &input.unwrap(), 5).unwrap();
    }

    #[test]
    fn list_items_are_numbered_and_unions_have_one_member() {
        let ports = |ports: Value| {
            judge(
                "CreateMicrovmAuthToken",
                &[("microvmIdentifier", "microvm-1")],
                "",
                &json!({"expirationInMinutes": 5, "allowedPorts": ports}),
            )
        };
        ports(json!([{"port": 80}, {"range": {"startPort": 1, "endPort": 65535}}, {"allPorts": {}}])).unwrap();
        assert_eq!(
            message(ports(json!([{"port": 80}, {"range": {"startPort": 0, "endPort": 80}}]))),
            "1 validation error detected: Value '0' at 'allowedPorts.2.member.range.startPort' failed to satisfy constraint: \
             Member must have value greater than or equal to 1"
        );
        assert_eq!(
            message(ports(json!([]))),
            "1 validation error detected: Value '[]' at 'allowedPorts' failed to satisfy constraint: Member must have length greater than or equal to 1"
        );
        for union in [json!([{}]), json!([{"port": 80, "allPorts": {}}]), json!([{"unknown": 1}])] {
            assert!(message(ports(union)).contains("at 'allowedPorts.1.member' failed"));
        }
        assert!(message(ports(json!([null]))).contains("Value null at 'allowedPorts.1.member' failed"));
    }

    #[test]
    fn enums_and_members_of_lists_name_what_is_allowed() {
        assert_eq!(
            message(judge("CreateMicrovmImage", &[], "", &image_with("additionalOsCapabilities", json!(["ALL", "SOME"])))),
            "1 validation error detected: Value '[ALL, SOME]' at 'additionalOsCapabilities' failed to satisfy constraint: \
             Member must satisfy constraint: [Member must satisfy enum value set: [ALL], Member must not be null]"
        );
        assert_eq!(
            message(judge("CreateMicrovmImage", &[], "", &image_with("hooks", json!({"microvmHooks": {"run": "on"}})))),
            "1 validation error detected: Value 'on' at 'hooks.microvmHooks.run' failed to satisfy constraint: \
             Member must satisfy enum value set: [DISABLED, ENABLED]"
        );
    }

    #[test]
    fn connector_paths_begin_in_lower_case() {
        let subnets = vec!["subnet-1"; 17];
        let sent = json!({"Name": "n", "Configuration": {"VpcEgressConfiguration": {"SubnetIds": subnets}}});
        let message = message(judge("CreateNetworkConnector", &[], "", &sent));
        assert!(message.contains("' at 'configuration.vpcEgressConfiguration.subnetIds' failed"), "{message}");
        assert!(message.ends_with("Member must have length less than or equal to 16"), "{message}");
    }

    #[test]
    fn repeated_query_parameters_make_lists() {
        let arn = "arn:aws:lambda:us-east-1:000000000000:microvm-image:demo";
        let input = input(operation("UntagResource"), vec![("Resource", arn.to_owned())], "tagKeys=a&tagKeys=b%20c", b"").unwrap();
        assert_eq!(input["TagKeys"], json!(["a", "b c"]));
    }

    #[test]
    fn wrong_types_are_malformed() {
        for body in [
            "{",
            "[]",
            "\"x\"",
            "null",
            r#"{"name": 1}"#,
            r#"{"tags": {"a": 1}}"#,
            r#"{"hooks": {"port": 1.5}}"#,
            r#"{"hooks": {"port": "80"}}"#,
        ] {
            let found = input(operation("CreateMicrovmImage"), Vec::new(), "", body.as_bytes());
            assert_eq!(found, Err(Invalid::Malformed), "{body}");
        }
        let found = input(operation("CreateMicrovmImage"), Vec::new(), "", br#"{"codeArtifact": true}"#);
        assert_eq!(found, Err(Invalid::NotAStructure));
    }
}
