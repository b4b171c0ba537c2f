//! `belljar pause` and `belljar resume`.

use belljar_node::lifecycle;

use crate::failure::each;
use crate::options::Selection;
use crate::output;

/// Let the processors of guests stand still
///
/// Memory and disks stay as they are. Connections are kept, and answered after 'resume'.
#[derive(Debug, clap::Args)]
pub(crate) struct Pause {
    #[command(flatten)]
    which: Selection,
}

/// Let paused guests go on
#[derive(Debug, clap::Args)]
pub(crate) struct Resume {
    #[command(flatten)]
    which: Selection,
}

/// Returns the exit status.
pub(crate) fn pause(args: &Pause) -> u8 {
    each(args.which.find(|state| state == "running"), |found| {
        lifecycle::pause(found)?;
        output::print(&format!("{}\n", found.id()));
        Ok(())
    })
}

/// Returns the exit status.
pub(crate) fn resume(args: &Resume) -> u8 {
    each(args.which.find(|state| state == "paused"), |found| {
        lifecycle::resume(found)?;
        output::print(&format!("{}\n", found.id()));
        Ok(())
    })
}
