//! The process that owns one VMM (contract 10).
//!
//! It is started with the sandbox's lock as standard output and a socket to its owner as standard input.
//! It starts the VMM in the sandbox's directory, keeps what VMM and console say, writes how the VMM
//! ended, and tells its owner. VMM and supervisor die together. When an owner hangs up that has not
//! released the guest before, the VMM is killed. At the end the directory is removed, unless the
//! sandbox is persistent.
//!
//! One that was started ahead ([`ready`]) waits with its VMM until it is given a sandbox, and is then like any other.

pub mod control;
mod protocol;
mod ready;
mod waiting;

use std::ffi::OsString;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::bounded_log::BoundedLog;
use crate::cgroup;
use crate::ending::{Ended, Meaning};
use crate::poll::PollSet;
use crate::registry::Found;
use crate::state::spec::{Life, SandboxSpec};
use crate::state::{self, Owner, ProcessRecord, SandboxDir};
use crate::sys::{self, SignalFd};

use control::Control;
pub(crate) use protocol::EventReader;
pub use protocol::{ABANDON, ATTACH_CONSOLE, Event, RELEASE};
pub(crate) use ready::{Ready, Supervising};

/// First argument of the hidden mode: `belljar __supervise DIR PROGRAM ARGUMENTS…`, or `belljar __supervise --ready DIR
/// PROGRAM` for one that waits.
pub const MODE: &str = "__supervise";
/// Its name in lists of processes.
const NAME: &str = "belljar-supervisor";
/// Bytes of each log file; at most two of each are kept.
const LOG_LIMIT: u64 = 512 * 1024;
/// Lines quoted in the record of the end.
const QUOTED_LINES: usize = 20;
/// What a dead VMM's console and log may still hold is read for this long at most.
const DRAIN: Duration = Duration::from_millis(200);

/// Runs the hidden mode with the arguments after [`MODE`]. Returns the exit status of the supervisor.
#[must_use]
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> u8 {
    let Some(dir) = arguments.next() else {
        return 2;
    };
    if dir == belljar_keeper::READY_MODE {
        return waiting::main(arguments);
    }
    let Some(program) = arguments.next() else {
        return 2;
    };
    let Ok(owner) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else {
        return 1;
    };
    let mut owner = UnixStream::from(owner);
    let dir = SandboxDir::existing(&PathBuf::from(dir));
    // Sockets are named relative to it, because a socket's path may have at most 107 bytes.
    if std::env::set_current_dir(dir.path()).is_err() {
        return 1;
    }
    stand_alone();
    let arguments: Vec<OsString> = arguments.collect();
    let outcome = Supervisor::start(dir.clone(), &program, &arguments)
        .and_then(|supervisor| supervisor.watch(&mut owner));
    finish(&dir, owner, &outcome)
}

fn stand_alone() {
    let _ = rustix::thread::set_name(c"belljar-superv");
    // Ctrl-C in the owner's terminal is for the guest.
    let _ = rustix::process::setsid();
}

/// What is to become of the sandbox's directory when its guest has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// As its configuration says.
    Usual,
    /// Its owner goes on with it.
    Nothing,
}

fn finish(dir: &SandboxDir, mut owner: UnixStream, outcome: &io::Result<After>) -> u8 {
    if let Err(error) = outcome {
        Event::Failed {
            message: error.to_string(),
        }
        .send(&mut owner);
    }
    // It may give the sandbox up before it has heard that the VMM ended.
    let given_up = wait_for_hang_up(&mut owner);
    if given_up || matches!(outcome, Ok(After::Nothing)) {
        return 0;
    }
    // The lock is still held: it is the open file at descriptor 1.
    let spec: Option<SandboxSpec> = dir.read_record(state::CONFIG).ok().flatten();
    let stays = spec
        .as_ref()
        .is_some_and(|spec| spec.life == Life::Persistent);
    // Of one with an owner, the owner tells.
    if let Some(spec) = spec.filter(|spec| spec.life == Life::Detached)
        && let Ok(Some(ended)) = dir.read_record(state::ENDED)
    {
        dir.remember_end(spec.name, &ended);
    }
    let removed = stays || dir.remove().is_ok();
    u8::from(outcome.is_err() || !removed)
}

/// The owner reads what it needs from the directory and then hangs up. True if it wants to keep the directory.
fn wait_for_hang_up(owner: &mut UnixStream) -> bool {
    let mut given_up = false;
    let mut commands = [0u8; 64];
    while let Ok(count @ 1..) = owner.read(&mut commands) {
        let commands = commands.get(..count).unwrap_or_default();
        given_up |= commands.contains(&ABANDON);
    }
    given_up
}

/// A VMM that this process has started.
struct Vmm {
    child: Child,
    pidfd: OwnedFd,
    /// Its standard output and error.
    output: PipeReader,
}

impl Vmm {
    /// It works in the present directory, and dies with this thread.
    fn spawn(program: &OsString, arguments: &[OsString]) -> io::Result<Self> {
        let (output, vmm_output) = io::pipe()?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(vmm_output.try_clone()?)
            .stderr(vmm_output);
        sys::die_with_parent(&mut command);
        let child = command.spawn().map_err(|error| {
            let program = program.to_string_lossy();
            io::Error::new(
                error.kind(),
                format!("cannot start the VMM {program}: {error}"),
            )
        })?;
        // Drops this process's ends of the pipe for writing, so that its end is seen.
        drop(command);
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Self {
            child,
            pidfd,
            output,
        })
    }
}

struct Supervisor {
    dir: SandboxDir,
    vmm: Child,
    vmm_pidfd: OwnedFd,
    /// Standard output and error of the VMM, until it closes them.
    output: Option<PipeReader>,
    log: BoundedLog,
    console: Option<UnixStream>,
    console_log: BoundedLog,
    signals: SignalFd,
    /// For others than the owner.
    control_socket: UnixListener,
    control: Control,
    /// What limits the VMM's CPU time.
    cgroup: Option<PathBuf>,
    released: bool,
    torn_down: bool,
    after: After,
}

impl Supervisor {
    fn start(dir: SandboxDir, program: &OsString, arguments: &[OsString]) -> io::Result<Self> {
        let signals = signals()?;
        let control_socket = UnixListener::bind(state::CONTROL_SOCKET)?;
        let vmm = Vmm::spawn(program, arguments)?;
        Self::own(dir, signals, control_socket, vmm)
    }

    /// Makes this process the owner of a sandbox whose directory is its working directory.
    fn own(
        dir: SandboxDir,
        signals: SignalFd,
        control_socket: UnixListener,
        vmm: Vmm,
    ) -> io::Result<Self> {
        let control = Control::new(Found::at(dir.clone()));
        let Vmm {
            child: vmm,
            pidfd: vmm_pidfd,
            output,
        } = vmm;
        let supervisor = ProcessRecord::of(std::process::id());
        let spec: Option<SandboxSpec> = dir.read_record(state::CONFIG).map_err(io::Error::other)?;
        let spec = spec.unwrap_or_default();
        let cgroup = spec
            .cpu_limit_milli
            .map(|milli| cgroup::limit(dir.id(), milli, vmm.id()))
            .transpose()
            .map_err(io::Error::other)?;
        let record = Owner {
            cgroup: cgroup.clone(),
            ..Owner::new(
                supervisor.ok_or(io::ErrorKind::NotFound)?,
                ProcessRecord::of(vmm.id()),
                spec.life != Life::Persistent,
            )
        };
        dir.write_record(state::OWNER, &record)
            .map_err(io::Error::other)?;
        Ok(Self {
            vmm,
            vmm_pidfd,
            output: Some(output),
            log: BoundedLog::new(dir.file(state::VMM_LOG), LOG_LIMIT),
            console: None,
            console_log: BoundedLog::new(dir.file(state::CONSOLE_LOG), LOG_LIMIT),
            dir,
            signals,
            control_socket,
            control,
            cgroup,
            released: false,
            torn_down: false,
            after: After::Usual,
        })
    }

    fn watch(mut self, owner: &mut UnixStream) -> io::Result<After> {
        Event::Started { pid: self.vmm.id() }.send(owner);
        let mut owner_present = true;
        loop {
            let ready = self.wait(owner_present.then_some(&*owner))?;
            if ready.output {
                follow(&mut self.output, &mut self.log);
            }
            if ready.console {
                follow(&mut self.console, &mut self.console_log);
            }
            if ready.vmm {
                break;
            }
            if ready.signal && self.signals.take().is_some() {
                self.tear_down();
            }
            if ready.control {
                self.control.accept(&self.control_socket);
            }
            if ready.owner {
                owner_present = self.obey(owner);
            }
        }
        let ended = match self.end() {
            // Its owner goes on with the directory, whatever could not be written there.
            Err(_) if matches!(self.after, After::Nothing) => return Ok(self.after),
            ended => ended?,
        };
        self.control.close();
        Event::Ended(Box::new(ended)).send(owner);
        Ok(self.after)
    }

    fn wait(&self, owner: Option<&UnixStream>) -> io::Result<Todo> {
        let mut set = PollSet::default();
        let vmm = set.readable(self.vmm_pidfd.as_fd());
        let signal = set.readable(self.signals.as_fd());
        let control = set.readable(self.control_socket.as_fd());
        let output = self.output.as_ref().map(|fd| set.readable(fd.as_fd()));
        let console = self.console.as_ref().map(|fd| set.readable(fd.as_fd()));
        let owner = owner.map(|fd| set.readable(fd.as_fd()));
        let polled = set.wait(None)?;
        let is_ready = |slot: Option<usize>| slot.is_some_and(|slot| polled.is_ready(slot));
        Ok(Todo {
            vmm: polled.is_ready(vmm),
            signal: polled.is_ready(signal),
            control: polled.is_ready(control),
            output: is_ready(output),
            console: is_ready(console),
            owner: is_ready(owner),
        })
    }

    /// Carries out what the owner sent; `false` if it has hung up.
    fn obey(&mut self, owner: &mut UnixStream) -> bool {
        let mut commands = [0u8; 16];
        let count = match owner.read(&mut commands) {
            Ok(0) | Err(_) => {
                if !self.released {
                    self.tear_down();
                }
                return false;
            }
            Ok(count) => count,
        };
        for command in commands.iter().take(count) {
            match *command {
                ATTACH_CONSOLE if self.console.is_none() => {
                    self.console = UnixStream::connect(state::CONSOLE_SOCKET).ok();
                }
                RELEASE => self.released = true,
                ABANDON => {
                    self.after = After::Nothing;
                    self.tear_down();
                }
                _ => {}
            }
        }
        true
    }

    fn tear_down(&mut self) {
        self.torn_down = true;
        let _ = self.vmm.kill();
    }

    /// Reaps the VMM and writes how it ended.
    fn end(&mut self) -> io::Result<Ended> {
        let (status, usage) = sys::wait_with_usage(self.vmm.id())?;
        if let Some(cgroup) = &self.cgroup {
            cgroup::remove(cgroup);
        }
        if let Some(output) = &mut self.output {
            drain(output, &mut self.log);
        }
        if let Some(console) = &mut self.console {
            drain(console, &mut self.console_log);
        }
        let meaning = match (status.code(), status.signal()) {
            _ if self.torn_down => Meaning::TornDown,
            (Some(code), _) => Meaning::of_status(code),
            (None, signal) => Meaning::Signalled(signal.unwrap_or(0)),
        };
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let ended = Ended {
            version: 1,
            meaning,
            at_ms: since_1970
                .ok()
                .and_then(|time| u64::try_from(time.as_millis()).ok())
                .unwrap_or(0),
            user_us: usage.user_us,
            system_us: usage.system_us,
            max_rss_kib: usage.max_rss_kib,
            console: self.console_log.last_lines(QUOTED_LINES),
            log: self.log.last_lines(QUOTED_LINES),
        };
        self.dir
            .write_record(state::ENDED, &ended)
            .map_err(io::Error::other)?;
        Ok(ended)
    }
}

fn signals() -> io::Result<SignalFd> {
    SignalFd::new(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
}

/// What there is to do.
struct Todo {
    vmm: bool,
    signal: bool,
    control: bool,
    output: bool,
    console: bool,
    owner: bool,
}

/// Copies what one read gives, and closes the source at its end.
fn follow(source: &mut Option<impl Read>, log: &mut BoundedLog) {
    if !source.as_mut().is_some_and(|source| copy_some(source, log)) {
        *source = None;
    }
}

/// Copies what one read gives; `false` at the end.
fn copy_some(from: &mut impl Read, log: &mut BoundedLog) -> bool {
    let mut buffer = [0u8; 16 * 1024];
    match from.read(&mut buffer) {
        Ok(count) if count > 0 => {
            log.append(buffer.get(..count).unwrap_or_default());
            true
        }
        _ => false,
    }
}

/// Reads to the end, or for as long as somebody else could hold the other side open.
fn drain(from: &mut (impl Read + AsFd), log: &mut BoundedLog) {
    loop {
        let mut set = PollSet::default();
        let slot = set.readable(from.as_fd());
        let readable = set
            .wait(Some(Instant::now() + DRAIN))
            .is_ok_and(|polled| polled.is_ready(slot));
        if !readable || !copy_some(from, log) {
            return;
        }
    }
}

/// Starts a supervisor: `program MODE dir vmm arguments…`. `program` is a binary that calls [`main`] in that mode.
///
/// # Errors
/// `program` cannot be started.
pub(crate) fn spawn(
    program: &std::path::Path,
    dir: &SandboxDir,
    lock: std::fs::File,
    vmm: &std::path::Path,
    arguments: &[OsString],
) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    let child = Command::new(program)
        .arg0(NAME)
        .arg(MODE)
        .arg(dir.path())
        .arg(vmm)
        .args(arguments)
        .stdin(OwnedFd::from(theirs))
        .stdout(lock)
        .stderr(Stdio::null())
        .spawn()?;
    Ok((child, ours))
}

/// Tells the supervisor to kill the VMM and leave the sandbox's directory as it is.
pub(crate) fn abandon(supervisor: &mut UnixStream) -> io::Result<()> {
    supervisor.write_all(&[ABANDON])
}

/// Asks the supervisor to follow the guest's console, which exists by now.
pub(crate) fn attach_console(supervisor: &mut UnixStream) -> io::Result<()> {
    supervisor.write_all(&[ATTACH_CONSOLE])
}

/// Tells the supervisor to let the guest run on without an owner.
pub(crate) fn release(supervisor: &mut UnixStream) -> io::Result<()> {
    supervisor.write_all(&[RELEASE])
}
