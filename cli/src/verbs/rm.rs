//! `belljar rm`.

use belljar_node::lifecycle;

use crate::failure::each;
use crate::options::Selection;
use crate::output;

/// Remove sandboxes with all they hold
///
/// Also what crashes left of them. Running ones only with --force.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar rm web
  belljar rm -f web job              ends them first
  belljar rm --all                   all that do not run
  belljar rm -f -l team=data         all that have the label")]
pub(crate) struct Args {
    #[command(flatten)]
    which: Selection,

    /// Running ones too; their guests are not asked
    #[arg(short, long)]
    force: bool,
}

/// Returns the exit status.
pub(crate) fn rm(args: &Args) -> u8 {
    let wanted =
        |state: &str| args.force || !matches!(state, "running" | "paused" | "orphaned" | "busy");
    each(args.which.find(wanted), |found| {
        lifecycle::remove(found, args.force)?;
        output::print(&format!("{}\n", found.id()));
        Ok(())
    })
}
