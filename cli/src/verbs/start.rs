//! `belljar start`.

use std::os::fd::AsFd;
use std::time::Instant;

use belljar_node::assets::Assets;
use belljar_node::lifecycle::{self, StartError};
use belljar_node::registry::Found;
use belljar_node::sandbox::{BootError, Limits};
use belljar_node::stages::Stages;
use belljar_node::sys::{SIGHUP, SIGINT, SIGTERM, SignalFd};

use crate::OURS;
use crate::failure::{Failure, each};
use crate::options::{BootOptions, MachineOptions, Selection};
use crate::output;
use crate::report;

/// Start sandboxes that were made or stopped before
///
/// Returns when the guest answers. Of two starts at the same time one wins, the other one says so.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar start web
  belljar start -v web               what booting took, by stages
  belljar start -l team=data         all that have the label")]
pub(crate) struct Args {
    #[command(flatten)]
    which: Selection,

    #[command(flatten)]
    machine: MachineOptions,

    #[command(flatten)]
    boot: BootOptions,

    /// Print the boot time and its stages on standard error
    #[arg(short = 'v', long, visible_alias = "stages")]
    boot_time: bool,
}

/// Returns the exit status.
pub(crate) fn start(args: &Args) -> u8 {
    let stopped = |state: &str| matches!(state, "created" | "stopped" | "crashed");
    each(args.which.find(stopped), |found| start_one(args, found))
}

fn start_one(args: &Args, found: &Found) -> Result<(), Failure> {
    let signals = SignalFd::new(&[SIGINT, SIGTERM, SIGHUP]).map_err(Failure::new)?;
    let limits = Limits {
        boot: args.boot.limit(),
        cancel: Some(signals.as_fd()),
    };
    let mut stages = Stages::new(Instant::now());
    let assets = Assets::locate(args.machine.assets.as_deref())?;
    let programs = args.machine.programs();
    let sandbox = lifecycle::start(found, &programs, &assets, limits, &mut stages)
        .map_err(|error| not_started(error, &signals))?;
    if args.boot_time {
        report::stages(&stages);
    }
    let dir = sandbox.release()?;
    output::print(&format!("{}\n", dir.id()));
    Ok(())
}

/// Why it does not run; that the user has cancelled it is an exit status of its own.
pub(crate) fn not_started(error: StartError, signals: &SignalFd) -> Failure {
    match error {
        StartError::Boot(error @ BootError::Cancelled) => {
            let signal = signals.take().unwrap_or(SIGINT);
            Failure::Other {
                status: u8::try_from(signal.saturating_add(128)).unwrap_or(OURS),
                message: error.to_string(),
                remedy: None,
            }
        }
        other => other.into(),
    }
}
