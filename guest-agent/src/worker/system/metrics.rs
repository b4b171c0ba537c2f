//! Figures of the guest, out of `/proc` and cgroup files (Linux Documentation/admin-guide/cgroup-v2.rst,
//! proc(5)). What a kernel does not tell is 0.

use belljar_protocol::v1::{self, reply::Result as Answer};

use super::super::{Answered, Context, Outcome, procfs};
use crate::wire::{from_holder::Message as Said, to_holder::Message as Asked};

/// USER_HZ: what times in `/proc` are counted in, on every Linux.
const TICK_US: u64 = 10_000;

/// All figures.
pub(in super::super) fn metrics(context: &Context, call: v1::GetMetrics) -> Answered {
    let text = |path: &str| procfs::text(path).unwrap_or_default();
    let cpu = Cpu::parse(&text("/proc/stat"));
    let memory = text("/proc/meminfo");
    let load = Load::parse(&text("/proc/loadavg"));
    let disk = rustix::fs::statvfs("/").ok();
    let bytes = |blocks: fn(&rustix::fs::StatVfs) -> u64| {
        disk.as_ref()
            .map_or(0, |disk| blocks(disk).saturating_mul(disk.f_frsize))
    };
    let exact = key(&text("/sys/fs/cgroup/cpu.stat"), "usage_usec");
    let processes = if call.processes {
        processes(context)?
    } else {
        Vec::new()
    };
    Ok(Outcome::Reply(Answer::Metrics(v1::Metrics {
        boottime_ns: crate::boot::now_ns(),
        cpu_busy_us: exact.unwrap_or(cpu.busy_us),
        cpu_idle_us: cpu.idle_us,
        cpus: cpu.cpus,
        memory_total: kib(&memory, "MemTotal:"),
        memory_available: kib(&memory, "MemAvailable:"),
        disk_total: bytes(|disk| disk.f_blocks),
        disk_available: bytes(|disk| disk.f_bavail),
        load_1_centi: load.centi[0],
        load_5_centi: load.centi[1],
        load_15_centi: load.centi[2],
        pids: load.tasks,
        pids_max: text("/proc/sys/kernel/pid_max").trim().parse().unwrap_or(0),
        user: Some(usage(&context.config.user_cgroup)),
        processes,
        agent_memory: agent_memory(),
    })))
}

/// Of each process that the host started and that runs.
fn processes(context: &Context) -> Result<Vec<v1::ProcessUsage>, super::super::Failure> {
    let asked = Asked::List(v1::ListProcesses { ended: false });
    let Said::List(list) = context.holder.ask(asked)? else {
        return Err(super::out_of_step());
    };
    let usages = list.processes.into_iter().map(|process| v1::ProcessUsage {
        id: process.id,
        name: process.name,
        usage: process.usage,
    });
    Ok(usages.collect())
}

/// Of a cgroup with all below it.
fn usage(cgroup: &str) -> v1::Usage {
    if cgroup.is_empty() {
        return v1::Usage::default();
    }
    let text = |file: &str| procfs::text(&format!("{cgroup}/{file}")).unwrap_or_default();
    let number = |file: &str| text(file).trim().parse().unwrap_or(0);
    v1::Usage {
        cpu_us: key(&text("cpu.stat"), "usage_usec").unwrap_or(0),
        memory: number("memory.current"),
        memory_peak: number("memory.peak"),
        pids: u32::try_from(number("pids.current")).unwrap_or(u32::MAX),
    }
}

/// Resident memory of the agent's two processes.
fn agent_memory() -> u64 {
    let parent = std::os::unix::process::parent_id().to_string();
    ["self", &parent]
        .into_iter()
        .map(|pid| {
            kib(
                &procfs::text(&format!("/proc/{pid}/status")).unwrap_or_default(),
                "VmRSS:",
            )
        })
        .fold(0, u64::saturating_add)
}

/// The number behind `name` in a flat-keyed file.
fn key(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// Bytes of a line `NAME: 123 kB`.
fn kib(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok());
    number.unwrap_or(0).saturating_mul(1024)
}

/// Times of all CPUs together.
#[derive(Debug, Default, PartialEq, Eq)]
struct Cpu {
    busy_us: u64,
    idle_us: u64,
    cpus: u32,
}

impl Cpu {
    /// `cpu user nice system idle iowait irq softirq steal guest guest_nice`; the last two are in the first.
    fn parse(stat: &str) -> Self {
        let mut cpu = Self::default();
        for line in stat.lines() {
            let mut fields = line.split_ascii_whitespace();
            match fields.next() {
                Some("cpu") => {
                    for (index, ticks) in fields.take(8).enumerate() {
                        let time = ticks.parse::<u64>().unwrap_or(0).saturating_mul(TICK_US);
                        let sum = if matches!(index, 3 | 4) {
                            &mut cpu.idle_us
                        } else {
                            &mut cpu.busy_us
                        };
                        *sum = sum.saturating_add(time);
                    }
                }
                Some(name) if name.starts_with("cpu") => cpu.cpus = cpu.cpus.saturating_add(1),
                _ => break,
            }
        }
        cpu
    }
}

/// Load averages times 100, and how many tasks there are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Load {
    centi: [u32; 3],
    tasks: u32,
}

impl Load {
    /// `0.20 0.18 0.12 1/80 11206`
    fn parse(text: &str) -> Self {
        let mut load = Self::default();
        let mut fields = text.split_ascii_whitespace();
        for centi in &mut load.centi {
            *centi = fields.next().and_then(parse_centi).unwrap_or(0);
        }
        let tasks = fields.next().and_then(|field| field.split_once('/'));
        load.tasks = tasks.and_then(|(_, tasks)| tasks.parse().ok()).unwrap_or(0);
        load
    }
}

fn parse_centi(text: &str) -> Option<u32> {
    let (whole, part) = text.split_once('.')?;
    let part: u32 = part.get(..2)?.parse().ok()?;
    whole
        .parse::<u32>()
        .ok()?
        .checked_mul(100)?
        .checked_add(part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_files_are_understood() {
        let stat = "cpu  10 1 2 100 5 0 3 4 9 9\ncpu0 5 1 1 50 5 0 1 2 9 9\ncpu1 0 0 0 0 0 0 0 0 0 0\nintr 5\ncpu9 1\n";
        let cpu = Cpu {
            busy_us: 20 * TICK_US,
            idle_us: 105 * TICK_US,
            cpus: 2,
        };
        assert_eq!(Cpu::parse(stat), cpu);
        let load = Load {
            centi: [20, 118, 1200],
            tasks: 80,
        };
        assert_eq!(Load::parse("0.20 1.18 12.00 1/80 11206\n"), load);
        assert_eq!(kib("MemTotal: 5 kB\nMemFree:  3 kB\n", "MemFree:"), 3072);
        assert_eq!(key("usage_usec 17\nuser_usec 5\n", "usage_usec"), Some(17));
        assert_eq!(key("usage_usec_x 17\n", "usage_usec"), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(cpu[0-9 ]{0,30}\n|[0-9./é ]{0,20}){0,5}") {
            Cpu::parse(&text);
            Load::parse(&text);
            kib(&text, "cpu");
            key(&text, "cpu");
        }
    }
}
