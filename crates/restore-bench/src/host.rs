//! Who measures on a loaded machine measures the machine: what else goes on here, and whether it is too much.

use std::fs;
use std::time::Duration;

/// How long the machine is watched.
const WATCH: Duration = Duration::from_millis(500);
/// Of the processors' time, while we do nothing: above it somebody else works.
const BUSY_LIMIT: f64 = 0.1;
/// Of the processors' time that a hypervisor gave to others.
const STEAL_LIMIT: f64 = 0.01;
/// Of the last ten seconds in which something waited for a processor (`/proc/pressure/cpu`, some), per cent.
const PRESSURE_LIMIT: f64 = 10.0;
/// One-minute load average for each processor.
const AVERAGE_LIMIT: f64 = 0.5;

/// Processor time since the boot, in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticks {
    pub all: u64,
    /// Neither idle nor waiting for a disk, and not stolen.
    pub busy: u64,
    pub steal: u64,
}

impl Ticks {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        Self::parse(&fs::read_to_string("/proc/stat").unwrap_or_default())
    }

    /// From the first line of `/proc/stat`: user nice system idle iowait irq softirq steal (proc(5)); guest time is
    /// part of user time.
    fn parse(stat: &str) -> Self {
        let line = stat.lines().next().unwrap_or_default();
        let ticks: Vec<u64> = line
            .split_whitespace()
            .skip(1)
            .take(8)
            .map_while(|word| word.parse().ok())
            .collect();
        let at = |index: usize| ticks.get(index).copied().unwrap_or(0);
        let all = ticks.iter().copied().fold(0, u64::saturating_add);
        let steal = at(7);
        let idle = at(3).saturating_add(at(4));
        Self {
            all,
            busy: all.saturating_sub(idle).saturating_sub(steal),
            steal,
        }
    }

    /// Shares of the processors' time since `before`: busy, stolen.
    #[must_use]
    pub fn shares_since(self, before: Self) -> (f64, f64) {
        let all = self.all.saturating_sub(before.all).max(1) as f64;
        let share = |now: u64, then: u64| now.saturating_sub(then) as f64 / all;
        (
            share(self.busy, before.busy),
            share(self.steal, before.steal),
        )
    }
}

/// What goes on on this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    pub processors: usize,
    /// One minute.
    pub average: f64,
    /// Share of time, while nothing of ours ran.
    pub busy: f64,
    /// Share of time.
    pub steal: f64,
    /// Per cent; `None`: the kernel does not tell.
    pub pressure: Option<f64>,
}

impl Load {
    /// Watches the machine for half a second, doing nothing.
    #[must_use]
    pub fn watch() -> Self {
        let before = Ticks::now();
        std::thread::sleep(WATCH);
        let (busy, steal) = Ticks::now().shares_since(before);
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self {
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            average: average(&read("/proc/loadavg")),
            busy,
            steal,
            pressure: pressure(&read("/proc/pressure/cpu")),
        }
    }

    /// Why this machine is too loaded to measure on; empty: it is quiet.
    #[must_use]
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.busy > BUSY_LIMIT {
            reasons.push(format!(
                "others use {:.0} % of the processors",
                self.busy * 100.0
            ));
        }
        if let Some(reason) = stolen(self.steal) {
            reasons.push(reason);
        }
        if let Some(pressure) = self.pressure.filter(|pressure| *pressure > PRESSURE_LIMIT) {
            reasons.push(format!(
                "programs waited for a processor {pressure:.0} % of the last 10 s"
            ));
        }
        if self.average > AVERAGE_LIMIT * self.processors as f64 {
            reasons.push(format!(
                "the load average is {:.2} on {} processors",
                self.average, self.processors
            ));
        }
        reasons
    }
}

/// Whether a hypervisor took too much of the processors away.
#[must_use]
pub fn stolen(share: f64) -> Option<String> {
    (share > STEAL_LIMIT).then(|| {
        format!(
            "{:.1} % of the processors' time was stolen by other virtual machines",
            share * 100.0
        )
    })
}

fn average(loadavg: &str) -> f64 {
    let first = loadavg.split_whitespace().next();
    first.and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

/// `some avg10=1.23 avg60=…` (Linux, accounting/psi).
fn pressure(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let word = line
        .split(' ')
        .find_map(|word| word.strip_prefix("avg10="))?;
    word.parse().ok()
}

/// Kind of processor and version of the kernel.
#[must_use]
pub fn describe() -> (String, String) {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or_else(String::new, |rest| {
            rest.trim_matches([' ', '\t', ':']).to_owned()
        });
    (
        processor,
        read("/proc/sys/kernel/osrelease").trim().to_owned(),
    )
}

/// Memory that programs could have, in KiB.
#[must_use]
pub fn available_kib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_and_their_shares() {
        let before = Ticks::parse("cpu  100 0 50 800 50 0 0 0 90 0\ncpu0 1 2 3\n");
        assert_eq!(
            before,
            Ticks {
                all: 1000,
                busy: 150,
                steal: 0
            }
        );
        let after = Ticks::parse("cpu  110 0 50 840 50 0 0 50 99 0\n");
        assert_eq!(after.shares_since(before), (0.1, 0.5));
        assert_eq!(Ticks::parse("").shares_since(Ticks::default()), (0.0, 0.0));
    }

    #[test]
    fn a_quiet_machine_has_no_reasons_and_each_load_has_one() {
        let quiet = Load {
            processors: 2,
            average: 0.9,
            busy: 0.02,
            steal: 0.0,
            pressure: Some(1.5),
        };
        assert_eq!(quiet.reasons(), Vec::<String>::new());
        for (load, word) in [
            (Load { busy: 0.4, ..quiet }, "others use 40 %"),
            (
                Load {
                    steal: 0.05,
                    ..quiet
                },
                "5.0 % of the processors' time was stolen",
            ),
            (
                Load {
                    pressure: Some(30.0),
                    ..quiet
                },
                "30 % of the last 10 s",
            ),
            (
                Load {
                    average: 3.0,
                    ..quiet
                },
                "load average is 3.00",
            ),
        ] {
            let reasons = load.reasons();
            assert!(
                reasons.len() == 1 && reasons[0].contains(word),
                "{reasons:?}"
            );
        }
    }

    #[test]
    fn what_the_kernel_tells() {
        assert!((average("1.25 0.50 0.1 1/2 3") - 1.25).abs() < 1e-9);
        let text = "some avg10=12.50 avg60=1.00 avg300=0.1 total=5\nfull avg10=0.00\n";
        assert_eq!(pressure(text), Some(12.5));
        assert_eq!(pressure(""), None);
        assert!(Load::watch().processors > 0);
    }
}
