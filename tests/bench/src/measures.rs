//! The measures. Each gets a VMM in the state it needs and returns samples.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use belljar_protocol::READY_PORT;
use belljar_protocol::client::receive_ready;
use belljar_restore_bench::wire::{
    Access, BLOCK_PORT, BOOT_PORT, BULK_PORT, Block, Boot, Bulk, ECHO_PORT, word,
};
use rustix::io::Errno;

use crate::counters::{self, Counts};
use crate::failure::{Attempt, Failure, Result};
use crate::report::Samples;
use crate::vmm::Vmm;

const MIB: f64 = 1_048_576.0;
/// The payload of an echo.
const GREETING: [u8; 12] = *b"hello, guest";
/// Operations before the measured ones: they make the guest's and the VMM's memory resident.
const WARM_UP: u64 = 16;

/// A running guest of the benchmark's own kind, and whether system calls are counted.
pub(crate) struct Subject<'a> {
    pub(crate) vmm: &'a mut Vmm,
    pub(crate) tracing: bool,
}

impl Subject<'_> {
    fn counts(&self) -> Counts {
        counters::read(self.vmm.pid(), self.tracing)
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn ns_to_ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// Process start → API answers.
pub(crate) fn answers(name: &str, subject: &Subject<'_>) -> Samples {
    Samples::one(name, "ms", ms(subject.vmm.answered)).counted(subject.counts(), 1)
}

/// `InstanceStart` → first words of the benchmark's guest, by stages; leaves it serving.
pub(crate) fn boot(subject: &mut Subject<'_>) -> Result<Vec<Samples>> {
    let before = subject.counts();
    let mut booted = subject.vmm.boot(BOOT_PORT, Boot::SIZE)?;
    let counts = subject.counts().since(&before);
    let record = booted.first.as_slice().try_into().ok();
    let boot = record
        .and_then(Boot::decode)
        .ok_or_else(|| Failure("the guest is not the benchmark's".to_owned()))?;
    let mut listening = [0];
    booted
        .stream
        .read_exact(&mut listening)
        .attempt("the guest does not listen")?;
    let outside = ms(booted.replied) - ns_to_ms(boot.sent_ns);
    Ok(vec![
        Samples::one("boot.api_returned", "ms", ms(booted.returned)),
        Samples::one("boot.guest_kernel", "ms", ns_to_ms(boot.init_ns)),
        Samples::one(
            "boot.guest_init",
            "ms",
            ns_to_ms(boot.sent_ns.saturating_sub(boot.init_ns)),
        ),
        Samples::one("boot.outside_guest", "ms", outside),
        Samples::one("boot.first_reply", "ms", ms(booted.replied)).counted(counts, 1),
    ])
}

/// `InstanceStart` → the agent's `Ready`, by the agent's own stages.
pub(crate) fn agent(name: &str, subject: &mut Subject<'_>) -> Result<Vec<Samples>> {
    let before = subject.counts();
    let booted = subject.vmm.boot(READY_PORT, 0)?;
    let ready = receive_ready(booted.stream, None).attempt("the agent's Ready")?;
    let replied = booted.started.elapsed();
    let counts = subject.counts().since(&before);
    if !ready.degraded.is_empty() {
        return Err(Failure(format!(
            "the agent is degraded: {}",
            ready.degraded
        )));
    }
    let times = ready.times.unwrap_or_default();
    let stage = |what: &str, ns: u64| Samples::one(format!("{name}.{what}"), "ms", ns_to_ms(ns));
    Ok(vec![
        stage("guest_kernel", times.init_ns),
        stage("mounts", times.mounted_ns.saturating_sub(times.init_ns)),
        stage("listens", times.ready_ns.saturating_sub(times.mounted_ns)),
        Samples::one(
            format!("{name}.outside_guest"),
            "ms",
            ms(replied) - ns_to_ms(times.ready_ns),
        ),
        Samples::one(format!("{name}.ready"), "ms", ms(replied)).counted(counts, 1),
    ])
}

/// The VMM's memory without its guest's, and how much of the guest's is resident.
pub(crate) fn memory(when: &str, vmm: &Vmm, guest_mib: u64) -> Result<Vec<Samples>> {
    // What the boot left to do is done by then.
    std::thread::sleep(Duration::from_millis(50));
    let memory = counters::memory(vmm.pid(), guest_mib)?;
    let sample =
        |what: &str, kib: u64| Samples::one(format!("memory.{when}.{what}"), "KiB", kib as f64);
    Ok(vec![
        sample("private", memory.private),
        sample("pss", memory.pss),
        sample("rss", memory.rss),
        sample("guest", memory.guest),
    ])
}

/// Runs an operation some times, after a warm-up; microseconds of each.
fn repeat(
    name: &str,
    subject: &Subject<'_>,
    count: u64,
    mut operation: impl FnMut() -> Result<()>,
) -> Result<Samples> {
    for _ in 0..WARM_UP {
        operation()?;
    }
    let before = subject.counts();
    let mut values = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        operation()?;
        values.push(us(start.elapsed()));
    }
    let counts = subject.counts().since(&before);
    Ok(Samples {
        measure: name.to_owned(),
        unit: "us",
        values,
        counts: Some((counts, count)),
    })
}

/// 12 bytes to the guest and back: with a connection each, and on one that stays.
pub(crate) fn echo(subject: &Subject<'_>, count: u64) -> Result<Vec<Samples>> {
    let vmm = &subject.vmm;
    let greet = |stream: &mut std::os::unix::net::UnixStream| {
        let mut answer = [0; GREETING.len()];
        stream.write_all(&GREETING).attempt("echo")?;
        stream.read_exact(&mut answer).attempt("echo")?;
        if answer == GREETING {
            Ok(())
        } else {
            Err(Failure(format!("the echo differs: {answer:?}")))
        }
    };
    let connected = repeat("echo.connect", subject, count, || {
        greet(&mut vmm.connect(ECHO_PORT)?)
    })?;
    let mut stream = vmm.connect(ECHO_PORT)?;
    let steady = repeat("echo.steady", subject, count, || greet(&mut stream))?;
    Ok(vec![connected, steady])
}

/// Bytes through one connection, in both directions.
pub(crate) fn bulk(subject: &Subject<'_>, total: u64) -> Result<Vec<Samples>> {
    let mut stream = subject.vmm.connect(BULK_PORT)?;
    let mut all = Vec::new();
    for (label, chunk) in [("64k", 64 << 10), ("1m", 1 << 20)] {
        for from_guest in [true, false] {
            let direction = if from_guest { "from_guest" } else { "to_guest" };
            move_bytes(&mut stream, from_guest, chunk, chunk)?;
            let before = subject.counts();
            let start = Instant::now();
            move_bytes(&mut stream, from_guest, total, chunk)?;
            let time = start.elapsed();
            let counts = subject.counts().since(&before);
            let rate = total as f64 / MIB / time.as_secs_f64();
            let operations = total.div_ceil(chunk);
            all.push(
                Samples::one(format!("bulk.{direction}.{label}"), "MiB/s", rate)
                    .counted(counts, operations),
            );
        }
    }
    Ok(all)
}

fn move_bytes(
    stream: &mut std::os::unix::net::UnixStream,
    from_guest: bool,
    total: u64,
    chunk: u64,
) -> Result<()> {
    let request = Bulk {
        from_guest,
        total,
        chunk,
    };
    let mut buffer = vec![0x5a; usize::try_from(chunk).unwrap_or(0)];
    stream.write_all(&request.encode()).attempt("bulk")?;
    let mut left = total;
    while left > 0 {
        let length = usize::try_from(left.min(chunk)).unwrap_or(0);
        let piece = buffer.get_mut(..length).unwrap_or_default();
        let moved = if from_guest {
            stream.read(piece).attempt("bulk from the guest")?
        } else {
            stream.write(piece).attempt("bulk to the guest")?
        };
        if moved == 0 {
            return Err(Failure("the bulk connection was cut".to_owned()));
        }
        left = left.saturating_sub(moved as u64);
    }
    if from_guest {
        return Ok(());
    }
    // The guest has it all.
    let mut done = [0];
    stream.read_exact(&mut done).attempt("bulk to the guest")
}

/// Direct I/O on the guest's first drives, timed in the guest; `engines` are their names, in order.
pub(crate) fn block(subject: &Subject<'_>, engines: &[&str], count: u64) -> Result<Vec<Samples>> {
    let mut stream = subject.vmm.connect(BLOCK_PORT)?;
    let mut all = Vec::new();
    for (drive, engine) in engines.iter().enumerate() {
        for (what, access, size) in [
            ("read_4k", Access::RandomRead, 4 << 10),
            ("write_4k", Access::RandomWrite, 4 << 10),
            ("seq_read_128k", Access::SequentialRead, 128 << 10),
            ("seq_read_1m", Access::SequentialRead, 1 << 20),
        ] {
            let request = |count| Block {
                access,
                drive: drive as u64,
                size,
                count,
            };
            let count = if access == Access::SequentialRead {
                (count / 8).max(1)
            } else {
                count
            };
            transfer(&mut stream, request(WARM_UP))?;
            let before = subject.counts();
            let times = transfer(&mut stream, request(count))?;
            let counts = subject.counts().since(&before);
            let name = format!("block.{engine}.{what}");
            all.push(if access == Access::SequentialRead {
                let seconds = times.iter().sum::<u64>() as f64 / 1e9;
                let mib = (size.saturating_mul(count)) as f64 / MIB;
                Samples::one(name, "MiB/s", mib / seconds).counted(counts, count)
            } else {
                Samples {
                    measure: name,
                    unit: "us",
                    values: times.iter().map(|ns| *ns as f64 / 1e3).collect(),
                    counts: Some((counts, count)),
                }
            });
        }
    }
    Ok(all)
}

/// Nanoseconds of each operation, by the guest's clock.
fn transfer(stream: &mut std::os::unix::net::UnixStream, request: Block) -> Result<Vec<u64>> {
    stream.write_all(&request.encode()).attempt("block")?;
    let mut next = || {
        let mut bytes = [0; 8];
        stream
            .read_exact(&mut bytes)
            .attempt("block")
            .map(|()| word(bytes))
    };
    let count = next()?;
    if count == Block::FAILED {
        let errno = Errno::from_raw_os_error(i32::try_from(next()?).unwrap_or(0));
        return Err(Failure(format!("the guest's {request:?} failed: {errno}")));
    }
    (0..count).map(|_| next()).collect()
}
