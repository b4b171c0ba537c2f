//! A base image and layers over it: what a virtual machine reads and writes.
use std::collections::BTreeSet;

use crate::bitmap::Bitmap;
use crate::error::{Error, Result};
use crate::format::{Geometry, LayerId, State};
use crate::layer::{Batch, Layer, create};
use crate::medium::Medium;
use crate::owners::{Owner, Owners};
use crate::{CLUSTER, MAX_LAYERS};

/// Bytes of zeros that are written at once where there can be no hole.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Bytes of the disk that stand one behind the other in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// 0: the base image; n: layer n, counted from the lowest.
    pub file: usize,
    /// Where in that file.
    pub offset: u64,
    pub length: u64,
}

/// The layer that is written.
#[derive(Debug)]
struct Top {
    map: Bitmap,
    /// Pages of the map that changed since the last flush.
    dirty: BTreeSet<u32>,
    /// A sync failed: the kernel has dropped what it could not write, and the next sync would succeed.
    poisoned: bool,
}

/// A flush under way. First the bytes, then [`Stack::write_flush`], then [`Stack::end_flush`], with a
/// sync of the top layer's file after each of the first two.
#[derive(Debug)]
#[must_use]
pub struct Flush(Batch);

impl Flush {
    /// Whether the map changes: if not, one sync is all.
    pub fn has_map(&self) -> bool {
        !self.0.is_empty()
    }
}

/// A disk. Offsets and lengths are bytes of the disk, inside it.
#[derive(Debug)]
pub struct Stack<M> {
    base: M,
    size: u64,
    layers: Vec<Layer<M>>,
    owners: Owners,
    /// `None`: read-only.
    top: Option<Top>,
}

impl<M: Medium> Stack<M> {
    /// Opens a disk: `base` and its name, and all layers, lowest first. If it is `writable` the last one
    /// is written; an empty file there becomes a layer.
    ///
    /// # Errors
    /// Something is no layer, damaged, of another disk, in the wrong order, or frozen when it should not be.
    pub fn open(base: (M, &str), layers: Vec<(M, String)>, writable: bool) -> Result<Self> {
        let (base, base_name) = base;
        let size = base
            .length()
            .map_err(Error::io(base_name, "find its size"))?;
        let geometry = Geometry::of(size).ok_or(Error::BadSize { size })?;
        if layers.is_empty() {
            return Err(Error::None);
        }
        if layers.len() > MAX_LAYERS {
            return Err(Error::TooMany);
        }
        let mut stack = Self {
            base,
            size,
            layers: Vec::with_capacity(MAX_LAYERS),
            owners: Owners::new(geometry.clusters),
            top: None,
        };
        let last = layers.len() - 1;
        for (index, (medium, name)) in layers.into_iter().enumerate() {
            if writable && index == last {
                let (layer, map) = stack.writable(medium, &name)?;
                stack.push(layer, &map);
                stack.top = Some(Top::new(map));
            } else {
                let (layer, map) = Layer::read(medium, &name)?;
                stack.check(&layer)?;
                if layer.state() != State::Frozen {
                    return Err(Error::NotFrozen { layer: name });
                }
                stack.push(layer, &map);
            }
        }
        Ok(stack)
    }

    fn writable(&self, medium: M, name: &str) -> Result<(Layer<M>, Bitmap)> {
        let found = medium.length().map_err(Error::io(name, "find its size"))?;
        if found == 0 {
            create(&medium, name, self.size, self.id())?;
        }
        let (layer, map) = Layer::read(medium, name)?;
        if layer.state() == State::Frozen {
            return Err(Error::Frozen {
                layer: name.to_owned(),
            });
        }
        self.check(&layer)?;
        Ok((layer, map))
    }

    /// Whether it fits on top of what is there.
    fn check(&self, layer: &Layer<M>) -> Result<()> {
        if layer.size() != self.size {
            return Err(Error::Size {
                layer: layer.name().to_owned(),
                found: layer.size(),
                wanted: self.size,
            });
        }
        let below = self.id();
        if layer.parent() != below {
            return Err(Error::Order {
                layer: layer.name().to_owned(),
                found: below,
                wanted: layer.parent(),
            });
        }
        Ok(())
    }

    fn push(&mut self, layer: Layer<M>, map: &Bitmap) {
        self.layers.push(layer);
        let owner = self.top_owner();
        for (first, count) in map.runs() {
            self.owners.set(first..first + count, owner);
        }
    }

    /// At most [`MAX_LAYERS`].
    fn top_owner(&self) -> Owner {
        self.layers.len() as Owner
    }

    /// What names the highest layer's state.
    pub fn id(&self) -> LayerId {
        self.layers.last().map_or(LayerId::BASE, Layer::id)
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn base(&self) -> &M {
        &self.base
    }

    /// Lowest first.
    pub fn layers(&self) -> &[Layer<M>] {
        &self.layers
    }

    /// The file that a [`Run`] is in.
    pub fn file(&self, run: Run) -> Option<&M> {
        match run.file.checked_sub(1) {
            None => Some(&self.base),
            Some(index) => self.layers.get(index).map(Layer::medium),
        }
    }

    /// The file that is written.
    pub fn top(&self) -> Option<&M> {
        self.layers.last().map(Layer::medium)
    }

    /// The first run of the bytes from `offset` on, of at most `length`.
    pub fn run(&self, offset: u64, length: u64) -> Run {
        let first = offset / CLUSTER;
        let end = offset.saturating_add(length);
        let (owner, count) = self.owners.run(first, end.div_ceil(CLUSTER));
        let file = usize::from(owner);
        let data_offset = file
            .checked_sub(1)
            .and_then(|index| self.layers.get(index))
            .map_or(0, Layer::data_offset);
        let run_end = ((first + count) * CLUSTER).min(end);
        Run {
            file,
            offset: data_offset + offset,
            length: run_end.saturating_sub(offset),
        }
    }

    fn owner_of(&self, cluster: u64) -> Owner {
        self.owners.get(cluster)
    }

    /// The clusters at both ends that the bytes cover in part and that the top layer does not have.
    fn halves(&self, offset: u64, length: u64) -> impl Iterator<Item = u64> + use<M> {
        let end = offset + length;
        let top = self.top_owner();
        let lacking = |at: u64| {
            let cluster = at / CLUSTER;
            let partly = length > 0 && !at.is_multiple_of(CLUSTER);
            (partly && self.owner_of(cluster) != top).then_some(cluster)
        };
        let (head, tail) = (lacking(offset), lacking(end));
        head.into_iter()
            .chain(tail.filter(|tail| head != Some(*tail)))
    }

    /// Whether [`Stack::prepare_write`] would copy: then no write may be in flight.
    pub fn has_to_copy(&self, offset: u64, length: u64) -> bool {
        self.halves(offset, length).next().is_some()
    }

    /// Gives the top layer the clusters that a write would cover only in part. The write's bytes go to
    /// the top layer's file, from the returned offset on; then call [`Stack::written`].
    ///
    /// # Errors
    /// What is below cannot be read, or the top layer not written. Nothing has changed then.
    pub fn prepare_write(&mut self, offset: u64, length: u64) -> Result<u64> {
        let data_offset = self.layers.last().map_or(0, Layer::data_offset);
        let halves: [Option<u64>; 2] = {
            let mut halves = self.halves(offset, length);
            [halves.next(), halves.next()]
        };
        for cluster in halves.into_iter().flatten() {
            self.copy_up(cluster)?;
        }
        Ok(data_offset + offset)
    }

    fn copy_up(&mut self, cluster: u64) -> Result<()> {
        let mut bytes = [0; CLUSTER as usize];
        let at = cluster * CLUSTER;
        self.read(&mut bytes, at)?;
        self.write_top(&bytes, at)?;
        self.written(at, CLUSTER);
        Ok(())
    }

    fn write_top(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let Some(layer) = self.layers.last() else {
            return Err(Error::None);
        };
        layer
            .medium()
            .write(bytes, layer.data_offset() + offset)
            .map_err(Error::io(layer.name(), "write it"))
    }

    /// These bytes are in the top layer's file now.
    pub fn written(&mut self, offset: u64, length: u64) {
        let Some(top) = &mut self.top else {
            return;
        };
        if length == 0 {
            return;
        }
        let owner = self.layers.len() as Owner;
        let (first, end) = (offset / CLUSTER, (offset + length).div_ceil(CLUSTER));
        // As a rule it has them already.
        if self.owners.run(first, end) == (owner, end - first) {
            return;
        }
        top.map.set(first, end - first, |page| {
            top.dirty.insert(page);
        });
        self.owners.set(first..end, owner);
    }

    /// Fills `bytes` from there.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            let run = self.run(at, rest.len() as u64);
            let (part, others) = rest
                .split_at_mut_checked(run.length as usize)
                .filter(|(part, _)| !part.is_empty())
                .ok_or(Error::Range {
                    offset: at,
                    end: at,
                })?;
            let name = |index: usize| self.layers.get(index).map_or("", Layer::name);
            let name = run.file.checked_sub(1).map_or("the base image", name);
            let file = self.file(run).ok_or(Error::None)?;
            file.read(part, run.offset)
                .map_err(Error::io(name, "read it"))?;
            at += run.length;
            rest = others;
        }
        Ok(())
    }

    /// Writes `bytes` there.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.prepare_write(offset, bytes.len() as u64)?;
        self.write_top(bytes, offset)?;
        self.written(offset, bytes.len() as u64);
        Ok(())
    }

    /// The bytes are not needed any more: whole clusters of them that a layer has become holes and zero.
    ///
    /// # Errors
    /// The file system fails to make a hole.
    pub fn discard(&mut self, offset: u64, length: u64) -> Result<()> {
        let mut at = offset.next_multiple_of(CLUSTER);
        let end = (offset + length) / CLUSTER * CLUSTER;
        while at < end {
            let run = self.run(at, end - at);
            // The base image keeps what it has, and another map would be all that is gained.
            if run.file != 0 && self.punch(at, run.length)? {
                self.written(at, run.length);
            }
            at += run.length;
        }
        Ok(())
    }

    /// The bytes read as zeros afterwards.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<()> {
        let end = offset + length;
        let first = offset.next_multiple_of(CLUSTER).min(end);
        let last = (end / CLUSTER * CLUSTER).max(first);
        for (from, to) in [(offset, first), (last, end)] {
            // Less than a cluster.
            let zeros = ZEROS.get(..(to - from) as usize).unwrap_or_default();
            self.write(zeros, from)?;
        }
        let mut at = first;
        while at < last {
            let run = self.run(at, last - at);
            if run.file != 0 || !self.is_base_zero(at, run.length)? {
                self.zero_clusters(at, run.length)?;
            }
            at += run.length;
        }
        Ok(())
    }

    fn is_base_zero(&self, offset: u64, length: u64) -> Result<bool> {
        let data = self
            .base
            .next_data(offset)
            .map_err(Error::io("the base image", "look for holes in it"))?;
        Ok(data.is_none_or(|data| data >= offset + length))
    }

    fn zero_clusters(&mut self, offset: u64, length: u64) -> Result<()> {
        if !self.punch(offset, length)? {
            let (mut at, end) = (offset, offset + length);
            while at < end {
                let count = (end - at).min(ZEROS.len() as u64);
                self.write_top(ZEROS.get(..count as usize).unwrap_or_default(), at)?;
                at += count;
            }
        }
        self.written(offset, length);
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> Result<bool> {
        let Some(layer) = self.layers.last() else {
            return Err(Error::None);
        };
        layer
            .medium()
            .punch(layer.data_offset() + offset, length)
            .map_err(Error::io(layer.name(), "make a hole in it"))
    }

    /// All that was written survives a power cut afterwards.
    ///
    /// # Errors
    /// The system fails to write. Later flushes fail too.
    pub fn flush(&mut self) -> Result<()> {
        let flush = self.begin_flush()?;
        match self.carry_out(&flush) {
            Ok(()) => {
                self.end_flush(&flush);
                Ok(())
            }
            Err(error) => {
                self.fail_flush(&flush);
                Err(error)
            }
        }
    }

    fn carry_out(&mut self, flush: &Flush) -> Result<()> {
        let Some(layer) = self.layers.last_mut() else {
            return Err(Error::None);
        };
        layer.sync()?;
        if flush.has_map() {
            layer.write_batch(&flush.0)?;
            layer.sync()?;
        }
        Ok(())
    }

    /// Notes what the map is now. One flush at a time.
    ///
    /// # Errors
    /// A sync failed before, or the header cannot be written.
    pub fn begin_flush(&mut self) -> Result<Flush> {
        let (Some(layer), Some(top)) = (self.layers.last_mut(), &mut self.top) else {
            return Ok(Flush(Batch::default()));
        };
        if top.poisoned {
            return Err(Error::Poisoned {
                layer: layer.name().to_owned(),
            });
        }
        match layer.batch(&top.map, &top.dirty) {
            Ok(batch) => {
                top.dirty.clear();
                Ok(Flush(batch))
            }
            Err(error) => {
                top.poisoned = true;
                Err(error)
            }
        }
    }

    /// Writes the map, after a sync.
    ///
    /// # Errors
    /// The system fails to; call [`Stack::fail_flush`].
    pub fn write_flush(&self, flush: &Flush) -> Result<()> {
        self.layers
            .last()
            .map_or(Ok(()), |layer| layer.write_batch(&flush.0))
    }

    /// The map is durable, or had not changed and a sync is done.
    pub fn end_flush(&mut self, flush: &Flush) {
        if let Some(layer) = self.layers.last_mut() {
            layer.keep_batch(&flush.0);
        }
    }

    /// A sync or [`Stack::write_flush`] failed.
    pub fn fail_flush(&mut self, flush: &Flush) {
        if let Some(top) = &mut self.top {
            top.dirty.extend(flush.0.pages());
            top.poisoned = true;
        }
    }

    /// Opens what will be the top layer after [`Stack::freeze`]: an empty file, or a layer without
    /// clusters over the present top.
    ///
    /// # Errors
    /// It is something else; there are too many layers; the disk is read-only.
    pub fn next(&self, medium: M, name: &str) -> Result<Next<M>> {
        if self.top.is_none() {
            return Err(Error::Frozen {
                layer: self.layers.last().map_or("", Layer::name).to_owned(),
            });
        }
        if self.layers.len() >= MAX_LAYERS {
            return Err(Error::TooMany);
        }
        let (layer, map) = self.writable(medium, name)?;
        if map.runs().next().is_some() {
            return Err(Error::OtherClusters {
                layer: name.to_owned(),
            });
        }
        Ok(Next { layer, map })
    }

    /// Makes all written so far durable and the top layer unchangeable; what is written from now on goes
    /// to `next`. No write may be in flight.
    ///
    /// # Errors
    /// The system fails to write; nothing has changed then.
    pub fn freeze(&mut self, next: Next<M>) -> Result<()> {
        self.check(&next.layer)?;
        self.settle(State::Frozen)?;
        // Before the next layer has anything: else a power cut could leave one over an unfrozen one.
        if let Err(error) = self.layers.last_mut().map_or(Ok(()), Layer::sync) {
            self.fail_flush(&Flush(Batch::default()));
            return Err(error);
        }
        self.push(next.layer, &next.map);
        self.top = Some(Top::new(next.map));
        Ok(())
    }

    /// Makes all written so far durable, and says in the top layer that it is whole. It can be written on.
    ///
    /// # Errors
    /// The system fails to write.
    pub fn close(&mut self) -> Result<()> {
        if self.top.is_none() {
            return Ok(());
        }
        self.settle(State::Closed)
    }

    fn settle(&mut self, state: State) -> Result<()> {
        self.flush()?;
        match self.layers.last_mut() {
            Some(layer) => layer.finish(state),
            None => Ok(()),
        }
    }

    /// Puts one layer, made by [`merge`](crate::merge), in the place of the frozen layers that went into it: from
    /// the one that lies over its parent to the one whose state it holds. Returns how many these were; if it is
    /// there already, one.
    ///
    /// # Errors
    /// It is not frozen, is over or holds a state that no frozen layer has, or has not the same clusters.
    pub fn replace_merged(&mut self, medium: M, name: &str) -> Result<usize> {
        let (merged, map) = Layer::read(medium, name)?;
        if merged.state() != State::Frozen {
            return Err(Error::NotFrozen {
                layer: name.to_owned(),
            });
        }
        let range = self
            .range_of(&merged)
            .filter(|range| merged.size() == self.size && self.same_clusters(range, &map));
        let Some(range) = range else {
            return Err(Error::OtherClusters {
                layer: name.to_owned(),
            });
        };
        let (first, count) = (range.start, range.len());
        self.layers.splice(range, [merged]);
        self.owners.rename(|owner| {
            // Owner n is layer n - 1.
            let owner = usize::from(owner);
            let new = match owner.checked_sub(first + 1) {
                None => owner,
                Some(at) if at < count => first + 1,
                Some(_) => owner - (count - 1),
            };
            new as Owner
        });
        Ok(count)
    }

    /// Which frozen layers hold, together, what this one says that it holds.
    fn range_of(&self, merged: &Layer<M>) -> Option<std::ops::Range<usize>> {
        let frozen = self.layers.len() - usize::from(self.top.is_some());
        let frozen = self.layers.get(..frozen)?;
        let first = frozen.iter().position(|l| l.parent() == merged.parent())?;
        let last = frozen.iter().position(|l| l.id() == merged.id())?;
        (first <= last).then_some(first..last + 1)
    }

    /// Whether `map` has all clusters that the layers of `range` own, and none that lower ones, or nobody, have.
    fn same_clusters(&self, range: &std::ops::Range<usize>, map: &Bitmap) -> bool {
        let mut at = 0;
        while at < self.owners.clusters() {
            let (owner, run) = self.owners.run(at, self.owners.clusters());
            let mut clusters = at..at + run;
            let owner = usize::from(owner);
            let good = if owner <= range.start {
                clusters.all(|cluster| !map.has(cluster))
            } else if owner <= range.end {
                clusters.all(|cluster| map.has(cluster))
            } else {
                true
            };
            if !good {
                return false;
            }
            at += run;
        }
        true
    }
}

impl Top {
    fn new(map: Bitmap) -> Self {
        Self {
            map,
            dirty: BTreeSet::new(),
            poisoned: false,
        }
    }
}

/// An empty layer over the present top.
#[derive(Debug)]
pub struct Next<M> {
    layer: Layer<M>,
    map: Bitmap,
}
