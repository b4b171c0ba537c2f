//! `belljar run`.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use belljar_node::End;
use belljar_node::ending::{Ended, Meaning, signal_name};
use belljar_node::process::{Outcome, SIGNALS};
use belljar_node::sandbox::{BootError, ImageChoice, Limits, Sandbox};
use belljar_node::stages::Stages;
use belljar_node::state::StateRoot;
use belljar_node::state::spec::Life;
use belljar_node::sys::{SIGINT, SignalFd};

use crate::OURS;
use crate::failure::{Failure, status_of};
use crate::options::{BootOptions, GuestOptions, KeeperOptions, MachineOptions, NameOptions};
use crate::output;
use crate::report;
use crate::session::{self, CommandOptions, Ends, MAIN, TerminalOptions};
use crate::verbs::restore::From;

/// Boot a fresh guest and run a command in it
///
/// Output and exit status are the command's. Nothing is left behind, whatever happens, unless the sandbox
/// is given a name (then it stays, stopped) or -d (then the guest runs on).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar run -- sh -c 'ls / | wc -l'            a pipeline needs a shell
  echo hello | belljar run -i -- tr a-z A-Z      -i passes standard input on
  belljar run -it -- bash                        a terminal; gone when bash ends
  belljar run --memory 1G --cpus 2 -- make -j2
  belljar run --drive data.img:ro -- mount -o ro /dev/vdc /mnt
  belljar run --from ready -- ./tests            in a guest that goes on from a snapshot
  belljar run -d --name web                      a guest that runs until it is stopped
  belljar run -d -- ./server                     with a command in it: see logs, attach
  belljar run --timeout 10s -- ./might-hang      exit status 124 after ten seconds
  belljar run --boot-time -- true                what booting took, by stages

Ctrl-C sends SIGINT to the command in the guest; the second one kills it; the third one
gives up waiting and removes the guest. On a terminal (-it) all keys go to the command, and
Ctrl-P Ctrl-Q leaves guest and command running.

Exit status: the command's own; 128+n if a signal ended it; 124 for --timeout;
126 not executable; 127 not found; 125 if Bell Jar itself failed.")]
pub(crate) struct Args {
    /// Program and its arguments; no shell is involved
    #[arg(
        last = true,
        required_unless_present = "detach",
        value_name = "COMMAND"
    )]
    pub(crate) command: Vec<OsString>,

    /// Print the id of the sandbox, and leave the guest running
    #[arg(short, long)]
    detach: bool,

    /// Remove the sandbox at the end even if it has a name
    #[arg(long)]
    rm: bool,

    /// Go on from a snapshot instead of booting; what the guest is made of is the snapshot's
    #[arg(
        long,
        value_name = "SNAPSHOT",
        conflicts_with_all = ["cpus", "memory", "disk", "drive", "kernel", "initramfs", "boot_args"]
    )]
    from: Option<String>,

    #[command(flatten)]
    keeper: KeeperOptions,

    #[command(flatten)]
    naming: NameOptions,

    #[command(flatten)]
    pub(crate) terminal: TerminalOptions,

    #[command(flatten)]
    command_options: CommandOptions,

    #[command(flatten)]
    guest: GuestOptions,

    #[command(flatten)]
    machine: MachineOptions,

    #[command(flatten)]
    boot: BootOptions,

    /// Print the boot time and its stages on standard error
    #[arg(
        short = 'v',
        long,
        visible_alias = "stages",
        help_heading = "This machine"
    )]
    pub(crate) boot_time: bool,
}

/// A guest with writable drives of the user may take this long to write back.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(20);
/// How long the record of a VMM's end may take after its connections broke.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Returns the exit status.
pub(crate) fn run(options: &Args, begin: Instant) -> u8 {
    let mut stages = Stages::new(begin);
    let status = status_of(boot_and_exec(options, &mut stages));
    if options.boot_time {
        report::stages(&stages);
    }
    status
}

fn boot_and_exec(options: &Args, stages: &mut Stages) -> Result<u8, Failure> {
    let signals = SignalFd::new(&SIGNALS).map_err(Failure::new)?;
    let limits = Limits {
        boot: options.boot.limit(),
        cancel: Some(signals.as_fd()),
    };
    let mut sandbox = match bring_up(options, limits, stages) {
        Err(Failure::Boot(error @ BootError::Cancelled)) => {
            return Err(cancelled(&error, &signals));
        }
        other => other?,
    };

    if options.detach {
        if !options.command.is_empty() {
            exec_in(&sandbox, options)?;
        }
        let dir = sandbox.release()?;
        output::print(&format!("{}\n", dir.id()));
        return Ok(0);
    }
    let outcome = exec_in(&sandbox, options);
    stages.mark("exec");
    let outcome = match outcome {
        // The guest may have gone while the command ran: then its end is what to tell.
        Err(failure) => return Err(gone(&mut sandbox).unwrap_or(failure)),
        Ok(Outcome::Ended {
            how: End::Lost(lost),
            ..
        }) => {
            return Err(gone(&mut sandbox).unwrap_or_else(|| {
                let reason = output::escaped(&lost.reason).into_owned();
                Failure::new(format!("the end of the command is not known: {reason}"))
            }));
        }
        Ok(outcome) => outcome,
    };
    if outcome == Outcome::Detached {
        sandbox.release()?;
        return Ok(0);
    }
    session::comment(&outcome);
    let given_up = matches!(outcome, Outcome::GivenUp(_));
    let drives = &options.guest.drive;
    let kept = life(options) == Life::Persistent || drives.iter().any(|drive| !drive.read_only);
    let unsaved = kept && !given_up;
    if unsaved && !matches!(sandbox.shut_down(SHUTDOWN_LIMIT), Ok(Some(_))) {
        report::failure(
            "the guest did not switch itself off in time; what it wrote last may be missing",
            None,
        );
    }
    let _ = sandbox.tear_down();
    stages.mark("end");
    Ok(outcome.exit_status())
}

/// Boots a guest, or restores one.
fn bring_up(options: &Args, limits: Limits<'_>, stages: &mut Stages) -> Result<Sandbox, Failure> {
    if let Some(snapshot) = &options.from {
        let clone = options.naming.clone_of(life(options));
        let from = From {
            snapshot,
            image: match &options.guest.image {
                Some(ImageChoice::Path(path)) => Some(path.clone()),
                _ => None,
            },
            keeper: &options.keeper,
            machine: &options.machine,
        };
        return from.restore(&clone, limits, stages);
    }
    let root = StateRoot::locate()?;
    let guest = options.guest.spec(&options.machine)?;
    let new = options.naming.describe(life(options), guest)?;
    let programs = options.machine.programs();
    Ok(Sandbox::boot(&root, &programs, &new, limits, stages)?)
}

/// What happens to the sandbox at the end.
fn life(options: &Args) -> Life {
    if options.naming.name.is_some() && !options.rm {
        Life::Persistent
    } else if options.detach {
        Life::Detached
    } else {
        Life::Owned
    }
}

fn cancelled(error: &BootError, signals: &SignalFd) -> Failure {
    let signal = signals.take().unwrap_or(SIGINT);
    Failure::Other {
        status: Outcome::GivenUp(signal).exit_status(),
        message: error.to_string(),
        remedy: None,
    }
}

fn exec_in(sandbox: &Sandbox, options: &Args) -> Result<Outcome, Failure> {
    let mut spec = options.command_options.spec(&options.command);
    options.terminal.apply(&mut spec);
    let mut ends = Ends::of(&options.terminal, &spec);
    MAIN.clone_into(&mut spec.name);
    sandbox.id().clone_into(&mut ends.called);
    if options.detach {
        spec.detached = true;
        ends = Ends {
            quiet: true,
            ..Ends::default()
        };
    }
    let signals = ends.signals()?;
    ends.connect(spec.session(), &sandbox.found(), &signals, b"")
        .map_err(|error| session::failure(&error, sandbox.id()))
}

/// If the VMM has ended, how.
fn gone(sandbox: &mut Sandbox) -> Option<Failure> {
    match sandbox.wait_end(END_LIMIT) {
        Ok(Some(ended)) => Some(Failure::Other {
            status: OURS,
            message: ended_message(&ended),
            remedy: Some(end_remedy(&ended)),
        }),
        Ok(None) => None,
        Err(error) => Some(Failure::Boot(error)),
    }
}

fn ended_message(ended: &Ended) -> String {
    let mut quoted = String::new();
    report::quote(
        &mut quoted,
        "last lines of the guest's console",
        &ended.console,
    );
    report::quote(&mut quoted, "last lines of the VMM's log", &ended.log);
    report::print(&quoted);
    format!("{} while the command was running", ended.meaning)
}

fn end_remedy(ended: &Ended) -> String {
    match ended.meaning {
        Meaning::Signalled(9) => "if nobody killed it, the host ran out of memory".into(),
        Meaning::Signalled(signal) => {
            format!(
                "{} ended the VMM: please report it with its log",
                signal_name(signal)
            )
        }
        Meaning::PoweredOff | Meaning::Rebooted => {
            "the command, or something it started, switched the guest off".into()
        }
        _ => "the quoted lines say why; more memory (--memory) often helps".into(),
    }
}
