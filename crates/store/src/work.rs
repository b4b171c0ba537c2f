//! The threads of a writer: each takes a region, reads it, cuts it, names and compresses its chunks.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};
use std::thread;

use crate::codec::{Compressor, Packed};
use crate::cut::{self, REGION_PAGES};
use crate::error::{Error, Result};
use crate::id::ChunkId;
use crate::source::Source;
use crate::store::{Inner, locked};
use crate::{MAX_CHUNK, PAGE};

/// What a thread made of a region.
pub(crate) struct Cut {
    pub(crate) region: u64,
    pub(crate) chunks: Vec<Piece>,
}

pub(crate) struct Piece {
    pub(crate) id: ChunkId,
    pub(crate) pages: Vec<u64>,
    /// If it is not in the store yet.
    pub(crate) packed: Option<Packed>,
}

pub(crate) fn needs(
    inner: &Inner,
    writer: u64,
    pending: &Mutex<HashSet<ChunkId>>,
    id: ChunkId,
) -> bool {
    let mut pending = locked(pending);
    !inner.state().claim(writer, id) && pending.insert(id)
}

/// What the threads share.
pub(crate) struct Work<'a, S: ?Sized> {
    inner: Arc<Inner>,
    writer: u64,
    pending: Arc<Mutex<HashSet<ChunkId>>>,
    name: &'a str,
    source: &'a S,
    /// In pages.
    changed: &'a [Range<u64>],
    next: AtomicU64,
    pub(crate) stop: AtomicBool,
}

impl<'a, S: Source + ?Sized> Work<'a, S> {
    pub(crate) fn new(
        inner: Arc<Inner>,
        writer: u64,
        pending: Arc<Mutex<HashSet<ChunkId>>>,
        name: &'a str,
        source: &'a S,
        changed: &'a [Range<u64>],
    ) -> Self {
        Self {
            inner,
            writer,
            pending,
            name,
            source,
            changed,
            next: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        }
    }

    pub(crate) fn threads(&self, wanted: usize) -> usize {
        let regions = self
            .changed
            .last()
            .map_or(0, |last| last.end.div_ceil(REGION_PAGES));
        let most = usize::try_from(regions).unwrap_or(usize::MAX);
        let wanted = match wanted {
            0 => thread::available_parallelism().map_or(1, usize::from),
            wanted => wanted,
        };
        wanted.min(most).max(1)
    }

    #[allow(clippy::needless_pass_by_value)]
    pub(crate) fn run(&self, results: SyncSender<Result<Cut>>) {
        let mut compressor = match Compressor::new(self.inner.settings.level) {
            Ok(compressor) => compressor,
            Err(error) => {
                let _ = results.send(Err(error));
                return;
            }
        };
        let mut buffers = Buffers::default();
        while !self.stop.load(Ordering::Relaxed) {
            let region = match self.next_region() {
                Ok(Some(region)) => region,
                Ok(None) => return,
                Err(error) => {
                    let _ = results.send(Err(error));
                    return;
                }
            };
            let cut = self.cut(region, &mut compressor, &mut buffers);
            let failed = cut.is_err();
            let empty = cut.as_ref().is_ok_and(|cut| cut.chunks.is_empty());
            if (!empty && results.send(cut).is_err()) || failed {
                return;
            }
        }
    }

    /// The next region that has pages to look at; those before it have none.
    fn next_region(&self) -> Result<Option<u64>> {
        loop {
            let region = self.next.fetch_add(1, Ordering::Relaxed);
            let first = region.saturating_mul(REGION_PAGES);
            let from = self.changed.partition_point(|range| range.end <= first);
            let Some(range) = self.changed.get(from) else {
                return Ok(None);
            };
            if range.start >= first + REGION_PAGES {
                self.skip_to(range.start / REGION_PAGES);
                continue;
            }
            match self
                .source
                .next_data(first * PAGE)
                .map_err(|source| self.failed(source))?
            {
                None => return Ok(None),
                Some(data) if data.start >= (first + REGION_PAGES) * PAGE => {
                    self.skip_to(data.start / PAGE / REGION_PAGES);
                }
                Some(_) => return Ok(Some(region)),
            }
        }
    }

    fn skip_to(&self, region: u64) {
        self.next.fetch_max(region, Ordering::Relaxed);
    }

    fn failed(&self, source: std::io::Error) -> Error {
        Error::Source {
            name: self.name.to_owned(),
            source,
        }
    }

    fn cut(&self, region: u64, compressor: &mut Compressor, buffers: &mut Buffers) -> Result<Cut> {
        let first = region * REGION_PAGES;
        let from = self.changed.partition_point(|range| range.end <= first);
        buffers.data.resize(MAX_CHUNK, 0);
        buffers.pages.clear();
        for range in self.changed.get(from..).unwrap_or_default() {
            let pages = range.start.max(first)..range.end.min(first + REGION_PAGES);
            if pages.is_empty() {
                break;
            }
            self.read(first, &pages, buffers)?;
        }
        let slot_pages = u64::from(self.inner.settings.slot_bytes) / PAGE;
        let mut chunks = Vec::new();
        for pages in cut::chunks_of(&buffers.pages, slot_pages) {
            let run = match (pages.first(), pages.last()) {
                (Some(one), Some(last)) if last - one + 1 == pages.len() as u64 => Some(*one),
                _ => None,
            };
            let bytes = match run {
                Some(one) => buffers
                    .data
                    .get(span(one - first, pages.len() as u64))
                    .unwrap_or_default(),
                None => {
                    buffers.chunk.clear();
                    for page in &pages {
                        let bytes = buffers.data.get(span(page - first, 1));
                        buffers.chunk.extend_from_slice(bytes.unwrap_or_default());
                    }
                    &buffers.chunk
                }
            };
            let id = self.inner.namer.name(bytes);
            let new = needs(&self.inner, self.writer, &self.pending, id);
            let packed = new.then(|| compressor.pack(id, bytes)).transpose()?;
            chunks.push(Piece { id, pages, packed });
        }
        Ok(Cut { region, chunks })
    }

    /// Reads what of these pages is not a hole, and notes which are not zero.
    fn read(&self, first: u64, pages: &Range<u64>, buffers: &mut Buffers) -> Result<()> {
        let end = (pages.end * PAGE).min(self.source.length());
        let mut at = pages.start * PAGE;
        while at < end {
            let data = self
                .source
                .next_data(at)
                .map_err(|source| self.failed(source))?;
            let Some(data) = data.filter(|data| data.start < end && data.end > at) else {
                break;
            };
            // Whole pages, zero where the source has none: so that the last one is padded.
            let data = data.start.max(at) / PAGE..data.end.min(end).div_ceil(PAGE);
            let into = buffers
                .data
                .get_mut(span(data.start - first, data.end - data.start));
            let into = into.unwrap_or_default();
            let wanted = usize::try_from(end - data.start * PAGE).unwrap_or(usize::MAX);
            let (bytes, padding) = into.split_at_mut(wanted.min(into.len()));
            padding.fill(0);
            self.source
                .read(bytes, data.start * PAGE)
                .map_err(|source| self.failed(source))?;
            for page in data.clone() {
                let bytes = buffers.data.get(span(page - first, 1)).unwrap_or_default();
                if !cut::is_zero(bytes) {
                    buffers.pages.push(page);
                }
            }
            at = data.end * PAGE;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Buffers {
    /// The region, where it was read.
    data: Vec<u8>,
    chunk: Vec<u8>,
    /// Not zero, in rising order.
    pages: Vec<u64>,
}

/// Bytes of some pages in the buffer of a region.
fn span(page: u64, count: u64) -> Range<usize> {
    let from = page.saturating_mul(PAGE);
    let to = page.saturating_add(count).saturating_mul(PAGE);
    usize::try_from(from).unwrap_or(usize::MAX)..usize::try_from(to).unwrap_or(usize::MAX)
}
