//! What went wrong without ending the whole: told at the end.

use rustix::io::Errno;

use crate::TreeError;

/// Problems kept; of the others only the number.
const MAX: usize = 32;

/// Problems of a tree, the first few in full.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems {
    /// The first.
    pub first: Vec<TreeError>,
    /// How many there were.
    pub total: u64,
}

impl Problems {
    /// Notes one.
    pub fn add(&mut self, doing: &'static str, path: Vec<u8>, errno: Errno) {
        self.note(TreeError { doing, path, errno });
    }

    /// Notes one.
    pub fn note(&mut self, error: TreeError) {
        if self.first.len() < MAX {
            self.first.push(error);
        }
        self.total = self.total.saturating_add(1);
    }
}

/// What became of a tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Entries in the stream.
    pub entries: u64,
    /// Bytes of content, without holes.
    pub bytes: u64,
    /// What was left out, or is not as it was.
    pub problems: Problems,
}
