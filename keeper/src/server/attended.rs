//! A descriptor of a client's that is read or written as long as the client is there.
//!
//! It may be a pipe that nobody ever fills or empties: then the client decides how long that takes, and its end
//! is the end of the call.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};

/// Bytes that a pipe takes without waiting when it says that it takes some (`PIPE_BUF`).
const AT_ONCE: usize = 4096;

/// The descriptor, and the connection of who sent it.
#[derive(Debug)]
pub(super) struct Attended {
    file: File,
    /// It never makes anybody wait.
    is_regular: bool,
    caller: UnixStream,
}

impl Attended {
    pub(super) fn new(file: File, caller: UnixStream) -> io::Result<Self> {
        let is_regular = file.metadata()?.is_file();
        Ok(Self {
            file,
            is_regular,
            caller,
        })
    }

    /// Until it can be read or written, or nobody wants that any more.
    fn wait(&self, what: PollFlags) -> io::Result<()> {
        if self.is_regular {
            return Ok(());
        }
        loop {
            let mut set = [
                PollFd::new(&self.file, what),
                // Of interest is only that it was closed, which is always told.
                PollFd::from_borrowed_fd(self.caller.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut set, None) {
                Err(rustix::io::Errno::INTR) => continue,
                done => done?,
            };
            let [file, caller] = &set;
            if !caller.revents().is_empty() {
                return Err(io::Error::other("whoever asked for it has gone"));
            }
            if !file.revents().is_empty() {
                return Ok(());
            }
        }
    }
}

impl Read for Attended {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN)?;
        self.file.read(bytes)
    }
}

impl Write for Attended {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::OUT)?;
        let most = if self.is_regular {
            bytes.len()
        } else {
            bytes.len().min(AT_ONCE)
        };
        self.file.write(bytes.get(..most).unwrap_or_default())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn a_pipe_that_nobody_serves_ends_with_who_sent_it() {
        let (reader, writer) = pipe();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut attended = Attended::new(reader.into(), ours).unwrap();
        rustix::io::write(&writer, b"one").unwrap();
        let mut bytes = [0; 9];
        assert_eq!(attended.read(&mut bytes).unwrap(), 3);
        let waiting = std::thread::spawn(move || attended.read(&mut [0; 9]));
        drop(theirs);
        assert!(waiting.join().unwrap().is_err());
        drop(writer);

        let (reader, writer) = pipe();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut attended = Attended::new(writer.into(), ours).unwrap();
        let waiting = std::thread::spawn(move || attended.write_all(&vec![1; 4 << 20]));
        drop(theirs);
        assert!(waiting.join().unwrap().is_err());
        drop(reader);
    }

    #[test]
    fn what_comes_through_is_what_was_sent() {
        let (reader, writer) = pipe();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let sent: Vec<u8> = (0..300_000_u32).map(|number| number as u8).collect();
        let copy = sent.clone();
        let mut out = Attended::new(writer.into(), ours.try_clone().unwrap()).unwrap();
        let writing = std::thread::spawn(move || out.write_all(&copy));
        let mut got = Vec::new();
        Attended::new(reader.into(), ours)
            .unwrap()
            .read_to_end(&mut got)
            .unwrap();
        writing.join().unwrap().unwrap();
        assert!(got == sent);
    }
}
