//! Starting a program that the worker has prepared.

use std::cell::Cell;
use std::collections::VecDeque;
use std::ffi::CString;
use std::time::{Duration, Instant};

use belljar_protocol::v1::{self, error::Code, event::What};
use rustix::event::epoll::EventFlags;

use super::channel::{Role, Viewer};
use super::input::Input;
use super::process::{About, Output, Owner, Process, sane_size};
use super::requests::MAX_NAME;
use super::table::MAX_RUNNING;
use super::{Holder, KIND_STDERR, KIND_STDIN, KIND_STDOUT, KIND_TERMINAL, token, unix_ns};
use crate::exec::cgroup::Leaf;
use crate::exec::lifecycle::Lifecycle;
use crate::exec::plan;
use crate::exec::streams::{self, OwnEnds};
use crate::sys::spawn::{
    Failure, Ids, Program, ResourceLimit, START_TIME, Spawned, Starting, Step,
};
use crate::sys::{self, Reaped};
use crate::wire::{SpawnFailed, Start, Started, from_holder::Message as Said};

/// Bytes of a ring: by default, and the most and the least that is given.
const DEFAULT_RING: u64 = 1 << 20;
const MAX_RING: u64 = 64 << 20;
const MIN_RING: u64 = 4 << 10;

/// Arguments are kept for those who ask, up to so much memory, bytes; each takes some itself.
const MAX_ARGV_KEPT: usize = 4 << 10;
const ARGUMENT_COST: usize = size_of::<Vec<u8>>();

/// Longest working directory, bytes: the kernel's PATH_MAX.
const MAX_CWD: usize = 4096;

/// Longest key of an owner, bytes.
const MAX_KEY: usize = 32;

/// Longest text that names a user, bytes.
const MAX_USER: usize = 256;

/// RLIMIT_NOFILE
const RLIMIT_NOFILE: u32 = 7;

/// Why a start came to nothing.
enum NotStarted {
    Refused(Code, &'static str),
    Failed(Failure),
}

impl From<rustix::io::Errno> for NotStarted {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Failed(Failure {
            step: Step::Descriptors,
            errno: errno.raw_os_error(),
        })
    }
}

/// A program with all that belongs to it, from its check to its entry in the table.
#[derive(Debug)]
struct Prepared {
    channel: u64,
    start: Start,
    terminal: Option<v1::Terminal>,
    own: OwnEnds,
    leaf: Option<Leaf>,
}

/// One whose start takes long: its cgroup is frozen, or its file system slow.
#[derive(Debug)]
pub(super) struct Pending {
    prepared: Prepared,
    starting: Starting,
}

impl Holder {
    /// Starts a program for a channel, or finds the one of that name.
    pub(super) fn start(&mut self, channel: u64, start: Start) {
        if self.stopping.is_some() {
            return self.refuse(channel, Code::ShuttingDown, "the guest is shutting down");
        }
        if let Some(known) = self.table.by_name(&start.name).map(|it| (it.id, it.pid)) {
            let (id, pid) = known;
            let is_running = self.table.get(id).is_some_and(Process::is_running);
            if is_running || !start.replace_ended {
                return self.say(
                    channel,
                    Said::Started(Started {
                        pid: pid.unsigned_abs(),
                        id,
                        existed: true,
                    }),
                );
            }
            self.forget(id);
        }
        let busy = self.table.running().saturating_add(self.starting.len());
        if busy >= MAX_RUNNING {
            let message = format!("{MAX_RUNNING} processes run already");
            return self.refuse(channel, Code::Busy, message);
        }
        let is_same = |it: &Pending| it.prepared.start.name == start.name;
        if !start.name.is_empty() && self.starting.iter().any(is_same) {
            // What becomes of that one decides; see `start_followers`.
            if let Some(channel) = self.channels.get_mut(&channel) {
                channel.role = Role::Starting;
            }
            self.followers.push((channel, start));
            return;
        }
        if let Err(error) = self.try_start(channel, start) {
            self.say_not_started(channel, error);
        }
    }

    fn say_not_started(&mut self, channel: u64, error: NotStarted) {
        match error {
            NotStarted::Refused(code, message) => self.refuse(channel, code, message),
            NotStarted::Failed(failure) => self.say(
                channel,
                Said::SpawnFailed(SpawnFailed {
                    step: failure.step.number(),
                    errno: failure.errno.unsigned_abs(),
                }),
            ),
        }
    }

    fn try_start(&mut self, channel: u64, start: Start) -> Result<(), NotStarted> {
        check(&start)?;
        let mut program = program(&start).ok_or(NotStarted::Refused(
            Code::Invalid,
            "a path, an argument or a variable holds a NUL byte",
        ))?;
        let terminal = start.terminal.as_ref().map(sane_size);
        let (own, child) = match &terminal {
            Some(size) => streams::terminal(size)?,
            None => streams::pipes(start.stdin)?,
        };
        if let Some(ids) = &program.ids {
            child.give_to(ids.uid, ids.gid);
        }
        // What this process may open more than programs do is its own.
        let is_limited = |limit: &ResourceLimit| limit.resource == RLIMIT_NOFILE;
        if !program.limits.iter().any(is_limited)
            && let Some(values) = descriptor_limit(self.descriptors)
        {
            program.limits.push(ResourceLimit {
                resource: RLIMIT_NOFILE,
                values,
            });
        }
        let leaf = self.take_leaf(start.limits.as_ref())?;
        // Where some hang, more may: the others are not to wait for each of them.
        let patience = match self.starting.len() {
            0 | 1 => START_TIME,
            _ => Duration::ZERO,
        };
        let spawned = self.spawner.spawn(
            program,
            &child.stdio(&self.null),
            leaf.as_ref().map(Leaf::folder),
            patience,
        );
        drop(child);
        self.note_untidy();
        let prepared = Prepared {
            channel,
            start,
            terminal,
            own,
            leaf,
        };
        match spawned {
            Ok(Spawned::Running(pid)) => {
                self.enter(prepared, pid);
            }
            Ok(Spawned::Starting(starting)) => self.begin_to_wait(prepared, starting),
            Err((failure, _)) => {
                self.returned.extend(prepared.leaf);
                return Err(NotStarted::Failed(failure));
            }
        }
        Ok(())
    }

    fn begin_to_wait(&mut self, prepared: Prepared, starting: Starting) {
        if let Some(channel) = self.channels.get_mut(&prepared.channel) {
            channel.role = Role::Starting;
        }
        self.starting.push(Pending { prepared, starting });
    }

    /// Looks whether programs run by now whose start takes long.
    pub(super) fn check_starting(&mut self) {
        for pending in std::mem::take(&mut self.starting) {
            self.check_start(pending);
        }
    }

    /// Returns the number of the process if the program has got to run.
    fn check_start(&mut self, pending: Pending) -> Option<u64> {
        let Pending { prepared, starting } = pending;
        let channel = prepared.channel;
        match starting.check(&mut self.spawner) {
            Err(starting) => {
                self.starting.push(Pending { prepared, starting });
                None
            }
            Ok(Ok(pid)) => {
                let name = prepared.start.name.clone();
                let id = self.enter(prepared, pid);
                self.start_followers(&name);
                Some(id)
            }
            Ok(Err(failure)) => {
                let name = prepared.start.name.clone();
                self.returned.extend(prepared.leaf);
                self.note_untidy();
                if let Some(channel) = self.channels.get_mut(&channel) {
                    channel.role = Role::Idle;
                }
                self.say_not_started(channel, NotStarted::Failed(failure));
                self.start_followers(&name);
                None
            }
        }
    }

    /// Answers those who wanted a program of the name of one whose start has just been decided: with that one
    /// if it runs, else by a start of their own.
    fn start_followers(&mut self, name: &str) {
        let is_meant = |(_, start): &mut (u64, Start)| start.name == name;
        let followers: Vec<_> = self.followers.extract_if(.., is_meant).collect();
        for (id, start) in followers {
            let Some(channel) = self.channels.get_mut(&id) else {
                continue;
            };
            if matches!(channel.role, Role::Starting) {
                channel.role = Role::Idle;
                self.start(id, start);
            }
        }
    }

    /// A child has ended that may be one whose program did not run yet.
    pub(super) fn take_start(&mut self, reaped: &Reaped) -> bool {
        let known = |it: &Pending| it.starting.pid() == reaped.pid;
        let Some(at) = self.starting.iter().position(known) else {
            return false;
        };
        let pending = self.starting.swap_remove(at);
        if let Some(id) = self.check_start(pending) {
            self.table.take_pid(reaped.pid);
            self.process_ended(id, reaped);
        }
        true
    }

    /// Nobody waits for a start any more.
    pub(super) fn cancel_start(&mut self, channel: u64) {
        for pending in &self.starting {
            let prepared = &pending.prepared;
            if prepared.channel == channel && !prepared.start.detached {
                match prepared.leaf.as_ref().map(Leaf::kill) {
                    Some(Ok(())) => {}
                    _ => sys::signal_process(pending.starting.pid(), libc::SIGKILL as u32),
                }
            }
        }
    }

    /// Enters a process that runs, with the channel that started it as its first reader, and tells of
    /// it.
    fn enter(&mut self, prepared: Prepared, pid: i32) -> u64 {
        let channel = prepared.channel;
        let process = self.record(prepared, pid);
        let id = process.id;
        if let Err(error) = self.watch_process(&process) {
            // Its output cannot be read: without memory for that it is better not run.
            crate::log!("cannot watch process {pid}: {error}; killing it");
            process.kill_tree();
        }
        let event = v1::ProcessStarted {
            id,
            name: process.name.clone(),
            pid: pid.unsigned_abs(),
        };
        self.insert(channel, process);
        let started = Started {
            pid: pid.unsigned_abs(),
            id,
            existed: false,
        };
        self.say(channel, Said::Started(started));
        self.add_event(What::Started(event));
        id
    }

    /// A cgroup, with limits if there are any. Without cgroups programs run all the same, but not
    /// with limits that nobody enforces.
    fn take_leaf(&mut self, limits: Option<&v1::Limits>) -> Result<Option<Leaf>, NotStarted> {
        let limits = limits.filter(|limits| **limits != v1::Limits::default());
        let leaf = self.cgroups.as_mut().and_then(|cgroups| {
            let leaf = cgroups.take();
            leaf.inspect_err(|error| crate::log!("no cgroup for a program: {error}"))
                .ok()
        });
        let (Some(limits), Some(limited)) = (limits, &leaf) else {
            return match limits {
                Some(_) => Err(NotStarted::Refused(
                    Code::Invalid,
                    "limits: this guest has no cgroups",
                )),
                None => Ok(leaf),
            };
        };
        match limited.limit(limits) {
            Ok(()) => Ok(leaf),
            Err(error) => {
                crate::log!("cannot limit a program: {error}");
                self.returned.extend(leaf);
                Err(NotStarted::Refused(
                    Code::Invalid,
                    "limits: the guest's kernel does not take one of them",
                ))
            }
        }
    }

    fn record(&mut self, prepared: Prepared, pid: i32) -> Process {
        let Prepared {
            channel,
            start,
            terminal,
            own,
            leaf,
        } = prepared;
        let now = Instant::now();
        let ring = match start.ring_bytes {
            0 => DEFAULT_RING,
            bytes => bytes.clamp(MIN_RING, MAX_RING),
        };
        let about = About {
            argv: cut(&start.argv, MAX_ARGV_KEPT),
            cwd: start.cwd,
            user: start.user,
            limits: start.limits,
            boottime_ns: crate::boot::now_ns(),
            unix_ns: unix_ns(),
        };
        let owner = if start.detached {
            Owner::None
        } else {
            Owner::Channel(channel)
        };
        Process {
            id: self.table.next_id(),
            name: start.name,
            pid,
            about: Box::new(about),
            started: now,
            keep: Duration::from_millis(start.keep_ms),
            life: Lifecycle::new(plan::limit(start.time_limit_ms, start.grace_ms, now)),
            leaf,
            owner,
            owner_key: start.owner_key,
            holds: [None; 2],
            outputs: [
                Output::new(Some(own.stdout), ring),
                Output::new(own.stderr, ring),
            ],
            terminal,
            stdin: own.stdin,
            stdin_writable: true,
            input: Input::default(),
            senders: VecDeque::new(),
            viewers: Vec::new(),
            waiters: Vec::new(),
            ended: None,
            was_killed: Cell::new(false),
            finals: [None; 2],
            drain_to: None,
        }
    }

    fn watch_process(&self, process: &Process) -> rustix::io::Result<()> {
        let input = EventFlags::IN | EventFlags::ET;
        let output = EventFlags::OUT | EventFlags::ET;
        let id = process.id;
        let [stdout, stderr] = process.outputs.each_ref().map(|output| output.fd.as_ref());
        if process.terminal.is_some() {
            if let Some(fd) = stdout {
                self.watch(fd, token(id, KIND_TERMINAL), input | output)?;
            }
            return Ok(());
        }
        let watched = [
            (stdout, KIND_STDOUT, input),
            (stderr, KIND_STDERR, input),
            (process.stdin.as_ref(), KIND_STDIN, output),
        ];
        for (fd, kind, flags) in watched {
            if let Some(fd) = fd {
                self.watch(fd, token(id, kind), flags)?;
            }
        }
        Ok(())
    }

    fn insert(&mut self, channel: u64, mut process: Process) {
        let id = process.id;
        let mut viewer = Viewer::new(id);
        viewer.is_told_all = !process.name.is_empty() || !process.owner_key.is_empty();
        viewer.size = process.terminal;
        (viewer.input_session, _) = process.input.open(0);
        if let Some(at) = process.life.wakes_at() {
            self.timers.insert((at, id));
        }
        match self.channels.get_mut(&channel) {
            Some(known) => {
                known.role = Role::Viewer(Box::new(viewer));
                process.viewers.push(channel);
            }
            // Gone while the program was started.
            None => {
                let is_tied = process.owner != Owner::None;
                process.disown();
                if is_tied {
                    process.kill_tree();
                }
            }
        }
        self.table.insert(process);
    }
}

fn check(start: &Start) -> Result<(), NotStarted> {
    let refused = |message| Err(NotStarted::Refused(Code::Invalid, message));
    if start.name.len() > MAX_NAME {
        return refused("name: longer than 128 bytes");
    }
    if start.owner_key.len() > MAX_KEY {
        return refused("owner_key: longer than 32 bytes");
    }
    if start.cwd.len() > MAX_CWD {
        return refused("cwd: longer than 4096 bytes");
    }
    if start.user.len() > MAX_USER {
        return refused("user: longer than 256 bytes");
    }
    Ok(())
}

/// `None`: a string holds a NUL byte.
fn program(start: &Start) -> Option<Program> {
    let strings = |list: &[Vec<u8>]| -> Option<Vec<CString>> {
        list.iter()
            .map(|bytes| CString::new(bytes.as_slice()).ok())
            .collect()
    };
    Some(Program {
        candidates: strings(&start.candidates)?,
        argv: strings(&start.argv)?,
        env: strings(&start.env)?,
        cwd: CString::new(start.cwd.as_slice()).ok()?,
        ids: start.identity.as_ref().map(|identity| Ids {
            uid: identity.uid,
            gid: identity.gid,
            groups: identity.groups.clone(),
        }),
        limits: start
            .rlimits
            .iter()
            .map(|limit| ResourceLimit {
                resource: limit.resource,
                values: [limit.soft, limit.hard],
            })
            .collect(),
        has_terminal: start.terminal.is_some(),
    })
}

/// The limit of descriptors for programs: our own hard one, and a soft one that is not ours.
fn descriptor_limit(soft: u64) -> Option<[u64; 2]> {
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let hard = own.maximum.unwrap_or(u64::MAX);
    (own.current != Some(soft)).then_some([soft.min(hard), hard])
}

/// The first arguments, as far as they fit into so much memory.
fn cut(argv: &[Vec<u8>], most: usize) -> Vec<Vec<u8>> {
    let mut left = most;
    let mut kept = Vec::new();
    for argument in argv {
        let part = argument.get(..left).unwrap_or(argument);
        kept.push(part.to_vec());
        left = left.saturating_sub(part.len().saturating_add(ARGUMENT_COST));
        if left == 0 {
            break;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_kept_by_the_memory_that_they_take() {
        let empty = vec![Vec::new(); 200_000];
        assert!(cut(&empty, MAX_ARGV_KEPT).len() <= MAX_ARGV_KEPT / ARGUMENT_COST + 1);
        let words = [b"ls".to_vec(), b"-l".to_vec()];
        assert_eq!(cut(&words, MAX_ARGV_KEPT), words);
        let long = [vec![b'x'; 5000], b"y".to_vec()];
        assert_eq!(cut(&long, MAX_ARGV_KEPT), [vec![b'x'; MAX_ARGV_KEPT]]);
    }
}
