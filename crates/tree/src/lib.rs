//! Directory trees: walking, removing, copying, and tar streams both ways.
//!
//! The agent uses it in the guest, `belljar-node` on the host. Both take names, links and streams as
//! hostile: everything is reached by descriptors and single names, no symlink is ever followed below the
//! root, no file system is left, and no depth overflows a stack or runs out of descriptors.
#![forbid(unsafe_code)]

pub mod attributes;
pub mod dirs;
pub mod names;
pub mod pack;
pub mod problems;
pub mod remove;
pub mod tar;
pub mod unpack;
pub mod walk;

use std::ffi::CStr;

use rustix::io::Errno;

/// A failed system call: what was attempted, with which path (relative to the root of the tree), and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {doing} {}: {}", show(.path), std::io::Error::from(*.errno))]
pub struct TreeError {
    /// "remove", "read", …
    pub doing: &'static str,
    /// Bytes, relative to the root of the tree; empty for the root itself.
    pub path: Vec<u8>,
    /// Why.
    pub errno: Errno,
}

/// A path for people; the root of a tree is ".".
fn show(path: &[u8]) -> String {
    if path.is_empty() {
        return ".".to_owned();
    }
    String::from_utf8_lossy(path).into_owned()
}

/// Puts `name` behind `path`; either may be empty.
pub(crate) fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if name.is_empty() {
        return path.to_vec();
    }
    let mut joined = Vec::with_capacity(path.len() + name.len() + 1);
    joined.extend_from_slice(path);
    if !path.is_empty() {
        joined.push(b'/');
    }
    joined.extend_from_slice(name);
    joined
}

/// Neither "." nor "..".
pub(crate) fn is_entry(name: &CStr) -> bool {
    !matches!(name.to_bytes(), b"." | b"..")
}
