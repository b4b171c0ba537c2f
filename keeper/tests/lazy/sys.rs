//! Memory of this process that somebody else fills, as a guest's RAM is.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;

pub(crate) struct View {
    pub(crate) start: u64,
    pub(crate) length: usize,
    pub(crate) userfault: OwnedFd,
}

impl View {
    /// A private view of a file.
    pub(crate) fn of(file: &File, length: usize) -> Self {
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the argument is a number.
        let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        assert!(made >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the kernel has just made it for us.
        let userfault = unsafe { OwnedFd::from_raw_fd(i32::try_from(made).unwrap()) };
        Self {
            start: start as u64,
            length,
            userfault,
        }
    }

    /// Whoever touches what is missing waits for who has the userfaultfd.
    pub(crate) fn waiting(self) -> Self {
        self.request(UFFDIO_API, &mut [0xaa, 0, 0]);
        self.request(UFFDIO_REGISTER, &mut [self.start, self.length as u64, 1, 0]);
        self
    }

    fn request<const N: usize>(&self, request: libc::c_ulong, words: &mut [u64; N]) {
        // SAFETY: the words are the structure that the request names.
        let done = unsafe {
            libc::ioctl(
                self.userfault.as_raw_fd(),
                request,
                words.as_mut_ptr().cast::<libc::c_void>(),
            )
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }

    /// Reads as a system call does, so that a broken page is an error.
    pub(crate) fn read(&self, offset: usize, length: usize) -> io::Result<Vec<u8>> {
        assert!(offset + length <= self.length);
        let mut bytes = vec![0u8; length];
        let local = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: length,
        };
        let remote = libc::iovec {
            iov_base: (self.start + offset as u64) as *mut libc::c_void,
            iov_len: length,
        };
        // SAFETY: the one range is a vector's, which has that length; the other is only read.
        let got = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        match usize::try_from(got) {
            Ok(got) if got == length => Ok(bytes),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    pub(crate) fn write(&self, offset: usize, byte: u8) {
        assert!(offset < self.length);
        // SAFETY: it lies in the mapping, which nothing else refers to.
        unsafe { ((self.start + offset as u64) as *mut u8).write_volatile(byte) };
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: it was mapped by `of`.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.length) };
    }
}
