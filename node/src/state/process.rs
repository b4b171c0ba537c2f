//! Which process a record means: a pid alone may have been given to another one since.

use std::fs;

use serde::{Deserialize, Serialize};

/// A process, told apart from every later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    pub pid: u32,
    /// Clock ticks after boot (`proc_pid_stat(5)`, field 22).
    pub start_time: u64,
}

impl ProcessRecord {
    /// The process that has this pid now.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Self {
            pid,
            start_time: start_time(&stat)?,
        })
    }

    /// Whether it still runs, given that this machine has not been booted since. One that waits to be
    /// reaped does not.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .is_ok_and(|stat| start_time(&stat) == Some(self.start_time) && !is_zombie(&stat))
    }
}

/// Field 3 of `/proc/PID/stat`.
fn is_zombie(stat: &str) -> bool {
    let state = stat.rsplit_once(')').map(|(_, after)| after.trim_start());
    state.is_some_and(|state| state.starts_with(['Z', 'X']))
}

/// Field 22 of `/proc/PID/stat`. The name in field 2 may hold spaces and parentheses.
fn start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Identifies the present boot of this machine.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let numbers: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let numbers = numbers.join(" ");
        for name in ["cat", "a b", ") S 1 (", ""] {
            assert_eq!(start_time(&format!("17 ({name}) {numbers}\n")), Some(22));
        }
        assert_eq!(start_time("17 (cat) S 1"), None);
        assert!(is_zombie("17 (a) b) Z 1") && !is_zombie("17 (Z) S 1") && !is_zombie(""));
        assert_eq!(start_time(""), None);
    }

    #[test]
    fn this_process_lives_and_another_with_its_pid_does_not() {
        let this = ProcessRecord::of(std::process::id()).unwrap();
        assert!(this.is_alive());
        let earlier = ProcessRecord {
            start_time: this.start_time - 1,
            ..this
        };
        assert!(!earlier.is_alive());
        assert!(!boot_id().is_empty());
    }
}
