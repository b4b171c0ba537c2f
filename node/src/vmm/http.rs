//! The little HTTP/1.1 that the VMM's API needs: requests in one write, responses cut out of a byte stream.

use std::fmt::Write as _;

/// Longest response, head and body.
const RESPONSE_MAX: usize = 256 * 1024;
const HEADERS_MAX: usize = 32;

/// What came is not a response of the API.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HttpError {
    #[error("it sent something that is not HTTP ({0})")]
    Malformed(httparse::Error),
    #[error("it sent a response without a usable length")]
    NoLength,
    #[error("it sent more than {RESPONSE_MAX} bytes")]
    TooLong,
}

/// A complete response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Response {
    /// The message of a refused call, or what there is instead of one.
    #[must_use]
    pub fn fault_message(&self) -> String {
        #[derive(serde::Deserialize)]
        struct Fault {
            fault_message: String,
        }
        serde_json::from_slice::<Fault>(&self.body).map_or_else(
            |_| {
                let text = String::from_utf8_lossy(&self.body);
                format!("status {} {}", self.status, text.trim())
            },
            |fault| fault.fault_message,
        )
    }
}

/// Appends a request with a JSON body, or none if that is empty.
pub(super) fn put_request(out: &mut Vec<u8>, method: &str, path: &str, body: &[u8]) {
    put_request_with(out, method, path, body, &[]);
}

/// The same with the names of the descriptors that come with it.
pub(super) fn put_request_with(
    out: &mut Vec<u8>,
    method: &str,
    path: &str,
    body: &[u8],
    descriptors: &[&str],
) {
    let mut head = String::new();
    let named = match descriptors {
        [] => String::new(),
        names => format!("Belljar-Fds: {}\r\n", names.join(", ")),
    };
    // Writing to a string does not fail.
    let _ = write!(
        head,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\n{named}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(body);
}

/// Cuts responses out of what arrives.
#[derive(Debug, Default)]
pub(super) struct ResponseReader {
    pending: Vec<u8>,
}

impl ResponseReader {
    /// Takes bytes as they come.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The next complete response, if it is all there.
    ///
    /// # Errors
    /// What came is not a response, or too long for one.
    pub(super) fn next_response(&mut self) -> Result<Option<Response>, HttpError> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut head = httparse::Response::new(&mut headers);
        let parsed = head.parse(&self.pending).map_err(HttpError::Malformed)?;
        let httparse::Status::Complete(head_length) = parsed else {
            return self.incomplete();
        };
        let status = head.code.unwrap_or(0);
        let body_length = match content_length(head.headers)? {
            Some(length) => length,
            None if status == 204 || status / 100 == 1 => 0,
            None => return Err(HttpError::NoLength),
        };
        let total = head_length
            .checked_add(body_length)
            .filter(|total| *total <= RESPONSE_MAX)
            .ok_or(HttpError::TooLong)?;
        let Some(body) = self.pending.get(head_length..total) else {
            return self.incomplete();
        };
        let body = body.to_vec();
        self.pending.drain(..total);
        Ok(Some(Response { status, body }))
    }

    fn incomplete(&self) -> Result<Option<Response>, HttpError> {
        if self.pending.len() > RESPONSE_MAX {
            Err(HttpError::TooLong)
        } else {
            Ok(None)
        }
    }
}

fn content_length(headers: &[httparse::Header<'_>]) -> Result<Option<usize>, HttpError> {
    headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .map(|header| {
            std::str::from_utf8(header.value)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .ok_or(HttpError::NoLength)
        })
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ANSWERS: &[u8] = b"HTTP/1.1 204 \r\nServer: x\r\n\r\nHTTP/1.1 400 Bad Request\r\n\
        content-length: 25\r\n\r\n{\"fault_message\":\"no way\"}HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";

    fn read_all(cuts: &[usize]) -> Vec<Response> {
        let answers = String::from_utf8_lossy(ANSWERS).replace("length: 25", "length: 26");
        let mut reader = ResponseReader::default();
        let mut responses = Vec::new();
        let mut rest = answers.as_bytes();
        for cut in cuts.iter().cycle() {
            let (head, tail) = rest.split_at((*cut).min(rest.len()));
            reader.push(head);
            while let Some(response) = reader.next_response().unwrap() {
                responses.push(response);
            }
            rest = tail;
            if rest.is_empty() {
                break;
            }
        }
        responses
    }

    #[test]
    fn faults_are_read() {
        let responses = read_all(&[1000]);
        let statuses: Vec<u16> = responses.iter().map(|r| r.status).collect();
        assert_eq!(statuses, [204, 400, 200]);
        assert_eq!(responses[1].fault_message(), "no way");
        assert_eq!(responses[2].fault_message(), "status 200 {}");
    }

    #[test]
    fn nonsense_is_an_error() {
        let read = |bytes: &[u8]| {
            let mut reader = ResponseReader::default();
            reader.push(bytes);
            reader.next_response()
        };
        assert!(matches!(
            read(b"SSH-2.0\r\n\r\n"),
            Err(HttpError::Malformed(_))
        ));
        assert_eq!(
            read(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"),
            Err(HttpError::NoLength)
        );
        assert_eq!(
            read(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"),
            Err(HttpError::TooLong)
        );
        assert_eq!(read(b"HTTP/1.1 200 OK\r\n\r\n"), Err(HttpError::NoLength));
    }

    proptest! {
        #[test]
        fn any_cutting_gives_the_same(cuts in prop::collection::vec(1usize..50, 1..20)) {
            prop_assert_eq!(read_all(&cuts), read_all(&[1000]));
        }

        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut reader = ResponseReader::default();
            reader.push(b"HTTP/1.1 ");
            reader.push(&bytes);
            let _ = reader.next_response();
        }
    }
}
