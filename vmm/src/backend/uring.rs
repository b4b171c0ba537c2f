//! A raw disk whose transfers run in io_uring while the guest goes on.
//!
//! The ring is made with the first request. It is restricted to the few operations of a disk
//! on the one registered file. Where the kernel offers no io_uring, requests are
//! carried out at once, as [`RawFile`] does.
use std::io;
use std::os::fd::AsRawFd;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use vmm_sys_util::eventfd::EventFd;

use super::disk::{Disk, FileId, Op, Started};
use super::file::RawFile;
use super::iovec::{Direction, IoVectors, MAX_VECTORS, ended};
use crate::memory::GuestRam;
use crate::memory::segment::Segment;

/// Most operations in flight, and entries of the ring.
pub(super) const DEPTH: u16 = 128;

/// An operation in flight, with all that the kernel uses for it.
struct Slot {
    /// Keeps the buffers mapped, whatever becomes of the VM.
    _mem: GuestRam,
    /// `None`: a flush.
    transfer: Option<Transfer>,
}

struct Transfer {
    vectors: IoVectors,
    direction: Direction,
    offset: u64,
    len: u64,
}

enum Ring {
    /// No request came yet.
    Unmade,
    Made(Box<IoUring>),
    /// The kernel offers none.
    Refused,
}

/// See the module.
pub struct UringFile {
    file: RawFile,
    ring: Ring,
    wakeup: Option<EventFd>,
    slots: Vec<Option<Slot>>,
    in_flight: usize,
    /// Vectors of finished operations, for the next ones.
    spare: Vec<IoVectors>,
}

impl UringFile {
    pub fn new(file: RawFile) -> Self {
        Self {
            file,
            ring: Ring::Unmade,
            wakeup: None,
            slots: (0..DEPTH).map(|_| None).collect(),
            in_flight: 0,
            spare: Vec::new(),
        }
    }

    fn ring(&mut self) -> Option<&mut IoUring> {
        if matches!(self.ring, Ring::Unmade) {
            self.ring = make_ring(&self.file, self.wakeup.as_ref())
                .map_or(Ring::Refused, |ring| Ring::Made(Box::new(ring)));
        }
        match &mut self.ring {
            Ring::Made(ring) => Some(ring),
            Ring::Unmade | Ring::Refused => None,
        }
    }

    fn prepare(
        &mut self,
        mem: &GuestRam,
        direction: Direction,
        segments: &[Segment],
        offset: u64,
    ) -> io::Result<Transfer> {
        let mut vectors = self.spare.pop().unwrap_or_default();
        vectors.fill(mem, segments)?;
        Ok(Transfer {
            vectors,
            direction,
            offset,
            len: segments.iter().map(|segment| u64::from(segment.len)).sum(),
        })
    }

    fn queue(&mut self, slot: Slot, tag: u16) -> io::Result<()> {
        let entry = slot.entry().user_data(u64::from(tag));
        match self.slots.get_mut(usize::from(tag)) {
            Some(place @ None) => *place = Some(slot),
            // Its operation never came back, so nothing may be reused.
            _ => return Err(io::ErrorKind::ResourceBusy.into()),
        }
        let pushed = match self.ring() {
            // SAFETY: the vectors live in the slot, and the memory they point to as long as
            // the slot's guard: both until the completion is reaped, or for ever (`drop`).
            Some(ring) => unsafe { ring.submission().push(&entry) }.is_ok(),
            None => false,
        };
        if !pushed {
            if let Some(place) = self.slots.get_mut(usize::from(tag)) {
                *place = None;
            }
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        self.in_flight += 1;
        Ok(())
    }

    /// Takes back what the kernel has finished.
    fn collect(&mut self, done: &mut Vec<(u16, io::Result<()>)>) {
        let Ring::Made(ring) = &mut self.ring else {
            return;
        };
        for completion in ring.completion() {
            let Ok(tag) = u16::try_from(completion.user_data()) else {
                continue;
            };
            let Some(mut slot) = self.slots.get_mut(usize::from(tag)).and_then(Option::take) else {
                continue;
            };
            self.in_flight -= 1;
            let result = slot.finish(&self.file, completion.result());
            if let Some(transfer) = slot.transfer
                && self.spare.len() < usize::from(DEPTH)
            {
                self.spare.push(transfer.vectors);
            }
            done.push((tag, result));
        }
    }

    fn wait(&mut self, done: &mut Vec<(u16, io::Result<()>)>) -> io::Result<()> {
        while self.in_flight > 0 {
            let Ring::Made(ring) = &self.ring else {
                return Ok(());
            };
            match ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if is_transient(&e) => {}
                Err(e) => return Err(e),
            }
            self.collect(done);
        }
        Ok(())
    }
}

/// A signal came, or completions have to be taken first.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)
    )
}

fn make_ring(file: &RawFile, wakeup: Option<&EventFd>) -> io::Result<IoUring> {
    let ring = IoUring::builder()
        .setup_r_disabled()
        .build(u32::from(DEPTH))?;
    let submitter = ring.submitter();
    submitter.register_files(&[file.file().as_raw_fd()])?;
    if let Some(wakeup) = wakeup {
        // Not the `async` kind: that is silent about what finishes in this thread's own task work
        // (reads that miss the page cache, direct I/O), and the guest would wait for ever.
        submitter.register_eventfd(wakeup.as_raw_fd())?;
    }
    submitter.register_restrictions(&mut [
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_op(opcode::Write::CODE),
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
    ])?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

impl Slot {
    fn entry(&self) -> Entry {
        let file = Fixed(0);
        let Some(transfer) = &self.transfer else {
            return opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build();
        };
        let vectors = transfer.vectors.as_slice();
        let list = vectors.as_ptr();
        // At most 1,024. The rest of a longer list, or of a short transfer, is moved in `finish`.
        let count = vectors.len().min(MAX_VECTORS) as u32;
        let at = transfer.offset;
        match (transfer.direction, vectors) {
            (Direction::Read, [one]) => {
                opcode::Read::new(file, one.iov_base.cast(), one.iov_len as u32)
                    .offset(at)
                    .build()
            }
            (Direction::Write, [one]) => {
                opcode::Write::new(file, one.iov_base.cast(), one.iov_len as u32)
                    .offset(at)
                    .build()
            }
            (Direction::Read, _) => opcode::Readv::new(file, list, count).offset(at).build(),
            (Direction::Write, _) => opcode::Writev::new(file, list, count).offset(at).build(),
        }
    }

    fn finish(&mut self, file: &RawFile, result: i32) -> io::Result<()> {
        let Ok(moved) = usize::try_from(result) else {
            let error = io::Error::from_raw_os_error(result.saturating_neg());
            return match &mut self.transfer {
                Some(transfer) if is_transient(&error) => transfer.rest(file, 0),
                _ => Err(error),
            };
        };
        match &mut self.transfer {
            None => Ok(()),
            Some(transfer) if moved as u64 >= transfer.len => Ok(()),
            Some(transfer) if moved == 0 => Err(ended(transfer.direction)),
            Some(transfer) => transfer.rest(file, moved),
        }
    }
}

impl Transfer {
    /// Moves what a short transfer left.
    fn rest(&mut self, file: &RawFile, moved: usize) -> io::Result<()> {
        // SAFETY: the slot that holds this transfer holds the guest RAM too.
        unsafe {
            self.vectors
                .transfer(file.file(), self.direction, self.offset, moved)
        }
    }
}

impl Disk for UringFile {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn start(&mut self, mem: &GuestRam, op: Op<'_>, tag: u16) -> Started {
        if self.ring().is_none() {
            return Started::Done(self.file.run(mem, op));
        }
        let transfer = match op {
            Op::Read { to, offset } => self.prepare(mem, Direction::Read, to, offset).map(Some),
            Op::Write { from, offset } => {
                self.prepare(mem, Direction::Write, from, offset).map(Some)
            }
            Op::Flush => Ok(None),
        };
        let queued = transfer.and_then(|transfer| {
            // Nothing to move: the kernel would report that as an end of file.
            if transfer.as_ref().is_some_and(|transfer| transfer.len == 0) {
                return Ok(false);
            }
            let mem = mem.clone();
            self.queue(
                Slot {
                    _mem: mem,
                    transfer,
                },
                tag,
            )
            .map(|()| true)
        });
        match queued {
            Ok(true) => Started::InFlight,
            Ok(false) => Started::Done(Ok(())),
            Err(e) => Started::Done(Err(e)),
        }
    }

    fn depth(&self) -> u16 {
        DEPTH
    }

    fn notify_through(&mut self, wakeup: EventFd) {
        self.wakeup = Some(wakeup);
    }

    fn submit(&mut self) -> io::Result<()> {
        let Ring::Made(ring) = &mut self.ring else {
            return Ok(());
        };
        if ring.submission().is_empty() {
            return Ok(());
        }
        match ring.submit() {
            // What stays in the ring goes along with the next batch; for that one comes.
            Err(e) if is_transient(&e) => {
                if let Some(wakeup) = &self.wakeup {
                    let _ = wakeup.write(1);
                }
                Ok(())
            }
            result => result.map(|_| ()),
        }
    }

    fn reap(&mut self, wait: bool, done: &mut Vec<(u16, io::Result<()>)>) -> io::Result<()> {
        self.collect(done);
        if wait { self.wait(done) } else { Ok(()) }
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.file.write_zeroes(offset, len, unmap)
    }

    fn file_id(&self) -> Option<FileId> {
        self.file.file_id()
    }

    fn rescan(&mut self) -> io::Result<()> {
        self.file.rescan()
    }
}

impl Drop for UringFile {
    fn drop(&mut self) {
        let failed = self.wait(&mut Vec::new()).is_err();
        if failed {
            // The kernel may still write to these buffers: they must never be reused.
            for slot in self.slots.drain(..).flatten() {
                std::mem::forget(slot);
            }
        }
    }
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
