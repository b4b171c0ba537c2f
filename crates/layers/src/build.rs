//! Frozen layers that no guest wrote: from extents, or from several layers.
use std::collections::BTreeSet;

use crate::bitmap::Bitmap;
use crate::error::{Error, Result};
use crate::format::{LayerId, State};
use crate::layer::{Layer, create_as};
use crate::medium::Medium;
use crate::view::{Content, View};
use crate::{CLUSTER, MAX_LAYERS};

/// Bytes that are copied at once.
const COPY: u64 = 1 << 20;

/// Writes a layer. Nothing is a layer before [`Builder::finish`]: what was cut short has no clusters.
#[derive(Debug)]
pub struct Builder<M> {
    layer: Layer<M>,
    map: Bitmap,
    pages: BTreeSet<u32>,
}

impl<M: Medium> Builder<M> {
    /// In an empty `medium`: a layer that holds state `id` of a disk of `size` bytes, over `parent`.
    ///
    /// # Errors
    /// The file is not empty, `size` is no disk's, or the system refuses.
    pub fn new(medium: M, name: &str, size: u64, id: LayerId, parent: LayerId) -> Result<Self> {
        create_as(&medium, name, size, id, parent)?;
        let (layer, map) = Layer::read(medium, name)?;
        Ok(Self {
            layer,
            map,
            pages: BTreeSet::new(),
        })
    }

    fn check(&self, offset: u64, length: u64) -> Result<()> {
        let end = offset.saturating_add(length);
        let whole = offset.is_multiple_of(CLUSTER) && length.is_multiple_of(CLUSTER);
        if whole && end <= self.layer.size() {
            return Ok(());
        }
        Err(Error::Range { offset, end })
    }

    fn mark(&mut self, offset: u64, length: u64) {
        let pages = &mut self.pages;
        self.map.set(offset / CLUSTER, length / CLUSTER, |page| {
            pages.insert(page);
        });
    }

    /// The layer has these bytes there. Whole clusters; those that are zero become holes.
    ///
    /// # Errors
    /// They are not whole clusters inside the disk, or cannot be written.
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.check(offset, bytes.len() as u64)?;
        self.mark(offset, bytes.len() as u64);
        let mut at = offset;
        let is_zero = |cluster: &&[u8]| cluster.iter().all(|byte| *byte == 0);
        let clusters: Vec<&[u8]> = bytes.chunks(CLUSTER as usize).collect();
        for run in clusters.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let count = run.len() as u64 * CLUSTER;
            if run.first().is_some_and(|cluster| !is_zero(cluster)) {
                let from = (at - offset) as usize;
                let part = bytes.get(from..from + count as usize).unwrap_or_default();
                self.layer
                    .medium()
                    .write(part, self.layer.data_offset() + at)
                    .map_err(Error::io(self.layer.name(), "write it"))?;
            }
            at += count;
        }
        Ok(())
    }

    /// The layer has zeros there, where nothing was written before.
    ///
    /// # Errors
    /// They are not whole clusters inside the disk.
    pub fn zero(&mut self, offset: u64, length: u64) -> Result<()> {
        self.check(offset, length)?;
        self.mark(offset, length);
        Ok(())
    }

    /// Makes it durable, then a frozen layer, then that durable.
    ///
    /// # Errors
    /// The system fails to write.
    pub fn finish(mut self) -> Result<Layer<M>> {
        let batch = self.layer.batch(&self.map, &self.pages)?;
        self.layer.sync()?;
        self.layer.write_batch(&batch)?;
        self.layer.sync()?;
        self.layer.keep_batch(&batch);
        self.layer.finish(State::Frozen)?;
        self.layer.sync()?;
        Ok(self.layer)
    }
}

/// Writes one frozen layer that can take the place of all of `view`'s: same state, same parent, same
/// clusters. `pause` is called after each MiB with the bytes done so far; its error ends the merge, and
/// so it can wait, tell or cancel.
///
/// # Errors
/// A file cannot be read or written, or `pause` said so.
pub fn merge<M: Medium, N: Medium>(
    view: &View<M>,
    into: N,
    name: &str,
    pause: &mut dyn FnMut(u64) -> std::io::Result<()>,
) -> Result<Layer<N>> {
    debug_assert!(view.layers().len() <= MAX_LAYERS);
    let mut builder = Builder::new(into, name, view.size(), view.id(), view.parent())?;
    let mut buffer = vec![0; COPY as usize];
    let mut done = 0;
    for extent in view.extents() {
        let extent = extent?;
        if extent.content == Content::Zero {
            builder.zero(extent.offset, extent.length)?;
            continue;
        }
        let (mut at, end) = (extent.offset, extent.offset + extent.length);
        while at < end {
            let count = (end - at).min(COPY);
            let part = buffer.get_mut(..count as usize).unwrap_or_default();
            view.read(part, at)?;
            builder.write(part, at)?;
            at += count;
            done += count;
            pause(done).map_err(Error::io(name, "merge layers into it"))?;
        }
    }
    builder.finish()
}
