//! The hybrid vsock convention: a guest's vsock port behind a Unix socket of its VMM.
//!
//! The host connects, sends `CONNECT <port>\n` and reads `OK <host port>\n`; from then on the
//! bytes are the guest's. The VMM closes the connection instead when nobody listens.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

/// Longest answer line: `OK ` and a 32-bit number.
const MAX_LINE: usize = 32;

/// How long to wait before trying a full accept queue again.
const RETRY: Duration = Duration::from_micros(500);

/// A guest refuses a connection sooner than this.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Why a guest's port could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The VMM's socket itself; a missing file or nobody listening on it.
    #[error("cannot connect to the VMM's vsock socket {path}: {source}")]
    Socket {
        /// The Unix socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The VMM hung up without an answer: nothing in the guest listens on that port.
    #[error("nothing in the guest listens on vsock port {port} (socket {path})")]
    Refused {
        /// The Unix socket.
        path: PathBuf,
        /// The guest's port.
        port: u32,
    },
    /// No answer before the deadline.
    #[error("the guest did not answer on vsock port {port} in time (socket {path})")]
    Timeout {
        /// The Unix socket.
        path: PathBuf,
        /// The guest's port.
        port: u32,
    },
    /// The other end of the socket is no VMM that speaks this convention.
    #[error("unexpected answer {line:?} to CONNECT {port} on {path}")]
    BadAnswer {
        /// The Unix socket.
        path: PathBuf,
        /// The guest's port.
        port: u32,
        /// What came, at most [`MAX_LINE`] bytes.
        line: String,
    },
    /// Sending or receiving failed.
    #[error("handshake for vsock port {port} on {path}: {source}")]
    Io {
        /// The Unix socket.
        path: PathBuf,
        /// The guest's port.
        port: u32,
        /// What the system said.
        source: io::Error,
    },
}

/// Connects to `port` of the guest whose VMM listens on the Unix socket `path`. Returns a blocking
/// stream without time limits; no byte of the guest's has been taken from it.
pub fn connect(path: &Path, port: u32, deadline: Instant) -> Result<UnixStream, ConnectError> {
    let mut stream = connect_socket(path, deadline).map_err(|source| match source.kind() {
        io::ErrorKind::TimedOut => ConnectError::Timeout {
            path: path.to_owned(),
            port,
        },
        _ => ConnectError::Socket {
            path: path.to_owned(),
            source,
        },
    })?;
    match handshake(&mut stream, port, deadline) {
        Ok(Answer::Connected) => Ok(stream),
        Ok(Answer::HungUp) => Err(ConnectError::Refused {
            path: path.to_owned(),
            port,
        }),
        Ok(Answer::Other(line)) => Err(ConnectError::BadAnswer {
            path: path.to_owned(),
            port,
            line: String::from_utf8_lossy(&line).into_owned(),
        }),
        Err(source) if is_timeout(&source) => Err(ConnectError::Timeout {
            path: path.to_owned(),
            port,
        }),
        Err(source) => Err(ConnectError::Io {
            path: path.to_owned(),
            port,
            source,
        }),
    }
}

/// The same, but not put off by a VMM that hangs up because the guest took long to answer (ours gives it 5 s): one whose
/// memory comes as it is needed, on a busy machine, may. A refusal within a second is the guest's own, and final.
pub fn connect_patiently(
    path: &Path,
    port: u32,
    deadline: Instant,
) -> Result<UnixStream, ConnectError> {
    loop {
        let started = Instant::now();
        match connect(path, port, deadline) {
            Err(ConnectError::Refused { .. })
                if started.elapsed() >= AT_ONCE && Instant::now() < deadline => {}
            outcome => return outcome,
        }
    }
}

/// True for the ways a socket with a time limit says that it passed.
pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// What is left until `deadline`, as a socket time limit: never zero, which would mean none.
pub(crate) fn remaining(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left.max(Duration::from_micros(1)))
}

/// A connect that keeps the deadline even when the accept queue is full, where a blocking one
/// would hang.
fn connect_socket(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) => std::thread::sleep(remaining(deadline)?.min(RETRY)),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

enum Answer {
    Connected,
    HungUp,
    Other(Vec<u8>),
}

fn handshake(stream: &mut UnixStream, port: u32, deadline: Instant) -> io::Result<Answer> {
    stream.set_write_timeout(Some(remaining(deadline)?))?;
    match stream.write_all(format!("CONNECT {port}\n").as_bytes()) {
        Ok(()) => {}
        Err(error) if is_hang_up(&error) => return Ok(Answer::HungUp),
        Err(error) => return Err(error),
    }
    let mut line = Vec::with_capacity(MAX_LINE);
    loop {
        stream.set_read_timeout(Some(remaining(deadline)?))?;
        let taken = match read_line_part(stream, MAX_LINE.saturating_sub(line.len())) {
            Ok(part) => part,
            Err(error) if is_hang_up(&error) => return Ok(Answer::HungUp),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if taken.is_empty() {
            return Ok(if line.is_empty() {
                Answer::HungUp
            } else {
                Answer::Other(line)
            });
        }
        line.extend_from_slice(&taken);
        if line.ends_with(b"\n") || line.len() >= MAX_LINE {
            break;
        }
    }
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(if is_ok(&line) {
        Answer::Connected
    } else {
        Answer::Other(line)
    })
}

/// Takes bytes up to and including the first newline: looks first, so that the guest's bytes behind
/// it stay in the socket.
fn read_line_part(stream: &mut UnixStream, limit: usize) -> io::Result<Vec<u8>> {
    let mut seen = [0_u8; MAX_LINE];
    let window = seen.get_mut(..limit).unwrap_or_default();
    let (_, got) = rustix::net::recv(&*stream, &mut *window, RecvFlags::PEEK)?;
    let seen = window.get(..got).unwrap_or_default();
    let length = seen
        .iter()
        .position(|&byte| byte == b'\n')
        .map_or(seen.len(), |at| at.saturating_add(1));
    let mut part = vec![0; length];
    stream.read_exact(&mut part)?;
    Ok(part)
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof
    )
}

fn is_ok(line: &[u8]) -> bool {
    line.strip_prefix(b"OK ")
        .and_then(|rest| rest.strip_suffix(b"\n"))
        .and_then(|number| std::str::from_utf8(number).ok())
        .is_some_and(|number| number.parse::<u32>().is_ok())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    /// A VMM that answers one connection with `answer`.
    fn with_vmm(answer: &'static [u8], test: impl FnOnce(&Path)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let vmm = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 1024\n");
            for byte in answer {
                stream.write_all(std::slice::from_ref(byte)).unwrap();
            }
        });
        test(&path);
        vmm.join().unwrap();
    }

    #[test]
    fn the_guests_first_bytes_stay_in_the_stream() {
        with_vmm(b"OK 1073741824\nhello\n", |path| {
            let mut stream = connect(path, 1024, soon()).unwrap();
            let mut rest = String::new();
            stream.read_to_string(&mut rest).unwrap();
            assert_eq!(rest, "hello\n");
        });
    }

    #[test]
    fn a_hang_up_is_a_refusal() {
        with_vmm(b"", |path| {
            let error = connect(path, 1024, soon()).unwrap_err();
            assert!(matches!(error, ConnectError::Refused { port: 1024, .. }));
        });
    }

    #[test]
    fn a_guest_that_is_slow_is_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let vmm = thread::spawn(move || {
            let (mut slow, _) = listener.accept().unwrap();
            slow.read_exact(&mut [0; 13]).unwrap();
            thread::sleep(AT_ONCE);
            drop(slow);
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 13]).unwrap();
            stream.write_all(b"OK 1\n").unwrap();
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        connect_patiently(&path, 1024, deadline).unwrap();
        vmm.join().unwrap();
    }

    #[test]
    fn other_answers_are_named_and_bounded() {
        for answer in [&b"HTTP/1.1 400 Bad Request\r\n"[..], &[b'x'; 20], b"OK\n"] {
            with_vmm(answer, |path| {
                let error = connect(path, 1024, soon()).unwrap_err();
                assert!(matches!(error, ConnectError::BadAnswer { .. }), "{error}");
            });
        }
    }

    #[test]
    fn silence_ends_at_the_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let _listener = UnixListener::bind(&path).unwrap();
        let deadline = Instant::now() + Duration::from_millis(50);
        let error = connect(&path, 1024, deadline).unwrap_err();
        assert!(matches!(error, ConnectError::Timeout { .. }), "{error}");
    }

    #[test]
    fn a_missing_socket_is_named() {
        let path = Path::new("/nonexistent/vsock");
        let error = connect(path, 1024, soon()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/vsock"), "{error}");
        let long = PathBuf::from(format!("/{}", "x".repeat(200)));
        assert!(matches!(
            connect(&long, 1024, soon()),
            Err(ConnectError::Socket { .. })
        ));
    }
}
