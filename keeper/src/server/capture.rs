//! From the files of a capture to a snapshot in the store, behind the resumed guest.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use belljar_layers::{LayerId, State, View};
use belljar_store::{
    self as store, FileSource, Kind, Options, Reader, Requirements, SnapshotId, Source, Writer,
};

use rustix::fs::MemfdFlags;

use super::names::{io_error, refusal};
use super::templates::Part;
use super::{Busy, Point, Shared, calls, locked, log};
use crate::images;
use crate::v1::{self, error::Code};

/// The machine that everything here runs on.
pub(super) const ARCHITECTURE: &str = "x86_64";
/// Room that is left when everything else fits.
const RESERVE: u64 = 16 << 20;
/// How long somebody waits for a snapshot that is still being made durable.
const PATIENCE: Duration = Duration::from_secs(600);

/// Snapshots under way.
#[derive(Default)]
pub(crate) struct Captures {
    pending: Mutex<HashMap<SnapshotId, Vec<String>>>,
    ended: Condvar,
}

impl Captures {
    /// Waits for those that a word may mean.
    pub(super) fn wait_for(&self, word: &str) {
        let meant = |pending: &mut HashMap<SnapshotId, Vec<String>>| {
            pending.iter().any(|(id, tags)| {
                tags.iter().any(|tag| tag == word)
                    || (word.len() >= 4 && id.to_string().starts_with(word))
            })
        };
        let pending = locked(&self.pending);
        drop(
            self.ended
                .wait_timeout_while(pending, PATIENCE, meant)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Those under way, as a list shows them.
    pub(super) fn list(&self) -> Vec<v1::Snapshot> {
        let pending = locked(&self.pending);
        let list = pending.iter().map(|(id, tags)| v1::Snapshot {
            id: id.to_string(),
            tags: tags.clone(),
            pending: true,
            ..v1::Snapshot::default()
        });
        list.collect()
    }

    fn begin(&self, id: SnapshotId, tags: Vec<String>) {
        locked(&self.pending).insert(id, tags);
    }

    fn end(&self, id: SnapshotId) {
        locked(&self.pending).remove(&id);
        self.ended.notify_all();
    }
}

/// The files of a capture.
pub(super) struct Files {
    pub(super) state: File,
    pub(super) memory: Option<File>,
    pub(super) disk: Option<File>,
    /// The disk, if it has layers; these come with Keep.
    pub(super) layers: Option<View<File>>,
    /// What memory, if it is captured, may be an increment of, and the disk; held, so that it is not removed
    /// meanwhile.
    pub(super) base: Option<Reader>,
}

/// Makes the files, if there is room for what will be in them.
pub(super) fn files(shared: &Shared, begin: &v1::Begin) -> Result<Files, v1::Error> {
    let wanted = begin.expected_bytes.saturating_add(RESERVE);
    if begin.in_memory {
        let [free] = memory(["MemAvailable:"]);
        enough(free, wanted, "the clones'")?;
    }
    let free = shared.templates.make_room(wanted);
    if free < wanted {
        return Err(refusal(
            Code::NoSpace,
            format!(
                "there are {} MiB of space where snapshots are kept, and this one may take {} MiB",
                free >> 20,
                wanted >> 20
            ),
        ));
    }
    let made = |file: io::Result<File>| file.map_err(io_error("make a file for the capture"));
    let nameless = || made(shared.templates.nameless());
    let machine = || match begin.in_memory {
        true => made(sealable("clones")),
        false => nameless(),
    };
    Ok(Files {
        state: machine()?,
        memory: (begin.memory_bytes > 0).then(machine).transpose()?,
        disk: (begin.disk_bytes > 0).then(nameless).transpose()?,
        layers: None,
        base: base(shared, begin),
    })
}

/// A disk from its base image and so many layers.
pub(super) fn layers(count: u32, files: Vec<OwnedFd>) -> Result<View<File>, v1::Error> {
    let invalid = |why: String| refusal(Code::Invalid, format!("the sandbox's disk: {why}"));
    let mut files = files.into_iter().map(File::from);
    let base = files.next();
    let layers: Vec<_> = (1_u32..)
        .zip(files)
        .map(|(number, file)| (file, format!("layer {number}")))
        .collect();
    let (Some(base), true) = (base, u32::try_from(layers.len()) == Ok(count)) else {
        return Err(invalid(format!(
            "{count} layers and their base image should have come"
        )));
    };
    let view = View::open(layers).and_then(|view| view.over(base, "the base image"));
    let view = view.map_err(|error| invalid(error.to_string()))?;
    if view.parent() != LayerId::BASE {
        return Err(invalid(
            "its lowest layer does not lie over a base image".to_owned(),
        ));
    }
    // What is written on could be of another instant by the time it is read.
    let mut written = view
        .layers()
        .iter()
        .filter(|layer| layer.state() != State::Frozen);
    match written.next() {
        Some(layer) => Err(invalid(format!("{} is not frozen", layer.name()))),
        None => Ok(view),
    }
}

/// A memfd that can be made immutable.
pub(super) fn sealable(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(rustix::fs::memfd_create(name, flags)?.into())
}

/// What is in no file needs memory, of which `free` bytes are available; `whose` it is.
pub(super) fn enough(free: Option<u64>, wanted: u64, whose: &str) -> Result<(), v1::Error> {
    let free = free.unwrap_or(u64::MAX);
    if free >= wanted {
        return Ok(());
    }
    Err(refusal(
        Code::NoMemory,
        format!(
            "{} MiB of this machine's memory are free, and {whose} may take {} MiB",
            free >> 20,
            wanted >> 20
        ),
    ))
}

/// Bytes of this machine's memory, by their names in `/proc/meminfo`.
pub(super) fn memory<const N: usize>(names: [&str; N]) -> [Option<u64>; N] {
    // All of it at once: the kernel counts anew for each part that is read.
    let mut text = String::with_capacity(8 << 10);
    let read = File::open("/proc/meminfo").and_then(|mut file| file.read_to_string(&mut text));
    names.map(|name| {
        read.as_ref().ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
        Some(kib.saturating_mul(1024))
    })
}

/// The snapshot that memory may be an increment of, if its memory is still here and whole. Without memory: any.
fn base(shared: &Shared, begin: &v1::Begin) -> Option<Reader> {
    if begin.base.is_empty() {
        return None;
    }
    shared.captures.wait_for(&begin.base);
    let reader = shared.store.read(begin.base.parse().ok()?).ok()?;
    if begin.memory_bytes == 0 {
        return Some(reader);
    }
    let length = reader.image(images::MEMORY).ok()?.length;
    let is_whole = length == begin.memory_bytes && reader.has_all(images::MEMORY).ok()?;
    is_whole.then_some(reader)
}

/// Where a file has data, in bytes.
fn data_ranges(source: &dyn Source) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut from = 0;
    while let Some(range) = source.next_data(from)? {
        from = range.end;
        ranges.push(range);
    }
    Ok(ranges)
}

/// How a capture ends.
pub(super) type Outcome = Result<v1::Kept, v1::Error>;

/// A capture that is being stored.
pub(super) struct Storing {
    /// The id that it will have.
    pub(super) id: SnapshotId,
    /// Its end is told here.
    pub(super) end: mpsc::Receiver<Outcome>,
    so_far: Arc<SoFar>,
}

impl Storing {
    /// How far it has come, in bytes.
    pub(super) fn progress(&self) -> v1::Progress {
        let total = self.so_far.total.load(Ordering::Relaxed);
        v1::Progress {
            done: self.so_far.done.load(Ordering::Relaxed).min(total),
            total,
        }
    }
}

/// Bytes of memory and disk that were read, of those that are there.
#[derive(Default)]
struct SoFar {
    done: AtomicU64,
    total: AtomicU64,
}

/// What is read of it is counted.
struct Counted<'a, S> {
    source: S,
    so_far: &'a SoFar,
}

impl<S: Source> Source for Counted<'_, S> {
    fn length(&self) -> u64 {
        self.source.length()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        self.source.next_data(from)
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.source.read(bytes, offset)?;
        let read = bytes.len() as u64;
        self.so_far.done.fetch_add(read, Ordering::Relaxed);
        Ok(())
    }
}

/// A disk of layers.
struct Layers<'a>(&'a View<File>);

impl Source for Layers<'_> {
    fn length(&self) -> u64 {
        self.0.size()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        self.0.next_data(from).map_err(io::Error::other)
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read(bytes, offset).map_err(io::Error::other)
    }
}

/// Bytes of a disk that may differ from those of a snapshot, if what that snapshot is of is one of the disk's layers:
/// what the layers over it have. Layers that went into one have the id of the highest of them. `None`: all may.
fn changed_since(base: &Reader, view: &View<File>) -> Option<Vec<Range<u64>>> {
    let length = base.image(images::DISK).ok()?.length;
    // What of it is lost is stored again with all the rest.
    if length != view.size() || !base.has_all(images::DISK).ok()? {
        return None;
    }
    let id = base.read_all(images::DISK_LAYER, LayerId::BASE.0.len());
    let id = LayerId(id.ok()?.try_into().ok()?);
    let at = view.layers().iter().position(|layer| layer.id() == id)?;
    let extents = view.extents_since(at + 1);
    let ranges = extents.map(|extent| extent.map(|e| e.offset..e.offset + e.length));
    ranges.collect::<Result<_, _>>().ok()
}

/// Begins to store a capture.
pub(super) fn keep(busy: Busy, files: Files, keep: v1::Keep) -> Result<Storing, v1::Error> {
    let shared = Arc::clone(busy.shared());
    let tags = keep.tags.clone();
    let began = Instant::now();
    let writer = shared.store.begin(options(&shared, &keep)?)?;
    let id = writer.id();
    let surroundings = &shared.surroundings;
    surroundings
        .at(Point::Accepted)
        .map_err(io_error("store the capture"))?;
    shared.captures.begin(id, tags);
    let (sender, end) = mpsc::channel();
    let so_far = Arc::new(SoFar::default());
    let count = Arc::clone(&so_far);
    let carry_out = move || {
        let shared = busy.shared();
        let ending = Ending(Arc::clone(shared), id);
        let outcome = store_all(writer, &files, &keep, &count).map(|stored| v1::Kept {
            id: id.to_string(),
            data_bytes: stored.data_bytes,
            new_bytes: stored.new_bytes,
            stored_bytes: stored.stored_bytes,
            took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        // What was captured is in files that others have open: they make room for one that is the keeper's own.
        drop(files);
        if let Err(error) = &outcome {
            log::line(&format!("snapshot {id} is lost: {}", error.message));
        }
        // It exists by now, whatever fails.
        let _ = shared.surroundings.at(Point::Kept);
        let parts = match (&outcome, keep.is_increment) {
            (Err(_), _) => &[][..],
            // All templates of a long series would be much; the one that is restored is made then.
            (Ok(_), true) => &[Part::Disk],
            (Ok(_), false) => &[Part::Memory, Part::Disk],
        };
        // Whoever wants to restore it now waits for these, and does not make them a second time; what is not made by
        // then it makes itself, at once: this thread may have little of the processor's time from here on.
        let turns: Vec<_> = parts
            .iter()
            .map(|part| shared.templates.turn(id, *part))
            .collect();
        let held: Vec<_> = parts
            .iter()
            .zip(turns.iter().map(|turn| turn.hold_ahead()))
            .collect();
        drop(ending);
        // Whoever asked may have gone.
        let _ = sender.send(outcome);
        // What nobody waits for yet must not take the time of guests, nor lengthen their pauses.
        let _ = rustix::process::setpriority_process(None, 10);
        for (part, turn) in held {
            calls::fill_ahead(shared, id, *part, &turn);
            drop(turn);
        }
        for turn in &turns {
            turn.wait_for_who_took_over();
        }
        calls::settle(shared, id);
    };
    let made = std::thread::Builder::new()
        .name("capture".to_owned())
        .spawn(carry_out);
    if let Err(error) = made {
        shared.captures.end(id);
        return Err(io_error("start a thread")(error));
    }
    Ok(Storing { id, end, so_far })
}

/// A capture that is under way until this is dropped, also by a panic.
struct Ending(Arc<Shared>, SnapshotId);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.captures.end(self.1);
    }
}

fn options(shared: &Shared, keep: &v1::Keep) -> Result<Options, v1::Error> {
    let mut base_images = std::collections::BTreeMap::new();
    for (drive, file) in &keep.base_files {
        let digest = shared.digests.of_used(file).map_err(|error| {
            let message = format!("the base image of drive '{drive}', {}: {error}", file.path);
            refusal(Code::Invalid, message)
        })?;
        base_images.insert(drive.clone(), digest);
    }
    let parents = keep.parents.iter().filter_map(|id| id.parse().ok());
    Ok(Options {
        parents: parents.collect(),
        labels: keep.labels.clone(),
        tags: keep.tags.clone(),
        pinned: keep.pinned,
        requirements: Requirements {
            architecture: ARCHITECTURE.to_owned(),
            cpu_baseline: keep.cpu_baseline.clone(),
            memory_bytes: keep.memory_bytes,
            vcpus: keep.vcpus,
            base_images,
            other: keep.requirements.clone(),
        },
        workers: 0,
    })
}

fn store_all(
    mut writer: Writer,
    files: &Files,
    keep: &v1::Keep,
    so_far: &SoFar,
) -> Result<store::Stored, v1::Error> {
    let source = |file: &File| {
        let again = file.try_clone().map_err(io_error("read the capture"))?;
        let source = FileSource::new(again).map_err(io_error("read the capture"))?;
        Ok::<_, v1::Error>(Counted { source, so_far })
    };
    let layers = files.layers.as_ref().map(|view| Counted {
        source: Layers(view),
        so_far,
    });
    let expect = |source: &dyn Source| {
        let data = data_ranges(source).map_err(io_error("read the capture"))?;
        let bytes = data.iter().map(|range| range.end - range.start).sum();
        so_far.total.fetch_add(bytes, Ordering::Relaxed);
        Ok::<_, v1::Error>(())
    };
    // Of what is large.
    for file in [&files.memory, &files.disk].into_iter().flatten() {
        expect(&source(file)?)?;
    }
    let changed = match (&files.layers, &files.base) {
        (Some(view), Some(base)) => changed_since(base, view).map(|ranges| (base, ranges)),
        _ => None,
    };
    match (&layers, &changed) {
        (Some(_), Some((_, ranges))) => {
            let bytes = ranges.iter().map(|range| range.end - range.start).sum();
            so_far.total.fetch_add(bytes, Ordering::Relaxed);
        }
        (Some(layers), None) => expect(layers)?,
        (None, _) => {}
    }
    let missing = |what: &str| refusal(Code::Invalid, format!("the capture has no {what}"));
    writer.image(images::SANDBOX, Kind::State, &keep.sandbox[..])?;
    if keep.has_memory {
        let memory = files.memory.as_ref().ok_or_else(|| missing("memory"))?;
        writer.image(images::STATE, Kind::State, &source(&files.state)?)?;
        let memory = source(memory)?;
        if keep.is_increment {
            let base = files.base.as_ref().ok_or_else(|| missing("base"))?;
            let changed = data_ranges(&memory).map_err(io_error("read the capture"))?;
            writer.image_changed(images::MEMORY, &memory, base, &changed)?;
        } else {
            writer.image(images::MEMORY, Kind::Memory, &memory)?;
        }
    }
    if keep.has_disk {
        if let Some(view) = &files.layers {
            writer.image(images::DISK_LAYER, Kind::State, &view.id().0[..])?;
        }
        match (&layers, &files.disk) {
            (Some(layers), _) => match &changed {
                Some((base, ranges)) => writer.image_changed(images::DISK, layers, base, ranges)?,
                None => writer.image(images::DISK, Kind::Disk, layers)?,
            },
            (None, Some(disk)) => writer.image(images::DISK, Kind::Disk, &source(disk)?)?,
            (None, None) => return Err(missing("disk")),
        }
    }
    let (id, stored) = writer.commit()?;
    log::line(&format!(
        "snapshot {id}: {} KiB, of these {} KiB new in {} KiB",
        stored.data_bytes >> 10,
        stored.new_bytes >> 10,
        stored.stored_bytes >> 10
    ));
    Ok(stored)
}
