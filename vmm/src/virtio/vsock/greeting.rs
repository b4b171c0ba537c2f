//! The first line of a connection from the host: `CONNECT <port>\n`.

/// Longest line, its newline included. `CONNECT 4294967295\r\n` has 20 bytes.
pub const MAX_LINE: usize = 32;

/// How far a greeting came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// No newline yet, and room for one.
    Incomplete,
    /// The guest's port, and where the bytes after the line begin.
    Connect { port: u32, end: usize },
    /// Not a greeting.
    Bad,
}

/// Reads the line at the start of `bytes`. As Firecracker does, the word may have any case and
/// the words any number of blanks between and after them.
pub fn parse(bytes: &[u8]) -> Greeting {
    let window = bytes.get(..MAX_LINE).unwrap_or(bytes);
    let Some(newline) = window.iter().position(|&byte| byte == b'\n') else {
        return if bytes.len() < MAX_LINE {
            Greeting::Incomplete
        } else {
            Greeting::Bad
        };
    };
    let mut words = window
        .get(..newline)
        .unwrap_or_default()
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    let (Some(verb), Some(port), None) = (words.next(), words.next(), words.next()) else {
        return Greeting::Bad;
    };
    match decimal(port) {
        Some(port) if verb.eq_ignore_ascii_case(b"connect") => Greeting::Connect {
            port,
            end: newline + 1,
        },
        _ => Greeting::Bad,
    }
}

/// Digits only: `str::parse` would take a sign.
fn decimal(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0u32, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|&digit| digit <= 9)?;
        value.checked_mul(10)?.checked_add(u32::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn greeting_names_a_port() {
        let port = |port, end| Greeting::Connect { port, end };
        assert_eq!(parse(b"CONNECT 52\n"), port(52, 11));
        assert_eq!(parse(b"CONNECT 52\nGET /"), port(52, 11));
        assert_eq!(parse(b"connect  4294967295 \r\n"), port(u32::MAX, 22));
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [
            "CONNECT\n",
            "\n",
            "CONNECT 4294967296\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 1 2\n",
            "GET / HTTP/1.1\n",
            "CONNECT 00000000000000000000000000001\n",
        ] {
            assert_eq!(parse(bad.as_bytes()), Greeting::Bad, "{bad:?}");
        }
    }

    proptest! {
        /// A line cut anywhere is incomplete, and never reads as something else.
        #[test]
        fn greeting_survives_any_split(port in any::<u32>(), cut in 0usize..40) {
            let line = format!("CONNECT {port}\n");
            let cut = cut.min(line.len());
            let whole = Greeting::Connect { port, end: line.len() };
            let expected = if cut == line.len() { whole } else { Greeting::Incomplete };
            prop_assert_eq!(parse(&line.as_bytes()[..cut]), expected);
        }

        #[test]
        fn greeting_ends_within_its_line(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            match parse(&bytes) {
                Greeting::Incomplete => prop_assert!(bytes.len() < MAX_LINE),
                Greeting::Connect { end, .. } => prop_assert!(end <= MAX_LINE.min(bytes.len())),
                Greeting::Bad => {}
            }
        }
    }
}
