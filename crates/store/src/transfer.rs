//! A snapshot as one stream: out of one store, into another, whose key is another. A stream that broke off goes
//! on at any record.
//!
//! Nothing in a stream is believed: chunks are named in it by plain BLAKE3, its last frame lists them all, and
//! only when that has come, and fits what was received, is there a snapshot.

use std::io::{Read, Write};

use prost::Message;

use crate::codec::{Compressor, Decompressor, Encoding, Packed};
use crate::envelope::{self, Kind};
use crate::error::{Error, Result};
use crate::fs::Fs;
use crate::id::{ChunkId, SnapshotId};
use crate::manifest::Manifest;
use crate::read::Reader;
use crate::store::{Store, manifest_path};
use crate::write::{Options, Stored, Writer};
use crate::{MAX_CHUNK, proto};

const MAGIC: &[u8; 8] = b"BELLJARX";
const VERSION: u32 = 1;
const HEAD: u8 = 1;
const CHUNK: u8 = 2;
const MANIFEST: u8 = 3;
/// Most bytes of a frame of each kind.
const LIMITS: [usize; 4] = [0, 4 << 10, MAX_CHUNK + CHUNK_HEAD, 64 << 20];
/// Of a chunk frame, before the stored bytes: encoding, three zeros, length, name.
const CHUNK_HEAD: usize = 40;
/// What was received is made durable after so many bytes: as much is sent again at most.
const DURABLE_EVERY: u64 = 32 << 20;
/// No manifest has more chunks.
const MAX_RECORDS: u64 = 1 << 21;

/// What an import did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Imported {
    /// It is in the list now.
    New(SnapshotId, Stored),
    /// It was in the list before; no more of the stream was read.
    Known(SnapshotId),
}

impl Store {
    /// Writes a snapshot as a stream, from chunk record `first` on (0 is all; [`Store::received`] of the other
    /// store tells). `progress` is told the records done and all.
    ///
    /// # Errors
    /// As [`Reader::read`] for any chunk; [`Error::Stream`] if `first` is beyond the end; [`Error::Sink`] with
    /// what the writer says and the record's number.
    pub fn export(
        &self,
        id: SnapshotId,
        first: u64,
        out: &mut dyn Write,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<()> {
        let reader = self.read(id)?;
        let records = reader.manifest().chunks.len() as u64;
        if first > records {
            return Err(Error::Stream(format!(
                "the snapshot has {records} records, fewer than {first}"
            )));
        }
        let sent = |record: u64| {
            move |source| Error::Sink {
                offset: record,
                source,
            }
        };
        let names = self.plain_names(&reader)?;
        let manifest = plain(reader.manifest(), names.clone()).encode();
        let head = proto::StreamHead {
            version: VERSION,
            stream: blake3::hash(&manifest).as_bytes().to_vec(),
            snapshot: id.0.to_vec(),
            first,
            records,
        };
        out.write_all(MAGIC).map_err(sent(first))?;
        send(out, HEAD, &[&head.encode_to_vec()]).map_err(sent(first))?;
        let (mut decoder, mut bytes) = (Decompressor::new()?, Vec::new());
        let chunks = reader.manifest().chunks.iter().zip(&names);
        for (record, (id, name)) in (0..)
            .zip(chunks)
            .skip(usize::try_from(first).unwrap_or(usize::MAX))
        {
            let packed = self.inner.chunk(*id, &mut decoder, &mut bytes)?;
            let length = packed.raw_len.to_le_bytes();
            let parts: [&[u8]; 4] = [
                &[packed.encoding.code(), 0, 0, 0],
                &length,
                &name.0,
                &packed.bytes,
            ];
            send(out, CHUNK, &parts).map_err(sent(record))?;
            progress(record + 1, records);
        }
        send(out, MANIFEST, &[&manifest]).map_err(sent(records))?;
        out.flush().map_err(sent(records))
    }

    /// Names that do not tell anything about the key.
    fn plain_names(&self, reader: &Reader) -> Result<Vec<ChunkId>> {
        let (mut decoder, mut bytes) = (Decompressor::new()?, Vec::new());
        let name = |id: &ChunkId| {
            self.inner.chunk(*id, &mut decoder, &mut bytes)?;
            Ok(plain_name(&bytes))
        };
        reader.manifest().chunks.iter().map(name).collect()
    }

    /// How many records of that snapshot an unfinished import has made durable here: where to go on.
    #[must_use]
    pub fn received(&self, id: SnapshotId) -> u64 {
        let incoming = Incoming::load(&*self.inner.fs, id);
        let state = self.inner.state();
        let here = incoming
            .received
            .iter()
            .take_while(|(_, chunk)| state.index.contains_key(chunk));
        here.count() as u64
    }

    /// Takes a snapshot from a stream. If that breaks off, what came is kept for a week, and the next import of
    /// the same snapshot may begin at the record that [`Store::received`] tells, or before it.
    ///
    /// # Errors
    /// [`Error::Stream`] for what is not as it should be; [`Error::StreamGap`]; as [`Writer::commit`].
    pub fn import(
        &self,
        stream: &mut dyn Read,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Imported> {
        self.inner.writable()?;
        let head = read_head(stream)?;
        let id = SnapshotId::from_slice(&head.snapshot)
            .ok_or_else(|| bad("its snapshot has no good id"))?;
        if self.inner.snapshot_ids()?.binary_search(&id).is_ok() {
            // Durable too, if an earlier attempt could not make it so.
            self.inner.sync_dir("manifests")?;
            return Ok(Imported::Known(id));
        }
        let mut receiver = Receiver::begin(self, id, &head)?;
        let mut frame = Vec::new();
        for record in head.first..head.records {
            if receive(stream, &mut frame)? != CHUNK {
                return Err(bad("a chunk is missing"));
            }
            receiver.chunk(record, &frame)?;
            progress(record + 1, head.records);
        }
        if receive(stream, &mut frame)? != MANIFEST {
            return Err(bad("it does not end with a manifest"));
        }
        receiver.finish(&head, &frame)
    }
}

fn bad(what: &str) -> Error {
    Error::Stream(what.to_owned())
}

fn plain_name(bytes: &[u8]) -> ChunkId {
    ChunkId(*blake3::hash(bytes).as_bytes())
}

/// The manifest with other names for its chunks.
fn plain(manifest: &Manifest, names: Vec<ChunkId>) -> Manifest {
    Manifest {
        chunks: names,
        ..manifest.clone()
    }
}

/// Kind, length, payload, BLAKE3 of these.
fn send(out: &mut dyn Write, kind: u8, parts: &[&[u8]]) -> std::io::Result<()> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut head = vec![kind, 0, 0, 0];
    head.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    let mut sum = blake3::Hasher::new();
    for part in [&[&head[..]], parts].concat() {
        sum.update(part);
        out.write_all(part)?;
    }
    out.write_all(sum.finalize().as_bytes())
}

/// A frame's payload, and its kind.
fn receive(stream: &mut dyn Read, frame: &mut Vec<u8>) -> Result<u8> {
    let mut head = [0; 8];
    fill(stream, &mut head)?;
    let [kind, 0, 0, 0, a, b, c, d] = head else {
        return Err(bad("a frame begins as none does"));
    };
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    let limit = LIMITS.get(usize::from(kind)).copied().unwrap_or(0);
    if length > limit || length == 0 {
        return Err(bad("a frame is of an unknown kind, or too long"));
    }
    // Grows with what really comes, not with what is promised.
    frame.clear();
    let got = stream
        .take(length as u64)
        .read_to_end(frame)
        .map_err(|error| broken(&error))?;
    let mut sum = [0; 32];
    fill(stream, &mut sum)?;
    let mut found = blake3::Hasher::new();
    found.update(&head).update(frame);
    if got != length || *found.finalize().as_bytes() != sum {
        return Err(bad("a frame's checksum does not match"));
    }
    Ok(kind)
}

/// Encoding, length, name, and stored bytes.
fn chunk_frame(frame: &[u8]) -> Option<(Encoding, u32, ChunkId, &[u8])> {
    let (head, stored) = frame.split_at_checked(CHUNK_HEAD)?;
    let [code, 0, 0, 0, a, b, c, d, name @ ..] = head else {
        return None;
    };
    let length = u32::from_le_bytes([*a, *b, *c, *d]);
    Some((
        Encoding::of(*code)?,
        length,
        ChunkId::from_slice(name)?,
        stored,
    ))
}

/// Reads a stream as an import does, without a store.
pub(crate) fn probe(mut stream: &[u8]) {
    let stream: &mut dyn Read = &mut stream;
    let (Ok(_), Ok(mut decoder)) = (read_head(stream), Decompressor::new()) else {
        return;
    };
    let (mut frame, mut bytes) = (Vec::new(), Vec::new());
    while let Ok(kind) = receive(stream, &mut frame) {
        if kind == MANIFEST {
            let _ = Manifest::decode("the stream's manifest", &frame);
        } else if let Some((encoding, length, _, stored)) = chunk_frame(&frame) {
            let _ = decoder.unpack(encoding, length, stored, &mut bytes);
        }
    }
}

fn fill(stream: &mut dyn Read, bytes: &mut [u8]) -> Result<()> {
    stream.read_exact(bytes).map_err(|error| broken(&error))
}

fn broken(error: &std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::UnexpectedEof {
        return bad("it ends too early");
    }
    Error::Stream(format!("it cannot be read: {error}"))
}

fn read_head(stream: &mut dyn Read) -> Result<proto::StreamHead> {
    let mut magic = [0; 8];
    fill(stream, &mut magic)?;
    if &magic != MAGIC {
        return Err(bad("it is not an exported snapshot"));
    }
    let mut frame = Vec::new();
    if receive(stream, &mut frame)? != HEAD {
        return Err(bad("it does not begin with a head"));
    }
    let head =
        proto::StreamHead::decode(&frame[..]).map_err(|error| Error::Stream(error.to_string()))?;
    if head.version != VERSION {
        return Err(Error::Version {
            path: "the stream".into(),
            found: head.version,
            known: VERSION,
        });
    }
    if head.first > head.records || head.records > MAX_RECORDS || head.stream.len() != 32 {
        return Err(bad("the numbers in its head cannot be"));
    }
    Ok(head)
}

/// What of a stream is here, durably.
#[derive(Default)]
struct Incoming {
    stream: Vec<u8>,
    started_ms: u64,
    /// The records' names in the stream, and here.
    received: Vec<(ChunkId, ChunkId)>,
}

impl Incoming {
    fn path(id: SnapshotId) -> String {
        format!("incoming/{id}")
    }

    /// Nothing, if it cannot be read: then the import begins anew.
    fn load(fs: &dyn Fs, id: SnapshotId) -> Self {
        let read = envelope::read(fs, Kind::Incoming, &Self::path(id)).ok();
        let Some(message) = read.and_then(|bytes| proto::Incoming::decode(&bytes[..]).ok()) else {
            return Self::default();
        };
        let theirs = message.stream_names.as_chunks::<32>().0.iter();
        let ours = message.chunks.as_chunks::<32>().0.iter();
        Self {
            stream: message.stream,
            started_ms: message.started_ms,
            received: theirs
                .zip(ours)
                .map(|(a, b)| (ChunkId(*a), ChunkId(*b)))
                .collect(),
        }
    }

    fn save(&self, fs: &dyn Fs, id: SnapshotId) -> Result<()> {
        let message = proto::Incoming {
            stream: self.stream.clone(),
            started_ms: self.started_ms,
            stream_names: self
                .received
                .iter()
                .flat_map(|(theirs, _)| theirs.0)
                .collect(),
            chunks: self.received.iter().flat_map(|(_, ours)| ours.0).collect(),
        };
        let temporary = format!("tmp/incoming-{id}");
        envelope::write(
            fs,
            Kind::Incoming,
            &Self::path(id),
            &temporary,
            &message.encode_to_vec(),
        )
    }
}

/// An import under way.
struct Receiver<'a> {
    store: &'a Store,
    id: SnapshotId,
    writer: Writer,
    incoming: Incoming,
    decoder: Decompressor,
    compressor: Compressor,
    bytes: Vec<u8>,
    /// Appended since the last time that all was made durable.
    loose: u64,
}

impl<'a> Receiver<'a> {
    fn begin(store: &'a Store, id: SnapshotId, head: &proto::StreamHead) -> Result<Self> {
        let fs = &*store.inner.fs;
        let have = store.received(id);
        let mut incoming = Incoming::load(fs, id);
        if incoming.stream != head.stream {
            incoming = Incoming {
                stream: head.stream.clone(),
                started_ms: fs.now_ms(),
                received: Vec::new(),
            };
        }
        incoming
            .received
            .truncate(usize::try_from(have).unwrap_or(usize::MAX));
        let have = incoming.received.len() as u64;
        if head.first > have {
            return Err(Error::StreamGap {
                first: head.first,
                have,
            });
        }
        let writer = store.begin_as(id, fs.now_ms(), Options::default())?;
        for (_, chunk) in &incoming.received {
            if writer.needs(*chunk) {
                return Err(Error::ChunkMissing(*chunk));
            }
        }
        Ok(Self {
            store,
            id,
            writer,
            incoming,
            decoder: Decompressor::new()?,
            compressor: Compressor::new(store.inner.settings.level)?,
            bytes: Vec::new(),
            loose: 0,
        })
    }

    fn chunk(&mut self, record: u64, frame: &[u8]) -> Result<()> {
        let (encoding, length, name, stored) =
            chunk_frame(frame).ok_or_else(|| bad("a chunk's frame is not one"))?;
        self.decoder
            .unpack(encoding, length, stored, &mut self.bytes)
            .map_err(|what| Error::Stream(format!("record {record}: {what}")))?;
        if plain_name(&self.bytes) != name {
            return Err(Error::Stream(format!(
                "record {record} is not what its name says"
            )));
        }
        if usize::try_from(record).is_ok_and(|record| record < self.incoming.received.len()) {
            return Ok(());
        }
        let id = self.store.inner.namer.name(&self.bytes);
        if self.writer.needs(id) {
            // A stored form that is longer than the chunk is possible for a stream, and not for a pack.
            let packed = if stored.len() <= self.bytes.len() {
                Packed {
                    id,
                    encoding,
                    raw_len: length,
                    bytes: stored.to_vec(),
                }
            } else {
                self.compressor.pack(id, &self.bytes)?
            };
            self.writer.append(&packed)?;
            self.loose += packed.bytes.len() as u64;
        }
        self.incoming.received.push((name, id));
        if self.loose >= DURABLE_EVERY.min(self.store.inner.settings.pack_bytes) {
            self.keep()?;
        }
        Ok(())
    }

    /// Makes durable what came so far.
    fn keep(&mut self) -> Result<()> {
        self.writer.seal()?;
        self.store.inner.sync_dir("packs")?;
        self.incoming.save(&*self.store.inner.fs, self.id)?;
        self.store.inner.sync_dir("incoming")?;
        self.loose = 0;
        Ok(())
    }

    fn finish(mut self, head: &proto::StreamHead, frame: &[u8]) -> Result<Imported> {
        let manifest = Manifest::decode("the stream's manifest", frame)?;
        let received = &self.incoming.received;
        let same = manifest
            .chunks
            .iter()
            .eq(received.iter().map(|(theirs, _)| theirs));
        if blake3::hash(frame).as_bytes()[..] != head.stream || manifest.id != self.id || !same {
            return Err(bad("its manifest does not fit what was received"));
        }
        let chunks = received.iter().map(|(_, ours)| *ours).collect();
        self.writer.set_manifest(Manifest { chunks, ..manifest });
        // Extents beyond the end of a chunk would be noticed too late.
        self.writer.check_extents()?;
        let (id, stored) = self.writer.commit()?;
        let fs = &self.store.inner.fs;
        if self.store.inner.fs.open(&manifest_path(id)).is_ok() {
            // Otherwise it is forgotten after a week.
            let _ = fs.remove(&Incoming::path(id));
        }
        Ok(Imported::New(id, stored))
    }
}
