//! A sandbox from its directory to the agent's sign of readiness, and to its end.

mod create;
mod error;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod handed_over;
mod plan;
mod record;
mod restore;
#[cfg(test)]
#[path = "../../../tests/support/small_disk.rs"]
pub(crate) mod small_disk;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use belljar_protocol::{READY_PORT, client, v1};

pub use create::create;
pub(crate) use create::create_with;
pub use error::BootError;
pub use plan::{DiskChoice, GuestSpec, ImageChoice, NewSandbox};
pub use record::{BootRecord, StageRecord};
pub(crate) use restore::{NewDisk, Shape, adopt};

use crate::assets::Assets;

use crate::diagnosis;
use crate::ending::{Ended, Meaning};
use crate::layered::Layered;
use crate::poll::{PollSet, Polled};
use crate::registry::{Found, SocketPath};
use crate::snapshots::Bases;
use crate::stages::Stages;
use crate::state::spec::{Life, SandboxSpec};
use crate::state::{self, SandboxDir, StateRoot};
use crate::supervisor::{self, Event, EventReader, Ready, Supervising};
use crate::vmm;

/// Between two looks for the API's socket. The supervisor is watched at the same time.
const API_RETRY: Duration = Duration::from_micros(300);
/// How long the record of an end may take after the connection broke.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// A supervisor that was told to end, and is no child of this process, does so within this time.
const OWNER_PATIENCE: Duration = Duration::from_secs(60);
/// A Ready message that has begun to arrive is here within this time.
const READY_PATIENCE: Duration = Duration::from_secs(2);

/// The programs that make a sandbox.
#[derive(Debug, Clone)]
pub struct Programs {
    /// A binary whose `__supervise` mode is [`supervisor::main`].
    pub supervisor: PathBuf,
    pub vmm: PathBuf,
}

/// The supervisor of a sandbox.
#[derive(Debug)]
enum Owner {
    /// This process has started it.
    Child(Child),
    /// It was started ahead, by the keeper.
    Other(Supervising),
}

impl Owner {
    /// Waits for its end, which was asked for.
    fn wait(&mut self) {
        match self {
            Self::Child(child) => drop(child.wait()),
            Self::Other(other) => drop(other.wait(OWNER_PATIENCE)),
        }
    }
}

/// A guest that is up, with the supervisor that owns it. Dropping it tears it down, and removes a sandbox
/// that is not persistent.
#[derive(Debug)]
pub struct Sandbox {
    dir: SandboxDir,
    supervisor: Owner,
    /// Hanging up ends everything.
    control: Option<UnixStream>,
    events: EventReader,
    ended: Option<Box<Ended>>,
    /// Shared with the supervisor; for when it is killed and this process has to clean up.
    _lock: File,
    ready: v1::Ready,
    /// What a restored guest could not be told.
    warnings: Vec<String>,
    life: Life,
    finished: bool,
}

/// What bounds a boot.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    pub boot: Duration,
    /// Readable when the boot is to be given up.
    pub cancel: Option<BorrowedFd<'a>>,
}

impl Sandbox {
    /// Makes a sandbox, boots its guest and waits until the agent serves calls.
    ///
    /// # Errors
    /// Where it ended early. Nothing is left behind then, unless the sandbox is persistent.
    pub fn boot(
        root: &StateRoot,
        programs: &Programs,
        new: &NewSandbox,
        limits: Limits<'_>,
        stages: &mut Stages,
    ) -> Result<Self, BootError> {
        if !programs.vmm.exists() {
            return Err(BootError::NoVmm(programs.vmm.clone()));
        }
        let (dir, lock) = create(root, new)?;
        let assets = &new.guest.assets;
        Self::start(&dir, lock, programs, assets, limits, stages)
    }

    /// Starts a sandbox that was made before. `lock` is its lock.
    ///
    /// # Errors
    /// Where it ended early. A sandbox that is not persistent is removed then.
    pub fn start(
        dir: &SandboxDir,
        lock: File,
        programs: &Programs,
        assets: &Assets,
        limits: Limits<'_>,
        stages: &mut Stages,
    ) -> Result<Self, BootError> {
        let deadline = Instant::now() + limits.boot;
        let spawned = Self::prepare(dir, programs, assets).and_then(|(config, life)| {
            Ok((config, Self::spawn(programs, dir.clone(), lock, life)?))
        });
        let (config, mut sandbox) = match spawned {
            Ok(spawned) => spawned,
            Err(error) => {
                let spec: Option<SandboxSpec> = dir.read_record(state::CONFIG).ok().flatten();
                if spec.is_none_or(|spec| spec.life != Life::Persistent) {
                    let _ = dir.remove();
                }
                return Err(error);
            }
        };
        stages.mark("prepared");
        sandbox.bring_up(&config, limits, deadline, stages)?;
        if sandbox.ready.degraded.is_empty() {
            BootRecord::new(&sandbox.ready, stages).write(&sandbox.dir)?;
            Ok(sandbox)
        } else {
            Err(BootError::Degraded(sandbox.ready.degraded.clone()))
        }
    }

    fn prepare(
        dir: &SandboxDir,
        programs: &Programs,
        assets: &Assets,
    ) -> Result<(vmm::Config, Life), BootError> {
        if !programs.vmm.exists() {
            return Err(BootError::NoVmm(programs.vmm.clone()));
        }
        let spec: SandboxSpec = dir
            .read_record(state::CONFIG)?
            .ok_or_else(|| BootError::Invalid(format!("sandbox {} is not complete", dir.id())))?;
        let disk = Layered::settled(dir, spec.life == Life::Persistent)?;
        if let Some(disk) = &disk {
            disk.sweep(dir);
        }
        let config = plan::configure(&spec, disk.as_ref(), assets)?;
        dir.forget_last_run()?;
        Bases::note(dir, &spec)?;
        Ok((config, spec.life))
    }

    fn spawn(
        programs: &Programs,
        dir: SandboxDir,
        lock: File,
        life: Life,
    ) -> Result<Self, BootError> {
        let failed = |doing| move |source| BootError::Supervisor { doing, source };
        let inherited = lock.try_clone().map_err(failed("sharing the lock"))?;
        let arguments = ["--api-sock", state::API_SOCKET, "--id", dir.id()].map(Into::into);
        let (supervisor, control) = supervisor::spawn(
            &programs.supervisor,
            &dir,
            inherited,
            &programs.vmm,
            &arguments,
        )
        .map_err(failed("starting it"))?;
        Ok(Self {
            dir,
            supervisor: Owner::Child(supervisor),
            control: Some(control),
            events: EventReader::default(),
            ended: None,
            _lock: lock,
            ready: v1::Ready::default(),
            warnings: Vec::new(),
            life,
            finished: false,
        })
    }

    /// Gives the sandbox to a VMM that waits. If that fails nobody owns it, and something may be left in the directory.
    fn hand_over(ready: Ready, dir: SandboxDir, lock: File, life: Life) -> std::io::Result<Self> {
        let (supervisor, control, events) = ready.take(&dir, &lock)?;
        Ok(Self {
            dir,
            supervisor: Owner::Other(supervisor),
            control: Some(control),
            events,
            ended: None,
            _lock: lock,
            ready: v1::Ready::default(),
            warnings: Vec::new(),
            life,
            finished: false,
        })
    }

    /// Ends the VMM, whose guest has not run; the directory stays, with what is left of them in it.
    fn abandon(mut self) {
        self.finished = true;
        if let Some(control) = &mut self.control {
            let _ = supervisor::abandon(control);
            // It says how the VMM ended, and waits until it is heard.
            let _ = control.shutdown(std::net::Shutdown::Write);
        }
        match &mut self.supervisor {
            Owner::Other(other) => other.end(OWNER_PATIENCE),
            Owner::Child(child) => drop(child.wait()),
        }
    }

    fn bring_up(
        &mut self,
        config: &vmm::Config,
        limits: Limits<'_>,
        deadline: Instant,
        stages: &mut Stages,
    ) -> Result<(), BootError> {
        let io_failed = |doing| move |source| BootError::Supervisor { doing, source };
        let socket = self.socket(&format!("{}_{READY_PORT}", state::VSOCK_SOCKET))?;
        let listener =
            UnixListener::bind(socket.path()).map_err(io_failed("listening for the agent"))?;

        let mut api = self.connect_api(limits, deadline)?;
        stages.mark("VMM process");
        let calls = config
            .calls()
            .map_err(|error| BootError::Invalid(error.to_string()))?;
        let outcome = vmm::run_calls(&mut api, &calls, deadline, |index| {
            if index == 0 {
                stages.mark("API");
            }
        });
        match outcome {
            Ok(()) => {}
            Err(error @ vmm::ApiError::Refused { .. }) => return Err(error.into()),
            Err(error) => {
                return Err(self
                    .explain_end("before it had started the guest")
                    .unwrap_or_else(|| error.into()));
            }
        }
        stages.mark("InstanceStart");
        if let Some(control) = &mut self.control {
            supervisor::attach_console(control).map_err(io_failed("following the console"))?;
        }
        self.ready = self.wait_ready(&listener, limits, deadline)?;
        stages.mark_guest(&self.ready.times.unwrap_or_default());
        Ok(())
    }

    /// Connects as soon as the VMM listens.
    fn connect_api(
        &mut self,
        limits: Limits<'_>,
        deadline: Instant,
    ) -> Result<UnixStream, BootError> {
        let socket = self.socket(state::API_SOCKET)?;
        loop {
            if let Ok(stream) = UnixStream::connect(socket.path()) {
                return Ok(stream);
            }
            if Instant::now() >= deadline {
                return Err(BootError::NotStarted(format!(
                    "the VMM did not open its API within {} s",
                    limits.boot.as_secs_f32()
                )));
            }
            self.watch(None, limits.cancel, Instant::now() + API_RETRY)?;
            if let Some(ended) = self.ended.take() {
                return Err(BootError::Ended {
                    stage: "before it opened its API",
                    ended,
                });
            }
        }
    }

    fn wait_ready(
        &mut self,
        listener: &UnixListener,
        limits: Limits<'_>,
        deadline: Instant,
    ) -> Result<v1::Ready, BootError> {
        loop {
            if self.watch(Some(listener.as_fd()), limits.cancel, deadline)? {
                let patience = Some(Instant::now() + READY_PATIENCE);
                let ready = listener
                    .accept()
                    .ok()
                    .and_then(|(stream, _)| client::receive_ready(stream, patience).ok());
                // A guest that sends something else gets another chance, until the deadline.
                if let Some(ready) = ready {
                    return Ok(ready);
                }
            }
            if let Some(ended) = self.ended.take() {
                return Err(BootError::Ended {
                    stage: "while it was booting",
                    ended,
                });
            }
            if Instant::now() >= deadline {
                let console = self.console_lines();
                return Err(BootError::NotReady {
                    progress: diagnosis::progress(&console),
                    limit: limits.boot,
                    console,
                });
            }
        }
    }

    /// Waits for `awaited` (returns `true`), the supervisor or the deadline.
    fn watch(
        &mut self,
        awaited: Option<BorrowedFd<'_>>,
        cancel: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<bool, BootError> {
        let io_failed = |doing| move |source| BootError::Supervisor { doing, source };
        let Some(control) = &self.control else {
            return Err(BootError::NotStarted("the supervisor is gone".into()));
        };
        let mut set = PollSet::default();
        let control = set.readable(control.as_fd());
        let awaited = awaited.map(|fd| set.readable(fd));
        let cancel = cancel.map(|fd| set.readable(fd));
        let polled: Polled = set.wait(Some(deadline)).map_err(io_failed("waiting"))?;
        let is_ready = |slot: Option<usize>| slot.is_some_and(|slot| polled.is_ready(slot));
        if is_ready(cancel) {
            return Err(BootError::Cancelled);
        }
        let awaited = is_ready(awaited);
        if polled.is_ready(control) {
            self.read_events()?;
        }
        Ok(awaited)
    }

    fn read_events(&mut self) -> Result<(), BootError> {
        let io_failed = |source| BootError::Supervisor {
            doing: "listening to it",
            source,
        };
        let events = match &mut self.control {
            Some(control) => self.events.read(control).map_err(io_failed)?,
            None => None,
        };
        let Some(events) = events else {
            self.control = None;
            return Err(BootError::NotStarted(
                "the supervisor died, and the VMM with it".into(),
            ));
        };
        for event in events {
            match event {
                Event::Started { .. } => {}
                Event::Failed { message } => return Err(BootError::NotStarted(message)),
                Event::Ended(ended) => self.ended = Some(ended),
            }
        }
        Ok(())
    }

    /// How the VMM ended, if it did or is about to.
    fn explain_end(&mut self, stage: &'static str) -> Option<BootError> {
        match self.wait_end(END_PATIENCE) {
            Ok(ended) => ended.map(|ended| BootError::Ended { stage, ended }),
            Err(error) => Some(error),
        }
    }

    /// Waits for the VMM's end; `None` if it still runs at the limit.
    ///
    /// # Errors
    /// The supervisor died.
    pub fn wait_end(&mut self, limit: Duration) -> Result<Option<Box<Ended>>, BootError> {
        let deadline = Instant::now() + limit;
        while self.ended.is_none() && Instant::now() < deadline {
            self.watch(None, None, deadline)?;
        }
        Ok(self.ended.clone())
    }

    /// What the agent said about itself.
    #[must_use]
    pub fn ready(&self) -> &v1::Ready {
        &self.ready
    }

    #[must_use]
    pub fn id(&self) -> &str {
        self.dir.id()
    }

    /// As others find it.
    #[must_use]
    pub fn found(&self) -> Found {
        Found::at(self.dir.clone())
    }

    /// A descriptor that becomes readable when the VMM ends.
    #[must_use]
    pub fn events_fd(&self) -> Option<BorrowedFd<'_>> {
        self.control.as_ref().map(AsFd::as_fd)
    }

    /// Connects to a vsock port of the guest.
    ///
    /// # Errors
    /// Nothing listens there, or the VMM is gone.
    pub fn connect(
        &self,
        port: u32,
        deadline: Instant,
    ) -> Result<UnixStream, belljar_protocol::hybrid::ConnectError> {
        let path = SocketPath::new(&self.dir, state::VSOCK_SOCKET);
        belljar_protocol::hybrid::connect(path.path(), port, deadline)
    }

    fn console_lines(&self) -> Vec<String> {
        let text = std::fs::read(self.dir.file(state::CONSOLE_LOG)).unwrap_or_default();
        crate::bounded_log::last_lines(&text, 20)
    }

    fn socket(&self, name: &str) -> Result<SocketPath, BootError> {
        Ok(SocketPath::new(&self.dir, name))
    }

    /// Asks the guest to write everything back and to switch itself off; waits for that.
    ///
    /// # Errors
    /// The supervisor died.
    pub fn shut_down(&mut self, limit: Duration) -> Result<Option<Box<Ended>>, BootError> {
        let deadline = Instant::now() + limit;
        if let Ok(stream) = self.connect(belljar_protocol::AGENT_PORT, deadline) {
            let mode = v1::shutdown::Mode::PowerOff;
            let _ = client::shutdown(stream, mode, None, Some(deadline));
        }
        self.wait_end(deadline.saturating_duration_since(Instant::now()))
    }

    /// Leaves the guest to its supervisor: it runs on when this process ends.
    ///
    /// # Errors
    /// The supervisor died.
    pub fn release(mut self) -> Result<SandboxDir, BootError> {
        if let Some(control) = &mut self.control {
            supervisor::release(control).map_err(|source| BootError::Supervisor {
                doing: "leaving the guest to it",
                source,
            })?;
        }
        self.finished = true;
        Ok(self.dir.clone())
    }

    /// What did not work out when it was restored, and did not stop it.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// From now on it stays when its guest has ended, after a power failure too.
    ///
    /// # Errors
    /// Its directory cannot be written.
    pub(crate) fn keep(&mut self, spec: &SandboxSpec) -> Result<(), state::StateError> {
        self.dir.write_record_durably(state::CONFIG, spec)?;
        self.life = spec.life;
        Ok(())
    }

    /// Kills the VMM if it still runs, and removes everything that is not to stay. Returns how it ended, if
    /// it did by itself.
    #[must_use]
    pub fn tear_down(mut self) -> Option<Box<Ended>> {
        self.finish();
        self.ended.take()
    }

    fn finish(&mut self) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        // Hanging up is the order to end and to remove the directory.
        if let Some(control) = self.control.take() {
            let _ = control.shutdown(std::net::Shutdown::Write);
            self.collect_end(control);
        }
        self.supervisor.wait();
        // The supervisor has done it, unless it was killed.
        if self.life != Life::Persistent && self.dir.path().exists() {
            let _ = self.dir.remove();
        }
    }

    fn collect_end(&mut self, mut control: UnixStream) {
        while let Ok(Some(events)) = self.events.read(&mut control) {
            for event in events {
                if let Event::Ended(ended) = event
                    && ended.meaning != Meaning::TornDown
                {
                    self.ended = Some(ended);
                }
            }
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_errors_of_the_supervisor_name_what_was_done() {
        let error = BootError::Supervisor {
            doing: "starting it",
            source: std::io::ErrorKind::NotFound.into(),
        };
        assert!(error.to_string().contains("starting it"));
    }
}
