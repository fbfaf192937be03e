//! Whether a MicroVM's logs may go where the API shows them: they are shipped with the execution role, as its policy allows (SPEC 13.1). The
//! operator's copy is kept in any case.

use crate::{logs::Route, roles::Roles};

/// The actions with which a stream is made and written to.
const ACTIONS: [&str; 2] = ["logs:CreateLogStream", "logs:PutLogEvents"];

/// The route as far as the role allows it, and, if it does not although there is one, why.
pub fn checked(route: Route, role: Option<&str>, roles: &dyn Roles) -> (Route, Option<String>) {
    let Some(resource) = route.shipped().map(|(group, stream)| group.stream_arn(stream)) else { return (route, None) };
    let Some(role) = role else { return (route.kept_back(), None) };
    match ACTIONS.into_iter().find(|action| !roles.allows(role, action, &resource)) {
        Some(action) => {
            let why = format!("Logs are not shipped: the policy of {role} does not allow {action} on {resource}.");
            (route.kept_back(), Some(why))
        }
        None => (route, None),
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use serde_json::json;

    use super::*;
    use crate::{
        logs::LogGroup,
        roles::{Credentials, RoleError},
    };

    /// A role that may do this to that.
    struct May(&'static str, &'static str);

    #[async_trait]
    impl Roles for May {
        async fn assume(&self, _: &str, _: &str) -> Result<Credentials, RoleError> {
            Err(RoleError::Refused("not asked here".to_owned()))
        }

        fn allows(&self, _role: &str, action: &str, resource: &str) -> bool {
            action.starts_with(self.0) && resource == self.1
        }
    }

    fn route(logging: Option<serde_json::Value>) -> Route {
        Route::new(LogGroup::of_image("000000000000", "us-east-1", "demo"), "s".to_owned(), logging.as_ref())
    }

    #[test]
    fn only_what_the_role_may_write_is_shown() {
        let arn = "arn:aws:logs:us-east-1:000000000000:log-group:/aws/lambda-microvms/demo:log-stream:s";
        let kept_back = route(Some(json!({"disabled": {}})));
        assert_eq!(checked(route(None), Some("r"), &May("logs:", arn)), (route(None), None));
        assert_eq!(checked(route(None), None, &May("logs:", arn)), (kept_back.clone(), None));
        let (refused, why) = checked(route(None), Some("r"), &May("logs:Create", arn));
        assert_eq!(refused, kept_back);
        assert!(why.unwrap().contains(&format!("logs:PutLogEvents on {arn}")));
        let elsewhere = route(Some(json!({"cloudWatch": {"logGroup": "/mine"}})));
        assert_eq!(checked(elsewhere, Some("r"), &May("logs:", arn)).0, kept_back);
        assert_eq!(checked(kept_back.clone(), Some("r"), &May("none", arn)), (kept_back, None));
    }
}
