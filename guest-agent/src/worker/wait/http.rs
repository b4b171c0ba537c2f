//! As much of HTTP/1.1 (RFC 9112) as asking for a status takes: pure.

/// Bytes of interim answers and status lines that are read at most.
const MAX_HEAD: usize = 16 << 10;

/// A GET request.
#[derive(Debug)]
pub(super) struct Request(Vec<u8>);

impl Request {
    /// `None`: path or host cannot stand in a request. Empty ones have defaults.
    pub(super) fn new(path: &str, host: &str, port: u16) -> Option<Self> {
        let fits = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        let path = if path.is_empty() { "/" } else { path };
        if !path.starts_with('/') || !fits(path) || !fits(host) || path.len() + host.len() > 4096 {
            return None;
        }
        let host = if host.is_empty() {
            format!("localhost:{port}")
        } else {
            host.to_owned()
        };
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: belljar\r\nAccept: */*\r\nConnection: close\r\n\r\n"
        );
        Some(Self(head.into_bytes()))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// It is no HTTP.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotHttp;

/// Reads an answer up to its final status.
#[derive(Debug, Default)]
pub(super) struct StatusReader {
    line: Vec<u8>,
    taken: usize,
    /// In the header of an interim answer (1xx).
    in_header: bool,
}

impl StatusReader {
    /// Takes bytes as they come. `None`: more are needed.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<Option<u16>, NotHttp> {
        for byte in bytes {
            self.taken = self.taken.saturating_add(1);
            if self.taken > MAX_HEAD {
                return Err(NotHttp);
            }
            if *byte != b'\n' {
                self.line.push(*byte);
                // What cannot become a status line any more is not waited for.
                if !self.in_header && !could_be_status(&self.line) {
                    return Err(NotHttp);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let line = line.strip_suffix(b"\r").unwrap_or(&line);
            if self.in_header {
                self.in_header = !line.is_empty();
            } else if !line.is_empty() {
                match parse(line).ok_or(NotHttp)? {
                    100..=199 => self.in_header = true,
                    status => return Ok(Some(status)),
                }
            }
        }
        Ok(None)
    }
}

fn could_be_status(line: &[u8]) -> bool {
    let start = b"HTTP/1.";
    line == b"\r" || start.iter().zip(line).all(|(a, b)| a == b)
}

/// `HTTP/1.x NNN …`
fn parse(line: &[u8]) -> Option<u16> {
    let rest = line.strip_prefix(b"HTTP/1.")?;
    let [minor, b' ', status @ ..] = rest else {
        return None;
    };
    let (digits, rest) = status.split_at_checked(3)?;
    let ends = matches!(rest.first(), None | Some(b' '));
    if !minor.is_ascii_digit() || !ends {
        return None;
    }
    let status = digits.iter().try_fold(0_u16, |sum, digit| {
        digit
            .is_ascii_digit()
            .then(|| sum * 10 + u16::from(digit - b'0'))
    })?;
    (100..=999).contains(&status).then_some(status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn status(answer: &[u8]) -> Result<Option<u16>, NotHttp> {
        StatusReader::default().feed(answer)
    }

    #[test]
    fn a_status_is_read() {
        assert_eq!(status(b"HTTP/1.1 200 OK\r\n"), Ok(Some(200)));
        assert_eq!(status(b"HTTP/1.0 404\n"), Ok(Some(404)));
        assert_eq!(status(b"\r\nHTTP/1.1 204 \r\n"), Ok(Some(204)));
        let interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 301 Moved\r\n";
        assert_eq!(status(interim), Ok(Some(301)));
        assert_eq!(status(b"HTTP/1.1 20"), Ok(None));
    }

    #[test]
    fn anything_else_is_none() {
        for answer in [
            &b"SSH-2.0-OpenSSH"[..],
            b"HTTP/2 200\r\n",
            b"HTTP/1.1 2000 OK\r\n",
            b"HTTP/1.1 20x OK\r\n",
            b"HTTP/1.1 099 OK\r\n",
            b"HTTP/1.1\r\n",
        ] {
            assert_eq!(status(answer), Err(NotHttp), "{answer:?}");
        }
        let endless = [&b"HTTP/1.1 100 \r\n"[..], &vec![b'x'; MAX_HEAD]].concat();
        assert_eq!(status(&endless), Err(NotHttp));
    }

    #[test]
    fn a_request_holds_what_is_asked_for_and_nothing_else() {
        let request = Request::new("/a?b", "", 80).unwrap();
        assert!(
            request
                .bytes()
                .starts_with(b"GET /a?b HTTP/1.1\r\nHost: localhost:80\r\n")
        );
        for (path, host) in [
            ("a", ""),
            ("/a b", ""),
            ("/a\r\nX: y", ""),
            ("/", "a\nb"),
            ("/ä", ""),
        ] {
            assert!(Request::new(path, host, 80).is_none(), "{path:?} {host:?}");
        }
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(code in 200_u16..1000, text in "[ -~]{0,40}", at in 0_usize..60) {
            let answer = format!("HTTP/1.1 {code} {text}\r\nA: b\r\n\r\n").into_bytes();
            let (first, second) = answer.split_at(at.min(answer.len()));
            let mut reader = StatusReader::default();
            let found = reader.feed(first).unwrap().or_else(|| reader.feed(second).unwrap());
            prop_assert_eq!(found, Some(code));
        }

        #[test]
        fn no_bytes_make_it_panic_or_grow(pieces in proptest::collection::vec(any::<Vec<u8>>(), 0..20)) {
            let mut reader = StatusReader::default();
            for piece in pieces {
                if reader.feed(&piece) != Ok(None) {
                    break;
                }
                prop_assert!(reader.line.len() <= MAX_HEAD);
            }
        }
    }
}
