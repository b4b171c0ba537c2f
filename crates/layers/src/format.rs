//! Bytes of a layer: two copies of a header, the map in pages of two slots each, the clusters. Pure;
//! `docs/disk-layers.md` says it all.
use std::fmt;

use crate::CLUSTER;
use crc32fast::hash as crc32;

/// Bytes of a header and of a page of the map.
pub(crate) const BLOCK: usize = 4096;
/// Clusters that one page of the map tells of: 125 MiB.
pub(crate) const PAGE_CLUSTERS: u64 = 32_000;
pub(crate) const PAGE_WORDS: usize = PAGE_CLUSTERS as usize / 64;
/// Where the map begins, behind both copies of the header.
pub(crate) const MAP_OFFSET: u64 = 2 * BLOCK as u64;
/// Largest disk: 1 TiB. Bounds what a file can make its reader allocate.
pub const MAX_SIZE: u64 = 1 << 40;

const MAGIC: &[u8; 8] = b"BELLJARL";
const PAGE_MAGIC: &[u8; 4] = b"LMAP";
const VERSION: u32 = 1;
/// Where the clusters begin is a multiple of this.
const DATA_ALIGN: u64 = 1 << 20;
/// Where the checksum of a block stands: it covers all before it.
const SUM_AT: usize = BLOCK - 4;
const PAYLOAD_AT: usize = 64;
const PAYLOAD_END: usize = PAYLOAD_AT + PAGE_WORDS * 8;

/// A block of zeros.
pub(crate) const EMPTY: [u8; BLOCK] = [0; BLOCK];

/// What names the state of a disk that a layer holds: 16 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerId(pub [u8; 16]);

impl LayerId {
    /// What the lowest layer lies over: the base image, which has no name.
    pub const BASE: Self = Self([0; 16]);

    /// A new one.
    ///
    /// # Errors
    /// The system gives no random bytes.
    pub fn random() -> std::io::Result<Self> {
        let mut id = [0; 16];
        let filled = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
        if filled == id.len() {
            Ok(Self(id))
        } else {
            Err(std::io::ErrorKind::UnexpectedEof.into())
        }
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::BASE {
            return f.write_str("the base image");
        }
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why bytes are no layer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("it does not begin like one")]
    Magic,
    #[error("it has version {0}, and this program knows version 1")]
    Version(u32),
    #[error("neither copy of its header is whole")]
    Header,
    #[error("its header says what cannot be: {0}")]
    Impossible(&'static str),
    #[error("page {0} of its map is damaged in both places")]
    Page(u32),
    #[error("page {0} of its map has clusters beyond the end of the disk")]
    Beyond(u32),
    #[error(
        "its map is not the one that it was closed with: a page was damaged or is an older one"
    )]
    Map,
}

/// What a layer is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Somebody writes it, or was cut off while writing.
    Open,
    /// Nobody writes it; it may be written again.
    Closed,
    /// It never changes again.
    Frozen,
}

/// The header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) state: State,
    /// Of two copies the one with the higher number counts.
    pub(crate) sequence: u64,
    pub(crate) id: LayerId,
    /// The layer below.
    pub(crate) parent: LayerId,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// See [`map_sum`]; 0 if open.
    pub(crate) map_sum: u32,
}

/// Where things are, which follows from the size of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) size: u64,
    pub(crate) clusters: u64,
    pub(crate) pages: u32,
    pub(crate) data_offset: u64,
}

impl Geometry {
    /// `None`: no disk has that size.
    pub(crate) fn of(size: u64) -> Option<Self> {
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(CLUSTER) {
            return None;
        }
        let clusters = size / CLUSTER;
        let pages = clusters.div_ceil(PAGE_CLUSTERS);
        let map_end = MAP_OFFSET + pages * 2 * BLOCK as u64;
        Some(Self {
            size,
            clusters,
            // At most 8,389.
            pages: pages as u32,
            data_offset: map_end.next_multiple_of(DATA_ALIGN),
        })
    }

    /// Bytes of the file.
    pub(crate) fn file_size(&self) -> u64 {
        self.data_offset + self.size
    }

    /// Where the slot is in the file.
    pub(crate) fn slot_offset(&self, page: u32, slot: Slot) -> u64 {
        MAP_OFFSET + (u64::from(page) * 2 + slot.number()) * BLOCK as u64
    }
}

/// One of the two places of a header or page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    First,
    Second,
}

impl Slot {
    pub(crate) fn number(self) -> u64 {
        match self {
            Self::First => 0,
            Self::Second => 1,
        }
    }

    pub(crate) fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

fn put(block: &mut [u8; BLOCK], at: usize, bytes: &[u8]) {
    if let Some(field) = block.get_mut(at..at + bytes.len()) {
        field.copy_from_slice(bytes);
    }
}

fn bytes_at<const N: usize>(block: &[u8; BLOCK], at: usize) -> [u8; N] {
    let field = block.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().unwrap_or([0; N])
}

fn u32_at(block: &[u8; BLOCK], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(block, at))
}

fn u64_at(block: &[u8; BLOCK], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(block, at))
}

fn seal(block: &mut [u8; BLOCK]) -> u32 {
    let sum = crc32(block.get(..SUM_AT).unwrap_or_default());
    put(block, SUM_AT, &sum.to_le_bytes());
    sum
}

fn is_sealed(block: &[u8; BLOCK]) -> bool {
    crc32(block.get(..SUM_AT).unwrap_or_default()) == u32_at(block, SUM_AT)
}

fn is_zero(block: &[u8; BLOCK], from: usize, to: usize) -> bool {
    let part = block.get(from..to).unwrap_or_default();
    part.iter().all(|byte| *byte == 0)
}

impl Header {
    pub(crate) fn encode(&self) -> Box<[u8; BLOCK]> {
        let mut block = Box::new(EMPTY);
        let geometry = Geometry::of(self.size);
        let state: u32 = match self.state {
            State::Open => 1,
            State::Closed => 2,
            State::Frozen => 3,
        };
        put(&mut block, 0, MAGIC);
        put(&mut block, 8, &VERSION.to_le_bytes());
        put(&mut block, 12, &state.to_le_bytes());
        put(&mut block, 16, &self.sequence.to_le_bytes());
        put(&mut block, 24, &self.size.to_le_bytes());
        put(&mut block, 32, &self.id.0);
        put(&mut block, 48, &self.parent.0);
        let data_offset = geometry.map_or(0, |geometry| geometry.data_offset);
        put(&mut block, 64, &data_offset.to_le_bytes());
        put(&mut block, 72, &(CLUSTER as u32).to_le_bytes());
        put(&mut block, 76, &self.map_sum.to_le_bytes());
        seal(&mut block);
        block
    }

    /// `Ok(None)`: not whole, as a write that was cut short leaves it.
    fn decode(block: &[u8; BLOCK]) -> Result<Option<Self>, Damage> {
        if !is_sealed(block) || bytes_at(block, 0) != *MAGIC {
            return Ok(None);
        }
        let version = u32_at(block, 8);
        if version != VERSION {
            return Err(Damage::Version(version));
        }
        let state = match u32_at(block, 12) {
            1 => State::Open,
            2 => State::Closed,
            3 => State::Frozen,
            _ => return Err(Damage::Impossible("its state")),
        };
        let size = u64_at(block, 24);
        let geometry = Geometry::of(size).ok_or(Damage::Impossible("its size"))?;
        if u64_at(block, 64) != geometry.data_offset || u64::from(u32_at(block, 72)) != CLUSTER {
            return Err(Damage::Impossible("where its clusters are"));
        }
        if !is_zero(block, 80, SUM_AT) {
            return Err(Damage::Impossible("bytes that are not used"));
        }
        let (id, parent) = (LayerId(bytes_at(block, 32)), LayerId(bytes_at(block, 48)));
        if id == LayerId::BASE || id == parent {
            return Err(Damage::Impossible("its id"));
        }
        Ok(Some(Self {
            state,
            sequence: u64_at(block, 16),
            id,
            parent,
            size,
            map_sum: u32_at(block, 76),
        }))
    }

    /// The copy that counts, and where it stands.
    pub(crate) fn newest(copies: [&[u8; BLOCK]; 2]) -> Result<(Self, Slot), Damage> {
        let [first, second] = copies;
        let found = match (Self::decode(first)?, Self::decode(second)?) {
            (Some(a), Some(b)) if a.sequence == b.sequence => {
                return Err(Damage::Impossible("two headers at the same time"));
            }
            (Some(a), Some(b)) if (a.id, a.parent, a.size) != (b.id, b.parent, b.size) => {
                return Err(Damage::Impossible("headers of two layers"));
            }
            (Some(a), Some(b)) if a.sequence > b.sequence => (a, Slot::First),
            (_, Some(b)) => (b, Slot::Second),
            (Some(a), None) => (a, Slot::First),
            (None, None) if [first, second].iter().any(|b| b.starts_with(MAGIC)) => {
                return Err(Damage::Header);
            }
            (None, None) => return Err(Damage::Magic),
        };
        Ok(found)
    }
}

/// A page of the map as it stands in one slot.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) sequence: u64,
    pub(crate) words: Box<[u64; PAGE_WORDS]>,
    /// The checksum that it carries.
    pub(crate) sum: u32,
}

impl Page {
    /// The block, and the checksum in it.
    pub(crate) fn encode(
        id: LayerId,
        index: u32,
        sequence: u64,
        words: &[u64; PAGE_WORDS],
    ) -> (Box<[u8; BLOCK]>, u32) {
        let mut block = Box::new(EMPTY);
        put(&mut block, 0, PAGE_MAGIC);
        put(&mut block, 4, &index.to_le_bytes());
        put(&mut block, 8, &sequence.to_le_bytes());
        put(&mut block, 16, &id.0);
        let payload = block.get_mut(PAYLOAD_AT..PAYLOAD_END).unwrap_or_default();
        for (to, word) in payload.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        let sum = seal(&mut block);
        (block, sum)
    }

    /// `None`: not a whole page of this layer at this place.
    fn decode(block: &[u8; BLOCK], id: LayerId, index: u32) -> Option<Self> {
        let fits = bytes_at(block, 0) == *PAGE_MAGIC
            && u32_at(block, 4) == index
            && bytes_at(block, 16) == id.0
            && is_zero(block, 32, PAYLOAD_AT)
            && is_zero(block, PAYLOAD_END, SUM_AT)
            && is_sealed(block);
        if !fits {
            return None;
        }
        let mut words = Box::new([0; PAGE_WORDS]);
        let payload = block.get(PAYLOAD_AT..PAYLOAD_END).unwrap_or_default();
        for (word, bytes) in words.iter_mut().zip(payload.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Some(Self {
            sequence: u64_at(block, 8),
            words,
            sum: u32_at(block, SUM_AT),
        })
    }

    /// The page that counts of two slots; `None`: none was ever written. A slot that is not whole is
    /// what the last flush left when it was cut short, and the other one is right; if there is no other,
    /// and the page was never flushed before, it has nothing.
    pub(crate) fn newest(
        slots: [&[u8; BLOCK]; 2],
        header: &Header,
        index: u32,
    ) -> Result<Option<(Self, Slot)>, Damage> {
        let [first, second] = slots;
        let decode = |block| Self::decode(block, header.id, index);
        let found = match (decode(first), decode(second)) {
            (Some(a), Some(b)) if a.sequence == b.sequence => return Err(Damage::Page(index)),
            (Some(a), Some(b)) if a.sequence > b.sequence => (a, Slot::First),
            (_, Some(b)) => (b, Slot::Second),
            (Some(a), None) => (a, Slot::First),
            // The first write of a page goes to its first slot.
            (None, None) if *second == EMPTY => return Ok(None),
            (None, None) => return Err(Damage::Page(index)),
        };
        let (page, slot) = found;
        let past = u64::from(index) * PAGE_CLUSTERS;
        let clusters = (header.size / CLUSTER).saturating_sub(past);
        if !ends_within(&page.words, clusters) {
            return Err(Damage::Beyond(index));
        }
        Ok(Some((page, slot)))
    }
}

/// Whether only the first `clusters` bits are set.
fn ends_within(words: &[u64; PAGE_WORDS], clusters: u64) -> bool {
    let last = words.iter().rposition(|word| *word != 0);
    last.is_none_or(|last| {
        let word = words.get(last).copied().unwrap_or(0);
        let end = last as u64 * 64 + u64::from(64 - word.leading_zeros());
        end <= clusters
    })
}

/// The checksum over a map that a layer is closed with: of the checksums of its pages' newest slots, 0
/// for one that was never written.
pub(crate) fn map_sum(pages: impl Iterator<Item = u32>) -> u32 {
    let sums: Vec<u8> = pages.flat_map(u32::to_le_bytes).collect();
    crc32(&sums)
}
