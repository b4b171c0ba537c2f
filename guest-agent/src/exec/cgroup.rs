//! A cgroup (version 2) for every program: what it starts cannot leave it, so killing it leaves no
//! descendant, and the kernel says there when it ran out of memory.
//!
//! Making a cgroup and removing it take a third of the time of starting a program, so some are kept ready;
//! making and removing happen in batches, while no program is started. None is used twice: a program that may write to its cgroup (frozen,
//! threaded, with children or limits of its own) must not hand that on to the next one, and once
//! `cgroup.kill` was written, Linux (seen on 6.18) kills everything that `clone3` starts in it, too.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use belljar_protocol::v1::{Limits, Usage};
use rustix::fs::{AtFlags, Mode, OFlags, inotify};
use rustix::io::Errno;

/// Holds the cgroups of all programs, so that they can be frozen together.
const USER: &str = "user";

/// Fresh cgroups kept for the next programs. Each takes some 16 KiB of the kernel's memory.
const KEPT: usize = 8;

/// The same in a guest of next to no memory.
const KEPT_IF_SMALL: usize = 2;

/// Memory of a guest that has enough, bytes.
const ENOUGH_MEMORY: u64 = 96 << 20;

/// Cgroups with survivors that are looked at in one go.
const LOOKED_AT: usize = 4;

/// Longest control file read, bytes.
const MAX_FILE: usize = 1024;

/// How often the list of processes is read to signal all of them.
const SIGNAL_ROUNDS: usize = 8;

/// The cgroup of one program.
#[derive(Debug)]
pub(crate) struct Leaf {
    number: u64,
    folder: OwnedFd,
    /// Out-of-memory kills in it that were told of.
    told_oom_kills: Cell<u64>,
}

impl Leaf {
    /// Its directory, for `clone3`.
    pub(crate) fn folder(&self) -> RawFd {
        self.folder.as_raw_fd()
    }

    /// SIGKILL to everything in it.
    pub(crate) fn kill(&self) -> io::Result<()> {
        write(&self.folder, "cgroup.kill", "1")
    }

    /// Sets limits for the program that is to be started in it.
    pub(crate) fn limit(&self, limits: &Limits) -> io::Result<()> {
        if limits.memory != 0 {
            write(&self.folder, "memory.max", &limits.memory.to_string())?;
            // Out of memory is to come at the limit, not at the limit and as much swap.
            let _ = write(&self.folder, "memory.swap.max", "0");
        }
        if limits.cpu_milli != 0 {
            // Of a period of 100 ms, in microseconds; less than 1 ms the kernel does not take.
            let quota = u64::from(limits.cpu_milli).saturating_mul(100).max(1000);
            write(&self.folder, "cpu.max", &format!("{quota} 100000"))?;
        }
        if limits.pids != 0 {
            write(&self.folder, "pids.max", &limits.pids.to_string())?;
        }
        Ok(())
    }

    /// Whether anything lives in it. What cannot be told counts as empty.
    pub(crate) fn is_populated(&self) -> bool {
        is_populated(&self.folder).unwrap_or(false)
    }

    /// A signal to everything in it; returns how many processes got it.
    pub(crate) fn signal_all(&self, number: u32) -> usize {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let mut signalled = Vec::new();
        // Those that were started while the list was read are in the next one.
        for _ in 0..SIGNAL_ROUNDS {
            let Ok(file) = rustix::fs::openat(&self.folder, "cgroup.procs", flags, Mode::empty())
            else {
                break;
            };
            let mut text = String::new();
            // What could be read counts.
            let _ = std::fs::File::from(file).read_to_string(&mut text);
            let before = signalled.len();
            for pid in text.lines().filter_map(|line| line.parse::<i32>().ok()) {
                if !signalled.contains(&pid) {
                    crate::sys::signal_process(pid, number);
                    signalled.push(pid);
                }
            }
            if signalled.len() == before {
                break;
            }
        }
        signalled.len()
    }

    /// CPU time of all that ever ran in it, and memory. 0: not known.
    pub(crate) fn usage(&self) -> Usage {
        let read = |name| read_number(&self.folder, name);
        let pids = read("pids.current");
        Usage {
            cpu_us: read_key(&self.folder, "cpu.stat", "usage_usec").unwrap_or(0),
            // What is still charged when nothing lives in it is the page cache of its files.
            memory: match pids {
                Some(0) => 0,
                _ => read("memory.current").unwrap_or(0),
            },
            memory_peak: read("memory.peak").unwrap_or(0),
            pids: u32::try_from(pids.unwrap_or(0)).unwrap_or(u32::MAX),
        }
    }

    /// Whether the out-of-memory killer struck in it.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        oom_kills(&self.folder) > 0
    }

    /// Whether it did so since this was asked last.
    pub(crate) fn take_out_of_memory(&self) -> bool {
        let kills = oom_kills(&self.folder);
        kills > self.told_oom_kills.replace(kills)
    }
}

/// All cgroups of programs.
#[derive(Debug)]
pub(crate) struct Cgroups {
    user: OwnedFd,
    path: String,
    /// Tells when `memory.events` of all programs together changes.
    memory_events: Option<OwnedFd>,
    /// Out-of-memory kills known of.
    oom_kills: u64,
    next: u64,
    idle: Vec<Leaf>,
    /// How many of those there are to be.
    kept: usize,
    /// Their program has ended, but something in them lives on.
    occupied: VecDeque<u64>,
}

impl Cgroups {
    /// Uses `root`, a directory of the cgroup file system.
    pub(crate) fn open(root: &str) -> io::Result<Self> {
        let path = format!("{root}/{USER}");
        let root = open_folder(rustix::fs::CWD, root)?;
        // Memory is accounted per program where the kernel can; a kill needs no controller.
        enable(&root);
        make_folder(&root, USER)?;
        let user = open_folder(&root, USER)?;
        enable(&user);
        let ram = ram();
        reserve(&user, ram);
        Ok(Self {
            memory_events: watch(&format!("{path}/memory.events")),
            oom_kills: oom_kills(&user),
            user,
            path,
            next: 0,
            idle: Vec::new(),
            kept: match ram < ENOUGH_MEMORY {
                true => KEPT_IF_SMALL,
                false => KEPT,
            },
            occupied: VecDeque::new(),
        })
    }

    /// Directory of the cgroup of all programs.
    pub(crate) fn user_path(&self) -> &str {
        &self.path
    }

    /// Readable when the out-of-memory killer may have struck in any of them. Edge-triggered use only:
    /// see [`Self::take_out_of_memory`].
    pub(crate) const fn memory_events(&self) -> Option<&OwnedFd> {
        self.memory_events.as_ref()
    }

    /// Whether the killer has struck since this was asked last.
    pub(crate) fn take_out_of_memory(&mut self) -> bool {
        if let Some(events) = &self.memory_events {
            let mut buffer = [0_u8; 512];
            while rustix::io::read(events, &mut buffer[..]).is_ok_and(|got| got > 0) {}
        }
        let kills = oom_kills(&self.user);
        kills > std::mem::replace(&mut self.oom_kills, kills)
    }

    /// Whether any program lives.
    pub(crate) fn is_populated(&self) -> bool {
        is_populated(&self.user).unwrap_or(false)
    }

    /// SIGKILL to all programs.
    pub(crate) fn kill_all(&self) {
        if let Err(error) = write(&self.user, "cgroup.kill", "1") {
            crate::log!("cannot kill all programs by their cgroup: {error}");
        }
    }

    /// Begins to stop all programs, or lets them go on.
    pub(crate) fn freeze(&self, frozen: bool) -> io::Result<()> {
        let text = if frozen { "1" } else { "0" };
        write(&self.user, "cgroup.freeze", text)
    }

    /// A fresh cgroup.
    pub(crate) fn take(&mut self) -> io::Result<Leaf> {
        match self.idle.pop() {
            Some(leaf) => Ok(leaf),
            None => self.make(),
        }
    }

    /// Whether the next program has to wait for its cgroup to be made.
    pub(crate) const fn has_none_ready(&self) -> bool {
        self.idle.is_empty()
    }

    /// Takes a cgroup back that nobody asks for any more.
    pub(crate) fn give_back(&mut self, leaf: &Leaf) {
        if !self.remove(leaf) {
            self.occupied.push_back(leaf.number);
        }
    }

    /// Removes the cgroup of a program that has ended; false: something lives in it.
    pub(crate) fn remove_if_empty(&mut self, leaf: &Leaf) -> bool {
        if self.remove(leaf) {
            return true;
        }
        if leaf.is_populated() {
            return false;
        }
        // Someone in the guest has made others in it.
        self.occupied.push_back(leaf.number);
        true
    }

    /// Work for idle times: keeps fresh cgroups ready, and removes those whose last process has
    /// ended.
    pub(crate) fn tidy(&mut self) {
        while self.idle.len() < self.kept {
            let Ok(leaf) = self.make() else { break };
            self.idle.push(leaf);
        }
        for _ in 0..self.occupied.len().min(LOOKED_AT) {
            if let Some(number) = self.occupied.pop_front()
                && !self.remove_numbered(number)
            {
                self.occupied.push_back(number);
            }
        }
    }

    fn make(&mut self) -> io::Result<Leaf> {
        loop {
            let number = self.next;
            self.next = number.wrapping_add(1);
            let name = number.to_string();
            match rustix::fs::mkdirat(&self.user, &*name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    let folder = open_folder(&self.user, &name)?;
                    return Ok(Leaf {
                        number,
                        folder,
                        told_oom_kills: Cell::new(0),
                    });
                }
                // Left over from before, or made by someone in the guest.
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn remove(&self, leaf: &Leaf) -> bool {
        self.remove_numbered(leaf.number)
    }

    /// False: it is not empty.
    fn remove_numbered(&self, number: u64) -> bool {
        let name = number.to_string();
        rustix::fs::unlinkat(&self.user, &*name, AtFlags::REMOVEDIR) != Err(Errno::BUSY)
    }
}

/// The guest's memory, bytes.
fn ram() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram
        .saturating_mul(u64::from(info.mem_unit.max(1)))
}

/// Keeps back from the programs what holder, worker and kernel need to answer under any load: some
/// memory and some process numbers. And under full load the CPU is the agent's first.
fn reserve(user: &OwnedFd, ram: u64) {
    // Of a guest that has next to none, the larger part is still the programs'.
    let kept = (ram / 16).clamp(12 << 20, 64 << 20).min(ram / 4);
    let memory = ram.saturating_sub(kept);
    let number = |path| {
        crate::boot::read_file(path)
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let most = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"]
        .into_iter()
        .filter_map(number)
        .min();
    let pids = most.map(|most| most.saturating_sub((most / 8).clamp(64, 1024)));
    let limits = [
        ("memory.max", Some(memory)),
        ("pids.max", pids),
        ("cpu.weight", Some(50)),
    ];
    for (name, value) in limits {
        if let Some(value) = value {
            // Without the controller there is no limit to set.
            let _ = write(user, name, &value.to_string());
        }
    }
}

/// Turns on what the kernel has of the controllers that are used.
fn enable(folder: &OwnedFd) {
    for controller in ["+memory", "+pids", "+cpu"] {
        let _ = write(folder, "cgroup.subtree_control", controller);
    }
}

fn make_folder(at: &OwnedFd, name: &str) -> io::Result<()> {
    match rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn open_folder(at: impl std::os::fd::AsFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(at, name, flags, Mode::empty())?)
}

fn write(folder: &OwnedFd, name: &str, text: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, name, flags, Mode::empty())?;
    rustix::io::write(file, text.as_bytes())?;
    Ok(())
}

/// The number behind `key` in a flat-keyed control file.
fn read_key(folder: &OwnedFd, name: &str, key: &str) -> Option<u64> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, name, flags, Mode::empty()).ok()?;
    let mut content = [0; MAX_FILE];
    let got = rustix::io::read(file, &mut content[..]).ok()?;
    let text = std::str::from_utf8(content.get(..got)?).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
}

fn read_number(folder: &OwnedFd, name: &str) -> Option<u64> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, name, flags, Mode::empty()).ok()?;
    let mut content = [0; 32];
    let got = rustix::io::read(file, &mut content[..]).ok()?;
    let text = std::str::from_utf8(content.get(..got)?).ok()?;
    text.trim().parse().ok()
}

/// Tells when a file changes. `None`: there is no such file.
fn watch(path: &str) -> Option<OwnedFd> {
    let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).ok()?;
    inotify::add_watch(&fd, path, inotify::WatchFlags::MODIFY).ok()?;
    Some(fd)
}

fn is_populated(folder: &OwnedFd) -> Option<bool> {
    read_key(folder, "cgroup.events", "populated").map(|count| count != 0)
}

fn oom_kills(folder: &OwnedFd) -> u64 {
    read_key(folder, "memory.events", "oom_kill").unwrap_or(0)
}
