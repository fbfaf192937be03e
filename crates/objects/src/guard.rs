//! What is checked before a request reaches the files: that its signer is of this account and may, names that could leave their bucket, and the rules of S3 that
//! a plain file system would not keep (no writes to buckets that do not exist, no deletion of buckets that are not empty).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use s3s::{
    S3Error, S3Request, S3Result,
    access::{S3Access, S3AccessContext},
    auth::Credentials,
    dto::{
        CopyObjectInput, CopySource, CreateBucketInput, DeleteBucketInput, DeleteObjectsInput, ListObjectsInput, ListObjectsV2Input,
        UploadPartCopyInput,
    },
    s3_error,
};

use crate::{Principals, Refused, local::Trusted, signer::Signer, uri::is_safe_key};

/// Longest name of a file on the file systems we run on, in bytes.
const MAX_FILE_NAME: usize = 255;

/// Length of `.upload-<uuid>` in the name of the file that holds an unfinished upload's attributes, in bytes.
const UPLOAD_ID: usize = 44;

pub(crate) struct Guard {
    root: PathBuf,
    /// Whose objects these are.
    account: String,
    principals: Arc<dyn Principals>,
}

impl Guard {
    pub(crate) fn new(root: PathBuf, account: String, principals: Arc<dyn Principals>) -> Self {
        Self { root, account, principals }
    }

    /// Gives leave to whoever signed, with a signature that was found to be good.
    fn allow(&self, signer: &Signer, action: &str, resource: &str) -> S3Result<()> {
        let key = signer.access_key_id.as_deref().unwrap_or_default();
        let token = signer.token.as_deref();
        let account = self.principals.account(key, token).map_err(refusal)?;
        if account != self.account {
            return Err(s3_error!(AccessDenied, "Access Denied"));
        }
        self.principals.allow(key, token, action, resource).map_err(refusal)
    }

    /// Gives leave to an object that an operation touches besides the one in its path.
    fn allow_other<T>(&self, req: &S3Request<T>, action: &str, bucket: &str, key: &str) -> S3Result<()> {
        if req.extensions.get::<Trusted>().is_some() {
            return Ok(());
        }
        let signer = verified(Signer::of(&req.uri, &req.headers), req.credentials.as_ref());
        self.allow(&signer, action, &format!("arn:aws:s3:::{bucket}/{key}"))
    }

    async fn is_directory(&self, names: &[&str]) -> bool {
        let path = names.iter().fold(self.root.clone(), |path, name| path.join(name));
        tokio::fs::metadata(path).await.is_ok_and(|metadata| metadata.is_dir())
    }
}

#[async_trait]
impl S3Access for Guard {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        let trusted = cx.extensions_mut().get::<Trusted>().is_some();
        if cx.credentials().is_none() && !trusted {
            return Err(s3_error!(AccessDenied, "Access Denied: the request is not signed."));
        }
        let operation = cx.s3_op().name();
        if !trusted {
            let signer = verified(Signer::of(cx.uri(), cx.headers()), cx.credentials());
            if signer.outdated {
                let text = "The authorization mechanism you have provided is not supported. Please use AWS4-HMAC-SHA256.";
                return Err(s3_error!(InvalidRequest, "{text}"));
            }
            if signer.is_too_long() {
                return Err(s3_error!(InvalidRequest, "X-Amz-Expires must be less than a week (in seconds); that is, from 0 to 604800."));
            }
            let (bucket, key) = (cx.s3_path().get_bucket_name(), cx.s3_path().get_object_key());
            if let Some(action) = action(operation) {
                let resource = match (bucket, key) {
                    (Some(bucket), Some(key)) => format!("arn:aws:s3:::{bucket}/{key}"),
                    (Some(bucket), None) => format!("arn:aws:s3:::{bucket}"),
                    (None, _) => "*".to_owned(),
                };
                self.allow(&signer, &action, &resource)?;
            } else {
                self.principals
                    .account(signer.access_key_id.as_deref().unwrap_or_default(), signer.token.as_deref())
                    .map_err(refusal)
                    .and_then(|account| if account == self.account { Ok(()) } else { Err(s3_error!(AccessDenied, "Access Denied")) })?;
            }
        }
        // Form uploads name their object in the form, after this check.
        if operation == "PostObject" {
            return Err(s3_error!(NotImplemented, "Browser-based uploads are not supported."));
        }
        let Some(bucket) = cx.s3_path().get_bucket_name() else { return Ok(()) };
        if let Some(key) = cx.s3_path().get_object_key() {
            check_key(key)?;
            let upload = if operation == "CreateMultipartUpload" { UPLOAD_ID } else { 0 };
            check_name_lengths(bucket, key, upload)?;
        }
        if operation != "CreateBucket" && !self.is_directory(&[bucket]).await {
            return Err(s3_error!(NoSuchBucket, "The specified bucket does not exist"));
        }
        if let Some(key) = cx.s3_path().get_object_key()
            && matches!(operation, "GetObject" | "HeadObject" | "DeleteObject")
            && !key.ends_with('/')
            && self.is_directory(&[bucket, key]).await
        {
            return Err(s3_error!(NoSuchKey, "The specified key does not exist."));
        }
        Ok(())
    }

    async fn copy_object(&self, req: &mut S3Request<CopyObjectInput>) -> S3Result<()> {
        let (bucket, key) = check_source(&req.input.copy_source)?;
        self.allow_other(req, "s3:GetObject", bucket, key)
    }

    async fn upload_part_copy(&self, req: &mut S3Request<UploadPartCopyInput>) -> S3Result<()> {
        let (bucket, key) = check_source(&req.input.copy_source)?;
        self.allow_other(req, "s3:GetObject", bucket, key)
    }

    async fn delete_objects(&self, req: &mut S3Request<DeleteObjectsInput>) -> S3Result<()> {
        req.input.delete.objects.iter().try_for_each(|object| {
            check_key(&object.key)?;
            self.allow_other(req, "s3:DeleteObject", &req.input.bucket, &object.key)
        })
    }

    // The answer would claim the encoding without applying it, and clients would decode names that were never encoded.
    async fn list_objects(&self, req: &mut S3Request<ListObjectsInput>) -> S3Result<()> {
        req.input.encoding_type = None;
        Ok(())
    }

    async fn list_objects_v2(&self, req: &mut S3Request<ListObjectsV2Input>) -> S3Result<()> {
        req.input.encoding_type = None;
        Ok(())
    }

    async fn create_bucket(&self, req: &mut S3Request<CreateBucketInput>) -> S3Result<()> {
        if self.is_directory(&[&req.input.bucket]).await {
            return Err(s3_error!(
                BucketAlreadyOwnedByYou,
                "Your previous request to create the named bucket succeeded and you already own it."
            ));
        }
        Ok(())
    }

    async fn delete_bucket(&self, req: &mut S3Request<DeleteBucketInput>) -> S3Result<()> {
        let bucket = self.root.join(&req.input.bucket);
        match tokio::task::spawn_blocking(move || has_objects(&bucket)).await {
            Ok(Ok(false)) => Ok(()),
            Ok(Ok(true)) => Err(s3_error!(BucketNotEmpty, "The bucket you tried to delete is not empty")),
            Ok(Err(error)) => Err(s3_error!(error, InternalError)),
            Err(error) => Err(s3_error!(error, InternalError)),
        }
    }
}

/// A request may name one key in a header and another in its query: the one whose signature was checked counts.
fn verified(signer: Signer, credentials: Option<&Credentials>) -> Signer {
    Signer { access_key_id: credentials.map(|credentials| credentials.access_key.clone()), ..signer }
}

/// The action that an operation needs leave for, on what its path names. `None`: only what its body names counts.
fn action(operation: &str) -> Option<String> {
    let name = match operation {
        "ListBuckets" => "ListAllMyBuckets",
        "HeadBucket" | "ListObjects" | "ListObjectsV2" => "ListBucket",
        "HeadObject" => "GetObject",
        "CopyObject" | "CreateMultipartUpload" | "UploadPart" | "UploadPartCopy" | "CompleteMultipartUpload" => "PutObject",
        "ListParts" => "ListMultipartUploadParts",
        "ListMultipartUploads" => "ListBucketMultipartUploads",
        "DeleteObjects" => return None,
        other => other,
    };
    Some(format!("s3:{name}"))
}

fn refusal(refused: Refused) -> S3Error {
    match refused {
        Refused::Unknown => s3_error!(InvalidToken, "The provided token is malformed or otherwise invalid."),
        Refused::Expired => s3_error!(ExpiredToken, "The provided token has expired."),
        Refused::Denied(message) => s3_error!(AccessDenied, "{message}"),
    }
}

fn check_source(source: &CopySource) -> S3Result<(&str, &str)> {
    match source {
        CopySource::Bucket { bucket, key, .. } if s3s::path::check_bucket_name(bucket) => check_key(key).map(|()| (&**bucket, &**key)),
        _ => Err(s3_error!(InvalidArgument, "The copy source is not an object of this store.")),
    }
}

fn check_key(key: &str) -> S3Result<()> {
    // A key that ends with a slash is a directory marker.
    if is_safe_key(key.strip_suffix('/').unwrap_or(key)) {
        Ok(())
    } else {
        Err(s3_error!(InvalidArgument, "Keys with empty, '.' or '..' segments are not supported."))
    }
}

/// Attributes of an object live in a file whose name holds bucket and key in base64, and the id of the upload while there is one.
fn check_name_lengths(bucket: &str, key: &str, upload: usize) -> S3Result<()> {
    let base64 = |text: &str| (text.len() * 4).div_ceil(3);
    let attributes = ".bucket-.object-.metadata.json".len() + base64(bucket) + base64(key) + upload;
    if attributes > MAX_FILE_NAME || key.split('/').any(|segment| segment.len() > MAX_FILE_NAME) {
        return Err(s3_error!(KeyTooLongError, "Your key is too long for this store."));
    }
    Ok(())
}

fn has_objects(directory: &Path) -> std::io::Result<bool> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() || has_objects(&entry.path())? {
            return Ok(true);
        }
    }
    Ok(false)
}
