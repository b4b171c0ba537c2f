//! Checked descriptor chains (virtio 1.2 §2.7.4, §2.7.5) over virtio-queue.
//!
//! virtio-queue stops silently where a chain loops, leaves the table or RAM, or nests
//! indirect tables. Here that is an error, so a device sees either a whole, well-formed chain
//! or none. The only state kept between requests is the buffer of a [`Chain`].
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{DeviceError, DeviceIo, Interrupt};
use crate::memory::GuestRam;
pub use crate::memory::segment::Segment;

/// Most descriptors of one chain, those of an indirect table included. It is what Linux
/// takes in one vectored call (`UIO_MAXIOV`), and bounds the work of one request.
pub const MAX_SEGMENTS: usize = 1024;

/// One descriptor chain: readable buffers first, then writable ones, all inside guest RAM when
/// it was loaded. Reused from request to request, so that none allocates.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// How many of `segments` at the start were consumed.
    start: usize,
    /// Where the writable ones of `segments` start.
    split: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    pub fn new() -> Self {
        Self::default()
    }

    /// Index of the first descriptor; names the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers the device reads, in order. None is empty.
    pub fn readable(&self) -> &[Segment] {
        self.segments
            .get(self.start..self.split)
            .unwrap_or_default()
    }

    /// Buffers the device writes, in order. None is empty.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.split..).unwrap_or_default()
    }

    /// Bytes in all readable buffers.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes in all writable buffers.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Takes a header of exactly `data.len()` bytes off the front of the readable part;
    /// `false` (and nothing is taken) if that is shorter.
    pub fn take_header(&mut self, mem: &GuestRam, data: &mut [u8]) -> Result<bool, OutsideRam> {
        let Some(rest) = u32::try_from(data.len())
            .ok()
            .and_then(|len| self.readable_len.checked_sub(len))
        else {
            return Ok(false);
        };
        self.read(mem, 0, data)?;
        let mut left = self.readable_len - rest;
        while left > 0 {
            let split = self.split;
            let Some(segment) = self
                .segments
                .get_mut(self.start..split)
                .and_then(<[_]>::first_mut)
            else {
                break;
            };
            if segment.len > left {
                segment.addr.0 += u64::from(left);
                segment.len -= left;
                break;
            }
            left -= segment.len;
            self.start += 1;
        }
        self.readable_len = rest;
        Ok(true)
    }

    /// Takes the last writable byte off, where block devices put a status; its address.
    pub fn take_last_writable(&mut self) -> Option<GuestAddress> {
        if self.segments.len() <= self.split {
            return None;
        }
        let last = self.segments.last_mut()?;
        // Segments are never empty, and lie in RAM with their last byte.
        last.len -= 1;
        let addr = GuestAddress(last.addr.0 + u64::from(last.len));
        if last.len == 0 {
            self.segments.pop();
        }
        self.writable_len -= 1;
        Some(addr)
    }

    /// Copies readable bytes from `offset` into `data`; returns how many there were.
    pub fn read(&self, mem: &GuestRam, offset: u32, data: &mut [u8]) -> Result<usize, OutsideRam> {
        copy(self.readable(), offset, data.len(), |addr, range| {
            let part = data.get_mut(range).ok_or(OutsideRam)?;
            mem.read_slice(part, addr).map_err(|_| OutsideRam)
        })
    }

    /// Copies `data` to the writable bytes from `offset`; returns how many found room.
    pub fn write(&self, mem: &GuestRam, offset: u32, data: &[u8]) -> Result<usize, OutsideRam> {
        copy(self.writable(), offset, data.len(), |addr, range| {
            let part = data.get(range).ok_or(OutsideRam)?;
            mem.write_slice(part, addr).map_err(|_| OutsideRam)
        })
    }

    fn load<'m>(
        &mut self,
        mem: &'m GuestRam,
        mut descriptors: virtio_queue::DescriptorChain<&'m GuestRam>,
    ) -> Result<(), &'static str> {
        self.head = descriptors.head_index();
        self.segments.clear();
        self.start = 0;
        self.split = 0;
        self.readable_len = 0;
        self.writable_len = 0;

        let mut complete = false;
        let mut count = 0;
        for descriptor in descriptors.by_ref() {
            complete = !descriptor.has_next();
            count += 1;
            if count > MAX_SEGMENTS {
                return Err("a chain has too many descriptors");
            }
            let segment = Segment {
                addr: descriptor.addr(),
                len: descriptor.len(),
            };
            if segment.len == 0 {
                continue;
            }
            if !in_ram(mem, segment) {
                return Err("a descriptor points outside RAM");
            }
            let total = if descriptor.is_write_only() {
                &mut self.writable_len
            } else if self.segments.len() > self.split {
                return Err("a readable descriptor follows a writable one");
            } else {
                self.split += 1;
                &mut self.readable_len
            };
            *total = total
                .checked_add(segment.len)
                .ok_or("a chain is longer than 4 GiB")?;
            self.segments.push(segment);
        }
        if complete {
            Ok(())
        } else {
            Err("a chain loops, or leaves its table or RAM")
        }
    }
}

/// A buffer left guest RAM between the check and the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a buffer is outside guest RAM")]
pub struct OutsideRam;

fn in_ram(mem: &GuestRam, segment: Segment) -> bool {
    usize::try_from(segment.len).is_ok_and(|len| mem.check_range(segment.addr, len))
}

/// Walks `len` bytes of `segments` from `offset`; `part` gets the address and the range of
/// the caller's buffer of each piece.
fn copy(
    segments: &[Segment],
    offset: u32,
    len: usize,
    mut part: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), OutsideRam>,
) -> Result<usize, OutsideRam> {
    let mut skip = offset;
    let mut done = 0;
    for segment in segments {
        if done == len {
            break;
        }
        if skip >= segment.len {
            skip -= segment.len;
            continue;
        }
        let room = usize::try_from(segment.len - skip).map_err(|_| OutsideRam)?;
        let end = done + room.min(len - done);
        let addr = segment
            .addr
            .0
            .checked_add(u64::from(skip))
            .ok_or(OutsideRam)?;
        part(GuestAddress(addr), done..end)?;
        done = end;
        skip = 0;
    }
    Ok(done)
}

/// The requests one call may take from a queue: at most its length, so that a driver which
/// refills the queue meanwhile cannot keep the event loop (virtio 1.2 §2.7.13).
#[derive(Debug)]
pub struct Budget {
    queue: usize,
    left: u16,
}

impl Budget {
    /// A call's budget for `queue`, which is number `index` of the device.
    pub fn new(queue: &Queue, index: usize) -> Self {
        Self {
            queue: index,
            left: queue.size(),
        }
    }

    /// Whether a queue's length was taken: the rest needs another call.
    pub fn is_spent(&self) -> bool {
        self.left == 0
    }

    /// Takes the next available chain. `false`: none is there, the budget is spent or the
    /// driver did not enable the queue.
    ///
    /// # Errors
    /// An available index beyond the queue's size, or a malformed chain.
    pub fn next(
        &mut self,
        mem: &GuestRam,
        queue: &mut Queue,
        chain: &mut Chain,
    ) -> Result<bool, DeviceError> {
        if self.left == 0 || !queue.ready() {
            return Ok(false);
        }
        // An empty look costs budget too: `serve` looks again while the ring says that
        // something is there, which a ring that left RAM could say for ever.
        self.left -= 1;
        let mut heads = queue.iter(mem).map_err(|e| bad_queue(self.queue, &e))?;
        let Some(descriptors) = heads.next() else {
            return Ok(false);
        };
        chain
            .load(mem, descriptors)
            .map_err(|what| bad_queue(self.queue, &what))?;
        Ok(true)
    }
}

/// What became of a chain given to [`serve`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Finished: this many bytes of the writable buffers were written.
    Used(u32),
    /// Kept by the device, which calls [`add_used`] and [`notify`] later.
    InFlight,
    /// Not taken: it stays the queue's next chain, and the call ends.
    PutBack,
}

/// Serves up to a queue's length of requests from queue `index`, and interrupts the driver
/// once if it wants that. Returns `true` if the budget was spent with requests left: the
/// driver will not kick for those, so the caller arranges another call (see [`Again`]).
///
/// # Errors
/// The driver broke the ring or a chain; requests finished before are in the used ring.
pub fn serve(
    io: &mut DeviceIo<'_>,
    index: usize,
    chain: &mut Chain,
    mut request: impl FnMut(&GuestRam, &mut Chain) -> Result<Outcome, DeviceError>,
) -> Result<bool, DeviceError> {
    let Some(queue) = io.queues.get_mut(index).filter(|queue| queue.ready()) else {
        return Ok(false);
    };
    let mut budget = Budget::new(queue, index);
    let mut used = false;
    let more = loop {
        let mut put_back = false;
        queue
            .disable_notification(io.mem)
            .map_err(|e| bad_queue(index, &e))?;
        while budget.next(io.mem, queue, chain)? {
            match request(io.mem, chain)? {
                Outcome::Used(len) => {
                    add_used(io.mem, queue, index, chain.head(), len)?;
                    used = true;
                }
                Outcome::InFlight => {}
                Outcome::PutBack => {
                    queue.go_to_previous_position();
                    put_back = true;
                    break;
                }
            }
        }
        let pending = queue
            .enable_notification(io.mem)
            .map_err(|e| bad_queue(index, &e))?;
        if !pending || put_back {
            break false;
        }
        if budget.is_spent() {
            break true;
        }
    };
    if used {
        notify(io.mem, queue, index, io.irq)?;
    }
    Ok(more)
}

/// Gives the chain `head` back to the driver with `len` bytes written. [`notify`] follows
/// once per batch.
pub fn add_used(
    mem: &GuestRam,
    queue: &mut Queue,
    index: usize,
    head: u16,
    len: u32,
) -> Result<(), DeviceError> {
    queue
        .add_used(mem, head, len)
        .map_err(|e| bad_queue(index, &e))
}

/// Interrupts the driver for what was added since the last call, unless it asked not to be
/// (EVENT_IDX, or VIRTQ_AVAIL_F_NO_INTERRUPT; virtio 1.2 §2.7.7).
pub fn notify(
    mem: &GuestRam,
    queue: &mut Queue,
    index: usize,
    irq: &Interrupt,
) -> Result<(), DeviceError> {
    let wanted = queue
        .needs_notification(mem)
        .map_err(|e| bad_queue(index, &e))?;
    if wanted && (queue.event_idx_enabled() || !interrupts_off(mem, queue)) {
        irq.used_ring();
    }
    Ok(())
}

fn interrupts_off(mem: &GuestRam, queue: &Queue) -> bool {
    mem.load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
        .is_ok_and(|flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
}

/// A driver's fault in queue `index`.
pub fn bad_queue(index: usize, what: &dyn std::fmt::Display) -> DeviceError {
    DeviceError::BadQueue {
        queue: index,
        what: what.to_string(),
    }
}

/// Brings a device back on the event loop after a spent budget: a readable descriptor for
/// `host_events`.
#[derive(Debug)]
pub struct Again(EventFd);

impl Again {
    pub fn new() -> std::io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(Self)
    }

    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// A second descriptor of the same counter, for whoever else wakes the device.
    pub fn try_clone(&self) -> std::io::Result<EventFd> {
        self.0.try_clone()
    }

    /// Asks for another call.
    pub fn ask(&self) {
        // Fails only when the counter is full, and then the descriptor is readable.
        let _ = self.0.write(1);
    }

    /// Takes the request back; call it first in `host_ready`.
    pub fn clear(&self) {
        // Nothing to read means that nothing was asked for.
        let _ = self.0.read();
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
