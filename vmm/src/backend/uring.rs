//! A raw disk whose transfers run in io_uring while the guest goes on. Where the kernel offers
//! none, requests are carried out at once, as [`RawFile`] does.
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::disk::{Disk, FileId, Op, Started};
use super::engine::{DEPTH, Engine};
use super::file::RawFile;
use super::iovec::Direction;
use crate::memory::GuestRam;

/// See the module.
pub struct UringFile {
    file: RawFile,
    engine: Engine,
}

impl UringFile {
    pub fn new(file: RawFile) -> Self {
        let engine = Engine::new(vec![Arc::clone(file.file())]);
        Self { file, engine }
    }
}

impl Disk for UringFile {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn start(&mut self, mem: &GuestRam, op: Op<'_>, tag: u16) -> Started {
        if !self.engine.is_there() {
            return Started::Done(self.file.run(mem, op));
        }
        let engine = &mut self.engine;
        let queued = match op {
            Op::Read { to, offset } => engine.transfer(mem, (0, offset), Direction::Read, to, tag),
            Op::Write { from, offset } => {
                engine.transfer(mem, (0, offset), Direction::Write, from, tag)
            }
            Op::Flush => engine.sync(0, tag).map(|()| true),
        };
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
        self.engine.notify_through(wakeup);
    }

    fn submit(&mut self) -> io::Result<()> {
        self.engine.submit()
    }

    fn reap(&mut self, wait: bool, done: &mut Vec<(u16, io::Result<()>)>) -> io::Result<()> {
        self.engine.collect(done);
        if wait { self.engine.wait(done) } else { Ok(()) }
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

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
