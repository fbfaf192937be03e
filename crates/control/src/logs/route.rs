//! Where the lines of a build, of a snapshot's console, or of a MicroVM go (SPEC 13.1).

use serde_json::Value;

use super::LogGroup;

/// Where lines go: always to one stream that the operator finds by image and id, and also to another if the caller asked for one.
///
/// | `logging` | the API shows | `hearth logs` reads |
/// |---|---|---|
/// | absent | the default group and stream | the same |
/// | `cloudWatch` with a group or a stream | exactly those | the operator's copy |
/// | `disabled` | nothing | the operator's copy |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub(super) own: (LogGroup, String),
    pub(super) shipped: Option<(LogGroup, String)>,
}

impl Route {
    /// The route that a `logging` member asks for. Names in it are used verbatim, so that several phases may share a stream.
    pub fn new(group: LogGroup, stream: String, logging: Option<&Value>) -> Self {
        let named = |member: &str| logging.and_then(|logging| logging["cloudWatch"][member].as_str());
        let shipped = (
            named("logGroup").map_or_else(|| group.clone(), |name| LogGroup::new(&group.account, &group.region, name)),
            named("logStream").map_or_else(|| stream.clone(), str::to_owned),
        );
        let own = (group, stream);
        if logging.is_some_and(|logging| logging["disabled"].is_object()) {
            return Self { own: (own.0.private(), own.1), shipped: None };
        }
        if shipped == own {
            return Self { own, shipped: None };
        }
        Self { own: (own.0.private(), own.1), shipped: Some(shipped) }
    }

    /// Where the API shows the lines, if it does.
    pub fn shipped(&self) -> Option<(&LogGroup, &str)> {
        let (group, stream) = self.shipped.as_ref().or(Some(&self.own).filter(|(group, _)| !group.private))?;
        Some((group, stream))
    }

    /// For the operator's eyes only.
    pub fn kept_back(self) -> Self {
        Self { own: (self.own.0.private(), self.own.1), shipped: None }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn configured_names_are_used_verbatim_and_the_operator_keeps_a_copy() {
        let group = || LogGroup::of_image("000000000000", "us-east-1", "demo");
        let own = |private| (LogGroup { private, ..group() }, "s".to_owned());
        let other = |name: &str, stream: &str| Some((LogGroup::new("000000000000", "us-east-1", name), stream.to_owned()));
        let default = "/aws/lambda-microvms/demo";
        for (logging, private, shipped) in [
            (None, false, None),
            (Some(Value::Null), false, None),
            (Some(json!({"cloudWatch": {}})), false, None),
            (Some(json!({"cloudWatch": {"logGroup": null, "logStream": null}})), false, None),
            (Some(json!({"cloudWatch": {"logGroup": default, "logStream": "s"}})), false, None),
            (Some(json!({"cloudWatch": {"logGroup": "/mine"}})), true, other("/mine", "s")),
            (Some(json!({"cloudWatch": {"logStream": "a/b"}})), true, other(default, "a/b")),
            (Some(json!({"disabled": {}})), true, None),
            (Some(json!({"disabled": null, "cloudWatch": {"logGroup": "g", "logStream": "t"}})), true, other("g", "t")),
        ] {
            let route = Route::new(group(), "s".to_owned(), logging.as_ref());
            assert_eq!(route, Route { own: own(private), shipped }, "{logging:?}");
        }
    }
}
