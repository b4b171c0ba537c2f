//! Processes end: reaping, the one truthful end, and how long it is remembered.

use std::time::Instant;

use belljar_protocol::v1::{self, event::What};

use super::Holder;
use super::channel::Role;
use super::process::{Ended, Owner};
use crate::exec::cgroup::Leaf;
use crate::exec::lifecycle::Status;
use crate::sys::{self, Reaped};
use crate::wire::from_holder::Message as Said;

impl Holder {
    /// Waits for every child that has ended: the worker, programs, and whatever else was left to
    /// PID 1.
    pub(super) fn reap(&mut self) {
        let mut buffer = [0_u8; 1024];
        while rustix::io::read(&self.signals, &mut buffer[..]).is_ok_and(|got| got == buffer.len())
        {
        }
        loop {
            match sys::reap() {
                Ok(Some(reaped)) => self.take_reaped(&reaped),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn take_reaped(&mut self, reaped: &Reaped) {
        if self.worker.pid == Some(reaped.pid) {
            self.worker_ended(reaped.status);
        } else if let Some(id) = self.table.take_pid(reaped.pid) {
            self.process_ended(id, reaped);
        } else if self.take_start(reaped) {
            // A program that did not get to run, or not for long.
        } else {
            // Somebody's orphan: its cgroup may be empty now. There may be many of them, all the time.
            if self.tidy_at.is_none() {
                self.note_untidy();
            }
        }
    }

    pub(super) fn process_ended(&mut self, id: u64, reaped: &Reaped) {
        let Some(process) = self.table.get_mut(id) else {
            return;
        };
        let now = Instant::now();
        let status = to_status(reaped.status);
        let is_killed = matches!(status, Status::Signalled { number: 9, .. });
        let leaf = process.leaf.as_ref();
        let out_of_memory = leaf
            .filter(|_| is_killed && !process.was_killed.get())
            .is_some_and(Leaf::ran_out_of_memory);
        let usage = usage(leaf, reaped);
        let action = process.life.ended(status, out_of_memory);
        let end = v1::End {
            how: process.life.end().cloned(),
            usage: Some(usage),
            wall_us: u64::try_from(now.saturating_duration_since(process.started).as_micros())
                .unwrap_or(u64::MAX),
        };
        process.ended = Some(Ended {
            end: end.clone(),
            boottime_ns: crate::boot::now_ns(),
            expires: now.checked_add(process.keep),
        });
        if let Some(action) = action {
            process.act(action);
        }
        // A terminal still takes the keys of those who look at what runs on in it.
        if process.terminal.is_none() {
            process.stdin = None;
        }
        process.begin_finals();
        if let Some(at) = process.ended.as_ref().and_then(|ended| ended.expires) {
            self.timers.insert((at, id));
        }
        // The cgroup is looked at when there is time.
        let has_leaf = process.leaf.is_some();
        let name = process.name.clone();
        if has_leaf {
            self.emptied.push(id);
            self.note_untidy_end();
        }
        let out_of_memory = matches!(end.how, Some(v1::end::How::OutOfMemory(_)));
        self.drive(id);
        self.tell_waiters(id);
        for dropped in self.table.note_ended(id) {
            self.forget(dropped);
        }
        // A leaf that tells of no news has told of this kill already.
        let is_news = |leaf: &Leaf| leaf.take_out_of_memory();
        let leaf = self.table.get(id).and_then(|it| it.leaf.as_ref());
        if out_of_memory && leaf.is_none_or(is_news) {
            let name = name.clone();
            self.add_event(What::OutOfMemory(v1::GuestOutOfMemory { id, name }));
        }
        self.add_event(What::Ended(v1::ProcessEnded {
            id,
            name,
            end: Some(end),
        }));
    }

    /// Memory has run out somewhere: tells whose, also of programs that live on after one that they had
    /// started was killed.
    pub(super) fn note_out_of_memory(&mut self) {
        let Some(cgroups) = &mut self.cgroups else {
            return;
        };
        if !cgroups.take_out_of_memory() {
            return;
        }
        let struck: Vec<_> = self
            .table
            .all()
            .filter(|process| process.leaf.as_ref().is_some_and(Leaf::take_out_of_memory))
            .map(|process| (process.id, process.name.clone()))
            .collect();
        for (id, name) in struck {
            self.add_event(What::OutOfMemory(v1::GuestOutOfMemory { id, name }));
        }
    }

    /// Answers those who wait for the end, once all is known about it.
    pub(super) fn tell_waiters(&mut self, id: u64) {
        let Some(process) = self.table.get_mut(id).filter(|it| it.is_settled()) else {
            return;
        };
        if process.waiters.is_empty() {
            return;
        }
        let waiters = std::mem::take(&mut process.waiters);
        let info = super::info::full(process);
        for waiter in waiters {
            if let Some(channel) = self.channels.get_mut(&waiter) {
                channel.role = Role::Idle;
                channel.queue(Said::Info(info.clone()));
                self.dirty.insert(waiter);
            }
        }
    }

    /// The time of a record is over, unless somebody still reads it.
    pub(super) fn expire(&mut self, id: u64, now: Instant) {
        let Some(process) = self.table.get_mut(id) else {
            return;
        };
        let is_awaited = matches!(process.owner, Owner::Lost { .. });
        if process.viewers.is_empty() && !is_awaited {
            return self.forget(id);
        }
        let keep = process.keep.max(std::time::Duration::from_secs(1));
        if let (Some(ended), Some(at)) = (&mut process.ended, now.checked_add(keep)) {
            ended.expires = Some(at);
            self.timers.insert((at, id));
        }
    }

    /// Drops the record of a process that has ended; its readers are cut off.
    pub(super) fn forget(&mut self, id: u64) {
        let Some(mut process) = self.table.remove(id) else {
            return;
        };
        // What it has started in the background may live on, and write.
        self.abandoned.take(&mut process);
        self.again.insert(id);
        if let Some(at) = process.ended.as_ref().and_then(|ended| ended.expires) {
            self.timers.remove(&(at, id));
        }
        for viewer in process.viewers.iter().chain(&process.waiters) {
            self.dirty.remove(viewer);
            self.channels.remove(viewer);
        }
        if process.leaf.is_some() {
            self.returned.extend(process.leaf);
            self.note_untidy();
        }
    }

    /// Removes the cgroups of processes that have ended and left nothing behind.
    pub(super) fn collect_leaves(&mut self) {
        let Some(cgroups) = &mut self.cgroups else {
            return;
        };
        let mut populated = Vec::new();
        for id in std::mem::take(&mut self.emptied) {
            let Some(process) = self.table.get_mut(id) else {
                continue;
            };
            match &process.leaf {
                Some(leaf) if !cgroups.remove_if_empty(leaf) => populated.push(id),
                _ => process.leaf = None,
            }
        }
        self.emptied = populated;
    }
}

fn usage(leaf: Option<&Leaf>, reaped: &Reaped) -> v1::Usage {
    let mut usage = leaf.map(Leaf::usage).unwrap_or_default();
    // Nothing of it is left to be counted; what it started may be, though.
    if usage.cpu_us == 0 {
        usage.cpu_us = reaped.cpu_us;
    }
    if usage.memory_peak == 0 {
        usage.memory_peak = reaped.memory_peak;
    }
    usage
}

fn to_status(status: i32) -> Status {
    let number = status & 0x7f;
    if number == 0 {
        return Status::Exited((status >> 8) as u8);
    }
    Status::Signalled {
        number: number.unsigned_abs(),
        core_dumped: status & 0x80 != 0,
    }
}
