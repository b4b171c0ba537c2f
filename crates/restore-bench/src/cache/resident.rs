//! Which pages of a file are in memory, asked so that none comes in by it: the only `unsafe` of the measuring side.
//!
//! A read that does not wait (`RWF_NOWAIT`) is no such question: Linux begins to read ahead where a page is missing
//! (`filemap_get_pages`), and the next question finds what the one before has fetched.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes of a page of x86-64.
pub(super) const PAGE: u64 = 4096;

/// How many of the pages of this range are in the page cache. Both in bytes; the offset is a multiple of a page. Linux
/// says that all are of a file that the caller neither owns nor may write (mincore(2)).
pub(super) fn pages(file: &File, offset: u64, length: usize) -> io::Result<u64> {
    if length == 0 {
        return Ok(0);
    }
    let mut flags = vec![0_u8; length.div_ceil(PAGE as usize)];
    // SAFETY: a new mapping at a place of the kernel's choice; its bytes are never touched.
    let address = unsafe {
        mmap(
            std::ptr::null_mut(),
            length,
            ProtFlags::empty(),
            MapFlags::SHARED,
            file,
            offset,
        )
    }?;
    // SAFETY: the mapping is there to the next statement, and `flags` has a byte for each of its pages.
    let answer = match unsafe { libc::mincore(address, length, flags.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: the whole of the mapping from above, to which nothing refers.
    unsafe { munmap(address, length) }?;
    answer?;
    Ok(flags.iter().filter(|flag| **flag & 1 != 0).count() as u64)
}
