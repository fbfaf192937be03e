//! The Security Token Service: `GetCallerIdentity` and `AssumeRole`, asked for in forms and answered in XML (API version 2011-06-15).

use std::{
    collections::HashMap,
    fmt::Write,
    time::{Duration, SystemTime},
};

use axum::{body::Body, response::Response};
use http::{HeaderValue, StatusCode, header::CONTENT_TYPE, request::Parts};
use percent_encoding::percent_decode_str;
use time::{OffsetDateTime, macros::format_description};

use hearth_identity::{AssumeError, AssumeRole, CredentialError, Policy, SessionError};

use crate::{
    auth::{Auth, AuthError},
    sigv4::SignatureError,
};

/// `DurationSeconds` where it is absent.
const DEFAULT_DURATION: Duration = Duration::from_secs(3600);

/// An answer that is not a success.
#[derive(Debug)]
struct StsError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl StsError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    fn validation(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "ValidationError", message)
    }
}

impl From<AuthError> for StsError {
    fn from(error: AuthError) -> Self {
        let (status, code) = match &error {
            AuthError::Signature(SignatureError::Missing) => (StatusCode::FORBIDDEN, "MissingAuthenticationToken"),
            AuthError::Signature(SignatureError::Incomplete(_)) => (StatusCode::BAD_REQUEST, "IncompleteSignature"),
            AuthError::Signature(_) => (StatusCode::FORBIDDEN, "SignatureDoesNotMatch"),
            AuthError::Credential(CredentialError::Unknown) => (StatusCode::FORBIDDEN, "InvalidClientTokenId"),
            AuthError::Credential(CredentialError::Expired) => (StatusCode::FORBIDDEN, "ExpiredToken"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<AssumeError> for StsError {
    fn from(error: AssumeError) -> Self {
        let message = error.to_string();
        match error {
            AssumeError::Denied(_) => Self::new(StatusCode::FORBIDDEN, "AccessDenied", message),
            AssumeError::Invalid(_) => Self::validation(message),
            AssumeError::Session(SessionError::NoSuchRole(_) | SessionError::NotTrusted(_) | SessionError::Random) => {
                tracing::error!(message, "a session could not be made");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalFailure", "The request could not be processed.")
            }
        }
    }
}

/// Answers a form.
pub(crate) fn answer(auth: &Auth, parts: &Parts, body: &[u8], request_id: &str) -> Response {
    match perform(auth, parts, body, request_id) {
        Ok(body) => xml(StatusCode::OK, body),
        Err(error) => refuse(error, request_id),
    }
}

/// The answer to a form that cannot be read.
pub(crate) fn unreadable(request_id: &str) -> Response {
    refuse(StsError::new(StatusCode::BAD_REQUEST, "MalformedInput", "The request body could not be read."), request_id)
}

fn perform(auth: &Auth, parts: &Parts, body: &[u8], request_id: &str) -> Result<String, StsError> {
    let who = auth.identify(parts, body, "sts")?;
    let form = form(body);
    let parameter = |name: &str| form.get(name).map(String::as_str);
    let action = parameter("Action").unwrap_or_default();
    let result = match action {
        "GetCallerIdentity" => [("Arn", &who.principal.arn), ("UserId", &who.principal.user_id), ("Account", &who.principal.account)]
            .iter()
            .map(|(name, value)| element(name, value))
            .collect(),
        "AssumeRole" => assume_role(auth, &who.principal, &form)?,
        _ => {
            let version = parameter("Version").unwrap_or_default();
            let message = format!("Could not find operation {action} for version {version}");
            return Err(StsError::new(StatusCode::BAD_REQUEST, "InvalidAction", message));
        }
    };
    Ok(format!(
        "<{action}Response xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><{action}Result>{result}</{action}Result>\
         <ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata></{action}Response>"
    ))
}

fn assume_role(auth: &Auth, caller: &hearth_identity::Principal, form: &HashMap<String, String>) -> Result<String, StsError> {
    let parameter = |name: &str| form.get(name).map(String::as_str);
    let required = |name: &'static str| {
        let null = || {
            let at = format!("{}{}", name[..1].to_ascii_lowercase(), &name[1..]);
            StsError::validation(format!(
                "1 validation error detected: Value null at '{at}' failed to satisfy constraint: Member must not be null"
            ))
        };
        parameter(name).filter(|value| !value.is_empty()).ok_or_else(null)
    };
    // What narrows or marks a session must not be lost silently.
    let unsupported = ["PolicyArns.", "Tags.", "TransitiveTagKeys.", "ProvidedContexts.", "SerialNumber", "TokenCode", "SourceIdentity"];
    if let Some(name) = form.keys().find(|name| unsupported.iter().any(|prefix| name.starts_with(prefix))) {
        return Err(StsError::validation(format!("{name} is not supported by Hearth.")));
    }
    let role_arn = required("RoleArn")?;
    let duration = match parameter("DurationSeconds") {
        Some(text) => {
            let seconds = text.parse().map_err(|_| StsError::validation(format!("DurationSeconds '{text}' is not a number")))?;
            Duration::from_secs(seconds)
        }
        None => DEFAULT_DURATION,
    };
    let malformed = |error: &dyn std::fmt::Display| StsError::new(StatusCode::BAD_REQUEST, "MalformedPolicyDocument", error.to_string());
    let ask = AssumeRole {
        role_arn,
        session_name: required("RoleSessionName")?,
        duration,
        external_id: parameter("ExternalId"),
        policy: parameter("Policy").map(Policy::parse).transpose().map_err(|error| malformed(&error))?,
    };
    let session = auth.directory().assume_role(caller, ask, SystemTime::now())?;
    let expiration = OffsetDateTime::from(session.expires_at)
        .format(format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z"))
        .unwrap_or_default();
    let mut result = String::new();
    let fields = [("Arn", &session.principal.arn), ("AssumedRoleId", &session.principal.user_id)];
    let credentials = [
        ("AccessKeyId", &session.access_key_id),
        ("SecretAccessKey", &session.secret_access_key),
        ("SessionToken", &session.session_token),
        ("Expiration", &expiration),
    ];
    let elements = |fields: &[(&str, &String)]| fields.iter().map(|(name, value)| element(name, value)).collect::<String>();
    // Writing to a string cannot fail.
    let _ = write!(result, "<AssumedRoleUser>{}</AssumedRoleUser>", elements(&fields));
    let _ = write!(result, "<Credentials>{}</Credentials>", elements(&credentials));
    Ok(result)
}

fn form(body: &[u8]) -> HashMap<String, String> {
    let decode = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let body = String::from_utf8_lossy(body);
    let pairs = body.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.map(|(name, value)| (decode(name), decode(value))).collect()
}

fn refuse(error: StsError, request_id: &str) -> Response {
    tracing::debug!(request_id, code = error.code, message = error.message, "request refused");
    let kind = if error.status.is_server_error() { "Receiver" } else { "Sender" };
    let body = format!(
        "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>{kind}</Type>{}{}</Error>\
         <RequestId>{request_id}</RequestId></ErrorResponse>",
        element("Code", error.code),
        element("Message", &error.message)
    );
    xml(error.status, body)
}

fn element(name: &str, text: &str) -> String {
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;");
    format!("<{name}>{escaped}</{name}>")
}

fn xml(status: StatusCode, body: String) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/xml"));
    response
}
