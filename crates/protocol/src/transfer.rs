//! Streams of [`v1::FileChunk`] without copies: files and trees, both ways.
//!
//! A sender reads a file straight into the frame that it sends; a receiver gets the bytes out of the
//! buffer that the socket was read into, as they come, and never holds a whole frame of them.

use crate::frame::{self, FrameError, MAX_FRAME, MessageError};
use crate::v1::{self, file_chunk::Piece as Kind};

/// Payload bytes of one frame of [`ChunkBuffer`].
pub const CHUNK: usize = 256 << 10;

/// Payload bytes of one frame that is announced ahead of its bytes ([`announce`]).
pub const LONG_CHUNK: usize = 512 << 10;

/// Room ahead of the payload for the frame's length, the field's tag and its length.
const PREFIX: usize = 16;

/// Field 1, wire type 2: `FileChunk.data`.
const DATA_TAG: u8 = 0x0a;

/// Longest varint that is accepted as a length.
const MAX_VARINT: u32 = 5;

/// Why a stream of chunks cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// No frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The frame holds no such message.
    #[error("a piece of the stream cannot be decoded: {0}")]
    Decode(#[from] MessageError),
    /// The length of the data does not fit into its frame.
    #[error("a piece of the stream says it is longer than its frame")]
    BadLength,
    /// A kind of piece that this program does not know; leaving it out would change the content.
    #[error("a piece of the stream is of an unknown kind")]
    Unknown,
}

/// One piece of a stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece<'a> {
    /// Bytes; a frame may come in several of these.
    Data(&'a [u8]),
    /// So many zero bytes that are a hole.
    Hole(u64),
    /// The stream is complete.
    End(v1::TransferEnd),
    /// It failed half-way; nothing follows.
    Error(v1::Error),
}

#[derive(Debug)]
enum State {
    Length {
        value: u64,
        bytes: u32,
    },
    Tag {
        left: usize,
    },
    DataLength {
        value: u64,
        bytes: u32,
        left: usize,
    },
    Data {
        data: usize,
        after: usize,
    },
    /// Fields that came behind the data, from a later generation.
    Skip {
        left: usize,
    },
    Whole {
        length: usize,
        held: Vec<u8>,
    },
}

const START: State = State::Length { value: 0, bytes: 0 };

/// Takes a byte stream apart into pieces: a pure machine that holds no payload.
#[derive(Debug)]
pub struct ChunkReader {
    state: State,
}

impl Default for ChunkReader {
    fn default() -> Self {
        Self::new()
    }
}

impl ChunkReader {
    /// At the start of a frame.
    #[must_use]
    pub const fn new() -> Self {
        Self { state: START }
    }

    /// Takes bytes from the front of `input` and returns the next piece. `None`: all is taken and more is
    /// needed. After an error the stream is of no use.
    pub fn feed<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, TransferError> {
        loop {
            if let State::Data { data, after } = self.state {
                if data == 0 {
                    self.state = State::Skip { left: after };
                    continue;
                }
                if input.is_empty() {
                    return Ok(None);
                }
                let (piece, rest) = input.split_at(data.min(input.len()));
                *input = rest;
                let data = data.saturating_sub(piece.len());
                self.state = State::Data { data, after };
                return Ok(Some(Piece::Data(piece)));
            }
            if let State::Skip { left } = self.state {
                let skipped = left.min(input.len());
                *input = input.get(skipped..).unwrap_or_default();
                let left = left.saturating_sub(skipped);
                self.state = if left == 0 {
                    START
                } else {
                    State::Skip { left }
                };
                if left != 0 {
                    return Ok(None);
                }
                continue;
            }
            if let State::Whole { length, held } = &mut self.state {
                let missing = length.saturating_sub(held.len()).min(input.len());
                let (taken, rest) = input.split_at(missing);
                held.extend_from_slice(taken);
                *input = rest;
                if held.len() < *length {
                    return Ok(None);
                }
                let message = std::mem::take(held);
                self.state = START;
                return whole(&message).map(Some);
            }
            let Some((&byte, rest)) = input.split_first() else {
                return Ok(None);
            };
            *input = rest;
            self.byte(byte)?;
        }
    }

    /// True between two frames.
    #[must_use]
    pub const fn is_at_boundary(&self) -> bool {
        matches!(self.state, State::Length { bytes: 0, .. })
    }

    /// The bytes ahead of a payload.
    fn byte(&mut self, byte: u8) -> Result<(), TransferError> {
        match &mut self.state {
            State::Length { value, bytes } => {
                if let Some(length) = varint(value, bytes, byte)? {
                    if length > MAX_FRAME as u64 {
                        return Err(FrameError::TooLong(length).into());
                    }
                    if length == 0 {
                        return Err(TransferError::Unknown);
                    }
                    let left = usize::try_from(length).unwrap_or(0);
                    self.state = State::Tag { left };
                }
            }
            State::Tag { left } => {
                let length = *left;
                self.state = if byte == DATA_TAG {
                    State::DataLength {
                        value: 0,
                        bytes: 0,
                        left: length.saturating_sub(1),
                    }
                } else {
                    State::Whole {
                        length,
                        held: vec![byte],
                    }
                };
            }
            State::DataLength { value, bytes, left } => {
                let Some(rest) = left.checked_sub(1) else {
                    return Err(TransferError::BadLength);
                };
                *left = rest;
                if let Some(data) = varint(value, bytes, byte)? {
                    let data = usize::try_from(data).unwrap_or(usize::MAX);
                    let Some(after) = rest.checked_sub(data) else {
                        return Err(TransferError::BadLength);
                    };
                    self.state = State::Data { data, after };
                }
            }
            State::Data { .. } | State::Skip { .. } | State::Whole { .. } => {}
        }
        Ok(())
    }
}

fn varint(value: &mut u64, bytes: &mut u32, byte: u8) -> Result<Option<u64>, TransferError> {
    if *bytes >= MAX_VARINT {
        return Err(FrameError::BadPrefix.into());
    }
    *value |= u64::from(byte & 0x7f) << (7 * *bytes);
    *bytes += 1;
    Ok((byte & 0x80 == 0).then_some(*value))
}

fn whole(message: &[u8]) -> Result<Piece<'static>, TransferError> {
    match frame::decode_lists::<v1::FileChunk>(message)?.piece {
        Some(Kind::Hole(length)) => Ok(Piece::Hole(length)),
        Some(Kind::End(end)) => Ok(Piece::End(end)),
        Some(Kind::Error(error)) => Ok(Piece::Error(error)),
        // Data begins with its tag, unless unknown fields were put ahead of it.
        Some(Kind::Data(_)) | None => Err(TransferError::Unknown),
    }
}

/// A frame with room for [`CHUNK`] bytes of data, filled in place.
#[derive(Debug)]
pub struct ChunkBuffer {
    bytes: Vec<u8>,
    filled: usize,
}

impl Default for ChunkBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl ChunkBuffer {
    /// Empty.
    #[must_use]
    pub fn new() -> Self {
        Self {
            bytes: vec![0; PREFIX + CHUNK],
            filled: 0,
        }
    }

    /// Where data may be put. Call [`Self::filled`] with how much it was.
    pub fn space(&mut self) -> &mut [u8] {
        let from = PREFIX.saturating_add(self.filled);
        self.bytes.get_mut(from..).unwrap_or_default()
    }

    /// Counts bytes that were put into [`Self::space`].
    pub fn filled(&mut self, count: usize) {
        self.filled = self.filled.saturating_add(count).min(CHUNK);
    }

    /// Copies what fits from the front of `data`; returns how much that is.
    pub fn put(&mut self, data: &[u8]) -> usize {
        let space = self.space();
        let count = space.len().min(data.len());
        if let (Some(to), Some(from)) = (space.get_mut(..count), data.get(..count)) {
            to.copy_from_slice(from);
        }
        self.filled(count);
        count
    }

    /// No room is left.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.filled >= CHUNK
    }

    /// Payload bytes held.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.filled
    }

    /// Nothing is held.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// The whole frame, ready to be sent; not to be called when empty.
    pub fn frame(&mut self) -> &[u8] {
        let mut prefix = [0; PREFIX];
        let start = write_prefix(&mut prefix, self.filled);
        if let Some(room) = self.bytes.first_chunk_mut() {
            *room = prefix;
        }
        let end = PREFIX.saturating_add(self.filled);
        self.bytes.get(start..end).unwrap_or_default()
    }

    /// Begins the next frame.
    pub const fn clear(&mut self) {
        self.filled = 0;
    }
}

/// What comes ahead of `length` bytes of data that follow as one frame, at most [`LONG_CHUNK`]. Whoever sends
/// this has promised them.
#[must_use]
pub fn announce(length: usize) -> Vec<u8> {
    let mut prefix = [0; PREFIX];
    let start = write_prefix(&mut prefix, length);
    prefix.get(start..).unwrap_or_default().to_vec()
}

/// Returns where the prefix begins; it ends with the room.
fn write_prefix(prefix: &mut [u8; PREFIX], length: usize) -> usize {
    let mut start = PREFIX;
    let data = put_varint_before(prefix, &mut start, length);
    start = start.saturating_sub(1);
    if let Some(byte) = prefix.get_mut(start) {
        *byte = DATA_TAG;
    }
    let length = length.saturating_add(data).saturating_add(1);
    put_varint_before(prefix, &mut start, length);
    start
}

/// Writes a varint so that it ends at `start`, which moves to its first byte. Returns its length.
fn put_varint_before(room: &mut [u8], start: &mut usize, value: usize) -> usize {
    let bits = usize::BITS - (value | 1).leading_zeros();
    let length = bits.div_ceil(7) as usize;
    *start = start.saturating_sub(length);
    let mut rest = value;
    for (at, byte) in room.iter_mut().skip(*start).take(length).enumerate() {
        let more = if at + 1 < length { 0x80 } else { 0 };
        *byte = (rest & 0x7f) as u8 | more;
        rest >>= 7;
    }
    length
}

#[cfg(test)]
mod tests;
