//! `belljar bench load`: many clones of a server that is busy with its memory.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use belljar_node::assets::Assets;
use belljar_node::sandbox::{GuestSpec, Limits, NewSandbox, Programs, Sandbox};
use belljar_node::size::Size;
use belljar_node::snapshots::{self, Capture, Host, NewClone, Source};
use belljar_node::stages::Stages;
use belljar_node::state::spec::Life;
use belljar_node::state::{self, Owner, StateRoot};
use belljar_protocol::client::{CallError, Exec, ports};
use belljar_protocol::{AGENT_PORT, v1};
use belljar_restore_bench::failure::{Attempt, Failure as BenchFailure, Result};
use belljar_restore_bench::record::line;
use belljar_restore_bench::run::Sink;
use belljar_restore_bench::stats::summarise;
use belljar_restore_bench::{lazy, subject};
use serde_json::{Value, json};

use super::{Lines, bench_failure, circumstances, create, directory, mebibytes};
use crate::failure::Failure;
use crate::options::{self, BootOptions, MachineOptions};
use crate::output::{self, Format, OutputOption, Table};
use crate::report;
use crate::values::Cpus;

/// What serves in the guest.
const SERVER: &str = include_str!("server.py");
/// Its port.
const PORT: u32 = 8000;
/// Bytes of a page.
const PAGE: u64 = 4096;
/// Nothing takes longer, even with processors in software.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between attempts to reach a server that starts.
const RETRY: Duration = Duration::from_millis(20);
/// Longest answer that makes sense.
const ANSWER_MAX: u64 = 4096;

/// Measure clones of a server in Python that answer requests, all at the same time
///
/// Boots a guest, has a server fill its memory, saves it, and restores many clones at once, each as a sandbox of its
/// own. Every answer depends on a random number and on RAM that only that server has; a wrong one ends the measurement.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar bench load
  belljar bench load --clones 10 --requests 100 -o json >samples.jsonl")]
pub(super) struct Args {
    /// How many clones
    #[arg(short, long, value_name = "N", default_value = "50", value_parser = clap::value_parser!(u32).range(1..=1000))]
    clones: u32,

    /// Requests to each of them
    #[arg(short = 'n', long, value_name = "N", default_value = "20", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,

    /// Pages of its memory that the server reads for one request, of which it writes an eighth
    #[arg(long, value_name = "N", default_value = "256", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pages: u32,

    /// Memory that the server fills
    #[arg(short, long, value_name = "SIZE", default_value = "200M")]
    working_set: Size,

    /// RAM of the guest
    #[arg(short, long, value_name = "SIZE", default_value = "1G")]
    memory: Size,

    /// Number of virtual processors
    #[arg(long, value_name = "N", default_value = "2", value_parser = crate::values::cpus)]
    cpus: Cpus,

    /// Where sandboxes and store are meanwhile [default: /dev/shm, else the directory for temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Write the raw samples as JSON lines
    #[arg(long, value_name = "FILE")]
    lines: Option<PathBuf>,

    /// Measure although others use this machine
    #[arg(long)]
    on_loaded_host: bool,

    #[command(flatten)]
    output: OutputOption,

    #[command(flatten)]
    machine: MachineOptions,

    #[command(flatten)]
    boot: BootOptions,
}

/// What one clone showed, in microseconds.
#[derive(Debug, Clone, Default)]
struct Sample {
    /// Call → programs go on.
    restored: f64,
    /// Call → first answer.
    first: f64,
    /// Of each request after that.
    requests: Vec<f64>,
    pss_kib: u64,
}

/// What the server was told, and what it answers.
#[derive(Debug, Clone, Copy)]
struct Server {
    salt: u64,
    pages: u64,
    /// Pages for one request.
    count: u32,
}

fn mix(one: u64, other: u64) -> u64 {
    (one ^ other)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(1)
}

impl Server {
    fn answer(self, nonce: u64) -> u64 {
        let (mut answer, mut at) = (nonce, nonce);
        for turn in 0..u64::from(self.count) {
            at = mix(at, turn);
            let page = at.checked_rem(self.pages).unwrap_or(0);
            answer = mix(answer, mix(self.salt, page));
        }
        answer
    }

    /// One request on a connection of its own; the server says that it is its `number`th.
    fn request(self, sandbox: &Sandbox, number: u64) -> Result<Duration> {
        let nonce = subject::random()?;
        let begin = Instant::now();
        let deadline = begin + PATIENCE;
        let target = v1::Connect {
            target: Some(v1::connect::Target::Tcp(v1::TcpTarget {
                host: String::new(),
                port: PORT,
            })),
            ..v1::Connect::default()
        };
        // The agent hangs up on who does not ask in time, and where many guests share a processor one of them may be
        // away for so long. The server has seen nothing of that then; the clock goes on.
        let (mut stream, mut text) = loop {
            let stream = sandbox
                .connect(AGENT_PORT, deadline)
                .attempt("cannot reach the guest")?;
            match ports::connect(stream, target.clone(), Some(deadline)) {
                Err(CallError::Closed { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(RETRY);
                }
                reached => break reached.attempt("the server's port")?,
            }
        };
        let request = format!("GET /{nonce}/{} HTTP/1.0\r\n\r\n", self.count);
        let asked = stream.set_read_timeout(Some(PATIENCE));
        asked
            .and_then(|()| stream.write_all(request.as_bytes()))
            .attempt("a request")?;
        stream
            .take(ANSWER_MAX)
            .read_to_end(&mut text)
            .attempt("no answer")?;
        let took = begin.elapsed();
        let text = String::from_utf8_lossy(&text);
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        if body == format!("{} {number}", self.answer(nonce)) {
            return Ok(took);
        }
        Err(BenchFailure(format!(
            "a wrong answer to request {number}: {:?}",
            text.lines().last().unwrap_or_default()
        )))
    }
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// A failure of the node, in a benchmark's words.
fn failed(failure: impl Into<Failure>) -> BenchFailure {
    BenchFailure(match failure.into() {
        Failure::Boot(error) => error.to_string(),
        Failure::Other { message, .. } => message,
    })
}

/// Everything that makes sandboxes here.
struct Place<'a> {
    root: StateRoot,
    programs: Programs,
    assets: Assets,
    keeper: belljar_node::snapshots::Keeper,
    args: &'a Args,
}

impl Place<'_> {
    fn limits(&self) -> Limits<'static> {
        Limits {
            boot: self.args.boot.limit().max(PATIENCE),
            cancel: None,
        }
    }

    /// Boots the guest, has the server fill its memory and answer once, and saves it.
    fn save(&self, server: Server) -> Result<String> {
        let guest = GuestSpec {
            assets: self.assets.clone(),
            kernel: None,
            initramfs: None,
            image: Default::default(),
            disk: Default::default(),
            drives: Vec::new(),
            vcpus: self.args.cpus.vcpus,
            cpu_limit_milli: self.args.cpus.limit_milli,
            memory: self.args.memory,
            boot_args: None,
        };
        let new = NewSandbox {
            name: None,
            labels: Default::default(),
            life: Life::Owned,
            guest,
        };
        let mut stages = Stages::new(Instant::now());
        let sandbox = Sandbox::boot(&self.root, &self.programs, &new, self.limits(), &mut stages);
        let sandbox = sandbox.map_err(failed)?;
        let salt = server.salt.to_string();
        let pages = server.pages.to_string();
        let words = ["python3", "-c", SERVER, &salt, &pages];
        let call = v1::Exec {
            argv: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
            detached: true,
            ..v1::Exec::default()
        };
        let deadline = Instant::now() + PATIENCE;
        let agent = sandbox.connect(AGENT_PORT, deadline).attempt("the agent")?;
        Exec::start(agent, call, Some(deadline)).attempt("cannot start the server")?;
        while let Err(failure) = server.request(&sandbox, 1) {
            if Instant::now() > deadline {
                return Err(failure);
            }
            std::thread::sleep(RETRY);
        }
        let capture = Capture {
            wait: true,
            ..Capture::default()
        };
        let captured = snapshots::capture(&sandbox.found(), &self.keeper, &capture, |_, _| {});
        let id = captured.map_err(failed)?.id;
        drop(sandbox.tear_down());
        Ok(id)
    }

    /// A clone that has answered once.
    fn restore(&self, id: &str, server: Server, barrier: &Barrier) -> Result<(Sandbox, Sample)> {
        barrier.wait();
        let begin = Instant::now();
        let source = Source::open(&self.keeper, id, &self.assets, &self.programs, None);
        let source = source.map_err(failed)?;
        let clone = NewClone {
            life: Life::Owned,
            name: None,
            labels: Default::default(),
        };
        let host = Host {
            root: &self.root,
            programs: &self.programs,
            assets: &self.assets,
            limits: self.limits(),
        };
        let mut stages = Stages::new(begin);
        let sandbox = snapshots::restore(host, &source, &clone, &mut stages).map_err(failed)?;
        let restored = us(begin.elapsed());
        server.request(&sandbox, 2)?;
        let first = us(begin.elapsed());
        let sample = Sample {
            restored,
            first,
            ..Sample::default()
        };
        Ok((sandbox, sample))
    }

    fn pss(sandbox: &Sandbox) -> Result<u64> {
        let record: Option<Owner> = sandbox
            .found()
            .dir()
            .read_record(state::OWNER)
            .map_err(failed)?;
        let pid = record.and_then(|owner| owner.vmm).map(|vmm| vmm.pid);
        let pid = pid.ok_or_else(|| BenchFailure("a clone without a VMM".to_owned()))?;
        Ok(subject::memory_of(pid)?.pss_kib)
    }

    /// Restores all at once, and has all answer at once.
    fn measure(&self, id: &str, server: Server, clones: u32) -> Result<Vec<Sample>> {
        let barrier = Barrier::new(usize::try_from(clones).unwrap_or(1));
        // A thread that failed meets the others all the same, and what they share is measured while all are there.
        let one = || -> Result<Sample> {
            let restored = self.restore(id, server, &barrier);
            barrier.wait();
            let answered = restored.and_then(|(sandbox, mut sample)| {
                for number in 0..self.args.requests {
                    let took = server.request(&sandbox, u64::from(number).saturating_add(3))?;
                    sample.requests.push(us(took));
                }
                Ok((sandbox, sample))
            });
            barrier.wait();
            let measured = answered.and_then(|(sandbox, mut sample)| {
                sample.pss_kib = Self::pss(&sandbox)?;
                Ok((sandbox, sample))
            });
            barrier.wait();
            let (sandbox, sample) = measured?;
            drop(sandbox.tear_down());
            Ok(sample)
        };
        let samples = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..clones {
                scope.spawn(|| {
                    let sample = one();
                    let mut all = samples.lock().unwrap_or_else(PoisonError::into_inner);
                    all.push(sample);
                });
            }
        });
        let samples = samples.into_inner().unwrap_or_else(PoisonError::into_inner);
        samples.into_iter().collect()
    }
}

/// Measures it, and prints what came out.
pub(super) fn load(args: &Args) -> std::result::Result<u8, Failure> {
    let circumstances = circumstances(args.on_loaded_host)?;
    let set_mib = mebibytes("a working set", args.working_set)?;
    if args.working_set.0.saturating_add(128 << 20) > args.memory.0 {
        return Err(Failure::with_remedy(
            format!("a server of {set_mib} MiB does not fit into the guest's RAM"),
            "give it 128 MiB more than the working set (--memory)",
        ));
    }
    let format = args.output.format();
    let mut sink = Lines::new(
        args.lines.as_deref().map(create).transpose()?,
        format == Format::Json,
    );
    let work = args.dir.clone().unwrap_or_else(directory);
    let work = work.join(format!("belljar-load-{}", std::process::id()));
    let root = StateRoot::at(&work)?;
    let program = options::program(None, "belljar-keeper");
    let place = Place {
        keeper: snapshots::keeper_of(&root, program),
        root,
        programs: args.machine.programs(),
        assets: args.machine.assets()?,
        args,
    };
    let measured = run(&place, &mut sink, circumstances.forced);
    sink.finish();
    let _ = lazy::end_keeper(&place.keeper);
    let _ = std::fs::remove_dir_all(&work);
    let samples = measured.map_err(|failure| bench_failure(&failure))?;
    if format == Format::Table {
        output::print(&table(args, &samples));
    }
    if circumstances.forced && !circumstances.load.reasons().is_empty() {
        report::note("this machine was loaded: the figures are not what it can do");
    }
    Ok(0)
}

fn run(place: &Place<'_>, sink: &mut Lines, forced: bool) -> Result<Vec<Sample>> {
    let args = place.args;
    let server = Server {
        salt: subject::random()?,
        pages: args.working_set.0 / PAGE,
        count: args.pages,
    };
    sink.line(&line(
        "load",
        json!({
            "clones": args.clones, "requests": args.requests, "pages": args.pages, "vcpus": args.cpus.vcpus,
            "memory_mib": args.memory.0 >> 20, "working_set_mib": args.working_set.0 >> 20, "forced": forced,
        }),
    ))?;
    sink.progress(0, 3, "saving a guest with a server");
    let id = place.save(server)?;
    // The first one has the keeper make templates; what is used twice it holds in huge pages, if it can.
    sink.progress(1, 3, "one clone at a time");
    for _ in 0..3 {
        place.measure(&id, server, 1)?;
    }
    sink.progress(2, 3, "all clones at once");
    let samples = place.measure(&id, server, args.clones)?;
    for (number, sample) in samples.iter().enumerate() {
        sink.line(&line("clone", of_clone(number, sample)))?;
    }
    for (measure, values) in measures(&samples) {
        if let Some(summary) = summarise(&values) {
            let fields = json!({"measure": measure, "n": summary.n, "min": summary.min, "p50": summary.p50,
                "p90": summary.p90, "p99": summary.p99, "max": summary.max});
            sink.line(&line("summary", fields))?;
        }
    }
    Ok(samples)
}

fn of_clone(number: usize, sample: &Sample) -> Value {
    json!({
        "clone": number, "restored_us": sample.restored, "first_us": sample.first,
        "request_us": sample.requests, "pss_kib": sample.pss_kib,
    })
}

fn measures(samples: &[Sample]) -> [(&'static str, Vec<f64>); 4] {
    let all = |pick: fn(&Sample) -> f64| samples.iter().map(pick).collect();
    [
        ("restored_us", all(|sample| sample.restored)),
        ("first_us", all(|sample| sample.first)),
        (
            "request_us",
            samples
                .iter()
                .flat_map(|sample| sample.requests.clone())
                .collect(),
        ),
        ("pss_kib", all(|sample| sample.pss_kib as f64)),
    ]
}

fn table(args: &Args, samples: &[Sample]) -> String {
    let mut table = Table::new(&["MEASURE", "CLONES", "N", "P50", "P90", "P99", "MAX"]);
    for (measure, values) in measures(samples) {
        let Some(summary) = summarise(&values) else {
            continue;
        };
        let told = |value: f64| match measure {
            "pss_kib" => format!("{:.1} MiB", value / 1024.0),
            _ => format!("{:.2} ms", value / 1e3),
        };
        table.row(&[
            match measure {
                "restored_us" => "call to programs running",
                "first_us" => "call to first answer",
                "request_us" => "later requests",
                _ => "memory (PSS)",
            },
            &args.clones.to_string(),
            &summary.n.to_string(),
            &told(summary.p50),
            &told(summary.p90),
            &told(summary.p99),
            &told(summary.max),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_depends_on_salt_nonce_and_pages() {
        let server = Server {
            salt: 1,
            pages: 100,
            count: 8,
        };
        let answer = server.answer(2);
        assert_ne!(answer, server.answer(3));
        assert_ne!(answer, Server { salt: 2, ..server }.answer(2));
        assert_ne!(answer, Server { count: 9, ..server }.answer(2));
        assert_eq!(answer, server.answer(2));
    }
}
