//! A sandbox from a saved machine: a VMM that loads it, and an agent that takes over.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use belljar_protocol::client::system::Adoption;
use belljar_protocol::{AGENT_PORT, GENERATION, hybrid, v1};
use serde_json::json;

use super::{BootError, BootRecord, Limits, Programs, Sandbox, plan};
use crate::layered::{self, Layered};
use crate::registry::SocketPath;
use crate::snapshots::{Bases, Disk, Loaded, Origin, Source};
use crate::stages::Stages;
use crate::state::spec::{Life, SandboxSpec};
use crate::state::{self, SandboxDir, StateError};
use crate::supervisor::Ready;
use crate::{disk, supervisor, vmm};

/// A VMM has written down what its guest has written within this time.
const RECORD_LIMIT: Duration = Duration::from_secs(2);
/// Programs go on within this time after the agent has taken over.
const THAW_LIMIT: Duration = Duration::from_secs(30);
/// Bytes of randomness for each clone.
const SEED: usize = 64;

impl Sandbox {
    /// Starts a sandbox from a saved machine, and returns when its agent has taken over and its programs run. Its
    /// directory was filled by [`Source::fill`]; `lock` is its lock; `stays`: its disk outlives the guest.
    ///
    /// # Errors
    /// Where it ended early. A sandbox that is not persistent is removed then.
    pub(crate) fn restore(
        dir: &SandboxDir,
        lock: File,
        programs: &Programs,
        source: &Source,
        stays: bool,
        limits: Limits<'_>,
        stages: &mut Stages,
    ) -> Result<Self, BootError> {
        if !programs.vmm.exists() {
            return Err(BootError::NoVmm(programs.vmm.clone()));
        }
        let deadline = Instant::now() + limits.boot;
        let spec: SandboxSpec = dir
            .read_record(state::CONFIG)?
            .ok_or_else(|| BootError::Invalid(format!("sandbox {} is not complete", dir.id())))?;
        let disk = Layered::settled(dir, stays)?;
        let machine = Machine {
            source,
            spec: &spec,
            disk: disk.as_ref(),
            stays,
            deadline,
        };
        Bases::note(dir, &spec)?;
        let ahead = match source.take_ready() {
            Some(ready) => Self::load_ahead(ready, dir, &lock, &machine, stages)?,
            None => None,
        };
        // Dropping it tears it down.
        let mut sandbox = match ahead {
            Some(sandbox) => sandbox,
            None => {
                let mut sandbox = Self::spawn(programs, dir.clone(), lock, spec.life)?;
                let mut api = sandbox.connect_api(limits, deadline)?;
                stages.mark("VMM process");
                put_console(&mut api, deadline)
                    .map_err(BootError::from)
                    .and_then(|()| machine.load(&mut api))
                    .map_err(|error| sandbox.why_not_loaded(error))?;
                sandbox
            }
        };
        sandbox.note_loaded(source)?;
        stages.mark("loaded");
        if let Some(control) = &mut sandbox.control {
            supervisor::attach_console(control).map_err(|source| BootError::Supervisor {
                doing: "following the console",
                source,
            })?;
        }
        sandbox.take_over(&spec, limits, deadline, stages)?;
        BootRecord::new(&sandbox.ready, stages).write(&sandbox.dir)?;
        Ok(sandbox)
    }

    /// Has a VMM that waits load the machine. `None`: it could not, and no guest has run; it is to be done in the
    /// ordinary way, from the beginning.
    fn load_ahead(
        ready: Ready,
        dir: &SandboxDir,
        lock: &File,
        machine: &Machine<'_>,
        stages: &mut Stages,
    ) -> Result<Option<Self>, BootError> {
        let Machine { spec, deadline, .. } = *machine;
        let taken = lock
            .try_clone()
            .and_then(|lock| Self::hand_over(ready, dir.clone(), lock, spec.life));
        if let Ok(mut sandbox) = taken {
            let socket = sandbox.socket(state::API_SOCKET)?;
            let api = UnixStream::connect(socket.path()).map_err(vmm::ApiError::from);
            let asked = api.and_then(|mut api| {
                put_console(&mut api, deadline)?;
                Ok(api)
            });
            if let Ok(mut api) = asked {
                stages.mark("ready VMM");
                match machine.load(&mut api) {
                    Ok(()) => return Ok(Some(sandbox)),
                    Err(BootError::Api(vmm::ApiError::Refused { .. })) => {}
                    // Its guest may have written to its disk.
                    Err(error) => return Err(sandbox.why_not_loaded(error)),
                }
            }
            sandbox.abandon();
        }
        dir.forget_last_run()?;
        Bases::note(dir, spec)?;
        Ok(None)
    }

    fn why_not_loaded(&mut self, error: BootError) -> BootError {
        match error {
            BootError::Api(vmm::ApiError::Refused { .. }) => error,
            BootError::Api(_) => self
                .explain_end("before it had loaded the snapshot")
                .unwrap_or(error),
            other => other,
        }
    }

    /// Which pages its guest has written since it was loaded, as `/snapshot/load` takes it.
    pub(crate) fn working_set(&self, limits: Limits<'_>) -> io::Result<File> {
        let deadline = Instant::now() + limits.boot.min(RECORD_LIMIT);
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("working set", flags)?);
        let mut api = UnixStream::connect(
            self.socket(state::API_SOCKET)
                .map_err(io::Error::other)?
                .path(),
        )?;
        let body = json!({"path": "fd:set"}).to_string();
        let call = ("PUT", "/snapshot/working-set");
        let files = [("set", file.as_fd())];
        vmm::request_with(&mut api, call, body.as_bytes(), &files, deadline)
            .map_err(io::Error::other)?;
        Ok(file)
    }

    fn note_loaded(&self, source: &Source) -> Result<(), BootError> {
        if let Some(snapshot) = &source.snapshot {
            let loaded = Loaded {
                snapshot: snapshot.clone(),
            };
            self.dir.write_record(state::LOADED, &loaded)?;
        }
        Ok(())
    }

    /// Tells the guest who it is; returns when its programs go on.
    fn take_over(
        &mut self,
        spec: &SandboxSpec,
        limits: Limits<'_>,
        deadline: Instant,
        stages: &mut Stages,
    ) -> Result<(), BootError> {
        // A cancelled restore is noticed here at the latest.
        self.watch(None, limits.cancel, Instant::now())?;
        let told = adopt(&self.dir, spec, deadline, stages).map_err(|error| {
            self.explain_end("right after it was restored")
                .unwrap_or(error)
        })?;
        self.ready.generation = GENERATION;
        // It draws its own numbers, or it would not have been adopted; anything else it can be told again.
        self.warnings.extend(told);
        Ok(())
    }
}

/// A machine that is to be loaded, and what it has here.
struct Machine<'a> {
    source: &'a Source,
    spec: &'a SandboxSpec,
    disk: Option<&'a Layered>,
    stays: bool,
    deadline: Instant,
}

impl Machine<'_> {
    /// Has a VMM load it, and run it.
    fn load(&self, api: &mut UnixStream) -> Result<(), BootError> {
        let source = self.source;
        let (drives, files) = overrides(self.spec, self.disk, self.stays)?;
        let (state, memory) = source.machine()?;
        let backend = match &source.handler {
            None => json!({"backend_type": "File", "backend_path": "fd:memory"}),
            Some(_) => json!({
                "backend_type": "Uffd",
                "backend_path": "fd:handler",
                "template_path": "fd:memory",
            }),
        };
        let mut load = json!({
            "snapshot_path": "fd:state",
            "mem_backend": backend,
            "resume_vm": true,
            "vsock_override": {"uds_path": state::VSOCK_SOCKET},
            "drive_overrides": drives,
            "only_overrides": true,
        });
        let set = source.working_set.as_ref().map(opened_anew);
        let set = set.and_then(Result::ok);
        if let (Some(_), Some(load)) = (&set, load.as_object_mut()) {
            load.insert("working_set".to_owned(), json!("fd:set"));
        }
        let load = load.to_string();
        let mut descriptors = vec![("state", state.as_fd()), ("memory", memory.as_fd())];
        descriptors.extend(set.iter().map(|file| ("set", file.as_fd())));
        descriptors.extend(source.handler.iter().map(|fd| ("handler", fd.as_fd())));
        descriptors.extend(
            files
                .iter()
                .map(|(name, file)| (name.as_str(), file.as_fd())),
        );
        let call = ("PUT", "/snapshot/load");
        vmm::request_with(api, call, load.as_bytes(), &descriptors, self.deadline)?;
        Ok(())
    }
}

fn put_console(api: &mut UnixStream, deadline: Instant) -> Result<(), vmm::ApiError> {
    let console = json!({"socket_path": state::CONSOLE_SOCKET}).to_string();
    vmm::request(api, "PUT", "/console", console.as_bytes(), deadline).map(drop)
}

/// Tells a guest that was restored, or has gone back, who it is now; returns when its programs go on. What it
/// could not be told, and what does not stop it, is returned.
pub(crate) fn adopt(
    dir: &SandboxDir,
    spec: &SandboxSpec,
    deadline: Instant,
    stages: &mut Stages,
) -> Result<Vec<String>, BootError> {
    let call = adoption(dir, spec)?;
    let failed = |error: &dyn std::fmt::Display| BootError::NotAdopted(error.to_string());
    let socket = SocketPath::new(dir, state::VSOCK_SOCKET);
    let stream =
        hybrid::connect_patiently(socket.path(), AGENT_PORT, deadline).map_err(|e| failed(&e))?;
    let adoption = Adoption::start(stream, call, Some(deadline)).map_err(|e| failed(&e))?;
    stages.mark("agent ready");
    let adopted = adoption.thawed(Some(Instant::now() + THAW_LIMIT));
    let adopted = adopted.map_err(|e| failed(&e))?;
    stages.mark("thawed");
    Ok(adopted.failed)
}

/// A descriptor to be sent along, and its name.
type NamedFile = (String, File);

/// Drives are found by name: what a path meant where the snapshot was taken it need not mean here. What must
/// not be written is given as a descriptor for reading, whatever the snapshot says about it.
fn overrides(
    spec: &SandboxSpec,
    disk: Option<&Layered>,
    stays: bool,
) -> Result<(Vec<serde_json::Value>, Vec<NamedFile>), BootError> {
    let mut files = Vec::new();
    let mut all = Vec::new();
    for drive in plan::drives(spec, disk, stays)? {
        let mut path = drive.path_on_host;
        if drive.is_read_only {
            let file = File::open(&path).map_err(|error| {
                BootError::Invalid(format!("cannot read drive '{}': {error}", drive.drive_id))
            })?;
            files.push((drive.drive_id.clone(), file));
            path = format!("fd:{}", drive.drive_id);
        }
        let mut with = json!({
            "drive_id": drive.drive_id,
            "path_on_host": path,
            "cache_type": drive.cache_type,
        });
        if let (false, Some(with)) = (drive.layers.is_empty(), with.as_object_mut()) {
            with.insert("layers".to_owned(), json!(drive.layers));
        }
        all.push(with);
    }
    Ok((all, files))
}

/// Who the guest is now.
fn adoption(dir: &SandboxDir, spec: &SandboxSpec) -> Result<v1::Adopt, BootError> {
    let origin: Option<Origin> = dir.read_record(state::ORIGIN)?;
    let origin =
        origin.ok_or_else(|| BootError::Invalid("it is not said where it comes from".into()))?;
    let host_name = spec.name.as_deref().map(plan::host_name);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Ok(v1::Adopt {
        sandbox: dir.id().to_owned(),
        lineage: origin.lineage,
        generation: origin.generation,
        host_name: host_name.unwrap_or_default(),
        machine_id: origin.machine_id,
        unix_ns: now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(0)),
        seed: random(SEED)?,
    })
}

/// Bytes of the host's generator.
fn random(count: usize) -> Result<Vec<u8>, BootError> {
    let mut bytes = vec![0; count];
    let mut rest = &mut bytes[..];
    while !rest.is_empty() {
        let flags = rustix::rand::GetRandomFlags::empty();
        let got = rustix::rand::getrandom(&mut *rest, flags)
            .map_err(|errno| BootError::Invalid(format!("no random bytes: {errno}")))?;
        rest = rest.get_mut(got..).unwrap_or_default();
    }
    Ok(bytes)
}

/// What a sandbox's disk shall be like, if there is a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    Raw,
    Layers,
}

/// A disk that was made, and is not yet the sandbox's.
#[derive(Debug)]
pub(crate) enum NewDisk {
    None,
    Raw,
    Layers(Layered),
}

impl NewDisk {
    /// It is not wanted.
    pub(crate) fn discard(&self, dir: &SandboxDir) {
        match self {
            Self::None => {}
            Self::Raw => drop(std::fs::remove_file(dir.file(state::NEW_DISK))),
            Self::Layers(layered) => layered.discard(dir),
        }
    }
}

impl Source {
    /// Puts into a new sandbox's directory what a clone needs. One that stays has it after a power failure too.
    pub(crate) fn fill(&self, dir: &SandboxDir, life: Life) -> Result<(), BootError> {
        let durably = life == Life::Persistent;
        let disk = self.prepare(dir, durably, Shape::Layers)?;
        self.install(dir, &disk, durably)
    }

    /// Makes the disk beside the one that there may be. It has layers if they are wanted and can be.
    pub(crate) fn prepare(
        &self,
        dir: &SandboxDir,
        durably: bool,
        shape: Shape,
    ) -> Result<NewDisk, BootError> {
        let path = dir.file(state::NEW_DISK);
        let failed = |source| {
            let what = "copy the snapshot's disk to";
            let path = path.clone();
            BootError::State(StateError::Io { what, path, source })
        };
        let shared = match &self.disk {
            None => return Ok(NewDisk::None),
            Some(Disk::Layers(files)) => {
                let made = Layered::make(dir, &files.base, &files.layers, durably)?;
                return Ok(NewDisk::Layers(made));
            }
            Some(Disk::Image(shared)) => shared,
        };
        let bytes = shared.metadata().map_err(failed)?.len();
        if shape == Shape::Layers && layered::fits(bytes) {
            return Ok(NewDisk::Layers(Layered::make(dir, shared, &[], durably)?));
        }
        // A copy that was not finished.
        let _ = std::fs::remove_file(&path);
        let copied = || {
            let own = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            disk::copy_into(opened_anew(shared)?, own.try_clone()?)?;
            if durably { own.sync_all() } else { Ok(()) }
        };
        copied().map_err(|source| {
            let _ = std::fs::remove_file(&path);
            failed(source)
        })?;
        Ok(NewDisk::Raw)
    }

    /// Puts the prepared disk in its place, and says where the sandbox comes from.
    pub(crate) fn install(
        &self,
        dir: &SandboxDir,
        disk: &NewDisk,
        durably: bool,
    ) -> Result<(), BootError> {
        match disk {
            NewDisk::None => {}
            NewDisk::Layers(layered) => layered.install(dir, durably)?,
            NewDisk::Raw => {
                let path = dir.file(state::DISK);
                std::fs::rename(dir.file(state::NEW_DISK), &path).map_err(|source| {
                    let what = "replace";
                    BootError::State(StateError::Io { what, path, source })
                })?;
            }
        }
        let machine_id = random(16)?;
        let machine_id = machine_id
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let origin = Origin::next(&self.saved, self.snapshot.clone(), machine_id);
        if durably {
            dir.write_record_durably(state::ORIGIN, &origin)?;
        } else {
            dir.write_record(state::ORIGIN, &origin)?;
        }
        Ok(())
    }

    /// The VMM that waits for it, if there is one: for one guest.
    fn take_ready(&self) -> Option<Ready> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        ready.take()
    }

    /// State and memory, with positions of their own: clones share the files.
    fn machine(&self) -> Result<(File, File), BootError> {
        let (state, memory) = self
            .machine
            .as_ref()
            .ok_or_else(|| BootError::Invalid("the snapshot holds a disk only".into()))?;
        let failed = |error| BootError::Invalid(format!("cannot share the snapshot: {error}"));
        Ok((
            opened_anew(state).map_err(failed)?,
            opened_anew(memory).map_err(failed)?,
        ))
    }
}

/// The same file for reading, with a position of its own.
fn opened_anew(file: &File) -> std::io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
