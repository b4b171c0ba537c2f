//! virtio-blk (virtio 1.2 §5.2): one drive, one queue, over any [`Disk`].
//!
//! `request` turns chains into checked operations, `config` is what the driver reads, `work`
//! knows what is in flight, `control` changes the medium; this file moves requests between
//! the queue and the disk.
mod config;
mod control;
mod request;
mod work;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use self::config::{
    ConfigSpace, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_SIZE_MAX, F_WRITE_ZEROES,
    QUEUE_SIZE, SECTOR,
};
pub use self::control::Control;
use self::control::Order;
pub use self::control::open_disk;
use self::request::{ByteRange, ID_BYTES, Request, Rules, Status};
use self::work::{InFlight, Work};
use super::chain::{self, Again, Chain, Outcome};
use super::device::{DeviceError, DeviceIo, DeviceState, HostEvent, RestoreError, VirtioDevice};
use crate::backend::disk::{Disk, Op, Started};
use crate::config::{CacheType, IoEngine};
use crate::memory::GuestRam;

const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;

/// What a discarded range counts as, however long: a file system frees extents, not bytes.
const DISCARD_COST: u64 = CALL_BYTES;

/// Bytes moved or zeroed in one call before the event loop gets its turn. A guest that writes all it can
/// holds up vsock for so long several times in each exchange.
const CALL_BYTES: u64 = 512 << 10;

/// Token of the one host descriptor: a spent budget, completions, and orders of [`Control`].
const WAKEUP: u16 = 0;

/// What a drive is to its guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// `drive_id`; for logs and errors.
    pub id: String,
    /// What the guest reads as serial; the first 20 bytes count.
    pub serial: String,
    pub read_only: bool,
    /// Whether flushes are offered, and whether one reaches the host's disk. One that does not succeeds and does
    /// nothing.
    pub cache_type: CacheType,
    /// For media that [`Control`] brings later.
    pub engine: IoEngine,
}

/// Counters of one drive, since the start.
#[derive(Debug, Default)]
pub struct Stats {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub discards: AtomicU64,
    pub read_bytes: AtomicU64,
    pub write_bytes: AtomicU64,
    /// Requests that were answered with an error.
    pub failed: AtomicU64,
}

/// A block device.
pub struct Block {
    name: String,
    serial: [u8; ID_BYTES],
    read_only: bool,
    cache_type: CacheType,
    config: ConfigSpace,
    stats: Arc<Stats>,
    again: Arc<Again>,
    control: Control,
    work: Work,
}

impl Block {
    /// A drive over `disk`.
    ///
    /// # Errors
    /// No event descriptor could be made.
    pub fn new(disk: Box<dyn Disk>, options: &Options) -> io::Result<Self> {
        let mut serial = [0; ID_BYTES];
        for (to, byte) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = byte;
        }
        let again = Arc::new(Again::new()?);
        let control = Control::new(
            Arc::clone(&again),
            options.read_only,
            options.engine,
            disk.file_id(),
        );
        let mut device = Self {
            name: format!("blk/{}", options.id),
            serial,
            read_only: options.read_only,
            cache_type: options.cache_type,
            config: ConfigSpace::new(disk.size() / SECTOR, !options.read_only),
            stats: Arc::default(),
            control,
            again,
            work: Work::new(disk),
        };
        device.connect()?;
        Ok(device)
    }

    /// Has the disk wake the event loop.
    fn connect(&mut self) -> io::Result<()> {
        if self.work.is_deep() {
            self.work.disk.notify_through(self.again.try_clone()?);
        }
        Ok(())
    }

    /// A handle by which other threads change the drive's medium.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.stats)
    }

    /// Takes requests from the queue and starts them; answers those that are done.
    fn process(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let rules = Rules {
            size: self.work.disk.size(),
            read_only: self.read_only,
            features: self.work.features,
        };
        let mut chain = std::mem::take(&mut self.work.chain);
        self.work.moved = 0;
        let mut spent = false;
        let mut stalled = false;
        let served = chain::serve(io, 0, &mut chain, |mem, chain| {
            if self.work.moved >= CALL_BYTES {
                spent = true;
                return Ok(Outcome::PutBack);
            }
            if !self.work.has_room() {
                stalled = true;
                return Ok(Outcome::PutBack);
            }
            self.work.moved += u64::from(chain.readable_len()) + u64::from(chain.writable_len());
            self.handle(mem, chain, rules)
        });
        self.work.chain = chain;
        if served? || spent {
            self.again.ask();
        }
        if self.work.is_deep() {
            self.work
                .disk
                .submit()
                .map_err(|source| DeviceError::Host {
                    what: "cannot submit requests to io_uring",
                    source,
                })?;
            self.complete(io, false)?;
            // What finished during submission wakes nobody later.
            if stalled && self.work.has_room() {
                self.again.ask();
            }
        }
        Ok(())
    }

    fn handle(
        &mut self,
        mem: &GuestRam,
        chain: &mut Chain,
        rules: Rules,
    ) -> Result<Outcome, DeviceError> {
        let parsed = request::parse(mem, chain, rules).map_err(|e| chain::bad_queue(0, &e))?;
        let written = chain.writable_len();
        let result = match parsed.request {
            Err(status) => Err(status),
            Ok(request) => match self.start(mem, chain, request, rules.size) {
                Ok(Started::Done(Ok(()))) => Ok(()),
                Ok(Started::Done(Err(_))) => Err(Status::IoError),
                Ok(Started::InFlight) => {
                    self.work.remember(InFlight {
                        head: chain.head(),
                        status: parsed.status,
                        written,
                    });
                    return Ok(Outcome::InFlight);
                }
                Err(status) => Err(status),
            },
        };
        self.answer(mem, parsed.status, written, result)
            .map(Outcome::Used)
    }

    /// Writes the status; returns how many bytes the driver may take as written.
    fn answer(
        &self,
        mem: &GuestRam,
        at: GuestAddress,
        written: u32,
        result: Result<(), Status>,
    ) -> Result<u32, DeviceError> {
        let status = match result {
            Ok(()) => Status::Ok,
            Err(status) => {
                count(&self.stats.failed, 1);
                status
            }
        };
        mem.write_obj(status as u8, at)
            .map_err(|e| chain::bad_queue(0, &e))?;
        // `written` bytes of data, then the status. After an error nothing is promised of the
        // data, so that only a status without data in front of it counts.
        Ok(match (status, written) {
            (Status::Ok, written) => written.saturating_add(1),
            (_, 0) => 1,
            _ => 0,
        })
    }

    fn start(
        &mut self,
        mem: &GuestRam,
        chain: &Chain,
        request: Request,
        size: u64,
    ) -> Result<Started, Status> {
        let stats = &self.stats;
        let tag = self.work.next_tag();
        let disk = &mut self.work.disk;
        Ok(match request {
            Request::Read { offset } => {
                count(&stats.reads, 1);
                count(&stats.read_bytes, u64::from(chain.writable_len()));
                let to = chain.writable();
                disk.start(mem, Op::Read { to, offset }, tag)
            }
            Request::Write { offset } => {
                count(&stats.writes, 1);
                count(&stats.write_bytes, u64::from(chain.readable_len()));
                let from = chain.readable();
                disk.start(mem, Op::Write { from, offset }, tag)
            }
            Request::Flush => {
                count(&stats.flushes, 1);
                if self.cache_type != CacheType::Writeback || self.read_only {
                    return Ok(Started::Done(Ok(())));
                }
                disk.start(mem, Op::Flush, tag)
            }
            Request::GetId => match chain.write(mem, 0, &self.serial) {
                Ok(ID_BYTES) => Started::Done(Ok(())),
                _ => return Err(Status::IoError),
            },
            Request::Discard { ranges } | Request::WriteZeroes { ranges } => {
                count(&stats.discards, 1);
                return self.zap(mem, chain, request, ranges, size);
            }
        })
    }

    /// Discards or zeroes all ranges. Every range is checked before the first is touched.
    fn zap(
        &mut self,
        mem: &GuestRam,
        chain: &Chain,
        request: Request,
        ranges: u32,
        size: u64,
    ) -> Result<Started, Status> {
        for index in 0..ranges {
            request::range(mem, chain, request, index, size)?;
        }
        for index in 0..ranges {
            // Read and checked again: the driver can change it meanwhile.
            let ByteRange { offset, len, unmap } =
                request::range(mem, chain, request, index, size)?;
            let done = match request {
                Request::Discard { .. } => {
                    self.work.moved += DISCARD_COST;
                    self.work.disk.discard(offset, len)
                }
                _ => {
                    // Zeros may have to be written.
                    self.work.moved += len;
                    self.work.disk.write_zeroes(offset, len, unmap)
                }
            };
            if done.is_err() {
                return Err(Status::IoError);
            }
        }
        Ok(Started::Done(Ok(())))
    }

    /// Answers what has finished; with `wait`, everything in flight.
    fn complete(&mut self, io: &mut DeviceIo<'_>, wait: bool) -> Result<(), DeviceError> {
        let mut done = std::mem::take(&mut self.work.done);
        let reaped = self.work.disk.reap(wait, &mut done);
        let mut used = false;
        let mut failed = None;
        if let Some(queue) = io.queues.first_mut() {
            for (tag, result) in done.drain(..) {
                match self.finish(io.mem, queue, tag, &result) {
                    Ok(()) => used = true,
                    Err(e) => failed = Some(e),
                }
            }
            if used && queue.ready() {
                chain::notify(io.mem, queue, 0, io.irq)?;
            }
        }
        self.work.done = done;
        reaped.map_err(|source| DeviceError::Host {
            what: "cannot take completions from io_uring",
            source,
        })?;
        failed.map_or(Ok(()), Err)
    }

    fn finish(
        &mut self,
        mem: &GuestRam,
        queue: &mut Queue,
        tag: u16,
        result: &io::Result<()>,
    ) -> Result<(), DeviceError> {
        let Some(request) = self.work.forget(tag) else {
            return Ok(());
        };
        let result = match result {
            Ok(()) => Ok(()),
            Err(_) => Err(Status::IoError),
        };
        let len = self.answer(mem, request.status, request.written, result)?;
        chain::add_used(mem, queue, 0, request.head, len)
    }

    /// The event loop was woken: by completions, by an order, or by ourselves.
    fn wake(&mut self, io: &mut DeviceIo<'_>, order: Option<Order>) -> Result<(), DeviceError> {
        self.complete(io, order.is_some())?;
        if let Some(order) = order
            && self.obey(order)?
        {
            io.irq.config_changed();
        }
        self.process(io)
    }

    /// After an error the transport leaves the device alone until it is reset, and the VM may
    /// be paused and saved before that: so nothing may stay in flight.
    fn settled(&mut self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        if result.is_err() {
            self.work.settle();
        }
        result
    }

    /// Carries out what came through [`Control`]; `true` if the driver has to look at the
    /// configuration again. Nothing may be in flight.
    fn obey(&mut self, order: Order) -> Result<bool, DeviceError> {
        match order {
            Order::Replace(disk) => {
                let features = self.work.features;
                self.work = Work::new(disk);
                self.work.features = features;
                self.connect().map_err(|source| DeviceError::Host {
                    what: "cannot wake the event loop from the new disk",
                    source,
                })?;
            }
            // An unusable size leaves the old one.
            Order::Rescan => {
                if self.work.disk.rescan().is_err() {
                    return Ok(false);
                }
            }
        }
        self.config.set_capacity(self.work.disk.size() / SECTOR);
        Ok(true)
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        2
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let mut features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_INDIRECT_DESC | F_EVENT_IDX;
        if self.read_only {
            features |= F_RO;
        } else {
            features |= F_DISCARD | F_WRITE_ZEROES;
            if self.cache_type != CacheType::Unsafe {
                features |= F_FLUSH;
            }
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn activate(&mut self, _io: &mut DeviceIo<'_>, features: u64) -> Result<(), DeviceError> {
        self.work.features = features;
        Ok(())
    }

    fn queue_notified(&mut self, io: &mut DeviceIo<'_>, queue: usize) -> Result<(), DeviceError> {
        if queue != 0 {
            return Ok(());
        }
        // A drive that was replaced while the guest stood still is the new one from its first request on.
        let result = match self.control.take() {
            Some(order) => self.wake(io, Some(order)),
            None => self.process(io),
        };
        self.settled(result)
    }

    fn host_events(&self) -> Vec<HostEvent> {
        vec![HostEvent {
            fd: self.again.fd(),
            token: WAKEUP,
        }]
    }

    fn host_ready(
        &mut self,
        io: Option<&mut DeviceIo<'_>>,
        _token: u16,
    ) -> Result<(), DeviceError> {
        self.again.clear();
        let order = self.control.take();
        let Some(io) = io else {
            // Not active: nothing in flight, and the driver reads the configuration later.
            return order.map_or(Ok(()), |order| self.obey(order).map(|_| ()));
        };
        let result = self.wake(io, order);
        self.settled(result)
    }

    fn drain(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let result = self.complete(io, true);
        self.settled(result)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block {
            capacity: self.config.capacity(),
        }
    }

    /// The disk may have grown meanwhile: then the driver is told. A smaller one would fail reads
    /// of what the guest's file system knows to be there.
    fn restore(
        &mut self,
        io: Option<&mut DeviceIo<'_>>,
        features: u64,
        state: &DeviceState,
    ) -> Result<(), RestoreError> {
        let DeviceState::Block { capacity: known } = *state else {
            return Err(RestoreError::Invalid(format!("{state:?}")));
        };
        let found = self.config.capacity();
        if found < known {
            return Err(RestoreError::Smaller { found, known });
        }
        if let Some(io) = io {
            self.work.features = features;
            if found > known {
                io.irq.config_changed();
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.work.reset();
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
