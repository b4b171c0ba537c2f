//! VMMs that wait for the next restore of the snapshot that was restored last.
//!
//! Each has a supervisor, which is started here and waits in a directory of its own. The VMM has its VM, and RAM mapped,
//! before anybody asks. Nothing here is in the way of a restore: they are made behind it, one at a time, and whoever
//! restores takes one that fits or does without. All of them end with this process: their supervisors wait for that at
//! the socket they were started with. A supervisor is trusted little: one that is late is killed, and its VMM with it.

mod fit;
mod pool;

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use belljar_store::SnapshotId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use self::fit::{Fit, Needs, Target};
use self::pool::Pool;
use super::capture::memory;
use super::templates::Part;
use super::{Shared, Surroundings, locked, log};
use crate::READY_MODE;
use crate::v1::{self, order::Order};
use crate::wire::Connection;

/// Unless [`crate::READY_VARIABLE`] says.
const BOUND: u64 = 2;
/// However many are asked for.
const BOUND_AT_MOST: u64 = 64;
/// The folder in which they wait.
const FOLDER: &str = "ready";
/// First argument of a supervisor, and its name in lists of processes.
const MODE: &str = "__supervise";
const NAME: &str = "belljar-supervisor";
/// One that is not prepared within this time never is.
const PREPARE_LIMIT: Duration = Duration::from_secs(15);
/// One that was hung up on has ended within this time.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks whether there is something to do that nobody asked for.
const LOOK: Duration = Duration::from_millis(250);
/// Of this machine's memory, what must be free so that another one is made: one part of so many.
const FREE_SHARE: u64 = 16;

/// Those that wait, and what they wait for.
pub(crate) struct ReadyVmms {
    pool: Mutex<Pool<Fit, Waiting>>,
    /// The snapshot that was restored last.
    target: Mutex<Option<Target>>,
    children: Mutex<Vec<Kid>>,
    /// Directories that were made for them.
    made: AtomicU64,
}

/// A VMM that is prepared. Dropping it ends it.
struct Waiting {
    socket: UnixStream,
    supervisor: OwnedFd,
    /// Of the supervisor and of the VMM.
    pids: (u32, u32),
}

impl Waiting {
    /// It has said nothing since, and its supervisor is there.
    fn is_good(&self) -> bool {
        let mut set = [
            PollFd::new(&self.socket, PollFlags::IN),
            PollFd::new(&self.supervisor, PollFlags::IN),
        ];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut set, Some(&now)) == Ok(0)
    }
}

/// A supervisor that was started here, until it is reaped.
struct Kid {
    child: Child,
    dir: PathBuf,
    /// It is killed then; `None`: it waits, or has a sandbox.
    end_by: Option<Instant>,
    /// Somebody waits for it to be prepared.
    is_new: bool,
}

impl ReadyVmms {
    /// What an earlier keeper's left goes.
    pub(super) fn new(bound: Option<u64>) -> Self {
        let _ = std::fs::remove_dir_all(FOLDER);
        let bound = bound.unwrap_or(BOUND).min(BOUND_AT_MOST);
        Self {
            pool: Mutex::new(Pool::new(usize::try_from(bound).unwrap_or(0))),
            target: Mutex::default(),
            children: Mutex::default(),
            made: AtomicU64::new(0),
        }
    }

    /// A snapshot is being restored with this memory: one that waits for it, if there is one. From now on others are
    /// kept for it. Its supervisor's socket, and pidfd.
    pub(super) fn restoring(
        &self,
        id: SnapshotId,
        vcpus: u32,
        programs: &v1::Programs,
        needs: Option<Needs<'_>>,
        system: &dyn Surroundings,
    ) -> Option<(OwnedFd, OwnedFd)> {
        if locked(&self.pool).is_off() {
            return None;
        }
        let target = Target {
            id,
            vcpus,
            programs: programs.clone(),
        };
        let fit = needs.and_then(|needs| Fit::of(&target, needs, system).ok());
        *locked(&self.target) = Some(target);
        let fit = fit?;
        loop {
            let waiting = locked(&self.pool).take(&fit, Instant::now())?;
            if waiting.is_good() {
                return Some((waiting.socket.into(), waiting.supervisor));
            }
            self.end([waiting]);
        }
    }

    /// A snapshot is gone.
    pub(super) fn forget(&self, id: SnapshotId) {
        locked(&self.target).take_if(|target| target.id == id);
        let of_it = |fit: &Fit| fit.target.id == id;
        let mut pool = locked(&self.pool);
        let gone = if pool.fit().is_some_and(of_it) {
            pool.want(None, Instant::now())
        } else {
            Vec::new()
        };
        drop(pool);
        self.end(gone);
    }

    /// None waits any more, nor is made, until something is restored. True if there were any, which have ended.
    pub(super) fn clear(&self) -> bool {
        *locked(&self.target) = None;
        let (gone, was_making) = {
            let mut pool = locked(&self.pool);
            (pool.want(None, Instant::now()), pool.is_making())
        };
        let were = was_making || !gone.is_empty();
        self.end(gone);
        let deadline = Instant::now() + END_LIMIT;
        loop {
            // The one that is made may not have been started before, and be wanted again by now.
            let is_made_in_vain = {
                let pool = locked(&self.pool);
                pool.is_making() && pool.fit().is_none()
            };
            if is_made_in_vain {
                self.kill_new();
            }
            let some_end = self.reap();
            if !(some_end || is_made_in_vain) || Instant::now() >= deadline {
                return were;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whoever waits for one that is being prepared sees its end.
    fn kill_new(&self) {
        for kid in locked(&self.children).iter_mut().filter(|kid| kid.is_new) {
            let _ = kid.child.kill();
        }
    }

    /// Hangs up on them.
    fn end(&self, waiting: impl IntoIterator<Item = Waiting>) {
        for one in waiting {
            let pid = one.pids.0;
            drop(one);
            self.set_limit(pid, Some(Instant::now() + END_LIMIT));
        }
    }

    fn set_limit(&self, pid: u32, end_by: Option<Instant>) {
        for kid in locked(&self.children).iter_mut() {
            if kid.child.id() == pid {
                kid.end_by = end_by;
                kid.is_new = false;
            }
        }
    }

    /// Forgets those that have ended, and kills those that should have. True if there are some that should.
    fn reap(&self) -> bool {
        let now = Instant::now();
        let mut children = locked(&self.children);
        children.retain_mut(|kid| {
            if kid.end_by.is_some_and(|at| now >= at) {
                let _ = kid.child.kill();
            }
            let over = !matches!(kid.child.try_wait(), Ok(None));
            if over {
                // Unless it did so itself.
                let _ = std::fs::remove_dir_all(&kid.dir);
            }
            !over
        });
        children.iter().any(|kid| kid.end_by.is_some())
    }

    /// How many wait, and the bytes of memory that they have for themselves, about.
    pub(super) fn usage(&self) -> (u64, u64) {
        let pids: Vec<(u32, u32)> = locked(&self.pool)
            .waiting()
            .iter()
            .map(|one| one.pids)
            .collect();
        let each = pids.iter().flat_map(|(one, other)| [one, other]);
        let bytes = each.map(|pid| own_bytes(*pid)).sum();
        (pids.len() as u64, bytes)
    }

    /// A directory that none ever waited in.
    fn new_dir(&self) -> io::Result<PathBuf> {
        let make = |path: &Path, recursive| {
            let mut builder = DirBuilder::new();
            builder.recursive(recursive).mode(0o700).create(path)
        };
        let folder = std::path::absolute(FOLDER)?;
        make(&folder, true)?;
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        // A supervisor of an earlier keeper may still remove its own.
        let dir = folder.join(format!("{}-{number}", std::process::id()));
        make(&dir, false)?;
        Ok(dir)
    }

    /// When another one is to be begun.
    fn next(&self) -> Option<Instant> {
        locked(&self.pool).next()
    }
}

/// Memory of a process that it shares with none, or as its part of what it shares.
fn own_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// [`look_after`]s them in a thread of its own, until the other end of the channel is dropped: it looks at paths that
/// clients have named, and one on a server that is gone may take for ever. Then no VMM is made ready, and that is all.
pub(super) fn begin(shared: &Arc<Shared>, until: mpsc::Receiver<()>) -> io::Result<()> {
    let shared = Arc::clone(shared);
    let look = move || {
        loop {
            let next = shared.ready.next();
            let next = next.map(|next| next.saturating_duration_since(Instant::now()));
            let wait = next.unwrap_or(LOOK).min(LOOK);
            if until.recv_timeout(wait) != Err(mpsc::RecvTimeoutError::Timeout) {
                return;
            }
            look_after(&shared);
        }
    };
    let thread = std::thread::Builder::new().name("pool".to_owned());
    thread.spawn(look).map(drop)
}

/// Ends what is not good any more, and begins to make what is missing.
fn look_after(shared: &Arc<Shared>) {
    let ready = &shared.ready;
    ready.reap();
    let target = locked(&ready.target).clone();
    let fit = target.and_then(|target| {
        let (memory, set) = current(shared, target.id)?;
        Fit::of(&target, (&memory, set.as_ref()), &*shared.surroundings).ok()
    });
    let now = Instant::now();
    let (gone, wanted) = {
        let mut pool = locked(&ready.pool);
        let mut gone = pool.want(fit, now);
        gone.extend(pool.check(Waiting::is_good, now));
        (gone, pool.begin(now))
    };
    ready.end(gone);
    let Some(fit) = wanted else {
        return;
    };
    let with = Arc::clone(shared);
    let make = move || {
        let made = make(&with, &fit);
        if let Err(error) = &made {
            log::line(&format!("no VMM is made ready: {error}"));
        }
        let ready = &with.ready;
        // Whoever clears sees it being made, or being ended.
        let mut pool = locked(&ready.pool);
        ready.end(pool.made(made.ok(), Instant::now()));
    };
    let spawned = std::thread::Builder::new()
        .name("ready".to_owned())
        .spawn(make);
    if let Err(error) = spawned {
        log::line(&format!("no VMM is made ready: {error}"));
        let unwanted = locked(&ready.pool).made(None, now);
        ready.end(unwanted);
    }
}

/// What the next restore of a snapshot gets, if its memory is complete.
fn current(shared: &Shared, id: SnapshotId) -> Option<(File, Option<File>)> {
    let hot = shared.hot.peek(id);
    let memory = hot.or_else(|| shared.templates.peek(id, Part::Memory))?;
    Some((memory, shared.recordings.peek(id)))
}

fn make(shared: &Shared, fit: &Fit) -> io::Result<Waiting> {
    // One that is not good goes.
    drop(shared.recordings.get(fit.target.id));
    let needs = current(shared, fit.target.id).ok_or(io::ErrorKind::NotFound)?;
    let needs = (&needs.0, needs.1.as_ref());
    if Fit::of(&fit.target, needs, &*shared.surroundings)? != *fit {
        return Err(io::Error::other("its files are others now"));
    }
    enough_memory()?;
    let (ours, theirs) = UnixStream::pair()?;
    let (pid, supervisor) = start(&shared.ready, &fit.target.programs, theirs)?;
    let prepared = prepare(ours, needs, fit.target.vcpus);
    match prepared {
        Ok((socket, vmm)) => {
            shared.ready.set_limit(pid, None);
            let pids = (pid, vmm);
            Ok(Waiting {
                socket,
                supervisor,
                pids,
            })
        }
        Err(error) => {
            // It is hung up on by now.
            let soon = Instant::now() + END_LIMIT;
            shared.ready.set_limit(pid, Some(soon));
            Err(error)
        }
    }
}

fn enough_memory() -> io::Result<()> {
    match memory(["MemTotal:", "MemAvailable:"]) {
        [Some(all), Some(free)] if free < all / FREE_SHARE => {
            Err(io::Error::other("this machine's memory is in use"))
        }
        _ => Ok(()),
    }
}

/// Starts a supervisor, which dies soon unless it is prepared.
fn start(
    ready: &ReadyVmms,
    programs: &v1::Programs,
    socket: UnixStream,
) -> io::Result<(u32, OwnedFd)> {
    let dir = ready.new_dir()?;
    let child = Command::new(&programs.supervisor)
        .arg0(NAME)
        .args([MODE, READY_MODE])
        .arg(&dir)
        .arg(&programs.vmm)
        .stdin(OwnedFd::from(socket))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .inspect_err(|_| drop(std::fs::remove_dir(&dir)))?;
    let pid = child.id();
    let supervisor = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    locked(&ready.children).push(Kid {
        child,
        dir,
        end_by: Some(Instant::now() + PREPARE_LIMIT),
        is_new: true,
    });
    Ok((pid, supervisor?))
}

/// Has a VMM prepared. The socket to its supervisor, and the VMM's pid.
fn prepare(
    socket: UnixStream,
    (memory, set): Needs<'_>,
    vcpus: u32,
) -> io::Result<(UnixStream, u32)> {
    let mut connection = Connection::new(socket);
    let files: Vec<BorrowedFd<'_>> = std::iter::once(memory)
        .chain(set)
        .map(AsFd::as_fd)
        .collect();
    let order = v1::Order {
        descriptors: u32::try_from(files.len()).unwrap_or(0),
        order: Some(Order::Prepare(v1::Prepare { vcpus })),
    };
    connection.send(&order, &files).map_err(io::Error::other)?;
    // It is killed if that takes too long.
    let answer: Option<v1::Waiting> = connection.receive().map_err(io::Error::other)?;
    match answer {
        Some(waiting) if waiting.failed.is_empty() => Ok((connection.into_stream(), waiting.pid)),
        Some(waiting) => {
            let said = waiting.failed.chars().filter(|c| !c.is_control());
            Err(io::Error::other(said.take(400).collect::<String>()))
        }
        None => Err(io::Error::other("its supervisor ended")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::server::surroundings::Undisturbed;

    fn bare() -> ReadyVmms {
        ReadyVmms {
            pool: Mutex::new(Pool::new(1)),
            target: Mutex::default(),
            children: Mutex::default(),
            made: AtomicU64::new(0),
        }
    }

    #[test]
    fn one_that_is_being_prepared_is_ended_when_none_is_wanted() {
        let keep = tempfile::tempdir().unwrap();
        let dir = keep.path().join("new");
        std::fs::create_dir(&dir).unwrap();
        let memory = tempfile::tempfile().unwrap();
        let target = Target {
            id: SnapshotId([1; 16]),
            vcpus: 1,
            programs: v1::Programs {
                supervisor: keep.path().display().to_string(),
                vmm: keep.path().display().to_string(),
            },
        };
        let fit = Fit::of(&target, (&memory, None), &Undisturbed).unwrap();
        let ready = bare();
        let now = Instant::now();
        let long = now + Duration::from_secs(1000);
        {
            let mut pool = locked(&ready.pool);
            assert!(pool.want(Some(fit), now).is_empty());
            assert!(pool.begin(long).is_some());
        }
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new("sleep")
            .arg("1000")
            .stdout(OwnedFd::from(theirs))
            .spawn()
            .unwrap();
        locked(&ready.children).push(Kid {
            child,
            dir: dir.clone(),
            end_by: Some(long),
            is_new: true,
        });
        std::thread::scope(|scope| {
            // Who makes it waits for its answer.
            scope.spawn(|| {
                assert_eq!(ours.read(&mut [0; 9]).unwrap(), 0);
                let mut pool = locked(&ready.pool);
                ready.end(pool.made(None, now));
            });
            assert!(ready.clear(), "there was one");
            assert!(locked(&ready.children).is_empty() && !dir.exists());
        });
        assert!(!ready.clear(), "there is none");
    }

    #[test]
    fn one_that_is_late_is_killed_and_its_directory_goes() {
        let keep = tempfile::tempdir().unwrap();
        let ready = bare();
        let start = |name: &str, end_by| {
            let dir = keep.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            let child = Command::new("sleep").arg("1000").spawn().unwrap();
            let pid = child.id();
            locked(&ready.children).push(Kid {
                child,
                dir,
                end_by,
                is_new: false,
            });
            pid
        };
        let (long, now) = (Duration::from_secs(1000), Instant::now());
        start("late", Some(now));
        let early = start("early", Some(now + long));
        let waiting = start("waiting", None);
        let all = || locked(&ready.children).len();
        while all() == 3 {
            assert!(ready.reap());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!keep.path().join("late").exists());
        assert!(keep.path().join("early").exists());
        ready.set_limit(early, None);
        assert!(!ready.reap(), "no other is to end");
        for pid in [early, waiting] {
            ready.set_limit(pid, Some(now));
        }
        while ready.reap() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(all(), 0);
        assert_eq!(std::fs::read_dir(keep.path()).unwrap().count(), 0);
    }
}
