//! How much is used, by whom, and making room.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};
use crate::id::{ChunkId, SnapshotId};
use crate::pack::Entry;
use crate::state::{Place, Snapshot};
use crate::store::{Inner, Store};

/// What a store has on disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    pub packs: u64,
    pub pack_bytes: u64,
    /// Of these: in chunks that snapshots name.
    pub live_bytes: u64,
    pub manifest_bytes: u64,
    /// Waiting to be deleted.
    pub trash_bytes: u64,
    /// 0 is no limit.
    pub budget: u64,
    pub snapshots: Vec<SnapshotUsage>,
}

impl Usage {
    /// All that counts against the budget.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.pack_bytes + self.manifest_bytes + self.trash_bytes
    }
}

/// What a snapshot takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotUsage {
    pub snapshot: Snapshot,
    /// On disk, shared chunks included.
    pub stored_bytes: u64,
    /// In chunks that no other snapshot names: what its removal frees.
    pub unique_bytes: u64,
}

/// What was, or would be, evicted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Eviction {
    pub removed: Vec<SnapshotId>,
    /// Bytes on disk once garbage is collected and the waiting area is empty.
    pub bytes_then: u64,
    pub budget: u64,
    /// What may not be removed, and why.
    pub kept: Vec<(SnapshotId, String)>,
}

impl Eviction {
    /// Whether that is within the budget.
    #[must_use]
    pub const fn suffices(&self) -> bool {
        self.budget == 0 || self.bytes_then <= self.budget
    }
}

/// How often each chunk is named, and by whom.
struct Census {
    uses: HashMap<ChunkId, u32>,
    snapshots: Vec<(Snapshot, HashSet<ChunkId>)>,
}

impl Store {
    /// What is used, and by which snapshot.
    ///
    /// # Errors
    /// If the folders cannot be read.
    pub fn usage(&self) -> Result<Usage> {
        let census = self.census()?;
        let (manifest_bytes, trash_bytes) = self.inner.other_bytes()?;
        let state = self.inner.state();
        let size = |id: &ChunkId| state.index.get(id).map_or(0, on_disk);
        let snapshots = census.snapshots.iter().map(|(snapshot, chunks)| {
            let unique = chunks.iter().filter(|id| census.uses.get(id) == Some(&1));
            SnapshotUsage {
                snapshot: snapshot.clone(),
                stored_bytes: chunks.iter().map(size).sum(),
                unique_bytes: unique.map(size).sum(),
            }
        });
        Ok(Usage {
            packs: state.packs.len() as u64,
            pack_bytes: state.pack_bytes(),
            live_bytes: census.uses.keys().map(size).sum(),
            manifest_bytes,
            trash_bytes,
            budget: state.names.budget,
            snapshots: snapshots.collect(),
        })
    }

    /// Removes the oldest snapshots until the rest is within the budget, or nothing more may be removed: never
    /// what is tagged, pinned, being read, or in `live`. Room on disk comes from [`Store::gc`].
    ///
    /// # Errors
    /// What the system says.
    pub fn evict(&self, live: &HashSet<SnapshotId>, dry_run: bool) -> Result<Eviction> {
        self.inner.writable()?;
        let mut census = self.census()?;
        let (manifest_bytes, _) = self.inner.other_bytes()?;
        let existing = self.inner.snapshot_ids()?;
        let mut done = {
            let state = self.inner.state();
            let live = census
                .uses
                .keys()
                .map(|id| state.index.get(id).map_or(0, on_disk));
            Eviction {
                bytes_then: live.sum::<u64>() + manifest_bytes,
                budget: state.names.budget,
                ..Eviction::default()
            }
        };
        for (snapshot, chunks) in &census.snapshots {
            if done.suffices() {
                break;
            }
            let removed = if dry_run {
                self.inner
                    .state()
                    .why_kept(snapshot.id, live, &existing)
                    .map_or(Ok(()), |why| {
                        Err(Error::Kept {
                            id: snapshot.id,
                            why,
                        })
                    })
            } else {
                self.remove(snapshot.id, live)
            };
            match removed {
                Ok(()) => {}
                Err(Error::Kept { id, why }) => {
                    done.kept.push((id, why));
                    continue;
                }
                Err(error) => return Err(error),
            }
            done.removed.push(snapshot.id);
            let state = self.inner.state();
            for id in chunks {
                let Some(uses) = census.uses.get_mut(id) else {
                    continue;
                };
                *uses -= 1;
                if *uses == 0 {
                    let freed = state.index.get(id).map_or(0, on_disk);
                    done.bytes_then = done.bytes_then.saturating_sub(freed);
                }
            }
        }
        Ok(done)
    }

    fn census(&self) -> Result<Census> {
        let mut census = Census {
            uses: HashMap::new(),
            snapshots: Vec::new(),
        };
        for snapshot in self.list()? {
            let manifest = match self.inner.manifest(snapshot.id) {
                Err(Error::NoSnapshot(_)) => continue,
                other => other?,
            };
            let chunks: HashSet<ChunkId> = manifest.chunks.into_iter().collect();
            for id in &chunks {
                *census.uses.entry(*id).or_insert(0) += 1;
            }
            census.snapshots.push((snapshot, chunks));
        }
        Ok(census)
    }
}

fn on_disk(place: &Place) -> u64 {
    let entry = Entry {
        id: ChunkId([0; 32]),
        offset: place.offset,
        raw_len: place.raw_len,
        stored_len: place.stored_len,
    };
    entry.bytes_on_disk()
}

impl Inner {
    /// Bytes of manifests and of the waiting area.
    fn other_bytes(&self) -> Result<(u64, u64)> {
        let sum = |folder: &str| -> Result<u64> {
            let names = self.fs.list(folder).map_err(Error::io("list", folder))?;
            let length = |name: &String| {
                self.fs
                    .open(&format!("{folder}/{name}"))
                    .and_then(|file| file.length())
            };
            // What is gone since it was listed takes nothing.
            Ok(names.iter().map(|name| length(name).unwrap_or(0)).sum())
        };
        Ok((sum("manifests")?, sum("trash")?))
    }

    /// Whether so many bytes more are within the budget.
    pub(crate) fn within_budget(&self, wanted: u64) -> Result<()> {
        let (budget, packs) = {
            let state = self.state();
            (state.names.budget, state.pack_bytes())
        };
        if budget == 0 {
            return Ok(());
        }
        let (manifests, trash) = self.other_bytes()?;
        let used = packs + manifests + trash;
        if used.saturating_add(wanted) > budget {
            return Err(Error::OverBudget {
                budget,
                used,
                wanted,
            });
        }
        Ok(())
    }
}
