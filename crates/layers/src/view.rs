//! What frozen layers hold, for those who store, flatten or merge it.
use std::ops::Range;

use crate::error::{Error, Result};
use crate::format::{LayerId, State};
use crate::layer::Layer;
use crate::medium::Medium;
use crate::owners::{Owner, Owners};
use crate::{CLUSTER, MAX_LAYERS};

/// What an extent has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It is zero, whatever the base image has there.
    Zero,
    Data,
}

/// Bytes of the disk that layers have, one behind the other. Whole clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub length: u64,
    pub content: Content,
}

/// Layers that do not change, one over the other, on a base image or without.
#[derive(Debug)]
pub struct View<M> {
    base: Option<M>,
    layers: Vec<Layer<M>>,
    owners: Owners,
    size: u64,
}

impl<M: Medium> View<M> {
    /// Opens layers with their names, lowest first; they need not begin with the lowest of the disk.
    /// Frozen layers, and the top one of a disk that nobody has open.
    ///
    /// # Errors
    /// Something is no layer, damaged, of another disk, in the wrong order, or being written.
    pub fn open(layers: Vec<(M, String)>) -> Result<Self> {
        if layers.len() > MAX_LAYERS {
            return Err(Error::TooMany);
        }
        let mut view: Option<Self> = None;
        for (medium, name) in layers {
            let (layer, map) = Layer::read(medium, &name)?;
            if layer.state() == State::Open {
                return Err(Error::NotFrozen { layer: name });
            }
            let view = view.get_or_insert_with(|| Self {
                base: None,
                layers: Vec::new(),
                owners: Owners::new(layer.size() / CLUSTER),
                size: layer.size(),
            });
            view.check(&layer)?;
            view.layers.push(layer);
            let owner = view.layers.len() as Owner;
            for (first, count) in map.runs() {
                view.owners.set(first..first + count, owner);
            }
        }
        view.ok_or(Error::None)
    }

    /// The same over the image that the lowest layer was made for.
    ///
    /// # Errors
    /// It has another size.
    pub fn over(mut self, base: M, name: &str) -> Result<Self> {
        let found = base.length().map_err(Error::io(name, "find its size"))?;
        if found != self.size {
            return Err(Error::Size {
                layer: name.to_owned(),
                found,
                wanted: self.size,
            });
        }
        self.base = Some(base);
        Ok(self)
    }

    fn check(&self, layer: &Layer<M>) -> Result<()> {
        if layer.size() != self.size {
            return Err(Error::Size {
                layer: layer.name().to_owned(),
                found: layer.size(),
                wanted: self.size,
            });
        }
        match self.layers.last() {
            Some(below) if below.id() != layer.parent() => Err(Error::Order {
                layer: layer.name().to_owned(),
                found: below.id(),
                wanted: layer.parent(),
            }),
            _ => Ok(()),
        }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What names the state that the layers together hold.
    pub fn id(&self) -> LayerId {
        self.layers.last().map_or(LayerId::BASE, Layer::id)
    }

    /// What the lowest of the layers lies over.
    pub fn parent(&self) -> LayerId {
        self.layers.first().map_or(LayerId::BASE, Layer::parent)
    }

    /// Lowest first.
    pub fn layers(&self) -> &[Layer<M>] {
        &self.layers
    }

    /// What the layers have, in order, without gaps inside an extent. Neighbours may be of one kind.
    pub fn extents(&self) -> Extents<'_, M> {
        self.extents_since(0)
    }

    /// What the layers from number `first` on have, 0 being the lowest: what changed since the layer
    /// below `first` was frozen.
    pub fn extents_since(&self, first: usize) -> Extents<'_, M> {
        Extents {
            view: self,
            above: first.min(MAX_LAYERS) as Owner,
            at: 0,
        }
    }

    /// Fills `bytes` from there: from the layers, else from the base image, else with zeros.
    ///
    /// # Errors
    /// A file cannot be read, or the bytes are not inside the disk.
    pub fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(bytes.len() as u64);
        if end > self.size {
            return Err(Error::Range { offset, end });
        }
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            let (owner, run) = self.run(at, end);
            let count = (run.end - at) as usize;
            let Some((part, others)) = rest.split_at_mut_checked(count) else {
                return Err(Error::Range { offset, end });
            };
            self.read_part(owner, part, at)?;
            rest = others;
            at = run.end;
        }
        Ok(())
    }

    fn read_part(&self, owner: Owner, part: &mut [u8], at: u64) -> Result<()> {
        match (self.owned_by(owner), &self.base) {
            (Some(layer), _) => layer
                .medium()
                .read(part, layer.data_offset() + at)
                .map_err(Error::io(layer.name(), "read it")),
            (None, Some(base)) => base
                .read(part, at)
                .map_err(Error::io("the base image", "read it")),
            (None, None) => {
                part.fill(0);
                Ok(())
            }
        }
    }

    /// The next bytes of the disk from there on that are not known to be zero.
    ///
    /// # Errors
    /// A file cannot be searched.
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let mut at = from;
        while at < self.size {
            let (owner, run) = self.run(at, self.size);
            let (first, offset, name) = match (self.owned_by(owner), &self.base) {
                (Some(layer), _) => (layer.medium(), layer.data_offset(), layer.name()),
                (None, Some(base)) => (base, 0, "the base image"),
                (None, None) => {
                    at = run.end;
                    continue;
                }
            };
            if let Some(data) = data_in(first, name, offset, at..run.end)? {
                return Ok(Some(data));
            }
            at = run.end;
        }
        Ok(None)
    }

    fn owned_by(&self, owner: Owner) -> Option<&Layer<M>> {
        self.layers.get(usize::from(owner).checked_sub(1)?)
    }

    /// From `at` on, the bytes with one owner.
    fn run(&self, at: u64, end: u64) -> (Owner, Range<u64>) {
        let first = at / CLUSTER;
        let (owner, count) = self.owners.run(first, end.div_ceil(CLUSTER));
        (owner, at..((first + count) * CLUSTER).min(end))
    }
}

/// The first data of a file, `offset` bytes further there, in `range`.
fn data_in<M: Medium>(
    medium: &M,
    name: &str,
    offset: u64,
    range: Range<u64>,
) -> Result<Option<Range<u64>>> {
    let failed = || Error::io(name, "look for holes in it");
    let data = medium.next_data(offset + range.start).map_err(failed())?;
    let start = match data {
        Some(start) if start < offset + range.end => start,
        _ => return Ok(None),
    };
    let end = medium.next_hole(start).map_err(failed())?;
    let end = end.max(start + 1).min(offset + range.end);
    Ok(Some((start - offset).max(range.start)..end - offset))
}

/// See [`View::extents`].
#[derive(Debug)]
pub struct Extents<'a, M> {
    view: &'a View<M>,
    above: Owner,
    at: u64,
}

impl<M: Medium> Extents<'_, M> {
    fn advance(&mut self) -> Result<Option<Extent>> {
        let size = self.view.size;
        while self.at < size {
            let (owner, run) = self.view.run(self.at, size);
            let Some(layer) = self.view.owned_by(owner).filter(|_| owner > self.above) else {
                self.at = run.end;
                continue;
            };
            let offset = layer.data_offset();
            let data = data_in(layer.medium(), layer.name(), offset, run.clone())?;
            let (content, end) = match data {
                None => (Content::Zero, run.end),
                Some(data) => {
                    // File systems may have smaller or larger blocks than a cluster.
                    let start = data.start / CLUSTER * CLUSTER;
                    if start > run.start {
                        (Content::Zero, start)
                    } else {
                        let end = data.end.next_multiple_of(CLUSTER);
                        (Content::Data, end.min(run.end))
                    }
                }
            };
            self.at = end;
            return Ok(Some(Extent {
                offset: run.start,
                length: end - run.start,
                content,
            }));
        }
        Ok(None)
    }
}

impl<M: Medium> Iterator for Extents<'_, M> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let extent = self.advance();
        if extent.is_err() {
            self.at = self.view.size;
        }
        extent.transpose()
    }
}
