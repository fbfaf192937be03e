//! `s3://bucket/key`, taken apart and checked so that neither part can mean a place outside the store.

use std::fmt;

/// The text is not the URI of an object. The message is the service's own (SPEC 3.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>")]
pub struct InvalidUri;

/// An object's bucket and key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectUri {
    bucket: String,
    key: String,
}

impl ObjectUri {
    /// An object by its names. Bucket names follow S3's rules; keys are 1–1024 bytes whose segments are neither empty, `.` nor `..`, because
    /// objects are files here.
    pub fn new(bucket: &str, key: &str) -> Result<Self, InvalidUri> {
        if s3s::path::check_bucket_name(bucket) && is_safe_key(key) {
            Ok(Self { bucket: bucket.to_owned(), key: key.to_owned() })
        } else {
            Err(InvalidUri)
        }
    }

    /// Parses `s3://<bucket>/<key>`. Nothing is decoded: keys with escapes are keys with percent signs, as in S3.
    pub fn parse(text: &str) -> Result<Self, InvalidUri> {
        let (bucket, key) = text.strip_prefix("s3://").and_then(|rest| rest.split_once('/')).ok_or(InvalidUri)?;
        Self::new(bucket, key)
    }

    /// The bucket's name.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// The object's key.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl fmt::Display for ObjectUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.key)
    }
}

/// Whether a key names one file below its bucket's directory.
pub(crate) fn is_safe_key(key: &str) -> bool {
    (1..=1024).contains(&key.len()) && !key.contains(['\0', '\\']) && key.split('/').all(|segment| !matches!(segment, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uri_has_a_bucket_and_a_key() {
        let uri = ObjectUri::parse("s3://artifacts/apps/demo v1%20.zip").unwrap();
        assert_eq!((uri.bucket(), uri.key()), ("artifacts", "apps/demo v1%20.zip"));
        assert_eq!(uri.to_string(), "s3://artifacts/apps/demo v1%20.zip");
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "artifacts/demo.zip",
            "https://artifacts/demo.zip",
            "s3://",
            "s3://artifacts",
            "s3://artifacts/",
            "s3:///demo.zip",
            "s3://Artifacts/demo.zip",
            "s3://../demo.zip",
            "s3://artifacts/../other/demo.zip",
            "s3://artifacts/a/../../demo.zip",
            "s3://artifacts/./demo.zip",
            "s3://artifacts//etc/passwd",
            "s3://artifacts/demo/",
            "s3://artifacts/a\0b",
        ] {
            assert_eq!(ObjectUri::parse(text), Err(InvalidUri), "{text:?}");
        }
        assert_eq!(ObjectUri::parse(&format!("s3://artifacts/{}", "k".repeat(1025))), Err(InvalidUri));
    }
}
