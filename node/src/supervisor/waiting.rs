//! A supervisor that was started ahead: it has its VMM prepared, and waits to be given a sandbox.
//!
//! The keeper starts it, with a socket as standard input, and has it prepare the VMM for a snapshot's memory. Whoever
//! restores that snapshot gets the socket, and gives it a directory and a lock. Until then it works in a directory of
//! its own, and ends when the socket is hung up: with the keeper, or with who was handed it. It does nothing in the
//! sandbox's directory before its VMM has moved there.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_keeper::READY_SOCKET;
use belljar_keeper::v1::{self as keeper, order::Order};
use belljar_keeper::wire::Connection;
use rustix::fs::{CWD, RenameFlags};
use serde_json::json;

use super::{Supervisor, Vmm, drain, finish, signals, stand_alone};
use crate::bounded_log::BoundedLog;
use crate::poll::PollSet;
use crate::state::{self, SandboxDir};
use crate::sys::SignalFd;
use crate::vmm;

/// A VMM opens its API within this time, and answers.
const PREPARE_LIMIT: Duration = Duration::from_secs(10);
/// The same when somebody waits for it.
const TAKE_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks for the API's socket.
const API_RETRY: Duration = Duration::from_micros(300);
/// An order that has begun to arrive is here within this time.
const ORDER_LIMIT: Duration = Duration::from_secs(2);
/// Where the kernel is told how readily it shall end a process for want of memory (proc_pid_oom_score_adj(5)).
const OOM_SCORE: &str = "oom_score_adj";
/// Before any other.
const FIRST_TO_GO: &str = "1000";
/// Of what a VMM says that cannot be prepared.
const LAST_WORDS: &str = "vmm.log";

/// Runs with the arguments behind [`belljar_keeper::READY_MODE`]. Returns the exit status.
pub(super) fn main(mut arguments: impl Iterator<Item = OsString>) -> u8 {
    let (Some(dir), Some(program)) = (arguments.next(), arguments.next()) else {
        return 2;
    };
    let Ok(owner) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else {
        return 1;
    };
    let dir = PathBuf::from(dir);
    if std::env::set_current_dir(&dir).is_err() {
        return 1;
    }
    stand_alone();
    let mut owner = Connection::new(UnixStream::from(owner));
    let outcome = Waiting::start(&dir, &program).and_then(|waiting| waiting.wait(&mut owner));
    match outcome {
        Ok(Some((sandbox, supervisor))) => {
            let mut owner = owner.into_stream();
            let outcome = supervisor.watch(&mut owner);
            finish(&sandbox, owner, &outcome)
        }
        Ok(None) => 0,
        Err(error) => {
            let failed = error.to_string();
            let _ = owner.send(&keeper::Waiting { failed, pid: 0 }, &[]);
            1
        }
    }
}

/// Its VMM dies with this process.
struct Waiting {
    _place: Place,
    vmm: Vmm,
    expendable: Option<Expendable>,
    signals: SignalFd,
    /// A connection to the VMM, when it is prepared.
    api: Option<UnixStream>,
}

/// The directory it waits in; it goes when nobody waits there any more.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process that ends first for want of memory: nobody misses a VMM that waits. Whoever may raise the score may set it
/// back to what it was, which needs no privilege as long as it is not less.
struct Expendable {
    path: PathBuf,
    usual: String,
}

impl Expendable {
    fn make(pid: u32) -> io::Result<Self> {
        let path = Path::new("/proc").join(pid.to_string()).join(OOM_SCORE);
        let usual = std::fs::read_to_string(&path)?;
        std::fs::write(&path, FIRST_TO_GO)?;
        Ok(Self { path, usual })
    }

    /// It is like any other.
    fn end(self) -> io::Result<()> {
        std::fs::write(self.path, self.usual.trim())
    }
}

/// A sandbox, and who owns it now.
type Taken = (SandboxDir, Supervisor);

impl Waiting {
    fn start(dir: &Path, program: &OsString) -> io::Result<Self> {
        let place = Place(dir.to_path_buf());
        let signals = signals()?;
        let id = dir.file_name().unwrap_or_default();
        let arguments = [
            "--api-sock".into(),
            READY_SOCKET.into(),
            "--id".into(),
            id.into(),
        ];
        let vmm = Vmm::spawn(program, &arguments)?;
        Ok(Self {
            _place: place,
            // Where that cannot be it is as any other.
            expendable: Expendable::make(vmm.child.id()).ok(),
            vmm,
            signals,
            api: None,
        })
    }

    /// Until it is given a sandbox; `None`: it is not needed any more.
    fn wait(mut self, owner: &mut Connection) -> io::Result<Option<Taken>> {
        owner.stream().set_read_timeout(Some(ORDER_LIMIT))?;
        loop {
            let mut set = PollSet::default();
            let vmm = set.readable(self.vmm.pidfd.as_fd());
            let signal = set.readable(self.signals.as_fd());
            let order = set.readable(owner.as_fd());
            let polled = set.wait(None)?;
            if polled.is_ready(vmm) {
                return Err(self.ended());
            }
            if polled.is_ready(signal) && self.signals.take().is_some() {
                return Ok(None);
            }
            if !polled.is_ready(order) {
                continue;
            }
            let Ok(Some(order)) = owner.receive::<keeper::Order>() else {
                return Ok(None);
            };
            let files = owner.take(order.descriptors).map_err(io::Error::other)?;
            match order.order {
                Some(Order::Prepare(wanted)) => {
                    self.prepare(&wanted, &files)?;
                    let waiting = keeper::Waiting {
                        failed: String::new(),
                        pid: self.vmm.child.id(),
                    };
                    owner.send(&waiting, &[]).map_err(io::Error::other)?;
                }
                Some(Order::Take(take)) => {
                    owner.stream().set_read_timeout(None)?;
                    return self.take(&take, files).map(Some);
                }
                None => return Err(io::Error::other("an order that is not known")),
            }
        }
    }

    /// Why the VMM is gone.
    fn ended(&mut self) -> io::Error {
        let status = self.vmm.child.wait();
        let mut log = BoundedLog::new(PathBuf::from(LAST_WORDS), 1 << 16);
        drain(&mut self.vmm.output, &mut log);
        let said = log.last_lines(1).join("; ");
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        io::Error::other(format!("the VMM ended early ({status}): {said}"))
    }

    fn prepare(&mut self, wanted: &keeper::Prepare, files: &[OwnedFd]) -> io::Result<()> {
        let deadline = Instant::now() + PREPARE_LIMIT;
        let mut api = self.connect(deadline)?;
        let names = ["memory", "set"];
        let named: Vec<_> = names
            .into_iter()
            .zip(files.iter().map(AsFd::as_fd))
            .collect();
        let mut call = json!({"vcpu_count": wanted.vcpus});
        let fields = ["mem_file_path", "working_set"];
        if let Some(call) = call.as_object_mut() {
            for (field, (name, _)) in fields.into_iter().zip(&named) {
                call.insert(field.to_owned(), json!(format!("fd:{name}")));
            }
        }
        let call = call.to_string();
        vmm::request_with(
            &mut api,
            ("PUT", "/prepare"),
            call.as_bytes(),
            &named,
            deadline,
        )
        .map_err(io::Error::other)?;
        self.api = Some(api);
        Ok(())
    }

    fn connect(&mut self, deadline: Instant) -> io::Result<UnixStream> {
        loop {
            match UnixStream::connect(READY_SOCKET) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => {}
            }
            let mut set = PollSet::default();
            let vmm = set.readable(self.vmm.pidfd.as_fd());
            if set.wait(Some(Instant::now() + API_RETRY))?.is_ready(vmm) {
                return Err(self.ended());
            }
        }
    }

    /// Takes a sandbox over.
    fn take(mut self, take: &keeper::Take, files: Vec<OwnedFd>) -> io::Result<Taken> {
        let mut files = files.into_iter();
        let (Some(directory), Some(lock)) = (files.next(), files.next()) else {
            return Err(io::Error::other("a directory and a lock belong to this"));
        };
        let dir = SandboxDir::existing(Path::new(&take.dir));
        let (named, given) = (
            std::fs::metadata(dir.path())?,
            rustix::fs::fstat(&directory)?,
        );
        if (named.dev(), named.ino()) != (given.st_dev, given.st_ino) {
            return Err(io::Error::other("another directory is at that path"));
        }
        // Rather none than one whose guest would be the first to go.
        self.expendable.take().map_or(Ok(()), Expendable::end)?;
        let mut api = self
            .api
            .take()
            .ok_or_else(|| io::Error::other("the VMM is not prepared"))?;
        let workplace = json!({"directory": "fd:workplace", "id": dir.id()}).to_string();
        vmm::request_with(
            &mut api,
            ("PUT", "/workplace"),
            workplace.as_bytes(),
            &[("workplace", directory.as_fd())],
            Instant::now() + TAKE_LIMIT,
        )
        .map_err(io::Error::other)?;
        // It is the same socket, under the name that it has in any sandbox.
        rustix::fs::renameat_with(
            CWD,
            READY_SOCKET,
            &directory,
            state::API_SOCKET,
            RenameFlags::NOREPLACE,
        )?;
        rustix::process::fchdir(&directory)?;
        // As that of any sandbox: it is held as long as this process lives.
        rustix::stdio::dup2_stdout(lock)?;
        let control_socket = UnixListener::bind(state::CONTROL_SOCKET)?;
        let supervisor = Supervisor::own(dir.clone(), self.signals, control_socket, self.vmm)?;
        Ok((dir, supervisor))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::state::StateRoot;

    #[test]
    fn one_that_waits_is_the_first_to_go_and_one_with_a_sandbox_is_not() {
        let keep = tempfile::tempdir().unwrap();
        let program = keep.path().join("vmm");
        fs::write(&program, "#!/bin/sh\nexec sleep 1000\n").unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        let place = keep.path().join("place");
        fs::create_dir(&place).unwrap();
        let waiting = Waiting::start(&place, &program.into()).unwrap();
        let score = |pid: &str| {
            let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"));
            text.unwrap().trim().to_owned()
        };
        let pid = waiting.vmm.child.id();
        assert_eq!(score(&pid.to_string()), FIRST_TO_GO);
        // Before anything else is done with it: here it has no connection to its VMM.
        let root = StateRoot::at(keep.path()).unwrap();
        let (dir, lock) = root.create().unwrap();
        let take = keeper::Take {
            dir: dir.path().to_str().unwrap().to_owned(),
        };
        let directory = fs::File::open(dir.path()).unwrap();
        let taken = waiting.take(&take, vec![directory.into(), lock.into()]);
        assert!(taken.is_err_and(|error| error.to_string().contains("not prepared")));
        assert_eq!(score(&pid.to_string()), score("self"));
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
}
