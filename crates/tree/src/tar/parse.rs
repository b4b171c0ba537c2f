//! Headers to entries: a machine that takes bytes as they come and holds no content.

use std::ffi::CString;

use super::encode::{BLOCK, padding};
use super::{Entry, Kind, MAX_PATH};

/// Most bytes of the headers that come ahead of an entry: attributes, long names.
const MAX_EXTENSION: u64 = 4 << 20;

/// Most segments of a sparse file.
const MAX_SEGMENTS: u64 = 1 << 20;

/// Longest file.
const MAX_SIZE: u64 = i64::MAX as u64;

/// Why bytes are no tar stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// A header's checksum is wrong.
    #[error("not a tar stream: a header has a wrong checksum")]
    Checksum,
    /// A field or record cannot be understood.
    #[error("not a valid tar stream: {0}")]
    Invalid(&'static str),
    /// Something legal that this program does not read.
    #[error("the tar stream has {0}, which is not supported")]
    Unsupported(&'static str),
    /// Headers or names are longer than is sensible.
    #[error("the tar stream has {0} beyond the limit")]
    TooLarge(&'static str),
    /// It ended within an entry.
    #[error("the tar stream ends within an entry")]
    Cut,
}

/// What comes next in a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// An entry begins; its content follows as `Data`, then `Done`.
    Entry(Box<Entry>),
    /// Content at an offset of the file; in order, with holes left out.
    Data {
        /// Where in the file.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// The entry is complete.
    Done,
    /// The stream is.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extension {
    Pax,
    Global,
    LongName,
    LongLink,
}

#[derive(Debug)]
enum State {
    Header {
        held: Vec<u8>,
    },
    Extension {
        kind: Extension,
        length: u64,
        held: Vec<u8>,
    },
    /// Numbers of a sparse map, a line each; `left` bytes of content follow from here.
    Map {
        map: Map,
        left: u64,
    },
    /// `left` bytes of the segment, `after` bytes of content behind it.
    Data {
        offset: u64,
        left: u64,
        after: u64,
    },
    /// Zeros up to the next block, then `Done`.
    Padding {
        left: usize,
    },
    /// The padding of a sparse map; `after` bytes of content follow.
    Skip {
        left: u64,
        after: u64,
    },
    Over,
}

#[derive(Debug, Default)]
struct Map {
    count: Option<u64>,
    numbers: Vec<u64>,
    current: u64,
    has_digit: bool,
    read: u64,
}

/// What extensions say about the next entry.
#[derive(Debug, Default)]
struct Said {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    time: Option<(i64, u32)>,
    xattrs: Vec<(CString, Vec<u8>)>,
    is_sparse: bool,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Parser {
    state: State,
    said: Said,
    /// Of a sparse file: segments still to come, in reverse.
    segments: Vec<(u64, u64)>,
    /// Of the entry: bytes of the file, and of its content in the stream.
    size: u64,
    stored: u64,
}

impl Default for Parser {
    fn default() -> Self {
        Self::new()
    }
}

impl Parser {
    /// At the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::Header { held: Vec::new() },
            said: Said::default(),
            segments: Vec::new(),
            size: 0,
            stored: 0,
        }
    }

    /// Whether the stream may end here. Not every program writes the two blocks that say so.
    #[must_use]
    pub fn may_end(&self) -> bool {
        match &self.state {
            State::Over => true,
            State::Header { held } => held.is_empty() && self.said.bytes == 0,
            _ => false,
        }
    }

    /// Takes bytes from the front of `input` and returns the next event. `None`: all is taken and more is
    /// needed. After [`Event::End`] everything is taken and nothing said.
    pub fn feed<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, ParseError> {
        loop {
            match &mut self.state {
                State::Header { held } => {
                    if !hold(held, BLOCK, input) {
                        return Ok(None);
                    }
                    let block = std::mem::take(held);
                    if let Some(event) = self.header(&block)? {
                        return Ok(Some(event));
                    }
                }
                State::Extension { kind, length, held } => {
                    let with_padding = length.saturating_add(padding(*length) as u64);
                    let wanted = usize::try_from(with_padding).unwrap_or(usize::MAX);
                    if !hold(held, wanted, input) {
                        return Ok(None);
                    }
                    let (kind, length) = (*kind, usize::try_from(*length).unwrap_or(0));
                    let held = std::mem::take(held);
                    self.extension(kind, held.get(..length).unwrap_or_default())?;
                    self.state = State::Header { held: Vec::new() };
                }
                State::Map { map, left } => {
                    let Some((&byte, rest)) = input.split_first() else {
                        return Ok(None);
                    };
                    *input = rest;
                    *left = left
                        .checked_sub(1)
                        .ok_or(ParseError::Invalid("a sparse map is longer than its entry"))?;
                    if map.byte(byte)? {
                        let pad = padding(map.read) as u64;
                        let (numbers, left) = (std::mem::take(&mut map.numbers), *left);
                        self.mapped(&numbers, left, pad)?;
                    }
                }
                State::Data {
                    offset,
                    left,
                    after,
                } => {
                    if *left == 0 {
                        let after = *after;
                        self.next_segment(after)?;
                        continue;
                    }
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let room = usize::try_from(*left).unwrap_or(usize::MAX);
                    let (bytes, rest) = input.split_at(room.min(input.len()));
                    *input = rest;
                    let at = *offset;
                    *left = left.saturating_sub(bytes.len() as u64);
                    *offset = at.saturating_add(bytes.len() as u64);
                    return Ok(Some(Event::Data { offset: at, bytes }));
                }
                State::Padding { left } => {
                    let skipped = (*left).min(input.len());
                    *input = input.get(skipped..).unwrap_or_default();
                    *left = left.saturating_sub(skipped);
                    if *left != 0 {
                        return Ok(None);
                    }
                    self.state = State::Header { held: Vec::new() };
                    return Ok(Some(Event::Done));
                }
                State::Skip { left, after } => {
                    let skipped = usize::try_from(*left)
                        .unwrap_or(usize::MAX)
                        .min(input.len());
                    *input = input.get(skipped..).unwrap_or_default();
                    *left = left.saturating_sub(skipped as u64);
                    if *left != 0 {
                        return Ok(None);
                    }
                    let after = *after;
                    self.next_segment(after)?;
                }
                State::Over => {
                    *input = &[];
                    return Ok(None);
                }
            }
        }
    }

    fn header<'a>(&mut self, block: &[u8]) -> Result<Option<Event<'a>>, ParseError> {
        if block.iter().all(|&byte| byte == 0) {
            if self.said.bytes != 0 {
                return Err(ParseError::Cut);
            }
            self.state = State::Over;
            return Ok(Some(Event::End));
        }
        check(block)?;
        let size = number(block, 124, 12)?;
        let kind = block.get(156).copied().unwrap_or(0);
        let extension = match kind {
            b'x' => Some(Extension::Pax),
            b'g' => Some(Extension::Global),
            b'L' => Some(Extension::LongName),
            b'K' => Some(Extension::LongLink),
            _ => None,
        };
        if let Some(kind) = extension {
            self.said.bytes = self.said.bytes.saturating_add(size.max(1));
            if self.said.bytes > MAX_EXTENSION {
                return Err(ParseError::TooLarge("the headers of an entry"));
            }
            self.state = State::Extension {
                kind,
                length: size,
                held: Vec::new(),
            };
            return Ok(None);
        }
        let said = std::mem::take(&mut self.said);
        let entry = self.entry(block, kind, size, said)?;
        Ok(Some(Event::Entry(Box::new(entry))))
    }

    fn entry(
        &mut self,
        block: &[u8],
        kind: u8,
        size: u64,
        said: Said,
    ) -> Result<Entry, ParseError> {
        let mut kind = match kind {
            // Contiguous files are ordinary ones.
            0 | b'0' | b'7' => Kind::Regular,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharacterDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => {
                return Err(ParseError::Unsupported(
                    "a sparse file in the old GNU format",
                ));
            }
            _ => return Err(ParseError::Unsupported("an entry of an unknown type")),
        };
        let path = said
            .sparse_name
            .or(said.path)
            .unwrap_or_else(|| ustar_path(block));
        if kind == Kind::Regular && path.last() == Some(&b'/') {
            // Before POSIX that made a directory.
            kind = Kind::Directory;
        }
        let link = said.link.unwrap_or_else(|| field(block, 157, 100).to_vec());
        if path.len() > MAX_PATH || link.len() > MAX_PATH {
            return Err(ParseError::TooLarge("a name"));
        }
        let has_content = kind == Kind::Regular;
        // Some programs say a size for what has no content.
        let stored = if has_content {
            said.size.unwrap_or(size)
        } else {
            0
        };
        let size = match said.sparse_size {
            Some(size) if said.is_sparse => size,
            _ if said.is_sparse => return Err(ParseError::Invalid("a sparse file without a size")),
            _ => stored,
        };
        if size > MAX_SIZE || stored > MAX_SIZE {
            return Err(ParseError::TooLarge("a file"));
        }
        if said.is_sparse && !has_content {
            return Err(ParseError::Invalid("a sparse entry that is no file"));
        }
        let id = |said: Option<u32>, start| -> Result<u32, ParseError> {
            match said {
                Some(id) => Ok(id),
                None => u32::try_from(number(block, start, 8)?)
                    .map_err(|_| ParseError::Invalid("an owner")),
            }
        };
        let (modified, modified_ns) = match said.time {
            Some(time) => time,
            None => (signed(block, 136, 12)?, 0),
        };
        let device = match kind {
            Kind::CharacterDevice | Kind::BlockDevice => (
                u32::try_from(number(block, 329, 8)?).unwrap_or(0),
                u32::try_from(number(block, 337, 8)?).unwrap_or(0),
            ),
            _ => (0, 0),
        };
        let entry = Entry {
            path,
            kind,
            mode: (number(block, 100, 8)? & 0o7777) as u32,
            uid: id(said.uid, 108)?,
            gid: id(said.gid, 116)?,
            size,
            modified,
            modified_ns,
            link,
            device,
            xattrs: said.xattrs,
        };
        self.size = size;
        self.stored = stored;
        self.segments.clear();
        self.state = if said.is_sparse {
            State::Map {
                map: Map::default(),
                left: stored,
            }
        } else {
            State::Data {
                offset: 0,
                left: stored,
                after: 0,
            }
        };
        Ok(entry)
    }

    /// The numbers of a sparse map are complete; `left` bytes of content follow, `pad` of them padding.
    fn mapped(&mut self, numbers: &[u64], left: u64, pad: u64) -> Result<(), ParseError> {
        const BAD: ParseError = ParseError::Invalid("a sparse map does not fit its file");
        let mut end = 0;
        let mut data: u64 = 0;
        self.segments.clear();
        for pair in numbers.chunks_exact(2) {
            let &[offset, length] = pair else { continue };
            let to = offset.checked_add(length).ok_or(BAD)?;
            if offset < end || to > self.size {
                return Err(BAD);
            }
            end = to;
            data = data.checked_add(length).ok_or(BAD)?;
            if length > 0 {
                self.segments.push((offset, length));
            }
        }
        self.segments.reverse();
        let after = left.checked_sub(pad).ok_or(BAD)?;
        if after != data {
            return Err(BAD);
        }
        self.state = State::Skip { left: pad, after };
        Ok(())
    }

    fn next_segment(&mut self, after: u64) -> Result<(), ParseError> {
        if let Some((offset, length)) = self.segments.pop() {
            let after = after
                .checked_sub(length)
                .ok_or(ParseError::Invalid("a sparse map does not fit its file"))?;
            self.state = State::Data {
                offset,
                left: length,
                after,
            };
        } else {
            self.state = State::Padding {
                left: padding(self.stored),
            };
        }
        Ok(())
    }

    fn extension(&mut self, kind: Extension, bytes: &[u8]) -> Result<(), ParseError> {
        let trimmed = || {
            let end = bytes
                .iter()
                .position(|&byte| byte == 0)
                .unwrap_or(bytes.len());
            bytes.get(..end).unwrap_or_default().to_vec()
        };
        match kind {
            Extension::LongName => self.said.path = Some(trimmed()),
            Extension::LongLink => self.said.link = Some(trimmed()),
            // Comments of whoever made the stream (`git archive` writes one); nothing about an entry.
            Extension::Global => self.said.bytes = 0,
            Extension::Pax => pax(bytes, &mut self.said)?,
        }
        Ok(())
    }
}

impl Map {
    /// Takes a byte; true when that was the last number.
    fn byte(&mut self, byte: u8) -> Result<bool, ParseError> {
        const BAD: ParseError = ParseError::Invalid("a sparse map has something else than numbers");
        self.read = self.read.saturating_add(1);
        if byte.is_ascii_digit() {
            self.has_digit = true;
            self.current = self
                .current
                .checked_mul(10)
                .and_then(|number| number.checked_add(u64::from(byte - b'0')))
                .ok_or(BAD)?;
            return Ok(false);
        }
        if byte != b'\n' || !self.has_digit {
            return Err(BAD);
        }
        let number = std::mem::take(&mut self.current);
        self.has_digit = false;
        match self.count {
            None if number > MAX_SEGMENTS => {
                return Err(ParseError::TooLarge("a sparse map"));
            }
            None => self.count = Some(number),
            Some(_) => self.numbers.push(number),
        }
        let wanted = self.count.unwrap_or(0).saturating_mul(2);
        Ok(self.numbers.len() as u64 >= wanted)
    }
}

/// Fills `held` up to `wanted` bytes; true when they are there.
fn hold(held: &mut Vec<u8>, wanted: usize, input: &mut &[u8]) -> bool {
    let missing = wanted.saturating_sub(held.len()).min(input.len());
    let (taken, rest) = input.split_at(missing);
    held.extend_from_slice(taken);
    *input = rest;
    held.len() >= wanted
}

/// Bytes of a field up to the first NUL.
fn field(block: &[u8], start: usize, length: usize) -> &[u8] {
    let field = block
        .get(start..start.saturating_add(length))
        .unwrap_or_default();
    let end = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    field.get(..end).unwrap_or_default()
}

fn ustar_path(block: &[u8]) -> Vec<u8> {
    let name = field(block, 0, 100);
    // GNU's own magic ("ustar  ") has other fields where the prefix is.
    let prefix = if block.get(257..263) == Some(b"ustar\0") {
        field(block, 345, 155)
    } else {
        &[]
    };
    crate::join(prefix, name)
}

fn check(block: &[u8]) -> Result<(), ParseError> {
    let said = number(block, 148, 8)?;
    let bytes = || {
        block.iter().enumerate().map(
            |(at, &byte)| {
                if (148..156).contains(&at) { b' ' } else { byte }
            },
        )
    };
    let unsigned: u64 = bytes().map(u64::from).sum();
    // Old programs added signed bytes.
    let signed: i64 = bytes().map(|byte| i64::from(byte as i8)).sum();
    if said == unsigned || i64::try_from(said) == Ok(signed) {
        Ok(())
    } else {
        Err(ParseError::Checksum)
    }
}

fn number(block: &[u8], start: usize, length: usize) -> Result<u64, ParseError> {
    u64::try_from(signed(block, start, length)?)
        .map_err(|_| ParseError::Invalid("a negative number"))
}

/// Octal digits, or GNU's base-256 with the first bit set.
fn signed(block: &[u8], start: usize, length: usize) -> Result<i64, ParseError> {
    const BAD: ParseError = ParseError::Invalid("a field is no number");
    let bytes = block
        .get(start..start.saturating_add(length))
        .unwrap_or_default();
    if let Some((&first, rest)) = bytes.split_first()
        && first & 0x80 != 0
    {
        // Two's complement; 0x80 itself is only the mark.
        let mut value: i64 = if first & 0x40 != 0 {
            i64::from(first as i8)
        } else {
            i64::from(first & 0x3f)
        };
        for &byte in rest {
            value = value
                .checked_mul(256)
                .and_then(|value| value.checked_add(i64::from(byte)))
                .ok_or(BAD)?;
        }
        return Ok(value);
    }
    let digits = bytes
        .iter()
        .skip_while(|byte| **byte == b' ')
        .take_while(|byte| !matches!(byte, 0 | b' '));
    let mut value: i64 = 0;
    for digit in digits {
        if !(b'0'..=b'7').contains(digit) {
            return Err(BAD);
        }
        value = value
            .checked_mul(8)
            .and_then(|value| value.checked_add(i64::from(digit - b'0')))
            .ok_or(BAD)?;
    }
    Ok(value)
}

/// Records of an extended header: `LENGTH NAME=VALUE\n`.
fn pax(mut bytes: &[u8], said: &mut Said) -> Result<(), ParseError> {
    const BAD: ParseError = ParseError::Invalid("an extended header");
    while !bytes.is_empty() {
        let space = bytes.iter().position(|&byte| byte == b' ').ok_or(BAD)?;
        let length = decimal(bytes.get(..space).unwrap_or_default()).ok_or(BAD)?;
        let length = usize::try_from(length).map_err(|_| BAD)?;
        let record = bytes.get(space + 1..length).ok_or(BAD)?;
        bytes = bytes.get(length..).unwrap_or_default();
        let record = record.strip_suffix(b"\n").ok_or(BAD)?;
        let equals = record.iter().position(|&byte| byte == b'=').ok_or(BAD)?;
        let (name, value) = record.split_at(equals);
        let value = value.get(1..).unwrap_or_default();
        keep(name, value, said)?;
    }
    Ok(())
}

fn keep(name: &[u8], value: &[u8], said: &mut Said) -> Result<(), ParseError> {
    const BAD: ParseError = ParseError::Invalid("a number in an extended header");
    let id = |value| {
        decimal(value)
            .and_then(|id| u32::try_from(id).ok())
            .ok_or(BAD)
    };
    match name {
        b"path" => said.path = Some(value.to_vec()),
        b"linkpath" => said.link = Some(value.to_vec()),
        b"size" => said.size = Some(decimal(value).ok_or(BAD)?),
        b"uid" => said.uid = Some(id(value)?),
        b"gid" => said.gid = Some(id(value)?),
        b"mtime" => said.time = Some(time(value).ok_or(BAD)?),
        b"GNU.sparse.major" if value == b"1" => said.is_sparse = true,
        b"GNU.sparse.minor" if value == b"0" => {}
        b"GNU.sparse.name" => said.sparse_name = Some(value.to_vec()),
        b"GNU.sparse.realsize" => said.sparse_size = Some(decimal(value).ok_or(BAD)?),
        name if name.starts_with(b"GNU.sparse.") => {
            return Err(ParseError::Unsupported(
                "a sparse file in an old GNU format",
            ));
        }
        name => {
            if let Some(name) = name.strip_prefix(b"SCHILY.xattr.")
                && let Ok(name) = CString::new(name)
            {
                said.xattrs.push((name, value.to_vec()));
            }
        }
    }
    Ok(())
}

fn decimal(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() || !bytes.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// `[-]SECONDS[.FRACTION]` as seconds and the nanoseconds after them.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut ns = 0;
    if let Some(fraction) = parts.next() {
        if !fraction.iter().all(u8::is_ascii_digit) {
            return None;
        }
        for at in 0..9 {
            let digit = fraction.get(at).map_or(0, |digit| digit - b'0');
            ns = ns * 10 + u32::from(digit);
        }
    }
    match (negative, ns) {
        (false, ns) => Some((seconds, ns)),
        (true, 0) => Some((-seconds, 0)),
        (true, ns) => Some(((-seconds).checked_sub(1)?, 1_000_000_000 - ns)),
    }
}
