//! `belljar attach`.

use std::io::{IsTerminal, stdin, stdout};
use std::os::fd::AsFd;

use belljar_node::guest::GuestError;
use belljar_node::process::{self, Selector, Session, terminal};
use belljar_node::registry::Found;
use belljar_node::v1::{self, position::At};

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::session::{self, Ends, LeavingOptions, MAIN};
use crate::values::FromByte;

/// Connect this terminal with a process in a sandbox
///
/// Any number may be attached at once, and see the same; a slow one is not waited for, and is told what
/// it missed. The process goes on when you leave, unless it was started by an exec that still runs.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar attach box web               a process by its name
  belljar attach box 7 --read-only     by its id; nothing that is typed here reaches it
  belljar attach box 7 --replay        all that is kept of its output first, instead of the screen
  belljar attach box 7 --from 4096     from a byte of its output on; what is not kept any more is told
  echo quit | belljar attach -i box 7  standard input that is no terminal is passed on with -i only;
                                       its end is the end of the process's input

On a terminal Ctrl-P Ctrl-Q leaves it running. Exit status: that of the process if it ends
meanwhile, 0 after leaving it.")]
pub(crate) struct Args {
    /// Pass standard input on, although it is no terminal
    #[arg(short, long)]
    interactive: bool,

    /// Only watch: no input, no signals, no size
    #[arg(short, long, conflicts_with = "interactive")]
    read_only: bool,

    /// Draw the screen as it is now first; this is so anyway for a terminal on a terminal
    #[arg(long, conflicts_with = "replay")]
    screen: bool,

    /// Print what is kept of the output first, byte by byte
    #[arg(long)]
    replay: bool,

    /// Print only what comes from now on
    #[arg(long, conflicts_with_all = ["replay", "screen"])]
    new: bool,

    /// Print what is kept from this byte of the output on, and this one of the error output
    #[arg(long, value_name = "BYTE[:BYTE]", conflicts_with_all = ["replay", "screen", "new"])]
    from: Option<FromByte>,

    /// Lines from above the screen that are drawn with it
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(..=10_000))]
    scrollback: u32,

    #[command(flatten)]
    leaving: LeavingOptions,

    #[command(flatten)]
    sandbox: BoxArg,

    /// Id or name of the process, or pid:N [default: the one that run was given]
    #[arg(value_name = "PROCESS", default_value = MAIN, hide_default_value = true)]
    process: Selector,
}

/// Returns the exit status.
pub(crate) fn attach(args: &Args) -> u8 {
    status_of(connect(args))
}

fn connect(args: &Args) -> Result<u8, Failure> {
    let found = args.sandbox.find()?;
    let info = process::inspect(&found, &args.process)?;
    let has_terminal = info.terminal.is_some();
    // Whoever gets its name later is not meant.
    let which = Selector::id(info.id);
    let ends = Ends {
        stdin: takes_input(args, stdin().is_terminal()),
        terminal: has_terminal,
        detach_keys: args.leaving.detach_keys.clone(),
        give_up: args.read_only,
        watch_only: args.read_only,
        called: args.sandbox.sandbox.clone(),
        ..Ends::default()
    };
    let signals = ends.signals()?;
    let here = (has_terminal && stdout().is_terminal())
        .then(|| terminal::size_of(stdout().as_fd()))
        .flatten();
    let size = here.filter(|_| !args.read_only);
    let stream_wanted = args.replay || args.new || args.from.is_some();
    let draw = has_terminal && (args.screen || (stdout().is_terminal() && !stream_wanted));
    let (first, from) = if draw {
        let running = info.end.is_none();
        let (drawing, offset) = picture(&found, &which, size.filter(|_| running), args.scrollback)?;
        (drawing, At::Offset(offset))
    } else if let Some(from) = args.from {
        (Vec::new(), At::Offset(from.stdout))
    } else if args.new {
        (Vec::new(), At::Newest(true))
    } else {
        (Vec::new(), At::Oldest(true))
    };
    let session = Session::attach(v1::Attach {
        process: Some(which.message()),
        stdout: Some(v1::Position { at: Some(from) }),
        stderr: errors_from(args).map(|at| v1::Position { at: Some(at) }),
        follow: true,
        read_only: args.read_only,
        size,
        ..v1::Attach::default()
    });
    let outcome = ends
        .connect(session, &found, &signals, &first)
        .map_err(|error| session::explain(&found, &error))?;
    session::comment(&outcome);
    Ok(outcome.exit_status())
}

/// A terminal is for typing; anything else, an input that is closed above all, would end the process's.
const fn takes_input(args: &Args, stdin_is_terminal: bool) -> bool {
    !args.read_only && (args.interactive || stdin_is_terminal)
}

/// Where the error output begins; `None`: at the oldest byte kept.
fn errors_from(args: &Args) -> Option<At> {
    let from = args.from.map(|from| At::Offset(from.stderr));
    from.or_else(|| args.new.then_some(At::Newest(true)))
}

/// The screen as it is, drawn for a terminal of the size of this one, and where the stream goes on.
fn picture(
    found: &Found,
    which: &Selector,
    size: Option<v1::Terminal>,
    scrollback: u32,
) -> Result<(Vec<u8>, u64), GuestError> {
    if let Some(size) = size {
        // First, so that programs draw for this size, and the screen is one of it.
        process::resize(found, which, size)?;
    }
    let screen = process::screen(found, which, scrollback)?;
    Ok((draw(&screen), screen.offset))
}

/// Escape sequences that show a screen.
fn draw(screen: &v1::Screen) -> Vec<u8> {
    let mut drawing = Vec::new();
    for line in screen.scrollback.split(|&byte| byte == b'\n') {
        if !screen.scrollback.is_empty() {
            drawing.extend_from_slice(line);
            drawing.extend_from_slice(b"\x1b[m\r\n");
        }
    }
    drawing.extend_from_slice(&screen.content);
    drawing
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parsed(words: &[&str]) -> Args {
        let words = ["attach"].iter().chain(words);
        Line::try_parse_from(words).unwrap().args
    }

    #[test]
    fn input_is_passed_on_from_a_terminal_or_when_asked_for() {
        assert!(takes_input(&parsed(&["box"]), true));
        assert!(!takes_input(&parsed(&["box"]), false));
        assert!(takes_input(&parsed(&["-i", "box"]), false));
        assert!(!takes_input(&parsed(&["-r", "box"]), true));
        for wrong in [["-ri", "box"], ["--from", "x"]] {
            assert!(Line::try_parse_from(["attach"].iter().chain(&wrong)).is_err());
        }
    }

    #[test]
    fn a_byte_to_begin_at_is_of_both_streams_or_of_each() {
        let errors = |words: &[&str]| errors_from(&parsed(words));
        assert_eq!(errors(&["box"]), None);
        assert_eq!(errors(&["--new", "box"]), Some(At::Newest(true)));
        assert_eq!(errors(&["--from", "7", "box"]), Some(At::Offset(7)));
        assert_eq!(errors(&["--from", "7:9", "box"]), Some(At::Offset(9)));
    }

    #[test]
    fn lines_from_above_are_drawn_first() {
        let screen = v1::Screen {
            content: b"\x1b[H\x1b[Jnow".to_vec(),
            scrollback: b"one\ntwo".to_vec(),
            ..v1::Screen::default()
        };
        assert_eq!(draw(&screen), b"one\x1b[m\r\ntwo\x1b[m\r\n\x1b[H\x1b[Jnow");
        assert_eq!(draw(&v1::Screen::default()), b"");
    }
}
