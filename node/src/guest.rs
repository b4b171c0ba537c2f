//! Calls to the agent of a found sandbox, and why they fail.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_protocol::client::CallError;
use belljar_protocol::v1::error::Code;

use crate::registry::{ConnectError, Found};

/// A guest that is up answers within this time.
pub const CALL_LIMIT: Duration = Duration::from_secs(10);

/// A call to a guest failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("sandbox {id}: {}", said(source))]
    Call { id: String, source: CallError },
    #[error("sandbox {id}: {}", said(source))]
    NoProcess { id: String, source: CallError },
}

/// What the guest's system refused is told as it was told: nothing is wrong with call or agent.
fn said(error: &CallError) -> String {
    match error {
        CallError::Refused {
            code: Code::System | Code::NotFound,
            message,
            ..
        } => message.clone(),
        other => other.to_string(),
    }
}

impl GuestError {
    /// What the user can do about it, if anything is known to help.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Connect(error) => Some(error.remedy()),
            Self::NoProcess { id, .. } => Some(lists_processes(id)),
            Self::Call { id, source } => match source {
                CallError::TooOld { .. } => Some(format!(
                    "its agent is older than this program: a new sandbox has the present one, {id} keeps its own"
                )),
                CallError::Timeout { .. } | CallError::Closed { .. } => Some(format!(
                    "'belljar debug state {id}' tells what is the matter with the guest"
                )),
                _ => None,
            },
        }
    }

    /// The code and errno with which the agent refused, if it did.
    #[must_use]
    pub fn refusal(&self) -> Option<(Code, u32)> {
        match self {
            Self::Call {
                source: CallError::Refused { code, errno, .. },
                ..
            }
            | Self::NoProcess {
                source: CallError::Refused { code, errno, .. },
                ..
            } => Some((*code, *errno)),
            _ => None,
        }
    }

    /// Of a call about a process: what the agent has not found is that.
    #[must_use]
    pub(crate) fn of_process(self) -> Self {
        match self {
            Self::Call {
                id,
                source:
                    source @ CallError::Refused {
                        code: Code::NotFound,
                        ..
                    },
            } => Self::NoProcess { id, source },
            other => other,
        }
    }
}

/// What helps whoever named a process that there is not.
pub(crate) fn lists_processes(id: &str) -> String {
    format!("'belljar ps -a {id}' lists the processes")
}

/// When a call that begins now should be answered.
#[must_use]
pub fn soon() -> Instant {
    Instant::now() + CALL_LIMIT
}

/// Makes a connection to the agent and one call on it. `deadline` bounds both; `None`: only the connecting.
///
/// # Errors
/// The sandbox does not run, or the call failed.
pub fn call<T>(
    found: &Found,
    deadline: Option<Instant>,
    call: impl FnOnce(UnixStream, Option<Instant>) -> Result<T, CallError>,
) -> Result<T, GuestError> {
    let stream = found.agent(deadline.unwrap_or_else(soon))?;
    call(stream, deadline).map_err(|source| GuestError::Call {
        id: found.called(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: Code) -> GuestError {
        GuestError::Call {
            id: "box".into(),
            source: CallError::Refused {
                code,
                message: "no such process".into(),
                errno: 0,
            },
        }
    }

    #[test]
    fn an_unknown_process_has_a_remedy_that_names_the_sandbox() {
        let error = refused(Code::NotFound).of_process();
        assert_eq!(error.to_string(), "sandbox box: no such process");
        assert_eq!(error.refusal(), Some((Code::NotFound, 0)));
        assert!(error.remedy().unwrap().contains("'belljar ps -a box'"));
        // A watch, for instance, is no process.
        assert_eq!(refused(Code::NotFound).remedy(), None);
        assert_eq!(refused(Code::Busy).of_process().remedy(), None);
    }

    #[test]
    fn a_silent_agent_is_looked_at_from_outside() {
        let error = GuestError::Call {
            id: "box".into(),
            source: CallError::Closed { doing: "ping" },
        };
        assert!(
            error
                .remedy()
                .unwrap()
                .contains("'belljar debug state box'")
        );
    }
}
