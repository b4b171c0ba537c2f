//! Vectored I/O straight between a file and guest RAM.
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::GuestMemoryBackend;

use crate::memory::GuestRam;
use crate::memory::segment::Segment;

/// Most vectors of one call (UIO_MAXIOV).
pub(super) const MAX_VECTORS: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the file to guest RAM.
    Read,
    Write,
}

/// Host addresses of the buffers of one request. They are valid only as long as the guest
/// RAM they were looked up in; whoever fills them keeps that alive until the I/O is over.
#[derive(Debug, Default)]
pub(super) struct IoVectors(Vec<libc::iovec>);

// SAFETY: the pointers are only passed to the kernel, which takes them on any thread of the
// process; guest RAM is shared memory, not tied to a thread.
unsafe impl Send for IoVectors {}

impl IoVectors {
    /// Looks `segments` up in `mem`.
    pub(super) fn fill(&mut self, mem: &GuestRam, segments: &[Segment]) -> io::Result<()> {
        self.0.clear();
        for segment in segments {
            let len = usize::try_from(segment.len).map_err(|_| outside_ram())?;
            match mem.get_slice(segment.addr, len) {
                Ok(slice) => self.push(slice.ptr_guard_mut().as_ptr(), len),
                // It crosses from one region into the next, or is not RAM.
                Err(_) => {
                    for slice in GuestMemoryBackend::get_slices(mem, segment.addr, len) {
                        let slice = slice.map_err(|_| outside_ram())?;
                        self.push(slice.ptr_guard_mut().as_ptr(), slice.len());
                    }
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, base: *mut u8, len: usize) {
        self.0.push(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        });
    }

    pub(super) fn as_slice(&self) -> &[libc::iovec] {
        &self.0
    }

    /// Moves all bytes, beyond the first `skip`, between `file` at `offset + skip` and RAM.
    ///
    /// # Safety
    /// The guest RAM that `fill` was given is still mapped.
    pub(super) unsafe fn transfer(
        &mut self,
        file: &File,
        direction: Direction,
        offset: u64,
        skip: usize,
    ) -> io::Result<()> {
        let mut rest = advance(&mut self.0, skip);
        let mut at = offset.saturating_add(skip as u64);
        while !rest.is_empty() {
            // SAFETY: every vector lies in guest RAM, by the caller's promise.
            let moved = match unsafe { call(file, direction, rest, at) } {
                Ok(moved) => moved,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            if moved == 0 {
                return Err(ended(direction));
            }
            rest = advance(rest, moved);
            at = at.saturating_add(moved as u64);
        }
        Ok(())
    }
}

/// One system call; the plain one for a single buffer, which saves the kernel the copy of
/// the vector.
///
/// # Safety
/// The vectors point to memory that stays mapped during the call.
unsafe fn call(
    file: &File,
    direction: Direction,
    vectors: &[libc::iovec],
    offset: u64,
) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    let at =
        libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // No more than 1,024, so it fits.
    let count = vectors.len().min(MAX_VECTORS) as libc::c_int;
    let list = vectors.as_ptr();
    // SAFETY: the caller vouches for the vectors' memory; guest RAM may change under the
    // kernel's copy, which is the guest's own affair.
    let moved = unsafe {
        match (direction, vectors) {
            (Direction::Read, [one]) => libc::pread(fd, one.iov_base, one.iov_len, at),
            (Direction::Write, [one]) => libc::pwrite(fd, one.iov_base, one.iov_len, at),
            (Direction::Read, _) => libc::preadv(fd, list, count, at),
            (Direction::Write, _) => libc::pwritev(fd, list, count, at),
        }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// The vectors without their first `bytes`.
fn advance(vectors: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    for vector in vectors.iter_mut() {
        if bytes < vector.iov_len {
            vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(bytes).cast();
            vector.iov_len -= bytes;
            break;
        }
        bytes -= vector.iov_len;
        whole += 1;
    }
    vectors.get_mut(whole..).unwrap_or_default()
}

pub(super) fn ended(direction: Direction) -> io::Error {
    io::Error::from(match direction {
        Direction::Read => io::ErrorKind::UnexpectedEof,
        Direction::Write => io::ErrorKind::WriteZero,
    })
}

fn outside_ram() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "a buffer is outside guest RAM")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn advance_skips_whole_and_part_vectors() {
        let vector = |base: usize, len| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(base),
            iov_len: len,
        };
        let mut vectors = [vector(100, 4), vector(200, 4), vector(300, 4)];
        let rest = advance(&mut vectors, 6);
        assert_eq!(rest.len(), 2);
        assert_eq!((rest[0].iov_base as usize, rest[0].iov_len), (202, 2));
        assert!(advance(rest, 6).is_empty());
    }

    #[test]
    fn more_vectors_than_one_call_takes_and_a_buffer_across_regions() {
        let mem =
            GuestRam::from_ranges(&[(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)])
                .unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..6000u32).map(|i| (i * 7) as u8).collect();
        file.write_all(&content).unwrap();
        let mut segments: Vec<Segment> = (0..1500u64)
            .map(|i| Segment {
                addr: GuestAddress(i * 8),
                len: 2,
            })
            .collect();
        segments.push(Segment {
            addr: GuestAddress(0xfff0),
            len: 3000,
        });
        let mut vectors = IoVectors::default();
        vectors.fill(&mem, &segments).unwrap();
        // SAFETY: `mem` outlives the call.
        unsafe { vectors.transfer(&file, Direction::Read, 0, 0) }.unwrap();
        let mut got = Vec::new();
        for segment in &segments {
            let mut part = vec![0; segment.len as usize];
            mem.read_slice(&mut part, segment.addr).unwrap();
            got.extend(part);
        }
        assert_eq!(got, content);
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let mem = GuestRam::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 100]).unwrap();
        let mut vectors = IoVectors::default();
        let segment = Segment {
            addr: GuestAddress(0),
            len: 512,
        };
        vectors.fill(&mem, &[segment]).unwrap();
        // SAFETY: `mem` outlives the call.
        let error = unsafe { vectors.transfer(&file, Direction::Read, 0, 0) }.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_buffer_outside_ram_is_an_error() {
        let mem = GuestRam::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let segment = Segment {
            addr: GuestAddress(0xffff),
            len: 2,
        };
        assert!(IoVectors::default().fill(&mem, &[segment]).is_err());
    }
}
