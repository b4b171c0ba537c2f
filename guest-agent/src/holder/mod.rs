//! The holder: PID 1's life after the boot. It holds what must not die (processes, terminals, pipes,
//! their output, cgroups), reaps, and keeps a worker running that speaks with the host.
//!
//! One thread, one epoll set, every descriptor non-blocking and edge-triggered. It parses nothing that
//! comes from a program, a file of the guest or the host, but for the frames of its own worker, which
//! it bounds and checks all the same.

mod abandoned;
mod announce;
mod channel;
mod end;
mod events;
mod info;
mod input;
mod process;
mod pump;
mod requests;
mod ring;
#[cfg(test)]
mod scenes;
mod shutdown;
mod start;
mod table;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use belljar_protocol::v1;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fs::{Mode, OFlags, Timespec};
use rustix::io::Errno;

use self::abandoned::Abandoned;
use self::announce::Announcement;
use self::channel::Channel;
use self::events::Events;
use self::shutdown::Stopping;
use self::table::Table;
use self::worker::Worker;
use crate::exec::cgroup::{Cgroups, Leaf};
use crate::sys::{self, spawn::Spawner};

/// Size of the one read buffer: what a pipe holds.
const SCRATCH: usize = 64 << 10;

/// Channels at a time: one for each call, so as many as the worker has threads, and some.
const MAX_CHANNELS: usize = 2048;

/// No program has been started or has ended for so long: there is time to tidy up.
const QUIET: Duration = Duration::from_millis(2);

/// How often programs are looked at whose start takes long.
const START_PAUSE: Duration = Duration::from_millis(3);

/// Tokens of the epoll set: a number times `KINDS` plus the kind of descriptor.
const KINDS: u64 = 8;
const KIND_OWN: u64 = 0;
const KIND_CHANNEL: u64 = 1;
const KIND_STDIN: u64 = 2;
const KIND_STDOUT: u64 = 3;
const KIND_STDERR: u64 = 4;
const KIND_TERMINAL: u64 = 5;
/// Numbers of KIND_OWN.
const OWN_SIGNALS: u64 = 0;
const OWN_CONTROL: u64 = 1;
const OWN_ANNOUNCE: u64 = 2;
const OWN_MEMORY: u64 = 3;

/// How the service ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    PowerOff,
    Reboot,
}

/// What a holder is made of.
#[derive(Debug)]
pub(crate) struct Setup {
    /// Listening and blocking: the worker's.
    pub(crate) listener: OwnedFd,
    pub(crate) cgroups: Option<Cgroups>,
    /// Not empty: the guest did not come up as asked.
    pub(crate) degraded: String,
    /// Soft limit of descriptors that programs are started with.
    pub(crate) descriptors: u64,
    /// The writable drive, open as long as this process lives.
    pub(crate) disk: Option<RawFd>,
}

/// See the module.
pub(crate) struct Holder {
    epoll: OwnedFd,
    signals: OwnedFd,
    null: OwnedFd,
    spawner: Spawner,
    worker: Worker,
    cgroups: Option<Cgroups>,
    descriptors: u64,
    /// All programs are stopped, and none must be started.
    frozen: bool,
    /// Where workers note the last activity.
    _activity: OwnedFd,
    table: Table,
    channels: BTreeMap<u64, Channel>,
    last_channel: u64,
    events: Events,
    /// Programs that do not run yet.
    starting: Vec<start::Pending>,
    /// Starts of a name that is being started: they wait for what becomes of that one.
    followers: Vec<(u64, crate::wire::Start)>,
    /// When processes want to be looked at.
    timers: BTreeSet<(Instant, u64)>,
    /// Processes with more to do than fitted into their turn.
    again: BTreeSet<u64>,
    /// Channels with frames that are not flushed yet.
    dirty: BTreeSet<u64>,
    /// What is left of forgotten processes.
    abandoned: Abandoned,
    /// Processes that have ended, with a cgroup that may not be empty yet.
    emptied: Vec<u64>,
    /// Cgroups whose program has ended.
    returned: Vec<Leaf>,
    /// When to tidy up, if there is something.
    tidy_at: Option<Instant>,
    /// For what programs write, and for what the worker sends.
    scratch: Vec<u8>,
    inbox: Vec<u8>,
    announcement: Option<Announcement>,
    stopping: Option<Stopping>,
}

impl Holder {
    /// A holder with its first worker running.
    pub(crate) fn new(setup: Setup) -> io::Result<Self> {
        let mut holder = Self::without_worker(setup)?;
        holder.start_worker();
        Ok(holder)
    }

    fn without_worker(setup: Setup) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let signals = sys::child_signals()?;
        let token = EventData::new_u64(own(OWN_SIGNALS));
        epoll::add(&epoll, &signals, token, EventFlags::IN)?;
        if let Some(events) = setup.cgroups.as_ref().and_then(Cgroups::memory_events) {
            let token = EventData::new_u64(own(OWN_MEMORY));
            epoll::add(&epoll, events, token, EventFlags::IN | EventFlags::ET)?;
        }
        let mut abilities: Vec<i32> = crate::ABILITIES.iter().map(|it| *it as i32).collect();
        if setup.cgroups.is_some() {
            abilities.push(v1::Ability::Cgroups as i32);
            abilities.push(v1::Ability::Freeze as i32);
        }
        let activity = high(activity_note()?)?;
        let path_of = |fd: RawFd| format!("/proc/{}/fd/{fd}", std::process::id());
        let config = crate::wire::WorkerConfig {
            abilities,
            degraded: setup.degraded,
            restarts: 0,
            user_cgroup: setup
                .cgroups
                .as_ref()
                .map(|cgroups| cgroups.user_path().to_owned())
                .unwrap_or_default(),
            disk: setup.disk.map(path_of).unwrap_or_default(),
            activity: path_of(activity.as_raw_fd()),
        };
        Ok(Self {
            epoll,
            signals,
            null: high(open_null()?)?,
            spawner: Spawner::new(),
            worker: Worker::new(high(setup.listener)?, config),
            cgroups: setup.cgroups,
            descriptors: setup.descriptors,
            frozen: false,
            _activity: activity,
            table: Table::new(ring_budget()),
            channels: BTreeMap::new(),
            last_channel: 0,
            events: Events::new(),
            starting: Vec::new(),
            followers: Vec::new(),
            timers: BTreeSet::new(),
            again: BTreeSet::new(),
            dirty: BTreeSet::new(),
            abandoned: Abandoned::default(),
            emptied: Vec::new(),
            returned: Vec::new(),
            tidy_at: Some(Instant::now()),
            scratch: vec![0; SCRATCH],
            inbox: vec![0; SCRATCH],
            announcement: None,
            stopping: None,
        })
    }

    /// What replies say the agent can do.
    pub(crate) fn abilities(&self) -> &[i32] {
        &self.worker.config.abilities
    }

    /// Tells the host once that the guest is ready. Nothing waits for it.
    pub(crate) fn announce(&mut self, ready: &v1::Ready) {
        match Announcement::begin(ready) {
            Ok(announcement) => {
                let data = EventData::new_u64(own(OWN_ANNOUNCE));
                let flags = EventFlags::OUT | EventFlags::ET;
                if epoll::add(&self.epoll, &announcement, data, flags).is_ok() {
                    self.announcement = Some(announcement);
                }
            }
            // A host that waits for no announcement, or an early transport: it can still call.
            Err(error) => crate::log!("cannot announce: {error}"),
        }
    }

    /// Serves until the guest is to end; returns when its processes have.
    pub(crate) fn run(&mut self) -> Ended {
        let mut events = Vec::with_capacity(64);
        loop {
            if let Some(ended) = self.check_stopped() {
                return ended;
            }
            self.flush_channels();
            events.clear();
            let timeout = self.timeout();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    crate::log!("epoll_wait failed: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            for event in &events {
                self.dispatch(*event);
            }
            self.tick();
            for id in std::mem::take(&mut self.again) {
                self.drive(id);
            }
        }
    }

    fn dispatch(&mut self, event: Event) {
        let flags = event.flags;
        let ended = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        let readable = ended || flags.contains(EventFlags::IN);
        let writable = ended || flags.contains(EventFlags::OUT);
        let token = event.data.u64();
        let id = token / KINDS;
        match token % KINDS {
            KIND_OWN => match id {
                OWN_SIGNALS => self.reap(),
                OWN_CONTROL => self.take_channels(),
                OWN_MEMORY => self.note_out_of_memory(),
                OWN_ANNOUNCE => {
                    let done = self.announcement.as_mut().is_none_or(Announcement::advance);
                    if done {
                        self.announcement = None;
                    }
                }
                _ => {}
            },
            KIND_CHANNEL => {
                if let Some(channel) = self.channels.get_mut(&id) {
                    channel.readable |= readable;
                    channel.writable |= writable;
                    if channel.has_unsent() {
                        self.dirty.insert(id);
                    }
                    self.serve_channel(id);
                }
            }
            kind => {
                if let Some(process) = self.table.get_mut(id) {
                    if matches!(kind, KIND_STDIN | KIND_TERMINAL) {
                        process.stdin_writable |= writable;
                    }
                    let at = usize::from(kind == KIND_STDERR);
                    if kind != KIND_STDIN
                        && let Some(output) = process.outputs.get_mut(at)
                    {
                        output.readable |= readable;
                    }
                }
                self.drive(id);
            }
        }
    }

    fn watch(&self, fd: &impl AsFd, token: u64, flags: EventFlags) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, fd, EventData::new_u64(token), flags)
    }

    /// Does what is due by now.
    fn tick(&mut self) {
        let now = Instant::now();
        while let Some(first) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.remove(&first);
            self.tick_process(first.1, now);
        }
        if self
            .announcement
            .as_ref()
            .is_some_and(|it| it.expires() <= now)
        {
            self.announcement = None;
        }
        if self.worker.restart_at.is_some_and(|at| at <= now) {
            self.start_worker();
        }
        self.check_starting();
        self.tick_shutdown(now);
        if self.tidy_at.is_some_and(|at| at <= now) {
            self.tidy();
        }
    }

    /// How long nothing is due. Zero while processes wait for a turn or there is tidying to do.
    fn timeout(&self) -> Option<Timespec> {
        let is_untidy = self.tidy_at.is_some_and(|at| at <= Instant::now());
        if !self.again.is_empty() || is_untidy {
            return Some(Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            });
        }
        let next = self
            .timers
            .first()
            .map(|(at, _)| *at)
            .into_iter()
            .chain(self.announcement.as_ref().map(Announcement::expires))
            .chain(self.worker.restart_at)
            .chain(
                self.starting
                    .first()
                    .and_then(|_| Instant::now().checked_add(START_PAUSE)),
            )
            .chain(self.stopping.as_ref().map(Stopping::wakes_at))
            .chain(self.tidy_at)
            .min()?;
        let left = next.saturating_duration_since(Instant::now());
        // Rounded up by a millisecond: the system's resolution here, and waking early would spin.
        let left = left.saturating_add(Duration::from_millis(1));
        Timespec::try_from(left).ok()
    }

    /// There is something to tidy up. What that takes is taken from whoever starts a program next, so it
    /// waits until nobody does, or until there is no cgroup left to start one in.
    fn note_untidy(&mut self) {
        self.tidy_at = Instant::now().checked_add(QUIET);
    }

    /// The same, after the end of a program.
    fn note_untidy_end(&mut self) {
        let is_due = self.cgroups.as_ref().is_some_and(Cgroups::has_none_ready);
        match is_due {
            true => self.tidy_at = Some(Instant::now()),
            false => self.note_untidy(),
        }
    }

    fn tidy(&mut self) {
        self.tidy_at = None;
        self.collect_leaves();
        if let Some(cgroups) = &mut self.cgroups {
            for leaf in self.returned.drain(..) {
                cgroups.give_back(&leaf);
            }
            cgroups.tidy();
        }
    }

    /// Notes an event for those who follow them.
    fn add_event(&mut self, what: v1::event::What) {
        self.events.add(what, crate::boot::now_ns(), unix_ns());
        self.feed_events();
    }
}

const fn own(number: u64) -> u64 {
    number * KINDS + KIND_OWN
}

const fn token(id: u64, kind: u64) -> u64 {
    id.wrapping_mul(KINDS).wrapping_add(kind)
}

/// CLOCK_REALTIME, nanoseconds since 1970.
fn unix_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}

/// Memory for all rings together, bytes: an eighth of the RAM.
fn ring_budget() -> usize {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit.max(1));
    let ram = info.totalram.saturating_mul(unit);
    let budget = (ram / 8).clamp(4 << 20, 256 << 20);
    usize::try_from(budget).unwrap_or(256 << 20)
}

/// `/dev/null`, or in a guest that came up without it, a pipe that is at its end.
fn open_null() -> io::Result<OwnedFd> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let fd = null.or_else(|_| {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map(|(read, _)| read)
    })?;
    Ok(fd)
}

/// Eight bytes of memory that belong to no worker.
fn activity_note() -> io::Result<OwnedFd> {
    let note = rustix::fs::memfd_create(c"activity", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::io::pwrite(&note, &crate::boot::now_ns().to_ne_bytes(), 0)?;
    Ok(note)
}

/// The same descriptor with a number that programs are not given theirs by: they get them by
/// copying, which must not overwrite one that is still to be copied.
fn high(fd: OwnedFd) -> io::Result<OwnedFd> {
    const FIRST: i32 = 8;
    if fd.as_raw_fd() >= FIRST {
        return Ok(fd);
    }
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, FIRST)?)
}
