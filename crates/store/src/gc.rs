//! Garbage: what no manifest names goes to a waiting area, and is deleted after a grace.
//!
//! A collection runs beside writers and readers. What a writer uses is live from the moment it is used;
//! what no one uses leaves the index before its pack leaves the folder, under the lock that writers ask under.

use std::collections::HashSet;

use prost::Message;

use crate::codec::Decompressor;
use crate::envelope::{self, Kind};
use crate::error::{Error, Result};
use crate::id::{ChunkId, PackId, SnapshotId};
use crate::pack::{self, Entry, PackWriter};
use crate::proto;
use crate::state::{Pack, Problem, State};
use crate::store::{Inner, Store, locked, manifest_path};

/// A pack with less than this percentage of live bytes is rewritten.
const FULL_ENOUGH: u64 = 70;
/// So many packs smaller than a quarter of a full one are joined.
const SMALL_PACKS: usize = 8;
/// An import that is not taken up again is forgotten.
const INCOMING_MS: u64 = 7 * 24 * 3600 * 1000;

/// What a collection did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Packs put into the waiting area, and their bytes.
    pub packs: u64,
    pub bytes: u64,
    /// Bytes of live chunks that were copied to new packs for that.
    pub copied_bytes: u64,
    /// Bytes deleted for good, which had waited long enough.
    pub deleted_bytes: u64,
}

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    pub chunks: u64,
    /// Before compression.
    pub bytes: u64,
    pub damaged: Vec<ChunkId>,
    /// Snapshots that cannot be restored, and why.
    pub broken: Vec<(SnapshotId, String)>,
    pub problems: Vec<Problem>,
}

impl Verified {
    /// Whether all is as it should be.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.damaged.is_empty() && self.broken.is_empty() && self.problems.is_empty()
    }
}

impl Store {
    /// Removes a snapshot from the list. Its chunks stay until a collection. `live` are those that sandboxes use.
    ///
    /// # Errors
    /// [`Error::Kept`] if it is named, pinned, live or being read; [`Error::NoSnapshot`]; what the system says.
    pub fn remove(&self, id: SnapshotId, live: &HashSet<SnapshotId>) -> Result<()> {
        self.inner.writable()?;
        let _changing = locked(&self.inner.changing);
        let existing = self.inner.snapshot_ids()?;
        if existing.binary_search(&id).is_err() {
            return Err(Error::NoSnapshot(id.to_string()));
        }
        self.inner.names_good()?;
        {
            let mut state = self.inner.state();
            if let Some(why) = state.why_kept(id, live, &existing) {
                return Err(Error::Kept { id, why });
            }
            state.removing.insert(id);
        }
        let moved = self
            .inner
            .discard(&manifest_path(id), "manifest", &id.to_string());
        self.inner.state().removing.remove(&id);
        moved?;
        self.inner.sync_dir("manifests")
    }

    /// Moves chunks that nothing names to the waiting area, and deletes what has been there for `grace_ms`.
    ///
    /// # Errors
    /// [`Error::Damaged`] if a manifest cannot be read: then nothing is deleted. What the system says.
    pub fn gc(&self, grace_ms: u64) -> Result<Collected> {
        self.inner.writable()?;
        let _collecting = locked(&self.inner.collecting);
        // Removals of manifests are durable before what they named goes.
        for folder in ["manifests", "incoming"] {
            self.inner.sync_dir(folder)?;
        }
        let claims = Claims::begin(&self.inner);
        let named = self.inner.named()?;
        let mut done = Collected::default();
        let (dead, sparse) = self.inner.sweep(&named);
        for pack in dead {
            self.inner.trash(&pack, &mut done)?;
        }
        drop(claims);
        self.inner.purge(grace_ms, &named, &mut done)?;
        self.inner.compact(&sparse, &mut done)?;
        for folder in ["trash", "packs"] {
            self.inner.sync_dir(folder)?;
        }
        Ok(done)
    }

    /// Reads everything and compares it with its name. `progress` is told the packs done and all.
    ///
    /// # Errors
    /// If the folders cannot be read; damage is in the result.
    pub fn verify(&self, mut progress: impl FnMut(usize, usize)) -> Result<Verified> {
        let mut found = Verified::default();
        let mut decoder = Decompressor::new()?;
        let mut bytes = Vec::new();
        let packs: Vec<Pack> = self.inner.state().packs.values().cloned().collect();
        for (number, pack) in packs.iter().enumerate() {
            let path = pack::path(pack.id);
            for entry in pack.entries.iter() {
                found.chunks += 1;
                found.bytes += u64::from(entry.raw_len);
                let good = self.inner.pack_file(pack.id).and_then(|file| {
                    let packed = pack::read_record(&*file, &path, entry)?;
                    self.inner.verify(&packed, &path, &mut decoder, &mut bytes)
                });
                // The pack may have been moved, or the chunk may be good elsewhere.
                if good.is_err()
                    && self.inner.is_needed(entry.id)
                    && self
                        .inner
                        .chunk(entry.id, &mut decoder, &mut bytes)
                        .is_err()
                {
                    found.damaged.push(entry.id);
                }
            }
            progress(number + 1, packs.len());
        }
        self.verify_snapshots(&mut found)?;
        found.problems = self.problems();
        Ok(found)
    }

    fn verify_snapshots(&self, found: &mut Verified) -> Result<()> {
        let damaged: HashSet<ChunkId> = found.damaged.iter().copied().collect();
        for id in self.inner.snapshot_ids()? {
            let manifest = match self.inner.manifest(id) {
                Ok(manifest) => manifest,
                Err(Error::NoSnapshot(_)) => continue,
                Err(error) => {
                    found.broken.push((id, error.to_string()));
                    continue;
                }
            };
            let bad = {
                let state = self.inner.state();
                let bad =
                    |chunk: &&ChunkId| damaged.contains(chunk) || !state.index.contains_key(chunk);
                manifest.chunks.iter().filter(bad).count()
            };
            if bad > 0 {
                let of = manifest.chunks.len();
                found.broken.push((
                    id,
                    format!("{bad} of its {of} chunks are missing or damaged"),
                ));
            }
        }
        Ok(())
    }
}

/// A pack to be rewritten: its number in the index, and what of it is live.
struct Sparse {
    number: u32,
    pack: Pack,
    live: Vec<Entry>,
}

/// While it lives, chunks that writers use are noted.
struct Claims<'a>(&'a Inner);

impl<'a> Claims<'a> {
    fn begin(inner: &'a Inner) -> Self {
        let mut state = inner.state();
        let used = state.writers.values().flatten().copied().collect();
        state.claimed = Some(used);
        Self(inner)
    }
}

impl Drop for Claims<'_> {
    fn drop(&mut self) {
        self.0.state().claimed = None;
    }
}

impl State {
    /// Why a snapshot may not be removed.
    pub(crate) fn why_kept(
        &self,
        id: SnapshotId,
        live: &HashSet<SnapshotId>,
        existing: &[SnapshotId],
    ) -> Option<String> {
        let tags = self.names.tags_of(id, existing);
        if self.names.mark(id).is_some_and(|mark| mark.pinned) {
            return Some("it is pinned".into());
        }
        if !tags.is_empty() {
            return Some(format!("it is tagged {}", tags.join(", ")));
        }
        if live.contains(&id) {
            return Some("a sandbox uses it".into());
        }
        self.held
            .contains_key(&id)
            .then(|| "it is being read".into())
    }
}

impl Inner {
    /// Moves a file to the waiting area, under the time at which that was.
    fn discard(&self, path: &str, kind: &str, id: &str) -> Result<()> {
        let to = format!("trash/{:016}.{kind}.{id}", self.fs.now_ms());
        self.fs
            .rename(path, &to)
            .map_err(Error::io("move to the waiting area", path))
    }

    /// The chunks that manifests and unfinished imports name.
    fn named(&self) -> Result<HashSet<ChunkId>> {
        let mut named = HashSet::new();
        for id in self.snapshot_ids()? {
            match self.manifest(id) {
                Ok(manifest) => named.extend(manifest.chunks),
                Err(Error::NoSnapshot(_)) => {}
                Err(error) => return Err(error),
            }
        }
        for name in self
            .fs
            .list("incoming")
            .map_err(Error::io("list", "incoming"))?
        {
            let path = format!("incoming/{name}");
            let read = envelope::read(&*self.fs, Kind::Incoming, &path);
            let message = read
                .ok()
                .and_then(|bytes| proto::Incoming::decode(&bytes[..]).ok());
            let fresh = |message: &proto::Incoming| {
                self.fs.now_ms() < message.started_ms.saturating_add(INCOMING_MS)
            };
            match message.filter(fresh) {
                Some(message) => named.extend(
                    message
                        .chunks
                        .as_chunks::<32>()
                        .0
                        .iter()
                        .copied()
                        .map(ChunkId),
                ),
                // Only means to begin that import anew.
                None => drop(self.fs.remove(&path)),
            }
        }
        Ok(named)
    }

    /// Takes what is not live out of the index. Returns the packs that have nothing live, and those to rewrite
    /// with what is live in them.
    fn sweep(&self, named: &HashSet<ChunkId>) -> (Vec<Pack>, Vec<Sparse>) {
        let mut state = self.state();
        let claimed = state.claimed.clone().unwrap_or_default();
        let small = self.settings.pack_bytes / 4;
        let join = state
            .packs
            .values()
            .filter(|pack| pack.bytes < small)
            .count()
            >= SMALL_PACKS;
        let (mut dead, mut sparse) = (Vec::new(), Vec::new());
        for (number, pack) in state.packs.clone() {
            if pack.salvaged {
                continue;
            }
            let here = |entry: &&Entry| {
                let place = state.index.get(&entry.id);
                place.is_some_and(|place| place.pack == number && place.offset == entry.offset)
            };
            let (live, gone): (Vec<Entry>, Vec<Entry>) = pack
                .entries
                .iter()
                .filter(here)
                .partition(|entry| named.contains(&entry.id) || claimed.contains(&entry.id));
            let live_bytes: u64 = live.iter().map(Entry::bytes_on_disk).sum();
            let is_sparse =
                live_bytes * 100 < pack.bytes * FULL_ENOUGH || join && pack.bytes < small;
            if !live.is_empty() && !is_sparse {
                continue;
            }
            for entry in gone {
                state.index.remove(&entry.id);
            }
            if live.is_empty() {
                state.packs.remove(&number);
                dead.push(pack);
            } else {
                sparse.push(Sparse { number, pack, live });
            }
        }
        (dead, sparse)
    }

    /// Moves a pack that nothing in the index refers to.
    fn trash(&self, pack: &Pack, done: &mut Collected) -> Result<()> {
        self.discard(&pack::path(pack.id), "pack", &pack.id.to_string())?;
        self.close_pack(pack.id);
        done.packs += 1;
        done.bytes += pack.bytes;
        Ok(())
    }

    /// Copies what is live in sparse packs to new ones, and moves the old ones away once that is durable.
    fn compact(&self, sparse: &[Sparse], done: &mut Collected) -> Result<()> {
        let mut decoder = Decompressor::new()?;
        let mut bytes = Vec::new();
        let mut rest = sparse;
        while !rest.is_empty() {
            let id = PackId(self.random_id()?);
            let mut writer = PackWriter::create(&*self.fs, id, self.id)?;
            let mut moved = Vec::new();
            while let Some((Sparse { number, pack, live }, others)) = rest.split_first() {
                if writer.length() >= self.settings.pack_bytes {
                    break;
                }
                rest = others;
                match self.copy(pack, live, &mut writer, &mut decoder, &mut bytes) {
                    Ok(()) => moved.push((*number, pack)),
                    // It stays as it is, and what was copied is there twice.
                    Err(error @ (Error::ChunkDamaged { .. } | Error::Damaged { .. })) => {
                        self.state().problem(&pack::path(pack.id), &error);
                    }
                    Err(error) => {
                        writer.discard(&*self.fs);
                        return Err(error);
                    }
                }
            }
            let (id, entries, length) = writer.seal(&*self.fs)?;
            self.sync_dir("packs")?;
            done.copied_bytes += length;
            let mut state = self.state();
            state.add_pack(id, length, entries, false);
            for (number, _) in &moved {
                state.packs.remove(number);
                // What became damaged is not there any more, rather than in a pack that is gone.
                state.index.retain(|_, place| place.pack != *number);
            }
            drop(state);
            for (_, pack) in moved {
                self.trash(pack, done)?;
            }
        }
        Ok(())
    }

    fn copy(
        &self,
        pack: &Pack,
        live: &[Entry],
        writer: &mut PackWriter,
        decoder: &mut Decompressor,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let path = pack::path(pack.id);
        let file = self.pack_file(pack.id)?;
        for entry in live {
            let packed = pack::read_record(&*file, &path, entry)?;
            self.verify(&packed, &path, decoder, bytes)?;
            writer.append(&packed)?;
        }
        Ok(())
    }

    /// Deletes what has waited long enough. A pack that turns out to be needed is brought back instead.
    fn purge(&self, grace_ms: u64, named: &HashSet<ChunkId>, done: &mut Collected) -> Result<()> {
        self.sync_dir("trash")?;
        self.sync_dir("packs")?;
        let now = self.fs.now_ms();
        for name in self.fs.list("trash").map_err(Error::io("list", "trash"))? {
            let path = format!("trash/{name}");
            let mut parts = name.splitn(3, '.');
            let since = parts.next().and_then(|ms| ms.parse::<u64>().ok());
            // A clock that was set back makes it wait longer, not shorter.
            if since.is_none_or(|since| now < since.saturating_add(grace_ms)) {
                continue;
            }
            let file = self.fs.open(&path).map_err(Error::io("open", &path))?;
            let length = file.length().unwrap_or(0);
            let id = parts.nth(1).and_then(|id| id.parse::<PackId>().ok());
            if let Some(id) = id
                && let Ok(entries) = pack::index(&*file, &path, id)
                && entries.iter().any(|entry| {
                    named.contains(&entry.id) && !self.state().index.contains_key(&entry.id)
                })
            {
                let back = pack::path(id);
                self.fs
                    .rename(&path, &back)
                    .map_err(Error::io("bring back", &path))?;
                self.state().add_pack(id, length, entries, false);
                continue;
            }
            self.fs.remove(&path).map_err(Error::io("delete", &path))?;
            done.deleted_bytes += length;
        }
        Ok(())
    }

    /// Whether a chunk is in the index at all.
    fn is_needed(&self, id: ChunkId) -> bool {
        self.state().index.contains_key(&id)
    }
}
