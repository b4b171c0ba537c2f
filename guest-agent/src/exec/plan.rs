//! From a call of the host to a program that can be started: checked, with environment, user and
//! the places where the program may lie. And back: from a failed start to the typed answer.

use std::ffi::CString;
use std::time::{Duration, Instant};

use belljar_protocol::v1::{self, spawn_failure::Kind};

use super::lifecycle::Limit;
use super::users::Identity;
use crate::sys::spawn::{Failure, Ids, Program, ResourceLimit, Step};

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// TERM of programs on a terminal.
const DEFAULT_TERM: &[u8] = b"xterm-256color";

/// Longest path that the kernel takes, bytes (PATH_MAX without its NUL).
const MAX_PATH: usize = 4095;

/// Names of resources and their numbers, asm-generic/resource.h.
const RESOURCES: [(&str, u32); 16] = [
    ("cpu", 0),
    ("fsize", 1),
    ("data", 2),
    ("stack", 3),
    ("core", 4),
    ("rss", 5),
    ("nproc", 6),
    ("nofile", 7),
    ("memlock", 8),
    ("as", 9),
    ("locks", 10),
    ("sigpending", 11),
    ("msgqueue", 12),
    ("nice", 13),
    ("rtprio", 14),
    ("rttime", 15),
];

/// Most directories of PATH that are tried.
const MAX_CANDIDATES: usize = 64;

/// A field of the call has a value that can never work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Invalid {
    #[error("argv is empty: name a program")]
    NoProgram,
    #[error("argv[{0}] holds a NUL byte")]
    Argument(usize),
    #[error("env[{0}] is not NAME=value without NUL bytes")]
    Environment(usize),
    #[error("cwd holds a NUL byte, or is longer than a path can be")]
    Directory,
    #[error("rlimits: no resource is called {0:?}")]
    ResourceName(String),
    #[error("rlimits: the soft limit of {0} is above its hard limit")]
    ResourceRange(String),
}

/// Prepares a program to be run as `identity`.
pub(crate) fn program(exec: &v1::Exec, identity: Identity) -> Result<Program, Invalid> {
    let name = exec.argv.first().ok_or(Invalid::NoProgram)?;
    let argv = exec
        .argv
        .iter()
        .enumerate()
        .map(|(at, argument)| c_string(argument).ok_or(Invalid::Argument(at)))
        .collect::<Result<_, _>>()?;
    let env = environment(&exec.env, &identity, exec.terminal.is_some())?;
    let path = env
        .iter()
        .find_map(|(name, entry)| (name == b"PATH").then(|| entry.get(5..)).flatten());
    let candidates = candidates(name, path.unwrap_or(DEFAULT_PATH));
    let cwd = match exec.cwd.as_slice() {
        [] => c"/".to_owned(),
        cwd if cwd.len() > MAX_PATH => return Err(Invalid::Directory),
        cwd => c_string(cwd).ok_or(Invalid::Directory)?,
    };
    let is_plain_root = identity.uid == 0 && identity.gid == 0 && identity.groups.is_empty();
    Ok(Program {
        candidates,
        argv,
        env: env
            .into_iter()
            .filter_map(|(_, entry)| c_string(&entry))
            .collect(),
        cwd,
        ids: (!is_plain_root).then_some(Ids {
            uid: identity.uid,
            gid: identity.gid,
            groups: identity.groups,
        }),
        limits: resource_limits(&exec.rlimits)?,
        has_terminal: exec.terminal.is_some(),
    })
}

/// The time limit of a program that starts now. 0: none.
pub(crate) fn limit(time_limit_ms: u64, grace_ms: u64, now: Instant) -> Option<Limit> {
    if time_limit_ms == 0 {
        return None;
    }
    // A limit beyond what the clock can say is none.
    let at = now.checked_add(Duration::from_millis(time_limit_ms))?;
    let grace = Duration::from_millis(grace_ms);
    Some(Limit { at, grace })
}

/// Resource limits by number.
fn resource_limits(rlimits: &[v1::Rlimit]) -> Result<Vec<ResourceLimit>, Invalid> {
    let one = |limit: &v1::Rlimit| {
        let known = RESOURCES.iter().find(|(name, _)| *name == limit.name);
        let (_, resource) = known.ok_or_else(|| Invalid::ResourceName(limit.name.clone()))?;
        if limit.soft > limit.hard {
            return Err(Invalid::ResourceRange(limit.name.clone()));
        }
        Ok(ResourceLimit {
            resource: *resource,
            values: [limit.soft, limit.hard],
        })
    };
    rlimits.iter().map(one).collect()
}

fn c_string(bytes: &[u8]) -> Option<CString> {
    CString::new(bytes).ok()
}

/// (name, whole entry) of every variable, each name once.
type Environment = Vec<(Vec<u8>, Vec<u8>)>;

fn environment(
    given: &[Vec<u8>],
    identity: &Identity,
    has_terminal: bool,
) -> Result<Environment, Invalid> {
    let mut env = Environment::new();
    let defaults: [(&[u8], &[u8]); 5] = [
        (b"PATH", DEFAULT_PATH),
        (b"HOME", &identity.home),
        (b"USER", &identity.name),
        (b"LOGNAME", &identity.name),
        (b"TERM", DEFAULT_TERM),
    ];
    let count = if has_terminal { 5 } else { 4 };
    for (name, value) in defaults.into_iter().take(count) {
        env.push((name.to_vec(), [name, b"=", value].concat()));
    }
    for (at, entry) in given.iter().enumerate() {
        let split = entry.iter().position(|&byte| byte == b'=');
        let name = split.and_then(|split| entry.get(..split));
        let name = name.filter(|name| !name.is_empty() && !entry.contains(&0));
        let name = name.ok_or(Invalid::Environment(at))?;
        match env.iter_mut().find(|(known, _)| known == name) {
            Some(known) => known.1.clone_from(entry),
            None => env.push((name.to_vec(), entry.clone())),
        }
    }
    Ok(env)
}

fn candidates(name: &[u8], path: &[u8]) -> Vec<CString> {
    if name.contains(&b'/') {
        // Of one that is too long, enough that the system says so.
        let name = name.get(..MAX_PATH + 2).unwrap_or(name);
        return c_string(name).into_iter().collect();
    }
    if name.is_empty() {
        return Vec::new();
    }
    path.split(|&byte| byte == b':')
        .take(MAX_CANDIDATES)
        .filter(|folder| folder.len().saturating_add(name.len()) < MAX_PATH)
        .filter_map(|folder| {
            // An empty folder in PATH is the current one, POSIX 2018 §8.3.
            let folder = if folder.is_empty() { b"." } else { folder };
            c_string(&[folder, b"/", name].concat())
        })
        .collect()
}

/// Tells why a program could not be started, in the terms of the protocol.
pub(crate) fn failure(failure: &Failure, exec: &v1::Exec) -> v1::SpawnFailure {
    let errno = failure.errno;
    let kind = match (failure.step, errno) {
        (_, libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE) => Kind::NoResources,
        (Step::Directory, _) => Kind::BadCwd,
        (Step::Execute, libc::ENOENT | libc::ENOTDIR) => Kind::NotFound,
        (
            Step::Execute,
            libc::EACCES
            | libc::EPERM
            | libc::ENOEXEC
            | libc::EISDIR
            | libc::ELIBBAD
            | libc::EINVAL
            | libc::ELOOP
            | libc::ETXTBSY,
        ) => Kind::NotExecutable,
        _ => Kind::Other,
    };
    let what = match failure.step {
        Step::Directory => String::from_utf8_lossy(&exec.cwd),
        _ => String::from_utf8_lossy(exec.argv.first().map_or(&[][..], Vec::as_slice)),
    };
    let reason = rustix::io::Errno::from_raw_os_error(errno);
    let message = match (failure.step, kind) {
        (Step::Execute, Kind::NotFound) if !what.contains('/') => {
            format!("{what:?}: no such program in PATH of the guest")
        }
        (Step::Execute, Kind::NotFound) if std::path::Path::new(&*what).exists() => {
            format!("{what:?}: its interpreter or loader is not in the guest")
        }
        (Step::Execute, _) => format!("cannot execute {what:?} in the guest: {reason}"),
        (Step::Directory, _) => {
            format!("cannot change to directory {what:?} in the guest: {reason}")
        }
        (Step::Clone, _) => format!("cannot start a process for {what:?} in the guest: {reason}"),
        (step, _) => format!("cannot prepare the process for {what:?} ({step:?}): {reason}"),
    };
    v1::SpawnFailure {
        kind: kind.into(),
        errno: errno.unsigned_abs(),
        message,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exec(argv: &[&str], env: &[&str]) -> v1::Exec {
        v1::Exec {
            argv: argv.iter().map(|word| word.as_bytes().to_vec()).collect(),
            env: env.iter().map(|word| word.as_bytes().to_vec()).collect(),
            ..Default::default()
        }
    }

    fn texts(strings: &[CString]) -> Vec<&str> {
        strings.iter().map(|text| text.to_str().unwrap()).collect()
    }

    #[test]
    fn defaults_are_set_unless_given_and_the_last_one_counts() {
        let call = exec(&["x"], &["A=1", "HOME=/h", "A=2", "B="]);
        let program = program(&call, Identity::root()).unwrap();
        let path = format!("PATH={}", std::str::from_utf8(DEFAULT_PATH).unwrap());
        assert_eq!(
            texts(&program.env),
            [&path, "HOME=/h", "USER=root", "LOGNAME=root", "A=2", "B="]
        );
        assert_eq!(program.cwd.as_c_str(), c"/");
        assert_eq!(program.ids, None);
    }

    #[test]
    fn the_path_of_the_call_is_searched() {
        let call = exec(&["ls", "-l"], &["PATH=/a:/b::"]);
        let found = program(&call, Identity::root()).unwrap();
        assert_eq!(texts(&found.candidates), ["/a/ls", "/b/ls", "./ls", "./ls"]);
        assert_eq!(texts(&found.argv), ["ls", "-l"]);
        let call = exec(&["./here"], &["PATH=/a"]);
        let found = program(&call, Identity::root()).unwrap();
        assert_eq!(texts(&found.candidates), ["./here"]);
    }

    #[test]
    fn values_that_can_never_work_are_named() {
        let invalid = |call: &v1::Exec| program(call, Identity::root()).unwrap_err();
        assert_eq!(invalid(&exec(&[], &[])), Invalid::NoProgram);
        assert_eq!(invalid(&exec(&["a", "b\0"], &[])), Invalid::Argument(1));
        assert_eq!(
            invalid(&exec(&["a"], &["A=1", "B"])),
            Invalid::Environment(1)
        );
        assert_eq!(invalid(&exec(&["a"], &["=x"])), Invalid::Environment(0));
        assert_eq!(invalid(&exec(&["a"], &["A=\0"])), Invalid::Environment(0));
        let call = v1::Exec {
            cwd: b"/a\0b".to_vec(),
            ..exec(&["a"], &[])
        };
        assert_eq!(invalid(&call), Invalid::Directory);
    }

    #[test]
    fn failures_get_the_shells_kinds() {
        let kind = |step, errno| failure(&Failure { step, errno }, &exec(&["/no/x"], &[])).kind();
        assert_eq!(kind(Step::Execute, libc::ENOENT), Kind::NotFound);
        assert_eq!(kind(Step::Execute, libc::EACCES), Kind::NotExecutable);
        assert_eq!(kind(Step::Execute, libc::E2BIG), Kind::Other);
        assert_eq!(kind(Step::Execute, libc::ENOMEM), Kind::NoResources);
        assert_eq!(kind(Step::Directory, libc::ENOENT), Kind::BadCwd);
        assert_eq!(kind(Step::Clone, libc::EAGAIN), Kind::NoResources);
    }

    #[test]
    fn limits_are_none_or_whatever_the_clock_can_say() {
        let now = Instant::now();
        assert!(limit(0, 1, now).is_none());
        assert!(limit(u64::MAX, u64::MAX, now).is_none_or(|limit| limit.at > now));
    }

    proptest! {
        #[test]
        fn any_call_is_prepared_or_refused(
            argv in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..4),
            env in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..8),
            cwd in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let call = v1::Exec { argv, env, cwd, ..Default::default() };
            if let Ok(program) = program(&call, Identity::root()) {
                prop_assert_eq!(program.argv.len(), call.argv.len());
                let names: Vec<_> = program.env.iter()
                    .map(|entry| entry.to_bytes().split(|&b| b == b'=').next().unwrap().to_vec())
                    .collect();
                let mut unique = names.clone();
                unique.sort();
                unique.dedup();
                prop_assert_eq!(unique.len(), names.len());
            }
        }
    }
}
