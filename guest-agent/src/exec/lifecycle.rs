//! The life of one process as a pure state machine: its time limit, and the one truthful end.

use std::time::{Duration, Instant};

use belljar_protocol::v1::{Exited, OutOfMemory, Signalled, TimedOut, end::How};

/// What the system said about an ended process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Exited(u8),
    Signalled { number: u32, core_dumped: bool },
}

/// What is to be done to the processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// SIGTERM to the process group.
    Terminate,
    /// SIGKILL to everything that descends from it.
    KillTree,
}

/// A time limit: when it ends, and how long SIGTERM may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    pub(crate) at: Instant,
    pub(crate) grace: Duration,
}

#[derive(Debug, Clone, PartialEq)]
enum Phase {
    Running,
    /// The limit has passed and SIGTERM is sent.
    Terminating {
        kill_at: Instant,
    },
    /// The limit has passed and SIGKILL is sent.
    Killed,
    Ended(How),
}

/// One process from its start to its end.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    limit: Option<Limit>,
    phase: Phase,
}

impl Lifecycle {
    /// A process that has just been started.
    pub(crate) const fn new(limit: Option<Limit>) -> Self {
        Self {
            limit,
            phase: Phase::Running,
        }
    }

    /// When [`Self::tick`] wants to be called next.
    pub(crate) const fn wakes_at(&self) -> Option<Instant> {
        match (&self.phase, self.limit) {
            (Phase::Running, Some(limit)) => Some(limit.at),
            (Phase::Terminating { kill_at }, _) => Some(*kill_at),
            _ => None,
        }
    }

    /// Tells the time.
    pub(crate) fn tick(&mut self, now: Instant) -> Option<Action> {
        match (&self.phase, self.limit) {
            (Phase::Running, Some(limit)) if now >= limit.at => {
                match now.checked_add(limit.grace) {
                    Some(kill_at) if !limit.grace.is_zero() => {
                        self.phase = Phase::Terminating { kill_at };
                        Some(Action::Terminate)
                    }
                    _ => {
                        self.phase = Phase::Killed;
                        Some(Action::KillTree)
                    }
                }
            }
            (Phase::Terminating { kill_at }, _) if now >= *kill_at => {
                self.phase = Phase::Killed;
                Some(Action::KillTree)
            }
            _ => None,
        }
    }

    /// The process has ended. `out_of_memory`: the kernel's out-of-memory killer struck in its
    /// cgroup. After a time limit nothing of its tree may go on, so the rest is killed.
    pub(crate) fn ended(&mut self, status: Status, out_of_memory: bool) -> Option<Action> {
        let (how, action) = match self.phase {
            Phase::Ended(_) => return None,
            Phase::Terminating { .. } => (
                How::TimedOut(TimedOut { killed: false }),
                Some(Action::KillTree),
            ),
            Phase::Killed => (How::TimedOut(TimedOut { killed: true }), None),
            Phase::Running => (natural_end(status, out_of_memory), None),
        };
        self.phase = Phase::Ended(how);
        action
    }

    /// How it ended, once it has.
    pub(crate) const fn end(&self) -> Option<&How> {
        match &self.phase {
            Phase::Ended(how) => Some(how),
            _ => None,
        }
    }
}

fn natural_end(status: Status, out_of_memory: bool) -> How {
    match status {
        Status::Exited(code) => How::Exited(Exited { code: code.into() }),
        Status::Signalled { number, .. } if out_of_memory && number == libc::SIGKILL as u32 => {
            How::OutOfMemory(OutOfMemory {})
        }
        Status::Signalled {
            number,
            core_dumped,
        } => How::Signalled(Signalled {
            number,
            core_dumped,
        }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const KILLED: Status = Status::Signalled {
        number: 9,
        core_dumped: false,
    };

    fn limited(start: Instant, grace: Duration) -> Lifecycle {
        Lifecycle::new(Some(Limit {
            at: start + SECOND,
            grace,
        }))
    }

    #[test]
    fn term_then_grace_then_kill() {
        let start = Instant::now();
        let mut life = limited(start, SECOND);
        assert_eq!(life.wakes_at(), Some(start + SECOND));
        assert_eq!(life.tick(start), None);
        assert_eq!(life.tick(start + SECOND), Some(Action::Terminate));
        assert_eq!(life.tick(start + SECOND), None);
        assert_eq!(life.wakes_at(), Some(start + 2 * SECOND));
        assert_eq!(life.tick(start + 2 * SECOND), Some(Action::KillTree));
        assert_eq!(life.wakes_at(), None);
        assert_eq!(life.ended(KILLED, false), None);
        assert_eq!(life.end(), Some(&How::TimedOut(TimedOut { killed: true })));
    }

    #[test]
    fn a_clean_exit_after_term_is_still_a_time_out_and_the_rest_is_killed() {
        let start = Instant::now();
        let mut life = limited(start, SECOND);
        life.tick(start + SECOND);
        assert_eq!(life.ended(Status::Exited(0), false), Some(Action::KillTree));
        assert_eq!(life.end(), Some(&How::TimedOut(TimedOut { killed: false })));
    }

    #[test]
    fn no_grace_kills_at_once() {
        let start = Instant::now();
        let mut life = limited(start, Duration::ZERO);
        assert_eq!(life.tick(start + SECOND), Some(Action::KillTree));
    }

    #[test]
    fn out_of_memory_is_told_only_for_its_own_signal() {
        let ended = |status, out_of_memory| {
            let mut life = Lifecycle::new(None);
            life.ended(status, out_of_memory);
            life.end().cloned().unwrap()
        };
        assert_eq!(ended(KILLED, true), How::OutOfMemory(OutOfMemory {}));
        assert!(matches!(ended(KILLED, false), How::Signalled(_)));
        assert!(matches!(
            ended(Status::Exited(137), true),
            How::Exited(Exited { code: 137 })
        ));
        let aborted = Status::Signalled {
            number: 6,
            core_dumped: true,
        };
        assert!(matches!(
            ended(aborted, true),
            How::Signalled(Signalled {
                number: 6,
                core_dumped: true
            })
        ));
    }

    proptest! {
        #[test]
        fn the_end_never_changes_and_comes_only_from_an_ended_process(
            steps in proptest::collection::vec((0_u8..3, 0_u64..5000, any::<u8>()), 0..20),
            grace in 0_u64..3000,
        ) {
            let start = Instant::now();
            let mut life = limited(start, Duration::from_millis(grace));
            let mut first: Option<How> = None;
            for (kind, at, code) in steps {
                match kind {
                    0 => { life.ended(Status::Exited(code), false); }
                    _ => { life.tick(start + Duration::from_millis(at)); }
                }
                match (&first, life.end()) {
                    (Some(before), now) => prop_assert_eq!(Some(before), now),
                    (None, Some(end)) => {
                        prop_assert_eq!(kind, 0);
                        first = Some(end.clone());
                    }
                    (None, None) => {}
                }
            }
        }
    }
}
