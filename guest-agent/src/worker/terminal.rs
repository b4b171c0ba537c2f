//! The screen of a terminal, drawn from what its ring holds.

use std::time::{Duration, Instant};

use belljar_protocol::v1::{self, error::Code, position::At, reply::Result as Answer};

use super::holder::Piece;
use super::{Answered, Context, Outcome, refusal};
use crate::screen::{self, Wanted};

/// The last bytes of a ring that are drawn: enough for the longest scroll-back.
const MAX_BYTES: u64 = 2 << 20;

/// Without the beginning of the stream, the first line is looked for within so many bytes.
const MAX_PARTIAL: usize = 4 << 10;

/// Reading what is there takes no longer than this.
const READ_TIME: Duration = Duration::from_secs(5);

/// Draws the screen of a process with a terminal.
pub(super) fn screen(context: &Context, call: v1::GetScreen) -> Answered {
    let attach = |process, stdout| v1::Attach {
        process,
        stdout,
        read_only: true,
        ..v1::Attach::default()
    };
    let mut reader = context.holder.read(attach(call.process.clone(), None))?;
    let info = reader.attached().process.clone().unwrap_or_default();
    let Some(size) = info.terminal else {
        return Err(refusal(Code::Invalid, "the process has no terminal").into());
    };
    let newest = info.stdout.unwrap_or_default().newest;
    let mut from = reader.attached().stdout_from;
    if newest.saturating_sub(from) > MAX_BYTES {
        from = newest.saturating_sub(MAX_BYTES);
        let at = Some(At::Offset(from));
        let place = Some(v1::Position { at });
        reader = context.holder.read(attach(call.process, place))?;
    }
    let deadline = Instant::now().checked_add(READ_TIME);
    let mut bytes = Vec::new();
    let mut end = from;
    while let Some(piece) = reader.next(deadline)? {
        match piece {
            Piece::Data {
                offset,
                bytes: more,
                ..
            } => {
                end = offset.saturating_add(more.len() as u64);
                bytes.extend_from_slice(&more);
            }
            Piece::Gap(gap) => {
                bytes.clear();
                from = gap.to;
                end = gap.to;
            }
            Piece::CaughtUp => {}
            Piece::End | Piece::Detached => break,
        }
    }
    let wanted = Wanted {
        columns: size.columns,
        rows: size.rows,
        scrollback: call.scrollback,
        formatted: call.formatted,
    };
    let bytes = if from == 0 { &bytes } else { whole(&bytes) };
    let drawn =
        screen::draw(wanted, bytes).map_err(|error| refusal(Code::Internal, error.to_string()))?;
    Ok(Outcome::Reply(Answer::Screen(v1::Screen {
        offset: end,
        ..drawn
    })))
}

/// Without the rest of a line or an escape sequence whose beginning is lost.
fn whole(bytes: &[u8]) -> &[u8] {
    let near = bytes.get(..MAX_PARTIAL).unwrap_or(bytes);
    let start = near.iter().position(|byte| matches!(byte, b'\n' | 0x1b));
    bytes.get(start.unwrap_or(0)..).unwrap_or_default()
}
