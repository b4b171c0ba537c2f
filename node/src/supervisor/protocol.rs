//! What a supervisor tells its owner: one JSON document per line.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};

use crate::ending::Ended;

/// The owner's command: follow the guest's console. Hanging up ends everything, unless
/// [`RELEASE`] came first.
pub const ATTACH_CONSOLE: u8 = b'c';
/// The owner's command: the guest runs on when the owner hangs up.
pub const RELEASE: u8 = b'r';
/// The owner's command: the VMM is killed, and the sandbox's directory stays for another one.
pub const ABANDON: u8 = b'a';
/// A line longer than this is not from a supervisor.
const LINE_MAX: usize = 256 * 1024;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The VMM's process runs.
    Started { pid: u32 },
    /// The VMM could not be started or watched.
    Failed { message: String },
    /// The VMM ended; the record is written.
    Ended(Box<Ended>),
}

impl Event {
    /// An owner that is gone does not miss it.
    pub(crate) fn send(&self, owner: &mut UnixStream) {
        if let Ok(mut line) = serde_json::to_vec(self) {
            line.push(b'\n');
            let _ = owner.write_all(&line);
        }
    }
}

/// Cuts what arrives into events.
#[derive(Debug, Default)]
pub(crate) struct EventReader {
    pending: Vec<u8>,
}

impl EventReader {
    /// Reads once. `None`: the supervisor hung up.
    ///
    /// # Errors
    /// What came is not an event.
    pub(crate) fn read(&mut self, from: &mut impl Read) -> io::Result<Option<Vec<Event>>> {
        let mut buffer = [0u8; 4096];
        let count = match from.read(&mut buffer) {
            // A peer that dies with unread bytes of ours resets instead of closing.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            other => other?,
        };
        if count == 0 {
            return Ok(None);
        }
        self.push(buffer.get(..count).unwrap_or_default()).map(Some)
    }

    fn push(&mut self, bytes: &[u8]) -> io::Result<Vec<Event>> {
        self.pending.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            events.push(serde_json::from_slice(&line)?);
        }
        if self.pending.len() > LINE_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<Event> {
        vec![
            Event::Started { pid: 17 },
            Event::Failed {
                message: "two\nlines".into(),
            },
            Event::Ended(Box::default()),
        ]
    }

    proptest! {
        #[test]
        fn events_survive_any_cutting(cuts in prop::collection::vec(1usize..40, 1..40)) {
            let mut bytes = Vec::new();
            for event in sample() {
                bytes.extend(serde_json::to_vec(&event).unwrap());
                bytes.push(b'\n');
            }
            let mut reader = EventReader::default();
            let mut events = Vec::new();
            let mut rest = bytes.as_slice();
            for cut in cuts.iter().cycle() {
                let (head, tail) = rest.split_at((*cut).min(rest.len()));
                events.extend(reader.push(head).unwrap());
                rest = tail;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(events, sample());
        }
    }

    #[test]
    fn nonsense_is_an_error_and_cannot_grow() {
        assert!(EventReader::default().push(b"what?\n").is_err());
        assert!(
            EventReader::default()
                .push(&vec![b'x'; LINE_MAX + 1])
                .is_err()
        );
    }
}
