//! The ring of the last bytes of output.

/// The last `capacity` bytes of a stream. Positions count from the stream's beginning, so
/// they stay valid as names while the bytes behind them are overwritten.
pub struct Scrollback {
    /// Allocated zeroed and so, where it is large, not resident before it is written.
    ring: Box<[u8]>,
    end: u64,
}

impl Scrollback {
    /// `capacity` in bytes; at least 1.
    pub fn new(capacity: usize) -> Self {
        Self {
            ring: vec![0; capacity.max(1)].into_boxed_slice(),
            end: 0,
        }
    }

    pub fn capacity(&self) -> usize {
        self.ring.len()
    }

    /// Position of the oldest byte still held.
    pub fn start(&self) -> u64 {
        self.end.saturating_sub(self.ring.len() as u64)
    }

    /// Position after the newest byte: the length of the stream so far.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Appends `data`, overwriting the oldest bytes.
    pub fn push(&mut self, data: &[u8]) {
        let skipped = data.len().saturating_sub(self.ring.len());
        self.end += skipped as u64;
        let mut rest = data.get(skipped..).unwrap_or_default();
        while !rest.is_empty() {
            let at = self.index(self.end);
            let Some(room) = self.ring.get_mut(at..).filter(|room| !room.is_empty()) else {
                return;
            };
            let len = room.len().min(rest.len());
            let (now, later) = rest.split_at(len);
            if let Some(room) = room.get_mut(..len) {
                room.copy_from_slice(now);
            }
            self.end += len as u64;
            rest = later;
        }
    }

    /// The bytes from `position` on, in two runs. A position that is overwritten or beyond the
    /// end is moved to the nearest that is held.
    pub fn since(&self, position: u64) -> (&[u8], &[u8]) {
        let from = position.clamp(self.start(), self.end);
        let len = usize::try_from(self.end - from).unwrap_or(self.ring.len());
        let (before, after) = self
            .ring
            .split_at_checked(self.index(from))
            .unwrap_or((&[], &[]));
        match after.get(..len) {
            Some(run) => (run, &[]),
            None => (after, before.get(..len - after.len()).unwrap_or_default()),
        }
    }

    /// The last `lines` lines, at most `max` bytes of them. A last line without an end counts
    /// as one.
    pub fn tail(&self, lines: usize, max: usize) -> Vec<u8> {
        let (first, second) = self.since(self.end.saturating_sub(max as u64));
        let mut bytes = Vec::with_capacity(first.len() + second.len());
        bytes.extend_from_slice(first);
        bytes.extend_from_slice(second);
        let body = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        let cut = match lines.checked_sub(1) {
            None => bytes.len(),
            Some(ends) => body
                .iter()
                .enumerate()
                .rev()
                .filter(|(_, byte)| **byte == b'\n')
                .nth(ends)
                .map_or(0, |(at, _)| at + 1),
        };
        bytes.split_off(cut)
    }

    fn index(&self, position: u64) -> usize {
        // The remainder is below the ring's length, and the ring is not empty.
        position
            .checked_rem(self.ring.len() as u64)
            .and_then(|at| usize::try_from(at).ok())
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn held(ring: &Scrollback, position: u64) -> Vec<u8> {
        let (first, second) = ring.since(position);
        [first, second].concat()
    }

    proptest! {
        #[test]
        fn holds_the_last_bytes_of_the_stream(
            capacity in 1usize..20,
            writes in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..10),
            position in 0u64..600,
        ) {
            let mut ring = Scrollback::new(capacity);
            let mut stream = Vec::new();
            for data in &writes {
                ring.push(data);
                stream.extend_from_slice(data);
            }
            let start = stream.len().saturating_sub(capacity);
            prop_assert_eq!(ring.start(), start as u64);
            prop_assert_eq!(ring.end(), stream.len() as u64);
            let from = (position as usize).clamp(start, stream.len());
            prop_assert_eq!(held(&ring, position), &stream[from..]);
        }
    }

    #[test]
    fn tail_gives_whole_last_lines() {
        let mut ring = Scrollback::new(64);
        ring.push(b"one\ntwo\n\nfour\nfive");
        assert_eq!(ring.tail(0, 64), b"");
        assert_eq!(ring.tail(1, 64), b"five");
        assert_eq!(ring.tail(3, 64), b"\nfour\nfive");
        ring.push(b"\n");
        assert_eq!(ring.tail(1, 64), b"five\n");
        assert_eq!(ring.tail(2, 64), b"four\nfive\n");
        assert_eq!(ring.tail(99, 64), b"one\ntwo\n\nfour\nfive\n");
        assert_eq!(ring.tail(99, 7), b"r\nfive\n");
    }
}
