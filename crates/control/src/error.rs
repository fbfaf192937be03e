//! Why a call was refused, in the domain's terms. The API turns these into its exceptions; the texts are the service's own (SPEC 3.3).

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// the input breaks a rule that only the domain can check
    #[error("{0}")]
    Invalid(String),
    /// the image does not exist
    #[error("MicroVMImage not found for MicroVMImageID: {0}")]
    ImageNotFound(String),
    /// the version does not exist
    #[error("MicroVMImage not found for MicroVMImage: {arn}, Version: {version}")]
    VersionNotFound {
        /// ARN of the image.
        arn: String,
        /// Version asked for.
        version: String,
    },
    /// the MicroVM does not exist
    #[error("MicroVM not found: {0}")]
    MicrovmNotFound(String),
    /// nothing can be launched
    #[error("No active version found for MicroVM image {arn}{}", version.as_ref().map(|v| format!(" and version {v}")).unwrap_or_default())]
    NoActiveVersion {
        /// ARN of the image.
        arn: String,
        /// Version asked for.
        version: Option<String>,
    },
    /// the name is taken
    #[error("A MicroVM image with the name '{0}' already exists in this account")]
    NameTaken(String),
    /// the image has MicroVMs
    #[error("Cannot delete microvm image with running microvms.")]
    ImageInUse,
    /// the image is in the middle of something
    #[error("MicroVM Image is already in state: {0}")]
    ImageInTransition(String),
    /// the account has as much as it may
    #[error("{0}")]
    QuotaExceeded(String),
    /// the account calls too often
    #[error("Rate exceeded")]
    Throttled {
        /// Seconds until it may call again.
        retry_after_seconds: u64,
    },
    /// the tags are too many, or mean nothing
    #[error("{0}")]
    InvalidTags(String),
    /// nothing of this ARN can have tags here
    #[error("Resource not found: {0}")]
    TaggedNotFound(String),
    /// the connector does not exist
    #[error("Network connector not found for: {0}")]
    ConnectorNotFound(String),
    /// the connector's name is taken, its token was used, or MicroVMs use it
    #[error("{0}")]
    ConnectorConflict(String),
    /// the account has as many connectors as it may
    #[error("The maximum number of network connectors ({0}) has been reached for this account.")]
    ConnectorLimit(u32),
    /// the MicroVM is over
    #[error("The MicroVM {0} has been terminated and its state cannot be changed.")]
    Terminated(String),
    /// the idempotency token was used for something else
    #[error("The client token has already been used with different parameters.")]
    TokenReused,
    /// another account's resource
    #[error("User: {principal} is not authorized to perform this action on resource: {resource}")]
    Denied {
        /// Who asked.
        principal: String,
        /// For what.
        resource: String,
    },
    /// the host has no room
    #[error("{0}")]
    InsufficientCapacity(String),
    /// a cursor that this server did not issue
    #[error("the cursor is not valid")]
    BadCursor,
    /// our fault; the text is for the log, not for the caller
    #[error("{0}")]
    Internal(String),
}
