//! Where a reader stands in the two output streams.

use belljar_protocol::v1::{self, Position, position::At};

use super::super::error::SessionError;

/// One of the output streams of a process. On a terminal everything is `Stdout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    Stdout,
    Stderr,
}

impl Channel {
    pub(super) fn of(stream: v1::Stream) -> Self {
        match stream {
            v1::Stream::Stderr => Self::Stderr,
            v1::Stream::Stdout | v1::Stream::Unspecified => Self::Stdout,
        }
    }
}

#[derive(Debug)]
struct Cursor {
    /// Where the user wants to begin.
    wanted: Option<Position>,
    /// Of the next byte, once it is known.
    at: Option<u64>,
}

impl Cursor {
    const fn new(wanted: Option<Position>) -> Self {
        Self { wanted, at: None }
    }
}

/// The offsets of the next byte of each stream.
#[derive(Debug)]
pub(super) struct Cursors {
    stdout: Cursor,
    stderr: Cursor,
}

impl Cursors {
    pub(super) const fn new(stdout: Option<Position>, stderr: Option<Position>) -> Self {
        Self {
            stdout: Cursor::new(stdout),
            stderr: Cursor::new(stderr),
        }
    }

    fn of(&mut self, channel: Channel) -> &mut Cursor {
        match channel {
            Channel::Stdout => &mut self.stdout,
            Channel::Stderr => &mut self.stderr,
        }
    }

    /// The process is new, or wanted from its first byte.
    pub(super) fn begin(&mut self) {
        self.stdout.at = Some(0);
        self.stderr.at = Some(0);
    }

    /// Where to go on.
    pub(super) fn resume(&self, channel: Channel) -> Option<Position> {
        let cursor = match channel {
            Channel::Stdout => &self.stdout,
            Channel::Stderr => &self.stderr,
        };
        match cursor.at {
            Some(offset) => Some(Position {
                at: Some(At::Offset(offset)),
            }),
            None => cursor.wanted,
        }
    }

    /// The agent says where the reader really begins. Returns what is missing.
    pub(super) fn attached(
        &mut self,
        channel: Channel,
        from: u64,
    ) -> Result<Option<(u64, u64)>, SessionError> {
        let cursor = self.of(channel);
        let wanted = match cursor.wanted {
            Some(Position {
                at: Some(At::Offset(offset)),
            }) => Some(offset),
            _ => None,
        };
        match cursor.at {
            // Bytes that were told already would come twice.
            Some(at) if from < at => Err(SessionError::Offset),
            Some(at) => Ok(self.gap(channel, from).map(|_| (at, from))),
            None => {
                cursor.at = Some(from);
                Ok(wanted
                    .filter(|&wanted| wanted < from)
                    .map(|wanted| (wanted, from)))
            }
        }
    }

    /// Bytes up to `to` are lost. Returns which, unless that is known.
    pub(super) fn gap(&mut self, channel: Channel, to: u64) -> Option<(u64, u64)> {
        let cursor = self.of(channel);
        let at = cursor.at.unwrap_or(0);
        (to > at).then(|| {
            cursor.at = Some(to);
            (at, to)
        })
    }

    pub(super) fn advance(&mut self, channel: Channel, count: usize) -> Result<(), SessionError> {
        let cursor = self.of(channel);
        let count = u64::try_from(count).map_err(|_| SessionError::Offset)?;
        let at = cursor.at.unwrap_or(0);
        cursor.at = Some(at.checked_add(count).ok_or(SessionError::Offset)?);
        Ok(())
    }
}
