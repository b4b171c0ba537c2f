//! Memory that is there before it is needed: what is copied into it meets no page fault.
use std::io;

const PAGE: usize = 4096;

/// Bytes, one behind the other.
pub struct Room {
    start: *mut u8,
    size: usize,
    used: usize,
}

// SAFETY: the mapping is this value's alone.
unsafe impl Send for Room {}

impl Room {
    /// For so many bytes, in whole pages.
    pub fn of(bytes: u64) -> io::Result<Self> {
        let size = usize::try_from(bytes)
            .ok()
            .and_then(|bytes| bytes.max(1).checked_next_multiple_of(PAGE))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let room = Self {
            start: start.cast(),
            size,
            used: 0,
        };
        // SAFETY: the range was mapped above. All are best effort but for the last: what a guest has in RAM is its
        // own business, the frozen copies of this process need no copy of it, and pages that cannot be had now
        // would be missed when the guest stands still.
        let populated = unsafe {
            libc::madvise(start, size, libc::MADV_DONTDUMP);
            libc::madvise(start, size, libc::MADV_DONTFORK);
            libc::madvise(start, size, libc::MADV_HUGEPAGE);
            libc::madvise(start, size, libc::MADV_POPULATE_WRITE)
        };
        match populated {
            0 => Ok(room),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Bytes that it has room for yet.
    pub fn free(&self) -> u64 {
        (self.size - self.used) as u64
    }

    /// Adds bytes; `None`: there is no room for them.
    pub fn push(&mut self, bytes: &[u8]) -> Option<()> {
        if bytes.len() as u64 > self.free() {
            return None;
        }
        // SAFETY: the mapping has room for them behind what is used, and nobody else knows of it.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(self.used), bytes.len());
        }
        self.used += bytes.len();
        Some(())
    }

    /// All that were added.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: these were written, and the mapping lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start, self.used) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's alone.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_what_fits_and_no_more() {
        let mut room = Room::of(5000).unwrap();
        assert_eq!(room.free(), 8192);
        room.push(&[7; 5000]).unwrap();
        assert!(room.push(&[8; 3193]).is_none());
        room.push(&[8; 3192]).unwrap();
        assert_eq!(room.free(), 0);
        assert!(room.bytes()[..5000].iter().all(|byte| *byte == 7));
        assert!(room.bytes()[5000..].iter().all(|byte| *byte == 8));
        assert!(Room::of(u64::MAX).is_err());
        assert_eq!(Room::of(0).unwrap().free(), 4096);
    }
}
