//! All processes that are known: those that run, and for a while those that have ended.

use std::collections::{BTreeMap, VecDeque};

use belljar_protocol::v1::{ProcessRef, process_ref::Ref};

use super::process::Process;

/// Processes that run at a time.
pub(super) const MAX_RUNNING: usize = 1024;

/// Processes kept after their end: those that nobody has named, and all.
const MAX_ENDED_UNNAMED: usize = 256;
const MAX_ENDED: usize = 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct Table {
    processes: BTreeMap<u64, Process>,
    last: u64,
    running: usize,
    /// Which process a pid belongs to, until it is reaped.
    pids: BTreeMap<i32, u64>,
    names: BTreeMap<String, u64>,
    /// Ended ones in the order of their ends: unnamed and tied, and the others.
    ended: [VecDeque<u64>; 2],
    /// Memory for all rings, bytes.
    budget: usize,
    /// Memory of all rings, bytes.
    held: usize,
}

impl Table {
    pub(super) const fn new(budget: usize) -> Self {
        Self {
            processes: BTreeMap::new(),
            last: 0,
            running: 0,
            pids: BTreeMap::new(),
            names: BTreeMap::new(),
            ended: [VecDeque::new(), VecDeque::new()],
            budget,
            held: 0,
        }
    }

    pub(super) const fn running(&self) -> usize {
        self.running
    }

    /// Whether all rings together take more memory than they may.
    pub(super) const fn is_short(&self) -> bool {
        self.held > self.budget
    }

    #[cfg(test)]
    pub(super) const fn held(&self) -> usize {
        self.held
    }

    /// A number that was never used before.
    pub(super) const fn next_id(&mut self) -> u64 {
        self.last = self.last.saturating_add(1);
        self.last
    }

    pub(super) fn insert(&mut self, process: Process) {
        self.running = self.running.saturating_add(1);
        self.pids.insert(process.pid, process.id);
        if !process.name.is_empty() {
            self.names.insert(process.name.clone(), process.id);
        }
        self.processes.insert(process.id, process);
    }

    pub(super) fn get(&self, id: u64) -> Option<&Process> {
        self.processes.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut Process> {
        self.processes.get_mut(&id)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Process> {
        self.processes.values()
    }

    pub(super) fn by_name(&self, name: &str) -> Option<&Process> {
        self.processes.get(self.names.get(name)?)
    }

    /// The number of what a reference names.
    pub(super) fn find(&self, reference: Option<&ProcessRef>) -> Option<u64> {
        match reference?.r#ref.as_ref()? {
            Ref::Id(id) => self.processes.get(id).map(|process| process.id),
            Ref::Name(name) => self.names.get(name).copied(),
            Ref::Pid(pid) => self.pids.get(&i32::try_from(*pid).ok()?).copied(),
        }
    }

    /// A child was reaped; returns which process that was.
    pub(super) fn take_pid(&mut self, pid: i32) -> Option<u64> {
        let id = self.pids.remove(&pid)?;
        self.running = self.running.saturating_sub(1);
        Some(id)
    }

    /// Counts a process among the ended ones. Returns those that must be dropped to make room.
    pub(super) fn note_ended(&mut self, id: u64) -> Vec<u64> {
        let Some(process) = self.processes.get(&id) else {
            return Vec::new();
        };
        let is_wanted = !process.name.is_empty() || process.owner == super::process::Owner::None;
        if let Some(queue) = self.ended.get_mut(usize::from(is_wanted)) {
            queue.push_back(id);
        }
        let mut dropped = Vec::new();
        for (queue, most) in self.ended.iter_mut().zip([MAX_ENDED_UNNAMED, MAX_ENDED]) {
            let mut tries = queue.len();
            while queue.len() > most && tries > 0 {
                tries = tries.saturating_sub(1);
                let Some(oldest) = queue.pop_front() else {
                    break;
                };
                match self.processes.get(&oldest) {
                    // Somebody is still reading it.
                    Some(process) if !process.viewers.is_empty() => queue.push_back(oldest),
                    Some(_) => dropped.push(oldest),
                    None => {}
                }
            }
        }
        dropped
    }

    /// Takes a process that has ended out of the table.
    pub(super) fn remove(&mut self, id: u64) -> Option<Process> {
        let process = self.processes.remove(&id)?;
        if self.names.get(&process.name) == Some(&id) {
            self.names.remove(&process.name);
        }
        for queue in &mut self.ended {
            queue.retain(|known| *known != id);
        }
        for output in &process.outputs {
            self.held = self.held.saturating_sub(output.ring.held());
        }
        Some(process)
    }

    /// A ring has changed its size, bytes. Makes room if all together are too large: ended
    /// processes' first, the oldest first; then the largest of those that run.
    pub(super) fn note_held(&mut self, before: usize, after: usize) {
        self.held = self.held.saturating_sub(before).saturating_add(after);
        if self.held > self.budget {
            self.make_room();
        }
    }

    fn make_room(&mut self) {
        let ended: Vec<u64> = self.ended.iter().flatten().copied().collect();
        for id in ended {
            self.shrink(id, |_| u64::MAX);
            if self.held <= self.budget {
                return;
            }
        }
        // Half of the largest ring, until it fits: a ring is at its half at least twice as long.
        for _ in 0..64 {
            let kept = |process: &Process| -> u64 {
                let held = process.holds;
                let kept = process.outputs.iter().zip(held).map(|(output, hold)| {
                    let end = hold.unwrap_or(u64::MAX).min(output.ring.newest());
                    end.saturating_sub(output.ring.oldest())
                });
                kept.max().unwrap_or(0)
            };
            let largest = self.processes.values().max_by_key(|process| kept(process));
            let Some((id, size)) = largest.map(|process| (process.id, kept(process))) else {
                return;
            };
            if size < 4096 {
                // All that is left is held by owners: their processes wait.
                return;
            }
            self.shrink(id, |kept| kept / 2);
            if self.held <= self.budget {
                return;
            }
        }
    }

    /// Trims the rings of a process by so much, as a function of what is kept; not what its owner
    /// holds.
    fn shrink(&mut self, id: u64, by: impl Fn(u64) -> u64) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        let holds = process.holds;
        for (output, hold) in process.outputs.iter_mut().zip(holds) {
            let ring = &mut output.ring;
            let before = ring.held();
            let end = hold.unwrap_or(u64::MAX).min(ring.newest());
            let kept = end.saturating_sub(ring.oldest());
            ring.trim(ring.oldest().saturating_add(by(kept).min(kept)));
            self.held = self.held.saturating_sub(before).saturating_add(ring.held());
        }
    }
}
