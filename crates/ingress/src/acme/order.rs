//! One order: from the account to the certificate.

use std::time::Duration;

use instant_acme::{
    Account, AuthorizationStatus, ChallengeType, ExternalAccountKey, Identifier, NewAccount, NewOrder, Order, OrderStatus, RetryPolicy,
};

use super::{AcmeConfig, AcmeError, hook, hook::Record, store::Store};
use crate::chain::Chain;

/// How long the authority may take to look at the records, and then to issue.
const POLLING: RetryPolicy = RetryPolicy::new().initial_delay(Duration::from_secs(1)).backoff(1.2).timeout(Duration::from_secs(3 * 60));

/// Gets a certificate for all names, and keeps it.
pub(super) async fn issue(config: &AcmeConfig) -> Result<Chain, AcmeError> {
    tracing::info!(directory = config.directory, names = ?config.names, "ordering a certificate");
    let account = account(config).await?;
    let identifiers: Vec<Identifier> = config.names.iter().cloned().map(Identifier::Dns).collect();
    let order = account.new_order(&NewOrder::new(&identifiers)).await;
    let mut order = order.map_err(says("ordering a certificate"))?;

    let mut placed = Vec::new();
    let proved = prove(config, &mut order, &mut placed).await;
    for record in &placed {
        // A record that stays does no harm.
        if let Err(error) = hook::remove(config, record).await {
            tracing::warn!(%error, "a DNS record was not removed");
        }
    }
    proved?;
    let key = order.finalize().await.map_err(says("asking for the certificate"))?;
    let chain = order.poll_certificate(&POLLING).await.map_err(says("fetching the certificate"))?;
    Store::new(config).keep_certificate(&chain, &key)
}

/// The account from an earlier order, or a new one.
async fn account(config: &AcmeConfig) -> Result<Account, AcmeError> {
    let builder = match &config.ca {
        Some(ca) => Account::builder_with_root(ca),
        None => Account::builder(),
    };
    let builder = builder.map_err(says("preparing to talk to the authority"))?;
    let store = Store::new(config);
    if let Some(credentials) = store.account()? {
        return builder.from_credentials(credentials).await.map_err(says("reaching the authority"));
    }
    let contacts: Vec<&str> = config.contacts.iter().map(String::as_str).collect();
    let new = NewAccount { contact: &contacts, terms_of_service_agreed: true, only_return_existing: false };
    let external = config.external_account.as_ref().map(|account| ExternalAccountKey::new(account.id.clone(), &account.key));
    let created = builder.create(&new, config.directory.clone(), external.as_ref()).await;
    let (account, credentials) = created.map_err(says("making an account with the authority"))?;
    store.keep_account(&credentials)?;
    Ok(account)
}

/// Has the records published and looked at. What was published is in `placed`, however it ends.
async fn prove(config: &AcmeConfig, order: &mut Order, placed: &mut Vec<Record>) -> Result<(), AcmeError> {
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization.map_err(says("asking what is to be proved"))?;
        if authorization.status == AuthorizationStatus::Valid {
            continue;
        }
        let name = match authorization.identifier().identifier {
            Identifier::Dns(name) => name.clone(),
            other => return Err(AcmeError::NoDnsChallenge(format!("{other:?}"))),
        };
        let Some(mut challenge) = authorization.challenge(ChallengeType::Dns01) else { return Err(AcmeError::NoDnsChallenge(name)) };
        let record = Record { name: format!("_acme-challenge.{name}"), value: challenge.key_authorization().dns_value() };
        placed.push(record.clone());
        hook::add(config, &record).await?;
        challenge.set_ready().await.map_err(says("telling the authority that the record is there"))?;
    }
    match order.poll_ready(&POLLING).await.map_err(says("waiting for the authority to look at the records"))? {
        OrderStatus::Ready | OrderStatus::Valid => Ok(()),
        _ => Err(AcmeError::Refused(problems(order).await)),
    }
}

/// What the authority has to say of the names that it did not accept.
async fn problems(order: &mut Order) -> String {
    let mut found = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let Ok(mut authorization) = authorization else { continue };
        let Ok(state) = authorization.refresh().await else { continue };
        found.extend(state.challenges.iter().filter_map(|challenge| challenge.error.as_ref()).map(ToString::to_string));
    }
    if found.is_empty() { "it does not say why".to_owned() } else { found.join("; ") }
}

fn says(action: &'static str) -> impl FnOnce(instant_acme::Error) -> AcmeError {
    move |source| AcmeError::Authority { action, source }
}
