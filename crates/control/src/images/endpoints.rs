//! Tells SDKs in a guest where this server is: the variables that every AWS SDK reads an endpoint from (AWS SDKs and Tools reference guide,
//! "Service-specific endpoints").

use hearth_guest_protocol::{API_PORT, METADATA_ADDRESS};

/// The services that this server has, by their ids.
const SERVICES: [&str; 5] = ["LAMBDA_MICROVMS", "LAMBDA_CORE", "STS", "CLOUDWATCH_LOGS", "S3"];
/// An application with keys of its own means another cloud than this.
const OWN_KEYS: &str = "AWS_ACCESS_KEY_ID";

/// The variables for an image with these of its own; none that it has set, and none at all if it brings keys.
pub fn variables(own: &[(String, String)]) -> Vec<(String, String)> {
    let has = |name: &str| own.iter().any(|(key, _)| key == name);
    if has(OWN_KEYS) || has("AWS_ENDPOINT_URL") {
        return Vec::new();
    }
    let url = format!("http://{METADATA_ADDRESS}:{API_PORT}");
    let names = SERVICES.iter().map(|service| format!("AWS_ENDPOINT_URL_{service}"));
    names.filter(|name| !has(name)).map(|name| (name, url.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_s_own_choice_stands() {
        let pair = |key: &str| (key.to_owned(), "x".to_owned());
        let names = |own: &[(String, String)]| variables(own).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(
            variables(&[pair("PATH")])[0],
            ("AWS_ENDPOINT_URL_LAMBDA_MICROVMS".to_owned(), "http://169.254.169.254:8470".to_owned())
        );
        assert_eq!(variables(&[]).len(), 5);
        assert!(!names(&[pair("AWS_ENDPOINT_URL_S3")]).contains(&"AWS_ENDPOINT_URL_S3".to_owned()));
        assert_eq!(names(&[pair("AWS_ENDPOINT_URL_S3")]).len(), 4);
        assert!(names(&[pair("AWS_ENDPOINT_URL")]).is_empty() && names(&[pair(OWN_KEYS)]).is_empty());
    }
}
