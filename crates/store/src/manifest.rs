//! A snapshot's manifest: images, and which chunk holds which of their pages. Pure.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use prost::Message;

use crate::error::{Error, Result};
use crate::id::{ChunkId, SnapshotId};
use crate::proto;
use crate::{MAX_CHUNK, PAGE};

const MAX_IMAGES: usize = 256;
const MAX_PARENTS: usize = 64;
const MAX_LABELS: usize = 256;
const MAX_TEXT: usize = 4096;
/// Of the message, all kinds together; and bytes of one that is neither image nor list of chunks.
const MAX_FIELDS: usize = 1024;
const MAX_FIELD: u64 = 1 << 20;
/// Of all images: 200 MB in memory, and a page each of 32 GiB.
const MAX_EXTENTS: usize = 8 << 20;
/// 64 TiB: beyond any disk of a guest, and far from overflow.
const MAX_LENGTH: u64 = 1 << 46;

/// What an image is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// What the VMM serialises: vCPUs, devices.
    State,
    /// Guest RAM.
    Memory,
    /// A layer of a drive.
    Disk,
}

/// Some pages of an image, found one after another in a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First page in the image.
    pub page: u64,
    /// How many, at least one.
    pub pages: u32,
    /// Number of the chunk in [`Manifest::chunks`].
    pub chunk: u32,
    /// First page in the chunk.
    pub chunk_page: u32,
}

impl Extent {
    /// The page after the last one.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.page.saturating_add(self.pages as u64)
    }

    /// The part of it in these pages.
    fn within(&self, range: &Range<u64>) -> Option<Self> {
        let (from, to) = (self.page.max(range.start), self.end().min(range.end));
        if from >= to {
            return None;
        }
        let skipped = u32::try_from(from - self.page).ok()?;
        Some(Self {
            page: from,
            pages: u32::try_from(to - from).ok()?,
            chunk: self.chunk,
            chunk_page: self.chunk_page.checked_add(skipped)?,
        })
    }
}

/// A run of bytes with a name. What no extent covers is zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub name: String,
    pub kind: Kind,
    /// In bytes; the rest of the last page is zero.
    pub length: u64,
    /// In rising order, without overlap.
    pub extents: Vec<Extent>,
}

impl Image {
    /// How many pages it has, the last one perhaps in part.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.length.div_ceil(PAGE)
    }

    /// The extents in a range of pages, cut to it. All that is between them is zero.
    pub fn extents_in(&self, pages: Range<u64>) -> impl Iterator<Item = Extent> + '_ {
        let first = self
            .extents
            .partition_point(|extent| extent.end() <= pages.start);
        let rest = self.extents.get(first..).unwrap_or_default();
        rest.iter().map_while(move |extent| extent.within(&pages))
    }

    /// How many pages are not zero.
    #[must_use]
    pub fn data_pages(&self) -> u64 {
        self.extents
            .iter()
            .map(|extent| u64::from(extent.pages))
            .sum()
    }
}

/// What a machine must have to restore a snapshot; the store only keeps it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Requirements {
    pub architecture: String,
    /// Name of the CPUID baseline; `host` marks one that does not move between machines.
    pub cpu_baseline: String,
    pub memory_bytes: u64,
    pub vcpus: u32,
    /// Digests of read-only images that are not in the snapshot, by drive.
    pub base_images: BTreeMap<String, String>,
    /// Anything else. A restorer refuses names that it does not know.
    pub other: BTreeMap<String, String>,
}

/// One snapshot, complete in itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub id: SnapshotId,
    /// Since 1970, UTC.
    pub created_ms: u64,
    /// Information only.
    pub parents: Vec<SnapshotId>,
    pub labels: BTreeMap<String, String>,
    pub requirements: Requirements,
    pub images: Vec<Image>,
    pub chunks: Vec<ChunkId>,
}

impl Manifest {
    /// The image of that name.
    #[must_use]
    pub fn image(&self, name: &str) -> Option<&Image> {
        self.images.iter().find(|image| image.name == name)
    }

    /// As protobuf.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let requirements = self.requirements.clone();
        proto::Manifest {
            id: self.id.0.to_vec(),
            created_ms: self.created_ms,
            parents: self.parents.iter().map(|id| id.0.to_vec()).collect(),
            labels: self.labels.clone(),
            requirements: Some(proto::Requirements {
                architecture: requirements.architecture,
                cpu_baseline: requirements.cpu_baseline,
                memory_bytes: requirements.memory_bytes,
                vcpus: requirements.vcpus,
                base_images: requirements.base_images,
                other: requirements.other,
            }),
            images: self.images.iter().map(encode_image).collect(),
            chunks: self.chunks.iter().flat_map(|id| id.0).collect(),
        }
        .encode_to_vec()
    }

    /// From protobuf; `path` is for messages.
    ///
    /// # Errors
    /// If anything in it is not as the format says.
    pub fn decode(path: &str, bytes: &[u8]) -> Result<Self> {
        // Before protobuf makes something large of something small.
        if !is_frugal(bytes) {
            return Err(Error::damaged(
                path,
                "it has more or larger fields than any manifest",
            ));
        }
        let message = proto::Manifest::decode(bytes)
            .map_err(|error| Error::damaged(path, error.to_string()))?;
        checked(message).map_err(|what| Error::damaged(path, what))
    }

    /// Whether texts and counts are within what readers take.
    ///
    /// # Errors
    /// What is not.
    pub(crate) fn check(&self) -> Result<(), String> {
        check_texts(&self.labels, &self.requirements)?;
        if self.parents.len() > MAX_PARENTS || self.images.len() > MAX_IMAGES {
            return Err("too many parents or images".into());
        }
        Ok(())
    }
}

/// Whether that can be the name of an image or a tag: letters, digits, `.`, `_`, `-`, `:`; at most 128.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte))
}

pub(crate) fn labels_fit(labels: &BTreeMap<String, String>) -> bool {
    labels.len() <= MAX_LABELS
        && labels
            .iter()
            .all(|(name, value)| is_name(name) && value.len() <= MAX_TEXT)
}

fn check_texts(labels: &BTreeMap<String, String>, needs: &Requirements) -> Result<(), String> {
    for (what, map) in [
        ("label", labels),
        ("base image", &needs.base_images),
        ("requirement", &needs.other),
    ] {
        if !labels_fit(map) {
            return Err(format!("a {what} has a name or length that is not allowed"));
        }
    }
    if needs.architecture.len() > MAX_TEXT || needs.cpu_baseline.len() > MAX_TEXT {
        return Err("a requirement is too long".into());
    }
    Ok(())
}

/// Whether a message has few fields, and only the known large ones are large: an empty image is two bytes as
/// protobuf, and a hundred in memory.
fn is_frugal(mut bytes: &[u8]) -> bool {
    let mut fields = 0;
    while !bytes.is_empty() {
        fields += 1;
        let Some(tag) = take_varint(&mut bytes) else {
            return false;
        };
        let skip = match (tag >> 3, tag & 7) {
            (_, 0) => take_varint(&mut bytes).map(|_| 0),
            (_, 1) => Some(8),
            (_, 5) => Some(4),
            // Images and chunks; all else is small.
            (6 | 7, 2) => take_varint(&mut bytes),
            (_, 2) => take_varint(&mut bytes).filter(|length| *length <= MAX_FIELD),
            _ => None,
        };
        let skip = skip.and_then(|skip| usize::try_from(skip).ok());
        let Some(rest) = skip.and_then(|skip| bytes.get(skip..)) else {
            return false;
        };
        if fields > MAX_FIELDS {
            return false;
        }
        bytes = rest;
    }
    true
}

fn encode_image(image: &Image) -> proto::Image {
    let mut extents = Vec::with_capacity(image.extents.len() * 5);
    let (mut end, mut chunk) = (0, 0);
    for extent in &image.extents {
        let step = i64::from(extent.chunk) - chunk;
        put_varint(&mut extents, extent.page.wrapping_sub(end));
        put_varint(&mut extents, extent.pages.into());
        put_varint(&mut extents, (step << 1 ^ step >> 63).cast_unsigned());
        put_varint(&mut extents, extent.chunk_page.into());
        end = extent.end();
        chunk = extent.chunk.into();
    }
    proto::Image {
        name: image.name.clone(),
        kind: match image.kind {
            Kind::State => proto::Kind::State,
            Kind::Memory => proto::Kind::Memory,
            Kind::Disk => proto::Kind::Disk,
        }
        .into(),
        length: image.length,
        extents,
    }
}

fn checked(message: proto::Manifest) -> Result<Manifest, String> {
    let id = SnapshotId::from_slice(&message.id).ok_or("the id is not 16 bytes")?;
    let (chunks, rest) = message.chunks.as_chunks::<32>();
    if !rest.is_empty() {
        return Err("the list of chunks is cut off".into());
    }
    let chunks: Vec<_> = chunks.iter().map(|bytes| ChunkId(*bytes)).collect();
    let parents = message.parents.iter().map(|id| SnapshotId::from_slice(id));
    let parents: Option<Vec<_>> = parents.collect();
    let needs = message.requirements.unwrap_or_default();
    if message.images.len() > MAX_IMAGES {
        return Err("too many images".into());
    }
    let mut images = Vec::with_capacity(message.images.len());
    let mut names = HashSet::new();
    let mut extents = 0;
    for image in message.images {
        // Four bytes at least.
        extents += image.extents.len() / 4;
        if extents > MAX_EXTENTS {
            return Err("too many extents".into());
        }
        if !names.insert(image.name.clone()) {
            return Err(format!("two images are called {:?}", image.name));
        }
        images.push(checked_image(image, chunks.len())?);
    }
    let manifest = Manifest {
        id,
        created_ms: message.created_ms,
        parents: parents.ok_or("a parent's id is not 16 bytes")?,
        labels: message.labels,
        requirements: Requirements {
            architecture: needs.architecture,
            cpu_baseline: needs.cpu_baseline,
            memory_bytes: needs.memory_bytes,
            vcpus: needs.vcpus,
            base_images: needs.base_images,
            other: needs.other,
        },
        images,
        chunks,
    };
    manifest.check()?;
    Ok(manifest)
}

fn checked_image(image: proto::Image, chunks: usize) -> Result<Image, String> {
    if !is_name(&image.name) {
        return Err(format!("{:?} is no name for an image", image.name));
    }
    let bad = |what: &str| format!("image {}: {what}", image.name);
    let kind = match proto::Kind::try_from(image.kind) {
        Ok(proto::Kind::State) => Kind::State,
        Ok(proto::Kind::Memory) => Kind::Memory,
        Ok(proto::Kind::Disk) => Kind::Disk,
        _ => return Err(bad("its kind is not known")),
    };
    if image.length > MAX_LENGTH {
        return Err(bad("it is longer than any image may be"));
    }
    let mut bytes = &image.extents[..];
    let mut extents = Vec::with_capacity(bytes.len() / 8);
    let (mut end, mut last) = (0_u64, 0_i64);
    while !bytes.is_empty() {
        let mut next = || take_varint(&mut bytes).ok_or_else(|| bad("its extents are cut off"));
        let (gap, pages, step, chunk_page) = (next()?, next()?, next()?, next()?);
        let step = (step >> 1).cast_signed() ^ -(step & 1).cast_signed();
        let page = end.checked_add(gap);
        let chunk = last.checked_add(step);
        let known = chunk.and_then(|chunk| usize::try_from(chunk).ok());
        let stop = page.and_then(|page| page.checked_add(pages));
        let inside = chunk_page
            .checked_add(pages)
            .is_some_and(|end| end <= MAX_CHUNK as u64 / PAGE);
        let (Some(page), Some(chunk), Some(stop)) = (page, chunk, stop) else {
            return Err(bad("an extent's numbers are out of range"));
        };
        if pages == 0
            || !inside
            || stop > image.length.div_ceil(PAGE)
            || known.is_none_or(|known| known >= chunks)
        {
            return Err(bad("an extent lies outside"));
        }
        extents.push(Extent {
            page,
            pages: u32::try_from(pages).map_err(|_| bad("an extent is too long"))?,
            chunk: u32::try_from(chunk).map_err(|_| bad("there are too many chunks"))?,
            chunk_page: u32::try_from(chunk_page).map_err(|_| bad("an extent is too far"))?,
        });
        (end, last) = (stop, chunk);
    }
    Ok(Image {
        name: image.name,
        kind,
        length: image.length,
        extents,
    })
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return None;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// The extents of a parent with the changed pages taken out and the fresh ones put in.
///
/// `changed` and `fresh` are in rising order, and each of `fresh` lies in `changed`.
pub(crate) fn overlay(parent: &[Extent], changed: &[Range<u64>], fresh: &[Extent]) -> Vec<Extent> {
    let mut kept = Vec::with_capacity(parent.len() + fresh.len());
    let mut gaps = changed.iter().peekable();
    for extent in parent {
        let mut from = extent.page;
        while let Some(gap) = gaps.peek() {
            if gap.start >= extent.end() {
                break;
            }
            kept.extend(extent.within(&(from..gap.start)));
            from = from.max(gap.end);
            if gap.end > extent.end() {
                break;
            }
            gaps.next();
        }
        kept.extend(extent.within(&(from..extent.end())));
    }
    kept.extend_from_slice(fresh);
    kept.sort_unstable_by_key(|extent| extent.page);
    kept
}
