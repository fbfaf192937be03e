//! Tags of images and network connectors (SPEC 4.3).

use std::collections::BTreeMap;

use hearth_store::{ConnectorRow, ImageRow};

use crate::{
    connectors::policy_of,
    control::Inner,
    error::ControlError,
    records::{self, json},
    types::Caller,
};

/// Tags that a resource may have, as everywhere on AWS.
const MOST: u32 = 50;

enum Tagged {
    Image(ImageRow),
    Connector(ConnectorRow),
}

impl Inner {
    pub async fn list_tags(&self, caller: &Caller, arn: &str) -> Result<BTreeMap<String, String>, ControlError> {
        let (id, tags) = match self.find_tagged(caller, arn).await? {
            Tagged::Image(row) => (row.id, row.tags),
            Tagged::Connector(row) => (row.id, row.tags),
        };
        Ok(records::tags(&id, &tags)?)
    }

    /// Sets the tags that have a value and removes those that have none.
    pub async fn change_tags(&self, caller: &Caller, arn: &str, changes: BTreeMap<String, Option<String>>) -> Result<(), ControlError> {
        let patch = json(&changes);
        let changed = match self.find_tagged(caller, arn).await? {
            Tagged::Image(row) => self.store.change_image_tags(&row.id, &patch, MOST).await?,
            Tagged::Connector(row) => {
                let mut tags = records::tags(&row.id, &row.tags)?;
                for (key, value) in changes {
                    match value {
                        Some(value) => tags.insert(key, value),
                        None => tags.remove(&key),
                    };
                }
                policy_of(&tags)?;
                self.store.change_connector_tags(&row.id, &patch, MOST).await?
            }
        };
        if changed { Ok(()) } else { Err(ControlError::InvalidTags(format!("A resource can have {MOST} tags at most."))) }
    }

    async fn find_tagged(&self, caller: &Caller, arn: &str) -> Result<Tagged, ControlError> {
        if arn.contains(":microvm-image:") {
            return Ok(Tagged::Image(self.find_image(caller, arn).await?));
        }
        if arn.contains(":network-connector:") {
            return Ok(Tagged::Connector(self.find_connector(caller, arn).await?.0));
        }
        // Of the services that share this API only these two are here.
        Err(ControlError::TaggedNotFound(arn.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::{
        ControlError,
        plane::ControlPlane,
        testing::{World, caller, image_arn},
    };

    fn tags(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[tokio::test]
    async fn an_image_s_tags_come_and_go_and_its_versions_show_them() {
        let world = World::with_image().await;
        let (caller, arn) = (caller(), image_arn("demo"));
        assert!(world.control.list_tags(&caller, &arn).await.unwrap().is_empty());
        world.control.tag_resource(&caller, &arn, tags(&[("a", "1"), ("b", "2")])).await.unwrap();
        world.control.tag_resource(&caller, &arn, tags(&[("a", "3")])).await.unwrap();
        world.control.untag_resource(&caller, &arn, vec!["b".to_owned(), "never".to_owned()]).await.unwrap();
        let expected = tags(&[("a", "3")]);
        assert_eq!(world.control.list_tags(&caller, &arn).await.unwrap(), expected);
        assert_eq!(world.control.get_image(&caller, &arn).await.unwrap().tags, expected);
        assert_eq!(world.control.get_image_version(&caller, &arn, "1.0").await.unwrap().tags, expected);
    }

    #[tokio::test]
    async fn tags_of_what_is_not_there_or_another_s_and_too_many() {
        let world = World::with_image().await;
        let unknown = world.control.list_tags(&caller(), &image_arn("other")).await.unwrap_err();
        assert!(matches!(unknown, ControlError::ImageNotFound(_)), "{unknown}");
        let function = "arn:aws:lambda:us-east-1:000000000000:function:f";
        assert!(matches!(world.control.list_tags(&caller(), function).await, Err(ControlError::TaggedNotFound(_))));
        let foreign = image_arn("demo").replace("000000000000", "111111111111");
        assert!(matches!(world.control.list_tags(&caller(), &foreign).await, Err(ControlError::Denied { .. })));
        let many: BTreeMap<_, _> = (0..51).map(|n| (n.to_string(), String::new())).collect();
        let error = world.control.tag_resource(&caller(), &image_arn("demo"), many).await.unwrap_err();
        assert!(matches!(error, ControlError::InvalidTags(_)), "{error}");
    }
}
