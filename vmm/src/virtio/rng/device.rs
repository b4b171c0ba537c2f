//! The device. It has no state beyond its queue, and allocates nothing for a request.
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::memory::GuestRam;
use crate::virtio::chain::{self, Again, Chain, Outcome};
use crate::virtio::device::{DeviceError, DeviceIo, HostEvent, VirtioDevice};

/// Entropy device (virtio 1.2 §5).
const DEVICE_TYPE: u32 = 4;
const REQUESTS: usize = 0;
/// Linux asks for one buffer of 64 bytes or so at a time.
const QUEUE_SIZES: [u16; 1] = [8];
const AGAIN: u16 = 0;
/// VIRTIO_RING_F_INDIRECT_DESC and VIRTIO_RING_F_EVENT_IDX.
const FEATURES: u64 = 1 << 28 | 1 << 29;

/// Most bytes given to one request, however long its buffers: a driver gets the rest by
/// asking again (§5.4.6.1 leaves the amount to us). It bounds the time of one call.
pub(super) const MAX_REQUEST: u32 = 64 << 10;
const CHUNK: usize = 1024;

pub struct Rng {
    chain: Chain,
    again: Again,
}

impl Rng {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            chain: Chain::new(),
            again: Again::new()?,
        })
    }

    fn serve(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        if chain::serve(io, REQUESTS, &mut self.chain, |mem, request| {
            fill(mem, request)
        })? {
            self.again.ask();
        }
        Ok(())
    }
}

/// Fills a request's buffers, chunk by chunk through the stack.
fn fill(mem: &GuestRam, request: &Chain) -> Result<Outcome, DeviceError> {
    let wanted = request.writable_len().min(MAX_REQUEST);
    let mut filled = 0;
    let mut chunk = [0; CHUNK];
    while filled < wanted {
        let len = usize::try_from(wanted - filled).map_or(CHUNK, |left| left.min(CHUNK));
        let part = chunk.get_mut(..len).unwrap_or_default();
        let got = match getrandom(&mut *part, GetRandomFlags::NONBLOCK) {
            Ok(got) => got,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => {
                return Err(DeviceError::Host {
                    what: "getrandom",
                    source: error.into(),
                });
            }
        };
        let part = part.get(..got).unwrap_or_default();
        let written = request
            .write(mem, filled, part)
            .map_err(|e| chain::bad_queue(REQUESTS, &e))?;
        match u32::try_from(written) {
            Ok(written) if written > 0 => filled += written,
            _ => break,
        }
    }
    Ok(Outcome::Used(filled))
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    /// There is no configuration space (§5.4.4).
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, io: &mut DeviceIo<'_>, _features: u64) -> Result<(), DeviceError> {
        self.serve(io)
    }

    fn queue_notified(&mut self, io: &mut DeviceIo<'_>, _queue: usize) -> Result<(), DeviceError> {
        self.serve(io)
    }

    fn host_events(&self) -> Vec<HostEvent> {
        vec![HostEvent {
            fd: self.again.fd(),
            token: AGAIN,
        }]
    }

    fn host_ready(
        &mut self,
        io: Option<&mut DeviceIo<'_>>,
        _token: u16,
    ) -> Result<(), DeviceError> {
        self.again.clear();
        io.map_or(Ok(()), |io| self.serve(io))
    }

    fn reset(&mut self) {
        self.again.clear();
    }
}
