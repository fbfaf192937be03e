//! Who may do what: users, roles and their keys, policy documents and their evaluation, temporary credentials.
//!
//! A [`Directory`] knows every principal of every account. It turns an access key into a [`Principal`], a principal and a [`Request`] into leave
//! or a [`Denied`], and a role into a [`Session`]'s credentials. Policy documents are those of AWS IAM ("IAM JSON policy element reference"). They
//! are evaluated here because no kept library does it soundly: the one that is still released puts the values of policy variables into a
//! pattern before it looks for wildcards, so that a session called `*` matches everybody's resources, reads documents with misspelt elements as
//! if these were not there, and does not let an account in a trust policy stand for the account's principals; the older ones compare
//! service names by case or are no longer released.

#![forbid(unsafe_code)]

mod condition;
mod directory;
mod pattern;
mod policy;
mod principal;
mod records;
mod seal;
mod session;

pub use condition::Context;
pub use directory::{
    Account, AssumeError, AssumeRole, BadName, ChangeError, CredentialError, Directory, Known, OpenError, RoleRefused, Save, SessionError,
};
pub use policy::{Decision, Policy, PolicyError, Request, Trust, TrustPolicy};
pub use principal::{Denied, Principal};
pub use records::{Book, Key, Role, User, configured_id};
pub use seal::Sealer;
pub use session::Session;
