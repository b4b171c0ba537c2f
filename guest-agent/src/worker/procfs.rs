//! Files of the kernel: small reads with limits, and who runs.

use std::fs::File;
use std::io::Read;

use rustix::fs::{Dir, Mode, OFlags};

/// Most bytes taken of a file that is read whole.
const MAX_FILE: u64 = 64 << 10;

/// Opens a file for reading; never waits.
pub(super) fn open(path: &str) -> rustix::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

/// A file's bytes, at most 64 KiB; `None` if it cannot be read.
pub(super) fn read(path: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)
        .ok()?
        .take(MAX_FILE)
        .read_to_end(&mut bytes)
        .ok()?;
    Some(bytes)
}

/// As [`read`], text. Bytes that are none are replaced.
pub(super) fn text(path: &str) -> Option<String> {
    Some(String::from_utf8_lossy(&read(path)?).into_owned())
}

/// Ids of all processes, ascending.
pub(super) fn pids() -> Vec<u32> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(folder) = rustix::fs::open("/proc", flags, Mode::empty()) else {
        return Vec::new();
    };
    let Ok(entries) = Dir::new(folder) else {
        return Vec::new();
    };
    let mut pids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str().ok()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

/// Name of the program that a process runs, as the kernel has it (15 bytes).
pub(super) fn program(pid: u32) -> Vec<u8> {
    let mut name = read(&format!("/proc/{pid}/comm")).unwrap_or_default();
    if name.last() == Some(&b'\n') {
        name.pop();
    }
    name
}
