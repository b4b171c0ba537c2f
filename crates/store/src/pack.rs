//! Pack files: chunks one after another, an index of them, a trailer with a checksum.

use crate::codec::{Encoding, Packed, is_chunk_len};
use crate::error::{Error, Result};
use crate::fs::{File, Fs, append_all, read_exact_at};
use crate::id::{ChunkId, PackId, StoreId};

const MAGIC: &[u8; 8] = b"BELLJARP";
const TRAILER_MAGIC: &[u8; 8] = b"BELLJARI";
const RECORD_MAGIC: &[u8; 4] = b"CHNK";
pub(crate) const VERSION: u16 = 1;
/// No encryption: key id and cipher are zero.
const CIPHER_NONE: u8 = 0;
pub(crate) const HEADER: u32 = 96;
pub(crate) const RECORD: u32 = 48;
const ENTRY: usize = 48;
const TRAILER: usize = 64;
/// Larger ones are refused; writers seal at [`crate::Settings::pack_bytes`], far below.
const MAX_PACK: u64 = 1 << 31;
/// Written at once.
const BUFFER: usize = 1 << 20;

/// Where a chunk is in a pack: the offset is its record's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) id: ChunkId,
    pub(crate) offset: u32,
    pub(crate) raw_len: u32,
    pub(crate) stored_len: u32,
}

impl Entry {
    /// With the record's head.
    pub(crate) const fn bytes_on_disk(&self) -> u64 {
        RECORD as u64 + self.stored_len as u64 + ENTRY as u64
    }
}

/// The path of a sealed pack.
pub(crate) fn path(id: PackId) -> String {
    format!("packs/{id}.pack")
}

/// The id in a file name of the folder of packs.
pub(crate) fn id_of(name: &str) -> Option<PackId> {
    name.strip_suffix(".pack")?.parse().ok()
}

fn header(id: PackId, store: StoreId) -> [u8; HEADER as usize] {
    let mut bytes = Vec::with_capacity(HEADER as usize);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[CIPHER_NONE, 0, 0, 0, 0, 0]);
    bytes.extend_from_slice(&id.0);
    bytes.extend_from_slice(&store.0);
    bytes.extend_from_slice(&[0; 16]);
    bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
    bytes.try_into().unwrap_or([0; HEADER as usize])
}

/// Appends chunks to a new pack, under a temporary name until it is sealed.
pub(crate) struct PackWriter {
    id: PackId,
    header: [u8; HEADER as usize],
    temporary: String,
    file: Box<dyn File>,
    buffer: Vec<u8>,
    offset: u32,
    entries: Vec<Entry>,
}

impl PackWriter {
    pub(crate) fn create(fs: &dyn Fs, id: PackId, store: StoreId) -> Result<Self> {
        let temporary = format!("tmp/{id}.pack");
        let file = fs
            .create(&temporary)
            .map_err(Error::io("create", &temporary))?;
        let header = header(id, store);
        Ok(Self {
            id,
            header,
            temporary,
            file,
            buffer: header.to_vec(),
            offset: HEADER,
            entries: Vec::new(),
        })
    }

    /// How long it would be if it were sealed now.
    pub(crate) fn length(&self) -> u64 {
        u64::from(self.offset) + (self.entries.len() * ENTRY + TRAILER) as u64
    }

    pub(crate) fn append(&mut self, chunk: &Packed) -> Result<()> {
        let stored_len = u32::try_from(chunk.bytes.len()).unwrap_or(u32::MAX);
        self.buffer.extend_from_slice(RECORD_MAGIC);
        self.buffer
            .extend_from_slice(&[chunk.encoding.code(), 0, 0, 0]);
        self.buffer.extend_from_slice(&chunk.raw_len.to_le_bytes());
        self.buffer.extend_from_slice(&stored_len.to_le_bytes());
        self.buffer.extend_from_slice(&chunk.id.0);
        self.buffer.extend_from_slice(&chunk.bytes);
        self.entries.push(Entry {
            id: chunk.id,
            offset: self.offset,
            raw_len: chunk.raw_len,
            stored_len,
        });
        self.offset = self
            .offset
            .saturating_add(RECORD)
            .saturating_add(stored_len);
        if self.buffer.len() >= BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        append_all(&*self.file, &self.buffer).map_err(Error::io("write", &self.temporary))?;
        self.buffer.clear();
        Ok(())
    }

    /// Writes index and trailer, makes it durable, and gives it its name. The folder is not synced yet.
    pub(crate) fn seal(mut self, fs: &dyn Fs) -> Result<(PackId, Vec<Entry>, u64)> {
        let tail = tail(&self.header, self.offset, &self.entries);
        self.buffer.extend_from_slice(&tail);
        self.flush()?;
        self.file
            .sync()
            .map_err(Error::io("sync", &self.temporary))?;
        let path = path(self.id);
        fs.rename(&self.temporary, &path)
            .map_err(Error::io("rename to", &path))?;
        Ok((
            self.id,
            std::mem::take(&mut self.entries),
            u64::from(self.offset) + tail.len() as u64,
        ))
    }

    /// Gives up; what cannot be removed now is removed when the store is opened.
    pub(crate) fn discard(self, fs: &dyn Fs) {
        let _ = fs.remove(&self.temporary);
    }
}

fn tail(header: &[u8], offset: u32, entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.len() * ENTRY + TRAILER);
    for entry in entries {
        bytes.extend_from_slice(&entry.id.0);
        bytes.extend_from_slice(&u64::from(entry.offset).to_le_bytes());
        bytes.extend_from_slice(&entry.raw_len.to_le_bytes());
        bytes.extend_from_slice(&entry.stored_len.to_le_bytes());
    }
    bytes.extend_from_slice(TRAILER_MAGIC);
    bytes.extend_from_slice(&u64::from(offset).to_le_bytes());
    bytes.extend_from_slice(
        &u32::try_from(entries.len())
            .unwrap_or(u32::MAX)
            .to_le_bytes(),
    );
    bytes.extend_from_slice(&[0; 12]);
    let mut sum = blake3::Hasher::new();
    sum.update(header).update(&bytes);
    bytes.extend_from_slice(sum.finalize().as_bytes());
    bytes
}

fn number(bytes: &[u8], at: usize) -> u32 {
    let found = bytes.get(at..at.saturating_add(4));
    found
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(u32::MAX, u32::from_le_bytes)
}

fn read(file: &dyn File, path: &str, offset: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    read_exact_at(file, &mut bytes, offset).map_err(Error::io("read", path))?;
    Ok(bytes)
}

/// What is in a pack, or why that cannot be told. Reads header, index and trailer.
pub(crate) fn index(file: &dyn File, path: &str, id: PackId) -> Result<Vec<Entry>> {
    let length = file.length().map_err(Error::io("read", path))?;
    let header = checked_header(file, path, id, length)?;
    let damaged = |what: &str| Error::damaged(path, what);
    let trailer_at = length - TRAILER as u64;
    let trailer = read(file, path, trailer_at, TRAILER)?;
    if trailer.get(..8) != Some(&TRAILER_MAGIC[..]) {
        return Err(damaged("it does not end as a pack"));
    }
    let (offset, high, count) = (
        number(&trailer, 8),
        number(&trailer, 12),
        number(&trailer, 16),
    );
    let index_len = u64::from(count) * ENTRY as u64;
    if high != 0 || u64::from(offset) + index_len != trailer_at {
        return Err(damaged("its index does not fit"));
    }
    let index = read(
        file,
        path,
        offset.into(),
        usize::try_from(index_len).unwrap_or(0),
    )?;
    let (summed, sum) = trailer.split_at_checked(32).unwrap_or_default();
    let mut found = blake3::Hasher::new();
    found.update(&header).update(&index).update(summed);
    if found.finalize().as_bytes() != sum {
        return Err(damaged("the checksum of its index does not match"));
    }
    entries(&index, offset).ok_or_else(|| damaged("its index does not describe it"))
}

fn checked_header(file: &dyn File, path: &str, id: PackId, length: u64) -> Result<Vec<u8>> {
    let damaged = |what: &str| Error::damaged(path, what);
    if !(u64::from(HEADER) + TRAILER as u64..=MAX_PACK).contains(&length) {
        return Err(damaged("no pack has such a length"));
    }
    let header = read(file, path, 0, HEADER as usize)?;
    let (head, sum) = header.split_at_checked(64).unwrap_or_default();
    if head.get(..8) != Some(&MAGIC[..]) {
        return Err(damaged("it does not begin as a pack"));
    }
    let version = number(head, 8) & 0xffff;
    if version != u32::from(VERSION) {
        return Err(Error::Version {
            path: path.to_owned(),
            found: version,
            known: VERSION.into(),
        });
    }
    if blake3::hash(head).as_bytes() != sum || head.get(16..32) != Some(&id.0[..]) {
        return Err(damaged("its header is not that of this pack"));
    }
    if head.get(10) != Some(&CIPHER_NONE) {
        return Err(damaged("it is encrypted, which this version cannot read"));
    }
    Ok(header)
}

/// The entries of an index; they must lie one after another from the header to the index.
fn entries(index: &[u8], end: u32) -> Option<Vec<Entry>> {
    let (rows, _) = index.as_chunks::<ENTRY>();
    let mut entries = Vec::with_capacity(rows.len());
    let mut next = HEADER;
    for row in rows {
        let entry = Entry {
            id: ChunkId::from_slice(row.get(..32)?)?,
            offset: number(row, 32),
            raw_len: number(row, 40),
            stored_len: number(row, 44),
        };
        if entry.offset != next || number(row, 36) != 0 || !plausible(&entry) {
            return None;
        }
        next = next.checked_add(RECORD)?.checked_add(entry.stored_len)?;
        entries.push(entry);
    }
    (next == end).then_some(entries)
}

/// Stored as it is or smaller, and of a length that a chunk has.
const fn plausible(entry: &Entry) -> bool {
    is_chunk_len(entry.raw_len) && entry.stored_len > 0 && entry.stored_len <= entry.raw_len
}

/// The chunks of a pack whose index is not good, by the heads of the records, as far as they follow one
/// another. Their content is checked when it is used, as always.
pub(crate) fn salvage(file: &dyn File, path: &str, id: PackId) -> Result<Vec<Entry>> {
    let length = file.length().map_err(Error::io("read", path))?;
    checked_header(file, path, id, length)?;
    let mut entries = Vec::new();
    let mut offset = HEADER;
    while u64::from(offset) + u64::from(RECORD) <= length {
        let head = read(file, path, offset.into(), RECORD as usize)?;
        let Some((_, entry)) = record(&head, offset) else {
            break;
        };
        let Some(next) = offset.checked_add(RECORD + entry.stored_len) else {
            break;
        };
        if u64::from(next) > length {
            break;
        }
        entries.push(entry);
        offset = next;
    }
    Ok(entries)
}

fn record(head: &[u8], offset: u32) -> Option<(Encoding, Entry)> {
    if head.get(..4)? != RECORD_MAGIC || head.get(5..8)? != [0; 3] {
        return None;
    }
    let entry = Entry {
        id: ChunkId::from_slice(head.get(16..48)?)?,
        offset,
        raw_len: number(head, 8),
        stored_len: number(head, 12),
    };
    plausible(&entry).then_some(())?;
    Some((Encoding::of(*head.get(4)?)?, entry))
}

/// The record of a chunk, as it is stored; not yet verified.
pub(crate) fn read_record(file: &dyn File, path: &str, entry: &Entry) -> Result<Packed> {
    let length = RECORD as usize + entry.stored_len as usize;
    let mut bytes = read(file, path, entry.offset.into(), length)?;
    let Some((encoding, found)) = record(&bytes, entry.offset).filter(|(_, found)| found == entry)
    else {
        return Err(Error::ChunkDamaged {
            id: entry.id,
            path: path.to_owned(),
            what: "its record is not the one that the index names",
        });
    };
    bytes.drain(..RECORD as usize);
    Ok(Packed {
        id: found.id,
        encoding,
        raw_len: found.raw_len,
        bytes,
    })
}
