//! Tar streams as bytes: entries to headers, and back. Pure; nothing is read or written here.
//!
//! Written is POSIX pax (IEEE 1003.1-2017 `pax`, "pax Interchange Format") with the records that GNU tar,
//! libarchive and Python read too: `SCHILY.xattr.` for extended attributes, GNU sparse format 1.0 for holes.
//! Read is that, plain ustar, and GNU's long names and base-256 numbers.

mod encode;
mod parse;

use std::ffi::CString;

pub use encode::{BLOCK, END, encode, padding, sparse_map};
pub use parse::{Event, ParseError, Parser};

/// Longest path, and longest target of a link, in a stream, bytes.
pub const MAX_PATH: usize = 64 << 10;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file with content.
    Regular,
    /// Another name for a file that came before.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One entry of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// As in the stream, not to be trusted.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with set-id and sticky, 07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Of a file, bytes with holes.
    pub size: u64,
    /// Seconds since 1970.
    pub modified: i64,
    /// Nanoseconds beside them.
    pub modified_ns: u32,
    /// Of links, not to be trusted.
    pub link: Vec<u8>,
    /// Of devices: major, minor.
    pub device: (u32, u32),
    /// Extended attributes.
    pub xattrs: Vec<(CString, Vec<u8>)>,
}

impl Entry {
    /// With nothing but a name.
    #[must_use]
    pub const fn new(path: Vec<u8>, kind: Kind) -> Self {
        Self {
            path,
            kind,
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            modified: 0,
            modified_ns: 0,
            link: Vec::new(),
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
