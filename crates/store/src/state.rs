//! What a store knows in memory: where each chunk is, who uses what, the names.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::id::{ChunkId, PackId, SnapshotId};
use crate::manifest::Manifest;
use crate::names::Names;
use crate::pack::Entry;

/// A snapshot in the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub id: SnapshotId,
    pub created_ms: u64,
    pub parents: Vec<SnapshotId>,
    pub tags: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub pinned: bool,
    /// Sum of the images' lengths.
    pub bytes: u64,
    /// How many of those are in pages that are not zero.
    pub data_bytes: u64,
}

/// Something that is not as it should be, found while the store was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub path: String,
    pub what: String,
}

/// What the list needs of a manifest.
#[derive(Clone)]
pub(crate) struct Summary {
    created_ms: u64,
    parents: Vec<SnapshotId>,
    labels: BTreeMap<String, String>,
    bytes: u64,
    data_bytes: u64,
}

impl Summary {
    pub(crate) fn of(manifest: &Manifest) -> Self {
        Self {
            created_ms: manifest.created_ms,
            parents: manifest.parents.clone(),
            labels: manifest.labels.clone(),
            bytes: manifest.images.iter().map(|image| image.length).sum(),
            data_bytes: manifest
                .images
                .iter()
                .map(|image| image.data_pages() * crate::PAGE)
                .sum(),
        }
    }
}

/// A pack in the index.
#[derive(Clone)]
pub(crate) struct Pack {
    pub(crate) id: PackId,
    /// Of the file.
    pub(crate) bytes: u64,
    pub(crate) entries: Arc<Vec<Entry>>,
    /// Its index was damaged: never deleted on our own account.
    pub(crate) salvaged: bool,
}

#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) pack: u32,
    pub(crate) offset: u32,
    pub(crate) raw_len: u32,
    pub(crate) stored_len: u32,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) index: HashMap<ChunkId, Place>,
    /// By the number in `Place`; never used twice while the store is open.
    pub(crate) packs: BTreeMap<u32, Pack>,
    next_pack: u32,
    pub(crate) names: Names,
    /// Whether `names` could be read.
    pub(crate) names_good: bool,
    pub(crate) summaries: HashMap<SnapshotId, Summary>,
    /// Chunks that unfinished snapshots use.
    pub(crate) writers: HashMap<u64, HashSet<ChunkId>>,
    next_writer: u64,
    /// While garbage is collected: chunks used since it began.
    pub(crate) claimed: Option<HashSet<ChunkId>>,
    /// How many readers there are of a snapshot.
    pub(crate) held: HashMap<SnapshotId, usize>,
    /// Snapshots about to leave the list: no reader begins.
    pub(crate) removing: HashSet<SnapshotId>,
    pub(crate) problems: Vec<Problem>,
}

impl State {
    pub(crate) fn add_pack(&mut self, id: PackId, bytes: u64, entries: Vec<Entry>, salvaged: bool) {
        let number = self.next_pack;
        self.next_pack = self.next_pack.saturating_add(1);
        for entry in &entries {
            let place = Place {
                pack: number,
                offset: entry.offset,
                raw_len: entry.raw_len,
                stored_len: entry.stored_len,
            };
            // A good pack is preferred to a damaged one.
            if salvaged {
                self.index.entry(entry.id).or_insert(place);
            } else {
                self.index.insert(entry.id, place);
            }
        }
        let entries = Arc::new(entries);
        self.packs.insert(
            number,
            Pack {
                id,
                bytes,
                entries,
                salvaged,
            },
        );
    }

    /// Marks a chunk as used by a writer; whether it is there already.
    pub(crate) fn claim(&mut self, writer: u64, chunk: ChunkId) -> bool {
        if let Some(used) = self.writers.get_mut(&writer) {
            used.insert(chunk);
        }
        if let Some(claimed) = &mut self.claimed {
            claimed.insert(chunk);
        }
        self.index.contains_key(&chunk)
    }

    pub(crate) fn add_writer(&mut self) -> u64 {
        let number = self.next_writer;
        self.next_writer = self.next_writer.saturating_add(1);
        self.writers.insert(number, HashSet::new());
        number
    }

    /// Bytes of all packs.
    pub(crate) fn pack_bytes(&self) -> u64 {
        self.packs.values().map(|pack| pack.bytes).sum()
    }
}

impl State {
    pub(crate) fn describe(
        &self,
        id: SnapshotId,
        summary: Summary,
        existing: &[SnapshotId],
    ) -> Snapshot {
        let mark = self.names.mark(id);
        Snapshot {
            id,
            created_ms: summary.created_ms,
            parents: summary.parents,
            tags: self.names.tags_of(id, existing),
            labels: mark
                .and_then(|mark| mark.labels.clone())
                .unwrap_or(summary.labels),
            pinned: mark.is_some_and(|mark| mark.pinned),
            bytes: summary.bytes,
            data_bytes: summary.data_bytes,
        }
    }

    pub(crate) fn problem(&mut self, path: &str, what: &dyn std::fmt::Display) {
        let problem = Problem {
            path: path.to_owned(),
            what: what.to_string(),
        };
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }
}
