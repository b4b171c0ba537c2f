//! `belljar exec`.

use std::ffi::OsString;
use std::time::Duration;

use belljar_node::process::{self, Outcome, Rlimit, Started};
use belljar_node::size::Size;
use belljar_node::v1;

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::output;
use crate::session::{self, CommandOptions, Ends, TerminalOptions};
use crate::values::{self, Cpus};

/// Run a command in a running sandbox
///
/// Output and exit status are the command's. Without -d it ends when this program does; if the connection
/// to the guest breaks, it is made again, and no byte is lost or comes twice.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar exec box ls -l /                       no shell is involved
  belljar exec box sh -c 'ls / | wc -l'          a pipeline needs one
  echo hello | belljar exec -i box tr a-z A-Z    -i passes standard input on
  belljar exec -it box vim /etc/hosts            a terminal
  belljar exec -d --name web box ./server        goes on by itself; see ps, logs, attach, kill
  belljar exec --timeout 10s box ./might-hang    exit status 124 after ten seconds
  belljar exec --memory 100M --pids 50 box ./try

A name is used once: a second exec with it starts nothing, and tells what the first one says.

Ctrl-C sends SIGINT to the command, the second one kills it, the third one gives up; on a
terminal all keys go to the command, and Ctrl-P Ctrl-Q leaves it running.

Exit status: the command's own; 128+n if a signal ended it; 124 for --timeout;
126 not executable; 127 not found; 125 if Bell Jar itself failed.")]
pub(crate) struct Args {
    #[command(flatten)]
    terminal: TerminalOptions,

    /// Print its name, or its id, and let it go on by itself
    #[arg(short, long)]
    detach: bool,

    /// A name for the process, which no other one in the sandbox has
    #[arg(long, value_parser = process_name)]
    name: Option<String>,

    /// If a process of that name has ended, forget it and start anew
    #[arg(long, requires = "name")]
    replace: bool,

    #[command(flatten)]
    command_options: CommandOptions,

    /// An additional group of the guest, a name or a number; may be given several times
    #[arg(long, value_name = "GROUP", help_heading = "Limits and rights")]
    group: Vec<String>,

    /// A resource limit, as nofile=1024, core=0:unlimited; may be given several times
    #[arg(
        long,
        value_name = "NAME=SOFT[:HARD]",
        help_heading = "Limits and rights"
    )]
    ulimit: Vec<Rlimit>,

    /// Memory of the command and all it starts: 100M, 1G
    #[arg(long, value_name = "SIZE", help_heading = "Limits and rights")]
    memory: Option<Size>,

    /// Processor time of the command and all it starts: 0.5 is half of one processor
    #[arg(long, value_name = "N", value_parser = values::cpus, help_heading = "Limits and rights")]
    cpus: Option<Cpus>,

    /// Number of processes and threads the command may have
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits and rights")]
    pids: Option<u32>,

    /// Output kept for later readers, of each stream [default: 1M]
    #[arg(long, value_name = "SIZE", help_heading = "Output")]
    ring: Option<Size>,

    /// How long output and end are kept after the end [default: 10m if named or detached]
    #[arg(long, value_name = "TIME", value_parser = values::time, help_heading = "Output")]
    keep: Option<Duration>,

    #[command(flatten)]
    sandbox: BoxArg,

    /// Program and its arguments; no shell is involved
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        required = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

/// A name for a process, as clap wants it.
fn process_name(text: &str) -> Result<String, &'static str> {
    process::check_name(text).map(|()| text.to_owned())
}

/// Returns the exit status.
pub(crate) fn exec(args: &Args) -> u8 {
    status_of(start(args))
}

fn start(args: &Args) -> Result<u8, Failure> {
    let mut spec = args.command_options.spec(&args.command);
    args.terminal.apply(&mut spec);
    spec.name = args.name.clone().unwrap_or_default();
    spec.replace_ended = args.replace;
    spec.detached = args.detach;
    spec.groups.clone_from(&args.group);
    spec.rlimits.clone_from(&args.ulimit);
    spec.limits = limits(args);
    spec.ring_bytes = args.ring.map_or(0, |size| size.0);
    spec.keep = args.keep;

    let mut ends = Ends::of(&args.terminal, &spec);
    if args.detach {
        // The agent keeps the time of a process that goes on by itself.
        ends.timeout = None;
        ends.stdin = false;
        ends.quiet = true;
    }
    let signals = ends.signals()?;
    let found = args.sandbox.find()?;
    ends.called.clone_from(&args.sandbox.sandbox);
    let outcome = ends
        .connect(spec.session(), &found, &signals, b"")
        .map_err(|error| session::explain(&found, &error))?;
    if let Outcome::Started(started) = &outcome {
        output::print(&format!("{}\n", name_of(args, started)));
    }
    session::comment(&outcome);
    Ok(outcome.exit_status())
}

fn name_of(args: &Args, started: &Started) -> String {
    args.name.clone().unwrap_or_else(|| started.id.to_string())
}

fn limits(args: &Args) -> v1::Limits {
    v1::Limits {
        memory: args.memory.map_or(0, |size| size.0),
        cpu_milli: args.cpus.map_or(0, |cpus| {
            let whole = cpus.vcpus.saturating_mul(1000);
            cpus.limit_milli.unwrap_or(whole)
        }),
        pids: args.pids.unwrap_or(0),
    }
}
