//! Artifacts by `s3://` URI: the S3 that is embedded in the server, and the small interface that builds read from.
//!
//! [`LocalObjects`] keeps objects as files under one directory. Clients reach it through [`LocalObjects::service`], the rest of the server
//! through [`Objects`].

#![forbid(unsafe_code)]

mod guard;
mod local;
mod uri;

use std::path::Path;

use async_trait::async_trait;

pub use local::{Access, AccessKey, LocalObjects, OpenError, S3Service};
pub use uri::{InvalidUri, ObjectUri};

/// Where artifacts come from.
#[async_trait]
pub trait Objects: Send + Sync + 'static {
    /// Copies an object into a new file and returns its size in bytes. An object of more than `max_bytes` is refused before it is copied.
    async fn fetch(&self, uri: &ObjectUri, into: &Path, max_bytes: u64) -> Result<u64, FetchError>;

    /// Stores a file as an object; the bucket is made if it is missing.
    async fn put(&self, bucket: &str, key: &str, file: &Path) -> Result<(), PutError>;
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
