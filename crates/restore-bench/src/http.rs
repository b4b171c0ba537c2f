//! As much HTTP as a VMM's API needs: one keep-alive connection, one call at a time.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::failure::{Attempt, Failure, Result};

/// Longest answer that makes sense.
const ANSWER_MAX: usize = 64 * 1024;

pub struct Client {
    stream: UnixStream,
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    pub fn get(&mut self, path: &str) -> Result<()> {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))?;
        self.answer(path)
    }

    /// A call with descriptors, which the body names as `fd:NAME`; of our own VMM only.
    pub fn put_with(
        &mut self,
        path: &str,
        body: &serde_json::Value,
        descriptors: &[(&str, BorrowedFd<'_>)],
    ) -> Result<()> {
        let names: Vec<&str> = descriptors.iter().map(|(name, _)| *name).collect();
        let body = body.to_string();
        let request = format!(
            "PUT {path} HTTP/1.1\r\nHost: localhost\r\nBelljar-Fds: {}\r\nContent-Length: {}\r\n\r\n{body}",
            names.join(", "),
            body.len()
        );
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(|(_, fd)| *fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(Failure("too many descriptors for a call".to_owned()));
        }
        let slices = [IoSlice::new(request.as_bytes())];
        let sent = sendmsg(&self.stream, &slices, &mut control, SendFlags::NOSIGNAL)
            .attempt("cannot send to the API")?;
        self.stream
            .write_all(request.as_bytes().get(sent..).unwrap_or_default())
            .attempt("cannot send to the API")?;
        self.answer(path)
    }

    pub fn put(&mut self, path: &str, body: &serde_json::Value) -> Result<()> {
        self.begin_put(path, body)?;
        self.answer(path)
    }

    /// A call whose answer has a JSON body.
    pub fn ask(&mut self, path: &str, body: &serde_json::Value) -> Result<serde_json::Value> {
        self.begin_put(path, body)?;
        let text = self.text(path)?;
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        serde_json::from_str(body).attempt(format!("the answer to {path} is no JSON"))
    }

    pub fn patch(&mut self, path: &str, body: &serde_json::Value) -> Result<()> {
        self.begin("PATCH", path, body)?;
        self.answer(path)
    }

    /// Sends a call whose answer is taken later with [`Self::answer`].
    pub fn begin_put(&mut self, path: &str, body: &serde_json::Value) -> Result<()> {
        self.begin("PUT", path, body)
    }

    fn begin(&mut self, method: &str, path: &str, body: &serde_json::Value) -> Result<()> {
        let body = body.to_string();
        let length = body.len();
        self.send(&format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        ))
    }

    fn send(&mut self, request: &str) -> Result<()> {
        self.stream
            .write_all(request.as_bytes())
            .attempt("cannot send to the API")
    }

    /// Takes one answer; anything but success is an error.
    pub fn answer(&mut self, path: &str) -> Result<()> {
        self.text(path).map(drop)
    }

    fn text(&mut self, path: &str) -> Result<String> {
        let mut taken = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            if let Some(status) = complete(&taken) {
                let text = String::from_utf8_lossy(&taken);
                return if status / 100 == 2 {
                    Ok(text.into_owned())
                } else {
                    Err(Failure(format!("{path} was refused: {text}")))
                };
            }
            let length = self
                .stream
                .read(&mut buffer)
                .attempt(format!("no answer to {path}"))?;
            if length == 0 || taken.len() > ANSWER_MAX {
                return Err(Failure(format!("{path} was not answered")));
            }
            taken.extend_from_slice(buffer.get(..length).unwrap_or_default());
        }
    }
}

/// The status of a response, once its head and body are all there.
fn complete(bytes: &[u8]) -> Option<u16> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Some(0), |(_, value)| value.trim().parse().ok())?;
    (body.len() >= length).then_some(status)
}

#[cfg(test)]
mod tests {
    use super::complete;

    #[test]
    fn an_answer_is_complete_with_its_body() {
        let answer = b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(complete(answer), Some(200));
        for cut in 0..answer.len() {
            assert_eq!(complete(answer.get(..cut).unwrap()), None, "{cut}");
        }
        assert_eq!(complete(b"HTTP/1.1 204 No Content\r\n\r\n"), Some(204));
    }
}
