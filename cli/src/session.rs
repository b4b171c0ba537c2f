//! The user's terminal and streams connected with a process in a guest: what exec, shell, attach, logs
//! and run share.

use std::ffi::OsString;
use std::io::{IsTerminal, stderr, stdin, stdout};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use belljar_node::End;
use belljar_node::process::session::Channel;
use belljar_node::process::terminal::{self, RawTerminal};
use belljar_node::process::{
    self, DetachKeys, Dial, ExecSpec, Io, Notice, OnInterrupt, Outcome, Patience, SIGNALS, Session,
    SessionError, TERMINAL_SIGNALS,
};
use belljar_node::registry::Found;
use belljar_node::sys::SignalFd;
use belljar_node::v1;

use crate::OURS;
use crate::failure::Failure;
use crate::output::escaped;
use crate::report;
use crate::values;

/// The name of the process that a sandbox was made for.
pub(crate) const MAIN: &str = "main";

/// How a command is to run.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct CommandOptions {
    /// Set a variable in the command's environment; NAME alone copies it from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,

    /// Directory the command starts in
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,

    /// User the command runs as: a name or number of the guest, with a group if given
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,

    /// End the command after this time: 30s, 5m, 1h, 500ms
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    pub(crate) timeout: Option<Duration>,

    /// Time between SIGTERM and SIGKILL when --timeout has passed [default: 2s]
    #[arg(long, value_name = "TIME", value_parser = values::time, requires = "timeout")]
    pub(crate) grace: Option<Duration>,
}

impl CommandOptions {
    /// The command with all that is said here.
    pub(crate) fn spec(&self, command: &[OsString]) -> ExecSpec {
        let bytes = |text: &OsString| text.as_bytes().to_vec();
        ExecSpec {
            argv: command.iter().map(bytes).collect(),
            env: self.env.iter().filter_map(variable).collect(),
            workdir: self.workdir.as_ref().map(bytes).unwrap_or_default(),
            user: self.user.clone().unwrap_or_default(),
            timeout: self.timeout,
            grace: self.grace,
            ..ExecSpec::default()
        }
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

/// Whether a command reads from here, and whether it gets a terminal.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct TerminalOptions {
    /// Pass standard input on to the command
    #[arg(short, long)]
    pub(crate) interactive: bool,

    /// Run it on a terminal of its own; with -i this is so anyway if standard input and output are one here
    #[arg(short, long, overrides_with = "no_tty")]
    pub(crate) tty: bool,

    /// No terminal, even with -i on one
    #[arg(short = 'T', long, overrides_with = "tty")]
    pub(crate) no_tty: bool,

    #[command(flatten)]
    pub(crate) leaving: LeavingOptions,
}

/// How a terminal is left.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct LeavingOptions {
    /// Keys that leave the terminal and let its program go on; 'none' for no such keys
    /// [default: ctrl-p,ctrl-q]
    #[arg(long, value_name = "KEYS")]
    pub(crate) detach_keys: Option<DetachKeys>,
}

impl TerminalOptions {
    /// Whether the command gets a terminal.
    pub(crate) fn wants_terminal(&self) -> bool {
        let both = || stdin().is_terminal() && stdout().is_terminal();
        self.tty || (self.interactive && !self.no_tty && both())
    }

    /// Fills in what concerns input and terminal.
    pub(crate) fn apply(&self, spec: &mut ExecSpec) {
        spec.stdin = self.interactive;
        if self.wants_terminal() {
            give_terminal(spec);
        }
    }
}

/// A terminal of the size of this one, and of its kind.
pub(crate) fn give_terminal(spec: &mut ExecSpec) {
    spec.terminal = Some(terminal::size_of(stdout().as_fd()).unwrap_or_default());
    for name in ["TERM", "COLORTERM"] {
        let set = spec.env.iter().any(|setting| {
            setting.starts_with(name.as_bytes()) && setting.get(name.len()) == Some(&b'=')
        });
        if !set && let Some(setting) = variable(&name.into()) {
            spec.env.push(setting);
        }
    }
}

/// What of the user is connected.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    pub(crate) stdin: bool,
    /// The process has a terminal: the one here becomes its keyboard and screen.
    pub(crate) terminal: bool,
    pub(crate) detach_keys: Option<DetachKeys>,
    pub(crate) timeout: Option<Duration>,
    /// Between the signals that end it then; `None`: as usual.
    pub(crate) grace: Option<Duration>,
    /// SIGINT ends the session, and is not passed on.
    pub(crate) give_up: bool,
    /// Nothing that is typed reaches the process.
    pub(crate) watch_only: bool,
    /// What 'belljar attach' finds the process by, but for its id if that is told later.
    pub(crate) called: String,
    /// Nothing is said about beginning and end.
    pub(crate) quiet: bool,
}

impl Ends {
    /// Of a command that is started.
    pub(crate) fn of(options: &TerminalOptions, spec: &ExecSpec) -> Self {
        Self {
            stdin: options.interactive,
            terminal: spec.terminal.is_some(),
            detach_keys: options.leaving.detach_keys.clone(),
            timeout: spec.timeout,
            grace: spec.grace,
            ..Self::default()
        }
    }

    /// Whether the terminal here is made raw.
    fn is_raw(&self) -> bool {
        self.terminal && (self.stdin || self.watch_only) && stdin().is_terminal()
    }

    /// The signals that have to be collected; block them before anything takes time.
    pub(crate) fn signals(&self) -> Result<SignalFd, Failure> {
        let wanted: &[i32] = if self.is_raw() {
            &TERMINAL_SIGNALS
        } else {
            &SIGNALS
        };
        SignalFd::new(wanted).map_err(Failure::new)
    }

    /// Carries the session to its end. `first` is shown before anything of the process.
    pub(crate) fn connect(
        self,
        session: Session,
        dial: &dyn Dial,
        signals: &SignalFd,
        first: &[u8],
    ) -> Result<Outcome, SessionError> {
        let (stdin, stdout, stderr) = (stdin(), stdout(), stderr());
        let raw = self.is_raw();
        let keys = self.detach_keys.unwrap_or_default();
        let mut id = None;
        let mut notice = |notice: Notice<'_>| {
            match &notice {
                Notice::Started(started) => id = Some(started.id),
                Notice::Attached(info) => id = Some(info.id),
                _ => {}
            }
            tell(&notice, raw, self.quiet);
        };
        let mut io = Io::new(stdout.as_fd(), stderr.as_fd(), &mut notice);
        io.stdin = self.stdin.then(|| stdin.as_fd());
        io.signals = Some(signals);
        io.timeout = self.timeout;
        if self.give_up {
            io.on_interrupt = OnInterrupt::GiveUp;
        }
        if raw {
            io.terminal = Some(RawTerminal::enter(stdout.as_fd())?);
            io.detach_keys = Some(keys);
            io.watch_only = self.watch_only;
            io.stdin = Some(stdin.as_fd());
        }
        io.first = first;
        let mut patience = Patience::default();
        patience.grace = self.grace.unwrap_or(patience.grace);
        let outcome = process::run(session, dial, io, patience);
        if raw && !self.quiet && matches!(outcome, Ok(Outcome::Detached)) {
            let id = id.map(|id| id.to_string()).unwrap_or_default();
            report::print(&format!(
                "\ndetached; to come back: belljar attach {} {id}\n",
                self.called
            ));
        }
        outcome
    }
}

/// What the user is told while a session goes on.
fn tell(notice: &Notice<'_>, raw: bool, quiet: bool) {
    let text = match notice {
        Notice::Started(started) if started.existed && !quiet => format!(
            "there is a process of that name already, {}: this is what it says",
            started.id
        ),
        Notice::Gap { channel, from, to } => {
            let stream = match channel {
                Channel::Stdout => "output",
                Channel::Stderr => "error output",
            };
            let count = to.saturating_sub(*from);
            format!("{count} bytes of {stream} are missing here (from byte {from} on)")
        }
        Notice::Waiting => "the connection to the guest is cut; trying again …".to_owned(),
        Notice::Slow => "the guest does not answer; waiting …".to_owned(),
        Notice::Resumed => "connected again".to_owned(),
        Notice::Started(_) | Notice::Attached(_) => return,
    };
    let end = if raw { "\r\n" } else { "\n" };
    report::meanwhile(&text, end);
}

/// What an exit status alone does not say.
pub(crate) fn comment(outcome: &Outcome) {
    match outcome {
        Outcome::Ended {
            how: End::OutOfMemory(_),
            ..
        } => report::failure(
            "the command ran out of memory, and the guest's kernel ended it",
            Some("give the guest, or the command if it was limited, more with --memory"),
        ),
        Outcome::Ended {
            how: End::Lost(lost),
            ..
        } => report::failure(
            &format!(
                "the end of the command is not known: {}",
                escaped(&lost.reason)
            ),
            None,
        ),
        Outcome::TimedOut => report::failure(
            "the command's time was over, and the guest did not even answer",
            None,
        ),
        _ => {}
    }
}

/// Why a session with a found sandbox failed: its state says more than a broken connection.
pub(crate) fn explain(found: &Found, error: &SessionError) -> Failure {
    let unreachable = matches!(
        error,
        SessionError::Gone(_)
            | SessionError::Unreachable { .. }
            | SessionError::NoAnswer(_)
            | SessionError::Cut { .. }
            | SessionError::CutBeforeStart
    );
    if unreachable && let Some(why) = found.why_unreachable() {
        return why.into();
    }
    failure(error, &found.called())
}

/// Why a session failed; `called`: by what the user knows the sandbox.
pub(crate) fn failure(error: &SessionError, called: &str) -> Failure {
    Failure::Other {
        status: error.exit_status(),
        message: escaped(&error.to_string()).into_owned(),
        remedy: error.remedy(called),
    }
}

/// The exit status of a process that ended.
pub(crate) fn status_of_end(end: &v1::End) -> u8 {
    end.how.as_ref().map_or(OURS, process::exit_status)
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

    #[test]
    fn a_terminal_passes_its_kind_on_unless_told_otherwise() {
        let mut spec = ExecSpec {
            env: vec![b"TERM=vt100".to_vec()],
            ..ExecSpec::default()
        };
        give_terminal(&mut spec);
        let terms = spec.env.iter().filter(|env| env.starts_with(b"TERM="));
        assert_eq!(terms.count(), 1);
        assert!(spec.terminal.is_some());
    }
}
