//! What a guest costs, by the host's own count: a guest cannot falsify it.

use std::fs;
use std::time::Duration;

use serde::Serialize;

use crate::state::ProcessRecord;

/// CPU time of a VMM since its start, in microseconds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct CpuTimes {
    /// Time that each vCPU's thread ran, in the order of their numbers: in the guest, and in the kernel
    /// and the VMM for it.
    pub vcpus_us: Vec<u64>,
    /// Time of the VMM's other threads: devices and API.
    pub other_us: u64,
}

impl CpuTimes {
    /// Of all vCPUs.
    #[must_use]
    pub fn guest(&self) -> Duration {
        Duration::from_micros(
            self.vcpus_us
                .iter()
                .fold(0, |sum, us| sum.saturating_add(*us)),
        )
    }
}

/// A thread of a VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    pub tid: u32,
    pub name: String,
    /// CPU time since its start, in microseconds.
    pub ran_us: u64,
}

/// The threads of a process; none if it is gone. Costs two small files a thread.
#[must_use]
pub fn threads(process: ProcessRecord) -> Vec<Thread> {
    let Ok(entries) = fs::read_dir(format!("/proc/{}/task", process.pid)) else {
        return Vec::new();
    };
    let threads: Vec<Thread> = entries
        .flatten()
        .filter_map(|entry| {
            let task = entry.path();
            // A thread that ended in between has no files any more.
            Some(Thread {
                tid: entry.file_name().to_str()?.parse().ok()?,
                name: fs::read_to_string(task.join("comm"))
                    .ok()?
                    .trim()
                    .to_owned(),
                ran_us: run_time(&task)?,
            })
        })
        .collect();
    // The pid could have been given away while its threads were read.
    if process.is_alive() {
        threads
    } else {
        Vec::new()
    }
}

/// CPU time of the VMM's threads; `None` if the process is gone.
#[must_use]
pub fn cpu_times(vmm: ProcessRecord) -> Option<CpuTimes> {
    let threads = threads(vmm);
    if threads.is_empty() {
        return None;
    }
    let mut vcpus: Vec<(u32, u64)> = Vec::new();
    let mut times = CpuTimes::default();
    for thread in threads {
        let number = thread
            .name
            .strip_prefix("vcpu")
            .and_then(|n| n.parse().ok());
        match number {
            Some(number) => vcpus.push((number, thread.ran_us)),
            None => times.other_us = times.other_us.saturating_add(thread.ran_us),
        }
    }
    vcpus.sort_unstable();
    times.vcpus_us = vcpus.into_iter().map(|(_, ran)| ran).collect();
    Some(times)
}

/// Microseconds that a thread has run: from the scheduler's count in nanoseconds, else in clock ticks.
fn run_time(task: &std::path::Path) -> Option<u64> {
    let exact = fs::read_to_string(task.join("schedstat")).ok();
    let exact = exact.and_then(|text| text.split_ascii_whitespace().next()?.parse::<u64>().ok());
    if let Some(nanoseconds) = exact {
        return Some(nanoseconds / 1000);
    }
    let stat = fs::read_to_string(task.join("stat")).ok()?;
    ticks(&stat).map(|ticks| ticks.saturating_mul(1_000_000 / TICKS_PER_SECOND))
}

/// `USER_HZ`, which has this value on every x86-64 Linux.
const TICKS_PER_SECOND: u64 = 100;

/// Fields 14 and 15 of `proc_pid_stat(5)`: time in user mode (guest time included) and in the kernel.
fn ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user.saturating_add(system))
}

/// Resident memory of a process in bytes, guest RAM included; `None` if it is gone.
#[must_use]
pub fn resident(process: ProcessRecord) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{}/statm", process.pid)).ok()?;
    let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    process.is_alive().then(|| pages.saturating_mul(4096))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Instant;

    #[test]
    fn threads_of_vcpus_are_counted_one_by_one() {
        let (done, wait) = mpsc::channel::<()>();
        let spin = |name: &str, millis: u64, wait: Option<mpsc::Receiver<()>>| {
            let (ready, is_ready) = mpsc::channel();
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    let begin = Instant::now();
                    let mut number = 1u64;
                    while begin.elapsed() < Duration::from_millis(millis) {
                        number = std::hint::black_box(number.wrapping_mul(7));
                    }
                    ready.send(()).unwrap();
                    // Its time is counted as long as it lives.
                    let _ = wait.map(|wait| wait.recv());
                })
                .unwrap();
            is_ready.recv().unwrap();
        };
        let (done_too, wait_too) = mpsc::channel::<()>();
        spin("vcpu1", 0, Some(wait_too));
        spin("vcpu0", 60, Some(wait));
        let this = ProcessRecord::of(std::process::id()).unwrap();
        let times = cpu_times(this).unwrap();
        assert_eq!(times.vcpus_us.len(), 2, "{times:?}");
        // A busy machine gives less than asked for, never nothing.
        assert!(
            times.vcpus_us[0] > 5_000 && times.vcpus_us[1] < times.vcpus_us[0],
            "{times:?}"
        );
        assert!(times.guest() >= Duration::from_millis(5));
        assert!(resident(this).unwrap() > 100_000);
        drop((done, done_too));

        let gone = ProcessRecord {
            start_time: 0,
            ..this
        };
        assert!(cpu_times(gone).is_none() && resident(gone).is_none());
    }

    #[test]
    fn ticks_are_found_behind_any_name() {
        let numbers: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        assert_eq!(
            ticks(&format!("17 (a) b) {}", numbers.join(" "))),
            Some(14 + 15)
        );
        assert_eq!(ticks("17 (a) S 1"), None);
    }
}
