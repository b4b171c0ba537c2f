//! Waiting for a pattern in what a process writes.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use belljar_protocol::v1::{self, Stream, error::Code, position::At};
use regex::bytes::{Regex, RegexBuilder};
use rustix::event::PollFlags;

use super::super::holder::Piece;
use super::super::{Context, Failure, refusal};
use super::Waiting;

/// Longest pattern, and bytes of memory its program may take.
const MAX_PATTERN: usize = 4096;
const MAX_PROGRAM: usize = 1 << 20;

/// A match may be this long; what came before is forgotten.
const WINDOW: usize = 64 << 10;

/// Bytes of a match that are told.
const MAX_TOLD: usize = 4096;

/// Waits until the output matches, or the process has ended without.
pub(super) fn wait(
    context: &Context,
    waiting: &Waiting<'_>,
    call: &v1::OutputMatch,
) -> Result<v1::Awaited, Failure> {
    let pattern = compile(&call.pattern)?;
    let stream = call.stream();
    let wanted = |of: Stream| stream == Stream::Unspecified || stream == of;
    let position = |of: Stream| {
        let nowhere = || v1::Position {
            at: Some(At::Newest(true)),
        };
        if wanted(of) {
            call.from
        } else {
            Some(nowhere())
        }
    };
    let mut reader = context.holder.read(v1::Attach {
        process: call.process.clone(),
        stdout: position(Stream::Stdout),
        stderr: position(Stream::Stderr),
        follow: true,
        read_only: true,
        ..v1::Attach::default()
    })?;
    let mut searches = [Search::new(&pattern), Search::new(&pattern)];
    let [out, err] = &mut searches;
    loop {
        match reader.next(Some(Instant::now()))? {
            Some(Piece::Data {
                stream,
                offset,
                bytes,
            }) if wanted(stream) => {
                let search = if stream == Stream::Stderr {
                    &mut *err
                } else {
                    &mut *out
                };
                if let Some(found) = search.feed(offset, &bytes) {
                    return Ok(found);
                }
            }
            Some(Piece::Gap(gap)) => {
                let search = if gap.stream() == Stream::Stderr {
                    &mut *err
                } else {
                    &mut *out
                };
                search.skip();
            }
            Some(Piece::End | Piece::Detached) => {
                return Ok(v1::Awaited {
                    ended_without: true,
                    ..v1::Awaited::default()
                });
            }
            Some(Piece::Data { .. } | Piece::CaughtUp) => {}
            None => {
                let fd: BorrowedFd<'_> = reader.as_fd();
                let state = "the process has written nothing that matches";
                waiting.pause(&[(fd, PollFlags::IN)], None, state)?;
            }
        }
    }
}

fn compile(pattern: &str) -> Result<Regex, v1::Error> {
    if pattern.len() > MAX_PATTERN {
        let message = format!("pattern: longer than {MAX_PATTERN} bytes");
        return Err(refusal(Code::Invalid, message));
    }
    RegexBuilder::new(pattern)
        .unicode(false)
        .multi_line(true)
        .size_limit(MAX_PROGRAM)
        .dfa_size_limit(MAX_PROGRAM)
        .nest_limit(64)
        .build()
        .map_err(|error| refusal(Code::Invalid, format!("pattern: {error}")))
}

/// The search in one stream, whatever pieces it comes in.
#[derive(Debug)]
struct Search<'a> {
    pattern: &'a Regex,
    window: Vec<u8>,
    /// The first byte of the window stands only for what came before it.
    is_cut: bool,
}

impl<'a> Search<'a> {
    const fn new(pattern: &'a Regex) -> Self {
        Self {
            pattern,
            window: Vec::new(),
            is_cut: false,
        }
    }

    /// Takes bytes of the stream that begin at `offset`.
    fn feed(&mut self, offset: u64, bytes: &[u8]) -> Option<v1::Awaited> {
        self.window.extend_from_slice(bytes);
        let end = offset.saturating_add(bytes.len() as u64);
        let found = self.pattern.find_at(&self.window, usize::from(self.is_cut));
        let Some(found) = found else {
            if self.window.len() > WINDOW {
                let surplus = self.window.len().saturating_sub(WINDOW);
                self.window.drain(..surplus);
                self.is_cut = true;
            }
            return None;
        };
        let behind = self.window.len().saturating_sub(found.end());
        let matched = found.as_bytes();
        Some(v1::Awaited {
            offset: end.saturating_sub(behind as u64),
            matched: matched.get(..MAX_TOLD).unwrap_or(matched).to_vec(),
            ..v1::Awaited::default()
        })
    }

    /// Bytes are missing: nothing matches across them.
    fn skip(&mut self) {
        // A byte that is in no line and no word, where something else was.
        self.window.clear();
        self.window.push(0);
        self.is_cut = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Where the first match ends, and what it is.
    fn search(pattern: &str, pieces: &[&[u8]]) -> Option<(u64, Vec<u8>)> {
        let pattern = compile(pattern).unwrap();
        let mut search = Search::new(&pattern);
        let mut offset = 100;
        pieces.iter().find_map(|piece| {
            let found = search.feed(offset, piece);
            offset += piece.len() as u64;
            found.map(|found| (found.offset, found.matched))
        })
    }

    #[test]
    fn matches_are_found_across_pieces() {
        assert_eq!(
            search("ready", &[b"re", b"a", b"dy!"]),
            Some((105, b"ready".to_vec()))
        );
        assert_eq!(search("^b", &[b"ab\n", b"b"]), Some((104, b"b".to_vec())));
        assert_eq!(search("x", &[b"ab"]), None);
        assert_eq!(
            search("\\xff+", &[b"\xff\xff"]),
            Some((102, b"\xff\xff".to_vec()))
        );
    }

    #[test]
    fn a_cut_is_no_beginning_of_a_line() {
        let long = vec![b'a'; WINDOW + 10];
        assert_eq!(search("^ab", &[&long, b"b"]), None);
        assert!(search("ab", &[&long, b"b"]).is_some());
        let pattern = compile("^b|ab").unwrap();
        let mut search = Search::new(&pattern);
        assert!(search.feed(0, b"a").is_none());
        search.skip();
        assert!(search.feed(50, b"b").is_none());
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for pattern in ["(", "a{1000}{1000}", &"(".repeat(200), &"x".repeat(5000)] {
            assert_eq!(compile(pattern).unwrap_err().code(), Code::Invalid);
        }
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(text in "[abc\n]{0,200}", cuts in proptest::collection::vec(1..20_usize, 1..20)) {
            let pattern = compile("ab+c|^cc").unwrap();
            let whole = pattern.find(text.as_bytes()).map(|found| found.start());
            let mut search = Search::new(&pattern);
            let (mut at, mut found) = (0, None);
            for cut in cuts.into_iter().cycle() {
                let end = (at + cut).min(text.len());
                found = search.feed(at as u64, &text.as_bytes()[at..end]);
                at = end;
                if found.is_some() || at == text.len() {
                    break;
                }
            }
            // The same match, or one that was there before a longer one could be seen.
            prop_assert_eq!(found.is_some(), whole.is_some());
            if let (Some(found), Some(start)) = (found, whole) {
                prop_assert_eq!(found.offset - found.matched.len() as u64, start as u64);
            }
        }
    }
}
