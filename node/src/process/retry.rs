//! When to connect again: at once, then less and less often, and in the end no more. The clock is the
//! caller's.

use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// A connection that held for this long was a good one.
const GOOD: Duration = Duration::from_millis(50);
/// After a connection that brought something, but broke at once.
const SHORT_PAUSE: Duration = Duration::from_millis(2);
/// The user is told of a cut that lasts longer.
const NOTICEABLE: Duration = Duration::from_secs(2);
/// Connections one after the other without a cut, as finding a process by its name needs.
const HANDED_ON_MAX: u32 = 4;

/// See the module.
#[derive(Debug)]
pub(super) struct Retry {
    limit: Duration,
    pause: Duration,
    next: Option<Instant>,
    connected: Option<Instant>,
    progress: bool,
    /// Of the first of the cuts since it worked last.
    down_since: Option<Instant>,
    reason: String,
    handed_on: u32,
}

impl Retry {
    pub(super) const fn new(limit: Duration) -> Self {
        Self {
            limit,
            pause: Duration::ZERO,
            next: None,
            connected: None,
            progress: false,
            down_since: None,
            reason: String::new(),
            handed_on: 0,
        }
    }

    pub(super) const fn limit(&self) -> Duration {
        self.limit
    }

    /// When to try next; `None`: at once.
    pub(super) const fn next(&self) -> Option<Instant> {
        self.next
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    pub(super) const fn connected(&mut self, now: Instant) {
        self.connected = Some(now);
        self.progress = false;
        self.next = None;
    }

    /// The process is connected; `progress`: and has said something.
    pub(super) const fn works(&mut self, progress: bool) {
        self.progress |= progress;
        self.down_since = None;
        self.handed_on = 0;
    }

    /// The connection was cut, or could not be made.
    pub(super) fn failed(&mut self, now: Instant, reason: String) {
        let held = self.connected.take().map(|since| now.duration_since(since));
        self.pause = match held {
            Some(held) if held >= GOOD => Duration::ZERO,
            Some(_) if self.progress => SHORT_PAUSE,
            _ => (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE),
        };
        // The first try after it worked is made at once.
        if self.down_since.is_none() && self.pause == FIRST_PAUSE {
            self.pause = Duration::ZERO;
        }
        self.down_since.get_or_insert(now);
        self.reason = reason;
        self.next = now.checked_add(self.pause);
    }

    /// The next connection is part of the plan; `later`: but not at once.
    pub(super) fn again(&mut self, now: Instant, later: bool) {
        self.handed_on = self.handed_on.saturating_add(1);
        if later || self.handed_on > HANDED_ON_MAX {
            self.connected = None;
            self.failed(now, "the agent has no room".to_owned());
        } else {
            self.next = None;
        }
    }

    /// Why, if it has lasted too long.
    pub(super) fn given_up(&self, now: Instant) -> Option<String> {
        let since = self.down_since?;
        (now.saturating_duration_since(since) >= self.limit).then(|| self.reason.clone())
    }

    pub(super) fn is_noticeable(&self, now: Instant) -> bool {
        self.down_since
            .is_some_and(|since| now.saturating_duration_since(since) >= NOTICEABLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_try_is_at_once_and_then_they_get_rarer() {
        let start = Instant::now();
        let mut retry = Retry::new(Duration::from_secs(30));
        assert!(retry.is_due(start));
        retry.connected(start);
        retry.works(true);
        let mut now = start + Duration::from_secs(1);
        retry.failed(now, "cut".into());
        assert!(retry.is_due(now));
        let mut tries = 0;
        while retry.given_up(now).is_none() {
            retry.failed(now, "refused".into());
            let next = retry.next().unwrap();
            assert!(next >= now && next - now <= LONGEST_PAUSE);
            now = next.max(now + Duration::from_micros(100));
            tries += 1;
        }
        assert!((60..90).contains(&tries), "{tries}");
        assert!(retry.is_noticeable(now));
        assert_eq!(retry.given_up(now).as_deref(), Some("refused"));
    }

    #[test]
    fn a_guest_that_cuts_every_connection_at_once_is_not_asked_without_pause() {
        let mut now = Instant::now();
        let mut retry = Retry::new(Duration::from_secs(30));
        let begin = now;
        for _ in 0..100 {
            retry.connected(now);
            retry.works(true);
            retry.failed(now, "cut".into());
            now = retry.next().unwrap().max(now);
        }
        assert!(now - begin >= Duration::from_millis(150));
        for _ in 0..100 {
            retry.again(now, false);
            now = retry.next().unwrap_or(now);
        }
        assert!(now - begin >= Duration::from_secs(20));
    }
}
