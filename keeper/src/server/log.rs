//! What the keeper has to say: a file, as nobody looks at its output.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use super::locked;

const LOG: &str = "keeper.log";
/// What came before, where it became too long.
const BEFORE: &str = "keeper.log.old";
/// A longer one is begun anew.
const LONGEST: u64 = 256 << 10;
/// Longest line.
const LONGEST_LINE: usize = 4 << 10;

static FILE: Mutex<Option<File>> = Mutex::new(None);

/// Opens the file in the working directory.
pub(super) fn begin() {
    *locked(&FILE) = open();
}

fn open() -> Option<File> {
    if std::fs::metadata(LOG).is_ok_and(|metadata| metadata.len() > LONGEST) {
        let _ = std::fs::rename(LOG, BEFORE);
    }
    File::options().create(true).append(true).open(LOG).ok()
}

/// Adds a line.
pub(super) fn line(text: &str) {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    let mut log = locked(&FILE);
    if let Some(file) = &mut *log {
        let text = text.replace('\n', " ");
        let text = text.get(..text.floor_char_boundary(LONGEST_LINE));
        // Nobody to tell if the disk is full.
        let _ = writeln!(file, "{seconds} {}", text.unwrap_or_default());
        // A guest can make it say the same for ever.
        if file.metadata().is_ok_and(|is| is.len() > LONGEST) {
            *log = open();
        }
    }
}
