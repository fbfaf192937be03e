//! Artifacts by `s3://` URI: the S3 that is embedded in the server, and the small interface that builds read from.
//!
//! [`LocalObjects`] keeps objects as files, each account's under a directory of its own: bucket names belong to an account here, not to the whole
//! world. Clients reach it through [`LocalObjects::service`], the rest of the server through [`Objects`].

#![forbid(unsafe_code)]

mod guard;
mod local;
mod signer;
mod uri;

use std::path::Path;

use async_trait::async_trait;

pub use local::{Access, LocalObjects, OpenError, S3Service};
pub use uri::{InvalidUri, ObjectUri};

/// Where artifacts come from.
#[async_trait]
pub trait Objects: Send + Sync + 'static {
    /// Copies an object of an account into a new file and returns its size in bytes. An object of more than `max_bytes` is refused before it is
    /// copied.
    async fn fetch(&self, account: &str, uri: &ObjectUri, into: &Path, max_bytes: u64) -> Result<u64, FetchError>;

    /// Stores a file as an object of an account; the bucket is made if it is missing.
    async fn put(&self, account: &str, bucket: &str, key: &str, file: &Path) -> Result<(), PutError>;
}

/// Who may use the store.
pub trait Principals: Send + Sync + 'static {
    /// What requests with an access key are signed with.
    fn secret(&self, access_key_id: &str) -> Option<String>;

    /// The account that an access key belongs to, with the session token that came with it.
    fn account(&self, access_key_id: &str, token: Option<&str>) -> Result<String, Refused>;

    /// Gives leave to an action such as `s3:GetObject` on a resource such as `arn:aws:s3:::bucket/key`.
    fn allow(&self, access_key_id: &str, token: Option<&str>, action: &str, resource: &str) -> Result<(), Refused>;
}

/// Why somebody may not use the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// The key is not known, or the token is not its own.
    Unknown,
    /// The session is over.
    Expired,
    /// The message for the caller.
    Denied(String),
}

/// Why an artifact cannot be had. The variants are the reason codes of failed image builds (SPEC 2.1).
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// the bucket does not exist
    #[error("The bucket {bucket} does not exist.")]
    NoSuchBucket {
        /// Bucket asked for.
        bucket: String,
    },
    /// the bucket has no such object
    #[error("The object {key} does not exist in the bucket {bucket}.")]
    NoSuchKey {
        /// Bucket asked for.
        bucket: String,
        /// Key asked for.
        key: String,
    },
    /// the object may not be read
    #[error("Access to {uri} was denied.")]
    AccessDenied {
        /// Object asked for.
        uri: String,
    },
    /// the object is not one that can be built from
    #[error("The object {uri} is not valid: {reason}.")]
    InvalidObject {
        /// Object asked for.
        uri: String,
        /// What is wrong with it.
        reason: String,
    },
    /// the copy could not be written, or the store could not be read
    #[error("cannot copy {uri}: {source}")]
    Io {
        /// Object asked for.
        uri: String,
        /// What failed.
        source: std::io::Error,
    },
}

impl FetchError {
    /// The code that a failed build's reason begins with.
    pub fn reason_code(&self) -> &'static str {
        match self {
            Self::NoSuchBucket { .. } => "S3_NO_SUCH_BUCKET",
            Self::NoSuchKey { .. } => "S3_NO_SUCH_KEY",
            Self::AccessDenied { .. } => "S3_ACCESS_DENIED",
            Self::InvalidObject { .. } => "S3_INVALID_OBJECT",
            Self::Io { .. } => "INTERNAL_PLATFORM_ERROR",
        }
    }
}

/// Why a file cannot be stored.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// the bucket or key is not one that S3 would take
    #[error(transparent)]
    InvalidName(#[from] InvalidUri),
    /// the file could not be read, or the object not be written
    #[error("cannot store s3://{bucket}/{key}: {source}")]
    Io {
        /// Bucket to store in.
        bucket: String,
        /// Key to store as.
        key: String,
        /// What failed.
        source: std::io::Error,
    },
}
