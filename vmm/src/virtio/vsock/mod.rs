//! virtio-vsock (virtio 1.2 §5.10) over Unix sockets, Firecracker's hybrid convention:
//!
//! - *Host to guest*: connect to the listening socket, send `CONNECT <port>\n`, read
//!   `OK <host port>\n`; from then on the bytes are the stream. The connection is closed at once
//!   if nobody listens in the guest.
//! - *Guest to host*: a connection to CID 2, port P reaches the Unix socket that [`Dial`] names
//!   for P; without a listener the guest gets a reset.
//!
//! What has state without I/O is pure: [`packet`], [`credit`], [`greeting`], [`connection`],
//! [`muxer`]. Around it `tx` takes packets of the guest, `rx` gives packets to it, `host`
//! and `streams` serve the sockets. Each descriptor stands in one epoll instance, edge-triggered, so that a
//! stalled or closed peer wakes nobody a second time; what may still be read is remembered in the
//! connection.
pub mod connection;
pub mod credit;
pub mod greeting;
mod host;
mod interlude;
pub mod muxer;
pub mod packet;
mod rx;
mod streams;
mod tx;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use self::host::{EVENTS, Host, Token};
use self::interlude::Interlude;
pub use self::muxer::Counters;
use self::muxer::Muxer;
use super::chain::Chain;
use super::device::{DeviceError, DeviceIo, DeviceState, HostEvent, RestoreError, VirtioDevice};
use crate::backend::unix::{Listener, Spare};

#[cfg(test)]
mod tests;

/// virtio 1.2 §5.10.1.
const DEVICE_TYPE: u32 = 19;
/// virtio 1.2 §5.10.3 and §2.7.10.
const F_STREAM: u64 = 1 << 0;
const F_EVENT_IDX: u64 = 1 << 29;

/// Queues (virtio 1.2 §5.10.2). 128 receive buffers of 4 KiB, as Linux makes them, hold more than
/// one connection's credit; a guest keeps 8 event buffers.
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// Where connections of the guest to host ports go.
#[derive(Debug)]
pub enum Dial {
    /// The socket `<path>_<port>`.
    Beside(PathBuf),
    /// The socket named `_<port>` in a directory, for a VMM that opens no paths of its own: beside
    /// the listening socket `fd:NAME` it is given the directory as descriptor `NAME.dir`.
    /// Reached through `/proc/self/fd`.
    Under(OwnedFd),
    /// Nowhere: the guest gets a reset.
    Nowhere,
}

impl Dial {
    /// The socket file for `port`.
    fn path(&self, port: u32) -> Option<PathBuf> {
        match self {
            Self::Beside(base) => {
                let mut path = base.clone().into_os_string();
                path.push(format!("_{port}"));
                Some(path.into())
            }
            Self::Under(directory) => {
                let fd = directory.as_raw_fd();
                Some(PathBuf::from(format!("/proc/self/fd/{fd}/_{port}")))
            }
            Self::Nowhere => None,
        }
    }
}

/// The socket device.
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    host: Host,
    tx_chain: Chain,
    /// Receive chains of one read of a host's socket.
    rx_chains: Vec<Chain>,
    spare: Spare,
    interlude: Interlude,
}

impl Vsock {
    /// A device with CID `guest_cid` for the guest. Connections wait in `listener`'s backlog until
    /// the guest's driver is up.
    ///
    /// # Errors
    /// No descriptor for the epoll instance, the event fd or the timer.
    pub fn new(
        guest_cid: u32,
        listener: Listener,
        dial: Dial,
        counters: Counters,
    ) -> io::Result<Self> {
        let guest_cid = u64::from(guest_cid);
        Ok(Self {
            guest_cid,
            muxer: Muxer::new(guest_cid, counters),
            host: Host::new(listener, dial)?,
            tx_chain: Chain::new(),
            rx_chains: vec![Chain::new()],
            spare: Spare::default(),
            interlude: Interlude::default(),
        })
    }

    /// The guest's CID.
    pub fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Starts to take connections.
    fn listen(&mut self) -> Result<(), DeviceError> {
        self.host.listen().map_err(|source| DeviceError::Host {
            what: "listening for connections",
            source,
        })
    }

    /// Sends the guest what there is, and sees to it that time-outs and leftovers get a call.
    fn finish_call(&mut self, io: &mut DeviceIo<'_>, mut again: bool) -> Result<(), DeviceError> {
        again |= self.fill_rx(io)?;
        if again {
            self.host.ask_again();
        }
        self.host.arm_timer(&self.muxer);
        Ok(())
    }
}

/// The socket beside which a guest's connections go, with [`Dial::Beside`].
///
/// # Errors
/// See [`Listener::bind`]; and a path so long that no port fits behind it.
pub fn listen(path: &Path) -> Result<(Listener, Dial), crate::backend::unix::ListenError> {
    let len = path.as_os_str().len();
    if len > crate::backend::unix::MAX_PATH - "_4294967295".len() {
        let path = path.to_owned();
        return Err(crate::backend::unix::ListenError::TooLong { path, len });
    }
    Ok((Listener::bind(path)?, Dial::Beside(path.to_owned())))
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM | F_EVENT_IDX
    }

    /// `guest_cid`, 64 bits (virtio 1.2 §5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        data.fill(0);
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
            .unwrap_or_default();
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn activate(&mut self, io: &mut DeviceIo<'_>, _features: u64) -> Result<(), DeviceError> {
        self.interlude = Interlude::default();
        self.listen()?;
        self.finish_call(io, false)
    }

    /// Buffers for events are posted as good as never: no ioeventfd for them, which each load would wait for.
    fn kicked_synchronously(&self, queue: usize) -> bool {
        queue == EVENT
    }

    fn queue_notified(&mut self, io: &mut DeviceIo<'_>, queue: usize) -> Result<(), DeviceError> {
        if !self.is_through(io)? {
            return Ok(());
        }
        let again = queue == TX && self.drain_tx(io)?;
        self.finish_call(io, again)
    }

    fn host_events(&self) -> Vec<HostEvent> {
        vec![HostEvent {
            fd: self.host.epoll_fd(),
            token: 0,
        }]
    }

    fn host_ready(
        &mut self,
        io: Option<&mut DeviceIo<'_>>,
        _token: u16,
    ) -> Result<(), DeviceError> {
        let mut events = [const { MaybeUninit::uninit() }; EVENTS];
        let mut again = false;
        for event in self.host.wait(&mut events) {
            match Token::of(event) {
                Token::Again => {
                    self.host.clear_again();
                    again = true;
                }
                Token::Timer => self.host.expire(&mut self.muxer),
                // Without a driver the listener is not in the epoll instance.
                Token::Listener => self.host.accept(&mut self.muxer),
                Token::Greeting(index) => self.host.greeting_ready(index, &mut self.muxer),
                Token::Stream(id) => self.host.stream_ready(id, event.flags, &mut self.muxer),
            }
        }
        if let Some(io) = io {
            if !self.is_through(io)? {
                return Ok(());
            }
            let again = again && self.drain_tx(io)?;
            self.finish_call(io, again)?;
        } else {
            // A driver that broke the rules answers nobody: whoever connects still learns it in time.
            self.host.arm_timer(&self.muxer);
        }
        Ok(())
    }

    /// The ports that were used: a guest remembers connections for a while after their end, and
    /// answers one that looks like them with a reset.
    fn save(&self) -> DeviceState {
        DeviceState::Vsock {
            next_host_port: self.muxer.next_port(),
        }
    }

    /// The parent's connections stay with the parent: the guest is told that they are gone.
    fn restore(
        &mut self,
        io: Option<&mut DeviceIo<'_>>,
        _features: u64,
        state: &DeviceState,
    ) -> Result<(), RestoreError> {
        match *state {
            DeviceState::Vsock { next_host_port } => self.muxer.set_next_port(next_host_port),
            // Saved before ports were.
            DeviceState::Nothing => {}
            _ => return Err(RestoreError::Invalid(format!("{state:?}"))),
        }
        if let Some(io) = io {
            self.interlude = Interlude::begin();
            self.is_through(io)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.interlude = Interlude::default();
        self.host.reset(&mut self.muxer);
    }
}
