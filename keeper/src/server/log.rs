//! What the keeper has to say: a file, as nobody looks at its output.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use super::locked;

const LOG: &str = "keeper.log";
/// A longer one is begun anew.
const LONGEST: u64 = 256 << 10;

static FILE: Mutex<Option<File>> = Mutex::new(None);

/// Opens the file in the working directory.
pub(super) fn begin() {
    let long = std::fs::metadata(LOG).is_ok_and(|metadata| metadata.len() > LONGEST);
    let file = File::options()
        .create(true)
        .append(!long)
        .write(true)
        .truncate(long)
        .open(LOG);
    *locked(&FILE) = file.ok();
}

/// Adds a line.
pub(super) fn line(text: &str) {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    if let Some(file) = &mut *locked(&FILE) {
        let text = text.replace('\n', " ");
        // Nobody to tell if the disk is full.
        let _ = writeln!(file, "{seconds} {text}");
    }
}
