//! `belljar shell`.

use std::ffi::OsString;

use belljar_node::process::Outcome;

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

/// Becomes the login shell of the user it runs as, in the home directory unless another was asked for. The
/// agent sets USER and HOME.
const LOGIN: &str = r#"shell=
while IFS=: read -r name x x x x x program; do
    if [ "$name" = "$USER" ]; then shell=$program; break; fi
done 2>/dev/null </etc/passwd
[ -n "$shell" ] && [ -x "$shell" ] || shell=/bin/sh
[ -n "$1" ] || cd 2>/dev/null
SHELL=$shell
export SHELL
exec "$shell" -l"#;

/// Returns the exit status.
pub(crate) fn shell(args: &Args) -> u8 {
    status_of(open(args))
}

fn open(args: &Args) -> Result<u8, Failure> {
    let stays: &str = if args.options.workdir.is_some() {
        "stays"
    } else {
        ""
    };
    let command = ["/bin/sh", "-c", LOGIN, "sh", stays].map(OsString::from);
    let mut spec = args.options.spec(&command);
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
