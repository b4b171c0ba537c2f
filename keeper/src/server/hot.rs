//! Templates that are used again and again, in huge pages (`crate::huge`): in their files where the file system can have
//! it so, else copied into sealed memory of this process, within a budget. The longest unused makes room.

use std::collections::HashSet;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::{Arc, Mutex};

use belljar_store::SnapshotId;
use rustix::fs::{SealFlags, fcntl_add_seals};

use super::capture::{memory, sealable};
use super::templates::read_only;
use super::{Busy, Shared, locked, log};
use crate::huge;

/// Of this machine's memory, what is held at the most unless somebody says: one part of so many.
const SHARE: u64 = 8;
/// Bytes that are copied at a time.
const PIECE: u64 = 1 << 20;

pub(crate) struct Hot {
    /// Bytes.
    budget: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The last used comes last.
    held: Vec<Held>,
    /// Of which nothing is to be done: it was done, is being done, or is of no use.
    seen: HashSet<SnapshotId>,
}

struct Held {
    id: SnapshotId,
    file: File,
    bytes: u64,
}

impl Hot {
    /// `budget`: bytes of memory; `None`: a share of this machine's.
    pub(super) fn new(budget: Option<u64>) -> Self {
        Self {
            budget: budget.unwrap_or_else(|| memory(["MemTotal:"])[0].unwrap_or(0) / SHARE),
            state: Mutex::default(),
        }
    }

    /// The memory of a snapshot, if it is held here.
    pub(super) fn get(&self, id: SnapshotId) -> Option<File> {
        let mut state = locked(&self.state);
        let at = state.held.iter().position(|held| held.id == id)?;
        let held = state.held.remove(at);
        let file = read_only(&held.file).ok();
        state.held.push(held);
        file
    }

    /// The same, of which nobody makes use now.
    pub(super) fn peek(&self, id: SnapshotId) -> Option<File> {
        let state = locked(&self.state);
        let held = state.held.iter().find(|held| held.id == id)?;
        read_only(&held.file).ok()
    }

    /// Forgets a snapshot. Guests that have its memory keep it.
    pub(super) fn remove(&self, id: SnapshotId) {
        let mut state = locked(&self.state);
        state.held.retain(|held| held.id != id);
        state.seen.remove(&id);
    }

    /// Has a complete template of memory in huge pages soon, behind whoever asked for it.
    pub(super) fn begin(shared: &Arc<Shared>, id: SnapshotId, template: &File) {
        if !locked(&shared.hot.state).seen.insert(id) {
            return;
        }
        let Ok(template) = read_only(template) else {
            return;
        };
        let busy = Busy::begin(shared);
        let work = move || {
            // A guest that has just been restored goes first. It is only slower if that cannot be had.
            let _ = rustix::process::setpriority_process(None, 10);
            if let Err(error) = busy.shared().hot.warm(id, &template) {
                log::line(&format!("no huge pages for snapshot {id}: {error}"));
            }
        };
        let made = std::thread::Builder::new()
            .name("huge".to_owned())
            .spawn(work);
        if let Err(error) = made {
            log::line(&format!("no huge pages for snapshot {id}: {error}"));
        }
    }

    fn warm(&self, id: SnapshotId, template: &File) -> io::Result<()> {
        if huge::collapse(template)?.huge > 0 {
            return Ok(());
        }
        // About what it will take.
        let bytes = template.metadata()?.blocks().saturating_mul(512);
        let enough = memory(["MemAvailable:"])[0].is_none_or(|free| free / 2 >= bytes);
        if bytes == 0 || bytes > self.budget || !enough {
            return Ok(());
        }
        let file = copy(template)?;
        let collapsed = huge::collapse(&file)?;
        if collapsed.huge == 0 {
            return Ok(());
        }
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(file.as_fd(), seals)?;
        let bytes = file.metadata()?.blocks().saturating_mul(512);
        self.hold(Held { id, file, bytes });
        Ok(())
    }

    fn hold(&self, held: Held) {
        let mut state = locked(&self.state);
        // It was removed meanwhile.
        if !state.seen.contains(&held.id) {
            return;
        }
        let mut all = held.bytes;
        state.held.push(held);
        let mut keep = Vec::new();
        while let Some(held) = state.held.pop() {
            if !keep.is_empty() {
                all = all.saturating_add(held.bytes);
            }
            if all > self.budget {
                // It may come back.
                state.seen.remove(&held.id);
            } else {
                keep.push(held);
            }
        }
        keep.reverse();
        state.held = keep;
    }
}

/// The same contents in memory, which nobody can open for writing.
fn copy(template: &File) -> io::Result<File> {
    let length = template.metadata()?.len();
    let file = sealable("template")?;
    file.set_len(length)?;
    let mut bytes = Vec::new();
    let mut at = 0;
    while let Some(data) = huge::next_data(template, at, length)? {
        let mut start = data.start;
        while start < data.end {
            let count = data.end.saturating_sub(start).min(PIECE);
            bytes.resize(usize::try_from(count).unwrap_or(0), 0);
            template.read_exact_at(&mut bytes, start)?;
            file.write_all_at(&bytes, start)?;
            start = start.saturating_add(count);
        }
        at = data.end;
    }
    file.set_permissions(Permissions::from_mode(0o400))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(number: u8, bytes: u64) -> Held {
        let file = sealable("test").unwrap();
        file.set_len(u64::from(number)).unwrap();
        let id = SnapshotId([number; 16]);
        Held { id, file, bytes }
    }

    #[test]
    fn the_longest_unused_makes_room_and_may_come_back() {
        let hot = Hot::new(Some(10));
        let ids = [1, 2, 3, 4].map(|number| SnapshotId([number; 16]));
        for number in 1..=3 {
            locked(&hot.state).seen.insert(SnapshotId([number; 16]));
            hot.hold(held(number, 4));
            hot.get(ids[0]);
        }
        let there = |hot: &Hot| ids.map(|id| hot.get(id).is_some());
        assert_eq!(there(&hot), [true, false, true, false]);
        assert!(!locked(&hot.state).seen.contains(&ids[1]));
        let file = hot.get(ids[2]).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3, "it is that one's");
        hot.remove(ids[0]);
        assert_eq!(there(&hot), [false, false, true, false]);
        // One that was removed while it was copied is not held.
        hot.hold(held(4, 1));
        assert_eq!(there(&hot), [false, false, true, false]);
    }

    #[test]
    fn a_copy_has_the_contents_and_the_holes_and_cannot_be_opened_for_writing() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(9 << 20).unwrap();
        file.write_all_at(&[7; 5000], 3 << 20).unwrap();
        file.write_all_at(&[8; 2 << 20], 5 << 20).unwrap();
        let copied = copy(&file).unwrap();
        let read = |file: &File| {
            let mut bytes = vec![0; 9 << 20];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(read(&copied) == read(&file));
        assert!(copied.metadata().unwrap().blocks() * 512 < 3 << 20);
        assert_eq!(copied.metadata().unwrap().mode() & 0o777, 0o400);
    }

    #[test]
    fn what_cannot_be_huge_in_its_file_is_in_memory() {
        let contents = vec![8; 5 << 20];
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&contents, 0).unwrap();
        let probe = copy(&file).unwrap();
        if huge::collapse(&probe).unwrap().huge == 0 {
            eprintln!("skipped: this kernel has no huge pages for shared memory");
            return;
        }
        let hot = Hot::new(Some(64 << 20));
        let id = SnapshotId([1; 16]);
        locked(&hot.state).seen.insert(id);
        hot.warm(id, &file).unwrap();
        let in_place = huge::collapse(&file).unwrap().huge > 0;
        let held = hot.get(id);
        assert_eq!(held.is_some(), !in_place);
        let mut bytes = vec![0; contents.len()];
        let given = held.as_ref().unwrap_or(&file);
        given.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == contents);
        if let Some(held) = held {
            assert!(held.write_all_at(b"x", 0).is_err(), "it is for reading");
            let path = std::os::fd::AsRawFd::as_raw_fd(&held);
            let anew = File::options()
                .write(true)
                .open(format!("/proc/self/fd/{path}"));
            // Root may open it, and finds it sealed.
            assert!(anew.and_then(|file| file.write_all_at(b"x", 0)).is_err());
        }
    }

    #[test]
    fn what_is_larger_than_the_budget_is_not_copied() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[8; 2 << 20], 0).unwrap();
        let hot = Hot::new(Some(1 << 20));
        let id = SnapshotId([1; 16]);
        locked(&hot.state).seen.insert(id);
        hot.warm(id, &file).unwrap();
        assert!(hot.get(id).is_none());
    }
}
