//! A guest as a whole: what it says of itself beside what the host sees, its events, its clock, and standing
//! still.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use belljar_protocol::client::{self, system};
use belljar_protocol::v1;

use crate::accounting::{self, CpuTimes};
use crate::again;
use crate::guest::{self, GuestError};
use crate::registry::Found;

/// Bytes of randomness given to a guest at a time.
const SEED: usize = 64;

/// How much later than the agent's own answer its silence is taken for one.
const GRACE: Duration = Duration::from_secs(5);

/// Writing everything out may take this long.
const SYNC_LIMIT: Duration = Duration::from_secs(120);

/// What a sandbox uses.
#[derive(Debug, Clone)]
pub struct Stats {
    /// As the guest says.
    pub guest: v1::Metrics,
    /// As the host counts; the guest cannot falsify it.
    pub host: Option<CpuTimes>,
}

/// What a sandbox uses; `processes`: with each process that was started from outside.
///
/// # Errors
/// The sandbox does not run, or its agent does not answer.
pub fn stats(found: &Found, processes: bool) -> Result<Stats, GuestError> {
    let guest = again::call(found, Some(guest::soon()), |stream, deadline| {
        system::metrics(stream, processes, deadline)
    })?;
    let vmm = found.look().state.vmm();
    Ok(Stats {
        guest,
        host: vmm.and_then(accounting::cpu_times),
    })
}

/// What an agent answers that is asked how it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinged {
    /// From connecting to the answer.
    pub took: Duration,
    pub generation: u32,
    /// Not empty: why the guest is not as it should be.
    pub degraded: String,
    /// Since the guest's kernel started.
    pub up: Duration,
    /// How long the last activity was ago; `None`: there was none yet, or the agent is too old to tell.
    pub idle: Option<Duration>,
    /// How often its worker was replaced.
    pub worker_restarts: u32,
    /// All programs are stopped until somebody thaws them.
    pub frozen: bool,
}

/// Asks the agent how it is. That is not activity: looking at a guest does not keep it awake.
///
/// # Errors
/// The sandbox does not run, or its agent does not answer.
pub fn ping(found: &Found) -> Result<Pinged, GuestError> {
    let begin = Instant::now();
    let (info, pong) = guest::call(found, Some(guest::soon()), client::ping)?;
    let last = pong.last_activity_ns;
    Ok(Pinged {
        took: begin.elapsed(),
        generation: info.generation,
        degraded: info.degraded,
        up: Duration::from_nanos(pong.boottime_ns),
        idle: (last != 0).then(|| Duration::from_nanos(pong.boottime_ns.saturating_sub(last))),
        worker_restarts: pong.worker_restarts,
        frozen: pong.frozen,
    })
}

/// Counts as activity, and does nothing else.
///
/// # Errors
/// The sandbox does not run, or its agent does not answer.
pub fn touch(found: &Found) -> Result<(), GuestError> {
    guest::call(found, Some(guest::soon()), system::touch)
}

/// Sets the guest's clock to a time, or to the host's. Returns what it is then, nanoseconds since 1970.
///
/// # Errors
/// The sandbox does not run, or the guest refuses.
pub fn set_clock(found: &Found, unix_ns: Option<u64>) -> Result<u64, GuestError> {
    guest::call(found, Some(guest::soon()), |stream, deadline| {
        // As late as possible.
        let time = unix_ns.unwrap_or_else(host_unix_ns);
        system::set_clock(stream, time, deadline)
    })
}

fn host_unix_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// Gives the guest fresh randomness of the host, and has its generator start from it.
///
/// # Errors
/// The host has none, the sandbox does not run, or the guest refuses.
pub fn reseed(found: &Found) -> Result<(), GuestError> {
    guest::call(found, Some(guest::soon()), |stream, deadline| {
        let mut seed = vec![0; SEED];
        let flags = rustix::rand::GetRandomFlags::empty();
        rustix::rand::getrandom(&mut seed, flags).map_err(|errno| {
            belljar_protocol::client::CallError::Io {
                doing: "randomness of the host",
                source: errno.into(),
            }
        })?;
        system::reseed(stream, seed, deadline)
    })
}

/// Stops all programs of the guest, its writable drive's file system with them if asked; returns when they
/// are stopped.
///
/// # Errors
/// The sandbox does not run, or not everything has stopped in time: then it goes on.
pub fn freeze(found: &Found, limit: Duration, file_systems: bool) -> Result<(), GuestError> {
    let deadline = Instant::now().checked_add(limit.saturating_add(GRACE));
    guest::call(found, deadline, |stream, deadline| {
        system::freeze(stream, limit, file_systems, deadline)
    })
}

/// Lets them go on; nothing frozen is no error.
///
/// # Errors
/// The sandbox does not run, or the guest refuses.
pub fn thaw(found: &Found) -> Result<(), GuestError> {
    again::call(found, Some(guest::soon()), system::thaw)
}

/// Writes out everything that the guest holds in memory.
///
/// # Errors
/// The sandbox does not run, or it takes longer than two minutes.
pub fn sync(found: &Found) -> Result<(), GuestError> {
    let deadline = Instant::now().checked_add(SYNC_LIMIT);
    again::call(found, deadline, system::sync)
}

/// Reads the events of a guest, for longer than any connection lasts.
#[derive(Debug)]
pub struct Events {
    found: Found,
    reader: Option<system::Events<UnixStream>>,
    next: u64,
    follow: bool,
}

impl Events {
    /// From event number `from` on (0: the oldest kept); `follow`: for ever.
    ///
    /// # Errors
    /// The sandbox does not run, or its agent does not answer.
    pub fn start(found: Found, from: u64, follow: bool) -> Result<Self, GuestError> {
        let mut events = Self {
            found,
            reader: None,
            next: from,
            follow,
        };
        events.connect()?;
        Ok(events)
    }

    /// The next event; `None` when all that are kept were read, unless followed.
    ///
    /// # Errors
    /// The sandbox does not run any more.
    pub fn next_event(&mut self) -> Result<Option<v1::Event>, GuestError> {
        loop {
            let Some(reader) = &mut self.reader else {
                thread::sleep(again::PAUSE);
                self.connect()?;
                continue;
            };
            match reader.next(None) {
                Ok(Some(event)) => {
                    self.next = event.sequence.saturating_add(1);
                    return Ok(Some(event));
                }
                Ok(None) if !self.follow => return Ok(None),
                Ok(None) => self.reader = None,
                Err(error) if again::is_cut(&error) => self.reader = None,
                Err(source) => {
                    let id = self.found.called();
                    return Err(GuestError::Call { id, source });
                }
            }
        }
    }

    fn connect(&mut self) -> Result<(), GuestError> {
        let (from, follow) = (self.next, self.follow);
        let reader = again::call(&self.found, Some(guest::soon()), |stream, deadline| {
            system::Events::start(stream, from, follow, deadline)
        })?;
        self.reader = Some(reader);
        Ok(())
    }
}
