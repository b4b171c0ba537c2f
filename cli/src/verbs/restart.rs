//! `belljar restart`.

use std::os::fd::AsFd;
use std::time::Instant;

use belljar_node::assets::Assets;
use belljar_node::lifecycle;
use belljar_node::registry::Found;
use belljar_node::sandbox::Limits;
use belljar_node::stages::Stages;
use belljar_node::sys::{SIGHUP, SIGINT, SIGTERM, SignalFd};

use crate::failure::{Failure, each};
use crate::options::{BootOptions, MachineOptions, Selection};
use crate::output;
use crate::verbs::start::not_started;
use crate::verbs::stop::StopOptions;

/// End the guests of sandboxes that stay, and start them anew
///
/// As 'stop' and then 'start': what is on the disk stays, what runs and what is in memory does not, ports
/// that the supervisor forwarded are to be forwarded again. A sandbox that does not run is started.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar restart web
  belljar restart --force web        of a guest that hangs: what it has not written back is lost
  belljar restart --all              all that run")]
pub(crate) struct Args {
    #[command(flatten)]
    which: Selection,

    #[command(flatten)]
    stop: StopOptions,

    #[command(flatten)]
    machine: MachineOptions,

    #[command(flatten)]
    boot: BootOptions,
}

/// Returns the exit status.
pub(crate) fn restart(args: &Args) -> u8 {
    let up = |state: &str| matches!(state, "running" | "paused" | "orphaned");
    each(args.which.find(up), |found| restart_one(args, found))
}

fn restart_one(args: &Args, found: &Found) -> Result<(), Failure> {
    let signals = SignalFd::new(&[SIGINT, SIGTERM, SIGHUP]).map_err(Failure::new)?;
    let limits = Limits {
        boot: args.boot.limit(),
        cancel: Some(signals.as_fd()),
    };
    let mut stages = Stages::new(Instant::now());
    // What is missing is to be known before the guest is ended.
    let assets = Assets::locate(args.machine.assets.as_deref())?;
    let programs = args.machine.programs();
    let called = found.called();
    let how = args.stop.how();
    let restarted = lifecycle::restart(found, how, &programs, &assets, limits, &mut stages)
        .map_err(|error| not_started(error, &signals))?;
    if let Some(stopped) = &restarted.stopped {
        args.stop.comment(&called, stopped);
    }
    let dir = restarted.sandbox.release()?;
    output::print(&format!("{}\n", dir.id()));
    Ok(())
}
