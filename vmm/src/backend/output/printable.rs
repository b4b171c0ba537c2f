//! A guest's words on an operator's terminal.

/// Text of a guest for logs and error messages: lossy UTF-8 in which escape sequences are gone
/// and other control characters are `?`. Only line ends and tabs remain, so that a guest can
/// neither drive a terminal nor hide what it wrote.
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\n' | '\t' => out.push(c),
            '\r' => {}
            '\u{1b}' if chars.next_if_eq(&'[').is_some() => {
                // A control sequence ends with a byte of 0x40 to 0x7e (ECMA-48 §5.4).
                while chars.next_if(|c| matches!(c, ' '..='?')).is_some() {}
                chars.next_if(|c| matches!(c, '@'..='~'));
            }
            c if c.is_control() || is_bidi(c) => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

/// Characters that turn the direction of text.
fn is_bidi(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sequences_vanish_and_controls_show() {
        let text = b"\x1b[1;31mpanic\x1b[0m:\ttab\r\n\x07bell \x1b]0;title\xff";
        assert_eq!(printable(text), "panic:\ttab\n?bell ?]0;title\u{fffd}");
        assert_eq!(printable("\u{9b}31m\u{202e}abc".as_bytes()), "?31m?abc");
        assert_eq!(printable(b"\x1b["), "");
        assert_eq!(printable(b"\x1b[3\x1b[4mx"), "x");
    }

    proptest! {
        #[test]
        fn nothing_controls_a_terminal(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let text = printable(&bytes);
            prop_assert!(text.chars().all(|c| c == '\n' || c == '\t' || !c.is_control()));
        }
    }
}
