//! What the stories share: a home of its own for each user, and ways to look at what is left behind.
//!
//! The binaries are found in `BELLJAR_BIN_DIR` (default: where cargo puts the release build), the guest's
//! parts in `BELLJAR_ASSETS` (default: the cache).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

pub mod endurance;
pub mod files;
pub mod guest;
pub mod pty;
mod sandbox;
pub mod trial;
pub mod vmm;

pub use sandbox::Sandbox;

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// No step of a story takes longer, even with processors in software.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Where the built binaries are.
#[must_use]
pub fn bin_dir() -> PathBuf {
    let default = || {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        workspace.join("target/x86_64-unknown-linux-gnu/release")
    };
    std::env::var_os("BELLJAR_BIN_DIR").map_or_else(default, PathBuf::from)
}

/// Where the guest's parts are.
#[must_use]
pub fn assets_dir() -> PathBuf {
    let default = || {
        let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(
            || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"),
            PathBuf::from,
        );
        cache.join("belljar/assets")
    };
    std::env::var_os("BELLJAR_ASSETS").map_or_else(default, PathBuf::from)
}

/// A user with a state directory of their own. When it is dropped, nothing may be left in it.
#[derive(Debug)]
pub struct User {
    home: tempfile::TempDir,
}

/// What came out of a command.
#[derive(Debug)]
pub struct Said {
    pub status: ExitStatus,
    pub out: Vec<u8>,
    pub err: String,
}

impl Said {
    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    /// The exit status as a number.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Checks that all texts stand in what was said on standard error.
    #[track_caller]
    pub fn explains(&self, texts: &[&str]) {
        for text in texts {
            assert!(self.err.contains(text), "'{text}' is not in:\n{}", self.err);
        }
    }

    /// Checks exit status and standard output.
    #[track_caller]
    pub fn is(&self, code: i32, out: &str) {
        assert_eq!(
            (self.code(), self.text().as_str()),
            (code, out),
            "it said:\n{}",
            self.err
        );
    }
}

impl Default for User {
    fn default() -> Self {
        Self::new()
    }
}

impl User {
    /// # Panics
    /// No temporary directory can be made.
    #[must_use]
    pub fn new() -> Self {
        Self {
            home: tempfile::tempdir().unwrap(),
        }
    }

    /// The user's own directory.
    #[must_use]
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    fn state(&self) -> PathBuf {
        self.home().join("state")
    }

    /// `belljar` with the user's environment; standard input is a pipe that stays open.
    #[must_use]
    pub fn belljar<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(bin_dir().join("belljar"));
        command
            .args(arguments)
            .current_dir(self.home())
            .env("BELLJAR_STATE", self.state())
            .env("BELLJAR_ASSETS", assets_dir())
            .env_remove("BELLJAR_VMM")
            // A machine that does other things as well is no failure.
            .env("BELLJAR_BOOT_TIMEOUT", "150s")
            // A keeper that nobody needs leaves soon.
            .env("BELLJAR_KEEPER_IDLE_MS", "1000")
            // Nor are VMMs made that nobody asked for, unless a story is about them.
            .env("BELLJAR_READY_VMMS", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs `belljar` to its end; its standard input never ends.
    #[must_use]
    pub fn says<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Said {
        Running::start(&mut self.belljar(arguments)).wait()
    }

    /// `belljar run ARGUMENTS`.
    #[must_use]
    pub fn run(&self, arguments: &[&str]) -> Said {
        let mut all = vec!["run"];
        all.extend(arguments);
        self.says(&all)
    }

    /// `belljar run -- sh -c SCRIPT`.
    #[must_use]
    pub fn sh(&self, script: &str) -> Said {
        self.run(&["--", "sh", "-c", script])
    }

    /// Starts `belljar run ARGUMENTS` and waits until the command in the guest has printed a line.
    ///
    /// # Panics
    /// It printed nothing.
    #[must_use]
    pub fn start(&self, arguments: &[&str]) -> Running {
        let mut all = vec!["run"];
        all.extend(arguments);
        let running = Running::start(&mut self.belljar(&all));
        eventually("the command's first line", || {
            running.out_so_far().contains(&b'\n')
        });
        running
    }

    /// Processes that work in or with this user's state: supervisors and VMMs.
    #[must_use]
    pub fn processes(&self, name: &str) -> Vec<i32> {
        let state = self.state();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<i32>().ok())
            else {
                continue;
            };
            let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
            let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).into_owned();
            let ours = cwd.starts_with(&state) || words.contains(&*state.to_string_lossy());
            let first = words.split('\0').next().unwrap_or("");
            if ours && first.ends_with(name) {
                found.push(pid);
            }
        }
        found
    }

    /// VMMs that wait for the next restore.
    #[must_use]
    pub fn ready_vmms(&self) -> Vec<i32> {
        let place = self.state().join("keeper/ready");
        let waits = |pid: &i32| {
            fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&place))
        };
        let mut all = self.processes("belljar-vmm");
        all.retain(waits);
        all
    }

    /// Directories of sandboxes.
    #[must_use]
    pub fn sandboxes(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.state().join("sandboxes")) else {
            return Vec::new();
        };
        entries.flatten().map(|entry| entry.path()).collect()
    }

    /// How guests of this user ended, what their VMMs said, and what the host's kernel says: for a story that failed.
    fn tell_of_ends(&self) {
        let ends = ["ended.json", "vmm.log"].map(OsStr::new);
        let files = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
        let of_sandboxes = self.sandboxes().into_iter().flat_map(files);
        let of_sandboxes = of_sandboxes.filter(|file| ends.contains(&&*file.file_name()));
        for file in of_sandboxes.chain(files(self.state().join("gone"))) {
            let path = file.path();
            let said = fs::read(&path).unwrap_or_default();
            let said = said
                .get(said.len().saturating_sub(4096)..)
                .unwrap_or_default();
            eprintln!("{}:\n{}", path.display(), String::from_utf8_lossy(said));
        }
        if std::env::var_os("BELLJAR_HOST").is_some()
            && let Ok(log) = Command::new("dmesg").output()
        {
            let log = String::from_utf8_lossy(&log.stdout).into_owned();
            let lines: Vec<_> = log.lines().collect();
            let last = lines
                .get(lines.len().saturating_sub(30)..)
                .unwrap_or_default();
            eprintln!("the host's kernel:\n{}", last.join("\n"));
        }
    }

    /// Checks that no process and no state of this user is left, soon.
    pub fn has_nothing_left(&self) {
        eventually("no process and no state to be left", || {
            self.processes("").is_empty() && self.sandboxes().is_empty()
        });
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if thread::panicking() {
            self.tell_of_ends();
        } else {
            self.has_nothing_left();
        }
    }
}

/// A command under way, its output being collected.
#[derive(Debug)]
pub struct Running {
    /// What it is called with, and since when it runs, if the commands' times are asked for.
    timed: Option<(String, Instant)>,
    pub child: Child,
    out: Collector,
    err: Collector,
}

impl Running {
    /// # Panics
    /// It cannot be started.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().expect("belljar can be started");
        let out = Collector::start(child.stdout.take());
        let err = Collector::start(child.stderr.take());
        let timed = std::env::var_os("BELLJAR_E2E_TIMES").map(|_| {
            let words: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
            (words.join(" ").chars().take(100).collect(), Instant::now())
        });
        Self {
            timed,
            child,
            out,
            err,
        }
    }

    /// What it has printed by now.
    #[must_use]
    pub fn out_so_far(&self) -> Vec<u8> {
        self.out.so_far()
    }

    /// Sends a signal to the command line.
    ///
    /// # Panics
    /// It has ended and was waited for.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the end, with a limit.
    ///
    /// # Panics
    /// It does not end.
    #[must_use]
    pub fn wait(mut self) -> Said {
        let deadline = Instant::now() + PATIENCE;
        // Kept open: a command must not wait for the end of an input it does not use.
        let stdin = self.child.stdin.take();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                panic!(
                    "it does not end; so far it said:\n{}\n{}",
                    String::from_utf8_lossy(&self.out.so_far()),
                    String::from_utf8_lossy(&self.err.so_far())
                );
            }
            thread::sleep(Duration::from_millis(5));
        };
        drop(stdin);
        if let Some((what, begin)) = &self.timed {
            eprintln!("{:8.3} s: {what}", begin.elapsed().as_secs_f64());
        }
        assert!(
            status.signal().is_none() || status.signal() == Some(9),
            "belljar was ended by a signal: {status}"
        );
        Said {
            status,
            out: self.out.finish(),
            err: String::from_utf8_lossy(&self.err.finish()).into_owned(),
        }
    }
}

type Bytes = std::sync::Arc<std::sync::Mutex<Vec<u8>>>;

#[derive(Debug)]
struct Collector {
    bytes: Bytes,
    thread: thread::JoinHandle<()>,
}

impl Collector {
    fn start(source: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Bytes::default();
        let shared = Bytes::clone(&bytes);
        let thread = thread::spawn(move || {
            let Some(mut source) = source else { return };
            let mut buffer = vec![0u8; 64 * 1024];
            while let Ok(count) = source.read(&mut buffer) {
                if count == 0 {
                    break;
                }
                let read = buffer.get(..count).unwrap_or_default();
                shared.lock().unwrap().extend_from_slice(read);
            }
        });
        Self { bytes, thread }
    }

    fn so_far(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn finish(self) -> Vec<u8> {
        self.thread.join().unwrap();
        std::mem::take(&mut *self.bytes.lock().unwrap())
    }
}

/// Waits until something is so.
///
/// # Panics
/// It never is.
#[track_caller]
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Kills a process at once.
///
/// # Panics
/// There is no such process.
pub fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}
