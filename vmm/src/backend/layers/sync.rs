//! The engine whose operations are done when they were started.
use std::io;
use std::sync::{Arc, Mutex};

use super::{Shared, failed, lock};
use crate::backend::disk::{Disk, Op, Started};
use crate::backend::iovec::{Direction, IoVectors};
use crate::memory::GuestRam;
use crate::memory::segment::Segment;

/// See the module.
pub(super) struct SyncLayers {
    pub(super) shared: Arc<Mutex<Shared>>,
    size: u64,
    vectors: IoVectors,
    /// Buffers of one run.
    part: Vec<Segment>,
}

impl SyncLayers {
    pub(super) fn new(shared: Arc<Mutex<Shared>>) -> Self {
        let size = lock(&shared).stack.size();
        Self {
            shared,
            size,
            vectors: IoVectors::default(),
            part: Vec::new(),
        }
    }

    /// Does `op` now.
    pub(super) fn run(&mut self, mem: &GuestRam, op: Op<'_>) -> io::Result<()> {
        match op {
            Op::Read { to, offset } => self.read(mem, to, offset),
            Op::Write { from, offset } => self.write(mem, from, offset),
            Op::Flush => lock(&self.shared).stack.flush().map_err(failed),
        }
    }

    fn read(&mut self, mem: &GuestRam, to: &[Segment], offset: u64) -> io::Result<()> {
        let shared = lock(&self.shared);
        let length = total(to);
        let mut done = 0;
        while done < length {
            let run = shared.stack.run(offset + done, length - done);
            let file = shared.stack.file(run).ok_or(io::ErrorKind::NotFound)?;
            if run.length == length {
                self.vectors.fill(mem, to)?;
            } else {
                cut(to, done, run.length, &mut self.part);
                self.vectors.fill(mem, &self.part)?;
            }
            // SAFETY: `mem` is borrowed until the call is over.
            unsafe {
                self.vectors
                    .transfer(file, Direction::Read, run.offset, 0)?;
            }
            done += run.length.max(1);
        }
        Ok(())
    }

    fn write(&mut self, mem: &GuestRam, from: &[Segment], offset: u64) -> io::Result<()> {
        let mut shared = lock(&self.shared);
        let length = total(from);
        self.vectors.fill(mem, from)?;
        let at = shared.stack.prepare_write(offset, length).map_err(failed)?;
        let file = shared.stack.top().ok_or(io::ErrorKind::NotFound)?;
        // SAFETY: `mem` is borrowed until the call is over.
        unsafe { self.vectors.transfer(file, Direction::Write, at, 0)? };
        shared.stack.written(offset, length);
        Ok(())
    }
}

/// Bytes in all.
pub(super) fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// The part of `segments` that is `length` bytes long, behind the first `skip`.
pub(super) fn cut(segments: &[Segment], skip: u64, length: u64, part: &mut Vec<Segment>) {
    part.clear();
    let (mut skip, mut rest) = (skip, length);
    for segment in segments {
        let len = u64::from(segment.len);
        if skip >= len {
            skip -= len;
            continue;
        }
        if rest == 0 {
            return;
        }
        let here = (len - skip).min(rest);
        part.push(Segment {
            // An address that wraps is not in RAM, and is refused when it is looked up.
            addr: vm_memory::GuestAddress(segment.addr.0.wrapping_add(skip)),
            // No longer than the segment.
            len: here as u32,
        });
        rest -= here;
        skip = 0;
    }
}

impl Disk for SyncLayers {
    fn size(&self) -> u64 {
        self.size
    }

    fn start(&mut self, mem: &GuestRam, op: Op<'_>, _tag: u16) -> Started {
        Started::Done(self.run(mem, op))
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        lock(&self.shared)
            .stack
            .discard(offset, len)
            .map_err(failed)
    }

    /// Always a hole: that is what a snapshot need not keep.
    fn write_zeroes(&mut self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        lock(&self.shared)
            .stack
            .write_zeroes(offset, len)
            .map_err(failed)
    }

    fn rescan(&mut self) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "a layered disk has the size that it was made with",
        ))
    }
}
