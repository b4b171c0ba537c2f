//! userfaultfd(2), as much of it as is used (Documentation/admin-guide/mm/userfaultfd.rst, linux/userfaultfd.h).
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

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

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// On `/dev/userfaultfd`, with open flags as the argument.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// The kernel itself lets writes to protected pages through, and remembers them (6.7).
pub(super) const WP_ASYNC: u64 = 1 << 15;
/// Memory of files, too (5.19).
pub(super) const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;

const MODE_WRITE_PROTECT: u64 = 2;

pub(super) struct Userfault(OwnedFd);

impl Userfault {
    /// A descriptor that also sees faults of the kernel (KVM's are): through the device, or as a privileged
    /// process by the system call.
    pub(super) fn new(features: u64) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let made = match std::fs::File::open("/dev/userfaultfd") {
            // SAFETY: the argument is a number.
            Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
            // SAFETY: so it is here.
            Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as i32 },
        };
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
        Ok(Self(fd))
    }

    /// Watches writes to addresses of this process. Parts that are watched already stay so.
    pub(super) fn register(&self, range: &Range<u64>) -> io::Result<()> {
        let mut register = Register {
            start: range.start,
            len: range.end.saturating_sub(range.start),
            mode: MODE_WRITE_PROTECT,
            ioctls: 0,
        };
        // SAFETY: the argument is the structure that the call names; registering changes no memory.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &mut register) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
