//! A sandbox as its user knows it: what a command, a key, a copied file and a listing cost. Everything goes
//! through the built `belljar`, or straight to the agent on the sandbox's vsock.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use belljar_protocol::client::{Connection, Exec, ExecEvent};
use belljar_protocol::v1::{self, end::How, reply::Result as Answer, request::Call};
use belljar_protocol::{AGENT_PORT, hybrid};

use crate::failure::{Attempt, Failure, Result};
use crate::report::Samples;

/// Nothing here takes longer, by the clock of the instrument.
const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const NAME: &str = "bench";
/// Where the guest keeps this benchmark's program.
pub(crate) const TOOL: &str = "/root/tool";
const COPIED_MIB: usize = 64;
const ENTRIES: usize = 10_000;
/// Operations before the measured ones.
const WARM_UP: usize = 10;

/// What is run, and where.
#[derive(Debug)]
pub(crate) struct Programs {
    pub(crate) belljar: PathBuf,
    pub(crate) vmm: PathBuf,
    /// Kernel, initramfs, image and disks under their usual names.
    pub(crate) assets: PathBuf,
    /// PID 1 of the other groups' guests: here the program that is started again and again.
    pub(crate) tool: PathBuf,
    /// A directory on a tmpfs.
    pub(crate) work: PathBuf,
}

/// A sandbox of its own, removed when dropped.
pub(crate) struct Sandbox<'a> {
    programs: &'a Programs,
    socket: PathBuf,
}

/// All measures, with `count` operations each of the short ones.
pub(crate) fn measure(programs: &Programs, count: usize) -> Result<Vec<Samples>> {
    let sandbox = Sandbox::start(programs, "512M")?;
    let mut all = vec![sandbox.memory()?];
    let tool = programs.tool.to_string_lossy();
    sandbox.says(&["cp", &tool, &format!("{NAME}:{TOOL}")])?;
    all.push(sandbox.guests_own(count)?);
    all.push(sandbox.exec(count)?);
    all.push(sandbox.command_line(count)?);
    all.push(sandbox.key(count)?);
    all.extend(crate::waits::measure(&sandbox, count)?);
    all.extend(sandbox.copies()?);
    all.extend(sandbox.listings()?);
    Ok(all)
}

pub(crate) fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub(crate) fn soon() -> Option<Instant> {
    Instant::now().checked_add(PATIENCE)
}

pub(crate) fn argv(words: &[&str]) -> v1::Exec {
    v1::Exec {
        argv: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
        ..v1::Exec::default()
    }
}

fn expect_success(how: &How) -> Result<()> {
    match how {
        How::Exited(v1::Exited { code: 0 }) => Ok(()),
        other => Err(Failure(format!(
            "a program in the guest ended as {other:?}"
        ))),
    }
}

/// `count` values of an operation, after a warm-up.
fn repeat(
    measure: &str,
    unit: &'static str,
    count: usize,
    scale: fn(Duration) -> f64,
    mut operation: impl FnMut() -> Result<()>,
) -> Result<Samples> {
    for _ in 0..WARM_UP.min(count) {
        operation()?;
    }
    let mut values = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        operation()?;
        values.push(scale(start.elapsed()));
    }
    Ok(Samples {
        measure: measure.to_owned(),
        unit,
        values,
        counts: None,
    })
}

impl<'a> Sandbox<'a> {
    pub(crate) fn start(programs: &'a Programs, memory: &str) -> Result<Self> {
        let mut sandbox = Self {
            programs,
            socket: PathBuf::new(),
        };
        sandbox.says(&[
            "run", "-d", "--name", NAME, "--memory", memory, "--disk", "1G",
        ])?;
        let sandboxes = programs.work.join("state/sandboxes");
        let entries = fs::read_dir(&sandboxes).attempt("no sandboxes")?;
        sandbox.socket = entries
            .flatten()
            .map(|entry| entry.path().join("v.sock"))
            .find(|path| path.exists())
            .ok_or_else(|| Failure("the sandbox has no v.sock".to_owned()))?;
        Ok(sandbox)
    }

    fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(&self.programs.belljar);
        command
            .args(arguments)
            .env("BELLJAR_STATE", self.programs.work.join("state"))
            .env("BELLJAR_ASSETS", &self.programs.assets)
            .env("BELLJAR_VMM", &self.programs.vmm)
            .env("BELLJAR_BOOT_TIMEOUT", "120s")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn says<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<()> {
        self.run(self.command(arguments), arguments).map(drop)
    }

    /// What it prints.
    pub(crate) fn answers<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<String> {
        let mut command = self.command(arguments);
        command.stdout(Stdio::piped());
        self.run(command, arguments)
    }

    fn run<S: AsRef<OsStr>>(&self, mut command: Command, arguments: &[S]) -> Result<String> {
        let mut child = command.spawn().attempt("cannot start belljar")?;
        let (mut answer, mut said) = (String::new(), String::new());
        if let Some(mut output) = child.stdout.take() {
            // Less than a pipe holds, so it need not be read beside the other one.
            let _ = output.read_to_string(&mut answer);
        }
        if let Some(mut errors) = child.stderr.take() {
            // What it says matters only if it fails.
            let _ = errors.read_to_string(&mut said);
        }
        let status = child.wait().attempt("belljar")?;
        if status.success() {
            return Ok(answer);
        }
        let words: Vec<_> = arguments
            .iter()
            .map(|word| word.as_ref().to_string_lossy().into_owned())
            .collect();
        Err(Failure(format!(
            "belljar {}: {status}: {said}",
            words.join(" ")
        )))
    }

    pub(crate) fn connect(&self) -> Result<UnixStream> {
        hybrid::connect(&self.socket, AGENT_PORT, Instant::now() + PATIENCE)
            .attempt("cannot connect to the agent")
    }

    pub(crate) fn start_program(&self, exec: v1::Exec) -> Result<Exec<UnixStream>> {
        Exec::start(self.connect()?, exec, soon()).attempt("exec")
    }

    /// Resident memory of the agent's processes when nothing happens.
    fn memory(&self) -> Result<Samples> {
        std::thread::sleep(Duration::from_millis(200));
        let call = Call::Metrics(v1::GetMetrics::default());
        match Connection::new(self.connect()?).call(call, "metrics", soon()) {
            Ok((_, Answer::Metrics(metrics))) => Ok(Samples::one(
                "session.agent_rss",
                "KiB",
                metrics.agent_memory as f64 / 1024.0,
            )),
            other => Err(Failure(format!("metrics: {other:?}"))),
        }
    }

    /// fork, exec and wait of the same program, timed by a program in the guest.
    fn guests_own(&self, count: usize) -> Result<Samples> {
        let exec = argv(&[TOOL, "--spawn", &count.to_string()]);
        let (out, errors, how) = self
            .start_program(exec)?
            .finish(1 << 20, soon())
            .attempt("the guest's own spawns")?;
        expect_success(&how).map_err(|failure| {
            Failure(format!("{failure}: {}", String::from_utf8_lossy(&errors)))
        })?;
        let values = String::from_utf8_lossy(&out)
            .lines()
            .filter_map(|line| line.parse::<f64>().ok())
            .map(|ns| ns / 1e3)
            .collect();
        Ok(Samples {
            measure: "session.guest_spawn".to_owned(),
            unit: "us",
            values,
            counts: None,
        })
    }

    /// Connect → the exit status of that program.
    fn exec(&self, count: usize) -> Result<Samples> {
        repeat("session.exec_true", "us", count, us, || {
            let (_, _, how) = self
                .start_program(argv(&[TOOL, "--true"]))?
                .finish(0, soon())
                .attempt("exec")?;
            expect_success(&how)
        })
    }

    /// The same as a whole process of the host: `belljar exec`.
    fn command_line(&self, count: usize) -> Result<Samples> {
        repeat("session.cli_exec", "ms", count, ms, || {
            self.says(&["exec", NAME, "--", TOOL, "--true"])
        })
    }

    /// A key typed into a terminal → its echo.
    fn key(&self, count: usize) -> Result<Samples> {
        let mut exec = argv(&["cat"]);
        exec.terminal = Some(v1::Terminal::default());
        exec.stdin = v1::exec::Stdin::Stream.into();
        let mut terminal = self.start_program(exec)?;
        let mut keys = terminal.stdin().attempt("the terminal's input")?;
        repeat("session.terminal_echo", "us", count, us, || {
            keys.write(b"k").attempt("typing")?;
            loop {
                match terminal.next(soon()).attempt("the echo")? {
                    Some(ExecEvent::Stdout(bytes)) if bytes.contains(&b'k') => return Ok(()),
                    Some(ExecEvent::Ended(how)) => {
                        return Err(Failure(format!("the terminal ended: {how:?}")));
                    }
                    None => return Err(Failure("the terminal is gone".to_owned())),
                    Some(_) => {}
                }
            }
        })
    }

    /// `belljar cp` as a whole process, both ways, to a new file and over an old one; the bytes are compared.
    fn copies(&self) -> Result<Vec<Samples>> {
        let rate = |time: Duration| COPIED_MIB as f64 / time.as_secs_f64();
        let (here, back) = (
            self.programs.work.join("sent"),
            self.programs.work.join("back"),
        );
        fs::write(
            &here,
            crate::filling().get(..COPIED_MIB << 20).unwrap_or_default(),
        )
        .attempt("cannot write a file to copy")?;
        let (from, to) = (here.to_string_lossy(), back.to_string_lossy());
        let inside = format!("{NAME}:/root/copied");
        let [mut into_new, mut out_to_new] =
            ["session.cp_to_guest.new", "session.cp_from_guest.new"].map(|measure| Samples {
                measure: measure.to_owned(),
                unit: "MiB/s",
                values: Vec::new(),
                counts: None,
            });
        for number in 0..3 {
            let inside = format!("{NAME}:/root/copied-{number}");
            let start = Instant::now();
            self.says(&["cp", &from, &inside])?;
            into_new.values.push(rate(start.elapsed()));
            let _ = fs::remove_file(&back);
            let start = Instant::now();
            self.says(&["cp", &inside, &to])?;
            out_to_new.values.push(rate(start.elapsed()));
            self.says(&["exec", NAME, "--", "rm", &format!("/root/copied-{number}")])?;
        }
        let into_guest = repeat("session.cp_to_guest", "MiB/s", 3, rate, || {
            self.says(&["cp", &from, &inside])
        })?;
        let out_of_guest = repeat("session.cp_from_guest", "MiB/s", 3, rate, || {
            self.says(&["cp", &inside, &to])
        })?;
        if !same(&here, &back)? {
            return Err(Failure("the copy differs from its source".to_owned()));
        }
        Ok(vec![into_new, out_to_new, into_guest, out_of_guest])
    }

    /// A directory with [`ENTRIES`] files, names alone and with everything about each.
    fn listings(&self) -> Result<Vec<Samples>> {
        let script = format!("mkdir -p /root/many && cd /root/many && seq {ENTRIES} | xargs touch");
        let (_, errors, how) = self
            .start_program(argv(&["sh", "-c", &script]))?
            .finish(1 << 16, soon())
            .attempt("many files")?;
        expect_success(&how).map_err(|failure| {
            Failure(format!("{failure}: {}", String::from_utf8_lossy(&errors)))
        })?;
        [
            ("session.list_10000", false),
            ("session.list_10000_details", true),
        ]
        .into_iter()
        .map(|(name, details)| repeat(name, "ms", 5, ms, || self.list(details)))
        .collect()
    }

    fn list(&self, details: bool) -> Result<()> {
        let mut connection = Connection::new(self.connect()?);
        let call = Call::ListDirectory(v1::ListDirectory {
            path: b"/root/many".to_vec(),
            details,
            ..v1::ListDirectory::default()
        });
        connection
            .call(call, "listing", soon())
            .attempt("listing")?;
        let mut found = 0;
        loop {
            let page: v1::DirectoryPage = connection
                .receive("listing", soon())
                .attempt("listing")?
                .ok_or_else(|| Failure("the listing was cut".to_owned()))?;
            found += page.entries.len();
            if page.last && found == ENTRIES {
                return Ok(());
            }
            if page.last {
                return Err(Failure(format!("{found} of {ENTRIES} entries were listed")));
            }
        }
    }
}

impl Drop for Sandbox<'_> {
    fn drop(&mut self) {
        let _ = self.says(&["rm", "-f", NAME]);
    }
}

fn same(one: &Path, other: &Path) -> Result<bool> {
    let read = |path: &Path| fs::read(path).attempt(format!("cannot read {}", path.display()));
    Ok(read(one)? == read(other)?)
}
