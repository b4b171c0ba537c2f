//! Complete images of snapshots as sparse files, which restores map or copy: a cache in front of the chunks.
//!
//! A file gets its name when its bytes are durable, and a record beside it (`.ok`) after that, so that after a
//! power failure a template is whole or not there. Until then whoever asks gets it all the same: this process has
//! it open. Nobody but this process ever had such a file open for writing: it is filled from chunks, each of
//! which is verified. The record says of which file it speaks; one that was changed or replaced since is not used.

use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use belljar_store::SnapshotId;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};

use super::{Point, Surroundings, locked, log};
use crate::images;

/// What a template is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    Memory,
    Disk,
}

impl Part {
    pub(super) const ALL: [Self; 2] = [Self::Memory, Self::Disk];

    const fn extension(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
        }
    }

    /// Its image in a snapshot.
    pub(super) const fn image(self) -> &'static str {
        match self {
            Self::Memory => images::MEMORY,
            Self::Disk => images::DISK,
        }
    }
}

/// Of whoever fills a template.
#[derive(Debug, Default)]
pub(super) struct Turn {
    lock: Mutex<()>,
    /// How many want it.
    waiting: AtomicUsize,
    /// Somebody who filled it ahead has given way, and sees to the rest when it is made.
    given_up: AtomicBool,
}

impl Turn {
    /// For whoever needs the template.
    pub(super) fn hold(&self) -> Held<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let lock = locked(&self.lock);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        Held {
            turn: self,
            gives_way: false,
            _lock: lock,
        }
    }

    /// For whoever fills it before somebody asks, with less of the processor's time than those who do: it gives way.
    pub(super) fn hold_ahead(&self) -> Held<'_> {
        Held {
            gives_way: true,
            ..self.hold()
        }
    }

    /// For whoever gave way: returns when whoever needed it has made it, or could not.
    pub(super) fn wait_for_who_took_over(&self) {
        if !self.given_up.load(Ordering::SeqCst) {
            return;
        }
        // The lock alone could be had before somebody who waits for it.
        while self.waiting.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _held = self.hold();
        self.given_up.store(false, Ordering::SeqCst);
    }
}

/// Proof that a turn is somebody's.
pub(super) struct Held<'a> {
    turn: &'a Turn,
    gives_way: bool,
    _lock: MutexGuard<'a, ()>,
}

impl Held<'_> {
    /// Fails when whoever fills it is to give way.
    pub(super) fn go_on(&self) -> io::Result<()> {
        if self.gives_way && self.turn.waiting.load(Ordering::SeqCst) > 0 {
            self.turn.given_up.store(true, Ordering::SeqCst);
            return Err(io::Error::other("somebody else needs it at once"));
        }
        Ok(())
    }

    /// It was being filled ahead, and is not any more.
    pub(super) fn was_given_up(&self) -> bool {
        self.turn.given_up.load(Ordering::SeqCst)
    }
}

/// What the record of a template ends with.
const RECORD: &str = "ok";

/// The folder of templates.
pub(crate) struct Templates {
    dir: PathBuf,
    pub(super) budget: u64,
    /// Complete, but perhaps not durable.
    fresh: Mutex<HashMap<(SnapshotId, Part), Arc<File>>>,
    /// One lock for each that is being filled.
    filling: Mutex<HashMap<(SnapshotId, Part), Arc<Turn>>>,
    /// Held while names are given.
    naming: Mutex<()>,
    surroundings: Arc<dyn Surroundings>,
}

/// A template with a name.
struct Kept {
    id: SnapshotId,
    part: Part,
    bytes: u64,
    used: SystemTime,
}

impl Templates {
    /// What an earlier keeper left half-made goes.
    pub(super) fn open(
        dir: &Path,
        budget: u64,
        surroundings: Arc<dyn Surroundings>,
    ) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let templates = Self {
            dir: dir.to_path_buf(),
            budget,
            fresh: Mutex::default(),
            filling: Mutex::default(),
            naming: Mutex::default(),
            surroundings,
        };
        let records: HashSet<PathBuf> = templates
            .kept()
            .iter()
            .flat_map(|kept| {
                [
                    templates.path(kept.id, kept.part),
                    templates.record_path(kept.id, kept.part),
                ]
            })
            .collect();
        for entry in std::fs::read_dir(dir)?.flatten() {
            if !records.contains(&entry.path()) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(templates)
    }

    /// An empty file without a name, on the same file system.
    pub(super) fn nameless(&self) -> io::Result<File> {
        self.surroundings.at(Point::MakeFile)?;
        let mode = Mode::from(0o600);
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        Ok(rustix::fs::open(&self.dir, flags, mode)?.into())
    }

    /// A complete one of that length, for reading. One that is not what its record says is thrown away.
    pub(super) fn get(&self, id: SnapshotId, part: Part, length: u64) -> Option<File> {
        if let Some(fresh) = locked(&self.fresh).get(&(id, part)) {
            return read_only(fresh).ok();
        }
        let record = File::open(self.record_path(id, part)).ok()?;
        let good = || -> io::Result<Option<File>> {
            let file = File::open(self.path(id, part))?;
            let mut text = String::new();
            (&record).take(1 << 10).read_to_string(&mut text)?;
            let is = file.metadata()?;
            let good = is.len() == length && text == description(id, part, &is);
            Ok(good.then_some(file))
        };
        match good() {
            Ok(Some(file)) => {
                // So that the oldest is the one longest unused.
                let _ = record.set_modified(SystemTime::now());
                Some(file)
            }
            found => {
                let why = found.err().map_or_else(
                    || "it was changed, or is of something else".to_owned(),
                    |error| error.to_string(),
                );
                let path = self.path(id, part);
                log::line(&format!("template {} is not used: {why}", path.display()));
                self.remove_part(id, part);
                None
            }
        }
    }

    /// A complete one, if it is what its record says is for [`Templates::get`] to see; nobody makes use of it now.
    pub(super) fn peek(&self, id: SnapshotId, part: Part) -> Option<File> {
        if let Some(fresh) = locked(&self.fresh).get(&(id, part)) {
            return read_only(fresh).ok();
        }
        self.record_path(id, part).metadata().ok()?;
        File::open(self.path(id, part)).ok()
    }

    /// The lock of a template that may be filled.
    pub(super) fn turn(&self, id: SnapshotId, part: Part) -> Arc<Turn> {
        Arc::clone(locked(&self.filling).entry((id, part)).or_default())
    }

    /// A complete one, for reading; made by `fill` if there is none. Whether it was there, or
    /// somebody was about to have it there.
    pub(super) fn get_or_fill<E: From<io::Error>>(
        &self,
        id: SnapshotId,
        part: Part,
        length: u64,
        fill: impl FnOnce(&File) -> Result<(), E>,
    ) -> Result<(File, bool), E> {
        let turn = self.turn(id, part);
        let held = turn.hold();
        self.get_or_fill_held(id, part, length, &held, fill)
    }

    /// The same, for whoever has its [`Templates::turn`].
    pub(super) fn get_or_fill_held<E: From<io::Error>>(
        &self,
        id: SnapshotId,
        part: Part,
        length: u64,
        held: &Held<'_>,
        fill: impl FnOnce(&File) -> Result<(), E>,
    ) -> Result<(File, bool), E> {
        if let Some(file) = self.get(id, part, length) {
            return Ok((file, true));
        }
        let file = self.nameless()?;
        self.surroundings.at(Point::Fill)?;
        file.set_len(length)?;
        fill(&file)?;
        // Who gets it can open it anew, and must not do so for writing.
        file.set_permissions(Permissions::from_mode(0o400))?;
        let shared = read_only(&file)?;
        locked(&self.fresh).insert((id, part), Arc::new(file));
        locked(&self.filling).remove(&(id, part));
        Ok((shared, held.was_given_up()))
    }

    /// Makes what was filled durable, and keeps within the budget. What fails is only not cached.
    pub(super) fn settle(&self, id: SnapshotId) {
        let naming = locked(&self.naming);
        for part in Part::ALL {
            let Some(file) = locked(&self.fresh).get(&(id, part)).cloned() else {
                continue;
            };
            if let Err(error) = self.name(id, part, &file) {
                log::line(&format!("a template of snapshot {id} is not kept: {error}"));
                self.remove_part(id, part);
            }
            locked(&self.fresh).remove(&(id, part));
        }
        drop(naming);
        self.shrink(self.budget);
    }

    fn name(&self, id: SnapshotId, part: Part, file: &File) -> io::Result<()> {
        self.surroundings.at(Point::SyncTemplate)?;
        file.sync_all()?;
        self.surroundings.at(Point::NameTemplate)?;
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = self.path(id, part);
        // One that was not good.
        let _ = std::fs::remove_file(&path);
        rustix::fs::linkat(CWD, open, CWD, &path, AtFlags::SYMLINK_FOLLOW)?;
        let record = self.record_path(id, part);
        let temporary = record.with_added_extension("new");
        std::fs::write(&temporary, description(id, part, &file.metadata()?))?;
        File::open(&temporary)?.sync_all()?;
        std::fs::rename(temporary, record)
    }

    /// Removes those of a snapshot. Who has one open keeps it.
    pub(super) fn remove(&self, id: SnapshotId) {
        for part in Part::ALL {
            self.remove_part(id, part);
        }
    }

    /// Removes one.
    pub(super) fn remove_part(&self, id: SnapshotId, part: Part) {
        locked(&self.fresh).remove(&(id, part));
        let _ = std::fs::remove_file(self.record_path(id, part));
        let _ = std::fs::remove_file(self.path(id, part));
    }

    /// Bytes on disk.
    pub(super) fn bytes(&self) -> u64 {
        self.kept().iter().map(|kept| kept.bytes).sum()
    }

    /// What there is.
    pub(super) fn all(&self) -> Vec<(SnapshotId, Part)> {
        let kept = self.kept();
        kept.iter().map(|kept| (kept.id, kept.part)).collect()
    }

    /// Removes the longest unused until the rest has so many bytes. Returns how many bytes went.
    pub(super) fn shrink(&self, budget: u64) -> u64 {
        let mut files = self.kept();
        files.sort_by_key(|kept| kept.used);
        let mut all: u64 = files.iter().map(|kept| kept.bytes).sum();
        let mut gone: u64 = 0;
        for kept in files {
            if all <= budget {
                break;
            }
            self.remove_part(kept.id, kept.part);
            all = all.saturating_sub(kept.bytes);
            gone = gone.saturating_add(kept.bytes);
        }
        gone
    }

    /// Removes the longest unused until so many bytes can be written, or none is left. Returns how many can.
    pub(super) fn make_room(&self, wanted: u64) -> u64 {
        let free = self.free_bytes();
        if free >= wanted {
            return free;
        }
        let missing = wanted.saturating_sub(free);
        self.shrink(self.bytes().saturating_sub(missing));
        self.free_bytes()
    }

    fn kept(&self) -> Vec<Kept> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let files = entries.flatten().filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let (name, record) = name.rsplit_once('.')?;
            let (id, extension) = name.split_once('.')?;
            let id = id.parse().ok()?;
            let part = Part::ALL
                .into_iter()
                .find(|part| part.extension() == extension)?;
            let file = self.path(id, part).metadata().ok()?;
            (record == RECORD).then_some(Kept {
                id,
                part,
                bytes: file.blocks().saturating_mul(512),
                used: entry.metadata().ok()?.modified().ok()?,
            })
        });
        files.collect()
    }

    fn path(&self, id: SnapshotId, part: Part) -> PathBuf {
        self.dir.join(format!("{id}.{}", part.extension()))
    }

    fn record_path(&self, id: SnapshotId, part: Part) -> PathBuf {
        self.path(id, part).with_added_extension(RECORD)
    }

    /// Bytes that can still be written where templates and store are.
    pub(super) fn free_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.dir)
            .map_or(u64::MAX, |free| free.f_bavail.saturating_mul(free.f_frsize))
    }
}

/// What a template's record says: what it is of, and which file that is, unchanged since. Who writes to a file
/// can set the time of its last writing back, and not that of its last change; but a disk's also changes whenever
/// a sandbox that begins with it gives it a name of its own, or goes.
fn description(id: SnapshotId, part: Part, file: &Metadata) -> String {
    let changed = match part {
        Part::Memory => format!(" changed {}.{:09}", file.ctime(), file.ctime_nsec()),
        Part::Disk => String::new(),
    };
    format!(
        "belljar template 2\nsnapshot {id}\nimage {}\nlength {}\nfile {}:{} written {}.{:09}{changed}\n",
        part.image(),
        file.len(),
        file.dev(),
        file.ino(),
        file.mtime(),
        file.mtime_nsec(),
    )
}

/// The same file, opened anew: for reading, with a position of its own.
pub(super) fn read_only(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::surroundings::Undisturbed;
    use std::io::Write;

    const LENGTH: u64 = 2 << 20;

    fn templates(budget: u64) -> (tempfile::TempDir, Templates) {
        let dir = tempfile::tempdir().unwrap();
        let templates = Templates::open(dir.path(), budget, Arc::new(Undisturbed)).unwrap();
        (dir, templates)
    }

    fn id(number: u8) -> SnapshotId {
        SnapshotId([number; 16])
    }

    fn add(templates: &Templates, id: SnapshotId, part: Part) {
        let fill = |file: &File| (&mut &*file).write_all(&vec![1; 2 << 20]);
        templates.get_or_fill(id, part, LENGTH, fill).unwrap();
        templates.settle(id);
    }

    #[test]
    fn it_is_filled_once_and_found_before_and_after_it_is_durable() {
        let (dir, templates) = templates(1 << 30);
        let fill = |file: &File| -> io::Result<()> { (&mut &*file).write_all(b"filled") };
        let (_, was_there) = templates.get_or_fill(id(1), Part::Memory, 6, fill).unwrap();
        assert!(!was_there);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let again = |_: &File| -> io::Result<()> { panic!("it is there") };
        let (mut file, was_there) = templates
            .get_or_fill(id(1), Part::Memory, 6, again)
            .unwrap();
        assert!(was_there);
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "filled");
        assert!(file.write_all(b"x").is_err());
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o400, "nor can it be opened anew for writing");
        templates.settle(id(1));
        assert!(templates.bytes() > 0);
        assert!(templates.get(id(1), Part::Memory, 6).is_some());
        assert!(templates.get(id(1), Part::Disk, 6).is_none());
        templates.remove(id(1));
        assert_eq!(templates.bytes(), 0);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn who_fills_ahead_gives_way_to_who_needs_it() {
        let (_dir, templates) = templates(1 << 30);
        let turn = templates.turn(id(1), Part::Memory);
        let ahead = turn.hold_ahead();
        let fill = |file: &File| -> io::Result<()> { (&mut &*file).write_all(b"filled") };
        std::thread::scope(|scope| {
            let needs = scope.spawn(|| templates.get_or_fill(id(1), Part::Memory, 6, fill));
            // As long as nobody needs it, it goes on.
            let slowly = |_: &File| loop {
                ahead.go_on()?;
                std::thread::yield_now();
            };
            let filled: io::Result<_> =
                templates.get_or_fill_held(id(1), Part::Memory, 6, &ahead, slowly);
            assert!(filled.is_err());
            drop(ahead);
            turn.wait_for_who_took_over();
            // Whoever comes now finds it.
            assert!(templates.get(id(1), Part::Memory, 6).is_some());
            let (mut file, was_there) = needs.join().unwrap().unwrap();
            assert!(was_there, "as if it had been waited for");
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, "filled");
        });
        // Whoever needs it gives way to nobody.
        let turn = templates.turn(id(2), Part::Memory);
        let held = turn.hold();
        turn.waiting.fetch_add(1, Ordering::SeqCst);
        assert!(held.go_on().is_ok() && !held.was_given_up());
    }

    #[test]
    fn what_cannot_be_filled_leaves_nothing() {
        let (dir, templates) = templates(1 << 30);
        let fail = |_: &File| -> io::Result<()> { Err(io::ErrorKind::StorageFull.into()) };
        assert!(templates.get_or_fill(id(1), Part::Disk, 6, fail).is_err());
        assert!(templates.get(id(1), Part::Disk, 6).is_none());
        templates.settle(id(1));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn one_that_was_changed_replaced_or_is_of_another_is_not_used() {
        type Spoil = fn(&Path);
        let spoils: [Spoil; 6] = [
            |path| {
                let written = std::fs::metadata(path).unwrap().modified().unwrap();
                let permissions = Permissions::from_mode(0o600);
                std::fs::set_permissions(path, permissions).unwrap();
                let mut file = File::options().write(true).open(path).unwrap();
                file.write_all(b"other").unwrap();
                file.set_modified(written).unwrap();
            },
            |path| {
                let permissions = Permissions::from_mode(0o600);
                std::fs::set_permissions(path, permissions).unwrap();
                let mut file = File::options().write(true).open(path).unwrap();
                file.write_all(b"other").unwrap();
            },
            |path| {
                let copy = path.with_extension("copy");
                std::fs::copy(path, &copy).unwrap();
                std::fs::rename(copy, path).unwrap();
            },
            |path| std::fs::remove_file(path).unwrap(),
            |path| {
                let record = path.with_added_extension(RECORD);
                let text = std::fs::read_to_string(&record).unwrap();
                std::fs::write(record, text.replace("snapshot 01", "snapshot 02")).unwrap();
            },
            |path| std::fs::write(path.with_added_extension(RECORD), [0xff; 3000]).unwrap(),
        ];
        for (number, spoil) in spoils.iter().enumerate() {
            let (dir, templates) = templates(1 << 30);
            add(&templates, id(1), Part::Memory);
            assert!(templates.get(id(1), Part::Memory, LENGTH).is_some());
            std::thread::sleep(std::time::Duration::from_millis(15));
            spoil(&templates.path(id(1), Part::Memory));
            assert!(
                templates.get(id(1), Part::Memory, LENGTH).is_none(),
                "{number}"
            );
            assert_eq!(
                std::fs::read_dir(dir.path()).unwrap().count(),
                0,
                "{number}"
            );
        }
        let (_dir, templates) = templates(1 << 30);
        add(&templates, id(1), Part::Memory);
        assert!(templates.get(id(1), Part::Memory, LENGTH + 1).is_none());
    }

    #[test]
    fn a_disk_is_used_with_other_names_and_not_when_it_was_written() {
        let (dir, templates) = templates(1 << 30);
        add(&templates, id(1), Part::Disk);
        let path = templates.path(id(1), Part::Disk);
        let name = dir.path().join("name");
        std::fs::hard_link(&path, &name).unwrap();
        assert!(templates.get(id(1), Part::Disk, LENGTH).is_some());
        std::fs::remove_file(&name).unwrap();
        assert!(templates.get(id(1), Part::Disk, LENGTH).is_some());
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let mut file = File::options().write(true).open(&path).unwrap();
        file.write_all(b"other").unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert!(templates.get(id(1), Part::Disk, LENGTH).is_none());
    }

    #[test]
    fn what_was_left_half_made_is_gone_with_the_next_keeper() {
        let (dir, templates) = templates(1 << 30);
        add(&templates, id(1), Part::Memory);
        std::fs::write(dir.path().join(format!("{}.disk", id(1))), b"x").unwrap();
        std::fs::write(dir.path().join(format!("{}.disk.ok.new", id(1))), b"x").unwrap();
        let templates = Templates::open(dir.path(), 1 << 30, Arc::new(Undisturbed)).unwrap();
        assert_eq!(templates.all(), [(id(1), Part::Memory)]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        assert!(templates.get(id(1), Part::Memory, LENGTH).is_some());
    }

    #[test]
    fn the_longest_unused_makes_room() {
        let (_dir, templates) = templates(5 << 20);
        for number in 1..=3 {
            add(&templates, id(number), Part::Memory);
            std::thread::sleep(std::time::Duration::from_millis(15));
            templates.get(id(1), Part::Memory, LENGTH).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(15));
        }
        let there =
            [1, 2, 3].map(|number| templates.get(id(number), Part::Memory, LENGTH).is_some());
        assert_eq!(there, [true, false, true]);
    }
}
