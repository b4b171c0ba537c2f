//! What to run, as a user says it, and as the agent wants it.

use std::str::FromStr;
use std::time::Duration;

use belljar_protocol::v1;

use super::GRACE;
use super::session::Session;

/// Names that begin so were made up here, for starts that may have to be repeated.
const MADE_UP: char = '~';
/// Bytes of the key that lets a connection take over from one that broke.
const KEY: usize = 16;
/// How long what a command without a name has said is kept after its end: it was told already.
const KEEP_UNNAMED_MS: u64 = 10_000;

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct ExecSpec {
    /// Program and arguments; no shell is involved.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// Empty: `/`.
    pub workdir: Vec<u8>,
    /// `USER` or `USER:GROUP`, names or numbers. Empty: root.
    pub user: String,
    /// Names or numbers of additional groups.
    pub groups: Vec<String>,
    pub timeout: Option<Duration>,
    /// Between SIGTERM and SIGKILL when that is over; `None`: 2 s.
    pub grace: Option<Duration>,
    /// It has an input; otherwise it reads nothing.
    pub stdin: bool,
    /// Empty: none.
    pub name: String,
    /// Instead of telling about one of that name that has ended.
    pub replace_ended: bool,
    /// Goes on by itself; the session is over when it has started.
    pub detached: bool,
    /// It gets a terminal of that size.
    pub terminal: Option<v1::Terminal>,
    pub rlimits: Vec<Rlimit>,
    /// Of it and all its descendants; 0: no limit of its own.
    pub limits: v1::Limits,
    /// Bytes of output kept for later readers; 0: as the agent likes.
    pub ring_bytes: u64,
    /// How long that is kept after the end.
    pub keep: Option<Duration>,
}

impl ExecSpec {
    /// A session that starts it.
    #[must_use]
    pub fn session(&self) -> Session {
        Session::exec(self.request(random()), self.needs())
    }

    /// What an agent of generation 1 would ignore.
    fn needs(&self) -> Option<&'static str> {
        let limited = self.limits != v1::Limits::default();
        [
            (self.terminal.is_some(), "terminals"),
            (self.detached, "detached processes"),
            (!self.name.is_empty(), "names of processes"),
            (limited || !self.rlimits.is_empty(), "limits of processes"),
            (!self.groups.is_empty(), "additional groups"),
        ]
        .into_iter()
        .find_map(|(wanted, feature)| wanted.then_some(feature))
    }

    fn request(&self, key: [u8; KEY]) -> v1::Exec {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let unnamed = self.name.is_empty();
        let name = if unnamed {
            let mut name = String::from(MADE_UP);
            name.extend(key.iter().map(|byte| format!("{byte:02x}")));
            name
        } else {
            self.name.clone()
        };
        let stdin = if self.stdin || self.terminal.is_some() {
            v1::exec::Stdin::Stream
        } else {
            v1::exec::Stdin::Closed
        };
        let short = unnamed && !self.detached;
        v1::Exec {
            argv: self.argv.clone(),
            env: self.env.clone(),
            cwd: self.workdir.clone(),
            user: self.user.clone(),
            stdin: stdin.into(),
            // 0 would mean no limit at all.
            time_limit_ms: self.timeout.map_or(0, |limit| millis(limit).max(1)),
            grace_ms: Some(millis(self.grace.unwrap_or(GRACE))),
            name,
            replace_ended: self.replace_ended,
            detached: self.detached,
            terminal: self.terminal,
            ring_bytes: self.ring_bytes,
            rlimits: self.rlimits.iter().map(Rlimit::message).collect(),
            limits: (self.limits != v1::Limits::default()).then_some(self.limits),
            keep_ms: self
                .keep
                .map(millis)
                .or_else(|| short.then_some(KEEP_UNNAMED_MS)),
            owner_key: key.to_vec(),
            groups: self.groups.clone(),
        }
    }
}

/// The name of a process as a user gave it; empty if it was made up.
#[must_use]
pub fn given_name(name: &str) -> &str {
    if name.starts_with(MADE_UP) { "" } else { name }
}

/// Bytes that nobody can guess, or, on a kernel without any, that are unlikely to come twice.
fn random() -> [u8; KEY] {
    let mut bytes = [0; KEY];
    let flags = rustix::rand::GetRandomFlags::empty();
    if rustix::rand::getrandom(&mut bytes, flags).is_err() {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let seed = now.as_nanos() ^ (u128::from(std::process::id()) << 96);
        bytes = seed.to_ne_bytes();
    }
    bytes
}

/// A resource limit, `setrlimit(2)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rlimit {
    /// Without `RLIMIT_`, lower case.
    pub name: String,
    /// `u64::MAX`: unlimited.
    pub soft: u64,
    pub hard: u64,
}

/// No resource limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no limit: write NAME=SOFT[:HARD], for example nofile=1024 or core=0:unlimited")]
pub struct RlimitError(String);

impl FromStr for Rlimit {
    type Err = RlimitError;

    /// `NAME=SOFT[:HARD]`, with `unlimited` for a number.
    fn from_str(text: &str) -> Result<Self, RlimitError> {
        let wrong = || RlimitError(text.to_owned());
        let number = |text: &str| match text {
            "unlimited" | "-1" => Ok(u64::MAX),
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().map_err(|_| wrong())
            }
            _ => Err(wrong()),
        };
        let (name, values) = text.split_once('=').ok_or_else(wrong)?;
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_lowercase()) {
            return Err(wrong());
        }
        let (soft, hard) = match values.split_once(':') {
            Some((soft, hard)) => (number(soft)?, number(hard)?),
            None => (number(values)?, number(values)?),
        };
        if soft > hard {
            return Err(wrong());
        }
        Ok(Self {
            name: name.to_owned(),
            soft,
            hard,
        })
    }
}

impl Rlimit {
    fn message(&self) -> v1::Rlimit {
        v1::Rlimit {
            name: self.name.clone(),
            soft: self.soft,
            hard: self.hard,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read() {
        let limit: Rlimit = "nofile=10:unlimited".parse().unwrap();
        assert_eq!((limit.soft, limit.hard), (10, u64::MAX));
        let limit: Rlimit = "core=0".parse().unwrap();
        assert_eq!(
            (limit.name.as_str(), limit.soft, limit.hard),
            ("core", 0, 0)
        );
        for text in [
            "",
            "nofile",
            "=1",
            "nofile=",
            "nofile=x",
            "nofile=2:1",
            "NO=1",
            "a=+1",
        ] {
            assert!(text.parse::<Rlimit>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_old_agents_would_ignore_is_asked_for_first() {
        let plain = ExecSpec {
            argv: vec![b"true".to_vec()],
            ..ExecSpec::default()
        };
        assert_eq!(plain.needs(), None);
        let named = ExecSpec {
            name: "web".into(),
            ..plain.clone()
        };
        assert!(named.needs().is_some());
        let limited = ExecSpec {
            limits: v1::Limits {
                pids: 5,
                ..v1::Limits::default()
            },
            ..plain
        };
        assert!(limited.needs().is_some());
    }

    #[test]
    fn the_grace_is_as_said_and_may_be_none_at_all() {
        let grace = |grace| {
            let spec = ExecSpec {
                grace,
                ..ExecSpec::default()
            };
            spec.request([7; KEY]).grace_ms
        };
        assert_eq!(grace(None), Some(2000));
        assert_eq!(grace(Some(Duration::from_millis(7500))), Some(7500));
        assert_eq!(grace(Some(Duration::ZERO)), Some(0));
    }

    #[test]
    fn made_up_names_are_not_shown() {
        let spec = ExecSpec::default();
        let request = spec.request([7; KEY]);
        assert_eq!(request.name.len(), 1 + 2 * KEY);
        assert_eq!(given_name(&request.name), "");
        assert_eq!(given_name("web"), "web");
        assert_ne!(random(), random());
    }
}
