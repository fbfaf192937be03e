//! ARNs of images, managed images and connectors (SPEC section 2), and what the managed connectors mean (SPEC 10.5).

use uuid::Uuid;

use crate::{error::ControlError, types::Caller};

/// Names of the managed connectors that let clients in.
pub const MANAGED_INGRESS: [&str; 4] = ["HTTP_INGRESS", "SHELL_INGRESS", ALL_INGRESS, "NO_INGRESS"];
/// Names of the managed connectors that let MicroVMs out. `NO_EGRESS` is an extension: the service has none.
pub const MANAGED_EGRESS: [&str; 2] = ["INTERNET_EGRESS", NO_EGRESS];

const ALL_INGRESS: &str = "ALL_INGRESS";
pub(crate) const NO_EGRESS: &str = "NO_EGRESS";

/// Names of the managed base images.
pub const MANAGED_IMAGES: &[&str] = &["al2023-1"];

/// A new endpoint's host name.
pub(crate) fn endpoint_name(region: &str, domain: &str) -> String {
    format!("{}.lambda-microvm.{region}.{domain}", Uuid::new_v4())
}

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

/// A network connector's ARN, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectorArn {
    /// One of the server's own, by name.
    Managed { region: String, name: String },
    /// One of a user's.
    User {
        region: String,
        account: String,
        /// Its id; a name does as well, which is an extension.
        connector: String,
        /// A version of it, from 1.
        version: Option<i64>,
    },
}

impl ConnectorArn {
    /// Parses `arn:aws:lambda:<region>:<account>:network-connector:<id>[:<version>]` and the managed form.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        let ["arn", partition, "lambda", region, account, "network-connector", rest @ ..] = parts.as_slice() else { return None };
        if !partition.starts_with("aws") || region.is_empty() {
            return None;
        }
        let region = (*region).to_owned();
        match (*account, rest) {
            ("aws", ["aws-network-connector", name]) => Some(Self::Managed { region, name: (*name).to_owned() }),
            (account, [connector, version @ ..]) if account.len() == 12 && !connector.is_empty() => {
                let version = match version {
                    [] => None,
                    [number] if !number.starts_with('0') && number.bytes().all(|byte| byte.is_ascii_digit()) => Some(number.parse().ok()?),
                    _ => return None,
                };
                Some(Self::User { region, account: account.to_owned(), connector: (*connector).to_owned(), version })
            }
            _ => None,
        }
    }
}

/// ARN of a user's connector.
pub(crate) fn connector(account: &str, region: &str, id: &str) -> String {
    format!("arn:aws:lambda:{region}:{account}:network-connector:{id}")
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
    names(ingress_connectors).any(|name| matches!(name, "HTTP_INGRESS" | ALL_INGRESS))
}

/// Fails unless a shell token may be issued for a MicroVM with these ingress connectors. Only here are wrong combinations of them noticed.
pub(crate) fn check_shell(ingress_connectors: &[String]) -> Result<(), ControlError> {
    if ingress_connectors.len() > 1 && names(ingress_connectors).any(|name| name == ALL_INGRESS) {
        return Err(ControlError::Invalid(
            "ALL_INGRESS cannot be combined with other ingress network connectors; use HTTP_INGRESS and/or SHELL_INGRESS instead"
                .to_owned(),
        ));
    }
    if !names(ingress_connectors).any(|name| matches!(name, "SHELL_INGRESS" | ALL_INGRESS)) {
        return Err(ControlError::Invalid(
            "Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM.".to_owned(),
        ));
    }
    Ok(())
}

fn names(arns: &[String]) -> impl Iterator<Item = &str> {
    arns.iter().filter_map(|arn| arn.rsplit(':').next())
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
    #[test]
    fn a_shell_needs_its_connector_and_all_ingress_stands_alone() {
        let check = |names: &[&str]| {
            let arns: Vec<_> = names.iter().map(|name| managed_connector("us-east-1", name)).collect();
            check_shell(&arns).map_err(|error| error.to_string())
        };
        assert_eq!(check(&["HTTP_INGRESS", "SHELL_INGRESS"]), Ok(()));
        assert_eq!(check(&["ALL_INGRESS"]), Ok(()));
        let missing = "Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM.";
        assert_eq!(check(&["HTTP_INGRESS"]), Err(missing.to_owned()));
        let mixed = "ALL_INGRESS cannot be combined with other ingress network connectors; use HTTP_INGRESS and/or SHELL_INGRESS instead";
        assert_eq!(check(&["ALL_INGRESS", "HTTP_INGRESS"]), Err(mixed.to_owned()));
    }

    #[test]
    fn connector_arns_are_told_apart() {
        let managed = ConnectorArn::Managed { region: "us-east-1".to_owned(), name: "NO_EGRESS".to_owned() };
        assert_eq!(ConnectorArn::parse(&managed_connector("us-east-1", "NO_EGRESS")), Some(managed));
        let own = |version| ConnectorArn::User {
            region: "us-east-1".to_owned(),
            account: "000000000000".to_owned(),
            connector: "nc-1".to_owned(),
            version,
        };
        let text = connector("000000000000", "us-east-1", "nc-1");
        assert_eq!(ConnectorArn::parse(&text), Some(own(None)));
        assert_eq!(ConnectorArn::parse(&format!("{text}:12")), Some(own(Some(12))));
        for wrong in
            ["nc-1", "arn:aws:lambda:us-east-1:0:network-connector:nc-1", &format!("{text}:0"), &format!("{text}:1:2"), &format!("{text}:")]
        {
            assert_eq!(ConnectorArn::parse(wrong), None, "{wrong}");
        }
    }
}
