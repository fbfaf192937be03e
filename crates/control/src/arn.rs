//! ARNs of images, managed images and connectors (SPEC section 2).

use crate::{error::ControlError, types::Caller};

/// Names of the managed base images.
pub const MANAGED_IMAGES: &[&str] = &["al2023-1"];

/// An image's ARN, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageArn {
    pub region: String,
    pub account: String,
    pub name: String,
}

impl ImageArn {
    /// The ARN of an image of the caller's.
    pub fn of(caller: &Caller, name: &str) -> Self {
        Self { region: caller.region.clone(), account: caller.account.clone(), name: name.to_owned() }
    }

    /// Parses `arn:aws:lambda:<region>:<account>:microvm-image:<name>`. A bare name is refused, as the service does.
    pub fn parse(text: &str) -> Result<Self, ControlError> {
        let parts: Vec<&str> = text.split(':').collect();
        match parts.as_slice() {
            ["arn", partition, "lambda", region, account, "microvm-image", name]
                if partition.starts_with("aws") && !region.is_empty() && !account.is_empty() && !name.is_empty() =>
            {
                Ok(Self { region: (*region).to_owned(), account: (*account).to_owned(), name: (*name).to_owned() })
            }
            _ => Err(ControlError::Invalid(format!("Invalid ARN format: {text}"))),
        }
    }
}

impl std::fmt::Display for ImageArn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "arn:aws:lambda:{}:{}:microvm-image:{}", self.region, self.account, self.name)
    }
}

/// ARN of a managed connector such as `HTTP_INGRESS`.
pub fn managed_connector(region: &str, name: &str) -> String {
    format!("arn:aws:lambda:{region}:aws:network-connector:aws-network-connector:{name}")
}

/// ARN of a managed base image.
pub fn managed_image(region: &str, name: &str) -> String {
    format!("arn:aws:lambda:{region}:aws:microvm-image:{name}")
}

/// Whether a MicroVM with these ingress connectors answers requests (SPEC 10.5).
pub(crate) fn allows_http(ingress_connectors: &[String]) -> bool {
    ingress_connectors.iter().any(|arn| matches!(arn.rsplit(':').next(), Some("HTTP_INGRESS" | "ALL_INGRESS")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_arns_round_trip() {
        let text = "arn:aws:lambda:us-east-1:000000000000:microvm-image:demo";
        let arn = ImageArn::parse(text).unwrap();
        assert_eq!(arn.name, "demo");
        assert_eq!(arn.to_string(), text);
    }

    #[test]
    fn other_things_are_refused_with_the_service_s_words() {
        for text in ["demo", "arn:aws:lambda:us-east-1:000000000000:function:f", "arn:aws:lambda:us-east-1::microvm-image:demo"] {
            let error = ImageArn::parse(text).unwrap_err();
            assert_eq!(error.to_string(), format!("Invalid ARN format: {text}"));
        }
    }

    #[test]
    fn only_http_connectors_let_requests_in() {
        let arns = |names: &[&str]| names.iter().map(|name| managed_connector("us-east-1", name)).collect::<Vec<_>>();
        assert!(allows_http(&arns(&["HTTP_INGRESS"])) && allows_http(&arns(&["SHELL_INGRESS", "HTTP_INGRESS"])));
        assert!(allows_http(&arns(&["ALL_INGRESS"])));
        assert!(!allows_http(&arns(&["NO_INGRESS"])) && !allows_http(&arns(&["SHELL_INGRESS"])));
    }
}
