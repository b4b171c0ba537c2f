//! The way to the holder, who has the processes.
//!
//! [`Holder::open`] gives a [`Channel`]. [`Channel::ask`] is one request with one answer;
//! [`Holder::ask`] does both. [`Holder::read`] reads what a process writes, with offsets, for calls
//! that look at output themselves. A channel whose request has come to its end goes back with
//! [`Holder::give_back`]; dropping one instead is always right, too.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use belljar_protocol::frame;
use belljar_protocol::v1::{self, error::Code, exec_output::Output};
use prost::Message;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, IoSlice};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    socketpair,
};

use super::conn::{self, Conn, ConnError};
use super::{Failure, refusal};
use crate::wire::{
    FRAME_COST, FromHolder, OUTPUT_TAG, ToHolder, from_holder::Message as Said,
    to_holder::Message as Asked,
};

/// Channels kept for the next calls.
const KEPT: usize = 4;

/// Output is acknowledged in pieces of this size, well below the holder's window.
const ACKNOWLEDGED: u64 = 32 << 10;

/// See the module.
#[derive(Debug)]
pub(crate) struct Holder {
    control: OwnedFd,
    kept: Mutex<Vec<Channel>>,
    is_retiring: AtomicBool,
}

/// A connection to the holder that carries one request at a time.
#[derive(Debug)]
pub(crate) struct Channel {
    conn: Conn,
    /// The holder's end, until it is passed on.
    other: Option<OwnedFd>,
    out: Vec<u8>,
    /// Output passed on that the holder does not know of.
    passed_on: u64,
}

/// What came out of a process.
#[derive(Debug)]
pub(crate) enum Piece {
    Data {
        stream: v1::Stream,
        offset: u64,
        bytes: Vec<u8>,
    },
    Gap(v1::Gap),
    /// All that is kept at the moment is read.
    CaughtUp,
    /// The last one: the process has ended.
    End,
    /// The last one: all that was kept is read, and nothing more was asked for.
    Detached,
}

/// Reads the output of a process.
#[derive(Debug)]
pub(crate) struct Reader {
    channel: Channel,
    attached: v1::Attached,
    offsets: [u64; 2],
    is_over: bool,
}

impl Holder {
    /// Returns when the holder has gone.
    pub(crate) fn wait_for_its_end(&self) {
        loop {
            // Nothing is asked for: a hang-up is told all the same.
            let mut set = [PollFd::from_borrowed_fd(
                self.control.as_fd(),
                PollFlags::empty(),
            )];
            match poll(&mut set, None) {
                Ok(_) => return,
                Err(Errno::INTR) => {}
                // No memory for the kernel, for a moment.
                Err(_) => std::thread::sleep(std::time::Duration::from_secs(1)),
            }
        }
    }

    /// With the control socket that the worker was started with.
    pub(crate) const fn new(control: OwnedFd) -> Self {
        Self {
            control,
            kept: Mutex::new(Vec::new()),
            is_retiring: AtomicBool::new(false),
        }
    }

    /// A channel that carries nothing.
    pub(crate) fn open(&self) -> Result<Channel, Failure> {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        if let Some(channel) = kept {
            return Ok(channel);
        }
        let pair = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let (own, other) = pair.map_err(|errno| {
            Failure::Refused(super::system_error("cannot make a socket pair", errno))
        })?;
        Ok(Channel {
            conn: Conn::new(own),
            other: Some(other),
            out: Vec::new(),
            passed_on: 0,
        })
    }

    /// Takes a channel back whose last request has come to its end.
    pub(crate) fn give_back(&self, channel: Channel) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT && !self.is_retiring.load(Ordering::Relaxed) {
            kept.push(channel);
        }
    }

    /// The guest is about to end: a channel is closed as soon as all is said on it, which tells the
    /// holder so.
    pub(super) fn retire(&self) {
        self.is_retiring.store(true, Ordering::Relaxed);
        self.kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// One request with one answer. A refusal of the holder is an error.
    pub(crate) fn ask(&self, asked: Asked) -> Result<Said, Failure> {
        let mut channel = self.open()?;
        let said = channel.ask(self, asked)?;
        self.give_back(channel);
        Ok(said)
    }

    /// Begins to read a process.
    pub(crate) fn read(&self, attach: v1::Attach) -> Result<Reader, Failure> {
        let mut channel = self.open()?;
        match channel.ask(self, Asked::Attach(attach))? {
            Said::Attached(attached) => Ok(Reader {
                channel,
                offsets: [attached.stdout_from, attached.stderr_from],
                attached,
                is_over: false,
            }),
            _ => Err(out_of_step()),
        }
    }

    fn pass(&self, other: &OwnedFd) -> Result<(), Failure> {
        let descriptors = [other.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        loop {
            match rustix::net::sendmsg(
                &self.control,
                &[IoSlice::new(&[0])],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            ) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    let error = super::system_error("cannot reach PID 1", errno);
                    return Err(Failure::Refused(error));
                }
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.conn.as_fd()
    }
}

impl Channel {
    /// Sends a request. The first message of a channel; later ones may go by [`Self::send`].
    pub(crate) fn request(&mut self, holder: &Holder, asked: Asked) -> Result<(), Failure> {
        let Some(other) = self.other.take() else {
            return self.send(asked);
        };
        self.encode(asked)?;
        // The holder finds the request when it gets the channel. What does not fit into the socket
        // follows.
        let sent = self.conn.send_now(&self.out).map_err(gone)?;
        holder.pass(&other)?;
        let rest = self.out.get(sent..).unwrap_or_default();
        conn::send_all(self.conn.as_fd(), rest).map_err(gone)
    }

    /// Sends a message.
    pub(crate) fn send(&mut self, asked: Asked) -> Result<(), Failure> {
        self.encode(asked)?;
        conn::send_all(self.conn.as_fd(), &self.out).map_err(gone)
    }

    fn encode(&mut self, asked: Asked) -> Result<(), Failure> {
        self.out.clear();
        let message = ToHolder {
            message: Some(asked),
        };
        frame::encode(&message, &mut self.out).map_err(|error| {
            Failure::Refused(refusal(Code::Invalid, format!("too large: {error}")))
        })
    }

    /// Waits for a message. `None`: the deadline came first.
    pub(crate) fn receive(&mut self, deadline: Option<Instant>) -> Result<Option<Said>, Failure> {
        match self.conn.receive::<FromHolder>(deadline) {
            Ok(Some(message)) => message.message.ok_or_else(out_of_step).map(Some),
            Ok(None) => Err(gone(ConnError::HungUp)),
            Err(ConnError::Late) => Ok(None),
            Err(error) => Err(gone(error)),
        }
    }

    /// Sends a request and waits for its answer. A refusal of the holder is an error, and leaves the
    /// channel free.
    pub(crate) fn ask(&mut self, holder: &Holder, asked: Asked) -> Result<Said, Failure> {
        self.request(holder, asked)?;
        self.answer()
    }

    /// Waits for the answer to a request.
    pub(super) fn answer(&mut self) -> Result<Said, Failure> {
        match self.receive(None)? {
            Some(Said::Refused(error)) => Err(Failure::Refused(error)),
            Some(said) => Ok(said),
            None => Err(out_of_step()),
        }
    }

    /// Reads once from a channel that is known to be readable.
    pub(super) fn read_more(&mut self) -> Result<(), Failure> {
        match self.conn.read_more() {
            Ok(true) => Ok(()),
            Ok(false) => Err(gone(ConnError::HungUp)),
            Err(error) => Err(gone(error)),
        }
    }

    /// A message that is here already.
    pub(super) fn buffered(&mut self) -> Result<Option<Buffered<'_>>, Failure> {
        let Some(frame) = self.conn.buffered_frame().map_err(gone)? else {
            return Ok(None);
        };
        if frame.first() == Some(&OUTPUT_TAG) {
            return Ok(Some(Buffered::Output(frame)));
        }
        let message = FromHolder::decode(&*frame).map_err(|error| gone(error.into()))?;
        let said = message.message.ok_or_else(out_of_step)?;
        Ok(Some(Buffered::Said(said)))
    }

    /// Output was passed on to where it belongs; `cost` as of [`output_cost`].
    pub(super) fn passed_on(&mut self, cost: u64) -> Result<(), Failure> {
        self.passed_on = self.passed_on.saturating_add(cost);
        if self.passed_on < ACKNOWLEDGED {
            return Ok(());
        }
        self.acknowledge()
    }

    /// Whether the holder does not know of all that was passed on.
    pub(super) const fn owes_acknowledgement(&self) -> bool {
        self.passed_on > 0
    }

    /// Tells the holder what was passed on.
    pub(super) fn acknowledge(&mut self) -> Result<(), Failure> {
        let bytes = std::mem::take(&mut self.passed_on);
        self.send(Asked::PassedOn(bytes))
    }

    /// After the end of a stream the channel can be used again, with a window of its own.
    pub(super) const fn finish(&mut self) {
        self.passed_on = 0;
    }
}

/// A message of the holder, decoded unless it is only to be passed on.
#[expect(
    clippy::large_enum_variant,
    reason = "one at a time, on the stack, and matched at once"
)]
#[derive(Debug)]
pub(super) enum Buffered<'a> {
    /// A frame that holds `FromHolder.output`.
    Output(std::borrow::Cow<'a, [u8]>),
    Said(Said),
}

/// The `ExecOutput` in a frame that holds `FromHolder.output`, undecoded.
pub(super) fn output_of(frame: &[u8]) -> &[u8] {
    let mut rest = frame.get(1..).unwrap_or_default();
    match prost::encoding::decode_varint(&mut rest) {
        Ok(length) => {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            rest.get(..length).unwrap_or(rest)
        }
        Err(_) => &[],
    }
}

/// What an output message of so many bytes counts for in the holder's window.
pub(super) const fn output_cost(length: usize) -> u64 {
    FRAME_COST.saturating_add(length as u64)
}

impl Reader {
    /// What the holder said of the process.
    pub(crate) const fn attached(&self) -> &v1::Attached {
        &self.attached
    }

    /// For `poll`; look at [`Self::next`] before, until it returns `None` with a deadline of now.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Waits for the next piece. `None`: the deadline came first, or the last piece is read.
    pub(crate) fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Piece>, Failure> {
        loop {
            if self.is_over {
                return Ok(None);
            }
            let Some(said) = self.channel.receive(deadline)? else {
                return Ok(None);
            };
            let Said::Output(output) = said else { continue };
            self.channel.passed_on(output_cost(output.encoded_len()))?;
            let Some(output) = output.output else {
                continue;
            };
            if let Some(piece) = self.piece(output) {
                return Ok(Some(piece));
            }
        }
    }

    fn piece(&mut self, output: Output) -> Option<Piece> {
        let [out, err] = &mut self.offsets;
        let data = |stream, at: &mut u64, bytes: Vec<u8>| {
            let offset = *at;
            *at = offset.saturating_add(bytes.len() as u64);
            Some(Piece::Data {
                stream,
                offset,
                bytes,
            })
        };
        match output {
            Output::Stdout(bytes) => data(v1::Stream::Stdout, out, bytes),
            Output::Stderr(bytes) => data(v1::Stream::Stderr, err, bytes),
            Output::Gap(gap) => {
                match gap.stream() {
                    v1::Stream::Stderr => *err = gap.to,
                    _ => *out = gap.to,
                }
                Some(Piece::Gap(gap))
            }
            Output::CaughtUp(_) => Some(Piece::CaughtUp),
            Output::End(_) => {
                self.is_over = true;
                Some(Piece::End)
            }
            Output::Detached(_) => {
                self.is_over = true;
                Some(Piece::Detached)
            }
            Output::InputTaken(_) | Output::Resized(_) => None,
        }
    }
}

/// The holder is gone, or nothing that it sends can be understood: this worker is of no use any more,
/// and will be replaced with it.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn gone(error: ConnError) -> Failure {
    Failure::Refused(refusal(
        Code::Internal,
        format!("cannot talk to PID 1: {error}"),
    ))
}

/// An answer that does not belong to the request.
pub(super) fn out_of_step() -> Failure {
    Failure::Refused(refusal(
        Code::Internal,
        "PID 1 has answered something else than was asked",
    ))
}
