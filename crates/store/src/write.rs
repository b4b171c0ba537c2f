//! Writing a snapshot: threads read, name and compress regions; the caller's thread appends to packs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread;

use crate::PAGE;
use crate::codec::Packed;
use crate::cut;
use crate::envelope;
use crate::error::{Error, Result};
use crate::id::{ChunkId, PackId, SnapshotId};
use crate::manifest::{Extent, Image, Kind, Manifest, Requirements, overlay};
use crate::names::{check_labels, check_name};
use crate::pack::PackWriter;
use crate::read::Reader;
use crate::renew::{Renewed, to_renew, whole};
use crate::source::Source;
use crate::state::Summary;
use crate::store::{Inner, Store, locked, manifest_path};
use crate::work::{Cut, Work, needs};

/// What a snapshot is besides its images.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub parents: Vec<SnapshotId>,
    pub labels: BTreeMap<String, String>,
    /// Tags that name it from the moment it exists; they leave the snapshots that they named.
    pub tags: Vec<String>,
    pub pinned: bool,
    pub requirements: Requirements,
    /// Threads that compress; 0 is one for each CPU. Each takes about 4 MiB.
    pub workers: usize,
}

/// What writing a snapshot took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// Bytes of pages that are not zero, of those that were looked at.
    pub data_bytes: u64,
    /// Chunks that were there already.
    pub known_chunks: u64,
    /// Chunks that were not, and their bytes before and after compression.
    pub new_chunks: u64,
    pub new_bytes: u64,
    pub stored_bytes: u64,
    /// Of the manifest's file.
    pub manifest_bytes: u64,
}

/// A snapshot that is being written. Until [`Writer::commit`] nothing of it is in the list; dropped before,
/// its chunks are garbage.
pub struct Writer {
    inner: Arc<Inner>,
    /// In the store's table of writers.
    number: u64,
    manifest: Manifest,
    options: Options,
    /// Numbers of chunks in the manifest.
    numbers: HashMap<ChunkId, u32>,
    /// Chunks in the pack that is not sealed yet, or about to be.
    pending: Arc<Mutex<HashSet<ChunkId>>>,
    pack: Option<PackWriter>,
    stored: Stored,
    failed: bool,
}

impl Store {
    /// Begins a snapshot.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Name`] for tags or labels that cannot be.
    pub fn begin(&self, options: Options) -> Result<Writer> {
        let id = SnapshotId(self.inner.random_id()?);
        self.begin_as(id, self.inner.fs.now_ms(), options)
    }

    pub(crate) fn begin_as(
        &self,
        id: SnapshotId,
        created_ms: u64,
        options: Options,
    ) -> Result<Writer> {
        self.inner.writable()?;
        check_labels(&options.labels)?;
        for tag in &options.tags {
            check_name("tag", tag)?;
        }
        if !options.tags.is_empty() || options.pinned {
            self.inner.names_good()?;
        }
        let manifest = Manifest {
            id,
            created_ms,
            parents: options.parents.clone(),
            labels: options.labels.clone(),
            requirements: options.requirements.clone(),
            images: Vec::new(),
            chunks: Vec::new(),
        };
        manifest
            .check()
            .map_err(|what| Error::damaged(&manifest_path(id), what))?;
        Ok(Writer {
            number: self.inner.state().add_writer(),
            inner: Arc::clone(&self.inner),
            manifest,
            options,
            numbers: HashMap::new(),
            pending: Arc::default(),
            pack: None,
            stored: Stored::default(),
            failed: false,
        })
    }
}

impl Writer {
    /// The id that it will have.
    #[must_use]
    pub const fn id(&self) -> SnapshotId {
        self.manifest.id
    }

    /// What was written so far.
    #[must_use]
    pub const fn stored(&self) -> Stored {
        self.stored
    }

    /// Stores an image from all of a source.
    ///
    /// # Errors
    /// [`Error::Source`]; [`Error::OverBudget`]; what the system says. Then this writer takes nothing more.
    pub fn image(&mut self, name: &str, kind: Kind, source: &(impl Source + ?Sized)) -> Result<()> {
        let all = 0..source.length().div_ceil(PAGE);
        self.guarded(|writer| writer.add(name, kind, source, &[all], &[]))
    }

    /// Stores an image that is that of another snapshot but for some byte ranges. Only the pages of those are
    /// read from the source, whose length is the image's new one. A few of the others are stored again, from what
    /// the other snapshot has, where it needs many chunks for few pages.
    ///
    /// # Errors
    /// As [`Writer::image`]; [`Error::NoImage`]; [`Error::ChunkMissing`] if the other is not complete.
    pub fn image_changed(
        &mut self,
        name: &str,
        source: &(impl Source + ?Sized),
        base: &Reader,
        changed: &[Range<u64>],
    ) -> Result<()> {
        self.guarded(|writer| {
            let image = base.image(name)?;
            let pages = source.length().div_ceil(PAGE);
            let mut dirty: Vec<_> = changed
                .iter()
                .map(|range| range.start / PAGE..range.end.div_ceil(PAGE).min(pages))
                .collect();
            // What is beyond the base's end is new, and so is its last page if the end moved.
            if source.length() != image.length {
                let shorter = source.length().min(image.length);
                dirty.push(shorter / PAGE..pages);
            }
            let kept: Vec<Extent> = image.extents_in(0..pages).collect();
            let dirty = cut::joined(dirty);
            let kept = overlay(&kept, &dirty, &[]);
            let renewed = writer.renewed(name, source.length(), base, &kept, &dirty);
            let again: Vec<_> = renewed
                .iter()
                .map(|(range, _)| range.start / PAGE..range.end / PAGE)
                .collect();
            let kept = overlay(&kept, &again, &[]);
            let kept = writer.adopt(&kept, &base.manifest().chunks)?;
            let fresh = cut::joined(dirty.into_iter().chain(again).collect());
            let source = Renewed::new(source, renewed);
            writer.add(name, image.kind, &source, &fresh, &kept)
        })
    }

    /// What of the base is stored again: ranges in bytes, and these bytes. What cannot be read stays where it is.
    fn renewed(
        &self,
        name: &str,
        length: u64,
        base: &Reader,
        kept: &[Extent],
        dirty: &[Range<u64>],
    ) -> Vec<(Range<u64>, Vec<u8>)> {
        let slot_pages = u64::from(self.inner.settings.slot_bytes) / PAGE;
        let changed = dirty.iter().map(|range| range.end - range.start).sum();
        let ranges = to_renew(kept, slot_pages, changed);
        let base_length = base.image(name).map_or(0, |image| image.length);
        whole(ranges, length.min(base_length))
            .filter_map(|range| {
                let mut bytes = vec![0; usize::try_from(range.end - range.start).ok()?];
                base.read(name, range.start, &mut bytes).ok()?;
                Some((range, bytes))
            })
            .collect()
    }

    fn guarded(&mut self, step: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.failed {
            return Err(Error::Poisoned);
        }
        let done = step(self);
        self.failed = done.is_err();
        done
    }

    /// Extents of another manifest, with the chunks' numbers in this one.
    fn adopt(&mut self, extents: &[Extent], chunks: &[ChunkId]) -> Result<Vec<Extent>> {
        let mut adopted = Vec::with_capacity(extents.len());
        let mut last = None;
        for extent in extents {
            let number = match last {
                Some((theirs, ours)) if theirs == extent.chunk => ours,
                _ => {
                    let id = chunks.get(extent.chunk as usize).copied();
                    let id = id
                        .ok_or_else(|| Error::damaged("the base's manifest", "a chunk's number"))?;
                    if !self.inner.state().claim(self.number, id) {
                        return Err(Error::ChunkMissing(id));
                    }
                    self.chunk_number(id)
                }
            };
            last = Some((extent.chunk, number));
            adopted.push(Extent {
                chunk: number,
                ..*extent
            });
        }
        Ok(adopted)
    }

    fn chunk_number(&mut self, id: ChunkId) -> u32 {
        let next = u32::try_from(self.manifest.chunks.len()).unwrap_or(u32::MAX);
        let chunks = &mut self.manifest.chunks;
        *self.numbers.entry(id).or_insert_with(|| {
            chunks.push(id);
            next
        })
    }

    fn add(
        &mut self,
        name: &str,
        kind: Kind,
        source: &(impl Source + ?Sized),
        changed: &[Range<u64>],
        kept: &[Extent],
    ) -> Result<()> {
        check_name("image", name)?;
        if self.manifest.image(name).is_some() {
            return Err(Error::Name {
                what: "image",
                name: name.to_owned(),
                rule: "it is in this snapshot already",
            });
        }
        let (inner, pending) = (Arc::clone(&self.inner), Arc::clone(&self.pending));
        let work = Work::new(inner, self.number, pending, name, source, changed);
        let workers = work.threads(self.options.workers);
        let mut cuts = Vec::new();
        let done = thread::scope(|scope| {
            let (sender, receiver) = sync_channel(workers);
            for _ in 0..workers {
                let sender = sender.clone();
                scope.spawn(|| work.run(sender));
            }
            drop(sender);
            let mut done = Ok(());
            for cut in receiver {
                // After a failure the rest is only waited for.
                if done.is_ok() {
                    done = cut.and_then(|cut| self.take(cut)).map(|cut| cuts.push(cut));
                }
                if done.is_err() {
                    work.stop.store(true, Ordering::Relaxed);
                }
            }
            done
        });
        done?;
        // Regions were done in any order; numbers of chunks follow the image.
        cuts.sort_unstable_by_key(|(region, _)| *region);
        let mut fresh = Vec::new();
        for (id, pages) in cuts.into_iter().flat_map(|(_, pieces)| pieces) {
            let number = self.chunk_number(id);
            fresh.extend(cut::extents_of(&pages, number));
        }
        let extents = overlay(kept, &[], &fresh);
        self.manifest.images.push(Image {
            name: name.to_owned(),
            kind,
            length: source.length(),
            extents,
        });
        Ok(())
    }

    /// Appends the new chunks of a region.
    #[allow(clippy::type_complexity)]
    fn take(&mut self, cut: Cut) -> Result<(u64, Vec<(ChunkId, Vec<u64>)>)> {
        let mut pieces = Vec::with_capacity(cut.chunks.len());
        for piece in cut.chunks {
            self.stored.data_bytes += piece.pages.len() as u64 * PAGE;
            match piece.packed {
                Some(packed) => self.append(&packed)?,
                None => self.stored.known_chunks += 1,
            }
            pieces.push((piece.id, piece.pages));
        }
        Ok((cut.region, pieces))
    }

    /// Appends a chunk that is not in the store, and is claimed and pending.
    pub(crate) fn append(&mut self, packed: &Packed) -> Result<()> {
        let pack = match &mut self.pack {
            Some(pack) => pack,
            None => {
                let id = PackId(self.inner.random_id()?);
                self.pack
                    .insert(PackWriter::create(&*self.inner.fs, id, self.inner.id)?)
            }
        };
        pack.append(packed)?;
        self.stored.new_chunks += 1;
        self.stored.new_bytes += u64::from(packed.raw_len);
        self.stored.stored_bytes += packed.bytes.len() as u64;
        if pack.length() >= self.inner.settings.pack_bytes {
            self.seal()?;
        }
        Ok(())
    }

    /// Makes what was appended durable, and known to others.
    pub(crate) fn seal(&mut self) -> Result<()> {
        let Some(pack) = self.pack.take() else {
            return Ok(());
        };
        self.inner.within_budget(pack.length())?;
        let (id, entries, bytes) = pack.seal(&*self.inner.fs)?;
        let ids: Vec<ChunkId> = entries.iter().map(|entry| entry.id).collect();
        self.inner.state().add_pack(id, bytes, entries, false);
        let mut pending = locked(&self.pending);
        for id in ids {
            pending.remove(&id);
        }
        Ok(())
    }

    /// Claims a chunk: whether it has to be compressed and appended by the caller.
    pub(crate) fn needs(&self, id: ChunkId) -> bool {
        needs(&self.inner, self.number, &self.pending, id)
    }

    /// Takes a whole manifest: for an import, which has claimed its chunks one by one.
    pub(crate) fn set_manifest(&mut self, manifest: Manifest) {
        self.manifest = manifest;
    }

    /// Whether all chunks are in the store, and as long as the extents need.
    pub(crate) fn check_extents(&mut self) -> Result<()> {
        self.guarded(|writer| {
            writer.seal()?;
            let state = writer.inner.state();
            for extent in writer
                .manifest
                .images
                .iter()
                .flat_map(|image| &image.extents)
            {
                let id = writer.manifest.chunks.get(extent.chunk as usize);
                let id = *id.ok_or_else(|| Error::Stream("an extent names no chunk".into()))?;
                let place = state.index.get(&id).ok_or(Error::ChunkMissing(id))?;
                let end = u64::from(extent.chunk_page) + u64::from(extent.pages);
                if end * PAGE > u64::from(place.raw_len) {
                    return Err(Error::Stream(
                        "an extent reaches beyond the end of its chunk".into(),
                    ));
                }
            }
            Ok(())
        })
    }

    /// Makes the snapshot durable and puts it into the list. When this returns, it survives a loss of power.
    ///
    /// # Errors
    /// As [`Writer::image`]. The snapshot is then not in the list, unless the very last sync failed: then it
    /// may be, and is complete.
    pub fn commit(mut self) -> Result<(SnapshotId, Stored)> {
        if self.failed {
            return Err(Error::Poisoned);
        }
        let id = self.manifest.id;
        self.seal()?;
        // Always: a chunk may be in a pack that another writer has just sealed.
        self.inner.sync_dir("packs")?;
        let message = self.manifest.encode();
        // Nothing is stored that a reader would refuse.
        Manifest::decode(&manifest_path(id), &message)?;
        self.stored.manifest_bytes =
            envelope::seal(envelope::Kind::Manifest, &[]).len() as u64 + message.len() as u64;
        self.inner.within_budget(self.stored.manifest_bytes)?;
        let inner = Arc::clone(&self.inner);
        let _changing = locked(&inner.changing);
        if !self.options.tags.is_empty() || self.options.pinned {
            let (tags, pinned) = (std::mem::take(&mut self.options.tags), self.options.pinned);
            inner.change_names(|names, existing| {
                for tag in &tags {
                    names.set_tag(tag, id, existing);
                }
                if pinned {
                    names.mark_mut(id).pinned = true;
                }
            })?;
        }
        let path = manifest_path(id);
        envelope::write(
            &*inner.fs,
            envelope::Kind::Manifest,
            &path,
            &format!("tmp/{id}"),
            &message,
        )?;
        if let Err(error) = inner.sync_dir("manifests") {
            let _ = inner.fs.remove(&path);
            return Err(error);
        }
        inner
            .state()
            .summaries
            .insert(id, Summary::of(&self.manifest));
        Ok((id, self.stored))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(pack) = self.pack.take() {
            pack.discard(&*self.inner.fs);
        }
        self.inner.state().writers.remove(&self.number);
    }
}
