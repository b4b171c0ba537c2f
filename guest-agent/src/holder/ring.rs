//! The last bytes of an output stream, by offset since its start. Pure.

use std::collections::VecDeque;

/// Largest piece in which memory is taken and given back, bytes.
const MAX_CHUNK: usize = 16 << 10;

/// Smallest piece, for programs that say little.
const MIN_CHUNK: usize = 256;

/// Time marks of one ring. When there are more, every second one goes.
const MAX_MARKS: usize = 512;

/// Marks are not closer than this, nanoseconds.
const MARK_DISTANCE: u64 = 5_000_000;

#[derive(Debug)]
struct Chunk {
    from: u64,
    bytes: Vec<u8>,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.from.saturating_add(self.bytes.len() as u64)
    }
}

/// See the module. Keeps the bytes `[oldest, newest)`.
#[derive(Debug)]
pub(crate) struct Ring {
    limit: u64,
    oldest: u64,
    newest: u64,
    chunks: VecDeque<Chunk>,
    /// Memory of all chunks, bytes.
    held: usize,
    /// (offset, time): the bytes from there on came at that time or later.
    marks: VecDeque<(u64, u64)>,
    mark_distance: u64,
}

impl Ring {
    /// An empty ring that is to keep `limit` bytes.
    pub(crate) const fn new(limit: u64) -> Self {
        Self {
            limit,
            oldest: 0,
            newest: 0,
            chunks: VecDeque::new(),
            held: 0,
            marks: VecDeque::new(),
            mark_distance: MARK_DISTANCE,
        }
    }

    pub(crate) const fn oldest(&self) -> u64 {
        self.oldest
    }

    pub(crate) const fn newest(&self) -> u64 {
        self.newest
    }

    pub(crate) const fn limit(&self) -> u64 {
        self.limit
    }

    /// Memory taken, bytes.
    pub(crate) const fn held(&self) -> usize {
        self.held
    }

    /// Appends bytes that came at a time (nanoseconds of any clock). Trims nothing.
    pub(crate) fn push(&mut self, mut bytes: &[u8], now: u64) {
        if bytes.is_empty() {
            return;
        }
        self.mark(now);
        while !bytes.is_empty() {
            let last = self.chunks.back_mut();
            let spare = last.as_ref().map_or(0, |chunk| {
                chunk.bytes.capacity().saturating_sub(chunk.bytes.len())
            });
            match last {
                Some(chunk) if spare > 0 => {
                    let (now_taken, rest) = bytes.split_at(spare.min(bytes.len()));
                    chunk.bytes.extend_from_slice(now_taken);
                    self.newest = self.newest.saturating_add(now_taken.len() as u64);
                    bytes = rest;
                }
                _ => self.grow(bytes.len()),
            }
        }
    }

    /// A chunk more: the more has come, the larger.
    fn grow(&mut self, wanted: usize) {
        let before = self.chunks.back().map_or(0, |chunk| chunk.bytes.capacity());
        let size = before
            .saturating_mul(2)
            .max(wanted)
            .clamp(MIN_CHUNK, MAX_CHUNK);
        let bytes = Vec::with_capacity(size);
        self.held = self.held.saturating_add(bytes.capacity());
        self.chunks.push_back(Chunk {
            from: self.newest,
            bytes,
        });
    }

    fn mark(&mut self, now: u64) {
        let is_due = self
            .marks
            .back()
            .is_none_or(|(_, at)| now >= at.saturating_add(self.mark_distance));
        if !is_due {
            return;
        }
        if self.marks.len() >= MAX_MARKS {
            let mut keep = false;
            self.marks.retain(|_| {
                keep = !keep;
                keep
            });
            self.mark_distance = self.mark_distance.saturating_mul(2);
        }
        self.marks.push_back((self.newest, now));
    }

    /// Forgets what is below an offset.
    pub(crate) fn trim(&mut self, to: u64) {
        self.oldest = to.clamp(self.oldest, self.newest);
        while let Some(chunk) = self.chunks.front() {
            // The last chunk, too: its spare room is of no use to a stream that is over.
            if chunk.end() > self.oldest {
                break;
            }
            self.held = self.held.saturating_sub(chunk.bytes.capacity());
            self.chunks.pop_front();
        }
        // The mark before the oldest byte tells about that byte.
        while self
            .marks
            .get(1)
            .is_some_and(|(offset, _)| *offset <= self.oldest)
        {
            self.marks.pop_front();
        }
    }

    /// Forgets what is beyond the limit, but nothing from `hold` on.
    pub(crate) fn trim_to_limit(&mut self, hold: Option<u64>) {
        let to = self.newest.saturating_sub(self.limit);
        let to = to.min(hold.unwrap_or(u64::MAX));
        if to > self.oldest {
            self.trim(to);
        }
    }

    /// The bytes at an offset that lie in one piece; empty where there are none.
    pub(crate) fn piece(&self, from: u64) -> &[u8] {
        if from < self.oldest || from >= self.newest {
            return &[];
        }
        let after = self.chunks.partition_point(|chunk| chunk.from <= from);
        let chunk = after.checked_sub(1).and_then(|at| self.chunks.get(at));
        let Some(chunk) = chunk else { return &[] };
        let skip = usize::try_from(from.saturating_sub(chunk.from)).unwrap_or(usize::MAX);
        chunk.bytes.get(skip..).unwrap_or_default()
    }

    /// Where the first byte lies that came at `time` or later, as exactly as the marks tell.
    pub(crate) fn since(&self, time: u64) -> u64 {
        // Bytes behind the last earlier mark may have come after `time`.
        let after = self.marks.partition_point(|(_, at)| *at < time);
        let offset = match (after.checked_sub(1), self.marks.get(after)) {
            (None, _) => self.oldest,
            (Some(_), Some((offset, _))) => *offset,
            (Some(before), None) => {
                // All marks are earlier: what came within their distance may be, or not.
                let last = self.marks.get(before).copied().unwrap_or_default();
                if time.saturating_sub(last.1) <= self.mark_distance {
                    last.0
                } else {
                    self.newest
                }
            }
        };
        offset.clamp(self.oldest, self.newest)
    }

    /// Where the last `count` lines begin.
    pub(crate) fn lines(&self, count: u32) -> u64 {
        let mut left = count;
        let mut is_last_byte = true;
        for chunk in self.chunks.iter().rev() {
            for (at, byte) in chunk.bytes.iter().enumerate().rev() {
                let offset = chunk.from.saturating_add(at as u64);
                if offset < self.oldest {
                    return self.oldest;
                }
                if *byte == b'\n' && !is_last_byte {
                    left = left.saturating_sub(1);
                }
                if left == 0 {
                    return offset.saturating_add(1).min(self.newest);
                }
                is_last_byte = false;
            }
        }
        self.oldest
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(ring: &Ring) -> Vec<u8> {
        let mut out = Vec::new();
        let mut at = ring.oldest();
        loop {
            let piece = ring.piece(at);
            if piece.is_empty() {
                assert_eq!(at, ring.newest());
                return out;
            }
            out.extend_from_slice(piece);
            at += piece.len() as u64;
        }
    }

    #[test]
    fn the_last_lines_are_found() {
        let mut ring = Ring::new(1000);
        ring.push(b"one\ntwo\nthree\n", 0);
        assert_eq!(ring.lines(1), 8);
        assert_eq!(ring.lines(2), 4);
        assert_eq!(ring.lines(3), 0);
        assert_eq!(ring.lines(99), 0);
        assert_eq!(ring.lines(0), 14);
        ring.push(b"half", 0);
        assert_eq!(ring.lines(1), 14);
        ring.trim(5);
        assert_eq!(ring.lines(3), 5);
    }

    #[test]
    fn time_is_found_by_its_marks() {
        let mut ring = Ring::new(1000);
        ring.push(b"aaa", 1_000_000_000);
        ring.push(b"bbb", 2_000_000_000);
        ring.push(b"ccc", 3_000_000_000);
        assert_eq!(ring.since(0), 0);
        assert_eq!(ring.since(1_500_000_000), 3);
        assert_eq!(ring.since(2_000_000_000), 3);
        assert_eq!(ring.since(2_000_000_001), 6);
        assert_eq!(ring.since(4_000_000_000), 9);
    }

    #[test]
    fn marks_are_bounded() {
        let mut ring = Ring::new(1 << 20);
        for n in 0..100_000_u64 {
            ring.push(b"x", n * 1_000_000_000);
        }
        assert!(ring.marks.len() <= MAX_MARKS);
        let found = ring.since(50_000 * 1_000_000_000);
        assert!((49_000..=51_000).contains(&found), "{found}");
    }

    proptest! {
        #[test]
        fn it_keeps_the_last_bytes_and_its_books(
            steps in proptest::collection::vec((0_usize..40_000, any::<Option<u16>>()), 1..40),
            limit in 1_u64..100_000,
        ) {
            let mut ring = Ring::new(limit);
            let mut model: Vec<u8> = Vec::new();
            for (step, (length, hold)) in steps.into_iter().enumerate() {
                let bytes: Vec<u8> = (0..length).map(|n| (n * 7 + step) as u8).collect();
                ring.push(&bytes, step as u64);
                model.extend_from_slice(&bytes);
                let hold = hold.map(|hold| u64::from(hold) * 10);
                let oldest = ring.oldest();
                ring.trim_to_limit(hold);
                prop_assert_eq!(ring.newest(), model.len() as u64);
                let wanted = ring.newest().saturating_sub(limit)
                    .min(hold.unwrap_or(u64::MAX)).max(oldest);
                prop_assert_eq!(ring.oldest(), wanted);
                prop_assert_eq!(&all(&ring)[..], &model[wanted as usize..]);
                let capacities: usize = ring.chunks.iter().map(|c| c.bytes.capacity()).sum();
                prop_assert_eq!(ring.held(), capacities);
                let kept = ring.newest() - ring.oldest();
                prop_assert!(ring.held() as u64 <= kept * 2 + 2 * MAX_CHUNK as u64);
            }
            ring.trim(u64::MAX);
            prop_assert_eq!(ring.held(), 0);
        }
    }
}
