//! Between a connection of the host and a process: input one way, output the other, neither waiting
//! for the other.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use belljar_protocol::frame;
use belljar_protocol::v1::{self, exec_input::Input};
use prost::Message;
use prost::encoding::encode_varint;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::conn::{Conn, ConnError, timespec};
use super::holder::{Buffered, Channel, output_cost, output_of};
use super::process::hung_up;
use super::{Answered, Context, Failure, Outcome};
use crate::wire::{HangUp, from_holder::Message as Said, to_holder::Message as Asked};

/// Input that may be on its way to the process; the holder grants more when it is read.
const INPUT_WINDOW: u64 = 256 << 10;

/// When nothing more comes for so long, the holder is told of little output, too: it keeps until then
/// what the host has got.
const QUIET: Duration = Duration::from_millis(10);

/// A buffer of this size is not kept by a call that may be idle from now on.
const KEPT_BUFFER: usize = 16 << 10;

/// Fields of `ExecOutput` that end it.
const FIELD_END: u8 = 3;
const FIELD_DETACHED: u8 = 8;

/// See the module.
pub(super) struct Relay<'a> {
    context: &'a Context,
    conn: &'a mut Conn,
    channel: Channel,
    /// Frames for the host, and how much of them is sent.
    out: Vec<u8>,
    sent: usize,
    /// What `out` counts for in the holder's window.
    cost: u64,
    /// Input that may still be sent.
    room: u64,
    /// The last frame is in `out`.
    is_over: bool,
}

impl<'a> Relay<'a> {
    pub(super) const fn new(context: &'a Context, conn: &'a mut Conn, channel: Channel) -> Self {
        Self {
            context,
            conn,
            channel,
            out: Vec::new(),
            sent: 0,
            cost: 0,
            room: INPUT_WINDOW,
            is_over: false,
        }
    }

    /// Sends the head of the reply, and then everything up to the end.
    pub(super) fn run(mut self, head: &v1::Reply) -> Answered {
        if frame::encode(head, &mut self.out).is_err() {
            return Err(super::holder::out_of_step());
        }
        match self.pass_all() {
            Ok(()) => {
                self.channel.finish();
                self.context.holder.give_back(self.channel);
                Ok(Outcome::Streamed)
            }
            Err(failure) => {
                // The holder may be gone, too; then there is nobody to tell.
                let _ = self.channel.send(Asked::HangUp(HangUp {}));
                Err(match failure {
                    // The head is sent: an error would not be understood any more.
                    Failure::Refused(error) => {
                        crate::log!("a call was cut: {}", error.message);
                        hung_up()
                    }
                    gone @ Failure::Gone(_) => gone,
                })
            }
        }
    }

    fn pass_all(&mut self) -> Result<(), Failure> {
        loop {
            self.take_output()?;
            self.send_output()?;
            if self.is_over && self.out.is_empty() {
                return Ok(());
            }
            while self.room > 0 && !self.is_over {
                let Some(frame) = self.conn.buffered_frame()? else {
                    break;
                };
                let input = v1::ExecInput::decode(&*frame).map_err(ConnError::from)?;
                self.pass_input(input)?;
            }
            self.wait()?;
        }
    }

    /// Waits for either side and reads what it has.
    fn wait(&mut self) -> Result<(), Failure> {
        let is_sent = self.out.is_empty();
        let mut wanted = PollFlags::RDHUP;
        if !is_sent {
            wanted |= PollFlags::OUT;
        }
        let may_read = self.room > 0 && !self.is_over;
        if may_read {
            wanted |= PollFlags::IN;
        }
        let mut set = [
            PollFd::from_borrowed_fd(self.conn.as_fd(), wanted),
            PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::IN),
        ];
        // What the holder says is not read while the host does not read.
        let watched = if is_sent { 2 } else { 1 };
        let may_acknowledge = is_sent && self.channel.owes_acknowledgement();
        let timeout = may_acknowledge.then(|| timespec(QUIET));
        match poll(set.get_mut(..watched).unwrap_or_default(), timeout.as_ref()) {
            Err(Errno::INTR) => return Ok(()),
            Ok(0) => return self.channel.acknowledge(),
            ready => ready.map_err(ConnError::from)?,
        };
        let [host, holder] = set.map(|entry| entry.revents());
        self.context.touch();
        if host.contains(PollFlags::IN) && may_read {
            if !self.conn.read_more()? {
                return Err(hung_up());
            }
        } else if host.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP) {
            return Err(hung_up());
        }
        if is_sent && !holder.is_empty() {
            self.channel.read_more()?;
        }
        Ok(())
    }

    /// Turns what the holder has sent into frames for the host.
    fn take_output(&mut self) -> Result<(), Failure> {
        while !self.is_over {
            match self.channel.buffered()? {
                None => return Ok(()),
                Some(Buffered::Output(frame)) => {
                    let output = output_of(&frame);
                    let field = output.first().map_or(0, |tag| tag >> 3);
                    self.is_over = matches!(field, FIELD_END | FIELD_DETACHED);
                    encode_varint(output.len() as u64, &mut self.out);
                    self.out.extend_from_slice(output);
                    self.cost = self.cost.saturating_add(output_cost(output.len()));
                }
                Some(Buffered::Said(Said::InputRoom(room))) => {
                    self.room = self.room.saturating_add(room);
                }
                Some(Buffered::Said(_)) => return Err(super::holder::out_of_step()),
            }
        }
        Ok(())
    }

    fn send_output(&mut self) -> Result<(), Failure> {
        let rest = self.out.get(self.sent..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        self.sent = self.sent.saturating_add(self.conn.send_now(rest)?);
        if self.sent < self.out.len() {
            return Ok(());
        }
        self.sent = 0;
        self.out.clear();
        if self.out.capacity() > KEPT_BUFFER {
            self.out = Vec::new();
        }
        let cost = std::mem::take(&mut self.cost);
        if self.is_over {
            return Ok(());
        }
        self.channel.passed_on(cost)
    }

    fn pass_input(&mut self, input: v1::ExecInput) -> Result<(), Failure> {
        let asked = match input.input {
            Some(Input::Stdin(bytes)) => {
                self.room = self.room.saturating_sub(bytes.len() as u64);
                Asked::Input(bytes)
            }
            Some(Input::StdinEof(eof)) => Asked::CloseInput(eof),
            Some(Input::Signal(number)) => Asked::Signal(number),
            Some(Input::Resize(size)) => Asked::Resize(size),
            Some(Input::Detach(detach)) => Asked::Detach(detach),
            // From a later generation.
            None => return Ok(()),
        };
        self.channel.send(asked)
    }
}

/// Waits until the holder has something to say. False: the deadline came first. An error if the host
/// has hung up meanwhile: nobody waits any more.
pub(super) fn wait_for_either(
    conn: &Conn,
    channel: &Channel,
    deadline: Option<Instant>,
) -> Result<bool, Failure> {
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let mut set = [
            PollFd::from_borrowed_fd(conn.as_fd(), PollFlags::RDHUP),
            PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN),
        ];
        let ready = match poll(&mut set, left.map(timespec).as_ref()) {
            Err(Errno::INTR) => continue,
            ready => ready.map_err(ConnError::from)?,
        };
        let [host, holder] = set.map(|entry| entry.revents());
        if !holder.is_empty() {
            return Ok(true);
        }
        if !host.is_empty() {
            return Err(hung_up());
        }
        if ready == 0 && left.is_some_and(|left| left.is_zero()) {
            return Ok(false);
        }
    }
}
