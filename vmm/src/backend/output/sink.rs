//! A descriptor that output is copied to, without ever waiting for it.
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::SendFlags;

use super::Scrollback;

/// Bytes that a pipe which polls writable takes for certain; other files promise one byte.
const PIPE_WRITE: usize = 256;

/// One reader of a [`Scrollback`].
pub struct Sink {
    fd: OwnedFd,
    kind: Kind,
    /// Position in the stream of the next byte to write.
    at: u64,
    /// Bytes it never got: overwritten before they were taken, or over the limit.
    lost: u64,
    /// Bytes it may still take.
    left: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `send` with MSG_DONTWAIT.
    Socket,
    /// A regular file, or an open file description with O_NONBLOCK.
    Direct,
    /// A pipe or terminal we share with others, whose flags are not ours to change. Writes of so
    /// many bytes do not wait once it polls writable.
    Polled(usize),
}

/// How far a sink is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    UpToDate,
    /// It takes no more for now: try again when it polls writable.
    Behind,
    /// It will never take more: the other end is gone.
    Broken,
}

impl Sink {
    /// A sink that starts at `position` of the stream. A regular file gets at most `file_limit`
    /// bytes: no guest may fill the host's disk.
    pub fn new(fd: OwnedFd, position: u64, file_limit: u64) -> io::Result<Self> {
        let file_type = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        let (fd, kind) = match file_type {
            FileType::Socket => (fd, Kind::Socket),
            FileType::RegularFile => (fd, Kind::Direct),
            FileType::Fifo => nonblocking(fd, PIPE_WRITE)?,
            _ => nonblocking(fd, 1)?,
        };
        Ok(Self {
            fd,
            kind,
            at: position,
            lost: 0,
            left: match file_type {
                FileType::RegularFile => file_limit,
                _ => u64::MAX,
            },
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes it never got.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Writes what `stream` holds beyond this sink's position, as far as it goes at once.
    pub fn pump(&mut self, stream: &Scrollback) -> Progress {
        if self.at < stream.start() {
            self.lost += stream.start() - self.at;
            self.at = stream.start();
        }
        while self.at < stream.end() {
            if self.left == 0 {
                self.lost += stream.end() - self.at;
                self.at = stream.end();
                break;
            }
            let (run, _) = stream.since(self.at);
            let max = usize::try_from(self.left).unwrap_or(usize::MAX);
            let run = run.get(..run.len().min(max)).unwrap_or_default();
            match self.write(run) {
                Ok(0) => return Progress::Broken,
                Ok(len) => {
                    self.at += len as u64;
                    self.left -= len as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Progress::Behind,
                Err(_) => return Progress::Broken,
            }
        }
        Progress::UpToDate
    }

    fn write(&self, data: &[u8]) -> rustix::io::Result<usize> {
        match self.kind {
            Kind::Socket => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                rustix::net::send(&self.fd, data, flags)
            }
            Kind::Direct => rustix::io::write(&self.fd, data),
            Kind::Polled(most) => {
                let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
                let now = Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                };
                if poll(&mut fds, Some(&now))? == 0 {
                    return Err(rustix::io::Errno::AGAIN);
                }
                let small = data.get(..data.len().min(most)).unwrap_or_default();
                rustix::io::write(&self.fd, small)
            }
        }
    }
}

/// A way to write to `fd` without waiting; `most` as in [`Kind::Polled`].
fn nonblocking(fd: OwnedFd, most: usize) -> io::Result<(OwnedFd, Kind)> {
    if rustix::fs::fcntl_getfl(&fd)?.contains(OFlags::NONBLOCK) {
        return Ok((fd, Kind::Direct));
    }
    // O_NONBLOCK belongs to the open file description, which others may share (a shell its
    // terminal); one of our own may have it. A jail without /proc has to poll.
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let own = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match rustix::fs::open(path, own, Mode::empty()) {
        Ok(reopened) => Ok((reopened, Kind::Direct)),
        Err(_) => Ok((fd, Kind::Polled(most))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    const FLOOD: usize = 4 << 20;

    fn stream(len: usize) -> Scrollback {
        let mut stream = Scrollback::new(16 << 10);
        for at in 0..len / 16 {
            stream.push(format!("{:015}\n", at * 16).as_bytes());
        }
        stream
    }

    #[test]
    fn a_file_gets_everything_up_to_its_limit() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut sink = Sink::new(file.reopen().unwrap().into(), 0, 40).unwrap();
        let mut stream = Scrollback::new(64);
        stream.push(b"hello ");
        assert_eq!(sink.pump(&stream), Progress::UpToDate);
        stream.push(&[b'x'; 60]);
        assert_eq!(sink.pump(&stream), Progress::UpToDate);
        assert_eq!(sink.lost(), 26);
        let mut got = String::new();
        file.read_to_string(&mut got).unwrap();
        assert_eq!(got, format!("hello {}", "x".repeat(34)));
    }

    /// A peer's bug: output buffered without bound when nobody reads it.
    #[test]
    fn readers_that_stall_lose_bytes_instead_of_blocking() {
        let (socket, socket_reader) = UnixStream::pair().unwrap();
        let (pipe_reader, pipe) = rustix::pipe::pipe().unwrap();
        let polled = Sink {
            kind: Kind::Polled(PIPE_WRITE),
            ..Sink::new(pipe.try_clone().unwrap(), 0, u64::MAX).unwrap()
        };
        let blocking_pipe = Sink { fd: pipe, ..polled };
        let socket = Sink::new(socket.into(), 0, u64::MAX).unwrap();
        let readers: [File; 2] = [OwnedFd::from(socket_reader).into(), pipe_reader.into()];
        for (mut sink, mut reader) in [socket, blocking_pipe].into_iter().zip(readers) {
            let mut output = Scrollback::new(16 << 10);
            let mut behind = 0;
            for at in 0..FLOOD / 16 {
                output.push(format!("{:015}\n", at * 16).as_bytes());
                behind += u64::from(sink.pump(&output) == Progress::Behind);
            }
            assert!(behind > 0);
            assert!(sink.lost() > 0 || output.end() - sink.at > 0);
            // What does arrive is whole lines in order, with one gap at most.
            let mut got = vec![0; 4096];
            reader.read_exact(&mut got).unwrap();
            assert_eq!(&got[..32], b"000000000000000\n000000000000016\n");
        }
    }

    #[test]
    fn pipes_we_share_become_nonblocking_without_changing_the_others() {
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        let sink = Sink::new(writer.try_clone().unwrap(), 0, u64::MAX).unwrap();
        assert_eq!(sink.kind, Kind::Direct);
        assert!(
            !rustix::fs::fcntl_getfl(&writer)
                .unwrap()
                .contains(OFlags::NONBLOCK)
        );
    }

    #[test]
    fn a_reader_that_left_is_broken() {
        let (socket, reader) = UnixStream::pair().unwrap();
        drop(reader);
        let mut sink = Sink::new(socket.into(), 0, u64::MAX).unwrap();
        assert_eq!(sink.pump(&stream(1024)), Progress::Broken);
    }
}
