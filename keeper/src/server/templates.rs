//! Complete images of snapshots as sparse files, which restores map or copy: a cache in front of the chunks.
//!
//! A file gets its name when its bytes are durable, so that after a power failure a template is whole or
//! not there. Until then whoever asks gets it all the same: this process has it open.

use std::collections::HashMap;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use belljar_store::SnapshotId;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};

use super::{Point, Surroundings, locked};

/// What a template is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    Memory,
    Disk,
}

impl Part {
    const fn extension(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
        }
    }
}

/// Locked by whoever fills a template.
type Turn = Arc<Mutex<()>>;

/// The folder of templates.
pub(crate) struct Templates {
    dir: PathBuf,
    pub(super) budget: u64,
    /// Complete, but perhaps not durable.
    fresh: Mutex<HashMap<(SnapshotId, Part), Arc<File>>>,
    /// One lock for each that is being filled.
    filling: Mutex<HashMap<(SnapshotId, Part), Turn>>,
    surroundings: Arc<dyn Surroundings>,
}

impl Templates {
    pub(super) fn open(
        dir: &Path,
        budget: u64,
        surroundings: Arc<dyn Surroundings>,
    ) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        Ok(Self {
            dir: dir.to_path_buf(),
            budget,
            fresh: Mutex::default(),
            filling: Mutex::default(),
            surroundings,
        })
    }

    /// An empty file without a name, on the same file system.
    pub(super) fn nameless(&self) -> io::Result<File> {
        self.surroundings.at(Point::MakeFile)?;
        let mode = Mode::from(0o600);
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        Ok(rustix::fs::open(&self.dir, flags, mode)?.into())
    }

    /// A complete one, for reading.
    pub(super) fn get(&self, id: SnapshotId, part: Part) -> Option<File> {
        if let Some(fresh) = locked(&self.fresh).get(&(id, part)) {
            return read_only(fresh).ok();
        }
        let file = File::open(self.path(id, part)).ok()?;
        // So that the oldest is the one longest unused.
        let _ = file.set_modified(SystemTime::now());
        Some(file)
    }

    /// A complete one, for reading; made by `fill` if there is none. Whether it was there.
    pub(super) fn get_or_fill<E: From<io::Error>>(
        &self,
        id: SnapshotId,
        part: Part,
        fill: impl FnOnce(&File) -> Result<(), E>,
    ) -> Result<(File, bool), E> {
        let turn = Arc::clone(locked(&self.filling).entry((id, part)).or_default());
        let turn = locked(&turn);
        if let Some(file) = self.get(id, part) {
            return Ok((file, true));
        }
        let file = self.nameless()?;
        self.surroundings.at(Point::Fill)?;
        fill(&file)?;
        let file = self.add(id, part, file);
        drop(turn);
        locked(&self.filling).remove(&(id, part));
        Ok((read_only(&file)?, false))
    }

    /// Takes a complete image. It is found from now on, and gets its name by [`Templates::settle`].
    pub(super) fn add(&self, id: SnapshotId, part: Part, file: File) -> Arc<File> {
        let file = Arc::new(file);
        locked(&self.fresh).insert((id, part), Arc::clone(&file));
        file
    }

    /// Makes what was added durable, and keeps within the budget. What fails is only not cached.
    pub(super) fn settle(&self, id: SnapshotId) {
        for part in [Part::Memory, Part::Disk] {
            let Some(file) = locked(&self.fresh).get(&(id, part)).cloned() else {
                continue;
            };
            let _ = self.name(id, part, &file);
            locked(&self.fresh).remove(&(id, part));
        }
        self.shrink(self.budget);
    }

    fn name(&self, id: SnapshotId, part: Part, file: &File) -> io::Result<()> {
        file.set_permissions(Permissions::from_mode(0o400))?;
        self.surroundings.at(Point::SyncTemplate)?;
        file.sync_all()?;
        self.surroundings.at(Point::NameTemplate)?;
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = self.path(id, part);
        rustix::fs::linkat(CWD, open, CWD, &path, AtFlags::SYMLINK_FOLLOW)?;
        Ok(())
    }

    /// Removes those of a snapshot. Who has one open keeps it.
    pub(super) fn remove(&self, id: SnapshotId) {
        for part in [Part::Memory, Part::Disk] {
            locked(&self.fresh).remove(&(id, part));
            let _ = std::fs::remove_file(self.path(id, part));
        }
    }

    /// Bytes on disk.
    pub(super) fn bytes(&self) -> u64 {
        self.files().iter().map(|(_, bytes, _)| bytes).sum()
    }

    /// Removes the longest unused until the rest has so many bytes. Returns how many bytes went.
    pub(super) fn shrink(&self, budget: u64) -> u64 {
        let mut files = self.files();
        files.sort_by_key(|(used, ..)| *used);
        let mut all: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        let mut gone: u64 = 0;
        for (_, bytes, path) in files {
            if all <= budget {
                break;
            }
            if std::fs::remove_file(path).is_ok() {
                all = all.saturating_sub(bytes);
                gone = gone.saturating_add(bytes);
            }
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

    fn files(&self) -> Vec<(SystemTime, u64, PathBuf)> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let files = entries.flatten().filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            let used = metadata.modified().ok()?;
            Some((used, metadata.blocks().saturating_mul(512), entry.path()))
        });
        files.collect()
    }

    fn path(&self, id: SnapshotId, part: Part) -> PathBuf {
        self.dir.join(format!("{id}.{}", part.extension()))
    }

    /// Bytes that can still be written where templates and store are.
    pub(super) fn free_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.dir)
            .map_or(u64::MAX, |free| free.f_bavail.saturating_mul(free.f_frsize))
    }
}

/// The same file, opened anew: for reading, with a position of its own.
pub(super) fn read_only(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::surroundings::Undisturbed;
    use std::io::{Read, Write};

    fn templates(budget: u64) -> (tempfile::TempDir, Templates) {
        let dir = tempfile::tempdir().unwrap();
        let templates = Templates::open(dir.path(), budget, Arc::new(Undisturbed)).unwrap();
        (dir, templates)
    }

    fn id(number: u8) -> SnapshotId {
        SnapshotId([number; 16])
    }

    #[test]
    fn it_is_filled_once_and_found_before_and_after_it_is_durable() {
        let (dir, templates) = templates(1 << 30);
        let fill = |file: &File| -> io::Result<()> { (&mut &*file).write_all(b"filled") };
        let (_, was_there) = templates.get_or_fill(id(1), Part::Memory, fill).unwrap();
        assert!(!was_there);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let again = |_: &File| -> io::Result<()> { panic!("it is there") };
        let (mut file, was_there) = templates.get_or_fill(id(1), Part::Memory, again).unwrap();
        assert!(was_there);
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "filled");
        assert!(file.write_all(b"x").is_err());
        templates.settle(id(1));
        assert!(templates.bytes() > 0);
        assert!(templates.get(id(1), Part::Memory).is_some());
        assert!(templates.get(id(1), Part::Disk).is_none());
        templates.remove(id(1));
        assert_eq!(templates.bytes(), 0);
    }

    #[test]
    fn what_cannot_be_filled_leaves_nothing() {
        let (dir, templates) = templates(1 << 30);
        let fail = |_: &File| -> io::Result<()> { Err(io::ErrorKind::StorageFull.into()) };
        assert!(templates.get_or_fill(id(1), Part::Disk, fail).is_err());
        assert!(templates.get(id(1), Part::Disk).is_none());
        templates.settle(id(1));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_longest_unused_makes_room() {
        let (_dir, templates) = templates(5 << 20);
        for number in 1..=3 {
            let file = templates.nameless().unwrap();
            (&file).write_all(&vec![1; 2 << 20]).unwrap();
            templates.add(id(number), Part::Memory, file);
            templates.settle(id(number));
            std::thread::sleep(std::time::Duration::from_millis(15));
            templates.get(id(1), Part::Memory).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(15));
        }
        let there = [1, 2, 3].map(|number| templates.get(id(number), Part::Memory).is_some());
        assert_eq!(there, [true, false, true]);
    }
}
