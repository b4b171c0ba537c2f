//! `belljar bench`: what this machine reaches, measured honestly.

mod load;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use belljar_node::assets;
use belljar_node::size::Size;
use belljar_restore_bench::failure::{Attempt, Failure as BenchFailure};
use belljar_restore_bench::host::Load;
use belljar_restore_bench::record::{Measure, Series};
use belljar_restore_bench::run::{self, Circumstances, Outcome, Sink};
use belljar_restore_bench::settings::{Ahead, Cache, Guest, Settings};
use belljar_restore_bench::stats::Summary;
use belljar_restore_bench::vmm::Binary;
use belljar_restore_bench::{cache, page};
use serde_json::Value;

use crate::failure::{Failure, status_of};
use crate::options::{self, MachineOptions};
use crate::output::{self, Format, OutputOption, Table};
use crate::progress::Steps;
use crate::report;
use crate::values::Cpus;

/// Measure what this machine reaches
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Restore(Box<Restore>),
    Load(Box<load::Args>),
}

/// Measure how soon a saved guest answers again
///
/// Boots a guest, fills some of its RAM, saves it, and restores it again and again in new VMM processes. A reply counts
/// only if nobody but that guest could give it. Of each list the first value is the base; the others are swept one
/// list at a time.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar bench restore --html restore.html
  belljar bench restore --memory 256M,1G,4G --working-set 1M,8M,32M --html sweep.html
  belljar bench restore --clones 1,10,100 --prepared no
  belljar bench restore --dir /var/tmp --cache hot,warm,cold
  belljar bench restore --vs firecracker=/usr/bin/firecracker -o json >samples.jsonl")]
struct Restore {
    /// How often each is measured
    #[arg(short = 'n', long, value_name = "N", default_value = "20", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    iterations: u32,

    /// RAM of the guest
    #[arg(
        short,
        long,
        value_name = "SIZE,…",
        value_delimiter = ',',
        default_value = "256M"
    )]
    memory: Vec<Size>,

    /// What of it is filled before the guest is saved
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    fill: Size,

    /// What a restored guest writes to after its reply
    #[arg(
        short,
        long,
        value_name = "SIZE,…",
        value_delimiter = ',',
        default_value = "1M"
    )]
    working_set: Vec<Size>,

    /// How many are restored at the same time
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', default_value = "1",
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    clones: Vec<u32>,

    /// Where the snapshot is when it is restored: in memory, on the disk alone, for root nothing in memory at all, or in
    /// a store's chunks
    #[arg(
        long,
        value_name = "CACHE,…",
        value_delimiter = ',',
        default_value = "hot"
    )]
    cache: Vec<CacheWord>,

    /// What the VMM had made ahead, as one of a pool: nothing, its VM, or its VM and the snapshot's RAM
    #[arg(
        long,
        value_name = "WHAT,…",
        value_delimiter = ',',
        default_value = "no,memory"
    )]
    prepared: Vec<AheadWord>,

    /// Measure with a recorded working set, too
    #[arg(long)]
    recorded: bool,

    /// Whether the agent or one small program runs in the guest
    #[arg(long, value_name = "GUEST", default_value = "agent")]
    guest: GuestWord,

    /// Number of virtual processors
    #[arg(long, value_name = "N", default_value = "1", value_parser = crate::values::cpus)]
    cpus: Cpus,

    /// One more VMM with Firecracker's API to compare with; may be given several times
    #[arg(long, value_name = "NAME=BINARY", value_parser = peer)]
    vs: Vec<Binary>,

    /// Where snapshots lie meanwhile [default: /dev/shm, else the directory for temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Write a report with drawings
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Write the raw samples as JSON lines
    #[arg(long, value_name = "FILE")]
    lines: Option<PathBuf>,

    /// Measure although others use this machine; the report says so
    #[arg(long)]
    on_loaded_host: bool,

    /// The program for the guest [default: belljar-bench-guest beside this one]
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,

    #[command(flatten)]
    output: OutputOption,

    #[command(flatten)]
    machine: MachineOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum CacheWord {
    /// In the page cache
    Hot,
    /// Dropped from the page cache
    Warm,
    /// The page cache is empty, as far as the caller may empty it
    Cold,
    /// Straight from the store's chunks
    Lazy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum AheadWord {
    /// Nothing
    No,
    /// VM and vCPUs
    Vm,
    /// VM, vCPUs and RAM
    Memory,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum GuestWord {
    /// The agent; the reply is what a command says
    Agent,
    /// A program that is PID 1; the reply is its own
    Program,
}

fn peer(text: &str) -> Result<Binary, String> {
    let (name, path) = text
        .split_once('=')
        .filter(|(name, path)| !name.is_empty() && !path.is_empty())
        .ok_or("write NAME=BINARY, for example firecracker=/usr/bin/firecracker")?;
    crate::values::name(name)?;
    Ok(Binary {
        name: name.to_owned(),
        path: path.into(),
    })
}

/// Returns the exit status.
pub(crate) fn bench(args: &Args) -> u8 {
    match &args.verb {
        Verb::Restore(args) => status_of(restore(args)),
        Verb::Load(args) => status_of(load::load(args)),
    }
}

fn bench_failure(failure: &BenchFailure) -> Failure {
    Failure::new(failure)
}

fn restore(args: &Restore) -> Result<u8, Failure> {
    let settings = settings(args)?;
    settings
        .check()
        .map_err(|failure| bench_failure(&failure))?;
    let circumstances = circumstances(args.on_loaded_host)?;
    let format = args.output.format();
    let mut sink = Lines::new(
        args.lines.as_deref().map(create).transpose()?,
        format == Format::Json,
    );
    // Before an hour of measuring, not after.
    let page = args.html.as_deref().map(create).transpose()?;
    let measured = run::run(&settings, &circumstances, &mut sink);
    sink.finish();
    let outcome = measured.map_err(|failure| bench_failure(&failure))?;
    if let (Some(mut file), Some(path)) = (page, &args.html) {
        file.write_all(page::write(&settings, &circumstances, &outcome).as_bytes())
            .attempt(format!("cannot write {}", path.display()))
            .map_err(|failure| bench_failure(&failure))?;
    }
    if format == Format::Table {
        output::print(&table(&outcome));
    }
    for note in &outcome.notes {
        report::note(note);
    }
    match outcome.headline(&settings, &circumstances) {
        Ok(said) => {
            if format == Format::Table {
                output::print(&format!("\n{said}\n"));
            }
            Ok(0)
        }
        // Only others that came meanwhile can have this effect.
        Err(why) => Err(Failure::with_remedy(
            why,
            "measure again on a quiet machine; the samples are kept where they were asked for",
        )),
    }
}

/// What the machine is like, if one may measure on it.
fn circumstances(forced: bool) -> Result<Circumstances, Failure> {
    let load = Load::watch();
    let reasons = load.reasons();
    if !reasons.is_empty() && !forced {
        return Err(Failure::with_remedy(
            format!(
                "this machine is too loaded to measure on: {}",
                reasons.join("; ")
            ),
            "wait until it is quiet, or say --on-loaded-host; then the report says that it was loaded",
        ));
    }
    Ok(Circumstances {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        instrument: std::env::var("BELLJAR_BENCH_INSTRUMENT").unwrap_or_default(),
        load,
        forced,
    })
}

fn mebibytes(what: &str, size: Size) -> Result<u64, Failure> {
    if size.0.is_multiple_of(1 << 20) {
        Ok(size.0 >> 20)
    } else {
        Err(Failure::with_remedy(
            format!("{what} is measured in whole MiB"),
            "write for example 32M",
        ))
    }
}

fn create(path: &Path) -> Result<File, Failure> {
    File::create(path)
        .map_err(|error| Failure::new(format!("cannot write {}: {error}", path.display())))
}

fn settings(args: &Restore) -> Result<Settings, Failure> {
    let all = |what: &str, sizes: &[Size]| -> Result<Vec<u64>, Failure> {
        sizes.iter().map(|size| mebibytes(what, *size)).collect()
    };
    let caches = args.cache.iter().map(|word| match word {
        CacheWord::Hot => Cache::Hot,
        CacheWord::Warm => Cache::Warm,
        CacheWord::Cold => Cache::Cold,
        CacheWord::Lazy => Cache::Lazy,
    });
    let caches: Vec<Cache> = caches.collect();
    let ahead = args.prepared.iter().map(|word| match word {
        AheadWord::No => Ahead::Nothing,
        AheadWord::Vm => Ahead::Vm,
        AheadWord::Memory => Ahead::Memory,
    });
    let assets = args.machine.assets()?;
    let file = |what, path: &Path| assets::absolute_file(what, path).map_err(Failure::from);
    let mut vmms = vec![Binary {
        name: "belljar".to_owned(),
        path: args.machine.programs().vmm,
    }];
    vmms.extend(args.vs.iter().cloned());
    for vmm in &mut vmms {
        vmm.path = file("the VMM", &vmm.path)?;
    }
    let program = options::program(args.program.as_deref(), "belljar-bench-guest");
    Ok(Settings {
        vmms,
        kernel: assets.kernel()?,
        initramfs: assets.initramfs()?,
        program: file("the program for the guest", &program)?,
        keeper: if caches.contains(&Cache::Lazy) {
            file("the keeper", &options::program(None, "belljar-keeper"))?
        } else {
            PathBuf::new()
        },
        directory: args.dir.clone().unwrap_or_else(directory),
        guest: match args.guest {
            GuestWord::Agent => Guest::Agent,
            GuestWord::Program => Guest::Program,
        },
        vcpus: args.cpus.vcpus,
        memory_mib: all("RAM", &args.memory)?,
        filled_mib: mebibytes("what is filled", args.fill)?,
        working_set_mib: all("a working set", &args.working_set)?,
        clones: args.clones.clone(),
        caches,
        prepared: ahead.collect(),
        recorded: args.recorded,
        iterations: args.iterations,
    })
}

/// A tmpfs if there is one: so every VMM has its best setting.
fn directory() -> PathBuf {
    let shared = Path::new("/dev/shm");
    if cache::is_memory(shared).unwrap_or(false) {
        return shared.to_owned();
    }
    std::env::temp_dir()
}

/// Where samples go while they come.
struct Lines {
    file: Option<File>,
    printed: bool,
    steps: Steps,
}

impl Lines {
    fn new(file: Option<File>, printed: bool) -> Self {
        Self {
            file,
            printed,
            steps: Steps::new(),
        }
    }

    fn finish(&mut self) {
        self.steps.finish();
    }
}

impl Sink for Lines {
    fn line(&mut self, line: &Value) -> Result<(), BenchFailure> {
        let text = format!("{line}\n");
        if self.printed {
            output::print(&text);
        }
        if let Some(file) = &mut self.file {
            file.write_all(text.as_bytes())
                .attempt("cannot write the samples")?;
        }
        Ok(())
    }

    fn progress(&mut self, done: u64, all: u64, what: &str) {
        self.steps.tell(done, all, what);
    }
}

fn table(outcome: &Outcome) -> String {
    let mut table = Table::new(&[
        "HOW", "RAM", "SET", "CLONES", "N", "RUNNING", "READY", "RESULT", "P99", "FAULTS", "PSS",
    ]);
    for series in Series::of(&outcome.iterations) {
        let told = |measure, pick: fn(&Summary) -> f64| {
            let summary = series.summary(measure);
            summary.map_or_else(
                || "-".to_owned(),
                |summary| format!("{:.2} ms", pick(&summary) / 1e3),
            )
        };
        let p50: fn(&Summary) -> f64 = |summary| summary.p50;
        let pss = series.summary(Measure::Pss).map_or(0.0, |pss| pss.p50);
        table.row(&[
            &series.label(),
            &output::size(series.case.memory_mib << 20),
            &output::size(series.case.working_set_mib << 20),
            &series.case.clones.to_string(),
            &series.values(Measure::Result).len().to_string(),
            &told(Measure::Running, p50),
            &told(Measure::Ready, p50),
            &told(Measure::Result, p50),
            &told(Measure::Result, |summary| summary.p99),
            &told(Measure::Faults, p50),
            &format!("{:.1} MiB", pss / 1024.0),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::peer;

    #[test]
    fn a_peer_has_a_name_and_a_path() {
        let binary = peer("fc=/usr/bin/firecracker").unwrap();
        assert_eq!(
            (binary.name.as_str(), binary.path.to_str().unwrap()),
            ("fc", "/usr/bin/firecracker")
        );
        for wrong in ["fc", "=x", "fc=", "a/b=x"] {
            assert!(peer(wrong).is_err(), "{wrong}");
        }
    }
}
