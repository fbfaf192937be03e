//! Everybody that the server knows, and the credentials by which they are known.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use ring::rand::SystemRandom;

use crate::{
    condition::Context,
    policy::{Decision, Policy, Request, Trust, TrustPolicy},
    principal::{Denied, Principal},
    records::{Book, Key, Role, User, is_account, is_name, random_id},
    seal::Sealer,
    session::{Claims, Session},
};

/// Who assumes the roles of MicroVMs and builds.
const SERVICE: &str = "lambda.amazonaws.com";
/// Name of the session in which the service itself acts for a MicroVM.
const SERVICE_SESSION: &str = "lambda";
/// What temporary access keys begin with.
const TEMPORARY: &str = "ASIA";
/// Keys that a user may have, so that one can be replaced by another.
const MAX_KEYS: usize = 2;
/// Longest session of a role that was itself assumed from a session.
const LONGEST_CHAINED: Duration = Duration::from_secs(3600);
const SHORTEST: Duration = Duration::from_secs(900);
const LONGEST: Duration = Duration::from_secs(43_200);

/// Writes the kept book down.
pub type Save = Box<dyn Fn(&Book) -> io::Result<()> + Send + Sync>;

/// A root user's keys.
#[derive(Debug, Clone)]
pub struct Account {
    /// Twelve digits.
    pub id: String,
    pub keys: Vec<Key>,
}

/// All principals of all accounts.
pub struct Directory {
    configured: Book,
    roots: Vec<Account>,
    /// Changed by one at a time: what is on disk and what is in `index` follow each other.
    kept: Mutex<Book>,
    index: RwLock<Arc<Index>>,
    sealer: Sealer,
    random: SystemRandom,
    save: Save,
}

#[derive(Default)]
struct Index {
    keys: HashMap<String, (String, Arc<Principal>)>,
    /// By ARN.
    roles: HashMap<String, Arc<KnownRole>>,
    accounts: HashSet<String>,
}

struct KnownRole {
    role: Role,
    policy: Arc<Policy>,
}

/// A user or a role, and where it is written.
#[derive(Debug, Clone, PartialEq)]
pub struct Known<T> {
    pub record: T,
    /// In the configuration file; what is not was made with `hearth iam`.
    pub configured: bool,
}

/// The books contradict themselves.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// a name or an account is not one
    #[error("{0}")]
    Name(#[from] BadName),
    /// two records have the same name
    #[error("{0} is there twice; names are unique within an account, also across the configuration and what `hearth iam` made")]
    Twice(String),
}

/// A name or an account number is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// not a name
    #[error("'{0}' is not a name: use 1 to 64 letters, digits and _+=,.@-")]
    Name(String),
    /// not an account
    #[error("'{0}' is not an account: use twelve digits")]
    Account(String),
}

/// Credentials are not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CredentialError {
    /// the key is not known, or its token does not belong to it
    #[error("The security token included in the request is invalid.")]
    Unknown,
    /// the session is over
    #[error("The security token included in the request is expired")]
    Expired,
}

/// A role may not be passed to the service. The messages are AWS Lambda's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RoleRefused {
    /// another account's role
    #[error("Cross-account pass role is not allowed.")]
    CrossAccount,
    /// there is no such role, or it does not trust the service
    #[error("The role defined for the function cannot be assumed by Lambda.")]
    CannotBeAssumed,
}

/// A role cannot be assumed.
#[derive(Debug, thiserror::Error)]
pub enum AssumeError {
    /// the caller may not, or there is no such role
    #[error(transparent)]
    Denied(#[from] Denied),
    /// a parameter is out of range
    #[error("{0}")]
    Invalid(String),
    /// credentials could not be made
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Credentials for a role cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// the role is not known
    #[error("there is no role {0}")]
    NoSuchRole(String),
    /// the role's trust policy does not name the service
    #[error("the role {0} does not trust {SERVICE}")]
    NotTrusted(String),
    /// the system has no random numbers
    #[error("the system gave no random numbers for temporary credentials")]
    Random,
}

/// A change of what is kept was refused.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// a name or an account is not one
    #[error(transparent)]
    Name(#[from] BadName),
    /// the name is taken
    #[error("{0} exists already")]
    Exists(String),
    /// there is nothing of that name
    #[error("{0} does not exist")]
    NotFound(String),
    /// it is not the server's to change
    #[error("{0} is in the configuration file: change it there")]
    Configured(String),
    /// the user has as many keys as may be
    #[error("{0} has {MAX_KEYS} keys already: remove one first")]
    TooManyKeys(String),
    /// the system has no random numbers
    #[error("the system gave no random numbers for a new key pair")]
    Random,
    /// it could not be written down
    #[error("writing the principals down failed: {0}")]
    Save(#[from] io::Error),
}

/// What is asked of [`Directory::assume_role`].
#[derive(Debug, Clone)]
pub struct AssumeRole<'r> {
    pub role_arn: &'r str,
    pub session_name: &'r str,
    /// 15 minutes to 12 hours.
    pub duration: Duration,
    pub external_id: Option<&'r str>,
    /// What narrows the role's policy for this session.
    pub policy: Option<Policy>,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory").field("accounts", &self.index().accounts).finish_non_exhaustive()
    }
}

impl Directory {
    /// A directory of the root users and principals of the configuration, and of those that are kept, which `save` writes down.
    pub fn new(roots: Vec<Account>, configured: Book, kept: Book, sealer: Sealer, save: Save) -> Result<Self, OpenError> {
        let index = Index::of(&roots, &[&configured, &kept])?;
        let index = RwLock::new(Arc::new(index));
        Ok(Self { configured, roots, kept: Mutex::new(kept), index, sealer, random: SystemRandom::new(), save })
    }

    /// The secret that requests with this access key are signed with. Also one for every temporary key: whether it is in use, its token says.
    pub fn secret(&self, access_key_id: &str) -> Option<String> {
        match access_key_id.starts_with(TEMPORARY) {
            true => Some(self.sealer.secret(access_key_id)),
            false => self.index().keys.get(access_key_id).map(|(secret, _)| secret.clone()),
        }
    }

    /// Whom an access key stands for, with the session token that came with it. The signature is the caller's to check, with
    /// [`Directory::secret`].
    pub fn identify(&self, access_key_id: &str, token: Option<&str>, now: SystemTime) -> Result<Arc<Principal>, CredentialError> {
        let Some(token) = token else {
            return self.index().keys.get(access_key_id).map(|(_, principal)| Arc::clone(principal)).ok_or(CredentialError::Unknown);
        };
        let claims = self.sealer.open(token).and_then(|text| serde_json::from_slice::<Claims>(&text).ok());
        let claims = claims.filter(|claims| claims.access_key_id == access_key_id).ok_or(CredentialError::Unknown)?;
        if now >= claims.expires_at() {
            return Err(CredentialError::Expired);
        }
        // The role as it is now: what it may no longer do, its sessions may not either.
        let index = self.index();
        let known = index.roles.get(&claims.role).filter(|known| known.role.id == claims.role_id).ok_or(CredentialError::Unknown)?;
        Ok(Arc::new(known.session(&claims.session, claims.policy)))
    }

    /// Whether there is a principal in an account.
    pub fn has_account(&self, account: &str) -> bool {
        self.index().accounts.contains(account)
    }

    /// Every account with a principal.
    pub fn accounts(&self) -> Vec<String> {
        let mut accounts: Vec<String> = self.index().accounts.iter().cloned().collect();
        accounts.sort();
        accounts
    }

    /// Whether a role may be passed to the service by principals of an account. As long as the account has no roles every ARN is accepted: who has
    /// not set any up should not need to for an example that passes one.
    pub fn check_passed_role(&self, account: &str, role_arn: &str) -> Result<(), RoleRefused> {
        let index = self.index();
        if !index.roles.values().any(|known| known.role.account == account) {
            return Ok(());
        }
        if role_arn.split(':').nth(4) != Some(account) {
            return Err(RoleRefused::CrossAccount);
        }
        let known = index.roles.get(role_arn).ok_or(RoleRefused::CannotBeAssumed)?;
        if known.trusts_service() { Ok(()) } else { Err(RoleRefused::CannotBeAssumed) }
    }

    /// Temporary credentials for a principal that assumes a role. Both sides must agree: the role's trust policy, and the principal's own
    /// policies, unless the trust policy of a role in the same account names the principal itself.
    pub fn assume_role(&self, caller: &Principal, ask: AssumeRole<'_>, now: SystemTime) -> Result<Session, AssumeError> {
        let AssumeRole { role_arn, session_name, duration, external_id, policy } = ask;
        if session_name.len() < 2 || !is_name(session_name) {
            return Err(AssumeError::Invalid(format!("'{session_name}' is not a session name: use 2 to 64 letters, digits and _+=,.@-")));
        }
        if !(SHORTEST..=LONGEST).contains(&duration) {
            let (least, most) = (SHORTEST.as_secs(), LONGEST.as_secs());
            return Err(AssumeError::Invalid(format!("DurationSeconds is not between {least} and {most}")));
        }
        if caller.is_session() && duration > LONGEST_CHAINED {
            let text = "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining";
            return Err(AssumeError::Invalid(text.to_owned()));
        }
        let mut context = caller.context().with("sts:RoleSessionName", session_name);
        if let Some(id) = external_id {
            context = context.with("sts:ExternalId", id);
        }
        let action = "sts:AssumeRole";
        let own = caller.decide(Request { action, resource: role_arn, context: &context });
        let index = self.index();
        let known = index.roles.get(role_arn);
        let trust = known.map_or(Trust::No, |known| known.role.trust.trusts(caller, action, &context));
        let same_account = known.is_some_and(|known| known.role.account == caller.account);
        let agreed = match (trust, own) {
            (Trust::Denied | Trust::No, _) | (_, Decision::Denied) => false,
            (Trust::Itself, Decision::NotAllowed) => same_account,
            (Trust::Account, Decision::NotAllowed) => false,
            (Trust::Itself | Trust::Account, Decision::Allowed) => true,
        };
        match known.filter(|_| agreed) {
            Some(known) => Ok(self.session(known, session_name, duration, policy, now)?),
            // Whether there is such a role is nobody's business who may not assume it.
            None => Err(caller.denied_silently(action, role_arn).into()),
        }
    }

    /// Temporary credentials for the service itself, which assumes a role for a MicroVM or a build.
    pub fn session_for_role(
        &self,
        role_arn: &str,
        session_name: &str,
        duration: Duration,
        now: SystemTime,
    ) -> Result<Session, SessionError> {
        let index = self.index();
        let known = index.roles.get(role_arn).ok_or_else(|| SessionError::NoSuchRole(role_arn.to_owned()))?;
        if !known.trusts_service() {
            return Err(SessionError::NotTrusted(role_arn.to_owned()));
        }
        self.session(known, session_name, duration, None, now)
    }

    /// Whether sessions that the service has of a role may do something. Like [`Directory::check_passed_role`], everything is allowed as long as
    /// the account has no roles.
    pub fn role_allows(&self, role_arn: &str, action: &str, resource: &str) -> bool {
        let index = self.index();
        let Some(known) = index.roles.get(role_arn) else {
            let account = role_arn.split(':').nth(4).unwrap_or_default();
            return !index.roles.values().any(|known| known.role.account == account);
        };
        let principal = known.session(SERVICE_SESSION, None);
        let context = principal.context();
        known.trusts_service() && principal.decide(Request { action, resource, context: &context }) == Decision::Allowed
    }

    fn session(
        &self,
        known: &KnownRole,
        name: &str,
        duration: Duration,
        policy: Option<Policy>,
        now: SystemTime,
    ) -> Result<Session, SessionError> {
        let access_key_id = random_id(&self.random, TEMPORARY).ok_or(SessionError::Random)?;
        let expires = (now + duration).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let claims = Claims {
            access_key_id: access_key_id.clone(),
            role: known.role.arn(),
            role_id: known.role.id.clone(),
            session: name.to_owned(),
            expires,
            policy: policy.clone(),
        };
        let text = serde_json::to_vec(&claims).expect("claims are texts, a number and JSON");
        let session_token = self.sealer.seal(text, &self.random).ok_or(SessionError::Random)?;
        Ok(Session {
            secret_access_key: self.sealer.secret(&access_key_id),
            access_key_id,
            session_token,
            expires_at: claims.expires_at(),
            principal: known.session(name, policy),
        })
    }

    /// Every user.
    pub fn users(&self) -> Vec<Known<User>> {
        known(&self.configured.users, &self.kept().users)
    }

    /// Every role.
    pub fn roles(&self) -> Vec<Known<Role>> {
        known(&self.configured.roles, &self.kept().roles)
    }

    /// Makes a user with a first key. Waits for the disk.
    pub fn create_user(&self, account: &str, name: &str, policy: Option<Policy>, administrator: bool) -> Result<User, ChangeError> {
        let key = Key::random(&self.random).ok_or(ChangeError::Random)?;
        let id = random_id(&self.random, "AIDA").ok_or(ChangeError::Random)?;
        let user = User { account: account.to_owned(), name: name.to_owned(), id, administrator, policy, keys: vec![key] };
        let made = user.clone();
        self.change(|book| {
            book.users.push(made);
            Ok(())
        })?;
        Ok(user)
    }

    /// Removes a user and its keys. Waits for the disk.
    pub fn delete_user(&self, account: &str, name: &str) -> Result<(), ChangeError> {
        let arn = format!("arn:aws:iam::{account}:user/{name}");
        let configured = self.configured.users.iter().any(|user| user.arn() == arn);
        self.change(|book| remove(&mut book.users, configured, arn, User::arn))
    }

    /// Gives a user another key. Waits for the disk.
    pub fn create_key(&self, account: &str, name: &str) -> Result<Key, ChangeError> {
        let arn = format!("arn:aws:iam::{account}:user/{name}");
        let key = Key::random(&self.random).ok_or(ChangeError::Random)?;
        let made = key.clone();
        let configured = self.configured.users.iter().any(|user| user.arn() == arn);
        self.change(|book| match book.users.iter_mut().find(|user| user.arn() == arn) {
            Some(user) if user.keys.len() >= MAX_KEYS => Err(ChangeError::TooManyKeys(arn)),
            Some(user) => {
                user.keys.push(made);
                Ok(())
            }
            None if configured => Err(ChangeError::Configured(arn)),
            None => Err(ChangeError::NotFound(arn)),
        })?;
        Ok(key)
    }

    /// Removes a key. Waits for the disk.
    pub fn delete_key(&self, access_key_id: &str) -> Result<(), ChangeError> {
        let known = self.index().keys.contains_key(access_key_id);
        self.change(|book| {
            for user in &mut book.users {
                let before = user.keys.len();
                user.keys.retain(|key| key.access_key_id != access_key_id);
                if user.keys.len() < before {
                    return Ok(());
                }
            }
            let name = format!("the key {access_key_id}");
            Err(if known { ChangeError::Configured(name) } else { ChangeError::NotFound(name) })
        })
    }

    /// Makes a role. Waits for the disk.
    pub fn create_role(&self, account: &str, name: &str, trust: TrustPolicy, policy: Policy) -> Result<Role, ChangeError> {
        let id = random_id(&self.random, "AROA").ok_or(ChangeError::Random)?;
        let role = Role { account: account.to_owned(), name: name.to_owned(), id, trust, policy };
        let made = role.clone();
        self.change(|book| {
            book.roles.push(made);
            Ok(())
        })?;
        Ok(role)
    }

    /// Removes a role; its sessions end. Waits for the disk.
    pub fn delete_role(&self, account: &str, name: &str) -> Result<(), ChangeError> {
        let arn = format!("arn:aws:iam::{account}:role/{name}");
        let configured = self.configured.roles.iter().any(|role| role.arn() == arn);
        self.change(|book| remove(&mut book.roles, configured, arn, Role::arn))
    }

    fn change(&self, change: impl FnOnce(&mut Book) -> Result<(), ChangeError>) -> Result<(), ChangeError> {
        let mut kept = self.kept();
        let mut book = kept.clone();
        change(&mut book)?;
        let index = Index::of(&self.roots, &[&self.configured, &book])?;
        (self.save)(&book)?;
        *kept = book;
        *self.index.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(index);
        Ok(())
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Book> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self) -> Arc<Index> {
        Arc::clone(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Index {
    fn of(roots: &[Account], books: &[&Book]) -> Result<Self, OpenError> {
        let mut index = Self::default();
        let mut arns = HashSet::new();
        for root in roots {
            index.add_keys(&root.id, &root.keys, &Arc::new(Principal::root(&root.id)))?;
        }
        for user in books.iter().flat_map(|book| &book.users) {
            check(&user.account, &user.name)?;
            if !arns.insert(user.arn()) {
                return Err(OpenError::Twice(user.arn()));
            }
            let policy = user.policy.clone().map(Arc::new);
            let principal = Principal::user(&user.account, &user.name, &user.id, policy, user.administrator);
            index.add_keys(&user.account, &user.keys, &Arc::new(principal))?;
        }
        for role in books.iter().flat_map(|book| &book.roles) {
            check(&role.account, &role.name)?;
            if !arns.insert(role.arn()) {
                return Err(OpenError::Twice(role.arn()));
            }
            index.accounts.insert(role.account.clone());
            let known = KnownRole { role: role.clone(), policy: Arc::new(role.policy.clone()) };
            index.roles.insert(role.arn(), Arc::new(known));
        }
        Ok(index)
    }

    fn add_keys(&mut self, account: &str, keys: &[Key], principal: &Arc<Principal>) -> Result<(), OpenError> {
        self.accounts.insert(account.to_owned());
        for key in keys {
            let entry = (key.secret_access_key.clone(), Arc::clone(principal));
            if self.keys.insert(key.access_key_id.clone(), entry).is_some() {
                return Err(OpenError::Twice(format!("the key {}", key.access_key_id)));
            }
        }
        Ok(())
    }
}

impl KnownRole {
    fn session(&self, name: &str, policy: Option<Policy>) -> Principal {
        let policies = [Arc::clone(&self.policy)].into_iter().chain(policy.map(Arc::new)).collect();
        Principal::session(&self.role.account, &self.role.name, &self.role.id, name, policies)
    }

    fn trusts_service(&self) -> bool {
        let context = Context::default().with("aws:PrincipalIsAWSService", "true").with("aws:SourceAccount", &self.role.account);
        self.role.trust.trusts_service(SERVICE, &context)
    }
}

impl From<OpenError> for ChangeError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Name(bad) => Self::Name(bad),
            OpenError::Twice(name) => Self::Exists(name),
        }
    }
}

fn check(account: &str, name: &str) -> Result<(), BadName> {
    if !is_account(account) {
        return Err(BadName::Account(account.to_owned()));
    }
    if is_name(name) { Ok(()) } else { Err(BadName::Name(name.to_owned())) }
}

fn remove<T>(records: &mut Vec<T>, configured: bool, arn: String, arn_of: impl Fn(&T) -> String) -> Result<(), ChangeError> {
    match records.iter().position(|record| arn_of(record) == arn) {
        Some(at) => {
            records.remove(at);
            Ok(())
        }
        None if configured => Err(ChangeError::Configured(arn)),
        None => Err(ChangeError::NotFound(arn)),
    }
}

fn known<T: Clone>(configured: &[T], kept: &[T]) -> Vec<Known<T>> {
    let of = |records: &[T], configured| records.iter().map(move |record| Known { record: record.clone(), configured }).collect::<Vec<_>>();
    [of(configured, true), of(kept, false)].concat()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MINE: &str = "000000000000";
    const THEIRS: &str = "111111111111";
    const ROLE: &str = "arn:aws:iam::000000000000:role/worker";

    fn directory() -> (Directory, Arc<Mutex<Vec<Book>>>) {
        let saved = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&saved);
        let save = Box::new(move |book: &Book| {
            log.lock().unwrap().push(book.clone());
            Ok(())
        });
        let key = Key { access_key_id: "AKIAROOT".to_owned(), secret_access_key: "root".to_owned() };
        let roots = vec![Account { id: MINE.to_owned(), keys: vec![key] }];
        let sealer = Sealer::new(&[7; Sealer::KEY_LENGTH]);
        (Directory::new(roots, Book::default(), Book::default(), sealer, save).unwrap(), saved)
    }

    fn trust(principal: serde_json::Value) -> TrustPolicy {
        json!({"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}})
            .try_into()
            .unwrap()
    }

    fn allow(action: &str) -> Policy {
        json!({"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": action, "Resource": "*"}}).try_into().unwrap()
    }

    fn ask(duration: u64) -> AssumeRole<'static> {
        AssumeRole { role_arn: ROLE, session_name: "one", duration: Duration::from_secs(duration), external_id: None, policy: None }
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_793_500_000)
    }

    fn principal(directory: &Directory, user: &User) -> Arc<Principal> {
        directory.identify(&user.keys[0].access_key_id, None, now()).unwrap()
    }

    #[test]
    fn keys_come_and_go_with_their_users_and_every_change_is_saved() {
        let (directory, saved) = directory();
        assert_eq!(directory.secret("AKIAROOT").as_deref(), Some("root"));
        let user = directory.create_user(MINE, "ann", Some(allow("lambda:*")), false).unwrap();
        let first = &user.keys[0];
        assert_eq!(directory.secret(&first.access_key_id).as_deref(), Some(first.secret_access_key.as_str()));
        assert_eq!(principal(&directory, &user).arn, "arn:aws:iam::000000000000:user/ann");
        let second = directory.create_key(MINE, "ann").unwrap();
        assert!(matches!(directory.create_key(MINE, "ann"), Err(ChangeError::TooManyKeys(_))));
        directory.delete_key(&first.access_key_id).unwrap();
        assert_eq!(directory.identify(&first.access_key_id, None, now()), Err(CredentialError::Unknown));
        assert!(directory.identify(&second.access_key_id, None, now()).is_ok());
        directory.delete_user(MINE, "ann").unwrap();
        assert_eq!(directory.secret(&second.access_key_id), None);
        let saved = saved.lock().unwrap();
        assert_eq!((saved.len(), saved.last()), (4, Some(&Book::default())));
    }

    #[test]
    fn a_change_that_cannot_be_saved_does_not_happen() {
        let save = Box::new(|_: &Book| Err(io::Error::other("full")));
        let sealer = Sealer::new(&[7; Sealer::KEY_LENGTH]);
        let directory = Directory::new(Vec::new(), Book::default(), Book::default(), sealer, save).unwrap();
        assert!(matches!(directory.create_user(MINE, "ann", None, false), Err(ChangeError::Save(_))));
        assert_eq!(directory.users(), []);
    }

    #[test]
    fn names_are_unique_and_well_formed_and_the_configuration_s_stay() {
        let (directory, _) = directory();
        directory.create_user(MINE, "ann", None, false).unwrap();
        directory.create_user(THEIRS, "ann", None, false).unwrap();
        assert!(matches!(directory.create_user(MINE, "ann", None, false), Err(ChangeError::Exists(_))));
        assert!(matches!(directory.create_user(MINE, "a/b", None, false), Err(ChangeError::Name(BadName::Name(_)))));
        assert!(matches!(directory.create_user("12", "bob", None, false), Err(ChangeError::Name(BadName::Account(_)))));
        assert!(matches!(directory.delete_user(MINE, "bob"), Err(ChangeError::NotFound(_))));
        assert!(matches!(directory.delete_key("AKIAROOT"), Err(ChangeError::Configured(_))));

        let configured = Book { users: vec![directory.users()[0].record.clone()], roles: Vec::new() };
        let sealer = Sealer::new(&[7; Sealer::KEY_LENGTH]);
        let directory = Directory::new(Vec::new(), configured.clone(), Book::default(), sealer, Box::new(|_| Ok(()))).unwrap();
        assert!(directory.users()[0].configured);
        assert!(matches!(directory.delete_user(MINE, "ann"), Err(ChangeError::Configured(_))));
        let sealer = Sealer::new(&[7; Sealer::KEY_LENGTH]);
        let twice = Directory::new(Vec::new(), configured.clone(), configured, sealer, Box::new(|_| Ok(())));
        assert!(matches!(twice, Err(OpenError::Twice(_))));
    }

    #[test]
    fn a_session_is_good_for_its_key_until_it_expires_or_its_role_goes() {
        let (directory, _) = directory();
        directory.create_role(MINE, "worker", trust(json!({"AWS": MINE})), allow("lambda:*")).unwrap();
        let session = directory.assume_role(&Principal::root(MINE), ask(900), now()).unwrap();
        assert!(session.access_key_id.starts_with("ASIA") && session.secret_access_key.len() == 40);
        assert_eq!(directory.secret(&session.access_key_id).unwrap(), session.secret_access_key);
        let identify = |key: &str, token: &str, seconds| directory.identify(key, Some(token), now() + Duration::from_secs(seconds));
        let (key, token) = (session.access_key_id.as_str(), session.session_token.as_str());
        assert_eq!(identify(key, token, 899).unwrap().arn, "arn:aws:sts::000000000000:assumed-role/worker/one");
        assert_eq!(identify(key, token, 900), Err(CredentialError::Expired));
        assert_eq!(identify("ASIAOTHER", token, 0), Err(CredentialError::Unknown));
        assert_eq!(identify(key, &token[1..], 0), Err(CredentialError::Unknown));
        assert_eq!(identify("AKIAROOT", token, 0), Err(CredentialError::Unknown));
        assert_eq!(directory.identify(key, None, now()), Err(CredentialError::Unknown), "not without its token");
        directory.delete_role(MINE, "worker").unwrap();
        directory.create_role(MINE, "worker", trust(json!({"AWS": MINE})), allow("*")).unwrap();
        assert_eq!(identify(key, token, 0), Err(CredentialError::Unknown), "another role of the same name");
    }

    #[test]
    fn both_sides_must_agree_unless_the_role_names_the_principal() {
        let ann = "arn:aws:iam::000000000000:user/ann";
        let eve = "arn:aws:iam::111111111111:user/eve";
        let may = || Some(allow("sts:AssumeRole"));
        for (account, name, policy, trusted, expected) in [
            (MINE, "ann", None, json!({"AWS": ann}), true),
            (MINE, "ann", None, json!({"AWS": MINE}), false),
            (MINE, "ann", may(), json!({"AWS": MINE}), true),
            (MINE, "ann", may(), json!({"AWS": THEIRS}), false),
            (MINE, "ann", may(), json!({"Service": "lambda.amazonaws.com"}), false),
            (THEIRS, "eve", None, json!({"AWS": eve}), false),
            (THEIRS, "eve", may(), json!({"AWS": eve}), true),
            (THEIRS, "eve", may(), json!({"AWS": THEIRS}), true),
            (THEIRS, "eve", may(), json!({"AWS": MINE}), false),
        ] {
            let (directory, _) = directory();
            let text = format!("{name} {trusted} {}", policy.is_some());
            let user = directory.create_user(account, name, policy, false).unwrap();
            directory.create_role(MINE, "worker", trust(trusted), allow("lambda:*")).unwrap();
            let assumed = directory.assume_role(&principal(&directory, &user), ask(900), now());
            assert_eq!(assumed.is_ok(), expected, "{text}: {assumed:?}");
        }
    }

    #[test]
    fn a_role_that_is_not_there_is_refused_like_one_that_may_not_be_assumed() {
        let (directory, _) = directory();
        let refused = directory.assume_role(&Principal::root(MINE), ask(900), now()).unwrap_err();
        let text = "User: arn:aws:iam::000000000000:root is not authorized to perform: sts:AssumeRole on resource: \
                    arn:aws:iam::000000000000:role/worker";
        assert_eq!(refused.to_string(), text);
        directory.create_role(MINE, "worker", trust(json!({"AWS": THEIRS})), allow("*")).unwrap();
        assert_eq!(directory.assume_role(&Principal::root(MINE), ask(900), now()).unwrap_err().to_string(), text);
    }

    #[test]
    fn durations_and_names_have_limits() {
        let (directory, _) = directory();
        directory.create_role(MINE, "worker", trust(json!({"AWS": "*"})), allow("*")).unwrap();
        let root = Principal::root(MINE);
        for duration in [899, 43_201] {
            assert!(matches!(directory.assume_role(&root, ask(duration), now()), Err(AssumeError::Invalid(_))), "{duration}");
        }
        let session = directory.assume_role(&root, ask(43_200), now()).unwrap();
        assert!(matches!(directory.assume_role(&session.principal, ask(3601), now()), Err(AssumeError::Invalid(_))));
        assert!(directory.assume_role(&session.principal, ask(3600), now()).is_ok());
        for session_name in ["x", "a b", ""] {
            let asked = AssumeRole { session_name, ..ask(900) };
            assert!(matches!(directory.assume_role(&root, asked, now()), Err(AssumeError::Invalid(_))), "{session_name}");
        }
    }

    #[test]
    fn the_service_gets_sessions_of_roles_that_trust_it() {
        let (directory, _) = directory();
        let session = |directory: &Directory| directory.session_for_role(ROLE, "microvm-1", Duration::from_secs(3300), now());
        assert!(matches!(session(&directory), Err(SessionError::NoSuchRole(_))));
        directory.create_role(MINE, "worker", trust(json!({"AWS": MINE})), allow("*")).unwrap();
        assert!(matches!(session(&directory), Err(SessionError::NotTrusted(_))));
        directory.delete_role(MINE, "worker").unwrap();
        directory.create_role(MINE, "worker", trust(json!({"Service": SERVICE})), allow("s3:GetObject")).unwrap();
        let session = session(&directory).unwrap();
        let principal = directory.identify(&session.access_key_id, Some(&session.session_token), now()).unwrap();
        let decide = |action| principal.decide(Request { action, resource: "*", context: &principal.context() });
        assert_eq!((decide("s3:GetObject"), decide("s3:PutObject")), (Decision::Allowed, Decision::NotAllowed));
    }

    #[test]
    fn roles_may_be_passed_freely_until_an_account_has_its_own() {
        let (directory, _) = directory();
        assert_eq!(directory.check_passed_role(MINE, "arn:aws:iam::123456789012:role/example"), Ok(()));
        directory.create_role(MINE, "worker", trust(json!({"Service": SERVICE})), allow("*")).unwrap();
        directory.create_role(MINE, "people", trust(json!({"AWS": MINE})), allow("*")).unwrap();
        assert_eq!(directory.check_passed_role(MINE, ROLE), Ok(()));
        let check = |arn: &str| directory.check_passed_role(MINE, arn);
        assert_eq!(check("arn:aws:iam::000000000000:role/people"), Err(RoleRefused::CannotBeAssumed));
        assert_eq!(check("arn:aws:iam::000000000000:role/none"), Err(RoleRefused::CannotBeAssumed));
        assert_eq!(check("arn:aws:iam::123456789012:role/example"), Err(RoleRefused::CrossAccount));
        assert_eq!(directory.check_passed_role(THEIRS, "arn:aws:iam::123456789012:role/example"), Ok(()), "another account's affair");
    }

    #[test]
    fn the_book_is_read_as_it_was_written() {
        let (directory, saved) = directory();
        directory.create_user(MINE, "ann", Some(allow("lambda:*")), false).unwrap();
        directory.create_role(MINE, "worker", trust(json!({"Service": SERVICE})), allow("*")).unwrap();
        let book = saved.lock().unwrap().last().cloned().unwrap();
        let text = serde_json::to_string(&book).unwrap();
        assert_eq!(serde_json::from_str::<Book>(&text).unwrap(), book);
        let broken = text.replace("\"Allow\"", "\"Perhaps\"");
        assert!(serde_json::from_str::<Book>(&broken).unwrap_err().to_string().contains("MalformedPolicyDocument"));
    }
}
