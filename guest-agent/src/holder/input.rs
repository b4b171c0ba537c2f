//! Input on its way to a process: who has sent how much of what, and what is not yet written. Pure.

/// Sessions a process remembers.
const MAX_SESSIONS: usize = 16;

/// Bytes written ahead are moved away only when they are this many.
const COMPACT: usize = 64 << 10;

/// What was taken of one sender's input, however often it connects.
#[derive(Debug, Clone, Copy)]
struct Session {
    id: u64,
    /// Bytes.
    taken: u64,
    /// Where its end was told, if it was.
    ended_at: Option<u64>,
}

/// Bytes that wait for the process to read, and the sessions they belong to.
#[derive(Debug, Default)]
pub(crate) struct Input {
    pending: Vec<u8>,
    written: usize,
    /// The one used last at the end.
    sessions: Vec<Session>,
    last_session: u64,
    /// Nothing comes any more: the end follows the pending bytes.
    closing: bool,
}

impl Input {
    /// Makes sure a session is known (0: a new one); returns its number and the bytes taken of it.
    pub(crate) fn open(&mut self, session: u64) -> (u64, u64) {
        if let Some(at) = self.sessions.iter().position(|it| it.id == session)
            && session != 0
        {
            let known = self.sessions.remove(at);
            self.sessions.push(known);
            return (known.id, known.taken);
        }
        let id = match session {
            0 => self.last_session.wrapping_add(1).max(1),
            given => given,
        };
        self.last_session = self.last_session.max(id);
        if self.sessions.len() >= MAX_SESSIONS {
            self.sessions.remove(0);
        }
        self.sessions.push(Session {
            id,
            taken: 0,
            ended_at: None,
        });
        (id, 0)
    }

    /// Bytes taken of a session.
    pub(crate) fn taken(&self, session: u64) -> u64 {
        let known = self.sessions.iter().rev().find(|it| it.id == session);
        known.map_or(0, |it| it.taken)
    }

    /// Takes the end of a session that lies at `offset` in it. False: it was taken before.
    pub(crate) fn take_end(&mut self, session: u64, offset: u64) -> bool {
        self.open(session);
        let Some(last) = self.sessions.last_mut() else {
            return false;
        };
        let is_new = last.ended_at.is_none_or(|at| at < offset);
        if is_new {
            last.ended_at = Some(offset);
        }
        is_new
    }

    /// Takes the bytes of a session that lie at `offset` in it; what was taken before is dropped.
    /// Returns how many bytes of the session are taken now.
    pub(crate) fn take(&mut self, session: u64, offset: u64, bytes: &[u8]) -> u64 {
        let (_, taken) = self.open(session);
        let end = offset.saturating_add(bytes.len() as u64);
        let known = usize::try_from(taken.saturating_sub(offset)).unwrap_or(usize::MAX);
        let fresh = bytes.get(known..).unwrap_or_default();
        if !self.closing {
            self.push(fresh);
        }
        let now = taken.max(end);
        if let Some(last) = self.sessions.last_mut() {
            last.taken = now;
        }
        now
    }

    /// Adds bytes that belong to no session.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if self.written >= COMPACT {
            self.pending.drain(..self.written.min(self.pending.len()));
            self.written = 0;
        }
        self.pending.extend_from_slice(bytes);
    }

    /// The end follows what is pending.
    pub(crate) const fn close(&mut self) {
        self.closing = true;
    }

    /// All is written and nothing more will come.
    pub(crate) const fn is_over(&self) -> bool {
        self.closing && self.pending.is_empty()
    }

    pub(crate) const fn is_closing(&self) -> bool {
        self.closing
    }

    /// What is to be written next.
    pub(crate) fn unwritten(&self) -> &[u8] {
        self.pending.get(self.written..).unwrap_or_default()
    }

    /// So much of it is written.
    pub(crate) fn advance(&mut self, written: usize) {
        self.written = self.written.saturating_add(written);
        if self.written >= self.pending.len() {
            self.pending = Vec::new();
            self.written = 0;
        }
    }

    /// The process reads no more.
    pub(crate) fn discard(&mut self) {
        self.pending = Vec::new();
        self.written = 0;
        self.closing = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn new_sessions_get_numbers_of_their_own() {
        let mut input = Input::default();
        let (one, taken) = input.open(0);
        assert_eq!(taken, 0);
        let (two, _) = input.open(0);
        assert_ne!(one, two);
        input.take(one, 0, b"abc");
        assert_eq!(input.open(one), (one, 3));
        assert_eq!(input.open(u64::MAX), (u64::MAX, 0));
        assert_ne!(input.open(0).0, 0);
    }

    #[test]
    fn sessions_are_bounded_and_the_least_used_goes() {
        let mut input = Input::default();
        let (kept, _) = input.open(0);
        input.take(kept, 0, b"x");
        for _ in 0..100 {
            input.open(0);
            input.open(kept);
        }
        assert_eq!(input.open(kept), (kept, 1));
        assert!(input.sessions.len() <= MAX_SESSIONS);
    }

    #[test]
    fn an_end_is_taken_once_at_its_place() {
        let mut input = Input::default();
        let (session, _) = input.open(0);
        input.take(session, 0, b"abc");
        assert!(input.take_end(session, 3));
        assert!(!input.take_end(session, 3));
        let (other, _) = input.open(0);
        assert!(input.take_end(other, 0));
        // More has followed: that is another end.
        input.take(session, 3, b"def");
        assert!(input.take_end(session, 6));
    }

    proptest! {
        #[test]
        fn whatever_is_repeated_arrives_once(
            data in proptest::collection::vec(any::<u8>(), 1..2000),
            tries in proptest::collection::vec((0_usize..2000, 1_usize..300, 0_usize..500), 1..60),
        ) {
            let mut input = Input::default();
            let (session, _) = input.open(0);
            let mut arrived = Vec::new();
            for (back, length, write) in tries {
                // A client resumes at, or somewhere before, what was taken.
                let (_, taken) = input.open(session);
                let from = (taken as usize).saturating_sub(back);
                let to = (from + length).min(data.len());
                let now = input.take(session, from as u64, &data[from..to]);
                prop_assert_eq!(now, taken.max(to as u64));
                let write = write.min(input.unwritten().len());
                arrived.extend_from_slice(&input.unwritten()[..write]);
                input.advance(write);
            }
            arrived.extend_from_slice(input.unwritten());
            let (_, taken) = input.open(session);
            prop_assert_eq!(&arrived[..], &data[..taken as usize]);
        }
    }
}
