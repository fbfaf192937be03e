//! The element `Condition`: operators, the keys of a request, and when they fit ("IAM JSON policy elements: Condition operators").

use std::{collections::HashMap, net::IpAddr};

use serde_json::{Map, Value};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::pattern::{ArnPattern, Pattern};

/// What is known of a request, by condition key. Keys are compared without regard to case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Context(HashMap<String, Vec<String>>);

impl Context {
    /// Adds a key with one value.
    #[must_use]
    pub fn with(self, key: &str, value: impl Into<String>) -> Self {
        self.with_all(key, [value.into()])
    }

    /// Adds a key with several values.
    #[must_use]
    pub fn with_all(mut self, key: &str, values: impl IntoIterator<Item = String>) -> Self {
        self.0.insert(key.to_ascii_lowercase(), values.into_iter().collect());
        self
    }

    pub(crate) fn values(&self, key: &str) -> Option<&[String]> {
        self.0.get(&key.to_ascii_lowercase()).map(Vec::as_slice)
    }

    /// The value of a key that has exactly one.
    pub(crate) fn single(&self, key: &str) -> Option<&str> {
        match self.values(key)? {
            [value] => Some(value),
            _ => None,
        }
    }
}

/// One key under one operator.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Condition {
    key: String,
    test: Test,
    quantifier: Quantifier,
    if_exists: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quantifier {
    /// None is written: any value of the request, of which there is one as a rule.
    Plain,
    ForAnyValue,
    ForAllValues,
}

#[derive(Debug, Clone, PartialEq)]
enum Test {
    /// Whether the key is absent.
    Null(bool),
    Compare {
        negated: bool,
        /// The request's value must fit one of these.
        values: Vec<Expected>,
    },
}

#[derive(Debug, Clone, PartialEq)]
enum Expected {
    Text(Pattern),
    TextIgnoringCase(Pattern),
    Like(Pattern),
    Arn(ArnPattern),
    Number(Order, f64),
    /// Nanoseconds since 1970.
    Date(Order, i128),
    Bool(bool),
    Network(IpAddr, u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Equal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Order {
    fn holds<T: PartialOrd>(self, actual: &T, expected: &T) -> bool {
        match self {
            Self::Equal => actual == expected,
            Self::Less => actual < expected,
            Self::LessOrEqual => actual <= expected,
            Self::Greater => actual > expected,
            Self::GreaterOrEqual => actual >= expected,
        }
    }
}

impl Condition {
    /// Reads the element: operators, under each of them keys, under each of them one value or several.
    pub fn parse_all(element: &Map<String, Value>, variables: bool) -> Result<Vec<Self>, String> {
        let mut conditions = Vec::new();
        for (operator, keys) in element {
            let keys = keys.as_object().ok_or_else(|| format!("Condition.{operator} is not an object of condition keys"))?;
            for (key, values) in keys {
                let values = words(values).ok_or_else(|| format!("Condition.{operator}.{key} is neither a value nor a list of values"))?;
                let condition = Self::parse(operator, key, &values, variables);
                conditions.push(condition.map_err(|reason| format!("Condition.{operator}.{key}: {reason}"))?);
            }
        }
        Ok(conditions)
    }

    fn parse(operator: &str, key: &str, values: &[String], variables: bool) -> Result<Self, String> {
        let (quantifier, name) = match operator.split_once(':') {
            Some(("ForAnyValue", name)) => (Quantifier::ForAnyValue, name),
            Some(("ForAllValues", name)) => (Quantifier::ForAllValues, name),
            Some(_) => return Err(format!("'{operator}' is not an operator of conditions")),
            None => (Quantifier::Plain, operator),
        };
        let (name, if_exists) = name.strip_suffix("IfExists").map_or((name, false), |name| (name, true));
        if !key.contains(':') {
            return Err(format!("'{key}' is not a condition key"));
        }
        if values.is_empty() {
            return Err("the list of values is empty".to_owned());
        }
        let test = if name == "Null" {
            let [value] = values else { return Err("Null takes one value".to_owned()) };
            Test::Null(boolean(value)?)
        } else {
            let (kind, negated) = positive(name);
            let expected = values.iter().map(|value| Expected::parse(&kind, value, variables));
            let expected = expected.collect::<Result<Option<Vec<_>>, _>>()?;
            Test::Compare { negated, values: expected.ok_or_else(|| format!("the operator '{operator}' is not supported"))? }
        };
        Ok(Self { key: key.to_owned(), test, quantifier, if_exists })
    }

    /// Whether the request meets the condition.
    pub fn holds(&self, context: &Context) -> bool {
        let actual = context.values(&self.key).filter(|values| !values.is_empty());
        match &self.test {
            Test::Null(absent) => actual.is_none() == *absent,
            Test::Compare { negated, values } => {
                let Some(actual) = actual else {
                    return match self.quantifier {
                        Quantifier::ForAllValues => true,
                        Quantifier::ForAnyValue => self.if_exists,
                        Quantifier::Plain => self.if_exists || *negated,
                    };
                };
                let fits = |actual: &String| values.iter().any(|expected| expected.fits(actual, context)) != *negated;
                match self.quantifier {
                    Quantifier::ForAllValues => actual.iter().all(fits),
                    // A negation must hold of every value that the request has, whatever it was written for.
                    Quantifier::Plain if *negated => actual.iter().all(fits),
                    Quantifier::Plain | Quantifier::ForAnyValue => actual.iter().any(fits),
                }
            }
        }
    }
}

impl Expected {
    /// Reads a value as the operator wants it. `None`: there is no such operator.
    fn parse(kind: &str, value: &str, variables: bool) -> Result<Option<Self>, String> {
        let pattern = || Pattern::parse(value, variables);
        let order = |name: &str| match name {
            "Equals" => Some(Order::Equal),
            "LessThan" => Some(Order::Less),
            "LessThanEquals" => Some(Order::LessOrEqual),
            "GreaterThan" => Some(Order::Greater),
            "GreaterThanEquals" => Some(Order::GreaterOrEqual),
            _ => None,
        };
        Ok(Some(match kind {
            "StringEquals" => Self::Text(pattern()?),
            "StringEqualsIgnoreCase" => Self::TextIgnoringCase(pattern()?),
            "StringLike" => Self::Like(pattern()?),
            "ArnEquals" | "ArnLike" => Self::Arn(ArnPattern::parse(value, variables)?),
            "Bool" => Self::Bool(boolean(value)?),
            "IpAddress" => network(value).ok_or_else(|| format!("'{value}' is not an address or a CIDR block"))?,
            kind => match (kind.strip_prefix("Numeric").and_then(order), kind.strip_prefix("Date").and_then(order)) {
                (Some(order), _) => Self::Number(order, number(value).ok_or_else(|| format!("'{value}' is not a number"))?),
                (_, Some(order)) => Self::Date(order, date(value).ok_or_else(|| format!("'{value}' is not a date as in ISO 8601"))?),
                (None, None) => return Ok(None),
            },
        }))
    }

    fn fits(&self, actual: &str, context: &Context) -> bool {
        match self {
            Self::Text(pattern) => pattern.text(context).is_some_and(|text| text == actual),
            Self::TextIgnoringCase(pattern) => pattern.text(context).is_some_and(|text| text.eq_ignore_ascii_case(actual)),
            Self::Like(pattern) => pattern.matches(actual, context),
            Self::Arn(pattern) => pattern.matches(actual, context),
            Self::Number(order, expected) => number(actual).is_some_and(|actual| order.holds(&actual, expected)),
            Self::Date(order, expected) => date(actual).is_some_and(|actual| order.holds(&actual, expected)),
            Self::Bool(expected) => boolean(actual) == Ok(*expected),
            Self::Network(network, prefix) => actual.parse().is_ok_and(|address| contains(*network, *prefix, address)),
        }
    }
}

/// An operator without its negation, and whether it had one.
fn positive(name: &str) -> (String, bool) {
    if name == "NotIpAddress" {
        return ("IpAddress".to_owned(), true);
    }
    let negated = ["String", "Arn", "Numeric", "Date"].iter().find_map(|kind| {
        let rest = name.strip_prefix(kind)?.strip_prefix("Not")?;
        Some(format!("{kind}{rest}"))
    });
    negated.map_or((name.to_owned(), false), |kind| (kind, true))
}

/// One text or several: strings, and numbers and booleans as they are written.
pub(crate) fn words(value: &Value) -> Option<Vec<String>> {
    let word = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        _ => None,
    };
    match value {
        Value::Array(values) => values.iter().map(word).collect(),
        value => word(value).map(|word| vec![word]),
    }
}

fn boolean(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(format!("'{text}' is neither true nor false")),
    }
}

fn number(text: &str) -> Option<f64> {
    text.parse().ok().filter(|number: &f64| number.is_finite())
}

fn date(text: &str) -> Option<i128> {
    if let Ok(seconds) = text.parse::<i64>() {
        return Some(i128::from(seconds) * 1_000_000_000);
    }
    let at_midnight = || OffsetDateTime::parse(&format!("{text}T00:00:00Z"), &Rfc3339);
    OffsetDateTime::parse(text, &Rfc3339).or_else(|_| at_midnight()).ok().map(OffsetDateTime::unix_timestamp_nanos)
}

fn network(text: &str) -> Option<Expected> {
    let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
    let address: IpAddr = address.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.map_or(Some(longest), |prefix| prefix.parse().ok())?;
    (prefix <= longest).then_some(Expected::Network(address, prefix))
}

fn contains(network: IpAddr, prefix: u8, address: IpAddr) -> bool {
    let bits = |address| match address {
        IpAddr::V4(address) => u128::from(u32::from(address)) << 96,
        IpAddr::V6(address) => u128::from(address),
    };
    let address = address.to_canonical();
    let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
    network.is_ipv4() == address.is_ipv4() && (bits(network) ^ bits(address)) & mask == 0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn holds(element: &Value, context: &Context) -> bool {
        Condition::parse_all(element.as_object().unwrap(), true).unwrap().iter().all(|condition| condition.holds(context))
    }

    fn request() -> Context {
        Context::default()
            .with("aws:PrincipalArn", "arn:aws:iam::000000000000:user/ann")
            .with("aws:username", "ann")
            .with("aws:SourceIp", "192.0.2.7")
            .with("aws:EpochTime", "1793500000")
            .with("aws:CurrentTime", "2026-11-01T02:26:40Z")
            .with("aws:SecureTransport", "false")
            .with("s3:max-keys", "10")
            .with_all("aws:TagKeys", ["team".to_owned(), "cost".to_owned()])
    }

    #[test]
    fn operators_compare_as_their_names_say() {
        for (operator, key, value, expected) in [
            ("StringEquals", "aws:username", json!("ann"), true),
            ("StringEquals", "AWS:UserName", json!(["bob", "ann"]), true),
            ("StringEquals", "aws:username", json!("Ann"), false),
            ("StringEquals", "aws:username", json!("a*"), false),
            ("StringEqualsIgnoreCase", "aws:username", json!("Ann"), true),
            ("StringNotEquals", "aws:username", json!(["bob", "ann"]), false),
            ("StringNotEquals", "aws:username", json!(["bob", "eve"]), true),
            ("StringNotEqualsIgnoreCase", "aws:username", json!("ANN"), false),
            ("StringLike", "aws:username", json!("a?n"), true),
            ("StringNotLike", "aws:username", json!("a*"), false),
            ("StringLike", "aws:PrincipalArn", json!("*user/${aws:username}"), true),
            ("ArnLike", "aws:PrincipalArn", json!("arn:aws:iam::*:user/*"), true),
            ("ArnEquals", "aws:PrincipalArn", json!("arn:aws:iam::*:role/*"), false),
            ("ArnNotLike", "aws:PrincipalArn", json!("arn:aws:iam::*:role/*"), true),
            ("NumericEquals", "s3:max-keys", json!(10), true),
            ("NumericNotEquals", "s3:max-keys", json!("10.0"), false),
            ("NumericLessThan", "s3:max-keys", json!("10"), false),
            ("NumericLessThanEquals", "s3:max-keys", json!("10"), true),
            ("NumericGreaterThan", "s3:max-keys", json!("9.5"), true),
            ("NumericGreaterThanEquals", "s3:max-keys", json!("11"), false),
            ("NumericEquals", "aws:username", json!("1"), false),
            ("DateGreaterThan", "aws:CurrentTime", json!("2026-01-01T00:00:00Z"), true),
            ("DateLessThan", "aws:CurrentTime", json!("2026-11-01"), false),
            ("DateLessThan", "aws:EpochTime", json!("2030-01-01T00:00:00Z"), true),
            ("Bool", "aws:SecureTransport", json!(false), true),
            ("Bool", "aws:SecureTransport", json!("true"), false),
            ("IpAddress", "aws:SourceIp", json!("192.0.2.0/24"), true),
            ("IpAddress", "aws:SourceIp", json!(["198.51.100.0/24", "192.0.2.7"]), true),
            ("IpAddress", "aws:SourceIp", json!("192.0.2.8/31"), false),
            ("IpAddress", "aws:SourceIp", json!("0.0.0.0/0"), true),
            ("IpAddress", "aws:SourceIp", json!("::/0"), false),
            ("NotIpAddress", "aws:SourceIp", json!("192.0.2.0/24"), false),
            ("Null", "aws:username", json!("false"), true),
            ("Null", "aws:MultiFactorAuthAge", json!(true), true),
            ("ForAllValues:StringEquals", "aws:TagKeys", json!(["team", "cost", "env"]), true),
            ("ForAllValues:StringEquals", "aws:TagKeys", json!(["team"]), false),
            ("ForAnyValue:StringEquals", "aws:TagKeys", json!(["team"]), true),
            ("ForAnyValue:StringLike", "aws:TagKeys", json!(["x*"]), false),
            ("ForAllValues:StringNotEquals", "aws:TagKeys", json!(["cost"]), false),
        ] {
            let element = json!({operator: {key: value}});
            assert_eq!(holds(&element, &request()), expected, "{element}");
        }
    }

    #[test]
    fn an_absent_key_fails_what_wants_a_value_and_passes_what_forbids_one() {
        for (operator, value, expected) in [
            ("StringEquals", "x", false),
            ("StringLike", "*", false),
            ("StringNotEquals", "x", true),
            ("StringEqualsIfExists", "x", true),
            ("NotIpAddress", "192.0.2.0/24", true),
            ("Bool", "true", false),
            ("BoolIfExists", "true", true),
            ("ForAllValues:StringEquals", "x", true),
            ("ForAnyValue:StringEquals", "x", false),
        ] {
            assert_eq!(holds(&json!({operator: {"aws:Absent": value}}), &request()), expected, "{operator}");
        }
    }

    #[test]
    fn all_keys_under_all_operators_must_fit() {
        let both = json!({"StringEquals": {"aws:username": "ann"}, "IpAddress": {"aws:SourceIp": "198.51.100.0/24"}});
        assert!(!holds(&both, &request()));
    }

    #[test]
    fn what_cannot_be_understood_is_refused_and_named() {
        for (element, part) in [
            (json!({"StringIs": {"aws:username": "x"}}), "'StringIs' is not supported"),
            (json!({"NotStringEquals": {"aws:username": "x"}}), "NotStringEquals"),
            (json!({"ForSome:StringEquals": {"aws:username": "x"}}), "not an operator"),
            (json!({"StringEquals": "x"}), "not an object"),
            (json!({"StringEquals": {"aws:username": {"x": 1}}}), "neither a value nor a list"),
            (json!({"StringEquals": {"aws:username": []}}), "empty"),
            (json!({"StringEquals": {"username": "x"}}), "not a condition key"),
            (json!({"NumericEquals": {"a:b": "ten"}}), "'ten' is not a number"),
            (json!({"DateLessThan": {"a:b": "soon"}}), "'soon' is not a date"),
            (json!({"Bool": {"a:b": "yes"}}), "neither true nor false"),
            (json!({"IpAddress": {"a:b": "10.0.0.0/33"}}), "CIDR"),
            (json!({"ArnLike": {"a:b": "user/*"}}), "ARN"),
        ] {
            let error = Condition::parse_all(element.as_object().unwrap(), true).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
