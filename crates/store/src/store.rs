//! An open store: its folders, its index in memory, its list of snapshots.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;

use crate::codec::{Namer, is_chunk_len};
use crate::envelope::{self, Kind};
use crate::error::{Error, Result};
use crate::fs::{File, Folder, Fs};
use crate::id::{PackId, SnapshotId, StoreId};
use crate::manifest::Manifest;
use crate::pack;
use crate::state::{Problem, Snapshot, State, Summary};
use crate::{names, proto};

/// Packs kept open for reading.
const OPEN_PACKS: usize = 128;
const FOLDERS: [&str; 5] = ["packs", "manifests", "trash", "incoming", "tmp"];

/// How chunks are made. The first two are fixed when the store is made.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Bytes of a slot, and most of a chunk: a power of two from 16 KiB to 1 MiB.
    pub slot_bytes: u32,
    /// zstd's level for new chunks.
    pub level: i32,
    /// A pack is sealed when it has so many bytes.
    pub pack_bytes: u64,
}

impl Default for Settings {
    /// As measured on guest RAM: `docs/performance.md`.
    fn default() -> Self {
        Self {
            slot_bytes: 64 << 10,
            level: 1,
            pack_bytes: 64 << 20,
        }
    }
}

pub(crate) struct Inner {
    pub(crate) fs: Arc<dyn Fs>,
    pub(crate) id: StoreId,
    pub(crate) namer: Namer,
    pub(crate) settings: Settings,
    read_only: bool,
    _lock: Option<Box<dyn Any + Send + Sync>>,
    state: Mutex<State>,
    /// Taken before `state`, by whoever changes names or manifests.
    pub(crate) changing: Mutex<()>,
    /// One collection at a time; taken before `changing`.
    pub(crate) collecting: Mutex<()>,
    open: Mutex<HashMap<PackId, Arc<dyn File>>>,
}

/// A store that is open. Clones are handles to the same one.
#[derive(Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a thread that panicked left is whole: no change is made in two steps.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn manifest_path(id: SnapshotId) -> String {
    format!("manifests/{id}")
}

impl Store {
    /// Makes a store in an existing folder.
    ///
    /// # Errors
    /// [`Error::Exists`] if there is one; [`Error::Name`] for settings out of range; what the system says.
    pub fn create(folder: &Path, settings: Settings) -> Result<Self> {
        Self::create_on(folder_at(folder)?, settings)
    }

    /// Opens a store for writing; there can be one who does.
    ///
    /// # Errors
    /// [`Error::NoStore`], [`Error::Locked`], [`Error::Version`], [`Error::Damaged`], what the system says.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::open_on(folder_at(folder)?, false)
    }

    /// Opens a store for reading, whoever writes to it: it is seen as it was when it was opened, with the
    /// snapshots that have come since. The folder may be on a read-only file system.
    ///
    /// # Errors
    /// As [`Store::open`], without [`Error::Locked`].
    pub fn open_read_only(folder: &Path) -> Result<Self> {
        Self::open_on(folder_at(folder)?, true)
    }

    /// [`Store::create`] on any file system.
    ///
    /// # Errors
    /// As there.
    pub fn create_on(fs: Arc<dyn Fs>, settings: Settings) -> Result<Self> {
        if !settings.slot_bytes.is_power_of_two()
            || !(16 << 10..=1 << 20).contains(&settings.slot_bytes)
        {
            return Err(Error::Name {
                what: "slot size",
                name: settings.slot_bytes.to_string(),
                rule: "a power of two from 16 KiB to 1 MiB",
            });
        }
        let lock = fs.lock("lock").map_err(lock_error)?;
        if fs.open("store").is_ok() {
            return Err(Error::Exists);
        }
        for folder in FOLDERS {
            fs.create_dir(folder).map_err(Error::io("make", folder))?;
        }
        clear_temporary(&*fs);
        let mut random = [0; 48];
        fs.random(&mut random)
            .map_err(Error::io("draw random bytes for", "store"))?;
        let (id, key) = random.split_at_checked(16).unwrap_or_default();
        let identity = proto::Identity {
            id: id.to_vec(),
            key: key.to_vec(),
            slot_bytes: settings.slot_bytes,
            level: settings.level,
            created_ms: fs.now_ms(),
        }
        .encode_to_vec();
        // The copy first: where `store` is, there is a store.
        for path in ["store.copy", "store"] {
            envelope::write(&*fs, Kind::Identity, path, "tmp/store", &identity)?;
            fs.sync_dir(".").map_err(Error::io("sync", "."))?;
        }
        drop(lock);
        Self::open_with(fs, settings.pack_bytes, false)
    }

    /// [`Store::open`] or [`Store::open_read_only`] on any file system.
    ///
    /// # Errors
    /// As there.
    pub fn open_on(fs: Arc<dyn Fs>, read_only: bool) -> Result<Self> {
        Self::open_with(fs, Settings::default().pack_bytes, read_only)
    }

    fn open_with(fs: Arc<dyn Fs>, pack_bytes: u64, read_only: bool) -> Result<Self> {
        let mut state = State::default();
        let identity = read_identity(&*fs, &mut state.problems)?;
        let lock = if read_only {
            None
        } else {
            let lock = fs.lock("lock").map_err(lock_error)?;
            for folder in FOLDERS {
                fs.create_dir(folder).map_err(Error::io("make", folder))?;
            }
            clear_temporary(&*fs);
            Some(lock)
        };
        let bad = |what| Error::damaged("store", what);
        let id = StoreId::from_slice(&identity.id).ok_or_else(|| bad("its id is not 16 bytes"))?;
        let key = identity
            .key
            .as_slice()
            .try_into()
            .map_err(|_| bad("its key is not 32 bytes"))?;
        if !is_chunk_len(identity.slot_bytes) {
            return Err(bad("its slot size cannot be"));
        }
        let settings = Settings {
            slot_bytes: identity.slot_bytes,
            level: identity.level,
            pack_bytes,
        };
        names::load(&*fs, &mut state);
        let inner = Inner {
            fs,
            id,
            namer: Namer::new(key),
            settings,
            read_only,
            _lock: lock,
            state: Mutex::new(state),
            changing: Mutex::new(()),
            collecting: Mutex::new(()),
            open: Mutex::default(),
        };
        inner.load_packs()?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The same store, sealing packs at another size; only right after it was opened, when this is the only
    /// handle to it.
    #[must_use]
    pub fn with_pack_bytes(mut self, bytes: u64) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.settings.pack_bytes = bytes;
        }
        self
    }

    /// What was not as it should be when the store was opened or read.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        self.inner.state().problems.clone()
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.inner.settings
    }

    /// All snapshots, oldest first. One whose manifest is damaged is among the [`Store::problems`] instead.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn list(&self) -> Result<Vec<Snapshot>> {
        let mut all = Vec::new();
        let ids = self.inner.snapshot_ids()?;
        for id in &ids {
            if let Some(summary) = self.inner.summary(*id)? {
                all.push(self.inner.state().describe(*id, summary, &ids));
            }
        }
        all.sort_by_key(|snapshot| (snapshot.created_ms, snapshot.id));
        Ok(all)
    }

    /// The snapshot with that tag, that id, or the only one whose id begins so (four characters at least).
    ///
    /// # Errors
    /// [`Error::NoSnapshot`], [`Error::Ambiguous`].
    pub fn find(&self, name: &str) -> Result<SnapshotId> {
        let ids = self.inner.snapshot_ids()?;
        if let Some(id) = self.inner.state().names.tagged(name, &ids) {
            return Ok(id);
        }
        let mut fitting = ids
            .iter()
            .filter(|id| name.len() >= 4 && id.to_string().starts_with(name));
        match (fitting.next(), fitting.next()) {
            (Some(id), None) => Ok(*id),
            (Some(_), Some(_)) => Err(Error::Ambiguous(name.to_owned())),
            _ => Err(Error::NoSnapshot(name.to_owned())),
        }
    }
}

fn folder_at(path: &Path) -> Result<Arc<dyn Fs>> {
    let folder = Folder::open(path).map_err(Error::io("open", &path.display().to_string()))?;
    Ok(Arc::new(folder))
}

fn lock_error(error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::WouldBlock {
        Error::Locked
    } else {
        Error::io("lock", "lock")(error)
    }
}

/// What was being written when somebody died. Nothing refers to it.
fn clear_temporary(fs: &dyn Fs) {
    for name in fs.list("tmp").unwrap_or_default() {
        let _ = fs.remove(&format!("tmp/{name}"));
    }
}

fn read_identity(fs: &dyn Fs, problems: &mut Vec<Problem>) -> Result<proto::Identity> {
    let read = |path| {
        let bytes = envelope::read(fs, Kind::Identity, path)?;
        proto::Identity::decode(&bytes[..]).map_err(|error| Error::damaged(path, error.to_string()))
    };
    let first = match read("store") {
        Err(error) if error.is_not_found() => return Err(Error::NoStore),
        other => other,
    };
    match first {
        Err(error @ (Error::Damaged { .. } | Error::Io { .. })) => {
            let copy = read("store.copy").map_err(|_| error)?;
            problems.push(Problem {
                path: "store".into(),
                what: "it is damaged; its copy is used".into(),
            });
            Ok(copy)
        }
        other => other,
    }
}

impl Inner {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    pub(crate) fn writable(&self) -> Result<()> {
        if self.read_only {
            Err(Error::ReadOnly)
        } else {
            Ok(())
        }
    }

    pub(crate) fn sync_dir(&self, path: &str) -> Result<()> {
        self.fs.sync_dir(path).map_err(Error::io("sync", path))
    }

    pub(crate) fn random_id(&self) -> Result<[u8; 16]> {
        let mut id = [0; 16];
        self.fs
            .random(&mut id)
            .map_err(Error::io("draw random bytes for", "an id"))?;
        Ok(id)
    }

    /// Reads the indexes of packs that are not known yet.
    pub(crate) fn load_packs(&self) -> Result<()> {
        let known: HashSet<PackId> = self.state().packs.values().map(|pack| pack.id).collect();
        let mut names = self.fs.list("packs").map_err(Error::io("list", "packs"))?;
        names.sort_unstable();
        for name in names {
            let Some(id) = pack::id_of(&name) else {
                self.state()
                    .problem(&format!("packs/{name}"), &"it is not a pack's name");
                continue;
            };
            if !known.contains(&id) {
                self.load_pack(id);
            }
        }
        Ok(())
    }

    fn load_pack(&self, id: PackId) {
        let path = pack::path(id);
        let file = match self.fs.open(&path) {
            Ok(file) => file,
            Err(error) => return self.state().problem(&path, &error),
        };
        let bytes = file.length().unwrap_or(0);
        match pack::index(&*file, &path, id) {
            Ok(entries) => self.state().add_pack(id, bytes, entries, false),
            Err(error) => {
                let entries = pack::salvage(&*file, &path, id).unwrap_or_default();
                let mut state = self.state();
                state.problem(
                    &path,
                    &format!("{error}; {} chunks are still found in it", entries.len()),
                );
                state.add_pack(id, bytes, entries, true);
            }
        }
    }

    /// An open pack.
    pub(crate) fn pack_file(&self, id: PackId) -> Result<Arc<dyn File>> {
        let mut open = locked(&self.open);
        if let Some(file) = open.get(&id) {
            return Ok(Arc::clone(file));
        }
        let path = pack::path(id);
        let file: Arc<dyn File> = self
            .fs
            .open(&path)
            .map_err(Error::io("open", &path))?
            .into();
        if open.len() >= OPEN_PACKS {
            open.clear();
        }
        open.insert(id, Arc::clone(&file));
        Ok(file)
    }

    pub(crate) fn close_pack(&self, id: PackId) {
        locked(&self.open).remove(&id);
    }

    /// The snapshots that exist, whether their manifests are good or not.
    pub(crate) fn snapshot_ids(&self) -> Result<Vec<SnapshotId>> {
        let names = self
            .fs
            .list("manifests")
            .map_err(Error::io("list", "manifests"))?;
        let mut ids: Vec<SnapshotId> = names.iter().filter_map(|name| name.parse().ok()).collect();
        ids.sort_unstable();
        let mut state = self.state();
        state
            .summaries
            .retain(|id, _| ids.binary_search(id).is_ok());
        Ok(ids)
    }

    pub(crate) fn manifest(&self, id: SnapshotId) -> Result<Manifest> {
        let path = manifest_path(id);
        let bytes = envelope::read(&*self.fs, Kind::Manifest, &path).map_err(|error| {
            if error.is_not_found() {
                Error::NoSnapshot(id.to_string())
            } else {
                error
            }
        })?;
        let manifest = Manifest::decode(&path, &bytes)?;
        if manifest.id != id {
            return Err(Error::damaged(
                &path,
                "it is the manifest of another snapshot",
            ));
        }
        Ok(manifest)
    }

    /// `None` if the manifest cannot be read, which is noted.
    fn summary(&self, id: SnapshotId) -> Result<Option<Summary>> {
        if let Some(summary) = self.state().summaries.get(&id) {
            return Ok(Some(summary.clone()));
        }
        match self.manifest(id) {
            Ok(manifest) => {
                let summary = Summary::of(&manifest);
                self.state().summaries.insert(id, summary.clone());
                Ok(Some(summary))
            }
            // Removed since the folder was listed.
            Err(Error::NoSnapshot(_)) => Ok(None),
            Err(error @ (Error::Damaged { .. } | Error::Version { .. } | Error::Io { .. })) => {
                self.state().problem(&manifest_path(id), &error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
