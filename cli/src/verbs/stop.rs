//! `belljar stop`.

use std::time::Duration;

use belljar_node::lifecycle::{self, Stop, Stopped};

use crate::failure::each;
use crate::options::Selection;
use crate::output;
use crate::report;
use crate::values;

/// End the guests of sandboxes
///
/// The guest's programs get SIGTERM, then SIGKILL, and its disk is written back. A guest that has not
/// switched itself off after the time limit is killed. Sandboxes made by 'run' without a name go away.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar stop web
  belljar stop --all
  belljar stop --force web           does not ask the guest: what it has not written back is lost")]
pub(crate) struct Args {
    #[command(flatten)]
    which: Selection,

    #[command(flatten)]
    stop: StopOptions,
}

/// How a guest is ended.
#[derive(Debug, clap::Args)]
pub(crate) struct StopOptions {
    /// Do not ask the guest
    #[arg(short, long)]
    force: bool,

    /// Kill a guest that has not ended after this time
    #[arg(short, long, value_name = "TIME", default_value = "20s", value_parser = values::time)]
    time: Duration,

    /// Time that the guest's programs have between SIGTERM and SIGKILL [default: 2s]
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    grace: Option<Duration>,
}

impl StopOptions {
    /// For the function that does it.
    pub(crate) const fn how(&self) -> Stop {
        if self.force {
            Stop::FORCE
        } else {
            Stop {
                ask: true,
                grace: self.grace,
                limit: self.time,
            }
        }
    }

    /// Tells of a guest that was asked in vain.
    pub(crate) fn comment(&self, called: &str, stopped: &Stopped) {
        if !stopped.in_order && !self.force {
            report::note(&format!(
                "the guest of {called} did not switch itself off, so it was killed; what it had not written back is lost"
            ));
        }
    }
}

/// Returns the exit status.
pub(crate) fn stop(args: &Args) -> u8 {
    let how = args.stop.how();
    let up = |state: &str| matches!(state, "running" | "paused" | "orphaned");
    each(args.which.find(up), |found| {
        let called = found.called();
        let stopped = lifecycle::stop(found, how)?;
        args.stop.comment(&called, &stopped);
        output::print(&format!("{}\n", found.id()));
        Ok(())
    })
}
