//! What happened beside the time: KVM's own statistics, context switches, system calls, memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::{Attempt, Failure, Result};

const KVM: &str = "/sys/kernel/debug/kvm";
const SYSCALLS: &str = "/sys/kernel/tracing/events/raw_syscalls/sys_enter";
/// One bucket a thread: what tracing adds to a call is one look-up.
const HISTOGRAM: &str = "hist:keys=common_pid:size=8192";

/// KVM's statistics that are kept, with the names they get in the report.
const KVM_FILES: [(&str, &str); 7] = [
    ("exits", "exits"),
    ("io_exits", "io_exits"),
    ("mmio_exits", "mmio_exits"),
    ("halt_exits", "halt_exits"),
    ("irq_injections", "injections"),
    ("signal_exits", "signal_exits"),
    ("pf_taken", "page_faults"),
];

/// Counts by name; only those that could be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts(pub(crate) BTreeMap<&'static str, u64>);

impl Counts {
    /// What was counted since `before`. What `before` does not have began at zero.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let difference = |(name, count): (&&'static str, &u64)| {
            let earlier = before.0.get(name).copied().unwrap_or(0);
            (*name, count.saturating_sub(earlier))
        };
        Self(self.0.iter().map(difference).collect())
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (name, count) in &other.0 {
            let sum = self.0.entry(name).or_default();
            *sum = sum.saturating_add(*count);
        }
    }
}

/// Reads all counts of a process now.
pub(crate) fn read(pid: u32, tracing: bool) -> Counts {
    let mut counts = BTreeMap::new();
    for directory in kvm_directories(pid) {
        for (file, name) in KVM_FILES {
            let read = fs::read_to_string(directory.join(file)).ok();
            if let Some(count) = read.and_then(|text| text.trim().parse::<u64>().ok()) {
                let sum = counts.entry(name).or_insert(0_u64);
                *sum = sum.saturating_add(count);
            }
        }
    }
    let threads = threads(pid);
    counts.insert("context_switches", context_switches(pid, &threads));
    if tracing {
        counts.insert("system_calls", system_calls(&threads));
    }
    Counts(counts)
}

/// One per VM of the process, named `PID-FD`.
fn kvm_directories(pid: u32) -> Vec<PathBuf> {
    let prefix = format!("{pid}-");
    let entries = fs::read_dir(KVM).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
        .collect()
}

fn threads(pid: u32) -> Vec<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"));
    let entries = entries.into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Voluntary and involuntary ones of all threads that live.
fn context_switches(pid: u32, threads: &[u32]) -> u64 {
    let mut sum: u64 = 0;
    for thread in threads {
        let status = fs::read_to_string(format!("/proc/{pid}/task/{thread}/status"));
        for line in status.unwrap_or_default().lines() {
            if let Some((name, count)) = line.split_once(':')
                && name.ends_with("voluntary_ctxt_switches")
            {
                sum = sum.saturating_add(count.trim().parse().unwrap_or(0));
            }
        }
    }
    sum
}

/// System calls of all processes are counted by thread until this is dropped.
pub(crate) struct Tracing;

impl Tracing {
    pub(crate) fn start() -> Result<Self> {
        let trigger = Path::new(SYSCALLS).join("trigger");
        if !trigger.exists() {
            use rustix::mount::{MountFlags, mount};
            let target = "/sys/kernel/tracing";
            mount("tracefs", target, "tracefs", MountFlags::empty(), None)
                .attempt("cannot mount tracefs")?;
        }
        fs::write(trigger, HISTOGRAM).attempt("cannot count system calls")?;
        Ok(Self)
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        let _ = fs::write(Path::new(SYSCALLS).join("trigger"), format!("!{HISTOGRAM}"));
    }
}

fn system_calls(threads: &[u32]) -> u64 {
    let histogram = fs::read_to_string(Path::new(SYSCALLS).join("hist")).unwrap_or_default();
    sum_of_threads(&histogram, threads)
}

/// Adds the lines `{ common_pid: 7 } hitcount: 9` of the threads.
fn sum_of_threads(histogram: &str, threads: &[u32]) -> u64 {
    let counts = histogram.lines().filter_map(|line| {
        let (key, count) = line.strip_prefix("{ common_pid:")?.split_once('}')?;
        let thread: u32 = key.trim().parse().ok()?;
        let count: u64 = count
            .trim()
            .strip_prefix("hitcount:")?
            .trim()
            .parse()
            .ok()?;
        threads.contains(&thread).then_some(count)
    });
    counts.fold(0, u64::saturating_add)
}

/// Memory of a VMM without its guest's RAM, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) rss: u64,
    pub(crate) pss: u64,
    /// Pages that no other process maps.
    pub(crate) private: u64,
    /// Resident guest RAM.
    pub(crate) guest: u64,
}

/// Reads `/proc/PID/smaps`. Guest RAM is what is named so; where nothing is, mappings of at least its size.
pub(crate) fn memory(pid: u32, guest_mib: u64) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).attempt(format!("cannot read {path}"))?;
    sum_of_mappings(&text, guest_mib.saturating_mul(1024))
        .ok_or_else(|| Failure(format!("{path} shows no guest RAM")))
}

fn sum_of_mappings(smaps: &str, guest_kib: u64) -> Option<Memory> {
    let named = smaps.contains("[anon:guest-ram]");
    let mut memory = Memory::default();
    let mut is_guest = false;
    let mut seen = false;
    for line in smaps.lines() {
        let (name, rest) = line.split_once(' ')?;
        if !name.ends_with(':') {
            is_guest = line.ends_with("[anon:guest-ram]");
            continue;
        }
        let value = rest.trim().strip_suffix(" kB").and_then(|v| v.parse().ok());
        let Some(value) = value else { continue };
        let field = match name {
            "Size:" => {
                is_guest |= !named && value >= guest_kib;
                seen |= is_guest;
                continue;
            }
            "Rss:" if is_guest => &mut memory.guest,
            "Rss:" => &mut memory.rss,
            "Pss:" if !is_guest => &mut memory.pss,
            "Private_Clean:" | "Private_Dirty:" if !is_guest => &mut memory.private,
            _ => continue,
        };
        *field = field.saturating_add(value);
    }
    seen.then_some(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(head: &str, size: u64, rss: u64, private: u64) -> String {
        format!(
            "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 {head}\nSize:           {size} kB\n\
             Rss:  {rss} kB\nPss:  {rss} kB\nPss_Dirty: 1 kB\nPrivate_Clean: 0 kB\n\
             Private_Dirty:  {private} kB\nVmFlags: rd wr mr\n"
        )
    }

    #[test]
    fn guest_memory_is_left_out() {
        let heap = mapping("[heap]", 132, 20, 16);
        let named = heap.clone() + &mapping(" [anon:guest-ram]", 131_072, 9000, 9000);
        let nameless = mapping("", 131_072, 9000, 9000) + &heap;
        let expected = Memory {
            rss: 20,
            pss: 20,
            private: 16,
            guest: 9000,
        };
        assert_eq!(sum_of_mappings(&named, 131_072), Some(expected));
        assert_eq!(sum_of_mappings(&nameless, 131_072), Some(expected));
        assert_eq!(sum_of_mappings(&heap, 131_072), None);
    }

    #[test]
    fn system_calls_of_the_threads_are_added() {
        let text = "# event histogram\n\n{ common_pid:        187 } hitcount:          3\n\
                    { common_pid:        188 } hitcount:          4\n{ common_pid: 9 } hitcount: 8\n\nTotals:\n";
        assert_eq!(sum_of_threads(text, &[187, 9]), 11);
    }

    #[test]
    fn differences_and_sums() {
        let before = Counts([("exits", 5)].into());
        let after = Counts([("exits", 9), ("injections", 2)].into());
        let mut sum = after.since(&before);
        assert_eq!(sum, Counts([("exits", 4), ("injections", 2)].into()));
        sum.add(&after);
        assert_eq!(sum, Counts([("exits", 13), ("injections", 4)].into()));
    }
}
