//! Who acts: an account's root user, a user, or a session of a role, and what each of them may do.

use std::{fmt, sync::Arc};

use crate::{
    condition::Context,
    policy::{Decision, Policy, Request},
};

/// Somebody who is known.
#[derive(Debug, Clone, PartialEq)]
pub struct Principal {
    /// Twelve digits.
    pub account: String,
    /// For example `arn:aws:iam::000000000000:user/ann`.
    pub arn: String,
    /// What `GetCallerIdentity` calls `UserId`.
    pub user_id: String,
    kind: Kind,
    /// All of these must allow what is asked. Nobody may do anything without one, except who may do everything.
    policies: Vec<Arc<Policy>>,
    administrator: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Root,
    User { name: String },
    Session { role_arn: String },
}

/// Leave was not given. The message is the service's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denied {
    principal: String,
    action: String,
    resource: String,
    why: Why,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    NoPolicy,
    Explicit,
    OtherAccount,
    Untold,
}

impl Principal {
    /// The root user of an account, who may do everything in it.
    pub fn root(account: &str) -> Self {
        Self {
            account: account.to_owned(),
            arn: format!("arn:aws:iam::{account}:root"),
            user_id: account.to_owned(),
            kind: Kind::Root,
            policies: Vec::new(),
            administrator: true,
        }
    }

    pub(crate) fn user(account: &str, name: &str, id: &str, policy: Option<Arc<Policy>>, administrator: bool) -> Self {
        Self {
            account: account.to_owned(),
            arn: format!("arn:aws:iam::{account}:user/{name}"),
            user_id: id.to_owned(),
            kind: Kind::User { name: name.to_owned() },
            policies: policy.into_iter().collect(),
            administrator,
        }
    }

    pub(crate) fn session(account: &str, role: &str, role_id: &str, session: &str, policies: Vec<Arc<Policy>>) -> Self {
        Self {
            account: account.to_owned(),
            arn: format!("arn:aws:sts::{account}:assumed-role/{role}/{session}"),
            user_id: format!("{role_id}:{session}"),
            kind: Kind::Session { role_arn: format!("arn:aws:iam::{account}:role/{role}") },
            policies,
            administrator: false,
        }
    }

    /// Whether everything is allowed, so that nothing need be looked up to decide.
    pub fn is_administrator(&self) -> bool {
        self.administrator
    }

    /// Whether this is a session of a role.
    pub fn is_session(&self) -> bool {
        matches!(self.kind, Kind::Session { .. })
    }

    /// Whether a trust policy that names `arn` means this principal.
    pub(crate) fn is(&self, arn: &str) -> bool {
        self.arn == arn || matches!(&self.kind, Kind::Session { role_arn } if role_arn == arn)
    }

    /// What is known of every request of this principal.
    pub fn context(&self) -> Context {
        let context = Context::default()
            .with("aws:PrincipalAccount", &self.account)
            .with("aws:PrincipalIsAWSService", "false")
            .with("aws:userid", &self.user_id);
        match &self.kind {
            Kind::Root => context.with("aws:PrincipalArn", &self.arn).with("aws:PrincipalType", "Account"),
            Kind::User { name } => context.with("aws:PrincipalArn", &self.arn).with("aws:PrincipalType", "User").with("aws:username", name),
            // As AWS has it: the role, not the session.
            Kind::Session { role_arn } => context.with("aws:PrincipalArn", role_arn).with("aws:PrincipalType", "AssumedRole"),
        }
    }

    /// What this principal's policies say.
    pub fn decide(&self, request: Request<'_>) -> Decision {
        if self.administrator {
            return Decision::Allowed;
        }
        let decisions: Vec<Decision> = self.policies.iter().map(|policy| policy.decide(request)).collect();
        match () {
            () if decisions.contains(&Decision::Denied) => Decision::Denied,
            () if decisions.is_empty() || decisions.contains(&Decision::NotAllowed) => Decision::NotAllowed,
            () => Decision::Allowed,
        }
    }

    /// Gives leave, or says why not.
    pub fn authorize(&self, request: Request<'_>) -> Result<(), Denied> {
        let why = match self.decide(request) {
            Decision::Allowed => return Ok(()),
            Decision::NotAllowed => Why::NoPolicy,
            Decision::Denied => Why::Explicit,
        };
        Err(self.denied(request.action, request.resource, why))
    }

    /// The refusal of what another account has: nothing here can allow it, whether it exists or not.
    pub fn denied_elsewhere(&self, action: &str, resource: &str) -> Denied {
        self.denied(action, resource, Why::OtherAccount)
    }

    /// The refusal that does not tell why.
    pub(crate) fn denied_silently(&self, action: &str, resource: &str) -> Denied {
        self.denied(action, resource, Why::Untold)
    }

    fn denied(&self, action: &str, resource: &str, why: Why) -> Denied {
        Denied { principal: self.arn.clone(), action: action.to_owned(), resource: resource.to_owned(), why }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { principal, action, resource, why } = self;
        write!(f, "User: {principal} is not authorized to perform: {action} on resource: {resource}")?;
        match why {
            Why::NoPolicy => write!(f, " because no identity-based policy allows the {action} action"),
            Why::Explicit => write!(f, " with an explicit deny in an identity-based policy"),
            Why::OtherAccount => write!(f, " because no resource-based policy allows the {action} action"),
            Why::Untold => Ok(()),
        }
    }
}

impl std::error::Error for Denied {}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(effect: &str, action: &str) -> Arc<Policy> {
        let text = format!(r#"{{"Version": "2012-10-17", "Statement": {{"Effect": "{effect}", "Action": "{action}", "Resource": "*"}}}}"#);
        Arc::new(Policy::parse(&text).unwrap())
    }

    fn ask(principal: &Principal, action: &str) -> Result<(), String> {
        let context = principal.context();
        principal.authorize(Request { action, resource: "*", context: &context }).map_err(|denied| denied.to_string())
    }

    #[test]
    fn a_root_user_may_do_everything_and_a_user_without_a_policy_nothing() {
        assert_eq!(ask(&Principal::root("000000000000"), "lambda:RunMicrovm"), Ok(()));
        assert_eq!(
            ask(&Principal::user("000000000000", "ann", "AIDA1", None, false), "lambda:RunMicrovm").unwrap_err(),
            "User: arn:aws:iam::000000000000:user/ann is not authorized to perform: lambda:RunMicrovm on resource: * \
             because no identity-based policy allows the lambda:RunMicrovm action"
        );
    }

    #[test]
    fn an_explicit_deny_is_told() {
        let user = Principal::user("000000000000", "ann", "AIDA1", Some(policy("Deny", "lambda:*")), false);
        assert!(ask(&user, "lambda:RunMicrovm").unwrap_err().ends_with("with an explicit deny in an identity-based policy"));
    }

    #[test]
    fn a_session_s_policy_narrows_the_role_s() {
        let of = |policies| Principal::session("000000000000", "worker", "AROA1", "one", policies);
        let (role, session) = (policy("Allow", "lambda:*"), policy("Allow", "*:Get*".replace("*:", "lambda:").as_str()));
        assert_eq!(ask(&of(vec![role.clone()]), "lambda:RunMicrovm"), Ok(()));
        assert!(ask(&of(vec![role.clone(), session.clone()]), "lambda:RunMicrovm").is_err());
        assert_eq!(ask(&of(vec![role.clone(), session]), "lambda:GetMicrovm"), Ok(()));
        assert!(ask(&of(vec![policy("Allow", "lambda:Get*"), policy("Allow", "*")]), "lambda:RunMicrovm").is_err());
        assert!(ask(&of(vec![role, policy("Deny", "lambda:RunMicrovm")]), "lambda:RunMicrovm").unwrap_err().contains("explicit deny"));
        assert!(ask(&of(Vec::new()), "lambda:GetMicrovm").is_err());
    }

    #[test]
    fn a_session_is_its_role_and_itself() {
        let session = Principal::session("000000000000", "worker", "AROA1", "one", Vec::new());
        assert!(session.is("arn:aws:iam::000000000000:role/worker") && session.is("arn:aws:sts::000000000000:assumed-role/worker/one"));
        assert!(!session.is("arn:aws:sts::000000000000:assumed-role/worker/two"));
        assert_eq!(session.context().single("aws:principalarn"), Some("arn:aws:iam::000000000000:role/worker"));
    }
}
