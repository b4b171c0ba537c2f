//! Users and groups out of the guest's `/etc/passwd` and `/etc/group`: a static program has no
//! name service. The files belong to the guest; any content is possible.

use belljar_protocol::v1::spawn_failure::Kind;

/// Most supplementary groups a program gets; Linux allows 65,536.
const MAX_GROUPS: usize = 1024;

/// `(uid_t) -1` means "leave as it is" to the system calls, so it is nobody's number.
const NO_ID: u32 = u32::MAX;

/// Who a program runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) name: Vec<u8>,
    pub(crate) home: Vec<u8>,
}

impl Identity {
    /// Root as every system has it; needs no file.
    pub(crate) fn root() -> Self {
        Self {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            name: b"root".to_vec(),
            home: b"/root".to_vec(),
        }
    }
}

/// The user or group of a call does not exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UserError {
    #[error("no user {0:?} in /etc/passwd of the guest")]
    User(String),
    #[error("no group {0:?} in /etc/group of the guest")]
    Group(String),
}

impl UserError {
    pub(crate) const fn kind(&self) -> Kind {
        match self {
            Self::User(_) => Kind::UnknownUser,
            Self::Group(_) => Kind::UnknownGroup,
        }
    }
}

/// Finds out who `USER` or `USER:GROUP` is, from the contents of passwd and group. An unknown
/// *number* is accepted, with group 0 and home `/`, as container engines do.
pub(crate) fn resolve(spec: &str, passwd: &[u8], group: &[u8]) -> Result<Identity, UserError> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let number = parse_id(user.as_bytes());
    let entry = entries(passwd).find(|entry| match number {
        Some(uid) => entry.uid == uid,
        None => entry.name == user.as_bytes(),
    });
    let mut identity = match (entry, number) {
        (Some(entry), _) => Identity {
            uid: entry.uid,
            gid: entry.gid,
            groups: Vec::new(),
            name: entry.name.to_vec(),
            home: entry.home.to_vec(),
        },
        (None, Some(0)) => Identity::root(),
        (None, Some(uid)) => Identity {
            uid,
            gid: 0,
            groups: Vec::new(),
            name: user.as_bytes().to_vec(),
            home: b"/".to_vec(),
        },
        (None, None) if user == "root" => Identity::root(),
        (None, None) => return Err(UserError::User(user.to_owned())),
    };
    if identity.home.is_empty() {
        identity.home = b"/".to_vec();
    }
    match wanted_group {
        Some(wanted) => {
            identity.gid = parse_id(wanted.as_bytes())
                .or_else(|| group_id(group, wanted.as_bytes()))
                .ok_or_else(|| UserError::Group(wanted.to_owned()))?;
        }
        None => identity.groups = groups_of(group, &identity.name, identity.gid),
    }
    Ok(identity)
}

/// The name of a user, by the content of passwd.
pub(crate) fn user_name(passwd: &[u8], uid: u32) -> Option<&[u8]> {
    entries(passwd)
        .find(|entry| entry.uid == uid)
        .map(|entry| entry.name)
}

/// The name of a group, by the content of group.
pub(crate) fn group_name(group: &[u8], gid: u32) -> Option<&[u8]> {
    group_entries(group)
        .find(|(_, number, _)| *number == gid)
        .map(|(name, _, _)| name)
}

/// The number of a group, given by name or number.
pub(crate) fn group_number(group: &[u8], wanted: &str) -> Result<u32, UserError> {
    parse_id(wanted.as_bytes())
        .or_else(|| group_id(group, wanted.as_bytes()))
        .ok_or_else(|| UserError::Group(wanted.to_owned()))
}

/// Adds groups, by name or number, to those of a user.
pub(crate) fn add_groups(
    identity: &mut Identity,
    wanted: &[String],
    group: &[u8],
) -> Result<(), UserError> {
    for name in wanted {
        let gid = group_number(group, name)?;
        if !identity.groups.contains(&gid) && identity.groups.len() < MAX_GROUPS {
            identity.groups.push(gid);
        }
    }
    Ok(())
}

struct Entry<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

/// Well-formed lines of passwd(5): `name:password:uid:gid:gecos:home:shell`.
fn entries(passwd: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    passwd.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        let uid = parse_id(fields.next()?)?;
        let gid = parse_id(fields.next()?)?;
        let _gecos = fields.next();
        let home = fields.next().unwrap_or_default();
        let home = if home.contains(&0) { b"/" } else { home };
        Some(Entry {
            name,
            uid,
            gid,
            home,
        })
    })
}

/// Well-formed lines of group(5), `name:password:gid:members`, as (name, gid, members).
fn group_entries(group: &[u8]) -> impl Iterator<Item = (&[u8], u32, &[u8])> {
    group.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        let gid = parse_id(fields.next()?)?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

fn group_id(group: &[u8], wanted: &[u8]) -> Option<u32> {
    group_entries(group)
        .find(|(name, _, _)| *name == wanted)
        .map(|(_, gid, _)| gid)
}

fn groups_of(group: &[u8], user: &[u8], own: u32) -> Vec<u32> {
    let mut groups = Vec::new();
    for (_, gid, members) in group_entries(group) {
        let is_member = members
            .split(|&byte| byte == b',')
            .any(|member| member == user);
        if is_member && gid != own && !groups.contains(&gid) && groups.len() < MAX_GROUPS {
            groups.push(gid);
        }
    }
    groups
}

fn parse_id(field: &[u8]) -> Option<u32> {
    if field.is_empty() || !field.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let id = std::str::from_utf8(field).ok()?.parse().ok()?;
    (id != NO_ID).then_some(id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/bash\n\
        # a comment\n\
        broken:x:notanumber:5::/:\n\
        alice:x:1000:1000:Alice,,,:/home/alice:/bin/sh\n\
        nohome:x:1001:1001\n\
        minus:x:4294967295:0::/:/bin/sh\n\
        \xff\xfe:x:1002:1002::/odd:/bin/sh";
    const GROUP: &[u8] = b"root:x:0:\nalice:x:1000:\nsudo:x:27:alice\n\
        docker:x:999:bob,alice\ndocker2:x:999:alice\nbad:x::alice\nown:x:1000:alice";

    fn who(spec: &str) -> Result<Identity, UserError> {
        resolve(spec, PASSWD, GROUP)
    }

    #[test]
    fn a_name_brings_its_groups_and_home() {
        let alice = who("alice").unwrap();
        assert_eq!((alice.uid, alice.gid), (1000, 1000));
        assert_eq!(alice.groups, [27, 999]);
        assert_eq!(alice.home, b"/home/alice");
        assert_eq!(who("1000").unwrap(), alice);
    }

    #[test]
    fn an_explicit_group_replaces_all_others() {
        let alice = who("alice:docker").unwrap();
        assert_eq!((alice.gid, alice.groups.len()), (999, 0));
        assert_eq!(who("7:8").unwrap().gid, 8);
    }

    #[test]
    fn unknown_names_are_refused_unknown_numbers_are_not() {
        assert_eq!(who("eve"), Err(UserError::User("eve".to_owned())));
        assert_eq!(who("alice:no"), Err(UserError::Group("no".to_owned())));
        assert_eq!(who("alice:"), Err(UserError::Group(String::new())));
        let stranger = who("4242").unwrap();
        assert_eq!((stranger.uid, stranger.gid), (4242, 0));
        assert_eq!(stranger.home, b"/");
    }

    #[test]
    fn the_number_that_means_unchanged_is_nobodys() {
        assert!(who("4294967295").is_err());
        assert!(who("minus").is_err());
        assert!(who("0:4294967295").is_err());
        assert!(who("99999999999").is_err());
        assert!(who("-1").is_err());
        assert!(who("+5").is_err());
    }

    #[test]
    fn root_exists_without_files() {
        assert_eq!(resolve("root", b"", b"").unwrap(), Identity::root());
        assert_eq!(resolve("0", b"", b"").unwrap(), Identity::root());
        assert_eq!(who("nohome").unwrap().home, b"/");
    }

    proptest! {
        #[test]
        fn no_content_panics_or_gives_the_forbidden_number(
            spec in "[a-z0-9:]{0,12}",
            passwd in proptest::collection::vec(any::<u8>(), 0..400),
            group in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            if let Ok(identity) = resolve(&spec, &passwd, &group) {
                prop_assert!(identity.uid != NO_ID && identity.gid != NO_ID);
                prop_assert!(!identity.home.contains(&0));
                prop_assert!(identity.groups.len() <= MAX_GROUPS);
            }
        }
    }
}
