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
}

/// What the guest's system refused is told as it was told: nothing is wrong with call or agent.
fn said(error: &CallError) -> String {
    match error {
        CallError::Refused {
            code: Code::System,
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
            Self::Call { id, source } => match source {
                CallError::TooOld { .. } => Some(format!(
                    "its agent is older than this program: a new sandbox has the present one, {id} keeps its own"
                )),
                CallError::Timeout { .. } | CallError::Closed { .. } => Some(format!(
                    "'belljar console {id}' shows what the guest says, 'belljar inspect {id}' how it does"
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
            } => Some((*code, *errno)),
            _ => None,
        }
    }
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
