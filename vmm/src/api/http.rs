//! HTTP/1.1, as much as the API needs: bytes in, a message or what is wrong with them. Pure.
use std::ops::Range;

use httparse::{Header, ParserConfig};

use super::{Body, Fault, Status};

/// Longest request line with headers, in bytes.
pub const MAX_HEAD: usize = 8 * 1024;
/// Longest body unless `--http-api-max-payload-size` says otherwise; Firecracker's.
pub const MAX_BODY: usize = 51_200;
/// Most headers of one request.
const MAX_HEADERS: usize = 48;
/// Most descriptors of one request.
pub const MAX_FDS: usize = 32;
/// Names the descriptors that came with a request, in their order, separated by commas.
const FDS_HEADER: &str = "Belljar-Fds";

/// Methods of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Put,
    Patch,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
        }
    }
}

/// One complete request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    pub method: Method,
    /// Begins with `/`.
    pub path: &'a str,
    pub body: &'a [u8],
    /// What the `Belljar-Fds` header names.
    pub fd_names: Vec<&'a str>,
    /// The client wants to use the connection again.
    pub keep_alive: bool,
}

/// How far a request has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// More bytes must come; the head is complete and the client waits for `100 Continue`.
    Partial { wants_continue: bool },
    /// `length` bytes of the input belong to the message.
    Complete { message: Message<'a>, length: usize },
}

/// Looks at what has arrived of one request. A fault means that the stream cannot be trusted
/// any more: answer it and close.
pub fn parse(input: &[u8], max_body: usize) -> Result<Parsed<'_>, Fault> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let visible = input.get(..MAX_HEAD).unwrap_or(input);
    let status = ParserConfig::default()
        .parse_request(&mut head, visible)
        .map_err(|e| match e {
            httparse::Error::TooManyHeaders => {
                Fault::new(format!("Invalid request: more than {MAX_HEADERS} headers."))
            }
            e => Fault::new(format!("Invalid request: {e}.")),
        })?;
    let head_length = match status {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial if input.len() >= MAX_HEAD => {
            return Err(Fault::new(format!(
                "Invalid request: request line and headers exceed {MAX_HEAD} bytes."
            )));
        }
        httparse::Status::Partial => {
            return Ok(Parsed::Partial {
                wants_continue: false,
            });
        }
    };
    let framing = Framing::from_headers(head.headers)?;
    let body = framing.body_range(head_length, max_body)?;
    let path = absolute_path(head.path.unwrap_or("/"));
    let method = method(head.method.unwrap_or(""), path)?;
    let Some(bytes) = input.get(body.clone()) else {
        return Ok(Parsed::Partial {
            wants_continue: framing.wants_continue && input.len() == head_length,
        });
    };
    Ok(Parsed::Complete {
        message: Message {
            method,
            path,
            body: bytes,
            fd_names: fd_names(head.headers)?,
            // HTTP/1.0 closes by default.
            keep_alive: framing.connection.unwrap_or(head.version == Some(1)),
        },
        length: body.end,
    })
}

fn method(name: &str, path: &str) -> Result<Method, Fault> {
    match name {
        "GET" => Ok(Method::Get),
        "PUT" => Ok(Method::Put),
        "PATCH" => Ok(Method::Patch),
        other => Err(Fault::new(format!(
            "Invalid request method and/or path: {other} {path}."
        ))),
    }
}

/// `/a/b` out of `/a/b` or of `http://localhost/a/b`.
fn absolute_path(target: &str) -> &str {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/"),
        None => target,
    }
}

/// What the headers say about the message's end and the connection's.
#[derive(Default)]
struct Framing {
    content_length: Option<usize>,
    connection: Option<bool>,
    wants_continue: bool,
}

impl Framing {
    fn from_headers(headers: &[Header<'_>]) -> Result<Self, Fault> {
        let mut framing = Self::default();
        for header in headers {
            let name = header.name;
            if name.eq_ignore_ascii_case("Content-Length") {
                let length = decimal(header.value).ok_or_else(|| {
                    Fault::new("Invalid request: Content-Length is not a number.")
                })?;
                if framing.content_length.is_some_and(|n| n != length) {
                    return Err(Fault::new(
                        "Invalid request: two different Content-Length headers.",
                    ));
                }
                framing.content_length = Some(length);
            } else if name.eq_ignore_ascii_case("Transfer-Encoding") {
                return Err(Fault::new(
                    "Invalid request: Transfer-Encoding is not offered; send Content-Length.",
                ));
            } else if name.eq_ignore_ascii_case("Connection") {
                if has_token(header.value, "close") {
                    framing.connection = Some(false);
                } else if has_token(header.value, "keep-alive") {
                    framing.connection = Some(true);
                }
            } else if name.eq_ignore_ascii_case("Expect") {
                if !header.value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(Fault::new("Invalid request: unknown Expect header."));
                }
                framing.wants_continue = true;
            }
        }
        Ok(framing)
    }

    fn body_range(&self, head_length: usize, max_body: usize) -> Result<Range<usize>, Fault> {
        let length = self.content_length.unwrap_or(0);
        if length > max_body {
            return Err(Fault::with_status(
                Status::PayloadTooLarge,
                format!(
                    "Request payload with size {length} is larger than the limit of {max_body} allowed by server."
                ),
            ));
        }
        Ok(head_length..head_length.saturating_add(length))
    }
}

/// Decimal digits only: no sign, no spaces.
fn decimal(text: &[u8]) -> Option<usize> {
    if text.is_empty() || text.len() > 18 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn has_token(value: &[u8], token: &str) -> bool {
    value
        .split(|b| *b == b',')
        .any(|t| t.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

fn fd_names<'a>(headers: &[Header<'a>]) -> Result<Vec<&'a str>, Fault> {
    let mut names: Vec<&str> = Vec::new();
    for header in headers {
        if !header.name.eq_ignore_ascii_case(FDS_HEADER) {
            continue;
        }
        let value = std::str::from_utf8(header.value)
            .map_err(|_| Fault::new(format!("{FDS_HEADER}: not text")))?;
        for name in value.split(',').map(str::trim) {
            crate::config::check_fd_name(name)
                .map_err(|e| Fault::new(format!("{FDS_HEADER}: {e}")))?;
            if names.contains(&name) {
                return Err(Fault::new(format!("{FDS_HEADER}: {name:?} is there twice")));
            }
            if names.len() >= MAX_FDS {
                return Err(Fault::new(format!(
                    "{FDS_HEADER}: more than {MAX_FDS} names"
                )));
            }
            names.push(name);
        }
    }
    Ok(names)
}

/// The bytes of an answer.
pub fn response(outcome: &Result<Body, Fault>, keep_alive: bool) -> Vec<u8> {
    let (code, reason, body) = match outcome {
        Ok(Body::Empty) => (204, "No Content", None),
        Ok(Body::Json(text)) => (200, "OK", Some(text.clone())),
        Err(fault) => (
            fault.status.code(),
            fault.status.reason(),
            Some(fault.to_json()),
        ),
    };
    let connection = if keep_alive { "keep-alive" } else { "close" };
    let mut text =
        format!("HTTP/1.1 {code} {reason}\r\nServer: Bell Jar API\r\nConnection: {connection}\r\n");
    match body {
        // RFC 9110 §8.6: no Content-Length with 204.
        None => text.push_str("\r\n"),
        Some(body) => {
            text.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                body.len()
            ));
            text.push_str(&body);
        }
    }
    text.into_bytes()
}

/// What a client that sent `Expect: 100-continue` waits for.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn complete(input: &str) -> (Message<'_>, usize) {
        match parse(input.as_bytes(), MAX_BODY) {
            Ok(Parsed::Complete { message, length }) => (message, length),
            other => panic!("{other:?}"),
        }
    }

    fn fault(input: &str) -> Fault {
        parse(input.as_bytes(), MAX_BODY).unwrap_err()
    }

    #[test]
    fn a_put_with_body_and_what_follows_it() {
        let text = "PUT /vsock HTTP/1.1\r\nHost: x\r\ncontent-length: 2\r\n\r\n{}GET /";
        let (message, length) = complete(text);
        assert_eq!(message.method, Method::Put);
        assert_eq!(message.path, "/vsock");
        assert_eq!(message.body, b"{}");
        assert!(message.keep_alive);
        assert_eq!(&text[length..], "GET /");
    }

    #[test]
    fn connection_header_and_version_decide_keep_alive() {
        for (text, keep) in [
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nConnection: x, close\r\n\r\n", false),
        ] {
            assert_eq!(complete(text).0.keep_alive, keep, "{text}");
        }
    }

    #[test]
    fn absolute_targets_are_understood() {
        assert_eq!(
            complete("GET http://localhost/vm/config HTTP/1.1\r\n\r\n")
                .0
                .path,
            "/vm/config"
        );
        assert_eq!(
            complete("GET http://localhost HTTP/1.1\r\n\r\n").0.path,
            "/"
        );
    }

    #[test]
    fn bad_framing_is_refused() {
        for head in [
            "Content-Length: -1",
            "Content-Length: +1",
            "Content-Length: 1 1",
            "Content-Length: ",
            "Content-Length: 99999999999999999999",
            "Content-Length: 1\r\nContent-Length: 2",
            "Transfer-Encoding: chunked",
            "Expect: something",
            "Belljar-Fds: a,a",
            "Belljar-Fds: a b",
            "Belljar-Fds:",
        ] {
            let text = format!("PUT / HTTP/1.1\r\n{head}\r\n\r\n");
            assert_eq!(fault(&text).status, Status::BadRequest, "{head}");
        }
        assert!(
            fault("DELETE /x HTTP/1.1\r\n\r\n")
                .message
                .contains("DELETE /x")
        );
    }

    #[test]
    fn sizes_are_bounded() {
        let big = format!("PUT / HTTP/1.1\r\nContent-Length: {}\r\n\r\n", MAX_BODY + 1);
        assert_eq!(fault(&big).status, Status::PayloadTooLarge);
        let exact = format!("PUT / HTTP/1.1\r\nContent-Length: {MAX_BODY}\r\n\r\n");
        assert!(matches!(
            parse(exact.as_bytes(), MAX_BODY),
            Ok(Parsed::Partial { .. })
        ));
        let endless = format!("GET / HTTP/1.1\r\nX: {}", "y".repeat(MAX_HEAD));
        assert!(fault(&endless).message.contains("8192"));
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "A: b\r\n".repeat(MAX_HEADERS + 1)
        );
        assert!(fault(&many).message.contains("headers"));
    }

    #[test]
    fn descriptors_are_named_in_order() {
        let (message, _) =
            complete("PUT / HTTP/1.1\r\nBelljar-Fds: a, b\r\nbelljar-fds: c\r\n\r\n");
        assert_eq!(message.fd_names, ["a", "b", "c"]);
    }

    #[test]
    fn continue_is_wanted_only_before_the_body() {
        let head = "PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n";
        let wants = |text: &str| match parse(text.as_bytes(), MAX_BODY) {
            Ok(Parsed::Partial { wants_continue }) => wants_continue,
            other => panic!("{other:?}"),
        };
        assert!(wants(head));
        assert!(!wants(&format!("{head}a")));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let _ = parse(&bytes, MAX_BODY);
        }

        /// Half a request is never an error and never complete; the whole one always is.
        #[test]
        fn a_request_is_complete_exactly_at_its_end(
            path in "/[a-z_/]{0,20}",
            body in proptest::collection::vec(any::<u8>(), 0..64),
            extra in proptest::collection::vec(any::<u8>(), 0..16),
        ) {
            let mut text = format!("PUT {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
            text.extend_from_slice(&body);
            let end = text.len();
            for cut in 0..end {
                let partial = matches!(parse(&text[..cut], MAX_BODY), Ok(Parsed::Partial { .. }));
                prop_assert!(partial, "cut at {}", cut);
            }
            text.extend_from_slice(&extra);
            match parse(&text, MAX_BODY) {
                Ok(Parsed::Complete { message, length }) => {
                    prop_assert_eq!(length, end);
                    prop_assert_eq!(message.body, &body[..]);
                    prop_assert_eq!(message.path, path);
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}
