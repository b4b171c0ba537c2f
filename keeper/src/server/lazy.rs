//! Guests that run before their memory is here.
//!
//! RAM of each is a private view of one memfd, and what is missing in it raises a fault. Whoever needs a page
//! first has its block of 64 KiB filled from chunks, each of which is verified; the others find it there. Pages
//! are brought in whole, so nobody sees a part of one. Behind the guests all of it is filled, first what earlier
//! restores needed, in their order; then it becomes a template, which the next clones map. A page that cannot be
//! had is given as broken, and stops the guest that needs it.
//!
//! The memfd cannot be written but by this process: it has mode 0400, and is sealed against new writable mappings.

use std::collections::HashMap;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use belljar_store::{PAGE, Reader, SnapshotId};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{SealFlags, fcntl_add_seals};

use super::capture::{enough, memory, sealable};
use super::first::{self, First};
use super::regions::{Regions, receive};
use super::templates::{Part, read_only};
use super::touched::{self, Touched};
use super::{Busy, Shared, calls, locked, log};
use crate::images;
use crate::sys::{Filling, Userfault};
use crate::v1;

/// Bytes that one fault brings in.
const BLOCK: u64 = 64 << 10;
/// What nobody waits for is brought in when no guest has needed a page for so long,
const QUIET: Duration = Duration::from_millis(20);
/// or after this time.
const IMPATIENCE: Duration = Duration::from_secs(2);

/// Pages of zeros among those that are kept for the next guest, at most. One of them that is not costs it less than
/// others: there is nothing to read, and its fault has the zeros around it mapped, too.
const ZEROS: usize = 64;
/// How far back what earlier guests needed is looked for.
const GENERATIONS: usize = 4;

/// Images that are being filled, by snapshot.
#[derive(Default)]
pub(crate) struct Lazies(Mutex<HashMap<SnapshotId, Arc<Lazy>>>);

/// What is known of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Missing,
    /// Somebody brings it in.
    Coming,
    Here,
}

/// A snapshot's memory that is being filled.
pub(crate) struct Lazy {
    reader: Arc<Reader>,
    file: File,
    filling: Filling,
    length: u64,
    blocks: Mutex<Vec<Block>>,
    changed: Condvar,
    touched: Mutex<Touched>,
    /// What is brought in because a guest of an earlier snapshot needed it.
    expected: Mutex<Touched>,
    /// What an earlier guest needed; `None`: it is being found out, page by page.
    first: Option<First>,
    /// Somebody fills it behind the guests.
    is_filled: AtomicBool,
    begun: Instant,
    /// When a guest last needed a page, in nanoseconds after `begun`.
    needed: AtomicU64,
}

impl Lazies {
    /// The memory of a snapshot, for a clone that runs at once, and the socket on which its VMM tells of its RAM.
    pub(super) fn open(
        &self,
        shared: &Arc<Shared>,
        reader: Arc<Reader>,
    ) -> Result<(File, OwnedFd), v1::Error> {
        let failed = super::names::io_error("fill memory while the guest runs");
        let id = reader.manifest().id;
        let image = reader.image(images::MEMORY)?;
        if !locked(&self.0).contains_key(&id) {
            let data = image.data_pages().saturating_mul(PAGE);
            let [free, all, swap] = memory(["MemAvailable:", "MemTotal:", "SwapTotal:"]);
            enough(free, data, "memory that is filled while the guest runs")?;
            // Something is kept for each block, and a snapshot may say that it is larger than any machine.
            let all = all.zip(swap);
            if all.is_some_and(|(memory, swap)| image.length > memory.saturating_add(swap)) {
                let message = "it has more memory than this machine";
                return Err(super::names::refusal(v1::error::Code::NoMemory, message));
            }
        }
        let opened = || -> io::Result<(File, OwnedFd)> {
            let mut all = locked(&self.0);
            let known = all.get(&id).cloned();
            let lazy = match known {
                Some(lazy) => lazy,
                None => Arc::new(Lazy::new(reader, &shared.touched)?),
            };
            let (ours, theirs) = UnixStream::pair()?;
            let file = read_only(&lazy.file)?;
            let (served, busy) = (Arc::clone(&lazy), Busy::begin(shared));
            std::thread::Builder::new()
                .name("faults".to_owned())
                .spawn(move || serve(&served, &ours, &busy))?;
            // Only when somebody sees to it: as long as it is here, the snapshot is not removed.
            all.insert(id, lazy);
            Ok((file, theirs.into()))
        };
        opened().map_err(failed)
    }

    /// What guests of a snapshot needed, so far as it is known: of this one, or of the nearest of those before it.
    fn expected(&self, shared: &Shared, reader: &Reader) -> Touched {
        let mut nearest = Touched::load(&shared.touched, reader.manifest().id);
        let mut parent = reader.manifest().parents.first().copied();
        let mut left = GENERATIONS;
        while nearest.is_empty()
            && left > 0
            && let Some(id) = parent
        {
            left -= 1;
            nearest = Touched::load(&shared.touched, id);
            if nearest.is_empty() {
                // Or its guests still need more.
                let running = locked(&self.0).get(&id).cloned();
                nearest = running.map(|lazy| lazy.noticed()).unwrap_or_default();
                let reader = shared.store.read(id).ok();
                parent = reader.and_then(|reader| reader.manifest().parents.first().copied());
            }
        }
        nearest
    }

    fn forget(&self, id: SnapshotId) {
        locked(&self.0).remove(&id);
    }
}

impl Lazy {
    fn new(reader: Arc<Reader>, folder: &Path) -> io::Result<Self> {
        let image = reader.image(images::MEMORY).map_err(io::Error::other)?;
        let length = image.length;
        let id = reader.manifest().id;
        let (file, first) = begun(folder, id, length)?;
        file.set_permissions(Permissions::from_mode(0o400))?;
        // A mapping that was there before goes on writing.
        let filling = Filling::new(&file, length)?;
        let seals = SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(&file, seals)?;
        let count = usize::try_from(length.div_ceil(BLOCK)).map_err(io::Error::other)?;
        Ok(Self {
            file,
            filling,
            length,
            blocks: Mutex::new(vec![Block::Missing; count]),
            changed: Condvar::new(),
            touched: Mutex::default(),
            expected: Mutex::default(),
            first,
            is_filled: AtomicBool::new(false),
            begun: Instant::now(),
            needed: AtomicU64::new(0),
            reader,
        })
    }

    /// Parts of a block that are not zero, in bytes of the image.
    fn data(&self, block: &Range<u64>) -> Vec<Range<u64>> {
        let Ok(image) = self.reader.image(images::MEMORY) else {
            return Vec::new();
        };
        let mut parts: Vec<Range<u64>> = Vec::new();
        for extent in image.extents_in(block.start / PAGE..block.end.div_ceil(PAGE)) {
            let start = extent.page.saturating_mul(PAGE);
            let end = start.saturating_add(u64::from(extent.pages).saturating_mul(PAGE));
            match parts.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => parts.push(start..end),
            }
        }
        parts
    }

    fn block(&self, offset: u64) -> Range<u64> {
        let start = offset - offset % BLOCK;
        start..start.saturating_add(BLOCK).min(self.length)
    }

    /// Brings a block in, if nobody has; returns when it is here.
    fn bring(&self, block: &Range<u64>) -> Result<(), String> {
        let number = usize::try_from(block.start / BLOCK).unwrap_or(usize::MAX);
        let mut blocks = locked(&self.blocks);
        loop {
            match blocks.get_mut(number) {
                None => return Err(format!("there is no page at {:#x}", block.start)),
                Some(Block::Here) => return Ok(()),
                Some(state @ Block::Missing) => {
                    *state = Block::Coming;
                    break;
                }
                Some(Block::Coming) => {
                    let waited = self.changed.wait(blocks);
                    blocks = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
        drop(blocks);
        let outcome = self.read_and_fill(block);
        let state = match outcome {
            Ok(()) => Block::Here,
            Err(_) => Block::Missing,
        };
        if let Some(slot) = locked(&self.blocks).get_mut(number) {
            *slot = state;
        }
        self.changed.notify_all();
        outcome
    }

    fn read_and_fill(&self, block: &Range<u64>) -> Result<(), String> {
        for part in self.data(block) {
            let length = usize::try_from(part.end.saturating_sub(part.start)).unwrap_or(0);
            let mut bytes = vec![0; length];
            let read = self.reader.read(images::MEMORY, part.start, &mut bytes);
            read.map_err(|error| error.to_string())?;
            let filled = self.filling.fill(&bytes, part.start);
            filled.map_err(|error| format!("there is no room for it in memory: {error}"))?;
        }
        Ok(())
    }

    /// Brings in one page, if it is known to be needed or that is being found out. Returns whether it is here.
    fn bring_page(&self, offset: u64) -> bool {
        let page = offset / PAGE;
        let Some(first) = &self.first else {
            // More is not remembered, and in blocks it comes sooner.
            return locked(&self.touched).len() < first::MOST && self.bring_from_chunk(page);
        };
        let mut bytes = [0; PAGE as usize];
        let read = first.read(page, &mut bytes);
        read.is_some_and(|read| read.is_ok())
            && self.filling.fill(&bytes, page.saturating_mul(PAGE)).is_ok()
    }

    fn bring_from_chunk(&self, page: u64) -> bool {
        let mut bytes = [0; PAGE as usize];
        let start = page.saturating_mul(PAGE);
        let read = self.reader.read(images::MEMORY, start, &mut bytes);
        read.is_ok() && self.filling.fill(&bytes, start).is_ok()
    }

    /// Whether a page is more than zeros.
    fn has_data(&self, page: u64) -> bool {
        let image = self.reader.image(images::MEMORY);
        image.is_ok_and(|image| {
            image
                .extents_in(page..page.saturating_add(1))
                .next()
                .is_some()
        })
    }

    /// Brings in at once what will presumably be needed.
    fn bring_expected(&self, expected: Touched) {
        let pages: Vec<u64> = expected.in_order().take(touched::EXPECTED).collect();
        // Before: a guest that ends meanwhile has what is expected written down.
        *locked(&self.expected) = expected;
        for page in pages.into_iter().filter(|page| self.has_data(*page)) {
            // Whoever needs it will see why it is not there.
            self.bring_from_chunk(page);
        }
    }

    /// What guests needed, and what they were given before they could.
    fn noticed(&self) -> Touched {
        // Other guests' faults are noted meanwhile.
        let touched = locked(&self.touched).clone();
        touched.followed_by(&locked(&self.expected))
    }

    /// Waits for a moment at which no guest needs pages.
    fn wait_for_quiet(&self) {
        loop {
            let now = self.begun.elapsed();
            let needed = Duration::from_nanos(self.needed.load(Ordering::Relaxed));
            match pause(now, needed) {
                None => return,
                Some(pause) => std::thread::sleep(pause),
            }
        }
    }

    /// Everything that is not zero, what earlier guests needed first.
    fn bring_all(&self, first: &Touched) -> Result<(), String> {
        self.wait_for_quiet();
        for page in self.first.iter().flat_map(First::later) {
            self.bring_page(page.saturating_mul(PAGE));
        }
        for page in first.pages() {
            let offset = page.saturating_mul(PAGE);
            if offset < self.length {
                self.wait_for_quiet();
                self.bring(&self.block(offset))?;
            }
        }
        let mut at = 0;
        while at < self.length {
            let block = self.block(at);
            if !self.data(&block).is_empty() {
                self.wait_for_quiet();
                self.bring(&block)?;
            }
            at = block.end;
        }
        Ok(())
    }

    /// Writes down what was needed, for the next guest.
    fn save(&self, folder: &Path, id: SnapshotId) {
        static SAVING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = locked(&SAVING);
        let touched = self.noticed();
        touched.save(folder, id);
        if self.first.is_some() {
            return;
        }
        let mut zeros = 0;
        let pages = touched.in_order().filter(|page| {
            self.has_data(*page) || {
                zeros += 1;
                zeros <= ZEROS
            }
        });
        let pages: Vec<u64> = pages.take(first::MOST).collect();
        let written = First::write(folder, id, &pages, |page, bytes| {
            let read = self
                .reader
                .read(images::MEMORY, page.saturating_mul(PAGE), bytes);
            read.map_err(io::Error::other)
        });
        if let Err(error) = written {
            log::line(&format!(
                "what guests of snapshot {id} need first is not remembered: {error}"
            ));
        }
    }

    /// Answers one fault: what is zero with zeros, the rest from the block.
    fn resolve(&self, userfault: &Userfault, regions: &Regions, address: u64) -> io::Result<()> {
        let Some(offset) = regions.offset(address) else {
            return Err(io::Error::other(format!("a fault at {address:#x}")));
        };
        let page = address - address % PAGE;
        let block = self.block(offset);
        let data = self.data(&block);
        let holes = |at: u64| {
            let before = data.iter().rfind(|part| part.end <= at);
            let after = data.iter().find(|part| part.start > at);
            before.map_or(block.start, |part| part.end)..after.map_or(block.end, |part| part.start)
        };
        if !data.iter().any(|part| part.contains(&offset)) {
            for range in regions.addresses(&holes(offset)) {
                // The VMM may have mapped something else in between; what counts is the page itself.
                let _ = userfault.zero(&range);
            }
            return userfault.zero_page(page);
        }
        if self.bring_page(offset) {
            return userfault.wake(&(page..page.saturating_add(PAGE)));
        }
        if let Err(why) = self.bring(&block) {
            let id = self.reader.manifest().id;
            log::line(&format!(
                "snapshot {id}: the page at {offset:#x} of memory cannot be had, and a guest that needs it is stopped: {why}"
            ));
            // If even that cannot be, the guest is stopped by the end of this service.
            userfault.poison_page(page)?;
            for range in regions.addresses(&block) {
                let _ = userfault.poison(&range);
            }
            return Ok(());
        }
        for range in regions.addresses(&block) {
            userfault.wake(&range)?;
        }
        Ok(())
    }
}

/// A file for memory, with what an earlier guest needed first if that is known.
fn begun(folder: &Path, id: SnapshotId, length: u64) -> io::Result<(File, Option<First>)> {
    let empty = || -> io::Result<File> {
        let file = sealable("lazy template")?;
        file.set_len(length)?;
        Ok(file)
    };
    if let Some(first) = First::open(folder, id, length) {
        let file = empty()?;
        match first.bring_early(&file) {
            Ok(()) => return Ok((file, Some(first))),
            Err(error) => log::line(&format!(
                "what guests of snapshot {id} need first cannot be read: {error}"
            )),
        }
    }
    // One that is damaged makes room for a good one.
    first::remove(folder, id);
    Ok((empty()?, None))
}

/// Serves the faults of one guest, until its VMM ends.
fn serve(lazy: &Arc<Lazy>, socket: &UnixStream, busy: &Busy) {
    if let Err(error) = try_serve(busy.shared(), lazy, socket) {
        let id = lazy.reader.manifest().id;
        log::line(&format!(
            "the faults of a guest of snapshot {id} are not served any more, which stops it: {error}"
        ));
    }
    let (shared, id) = (busy.shared(), lazy.reader.manifest().id);
    // While it is read here, nobody can remove the snapshot.
    lazy.save(&shared.touched, id);
}

fn try_serve(shared: &Arc<Shared>, lazy: &Arc<Lazy>, socket: &UnixStream) -> io::Result<()> {
    let told = receive(socket, lazy.length);
    // Not before: whoever asked for the guest waited until now.
    if !lazy.is_filled.swap(true, Ordering::Relaxed)
        && let Err(error) = fill_behind(shared, lazy)
    {
        log::line(&format!("memory comes only as guests need it: {error}"));
        shared.lazies.forget(lazy.reader.manifest().id);
    }
    // One that is never told of has no guest.
    let Some((regions, userfault)) = told? else {
        return Ok(());
    };
    let userfault = Userfault::try_from(userfault)?;
    loop {
        let mut set = [
            PollFd::new(&userfault, PollFlags::IN),
            PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN),
        ];
        match poll(&mut set, None) {
            Err(rustix::io::Errno::INTR) => continue,
            done => done?,
        };
        let [faults, hung_up] = &set;
        if !hung_up.revents().is_empty() {
            return Ok(());
        }
        if faults.revents().is_empty() {
            continue;
        }
        for fault in userfault.faults()? {
            let now = u64::try_from(lazy.begun.elapsed().as_nanos());
            lazy.needed
                .store(now.unwrap_or(u64::MAX), Ordering::Relaxed);
            if let Some(offset) = regions.offset(fault.address) {
                locked(&lazy.touched).note(offset / PAGE, fault.is_write);
            }
            match lazy.resolve(&userfault, &regions, fault.address) {
                // The VMM is ending.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
                other => other?,
            }
        }
    }
}

/// How long filling waits, `now` and `needed` (the last time a guest needed a page) counted from the beginning.
fn pause(now: Duration, needed: Duration) -> Option<Duration> {
    let rest = needed.saturating_add(QUIET).saturating_sub(now);
    let patience = IMPATIENCE.saturating_sub(now);
    Some(rest.min(patience)).filter(|pause| !pause.is_zero())
}

/// Fills all of it, and makes it a template.
fn fill_behind(shared: &Arc<Shared>, lazy: &Arc<Lazy>) -> io::Result<()> {
    let (busy, lazy) = (Busy::begin(shared), Arc::clone(lazy));
    let work = move || {
        let shared = busy.shared();
        let id = lazy.reader.manifest().id;
        if lazy.first.is_none() {
            lazy.bring_expected(shared.lazies.expected(shared, &lazy.reader));
        }
        let first = Touched::load(&shared.touched, id);
        match lazy.bring_all(&first) {
            Ok(()) => {
                // The next snapshot of this guest may be restored while it still runs.
                lazy.save(&shared.touched, id);
                calls::keep_template(shared, &lazy.reader, Part::Memory, |file| {
                    copy_data(&lazy, file)
                });
            }
            Err(why) => log::line(&format!("snapshot {id}: memory stays incomplete: {why}")),
        }
        // Who comes now finds the template, or begins again.
        shared.lazies.forget(id);
        calls::settle(shared, id);
    };
    std::thread::Builder::new()
        .name("fill".to_owned())
        .spawn(work)
        .map(drop)
}

fn copy_data(lazy: &Lazy, mut file: &File) -> io::Result<()> {
    let mut bytes = Vec::new();
    let mut at = 0;
    while at < lazy.length {
        let block = lazy.block(at);
        for part in lazy.data(&block) {
            bytes.resize(usize::try_from(part.end - part.start).unwrap_or(0), 0);
            lazy.file.read_exact_at(&mut bytes, part.start)?;
            file.write_all_at(&bytes, part.start)?;
        }
        at = block.end;
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filling_waits_for_guests_but_not_for_ever() {
        let ms = Duration::from_millis;
        // It begins when the guest may have begun.
        assert_eq!(pause(ms(0), ms(0)), Some(QUIET));
        assert_eq!(pause(ms(20), ms(0)), None);
        assert_eq!(pause(ms(30), ms(25)), Some(ms(15)));
        assert_eq!(pause(ms(30), ms(30)), Some(QUIET));
        assert_eq!(pause(ms(1995), ms(1990)), Some(ms(5)));
        assert_eq!(pause(ms(2000), ms(2000)), None);
        assert_eq!(pause(ms(9000), Duration::MAX), None);
    }
}
