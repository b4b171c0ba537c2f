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
