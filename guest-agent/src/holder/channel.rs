//! One channel of the worker: the bytes, and what it is used for at the moment.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use belljar_protocol::frame::{self, Decoder};
use belljar_protocol::v1;
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::wire::{FRAME_COST, FromHolder, OUTPUT_TAG, from_holder::Message as Said};

/// Output on its way through a channel that the worker has not passed on, bytes.
const WINDOW: u64 = 128 << 10;

/// Bytes of output in one frame.
const MAX_PIECE: u64 = 64 << 10;

/// Not worth a frame while more is on its way.
const MIN_PIECE: u64 = 4 << 10;

/// Input that a channel may send ahead of the process's reading, bytes.
pub(crate) const INPUT_WINDOW: u64 = 256 << 10;

/// The channel is of no use any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken;

/// A reader of a process.
#[derive(Debug)]
pub(super) struct Viewer {
    pub(super) process: u64,
    /// What it reads next of each stream.
    pub(super) cursors: [u64; 2],
    /// Where it stops reading each stream, once that is known.
    pub(super) bounds: [Option<u64>; 2],
    pub(super) follow: bool,
    pub(super) read_only: bool,
    /// It knows of gaps and the like: all but the plain callers of generation 1.
    pub(super) is_told_all: bool,
    pub(super) caught_up: bool,
    pub(super) input_session: u64,
    pub(super) input_offset: u64,
    /// Told last.
    pub(super) input_taken: u64,
    /// Input sent by it that it was not told to be read.
    pub(super) input_owed: u64,
    /// That much of it is read, though.
    pub(super) input_read: u64,
    pub(super) size: Option<v1::Terminal>,
    /// Sent and not yet passed on.
    pub(super) unacknowledged: u64,
}

impl Viewer {
    pub(super) fn new(process: u64) -> Self {
        Self {
            process,
            cursors: [0; 2],
            bounds: [None; 2],
            follow: true,
            read_only: false,
            is_told_all: true,
            caught_up: true,
            input_session: 0,
            input_offset: 0,
            input_taken: 0,
            input_owed: 0,
            input_read: 0,
            size: None,
            unacknowledged: 0,
        }
    }

    /// How many bytes of output may go into the next frame, of so many that there are.
    pub(super) fn room(&self, available: u64) -> u64 {
        let left = WINDOW
            .saturating_sub(self.unacknowledged)
            .saturating_sub(FRAME_COST);
        let wanted = available.min(MAX_PIECE);
        if left >= wanted {
            wanted
        } else if left >= MIN_PIECE {
            left
        } else {
            0
        }
    }
}

/// What a channel is used for.
#[derive(Debug)]
pub(super) enum Role {
    Idle,
    /// Waits for a program to run.
    Starting,
    Viewer(Box<Viewer>),
    /// Waits for the end of a process.
    Waiting(u64),
    /// Reads events from this sequence number on.
    Events {
        next: u64,
        follow: bool,
    },
}

/// See the module. Readiness is edge-triggered: the flags stay set until the system says otherwise.
#[derive(Debug)]
pub(super) struct Channel {
    fd: OwnedFd,
    pub(super) decoder: Decoder,
    out: Vec<u8>,
    sent: usize,
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) role: Role,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Channel {
    pub(super) const fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            decoder: Decoder::new(),
            out: Vec::new(),
            sent: 0,
            readable: true,
            writable: true,
            role: Role::Idle,
        }
    }

    pub(super) const fn viewer(&self) -> Option<&Viewer> {
        match &self.role {
            Role::Viewer(viewer) => Some(viewer),
            _ => None,
        }
    }

    pub(super) const fn viewer_mut(&mut self) -> Option<&mut Viewer> {
        match &mut self.role {
            Role::Viewer(viewer) => Some(viewer),
            _ => None,
        }
    }

    pub(super) const fn has_unsent(&self) -> bool {
        !self.out.is_empty()
    }

    /// Bytes that wait because the worker does not read.
    pub(super) const fn unsent(&self) -> usize {
        self.out.len().saturating_sub(self.sent)
    }

    /// Queues a message.
    pub(super) fn queue(&mut self, message: Said) {
        let message = FromHolder {
            message: Some(message),
        };
        if frame::encode(&message, &mut self.out).is_err() {
            crate::log!("a message is longer than a frame");
            let refused = FromHolder {
                message: Some(Said::Refused(v1::Error {
                    code: v1::error::Code::Internal.into(),
                    message: "the answer is longer than a frame".to_owned(),
                    errno: 0,
                })),
            };
            // It is short.
            let _ = frame::encode(&refused, &mut self.out);
        }
    }

    /// Queues a message about the process that is attached to; it counts as output.
    pub(super) fn queue_output(&mut self, output: v1::exec_output::Output) {
        let output = v1::ExecOutput {
            output: Some(output),
        };
        let cost = frame_length(output.encoded_len() as u64);
        self.queue(Said::Output(output));
        if let Some(viewer) = self.viewer_mut() {
            viewer.unacknowledged = viewer.unacknowledged.saturating_add(cost);
        }
    }

    /// Queues `length` bytes of a stream (field of `ExecOutput`), which come in pieces.
    pub(super) fn queue_bytes<'a>(
        &mut self,
        field: u64,
        length: u64,
        pieces: impl Iterator<Item = &'a [u8]>,
    ) {
        let tag = (field << 3) | 2;
        let inner = (encoded_len_varint(tag) + encoded_len_varint(length)) as u64 + length;
        let outer = 1 + encoded_len_varint(inner) as u64 + inner;
        encode_varint(outer, &mut self.out);
        self.out.push(OUTPUT_TAG);
        encode_varint(inner, &mut self.out);
        encode_varint(tag, &mut self.out);
        encode_varint(length, &mut self.out);
        for piece in pieces {
            self.out.extend_from_slice(piece);
        }
        if let Some(viewer) = self.viewer_mut() {
            viewer.unacknowledged = viewer.unacknowledged.saturating_add(frame_length(inner));
        }
    }

    /// Sends what it can.
    pub(super) fn flush(&mut self) -> Result<(), Broken> {
        while self.writable && !self.out.is_empty() {
            let rest = self.out.get(self.sent..).unwrap_or_default();
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.fd, rest, flags) {
                Ok(sent) => self.sent = self.sent.saturating_add(sent),
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Broken),
            }
            if self.sent >= self.out.len() {
                // A large buffer is not kept by a channel that may be idle from now on.
                if self.out.capacity() > 4096 {
                    self.out = Vec::new();
                }
                self.out.clear();
                self.sent = 0;
            }
        }
        Ok(())
    }

    /// Reads once into `buffer`; `Ok(0)` if nothing is there now.
    pub(super) fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, Broken> {
        while self.readable {
            let wanted = buffer.len();
            match rustix::net::recv(&self.fd, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(Broken),
                Ok((_, got)) => {
                    // A short read has emptied the socket; the next bytes report themselves.
                    self.readable = got == wanted;
                    return Ok(got);
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Broken),
            }
        }
        Ok(0)
    }
}

/// What an output message of so many bytes counts for in the window: as the worker counts it, too.
fn frame_length(inner: u64) -> u64 {
    inner.saturating_add(FRAME_COST)
}
