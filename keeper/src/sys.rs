//! userfaultfd(2) and two mappings, as much of them as is used (linux/userfaultfd.h), and the heap. The only
//! unsafe code here.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

const PAGE: u64 = 4096;
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_POISON: libc::c_ulong = 0xc020_aa08;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const MODE_MISSING: u64 = 1;
/// `UFFD_USER_MODE_ONLY`: what anybody may have.
const USER_MODE_ONLY: i32 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
/// `UFFD_PAGEFAULT_FLAG_WRITE`.
const FLAG_WRITE: u64 = 1;

/// `struct uffdio_api`, and `uffdio_range` with what follows it in the other requests.
type Words<const N: usize> = [u64; N];

/// Has threads share two heaps: otherwise the C library makes one for each thread, which takes longer than most of
/// them live.
pub(crate) fn share_heaps() {
    // SAFETY: a plain call with numbers only.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
}

/// Somebody waits for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    /// In the address space of who waits.
    pub(crate) address: u64,
    pub(crate) is_write: bool,
}

/// A userfaultfd: faults are read from it, and resolved through it.
#[derive(Debug)]
pub(crate) struct Userfault(OwnedFd);

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How often a request is repeated that the kernel puts off. It does so for as long as an event waits to be read
/// that this process has not asked for: whoever made the descriptor could make it wait for ever.
const ATTEMPTS: u32 = 1000;

impl TryFrom<OwnedFd> for Userfault {
    type Error = io::Error;

    /// Of another process, which has done the handshake and is not trusted.
    fn try_from(fd: OwnedFd) -> io::Result<Self> {
        let what = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if what != Path::new("anon_inode:[userfaultfd]") {
            return Err(io::Error::other("a descriptor is no userfaultfd"));
        }
        // Reading must not wait, whoever else reads.
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self(fd))
    }
}

impl Userfault {
    /// One for memory of this process.
    pub(crate) fn own() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the arguments are numbers.
        let mut made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags | USER_MODE_ONLY) };
        if made < 0 {
            let device = File::open("/dev/userfaultfd")?;
            // SAFETY: the argument is a number.
            made = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) }.into();
        }
        let made = i32::try_from(made).map_err(|_| io::ErrorKind::InvalidData)?;
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it for us.
        let fault = Self(unsafe { OwnedFd::from_raw_fd(made) });
        fault.request(UFFDIO_API, &mut [UFFD_API, 0, 0])?;
        Ok(fault)
    }

    fn request<const N: usize>(
        &self,
        request: libc::c_ulong,
        words: &mut Words<N>,
    ) -> io::Result<()> {
        // SAFETY: callers give the structure that the request names, as words, and memory that it may change.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), request, words.as_mut_ptr()) } == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }

    /// A request that is repeated while the kernel puts it off.
    fn request_again<const N: usize>(
        &self,
        request: libc::c_ulong,
        words: &mut Words<N>,
    ) -> io::Result<()> {
        for _ in 1..ATTEMPTS {
            match self.request(request, words) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    std::thread::yield_now();
                }
                other => return other,
            }
        }
        self.request(request, words)
    }

    /// The next faults that wait; none if it would wait for one.
    pub(crate) fn faults(&self) -> io::Result<Vec<Fault>> {
        let mut bytes = [0u8; 32 * 64];
        let got = match rustix::io::read(&self.0, &mut bytes) {
            Ok(got) => got,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let (messages, _) = bytes.as_chunks::<32>();
        let faults = messages.iter().take(got / 32).filter_map(|message| {
            let (words, _) = message.as_chunks::<8>();
            let [_, flags, address, _] = *words else {
                return None;
            };
            (message.first() == Some(&EVENT_PAGEFAULT)).then_some(Fault {
                address: u64::from_le_bytes(address),
                is_write: u64::from_le_bytes(flags) & FLAG_WRITE != 0,
            })
        });
        Ok(faults.collect())
    }

    /// Whoever waits in a range looks again.
    pub(crate) fn wake(&self, range: &Range<u64>) -> io::Result<()> {
        self.request(UFFDIO_WAKE, &mut [range.start, length(range)])
    }

    /// Gives zeros to whoever waits in a range; pages that are there stay, and so do such of which the kernel
    /// remembers something (a protection that is to come).
    pub(crate) fn zero(&self, range: &Range<u64>) -> io::Result<()> {
        self.each_page(UFFDIO_ZEROPAGE, range)
    }

    /// Gives a page of zeros, whatever the kernel remembers of it, unless it is there.
    pub(crate) fn zero_page(&self, address: u64) -> io::Result<()> {
        static ZEROS: [u8; 4096] = [0; 4096];
        let mut words = [address, ZEROS.as_ptr() as u64, PAGE, 0, 0];
        match self.request_again(UFFDIO_COPY, &mut words) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            other => return other,
        }
        self.wake(&(address..address.saturating_add(PAGE)))
    }

    /// Whoever touches a page in a range has a memory error (Linux 6.6).
    pub(crate) fn poison(&self, range: &Range<u64>) -> io::Result<()> {
        self.each_page(UFFDIO_POISON, range)
    }

    /// The same with one page, for sure: it is an error if there is something already.
    pub(crate) fn poison_page(&self, address: u64) -> io::Result<()> {
        self.request_again(UFFDIO_POISON, &mut [address, PAGE, 0, 0])
    }

    /// A request with range, mode and the bytes done.
    fn each_page(&self, request: libc::c_ulong, range: &Range<u64>) -> io::Result<()> {
        let (mut at, mut put_off) = (range.start, 0);
        while at < range.end && put_off < ATTEMPTS {
            let mut words = [at, range.end - at, 0, 0];
            let failed = self.request(request, &mut words).err();
            let [.., done] = words;
            let before = at;
            at = next(at, failed, done)?;
            put_off = if at > before { 0 } else { put_off + 1 };
        }
        self.wake(range)
    }
}

/// Where to go on after a request that may have stopped on its way.
fn next(at: u64, failed: Option<io::Error>, done: u64) -> io::Result<u64> {
    let advanced = done.cast_signed();
    match failed {
        // Without an error all of it is done, and the bytes say how many.
        None if done > 0 => Ok(at.saturating_add(done)),
        None => Err(io::ErrorKind::InvalidData.into()),
        Some(error) => match error.raw_os_error() {
            // That page is there.
            Some(libc::EEXIST) => Ok(at.saturating_add(PAGE)),
            Some(libc::EAGAIN) if advanced > 0 => Ok(at.saturating_add(done)),
            Some(libc::EAGAIN) => Ok(at),
            _ => Err(error),
        },
    }
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// A file in this process's memory, that can be filled page by page: others who have it mapped see each page whole
/// or not at all. Nobody else may shorten the file.
#[derive(Debug)]
pub(crate) struct Filling {
    start: u64,
    length: usize,
    fault: Userfault,
}

impl Filling {
    pub(crate) fn new(file: &File, length: u64) -> io::Result<Self> {
        let fault = Userfault::own()?;
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping, at an address that the kernel chooses; nothing refers to its bytes.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let filling = Self {
            start: mapped as u64,
            length,
            fault,
        };
        let mut words = [filling.start, length as u64, MODE_MISSING, 0];
        filling.fault.request(UFFDIO_REGISTER, &mut words)?;
        Ok(filling)
    }

    /// Brings whole pages in; those that are there stay.
    pub(crate) fn fill(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.length as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (base, source) = (self.start.saturating_add(offset), bytes.as_ptr() as u64);
        let mut at = 0;
        while at < bytes.len() as u64 {
            // From `bytes`, which the kernel reads; to the mapping, which it checks.
            let mut words = [
                base.saturating_add(at),
                source.saturating_add(at),
                bytes.len() as u64 - at,
                0,
                0,
            ];
            let failed = self.fault.request(UFFDIO_COPY, &mut words).err();
            let [.., done] = words;
            at = next(at, failed, done)?;
        }
        Ok(())
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        // SAFETY: it was mapped by `new`, and nothing refers to it.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.length) };
    }
}

/// A file as it is in memory, for reading, at an address with the same place in a huge page.
pub(crate) struct Mapping {
    start: u64,
    length: usize,
}

impl Mapping {
    /// `align` is a power of two.
    pub(crate) fn new(file: &File, length: u64, align: u64) -> io::Result<Self> {
        let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let padded = length
            .checked_add(align)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let padded = usize::try_from(padded).map_err(too_long)?;
        let length = usize::try_from(length).map_err(too_long)?;
        // SAFETY: a new mapping, at an address that the kernel chooses, of which nothing can be touched.
        let room = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                padded,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if room == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = room as u64;
        let start = base.next_multiple_of(align);
        // SAFETY: it takes the place of a part of what was mapped just now, which is ours.
        let mapped = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                length,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            )
        };
        let failed = (mapped == libc::MAP_FAILED).then(io::Error::last_os_error);
        let end = start.saturating_add((length as u64).next_multiple_of(PAGE));
        let tail = base.saturating_add(padded as u64).saturating_sub(end);
        // SAFETY: the two ends of the room, and all of it if the file is not in it.
        unsafe {
            if failed.is_some() {
                libc::munmap(room, padded);
            } else {
                if start > base {
                    libc::munmap(room, (start - base) as usize);
                }
                if tail > 0 {
                    libc::munmap(end as *mut libc::c_void, tail as usize);
                }
            }
        }
        failed.map_or(Ok(Self { start, length }), Err)
    }

    /// Has a part that is aligned be huge pages in the page cache.
    pub(crate) fn collapse(&self, part: &Range<u64>) -> io::Result<()> {
        const MADV_COLLAPSE: i32 = 25;
        let inside = part.start <= part.end && part.end <= self.length as u64;
        if !inside {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = self.start.saturating_add(part.start) as *mut libc::c_void;
        // Where nothing of 1 GiB was touched so far the kernel has no table for its 2 MiB pieces. Linux 6.12 makes the
        // huge page all the same and then says EINVAL, as it cannot map it; with one page touched it has the table.
        // SAFETY: both ranges lie in the mapping; its contents stay the same.
        unsafe {
            libc::madvise(start, PAGE as usize, libc::MADV_POPULATE_READ);
            if libc::madvise(start, length(part) as usize, MADV_COLLAPSE) == 0 {
                return Ok(());
            }
        }
        Err(io::Error::last_os_error())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped by `new`, and nothing refers to it.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_userfaultfd_is_one() {
        let file = tempfile::tempfile().unwrap();
        assert!(Userfault::try_from(OwnedFd::from(file)).is_err());
        let (pipe, _other) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        assert!(Userfault::try_from(pipe).is_err());
        let Ok(own) = Userfault::own() else { return };
        let mut own = Userfault::try_from(own.0).unwrap();
        assert_eq!(own.faults().unwrap(), []);
        own = Userfault::try_from(own.0).unwrap();
        assert_eq!(own.faults().unwrap(), []);
    }

    #[test]
    fn who_puts_every_request_off_is_given_up() {
        const REMOVALS: u64 = 1 << 3;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: the argument is a number.
        let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if made < 0 {
            eprintln!("skipped: no userfaultfd");
            return;
        }
        // SAFETY: the kernel has just made it for us.
        let fault = Userfault(unsafe { OwnedFd::from_raw_fd(made as i32) });
        fault
            .request(UFFDIO_API, &mut [UFFD_API, REMOVALS, 0])
            .unwrap();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), 16 << 12, rights, flags, -1, 0)
        } as u64;
        fault
            .request(UFFDIO_REGISTER, &mut [start, 16 << 12, MODE_MISSING, 0])
            .unwrap();
        fault.zero_page(start).unwrap();
        // It waits until its event is read, and until then nothing is given.
        let removing = std::thread::spawn(move || {
            // SAFETY: the range lies in the mapping, and nothing refers to it.
            unsafe { libc::madvise(start as *mut libc::c_void, 4096, libc::MADV_DONTNEED) }
        });
        let mut set = [rustix::event::PollFd::new(
            &fault.0,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut set, None).unwrap();
        let page = start + 4096;
        for answer in [fault.zero_page(page), fault.poison_page(page)] {
            let error = answer.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EAGAIN), "{error}");
        }
        fault.zero(&(page..page + 8192)).unwrap();
        assert_eq!(fault.faults().unwrap(), [], "a removal is no fault");
        assert_eq!(removing.join().unwrap(), 0);
        fault.zero_page(page).unwrap();
    }
}
