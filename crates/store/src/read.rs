//! Reading a snapshot: each chunk is verified when it is used.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::PAGE;
use crate::codec::{Decompressor, Packed};
use crate::error::{Error, Result};
use crate::id::{ChunkId, SnapshotId};
use crate::manifest::{Extent, Image, Manifest};
use crate::pack::{self, Entry};
use crate::store::{Inner, Store, locked};

/// Decompressed chunks that a reader keeps for [`Reader::read`].
const CACHE: usize = 8 << 20;

/// Where a restored image goes. Several threads write at once, each byte once, and only bytes of pages that
/// are not zero: the rest must be zero before.
pub trait Sink: Sync {
    /// Takes all of the bytes.
    ///
    /// # Errors
    /// What the system says.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
}

impl Sink for std::fs::File {
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, bytes, offset)
    }
}

/// A snapshot that is being read; while there is one, the snapshot is not removed.
pub struct Reader {
    inner: Arc<Inner>,
    manifest: Manifest,
    cache: Mutex<Cache>,
}

struct Cache {
    chunks: HashMap<u32, Arc<[u8]>>,
    order: VecDeque<u32>,
    bytes: usize,
    /// Given back after use; more are made if several threads read.
    decoders: Vec<Decompressor>,
}

impl Store {
    /// Opens a snapshot for reading.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`], [`Error::Damaged`], [`Error::Version`], what the system says.
    pub fn read(&self, id: SnapshotId) -> Result<Reader> {
        let hold = Hold::new(&self.inner, id)?;
        let manifest = self.inner.manifest(id)?;
        std::mem::forget(hold);
        Ok(Reader {
            inner: Arc::clone(&self.inner),
            manifest,
            cache: Mutex::new(Cache {
                chunks: HashMap::new(),
                order: VecDeque::new(),
                bytes: 0,
                decoders: Vec::new(),
            }),
        })
    }
}

/// Keeps a snapshot until it is dropped.
struct Hold<'a>(&'a Inner, SnapshotId);

impl<'a> Hold<'a> {
    fn new(inner: &'a Inner, id: SnapshotId) -> Result<Self> {
        // Not under the lock that a commit holds while it syncs: restoring must not wait for that.
        let mut state = inner.state();
        if state.removing.contains(&id) {
            return Err(Error::NoSnapshot(id.to_string()));
        }
        *state.held.entry(id).or_insert(0) += 1;
        Ok(Self(inner, id))
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if let Some(count) = state.held.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                state.held.remove(&self.1);
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        drop(Hold(&self.inner, self.manifest.id));
    }
}

impl Reader {
    /// What the snapshot consists of.
    #[must_use]
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The image of that name.
    ///
    /// # Errors
    /// [`Error::NoImage`].
    pub fn image(&self, name: &str) -> Result<&Image> {
        self.manifest.image(name).ok_or_else(|| Error::NoImage {
            snapshot: self.manifest.id,
            name: name.to_owned(),
        })
    }

    /// Whether the store knows where every chunk of an image is. None of them is read.
    ///
    /// # Errors
    /// [`Error::NoImage`].
    pub fn has_all(&self, name: &str) -> Result<bool> {
        let image = self.image(name)?;
        let state = self.inner.state();
        let mut last = None;
        Ok(image.extents.iter().all(|extent| {
            let is_new = last.replace(extent.chunk) != Some(extent.chunk);
            let id = self.manifest.chunks.get(extent.chunk as usize);
            !is_new || id.is_some_and(|id| state.index.contains_key(id))
        }))
    }

    /// Fills the buffer from there, zeros included. For small pieces: it keeps the last chunks it used.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::ChunkMissing`], [`Error::ChunkDamaged`], what the system says. Then
    /// nothing in the buffer is meant.
    pub fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let image = self.image(name)?;
        let length = buffer.len() as u64;
        let end = offset
            .checked_add(length)
            .filter(|end| *end <= image.length);
        let Some(end) = end else {
            return Err(Error::OutOfRange {
                name: name.to_owned(),
                offset,
                length,
                size: image.length,
            });
        };
        buffer.fill(0);
        for extent in image.extents_in(offset / PAGE..end.div_ceil(PAGE)) {
            let chunk = self.cached(extent.chunk)?;
            let bytes = self.bytes_of(&chunk, &extent)?;
            // The first and the last page may be wanted in part.
            let start = extent.page * PAGE;
            let skip = usize::try_from(offset.saturating_sub(start)).unwrap_or(usize::MAX);
            let at = usize::try_from(start.saturating_sub(offset)).unwrap_or(usize::MAX);
            let from = bytes.get(skip..).unwrap_or_default();
            let into = buffer.get_mut(at..).unwrap_or_default();
            for (to, from) in into.iter_mut().zip(from) {
                *to = *from;
            }
        }
        Ok(())
    }

    /// All of an image; for small ones.
    ///
    /// # Errors
    /// As [`Reader::read`]; [`Error::OutOfRange`] if it is longer than `most`.
    pub fn read_all(&self, name: &str, most: usize) -> Result<Vec<u8>> {
        let length = self.image(name)?.length;
        let fitting = usize::try_from(length)
            .ok()
            .filter(|length| *length <= most);
        let mut bytes = vec![
            0;
            fitting.ok_or_else(|| Error::OutOfRange {
                name: name.to_owned(),
                offset: 0,
                length,
                size: most as u64,
            })?
        ];
        self.read(name, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// The bytes of one chunk, by its number in the manifest, verified. Not cached.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub fn chunk(&self, number: u32) -> Result<Vec<u8>> {
        let id = self.manifest.chunks.get(number as usize);
        let id =
            *id.ok_or_else(|| Error::damaged("the manifest", "a chunk's number is out of range"))?;
        let mut decoder = match locked(&self.cache).decoders.pop() {
            Some(decoder) => decoder,
            None => Decompressor::new()?,
        };
        let mut bytes = Vec::new();
        let done = self.inner.chunk(id, &mut decoder, &mut bytes);
        locked(&self.cache).decoders.push(decoder);
        done.map(|_| bytes)
    }

    /// The part of a chunk's bytes that an extent of this manifest names.
    ///
    /// # Errors
    /// [`Error::ChunkDamaged`] if the chunk is shorter.
    pub fn bytes_of<'a>(&self, chunk: &'a [u8], extent: &Extent) -> Result<&'a [u8]> {
        let page = usize::try_from(PAGE).unwrap_or(usize::MAX);
        let from = page.saturating_mul(extent.chunk_page as usize);
        let to = from.saturating_add(page.saturating_mul(extent.pages as usize));
        chunk.get(from..to).ok_or_else(|| {
            let id = self.manifest.chunks.get(extent.chunk as usize).copied();
            Error::ChunkDamaged {
                id: id.unwrap_or(ChunkId([0; 32])),
                path: format!("snapshot {}", self.manifest.id),
                what: "an extent reaches beyond its end",
            }
        })
    }

    fn cached(&self, number: u32) -> Result<Arc<[u8]>> {
        if let Some(chunk) = locked(&self.cache).chunks.get(&number) {
            return Ok(Arc::clone(chunk));
        }
        let chunk: Arc<[u8]> = self.chunk(number)?.into();
        let mut cache = locked(&self.cache);
        if cache.chunks.insert(number, Arc::clone(&chunk)).is_none() {
            cache.bytes += chunk.len();
            cache.order.push_back(number);
        }
        while cache.bytes > CACHE
            && let Some(oldest) = cache.order.pop_front()
        {
            let freed = cache.chunks.remove(&oldest).map_or(0, |chunk| chunk.len());
            cache.bytes = cache.bytes.saturating_sub(freed);
        }
        Ok(chunk)
    }

    /// Writes all of an image that is not zero, each chunk decompressed once, by several threads (0: one for
    /// each CPU). Returns how many bytes were written.
    ///
    /// # Errors
    /// As [`Reader::read`], and [`Error::Sink`]. Then the sink holds an unknown part.
    pub fn restore(&self, name: &str, sink: &(impl Sink + ?Sized), workers: usize) -> Result<u64> {
        let image = self.image(name)?;
        let mut extents: Vec<Extent> = image.extents.clone();
        extents.sort_by_key(|extent| extent.chunk);
        let jobs: Vec<&[Extent]> = extents.chunk_by(|a, b| a.chunk == b.chunk).collect();
        let workers = match workers {
            0 => thread::available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let run = || {
            let mut written = 0;
            while !stop.load(Ordering::Relaxed)
                && let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed))
            {
                written += self.restore_chunk(image, job, sink).inspect_err(|_| {
                    stop.store(true, Ordering::Relaxed);
                })?;
            }
            Ok(written)
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..workers.min(jobs.len()))
                .map(|_| scope.spawn(run))
                .collect();
            let mut all = run();
            for other in others {
                let result = other.join().unwrap_or(Err(Error::Poisoned));
                all = all.and_then(|sum| result.map(|part| sum + part));
            }
            all
        })
    }

    fn restore_chunk(
        &self,
        image: &Image,
        extents: &[Extent],
        sink: &(impl Sink + ?Sized),
    ) -> Result<u64> {
        let Some(first) = extents.first() else {
            return Ok(0);
        };
        let chunk = self.chunk(first.chunk)?;
        let mut written = 0;
        for extent in extents {
            let offset = extent.page * PAGE;
            let bytes = self.bytes_of(&chunk, extent)?;
            let rest = usize::try_from(image.length.saturating_sub(offset)).unwrap_or(usize::MAX);
            let bytes = bytes.get(..rest).unwrap_or(bytes);
            sink.write(bytes, offset)
                .map_err(|source| Error::Sink { offset, source })?;
            written += bytes.len() as u64;
        }
        Ok(written)
    }
}

impl Inner {
    /// A chunk's stored form, and verified bytes into `into`.
    pub(crate) fn chunk(
        &self,
        id: ChunkId,
        decoder: &mut Decompressor,
        into: &mut Vec<u8>,
    ) -> Result<Packed> {
        // A collection may move a chunk to another pack between the look-up and the reading.
        for _ in 0..3 {
            match self.try_chunk(id, decoder, into) {
                Err(error) if error.is_not_found() => self.load_packs_again()?,
                other => return other,
            }
        }
        Err(Error::ChunkMissing(id))
    }

    fn try_chunk(
        &self,
        id: ChunkId,
        decoder: &mut Decompressor,
        into: &mut Vec<u8>,
    ) -> Result<Packed> {
        let (pack, entry) = {
            let state = self.state();
            let place = state.index.get(&id).copied();
            let pack = place.and_then(|place| state.packs.get(&place.pack));
            let (Some(place), Some(pack)) = (place, pack) else {
                return Err(missing(id));
            };
            let entry = Entry {
                id,
                offset: place.offset,
                raw_len: place.raw_len,
                stored_len: place.stored_len,
            };
            (pack.id, entry)
        };
        let file = self.pack_file(pack)?;
        let path = pack::path(pack);
        let packed = pack::read_record(&*file, &path, &entry)?;
        self.verify(&packed, &path, decoder, into)?;
        Ok(packed)
    }

    pub(crate) fn verify(
        &self,
        packed: &Packed,
        path: &str,
        decoder: &mut Decompressor,
        into: &mut Vec<u8>,
    ) -> Result<()> {
        let damaged = |what| Error::ChunkDamaged {
            id: packed.id,
            path: path.to_owned(),
            what,
        };
        decoder
            .unpack(packed.encoding, packed.raw_len, &packed.bytes, into)
            .map_err(damaged)?;
        if self.namer.name(into) != packed.id {
            return Err(damaged("its content is not what its name says"));
        }
        Ok(())
    }

    /// A reader beside a writer may know packs that are gone, and not know new ones.
    fn load_packs_again(&self) -> Result<()> {
        if self.writable().is_err() {
            self.load_packs()?;
        }
        Ok(())
    }
}

fn missing(id: ChunkId) -> Error {
    Error::Io {
        action: "find chunk",
        path: id.to_string(),
        source: io::ErrorKind::NotFound.into(),
    }
}
