//! Counters of all subsystems, written as one line of JSON per flush.
//!
//! A device gets its counters from the [`Registry`] when it is made and only touches its own
//! atomics afterwards. As in Firecracker a line has one object per group, and a counter's
//! value is what was added since the last line that was written.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How often the machine calls [`Metrics::flush`], as Firecracker does.
pub const FLUSH_PERIOD: Duration = Duration::from_secs(60);

/// Counts events or bytes; wraps at 2^64. Cloning gives the same counter.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    pub fn inc(&self) {
        self.add(1);
    }

    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Everything since the start.
    pub fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A value that goes up and down; a line has its present value.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<AtomicU64>);

impl Gauge {
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
enum Metric {
    Counter { counter: Counter, written: u64 },
    Gauge(Gauge),
}

type Groups = BTreeMap<String, BTreeMap<String, Metric>>;

/// Where counters are registered. Cloning gives the same registry.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    groups: Arc<Mutex<Groups>>,
}

impl Registry {
    /// The counter `name` of `group` (`block_rootfs`, `vsock`, `api_server`): made at the first
    /// call, the same one at every later call.
    pub fn counter(&self, group: &str, name: &str) -> Counter {
        let mut groups = self.lock();
        let metrics = groups.entry(group.to_owned()).or_default();
        if let Some(Metric::Counter { counter, .. }) = metrics.get(name) {
            return counter.clone();
        }
        let counter = Counter::default();
        metrics.insert(
            name.to_owned(),
            Metric::Counter {
                counter: counter.clone(),
                written: 0,
            },
        );
        counter
    }

    /// The gauge `name` of `group`.
    pub fn gauge(&self, group: &str, name: &str) -> Gauge {
        let mut groups = self.lock();
        let metrics = groups.entry(group.to_owned()).or_default();
        if let Some(Metric::Gauge(gauge)) = metrics.get(name) {
            return gauge.clone();
        }
        let gauge = Gauge::default();
        metrics.insert(name.to_owned(), Metric::Gauge(gauge.clone()));
        gauge
    }

    /// One line of JSON without its newline. What it contains counts as written.
    pub fn take_line(&self, now: SystemTime) -> String {
        let ms = now
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis());
        let mut line = format!("{{\"utc_timestamp_ms\":{ms}");
        for (group, metrics) in self.lock().iter_mut() {
            let _ = write!(line, ",{}:{{", json_string(group));
            for (i, (name, metric)) in metrics.iter_mut().enumerate() {
                let value = match metric {
                    Metric::Gauge(gauge) => gauge.value(),
                    Metric::Counter { counter, written } => {
                        let total = counter.total();
                        total.wrapping_sub(std::mem::replace(written, total))
                    }
                };
                let comma = if i == 0 { "" } else { "," };
                let _ = write!(line, "{comma}{}:{value}", json_string(name));
            }
            line.push('}');
        }
        line.push('}');
        line
    }

    fn lock(&self) -> MutexGuard<'_, Groups> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn json_string(text: &str) -> String {
    serde_json::to_string(text).unwrap_or_else(|_| String::from("\"\""))
}

/// The registry with its output. A FIFO that is full delays lines, it never blocks the VMM:
/// one unfinished line is kept, and until it is out no further one begins.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    missed: Counter,
    output: Option<File>,
    unfinished: Vec<u8>,
}

impl Metrics {
    pub fn new(registry: Registry) -> Self {
        Self {
            missed: registry.counter("logger", "missed_metrics_count"),
            registry,
            output: None,
            unfinished: Vec::new(),
        }
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Lines go to `output` from now on; opened with
    /// [`Expect::Output`](crate::config::Expect::Output), so that it does not block.
    pub fn set_output(&mut self, output: File) {
        self.output = Some(output);
        self.unfinished.clear();
    }

    /// Writes one line: on `FlushMetrics`, every [`FLUSH_PERIOD`], and at the end. Without an
    /// output it does nothing. `WouldBlock`: the reader has not even taken the last line.
    pub fn flush(&mut self) -> io::Result<()> {
        let Some(output) = &self.output else {
            return Ok(());
        };
        let result = write_some(output, &mut self.unfinished);
        if result.is_ok() && self.unfinished.is_empty() {
            let line = self.registry.take_line(SystemTime::now());
            self.unfinished = line.into_bytes();
            self.unfinished.push(b'\n');
            return write_some(output, &mut self.unfinished).inspect_err(|_| self.missed.inc());
        }
        self.missed.inc();
        result.and(Err(io::ErrorKind::WouldBlock.into()))
    }
}

/// Writes as much of `bytes` as goes without blocking, and takes it off.
fn write_some(output: &File, bytes: &mut Vec<u8>) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(output, bytes) {
            Ok(count) => {
                bytes.drain(..count.min(bytes.len()));
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn value(line: &str, group: &str, name: &str) -> u64 {
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        json[group][name].as_u64().unwrap()
    }

    #[test]
    fn a_line_has_what_was_added_since_the_last() {
        let registry = Registry::default();
        let reads = registry.counter("block_a", "reads");
        registry.gauge("vcpu", "running").set(3);
        reads.add(5);
        // The same name is the same counter.
        registry.counter("block_a", "reads").inc();
        let line = registry.take_line(UNIX_EPOCH + Duration::from_millis(12));
        assert_eq!(
            line,
            r#"{"utc_timestamp_ms":12,"block_a":{"reads":6},"vcpu":{"running":3}}"#
        );
        reads.inc();
        let line = registry.take_line(UNIX_EPOCH);
        assert_eq!(value(&line, "block_a", "reads"), 1);
        assert_eq!(value(&line, "vcpu", "running"), 3);
        assert_eq!(reads.total(), 7);
    }

    #[test]
    fn a_slow_reader_gets_whole_lines_and_loses_no_counts() {
        let registry = Registry::default();
        let counter = registry.counter("g", "n");
        // Longer than a pipe holds, so that a line is cut.
        for i in 0..4000 {
            registry.counter("filler", &format!("a_long_name_{i}"));
        }
        let (mut reader, writer) = std::io::pipe().unwrap();
        let writer = std::os::fd::OwnedFd::from(writer);
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let mut metrics = Metrics::new(registry);
        metrics.set_output(writer.into());
        counter.add(1);
        metrics.flush().unwrap();
        counter.add(10);
        assert!(metrics.flush().is_err());
        let mut text = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        for _ in 0..3 {
            let count = reader.read(&mut buffer).unwrap();
            text.extend_from_slice(&buffer[..count]);
            let _ = metrics.flush();
        }
        drop(metrics);
        reader.read_to_end(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(value(lines[0], "g", "n"), 1);
        assert_eq!(value(lines[1], "g", "n"), 10);
        assert!(value(lines[1], "logger", "missed_metrics_count") >= 1);
    }

    #[test]
    fn without_an_output_nothing_is_lost() {
        let registry = Registry::default();
        registry.counter("g", "n").add(2);
        let mut metrics = Metrics::new(registry.clone());
        metrics.flush().unwrap();
        assert_eq!(value(&registry.take_line(UNIX_EPOCH), "g", "n"), 2);
    }
}
