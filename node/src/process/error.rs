//! What goes wrong with a process in a guest.

use std::io;
use std::time::Duration;

use belljar_protocol::frame::{FrameError, MessageError, MessageTooLong};
use belljar_protocol::v1;

use crate::guest::lists_processes;

/// Every agent says so when it refuses to start something because of that.
const FROZEN: &str = "programs are frozen";

/// A session came to no good end.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("{}", spawn_failure(.0))]
    Spawn(v1::SpawnFailure),
    #[error("the agent refused: {message}")]
    Refused {
        code: v1::error::Code,
        message: String,
    },
    #[error("the guest's agent is of generation {generation}, too old for this: {feature}")]
    TooOld {
        feature: &'static str,
        generation: u32,
    },
    #[error("the connection to the guest was cut before the command was started")]
    CutBeforeStart,
    /// Agents of generation 1 end a process with its connection.
    #[error(
        "the connection to the guest was cut, and its agent (generation {generation}) cannot take it up again"
    )]
    Cut { generation: u32 },
    #[error(
        "the process is not there any more: it was killed while the connection was cut, or the guest started anew"
    )]
    Vanished,
    #[error("no connection to the guest for {} s: {reason}", .limit.as_secs())]
    Unreachable { limit: Duration, reason: String },
    #[error("the guest is gone: {0}")]
    Gone(String),
    #[error("the agent did not answer within {} s", .0.as_secs())]
    NoAnswer(Duration),
    #[error("unexpected answer {0:?} of the VMM")]
    Greeting(String),
    #[error("the agent broke the protocol: {0}")]
    Frame(#[from] FrameError),
    #[error("the agent broke the protocol: {0}")]
    Decode(#[from] MessageError),
    #[error("the agent broke the protocol: a byte count that cannot be")]
    Offset,
    #[error("the agent answered something else than asked")]
    Unexpected,
    #[error("the session has failed before")]
    Failed,
    #[error("the command is too long: {0}")]
    TooLong(#[from] MessageTooLong),
    #[error("cannot pass on input and output: {0}")]
    Io(#[from] io::Error),
}

fn spawn_failure(failure: &v1::SpawnFailure) -> String {
    if failure.message.is_empty() {
        format!("the command could not be started (errno {})", failure.errno)
    } else {
        failure.message.clone()
    }
}

impl SessionError {
    /// What the user of this sandbox can do about it, if anything is known to help.
    #[must_use]
    pub fn remedy(&self, called: &str) -> Option<String> {
        match self {
            Self::TooOld { .. } => {
                Some("a new sandbox has the present agent; old ones keep theirs".to_owned())
            }
            Self::Refused {
                code: v1::error::Code::NotFound,
                ..
            } => Some(lists_processes(called)),
            Self::Refused { message, .. } if message.contains(FROZEN) => Some(format!(
                "'belljar system thaw {called}' lets its programs go on"
            )),
            Self::Gone(_)
            | Self::Unreachable { .. }
            | Self::NoAnswer(_)
            | Self::Cut { .. }
            | Self::CutBeforeStart => Some(format!(
                "'belljar debug state {called}' tells what is the matter with the guest"
            )),
            _ => None,
        }
    }

    /// The exit status of a command line: 127 not found, 126 not executable, else 125.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        use v1::spawn_failure::Kind;
        match self {
            Self::Spawn(failure) => match failure.kind() {
                Kind::NotFound => 127,
                Kind::NotExecutable => 126,
                _ => 125,
            },
            _ => 125,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_name_the_sandbox() {
        let refused = |code, message: &str| SessionError::Refused {
            code,
            message: message.to_owned(),
        };
        let frozen = "all programs are frozen, and none can be started until they are thawed";
        for (error, remedy) in [
            (
                refused(v1::error::Code::NotFound, "no such process"),
                "belljar ps -a web",
            ),
            (
                refused(v1::error::Code::Conflict, frozen),
                "belljar system thaw web",
            ),
            (
                SessionError::NoAnswer(Duration::from_secs(30)),
                "belljar debug state web",
            ),
        ] {
            let said = error.remedy("web").unwrap();
            assert!(said.contains(remedy), "{said}");
        }
        assert_eq!(refused(v1::error::Code::Busy, "full").remedy("web"), None);
    }
}
