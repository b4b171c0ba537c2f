//! userfaultfd(2), as much of it as is used (Documentation/admin-guide/mm/userfaultfd.rst, linux/userfaultfd.h).
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
/// Nobody waits for the pages.
const COPY_DONT_WAKE: u64 = 1;
/// Of the system call: without faults of the kernel, and so without rights (5.11).
const USER_MODE_ONLY: i32 = 1;
/// On `/dev/userfaultfd`, with open flags as the argument.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// Who handles faults hears of pages that were dropped, and `madvise` waits until it has (4.11).
const EVENT_REMOVE: u64 = 1 << 3;
/// The kernel itself lets writes to protected pages through, and remembers them (6.7).
const WP_ASYNC: u64 = 1 << 15;
/// Memory of files, too (5.19).
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;

const MODE_MISSING: u64 = 1;
const MODE_WRITE_PROTECT: u64 = 2;

/// What becomes of accesses to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    /// Those to pages that are not there wait for who reads the descriptor.
    Missing,
    /// Writes are told by `PAGEMAP_SCAN`.
    Writes,
    Both,
}

/// A userfaultfd of this process.
pub(super) struct Userfault {
    fd: OwnedFd,
    tells_writes: bool,
}

impl Userfault {
    /// One for [`Watch::Writes`] only.
    pub(super) fn for_writes() -> io::Result<Self> {
        Self::new(WP_ASYNC | WP_HUGETLBFS_SHMEM, true)
    }

    /// One for missing pages, and for writes where this kernel can. With `removals`, who reads it hears of
    /// dropped pages, too.
    pub(super) fn for_missing(removals: bool) -> io::Result<Self> {
        let events = if removals { EVENT_REMOVE } else { 0 };
        match Self::new(events | WP_ASYNC | WP_HUGETLBFS_SHMEM, true) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Self::new(events, false),
            done => done,
        }
    }

    /// One for [`Self::copy`] only.
    pub(super) fn for_copies() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: the argument is a number.
        let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as i32 };
        Self::enabled(made, 0, false)
    }

    /// A descriptor that also sees faults of the kernel (KVM's are): through the device, or as a privileged
    /// process by the system call.
    fn new(features: u64, tells_writes: bool) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let made = match std::fs::File::open("/dev/userfaultfd") {
            // SAFETY: the argument is a number.
            Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
            // SAFETY: so it is here.
            Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as i32 },
        };
        Self::enabled(made, features, tells_writes)
    }

    /// The descriptor `made`, unless that is an error.
    fn enabled(made: i32, features: u64, tells_writes: bool) -> io::Result<Self> {
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it for us.
        let fd = unsafe { OwnedFd::from_raw_fd(made) };
        let mut api = Api {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        // SAFETY: the argument is the structure that the call names.
        if unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &mut api) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { fd, tells_writes })
    }

    /// Puts copies of pages where none are yet, in a range that is registered for missing ones. Those before one that
    /// cannot be had are there after an error.
    pub(super) fn copy(&self, to: u64, from: u64, len: u64) -> io::Result<()> {
        let mut copy = Copy {
            to,
            from,
            len,
            mode: COPY_DONT_WAKE,
            copied: 0,
        };
        // SAFETY: the argument is the structure that the call names. Only pages that nobody has used so far change,
        // and both ranges are checked by the kernel.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &mut copy) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Whether it can be registered for writes.
    pub(super) fn tells_writes(&self) -> bool {
        self.tells_writes
    }

    /// Watches addresses of this process, whatever was watched there by this descriptor before.
    pub(super) fn register(&self, range: &Range<u64>, watch: Watch) -> io::Result<()> {
        let mut register = Register {
            start: range.start,
            len: range.end.saturating_sub(range.start),
            mode: match watch {
                Watch::Missing => MODE_MISSING,
                Watch::Writes => MODE_WRITE_PROTECT,
                Watch::Both => MODE_MISSING | MODE_WRITE_PROTECT,
            },
            ioctls: 0,
        };
        // SAFETY: the argument is the structure that the call names; registering changes no memory.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &mut register) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
