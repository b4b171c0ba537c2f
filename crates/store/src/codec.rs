//! A chunk's bytes: named, compressed, and the way back, where nothing is believed.

use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::{MAX_CHUNK, PAGE};

/// How a chunk's bytes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As they are: zstd would not have saved a sixteenth.
    Raw,
    /// One zstd frame.
    Zstd,
}

impl Encoding {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
        }
    }

    pub(crate) const fn of(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A chunk as it goes into a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packed {
    pub(crate) id: ChunkId,
    pub(crate) encoding: Encoding,
    pub(crate) raw_len: u32,
    pub(crate) bytes: Vec<u8>,
}

/// Names chunks of one trust domain.
#[derive(Clone)]
pub(crate) struct Namer([u8; 32]);

impl Namer {
    pub(crate) const fn new(key: [u8; 32]) -> Self {
        Self(key)
    }

    pub(crate) fn name(&self, bytes: &[u8]) -> ChunkId {
        ChunkId(*blake3::keyed_hash(&self.0, bytes).as_bytes())
    }
}

/// Compresses chunks; one for each thread.
pub(crate) struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    /// As large as the largest result: so that a chunk takes only what it needs.
    scratch: Vec<u8>,
}

impl Compressor {
    pub(crate) fn new(level: i32) -> Result<Self> {
        let zstd = zstd::bulk::Compressor::new(level).map_err(Error::Compress)?;
        let scratch = vec![0; zstd::zstd_safe::compress_bound(MAX_CHUNK)];
        Ok(Self { zstd, scratch })
    }

    pub(crate) fn pack(&mut self, id: ChunkId, bytes: &[u8]) -> Result<Packed> {
        let done = self.zstd.compress_to_buffer(bytes, &mut self.scratch[..]);
        let length = done.map_err(Error::Compress)?;
        let small = self.scratch.get(..length).unwrap_or(bytes);
        let worth = small.len() < bytes.len() - bytes.len() / 16;
        Ok(Packed {
            id,
            encoding: if worth { Encoding::Zstd } else { Encoding::Raw },
            raw_len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            bytes: if worth { small } else { bytes }.to_vec(),
        })
    }
}

/// Whether that can be a chunk's length.
pub(crate) const fn is_chunk_len(raw_len: u32) -> bool {
    raw_len > 0 && raw_len as usize <= MAX_CHUNK && (raw_len as u64).is_multiple_of(PAGE)
}

/// Undoes compression; one for each thread.
pub(crate) struct Decompressor(zstd::bulk::Decompressor<'static>);

impl Decompressor {
    pub(crate) fn new() -> Result<Self> {
        zstd::bulk::Decompressor::new()
            .map(Self)
            .map_err(Error::Compress)
    }

    /// Exactly `raw_len` bytes, or what is wrong. Never takes more memory than that: a frame that
    /// holds more fails where the buffer ends.
    pub(crate) fn unpack(
        &mut self,
        encoding: Encoding,
        raw_len: u32,
        stored: &[u8],
        into: &mut Vec<u8>,
    ) -> Result<(), &'static str> {
        if !is_chunk_len(raw_len) {
            return Err("its length cannot be");
        }
        into.clear();
        match encoding {
            Encoding::Raw if stored.len() == raw_len as usize => into.extend_from_slice(stored),
            Encoding::Raw => return Err("it is not as long as it says"),
            Encoding::Zstd => {
                into.resize(raw_len as usize, 0);
                match self.0.decompress_to_buffer(stored, &mut into[..]) {
                    Ok(got) if got == raw_len as usize => {}
                    Ok(_) => return Err("it is not as long as it says"),
                    Err(_) => return Err("it cannot be decompressed"),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(fill: impl Fn(usize) -> u8) -> Vec<u8> {
        (0..4096).map(fill).collect()
    }

    #[test]
    fn chunks_come_back_and_random_ones_are_stored_as_they_are() {
        let namer = Namer::new([3; 32]);
        let noise = page(|n| *blake3::hash(&n.to_le_bytes()).as_bytes().first().unwrap());
        for (bytes, encoding) in [
            (page(|n| (n / 100) as u8), Encoding::Zstd),
            (noise, Encoding::Raw),
        ] {
            let packed = Compressor::new(1)
                .unwrap()
                .pack(namer.name(&bytes), &bytes)
                .unwrap();
            assert_eq!(packed.encoding, encoding);
            let mut back = Vec::new();
            let mut decompressor = Decompressor::new().unwrap();
            decompressor
                .unpack(encoding, packed.raw_len, &packed.bytes, &mut back)
                .unwrap();
            assert_eq!(back, bytes);
        }
    }

    #[test]
    fn names_depend_on_the_key() {
        let bytes = page(|_| 1);
        assert_ne!(
            Namer::new([1; 32]).name(&bytes),
            Namer::new([2; 32]).name(&bytes)
        );
    }

    #[test]
    fn a_bomb_ends_at_the_length_that_was_promised() {
        let bomb = zstd::bulk::compress(&vec![0; 256 << 20], 19).unwrap();
        assert!(bomb.len() < 64 << 10);
        let mut into = Vec::new();
        let mut decompressor = Decompressor::new().unwrap();
        let told = decompressor.unpack(Encoding::Zstd, 4096, &bomb, &mut into);
        assert_eq!(told, Err("it cannot be decompressed"));
        assert!(into.capacity() <= MAX_CHUNK);
        let told = decompressor.unpack(Encoding::Zstd, u32::MAX, &bomb, &mut into);
        assert_eq!(told, Err("its length cannot be"));
    }
}
