//! What is done to the versions of an image that exists.

use std::sync::Arc;

use hearth_store::{ChangeVersion, CreateVersion, ImageRow};
use uuid::Uuid;

use crate::{
    control::Inner,
    control_plane::{arn_of, fingerprint},
    error::ControlError,
    images::{Handle, Update},
    records::{self, version_name},
    types::{Caller, Image, ImageVersion, UpdateImage, VersionState, VersionStatus},
};

impl Inner {
    /// Makes the image's next version, which has nothing from the ones before it.
    pub async fn update_image(&self, caller: &Caller, image: &str, request: UpdateImage) -> Result<(Image, ImageVersion), ControlError> {
        let UpdateImage { mut spec, client_token } = request;
        let row = self.find_image(caller, image).await?;
        self.check_spec(caller, &spec)?;
        let fingerprint = fingerprint(&serde_json::json!([row.id, spec]));
        spec.egress_network_connectors = self.image_egress(caller, spec.egress_network_connectors).await?;
        let token = client_token.map(|token| (token, fingerprint));
        let update = Update { spec, build_id: Uuid::new_v4().to_string(), token };
        match self.handle_of(&row)?.update(update).await {
            Some(Ok(CreateVersion::Created { number })) => self.image_with_version(&row.id, number).await,
            Some(Ok(CreateVersion::Replayed(made))) => self.image_with_version(&made.id, made.number).await,
            Some(Ok(CreateVersion::TokenReused)) => Err(ControlError::TokenReused),
            Some(Ok(CreateVersion::LimitReached)) => Err(ControlError::QuotaExceeded(format!(
                "The maximum number of versions ({}) has been reached for MicroVM image {}.",
                self.settings.quotas.versions_per_image,
                arn_of(&row)
            ))),
            Some(Ok(CreateVersion::Busy { state })) => Err(ControlError::ImageInTransition(state)),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(CreateVersion::Gone)) | None => Err(unknown(&row)),
        }
    }

    pub async fn set_version_status(
        &self,
        caller: &Caller,
        image: &str,
        version: &str,
        status: VersionStatus,
    ) -> Result<ImageVersion, ControlError> {
        let (row, found) = self.find_version(caller, image, version).await?;
        let changed = self.handle_of(&row)?.set_status(found.number, status).await;
        self.check_change(&row, version, changed)?;
        let (row, version) = self.find_version(caller, image, version).await?;
        Ok(records::version(&row, version)?)
    }

    /// Returns the version in state `DELETING`.
    pub async fn delete_image_version(&self, caller: &Caller, image: &str, version: &str) -> Result<ImageVersion, ControlError> {
        let (row, found) = self.find_version(caller, image, version).await?;
        let (number, deleted) = (found.number, records::version(&row, found)?);
        if deleted.state != VersionState::Deleting {
            let changed = self.handle_of(&row)?.delete_version(number).await;
            self.check_change(&row, version, changed)?;
        }
        Ok(ImageVersion { state: VersionState::Deleting, status: VersionStatus::Inactive, ..deleted })
    }

    fn check_change(
        &self,
        image: &ImageRow,
        version: &str,
        changed: Option<Result<ChangeVersion, hearth_store::StoreError>>,
    ) -> Result<(), ControlError> {
        match changed {
            Some(Ok(ChangeVersion::Started)) => Ok(()),
            Some(Ok(ChangeVersion::Busy { state })) => Err(ControlError::ImageInTransition(state)),
            Some(Ok(ChangeVersion::Only)) => Err(ControlError::Invalid(format!(
                "Cannot delete the only version of MicroVM image {}. Delete the image instead.",
                arn_of(image)
            ))),
            Some(Ok(ChangeVersion::NotBuilt { state })) => {
                Err(ControlError::Invalid(format!("Cannot activate MicroVM image version in its current state: {state}")))
            }
            Some(Err(error)) => Err(error.into()),
            Some(Ok(ChangeVersion::Gone)) | None => {
                Err(ControlError::VersionNotFound { arn: arn_of(image).to_string(), version: version.to_owned() })
            }
        }
    }

    fn handle_of(&self, image: &ImageRow) -> Result<Arc<Handle>, ControlError> {
        self.image_handles().get(&image.id).cloned().ok_or_else(|| unknown(image))
    }

    /// An image and one of its versions; the newest if that one is gone.
    pub async fn image_with_version(&self, id: &str, number: i64) -> Result<(Image, ImageVersion), ControlError> {
        let gone = || ControlError::ImageNotFound(id.to_owned());
        let image = self.store.image_by_id(id).await?.ok_or_else(gone)?;
        let version = match self.store.version(id, number).await? {
            Some(version) => version,
            None => self
                .store
                .version(id, image.last_number)
                .await?
                .ok_or_else(|| ControlError::VersionNotFound { arn: arn_of(&image).to_string(), version: version_name(number) })?,
        };
        let version = records::version(&image, version)?;
        Ok((records::image(image)?, version))
    }
}

fn unknown(image: &ImageRow) -> ControlError {
    ControlError::ImageNotFound(arn_of(image).to_string())
}

#[cfg(test)]
mod tests;
