//! The 16550 at COM1, for early debugging: one exit a byte, and so off in normal boots.
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};

use crate::backend::output::{Scrollback, Sink};
use crate::bus::BusDevice;
use crate::virtio::device::InterruptLine;

/// Bytes kept for [`Serial::tail`], and for an output that is slow.
const SCROLLBACK: usize = 64 << 10;

/// The 8 ports of a 16550.
pub struct Serial(Arc<Mutex<State>>);

/// Types into the UART; see [`Serial::input`].
#[derive(Clone)]
pub struct SerialInput(Arc<Mutex<State>>);

/// Reads the UART's registers, for a snapshot.
#[derive(Clone)]
pub struct SerialRegisters(Arc<Mutex<State>>);

impl SerialRegisters {
    pub fn save(&self) -> SerialState {
        lock(&self.0).state()
    }
}

type State = Uart<Line, NoEvents, Output>;

struct Line(Arc<dyn InterruptLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// Never waits and never fails: a guest's `outb` must not depend on who reads.
struct Output {
    scrollback: Scrollback,
    sink: Option<Sink>,
}

impl io::Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.scrollback.push(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(sink) = &mut self.sink {
            // A sink that is behind catches up with the next byte.
            let _ = sink.pump(&self.scrollback);
        }
        Ok(())
    }
}

impl Serial {
    /// `output` gets what the guest writes (a regular file at most `file_limit` bytes); what
    /// it does not take in time is lost.
    pub fn new(
        line: Arc<dyn InterruptLine>,
        output: Option<OwnedFd>,
        file_limit: u64,
    ) -> io::Result<Self> {
        Self::from_state(&SerialState::default(), line, output, file_limit)
    }

    /// The same, with registers as they were saved.
    pub fn from_state(
        state: &SerialState,
        line: Arc<dyn InterruptLine>,
        output: Option<OwnedFd>,
        file_limit: u64,
    ) -> io::Result<Self> {
        let sink = output.map(|fd| Sink::new(fd, 0, file_limit)).transpose()?;
        let scrollback = Scrollback::new(SCROLLBACK);
        let uart = Uart::from_state(state, Line(line), NoEvents, Output { scrollback, sink })
            .map_err(|e| io::Error::other(format!("its registers cannot be restored: {e:?}")))?;
        Ok(Self(Arc::new(Mutex::new(uart))))
    }

    /// A handle by which the machine reads the registers.
    pub fn registers(&self) -> SerialRegisters {
        SerialRegisters(self.0.clone())
    }

    /// Input for the guest, from any thread.
    pub fn input(&self) -> SerialInput {
        SerialInput(self.0.clone())
    }

    /// The last lines the guest wrote.
    pub fn tail(&self, lines: usize) -> Vec<u8> {
        lock(&self.0).writer().scrollback.tail(lines, SCROLLBACK)
    }
}

impl SerialInput {
    /// Offers `data` to the guest; returns how many bytes its FIFO (64 bytes) took.
    pub fn offer(&self, data: &[u8]) -> usize {
        // A full FIFO takes nothing, and an interrupt that cannot be raised leaves the bytes
        // in the FIFO for a guest that polls.
        lock(&self.0).enqueue_raw_bytes(data).unwrap_or(0)
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = lock(&self.0).read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            // The output cannot fail; see `Line` for the interrupt.
            let _ = lock(&self.0).write(offset, *byte);
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
