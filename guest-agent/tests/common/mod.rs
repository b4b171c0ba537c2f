//! An agent on a Unix socket, and calls to it.

// Each test program uses a part of this.
#![allow(dead_code, unreachable_pub)]

pub mod stream;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use belljar_protocol::client::{self, CallError, Exec};
use belljar_protocol::v1;
use belljar_protocol::v1::end::How;

/// Far more than anything here takes; a test that hits it has found a hang.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn soon() -> Option<Instant> {
    Some(Instant::now() + PATIENCE)
}

pub struct Agent {
    process: Child,
    path: PathBuf,
    cgroup: Option<PathBuf>,
    _folder: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Self {
        Self::start_in(None)
    }

    /// With a cgroup of its own for its programs, where this machine lets us; `None` elsewhere.
    pub fn start_with_cgroups() -> Option<Self> {
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .find(|root| Path::new(root).join("cgroup.controllers").exists())?;
        let name = format!("belljar-test-{}-{:?}", std::process::id(), Instant::now());
        let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
        let cgroup = Path::new(root).join(name);
        fs::create_dir(&cgroup).ok()?;
        Some(Self::start_in(Some(cgroup)))
    }

    /// With the calls that need no other process.
    pub fn start_worker() -> Self {
        Self::start()
    }

    fn start_in(cgroup: Option<PathBuf>) -> Self {
        Self::start_as("--serve-unix", cgroup)
    }

    fn start_as(mode: &str, cgroup: Option<PathBuf>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let mut command = Command::new(env!("CARGO_BIN_EXE_belljar-agent"));
        command.arg(mode).arg(&path).stdin(Stdio::null());
        if let Some(cgroup) = &cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        let process = command.spawn().unwrap();
        let agent = Self {
            process,
            path,
            cgroup,
            _folder: folder,
        };
        wait_until("the agent listens", || {
            UnixStream::connect(&agent.path).is_ok()
        });
        agent
    }

    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_deref()
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    pub fn exec(&self, exec: v1::Exec) -> Result<Exec<UnixStream>, CallError> {
        Exec::start(self.connect(), exec, soon())
    }

    /// Runs to the end: stdout, stderr, end.
    pub fn run(&self, exec: v1::Exec) -> (Vec<u8>, Vec<u8>, How) {
        self.exec(exec).unwrap().finish(1 << 30, soon()).unwrap()
    }

    pub fn is_alive(&self) -> bool {
        client::ping(self.connect(), soon()).is_ok()
    }

    /// Process id of the worker that runs now.
    pub fn worker_pid(&self) -> Option<u32> {
        self.all_children().into_iter().find_map(|pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            command.ends_with(b"--worker\0").then(|| pid.parse().ok())?
        })
    }

    fn pids(&self) -> Vec<u32> {
        self.worker_pid().into_iter().chain([self.pid()]).collect()
    }

    /// Of both processes.
    pub fn open_descriptors(&self) -> usize {
        let open = |pid| {
            let open = fs::read_dir(format!("/proc/{pid}/fd"));
            open.map_or(0, |open| open.count())
        };
        self.pids().into_iter().map(open).sum()
    }

    /// Open descriptors once those of ended calls are closed.
    pub fn settled_descriptors(&self) -> usize {
        let mut before = self.open_descriptors();
        wait_until("the descriptors settle", || {
            std::thread::sleep(Duration::from_millis(50));
            let now = self.open_descriptors();
            std::mem::replace(&mut before, now) == now
        });
        before
    }

    /// Children of the holder but for the worker.
    pub fn children(&self) -> Vec<String> {
        let worker = self.worker_pid().map(|pid| pid.to_string());
        let mut children = self.all_children();
        children.retain(|pid| Some(pid) != worker.as_ref());
        children
    }

    fn all_children(&self) -> Vec<String> {
        let pid = self.pid();
        let path = format!("/proc/{pid}/task/{pid}/children");
        let text = fs::read_to_string(path).unwrap();
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// Of both processes.
    pub fn resident_kib(&self) -> u64 {
        self.resident_kib_of_each().into_iter().sum()
    }

    /// Of worker and holder.
    pub fn resident_kib_of_each(&self) -> Vec<u64> {
        let resident = |pid| -> Option<u64> {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        self.pids().into_iter().filter_map(resident).collect()
    }

    /// Waits for the agent to end by itself.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.process.wait().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // A holder that is stopped starts no further worker.
        let _ = Command::new("kill")
            .args(["-STOP", &self.pid().to_string()])
            .stderr(Stdio::null())
            .status();
        let children = self.pid();
        let children = format!("/proc/{children}/task/{children}/children");
        let children = fs::read_to_string(children).unwrap_or_default();
        for pid in children.split_whitespace() {
            let _ = Command::new("kill").args(["-KILL", pid]).status();
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(cgroup) = &self.cgroup {
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            remove_cgroup(cgroup);
        }
    }
}

fn remove_cgroup(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    for _ in 0..100 {
        if fs::remove_dir(cgroup).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn argv(words: &[&str]) -> v1::Exec {
    v1::Exec {
        argv: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
        ..Default::default()
    }
}

pub fn sh(script: &str) -> v1::Exec {
    argv(&["sh", "-c", script])
}

pub fn exited(code: u32) -> How {
    How::Exited(v1::Exited { code })
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process exists and is no zombie.
pub fn is_running(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").starts_with(" Z"))
}

/// SIGKILL.
pub fn kill(pid: u32) {
    let _ = Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status();
}
