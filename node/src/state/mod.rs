//! The directory of each sandbox and what it says about its owner (contract 10).
//!
//! `…/sandboxes/ID/` holds:
//!
//! | file | what |
//! | --- | --- |
//! | `lock` | locked (flock) by the supervisor, and by whoever makes, starts or removes the sandbox |
//! | `config.json` | what the sandbox is; appears by rename when all else is ready |
//! | `boot.json` | the stages of the last start |
//! | `origin.json` | which snapshot it comes from; only if it does |
//! | `loaded.json` | which snapshot the guest that runs was loaded from; only if it was |
//! | `last.json` | the last snapshot that was taken of the guest that runs |
//! | `resetting.json` | the guest that runs is half way back to a snapshot |
//! | `capture` | locked (flock) while it is held still for a snapshot |
//! | `owner.json` | supervisor, VMM, boot of the machine |
//! | `ended.json` | how the VMM ended; appears by rename |
//! | `api.sock` | the VMM's control API |
//! | `v.sock`, `v.sock_1025` | vsock: into the guest; the agent's sign of readiness |
//! | `console.sock` | the guest's console |
//! | `control.sock` | the supervisor: port forwards |
//! | `console.log`, `vmm.log` | what the console and the VMM said, bounded |
//! | `disk.json` | the files of the writable disk; only if it has layers |
//! | `disk-N.base`, `disk-N.layer` | its base image and its layers, see [`crate::layered`] |
//! | `disk` | the writable disk, if it has none: a large one, or an old one |
//! | `disk.new` | one that is about to replace it |
//!
//! `…/names/NAME` are symbolic links to the directories of the sandboxes that have a name; `…/gone/ID.json` tells how
//! one ended that went away with its guest.

mod gone;
mod names;
mod process;
mod records;
#[cfg(test)]
pub(crate) use records::failing;
pub mod spec;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

pub use gone::Gone;
pub use names::ClaimError;
pub use process::{ProcessRecord, boot_id};

use crate::ending::Ended;
use spec::SandboxSpec;

/// Overrides the directory of all state.
pub const STATE_VARIABLE: &str = "BELLJAR_STATE";
/// Version of the records in the directory.
const VERSION: u32 = 1;
/// A directory younger than this without a lock is being made.
const GRACE: Duration = Duration::from_secs(10);

/// A lock that somebody only looks at is free again within this time.
const LOOK: Duration = Duration::from_millis(200);
/// Extension of a directory's name while it is being removed.
const REMOVING: &str = "removing";

pub const LOCK: &str = "lock";
pub const CONFIG: &str = "config.json";
pub const BOOT: &str = "boot.json";
pub const ORIGIN: &str = "origin.json";
/// What the guest that runs was loaded from; forgotten before the next start.
pub const LOADED: &str = "loaded.json";
/// The last snapshot that was taken of the guest that runs; forgotten before the next start.
pub const LAST: &str = "last.json";
/// The files of this machine that the guest that runs is made of, as they were when it was started; forgotten before
/// the next start.
pub const BASES: &str = "bases.json";
/// There while the guest that runs is half way back to a snapshot, and fit for nothing but another reset.
pub const RESETTING: &str = "resetting.json";
pub const CAPTURE: &str = "capture";
pub const CONTROL_SOCKET: &str = "control.sock";
pub const OWNER: &str = "owner.json";
pub const ENDED: &str = "ended.json";
pub const API_SOCKET: &str = "api.sock";
pub const VSOCK_SOCKET: &str = "v.sock";
pub const CONSOLE_SOCKET: &str = "console.sock";
pub const CONSOLE_LOG: &str = "console.log";
pub const VMM_LOG: &str = "vmm.log";
pub const DISK: &str = "disk";
/// [`crate::layered::Layered`].
pub const DISK_RECORD: &str = "disk.json";
/// A disk that is to take the place of `disk`.
pub const NEW_DISK: &str = "disk.new";

/// A directory or record could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("neither HOME nor XDG_STATE_HOME is set; set {STATE_VARIABLE}")]
    NoHome,
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{} is not a record of this program: {source}", path.display())]
    Malformed {
        path: PathBuf,
        source: serde_json::Error,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError + use<> {
    let path = path.to_path_buf();
    move |source| StateError::Io { what, path, source }
}

/// Who owns a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub version: u32,
    pub boot_id: String,
    pub supervisor: ProcessRecord,
    pub vmm: Option<ProcessRecord>,
    /// Goes away with the command that made it, or with its guest.
    pub ephemeral: bool,
    /// The cgroup that limits the VMM's CPU time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PathBuf>,
}

impl Owner {
    /// A record of the present boot.
    #[must_use]
    pub fn new(supervisor: ProcessRecord, vmm: Option<ProcessRecord>, ephemeral: bool) -> Self {
        Self {
            version: VERSION,
            boot_id: boot_id(),
            supervisor,
            vmm,
            ephemeral,
            cgroup: None,
        }
    }
}

/// All sandboxes of one user on this machine.
#[derive(Debug, Clone)]
pub struct StateRoot {
    sandboxes: PathBuf,
    names: PathBuf,
}

impl StateRoot {
    /// `BELLJAR_STATE`, else `${XDG_STATE_HOME:-$HOME/.local/state}/belljar`. Makes nothing.
    ///
    /// # Errors
    /// `NoHome` if none of them is known.
    pub fn locate() -> Result<Self, StateError> {
        let root = std::env::var_os(STATE_VARIABLE)
            .map(PathBuf::from)
            .or_else(|| crate::assets::user_dir("XDG_STATE_HOME", ".local/state"))
            .ok_or(StateError::NoHome)?;
        Self::at(&root)
    }

    /// State below a directory of the caller's choice.
    ///
    /// # Errors
    /// The working directory is gone.
    pub fn at(root: &Path) -> Result<Self, StateError> {
        let root = std::path::absolute(root).map_err(io_error("use", root))?;
        Ok(Self {
            sandboxes: root.join("sandboxes"),
            names: root.join("names"),
        })
    }

    /// The directory of the keeper.
    #[must_use]
    pub fn keeper_dir(&self) -> PathBuf {
        self.sandboxes.with_file_name(belljar_keeper::DIR)
    }

    /// Where the directories of the sandboxes are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.sandboxes
    }

    /// Makes the directory of a new sandbox and locks it. The lock belongs to the open file, so a
    /// supervisor that inherits it keeps it.
    ///
    /// # Errors
    /// The state directory cannot be written.
    pub fn create(&self) -> Result<(SandboxDir, File), StateError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.sandboxes)
            .map_err(io_error("make the directory", &self.sandboxes))?;
        loop {
            let id = new_id();
            let path = self.sandboxes.join(&id);
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(io_error("make the directory", &path)(error)),
            }
            let dir = SandboxDir { id, path };
            let lock = dir.lock_soon()?.ok_or_else(|| StateError::Io {
                what: "lock",
                path: dir.file(LOCK),
                source: io::ErrorKind::WouldBlock.into(),
            })?;
            return Ok((dir, lock));
        }
    }

    /// Every sandbox there is, by id.
    ///
    /// # Errors
    /// The directory exists and cannot be read.
    pub fn list(&self) -> Result<Vec<SandboxDir>, StateError> {
        let entries = match fs::read_dir(&self.sandboxes) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("read the directory", &self.sandboxes)(error)),
        };
        let mut found: Vec<SandboxDir> = entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| {
                Some(SandboxDir {
                    id: entry.file_name().into_string().ok()?,
                    path: entry.path(),
                })
            })
            .collect();
        found.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }
}

/// Whether a text has the form of an id.
#[must_use]
pub fn is_id(text: &str) -> bool {
    text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Eight hexadecimal digits.
fn new_id() -> String {
    let mut bytes = [0u8; 4];
    if rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).is_err() {
        bytes = std::process::id().to_ne_bytes();
    }
    format!("{:08x}", u32::from_ne_bytes(bytes))
}

/// The directory of one sandbox.
#[derive(Debug, Clone)]
pub struct SandboxDir {
    id: String,
    path: PathBuf,
}

/// Who has a sandbox in hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Its supervisor (or a command that is making or removing it) holds the lock.
    Owned(Option<Owner>),
    /// Nobody owns it any more.
    Left(Leftover),
}

/// Why a directory is still there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leftover {
    /// The machine was booted again while it ran.
    Rebooted,
    /// Its supervisor died; with it went the VMM.
    SupervisorDied,
    /// Its supervisor died, and its VMM still runs.
    VmmAlone(ProcessRecord),
    /// It ended as told, but nobody removed it.
    EndedUnremoved(Box<Ended>),
    /// It was never started.
    NeverStarted,
}

impl SandboxDir {
    /// The directory at `path`, which exists.
    #[must_use]
    pub fn existing(path: &Path) -> Self {
        let id = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        Self {
            id,
            path: path.to_path_buf(),
        }
    }

    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file inside.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Takes the lock if nobody has it.
    ///
    /// # Errors
    /// The lock file cannot be opened.
    pub fn try_lock(&self) -> Result<Option<File>, StateError> {
        self.try_lock_file(LOCK)
    }

    /// Waits until nobody holds the sandbox still for a capture, and keeps others from doing so; `None` if that
    /// is not within `limit`.
    ///
    /// # Errors
    /// The lock file cannot be opened.
    pub fn capture_turn(&self, limit: Duration) -> Result<Option<File>, StateError> {
        self.wait_for_lock(CAPTURE, limit)
    }

    fn try_lock_file(&self, name: &str) -> Result<Option<File>, StateError> {
        let path = self.file(name);
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open the lock", &path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(io_error("lock", &path)(error.into())),
        }
    }

    /// Takes the lock, even if somebody looks at the sandbox at this moment; `None` if it has an owner.
    ///
    /// # Errors
    /// The lock file cannot be opened.
    pub fn lock_soon(&self) -> Result<Option<File>, StateError> {
        self.lock_within(LOOK)
    }

    /// Takes the lock as soon as it is free; `None` if that is not within `limit`.
    ///
    /// # Errors
    /// The lock file cannot be opened.
    pub fn lock_within(&self, limit: Duration) -> Result<Option<File>, StateError> {
        self.wait_for_lock(LOCK, limit)
    }

    fn wait_for_lock(&self, name: &str, limit: Duration) -> Result<Option<File>, StateError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(lock) = self.try_lock_file(name)? {
                return Ok(Some(lock));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether its removal has begun.
    #[must_use]
    pub fn is_being_removed(&self) -> bool {
        self.path.extension().is_some_and(|end| end == REMOVING)
    }

    /// Who owns it, or why it is still there.
    ///
    /// # Errors
    /// The lock cannot be tried.
    pub fn condition(&self) -> Result<Condition, StateError> {
        if !self.file(LOCK).exists() && self.is_young() {
            return Ok(Condition::Owned(None));
        }
        // A record that cannot be read is as good as none: what is left can still be explained.
        let owner: Option<Owner> = self.read_record(OWNER).ok().flatten();
        if self.try_lock()?.is_none() {
            return Ok(Condition::Owned(owner));
        }
        Ok(Condition::Left(self.leftover()))
    }

    /// Why it is there, given that nobody owns it: for whoever has taken its lock.
    #[must_use]
    pub fn leftover(&self) -> Leftover {
        let owner: Option<Owner> = self.read_record(OWNER).ok().flatten();
        let ended: Option<Ended> = self.read_record(ENDED).ok().flatten();
        explain(owner, ended, &boot_id())
    }

    fn is_young(&self) -> bool {
        fs::metadata(&self.path)
            .and_then(|metadata| metadata.modified())
            .ok()
            .and_then(|made| SystemTime::now().duration_since(made).ok())
            .is_some_and(|age| age < GRACE)
    }

    /// Removes the directory and all in it. It loses its id first, so that what a crash leaves of it is
    /// known as half removed.
    ///
    /// # Errors
    /// Something in it cannot be removed.
    pub fn remove(&self) -> Result<(), StateError> {
        let doomed = if self.is_being_removed() {
            self.path.clone()
        } else {
            self.release_own_name();
            self.remove_cgroup();
            let doomed = self.path.with_added_extension(REMOVING);
            match fs::rename(&self.path, &doomed) {
                Ok(()) => doomed,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(io_error("remove", &self.path)(error)),
            }
        };
        match fs::remove_dir_all(&doomed) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &doomed)(error))
            }
            _ => Ok(()),
        }
    }

    /// The name, if it has one, can be given to another one from now on.
    fn release_own_name(&self) {
        let spec: Option<SandboxSpec> = self.read_record(CONFIG).ok().flatten();
        let name = spec.and_then(|spec| spec.name);
        let root = self.path.parent().and_then(Path::parent);
        if let (Some(name), Some(root)) = (name, root)
            && let Ok(root) = StateRoot::at(root)
        {
            root.release_name(&name, &self.id);
        }
    }
}

fn explain(owner: Option<Owner>, ended: Option<Ended>, boot_id: &str) -> Leftover {
    if let Some(ended) = ended {
        return Leftover::EndedUnremoved(Box::new(ended));
    }
    match owner {
        None => Leftover::NeverStarted,
        Some(owner) if owner.boot_id != boot_id => Leftover::Rebooted,
        Some(owner) => match owner.vmm {
            Some(vmm) if vmm.is_alive() => Leftover::VmmAlone(vmm),
            _ => Leftover::SupervisorDied,
        },
    }
}

#[cfg(test)]
mod tests;
