//! The events of one watch, numbered, the newest kept: pure.

use std::collections::VecDeque;

use belljar_protocol::v1::{self, watch_event::What as Wire};

use super::tree::{Told, What};

/// Events and bytes of paths kept for readers that are slow or away.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) events: usize,
    pub(super) bytes: usize,
}

/// What a whole watch is allowed.
pub(super) const LIMITS: Limits = Limits {
    events: 65_536,
    bytes: 6 << 20,
};

#[derive(Debug)]
enum Entry {
    Told(Told),
    Overflow(&'static str),
}

impl Entry {
    fn bytes(&self) -> usize {
        match self {
            Self::Told(told) => match &told.what {
                What::Created(path)
                | What::Changed(path)
                | What::Attributes(path)
                | What::Removed(path) => path.len(),
                What::Moved { from, to } => from.len().saturating_add(to.len()),
                What::Gone(_) => 0,
            },
            Self::Overflow(_) => 0,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Queue {
    limits: Limits,
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Number of the first entry kept. Numbers begin at 1.
    oldest: u64,
    /// Number up to which a reader has taken: what is newer may still be merged.
    taken: u64,
    ended: bool,
}

impl Queue {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            entries: VecDeque::new(),
            bytes: 0,
            oldest: 1,
            taken: 1,
            ended: false,
        }
    }

    /// Number of the event that will come next.
    pub(super) fn next(&self) -> u64 {
        self.oldest.saturating_add(self.entries.len() as u64)
    }

    /// Number of the oldest event kept.
    pub(super) fn oldest(&self) -> u64 {
        self.oldest
    }

    /// Nothing more will come.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    pub(super) fn push(&mut self, told: Told) {
        if self.ended {
            return;
        }
        // The same once more says nothing new to whoever has not read the first.
        let repeatable = matches!(told.what, What::Changed(_) | What::Attributes(_));
        if repeatable
            && self.next() > self.taken
            && matches!(self.entries.back(), Some(Entry::Told(last)) if *last == told)
        {
            return;
        }
        self.ended = matches!(told.what, What::Gone(_));
        self.add(Entry::Told(told));
    }

    /// Events are lost.
    pub(super) fn overflow(&mut self, reason: &'static str) {
        if !self.ended {
            self.add(Entry::Overflow(reason));
        }
    }

    fn add(&mut self, entry: Entry) {
        self.bytes = self.bytes.saturating_add(entry.bytes());
        self.entries.push_back(entry);
        while self.entries.len() > self.limits.events || self.bytes > self.limits.bytes {
            let Some(lost) = self.entries.pop_front() else {
                return;
            };
            self.bytes = self.bytes.saturating_sub(lost.bytes());
            self.oldest = self.oldest.saturating_add(1);
        }
    }

    /// Events from number `from` on, at most `limit`, and the number of the one after them. Those that are
    /// not kept any more, or never were, are told as an overflow first, with the number of the last lost.
    pub(super) fn read(&mut self, from: u64, limit: usize) -> (Vec<v1::WatchEvent>, u64) {
        let mut events = Vec::new();
        let mut at = from;
        if from < self.oldest || from > self.next() {
            at = self.oldest;
            let reason = "the reader was too slow, or away for too long";
            events.push(overflow(at.saturating_sub(1), reason));
        }
        let skip = usize::try_from(at.saturating_sub(self.oldest)).unwrap_or(usize::MAX);
        for entry in self.entries.iter().skip(skip).take(limit) {
            events.push(wire(entry, at));
            at = at.saturating_add(1);
        }
        self.taken = self.taken.max(at);
        (events, at)
    }
}

fn overflow(sequence: u64, reason: &str) -> v1::WatchEvent {
    v1::WatchEvent {
        sequence,
        what: Some(Wire::Overflow(v1::Overflow {
            reason: reason.to_owned(),
        })),
        is_directory: false,
    }
}

fn wire(entry: &Entry, sequence: u64) -> v1::WatchEvent {
    let told = match entry {
        Entry::Overflow(reason) => return overflow(sequence, reason),
        Entry::Told(told) => told,
    };
    let what = match &told.what {
        What::Created(path) => Wire::Created(path.clone()),
        What::Changed(path) => Wire::Changed(path.clone()),
        What::Attributes(path) => Wire::Attributes(path.clone()),
        What::Moved { from, to } => Wire::Moved(v1::Moved {
            from: from.clone(),
            to: to.clone(),
        }),
        What::Removed(path) => Wire::Removed(path.clone()),
        What::Gone(reason) => Wire::Gone(v1::Overflow {
            reason: (*reason).to_owned(),
        }),
    };
    v1::WatchEvent {
        sequence,
        what: Some(what),
        is_directory: told.is_directory,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn changed(name: &str) -> Told {
        Told {
            what: What::Changed(name.into()),
            is_directory: false,
        }
    }

    fn numbers(events: &[v1::WatchEvent]) -> Vec<u64> {
        events.iter().map(|event| event.sequence).collect()
    }

    fn is_overflow(event: &v1::WatchEvent) -> bool {
        matches!(event.what, Some(Wire::Overflow(_)))
    }

    #[test]
    fn what_nobody_has_read_is_merged() {
        let mut queue = Queue::new(LIMITS);
        queue.push(changed("a"));
        queue.push(changed("a"));
        let (events, next) = queue.read(1, 10);
        assert_eq!((numbers(&events), next), (vec![1], 2));
        queue.push(changed("a"));
        assert_eq!(numbers(&queue.read(next, 10).0), [2]);
    }

    #[test]
    fn nothing_follows_the_end() {
        let mut queue = Queue::new(LIMITS);
        queue.push(Told {
            what: What::Gone("x"),
            is_directory: true,
        });
        queue.push(changed("a"));
        queue.overflow("y");
        assert!(queue.has_ended());
        assert_eq!(numbers(&queue.read(1, 10).0), [1]);
    }

    proptest! {
        /// Readers with any pauses get every event or an overflow in place of those lost, in order.
        #[test]
        fn no_reader_misses_anything_unknowingly(
            steps in proptest::collection::vec((0..20_usize, 0..3_usize, 1..8_usize), 1..60)
        ) {
            let mut queue = Queue::new(Limits { events: 16, bytes: 200 });
            let (mut pushed, mut next) = (0_u64, 1_u64);
            let mut expected = 1;
            for (push, reads, limit) in steps {
                for _ in 0..push {
                    pushed += 1;
                    queue.push(changed(&format!("file {pushed}")));
                }
                prop_assert!(queue.entries.len() <= 16 && queue.bytes <= 200);
                for _ in 0..reads {
                    let (events, after) = queue.read(next, limit);
                    for event in events {
                        if is_overflow(&event) {
                            prop_assert!(event.sequence >= expected);
                        } else {
                            prop_assert_eq!(event.sequence, expected);
                            let name = format!("file {}", event.sequence).into_bytes();
                            prop_assert_eq!(event.what, Some(Wire::Changed(name)));
                        }
                        expected = event.sequence + 1;
                    }
                    prop_assert_eq!(after, expected);
                    next = after;
                }
            }
            prop_assert_eq!(queue.next(), pushed + 1);
        }

        #[test]
        fn a_cursor_from_elsewhere_is_an_overflow(from in 5_u64..) {
            let mut queue = Queue::new(LIMITS);
            queue.push(changed("a"));
            let (events, next) = queue.read(from, 10);
            prop_assert!(is_overflow(&events[0]));
            prop_assert_eq!((events.len(), next), (2, 2));
        }
    }
}
