//! The engine whose transfers run in io_uring while the guest goes on.
//!
//! What lies in one file, as nearly everything does, is one transfer; reads across files, copies of
//! clusters and the pages of the map are carried out at once. A cluster becomes the top layer's when
//! its write is over: if that fails, what was there before still is.
use std::collections::VecDeque;
use std::io;

use belljar_layers::Flush;
use vmm_sys_util::eventfd::EventFd;

use super::sync::{SyncLayers, total};
use super::{failed, lock};
use crate::backend::disk::{Disk, Op, Started};
use crate::backend::engine::{DEPTH, Engine};
use crate::backend::iovec::Direction;
use crate::memory::GuestRam;
use crate::memory::segment::Segment;

/// A flush that the device waits for, and how far it is.
struct Flushing {
    /// The operation in the ring; also of the request, unless others wait for the same flush.
    tag: u16,
    flush: Flush,
    /// The engine's number of the file; what it is in the stack may change meanwhile.
    top: usize,
    /// The bytes are durable, and the map is being made so.
    map_written: bool,
    /// More requests that this flush answers: they came before it began.
    others: Vec<u16>,
}

/// See the module.
pub(super) struct RingLayers {
    sync: SyncLayers,
    engine: Engine,
    /// Of the files that the engine has.
    generation: Option<u64>,
    /// By tag: a write under way and the bytes it covers.
    writes: Vec<Option<(u64, u64)>>,
    flushing: Option<Flushing>,
    /// Flushes that came while one was under way.
    waiting: VecDeque<u16>,
    /// Finished, not reported.
    finished: Vec<(u16, io::Result<()>)>,
    /// From the engine.
    raw: Vec<(u16, io::Result<()>)>,
    wakeup: Option<EventFd>,
}

impl RingLayers {
    pub(super) fn new(sync: SyncLayers) -> Self {
        Self {
            engine: Engine::new(Vec::new()),
            sync,
            generation: None,
            writes: vec![None; usize::from(DEPTH)],
            flushing: None,
            waiting: VecDeque::new(),
            finished: Vec::new(),
            raw: Vec::new(),
            wakeup: None,
        }
    }

    /// The files may have become others: then all that is in flight ends first.
    fn refresh(&mut self) {
        let generation = lock(&self.sync.shared).generation;
        if self.generation == Some(generation) {
            return;
        }
        if self.settle().is_err() {
            return;
        }
        let files = lock(&self.sync.shared).files();
        self.engine.replace_files(files);
        self.generation = Some(generation);
    }

    fn read(&mut self, mem: &GuestRam, to: &[Segment], offset: u64, tag: u16) -> Started {
        let length = total(to);
        let run = lock(&self.sync.shared).stack.run(offset, length);
        if run.length < length {
            let op = Op::Read { to, offset };
            return Started::Done(self.sync.run(mem, op));
        }
        let place = (run.file, run.offset);
        in_flight(self.engine.transfer(mem, place, Direction::Read, to, tag))
    }

    fn write(&mut self, mem: &GuestRam, from: &[Segment], offset: u64, tag: u16) -> Started {
        let length = total(from);
        let copies = lock(&self.sync.shared).stack.has_to_copy(offset, length);
        // What is copied could be on its way.
        if copies && let Err(error) = self.settle() {
            return Started::Done(Err(error));
        }
        let prepared = {
            let mut shared = lock(&self.sync.shared);
            let top = shared.stack.layers().len();
            let at = shared.stack.prepare_write(offset, length);
            at.map(|at| (top, at)).map_err(failed)
        };
        let started = prepared.and_then(|place| {
            self.engine
                .transfer(mem, place, Direction::Write, from, tag)
        });
        if let (Ok(true), Some(write)) = (&started, self.writes.get_mut(usize::from(tag))) {
            *write = Some((offset, length));
        }
        in_flight(started)
    }

    fn flush(&mut self, tag: u16) -> Started {
        if self.flushing.is_some() {
            self.waiting.push_back(tag);
            return Started::InFlight;
        }
        match self.begin(tag, Vec::new()) {
            Ok(()) => Started::InFlight,
            Err(error) => Started::Done(Err(error)),
        }
    }

    fn begin(&mut self, tag: u16, others: Vec<u16>) -> io::Result<()> {
        let (top, flush) = {
            let mut shared = lock(&self.sync.shared);
            let flush = shared.stack.begin_flush().map_err(failed)?;
            (shared.stack.layers().len(), flush)
        };
        if let Err(error) = self.engine.sync(top, tag) {
            lock(&self.sync.shared).stack.fail_flush(&flush);
            return Err(error);
        }
        self.flushing = Some(Flushing {
            tag,
            flush,
            top,
            map_written: false,
            others,
        });
        Ok(())
    }

    /// Sorts what the engine has finished; `true` if it started something in turn.
    fn sort(&mut self) -> bool {
        let mut started = false;
        for (tag, result) in std::mem::take(&mut self.raw) {
            if self.flushing.as_ref().is_some_and(|f| f.tag == tag) {
                started |= self.advance(result);
                continue;
            }
            let write = self.writes.get_mut(usize::from(tag)).and_then(Option::take);
            if let (Some((offset, length)), Ok(())) = (write, &result) {
                lock(&self.sync.shared).stack.written(offset, length);
            }
            self.finished.push((tag, result));
        }
        started
    }

    /// One of the syncs of the flush is over; `true` if another one was started.
    fn advance(&mut self, result: io::Result<()>) -> bool {
        let Some(mut flushing) = self.flushing.take() else {
            return false;
        };
        let mut result = result;
        if result.is_ok() && flushing.flush.has_map() && !flushing.map_written {
            result = self.write_map(&flushing);
            if result.is_ok() {
                flushing.map_written = true;
                self.flushing = Some(flushing);
                return true;
            }
        }
        {
            let stack = &mut lock(&self.sync.shared).stack;
            match &result {
                Ok(()) => stack.end_flush(&flushing.flush),
                Err(_) => stack.fail_flush(&flushing.flush),
            }
        }
        for tag in flushing.others {
            let same = result.as_ref().map_err(again).copied();
            self.finished.push((tag, same));
        }
        self.finished.push((flushing.tag, result));
        self.next_flush()
    }

    fn write_map(&mut self, flushing: &Flushing) -> io::Result<()> {
        let written = lock(&self.sync.shared).stack.write_flush(&flushing.flush);
        written.map_err(failed)?;
        self.engine.sync(flushing.top, flushing.tag)
    }

    /// All that wait are answered by one flush.
    fn next_flush(&mut self) -> bool {
        let Some(tag) = self.waiting.pop_front() else {
            return false;
        };
        let others: Vec<u16> = self.waiting.drain(..).collect();
        match self.begin(tag, others.clone()) {
            Ok(()) => true,
            Err(error) => {
                for other in others {
                    self.finished.push((other, Err(again(&error))));
                }
                self.finished.push((tag, Err(error)));
                // Nothing in the ring will wake the loop for these.
                if let Some(wakeup) = &self.wakeup {
                    let _ = wakeup.write(1);
                }
                false
            }
        }
    }

    /// Takes what has finished, and hands on what follows from it.
    fn collect(&mut self) -> io::Result<()> {
        self.engine.collect(&mut self.raw);
        if self.sort() {
            self.engine.submit()?;
        }
        Ok(())
    }

    /// Waits until nothing is in flight.
    fn settle(&mut self) -> io::Result<()> {
        loop {
            self.engine.wait(&mut self.raw)?;
            self.sort();
            if self.engine.is_idle() {
                return Ok(());
            }
        }
    }
}

/// The same error for another request.
fn again(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::other(error.to_string()),
    }
}

fn in_flight(started: io::Result<bool>) -> Started {
    match started {
        Ok(true) => Started::InFlight,
        Ok(false) => Started::Done(Ok(())),
        Err(error) => Started::Done(Err(error)),
    }
}

impl Disk for RingLayers {
    fn size(&self) -> u64 {
        self.sync.size()
    }

    fn start(&mut self, mem: &GuestRam, op: Op<'_>, tag: u16) -> Started {
        self.refresh();
        if !self.engine.is_there() {
            return Started::Done(self.sync.run(mem, op));
        }
        match op {
            Op::Read { to, offset } => self.read(mem, to, offset, tag),
            Op::Write { from, offset } => self.write(mem, from, offset, tag),
            Op::Flush => self.flush(tag),
        }
    }

    fn depth(&self) -> u16 {
        DEPTH
    }

    fn notify_through(&mut self, wakeup: EventFd) {
        self.wakeup = wakeup.try_clone().ok();
        self.engine.notify_through(wakeup);
    }

    fn submit(&mut self) -> io::Result<()> {
        self.engine.submit()
    }

    fn reap(&mut self, wait: bool, done: &mut Vec<(u16, io::Result<()>)>) -> io::Result<()> {
        let reaped = if wait { self.settle() } else { self.collect() };
        done.append(&mut self.finished);
        reaped
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.settle()?;
        self.sync.discard(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.settle()?;
        self.sync.write_zeroes(offset, len, unmap)
    }

    fn rescan(&mut self) -> io::Result<()> {
        self.sync.rescan()
    }
}

impl Drop for RingLayers {
    fn drop(&mut self) {
        // A flush under way has its map written; the engine waits for the rest.
        let _ = self.settle();
    }
}
