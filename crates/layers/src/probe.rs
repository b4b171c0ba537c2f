//! For fuzzing: hostile bytes as the file of a layer.
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

use crate::bitmap::Bitmap;
use crate::format::{BLOCK, Geometry, Header, MAP_OFFSET, Page, Slot};
use crate::layer::Layer;
use crate::medium::Medium;
use crate::{Builder, CLUSTER, LayerId, State};

/// A file in memory: what it begins with, and zeros up to its length.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    bytes: Rc<RefCell<Vec<u8>>>,
    length: Rc<Cell<u64>>,
}

impl Memory {
    /// As long as a layer with this header would be, so that what comes after that check is reached.
    pub fn hostile(bytes: &[u8]) -> Self {
        let blocks = bytes.as_chunks::<BLOCK>().0;
        let header = match blocks {
            [first, second, ..] => Header::newest([first, second]).ok(),
            _ => None,
        };
        let geometry = header.and_then(|(header, _)| Geometry::of(header.size));
        let length = geometry.map_or(bytes.len() as u64, |geometry| geometry.file_size());
        Self {
            bytes: Rc::new(RefCell::new(bytes.to_vec())),
            length: Rc::new(Cell::new(length)),
        }
    }
}

impl Medium for Memory {
    fn length(&self) -> io::Result<u64> {
        Ok(self.length.get())
    }

    fn extend(&self, length: u64) -> io::Result<()> {
        self.length.set(length);
        Ok(())
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.saturating_add(bytes.len() as u64) > self.length.get() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let all = self.bytes.borrow();
        let from = all.get(offset as usize..).unwrap_or_default();
        bytes.fill(0);
        for (to, byte) in bytes.iter_mut().zip(from) {
            *to = *byte;
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut all = self.bytes.borrow_mut();
        let end = offset as usize + bytes.len();
        if all.len() < end {
            all.resize(end, 0);
        }
        match all.get_mut(offset as usize..end) {
            Some(part) => part.copy_from_slice(bytes),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }

    fn punch(&self, _offset: u64, _length: u64) -> io::Result<bool> {
        Ok(false)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, from: u64) -> io::Result<Option<u64>> {
        Ok((from < self.bytes.borrow().len() as u64).then_some(from))
    }

    fn next_hole(&self, _from: u64) -> io::Result<u64> {
        Ok(self.bytes.borrow().len() as u64)
    }
}

/// Reads `bytes` as a layer, and all of its clusters' runs.
pub fn layer(bytes: &[u8]) {
    if let Ok((layer, map)) = Layer::read(Memory::hostile(bytes), "fuzz") {
        let clusters: u64 = map.runs().map(|(_, count)| count).sum();
        assert!(clusters <= layer.size() / CLUSTER);
    }
}

/// The same with right checksums, as an attacker would make them.
pub fn resealed(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    for block in bytes.as_chunks_mut::<BLOCK>().0 {
        let sum = crc32fast::hash(block.get(..BLOCK - 4).unwrap_or_default());
        if let Some(at) = block.last_chunk_mut() {
            *at = sum.to_le_bytes();
        }
    }
    layer(&bytes);
}

/// Header and map of good layers.
pub fn seeds() -> Vec<Vec<u8>> {
    let layer = |size: u64| -> crate::Result<Vec<u8>> {
        let memory = Memory::default();
        let id = LayerId([7; 16]);
        let mut builder = Builder::new(memory.clone(), "seed", size, id, LayerId::BASE)?;
        builder.zero(CLUSTER, 5 * CLUSTER)?;
        builder.zero(size - CLUSTER, CLUSTER)?;
        builder.finish()?;
        let mut bytes = memory.bytes.borrow().clone();
        bytes.truncate((MAP_OFFSET as usize) + 6 * BLOCK);
        Ok(bytes)
    };
    let open = || {
        let header = Header {
            state: State::Open,
            sequence: 3,
            id: LayerId([9; 16]),
            parent: LayerId([8; 16]),
            size: 300 << 20,
            map_sum: 0,
        };
        let mut map = Bitmap::new(3);
        map.set(100, 40_000, |_| {});
        let mut bytes = header.encode().to_vec();
        bytes.resize(MAP_OFFSET as usize, 0);
        for (index, sequence) in [(0, 4), (0, 5), (1, 6)] {
            let Some(words) = map.page(index) else {
                continue;
            };
            let (block, _) = Page::encode(header.id, index, sequence, words);
            bytes.extend_from_slice(&block[..]);
        }
        debug_assert_eq!(Slot::First.number(), 0);
        bytes
    };
    let sizes = [64 << 20, 200 << 20];
    let built = sizes.iter().filter_map(|size| layer(*size).ok());
    built.chain([open()]).collect()
}
