//! A cgroup (version 2) for every program: what it starts cannot leave it, so killing it leaves no
//! descendant, and the kernel says there when it ran out of memory.
//!
//! Making a cgroup takes longer than starting a program, so an empty one is kept ready and used
//! again; making and removing happen while the agent is idle.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

/// Holds the cgroups of all programs, so that they can be frozen together.
const USER: &str = "user";

/// Empty cgroups kept for the next programs.
const KEPT: usize = 2;

/// Cgroups with survivors that are looked at in one go.
const LOOKED_AT: usize = 4;

/// Longest control file read, bytes.
const MAX_FILE: usize = 1024;

/// The cgroup of one program.
#[derive(Debug)]
pub(crate) struct Leaf {
    number: u64,
    folder: OwnedFd,
    /// Count of out-of-memory kills when the program was started in it.
    oom_kills: u64,
    /// It was killed once: Linux (seen on 6.18) then kills everything that `clone3` starts in it,
    /// too, so it is not used again.
    killed: Cell<bool>,
}

impl Leaf {
    /// Its directory, for `clone3`.
    pub(crate) fn folder(&self) -> RawFd {
        self.folder.as_raw_fd()
    }

    /// SIGKILL to everything in it.
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.killed.set(true);
        write(&self.folder, "cgroup.kill", "1")
    }

    /// Whether the out-of-memory killer struck in it since the program was started.
    pub(crate) fn ran_out_of_memory(&self) -> bool {
        oom_kills(&self.folder) > self.oom_kills
    }
}

/// All cgroups of programs.
#[derive(Debug)]
pub(crate) struct Cgroups {
    user: OwnedFd,
    next: u64,
    idle: Vec<Leaf>,
    /// Their program has ended, but something in them lives on.
    occupied: VecDeque<u64>,
}

impl Cgroups {
    /// Uses `root`, a directory of the cgroup file system.
    pub(crate) fn open(root: &str) -> io::Result<Self> {
        let root = open_folder(rustix::fs::CWD, root)?;
        // Memory is accounted per program where the kernel can; a kill needs no controller.
        let _ = write(&root, "cgroup.subtree_control", "+memory");
        make_folder(&root, USER)?;
        let user = open_folder(&root, USER)?;
        let _ = write(&user, "cgroup.subtree_control", "+memory");
        Ok(Self {
            user,
            next: 0,
            idle: Vec::new(),
            occupied: VecDeque::new(),
        })
    }

    /// An empty cgroup.
    pub(crate) fn take(&mut self) -> io::Result<Leaf> {
        match self.idle.pop() {
            Some(leaf) => Ok(leaf),
            None => self.make(),
        }
    }

    /// Takes a cgroup back whose program has ended.
    pub(crate) fn give_back(&mut self, leaf: Leaf) {
        match is_populated(&leaf.folder) {
            Some(false) if self.idle.len() < KEPT && !leaf.killed.get() => {
                let oom_kills = oom_kills(&leaf.folder);
                self.idle.push(Leaf { oom_kills, ..leaf });
            }
            Some(false) => self.remove(leaf.number),
            _ => self.occupied.push_back(leaf.number),
        }
    }

    /// Work for idle times: keeps an empty cgroup ready, and removes those whose last process has
    /// ended.
    pub(crate) fn tidy(&mut self) {
        if self.idle.is_empty()
            && let Ok(leaf) = self.make()
        {
            self.idle.push(leaf);
        }
        for _ in 0..self.occupied.len().min(LOOKED_AT) {
            if let Some(number) = self.occupied.pop_front() {
                self.remove(number);
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
                        oom_kills: 0,
                        killed: Cell::new(false),
                    });
                }
                // Left over from before, or made by someone in the guest.
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn remove(&mut self, number: u64) {
        let name = number.to_string();
        if rustix::fs::unlinkat(&self.user, &*name, AtFlags::REMOVEDIR) == Err(Errno::BUSY) {
            self.occupied.push_back(number);
        }
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

fn is_populated(folder: &OwnedFd) -> Option<bool> {
    read_key(folder, "cgroup.events", "populated").map(|count| count != 0)
}

fn oom_kills(folder: &OwnedFd) -> u64 {
    read_key(folder, "memory.events", "oom_kill").unwrap_or(0)
}
