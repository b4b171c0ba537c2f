//! `belljar create`.

use belljar_node::sandbox;
use belljar_node::state::StateRoot;
use belljar_node::state::spec::Life;

use crate::failure::{Failure, status_of};
use crate::options::{GuestOptions, MachineOptions, NameOptions};
use crate::output;

/// Make a sandbox that stays, without starting it
///
/// Prints its id.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar create --name web --cpus 2 --memory 1G --disk 4G
  belljar create --name job --cpus 0.5 -l team=data
  belljar start web")]
pub(crate) struct Args {
    #[command(flatten)]
    naming: NameOptions,

    #[command(flatten)]
    guest: GuestOptions,

    #[command(flatten)]
    machine: MachineOptions,
}

/// Returns the exit status.
pub(crate) fn create(args: &Args) -> u8 {
    status_of(make(args))
}

fn make(args: &Args) -> Result<u8, Failure> {
    let guest = args.guest.spec(&args.machine)?;
    let new = args.naming.describe(Life::Persistent, guest)?;
    let (dir, _lock) = sandbox::create(&StateRoot::locate()?, &new)?;
    output::print(&format!("{}\n", dir.id()));
    Ok(0)
}
