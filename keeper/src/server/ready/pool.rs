//! Which VMMs are ready, and when another one is to be made. Pure: who makes them, and what time it is, is said.

use std::time::{Duration, Instant};

/// Another one is begun this long after it is first wanted: whoever is just restoring goes first.
const BEHIND: Duration = Duration::from_millis(50);
/// After one that could not be made it is tried again after this time, and after twice as long each time.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_AT_MOST: Duration = Duration::from_secs(60);

/// Those that wait, all of which fit `F`. The ones that are returned are to be ended.
#[derive(Debug)]
pub(super) struct Pool<F, E> {
    bound: usize,
    fit: Option<F>,
    waiting: Vec<E>,
    /// One is being made: for what was wanted then.
    making: Option<F>,
    failures: u32,
    /// None is begun before.
    not_before: Option<Instant>,
}

impl<F: Clone + PartialEq, E> Pool<F, E> {
    pub(super) const fn new(bound: usize) -> Self {
        Self {
            bound,
            fit: None,
            waiting: Vec::new(),
            making: None,
            failures: 0,
            not_before: None,
        }
    }

    /// None is ever made.
    pub(super) const fn is_off(&self) -> bool {
        self.bound == 0
    }

    /// From now on only those that fit this are wanted; `None`: none are.
    #[must_use]
    pub(super) fn want(&mut self, fit: Option<F>, now: Instant) -> Vec<E> {
        if self.fit == fit {
            return Vec::new();
        }
        self.fit = fit;
        self.failures = 0;
        self.not_before = Some(now + BEHIND);
        std::mem::take(&mut self.waiting)
    }

    /// One that fits, the one that has waited longest; it is another's from now on.
    pub(super) fn take(&mut self, fit: &F, now: Instant) -> Option<E> {
        if self.fit.as_ref() != Some(fit) || self.waiting.is_empty() {
            return None;
        }
        self.not_before = self.not_before.max(Some(now + BEHIND));
        // It was good to the end.
        self.failures = 0;
        Some(self.waiting.remove(0))
    }

    /// Those for which `good` does not say so. Others in their place are not made at once: what ended them may
    /// end these, too.
    #[must_use]
    pub(super) fn check(&mut self, mut good: impl FnMut(&E) -> bool, now: Instant) -> Vec<E> {
        let all = std::mem::take(&mut self.waiting);
        let (good, bad): (Vec<E>, Vec<E>) = all.into_iter().partition(|one| good(one));
        self.waiting = good;
        if !bad.is_empty() {
            self.back_off(now);
        }
        bad
    }

    fn back_off(&mut self, now: Instant) {
        let times = 1_u32.checked_shl(self.failures).unwrap_or(u32::MAX);
        self.failures = self.failures.saturating_add(1);
        let wait = AGAIN.saturating_mul(times).min(AGAIN_AT_MOST);
        self.not_before = Some(now + wait);
    }

    /// What one is to be made for now. Until [`Pool::made`] no other is begun.
    pub(super) fn begin(&mut self, now: Instant) -> Option<F> {
        if self.next()? > now {
            return None;
        }
        self.making = self.fit.clone();
        self.making.clone()
    }

    /// When the next one is to be begun.
    pub(super) fn next(&self) -> Option<Instant> {
        let missing = self.fit.is_some() && self.waiting.len() < self.bound;
        (missing && self.making.is_none()).then_some(self.not_before)?
    }

    /// What became of the one that was begun. It is returned if it is not wanted any more.
    #[must_use]
    pub(super) fn made(&mut self, made: Option<E>, now: Instant) -> Option<E> {
        let still = self.making.take() == self.fit && self.fit.is_some();
        match made {
            Some(one) if still && self.waiting.len() < self.bound => {
                self.waiting.push(one);
                None
            }
            None if still => {
                self.back_off(now);
                None
            }
            other => other,
        }
    }

    /// One was begun, and nobody has said what became of it.
    pub(super) const fn is_making(&self) -> bool {
        self.making.is_some()
    }

    /// What is wanted.
    pub(super) const fn fit(&self) -> Option<&F> {
        self.fit.as_ref()
    }

    pub(super) fn waiting(&self) -> &[E] {
        &self.waiting
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NONE: [u32; 0] = [];

    fn fill(pool: &mut Pool<u8, u32>, now: Instant, next: &mut u32) {
        while pool.begin(now).is_some() {
            *next += 1;
            assert_eq!(pool.made(Some(*next), now), None);
        }
    }

    #[test]
    fn it_is_filled_behind_who_restores_and_gives_each_away_once() {
        let (mut pool, start) = (Pool::new(2), Instant::now());
        assert_eq!(pool.begin(start), None, "nothing is wanted");
        assert_eq!(pool.want(Some(1), start), NONE);
        assert_eq!(pool.begin(start), None, "who restores goes first");
        let later = start + BEHIND;
        assert_eq!(pool.next(), Some(later));
        assert_eq!(pool.begin(later), Some(1));
        assert_eq!(pool.begin(later), None, "one at a time");
        assert_eq!(pool.made(Some(10), later), None);
        let mut next = 10;
        fill(&mut pool, later, &mut next);
        assert_eq!(pool.waiting(), [10, 11]);
        assert_eq!(pool.take(&2, later), None, "it is for another one");
        assert_eq!(pool.take(&1, later), Some(10));
        assert_eq!(pool.begin(later), None);
        fill(&mut pool, later + BEHIND, &mut next);
        assert_eq!(pool.waiting(), [11, 12]);
    }

    #[test]
    fn what_does_not_fit_any_more_is_given_up_also_while_it_is_made() {
        let (mut pool, start) = (Pool::new(2), Instant::now());
        let later = start + BEHIND;
        assert_eq!(pool.want(Some(1), start), NONE);
        fill(&mut pool, later, &mut 0);
        assert_eq!(pool.want(Some(1), later), NONE, "it is as before");
        assert_eq!(pool.check(|one| *one != 1, later), [1]);
        assert_eq!(pool.begin(later), None, "what ended it may end another");
        let later = later + AGAIN;
        assert_eq!(pool.begin(later), Some(1));
        assert_eq!(pool.want(Some(2), later), [2]);
        assert_eq!(pool.made(Some(3), later), Some(3));
        assert_eq!(pool.begin(later + BEHIND), Some(2));
        assert_eq!(pool.want(None, later), NONE);
        assert_eq!(pool.made(Some(4), later), Some(4));
        assert_eq!(pool.next(), None);
    }

    #[test]
    fn one_that_cannot_be_made_is_tried_less_and_less() {
        let (mut pool, start) = (Pool::<u8, u32>::new(2), Instant::now());
        assert_eq!(pool.want(Some(1), start), NONE);
        let mut now = start + BEHIND;
        let mut waits = Vec::new();
        for _ in 0..40 {
            assert_eq!(pool.begin(now), Some(1));
            assert_eq!(pool.made(None, now), None);
            let next = pool.next().unwrap();
            waits.push(next - now);
            now = next;
        }
        assert_eq!(waits[..3], [AGAIN, AGAIN * 2, AGAIN * 4]);
        assert_eq!(waits.last(), Some(&AGAIN_AT_MOST));
        assert_eq!(pool.want(Some(2), now), NONE);
        assert_eq!(pool.begin(now + BEHIND), Some(2), "another one may work");
    }

    proptest! {
        /// Whatever happens, none is lost, given twice, or more than are wanted, and what is given fits.
        #[test]
        fn each_is_somebodys(steps in prop::collection::vec((0u8..7, 0u8..3), 1..200), bound in 0usize..4) {
            let mut now = Instant::now();
            let mut pool: Pool<u8, (u8, u32)> = Pool::new(bound);
            let (mut made, mut gone, mut making) = (0u32, Vec::new(), None);
            for (step, word) in steps {
                now += BEHIND / 2;
                match step {
                    0 => gone.extend(pool.want(Some(word), now)),
                    1 => gone.extend(pool.want(None, now)),
                    2 => if let Some(one) = pool.take(&word, now) {
                        prop_assert_eq!(one.0, word);
                        gone.push(one);
                    },
                    3 => if let Some(fit) = pool.begin(now) {
                        prop_assert!(making.is_none());
                        making = Some(fit);
                    },
                    4 => if let Some(fit) = making.take() {
                        made += 1;
                        gone.extend(pool.made(Some((fit, made)), now));
                    },
                    5 => if making.take().is_some() {
                        prop_assert_eq!(pool.made(None, now), None);
                    },
                    _ => gone.extend(pool.check(|one| one.1 % 2 == 0, now)),
                }
                prop_assert!(pool.waiting().len() <= bound);
                prop_assert_eq!(pool.waiting().len() + gone.len(), made as usize);
            }
            let mut all: Vec<u32> = gone.iter().chain(pool.waiting()).map(|one| one.1).collect();
            all.sort_unstable();
            all.dedup();
            prop_assert_eq!(all.len(), made as usize);
        }
    }
}
