//! How a session ended.

use belljar_protocol::v1::{self, end::How};

use super::session::Started;

/// How a session ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// As the guest says, with what it used.
    Ended { how: How, end: v1::End },
    /// It was started detached, or was found.
    Started(Started),
    /// The user left it, or all that was kept has been read. It goes on.
    Detached,
    /// This host's limit passed, and the guest did not even answer.
    TimedOut,
    /// Whoever read the output is gone.
    OutputClosed,
    /// The user gave up with this signal.
    GivenUp(i32),
}

impl Outcome {
    /// The end that an agent told.
    #[must_use]
    pub fn of(end: v1::End) -> Self {
        let how = end.how.clone().unwrap_or_else(|| {
            How::Lost(v1::Lost {
                reason: "the agent told an end that this program does not know".to_owned(),
            })
        });
        Self::Ended { how, end }
    }

    /// The limit passed: the agent ended the process, or did not answer any more.
    pub(super) fn is_timed_out(&self) -> bool {
        let how = match self {
            Self::Ended { how, .. } => Some(how),
            _ => None,
        };
        matches!(self, Self::TimedOut) || matches!(how, Some(How::TimedOut(_)))
    }

    /// The exit status of a command line: the process's own, 128+n after a signal, 124 for the time limit,
    /// 125 if the end is not known, 0 for one that goes on.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        let after_signal = |number: u32| u8::try_from(number.saturating_add(128)).unwrap_or(255);
        match self {
            Self::Ended { how, .. } => exit_status(how),
            Self::Started(_) | Self::Detached => 0,
            Self::TimedOut => 124,
            Self::OutputClosed => after_signal(13),
            Self::GivenUp(signal) => after_signal(u32::try_from(*signal).unwrap_or(0)),
        }
    }
}

/// The exit status of a command line for the end of a process in the guest.
#[must_use]
pub fn exit_status(how: &How) -> u8 {
    let after_signal = |number: u32| u8::try_from(number.saturating_add(128)).unwrap_or(255);
    match how {
        How::Exited(exited) => u8::try_from(exited.code).unwrap_or(255),
        How::Signalled(signalled) => after_signal(signalled.number),
        How::TimedOut(_) => 124,
        How::OutOfMemory(_) => after_signal(9),
        How::Lost(_) => 125,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_status() {
        let signalled = How::Signalled(v1::Signalled {
            number: 15,
            core_dumped: false,
        });
        for (how, status) in [
            (How::Exited(v1::Exited { code: 0 }), 0),
            (How::Exited(v1::Exited { code: 70_000 }), 255),
            (signalled, 143),
            (How::TimedOut(v1::TimedOut { killed: true }), 124),
            (How::OutOfMemory(v1::OutOfMemory {}), 137),
        ] {
            let end = v1::End {
                how: Some(how),
                ..v1::End::default()
            };
            assert_eq!(Outcome::of(end).exit_status(), status);
        }
        assert_eq!(Outcome::of(v1::End::default()).exit_status(), 125);
        assert_eq!(Outcome::GivenUp(2).exit_status(), 130);
        assert_eq!(Outcome::Detached.exit_status(), 0);
    }
}
