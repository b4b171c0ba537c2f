//! `belljar kill`.

use belljar_node::process::{self, Selector, signal_number};
use belljar_node::v1::signal::Scope;

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;

/// Send a signal to processes in a sandbox
///
/// To the process group of each, as Ctrl-C would, unless --tree or --process says otherwise.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar kill box web                    SIGTERM, to its process group
  belljar kill -s KILL --tree box web     and to everything it has started, wherever that has gone
  belljar kill -s HUP --process box 7     to that process alone

Exit status: 0 if all were there, also if they had ended; 125 otherwise.")]
pub(crate) struct Args {
    /// A signal by name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "TERM", value_parser = number)]
    signal: i32,

    /// To the process and all its descendants
    #[arg(long, conflicts_with = "process")]
    tree: bool,

    /// To the process alone
    #[arg(long)]
    process: bool,

    #[command(flatten)]
    sandbox: BoxArg,

    /// Ids or names of processes, or pid:N
    #[arg(required = true, value_name = "PROCESS")]
    processes: Vec<Selector>,
}

fn number(text: &str) -> Result<i32, &'static str> {
    signal_number(text).ok_or("write a name like TERM, or a number from 1 to 64")
}

/// Returns the exit status.
pub(crate) fn kill(args: &Args) -> u8 {
    status_of(send(args))
}

fn send(args: &Args) -> Result<u8, Failure> {
    let found = args.sandbox.find()?;
    let scope = match (args.tree, args.process) {
        (true, _) => Scope::Tree,
        (_, true) => Scope::Process,
        _ => Scope::Group,
    };
    let mut status = 0;
    for which in &args.processes {
        // One that is not there does not keep the others.
        if let Err(error) = process::signal(&found, which, args.signal, scope) {
            let connected = error.refusal().is_some();
            let failure = Failure::from(error);
            if !connected {
                return Err(failure);
            }
            status = failure.tell();
        }
    }
    Ok(status)
}
