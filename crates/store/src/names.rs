//! Tags, pins, labels and the budget: what may change about snapshots, in one small file with a copy.

use std::collections::{BTreeMap, HashMap};

use prost::Message;

use crate::envelope::{self, Kind};
use crate::error::{Error, Result};
use crate::fs::Fs;
use crate::id::SnapshotId;
use crate::manifest::{is_name, labels_fit};
use crate::proto;
use crate::state::State;
use crate::store::{Inner, Store, locked};

#[derive(Debug, Clone, Default)]
pub(crate) struct Mark {
    pub(crate) pinned: bool,
    pub(crate) labels: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    /// A tag names the first of its snapshots that exists: so one can be moved to a snapshot that is about
    /// to be, and a crash before that leaves it where it was.
    tags: BTreeMap<String, Vec<SnapshotId>>,
    marks: HashMap<SnapshotId, Mark>,
    /// Bytes on disk; 0 is no limit.
    pub(crate) budget: u64,
}

impl Names {
    /// The snapshot with that tag, of those that exist (sorted).
    pub(crate) fn tagged(&self, name: &str, existing: &[SnapshotId]) -> Option<SnapshotId> {
        let ids = self.tags.get(name)?;
        ids.iter()
            .find(|id| existing.binary_search(id).is_ok())
            .copied()
    }

    /// The tags of a snapshot; `existing` is sorted.
    pub(crate) fn tags_of(&self, id: SnapshotId, existing: &[SnapshotId]) -> Vec<String> {
        let tags = self
            .tags
            .keys()
            .filter(|name| self.tagged(name, existing) == Some(id));
        tags.cloned().collect()
    }

    pub(crate) fn mark(&self, id: SnapshotId) -> Option<&Mark> {
        self.marks.get(&id)
    }

    /// The tag names that snapshot, once it exists.
    pub(crate) fn set_tag(&mut self, name: &str, id: SnapshotId, existing: &[SnapshotId]) {
        let before = self.tagged(name, existing).filter(|before| *before != id);
        let ids = [Some(id), before].into_iter().flatten().collect();
        self.tags.insert(name.to_owned(), ids);
    }

    pub(crate) fn mark_mut(&mut self, id: SnapshotId) -> &mut Mark {
        self.marks.entry(id).or_default()
    }

    /// Forgets snapshots that are gone.
    fn prune(&mut self, existing: &[SnapshotId]) {
        for ids in self.tags.values_mut() {
            ids.retain(|id| existing.binary_search(id).is_ok());
        }
        self.tags.retain(|_, ids| !ids.is_empty());
        self.marks
            .retain(|id, _| existing.binary_search(id).is_ok());
    }

    fn encode(&self) -> Vec<u8> {
        let tags = self.tags.iter().map(|(name, ids)| proto::Tag {
            name: name.clone(),
            snapshots: ids.iter().map(|id| id.0.to_vec()).collect(),
        });
        let marks = self.marks.iter().map(|(id, mark)| proto::Mark {
            snapshot: id.0.to_vec(),
            pinned: mark.pinned,
            labels: mark.labels.clone().map(|of| proto::Labels { of }),
        });
        proto::Names {
            tags: tags.collect(),
            marks: marks.collect(),
            budget: self.budget,
        }
        .encode_to_vec()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let message = proto::Names::decode(bytes).map_err(|error| error.to_string())?;
        let mut names = Self {
            budget: message.budget,
            ..Self::default()
        };
        for tag in message.tags {
            let ids = tag.snapshots.iter().map(|id| SnapshotId::from_slice(id));
            let ids: Option<Vec<_>> = ids.collect();
            if !is_name(&tag.name) {
                return Err(format!("{:?} is no tag", tag.name));
            }
            names
                .tags
                .insert(tag.name, ids.ok_or("a tag's snapshot has no good id")?);
        }
        for mark in message.marks {
            let id =
                SnapshotId::from_slice(&mark.snapshot).ok_or("a mark's snapshot has no good id")?;
            let labels = mark.labels.map(|labels| labels.of);
            if !labels.as_ref().is_none_or(labels_fit) {
                return Err("labels are too long".into());
            }
            names.marks.insert(
                id,
                Mark {
                    pinned: mark.pinned,
                    labels,
                },
            );
        }
        Ok(names)
    }
}

/// Reads `names`, or its copy. If neither is good, what needs them is refused, and the rest goes on.
pub(crate) fn load(fs: &dyn Fs, state: &mut State) {
    let read = |path| -> Result<Option<Names>> {
        match envelope::read(fs, Kind::Names, path) {
            Ok(bytes) => Names::decode(&bytes)
                .map(Some)
                .map_err(|what| Error::damaged(path, what)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    };
    let found = match read("names") {
        Ok(found) => Some(found.unwrap_or_default()),
        Err(error) => {
            state.problem("names", &error);
            read("names.copy").ok().flatten()
        }
    };
    state.names_good = found.is_some();
    state.names = found.unwrap_or_default();
}

impl Inner {
    /// Changes the names, durably. `changing` is held.
    pub(crate) fn change_names(
        &self,
        change: impl FnOnce(&mut Names, &[SnapshotId]),
    ) -> Result<()> {
        self.names_good()?;
        let existing = self.snapshot_ids()?;
        let mut names = self.state().names.clone();
        names.prune(&existing);
        change(&mut names, &existing);
        let bytes = names.encode();
        envelope::write(&*self.fs, Kind::Names, "names", "tmp/names", &bytes)?;
        self.state().names = names;
        self.sync_dir(".")?;
        // For when the first is damaged years later; so a failure only leaves an older one.
        let _ = envelope::write(
            &*self.fs,
            Kind::Names,
            "names.copy",
            "tmp/names.copy",
            &bytes,
        );
        Ok(())
    }

    /// Whether it is known what is named: without that nothing may be removed.
    pub(crate) fn names_good(&self) -> Result<()> {
        if self.state().names_good {
            return Ok(());
        }
        Err(Error::damaged(
            "names",
            "and so is its copy: tags and pins are lost; remove both files to begin new ones",
        ))
    }

    fn exists(&self, id: SnapshotId) -> Result<()> {
        if self.snapshot_ids()?.binary_search(&id).is_err() {
            return Err(Error::NoSnapshot(id.to_string()));
        }
        Ok(())
    }
}

pub(crate) fn check_name(what: &'static str, name: &str) -> Result<()> {
    if is_name(name) {
        return Ok(());
    }
    Err(Error::Name {
        what,
        name: name.to_owned(),
        rule: "1 to 128 letters, digits, '.', '_', '-' or ':'",
    })
}

pub(crate) fn check_labels(labels: &BTreeMap<String, String>) -> Result<()> {
    if labels_fit(labels) {
        return Ok(());
    }
    Err(Error::Name {
        what: "labels",
        name: labels.keys().cloned().collect::<Vec<_>>().join(", "),
        rule: "at most 256, named by 1 to 128 letters, digits, '.', '_', '-' or ':', each at most 4096 bytes",
    })
}

impl Store {
    /// Lets a tag name that snapshot, and no other.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::NoSnapshot`], what the system says; then it may be in either place.
    pub fn tag(&self, name: &str, id: SnapshotId) -> Result<()> {
        check_name("tag", name)?;
        self.change(id, |names, existing| names.set_tag(name, id, existing))
    }

    /// Takes a tag away; it need not be there.
    ///
    /// # Errors
    /// What the system says.
    pub fn untag(&self, name: &str) -> Result<()> {
        self.inner.writable()?;
        let _changing = locked(&self.inner.changing);
        self.inner.change_names(|names, _| {
            names.tags.remove(name);
        })
    }

    /// A pinned snapshot is never evicted or removed.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`], what the system says.
    pub fn pin(&self, id: SnapshotId, pinned: bool) -> Result<()> {
        self.change(id, |names, _| names.mark_mut(id).pinned = pinned)
    }

    /// Gives a snapshot other labels.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::NoSnapshot`], what the system says.
    pub fn label(&self, id: SnapshotId, labels: BTreeMap<String, String>) -> Result<()> {
        check_labels(&labels)?;
        self.change(id, |names, _| names.mark_mut(id).labels = Some(labels))
    }

    /// Sets how many bytes the store may have on disk; 0 is no limit.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_budget(&self, bytes: u64) -> Result<()> {
        self.inner.writable()?;
        let _changing = locked(&self.inner.changing);
        self.inner.change_names(|names, _| names.budget = bytes)
    }

    fn change(&self, id: SnapshotId, change: impl FnOnce(&mut Names, &[SnapshotId])) -> Result<()> {
        self.inner.writable()?;
        let _changing = locked(&self.inner.changing);
        self.inner.exists(id)?;
        self.inner.change_names(change)
    }
}
