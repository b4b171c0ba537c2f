//! The end of the guest: programs are asked, then killed; their ends are still told.

use std::time::{Duration, Instant};

use super::{Ended, Holder};
use crate::exec::lifecycle::Action;
use crate::sys;

/// After SIGKILL to everything, processes that do not go (stuck in the kernel) hold nothing up.
const KILLED_TIME: Duration = Duration::from_millis(500);

/// How long the worker may take to tell the host the last ends.
const TELL_TIME: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub(super) struct Stopping {
    ended: Ended,
    /// When the next step is taken.
    at: Instant,
    step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// SIGTERM is sent.
    Asked,
    /// SIGKILL is sent.
    Killed,
    /// Nothing runs any more; the ends are on their way.
    Telling,
    Over,
}

impl Stopping {
    pub(super) const fn wakes_at(&self) -> Instant {
        self.at
    }
}

impl Holder {
    /// Begins to end the guest: SIGTERM now, SIGKILL after `grace`.
    pub(super) fn stop(&mut self, ended: Ended, grace: Duration) {
        if self.stopping.is_some() {
            return;
        }
        crate::log!("{ended:?} asked for by the host");
        let now = Instant::now();
        self.stopping = Some(Stopping {
            ended,
            at: now.checked_add(grace).unwrap_or(now),
            step: Step::Asked,
        });
        // What is frozen could not end by itself.
        if self.frozen {
            let _ = self.freeze(false);
        }
        // The worker blocks this signal.
        sys::kill_everything(libc::SIGTERM);
        for process in self.table.all() {
            process.act(Action::Terminate);
        }
    }

    pub(super) fn tick_shutdown(&mut self, now: Instant) {
        let Some(stopping) = &mut self.stopping else {
            return;
        };
        let is_due = stopping.at <= now;
        let cgroups = self.cgroups.as_ref();
        let is_quiet = self.table.running() == 0
            && cgroups.is_none_or(|cgroups| !cgroups.is_populated())
            && orphans(self.worker.pid).is_empty();
        let (step, time) = match stopping.step {
            Step::Asked | Step::Killed if is_quiet => (Step::Telling, TELL_TIME),
            Step::Asked if is_due => {
                for process in self.table.all() {
                    process.act(Action::KillTree);
                }
                if let Some(cgroups) = &self.cgroups {
                    cgroups.kill_all();
                }
                for orphan in orphans(self.worker.pid) {
                    sys::signal_process(orphan, libc::SIGKILL as u32);
                }
                (Step::Killed, KILLED_TIME)
            }
            Step::Killed if is_due => (Step::Telling, TELL_TIME),
            Step::Telling if is_due || self.channels.is_empty() => (Step::Over, TELL_TIME),
            _ => return,
        };
        stopping.step = step;
        stopping.at = now.checked_add(time).unwrap_or(now);
    }

    /// How the guest is to end, once it may.
    pub(super) fn check_stopped(&mut self) -> Option<Ended> {
        self.tick_shutdown(Instant::now());
        let stopping = self.stopping.as_ref()?;
        if stopping.step != Step::Over {
            return None;
        }
        let ended = stopping.ended;
        if let Some(pid) = self.worker.pid {
            sys::signal_process(pid, libc::SIGKILL as u32);
        }
        sys::kill_everything(libc::SIGKILL);
        Some(ended)
    }
}

/// Children of this process but for the worker. What descends from programs is their child, or ours
/// when its parents have gone, wherever it has moved to.
fn orphans(worker: Option<i32>) -> Vec<i32> {
    let thread = rustix::thread::gettid().as_raw_pid();
    let children = crate::boot::read_file(&format!("/proc/self/task/{thread}/children"));
    // A kernel that does not tell them: there are the cgroups, at least.
    let children = children.unwrap_or_default();
    let pids = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    pids.filter(|pid| Some(*pid) != worker).collect()
}
