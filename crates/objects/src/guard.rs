//! What is checked before a request reaches the files: the signature's presence, names that could leave their bucket, and the rules of S3 that
//! a plain file system would not keep (no writes to buckets that do not exist, no deletion of buckets that are not empty).

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use s3s::{
    S3Request, S3Result,
    access::{S3Access, S3AccessContext},
    dto::{
        CopyObjectInput, CopySource, CreateBucketInput, DeleteBucketInput, DeleteObjectsInput, ListObjectsInput, ListObjectsV2Input,
        UploadPartCopyInput,
    },
    s3_error,
};

use crate::{local::Trusted, uri::is_safe_key};

/// Longest name of a file on the file systems we run on, in bytes.
const MAX_FILE_NAME: usize = 255;

/// Length of `.upload-<uuid>` in the name of the file that holds an unfinished upload's attributes, in bytes.
const UPLOAD_ID: usize = 44;

pub(crate) struct Guard {
    root: PathBuf,
}

impl Guard {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
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
        check_source(&req.input.copy_source)
    }

    async fn upload_part_copy(&self, req: &mut S3Request<UploadPartCopyInput>) -> S3Result<()> {
        check_source(&req.input.copy_source)
    }

    async fn delete_objects(&self, req: &mut S3Request<DeleteObjectsInput>) -> S3Result<()> {
        req.input.delete.objects.iter().try_for_each(|object| check_key(&object.key))
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

fn check_source(source: &CopySource) -> S3Result<()> {
    match source {
        CopySource::Bucket { bucket, key, .. } if s3s::path::check_bucket_name(bucket) => check_key(key),
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
