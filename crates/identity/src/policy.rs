//! Policy documents: reading them, and deciding by them. An explicit deny wins over every allow; what nothing allows is denied.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    condition::{Condition, Context, words},
    pattern::{ArnPattern, Pattern},
    principal::Principal,
};

/// Longest document, in bytes: what AWS allows for all inline policies of a role.
const MAX_BYTES: usize = 10_240;

/// What is asked of a policy.
#[derive(Debug, Clone, Copy)]
pub struct Request<'r> {
    /// For example `lambda:RunMicrovm`.
    pub action: &'r str,
    /// ARN, or `*` where the action has no resource.
    pub resource: &'r str,
    /// What conditions may ask about.
    pub context: &'r Context,
}

/// What a policy says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// A statement allows it, and none denies it.
    Allowed,
    /// No statement allows it.
    NotAllowed,
    /// A statement denies it.
    Denied,
}

/// What a role's trust policy says about somebody who wants to assume it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// The principal itself is trusted.
    Itself,
    /// Its account is trusted: which of its principals may is the account's to say.
    Account,
    /// No statement trusts it.
    No,
    /// A statement denies it.
    Denied,
}

/// A document is not a policy. The message says where, and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("MalformedPolicyDocument: {0}")]
pub struct PolicyError(String);

/// What a principal may do: the document of a user or a role.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Policy(Document);

/// Who may assume a role.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct TrustPolicy(Document);

#[derive(Debug, Clone, PartialEq)]
struct Document {
    statements: Vec<Statement>,
    /// As it was given.
    source: Value,
}

#[derive(Debug, Clone, PartialEq)]
struct Statement {
    effect: Effect,
    actions: Selector<Pattern>,
    /// Identity policies have one, trust policies have none.
    resources: Option<Selector<ArnPattern>>,
    /// Trust policies have them, identity policies have none.
    principals: Vec<Trusted>,
    conditions: Vec<Condition>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Effect {
    Allow,
    Deny,
}

#[derive(Debug, Clone, PartialEq)]
enum Selector<P> {
    Only(Vec<P>),
    Except(Vec<P>),
}

impl<P> Selector<P> {
    fn selects(&self, matches: impl Fn(&P) -> bool) -> bool {
        match self {
            Self::Only(patterns) => patterns.iter().any(matches),
            Self::Except(patterns) => !patterns.iter().any(matches),
        }
    }
}

/// An entry of a trust policy's `Principal`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Trusted {
    Anybody,
    /// Twelve digits.
    Account(String),
    /// ARN of a user, a role or a session.
    Arn(String),
    /// For example `lambda.amazonaws.com`.
    Service(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct RawDocument {
    version: Option<String>,
    #[serde(rename = "Id")]
    _id: Option<String>,
    statement: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct RawStatement {
    #[serde(rename = "Sid")]
    _sid: Option<String>,
    effect: Effect,
    action: Option<Value>,
    not_action: Option<Value>,
    resource: Option<Value>,
    not_resource: Option<Value>,
    principal: Option<Value>,
    #[serde(default)]
    condition: Map<String, Value>,
}

impl Policy {
    /// Reads a document.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        json(text)?.try_into()
    }

    /// Decides a request.
    pub fn decide(&self, request: Request<'_>) -> Decision {
        let applies = |statement: &&Statement| statement.applies(request);
        self.0.decide(applies)
    }
}

impl TrustPolicy {
    /// Reads a document.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        json(text)?.try_into()
    }

    /// What it says about a principal that wants to perform `action`, which is `sts:AssumeRole` as a rule.
    pub fn trusts(&self, principal: &Principal, action: &str, context: &Context) -> Trust {
        let request = Request { action, resource: "*", context };
        let says = |fits: &dyn Fn(&Trusted) -> bool| {
            self.0.decide(|statement: &&Statement| statement.applies(request) && statement.principals.iter().any(fits))
        };
        let itself = |trusted: &Trusted| match trusted {
            Trusted::Anybody => true,
            Trusted::Arn(arn) => principal.is(arn),
            Trusted::Account(_) | Trusted::Service(_) => false,
        };
        let account = |trusted: &Trusted| matches!(trusted, Trusted::Account(account) if *account == principal.account);
        match (says(&itself), says(&account)) {
            (Decision::Denied, _) | (_, Decision::Denied) => Trust::Denied,
            (Decision::Allowed, _) => Trust::Itself,
            (_, Decision::Allowed) => Trust::Account,
            (Decision::NotAllowed, Decision::NotAllowed) => Trust::No,
        }
    }

    /// Whether a service of AWS's may assume the role.
    pub fn trusts_service(&self, service: &str, context: &Context) -> bool {
        let request = Request { action: "sts:AssumeRole", resource: "*", context };
        let trusted = |trusted: &Trusted| match trusted {
            Trusted::Anybody => true,
            Trusted::Service(name) => name == service,
            Trusted::Account(_) | Trusted::Arn(_) => false,
        };
        let says = self.0.decide(|statement: &&Statement| statement.applies(request) && statement.principals.iter().any(trusted));
        says == Decision::Allowed
    }
}

impl Document {
    fn decide(&self, applies: impl Fn(&&Statement) -> bool) -> Decision {
        self.statements.iter().filter(applies).fold(Decision::NotAllowed, |so_far, statement| match (so_far, statement.effect) {
            (Decision::Denied, _) | (_, Effect::Deny) => Decision::Denied,
            (_, Effect::Allow) => Decision::Allowed,
        })
    }

    fn parse(source: Value, kind: Kind) -> Result<Self, PolicyError> {
        if source.to_string().len() > MAX_BYTES {
            return Err(PolicyError(format!("the document is longer than {MAX_BYTES} bytes")));
        }
        let RawDocument { version, statement, .. } =
            RawDocument::deserialize(&source).map_err(|error| PolicyError(format!("the document: {error}")))?;
        let variables = match version.as_deref() {
            Some("2012-10-17") => true,
            // What the language was before: without variables.
            Some("2008-10-17") | None => false,
            Some(other) => return Err(PolicyError(format!("Version '{other}' is neither 2012-10-17 nor 2008-10-17"))),
        };
        let statements = match statement {
            Value::Array(statements) => statements,
            statement => vec![statement],
        };
        if statements.is_empty() {
            return Err(PolicyError("there are no statements".to_owned()));
        }
        let read = |(at, statement)| Statement::parse(statement, kind, variables).map_err(|reason| located(at, &reason));
        let statements = statements.iter().enumerate().map(read).collect::<Result<_, _>>()?;
        Ok(Self { statements, source })
    }
}

/// What a document is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Identity,
    Trust,
}

impl Statement {
    fn applies(&self, request: Request<'_>) -> bool {
        let Request { action, resource, context } = request;
        self.actions.selects(|pattern| pattern.matches_ignoring_case(action, context))
            && self.resources.as_ref().is_none_or(|resources| resources.selects(|pattern| pattern.matches(resource, context)))
            && self.conditions.iter().all(|condition| condition.holds(context))
    }

    fn parse(statement: &Value, kind: Kind, variables: bool) -> Result<Self, String> {
        let raw = RawStatement::deserialize(statement).map_err(|error| error.to_string())?;
        let action = |text: &str| action(text, variables);
        let actions = selector(["Action", "NotAction"], raw.action, raw.not_action, action)?.ok_or("there is no Action")?;
        let arn = |text: &str| ArnPattern::parse(text, variables);
        let resources = selector(["Resource", "NotResource"], raw.resource, raw.not_resource, arn)?;
        let principals = match (kind, raw.principal) {
            (Kind::Identity, None) => Vec::new(),
            (Kind::Identity, Some(_)) => return Err("Principal has no place in a policy of a user or a role".to_owned()),
            (Kind::Trust, Some(principal)) => principals(&principal)?,
            (Kind::Trust, None) => return Err("there is no Principal".to_owned()),
        };
        match (kind, &resources) {
            (Kind::Identity, None) => return Err("there is no Resource".to_owned()),
            (Kind::Trust, Some(_)) => return Err("Resource has no place in a trust policy".to_owned()),
            _ => {}
        }
        let conditions = Condition::parse_all(&raw.condition, variables)?;
        Ok(Self { effect: raw.effect, actions, resources, principals, conditions })
    }
}

/// One of two elements, of which a statement has one.
fn selector<P>(
    names: [&str; 2],
    only: Option<Value>,
    except: Option<Value>,
    parse: impl Fn(&str) -> Result<P, String>,
) -> Result<Option<Selector<P>>, String> {
    let list = |name: &str, value: &Value| {
        let words = words(value).filter(|words| !words.is_empty());
        let words = words.ok_or_else(|| format!("{name} is neither a text nor a list of texts"))?;
        words.iter().map(|word| parse(word).map_err(|reason| format!("{name}: {reason}"))).collect::<Result<Vec<_>, _>>()
    };
    match (only, except) {
        (Some(_), Some(_)) => Err(format!("{} and {} exclude each other", names[0], names[1])),
        (Some(value), None) => Ok(Some(Selector::Only(list(names[0], &value)?))),
        (None, Some(value)) => Ok(Some(Selector::Except(list(names[1], &value)?))),
        (None, None) => Ok(None),
    }
}

/// `*`, or `service:Action` with wildcards in the action.
fn action(text: &str, variables: bool) -> Result<Pattern, String> {
    let service = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    let name = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"*?".contains(&byte));
    match text.split_once(':') {
        Some((vendor, action)) if service(vendor) && name(action) => Pattern::parse(text, variables),
        None if text == "*" => Pattern::parse(text, variables),
        _ => Err(format!("'{text}' is not an action such as 'lambda:RunMicrovm', 'lambda:*' or '*'")),
    }
}

fn principals(element: &Value) -> Result<Vec<Trusted>, String> {
    let kinds = match element {
        Value::String(text) if text == "*" => return Ok(vec![Trusted::Anybody]),
        Value::Object(kinds) if !kinds.is_empty() => kinds,
        _ => return Err("Principal is neither '*' nor an object such as {\"AWS\": …} or {\"Service\": …}".to_owned()),
    };
    let mut trusted = Vec::new();
    for (kind, values) in kinds {
        for value in words(values).ok_or_else(|| format!("Principal.{kind} is neither a text nor a list of texts"))? {
            trusted.push(match kind.as_str() {
                "AWS" => aws_principal(&value).ok_or_else(|| {
                    format!("Principal.AWS: '{value}' is neither '*', an account, nor the ARN of a root user, a user, a role or a session")
                })?,
                "Service" if value.contains('.') && !value.contains('*') => Trusted::Service(value),
                "Service" => return Err(format!("Principal.Service: '{value}' is not a service such as 'lambda.amazonaws.com'")),
                _ => return Err(format!("Principal.{kind} is not supported: use AWS or Service")),
            });
        }
    }
    Ok(trusted)
}

fn aws_principal(text: &str) -> Option<Trusted> {
    let is_account = |text: &str| text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit());
    if text == "*" {
        return Some(Trusted::Anybody);
    }
    if is_account(text) {
        return Some(Trusted::Account(text.to_owned()));
    }
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    let ["arn", _, service, "", account, resource] = *parts.as_slice() else { return None };
    if !is_account(account) || text.contains(['*', '?']) {
        return None;
    }
    match (service, resource.split_once('/')) {
        ("iam", None) if resource == "root" => Some(Trusted::Account(account.to_owned())),
        ("iam", Some(("user" | "role", name))) if !name.is_empty() => Some(Trusted::Arn(text.to_owned())),
        ("sts", Some(("assumed-role", name))) if name.contains('/') => Some(Trusted::Arn(text.to_owned())),
        _ => None,
    }
}

fn json(text: &str) -> Result<Value, PolicyError> {
    serde_json::from_str(text).map_err(|error| PolicyError(format!("not JSON: {error}")))
}

fn located(at: usize, reason: &str) -> PolicyError {
    PolicyError(format!("Statement[{at}]: {reason}"))
}

impl TryFrom<Value> for Policy {
    type Error = PolicyError;

    fn try_from(source: Value) -> Result<Self, PolicyError> {
        Document::parse(source, Kind::Identity).map(Self)
    }
}

impl TryFrom<Value> for TrustPolicy {
    type Error = PolicyError;

    fn try_from(source: Value) -> Result<Self, PolicyError> {
        Document::parse(source, Kind::Trust).map(Self)
    }
}

impl From<Policy> for Value {
    fn from(policy: Policy) -> Self {
        policy.0.source
    }
}

impl From<TrustPolicy> for Value {
    fn from(policy: TrustPolicy) -> Self {
        policy.0.source
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.source.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const DEMO: &str = "arn:aws:lambda:us-east-1:000000000000:microvm-image:demo";
    const OTHER: &str = "arn:aws:lambda:us-east-1:000000000000:microvm-image:other";

    fn policy(statements: Value) -> Policy {
        json!({"Version": "2012-10-17", "Statement": statements}).try_into().unwrap()
    }

    fn decide(policy: &Policy, action: &str, resource: &str) -> Decision {
        policy.decide(Request { action, resource, context: &Context::default() })
    }

    fn user() -> Principal {
        Principal::user("000000000000", "ann", "AIDA1", None, false)
    }

    #[test]
    fn what_nothing_allows_is_not_allowed() {
        let policy = policy(json!({"Effect": "Allow", "Action": ["lambda:GetMicrovm", "lambda:Run*"], "Resource": DEMO}));
        assert_eq!(decide(&policy, "lambda:GetMicrovm", DEMO), Decision::Allowed);
        assert_eq!(decide(&policy, "LAMBDA:runmicrovm", DEMO), Decision::Allowed, "actions have no case");
        assert_eq!(decide(&policy, "lambda:GetMicrovm", OTHER), Decision::NotAllowed);
        assert_eq!(decide(&policy, "lambda:GetMicrovmImage", DEMO), Decision::NotAllowed);
        assert_eq!(decide(&policy, "lambda:ListMicrovms", "*"), Decision::NotAllowed);
    }

    #[test]
    fn an_explicit_deny_wins_wherever_it_stands() {
        let allow = json!({"Effect": "Allow", "Action": "*", "Resource": "*"});
        let deny = json!({"Effect": "Deny", "Action": "lambda:TerminateMicrovm", "Resource": OTHER});
        for statements in [json!([allow, deny]), json!([deny, allow])] {
            let policy = policy(statements);
            assert_eq!(decide(&policy, "lambda:TerminateMicrovm", OTHER), Decision::Denied);
            assert_eq!(decide(&policy, "lambda:TerminateMicrovm", DEMO), Decision::Allowed);
        }
    }

    #[test]
    fn negated_elements_mean_everything_else() {
        let policy = policy(json!([
            {"Effect": "Allow", "NotAction": "iam:*", "Resource": "*"},
            {"Effect": "Deny", "Action": "*", "NotResource": [DEMO, "arn:aws:iam::*:role/build"]},
        ]));
        assert_eq!(decide(&policy, "lambda:RunMicrovm", DEMO), Decision::Allowed);
        assert_eq!(decide(&policy, "lambda:RunMicrovm", OTHER), Decision::Denied);
        assert_eq!(decide(&policy, "iam:PassRole", "arn:aws:iam::000000000000:role/build"), Decision::NotAllowed);
        assert_eq!(decide(&policy, "lambda:ListMicrovms", "*"), Decision::Denied, "an action without a resource has another one");
    }

    #[test]
    fn conditions_restrict_statements() {
        let policy = policy(json!({
            "Effect": "Allow", "Action": "iam:PassRole", "Resource": "*",
            "Condition": {"StringEquals": {"iam:PassedToService": "lambda.amazonaws.com"}},
        }));
        let decide = |context: &Context| policy.decide(Request { action: "iam:PassRole", resource: "arn:aws:iam::1:role/x", context });
        assert_eq!(decide(&Context::default().with("iam:PassedToService", "lambda.amazonaws.com")), Decision::Allowed);
        assert_eq!(decide(&Context::default().with("iam:PassedToService", "ec2.amazonaws.com")), Decision::NotAllowed);
        assert_eq!(decide(&Context::default()), Decision::NotAllowed);
    }

    #[test]
    fn trust_is_of_a_principal_its_account_or_a_service() {
        let trust = |principal: Value| -> TrustPolicy {
            json!({"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}})
                .try_into()
                .unwrap()
        };
        let says = |principal: Value| trust(principal).trusts(&user(), "sts:AssumeRole", &Context::default());
        assert_eq!(says(json!("*")), Trust::Itself);
        assert_eq!(says(json!({"AWS": "arn:aws:iam::000000000000:user/ann"})), Trust::Itself);
        assert_eq!(says(json!({"AWS": ["111111111111", "000000000000"]})), Trust::Account);
        assert_eq!(says(json!({"AWS": "arn:aws:iam::000000000000:root"})), Trust::Account);
        assert_eq!(says(json!({"AWS": "arn:aws:iam::000000000000:user/an"})), Trust::No);
        assert_eq!(says(json!({"Service": "lambda.amazonaws.com"})), Trust::No);
        let lambda = trust(json!({"Service": ["lambda.amazonaws.com", "ec2.amazonaws.com"], "AWS": "000000000000"}));
        assert!(lambda.trusts_service("lambda.amazonaws.com", &Context::default()));
        assert!(!trust(json!({"AWS": "000000000000"})).trusts_service("lambda.amazonaws.com", &Context::default()));
        assert_eq!(lambda.trusts(&user(), "sts:TagSession", &Context::default()), Trust::No, "another action");
    }

    #[test]
    fn an_external_id_is_asked_for_and_a_denial_wins() {
        let trust: TrustPolicy = json!({"Version": "2012-10-17", "Statement": [
            {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole",
             "Condition": {"StringEquals": {"sts:ExternalId": "secret"}}},
            {"Effect": "Deny", "Principal": {"AWS": "000000000000"}, "Action": "sts:AssumeRole",
             "Condition": {"StringEquals": {"aws:username": "eve"}}},
        ]})
        .try_into()
        .unwrap();
        let says = |context: &Context| trust.trusts(&user(), "sts:AssumeRole", context);
        assert_eq!(says(&Context::default()), Trust::No);
        assert_eq!(says(&Context::default().with("sts:ExternalId", "secret")), Trust::Itself);
        assert_eq!(says(&Context::default().with("sts:ExternalId", "secret").with("aws:username", "eve")), Trust::Denied);
    }

    #[test]
    fn malformed_documents_are_refused_with_the_place_and_the_reason() {
        let allow = |member: &str, value: Value| {
            let mut statement = json!({"Effect": "Allow", "Action": "*", "Resource": "*"});
            statement[member] = value;
            json!({"Version": "2012-10-17", "Statement": [statement]})
        };
        for (document, part) in [
            (json!([]), "the document"),
            (json!({"Version": "2012-10-17"}), "missing field `Statement`"),
            (json!({"Version": "2012-10-17", "Statement": []}), "no statements"),
            (json!({"Version": "2024-01-01", "Statement": []}), "Version '2024-01-01'"),
            (json!({"Statements": []}), "unknown field `Statements`"),
            (allow("Effect", json!("allow")), "Statement[0]: unknown variant `allow`"),
            (allow("Conditions", json!({})), "unknown field `Conditions`"),
            (allow("Action", json!("RunMicrovm")), "'RunMicrovm' is not an action"),
            (allow("Action", json!("lambda:")), "not an action"),
            (allow("Action", json!([])), "Action is neither"),
            (allow("NotAction", json!("lambda:*")), "exclude each other"),
            (allow("Resource", json!("demo")), "neither '*' nor the ARN"),
            (allow("Resource", json!("arn:aws:s3:::${aws:username")), "has no end"),
            (allow("Principal", json!("*")), "Principal has no place"),
            (allow("Condition", json!({"StringIs": {"a:b": "c"}})), "'StringIs' is not supported"),
        ] {
            let error = Policy::try_from(document).unwrap_err().to_string();
            assert!(error.starts_with("MalformedPolicyDocument: ") && error.contains(part), "{error}");
        }
        assert!(Policy::parse("{").unwrap_err().to_string().contains("not JSON"));
        let long = allow("Sid", json!("x".repeat(MAX_BYTES)));
        assert!(Policy::try_from(long).unwrap_err().to_string().contains("longer than"));
    }

    #[test]
    fn malformed_trust_is_refused_too() {
        for (member, value, part) in [
            ("Principal", Value::Null, "no Principal"),
            ("Principal", json!({"AWS": "arn:aws:iam::000000000000:user/*"}), "neither '*', an account"),
            ("Principal", json!({"AWS": "ann"}), "neither '*', an account"),
            ("Principal", json!({"Federated": "x"}), "Principal.Federated is not supported"),
            ("Principal", json!({"Service": "*"}), "not a service"),
            ("Resource", json!("*"), "Resource has no place"),
            ("NotPrincipal", json!("*"), "unknown field `NotPrincipal`"),
        ] {
            let mut statement = json!({"Effect": "Allow", "Principal": "*", "Action": "sts:AssumeRole"});
            statement[member] = value;
            let error = TrustPolicy::try_from(json!({"Version": "2012-10-17", "Statement": statement})).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn variables_are_of_the_newer_language() {
        let document = json!({"Statement": {"Effect": "Allow", "Action": "*", "Resource": "arn:aws:s3:::${aws:username}"}});
        let old = Policy::try_from(document).unwrap();
        let context = Context::default().with("aws:username", "ann");
        assert_eq!(old.decide(Request { action: "s3:GetObject", resource: "arn:aws:s3:::ann", context: &context }), Decision::NotAllowed);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[\\[\\]{}:,\"*$aA-Z ]{0,60}") {
            let _ = Policy::parse(&text);
        }
    }
}
