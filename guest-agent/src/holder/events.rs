//! The log of events: the last ones, by sequence number. Pure.

use std::collections::VecDeque;

use belljar_protocol::v1::{Event, event::What};

/// Events kept.
const KEPT: usize = 1024;

/// Events are numbered from 1: in the protocol 0 means "the oldest".
#[derive(Debug)]
pub(crate) struct Events {
    kept: VecDeque<Event>,
    next: u64,
}

impl Events {
    pub(crate) const fn new() -> Self {
        Self {
            kept: VecDeque::new(),
            next: 1,
        }
    }

    pub(crate) fn add(&mut self, what: What, boottime_ns: u64, unix_ns: u64) {
        if self.kept.len() >= KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(Event {
            sequence: self.next,
            boottime_ns,
            unix_ns,
            what: Some(what),
        });
        self.next = self.next.saturating_add(1);
    }

    /// Number of the oldest one kept; the next one's if there is none.
    pub(crate) fn oldest(&self) -> u64 {
        self.kept.front().map_or(self.next, |event| event.sequence)
    }

    /// Number of the next one to come.
    pub(crate) const fn next(&self) -> u64 {
        self.next
    }

    /// The event of that number. What is gone is told as the count of missing ones, in the place of
    /// the oldest kept minus one. `None`: it has not happened yet.
    pub(crate) fn get(&self, sequence: u64) -> Option<Event> {
        let oldest = self.oldest();
        if sequence < oldest {
            return Some(Event {
                sequence: oldest.saturating_sub(1),
                what: Some(What::Missing(oldest.saturating_sub(sequence))),
                ..Event::default()
            });
        }
        let at = usize::try_from(sequence.saturating_sub(oldest)).ok()?;
        self.kept.get(at).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_is_told() {
        let mut events = Events::new();
        assert_eq!((events.oldest(), events.next()), (1, 1));
        assert_eq!(events.get(1), None);
        for _ in 0..KEPT + 10 {
            events.add(What::Frozen(belljar_protocol::v1::Frozen {}), 1, 2);
        }
        assert_eq!(events.oldest(), 11);
        let gap = events.get(4).unwrap();
        assert_eq!(gap.what, Some(What::Missing(7)));
        assert_eq!(gap.sequence, 10);
        let first = events.get(gap.sequence + 1).unwrap();
        assert_eq!(first.sequence, 11);
        assert_eq!(events.get(events.next()), None);
        assert_eq!(events.get(u64::MAX), None);
    }
}
