//! Framing: a varint with the length of the message, then the message; at most [`MAX_FRAME`] bytes.
//!
//! The decoder is a pure state machine over bytes. Both peers treat the other as hostile: it
//! never holds more than one frame, takes memory only for bytes that have arrived, and every
//! input leads to a frame, to a request for more, or to an error.

mod lists;

use std::borrow::Cow;

use prost::Message;

pub use lists::{MAX_FIELDS, MessageError, decode, decode_lists};

/// Longest message, bytes, without its length prefix.
pub const MAX_FRAME: usize = 1 << 20;

/// Payload bytes a sender should put at most into one stream frame (stdin, stdout, stderr).
pub const MAX_CHUNK: usize = 64 << 10;

/// Longest varint that is accepted as a length. A 32-bit length needs no more.
const MAX_PREFIX: u32 = 5;

/// Memory taken for a frame ahead of its bytes.
const FIRST_RESERVE: usize = 4 << 10;

/// Why a byte stream is not a sequence of frames. The stream cannot be used any further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length prefix says more than [`MAX_FRAME`].
    #[error("a frame of {0} bytes was announced, the limit is {MAX_FRAME}")]
    TooLong(u64),
    /// The length prefix does not end.
    #[error("a frame's length prefix is longer than {MAX_PREFIX} bytes")]
    BadPrefix,
}

/// Why a message could not be put into a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes does not fit into a frame of {MAX_FRAME}")]
pub struct MessageTooLong(pub usize);

/// Appends `message` to `out` as one frame.
pub fn encode<M: Message>(message: &M, out: &mut Vec<u8>) -> Result<(), MessageTooLong> {
    let length = message.encoded_len();
    if length > MAX_FRAME {
        return Err(MessageTooLong(length));
    }
    out.reserve(length.saturating_add(MAX_PREFIX as usize));
    put_varint(length as u64, out);
    message.encode_raw(out);
    Ok(())
}

/// Appends one frame that holds a message with a single `bytes` field, without building the
/// message first. The result is what [`encode`] writes for it. `data` is cut at [`MAX_CHUNK`];
/// returns how many bytes were taken.
pub fn encode_chunk(field: u32, data: &[u8], out: &mut Vec<u8>) -> usize {
    let data = data.get(..MAX_CHUNK).unwrap_or(data);
    // Wire type 2, protobuf "Message structure".
    let tag = (u64::from(field) << 3) | 2;
    let length = varint_len(tag)
        .saturating_add(varint_len(data.len() as u64))
        .saturating_add(data.len());
    out.reserve(length.saturating_add(MAX_PREFIX as usize));
    put_varint(length as u64, out);
    put_varint(tag, out);
    put_varint(data.len() as u64, out);
    out.extend_from_slice(data);
    data.len()
}

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push((value as u8 & 0x7f) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn varint_len(value: u64) -> usize {
    let bits = 64 - (value | 1).leading_zeros();
    bits.div_ceil(7) as usize
}

#[derive(Debug)]
enum State {
    Length { value: u64, bytes: u32 },
    Body { length: usize, held: Vec<u8> },
}

/// Cuts a byte stream into frames.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    failed: Option<FrameError>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: State::Length { value: 0, bytes: 0 },
            failed: None,
        }
    }

    /// Takes bytes from the front of `input` up to the end of one frame and returns its message.
    /// `None`: all of `input` is taken and more is needed. The message is borrowed from `input`
    /// when it lies there in one piece. After an error every further call fails alike.
    pub fn feed<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Cow<'a, [u8]>>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.advance(input);
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.state = State::Length { value: 0, bytes: 0 };
        }
        result
    }

    /// True between two frames: a stream may end here.
    #[must_use]
    pub const fn is_at_boundary(&self) -> bool {
        self.failed.is_none() && matches!(self.state, State::Length { bytes: 0, .. })
    }

    fn advance<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Cow<'a, [u8]>>, FrameError> {
        loop {
            match &mut self.state {
                State::Length { value, bytes } => {
                    let Some((&byte, rest)) = input.split_first() else {
                        return Ok(None);
                    };
                    *input = rest;
                    if *bytes >= MAX_PREFIX {
                        return Err(FrameError::BadPrefix);
                    }
                    *value |= u64::from(byte & 0x7f) << (7 * *bytes);
                    *bytes += 1;
                    if byte & 0x80 != 0 {
                        continue;
                    }
                    let length = match usize::try_from(*value) {
                        Ok(length) if length <= MAX_FRAME => length,
                        _ => return Err(FrameError::TooLong(*value)),
                    };
                    if let Some((message, rest)) = input.split_at_checked(length) {
                        *input = rest;
                        self.state = State::Length { value: 0, bytes: 0 };
                        return Ok(Some(Cow::Borrowed(message)));
                    }
                    let held = Vec::with_capacity(length.min(input.len().max(FIRST_RESERVE)));
                    self.state = State::Body { length, held };
                }
                State::Body { length, held } => {
                    let missing = length.saturating_sub(held.len());
                    let Some((last, rest)) = input.split_at_checked(missing) else {
                        held.extend_from_slice(input);
                        *input = &[];
                        return Ok(None);
                    };
                    held.extend_from_slice(last);
                    *input = rest;
                    let message = std::mem::take(held);
                    self.state = State::Length { value: 0, bytes: 0 };
                    return Ok(Some(Cow::Owned(message)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
