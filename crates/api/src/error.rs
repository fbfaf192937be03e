//! Errors as callers see them (SPEC 3.1): status, exception name, and a body with every modelled member.
//!
//! What the caller is told and what the log is told are kept apart: [`ApiError::internal`] carries the second.

use axum::body::Body;
use http::{
    HeaderName, HeaderValue, Response, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER},
};
use serde_json::{Map, Value};

use hearth_control::ControlError;

use crate::validate::Invalid;

pub(crate) const ERROR_TYPE: HeaderName = HeaderName::from_static("x-amzn-errortype");
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-amzn-requestid");

/// An answer that is not a success.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    exception: &'static str,
    body: Map<String, Value>,
    /// Seconds, for the header `Retry-After`.
    retry_after: Option<u64>,
    /// For the log only.
    internal: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, exception: &'static str, message_member: &str, message: Value, nulls: &[&str]) -> Self {
        let mut body = Map::from_iter([(message_member.to_owned(), message)]);
        body.extend(nulls.iter().map(|member| ((*member).to_owned(), Value::Null)));
        Self { status, exception, body, retry_after: None, internal: None }
    }

    /// 400: the request breaks a rule.
    pub fn validation(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "ValidationException", "message", Value::String(message.into()), &[])
    }

    /// 400 without a message: the request cannot be parsed.
    pub fn malformed() -> Self {
        Self::new(StatusCode::BAD_REQUEST, "ValidationException", "message", Value::Null, &[])
    }

    /// 403 of the authorisation layer.
    pub fn access_denied(message: Option<String>) -> Self {
        let message = message.map_or(Value::Null, Value::String);
        Self::new(StatusCode::FORBIDDEN, "AccessDeniedException", "Message", message, &[])
    }

    /// 403: the caller is not known.
    pub fn unauthenticated(exception: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, exception, "message", Value::String(message.into()), &[])
    }

    /// 404: there is no such operation.
    pub fn unknown_operation(method: &str, path: &str) -> Self {
        let message = Value::String(format!("Unknown operation: {method} {path}"));
        Self::new(StatusCode::NOT_FOUND, "UnknownOperationException", "message", message, &[])
    }

    /// 400: an exception of a service that has its own names for them.
    pub fn client(exception: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, exception, "message", Value::String(message.into()), &[])
    }

    /// 413: the body is longer than `limit` bytes.
    pub fn too_large(limit: usize) -> Self {
        let message = Value::String(format!("Request must be smaller than {limit} bytes for this operation."));
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLargeException", "message", message, &[])
    }

    /// 500: our fault. `internal` goes to the log, the caller gets the id to find it there.
    pub fn internal(internal: impl Into<String>) -> Self {
        let message = Value::String("The request could not be processed because of an internal error.".to_owned());
        let error = Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerException", "message", message, &[]);
        Self { internal: Some(internal.into()), ..error }
    }

    fn not_found(message: String) -> Self {
        Self::new(StatusCode::NOT_FOUND, "ResourceNotFoundException", "message", Value::String(message), &["resourceId", "resourceType"])
    }

    fn conflict(message: String) -> Self {
        Self::new(StatusCode::CONFLICT, "ConflictException", "message", Value::String(message), &["resourceId", "resourceType"])
    }

    /// 402.
    fn quota_exceeded(message: String) -> Self {
        let nulls = ["quotaCode", "resourceId", "resourceType", "serviceCode"];
        Self::new(StatusCode::PAYMENT_REQUIRED, "ServiceQuotaExceededException", "message", Value::String(message), &nulls)
    }

    fn throttled(message: String, retry_after: u64) -> Self {
        let nulls = ["quotaCode", "serviceCode"];
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "ThrottlingException", "message", Value::String(message), &nulls);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// An error of connectors and tags, which come from an older service with other exceptions.
    fn older(status: StatusCode, exception: &'static str, message_member: &str, message: impl Into<String>) -> Self {
        let error = Self::new(status, exception, message_member, Value::String(message.into()), &[]);
        Self { body: error.body.into_iter().chain([("Type".to_owned(), Value::String("User".to_owned()))]).collect(), ..error }
    }

    /// 400 of the operations of connectors and tags.
    pub fn invalid_parameter(message: impl Into<String>) -> Self {
        Self::older(StatusCode::BAD_REQUEST, "InvalidParameterValueException", "message", message)
    }

    fn insufficient_capacity(message: String) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InsufficientCapacityException", "message", Value::String(message), &[])
    }

    /// The answer of the protocol AWS JSON 1.1: the exception's name is in the body, and whose fault it is says 400 or 500.
    pub fn into_aws_json(mut self, request_id: &str) -> Response<Body> {
        self.body.insert("__type".to_owned(), Value::String(self.exception.to_owned()));
        if self.status.is_client_error() {
            self.status = StatusCode::BAD_REQUEST;
        }
        let mut response = self.into_response(request_id);
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-amz-json-1.1"));
        response
    }

    /// Logs what the caller is not told, and makes the answer.
    pub fn into_response(self, request_id: &str) -> Response<Body> {
        match &self.internal {
            Some(internal) => tracing::error!(request_id, error = internal, "request failed"),
            None => tracing::debug!(request_id, exception = self.exception, body = ?self.body, "request refused"),
        }
        let mut response = json_response(self.status, &Value::Object(self.body));
        response.headers_mut().insert(ERROR_TYPE, HeaderValue::from_static(self.exception));
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// An answer with a JSON body.
pub(crate) fn json_response(status: StatusCode, body: &Value) -> Response<Body> {
    let mut response = Response::new(if status == StatusCode::NO_CONTENT { Body::empty() } else { Body::from(body.to_string()) });
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        match invalid {
            Invalid::Malformed => Self::malformed(),
            Invalid::NotAStructure => {
                Self::new(StatusCode::BAD_REQUEST, "ValidationException", "Message", Value::String("Expected null".to_owned()), &[])
            }
            Invalid::Constraints(message) => Self::validation(message),
        }
    }
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        let message = error.to_string();
        match error {
            ControlError::Invalid(_) | ControlError::NameTaken(_) | ControlError::ImageInUse | ControlError::Terminated(_) => {
                Self::validation(message)
            }
            ControlError::ImageNotFound(_)
            | ControlError::VersionNotFound { .. }
            | ControlError::MicrovmNotFound(_)
            | ControlError::NoActiveVersion { .. }
            | ControlError::TaggedNotFound(_) => Self::not_found(message),
            ControlError::TokenReused | ControlError::ImageInTransition(_) => Self::conflict(message),
            ControlError::QuotaExceeded(_) => Self::quota_exceeded(message),
            ControlError::Throttled { retry_after_seconds } => Self::throttled(message, retry_after_seconds),
            ControlError::InvalidTags(_) => Self::invalid_parameter(message),
            // Recorded with this one member.
            ControlError::ConnectorNotFound(_) => {
                Self::new(StatusCode::NOT_FOUND, "ResourceNotFoundException", "Message", Value::String(message), &[])
            }
            ControlError::ConnectorConflict(_) => Self::older(StatusCode::CONFLICT, "ResourceConflictException", "message", message),
            ControlError::ConnectorLimit(_) => {
                Self::older(StatusCode::BAD_REQUEST, "NetworkConnectorLimitExceededException", "message", message)
            }
            ControlError::Denied { .. } => Self::access_denied(Some(message)),
            ControlError::InsufficientCapacity(_) => Self::insufficient_capacity(message),
            ControlError::BadCursor => Self::malformed(),
            ControlError::Internal(_) => Self::internal(message),
        }
    }
}
