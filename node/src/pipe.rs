//! A stream of a guest or VMM connected with descriptors of the host: both directions in one loop, none of
//! which keeps the other one waiting.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use crate::poll::PollSet;
use crate::sys::SignalFd;

/// Bytes held for a side that does not take them. Above it nothing more is read from the other side.
const HELD_MAX: usize = 64 * 1024;
/// After `poll` says that a pipe has room, this much can be written without waiting (`pipe(7)`, PIPE_BUF).
const SAFE_WRITE: usize = 4096;

/// What becomes of the bytes that are typed and shown.
pub trait Watcher {
    /// Appends to `out` what goes to the guest; `false` to leave.
    fn typed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> bool;

    /// These bytes came from the guest and are about to be shown.
    fn shown(&mut self, bytes: &[u8]) {
        let _ = bytes;
    }

    /// A signal came; `false` to end.
    ///
    /// # Errors
    /// The terminal is gone.
    fn signalled(&mut self, signal: i32) -> io::Result<bool> {
        let _ = signal;
        Ok(false)
    }
}

/// Every byte goes to the guest.
#[derive(Debug, Clone, Copy)]
pub struct Everything;

impl Watcher for Everything {
    fn typed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> bool {
        out.extend_from_slice(bytes);
        true
    }
}

/// Why the connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipeEnd {
    /// The guest has closed its side, and all it sent was passed on.
    Closed,
    /// The user left.
    Left,
    /// Nobody reads the output any more.
    OutputClosed,
    /// A signal came.
    Signal(i32),
}

/// Connects until the guest closes its side. The end of `input` is passed on by closing our side only, and
/// never ends the connection: an answer may still come. Without `input` nothing is sent, and both sides
/// stay open.
///
/// # Errors
/// Waiting failed, or the stream broke.
pub fn connect(
    mut stream: &UnixStream,
    input: Option<BorrowedFd<'_>>,
    output: BorrowedFd<'_>,
    signals: Option<&SignalFd>,
    watcher: &mut impl Watcher,
) -> io::Result<PipeEnd> {
    stream.set_nonblocking(true)?;
    let (mut to_guest, mut to_output) = (Vec::new(), Vec::new());
    let mut input = input;
    let mut half_closed = input.is_none();
    let mut closed = false;
    let mut buffer = vec![0u8; HELD_MAX];
    loop {
        if closed && to_output.is_empty() {
            return Ok(PipeEnd::Closed);
        }
        if input.is_none() && to_guest.is_empty() && !std::mem::replace(&mut half_closed, true) {
            let _ = stream.shutdown(Shutdown::Write);
        }
        let mut set = PollSet::default();
        let from_guest =
            (!closed && to_output.len() < HELD_MAX).then(|| set.readable(stream.as_fd()));
        let room = (!to_guest.is_empty()).then(|| set.writable(stream.as_fd()));
        let typed = input
            .filter(|_| to_guest.len() < HELD_MAX && !closed)
            .map(|fd| set.readable(fd));
        let shown = (!to_output.is_empty()).then(|| set.writable(output));
        let signalled = signals.map(|signals| set.readable(signals.as_fd()));
        let polled = set.wait(None)?;
        let is_ready = |slot: Option<usize>| slot.is_some_and(|slot| polled.is_ready(slot));

        if is_ready(signalled)
            && let Some(signal) = signals.and_then(SignalFd::take)
            && !watcher.signalled(signal)?
        {
            return Ok(PipeEnd::Signal(signal));
        }
        if is_ready(shown) {
            let some = to_output.get(..to_output.len().min(SAFE_WRITE));
            match rustix::io::write(output, some.unwrap_or_default()) {
                Ok(count) => drop(to_output.drain(..count)),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(_) => return Ok(PipeEnd::OutputClosed),
            }
        }
        if is_ready(room) {
            match stream.write(&to_guest) {
                Ok(count) => drop(to_guest.drain(..count)),
                Err(error) if is_passing(&error) => {}
                // A guest that reads no more may still write.
                Err(_) => {
                    to_guest.clear();
                    input = None;
                }
            }
        }
        if is_ready(from_guest) {
            match stream.read(&mut buffer) {
                Ok(0) => closed = true,
                Ok(count) => {
                    let bytes = buffer.get(..count).unwrap_or_default();
                    watcher.shown(bytes);
                    to_output.extend_from_slice(bytes);
                }
                Err(error) if is_passing(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => closed = true,
                Err(error) => return Err(error),
            }
        }
        if is_ready(typed)
            && let Some(fd) = input
        {
            match rustix::io::read(fd, &mut buffer[..]) {
                Ok(count) if count > 0 => {
                    let bytes = buffer.get(..count).unwrap_or_default();
                    if !watcher.typed(bytes, &mut to_guest) {
                        return Ok(PipeEnd::Left);
                    }
                }
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                // An input that cannot be read is at its end.
                Ok(_) | Err(_) => input = None,
            }
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn the_end_of_the_input_is_passed_on_and_the_answer_awaited() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (input, mut typing) = io::pipe().unwrap();
        let (mut shown, output) = io::pipe().unwrap();
        let sent = vec![7u8; 3 << 20];
        let expected = sent.len();
        let guest = thread::spawn(move || {
            let mut all = Vec::new();
            guest.read_to_end(&mut all).unwrap();
            guest.write_all(&all).unwrap();
            guest.write_all(b"end").unwrap();
        });
        let typist = thread::spawn(move || typing.write_all(&sent).unwrap());
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            shown.read_to_end(&mut all).unwrap();
            all
        });
        let end = connect(
            &ours,
            Some(input.as_fd()),
            output.as_fd(),
            None,
            &mut Everything,
        );
        assert_eq!(end.unwrap(), PipeEnd::Closed);
        drop(output);
        typist.join().unwrap();
        guest.join().unwrap();
        let all = reader.join().unwrap();
        assert_eq!(all.len(), expected + 3);
        assert!(all.ends_with(b"\x07end"));
    }

    #[test]
    fn an_input_that_never_ends_does_not_keep_it_open() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (input, _typing) = io::pipe().unwrap();
        let (_shown, output) = io::pipe().unwrap();
        guest.write_all(b"bye").unwrap();
        drop(guest);
        let end = connect(
            &ours,
            Some(input.as_fd()),
            output.as_fd(),
            None,
            &mut Everything,
        );
        assert_eq!(end.unwrap(), PipeEnd::Closed);
    }

    #[test]
    fn a_reader_that_is_gone_ends_it() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (shown, output) = io::pipe().unwrap();
        drop(shown);
        guest.write_all(b"to nobody").unwrap();
        let end = connect(&ours, None, output.as_fd(), None, &mut Everything);
        assert_eq!(end.unwrap(), PipeEnd::OutputClosed);
    }
}
