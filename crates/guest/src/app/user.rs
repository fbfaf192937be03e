//! Who the application runs as: a Dockerfile's USER resolved against the image's own `/etc/passwd` and `/etc/group`, by the rules of
//! container engines.

use std::iter;

/// Identity of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups: the primary one, which a program that sets its group would else lose along with what is denied to that group
    /// (CVE-2022-36109), and, unless USER names a group, those that the user is a member of.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

/// USER cannot be resolved.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// no such user
    #[error("USER {0}: there is no such user in /etc/passwd")]
    NoUser(String),
    /// no such group
    #[error("USER {0}: there is no such group in /etc/group")]
    NoGroup(String),
}

/// A line of passwd(5), as far as it matters.
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// A line of group(5), as far as it matters.
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Resolves `name`, `uid`, `name:group`, `uid:gid` and mixtures. A number needs no entry; the empty string is root.
pub fn resolve(spec: &str, passwd: &str, group: &str) -> Result<User, UserError> {
    let (user, wanted_group) = spec.split_once(':').unwrap_or((spec, ""));
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let account = passwd.lines().filter_map(account).find(|account| number.map_or(account.name == user, |uid| account.uid == uid));
    let (uid, mut gid, home) = match (&account, number) {
        (Some(account), _) => (account.uid, account.gid, account.home),
        (None, Some(uid)) => (uid, 0, "/"),
        (None, None) => return Err(UserError::NoUser(spec.to_owned())),
    };
    let mut memberships = Vec::new();
    if wanted_group.is_empty() {
        let name = account.as_ref().map(|account| account.name);
        memberships = group
            .lines()
            .filter_map(parse_group)
            .filter(|group| name.is_some_and(|name| group.members.split(',').any(|member| member == name)))
            .map(|group| group.gid)
            .collect();
    } else {
        let number = wanted_group.parse::<u32>().ok();
        let named = group.lines().filter_map(parse_group).find(|group| group.name == wanted_group).map(|group| group.gid);
        gid = number.or(named).ok_or_else(|| UserError::NoGroup(spec.to_owned()))?;
    }
    let groups = iter::once(gid).chain(memberships.into_iter().filter(|&member_of| member_of != gid)).collect();
    let home = if home.is_empty() { "/" } else { home };
    Ok(User { uid, gid, groups, home: home.to_owned() })
}

fn account(line: &str) -> Option<Account<'_>> {
    let mut fields = line.trim().split(':');
    let name = fields.next()?;
    let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(Account { name, uid, gid, home: fields.nth(1).unwrap_or("") })
}

fn parse_group(line: &str) -> Option<Group<'_>> {
    let mut fields = line.trim().split(':');
    let name = fields.next()?;
    Some(Group { name, gid: fields.nth(1)?.parse().ok()?, members: fields.next().unwrap_or("") })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\n# comment\nbroken\nweb:x:1000:1001:Web:/home/web:/bin/sh\nbare:x:7:8\n42:x:9:9::/forty:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nweb:x:1001:web\nlog:x:4:web,other\ndocker:x:999:other,web\n";

    fn user(uid: u32, gid: u32, groups: &[u32], home: &str) -> User {
        User { uid, gid, groups: groups.to_vec(), home: home.to_owned() }
    }

    #[test]
    fn every_form_of_user_resolves() {
        let resolve = |spec| resolve(spec, PASSWD, GROUP);
        assert_eq!(resolve(""), Ok(user(0, 0, &[0], "/root")));
        assert_eq!(resolve("web"), Ok(user(1000, 1001, &[1001, 4, 999], "/home/web")));
        assert_eq!(resolve("1000"), Ok(user(1000, 1001, &[1001, 4, 999], "/home/web")));
        assert_eq!(resolve("web:log"), Ok(user(1000, 4, &[4], "/home/web")));
        assert_eq!(resolve("web:77"), Ok(user(1000, 77, &[77], "/home/web")));
        assert_eq!(resolve("1234"), Ok(user(1234, 0, &[0], "/")));
        assert_eq!(resolve("1234:log"), Ok(user(1234, 4, &[4], "/")));
        assert_eq!(resolve(":log"), Ok(user(0, 4, &[4], "/root")));
        assert_eq!(resolve("bare"), Ok(user(7, 8, &[8], "/")));
        assert_eq!(resolve("42"), Ok(user(42, 0, &[0], "/")), "a number is an id, never a name");
    }

    #[test]
    fn an_image_without_accounts_runs_as_numbers() {
        assert_eq!(resolve("", "", ""), Ok(user(0, 0, &[0], "/")));
        assert_eq!(resolve("5:6", "", ""), Ok(user(5, 6, &[6], "/")));
    }

    #[test]
    fn unknown_names_are_refused() {
        assert_eq!(resolve("nobody", PASSWD, GROUP), Err(UserError::NoUser("nobody".into())));
        assert_eq!(resolve("web:nogroup", PASSWD, GROUP), Err(UserError::NoGroup("web:nogroup".into())));
        assert_eq!(resolve("broken", PASSWD, GROUP), Err(UserError::NoUser("broken".into())));
    }
}
