//! `belljar run`.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use belljar_node::ending::{Ended, Meaning, signal_name};
use belljar_node::exec::{ExecSpec, Outcome, Streams, exec};
use belljar_node::sandbox::{BootError, Limits, Sandbox};
use belljar_node::stages::Stages;
use belljar_node::state::StateRoot;
use belljar_node::state::spec::Life;
use belljar_node::sys::{SIGHUP, SIGINT, SIGTERM, SignalFd};
use belljar_node::{AGENT_PORT, End};

use crate::OURS;
use crate::failure::{Failure, status_of};
use crate::options::{BootOptions, GuestOptions, MachineOptions, NameOptions, connect_deadline};
use crate::output;
use crate::report;
use crate::values;

/// Boot a fresh guest and run a command in it
///
/// Output and exit status are the command's. Nothing is left behind, whatever happens, unless the sandbox
/// is given a name (then it stays, stopped) or -d (then the guest runs on).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar run -- sh -c 'ls / | wc -l'            a pipeline needs a shell
  echo hello | belljar run -i -- tr a-z A-Z      -i passes standard input on
  belljar run --memory 1G --cpus 2 -- make -j2
  belljar run --drive data.img:ro -- mount -o ro /dev/vdc /mnt
  belljar run -d --name web                      a guest that runs until it is stopped
  belljar run --timeout 10s -- ./might-hang      exit status 124 after ten seconds
  belljar run --boot-time -- true                what booting took, by stages

Ctrl-C sends SIGINT to the command in the guest; the second one kills it; the third one
gives up waiting and removes the guest.

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
    #[arg(short, long, conflicts_with_all = ["interactive", "timeout"])]
    detach: bool,

    /// Remove the sandbox at the end even if it has a name
    #[arg(long)]
    rm: bool,

    #[command(flatten)]
    naming: NameOptions,

    /// Pass standard input on to the command
    #[arg(short, long)]
    pub(crate) interactive: bool,

    /// Set a variable in the command's environment; NAME alone copies it from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,

    /// Directory the command starts in
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<OsString>,

    /// User the command runs as: a name or number of the guest, with a group if given
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,

    /// End the command after this time: 30s, 5m, 1h, 500ms
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    timeout: Option<Duration>,

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
    let signals = SignalFd::new(&[SIGINT, SIGTERM, SIGHUP]).map_err(Failure::new)?;
    let root = StateRoot::locate()?;
    let guest = options.guest.spec(&options.machine)?;
    let new = options.naming.describe(life(options), guest)?;
    let limits = Limits {
        boot: options.boot.limit(),
        cancel: Some(signals.as_fd()),
    };
    let programs = options.machine.programs();
    let mut sandbox = match Sandbox::boot(&root, &programs, &new, limits, stages) {
        Err(error @ BootError::Cancelled) => return Err(cancelled(&error, &signals)),
        other => other?,
    };

    if options.detach {
        let dir = sandbox.release()?;
        output::print(&format!("{}\n", dir.id()));
        return Ok(0);
    }
    let outcome = exec_in(&sandbox, options, &signals);
    stages.mark("exec");
    let outcome = match outcome {
        // The guest may have gone while the command ran: then its end is what to tell.
        Err(failure) => return Err(gone(&mut sandbox).unwrap_or(failure)),
        Ok(Outcome::Ended(how)) if is_lost(&how) => {
            return Err(gone(&mut sandbox).unwrap_or_else(|| {
                Failure::new(format!("the end of the command is not known: {how:?}"))
            }));
        }
        Ok(outcome) => outcome,
    };
    comment(&outcome);
    let given_up = matches!(outcome, Outcome::GivenUp(_));
    let drives = &options.guest.drive;
    let kept = new.life == Life::Persistent || drives.iter().any(|drive| !drive.read_only);
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

/// What an exit status alone does not say.
fn comment(outcome: &Outcome) {
    match outcome {
        Outcome::Ended(End::OutOfMemory(_)) => report::failure(
            "the guest ran out of memory, and its kernel ended the command",
            Some("give it more with --memory"),
        ),
        Outcome::TimedOut => report::failure(
            "the command's time was over, and the guest did not even answer",
            None,
        ),
        _ => {}
    }
}

fn is_lost(how: &End) -> bool {
    matches!(how, End::Lost(_))
}

fn exec_in(sandbox: &Sandbox, options: &Args, signals: &SignalFd) -> Result<Outcome, Failure> {
    let stream = sandbox
        .connect(AGENT_PORT, connect_deadline())
        .map_err(Failure::new)?;
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let streams = Streams {
        stdin: options.interactive.then(|| stdin.as_fd()),
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
        signals: Some(signals),
    };
    exec(stream, &exec_spec(options), streams).map_err(|error| Failure::Other {
        status: error.exit_status(),
        message: error.to_string(),
        remedy: None,
    })
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

fn exec_spec(options: &Args) -> ExecSpec {
    let bytes = |text: &OsString| text.as_bytes().to_vec();
    ExecSpec {
        argv: options.command.iter().map(bytes).collect(),
        env: options.env.iter().filter_map(variable).collect(),
        workdir: options.workdir.as_ref().map(bytes).unwrap_or_default(),
        user: options.user.clone().unwrap_or_default(),
        timeout: options.timeout,
    }
}

/// `NAME=VALUE` as it is; `NAME` with its value here, if it has one.
fn variable(text: &OsString) -> Option<Vec<u8>> {
    let mut setting = text.as_bytes().to_vec();
    if !setting.contains(&b'=') {
        let value = std::env::var_os(text)?;
        setting.push(b'=');
        setting.extend_from_slice(value.as_bytes());
    }
    Some(setting)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_given_or_copied() {
        assert_eq!(variable(&"A=b=c".into()), Some(b"A=b=c".to_vec()));
        assert_eq!(variable(&"A=".into()), Some(b"A=".to_vec()));
        assert_eq!(variable(&"BELLJAR_NO_SUCH_VARIABLE".into()), None);
        let path = variable(&"PATH".into()).unwrap();
        assert!(path.starts_with(b"PATH=") && path.len() > 5);
    }
}
