//! What consoles and VMMs of sandboxes have said, as far as it is kept.

use std::path::Path;
use std::{fs, io};

use crate::registry::Found;
use crate::state;

/// A log of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Log {
    /// What the guest wrote to its console.
    Console,
    /// What its VMM said.
    Vmm,
}

/// All that is kept, the oldest first; bytes as they came. At least the last 512 KiB.
///
/// # Errors
/// `NotFound`: nothing was said yet. Or the file cannot be read.
pub fn read(found: &Found, log: Log) -> io::Result<Vec<u8>> {
    let name = match log {
        Log::Console => state::CONSOLE_LOG,
        Log::Vmm => state::VMM_LOG,
    };
    read_both(&found.dir().file(name))
}

/// A [`crate::bounded_log::BoundedLog`]: the file before it and the newest.
fn read_both(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = fs::read(path.with_added_extension("1")).unwrap_or_default();
    match fs::read(path) {
        Ok(newest) => bytes.extend(newest),
        // It was moved away this very moment.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !bytes.is_empty() => {}
        Err(error) => return Err(error),
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounded_log::BoundedLog;

    #[test]
    fn what_was_moved_away_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        assert_eq!(
            read_both(&path).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        let mut log = BoundedLog::new(path.clone(), 10);
        log.append(b"first ");
        assert_eq!(read_both(&path).unwrap(), b"first ");
        log.append(b"second");
        assert_eq!(read_both(&path).unwrap(), b"first second");
        fs::remove_file(&path).unwrap();
        assert_eq!(read_both(&path).unwrap(), b"first ");
    }
}
