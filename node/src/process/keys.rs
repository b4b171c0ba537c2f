//! Keys that leave a terminal and let the process go on.

use std::str::FromStr;

/// A sequence of key bytes, found in a stream of them. Typed keys are held back while they could become
/// the whole sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachKeys {
    sequence: Vec<u8>,
    /// So many bytes of the sequence were typed last.
    matched: usize,
}

/// No sequence of keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no list of keys: write for example ctrl-p,ctrl-q, or ctrl-] or a,b; none switches them off"
)]
pub struct KeysError(String);

impl Default for DetachKeys {
    /// Ctrl-P Ctrl-Q.
    fn default() -> Self {
        Self {
            sequence: vec![0x10, 0x11],
            matched: 0,
        }
    }
}

impl FromStr for DetachKeys {
    type Err = KeysError;

    /// Keys with commas between: a single character, or `ctrl-` with a letter or one of `@[\]^_`. `none`
    /// is no key at all.
    fn from_str(text: &str) -> Result<Self, KeysError> {
        if text == "none" {
            return Ok(Self {
                sequence: Vec::new(),
                matched: 0,
            });
        }
        let sequence = text.split(',').map(key).collect::<Option<Vec<u8>>>();
        match sequence {
            Some(sequence) if sequence.len() <= 16 => Ok(Self {
                sequence,
                matched: 0,
            }),
            _ => Err(KeysError(text.to_owned())),
        }
    }
}

fn key(text: &str) -> Option<u8> {
    let lower = text.to_ascii_lowercase();
    if let Some(rest) = lower.strip_prefix("ctrl-") {
        return match rest.as_bytes() {
            [letter @ b'a'..=b'z'] => Some(letter & 0x1f),
            [sign @ (b'@' | b'[' | b'\\' | b']' | b'^' | b'_')] => Some(sign & 0x1f),
            _ => None,
        };
    }
    match text.as_bytes() {
        [byte @ 0x20..=0x7e] => Some(*byte),
        _ => None,
    }
}

impl DetachKeys {
    /// Takes typed bytes and appends to `out` those that are for the process. True: the sequence is
    /// complete; what was typed after it is dropped.
    pub fn filter(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        if self.sequence.is_empty() {
            out.extend_from_slice(typed);
            return false;
        }
        for &byte in typed {
            // A key that does not go on may still begin anew, also with part of what was held.
            while self.matched > 0 && self.sequence.get(self.matched) != Some(&byte) {
                let shorter = self.longest_border();
                let released = self.matched.saturating_sub(shorter);
                out.extend_from_slice(self.sequence.get(..released).unwrap_or_default());
                self.matched = shorter;
            }
            if self.sequence.get(self.matched) == Some(&byte) {
                self.matched = self.matched.saturating_add(1);
                if self.matched == self.sequence.len() {
                    self.matched = 0;
                    return true;
                }
            } else {
                out.push(byte);
            }
        }
        false
    }

    /// Length of the longest proper suffix of what is matched that the sequence also begins with.
    fn longest_border(&self) -> usize {
        let held = self.sequence.get(..self.matched).unwrap_or_default();
        (0..self.matched)
            .rev()
            .find(|&length| {
                let from = self.matched.saturating_sub(length);
                held.get(..length) == held.get(from..)
            })
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn typed(keys: &str, pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut keys: DetachKeys = keys.parse().unwrap();
        let mut out = Vec::new();
        let left = pieces.iter().any(|piece| keys.filter(piece, &mut out));
        (out, left)
    }

    #[test]
    fn sequences_are_read_as_docker_does() {
        assert_eq!(
            "ctrl-p,ctrl-q".parse::<DetachKeys>().unwrap(),
            DetachKeys::default()
        );
        for (text, bytes) in [
            ("ctrl-]", &[0x1d][..]),
            ("Ctrl-@,x", &[0, b'x']),
            ("none", &[]),
        ] {
            assert_eq!(
                text.parse::<DetachKeys>().unwrap().sequence,
                bytes,
                "{text}"
            );
        }
        for text in ["", "ctrl-", "ctrl-1", "ab", "a,,b", "ctrl-pp", "é", "a,"] {
            assert!(text.parse::<DetachKeys>().is_err(), "{text}");
        }
        assert!(["a"; 17].join(",").parse::<DetachKeys>().is_err());
    }

    #[test]
    fn the_sequence_leaves_however_it_is_cut() {
        assert_eq!(
            typed("ctrl-p,ctrl-q", &[b"ls\x10\x11x"]),
            (b"ls".to_vec(), true)
        );
        assert_eq!(typed("ctrl-p,ctrl-q", &[b"\x10", b"\x11"]), (vec![], true));
    }

    #[test]
    fn keys_that_do_not_complete_it_reach_the_process() {
        assert_eq!(
            typed("ctrl-p,ctrl-q", &[b"\x10", b"a\x11"]),
            (b"\x10a\x11".to_vec(), false)
        );
        assert_eq!(
            typed("ctrl-p,ctrl-q", &[b"\x10\x10\x11"]),
            (vec![0x10], true)
        );
        // The last try begins within the first.
        assert_eq!(typed("a,b,a,c", &[b"ababac"]), (b"ab".to_vec(), true));
        assert_eq!(typed("none", &[b"\x10\x11"]), (b"\x10\x11".to_vec(), false));
    }

    proptest! {
        /// Compared with looking for the sequence in all that was typed.
        #[test]
        fn nothing_is_lost_or_found_elsewhere(
            sequence in proptest::collection::vec(b'a'..=b'c', 1..5),
            keys in proptest::collection::vec(b'a'..=b'c', 0..40),
            cut in 1_usize..7,
        ) {
            let mut machine = DetachKeys { sequence: sequence.clone(), matched: 0 };
            let mut out = Vec::new();
            let left = keys.chunks(cut).any(|piece| machine.filter(piece, &mut out));
            let found = keys.windows(sequence.len()).position(|window| window == sequence);
            prop_assert_eq!(left, found.is_some());
            match found {
                Some(at) => prop_assert_eq!(&out[..], &keys[..at]),
                None => {
                    out.extend_from_slice(&machine.sequence[..machine.matched]);
                    prop_assert_eq!(out, keys);
                }
            }
        }
    }
}
