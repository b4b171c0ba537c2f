//! Work on a frozen copy of this process's memory, behind its back.
//!
//! `fork` copies page tables and no pages: the child sees memory as it was at that moment, whatever the
//! guest does meanwhile in the parent. The kernel copies a page when either writes to it.
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};

/// A child that works.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    result: OwnedFd,
}

/// Does `work` in a child. There it must only compute and make system calls: other threads of this process
/// may have held any lock, that of the allocator too, and do not exist in the child. Touching a page of guest RAM
/// that cannot be had ends the child.
///
/// The calling thread must live as long as the process: when it ends, the child is killed.
pub fn begin(work: impl FnOnce() -> io::Result<u64>) -> io::Result<Child> {
    let (result, mut report) = {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        (reader, File::from(writer))
    };
    let parent = rustix::process::getpid();
    // SAFETY: the child does what `work` does, which callers keep to computing and system calls, and ends
    // without running anything of this process's.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let _ = rustix::process::set_parent_process_death_signal(Some(
                rustix::process::Signal::KILL,
            ));
            crate::memory::broken::die_of_it();
            let orphan = rustix::process::getppid() != Some(parent);
            let done = if orphan {
                Err(io::ErrorKind::Other.into())
            } else {
                work()
            };
            // Positive: bytes; negative: an error number.
            let answer = match done {
                Ok(bytes) => bytes.cast_signed(),
                Err(error) => -i64::from(error.raw_os_error().unwrap_or(libc::EIO)),
            };
            let _ = report.write_all(&answer.to_ne_bytes());
            // SAFETY: ends the child at once; no destructor and no exit handler runs.
            unsafe { libc::_exit(0) }
        }
        pid => Ok(Child {
            pid: Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?,
            result,
        }),
    }
}

impl Child {
    /// Waits until it is done. What it returned.
    pub fn wait(self) -> io::Result<u64> {
        let mut answer = [0; 8];
        let read = File::from(self.result).read_exact(&mut answer);
        let ended = loop {
            match waitpid(Some(self.pid), WaitOptions::empty()) {
                Err(rustix::io::Errno::INTR) => {}
                ended => break ended.ok().flatten(),
            }
        };
        let signal = ended.and_then(|(_, status)| status.terminating_signal());
        read.map_err(|_| match signal {
            Some(libc::SIGBUS) => io::Error::other(crate::memory::broken::NOT_THERE),
            // By the kernel when memory ran out, or by somebody.
            _ => io::Error::other("the process that wrote it was killed"),
        })?;
        let answer = i64::from_ne_bytes(answer);
        u64::try_from(answer)
            .map_err(|_| io::Error::from_raw_os_error(i32::try_from(-answer).unwrap_or(libc::EIO)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_child_sees_memory_as_it_was() {
        let mut number = Box::new(5u64);
        let child = begin(|| {
            std::thread::sleep(std::time::Duration::from_millis(30));
            // SAFETY: a plain read of a number that lives in the parent's closure.
            Ok(unsafe { std::ptr::read_volatile(&raw const *number) })
        })
        .unwrap();
        *number = 6;
        assert_eq!(child.wait().unwrap(), 5);
        assert_eq!(*number, 6);
        let failed = begin(|| Err(io::Error::from_raw_os_error(libc::ENOSPC))).unwrap();
        let error = failed.wait().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
}
