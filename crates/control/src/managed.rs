//! The base images that come with the server.

use std::time::{Duration, SystemTime};

use crate::{
    arn::{MANAGED_IMAGES, managed_image},
    control::Inner,
    control_plane::PAGE,
    error::ControlError,
    types::{Caller, ManagedImage, ManagedImageVersion, Page, PageRequest},
};

/// Their versions, newest first.
pub(crate) const VERSIONS: [&str; 2] = ["1", "0"];
/// When the service's were published: 2026-06-22, in seconds since the Unix epoch.
const PUBLISHED: u64 = 1_782_086_400;

impl Inner {
    pub fn list_managed_images(&self, caller: &Caller, page: &PageRequest) -> Result<Page<ManagedImage>, ControlError> {
        let images = MANAGED_IMAGES.iter().map(|name| image(managed_image(&caller.region, name))).collect();
        self.fixed_page(&["managed-images", &caller.region], images, page)
    }

    pub fn list_managed_image_versions(
        &self,
        caller: &Caller,
        arn: &str,
        page: &PageRequest,
    ) -> Result<Page<ManagedImageVersion>, ControlError> {
        if !arn.starts_with("arn:") {
            return Err(ControlError::Invalid(format!("Invalid ARN format: {arn}")));
        }
        if !MANAGED_IMAGES.iter().any(|name| managed_image(&caller.region, name) == arn) {
            return Err(ControlError::ImageNotFound(arn.to_owned()));
        }
        let versions = VERSIONS.iter().map(|version| ManagedImageVersion {
            image: image(arn.to_owned()),
            version: (*version).to_owned(),
            architectures: self.settings.architectures.offered(),
        });
        self.fixed_page(&["managed-versions", arn], versions.collect(), page)
    }

    /// A page of a list that does not change.
    fn fixed_page<T>(&self, list: &[&str], items: Vec<T>, page: &PageRequest) -> Result<Page<T>, ControlError> {
        let keys = self.keys(list, page, PAGE)?;
        let rows: Vec<(i64, T)> = (1..).zip(items.into_iter().rev()).collect();
        let rows = rows.into_iter().rev().filter(|(seq, _)| keys.before.is_none_or(|before| *seq < before));
        self.page(list, keys, rows.take(keys.limit as usize).collect(), |(seq, _)| *seq, |(_, item)| Ok(item))
    }
}

fn image(arn: String) -> ManagedImage {
    ManagedImage { arn, created_at: SystemTime::UNIX_EPOCH + Duration::from_secs(PUBLISHED) }
}

#[cfg(test)]
mod tests {
    use crate::{
        ControlError,
        plane::ControlPlane,
        testing::{World, caller},
        types::PageRequest,
    };

    #[tokio::test]
    async fn managed_images_and_their_versions_are_listed() {
        let world = World::new().await;
        let images = world.control.list_managed_images(&caller(), PageRequest::default()).await.unwrap();
        let arns: Vec<_> = images.items.iter().map(|image| image.arn.as_str()).collect();
        assert_eq!(arns, ["arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1"]);
        let page = |token| PageRequest { limit: Some(1), token };
        let first = world.control.list_managed_image_versions(&caller(), arns[0], page(None)).await.unwrap();
        let second = world.control.list_managed_image_versions(&caller(), arns[0], page(first.next.clone())).await.unwrap();
        assert_eq!((first.items[0].version.as_str(), second.items[0].version.as_str(), second.next), ("1", "0", None));
        assert!(first.next.is_some());
        let unknown = world.control.list_managed_image_versions(&caller(), &arns[0].replace("al2023", "al2"), PageRequest::default()).await;
        assert!(matches!(unknown, Err(ControlError::ImageNotFound(_))));
        let bare = world.control.list_managed_image_versions(&caller(), "al2023-1", PageRequest::default()).await.unwrap_err();
        assert_eq!(bare.to_string(), "Invalid ARN format: al2023-1");
    }
}
