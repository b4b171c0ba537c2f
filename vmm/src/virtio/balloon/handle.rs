//! What the machine sets and reads, shared with the device. No call waits for the guest.
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::Timespec;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use crate::config::{Balloon as Config, BalloonStats, GuestStats, HintingStatus};
use crate::virtio::chain::Again;
use crate::virtio::device::DeviceState;

const PAGES_PER_MIB: u32 = 256;

/// `free_page_hint_cmd_id` (virtio 1.2 §5.5.6.5): reserved values, and the first of a run.
pub(super) const CMD_STOP: u32 = 0;
pub(super) const CMD_DONE: u32 = 1;
const CMD_FIRST: u32 = 2;

/// The machine's side of a balloon, for any thread.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Inner>);

struct Inner {
    shared: Mutex<Shared>,
    wake: Again,
    timer: OwnedFd,
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonCounters {
    /// Bytes given back to the host, by each way.
    pub inflated_bytes: u64,
    pub reported_bytes: u64,
    pub hinted_bytes: u64,
    /// Ranges that were not RAM, or were too many for one request.
    pub ignored_ranges: u64,
    /// Ranges the host refused to take back.
    pub failed_ranges: u64,
}

#[derive(Default)]
pub(super) struct Shared {
    pub(super) target_pages: u32,
    pub(super) actual_pages: u32,
    pub(super) hinting: Hinting,
    pub(super) guest: GuestStats,
    pub(super) counters: BalloonCounters,
    /// Configuration space changed and the driver was not told yet.
    pub(super) changed: bool,
}

/// A pass of the guest over its free list.
#[derive(Default)]
pub(super) struct Hinting {
    /// Configuration space: what the host wants.
    pub(super) host_cmd: u32,
    /// What the guest said last.
    pub(super) guest_cmd: Option<u32>,
    last_run: u32,
    acknowledge_on_stop: bool,
}

impl Hinting {
    /// Begins a run; one that was under way is over, as its id is stale now.
    fn start(&mut self, acknowledge_on_stop: bool) {
        self.last_run = self.last_run.wrapping_add(1).max(CMD_FIRST);
        self.host_cmd = self.last_run;
        self.acknowledge_on_stop = acknowledge_on_stop;
    }

    /// Lets the guest have its hinted pages back.
    fn done(&mut self) {
        self.host_cmd = CMD_DONE;
    }

    /// The guest sent a command id. Returns whether configuration space changed.
    pub(super) fn heard(&mut self, id: u32) -> bool {
        let was_running = self.is_running();
        self.guest_cmd = Some(id);
        let acknowledge = id == CMD_STOP && was_running && self.acknowledge_on_stop;
        if acknowledge {
            self.done();
        }
        acknowledge
    }

    /// Whether ranges the guest sends now belong to the run the host asked for.
    pub(super) fn is_running(&self) -> bool {
        self.host_cmd >= CMD_FIRST && self.guest_cmd == Some(self.host_cmd)
    }
}

impl Shared {
    pub(super) fn save(&self) -> DeviceState {
        DeviceState::Balloon {
            target_pages: self.target_pages,
            actual_pages: self.actual_pages,
            hinting_host_cmd: self.hinting.host_cmd,
            hinting_guest_cmd: self.hinting.guest_cmd,
            hinting_acknowledge: self.hinting.acknowledge_on_stop,
        }
    }

    /// `false`: this is not the state of a balloon. Statistics are asked for anew.
    pub(super) fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Balloon {
            target_pages,
            actual_pages,
            hinting_host_cmd,
            hinting_guest_cmd,
            hinting_acknowledge,
        } = *state
        else {
            return false;
        };
        self.target_pages = target_pages;
        self.actual_pages = actual_pages;
        self.hinting = Hinting {
            host_cmd: hinting_host_cmd,
            guest_cmd: hinting_guest_cmd,
            // The next run must not have the number of one that the guest knows.
            last_run: hinting_host_cmd.max(hinting_guest_cmd.unwrap_or(0)),
            acknowledge_on_stop: hinting_acknowledge,
        };
        true
    }
}

impl BalloonHandle {
    pub(super) fn new(config: &Config) -> io::Result<Self> {
        let handle = Self(Arc::new(Inner {
            shared: Mutex::new(Shared {
                target_pages: config.amount_mib.saturating_mul(PAGES_PER_MIB),
                ..Shared::default()
            }),
            wake: Again::new()?,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
            )?,
        }));
        handle.set_stats_interval(config.stats_polling_interval_s)?;
        Ok(handle)
    }

    /// Sets how much the guest is asked to give back, in MiB.
    pub fn set_target(&self, mib: u32) {
        self.change(|shared| shared.target_pages = mib.saturating_mul(PAGES_PER_MIB));
    }

    /// Sets how often the guest is asked for statistics, in seconds; 0: never.
    pub fn set_stats_interval(&self, seconds: u16) -> io::Result<()> {
        let interval = Timespec {
            tv_sec: i64::from(seconds),
            tv_nsec: 0,
        };
        let spec = Itimerspec {
            it_interval: interval,
            it_value: interval,
        };
        timerfd_settime(&self.0.timer, TimerfdTimerFlags::empty(), &spec)?;
        Ok(())
    }

    /// The sizes now, and the last statistics the guest sent.
    pub fn stats(&self) -> BalloonStats {
        let shared = self.lock();
        BalloonStats {
            target_pages: shared.target_pages,
            actual_pages: shared.actual_pages,
            target_mib: shared.target_pages / PAGES_PER_MIB,
            actual_mib: shared.actual_pages / PAGES_PER_MIB,
            guest: shared.guest,
        }
    }

    /// Asks the guest to hint its free pages. With `acknowledge_on_stop` it gets them back as
    /// soon as it has named them all, else with [`Self::stop_hinting`].
    pub fn start_hinting(&self, acknowledge_on_stop: bool) {
        self.change(|shared| shared.hinting.start(acknowledge_on_stop));
    }

    /// Ends a run: the guest stops hinting and takes its pages back.
    pub fn stop_hinting(&self) {
        self.change(|shared| shared.hinting.done());
    }

    pub fn hinting(&self) -> HintingStatus {
        let shared = self.lock();
        HintingStatus {
            host_cmd: shared.hinting.host_cmd,
            guest_cmd: shared.hinting.guest_cmd,
        }
    }

    /// Whether a run that was asked for is not over.
    pub fn is_hinting(&self) -> bool {
        self.lock().hinting.host_cmd >= CMD_FIRST
    }

    pub fn counters(&self) -> BalloonCounters {
        self.lock().counters
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) -> &Again {
        &self.0.wake
    }

    pub(super) fn timer_fd(&self) -> RawFd {
        self.0.timer.as_raw_fd()
    }

    /// Makes the timer unreadable.
    pub(super) fn take_tick(&self) {
        let mut count = [0; 8];
        // Nothing to read means that the interval was changed meanwhile.
        let _ = rustix::io::read(&self.0.timer, &mut count);
    }

    /// Changes configuration space, and has the device tell the driver.
    fn change(&self, change: impl FnOnce(&mut Shared)) {
        let mut shared = self.lock();
        change(&mut shared);
        shared.changed = true;
        drop(shared);
        self.0.wake.ask();
    }
}
