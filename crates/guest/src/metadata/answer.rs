//! What is asked, and what it is answered: paths and status codes of EC2's instance metadata service (EC2 user guide, "Use the Instance
//! Metadata Service", and what botocore, the JavaScript and the Go SDK send).

use std::time::{Duration, SystemTime};

use hearth_guest_protocol::{Credentials, MetadataReply, MetadataRequest};
use hyper::{Method, StatusCode};
use serde_json::json;
use time::{OffsetDateTime, macros::format_description};

use super::{
    host::{Host, Unanswered},
    tokens::Tokens,
};

/// What the execution role is called in here, whatever its name (SPEC 12).
const ROLE: &str = "execution_role";
/// Longest time that a token may be good for, in seconds: six hours.
const LONGEST: u64 = 21_600;

/// What of a request matters.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'r> {
    pub method: &'r Method,
    pub path: &'r str,
    pub token: Option<&'r str>,
    /// How long a new token shall be good for.
    pub lifetime: Option<&'r str>,
    /// It came through a proxy: not from here.
    pub forwarded: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: StatusCode,
    pub body: String,
    /// Of a new token, in seconds.
    pub lifetime: Option<u64>,
}

impl Answer {
    fn ok(body: impl Into<String>) -> Self {
        Self { status: StatusCode::OK, body: body.into(), lifetime: None }
    }

    fn refused(status: StatusCode) -> Self {
        let body = format!("{} - {}\n", status.as_u16(), status.canonical_reason().unwrap_or_default());
        Self { status, body, lifetime: None }
    }

    fn unavailable(reason: &dyn std::fmt::Display) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, body: format!("{reason}\n"), lifetime: None }
    }
}

impl From<Unanswered> for Answer {
    fn from(error: Unanswered) -> Self {
        Self::unavailable(&error)
    }
}

/// Answers.
pub async fn answer(asked: Asked<'_>, host: &Host, tokens: &Tokens, now: SystemTime) -> Answer {
    if asked.path == "/latest/api/token" {
        return token(asked, tokens, now);
    }
    if !asked.token.is_some_and(|token| tokens.accept(token, now)) {
        return Answer::refused(StatusCode::UNAUTHORIZED);
    }
    let path: Vec<&str> = asked.path.split('/').filter(|part| !part.is_empty()).collect();
    let answered = match (asked.method, path.as_slice()) {
        (&(Method::PUT | Method::POST), ["latest", "hearth", "suspend"]) => suspend(host).await,
        (&(Method::GET | Method::HEAD), path) => look_up(path, host, now).await,
        _ => Ok(Answer::refused(StatusCode::METHOD_NOT_ALLOWED)),
    };
    answered.unwrap_or_else(Answer::from)
}

fn token(asked: Asked<'_>, tokens: &Tokens, now: SystemTime) -> Answer {
    if asked.method != Method::PUT {
        return Answer::refused(StatusCode::METHOD_NOT_ALLOWED);
    }
    if asked.forwarded {
        return Answer::refused(StatusCode::FORBIDDEN);
    }
    let Some(seconds) = asked.lifetime.and_then(|text| text.parse().ok()).filter(|seconds| (1..=LONGEST).contains(seconds)) else {
        return Answer::refused(StatusCode::BAD_REQUEST);
    };
    match tokens.issue(Duration::from_secs(seconds), now) {
        Ok(token) => Answer { lifetime: Some(seconds), ..Answer::ok(token) },
        Err(error) => Answer::unavailable(&error),
    }
}

async fn look_up(path: &[&str], host: &Host, now: SystemTime) -> Result<Answer, Unanswered> {
    let unknown = || Ok(Answer::refused(StatusCode::NOT_FOUND));
    let has_role = async || Ok(host.ask(MetadataRequest::Credentials).await? != MetadataReply::Absent);
    let region = async |suffix: &str| match host.ask(MetadataRequest::Region).await? {
        MetadataReply::Region(region) => Ok(Answer::ok(region + suffix)),
        other => Ok(unexpected(other)),
    };
    match path {
        [] => Ok(Answer::ok("latest")),
        ["latest"] => Ok(Answer::ok("meta-data")),
        ["latest", "meta-data"] => Ok(Answer::ok(if has_role().await? { "iam/\nplacement/" } else { "placement/" })),
        ["latest", "meta-data", "placement"] => Ok(Answer::ok("availability-zone\nregion")),
        ["latest", "meta-data", "placement", "region"] => region("").await,
        // A host is one zone.
        ["latest", "meta-data", "placement", "availability-zone"] => region("a").await,
        ["latest", "meta-data", "iam"] if has_role().await? => Ok(Answer::ok("security-credentials/")),
        ["latest", "meta-data", "iam", "security-credentials"] if has_role().await? => Ok(Answer::ok(ROLE)),
        ["latest", "meta-data", "iam", "security-credentials", name] if *name == ROLE => {
            let failed = |code, message: String| json!({"Code": code, "Message": message, "LastUpdated": iso_8601(now)});
            match host.ask(MetadataRequest::Credentials).await? {
                MetadataReply::Credentials(credentials) => Ok(Answer::ok(document(&credentials))),
                MetadataReply::Refused { reason } => Ok(Answer::ok(format!("{:#}", failed("AssumeRoleUnauthorizedAccess", reason)))),
                other => Ok(unexpected(other)),
            }
        }
        _ => unknown(),
    }
}

/// The machine may be suspended before the answer is out: then it is the first that the app hears when it goes on.
async fn suspend(host: &Host) -> Result<Answer, Unanswered> {
    match host.ask_once(MetadataRequest::Suspend).await {
        Ok(MetadataReply::Done) | Err(Unanswered::Ended) => Ok(Answer { status: StatusCode::ACCEPTED, ..Answer::ok("") }),
        Ok(other) => Ok(unexpected(other)),
        Err(error) => Err(error),
    }
}

/// What is left when the wanted reply did not come.
fn unexpected(reply: MetadataReply) -> Answer {
    match reply {
        MetadataReply::Absent => Answer::refused(StatusCode::NOT_FOUND),
        MetadataReply::Failed { reason } | MetadataReply::Refused { reason } => Answer::unavailable(&reason),
        MetadataReply::Credentials(_) | MetadataReply::Region(_) | MetadataReply::Done => {
            Answer::refused(StatusCode::INTERNAL_SERVER_ERROR)
        }
    }
}

fn document(credentials: &Credentials) -> String {
    let at = |seconds| iso_8601(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    let document = json!({
        "Code": "Success",
        "LastUpdated": at(credentials.issued_at),
        "Type": "AWS-HMAC",
        "AccessKeyId": credentials.access_key_id,
        "SecretAccessKey": credentials.secret_access_key,
        "Token": credentials.session_token,
        "Expiration": at(credentials.expires_at),
    });
    format!("{document:#}")
}

fn iso_8601(at: SystemTime) -> String {
    let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    OffsetDateTime::from(at).format(format).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use hearth_guest_protocol::Mux;
    use tokio::sync::watch;

    use super::{super::host::testing, *};

    const LIST: &str = "/latest/meta-data/iam/security-credentials/";
    const DOCUMENT: &str = "/latest/meta-data/iam/security-credentials/execution_role";
    const SUSPEND: &str = "/latest/hearth/suspend";

    struct Service {
        host: Host,
        tokens: Tokens,
        token: String,
        _alive: (watch::Sender<Option<Mux>>, testing::Session),
    }

    impl Service {
        fn new(answer: impl Fn(MetadataRequest) -> Option<MetadataReply> + Send + Sync + 'static) -> Self {
            let (session, alive) = testing::session(answer);
            let (enter, sessions) = watch::channel(Some(session));
            let tokens = Tokens::default();
            let token = tokens.issue(Duration::from_secs(60), SystemTime::now()).unwrap();
            Self { host: Host::new(sessions), tokens, token, _alive: (enter, alive) }
        }

        async fn ask(&self, method: Method, path: &str, change: impl FnOnce(&mut Asked)) -> Answer {
            let mut asked = Asked { method: &method, path, token: Some(&self.token), lifetime: None, forwarded: false };
            change(&mut asked);
            answer(asked, &self.host, &self.tokens, SystemTime::now()).await
        }

        async fn get(&self, path: &str) -> (u16, String) {
            let answer = self.ask(Method::GET, path, |_| ()).await;
            (answer.status.as_u16(), answer.body)
        }
    }

    /// A MicroVM with a role.
    fn with_role() -> Service {
        Service::new(|request| {
            Some(match request {
                MetadataRequest::Credentials => MetadataReply::Credentials(Credentials {
                    access_key_id: "ASIA1".to_owned(),
                    secret_access_key: "secret".to_owned(),
                    session_token: "token".to_owned(),
                    issued_at: 1_793_500_000,
                    expires_at: 1_793_503_300,
                }),
                MetadataRequest::Region => MetadataReply::Region("eu-west-1".to_owned()),
                MetadataRequest::Suspend => MetadataReply::Absent,
            })
        })
    }

    fn without_role() -> Service {
        Service::new(|request| match request {
            MetadataRequest::Region => Some(MetadataReply::Region("eu-west-1".to_owned())),
            _ => Some(MetadataReply::Absent),
        })
    }

    #[tokio::test]
    async fn tokens_are_put_with_a_lifetime_and_from_here() {
        let service = with_role();
        let put = async |lifetime: Option<&'static str>, forwarded| {
            let asked = service.ask(Method::PUT, "/latest/api/token", |asked| {
                (asked.token, asked.lifetime, asked.forwarded) = (None, lifetime, forwarded);
            });
            asked.await
        };
        for bad in [None, Some("0"), Some("21601"), Some("x"), Some("-1")] {
            assert_eq!(put(bad, false).await.status, 400, "{bad:?}");
        }
        assert_eq!(put(Some("60"), true).await.status, 403);
        assert_eq!(service.ask(Method::GET, "/latest/api/token", |_| ()).await.status, 405);
        let issued = put(Some("21600"), false).await;
        assert_eq!((issued.status, issued.lifetime), (StatusCode::OK, Some(21_600)));
        let service = Service { token: issued.body, ..service };
        assert_eq!(service.get(DOCUMENT).await.0, 200);
    }

    #[tokio::test]
    async fn nothing_is_told_without_a_token() {
        let service = with_role();
        for path in ["/", LIST, DOCUMENT, "/latest/meta-data/nothing"] {
            for token in [None, Some(""), Some("guessed")] {
                assert_eq!(service.ask(Method::GET, path, |asked| asked.token = token).await.status, 401, "{path} {token:?}");
            }
        }
        assert_eq!(service.ask(Method::PUT, SUSPEND, |asked| asked.token = None).await.status, 401);
        let later = SystemTime::now() + Duration::from_secs(61);
        let asked = Asked { method: &Method::GET, path: LIST, token: Some(&service.token), lifetime: None, forwarded: false };
        assert_eq!(answer(asked, &service.host, &service.tokens, later).await.status, 401, "expired");
    }

    #[tokio::test]
    async fn what_sdks_ask_for_is_there() {
        let service = with_role();
        for (path, body) in [
            ("/latest/meta-data/", "iam/\nplacement/"),
            ("/latest/meta-data", "iam/\nplacement/"),
            ("/latest/meta-data/iam/", "security-credentials/"),
            (LIST, "execution_role"),
            ("/latest/meta-data/placement/region", "eu-west-1"),
            ("/latest/meta-data/placement/availability-zone/", "eu-west-1a"),
        ] {
            assert_eq!(service.get(path).await, (200, body.to_owned()), "{path}");
        }
        let (status, body) = service.get(DOCUMENT).await;
        let document: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(status, 200);
        assert_eq!(
            document,
            json!({
                "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "ASIA1", "SecretAccessKey": "secret", "Token": "token",
                "LastUpdated": "2026-11-01T02:26:40Z", "Expiration": "2026-11-01T03:21:40Z",
            })
        );
        for path in ["/latest/user-data", "/latest/dynamic/instance-identity/document", "/latest/meta-data/iam/security-credentials/other"]
        {
            assert_eq!(service.get(path).await.0, 404, "{path}");
        }
        assert_eq!(service.ask(Method::DELETE, LIST, |_| ()).await.status, 405);
    }

    #[tokio::test]
    async fn without_a_role_there_are_no_credentials() {
        let service = without_role();
        assert_eq!(service.get("/latest/meta-data/").await, (200, "placement/".to_owned()));
        for path in ["/latest/meta-data/iam/", LIST, DOCUMENT] {
            assert_eq!(service.get(path).await.0, 404, "{path}");
        }
    }

    #[tokio::test]
    async fn a_role_that_cannot_be_assumed_is_answered_as_ec2_does() {
        let refused = Service::new(|_| Some(MetadataReply::Refused { reason: "It cannot be assumed.".to_owned() }));
        let (status, body) = refused.get(DOCUMENT).await;
        let document: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &document["Code"], &document["AccessKeyId"]), (200, &json!("AssumeRoleUnauthorizedAccess"), &json!(null)));
        assert_eq!(refused.get(LIST).await, (200, "execution_role".to_owned()));
        let failed = Service::new(|_| Some(MetadataReply::Failed { reason: "Later.".to_owned() }));
        assert_eq!(failed.get(DOCUMENT).await, (503, "Later.\n".to_owned()));
    }

    #[tokio::test]
    async fn a_suspend_is_accepted_also_when_it_comes_before_its_answer() {
        let answers = [(Some(MetadataReply::Done), 202), (None, 202), (Some(MetadataReply::Absent), 404)];
        for (reply, status) in answers {
            let asked = reply.clone();
            let service = Service::new(move |request| if request == MetadataRequest::Suspend { asked.clone() } else { None });
            assert_eq!(service.ask(Method::PUT, SUSPEND, |_| ()).await.status, status, "{reply:?}");
        }
        assert_eq!(with_role().get(SUSPEND).await.0, 404);
    }
}
