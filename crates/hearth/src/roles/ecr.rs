//! Logins of the Elastic Container Registry: `GetAuthorizationToken` (API version 2015-09-21).

use base64::{Engine, engine::general_purpose::STANDARD};
use hearth_control::roles::RegistryLogin;
use serde::Deserialize;

/// What the operation is called in its requests.
pub const TARGET: &str = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken";

/// A registry that takes these logins.
#[derive(Debug, PartialEq, Eq)]
pub struct Registry {
    /// Region of its API.
    pub region: String,
    suffix: &'static str,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    authorization_data: Vec<Token>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Token {
    authorization_token: String,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(rename = "__type", default)]
    code: String,
    #[serde(alias = "Message", default)]
    message: String,
}

impl Registry {
    /// The registry of a name, `<account>.dkr.ecr.<region>.amazonaws.com` or one of `others`, whose region is the given one.
    pub fn of(name: &str, others: &[String], region: &str) -> Option<Self> {
        if others.iter().any(|other| other == name) {
            return Some(Self { region: region.to_owned(), suffix: "amazonaws.com" });
        }
        let (account, rest) = name.split_once(".dkr.ecr")?;
        let is_account = account.len() == 12 && account.bytes().all(|byte| byte.is_ascii_digit());
        let rest = rest.strip_prefix("-fips").unwrap_or(rest).strip_prefix('.')?;
        let (region, suffix) = rest.split_once('.')?;
        let suffix = ["amazonaws.com", "amazonaws.com.cn"].into_iter().find(|known| *known == suffix)?;
        let is_region = !region.is_empty() && region.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        (is_account && is_region).then(|| Self { region: region.to_owned(), suffix })
    }

    /// URL of its API, unless all of them have the same one.
    pub fn endpoint(&self, fixed: Option<&str>) -> String {
        let Self { region, suffix } = self;
        fixed.map_or_else(|| format!("https://api.ecr.{region}.{suffix}/"), str::to_owned)
    }
}

/// The login in an answer: a token is `user:password` in base64.
pub fn login(text: &str) -> Result<RegistryLogin, String> {
    let answer: Answer = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let token = answer.authorization_data.into_iter().next().ok_or("there is no token in it")?.authorization_token;
    let token = STANDARD.decode(token).map_err(|error| error.to_string())?;
    let token = String::from_utf8(token).map_err(|error| error.to_string())?;
    let (user, password) = token.split_once(':').ok_or("its token is no user and password")?;
    Ok(RegistryLogin { user: user.to_owned(), password: password.to_owned() })
}

/// Code and message of a refusal.
pub fn refusal(text: &str) -> (String, String) {
    match serde_json::from_str::<Refusal>(text) {
        Ok(refusal) => (refusal.code, refusal.message),
        Err(_) => ("unknown".to_owned(), "the answer gives no reason".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_of_name_has_its_region() {
        let of = |name| Registry::of(name, &["127.0.0.1:5000".to_owned()], "us-east-1").map(|registry| registry.endpoint(None));
        assert_eq!(of("123456789012.dkr.ecr.eu-west-1.amazonaws.com").unwrap(), "https://api.ecr.eu-west-1.amazonaws.com/");
        assert_eq!(of("123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com").unwrap(), "https://api.ecr.us-gov-west-1.amazonaws.com/");
        assert_eq!(of("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn").unwrap(), "https://api.ecr.cn-north-1.amazonaws.com.cn/");
        assert_eq!(of("127.0.0.1:5000").unwrap(), "https://api.ecr.us-east-1.amazonaws.com/");
        for name in [
            "public.ecr.aws",
            "1.dkr.ecr.us-east-1.amazonaws.com",
            "123456789012.dkr.ecr.us-east-1.evil.example",
            "123456789012.dkr.ecr.a/b.amazonaws.com",
        ] {
            assert_eq!(of(name), None, "{name}");
        }
    }

    #[test]
    fn login_is_read_from_an_answer() {
        let text = format!(r#"{{"authorizationData":[{{"authorizationToken":"{}","expiresAt":1.0}}]}}"#, STANDARD.encode("AWS:a:b"));
        assert_eq!(login(&text).unwrap(), RegistryLogin { user: "AWS".to_owned(), password: "a:b".to_owned() });
        for bad in ["", "{}", r#"{"authorizationData":[]}"#, r#"{"authorizationData":[{"authorizationToken":"!"}]}"#] {
            assert!(login(bad).is_err(), "{bad}");
        }
        let refused = r#"{"__type":"AccessDeniedException","Message":"no"}"#;
        assert_eq!(refusal(refused), ("AccessDeniedException".to_owned(), "no".to_owned()));
    }
}
