//! `belljar top`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use belljar_node::poll::PollSet;
use belljar_node::process::terminal::{RawTerminal, is_input_terminal, size_of};
use belljar_node::process::{self, given_name};
use belljar_node::registry::Found;
use belljar_node::sys::{SIGHUP, SIGINT, SIGTERM, SignalFd};
use belljar_node::system::{self, Stats};
use belljar_node::v1;

use super::ps;
use super::stats::{cpu_time, load};
use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::output::{self, Table};
use crate::values;

/// Between the two looks of a plain listing.
const ONCE: Duration = Duration::from_millis(500);

/// To the alternate screen, cursor hidden. The terminal's own guard undoes both.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l\x1b[2J";

/// The size of a terminal that does not say.
const SIZE: v1::Terminal = v1::Terminal {
    columns: 80,
    rows: 24,
};

/// Show what uses a sandbox's processors and memory, refreshed; q quits
///
/// The processes that were started from outside, each with all its descendants. When standard output is no
/// terminal, once and plain.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar top box
  belljar top box -i 5s
  belljar top box | cat             once

'host' is this machine's own count of what the virtual processors ran, which a guest cannot falsify.
'belljar exec -t box top' shows the single processes.")]
pub(crate) struct Args {
    #[command(flatten)]
    sandbox: BoxArg,

    /// Time between two looks
    #[arg(short, long, value_name = "TIME", value_parser = values::time, default_value = "1s")]
    interval: Duration,
}

/// Returns the exit status.
pub(crate) fn top(args: &Args) -> u8 {
    let interactive = io::stdout().is_terminal() && is_input_terminal();
    status_of(args.sandbox.find().and_then(|found| {
        if interactive {
            refresh(&found, args.interval.max(Duration::from_millis(100)))
        } else {
            once(&found)
        }
    }))
}

/// One look.
struct Sample {
    stats: Stats,
    processes: Vec<v1::ProcessInfo>,
    at: Instant,
}

impl Sample {
    fn take(found: &Found) -> Result<Self, Failure> {
        let stats = system::stats(found, false)?;
        let at = Instant::now();
        let processes = process::list(found, false)?;
        Ok(Self {
            stats,
            processes,
            at,
        })
    }
}

fn once(found: &Found) -> Result<u8, Failure> {
    let first = Sample::take(found)?;
    thread::sleep(ONCE);
    let second = Sample::take(found)?;
    output::print(&render(&found.called(), &first, &second));
    Ok(0)
}

fn refresh(found: &Found, interval: Duration) -> Result<u8, Failure> {
    let signals = SignalFd::new(&[SIGINT, SIGTERM, SIGHUP]).map_err(Failure::new)?;
    let mut last = Sample::take(found)?;
    let called = found.called();
    let stdout = io::stdout();
    let keys = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Failure::new)?;
    let mut keys = File::from(keys);
    // Dropped on every way out of here: the terminal is as before then.
    let mut terminal = RawTerminal::enter(stdout.as_fd()).map_err(Failure::new)?;
    terminal.follow(ENTER);
    output::print(&String::from_utf8_lossy(ENTER));
    // Soon, so that there is something to be seen.
    let mut next = Instant::now() + ONCE.min(interval);
    loop {
        if wants_to_quit(&mut keys, &signals, next)? {
            return Ok(0);
        }
        let sample = Sample::take(found)?;
        let size = size_of(stdout.as_fd()).unwrap_or(SIZE);
        if !output::print_on(&frame(&render(&called, &last, &sample), size)) {
            return Ok(0);
        }
        last = sample;
        next = Instant::now() + interval;
    }
}

/// Waits until `next`, or for a key or signal that ends it.
fn wants_to_quit(keys: &mut File, signals: &SignalFd, next: Instant) -> Result<bool, Failure> {
    loop {
        let mut set = PollSet::default();
        let (key, signal) = (set.readable(keys.as_fd()), set.readable(signals.as_fd()));
        let polled = set.wait(Some(next)).map_err(Failure::new)?;
        if polled.is_ready(signal) {
            return Ok(true);
        }
        if !polled.is_ready(key) {
            return Ok(false);
        }
        let mut typed = [0; 64];
        let count = keys.read(&mut typed).unwrap_or(0);
        let typed = typed.get(..count).unwrap_or_default();
        // Ctrl-C is a key in raw mode.
        if count == 0 || typed.iter().any(|key| matches!(key, b'q' | b'Q' | 3)) {
            return Ok(true);
        }
    }
}

/// A whole screen, without a flicker: lines cut at the edge, and the rest of each erased.
fn frame(text: &str, size: v1::Terminal) -> String {
    let (columns, rows) = (size.columns as usize, size.rows as usize);
    let mut frame = String::from("\x1b[H");
    for (number, line) in text.lines().take(rows).enumerate() {
        if number != 0 {
            frame.push_str("\r\n");
        }
        frame.extend(line.chars().take(columns));
        frame.push_str("\x1b[K");
    }
    frame.push_str("\x1b[J");
    frame
}

/// `part` of `time` in percent of one processor.
fn percent(part_us: u64, time: Duration) -> String {
    let time = time.as_secs_f64();
    if time <= 0.0 {
        return "-".to_owned();
    }
    // Far fewer than 2^53 microseconds.
    format!("{:.1}%", part_us as f64 / 10_000.0 / time)
}

fn render(called: &str, before: &Sample, now: &Sample) -> String {
    let guest = &now.stats.guest;
    let time = now.at.saturating_duration_since(before.at);
    let host_us = |sample: &Sample| {
        let times = sample.stats.host.as_ref()?;
        u64::try_from(times.guest().as_micros()).ok()
    };
    let host = match (host_us(before), host_us(now)) {
        (Some(before), Some(now)) => percent(now.saturating_sub(before), time),
        _ => "-".to_owned(),
    };
    let busy = guest
        .cpu_busy_us
        .saturating_sub(before.stats.guest.cpu_busy_us);
    let used = |total: u64, available: u64| {
        format!(
            "{} of {}",
            output::size(total.saturating_sub(available)),
            output::size(total)
        )
    };
    let head = format!(
        "{}  up {}  {} CPU{}  load {} {} {}  {} tasks\n\
         CPU {} (host: {host})  memory {}  disk {}\n\n",
        output::escaped(called),
        output::duration(Duration::from_nanos(guest.boottime_ns)),
        guest.cpus,
        if guest.cpus == 1 { "" } else { "s" },
        load(guest.load_1_centi),
        load(guest.load_5_centi),
        load(guest.load_15_centi),
        guest.pids,
        percent(busy, time),
        used(guest.memory_total, guest.memory_available),
        used(guest.disk_total, guest.disk_available),
    );
    head + &processes(before, now, time)
}

/// The busiest first.
fn processes(before: &Sample, now: &Sample, time: Duration) -> String {
    let usage = |info: &v1::ProcessInfo| info.usage.unwrap_or_default();
    let earlier: HashMap<u64, u64> = before
        .processes
        .iter()
        .map(|info| (info.id, usage(info).cpu_us))
        .collect();
    let mut rows: Vec<(u64, &v1::ProcessInfo)> = now
        .processes
        .iter()
        .map(|info| {
            let before = earlier.get(&info.id).copied().unwrap_or(0);
            (usage(info).cpu_us.saturating_sub(before), info)
        })
        .collect();
    rows.sort_by_key(|(used, info)| (std::cmp::Reverse(*used), info.id));
    let mut table = Table::new(&[
        "ID", "NAME", "PID", "USER", "CPU", "TIME", "MEMORY", "PIDS", "COMMAND",
    ]);
    for (used, info) in rows {
        let name = given_name(&info.name);
        table.row(&[
            &info.id.to_string(),
            if name.is_empty() { "-" } else { name },
            &info.pid.to_string(),
            if info.user.is_empty() {
                "root"
            } else {
                &info.user
            },
            &percent(used, time),
            &cpu_time(usage(info).cpu_us),
            &output::size(usage(info).memory),
            &usage(info).pids.to_string(),
            &ps::command(info),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: Instant, busy_us: u64, cpu_us: u64) -> Sample {
        let process = v1::ProcessInfo {
            id: 4,
            pid: 44,
            argv: vec![b"sleep\x1b[2J".to_vec()],
            usage: Some(v1::Usage {
                cpu_us,
                ..v1::Usage::default()
            }),
            ..v1::ProcessInfo::default()
        };
        Sample {
            stats: Stats {
                guest: v1::Metrics {
                    cpu_busy_us: busy_us,
                    cpus: 1,
                    ..v1::Metrics::default()
                },
                host: None,
            },
            processes: vec![process],
            at,
        }
    }

    #[test]
    fn shares_are_of_the_time_between_two_looks() {
        let at = Instant::now();
        let (first, second) = (
            sample(at, 0, 0),
            sample(at + Duration::from_secs(2), 1_000_000, 500_000),
        );
        let text = render("box", &first, &second);
        assert!(text.contains("CPU 50.0% (host: -)"), "{text}");
        assert!(text.contains("25.0%") && !text.contains('\x1b'), "{text}");
    }

    #[test]
    fn a_frame_fits_the_screen() {
        let text = "wide line\n".repeat(10);
        let frame = frame(
            &text,
            v1::Terminal {
                columns: 4,
                rows: 3,
            },
        );
        assert_eq!(frame, "\x1b[Hwide\x1b[K\r\nwide\x1b[K\r\nwide\x1b[K\x1b[J");
    }
}
