//! `belljar system`: calls about a guest as a whole.

use std::time::Duration;

use belljar_node::system as guest;
use serde_json::json;

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::output::{self, Format, OutputOption, escaped};
use crate::values;

/// Ping, touch, freeze, thaw, write out, set the clock of, or reseed a guest
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar system ping box               whether its agent answers, and when it was used last
  belljar system touch box              counts as use
  belljar system freeze box             stops all its programs; returns when they are stopped
  belljar system freeze -f box          and its writable drive, written out before
  belljar system thaw box
  belljar system sync box               writes out what it holds in memory
  belljar system clock box              sets its clock to this machine's
  belljar system reseed box             gives its random generator fresh bytes of this machine")]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Ask the agent how it is, and when the sandbox was used last
    ///
    /// What only looks is no use: ping, ps, stats, top, events and port without a port.
    Ping {
        #[command(flatten)]
        sandbox: BoxArg,
        #[command(flatten)]
        output: OutputOption,
    },
    /// Count as use of the sandbox, and do nothing else
    Touch {
        #[command(flatten)]
        sandbox: BoxArg,
    },
    /// Stop all programs; returns when they are stopped
    ///
    /// The agent still answers, and can kill and thaw. Nothing can be started until then.
    Freeze {
        #[command(flatten)]
        sandbox: BoxArg,
        /// Write everything out, and freeze the writable drive's file system, too
        #[arg(short, long)]
        file_systems: bool,
        /// Give up, and let all go on, after this time
        #[arg(short, long, value_name = "TIME", value_parser = values::time, default_value = "5s")]
        timeout: Duration,
    },
    /// Let frozen programs go on
    Thaw {
        #[command(flatten)]
        sandbox: BoxArg,
    },
    /// Write out what the guest holds in memory
    Sync {
        #[command(flatten)]
        sandbox: BoxArg,
    },
    /// Set the guest's clock, and print what it is then, in seconds since 1970
    Clock {
        #[command(flatten)]
        sandbox: BoxArg,
        /// Seconds since 1970, with a fraction perhaps [default: this machine's clock]
        #[arg(long, value_name = "SECONDS", value_parser = unix_time)]
        to: Option<u64>,
    },
    /// Give the guest's random generator fresh bytes of this machine
    Reseed {
        #[command(flatten)]
        sandbox: BoxArg,
    },
}

/// Seconds since 1970 as nanoseconds.
fn unix_time(text: &str) -> Result<u64, String> {
    let wrong = || "write seconds since 1970, such as 1700000000.5".to_owned();
    let (whole, part) = values::pair(text, '.');
    let part = part.unwrap_or("");
    if part.len() > 9 || !part.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let nanoseconds: u64 = format!("{part:0<9}").parse().map_err(|_| wrong())?;
    let seconds: u64 = whole.parse().map_err(|_| wrong())?;
    seconds
        .checked_mul(1_000_000_000)
        .and_then(|time| time.checked_add(nanoseconds))
        .filter(|time| *time != 0)
        .ok_or_else(wrong)
}

/// Returns the exit status.
pub(crate) fn system(args: &Args) -> u8 {
    status_of(carry_out(&args.action))
}

fn carry_out(action: &Action) -> Result<u8, Failure> {
    match action {
        Action::Ping { sandbox, output } => {
            print_ping(&guest::ping(&sandbox.find()?)?, output.format());
        }
        Action::Touch { sandbox } => guest::touch(&sandbox.find()?)?,
        Action::Freeze {
            sandbox,
            file_systems,
            timeout,
        } => guest::freeze(&sandbox.find()?, *timeout, *file_systems)?,
        Action::Thaw { sandbox } => guest::thaw(&sandbox.find()?)?,
        Action::Sync { sandbox } => guest::sync(&sandbox.find()?)?,
        Action::Clock { sandbox, to } => {
            let now = guest::set_clock(&sandbox.find()?, *to)?;
            let (seconds, part) = (now / 1_000_000_000, now % 1_000_000_000);
            output::print(&format!("{seconds}.{part:09}\n"));
        }
        Action::Reseed { sandbox } => guest::reseed(&sandbox.find()?)?,
    }
    Ok(0)
}

fn print_ping(pinged: &guest::Pinged, format: Format) {
    match format {
        Format::Table => output::print(&ping_lines(pinged)),
        Format::Json => {
            let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
            output::print_json(&json!({
                "took_us": micros(pinged.took),
                "agent_generation": pinged.generation,
                "worker_restarts": pinged.worker_restarts,
                "frozen": pinged.frozen,
                "degraded": pinged.degraded,
                "up_us": micros(pinged.up),
                "idle_us": pinged.idle.map(micros),
            }));
        }
    }
}

fn ping_lines(pinged: &guest::Pinged) -> String {
    let idle = pinged.idle.map_or_else(
        || "not yet".to_owned(),
        |idle| format!("{:.1} s ago", idle.as_secs_f64()),
    );
    let mut text = format!(
        "agent          answers in {:.1} ms, generation {}\nup             {:.1} s\nlast activity  {idle}\n",
        pinged.took.as_secs_f64() * 1000.0,
        pinged.generation,
        pinged.up.as_secs_f64(),
    );
    if pinged.frozen {
        text.push_str("programs       frozen; 'system thaw' lets them go on\n");
    }
    if pinged.worker_restarts != 0 {
        text.push_str(&format!(
            "worker         replaced {} times\n",
            pinged.worker_restarts
        ));
    }
    if !pinged.degraded.is_empty() {
        text.push_str(&format!("degraded       {}\n", escaped(&pinged.degraded)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ping_tells_the_last_activity_and_what_is_wrong() {
        let mut pinged = guest::Pinged {
            took: Duration::from_micros(1500),
            generation: 3,
            degraded: String::new(),
            up: Duration::from_secs(61),
            idle: Some(Duration::from_millis(2500)),
            worker_restarts: 0,
            frozen: false,
        };
        let text = ping_lines(&pinged);
        assert!(text.contains("in 1.5 ms") && text.contains("activity  2.5 s ago"));
        assert_eq!(text.lines().count(), 3);
        pinged.idle = None;
        pinged.worker_restarts = 2;
        pinged.frozen = true;
        "no\x1bdrive".clone_into(&mut pinged.degraded);
        let text = ping_lines(&pinged);
        assert!(text.contains("activity  not yet") && text.contains("replaced 2 times"));
        assert!(text.contains("system thaw"));
        assert!(text.contains("degraded") && !text.contains('\x1b'));
    }

    #[test]
    fn times_have_fractions() {
        assert_eq!(unix_time("1.5"), Ok(1_500_000_000));
        assert_eq!(unix_time("1700000000"), Ok(1_700_000_000_000_000_000));
        for text in ["", "0", ".5", "-1", "1.1234567890", "1.x", "99999999999999"] {
            assert!(unix_time(text).is_err(), "{text}");
        }
    }
}
