//! Calls about what is stored.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use belljar_store::{Imported, Reader, Sink, Snapshot, SnapshotId};
use rustix::fs::SealFlags;

use super::attended::Attended;
use super::capture::{ARCHITECTURE, sealable};
use super::hot::Hot;
use super::names::{io_error, refusal, snapshot};
use super::quiet::Quiet;
use super::session::Answered;
use super::templates::{Held, Part, read_only};
use super::{Busy, Point, Shared, check, log, touched};
use crate::images;
use crate::v1::{self, error::Code, reply::Result as Answer, request::Call};

/// Longest state of a VMM, and longest record of a sandbox.
const SMALL: usize = 4 << 20;
/// Snapshots that are said to stay, at most: a message has an end.
const MAX_KEPT: usize = 1000;
/// With less room than this, a collection removes templates, too.
const LOW_SPACE: u64 = 512 << 20;
/// Room that is left when everything else fits.
const RESERVE: u64 = 16 << 20;

/// Carries out a call; `meanwhile` sends what goes before the answer, and is false when nobody takes it.
pub(super) fn answer(
    shared: &Arc<Shared>,
    call: Call,
    descriptors: Vec<OwnedFd>,
    caller: Option<UnixStream>,
    meanwhile: &mut dyn FnMut(Answer) -> bool,
) -> Answered {
    let plain = |answer| Ok((answer, Vec::new()));
    match call {
        Call::Open(open) => self::open(shared, &open),
        Call::Record(record) => self::record(shared, &record, descriptors),
        Call::List(_) => list(shared, meanwhile),
        Call::Describe(call) => {
            let reader = read(shared, &call.snapshot)?;
            plain(Answer::Description(describe(shared, &reader)?))
        }
        Call::Remove(call) => {
            let id = find(shared, &call.snapshot)?;
            shared.store.remove(id, &ids(&call.live))?;
            // It is gone by now, whatever fails.
            let _ = shared.surroundings.at(Point::Removed);
            forget(shared, id);
            plain(Answer::Done(v1::Done {}))
        }
        Call::Mark(call) => mark(shared, call),
        Call::Usage(_) => usage(shared, meanwhile),
        Call::Verify(_) => verify(shared, meanwhile),
        Call::Collect(call) => collect(shared, &call),
        Call::SetBudget(call) => {
            if let Some(bytes) = call.store_bytes {
                shared.store.set_budget(bytes)?;
            }
            plain(Answer::Done(v1::Done {}))
        }
        Call::Export(call) => export(shared, &call, attended(descriptors, caller), meanwhile),
        Call::Import(call) => import(shared, &call, attended(descriptors, caller), meanwhile),
        Call::Ping(_) | Call::Begin(_) | Call::Keep(_) | Call::Settle(_) => {
            Err(refusal(Code::Invalid, "this call belongs to a capture"))
        }
    }
}

fn record(shared: &Shared, call: &v1::Record, descriptors: Vec<OwnedFd>) -> Answered {
    let id = find(shared, &call.snapshot)?;
    let file = descriptors.into_iter().next().map(File::from);
    // Whatever it is read from, nobody is made to wait.
    let file = file.filter(|file| file.metadata().is_ok_and(|is| is.is_file()));
    let mut file = file.ok_or_else(|| refusal(Code::Invalid, "a file belongs to this call"))?;
    let kept = file
        .rewind()
        .and_then(|()| shared.recordings.keep(id, &file));
    kept.map_err(io_error("keep a recording"))?;
    Ok((Answer::Done(v1::Done {}), Vec::new()))
}

/// Removes what is kept beside the store of a snapshot.
fn forget(shared: &Shared, id: SnapshotId) {
    shared.templates.remove(id);
    shared.hot.remove(id);
    shared.ready.forget(id);
    shared.recordings.remove(id);
    touched::remove(&shared.touched, id);
}

fn ids(texts: &[String]) -> HashSet<SnapshotId> {
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}

/// The snapshot that a word means; one that is still being stored is waited for.
fn find(shared: &Shared, word: &str) -> Result<SnapshotId, v1::Error> {
    shared.captures.wait_for(word);
    Ok(shared.store.find(word)?)
}

fn read(shared: &Shared, word: &str) -> Result<Reader, v1::Error> {
    let id = find(shared, word)?;
    Ok(shared.store.read(id)?)
}

fn listed(shared: &Shared, id: SnapshotId) -> Result<Option<Snapshot>, v1::Error> {
    let all = shared.store.list()?;
    Ok(all.into_iter().find(|snapshot| snapshot.id == id))
}

fn list(shared: &Shared, meanwhile: &mut dyn FnMut(Answer) -> bool) -> Answered {
    let stored = shared.store.list()?.into_iter().map(snapshot);
    for item in stored.chain(shared.captures.list()) {
        if !meanwhile(Answer::Item(item)) {
            break;
        }
    }
    Ok((Answer::Done(v1::Done {}), Vec::new()))
}

fn describe(shared: &Shared, reader: &Reader) -> Result<v1::Description, v1::Error> {
    let manifest = reader.manifest();
    let needs = &manifest.requirements;
    let sandbox = match manifest.image(images::SANDBOX) {
        Some(_) => reader.read_all(images::SANDBOX, SMALL)?,
        None => Vec::new(),
    };
    Ok(v1::Description {
        snapshot: listed(shared, manifest.id)?.map(snapshot),
        sandbox,
        architecture: needs.architecture.clone(),
        cpu_baseline: needs.cpu_baseline.clone(),
        memory_bytes: needs.memory_bytes,
        vcpus: needs.vcpus,
        base_images: needs.base_images.clone(),
        requirements: needs.other.clone(),
        images: manifest
            .images
            .iter()
            .map(|image| v1::Image {
                name: image.name.clone(),
                kind: format!("{:?}", image.kind).to_lowercase(),
                length: image.length,
                data_bytes: image.data_pages().saturating_mul(belljar_store::PAGE),
                extents: image.extents.len() as u64,
            })
            .collect(),
        has_template: reader.image(images::MEMORY).is_ok_and(|memory| {
            let templates = &shared.templates;
            templates
                .get(manifest.id, Part::Memory, memory.length)
                .is_some()
        }),
    })
}

fn open(shared: &Arc<Shared>, call: &v1::Open) -> Answered {
    let reader = Arc::new(read(shared, &call.snapshot)?);
    let manifest = reader.manifest();
    let id = manifest.id;
    if manifest.requirements.architecture != ARCHITECTURE {
        return Err(refusal(
            Code::Invalid,
            format!(
                "snapshot {id} is of a machine of architecture {}, and this is {ARCHITECTURE}",
                manifest.requirements.architecture
            ),
        ));
    }
    let mut opened = v1::Opened {
        base_images: base_images(shared, &reader, &call.candidates)?,
        description: Some(describe(shared, &reader)?),
        has_memory: manifest.image(images::MEMORY).is_some() && !call.disk_only,
        has_disk: manifest.image(images::DISK).is_some(),
        hot: true,
        lazy: false,
        ready: false,
        has_working_set: false,
        wants_working_set: false,
    };
    let mut descriptors = Vec::new();
    let (mut handler, mut set, mut ready) = (None, None, None);
    let mut is_template_new = false;
    if opened.has_memory {
        descriptors.push(state(&reader)?);
        let here = memory_now(shared, &reader)?;
        if call.lazy && here.is_none() {
            // Where that cannot be, it is made first.
            handler = lazily(shared, &reader).inspect_err(not_lazy).ok();
        }
        let (memory, was_there) = match (here, &mut handler) {
            (Some(memory), _) => (memory, true),
            (None, Some((memory, _))) => {
                (read_only(memory).map_err(io_error("share memory"))?, false)
            }
            (None, None) => {
                is_template_new = true;
                template(shared, &reader, Part::Memory, None)?
            }
        };
        opened.hot = was_there;
        opened.lazy = handler.is_some();
        if !opened.lazy {
            set = shared.recordings.get(id);
            opened.has_working_set = set.is_some();
            opened.wants_working_set = set.is_none();
        }
        if let Some(programs) = &call.programs {
            let complete = (!opened.lazy).then_some(&memory);
            let vcpus = manifest.requirements.vcpus;
            let needs = complete.map(|memory| (memory, set.as_ref()));
            let system = &*shared.surroundings;
            ready = shared.ready.restoring(id, vcpus, programs, needs, system);
        }
        descriptors.push(memory.into());
    }
    if opened.has_disk {
        let (disk, was_there) = template(shared, &reader, Part::Disk, None)?;
        opened.hot &= was_there;
        is_template_new |= !was_there;
        descriptors.push(disk.into());
    }
    descriptors.extend(handler.map(|(_, socket)| socket));
    descriptors.extend(set.map(OwnedFd::from));
    opened.ready = ready.is_some();
    descriptors.extend(ready.into_iter().flat_map(|(socket, pid)| [socket, pid]));
    // Whoever fills memory behind a guest settles what comes of it.
    if is_template_new {
        settle_later(shared, id);
    }
    Ok((Answer::Opened(opened), descriptors))
}

/// Memory that comes while the guest runs, and the socket of who brings it.
fn lazily(shared: &Arc<Shared>, reader: &Arc<Reader>) -> Result<(File, OwnedFd), v1::Error> {
    shared.lazies.open(shared, Arc::clone(reader))
}

fn not_lazy(error: &v1::Error) {
    log::line(&format!("a template is made first: {}", error.message));
}

/// A complete template of memory; one that is being made is waited for, or made here if that was ahead of time.
fn memory_now(shared: &Arc<Shared>, reader: &Reader) -> Result<Option<File>, v1::Error> {
    let length = reader.image(images::MEMORY)?.length;
    let id = reader.manifest().id;
    let turn = shared.templates.turn(id, Part::Memory);
    let held = turn.hold();
    let template = match shared.templates.get(id, Part::Memory, length) {
        Some(template) => template,
        None if held.was_given_up() => template(shared, reader, Part::Memory, Some(&held))?.0,
        None => {
            shared.hot.remove(id);
            return Ok(None);
        }
    };
    let hot = shared.hot.get(id);
    if hot.is_none() {
        Hot::begin(shared, id, &template);
    }
    Ok(Some(hot.unwrap_or(template)))
}

/// Makes a template of what is complete elsewhere; what fails is only not cached.
pub(super) fn keep_template(
    shared: &Shared,
    reader: &Reader,
    part: Part,
    fill: impl FnOnce(&File) -> io::Result<()>,
) {
    let id = reader.manifest().id;
    let kept = reader.image(part.image()).map_err(v1::Error::from);
    let kept = kept.and_then(|image| {
        let data = image.data_pages().saturating_mul(belljar_store::PAGE);
        room_for(shared, data)?;
        let made = shared.templates.get_or_fill(id, part, image.length, fill);
        made.map(drop).map_err(io_error("write a template"))
    });
    if let Err(error) = kept {
        log::line(&format!("no template of snapshot {id}: {}", error.message));
    }
}

/// Each base image must be there with the content that it had.
fn base_images(
    shared: &Shared,
    reader: &Reader,
    candidates: &[v1::BaseImage],
) -> Result<std::collections::BTreeMap<String, String>, v1::Error> {
    let mut chosen = std::collections::BTreeMap::new();
    for (drive, wanted) in &reader.manifest().requirements.base_images {
        let mut tried = Vec::new();
        for candidate in candidates.iter().filter(|image| image.drive == *drive) {
            match shared.digests.of(Path::new(&candidate.path)) {
                Ok(digest) if digest == *wanted => {
                    chosen.insert(drive.clone(), candidate.path.clone());
                    break;
                }
                Ok(_) => tried.push(format!("{} has another content", candidate.path)),
                Err(error) => tried.push(format!("{}: {error}", candidate.path)),
            }
        }
        if !chosen.contains_key(drive) {
            let tried = match tried.as_slice() {
                [] => "no file was named".to_owned(),
                tried => tried.join("; "),
            };
            return Err(refusal(
                Code::BaseImage,
                format!("the base image of drive '{drive}' is missing: {tried}"),
            ));
        }
    }
    Ok(chosen)
}

/// The VMM's state in a file of its own.
fn state(reader: &Reader) -> Result<OwnedFd, v1::Error> {
    let bytes = reader.read_all(images::STATE, SMALL)?;
    let made = || -> io::Result<File> {
        let mut file = sealable("state")?;
        file.write_all(&bytes)?;
        file.rewind()?;
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        read_only(&file)
    };
    Ok(made().map_err(io_error("hand over the state"))?.into())
}

/// Makes a template before somebody asks for it.
pub(super) fn fill_ahead(shared: &Shared, id: SnapshotId, part: Part, held: &Held<'_>) {
    let filled = shared.store.read(id).map_err(v1::Error::from);
    let filled = filled.and_then(|reader| match reader.manifest().image(part.image()) {
        Some(_) => template(shared, &reader, part, Some(held)).map(drop),
        None => Ok(()),
    });
    if let Err(error) = filled
        && !held.was_given_up()
    {
        log::line(&format!("no template of snapshot {id}: {}", error.message));
    }
}

/// Where a template's bytes go, as long as whoever fills it is not to give way; not while a guest stands still, if it is
/// filled ahead.
struct Giving<'a> {
    file: &'a File,
    ahead: Option<(&'a Held<'a>, &'a Quiet)>,
}

impl Sink for Giving<'_> {
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if let Some((held, quiet)) = self.ahead {
            quiet.wait(|| held.go_on())?;
        }
        self.file.write_all_at(bytes, offset)
    }
}

/// A complete image as a file; made from chunks if there is none.
fn template(
    shared: &Shared,
    reader: &Reader,
    part: Part,
    held: Option<&Held<'_>>,
) -> Result<(File, bool), v1::Error> {
    let image = reader.image(part.image())?;
    let data = image.data_pages().saturating_mul(belljar_store::PAGE);
    let ahead = held.map(|held| (held, &*shared.quiet));
    let fill = |file: &File| {
        room_for(shared, data).map_err(Refused)?;
        reader
            .restore(part.image(), &Giving { file, ahead }, 0)
            .map_err(|error| Refused(error.into()))?;
        Ok(())
    };
    let (templates, id, length) = (&shared.templates, reader.manifest().id, image.length);
    let made = match held {
        Some(held) => templates.get_or_fill_held(id, part, length, held, fill),
        None => templates.get_or_fill(id, part, length, fill),
    };
    made.map_err(|Refused(error)| error)
}

/// Templates that are not needed make room for another one.
fn room_for(shared: &Shared, data: u64) -> Result<(), v1::Error> {
    let wanted = data.saturating_add(RESERVE);
    let mut free = shared.templates.make_room(wanted);
    // They keep files that have no name any more.
    if free < wanted && shared.ready.clear() {
        free = shared.templates.make_room(wanted);
    }
    if free >= wanted {
        return Ok(());
    }
    Err(refusal(
        Code::NoSpace,
        format!(
            "there are {} MiB of space where snapshots are kept; restoring this one takes {} MiB",
            free >> 20,
            wanted >> 20
        ),
    ))
}

/// A failure while a template is filled.
struct Refused(v1::Error);

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self(io_error("make a template")(error))
    }
}

/// Makes templates durable. If the snapshot was removed meanwhile, they go, too.
pub(super) fn settle(shared: &Shared, id: SnapshotId) {
    shared.templates.settle(id);
    let found = shared.store.find(&id.to_string());
    if matches!(found, Err(belljar_store::Error::NoSnapshot(_))) {
        forget(shared, id);
    }
}

/// Makes templates durable behind the answer.
fn settle_later(shared: &Arc<Shared>, id: SnapshotId) {
    let busy = Busy::begin(shared);
    let made = std::thread::Builder::new()
        .name("settle".to_owned())
        .spawn(move || settle(busy.shared(), id));
    if let Err(error) = made {
        log::line(&format!("a template is not kept: {error}"));
    }
}

fn mark(shared: &Shared, call: v1::Mark) -> Answered {
    let id = find(shared, &call.snapshot)?;
    // Labels are read, changed and written.
    let _turn = super::locked(&shared.marking);
    if !call.labels.is_empty() {
        let mut labels = listed(shared, id)?
            .map(|snapshot| snapshot.labels)
            .unwrap_or_default();
        for (key, value) in call.labels {
            if value.is_empty() {
                labels.remove(&key);
            } else {
                labels.insert(key, value);
            }
        }
        shared.store.label(id, labels)?;
    }
    for tag in &call.add_tags {
        shared.store.tag(tag, id)?;
    }
    for tag in &call.remove_tags {
        shared.store.untag(tag)?;
    }
    if let Some(pinned) = call.pinned {
        shared.store.pin(id, pinned)?;
    }
    Ok((Answer::Done(v1::Done {}), Vec::new()))
}

fn problems(shared: &Shared) -> Vec<String> {
    let problems = shared.store.problems().into_iter();
    problems
        .map(|problem| format!("{}: {}", problem.path, problem.what))
        .collect()
}

fn usage(shared: &Shared, meanwhile: &mut dyn FnMut(Answer) -> bool) -> Answered {
    let usage = shared.store.usage()?;
    // One by one: there may be more of them than fit into a message.
    for of in usage.snapshots {
        let item = v1::Snapshot {
            stored_bytes: of.stored_bytes,
            unique_bytes: of.unique_bytes,
            ..snapshot(of.snapshot)
        };
        if !meanwhile(Answer::Item(item)) {
            break;
        }
    }
    let (ready_vmms, ready_bytes) = shared.ready.usage();
    let answer = v1::Usage {
        packs: usage.packs,
        pack_bytes: usage.pack_bytes,
        live_bytes: usage.live_bytes,
        manifest_bytes: usage.manifest_bytes,
        trash_bytes: usage.trash_bytes,
        budget: usage.budget,
        snapshots: Vec::new(),
        template_bytes: shared.templates.bytes(),
        template_budget: shared.templates.budget,
        problems: problems(shared),
        ready_vmms,
        ready_bytes,
    };
    Ok((Answer::Usage(answer), Vec::new()))
}

fn progress(done: u64, total: u64) -> Answer {
    Answer::Progress(v1::Progress { done, total })
}

fn verify(shared: &Shared, meanwhile: &mut dyn FnMut(Answer) -> bool) -> Answered {
    let found = shared.store.verify(|done, total| {
        let _ = meanwhile(progress(done as u64, total as u64));
    })?;
    let (templates, bad_templates) = check::templates(shared);
    let broken = found.broken.into_iter();
    let problems = found.problems.into_iter();
    let answer = v1::Verified {
        chunks: found.chunks,
        bytes: found.bytes,
        damaged: found.damaged.len() as u64,
        broken: broken.map(|(id, why)| (id.to_string(), why)).collect(),
        problems: problems
            .map(|problem| format!("{}: {}", problem.path, problem.what))
            .collect(),
        templates,
        bad_templates,
    };
    Ok((Answer::Verified(answer), Vec::new()))
}

fn collect(shared: &Shared, call: &v1::Collect) -> Answered {
    let live = ids(&call.live);
    let mut answer = v1::Collected {
        suffices: true,
        ..v1::Collected::default()
    };
    if call.evict {
        let evicted = shared.store.evict(&live, call.dry_run)?;
        answer.suffices = evicted.suffices();
        answer.bytes_then = evicted.bytes_then;
        answer.evicted = evicted.removed.iter().map(ToString::to_string).collect();
        let kept = evicted.kept.into_iter().take(MAX_KEPT);
        answer.kept = kept.map(|(id, why)| (id.to_string(), why)).collect();
        if !call.dry_run {
            for id in evicted.removed {
                forget(shared, id);
            }
        }
    }
    if !call.dry_run {
        let collected = shared.store.gc(call.grace_ms)?;
        answer.packs = collected.packs;
        answer.bytes = collected.bytes;
        answer.copied_bytes = collected.copied_bytes;
        answer.deleted_bytes = collected.deleted_bytes;
        // What still waits counts against the budget, too: the next snapshot needs its room.
        if call.evict {
            let usage = shared.store.usage()?;
            let used = usage.pack_bytes.saturating_add(usage.trash_bytes);
            if usage.budget != 0 && used.saturating_add(usage.manifest_bytes) > usage.budget {
                let collected = shared.store.gc(0)?;
                answer.packs = answer.packs.saturating_add(collected.packs);
                answer.bytes = answer.bytes.saturating_add(collected.bytes);
                let deleted = collected.deleted_bytes;
                answer.deleted_bytes = answer.deleted_bytes.saturating_add(deleted);
            }
        }
        answer.template_bytes = shared.templates.shrink(shared.templates.budget);
        // Templates can be made again; what is saved next cannot.
        let before = shared.templates.bytes();
        shared.templates.make_room(LOW_SPACE);
        let evicted = before.saturating_sub(shared.templates.bytes());
        answer.template_bytes = answer.template_bytes.saturating_add(evicted);
    }
    Ok((Answer::Collected(answer), Vec::new()))
}

/// The one descriptor of a call, for as long as there is somebody who wants it read or written.
fn attended(descriptors: Vec<OwnedFd>, caller: Option<UnixStream>) -> Result<Attended, v1::Error> {
    let mut descriptors = descriptors.into_iter();
    match (descriptors.next(), descriptors.next(), caller) {
        (Some(one), None, Some(caller)) => {
            Attended::new(one.into(), caller).map_err(io_error("use the descriptor of this call"))
        }
        _ => Err(refusal(
            Code::Invalid,
            "one descriptor belongs to this call",
        )),
    }
}

fn export(
    shared: &Shared,
    call: &v1::Export,
    out: Result<Attended, v1::Error>,
    meanwhile: &mut dyn FnMut(Answer) -> bool,
) -> Answered {
    let mut out = io::BufWriter::with_capacity(1 << 20, out?);
    let id = find(shared, &call.snapshot)?;
    shared
        .store
        .export(id, call.first, &mut out, |done, total| {
            if done % 64 == 0 {
                let _ = meanwhile(progress(done, total));
            }
        })?;
    Ok((Answer::Done(v1::Done {}), Vec::new()))
}

fn import(
    shared: &Shared,
    call: &v1::Import,
    stream: Result<Attended, v1::Error>,
    meanwhile: &mut dyn FnMut(Answer) -> bool,
) -> Answered {
    if !call.received_of.is_empty() {
        let id = call
            .received_of
            .parse()
            .map_err(|_| refusal(Code::Invalid, "a whole snapshot id is needed"))?;
        let answer = v1::Imported {
            id: call.received_of.clone(),
            known: shared.store.find(&call.received_of).is_ok(),
            received: shared.store.received(id),
        };
        return Ok((Answer::Imported(answer), Vec::new()));
    }
    let mut stream = io::BufReader::with_capacity(1 << 20, stream?);
    let imported = shared.store.import(&mut stream, |done, total| {
        if done % 64 == 0 {
            let _ = meanwhile(progress(done, total));
        }
    })?;
    let (id, known, received) = match imported {
        Imported::New(id, stored) => (id, false, stored.new_chunks + stored.known_chunks),
        Imported::Known(id) => (id, true, 0),
    };
    let answer = v1::Imported {
        id: id.to_string(),
        known,
        received,
    };
    Ok((Answer::Imported(answer), Vec::new()))
}
