//! One layer: made, opened, flushed, frozen.
use std::collections::BTreeSet;

use crate::bitmap::Bitmap;
use crate::error::{Error, Result};
use crate::format::{
    BLOCK, Damage, EMPTY, Geometry, Header, LayerId, MAP_OFFSET, Page, Slot, State,
};
use crate::medium::Medium;

/// Bytes of the map that are read at once.
const READ: usize = 64 * 2 * BLOCK;

/// Where a page of the map stands.
#[derive(Clone, Copy, Debug)]
struct Place {
    slot: Slot,
    sum: u32,
}

/// A layer and its file.
#[derive(Debug)]
pub struct Layer<M> {
    medium: M,
    name: String,
    geometry: Geometry,
    header: Header,
    header_slot: Slot,
    /// Whether the header is known to survive a power cut. Before that its other copy must not be touched.
    header_durable: bool,
    /// By page of the map; `None`: never written.
    pages: Vec<Option<Place>>,
}

/// What a flush has to write, as it was when the flush began.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    blocks: Vec<(u32, Slot, Box<[u8; BLOCK]>, u32)>,
}

/// Makes an empty `medium` an empty layer over `parent`, durably. `name` is for errors.
///
/// # Errors
/// The file is not empty, `size` is no disk's, or the system refuses.
pub fn create<M: Medium>(medium: &M, name: &str, size: u64, parent: LayerId) -> Result<LayerId> {
    let id = LayerId::random().map_err(Error::io(name, "get random bytes"))?;
    create_as(medium, name, size, id, parent)?;
    medium.sync().map_err(Error::io(name, "sync it"))?;
    Ok(id)
}

/// The same with an id that is known, and not yet durable.
pub(crate) fn create_as<M: Medium>(
    medium: &M,
    name: &str,
    size: u64,
    id: LayerId,
    parent: LayerId,
) -> Result<()> {
    let geometry = Geometry::of(size).ok_or(Error::BadSize { size })?;
    let found = medium.length().map_err(Error::io(name, "find its size"))?;
    if found != 0 {
        return Err(Error::Length {
            layer: name.to_owned(),
            found,
            wanted: 0,
        });
    }
    let header = Header {
        state: State::Closed,
        sequence: 1,
        id,
        parent,
        size,
        map_sum: crate::format::map_sum((0..geometry.pages).map(|_| 0)),
    };
    medium
        .extend(geometry.file_size())
        .and_then(|()| medium.write(&header.encode()[..], 0))
        .map_err(Error::io(name, "make it a layer"))
}

/// What a layer's header says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// What names the state of the disk that it holds.
    pub id: LayerId,
    /// The layer below it.
    pub parent: LayerId,
    /// Bytes of the disk.
    pub size: u64,
    pub state: State,
}

/// Reads the header alone: of a layer that somebody writes, too.
///
/// # Errors
/// It is no layer, its header is damaged, or it cannot be read.
pub fn head<M: Medium>(medium: &M, name: &str) -> Result<Head> {
    let length = medium.length().map_err(Error::io(name, "find its size"))?;
    let (header, _) = newest_header(medium, name, length)?;
    Ok(Head {
        id: header.id,
        parent: header.parent,
        size: header.size,
        state: header.state,
    })
}

fn newest_header<M: Medium>(medium: &M, name: &str, length: u64) -> Result<(Header, Slot)> {
    let mut headers = [EMPTY; 2];
    if length < MAP_OFFSET {
        return Err(Error::damaged(name)(Damage::Magic));
    }
    for (slot, block) in (0u64..).zip(&mut headers) {
        medium
            .read(block, slot * BLOCK as u64)
            .map_err(Error::io(name, "read its header"))?;
    }
    let [first, second] = &headers;
    Header::newest([first, second]).map_err(Error::damaged(name))
}

impl<M: Medium> Layer<M> {
    /// Reads header and map of `medium`. Nothing of them is believed that cannot be.
    ///
    /// # Errors
    /// It is no layer, is damaged, or cannot be read.
    pub fn open(medium: M, name: &str) -> Result<Self> {
        Self::read(medium, name).map(|(layer, _)| layer)
    }

    pub(crate) fn read(medium: M, name: &str) -> Result<(Self, Bitmap)> {
        let length = medium.length().map_err(Error::io(name, "find its size"))?;
        let (header, header_slot) = newest_header(&medium, name, length)?;
        let geometry = Geometry::of(header.size).ok_or(Error::BadSize { size: header.size })?;
        if length != geometry.file_size() {
            return Err(Error::Length {
                layer: name.to_owned(),
                found: length,
                wanted: geometry.file_size(),
            });
        }
        let mut layer = Self {
            medium,
            name: name.to_owned(),
            geometry,
            header,
            header_slot,
            header_durable: false,
            pages: vec![None; geometry.pages as usize],
        };
        let bitmap = layer.read_map()?;
        if header.state != State::Open && layer.map_sum() != header.map_sum {
            return Err(Error::damaged(name)(Damage::Map));
        }
        Ok((layer, bitmap))
    }

    fn read_map(&mut self) -> Result<Bitmap> {
        let mut bitmap = Bitmap::new(self.geometry.pages);
        let pair = 2 * BLOCK as u64;
        let end = MAP_OFFSET + u64::from(self.geometry.pages) * pair;
        let mut at = MAP_OFFSET;
        let mut bytes = Vec::new();
        while let Some(data) = self
            .medium
            .next_data(at)
            .map_err(Error::io(&self.name, "find its map"))?
            && data < end
        {
            // Whole pairs of slots from the one on that has data.
            at = MAP_OFFSET + data.saturating_sub(MAP_OFFSET) / pair * pair;
            let length = (end - at).min(READ as u64);
            bytes.resize(length as usize, 0);
            self.medium
                .read(&mut bytes, at)
                .map_err(Error::io(&self.name, "read its map"))?;
            let first = ((at - MAP_OFFSET) / pair) as u32;
            let (blocks, _) = bytes.as_chunks::<BLOCK>();
            for (slots, index) in blocks.as_chunks::<2>().0.iter().zip(first..) {
                self.read_page(slots, index, &mut bitmap)?;
            }
            at += length;
        }
        Ok(bitmap)
    }

    fn read_page(&mut self, slots: &[[u8; BLOCK]; 2], index: u32, map: &mut Bitmap) -> Result<()> {
        let [first, second] = slots;
        if *first == EMPTY && *second == EMPTY {
            return Ok(());
        }
        let found = Page::newest([first, second], &self.header, index)
            .map_err(Error::damaged(&self.name))?;
        if let Some((page, slot)) = found {
            self.header.sequence = self.header.sequence.max(page.sequence);
            if let Some(place) = self.pages.get_mut(index as usize) {
                *place = Some(Place {
                    slot,
                    sum: page.sum,
                });
            }
            map.set_page(index, page.words);
        }
        Ok(())
    }

    fn map_sum(&self) -> u32 {
        let pages = self.pages.iter();
        crate::format::map_sum(pages.map(|page| page.map_or(0, |place| place.sum)))
    }

    /// What its opener called it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What names the state of the disk that it holds.
    pub fn id(&self) -> LayerId {
        self.header.id
    }

    /// The layer below it.
    pub fn parent(&self) -> LayerId {
        self.header.parent
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.geometry.size
    }

    pub fn state(&self) -> State {
        self.header.state
    }

    /// The file.
    pub fn medium(&self) -> &M {
        &self.medium
    }

    /// Where byte 0 of the disk would be in the file; all others follow.
    pub fn data_offset(&self) -> u64 {
        self.geometry.data_offset
    }

    fn put_header(&mut self, state: State) -> Result<()> {
        if !self.header_durable {
            self.sync()?;
        }
        let header = Header {
            state,
            sequence: self.header.sequence + 1,
            map_sum: match state {
                State::Open => 0,
                State::Closed | State::Frozen => self.map_sum(),
            },
            ..self.header
        };
        let slot = self.header_slot.other();
        self.medium
            .write(&header.encode()[..], slot.number() * BLOCK as u64)
            .map_err(Error::io(&self.name, "write its header"))?;
        self.header = header;
        self.header_slot = slot;
        self.header_durable = false;
        Ok(())
    }

    pub(crate) fn sync(&mut self) -> Result<()> {
        self.medium
            .sync()
            .map_err(Error::io(&self.name, "sync it"))?;
        self.header_durable = true;
        Ok(())
    }

    /// Prepares the `dirty` pages of the map for [`Layer::write_batch`]. What they tell has to be
    /// durable before: sync in between. The first batch marks the layer as written.
    pub(crate) fn batch(&mut self, map: &Bitmap, dirty: &BTreeSet<u32>) -> Result<Batch> {
        if dirty.is_empty() {
            return Ok(Batch::default());
        }
        if self.header.state != State::Open {
            self.put_header(State::Open)?;
        }
        let sequence = self.header.sequence + 1;
        self.header.sequence = sequence;
        let no_clusters = [0; crate::format::PAGE_WORDS];
        let blocks = dirty.iter().map(|index| {
            let place = self.pages.get(*index as usize).copied().flatten();
            let slot = place.map_or(Slot::First, |place| place.slot.other());
            let words = map.page(*index).unwrap_or(&no_clusters);
            let (block, sum) = Page::encode(self.header.id, *index, sequence, words);
            (*index, slot, block, sum)
        });
        Ok(Batch {
            blocks: blocks.collect(),
        })
    }

    pub(crate) fn write_batch(&self, batch: &Batch) -> Result<()> {
        for (index, slot, block, _) in &batch.blocks {
            self.medium
                .write(&block[..], self.geometry.slot_offset(*index, *slot))
                .map_err(Error::io(&self.name, "write its map"))?;
        }
        Ok(())
    }

    /// The batch is durable.
    pub(crate) fn keep_batch(&mut self, batch: &Batch) {
        for (index, slot, _, sum) in &batch.blocks {
            if let Some(place) = self.pages.get_mut(*index as usize) {
                *place = Some(Place {
                    slot: *slot,
                    sum: *sum,
                });
            }
        }
    }

    /// Nothing is to be flushed: says so in the header.
    pub(crate) fn finish(&mut self, state: State) -> Result<()> {
        if self.header.state == state {
            return Ok(());
        }
        self.put_header(state)
    }
}

impl Batch {
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = u32> {
        self.blocks.iter().map(|(index, ..)| *index)
    }
}
