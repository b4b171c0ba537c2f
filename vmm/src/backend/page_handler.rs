//! A process that brings a guest's pages in, at the other end of a Unix socket.
//!
//! It is sent one message: where guest RAM lies, with the userfaultfd of its faults. Nothing follows on the
//! socket. What remains is to notice its end.
use std::io;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sockopt,
};
use rustix::process::{PidfdFlags, pidfd_open};

#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    #[error("nobody can be reached there: {0}")]
    Connect(io::Error),
    #[error("it is no Unix stream socket that is connected")]
    NotASocket,
    #[error("it does not take the message: {0}")]
    Send(io::Error),
    #[error("the message needs {0} bytes more than fit at once")]
    Short(usize),
}

/// The connection to a page-fault handler.
#[derive(Debug)]
pub struct PageHandler {
    socket: OwnedFd,
    /// The process, if it is its end that counts.
    process: Option<OwnedFd>,
}

/// Why [`PageHandler::wait`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woke {
    /// The process has ended.
    Ended,
    /// Its end of the socket was closed.
    HungUp,
    /// The other descriptor with this number is readable.
    Other(usize),
}

impl PageHandler {
    /// The one that listens at `path`. It may close its connection and go on; its end is that of the process.
    pub fn connect(path: &Path) -> Result<Self, HandlerError> {
        let failed = |e: rustix::io::Errno| HandlerError::Connect(e.into());
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            // A full backlog must not make us wait.
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(failed)?;
        rustix::net::connect(&socket, &address).map_err(failed)?;
        // Where the kernel tells no process (it is gone, or in a namespace that we do not see), there is
        // still the socket.
        let process = peer(&socket).ok();
        Ok(Self { socket, process })
    }

    /// The one at the other end of a connected socket. Who made the socket need not be who handles, so the
    /// end is that of the connection.
    pub fn from_fd(socket: OwnedFd) -> Result<Self, HandlerError> {
        let connected = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&socket) == Ok(SocketType::STREAM)
            && rustix::net::getpeername(&socket).is_ok();
        if !connected {
            return Err(HandlerError::NotASocket);
        }
        Ok(Self {
            socket,
            process: None,
        })
    }

    /// Sends the message that it waits for.
    pub fn hand_over(&self, message: &[u8], userfault: BorrowedFd<'_>) -> Result<(), HandlerError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [userfault];
        // There is room for one.
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let sent = rustix::net::sendmsg(
            &self.socket,
            &[IoSlice::new(message)],
            &mut control,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )
        .map_err(|e| HandlerError::Send(e.into()))?;
        match message.len() - sent.min(message.len()) {
            0 => Ok(()),
            missing => Err(HandlerError::Short(missing)),
        }
    }

    /// Waits for its end, or until one of `others` is readable.
    pub fn wait(&self, others: &[BorrowedFd<'_>]) -> io::Result<Woke> {
        let ended = match &self.process {
            Some(process) => PollFd::new(process, PollFlags::IN),
            // What it might send is not read.
            None => PollFd::new(&self.socket, PollFlags::empty()),
        };
        let others = others.iter();
        let others = others.map(|other| PollFd::from_borrowed_fd(*other, PollFlags::IN));
        let mut fds: Vec<_> = std::iter::once(ended).chain(others).collect();
        loop {
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                done => done?,
            };
            let woke = fds.iter().position(|fd| !fd.revents().is_empty());
            match (woke, &self.process) {
                (None, _) => {}
                (Some(0), Some(_)) => return Ok(Woke::Ended),
                (Some(0), None) => return Ok(Woke::HungUp),
                (Some(other), _) => return Ok(Woke::Other(other - 1)),
            }
        }
    }
}

/// The process that listens where this socket is connected to.
fn peer(socket: &OwnedFd) -> io::Result<OwnedFd> {
    /// Linux 6.5; the libc crate does not have it.
    const SO_PEERPIDFD: i32 = 77;
    let mut made: i32 = -1;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the option's value is one int, for which there is room.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut made).cast(),
            &raw mut len,
        )
    };
    if done == 0 && made >= 0 {
        // SAFETY: the kernel has just made it for us.
        return Ok(unsafe { OwnedFd::from_raw_fd(made) });
    }
    let credentials = sockopt::socket_peercred(socket)?;
    Ok(pidfd_open(credentials.pid, PidfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Command, Stdio};

    use super::*;

    fn never() -> OwnedFd {
        rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn the_message_comes_with_a_descriptor_and_a_hang_up_is_noticed() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let handler = PageHandler::from_fd(ours.into()).unwrap();
        let file = File::open("/dev/null").unwrap();
        handler.hand_over(b"[]", file.as_fd()).unwrap();
        let mut message = [0; 2];
        theirs.read_exact(&mut message).unwrap();
        assert_eq!(&message, b"[]");
        let ready = never();
        rustix::io::write(&ready, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(handler.wait(&[ready.as_fd()]).unwrap(), Woke::Other(0));
        drop(theirs);
        assert_eq!(handler.wait(&[never().as_fd()]).unwrap(), Woke::HungUp);
        let broken = handler.hand_over(b"[]", file.as_fd());
        assert!(matches!(broken, Err(HandlerError::Send(_))), "{broken:?}");
    }

    #[test]
    fn the_end_of_a_process_that_listened_is_noticed_not_that_of_its_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handler");
        let script = "import socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen()\nprint('up', flush=True)\ns.accept()[0].close()\nprint('closed', flush=True)\nsys.stdin.read()";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut line = [0; 3];
        out.read_exact(&mut line).unwrap();
        let handler = PageHandler::connect(&path).unwrap();
        let mut line = [0; 7];
        out.read_exact(&mut line).unwrap();
        let ready = never();
        rustix::io::write(&ready, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(
            handler.wait(&[never().as_fd(), ready.as_fd()]).unwrap(),
            Woke::Other(1),
            "it lives"
        );
        child.kill().unwrap();
        assert_eq!(handler.wait(&[never().as_fd()]).unwrap(), Woke::Ended);
        child.wait().unwrap();
    }

    #[test]
    fn what_is_no_handler_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let refused =
            |path: &Path| matches!(PageHandler::connect(path), Err(HandlerError::Connect(_)));
        assert!(refused(&path), "nothing is there");
        File::create(&path).unwrap();
        assert!(refused(&path), "a file");
        assert!(refused(Path::new(&"x".repeat(200))), "too long a path");
        let listener = UnixListener::bind(dir.path().join("l")).unwrap();
        for fd in [OwnedFd::from(listener), File::open(&path).unwrap().into()] {
            let refused = PageHandler::from_fd(fd);
            assert!(
                matches!(refused, Err(HandlerError::NotASocket)),
                "{refused:?}"
            );
        }
    }
}
