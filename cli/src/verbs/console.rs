//! `belljar console`.

use std::io::{IsTerminal, stdin, stdout};
use std::os::fd::AsFd;

use belljar_node::console::{self, View};
use belljar_node::logs::{self, Log};
use belljar_node::pipe::PipeEnd;
use belljar_node::process::{DetachKeys, TERMINAL_SIGNALS};
use belljar_node::registry::Found;
use belljar_node::sys::SignalFd;

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::output;
use crate::report;

/// Keys that leave a console: what shells and boot loaders in it have no use for.
const KEYS: &str = "ctrl-]";
/// Lines of its log that a guest which does not run leaves to show.
const LINES: usize = 40;

/// See and use the console of a guest, also when its agent is dead
///
/// What the guest wrote last comes first. On a terminal all keys go to the guest, Ctrl-C too. Of a guest that
/// does not run the last lines are printed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar console box                    Ctrl-] leaves it
  belljar console -r box                 only watch
  belljar console -n 20 box              the last lines, and no more
  echo t | belljar console -i box        standard input that is no terminal is used with -i only")]
pub(crate) struct Args {
    #[command(flatten)]
    sandbox: BoxArg,

    /// Only watch: nothing that is typed reaches the guest
    #[arg(short, long, conflicts_with = "interactive")]
    read_only: bool,

    /// Pass standard input on, although it is no terminal
    #[arg(short, long)]
    interactive: bool,

    /// Print the last lines of the console, and end
    #[arg(short = 'n', long, value_name = "N")]
    lines: Option<usize>,

    /// Keys that leave the console; 'none' for no such keys
    #[arg(long, value_name = "KEYS", default_value = KEYS)]
    detach_keys: DetachKeys,
}

/// Returns the exit status.
pub(crate) fn console(args: &Args) -> u8 {
    status_of(args.sandbox.find().and_then(|found| show(args, &found)))
}

fn show(args: &Args, found: &Found) -> Result<u8, Failure> {
    if let Some(lines) = args.lines {
        print_last(found, lines);
        return Ok(0);
    }
    let signals = SignalFd::new(&TERMINAL_SIGNALS).map_err(Failure::new)?;
    let stream = match console::dial(found) {
        Ok(stream) => stream,
        Err(error) => {
            print_last(found, LINES);
            return Err(no_console(found, &error));
        }
    };
    let (input, output) = (stdin(), stdout());
    let terminal = input.is_terminal() && !args.read_only;
    if terminal {
        report::note(&format!(
            "the console of {}; {KEYS} leaves it",
            found.called()
        ));
    }
    let view = View {
        input: (terminal || args.interactive).then(|| input.as_fd()),
        output: output.as_fd(),
        keys: terminal.then(|| args.detach_keys.clone()),
        signals: &signals,
    };
    Ok(match console::show(&stream, view).map_err(Failure::new)? {
        PipeEnd::Left => {
            report::print("\n");
            0
        }
        PipeEnd::Closed => 0,
        PipeEnd::OutputClosed => 128 + 13,
        PipeEnd::Signal(signal) => u8::try_from(signal.saturating_add(128)).unwrap_or(255),
    })
}

/// The last lines of the log, escaped: nobody asked for a terminal here.
fn print_last(found: &Found, count: usize) {
    let log = logs::read(found, Log::Console).unwrap_or_default();
    let text = output::printable_lines(&log);
    let lines: Vec<&str> = text.lines().collect();
    let begin = lines.len().saturating_sub(count);
    let last: String = lines
        .iter()
        .skip(begin)
        .map(|line| format!("{line}\n"))
        .collect();
    output::print(&last);
}

fn no_console(found: &Found, error: &std::io::Error) -> Failure {
    let state = found.state();
    let called = found.called();
    if state.is_up() {
        return Failure::with_remedy(
            format!("the console of {called} cannot be reached: {error}"),
            format!("'belljar debug state {called}' tells more"),
        );
    }
    let remedy = state.remedy(&called);
    Failure::with_remedy(
        format!("sandbox {called} is {state}: these were its last words"),
        remedy.unwrap_or_else(|| format!("'belljar start {called}' starts it")),
    )
}
