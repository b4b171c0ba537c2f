//! Which modes of the user's terminal a program has switched on, so that they can be switched off when
//! the program is left before it does so itself.

/// DEC private modes that outlive a program noticeably, in the order in which they are reset: cursor keys,
/// mouse reporting and its encodings, focus events, bracketed paste, alternate screens.
const SET: [u16; 13] = [
    1, 9, 1000, 1002, 1003, 1004, 1005, 1006, 1015, 2004, 47, 1047, 1049,
];
/// Modes that are on by themselves: wrapping, a visible cursor.
const UNSET: [u16; 2] = [7, 25];
/// Parameters and digits of a sequence that is still looked at.
const PARAMETERS_MAX: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Text,
    Escape,
    /// `ESC [`
    Csi,
    /// `ESC [ ?`
    Private,
    /// `ESC [ …` that is of no interest.
    Other,
}

/// See the module. Follows the output of a program; pure.
#[derive(Debug, Default)]
pub(super) struct Modes {
    state: State,
    parameters: Vec<u16>,
    current: u16,
    /// Bit i: `SET[i]` is set.
    set: u16,
    /// Bit i: `UNSET[i]` is reset.
    unset: u8,
    keypad: bool,
    rendition: bool,
}

impl Modes {
    /// Looks at output.
    pub(super) fn follow(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.state = self.step(byte);
        }
    }

    fn step(&mut self, byte: u8) -> State {
        match (self.state, byte) {
            (_, 0x1b) => State::Escape,
            // Cancel and substitute end a sequence.
            (_, 0x18 | 0x1a) | (State::Text, _) => State::Text,
            (State::Escape, b'[') => {
                self.parameters.clear();
                self.current = 0;
                State::Csi
            }
            (State::Escape, _) => {
                match byte {
                    b'=' => self.keypad = true,
                    b'>' => self.keypad = false,
                    // Full reset.
                    b'c' => *self = Self::default(),
                    _ => {}
                }
                State::Text
            }
            (State::Csi, b'?') => State::Private,
            (State::Csi | State::Private, b'0'..=b'9') => {
                let digit = u16::from(byte & 0x0f);
                self.current = self.current.saturating_mul(10).saturating_add(digit);
                self.state
            }
            (State::Csi | State::Private, b';') => {
                self.push();
                self.state
            }
            (State::Csi | State::Private | State::Other, 0x40..=0x7e) => {
                self.push();
                self.finish(byte);
                State::Text
            }
            _ => State::Other,
        }
    }

    fn push(&mut self) {
        if self.parameters.len() < PARAMETERS_MAX {
            self.parameters.push(self.current);
        }
        self.current = 0;
    }

    fn finish(&mut self, last: u8) {
        match (self.state, last) {
            (State::Private, b'h' | b'l') => {
                let on = last == b'h';
                for mode in &self.parameters {
                    if let Some(bit) = SET.iter().position(|known| known == mode) {
                        let bit = 1_u16 << bit;
                        self.set = if on { self.set | bit } else { self.set & !bit };
                    }
                    if let Some(bit) = UNSET.iter().position(|known| known == mode) {
                        let bit = 1_u8 << bit;
                        self.unset = if on {
                            self.unset & !bit
                        } else {
                            self.unset | bit
                        };
                    }
                }
            }
            (State::Csi, b'm') => {
                self.rendition = self.parameters.last().is_some_and(|&last| last != 0);
            }
            _ => {}
        }
    }

    /// What switches everything off that is still on; empty if nothing is.
    #[must_use]
    pub(super) fn restore(&self) -> Vec<u8> {
        let mut out = Vec::new();
        // An unfinished sequence would swallow what follows.
        if self.state != State::Text {
            out.push(0x18);
        }
        if self.rendition {
            out.extend_from_slice(b"\x1b[0m");
        }
        if self.keypad {
            out.extend_from_slice(b"\x1b>");
        }
        for (bit, mode) in SET.iter().enumerate() {
            if self.set & (1 << bit) != 0 {
                out.extend_from_slice(format!("\x1b[?{mode}l").as_bytes());
            }
        }
        for (bit, mode) in UNSET.iter().enumerate() {
            if self.unset & (1 << bit) != 0 {
                out.extend_from_slice(format!("\x1b[?{mode}h").as_bytes());
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn after(output: &[u8]) -> String {
        let mut modes = Modes::default();
        modes.follow(output);
        String::from_utf8(modes.restore()).unwrap()
    }

    #[test]
    fn what_a_program_leaves_on_is_switched_off() {
        // As an editor begins.
        let text =
            after(b"\x1b[?1049h\x1b[22;0;0t\x1b[?1h\x1b=\x1b[?2004h\x1b[?25lfile\x1b[1;31mred");
        assert_eq!(text, "\x1b[0m\x1b>\x1b[?1l\x1b[?2004l\x1b[?1049l\x1b[?25h");
        assert_eq!(after(b"\x1b[?1000;1006h"), "\x1b[?1000l\x1b[?1006l");
        assert_eq!(after(b"\x1b[?104"), "\x18");
    }

    #[test]
    fn what_it_switches_off_itself_is_left_alone() {
        assert_eq!(after(b"plain text\r\n"), "");
        assert_eq!(after(b"\x1b[?1049h\x1b[?25l\x1b[?25h\x1b[?1049l"), "");
        assert_eq!(after(b"\x1b[1mbold\x1b[0m \x1b[31mred\x1b[m"), "");
        assert_eq!(after(b"\x1b[?1049h\x1b[?25l\x1bc"), "");
    }

    proptest! {
        #[test]
        fn any_output_in_any_pieces_leads_to_the_same(
            output in proptest::collection::vec(prop_oneof![any::<u8>(), Just(0x1b), Just(b'['), Just(b'?'), b'0'..=b'9', Just(b'h')], 0..200),
            cut in 1_usize..9,
        ) {
            let mut whole = Modes::default();
            whole.follow(&output);
            let mut pieces = Modes::default();
            for piece in output.chunks(cut) {
                pieces.follow(piece);
            }
            prop_assert_eq!(whole.restore(), pieces.restore());
            // And after what it says, nothing is left.
            whole.follow(&pieces.restore());
            prop_assert_eq!(whole.restore(), b"");
        }
    }
}
