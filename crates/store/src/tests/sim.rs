//! A file system in memory that records what is written, can fail any call, and can lose what was not synced.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::Random;
use crate::fs::{File, Fs};

/// A change, in the order in which it was made. Files are numbered.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    CreateDir,
    Create(String, usize),
    Append(usize, Vec<u8>),
    Sync(usize),
    Rename(String, String),
    Remove(String),
    SyncDir(String),
}

/// What a failing call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    NoSpace,
    Broken,
    /// Writes a part, and then there is no space. Other calls fail as if broken.
    Short,
}

/// When calls that change something fail.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// The call that fails first, counted from 0.
    pub(crate) at: usize,
    pub(crate) fault: Fault,
    /// All after it fail too, until the plan is taken away.
    pub(crate) forever: bool,
}

#[derive(Default)]
struct State {
    files: Vec<Vec<u8>>,
    /// By path.
    names: BTreeMap<String, usize>,
    log: Vec<Op>,
    calls: usize,
    plan: Option<Plan>,
    random: u64,
    now: u64,
    /// Whether reads fail, with that error.
    read_fails: bool,
}

/// Shared: what the store has, and what the test looks at.
#[derive(Clone, Default)]
pub(crate) struct Sim {
    state: Arc<Mutex<State>>,
    lock: Arc<AtomicBool>,
}

struct SimFile {
    sim: Sim,
    number: usize,
}

struct Lock(Arc<AtomicBool>);

impl Drop for Lock {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or(".", |(folder, _)| folder)
}

impl Sim {
    pub(crate) fn new() -> Self {
        let sim = Self::default();
        sim.state().random = 77;
        sim.state().now = 1_700_000_000_000;
        sim
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn fs(&self) -> Arc<dyn Fs> {
        Arc::new(self.clone())
    }

    pub(crate) fn log(&self) -> Vec<Op> {
        self.state().log.clone()
    }

    pub(crate) fn log_len(&self) -> usize {
        self.state().log.len()
    }

    /// How many calls that change something there were.
    pub(crate) fn calls(&self) -> usize {
        self.state().calls
    }

    pub(crate) fn plan(&self, plan: Option<Plan>) {
        self.state().plan = plan;
    }

    pub(crate) fn fail_reads(&self, fail: bool) {
        self.state().read_fails = fail;
    }

    pub(crate) fn pass(&self, ms: u64) {
        self.state().now += ms;
    }

    pub(crate) fn paths(&self, folder: &str) -> Vec<String> {
        let state = self.state();
        let inside = |path: &&String| parent(path) == folder;
        state.names.keys().filter(inside).cloned().collect()
    }

    pub(crate) fn bytes(&self, path: &str) -> Vec<u8> {
        let state = self.state();
        state.files[state.names[path]].clone()
    }

    /// Changes a file behind the store's back.
    pub(crate) fn set(&self, path: &str, bytes: Vec<u8>) {
        let mut state = self.state();
        let number = state.files.len();
        state.files.push(bytes);
        state.names.insert(path.to_owned(), number);
    }

    /// A copy of the present state, unlocked, with an empty log.
    pub(crate) fn copy(&self) -> Self {
        let state = self.state();
        let copy = Self::new();
        {
            let mut other = copy.state();
            other.files.clone_from(&state.files);
            other.names.clone_from(&state.names);
            other.now = state.now;
            other.random = state.random ^ 0x5555;
        }
        copy
    }

    /// What may be there if the power goes after so many operations: all that was synced, and of the rest
    /// what chance leaves, writes torn at sectors and names in any order.
    pub(crate) fn after_power_loss(log: &[Op], keep: Keep, random: &mut Random) -> Self {
        let mut disk = Disk::default();
        for op in log {
            disk.apply(op);
        }
        let sim = Self::new();
        disk.lose(keep, random, &mut sim.state());
        sim.state().random = random.next() | 1;
        sim
    }

    fn change(&self) -> io::Result<(MutexGuard<'_, State>, Option<Fault>)> {
        let mut state = self.state();
        let call = state.calls;
        state.calls += 1;
        let fault = state.plan.and_then(|plan| {
            let hit = call == plan.at || plan.forever && call > plan.at;
            hit.then_some(plan.fault)
        });
        Ok((state, fault))
    }

    fn simple(&self) -> io::Result<MutexGuard<'_, State>> {
        match self.change()? {
            (state, None) => Ok(state),
            (_, Some(fault)) => Err(error(fault)),
        }
    }
}

fn error(fault: Fault) -> io::Error {
    match fault {
        Fault::NoSpace => io::ErrorKind::StorageFull.into(),
        Fault::Broken | Fault::Short => io::Error::from_raw_os_error(5),
    }
}

impl Fs for Sim {
    fn create_dir(&self, _path: &str) -> io::Result<()> {
        self.simple()?.log.push(Op::CreateDir);
        Ok(())
    }

    fn create(&self, path: &str) -> io::Result<Box<dyn File>> {
        let mut state = self.simple()?;
        if state.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let number = state.files.len();
        state.files.push(Vec::new());
        state.names.insert(path.to_owned(), number);
        state.log.push(Op::Create(path.to_owned(), number));
        let sim = self.clone();
        Ok(Box::new(SimFile { sim, number }))
    }

    fn open(&self, path: &str) -> io::Result<Box<dyn File>> {
        let number = *self
            .state()
            .names
            .get(path)
            .ok_or(io::ErrorKind::NotFound)?;
        let sim = self.clone();
        Ok(Box::new(SimFile { sim, number }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.simple()?;
        let number = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), number);
        state.log.push(Op::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let mut state = self.simple()?;
        state.names.remove(path).ok_or(io::ErrorKind::NotFound)?;
        state.log.push(Op::Remove(path.to_owned()));
        Ok(())
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        if self.state().read_fails {
            return Err(error(Fault::Broken));
        }
        let paths = self.paths(path);
        Ok(paths
            .iter()
            .map(|path| path.rsplit('/').next().unwrap().to_owned())
            .collect())
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.simple()?.log.push(Op::SyncDir(path.to_owned()));
        Ok(())
    }

    fn lock(&self, _path: &str) -> io::Result<Box<dyn Any + Send + Sync>> {
        if self.lock.swap(true, Ordering::SeqCst) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Box::new(Lock(Arc::clone(&self.lock))))
    }

    fn now_ms(&self) -> u64 {
        self.state().now
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        let mut state = self.state();
        let mut random = Random(state.random);
        bytes.fill_with(|| random.next() as u8);
        state.random = random.0;
        Ok(())
    }
}

impl File for SimFile {
    fn append(&self, bytes: &[u8]) -> io::Result<usize> {
        let (mut state, fault) = self.sim.change()?;
        let count = match fault {
            None => bytes.len(),
            Some(Fault::Short) if bytes.len() > 1 => bytes.len() / 2,
            Some(fault) => return Err(error(fault)),
        };
        let bytes = &bytes[..count];
        state.files[self.number].extend_from_slice(bytes);
        state.log.push(Op::Append(self.number, bytes.to_vec()));
        Ok(count)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.sim.state();
        if state.read_fails {
            return Err(error(Fault::Broken));
        }
        state.files[self.number].read_at(bytes, offset)
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.sim.state().files[self.number].len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let (mut state, fault) = self.sim.change()?;
        if let Some(fault) = fault {
            // As Linux does it: what could not be written is dropped, and the next sync says nothing.
            let half = state.files[self.number].len() / 2;
            state.files[self.number][half..].fill(0);
            return Err(error(fault));
        }
        state.log.push(Op::Sync(self.number));
        Ok(())
    }
}

/// How much of what was not synced is there after the power came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    All,
    Nothing,
    Some,
}

/// A change of names that may not be durable yet. Both folders of a rename are in it.
#[derive(Clone)]
struct Naming {
    folders: Vec<String>,
    remove: Option<String>,
    insert: Option<(String, usize)>,
}

/// What is durable, and what is not yet.
#[derive(Default)]
struct Disk {
    durable: HashMap<usize, Vec<u8>>,
    pending: HashMap<usize, Vec<Vec<u8>>>,
    names: BTreeMap<String, usize>,
    now: BTreeMap<String, usize>,
    naming: Vec<Naming>,
}

impl Disk {
    fn apply(&mut self, op: &Op) {
        match op {
            Op::CreateDir => {}
            Op::Create(path, number) => {
                self.now.insert(path.clone(), *number);
                self.naming.push(Naming {
                    folders: vec![parent(path).to_owned()],
                    remove: None,
                    insert: Some((path.clone(), *number)),
                });
            }
            Op::Append(number, bytes) => {
                self.pending.entry(*number).or_default().push(bytes.clone());
            }
            Op::Sync(number) => {
                let pending = self.pending.remove(number).unwrap_or_default();
                self.durable
                    .entry(*number)
                    .or_default()
                    .extend(pending.concat());
            }
            Op::Rename(from, to) => {
                let number = self.now.remove(from).unwrap();
                self.now.insert(to.clone(), number);
                self.naming.push(Naming {
                    folders: vec![parent(to).to_owned(), parent(from).to_owned()],
                    remove: Some(from.clone()),
                    insert: Some((to.clone(), number)),
                });
            }
            Op::Remove(path) => {
                self.now.remove(path);
                self.naming.push(Naming {
                    folders: vec![parent(path).to_owned()],
                    remove: Some(path.clone()),
                    insert: None,
                });
            }
            Op::SyncDir(folder) => {
                let naming = std::mem::take(&mut self.naming);
                for change in naming {
                    if change.folders.contains(folder) {
                        self.commit(&change, true, true);
                    } else {
                        self.naming.push(change);
                    }
                }
            }
        }
    }

    fn commit(&mut self, change: &Naming, remove: bool, insert: bool) {
        if let Some(path) = change.remove.as_ref().filter(|_| remove) {
            self.names.remove(path);
        }
        if let Some((path, number)) = change.insert.as_ref().filter(|_| insert) {
            self.names.insert(path.clone(), *number);
        }
    }

    fn lose(mut self, keep: Keep, random: &mut Random, into: &mut State) {
        let mut naming = std::mem::take(&mut self.naming);
        if keep == Keep::Some {
            // Any order, any subset.
            for at in (1..naming.len()).rev() {
                naming.swap(at, random.below(at as u64 + 1) as usize);
            }
        }
        for change in naming {
            match (keep, random.below(4)) {
                (Keep::All, _) | (Keep::Some, 0 | 1) => self.commit(&change, true, true),
                // A rename between folders may be seen in both.
                (Keep::Some, 2) if change.folders.len() == 2 => self.commit(&change, false, true),
                _ => {}
            }
        }
        for (path, number) in self.names {
            let mut bytes = self.durable.get(&number).cloned().unwrap_or_default();
            for write in self.pending.get(&number).into_iter().flatten() {
                torn(&mut bytes, write, keep, random);
            }
            let place = into.files.len();
            into.files.push(bytes);
            into.names.insert(path, place);
        }
    }
}

/// A write that was not synced: there, not there, or with some sectors zero; and then perhaps not to its end.
fn torn(bytes: &mut Vec<u8>, write: &[u8], keep: Keep, random: &mut Random) {
    match keep {
        Keep::All => bytes.extend_from_slice(write),
        Keep::Nothing => {}
        Keep::Some => {
            let end = write.len()
                - random.below(2) as usize * random.below(write.len() as u64 + 1) as usize;
            for sector in write[..end].chunks(512) {
                if random.below(4) == 0 {
                    bytes.extend(std::iter::repeat_n(0, sector.len()));
                } else {
                    bytes.extend_from_slice(sector);
                }
            }
        }
    }
}
