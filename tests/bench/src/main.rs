//! Measures VMMs that speak the API of docs/api.md: same kernel, same guests, same run, interleaved.

mod counters;
mod measures;
mod overload;
mod pause;
mod report;
mod session;
mod snapshot;
mod waits;

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use belljar_restore_bench::{failure, stats, vmm};
use clap::{Parser, ValueEnum};
use serde_json::json;

use counters::Tracing;
use failure::{Attempt, Failure, Result};
use measures::Subject;
use report::{Report, Samples};
use vmm::{Binary, Drive, Machine, Vmm};

/// What our VMM is called in the report: it alone has layered drives.
const OURS: &str = "belljar";
/// First argument of the process that is an API server and nothing else, for comparison.
const EMPTY_SERVER: &str = "--empty-server";
/// The same for all VMMs. They add what they need themselves.
const BOOT_ARGS: &str = "quiet loglevel=1 panic=-1 reboot=t 8250.nr_uarts=0 pci=off";
/// Of each file behind a drive.
const DRIVE_MIB: usize = 64;
/// RAM of the guests that are saved.
const SNAPSHOT_MIB: u64 = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Process start → the API answers.
    Api,
    /// InstanceStart → first reply of a guest with one small program.
    Boot,
    /// InstanceStart → the agent's Ready.
    Agent,
    /// The VMM's memory without its guest's.
    Memory,
    /// vsock: 12 bytes and back.
    Echo,
    /// vsock: many bytes, both directions.
    Bulk,
    /// Direct reads and writes of drives, both engines.
    Block,
    /// Saving a guest and having it back.
    Snapshot,
    /// A sandbox by the command line: exec, terminal, waits, copies, listings. Of this project's VMM only.
    Session,
    /// How long a sandbox stands still for snapshots and a fork. Of this project's VMM only, and only if it is asked for.
    Pause,
    /// Pings of a sandbox that is full of something. Of this project's VMM only, and only if it is asked for.
    Overload,
}

/// Measures a VMM, and others beside it in the same run. Started by tests/bench/run, which builds all it needs.
#[derive(Debug, Parser)]
#[command(name = "belljar-bench")]
struct Arguments {
    /// The VMM
    #[arg(long, value_name = "BINARY")]
    vmm: PathBuf,
    /// One more VMM that speaks the same API, to compare with
    #[arg(long, value_name = "NAME=BINARY", value_parser = peer)]
    vs: Vec<Binary>,
    /// Measure these groups only
    #[arg(long, value_name = "GROUP", value_delimiter = ',')]
    only: Vec<Group>,
    /// How often each VMM is started
    #[arg(long, value_name = "N", default_value_t = 11)]
    runs: u32,
    /// Guest kernel
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initramfs with the benchmark's guest
    #[arg(long, value_name = "FILE")]
    initrd: PathBuf,
    /// Initramfs with the project's agent
    #[arg(long, value_name = "FILE")]
    agent_initrd: Option<PathBuf>,
    /// Image and empty disk for the agent to boot into
    #[arg(long, value_name = "FILE", requires = "disk")]
    image: Option<PathBuf>,
    #[arg(long, value_name = "FILE", requires = "image")]
    disk: Option<PathBuf>,
    /// The command line, for the group `session`
    #[arg(
        long,
        value_name = "FILE",
        requires = "image",
        requires = "agent_initrd",
        requires = "tool"
    )]
    belljar: Option<PathBuf>,
    /// The keeper of snapshots, for the group `pause`
    #[arg(long, value_name = "FILE", requires = "belljar")]
    keeper: Option<PathBuf>,
    /// A program that the guest of the group `session` starts again and again
    #[arg(long, value_name = "FILE")]
    tool: Option<PathBuf>,
    /// Guest memory
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    memory: u64,
    /// Terminals that are opened by the group `overload`
    #[arg(long, value_name = "N", default_value_t = 100)]
    terminals: usize,
    /// Guest vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Where inputs are copied and VMMs work: a tmpfs
    #[arg(long, value_name = "DIR", default_value = "/tmp")]
    work: PathBuf,
    /// Raw samples as JSON lines
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// What is measured, for the JSON lines
    #[arg(long, value_name = "ID", default_value = "unknown")]
    commit: String,
    /// Work in a root of its own on the tmpfs, so that no path is looked up in slower places (needs root)
    #[arg(long)]
    own_root: bool,
    /// Do not count system calls in one more run
    #[arg(long)]
    no_count: bool,
}

fn peer(text: &str) -> std::result::Result<Binary, String> {
    let (name, path) = text.split_once('=').ok_or("write NAME=BINARY")?;
    Ok(Binary {
        name: name.to_owned(),
        path: path.into(),
    })
}

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let ended = if words.next().is_some_and(|word| word == EMPTY_SERVER) {
        empty_server(words)
    } else {
        Bench::new(Arguments::parse()).and_then(Bench::run)
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("belljar-bench: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Answers one call on `--api-sock PATH`: what a process start and a call cost at the least.
fn empty_server(words: impl Iterator<Item = OsString>) -> Result<()> {
    let path = words
        .last()
        .ok_or_else(|| Failure("no socket was named".to_owned()))?;
    let listener = UnixListener::bind(path).attempt("bind")?;
    let (mut stream, _) = listener.accept().attempt("accept")?;
    let mut request = [0; 4096];
    let length = stream.read(&mut request).attempt("read")?;
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        .attempt("write")?;
    // Stays until it is killed, as a VMM would.
    let _ = stream.read(request.get_mut(..length).unwrap_or_default());
    std::thread::park();
    Ok(())
}

struct Bench {
    arguments: Arguments,
    work: PathBuf,
    vmms: Vec<Binary>,
    machine: Machine,
    report: Report,
    started: u32,
}

impl Bench {
    /// Copies all inputs to the work directory, so that no reading from slower places is measured.
    fn new(mut arguments: Arguments) -> Result<Self> {
        let work = arguments
            .work
            .join(format!("belljar-bench-{}", std::process::id()));
        fs::create_dir(&work).attempt(format!("cannot make {}", work.display()))?;
        let mut vmms = vec![Binary {
            name: OURS.to_owned(),
            path: arguments.vmm.clone(),
        }];
        vmms.append(&mut arguments.vs.clone());
        let take = |from: &mut PathBuf, name: &str| {
            let to = work.join(name);
            copy(from, &to)?;
            *from = to;
            Ok(())
        };
        for vmm in &mut vmms {
            take(&mut vmm.path, &format!("vmm-{}", vmm.name))?;
        }
        copy(Path::new("/proc/self/exe"), &work.join("empty-server"))?;
        take(&mut arguments.kernel, "kernel")?;
        take(&mut arguments.initrd, "initrd")?;
        for (file, name) in [
            (&mut arguments.agent_initrd, "agent-initrd"),
            (&mut arguments.image, "image"),
            (&mut arguments.disk, "disk"),
            (&mut arguments.belljar, "belljar"),
            // Beside it, where it looks.
            (&mut arguments.keeper, "belljar-keeper"),
            (&mut arguments.tool, "tool"),
        ] {
            if let Some(file) = file {
                take(file, name)?;
            }
        }
        let names = vmms.iter().map(|vmm| vmm.name.clone()).collect();
        let report = Report::new(arguments.out.as_deref(), names)?;
        let mut work = work;
        if arguments.own_root {
            enter(&work).attempt(format!("cannot make {} the root", work.display()))?;
            let files = [
                Some(&mut arguments.kernel),
                Some(&mut arguments.initrd),
                arguments.agent_initrd.as_mut(),
                arguments.image.as_mut(),
                arguments.disk.as_mut(),
                arguments.belljar.as_mut(),
                arguments.tool.as_mut(),
            ];
            let binaries = vmms.iter_mut().map(|vmm| &mut vmm.path);
            for path in files.into_iter().flatten().chain(binaries) {
                if let Ok(name) = path.strip_prefix(&work) {
                    *path = Path::new("/").join(name);
                }
            }
            work = "/".into();
        }
        let machine = Machine {
            kernel: arguments.kernel.clone(),
            vcpus: arguments.cpus,
            memory_mib: arguments.memory,
            boot_args: BOOT_ARGS.to_owned(),
        };
        Ok(Self {
            arguments,
            work,
            vmms,
            machine,
            report,
            started: 0,
        })
    }

    fn run(mut self) -> Result<()> {
        let ended = self.measure();
        if !self.arguments.own_root {
            let _ = fs::remove_dir_all(&self.work);
        }
        ended
    }

    fn measure(&mut self) -> Result<()> {
        self.describe()?;
        if self.wants(Group::Block) {
            for name in ["drive-sync", "drive-async", "drive-layers"] {
                fs::write(self.work.join(name), filling()).attempt("cannot fill a drive")?;
            }
        }
        // The first start of each binary pays for the host's own first times: it is not measured.
        let mut server = Command::new(self.work.join("empty-server"));
        server.arg(EMPTY_SERVER);
        self.start(server)?;
        // They stay, idle: what VMMs share, their program's text above all, is not private to the
        // one that is measured, as it is not on a machine with more than one guest.
        let mut companions = Vec::new();
        for binary in self.vmms.clone() {
            companions.push(self.start(Command::new(binary.path))?);
        }
        for run in 0..self.arguments.runs {
            eprintln!("run {} of {}", run.saturating_add(1), self.arguments.runs);
            self.round(run, false)?;
        }
        if !self.arguments.no_count {
            eprintln!("counting system calls");
            let _tracing = Tracing::start()?;
            self.round(self.arguments.runs, true)?;
        }
        drop(companions);
        print!("{}", self.report.finish()?);
        Ok(())
    }

    /// Every VMM once; who is first changes from round to round.
    fn round(&mut self, run: u32, tracing: bool) -> Result<()> {
        if self.wants(Group::Api) {
            let mut server = Command::new(self.work.join("empty-server"));
            server.arg(EMPTY_SERVER);
            let mut vmm = self.start(server)?;
            let samples = measures::answers(
                "api.empty_server",
                &Subject {
                    vmm: &mut vmm,
                    tracing,
                },
            );
            let first = self.vmms.first().map(|vmm| vmm.name.clone());
            self.report
                .add(&first.unwrap_or_default(), run, tracing, &samples)?;
        }
        let mut vmms = self.vmms.clone();
        if run % 2 == 1 {
            vmms.reverse();
        }
        if self.wants(Group::Session) && (tracing || run < self.arguments.runs.div_ceil(3)) {
            self.session(run, tracing)?;
        }
        if self.arguments.only.contains(&Group::Pause) && !tracing {
            self.pause(run)?;
        }
        if self.arguments.only.contains(&Group::Overload) && !tracing {
            self.overload(run)?;
        }
        for binary in &vmms {
            let samples = self
                .one(binary, run, tracing)
                .map_err(|failure| Failure(format!("{}: {failure}", binary.name)))?;
            for samples in samples {
                self.report.add(&binary.name, run, tracing, &samples)?;
            }
        }
        Ok(())
    }

    /// All measures of one VMM, each kind of guest in a process of its own.
    fn one(&mut self, binary: &Binary, run: u32, tracing: bool) -> Result<Vec<Samples>> {
        let mut all = Vec::new();
        if self.wants_one_of(&[Group::Api, Group::Boot, Group::Memory]) {
            self.plain(binary, tracing, &mut all)?;
        }
        if self.wants(Group::Agent) {
            self.agents(binary, tracing, &mut all)?;
        }
        if self.wants(Group::Snapshot) && (tracing || run < self.arguments.runs.div_ceil(3)) {
            self.started = self.started.saturating_add(1);
            let mut machine = self.machine.clone();
            machine.memory_mib = SNAPSHOT_MIB;
            let bench = snapshot::Bench {
                binary,
                ours: self
                    .vmms
                    .first()
                    .is_some_and(|ours| ours.name == binary.name),
                machine: &machine,
                initrd: &self.arguments.initrd,
                work: self.work.join(format!("snapshot-{}", self.started)),
                tracing,
            };
            all.extend(bench.measure(run == 0)?);
        }
        // These have many operations in each run.
        let runs = self.arguments.runs;
        if (tracing || run < runs.div_ceil(3))
            && self.wants_one_of(&[Group::Echo, Group::Bulk, Group::Block])
        {
            self.devices(binary, tracing, &mut all)?;
        }
        Ok(all)
    }

    fn plain(&mut self, binary: &Binary, tracing: bool, all: &mut Vec<Samples>) -> Result<()> {
        let mut vmm = self.start(Command::new(&binary.path))?;
        let mut subject = Subject {
            vmm: &mut vmm,
            tracing,
        };
        if self.wants(Group::Api) {
            all.push(measures::answers("api.answers", &subject));
        }
        if !self.wants_one_of(&[Group::Boot, Group::Memory]) {
            return Ok(());
        }
        subject
            .vmm
            .configure(&self.machine, &self.arguments.initrd, &[])?;
        let booted = measures::boot(&mut subject)?;
        if self.wants(Group::Boot) {
            all.extend(booted);
        }
        if self.wants(Group::Memory) {
            all.extend(measures::memory("booted", &vmm, self.machine.memory_mib)?);
        }
        Ok(())
    }

    fn agents(&mut self, binary: &Binary, tracing: bool, all: &mut Vec<Samples>) -> Result<()> {
        let Some(initrd) = self.arguments.agent_initrd.clone() else {
            return Ok(());
        };
        let mut vmm = self.start(Command::new(&binary.path))?;
        vmm.configure(&self.machine, &initrd, &[])?;
        let mut subject = Subject {
            vmm: &mut vmm,
            tracing,
        };
        all.extend(measures::agent("agent", &mut subject)?);
        let (Some(image), Some(disk)) = (&self.arguments.image, &self.arguments.disk) else {
            return Ok(());
        };
        let drive = |id, path: &Path, read_only| Drive {
            id,
            path: path.to_owned(),
            read_only,
            engine: "Sync",
            layer: None,
        };
        // A fresh disk each time: guests are killed with what they have written.
        let fresh = self.work.join("fresh-disk");
        copy(disk, &fresh)?;
        let drives = [drive("image", image, true), drive("disk", &fresh, false)];
        let mut machine = self.machine.clone();
        machine
            .boot_args
            .push_str(" belljar.image=/dev/vda belljar.disk=/dev/vdb");
        let mut vmm = self.start(Command::new(&binary.path))?;
        vmm.configure(&machine, &initrd, &drives)?;
        let mut subject = Subject {
            vmm: &mut vmm,
            tracing,
        };
        all.extend(measures::agent("agent_image", &mut subject)?);
        Ok(())
    }

    fn devices(&mut self, binary: &Binary, tracing: bool, all: &mut Vec<Samples>) -> Result<()> {
        let mut vmm = self.start(Command::new(&binary.path))?;
        let mut drives = Vec::new();
        if self.wants(Group::Block) {
            let drive = |id, engine, layer| Drive {
                id,
                path: self.work.join(format!("drive-{id}")),
                read_only: false,
                engine,
                layer,
            };
            drives.extend([drive("sync", "Sync", None), drive("async", "Async", None)]);
            if binary.name == OURS {
                drives.push(drive("layers", "Sync", Some(self.work.join("layer"))));
            }
        }
        vmm.configure(&self.machine, &self.arguments.initrd, &drives)?;
        let mut subject = Subject {
            vmm: &mut vmm,
            tracing,
        };
        measures::boot(&mut subject)?;
        if self.wants(Group::Echo) {
            all.extend(measures::echo(&subject, 100)?);
        }
        if self.wants(Group::Bulk) {
            all.extend(measures::bulk(&subject, 8 << 20)?);
        }
        if self.wants(Group::Block) {
            let names: Vec<&str> = drives.iter().map(|drive| drive.id).collect();
            all.extend(measures::block(&subject, &names, 256)?);
        }
        if self.wants(Group::Memory) {
            all.extend(measures::memory("worked", &vmm, self.machine.memory_mib)?);
        }
        Ok(())
    }

    /// A sandbox of the first VMM, which must be this project's.
    fn session(&mut self, run: u32, tracing: bool) -> Result<()> {
        let Some((name, programs)) = self.programs(&format!("session-{run}"))? else {
            return Ok(());
        };
        let samples = session::measure(&programs, 40)?;
        let _ = fs::remove_dir_all(programs.work);
        for samples in samples {
            self.report.add(&name, run, tracing, &samples)?;
        }
        Ok(())
    }

    /// One more of them, which is overloaded.
    fn pause(&mut self, run: u32) -> Result<()> {
        let programs = self.programs(&format!("pause-{run}"))?;
        let (Some((name, programs)), true) = (programs, self.arguments.keeper.is_some()) else {
            return Err(Failure(
                "the group 'pause' takes --belljar, --keeper and an image (make image)".to_owned(),
            ));
        };
        for samples in pause::measure(&programs)? {
            self.report.add(&name, run, false, &samples)?;
        }
        let _ = fs::remove_dir_all(programs.work);
        Ok(())
    }

    fn overload(&mut self, run: u32) -> Result<()> {
        let Some((name, programs)) = self.programs(&format!("overload-{run}"))? else {
            return Ok(());
        };
        let samples = overload::measure(&programs, self.arguments.terminals)?;
        let _ = fs::remove_dir_all(programs.work);
        for samples in samples {
            self.report.add(&name, run, false, &samples)?;
        }
        Ok(())
    }

    /// What a sandbox is made of, in a directory of its own, and the name of its VMM.
    fn programs(&self, folder: &str) -> Result<Option<(String, session::Programs)>> {
        let (Some(belljar), Some(tool)) = (&self.arguments.belljar, &self.arguments.tool) else {
            return Ok(None);
        };
        let work = self.work.join(folder);
        let assets = work.join("assets");
        fs::create_dir_all(&assets).attempt("cannot make a directory for assets")?;
        let parts = [
            (Some(&self.arguments.kernel), "vmlinux"),
            (self.arguments.agent_initrd.as_ref(), "initramfs"),
            (self.arguments.image.as_ref(), "image"),
            (self.arguments.disk.as_ref(), "disk-1G"),
        ];
        for (part, name) in parts {
            if let Some(part) = part {
                std::os::unix::fs::symlink(part, assets.join(name))
                    .attempt(format!("cannot link {name}"))?;
            }
        }
        let Some(vmm) = self.vmms.first().cloned() else {
            return Ok(None);
        };
        let programs = session::Programs {
            belljar: belljar.clone(),
            vmm: vmm.path,
            assets,
            tool: tool.clone(),
            work,
        };
        Ok(Some((vmm.name, programs)))
    }

    fn start(&mut self, command: Command) -> Result<Vmm> {
        self.started = self.started.saturating_add(1);
        Vmm::start(command, self.work.join(format!("run-{}", self.started)))
    }

    fn wants(&self, group: Group) -> bool {
        self.arguments.only.is_empty() || self.arguments.only.contains(&group)
    }

    fn wants_one_of(&self, groups: &[Group]) -> bool {
        groups.iter().any(|group| self.wants(*group))
    }

    /// The circumstances, in the output and as the first JSON line.
    fn describe(&mut self) -> Result<()> {
        let read = |path: &str| {
            fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let processor = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .map_or_else(String::new, |rest| {
                rest.trim_matches([' ', '\t', ':']).to_owned()
            });
        let kernel = read("/proc/sys/kernel/osrelease");
        let huge = read("/sys/kernel/mm/transparent_hugepage/enabled");
        let vmms: Vec<_> = self
            .vmms
            .iter()
            .map(|vmm| {
                let bytes = fs::metadata(&vmm.path).map_or(0, |file| file.len());
                json!({"name": vmm.name, "bytes": bytes})
            })
            .collect();
        let instrument = std::env::var("BELLJAR_BENCH_INSTRUMENT").unwrap_or_default();
        println!(
            "commit {}; host {processor}, Linux {kernel}, huge pages {huge}; clock: {instrument}\n\
             guest: {} vCPU, {} MiB, inputs on tmpfs, page cache warm; {BOOT_ARGS}",
            self.arguments.commit, self.machine.vcpus, self.machine.memory_mib
        );
        self.report.line(
            "run",
            json!({
                "commit": self.arguments.commit, "instrument": instrument, "host_cpu": processor,
                "host_kernel": kernel, "transparent_hugepage": huge, "cache": "inputs on tmpfs, warm",
                "vmms": vmms, "runs": self.arguments.runs, "vcpus": self.machine.vcpus,
                "memory_mib": self.machine.memory_mib, "boot_args": BOOT_ARGS,
            }),
        )
    }
}

/// Makes a directory the root of this process: with the kernel's own file systems, and the one file that a
/// static program may want (the C library reads the time zone for local time).
fn enter(root: &Path) -> std::io::Result<()> {
    for name in ["proc", "sys", "dev"] {
        fs::create_dir(root.join(name))?;
        rustix::mount::mount_bind_recursive(Path::new("/").join(name), root.join(name))?;
    }
    fs::create_dir(root.join("etc"))?;
    let _ = fs::copy("/etc/localtime", root.join("etc/localtime"));
    rustix::process::chroot(root)?;
    std::env::set_current_dir("/")
}

/// Copies a file with its mode; its holes stay holes.
fn copy(from: &Path, to: &Path) -> Result<()> {
    copy_data(from, to).attempt(format!("cannot copy {}", from.display()))
}

fn copy_data(from: &Path, to: &Path) -> std::io::Result<()> {
    use rustix::fs::{SeekFrom, seek};
    let mut source = fs::File::open(from)?;
    let mut target = fs::File::create(to)?;
    let metadata = source.metadata()?;
    target.set_len(metadata.len())?;
    target.set_permissions(metadata.permissions())?;
    let mut end = 0;
    // Fails at the end of the last data.
    while let Ok(begin) = seek(&source, SeekFrom::Data(end)) {
        end = seek(&source, SeekFrom::Hole(begin))?;
        seek(&source, SeekFrom::Start(begin))?;
        seek(&target, SeekFrom::Start(begin))?;
        let data = (&mut source).take(end.saturating_sub(begin));
        std::io::copy(&mut { data }, &mut target)?;
    }
    Ok(())
}

/// Bytes without structure, so that nothing can be saved on them.
fn filling() -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(DRIVE_MIB << 20);
    while bytes.len() < DRIVE_MIB << 20 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}
