//! `belljar run`.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_node::assets::Assets;
use belljar_node::drive::DriveSpec;
use belljar_node::ending::{Ended, Meaning, signal_name};
use belljar_node::exec::{ExecSpec, Outcome, Streams, exec};
use belljar_node::sandbox::{BootError, GuestSpec, Limits, Programs, Sandbox};
use belljar_node::stages::Stages;
use belljar_node::state::StateRoot;
use belljar_node::sys::{SIGHUP, SIGINT, SIGTERM, SignalFd};
use belljar_node::{AGENT_PORT, End, cpu};

use crate::OURS;
use crate::arguments::Run;
use crate::report;

/// A guest that is up answers a connection within this time.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A guest with writable drives of the user may take this long to write back.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(20);
/// How long the record of a VMM's end may take after its connections broke.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Returns the exit status.
pub(crate) fn run(options: &Run, begin: Instant) -> u8 {
    let mut stages = Stages::new(begin);
    let status = match boot_and_exec(options, &mut stages) {
        Ok(status) => status,
        Err(Failure::Boot(error)) => {
            report::boot_failure(&error);
            OURS
        }
        Err(Failure::Other {
            status,
            message,
            remedy,
        }) => {
            report::failure(&message, remedy.as_deref());
            status
        }
    };
    if options.boot_time {
        report::stages(&stages);
    }
    status
}

enum Failure {
    Boot(BootError),
    Other {
        status: u8,
        message: String,
        remedy: Option<String>,
    },
}

impl<E: Into<BootError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Boot(error.into())
    }
}

fn ours(message: impl std::fmt::Display) -> Failure {
    Failure::Other {
        status: OURS,
        message: format!("{message}"),
        remedy: None,
    }
}

fn boot_and_exec(options: &Run, stages: &mut Stages) -> Result<u8, Failure> {
    let signals = SignalFd::new(&[SIGINT, SIGTERM, SIGHUP]).map_err(ours)?;
    let root = StateRoot::locate()?;
    let guest = guest_spec(options)?;
    let limits = Limits {
        boot: options.boot_timeout.unwrap_or_else(default_boot_limit),
        cancel: Some(signals.as_fd()),
    };
    let programs = Programs {
        supervisor: PathBuf::from("/proc/self/exe"),
        vmm: vmm_program(options.vmm.as_deref()),
    };
    let mut sandbox = match Sandbox::boot(&root, &programs, &guest, limits, stages) {
        Err(error @ BootError::Cancelled) => return Err(cancelled(&error, &signals)),
        other => other?,
    };

    let outcome = exec_in(&sandbox, options, &signals);
    stages.mark("exec");
    let outcome = match outcome {
        // The guest may have gone while the command ran: then its end is what to tell.
        Err(failure) => return Err(gone(&mut sandbox).unwrap_or(failure)),
        Ok(Outcome::Ended(how)) if is_lost(&how) => {
            return Err(gone(&mut sandbox)
                .unwrap_or_else(|| ours(format!("the end of the command is not known: {how:?}"))));
        }
        Ok(outcome) => outcome,
    };
    comment(&outcome);
    let given_up = matches!(outcome, Outcome::GivenUp(_));
    let unsaved = !given_up
        && options
            .drive
            .iter()
            .any(|drive: &DriveSpec| !drive.read_only);
    if unsaved && !matches!(sandbox.shut_down(SHUTDOWN_LIMIT), Ok(Some(_))) {
        report::failure(
            "the guest did not switch itself off in time; what it wrote to the drives last may be missing",
            None,
        );
    }
    let _ = sandbox.tear_down();
    stages.mark("end");
    Ok(outcome.exit_status())
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

fn exec_in(sandbox: &Sandbox, options: &Run, signals: &SignalFd) -> Result<Outcome, Failure> {
    let stream = sandbox
        .connect(AGENT_PORT, Instant::now() + CONNECT_LIMIT)
        .map_err(ours)?;
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

fn guest_spec(options: &Run) -> Result<GuestSpec, Failure> {
    Ok(GuestSpec {
        assets: Assets::locate(options.assets.as_deref())?,
        kernel: options.kernel.clone(),
        initramfs: options.initramfs.clone(),
        image: options.image.clone().unwrap_or_default(),
        disk: options.disk.clone().unwrap_or_default(),
        drives: options.drive.clone(),
        vcpus: options.cpus,
        memory: options.memory,
        boot_args: options.boot_args.clone(),
    })
}

fn exec_spec(options: &Run) -> ExecSpec {
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

/// The program named, or `belljar-vmm` beside this one.
pub(crate) fn vmm_program(named: Option<&Path>) -> PathBuf {
    named.map_or_else(
        || {
            let beside = std::env::current_exe().unwrap_or_default();
            beside.with_file_name("belljar-vmm")
        },
        // The VMM runs in the sandbox's directory.
        |path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()),
    )
}

/// A virtual machine in a virtual machine boots slowly.
fn default_boot_limit() -> Duration {
    Duration::from_secs(if cpu::is_virtual() { 60 } else { 30 })
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
