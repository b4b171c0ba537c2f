//! A log on disk that a guest cannot grow without end, and its last lines in memory.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

/// Longest line that is quoted, in characters.
const LINE_MAX: usize = 400;
/// Bytes kept in memory for quoting.
const TAIL_MAX: usize = 16 * 1024;

/// A file that is moved to `NAME.1` and begun anew at a limit.
#[derive(Debug)]
pub struct BoundedLog {
    path: PathBuf,
    limit: u64,
    written: u64,
    file: Option<File>,
    tail: VecDeque<u8>,
}

impl BoundedLog {
    /// Appends to nothing: an earlier file of this name is replaced at the first byte.
    #[must_use]
    pub fn new(path: PathBuf, limit: u64) -> Self {
        Self {
            path,
            limit,
            written: 0,
            file: None,
            tail: VecDeque::new(),
        }
    }

    /// A full disk loses the line on disk, never the caller.
    pub fn append(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        let excess = self.tail.len().saturating_sub(TAIL_MAX);
        self.tail.drain(..excess);

        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.written.saturating_add(length) > self.limit && self.file.take().is_some() {
            let _ = fs::rename(&self.path, self.path.with_added_extension("1"));
            self.written = 0;
        }
        if self.file.is_none() {
            self.file = File::create(&self.path).ok();
        }
        if let Some(file) = &mut self.file {
            let _ = file.write_all(bytes);
            self.written = self.written.saturating_add(length);
        }
    }

    /// The last lines, at most `count`, fit for a terminal.
    #[must_use]
    pub fn last_lines(&mut self, count: usize) -> Vec<String> {
        last_lines(self.tail.make_contiguous(), count)
    }
}

/// The last `count` lines that are not empty; control characters, escape sequences included, are shown as
/// `?`, so that a guest cannot write to the user's terminal through an error message.
#[must_use]
pub fn last_lines(text: &[u8], count: usize) -> Vec<String> {
    let text = String::from_utf8_lossy(text);
    let mut lines: Vec<String> = text
        .split('\n')
        .rev()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .take(count)
        .map(|line| line.chars().take(LINE_MAX).map(printable).collect())
        .collect();
    lines.reverse();
    lines
}

fn printable(character: char) -> char {
    match character {
        '\t' => ' ',
        c if c.is_control() => '?',
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_disk_holds_at_most_twice_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = BoundedLog::new(dir.path().join("console.log"), 1000);
        for number in 0..500 {
            log.append(format!("line {number:05}\n").as_bytes());
        }
        let sizes: Vec<u64> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|size| *size <= 1000), "{sizes:?}");
        assert_eq!(log.last_lines(2), ["line 00498", "line 00499"]);
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(
            last_lines(b"a\x1b[2Jb\r\n\n\nlast\tone", 5),
            ["a?[2Jb", "last one"]
        );
        assert!(last_lines(b"", 5).is_empty());
    }

    proptest! {
        #[test]
        fn memory_is_bounded(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9000), 0..8)) {
            let dir = tempfile::tempdir().unwrap();
            let mut log = BoundedLog::new(dir.path().join("l"), 4000);
            for chunk in &chunks {
                log.append(chunk);
            }
            prop_assert!(log.tail.len() <= TAIL_MAX);
            for line in log.last_lines(10) {
                prop_assert!(line.chars().count() <= LINE_MAX);
                prop_assert!(!line.chars().any(char::is_control));
            }
        }
    }
}
