//! Stopping all programs, and the writable drive's file system with them.
//!
//! Whoever freezes for a snapshot needs to know that nothing moves: the answer comes when the kernel says
//! so, and a freeze whose caller has gone is undone. While the file system is frozen the agent itself must
//! not write to it: calls that change files are refused ([`super::quiet`]), and its own files are in
//! memory. So a worker that is replaced meanwhile changes nothing; the next one can thaw.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, TryLockError, mpsc};
use std::time::{Duration, Instant};

use belljar_protocol::v1::{self, error::Code, event::What, reply::Result as Answer};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::super::conn::{Conn, timespec};
use super::super::{Answered, Context, Failure, Outcome, procfs, refusal, system_error};
use super::{post, quiet};
use crate::sys;
use crate::wire::to_holder::Message as Asked;

/// Unless the call says.
const LIMIT: Duration = Duration::from_secs(5);

/// Should the kernel not tell of the change, it is looked at this often.
const LOOK: Duration = Duration::from_millis(100);

/// Longer than anybody waits for a snapshot.
const LONGEST: Duration = Duration::from_secs(60);

/// One freeze at a time. A thaw waits for none.
static TURN: Mutex<()> = Mutex::new(());

/// Counts thaws: a freeze that is under way when one comes has failed.
static THAWS: AtomicU64 = AtomicU64::new(0);

/// A thread is still freezing the drive, though its caller may have given up.
static FREEZER: AtomicBool = AtomicBool::new(false);

/// Programs are stopped, or are being stopped.
static PROGRAMS: AtomicBool = AtomicBool::new(false);

/// For a worker that starts: what it would know had it been there when the guest was frozen.
pub(in super::super) fn assume(user_cgroup: &str) {
    let path = format!("{user_cgroup}/cgroup.freeze");
    let frozen = std::fs::read(path).is_ok_and(|content| content.starts_with(b"1"));
    PROGRAMS.store(frozen, Ordering::Relaxed);
    quiet::assume(frozen);
}

/// Whether none can be started now.
pub(in super::super) fn is_guest_frozen() -> bool {
    PROGRAMS.load(Ordering::Relaxed)
}

/// Whether all of them are stopped, as the kernel says.
pub(super) fn programs_stand_still(context: &Context) -> Result<bool, v1::Error> {
    let path = format!("{}/cgroup.events", context.config.user_cgroup);
    let failed = |errno| system_error(format_args!("reading {path}"), errno);
    let mut text = [0; 256];
    let events = procfs::open(&path).map_err(failed)?;
    let got = rustix::io::read(&events, &mut text).map_err(failed)?;
    Ok(is_frozen(text.get(..got).unwrap_or_default()))
}

/// Freezes; answers when all is stopped. What fails half-way is undone.
pub(in super::super) fn freeze(context: &Context, conn: &mut Conn, call: v1::Freeze) -> Answered {
    let limit = match call.time_limit_ms {
        0 => LIMIT,
        limit => Duration::from_millis(limit).min(LONGEST),
    };
    let _turn = match TURN.try_lock() {
        Ok(turn) => turn,
        Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
        Err(TryLockError::WouldBlock) => {
            return Err(refusal(Code::Busy, "somebody else is freezing the guest").into());
        }
    };
    let waiting = Waiting {
        deadline: Instant::now().checked_add(limit),
        thaws: THAWS.load(Ordering::Acquire),
    };
    context.holder.ask(Asked::Freeze(true))?;
    PROGRAMS.store(true, Ordering::Relaxed);
    let frozen = wait_frozen(&context.config.user_cgroup, conn, &waiting)
        .and_then(|()| {
            if call.file_systems {
                quiet::begin(waiting.deadline)?;
                freeze_disk(context, waiting.deadline)
            } else {
                Ok(())
            }
        })
        .and_then(|()| waiting.not_thawed());
    if let Err(error) = frozen {
        undo(context)?;
        return Err(error.into());
    }
    if let Err(error) = conn.send(&context.head(Answer::Freeze(v1::Frozen {}))) {
        // Nobody knows of it, so nobody would thaw.
        undo(context)?;
        return Err(error.into());
    }
    post(context, What::Frozen(v1::Frozen {}));
    Ok(Outcome::Streamed)
}

/// Undoes a freeze; nothing frozen is no error.
pub(in super::super) fn thaw(context: &Context) -> Answered {
    undo(context)?;
    post(context, What::Thawed(v1::Thawed {}));
    Ok(Outcome::Reply(Answer::Thaw(v1::Thawed {})))
}

/// What bounds a freeze that is under way.
struct Waiting {
    deadline: Option<Instant>,
    /// [`THAWS`] at its begin.
    thaws: u64,
}

impl Waiting {
    fn not_thawed(&self) -> Result<(), v1::Error> {
        if THAWS.load(Ordering::Acquire) == self.thaws {
            return Ok(());
        }
        Err(refusal(
            Code::Conflict,
            "somebody has thawed the guest meanwhile",
        ))
    }
}

fn undo(context: &Context) -> Result<(), Failure> {
    // The drive first: programs that go on must not stop at it at once.
    let thawed = thaw_drive(context);
    thaw_programs(context)?;
    Ok(thawed?)
}

/// Makes the writable drive writable again; programs stay as they are.
pub(super) fn thaw_drive(context: &Context) -> Result<(), v1::Error> {
    THAWS.fetch_add(1, Ordering::AcqRel);
    let thawed = match open_disk(context) {
        Ok(Some(disk)) => thaw_disk(&disk),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    quiet::end();
    thawed
}

/// Lets programs go on.
pub(super) fn thaw_programs(context: &Context) -> Result<(), Failure> {
    context.holder.ask(Asked::Freeze(false))?;
    PROGRAMS.store(false, Ordering::Relaxed);
    Ok(())
}

/// Waits until the kernel says that all programs are stopped.
fn wait_frozen(cgroup: &str, host: &Conn, waiting: &Waiting) -> Result<(), v1::Error> {
    let path = format!("{cgroup}/cgroup.events");
    let failed = |errno| system_error(format_args!("reading {path}"), errno);
    let events = procfs::open(&path).map_err(failed)?;
    loop {
        // Opening it anew for each look would miss the change in between.
        let mut text = [0; 256];
        let got = rustix::io::pread(&events, &mut text, 0).map_err(failed)?;
        if is_frozen(text.get(..got).unwrap_or_default()) {
            return Ok(());
        }
        waiting.not_thawed()?;
        let left = waiting
            .deadline
            .map(|at| at.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            let message = "not all programs have stopped in time; they go on";
            return Err(refusal(Code::Deadline, message));
        }
        let time = left.map_or(LOOK, |left| left.min(LOOK));
        let mut set = [
            PollFd::new(&events, PollFlags::PRI),
            PollFd::new(host, PollFlags::RDHUP),
        ];
        match poll(&mut set, Some(&timespec(time))) {
            Ok(_) => {
                let [_, host] = &set;
                if !host.revents().is_empty() {
                    return Err(refusal(Code::Deadline, "the host has hung up"));
                }
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
}

fn is_frozen(events: &[u8]) -> bool {
    events
        .split(|byte| *byte == b'\n')
        .any(|line| line == b"frozen 1")
}

/// Writes everything out and freezes the writable drive, if there is one.
fn freeze_disk(context: &Context, deadline: Option<Instant>) -> Result<(), v1::Error> {
    let Some(disk) = open_disk(context)? else {
        rustix::fs::sync();
        return Ok(());
    };
    let own = rustix::io::fcntl_dupfd_cloexec(&disk, 0).map_err(failed_to_open)?;
    let (sender, receiver) = mpsc::channel();
    if FREEZER.swap(true, Ordering::AcqRel) {
        return Err(refusal(
            Code::Busy,
            "an earlier freeze is still writing out the drive",
        ));
    }
    // Writing out may take longer than the caller wants to wait.
    let made = std::thread::Builder::new().spawn(move || {
        rustix::fs::sync();
        let frozen = sys::freeze_file_system(own.as_fd());
        let is_ours = frozen.is_ok();
        if sender.send(frozen).is_err() && is_ours {
            let _ = sys::thaw_file_system(own.as_fd());
        }
        FREEZER.store(false, Ordering::Release);
    });
    if let Err(error) = made {
        FREEZER.store(false, Ordering::Release);
        return Err(refusal(
            Code::Busy,
            format!("no thread to freeze with: {error}"),
        ));
    }
    let left = deadline.map_or(Duration::MAX, |at| {
        at.saturating_duration_since(Instant::now())
    });
    match receiver.recv_timeout(left) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => match Errno::from_io_error(&error).unwrap_or(Errno::IO) {
            // It was frozen before.
            Errno::BUSY => Ok(()),
            errno => Err(system_error("freezing the writable drive", errno)),
        },
        // Should it be done just now, the thaw that follows undoes it.
        Err(_) => Err(refusal(
            Code::Deadline,
            "the writable drive could not be written out in time",
        )),
    }
}

/// The mounted drive, which is not to be seen from the root.
fn open_disk(context: &Context) -> Result<Option<OwnedFd>, v1::Error> {
    if context.config.disk.is_empty() {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(&*context.config.disk, flags, Mode::empty());
    opened.map(Some).map_err(failed_to_open)
}

fn failed_to_open(errno: Errno) -> v1::Error {
    system_error("opening the writable drive", errno)
}

fn thaw_disk(disk: &OwnedFd) -> Result<(), v1::Error> {
    match sys::thaw_file_system(disk.as_fd()) {
        Ok(()) => Ok(()),
        Err(error) => match Errno::from_io_error(&error).unwrap_or(Errno::IO) {
            // It was not frozen.
            Errno::INVAL => Ok(()),
            errno => Err(system_error("thawing the writable drive", errno)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frozen_is_a_line_of_its_own() {
        assert!(is_frozen(b"populated 1\nfrozen 1\n"));
        assert!(!is_frozen(b"populated 1\nfrozen 0\n"));
        assert!(!is_frozen(b"frozen 10\n"));
        assert!(!is_frozen(b""));
    }
}
