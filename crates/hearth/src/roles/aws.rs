//! Roles of an AWS account: `AssumeRole` of the Security Token Service, with the operator's keys (API version 2011-06-15). With what that gives,
//! build roles ask for logins of container registries ([`super::ecr`]).

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bytes::Bytes;
use hearth_api::Signing;
use hearth_control::roles::{Credentials, RegistryLogin, RoleError, Roles};
use http::{
    HeaderValue, Request, StatusCode, Uri,
    header::{CONTENT_TYPE, HOST},
    request::Builder,
};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    ecr::{self, Registry},
    keys, seconds,
};
use crate::config::AwsConfig;

const DEFAULT_REGION: &str = "us-east-1";
/// How long a call may take. A guest that waits for it is given up on a little later.
const DEADLINE: Duration = Duration::from_secs(15);
/// Longest answer, in bytes. AWS's have two thousand.
const LONGEST: usize = 64 << 10;

/// Roles that AWS keeps.
pub struct AwsRoles {
    config: AwsConfig,
    region: String,
    endpoint: Uri,
    lifetime: Duration,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// A call that brought no credentials.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error(transparent)]
    Keys(#[from] keys::KeysError),
    #[error("the request could not be made: {0}")]
    Request(#[from] http::Error),
    #[error("{0}")]
    Transport(String),
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Late,
    #[error("the answer is not understood: {0}")]
    Answer(String),
    #[error("{status} {code}: {message}")]
    Refused { status: StatusCode, code: String, message: String },
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AssumeRoleResponse {
    assume_role_result: AssumeRoleResult,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AssumeRoleResult {
    credentials: Temporary,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Temporary {
    access_key_id: String,
    secret_access_key: String,
    session_token: String,
    expiration: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ErrorResponse {
    error: ErrorDetail,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ErrorDetail {
    code: String,
    #[serde(default)]
    message: String,
}

impl AwsRoles {
    /// Roles of the account whose keys the configuration leads to. Nobody is asked yet.
    pub fn new(config: AwsConfig, lifetime: Duration) -> anyhow::Result<Self> {
        use anyhow::Context;
        let region = config.region.clone().unwrap_or_else(|| DEFAULT_REGION.to_owned());
        let endpoint = config.endpoint.clone().unwrap_or_else(|| format!("https://sts.{region}.amazonaws.com"));
        let endpoint: Uri = endpoint.parse().with_context(|| format!("roles.aws.endpoint = {endpoint} is not a URL"))?;
        let connector = HttpsConnectorBuilder::new().with_native_roots().context("reading the system's certificate authorities")?;
        let client = Client::builder(TokioExecutor::new()).build(connector.https_or_http().enable_http1().build());
        Ok(Self { config, region, endpoint, lifetime, client })
    }

    async fn call(&self, role_arn: &str, session_name: &str) -> Result<Credentials, CallError> {
        let keys = keys::find(&self.config)?;
        let seconds_wanted = self.lifetime.as_secs().to_string();
        let form = [
            ("Action", "AssumeRole"),
            ("Version", "2011-06-15"),
            ("RoleArn", role_arn),
            ("RoleSessionName", session_name),
            ("DurationSeconds", &seconds_wanted),
        ];
        let form: Vec<String> =
            form.iter().map(|(name, value)| format!("{name}={}", utf8_percent_encode(value, NON_ALPHANUMERIC))).collect();
        let body = form.join("&");
        let request = Request::post(self.endpoint.clone()).header(CONTENT_TYPE, "application/x-www-form-urlencoded; charset=utf-8");
        let signing = Signing {
            access_key_id: &keys.access_key_id,
            secret_access_key: &keys.secret_access_key,
            session_token: keys.session_token.as_deref(),
            region: &self.region,
            service: "sts",
        };
        let now = SystemTime::now();
        let (status, text) = self.exchange(request, body, signing, now).await?;
        if status.is_success() { credentials(&text, now) } else { Err(refusal(status, &text)) }
    }
}

impl AwsRoles {
    /// Signs a request and sends it; the status and the text of the answer.
    async fn exchange(
        &self,
        request: Builder,
        body: String,
        signing: Signing<'_>,
        now: SystemTime,
    ) -> Result<(StatusCode, String), CallError> {
        let (mut parts, ()) = request.body(())?.into_parts();
        let host = parts.uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
        let host = HeaderValue::from_str(host).map_err(http::Error::from)?;
        parts.headers.insert(HOST, host);
        hearth_api::sign(&mut parts, body.as_bytes(), signing, now).map_err(http::Error::from)?;
        let exchange = async {
            let request = Request::from_parts(parts, Full::new(Bytes::from(body)));
            let response = self.client.request(request).await.map_err(|error| CallError::Transport(chain(&error)))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), LONGEST).collect().await;
            let body = body.map_err(|error| CallError::Transport(chain(error.as_ref())))?;
            Ok::<_, CallError>((status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
        };
        tokio::time::timeout(DEADLINE, exchange).await.map_err(|_| CallError::Late)?
    }

    async fn ecr_login(&self, credentials: &Credentials, registry: &Registry) -> Result<RegistryLogin, CallError> {
        let request = Request::post(registry.endpoint(self.config.ecr_endpoint.as_deref()))
            .header(CONTENT_TYPE, "application/x-amz-json-1.1")
            .header("x-amz-target", ecr::TARGET);
        let signing = Signing {
            access_key_id: &credentials.access_key_id,
            secret_access_key: &credentials.secret_access_key,
            session_token: Some(&credentials.session_token),
            region: &registry.region,
            service: "ecr",
        };
        let (status, text) = self.exchange(request, "{}".to_owned(), signing, SystemTime::now()).await?;
        if status.is_success() {
            ecr::login(&text).map_err(CallError::Answer)
        } else {
            let (code, message) = ecr::refusal(&text);
            Err(CallError::Refused { status, code, message })
        }
    }
}

fn credentials(text: &str, now: SystemTime) -> Result<Credentials, CallError> {
    let unreadable = |error: &dyn fmt::Display| CallError::Answer(error.to_string());
    let response: AssumeRoleResponse = quick_xml::de::from_str(text).map_err(|error| unreadable(&error))?;
    let found = response.assume_role_result.credentials;
    let expiration = OffsetDateTime::parse(&found.expiration, &Rfc3339).map_err(|error| unreadable(&error))?;
    Ok(Credentials {
        access_key_id: found.access_key_id,
        secret_access_key: found.secret_access_key,
        session_token: found.session_token,
        issued_at: seconds(now),
        expires_at: seconds(expiration.into()),
    })
}

fn refusal(status: StatusCode, text: &str) -> CallError {
    match quick_xml::de::from_str::<ErrorResponse>(text) {
        Ok(ErrorResponse { error: ErrorDetail { code, message } }) => CallError::Refused { status, code, message },
        Err(error) => CallError::Answer(format!("status {status}, {error}")),
    }
}

/// An error with its causes: the outermost says little.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[async_trait]
impl Roles for AwsRoles {
    async fn assume(&self, role_arn: &str, session_name: &str) -> Result<Credentials, RoleError> {
        let told = |error: &CallError| format!("AssumeRole of {role_arn} at {}: {error}", self.endpoint);
        self.call(role_arn, session_name).await.map_err(|error| match &error {
            CallError::Refused { code, .. } if matches!(code.as_str(), "AccessDenied" | "ValidationError") => {
                RoleError::Refused(told(&error))
            }
            _ => RoleError::Failed(told(&error)),
        })
    }

    async fn registry_login(&self, role_arn: &str, session_name: &str, registry: &str) -> Result<Option<RegistryLogin>, RoleError> {
        let Some(found) = Registry::of(registry, &self.config.ecr_registries, &self.region) else { return Ok(None) };
        let credentials = self.assume(role_arn, session_name).await?;
        let login = self.ecr_login(&credentials, &found).await;
        login.map(Some).map_err(|error| RoleError::Failed(format!("GetAuthorizationToken of {role_arn} for {registry}: {error}")))
    }

    /// What the roles may do is AWS's to know; what is asked here is about this server's logs.
    fn allows(&self, _role_arn: &str, _action: &str, _resource: &str) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = r#"<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
  <AssumeRoleResult>
    <AssumedRoleUser><AssumedRoleId>AROA1:m</AssumedRoleId><Arn>arn:aws:sts::123456789012:assumed-role/demo/m</Arn></AssumedRoleUser>
    <Credentials>
      <AccessKeyId>ASIAEXAMPLE</AccessKeyId><SecretAccessKey>a/b+c&amp;d</SecretAccessKey>
      <SessionToken>AQoDYXdz==</SessionToken><Expiration>2026-11-09T13:34:41Z</Expiration>
    </Credentials>
    <PackedPolicySize>6</PackedPolicySize>
  </AssumeRoleResult>
  <ResponseMetadata><RequestId>c6104cbe</RequestId></ResponseMetadata>
</AssumeRoleResponse>"#;

    #[test]
    fn an_answer_s_credentials_are_found() {
        let found = credentials(ANSWER, SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!((found.access_key_id.as_str(), found.secret_access_key.as_str()), ("ASIAEXAMPLE", "a/b+c&d"));
        assert_eq!((found.session_token.as_str(), found.issued_at, found.expires_at), ("AQoDYXdz==", 0, 1_794_231_281));
        for bad in ["", "<AssumeRoleResponse/>", "{}", &ANSWER.replace("2026-11-09T13:34:41Z", "soon")] {
            assert!(matches!(credentials(bad, SystemTime::now()), Err(CallError::Answer(_))), "{bad}");
        }
    }

    #[test]
    fn a_refusal_says_what_aws_said() {
        let text = r#"<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>AccessDenied</Code>
            <Message>User: x is not authorized</Message></Error><RequestId>1</RequestId></ErrorResponse>"#;
        assert_eq!(refusal(StatusCode::FORBIDDEN, text).to_string(), "403 Forbidden AccessDenied: User: x is not authorized");
        assert!(refusal(StatusCode::BAD_GATEWAY, "<html>").to_string().contains("502"));
    }

    #[tokio::test]
    async fn an_endpoint_that_is_not_there_is_a_failure_that_names_it() {
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", closed.local_addr().unwrap());
        drop(closed);
        let config = AwsConfig {
            endpoint: Some(endpoint.clone()),
            access_key_id: Some("A".to_owned()),
            secret_access_key: Some("s".to_owned()),
            ..AwsConfig::default()
        };
        let error = AwsRoles::new(config, Duration::from_secs(900)).unwrap().assume("arn:role", "m").await.unwrap_err();
        assert!(matches!(&error, RoleError::Failed(text) if text.contains(&endpoint)), "{error}");
    }
}
