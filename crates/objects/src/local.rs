//! The embedded S3: objects are files below one directory, `<root>/<bucket>/<key>`, served over the S3 protocol by `s3s`. The root of the
//! default account is the directory that was given; every other account's is beside it, with a hyphen and the account behind its name.

use std::{
    collections::HashMap,
    convert::Infallible,
    io::{self, Read},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{TryStreamExt, future::BoxFuture};
use http::{Request, Response, StatusCode};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt, StreamBody};
use s3s::{
    Body, S3Result,
    auth::{S3Auth, SecretKey},
    host::{S3Host, VirtualHost},
    s3_error,
    service::{S3Service as Protocol, S3ServiceBuilder},
};
use s3s_fs::FileSystem;
use tokio_util::io::ReaderStream;

use crate::{FetchError, ObjectUri, Objects, Principals, PutError, guard::Guard, signer::Signer};

/// Who may use a [`S3Service`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Requests signed with a key that the [`Principals`] know.
    Signed,
    /// Any request, and it is for the default account: for a listener that only the operator can reach.
    Trusted,
}

/// Marks a request that needs no signature. Set by the server, never by a client.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trusted;

/// Objects in a directory for each account.
#[derive(Clone)]
pub struct LocalObjects(Arc<Inner>);

struct Inner {
    /// Of the default account.
    root: PathBuf,
    default_account: String,
    principals: Arc<dyn Principals>,
    /// By account, opened when they are first used.
    stores: Mutex<HashMap<String, Store>>,
}

/// One account's objects.
#[derive(Clone)]
struct Store {
    root: PathBuf,
    protocol: Protocol,
}

/// The directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {} as the object store: {reason}", path.display())]
pub struct OpenError {
    path: PathBuf,
    reason: String,
}

impl LocalObjects {
    /// Opens the store, creates its directory if it is missing, and removes what interrupted writes left. One process at a time may have a
    /// directory open.
    pub fn open(root: &Path, default_account: &str, principals: Arc<dyn Principals>) -> Result<Self, OpenError> {
        let inner = Inner { root: root.to_owned(), default_account: default_account.to_owned(), principals, stores: Mutex::default() };
        inner.store(default_account)?;
        Ok(Self(Arc::new(inner)))
    }

    /// The store as an HTTP service that speaks S3.
    pub fn service(&self, access: Access) -> S3Service {
        S3Service { objects: self.clone(), access }
    }

    async fn store(&self, account: &str) -> Result<Store, OpenError> {
        if let Some(store) = self.0.opened(account) {
            return Ok(store);
        }
        let (inner, account) = (Arc::clone(&self.0), account.to_owned());
        let root = inner.root_of(&account);
        let opened = tokio::task::spawn_blocking(move || inner.store(&account)).await;
        opened.unwrap_or_else(|e| Err(OpenError { path: root, reason: e.to_string() }))
    }
}

impl Inner {
    fn opened(&self, account: &str) -> Option<Store> {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner).get(account).cloned()
    }

    fn root_of(&self, account: &str) -> PathBuf {
        if account == self.default_account {
            return self.root.clone();
        }
        let mut name = self.root.file_name().unwrap_or_default().to_owned();
        name.push(format!("-{account}"));
        self.root.with_file_name(name)
    }

    /// Opens an account's objects, once. Waits for the disk.
    fn store(&self, account: &str) -> Result<Store, OpenError> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(account) {
            return Ok(store.clone());
        }
        let root = self.root_of(account);
        let error = |reason: String| OpenError { path: root.clone(), reason };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&root).map_err(|e| error(e.to_string()))?;
        let root = root.canonicalize().map_err(|e| error(e.to_string()))?;
        let files = FileSystem::new(&root).map_err(|e| error(format!("{e:?}")))?;

        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(Secrets(Arc::clone(&self.principals)));
        builder.set_access(Guard::new(root.clone(), account.to_owned(), Arc::clone(&self.principals)));
        builder.set_host(LocalhostBuckets);
        let store = Store { root, protocol: builder.build() };
        stores.insert(account.to_owned(), store.clone());
        Ok(store)
    }

    /// The account that a request says it is of. Whether it is, the guard of that account's store sees to, once the signature is checked.
    fn account_of<B>(&self, request: &Request<B>) -> String {
        let signer = Signer::of(request.uri(), request.headers());
        let account = signer.access_key_id.and_then(|key| self.principals.account(&key, signer.token.as_deref()).ok());
        account.unwrap_or_else(|| self.default_account.clone())
    }
}

impl Store {
    async fn call_trusted(&self, request: http::request::Builder, body: Body) -> io::Result<Response<Body>> {
        let request = request.extension(Trusted).body(body).map_err(io::Error::other)?;
        self.protocol.call(request).await.map_err(|e| io::Error::other(format!("{e:?}")))
    }

    async fn ensure_bucket(&self, bucket: &str) -> io::Result<()> {
        tokio::fs::create_dir_all(self.root.join(bucket)).await
    }
}

#[async_trait]
impl Objects for LocalObjects {
    async fn fetch(&self, account: &str, uri: &ObjectUri, into: &Path, max_bytes: u64) -> Result<u64, FetchError> {
        let store = self.store(account).await;
        let store = store.map_err(|e| FetchError::Io { uri: uri.to_string(), source: io::Error::other(e) })?;
        let (root, uri, into) = (store.root, uri.clone(), into.to_owned());
        let name = uri.to_string();
        tokio::task::spawn_blocking(move || copy_object(&root, &uri, &into, max_bytes))
            .await
            .unwrap_or_else(|e| Err(FetchError::Io { uri: name, source: io::Error::other(e) }))
    }

    async fn put(&self, account: &str, bucket: &str, key: &str, file: &Path) -> Result<(), PutError> {
        let uri = ObjectUri::new(bucket, key)?;
        let error = |source| PutError::Io { bucket: bucket.to_owned(), key: key.to_owned(), source };

        let store = self.store(account).await.map_err(io::Error::other).map_err(error)?;
        store.ensure_bucket(uri.bucket()).await.map_err(error)?;
        let file = tokio::fs::File::open(file).await.map_err(error)?;
        let bytes = file.metadata().await.map_err(error)?.len();
        let body = Body::http_body_unsync(StreamBody::new(ReaderStream::with_capacity(file, 64 << 10).map_ok(Frame::data)));
        let path: String = uri.key().split('/').map(|segment| format!("/{}", escape(segment))).collect();
        let request =
            Request::put(format!("http://127.0.0.1/{}{path}", uri.bucket())).header("host", "127.0.0.1").header("content-length", bytes);

        let response = store.call_trusted(request, body).await.map_err(error)?;
        if response.status() == StatusCode::OK {
            return Ok(());
        }
        let answer = response.into_body().collect().await.map_err(io::Error::other).map_err(error)?.to_bytes();
        Err(error(io::Error::other(String::from_utf8_lossy(&answer).into_owned())))
    }
}

/// Percent-encodes everything but the unreserved characters of RFC 3986.
fn escape(segment: &str) -> String {
    segment
        .bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

fn copy_object(root: &Path, uri: &ObjectUri, into: &Path, max_bytes: u64) -> Result<u64, FetchError> {
    let io_error = |source| FetchError::Io { uri: uri.to_string(), source };
    let bucket = root.join(uri.bucket());
    if !bucket.is_dir() {
        return Err(FetchError::NoSuchBucket { bucket: uri.bucket().to_owned() });
    }
    let missing = || FetchError::NoSuchKey { bucket: uri.bucket().to_owned(), key: uri.key().to_owned() };
    let object = std::fs::File::open(bucket.join(uri.key())).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => missing(),
        io::ErrorKind::PermissionDenied => FetchError::AccessDenied { uri: uri.to_string() },
        _ => io_error(e),
    })?;
    let metadata = object.metadata().map_err(io_error)?;
    if !metadata.is_file() {
        return Err(missing());
    }
    if metadata.len() > max_bytes {
        let reason = format!("it has {} bytes, at most {max_bytes} are allowed", metadata.len());
        return Err(FetchError::InvalidObject { uri: uri.to_string(), reason });
    }
    // The open file stays what it was measured to be: objects are replaced by renaming, never written in place.
    let copied = std::fs::File::create_new(into).and_then(|mut copy| io::copy(&mut object.take(max_bytes), &mut copy));
    copied.map_err(|e| {
        if e.kind() != io::ErrorKind::AlreadyExists {
            let _ = std::fs::remove_file(into);
        }
        io_error(e)
    })
}

struct Secrets(Arc<dyn Principals>);

#[async_trait]
impl S3Auth for Secrets {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        self.0
            .secret(access_key)
            .map(SecretKey::from)
            .ok_or_else(|| s3_error!(InvalidAccessKeyId, "The AWS Access Key Id you provided does not exist in our records."))
    }
}

/// `<bucket>.localhost` is the virtual-hosted form that SDKs choose for an endpoint called `localhost`. Every other host means that the path
/// names the bucket.
struct LocalhostBuckets;

impl S3Host for LocalhostBuckets {
    fn parse_host_header<'a>(&'a self, host: &'a str) -> S3Result<VirtualHost<'a>> {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        Ok(match name.strip_suffix(".localhost") {
            Some(bucket) => VirtualHost::new("localhost").with_bucket(bucket),
            None => VirtualHost::new(name),
        })
    }
}

/// The embedded S3 as a service for one listener. Cheap to clone.
#[derive(Clone)]
pub struct S3Service {
    objects: LocalObjects,
    access: Access,
}

impl<B> tower::Service<Request<B>> for S3Service
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let objects = self.objects.clone();
        let account = match self.access {
            Access::Signed => objects.0.account_of(&request),
            Access::Trusted => objects.0.default_account.clone(),
        };
        let mut request = request.map(Body::http_body_unsync);
        request.extensions_mut().clear();
        if self.access == Access::Trusted {
            request.extensions_mut().insert(Trusted);
        }
        Box::pin(async move {
            let failed = |error: &dyn std::fmt::Debug| {
                tracing::error!(?error, "the object store failed");
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                response
            };
            Ok(match objects.store(&account).await {
                Ok(store) => store.protocol.call(request).await.unwrap_or_else(|error| failed(&error)),
                Err(error) => failed(&error),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use tower::ServiceExt;

    use super::*;

    const MINE: &str = "000000000000";
    const THEIRS: &str = "111111111111";

    /// Knows no key.
    struct Nobody;

    impl Principals for Nobody {
        fn secret(&self, _: &str) -> Option<String> {
            None
        }

        fn account(&self, _: &str, _: Option<&str>) -> Result<String, crate::Refused> {
            Err(crate::Refused::Unknown)
        }

        fn allow(&self, _: &str, _: Option<&str>, _: &str, _: &str) -> Result<(), crate::Refused> {
            Err(crate::Refused::Unknown)
        }
    }

    struct Store {
        directory: tempfile::TempDir,
        objects: LocalObjects,
    }

    impl Store {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let objects = LocalObjects::open(&directory.path().join("objects"), MINE, Arc::new(Nobody)).unwrap();
            Self { directory, objects }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        async fn with_object(key: &str, content: &[u8]) -> Self {
            let store = Self::new();
            std::fs::write(store.path("source"), content).unwrap();
            store.objects.put(MINE, "artifacts", key, &store.path("source")).await.unwrap();
            store
        }

        async fn send(&self, access: Access, method: &str, path: &str, body: &'static str) -> (StatusCode, String) {
            let body = http_body_util::Full::new(Bytes::from_static(body.as_bytes()));
            let request = Request::builder().method(method).uri(path).header("host", "127.0.0.1").body(body).unwrap();
            let response = self.objects.service(access).oneshot(request).await.unwrap();
            let status = response.status();
            let body = response.into_body().collect().await.unwrap().to_bytes();
            (status, String::from_utf8_lossy(&body).into_owned())
        }

        async fn fetch(&self, uri: &str, max_bytes: u64) -> Result<u64, FetchError> {
            self.objects.fetch(MINE, &ObjectUri::parse(uri).unwrap(), &self.path("fetched"), max_bytes).await
        }
    }

    #[tokio::test]
    async fn what_is_put_can_be_fetched_and_read_over_s3() {
        let store = Store::with_object("apps/demo +%\u{e9}.zip", b"content").await;
        assert_eq!(store.fetch("s3://artifacts/apps/demo +%\u{e9}.zip", 7).await.unwrap(), 7);
        assert_eq!(std::fs::read(store.path("fetched")).unwrap(), b"content");
        let (status, body) = store.send(Access::Trusted, "GET", "/artifacts/apps/demo%20%2B%25%C3%A9.zip", "").await;
        assert_eq!((status, body.as_str()), (StatusCode::OK, "content"));
        let (_, list) = store.send(Access::Trusted, "GET", "/artifacts?list-type=2&encoding-type=url", "").await;
        assert!(list.contains("<Key>apps/demo +%\u{e9}.zip</Key>") && !list.contains("EncodingType"), "{list}");
    }

    #[tokio::test]
    async fn a_failed_fetch_has_a_code_and_leaves_nothing() {
        let store = Store::with_object("apps/demo.zip", b"content").await;
        for (uri, max_bytes, code, message) in [
            ("s3://nothing/demo.zip", 7, "S3_NO_SUCH_BUCKET", "The bucket nothing does not exist."),
            ("s3://artifacts/other.zip", 7, "S3_NO_SUCH_KEY", "The object other.zip does not exist in the bucket artifacts."),
            ("s3://artifacts/apps", 7, "S3_NO_SUCH_KEY", "The object apps does not exist in the bucket artifacts."),
            ("s3://artifacts/apps/demo.zip/x", 7, "S3_NO_SUCH_KEY", "The object apps/demo.zip/x does not exist in the bucket artifacts."),
            (
                "s3://artifacts/apps/demo.zip",
                6,
                "S3_INVALID_OBJECT",
                "The object s3://artifacts/apps/demo.zip is not valid: it has 7 bytes, at most 6 are allowed.",
            ),
        ] {
            let error = store.fetch(uri, max_bytes).await.unwrap_err();
            assert_eq!((error.reason_code(), error.to_string().as_str()), (code, message));
            assert!(!store.path("fetched").exists());
        }
    }

    #[tokio::test]
    async fn an_account_has_buckets_of_its_own() {
        let store = Store::with_object("demo.zip", b"mine").await;
        let uri = ObjectUri::parse("s3://artifacts/demo.zip").unwrap();
        let fetch = async |account: &str, name: &str| store.objects.fetch(account, &uri, &store.path(name), 9).await;
        assert_eq!(fetch(THEIRS, "nothing").await.unwrap_err().reason_code(), "S3_NO_SUCH_BUCKET");
        std::fs::write(store.path("source"), b"theirs").unwrap();
        store.objects.put(THEIRS, "artifacts", "demo.zip", &store.path("source")).await.unwrap();
        assert_eq!((fetch(MINE, "mine").await.unwrap(), fetch(THEIRS, "theirs").await.unwrap()), (4, 6));
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(store.path("objects-111111111111")).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o700);
    }

    #[tokio::test]
    async fn a_fetch_does_not_overwrite() {
        let store = Store::with_object("demo.zip", b"content").await;
        std::fs::write(store.path("fetched"), "mine").unwrap();
        assert!(matches!(store.fetch("s3://artifacts/demo.zip", 7).await, Err(FetchError::Io { .. })));
        assert_eq!(std::fs::read(store.path("fetched")).unwrap(), b"mine");
    }

    #[tokio::test]
    async fn unsigned_requests_need_a_trusted_listener() {
        let store = Store::with_object("demo.zip", b"content").await;
        let (status, body) = store.send(Access::Signed, "GET", "/artifacts/demo.zip", "").await;
        assert_eq!(status, StatusCode::FORBIDDEN);
        assert!(body.contains("AccessDenied"), "{body}");
        assert_eq!(store.send(Access::Trusted, "GET", "/artifacts/demo.zip", "").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn no_name_leads_out_of_the_store() {
        let store = Store::with_object("demo.zip", b"content").await;
        std::fs::write(store.path("secret"), "secret").unwrap();
        for path in [
            "/artifacts/../../secret",
            "/artifacts/..%2F..%2Fsecret",
            "/artifacts/%2e%2e/%2e%2e/secret",
            "/artifacts/a/%2e%2e/%2e%2e/%2e%2e/secret",
            "/artifacts//etc/passwd",
            "/artifacts/%2Fetc%2Fpasswd",
            "/%2e%2e/secret",
            "/../secret",
            "/..%2fsecret/x",
            "/artifacts/.%00/x",
        ] {
            for (method, body) in [("GET", ""), ("PUT", "overwritten"), ("DELETE", "")] {
                let (status, answer) = store.send(Access::Trusted, method, path, body).await;
                assert!(status.is_client_error(), "{method} {path}: {status} {answer}");
            }
        }
        let delete = "<Delete><Object><Key>../../secret</Key></Object></Delete>";
        let (status, answer) = store.send(Access::Trusted, "POST", "/artifacts?delete", delete).await;
        assert!(status.is_client_error(), "{status} {answer}");
        assert_eq!(std::fs::read(store.path("secret")).unwrap(), b"secret");
        assert_eq!(store.fetch("s3://artifacts/demo.zip", 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn names_that_are_no_buckets_cannot_be_put() {
        let store = Store::with_object("demo.zip", b"content").await;
        for (bucket, key) in [("..", "x"), ("artifacts", "../x"), ("artifacts", "/x"), ("UPPER", "x")] {
            let error = store.objects.put(MINE, bucket, key, &store.path("source")).await.unwrap_err();
            assert!(matches!(error, PutError::InvalidName(_)), "{bucket} {key}");
        }
    }

    #[tokio::test]
    async fn buckets_behave_as_in_s3() {
        let store = Store::with_object("apps/demo.zip", b"content").await;
        for (method, path, status, code) in [
            ("PUT", "/artifacts", 409, "BucketAlreadyOwnedByYou"),
            ("DELETE", "/artifacts", 409, "BucketNotEmpty"),
            ("PUT", "/typo/demo.zip", 404, "NoSuchBucket"),
            ("GET", "/artifacts/apps", 404, "NoSuchKey"),
        ] {
            let (found, body) = store.send(Access::Trusted, method, path, "").await;
            assert_eq!(found.as_u16(), status, "{method} {path}: {body}");
            assert!(body.contains(code), "{method} {path}: {body}");
        }
        let long = format!("/artifacts/{}", "k".repeat(200));
        assert!(store.send(Access::Trusted, "PUT", &long, "x").await.1.contains("KeyTooLongError"));
        assert_eq!(store.send(Access::Trusted, "DELETE", "/artifacts/apps/demo.zip", "").await.0, StatusCode::NO_CONTENT);
        assert_eq!(store.send(Access::Trusted, "DELETE", "/artifacts", "").await.0, StatusCode::NO_CONTENT);
    }

    #[test]
    fn a_host_below_localhost_names_a_bucket() {
        let bucket = |host| LocalhostBuckets.parse_host_header(host).unwrap().bucket().map(str::to_owned);
        assert_eq!(bucket("artifacts.localhost:8470").as_deref(), Some("artifacts"));
        assert_eq!(bucket("localhost:8470"), None);
        assert_eq!(bucket("hearth.example.org"), None);
    }
}
