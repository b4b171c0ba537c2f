//! `belljar stats`.

use std::thread;
use std::time::Duration;

use belljar_node::registry::Found;
use belljar_node::system::{self, Stats};
use belljar_node::v1;
use serde_json::{Value, json};

use crate::failure::{Failure, status_of};
use crate::options::Several;
use crate::output::{self, Format, OutputOption, Table};

/// Print what sandboxes use: processor time, memory, disk
///
/// As the guest says, beside the host's own count of processor time, which a guest cannot falsify.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar stats                     all sandboxes that run
  belljar stats box                 one
  belljar stats -o json box | jq '.[].host.vcpus_us'

BUSY is the guest's own count of processor time since its start, VCPU the host's count of the time that its
virtual processors ran. 'belljar top' refreshes.")]
pub(crate) struct Args {
    #[command(flatten)]
    several: Several,

    #[command(flatten)]
    output: OutputOption,
}

/// Returns the exit status.
pub(crate) fn stats(args: &Args) -> u8 {
    status_of(print(args))
}

fn print(args: &Args) -> Result<u8, Failure> {
    let all = args.several.running()?;
    // Together: one that does not answer does not hold the others up.
    let asking: Vec<_> = all
        .into_iter()
        .map(|found| {
            thread::spawn(move || {
                let stats = system::stats(&found, true);
                (found, stats)
            })
        })
        .collect();
    let (mut known, mut status) = (Vec::new(), 0);
    for asked in asking {
        match asked.join() {
            Ok((found, Ok(stats))) => known.push((found, stats)),
            Ok((_, Err(error))) => status = Failure::from(error).tell(),
            Err(_) => status = crate::OURS,
        }
    }
    match args.output.format() {
        Format::Table => output::print(&table(&known)),
        Format::Json => {
            let all: Vec<Value> = known
                .iter()
                .map(|(found, stats)| document(found, stats))
                .collect();
            output::print_json(&all);
        }
    }
    Ok(status)
}

pub(crate) fn cpu_time(us: u64) -> String {
    format!("{:.2}s", Duration::from_micros(us).as_secs_f64())
}

/// Load averages as people write them.
pub(crate) fn load(centi: u32) -> String {
    format!("{}.{:02}", centi / 100, centi % 100)
}

fn table(known: &[(Found, Stats)]) -> String {
    let mut table = Table::new(&[
        "NAME", "UP", "BUSY", "VCPU", "MEMORY", "OF", "DISK", "OF", "LOAD", "TASKS",
    ]);
    for (found, stats) in known {
        let guest = &stats.guest;
        let vcpu = stats
            .host
            .as_ref()
            .map(belljar_node::accounting::CpuTimes::guest);
        table.row(&[
            &found.called(),
            &output::duration(Duration::from_nanos(guest.boottime_ns)),
            &cpu_time(guest.cpu_busy_us),
            &vcpu.map_or_else(
                || "-".to_owned(),
                |time| format!("{:.2}s", time.as_secs_f64()),
            ),
            &output::size(guest.memory_total.saturating_sub(guest.memory_available)),
            &output::size(guest.memory_total),
            &output::size(guest.disk_total.saturating_sub(guest.disk_available)),
            &output::size(guest.disk_total),
            &load(guest.load_1_centi),
            &guest.pids.to_string(),
        ]);
    }
    table.render()
}

fn document(found: &Found, stats: &Stats) -> Value {
    let guest = &stats.guest;
    let usage = |usage: Option<v1::Usage>| {
        usage.map(|usage| {
            json!({
                "cpu_us": usage.cpu_us,
                "memory": usage.memory,
                "memory_peak": usage.memory_peak,
                "pids": usage.pids,
            })
        })
    };
    let processes: Vec<Value> = guest
        .processes
        .iter()
        .map(|process| json!({"id": process.id, "name": process.name, "usage": usage(process.usage)}))
        .collect();
    let load = [guest.load_1_centi, guest.load_5_centi, guest.load_15_centi];
    let load = load.map(|centi| f64::from(centi) / 100.0);
    json!({
        "id": found.id(),
        "name": found.called(),
        "guest": {
            "boottime_ns": guest.boottime_ns,
            "cpus": guest.cpus,
            "cpu_busy_us": guest.cpu_busy_us,
            "cpu_idle_us": guest.cpu_idle_us,
            "memory_total": guest.memory_total,
            "memory_available": guest.memory_available,
            "disk_total": guest.disk_total,
            "disk_available": guest.disk_available,
            "load": load,
            "tasks": guest.pids,
            "tasks_max": guest.pids_max,
            "agent_memory": guest.agent_memory,
            "user": usage(guest.user),
            "processes": processes,
        },
        "host": stats.host,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_written_for_people() {
        assert_eq!(cpu_time(1_234_567), "1.23s");
        assert_eq!(load(1203), "12.03");
    }
}
