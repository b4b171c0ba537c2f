//! Transfers in io_uring between files and guest RAM, under way while the guest goes on.
//!
//! The ring is made with the first request. It is restricted to the few operations of a disk
//! on the registered files. Where the kernel offers no io_uring, there is none.
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use vmm_sys_util::eventfd::EventFd;

use super::iovec::{Direction, IoVectors, MAX_VECTORS, ended};
use crate::memory::GuestRam;
use crate::memory::segment::Segment;

/// Most operations in flight, and entries of the ring.
pub(super) const DEPTH: u16 = 128;

/// An operation in flight, with all that the kernel uses for it.
struct Slot {
    /// Keeps the buffers mapped, whatever becomes of the VM.
    _mem: Option<GuestRam>,
    file: usize,
    /// `None`: a sync.
    transfer: Option<Transfer>,
}

struct Transfer {
    vectors: IoVectors,
    direction: Direction,
    offset: u64,
    len: u64,
}

pub(super) enum Ring {
    /// No request came yet.
    Unmade,
    Made(Box<IoUring>),
    /// The kernel offers none.
    Refused,
}

/// See the module.
pub(super) struct Engine {
    /// Registered with the ring, by index.
    files: Vec<Arc<File>>,
    pub(super) ring: Ring,
    wakeup: Option<EventFd>,
    slots: Vec<Option<Slot>>,
    pub(super) in_flight: usize,
    /// Vectors of finished operations, for the next ones.
    spare: Vec<IoVectors>,
}

impl Engine {
    pub(super) fn new(files: Vec<Arc<File>>) -> Self {
        Self {
            files,
            ring: Ring::Unmade,
            wakeup: None,
            slots: (0..DEPTH).map(|_| None).collect(),
            in_flight: 0,
            spare: Vec::new(),
        }
    }

    /// Whether requests can be started; else they have to be carried out at once.
    pub(super) fn is_there(&mut self) -> bool {
        self.ring().is_some()
    }

    /// `wakeup` is written when something has finished.
    pub(super) fn notify_through(&mut self, wakeup: EventFd) {
        self.wakeup = Some(wakeup);
    }

    /// Other files from now on. Nothing may be in flight.
    pub(super) fn replace_files(&mut self, files: Vec<Arc<File>>) {
        self.files = files;
        if matches!(self.ring, Ring::Made(_)) {
            self.ring = Ring::Unmade;
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    fn ring(&mut self) -> Option<&mut IoUring> {
        if matches!(self.ring, Ring::Unmade) {
            self.ring = make_ring(&self.files, self.wakeup.as_ref())
                .map_or(Ring::Refused, |ring| Ring::Made(Box::new(ring)));
        }
        match &mut self.ring {
            Ring::Made(ring) => Some(ring),
            Ring::Unmade | Ring::Refused => None,
        }
    }

    /// Starts a transfer; `false`: there is nothing to move, which the kernel would report as an
    /// end of the file.
    pub(super) fn transfer(
        &mut self,
        mem: &GuestRam,
        (file, offset): (usize, u64),
        direction: Direction,
        segments: &[Segment],
        tag: u16,
    ) -> io::Result<bool> {
        let len = segments.iter().map(|segment| u64::from(segment.len)).sum();
        if len == 0 {
            return Ok(false);
        }
        let mut vectors = self.spare.pop().unwrap_or_default();
        vectors.fill(mem, segments)?;
        let transfer = Some(Transfer {
            vectors,
            direction,
            offset,
            len,
        });
        let slot = Slot {
            _mem: Some(mem.clone()),
            file,
            transfer,
        };
        self.queue(slot, tag).map(|()| true)
    }

    /// Starts a sync of the data of a file.
    pub(super) fn sync(&mut self, file: usize, tag: u16) -> io::Result<()> {
        let slot = Slot {
            _mem: None,
            file,
            transfer: None,
        };
        self.queue(slot, tag)
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
    pub(super) fn collect(&mut self, done: &mut Vec<(u16, io::Result<()>)>) {
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
            let result = slot.finish(&self.files, completion.result());
            if let Some(transfer) = slot.transfer
                && self.spare.len() < usize::from(DEPTH)
            {
                self.spare.push(transfer.vectors);
            }
            done.push((tag, result));
        }
    }

    /// Waits for all that is in flight.
    pub(super) fn wait(&mut self, done: &mut Vec<(u16, io::Result<()>)>) -> io::Result<()> {
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

    /// Hands what was started to the kernel.
    pub(super) fn submit(&mut self) -> io::Result<()> {
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
}

/// A signal came, or completions have to be taken first.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)
    )
}

fn make_ring(files: &[Arc<File>], wakeup: Option<&EventFd>) -> io::Result<IoUring> {
    let ring = IoUring::builder()
        .setup_r_disabled()
        .build(u32::from(DEPTH))?;
    let submitter = ring.submitter();
    let files: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
    submitter.register_files(&files)?;
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
        // At most nine.
        let file = Fixed(self.file as u32);
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

    fn finish(&mut self, files: &[Arc<File>], result: i32) -> io::Result<()> {
        let Some(file) = files.get(self.file) else {
            return Err(io::ErrorKind::NotFound.into());
        };
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
    fn rest(&mut self, file: &File, moved: usize) -> io::Result<()> {
        // SAFETY: the slot that holds this transfer holds the guest RAM too.
        unsafe {
            self.vectors
                .transfer(file, self.direction, self.offset, moved)
        }
    }
}

impl Drop for Engine {
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
