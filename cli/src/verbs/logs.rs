//! `belljar logs`.

use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use belljar_node::process::{Outcome, Selector, Session};
use belljar_node::v1::{self, position::At};

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::session::{self, Ends, MAIN};
use crate::values::{self, FromByte};

/// Print what a process in a sandbox has said
///
/// The last bytes of each of its two streams are kept (1 MiB unless exec says otherwise), also for some
/// time after its end. Bytes that are not kept any more are told on standard error.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar logs box web                 all that is kept
  belljar logs -f --tail 20 box web    the last lines, and then what comes
  belljar logs --since 5m box web
  belljar logs --from 4096 box 7       from a byte of each stream on

Its output goes to standard output, its error output to standard error. Exit status 0, also if
the process failed.")]
pub(crate) struct Args {
    /// Go on with what comes, until the process ends
    #[arg(short, long)]
    follow: bool,

    /// Only what came since then: 10m ago, or seconds since 1970
    #[arg(long, value_name = "TIME")]
    since: Option<Since>,

    /// Only the last lines of each stream
    #[arg(short = 'n', long, value_name = "LINES", conflicts_with = "since")]
    tail: Option<u32>,

    /// From this byte of the output on, and this one of the error output
    #[arg(long, value_name = "BYTE[:BYTE]", conflicts_with_all = ["since", "tail"])]
    from: Option<FromByte>,

    #[command(flatten)]
    sandbox: BoxArg,

    /// Id or name of the process, or pid:N [default: the one that run was given]
    #[arg(value_name = "PROCESS", default_value = MAIN, hide_default_value = true)]
    process: Selector,
}

/// A moment, as `CLOCK_REALTIME` nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Since(u64);

/// Longest number of seconds since 1970 that is not taken for a duration.
const EPOCH_MIN: f64 = 1e9;

impl FromStr for Since {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        if let Ok(seconds) = text.parse::<f64>()
            && seconds >= EPOCH_MIN
        {
            let at = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
            return Ok(Self(nanos(at)));
        }
        let ago = values::time(text)?;
        Ok(Self(nanos(now.saturating_sub(ago))))
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Args {
    fn positions(&self) -> (At, At) {
        match (self.since, self.tail, self.from) {
            (Some(since), ..) => (At::SinceUnixNs(since.0), At::SinceUnixNs(since.0)),
            (_, Some(0), _) => (At::Newest(true), At::Newest(true)),
            (_, Some(lines), _) => (At::Lines(lines), At::Lines(lines)),
            (.., Some(from)) => (At::Offset(from.stdout), At::Offset(from.stderr)),
            _ => (At::Oldest(true), At::Oldest(true)),
        }
    }
}

/// Returns the exit status.
pub(crate) fn logs(args: &Args) -> u8 {
    status_of(print(args))
}

fn print(args: &Args) -> Result<u8, Failure> {
    let ends = Ends {
        give_up: true,
        quiet: true,
        ..Ends::default()
    };
    let signals = ends.signals()?;
    let found = args.sandbox.find()?;
    let (stdout, stderr) = args.positions();
    let session = Session::attach(v1::Attach {
        process: Some(args.process.message()),
        stdout: Some(v1::Position { at: Some(stdout) }),
        stderr: Some(v1::Position { at: Some(stderr) }),
        follow: args.follow,
        read_only: true,
        ..v1::Attach::default()
    });
    let outcome = ends
        .connect(session, &found, &signals, b"")
        .map_err(|error| session::explain(&found, &error))?;
    Ok(match outcome {
        Outcome::Ended { .. } | Outcome::Detached => 0,
        other => other.exit_status(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_ago_or_since_1970() {
        assert_eq!("1700000000.5".parse(), Ok(Since(1_700_000_000_500_000_000)));
        let Since(minute) = "1m".parse().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let ago = nanos(now) - minute;
        assert!((59_000_000_000..61_000_000_000).contains(&ago), "{ago}");
        for text in ["", "x", "-5", "1e300", "inf"] {
            assert!(text.parse::<Since>().is_err(), "{text}");
        }
    }
}
