//! Input on its way to a process: held until the agent says that it is taken, sent again from the offset
//! of the first byte that is not.

use std::collections::VecDeque;

use belljar_protocol::frame::{self, MAX_CHUNK};
use belljar_protocol::v1;

use super::super::error::SessionError;

/// Field of `ExecInput.stdin`.
const STDIN_FIELD: u32 = 1;
/// Held for a process that does not read. Above it the user's input is not read either.
const HELD_MAX: usize = 256 << 10;
/// The input session of the connection that started the process.
const OWNER_SESSION: u64 = 1;

#[derive(Debug, Default)]
pub(super) struct Input {
    /// Offset of the first byte of `held`: all before it is taken.
    base: u64,
    held: VecDeque<u8>,
    /// Bytes of `held` that this connection was given.
    given: usize,
    /// Most that was ever given to any connection: nobody can have taken more.
    given_up_to: u64,
    /// The agent says what it has taken; otherwise what is given counts as taken.
    confirmed: bool,
    /// 0: none yet.
    session: u64,
    ended: bool,
    end_given: bool,
    /// What the agent says it has taken. A connection's first byte is that at `base` nevertheless, as its
    /// request said; the agent drops what it has.
    taken_before: u64,
}

impl Input {
    pub(super) const fn session(&self) -> u64 {
        self.session
    }

    pub(super) const fn base(&self) -> u64 {
        self.base
    }

    /// The connection is the one that started the process.
    pub(super) const fn start(&mut self, confirmed: bool) {
        self.confirmed = confirmed;
        if confirmed {
            self.session = OWNER_SESSION;
        }
    }

    /// The process was there already: this is a viewer.
    pub(super) const fn renumber(&mut self) {
        self.session = 0;
        self.confirmed = true;
    }

    /// The agent numbered this client's input, and has taken so much of it.
    pub(super) fn attached(&mut self, session: u64, taken: u64) -> Result<(), SessionError> {
        if self.session != 0 && session != 0 && session != self.session {
            return Err(SessionError::Offset);
        }
        if session != 0 {
            self.session = session;
        }
        self.confirmed = session != 0;
        if taken > self.given_up_to {
            return Err(SessionError::Offset);
        }
        self.taken_before = taken;
        Ok(())
    }

    pub(super) fn taken(&mut self, count: u64) -> Result<(), SessionError> {
        if count > self.given_up_to {
            return Err(SessionError::Offset);
        }
        self.taken_before = self.taken_before.max(count);
        self.drop_taken(count);
        Ok(())
    }

    fn drop_taken(&mut self, count: u64) {
        let done = count.saturating_sub(self.base);
        let done = usize::try_from(done).unwrap_or(usize::MAX);
        // Never what this connection still has to be given.
        self.drop_front(done.min(self.given));
    }

    fn drop_front(&mut self, count: usize) {
        self.held.drain(..count);
        self.given = self.given.saturating_sub(count);
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.base = self.base.saturating_add(count);
    }

    pub(super) const fn disconnected(&mut self) {
        self.given = 0;
        self.end_given = false;
    }

    pub(super) fn has_room(&self) -> bool {
        !self.ended && self.held.len() < HELD_MAX
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        if !self.ended {
            self.held.extend(bytes);
        }
    }

    pub(super) const fn end(&mut self) {
        self.ended = true;
    }

    /// Appends frames to `out` while that is shorter than `limit`.
    pub(super) fn encode(&mut self, out: &mut Vec<u8>, limit: usize) {
        while out.len() < limit && self.given < self.held.len() {
            let (front, back) = self.held.as_slices();
            let rest = match front.get(self.given..) {
                Some(rest) if !rest.is_empty() => rest,
                _ => back
                    .get(self.given.saturating_sub(front.len())..)
                    .unwrap_or_default(),
            };
            let rest = rest.get(..MAX_CHUNK).unwrap_or(rest);
            let taken = frame::encode_chunk(STDIN_FIELD, rest, out);
            self.given = self.given.saturating_add(taken);
            let up_to = self
                .base
                .saturating_add(u64::try_from(self.given).unwrap_or(u64::MAX));
            self.given_up_to = self.given_up_to.max(up_to);
            if !self.confirmed {
                self.drop_front(self.given);
            } else if up_to >= self.taken_before {
                self.drop_taken(self.taken_before);
            }
        }
        if self.ended && !self.end_given && self.given == self.held.len() && out.len() < limit {
            self.end_given = true;
            let input = Some(v1::exec_input::Input::StdinEof(v1::StdinEof {}));
            // A few bytes: it always fits into a frame.
            let _ = frame::encode(&v1::ExecInput { input }, out);
        }
    }
}
