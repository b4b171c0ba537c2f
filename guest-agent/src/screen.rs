//! Draws the screen of a terminal from the bytes that a program has written to it.
//!
//! In a process of its own, made for one drawing: whatever the bytes are, neither the holder nor the
//! worker fails over them, and time and memory have limits.

use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use belljar_protocol::v1::Screen;
use prost::Message;
use rustix::event::{PollFd, PollFlags, poll};

/// Argument of the process that draws, followed by columns, rows, lines of scroll-back and whether
/// escape sequences are wanted.
pub(crate) const RENDER: &str = "--render";

/// Most lines of scroll-back.
const MAX_SCROLLBACK: u32 = 10_000;

/// Largest screen that is drawn.
const MAX_COLUMNS: u32 = 1000;
const MAX_ROWS: u32 = 500;

/// Cells of screen and scroll-back together: some 32 bytes each.
const MAX_CELLS: u32 = 1 << 20;

/// Bytes of text that go into the answer, whose frame is at most 1 MiB.
const MAX_TEXT: usize = 900 << 10;

/// Longest title, bytes.
const MAX_TITLE: usize = 1024;

/// Drawing 2 MiB takes some 50 ms.
const TIME: Duration = Duration::from_secs(5);

/// What is to be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) columns: u32,
    pub(crate) rows: u32,
    pub(crate) scrollback: u32,
    pub(crate) formatted: bool,
}

/// Why there is no drawing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScreenError {
    #[error("cannot start the process that draws: {0}")]
    Start(std::io::Error),
    #[error("cannot talk to the process that draws: {0}")]
    Talk(std::io::Error),
    #[error("the screen was not drawn in {} s", TIME.as_secs())]
    Late,
    #[error("the process that draws has failed")]
    Failed,
}

/// Has a screen drawn.
pub(crate) fn draw(wanted: Wanted, bytes: &[u8]) -> Result<Screen, ScreenError> {
    let number = |value: u32| value.to_string();
    let mut child = Command::new("/proc/self/exe")
        .arg(RENDER)
        .args([wanted.columns, wanted.rows, wanted.scrollback].map(number))
        .arg(if wanted.formatted { "1" } else { "0" })
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(ScreenError::Start)?;
    let drawn = exchange(&mut child, bytes);
    // It has ended, or is of no use any more.
    let _ = child.kill();
    let _ = child.wait();
    let drawn = drawn?;
    if drawn.is_empty() {
        return Err(ScreenError::Failed);
    }
    Screen::decode(&*drawn).map_err(|_| ScreenError::Failed)
}

fn exchange(child: &mut std::process::Child, bytes: &[u8]) -> Result<Vec<u8>, ScreenError> {
    let deadline = Instant::now() + TIME;
    if let Some(mut stdin) = child.stdin.take() {
        // It reads to the end before it does anything else. If it ends before, it says nothing.
        let _ = stdin.write_all(bytes);
    }
    let mut drawn = Vec::new();
    let Some(mut stdout) = child.stdout.take() else {
        return Err(ScreenError::Failed);
    };
    let mut buffer = vec![0; 64 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut set = [PollFd::new(&stdout, PollFlags::IN)];
        let limit = rustix::fs::Timespec::try_from(left).ok();
        let ready =
            poll(&mut set, limit.as_ref()).map_err(|errno| ScreenError::Talk(errno.into()))?;
        if ready == 0 {
            return Err(ScreenError::Late);
        }
        match stdout.read(&mut buffer).map_err(ScreenError::Talk)? {
            0 => return Ok(drawn),
            got => drawn.extend_from_slice(buffer.get(..got).unwrap_or_default()),
        }
    }
}

/// The whole life of the process that draws.
pub(crate) fn run(arguments: &[Option<&str>]) -> i32 {
    let number = |at: usize| -> Option<u32> { (*arguments.get(at)?)?.parse().ok() };
    let wanted = || {
        Some(Wanted {
            columns: number(0)?,
            rows: number(1)?,
            scrollback: number(2)?,
            formatted: number(3)? != 0,
        })
    };
    let Some(wanted) = wanted() else { return 2 };
    // The worker may not be chosen when memory runs out; this process may.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    let mut bytes = Vec::new();
    if std::io::stdin().read_to_end(&mut bytes).is_err() {
        return 1;
    }
    let drawn = render(wanted, &bytes).encode_to_vec();
    let mut out = std::io::stdout();
    i32::from(out.write_all(&drawn).and_then(|()| out.flush()).is_err())
}

#[derive(Debug, Default)]
struct Title(Vec<u8>);

impl vt100::Callbacks for Title {
    fn set_window_title(&mut self, _: &mut vt100::Screen, title: &[u8]) {
        self.0 = title.get(..MAX_TITLE).unwrap_or(title).to_vec();
    }
}

fn render(wanted: Wanted, bytes: &[u8]) -> Screen {
    let columns = wanted.columns.clamp(1, MAX_COLUMNS);
    let rows = wanted.rows.clamp(1, MAX_ROWS);
    let scrollback = wanted
        .scrollback
        .min(MAX_SCROLLBACK)
        .min(MAX_CELLS / columns);
    let short = |value: u32| {
        let short = u16::try_from(value).unwrap_or(u16::MAX);
        NonZeroU16::new(short).unwrap_or(NonZeroU16::MIN)
    };
    let long = |value: u32| usize::try_from(value).unwrap_or(usize::MAX);
    let mut parser = vt100::Parser::new_with_callbacks(
        short(rows),
        short(columns),
        long(scrollback),
        Title::default(),
    );
    parser.process(bytes);
    let title = String::from_utf8_lossy(&parser.callbacks().0).into_owned();
    let screen = parser.screen_mut();
    let above = above(screen, wanted.formatted, short(rows), short(columns).get());
    screen.set_scrollback(0);
    let (cursor_row, cursor_column) = screen.cursor_position();
    let content = if wanted.formatted {
        let mut content = Vec::new();
        if screen.alternate_screen() {
            content.extend_from_slice(b"\x1b[?1049h");
        }
        content.extend_from_slice(screen.state_formatted().as_bytes());
        content
    } else {
        let lines: Vec<String> = screen.rows(0, short(columns).get()).collect();
        lines.join("\n").trim_end_matches('\n').as_bytes().to_vec()
    };
    let left = MAX_TEXT.saturating_sub(content.len());
    Screen {
        columns,
        rows,
        cursor_column: cursor_column.into(),
        cursor_row: cursor_row.into(),
        scrollback: newest(&above, left),
        content,
        offset: 0,
        title,
        alternate: screen.alternate_screen(),
    }
}

/// The lines that have scrolled off the top, oldest first.
fn above(
    screen: &mut vt100::Screen,
    formatted: bool,
    rows: NonZeroU16,
    columns: u16,
) -> Vec<String> {
    screen.set_scrollback(usize::MAX);
    let mut left = screen.scrollback();
    let mut lines = Vec::with_capacity(left);
    while left > 0 {
        // So many lines of scroll-back are shown at the top now.
        screen.set_scrollback(left);
        let shown = left.min(usize::from(rows.get()));
        if formatted {
            lines.extend(screen.rows_formatted(0, columns).take(shown));
        } else {
            lines.extend(screen.rows(0, columns).take(shown));
        }
        left = left.saturating_sub(shown);
    }
    lines
}

/// As many of the last lines as fit into so many bytes.
fn newest(lines: &[String], most: usize) -> Vec<u8> {
    let mut left = most;
    let fitting = lines.iter().rev().take_while(|line| {
        let needed = line.len().saturating_add(1);
        let fits = needed <= left;
        left = left.saturating_sub(needed);
        fits
    });
    let kept = fitting.count();
    let from = lines.len().saturating_sub(kept);
    lines
        .get(from..)
        .unwrap_or_default()
        .join("\n")
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(columns: u32, rows: u32, scrollback: u32, bytes: &[u8]) -> Screen {
        let formatted = false;
        render(
            Wanted {
                columns,
                rows,
                scrollback,
                formatted,
            },
            bytes,
        )
    }

    #[test]
    fn text_cursor_title_and_what_has_scrolled_off() {
        let screen = plain(
            20,
            3,
            10,
            b"\x1b]2;a title\x07one\r\ntwo\r\nthree\r\nfour\r\n$ ",
        );
        assert_eq!(screen.content, b"three\nfour\n$ ");
        assert_eq!(screen.scrollback, b"one\ntwo");
        assert_eq!((screen.cursor_column, screen.cursor_row), (2, 2));
        assert_eq!(screen.title, "a title");
        assert!(!screen.alternate);
        let many: String = (0..100).map(|n| format!("{n}\r\n")).collect();
        let screen = plain(20, 3, 10, many.as_bytes());
        assert_eq!(screen.scrollback, b"88\n89\n90\n91\n92\n93\n94\n95\n96\n97");
    }

    #[test]
    fn the_other_screen_is_told_and_drawn() {
        let bytes = b"shell\x1b[?1049h\x1b[2;3H\x1b[1mvim";
        let screen = plain(20, 3, 10, bytes);
        assert!(screen.alternate);
        assert_eq!(screen.content, b"\n  vim");
        let wanted = Wanted {
            columns: 20,
            rows: 3,
            scrollback: 0,
            formatted: true,
        };
        let drawn = render(wanted, bytes);
        let again = plain(20, 3, 0, &drawn.content);
        assert_eq!(again.content, screen.content);
        assert!(again.alternate);
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_screen_within_bounds(
            columns in 0_u32..2000, rows in 0_u32..600, scrollback in any::<u32>(),
            formatted: bool,
            bytes in proptest::collection::vec(any::<u8>(), 0..3000),
        ) {
            let screen = render(Wanted { columns, rows, scrollback, formatted }, &bytes);
            prop_assert!(screen.encoded_len() < belljar_protocol::frame::MAX_FRAME);
        }
    }
}
