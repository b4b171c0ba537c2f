//! `belljar shell`.

use belljar_node::process::{Outcome, login_shell};

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::session::{self, CommandOptions, Ends, LeavingOptions};

/// Open a login shell in a running sandbox
///
/// The shell is that of the user in the guest's /etc/passwd, on a terminal of its own.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar shell box                       as root
  belljar shell -u alice -w /srv box      as another user, somewhere else
  echo 'uname -a; exit' | belljar shell box

Ctrl-P Ctrl-Q leaves the shell running; 'belljar ps box' and 'belljar attach box ID' find it again.
If the connection to the guest breaks, it is made again. Closing this terminal ends the shell.")]
pub(crate) struct Args {
    #[command(flatten)]
    options: CommandOptions,

    #[command(flatten)]
    leaving: LeavingOptions,

    #[command(flatten)]
    sandbox: BoxArg,
}

/// Returns the exit status.
pub(crate) fn shell(args: &Args) -> u8 {
    status_of(open(args))
}

fn open(args: &Args) -> Result<u8, Failure> {
    let mut spec = args.options.spec(&[]);
    spec.argv = login_shell(args.options.workdir.is_some());
    spec.stdin = true;
    session::give_terminal(&mut spec);
    let ends = Ends {
        stdin: true,
        terminal: true,
        detach_keys: args.leaving.detach_keys.clone(),
        timeout: spec.timeout,
        grace: spec.grace,
        called: args.sandbox.sandbox.clone(),
        ..Ends::default()
    };
    let signals = ends.signals()?;
    let found = args.sandbox.find()?;
    let outcome: Outcome = ends
        .connect(spec.session(), &found, &signals, b"")
        .map_err(|error| session::explain(&found, &error))?;
    session::comment(&outcome);
    Ok(outcome.exit_status())
}
