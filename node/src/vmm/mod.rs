//! The VMM's control API, as far as this crate uses it.

mod config;
mod http;

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

pub use config::{CacheType, Call, Config, Drive, Format};
pub use http::{HttpError, Response};

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("the VMM refused {method} {path}: {fault}")]
    Refused {
        method: &'static str,
        path: String,
        fault: String,
    },
    #[error("the VMM's API did not answer {method} {path} within {} ms", limit.as_millis())]
    TimedOut {
        method: &'static str,
        path: String,
        limit: Duration,
    },
    #[error("the VMM did not say what became of {method} {path}: {fault}")]
    Unanswered {
        method: &'static str,
        path: String,
        fault: String,
    },
    #[error("the VMM closed its API before it answered {method} {path}")]
    Closed { method: &'static str, path: String },
    #[error("the VMM's API broke off at {method} {path}: {source}")]
    Broken {
        method: &'static str,
        path: String,
        source: HttpError,
    },
    #[error("the VMM's API cannot be used: {0}")]
    Io(#[from] io::Error),
}

/// Makes the calls in order over one connection: all requests leave in one write, so that the VMM is
/// never waited for between two of them. A refusal does not stop the calls behind it: the first one is
/// reported, and the caller tears the VMM down. `answered` is told the index of each answered call.
///
/// # Errors
/// The first call that was refused, or what happened to the connection.
pub fn run_calls(
    stream: &mut UnixStream,
    calls: &[Call],
    deadline: Instant,
    mut answered: impl FnMut(usize),
) -> Result<(), ApiError> {
    let begin = Instant::now();
    let mut requests = Vec::new();
    for call in calls {
        http::put_request(&mut requests, "PUT", &call.path, &call.body);
    }
    stream.set_write_timeout(Some(time_left(deadline)))?;
    stream.write_all(&requests)?;

    let mut reader = http::ResponseReader::default();
    for (index, call) in calls.iter().enumerate() {
        let response = next_response(stream, &mut reader, ("PUT", &call.path), begin, deadline)?;
        if response.status / 100 != 2 {
            return Err(ApiError::Refused {
                method: "PUT",
                path: call.path.clone(),
                fault: response.fault_message(),
            });
        }
        answered(index);
    }
    Ok(())
}

/// Makes one call, and returns its answer if that is not a refusal.
///
/// # Errors
/// It was refused, or what happened to the connection.
pub fn request(
    stream: &mut UnixStream,
    method: &'static str,
    path: &str,
    body: &[u8],
    deadline: Instant,
) -> Result<Response, ApiError> {
    request_with(stream, (method, path), body, &[], deadline)
}

/// The same with descriptors, which the body names as `fd:NAME`.
///
/// # Errors
/// It was refused, or what happened to the connection.
pub fn request_with(
    stream: &mut UnixStream,
    (method, path): (&'static str, &str),
    body: &[u8],
    descriptors: &[(&str, BorrowedFd<'_>)],
    deadline: Instant,
) -> Result<Response, ApiError> {
    let begin = Instant::now();
    let mut bytes = Vec::new();
    let names: Vec<&str> = descriptors.iter().map(|(name, _)| *name).collect();
    http::put_request_with(&mut bytes, method, path, body, &names);
    stream.set_write_timeout(Some(time_left(deadline)))?;
    let sent = send_with(stream, &bytes, descriptors)?;
    stream.write_all(bytes.get(sent..).unwrap_or_default())?;
    let mut reader = http::ResponseReader::default();
    let response = next_response(stream, &mut reader, (method, path), begin, deadline)?;
    let (path, fault) = (path.to_owned(), response.fault_message());
    match response.status / 100 {
        2 => Ok(response),
        // It may still take effect.
        5 => Err(ApiError::Unanswered {
            method,
            path,
            fault,
        }),
        _ => Err(ApiError::Refused {
            method,
            path,
            fault,
        }),
    }
}

/// Most descriptors of a call.
const MAX_DESCRIPTORS: usize = 32;

/// Sends the beginning of a request, and all descriptors with it. Returns how much was sent.
fn send_with(
    stream: &UnixStream,
    bytes: &[u8],
    descriptors: &[(&str, BorrowedFd<'_>)],
) -> io::Result<usize> {
    if descriptors.is_empty() {
        return Ok(0);
    }
    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(|(_, fd)| *fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
    let message = rustix::net::SendAncillaryMessage::ScmRights(&descriptors);
    if !ancillary.push(message) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = rustix::net::SendFlags::NOSIGNAL;
    Ok(rustix::net::sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        flags,
    )?)
}

fn next_response(
    stream: &mut UnixStream,
    reader: &mut http::ResponseReader,
    (method, path): (&'static str, &str),
    begin: Instant,
    deadline: Instant,
) -> Result<Response, ApiError> {
    let path = || path.to_owned();
    loop {
        let parsed = reader.next_response().map_err(|source| ApiError::Broken {
            method,
            path: path(),
            source,
        })?;
        if let Some(response) = parsed {
            return Ok(response);
        }
        stream.set_read_timeout(Some(time_left(deadline)))?;
        let mut buffer = [0u8; 4096];
        match stream.read(&mut buffer) {
            Ok(0) => {
                return Err(ApiError::Closed {
                    method,
                    path: path(),
                });
            }
            Ok(count) => reader.push(buffer.get(..count).unwrap_or_default()),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::ConnectionReset => {
                    return Err(ApiError::Closed {
                        method,
                        path: path(),
                    });
                }
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    return Err(ApiError::TimedOut {
                        method,
                        path: path(),
                        limit: begin.elapsed(),
                    });
                }
                _ => return Err(error.into()),
            },
        }
    }
}

/// Never zero, which would mean no limit at all.
fn time_left(deadline: Instant) -> Duration {
    deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(path: &str) -> Call {
        Call {
            path: path.into(),
            body: b"{}".to_vec(),
        }
    }

    fn run(answers: &[u8]) -> (Result<(), ApiError>, Vec<usize>) {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(answers).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let mut seen = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(5);
        let result = run_calls(&mut ours, &[call("/a"), call("/b")], deadline, |index| {
            seen.push(index);
        });
        (result, seen)
    }

    #[test]
    fn the_first_refusal_is_named_with_its_fault() {
        let (result, seen) = run(
            b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 400 Bad Request\r\nContent-Length: 24\r\n\r\n{\"fault_message\":\"nope\"}",
        );
        assert_eq!(
            result.unwrap_err().to_string(),
            "the VMM refused PUT /b: nope"
        );
        assert_eq!(seen, [0]);
    }

    #[test]
    fn an_end_in_the_middle_is_named() {
        let (result, seen) = run(b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 2");
        assert!(matches!(result, Err(ApiError::Closed { path, .. }) if path == "/b"));
        assert_eq!(seen, [0]);
    }

    #[test]
    fn silence_ends_at_the_deadline() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let deadline = Instant::now() + Duration::from_millis(30);
        let result = run_calls(&mut ours, &[call("/a")], deadline, |_| {});
        assert!(matches!(result, Err(ApiError::TimedOut { .. })));
    }
}
