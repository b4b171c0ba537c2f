//! The calls that are one question and one answer, to a sandbox that was found.

use std::os::unix::net::UnixStream;
use std::str::FromStr;
use std::time::{Duration, Instant};

use belljar_protocol::client::{CallError, process};
use belljar_protocol::v1::{self, process_ref::Ref};

use crate::guest::{GuestError, call, soon};
use crate::registry::Found;

/// Which process: its id, its name, or `pid:N` by its number in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector(Ref);

/// No way to name a process.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("write the id or the name of a process, or pid:N")]
pub struct SelectorError;

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        if text.is_empty() {
            return Err(SelectorError);
        }
        if let Some(pid) = text.strip_prefix("pid:") {
            return pid
                .parse()
                .map(|pid| Self(Ref::Pid(pid)))
                .map_err(|_| SelectorError);
        }
        let number = text.bytes().all(|byte| byte.is_ascii_digit());
        Ok(Self(if number {
            Ref::Id(text.parse().map_err(|_| SelectorError)?)
        } else {
            Ref::Name(text.to_owned())
        }))
    }
}

impl Selector {
    /// The process with this id.
    #[must_use]
    pub const fn id(id: u64) -> Self {
        Self(Ref::Id(id))
    }

    /// For the agent.
    #[must_use]
    pub fn message(&self) -> v1::ProcessRef {
        v1::ProcessRef {
            r#ref: Some(self.0.clone()),
        }
    }
}

/// A name that a process may be given: unlike an id, and fit for every list.
///
/// # Errors
/// Why it may not.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > 128 {
        return Err("a name has 1 to 128 bytes");
    }
    if name.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("a name is not a number, which would be an id");
    }
    let good = |c: char| c.is_ascii_alphanumeric() || "._-/@+".contains(c);
    if !name.chars().all(good) {
        return Err("a name has letters, digits and any of ._-/@+");
    }
    Ok(())
}

/// What runs in the guest; with `ended` also what has ended and is kept.
///
/// # Errors
/// The guest cannot be reached, or refuses.
pub fn list(found: &Found, ended: bool) -> Result<Vec<v1::ProcessInfo>, GuestError> {
    call(found, Some(soon()), |stream, deadline| {
        process::list(stream, ended, deadline)
    })
}

/// A call about one process.
fn on_process<T>(
    found: &Found,
    deadline: Option<Instant>,
    carry_out: impl FnOnce(UnixStream, Option<Instant>) -> Result<T, CallError>,
) -> Result<T, GuestError> {
    call(found, deadline, carry_out).map_err(GuestError::of_process)
}

/// All about one process.
///
/// # Errors
/// There is none, or the guest cannot be reached.
pub fn inspect(found: &Found, which: &Selector) -> Result<v1::ProcessInfo, GuestError> {
    on_process(found, Some(soon()), |stream, deadline| {
        process::inspect(stream, which.message(), deadline)
    })
}

/// Sends a signal. True: it had ended before.
///
/// # Errors
/// There is no such process, or the guest cannot be reached.
pub fn signal(
    found: &Found,
    which: &Selector,
    number: i32,
    scope: v1::signal::Scope,
) -> Result<bool, GuestError> {
    let signal = v1::Signal {
        process: Some(which.message()),
        number: number.unsigned_abs(),
        scope: scope.into(),
    };
    on_process(found, Some(soon()), |stream, deadline| {
        process::signal(stream, signal, deadline)
    })
}

/// Waits for the end of a process; `None` if it still runs after `limit`.
///
/// # Errors
/// There is no such process, or the guest is gone.
pub fn wait(
    found: &Found,
    which: &Selector,
    limit: Option<Duration>,
) -> Result<Option<v1::ProcessInfo>, GuestError> {
    on_process(found, None, |stream, _| {
        process::wait(stream, which.message(), limit)
    })
}

/// Drops what is kept of a process that has ended.
///
/// # Errors
/// It runs, or there is none, or the guest cannot be reached.
pub fn forget(found: &Found, which: &Selector) -> Result<(), GuestError> {
    on_process(found, Some(soon()), |stream, deadline| {
        process::forget(stream, which.message(), deadline)
    })
}

/// A terminal's screen as it is now, as escape sequences that draw it, with so many lines from above it.
///
/// # Errors
/// There is no such process, or it has no terminal.
pub fn screen(found: &Found, which: &Selector, scrollback: u32) -> Result<v1::Screen, GuestError> {
    let screen = v1::GetScreen {
        process: Some(which.message()),
        scrollback,
        formatted: true,
    };
    on_process(found, Some(soon()), |stream, deadline| {
        process::screen(stream, screen, deadline)
    })
}

/// Sets a terminal's size.
///
/// # Errors
/// There is no such process, or it has no terminal.
pub fn resize(found: &Found, which: &Selector, size: v1::Terminal) -> Result<(), GuestError> {
    on_process(found, Some(soon()), |stream, deadline| {
        process::resize(stream, which.message(), size, deadline)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_named_by_id_name_or_pid() {
        let of = |text: &str| text.parse::<Selector>().map(|selector| selector.0);
        assert_eq!(of("5"), Ok(Ref::Id(5)));
        assert_eq!(of("web-1"), Ok(Ref::Name("web-1".into())));
        assert_eq!(of("pid:17"), Ok(Ref::Pid(17)));
        for text in ["", "pid:", "pid:x", "99999999999999999999999"] {
            assert!(of(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_cannot_be_taken_for_ids_or_break_a_list() {
        for name in ["web", "a.b_c-d/e@f+1", "1a"] {
            assert_eq!(check_name(name), Ok(()), "{name}");
        }
        for name in ["", "12", "a b", "a\nb", "~x", "pid:1", &"x".repeat(129)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }
}
