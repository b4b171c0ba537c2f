//! `belljar` against an agent without a guest: the agent serves on a Unix socket of this machine, and a
//! thread stands in for the VMM in front of it.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

/// Far more than anything here takes; a test that hits it has found a hang.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub const ID: &str = "abcd1234";

/// The agent of this build.
fn agent_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("BELLJAR_TEST_AGENT") {
            return path.into();
        }
        let built = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "-p", "belljar-agent"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        assert!(built.unwrap().success(), "the agent cannot be built");
        Path::new(env!("CARGO_BIN_EXE_belljar")).with_file_name("belljar-agent")
    })
}

/// A state directory with one sandbox.
pub struct Sandbox {
    agent: Child,
    state: tempfile::TempDir,
    /// Connections end after so many bytes from the guest; 0: never.
    pub cut_after: Arc<AtomicU64>,
    pub connections: Arc<AtomicU64>,
}

impl Sandbox {
    pub fn start() -> Self {
        let state = tempfile::tempdir().unwrap();
        let dir = state.path().join("sandboxes").join(ID);
        fs::create_dir_all(&dir).unwrap();
        let path = state.path().join("agent");
        let agent = Command::new(agent_binary())
            .arg("--serve-unix")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the agent listens", || UnixStream::connect(&path).is_ok());
        let sandbox = Self {
            agent,
            state,
            cut_after: Arc::default(),
            connections: Arc::default(),
        };
        let listener = UnixListener::bind(dir.join("v.sock")).unwrap();
        let cut_after = Arc::clone(&sandbox.cut_after);
        let connections = Arc::clone(&sandbox.connections);
        thread::spawn(move || {
            for host in listener.incoming() {
                connections.fetch_add(1, Ordering::Relaxed);
                let (path, cut) = (path.clone(), cut_after.load(Ordering::Relaxed));
                thread::spawn(move || forward(host.unwrap(), &path, cut));
            }
        });
        sandbox
    }

    /// `belljar ARGUMENTS`.
    pub fn belljar(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_belljar"));
        command
            .args(arguments)
            .env("BELLJAR_STATE", self.state.path())
            .env("TERM", "xterm-256color")
            .stdin(Stdio::null());
        command
    }

    /// `belljar ARGUMENTS`, to its end.
    pub fn says(&self, arguments: &[&str]) -> Output {
        let mut command = self.belljar(arguments);
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        finish(child.unwrap())
    }

    /// `belljar ARGUMENTS` must end so and print that.
    #[track_caller]
    pub fn expect(&self, arguments: &[&str], status: i32, stdout: &str) {
        let output = self.says(arguments);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            (output.status.code(), text(&output.stdout).as_str()),
            (Some(status), stdout),
            "{arguments:?}: {err}"
        );
    }

    /// Process id of the worker that runs now.
    pub fn worker(&self) -> Option<i32> {
        let pid = self.agent.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        children.split_whitespace().find_map(|child| {
            let command = fs::read(format!("/proc/{child}/cmdline")).ok()?;
            command
                .ends_with(b"--worker\0")
                .then(|| child.parse().ok())?
        })
    }

    /// Kills the worker; waits for another.
    pub fn replace_worker(&self) {
        let Some(worker) = self.worker() else { return };
        kill_process(Pid::from_raw(worker).unwrap(), Signal::KILL).unwrap();
        eventually("another worker", || {
            self.worker().is_some_and(|now| now != worker)
        });
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

/// Waits for a command to end, with a limit.
#[track_caller]
pub fn finish(child: Child) -> Output {
    let pid = Pid::from_child(&child);
    let waiting = thread::spawn(move || child.wait_with_output().unwrap());
    let deadline = Instant::now() + PATIENCE;
    while !waiting.is_finished() {
        if Instant::now() > deadline {
            let _ = kill_process(pid, Signal::KILL);
            let output = waiting.join().unwrap();
            panic!("it does not end: {output:?}");
        }
        thread::sleep(Duration::from_millis(1));
    }
    waiting.join().unwrap()
}

/// As a VMM: takes the line with the port, then passes bytes on.
fn forward(mut host: UnixStream, agent: &Path, cut: u64) {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") {
        if host.read_exact(&mut byte).is_err() {
            return;
        }
        line.extend_from_slice(&byte);
    }
    assert_eq!(line, b"CONNECT 1024\n");
    let Ok(mut guest) = UnixStream::connect(agent) else {
        return;
    };
    host.write_all(b"OK 1073741824\n").unwrap();
    let (mut from_host, mut to_guest) = (host.try_clone().unwrap(), guest.try_clone().unwrap());
    thread::spawn(move || {
        let _ = std::io::copy(&mut from_host, &mut to_guest);
        let _ = to_guest.shutdown(std::net::Shutdown::Both);
    });
    if cut > 0 {
        let _ = std::io::copy(&mut (&mut guest).take(cut), &mut host);
    } else {
        let _ = std::io::copy(&mut guest, &mut host);
    }
    let _ = host.shutdown(std::net::Shutdown::Both);
    let _ = guest.shutdown(std::net::Shutdown::Both);
}

/// Waits until something is so.
#[track_caller]
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A terminal, with a program on it.
pub struct Terminal {
    master: File,
    slave: OwnedFd,
    pub child: Child,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    pub fn start(command: &Command, columns: u16, rows: u16) -> Self {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags =
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
        resize(&slave, columns, rows);
        // A session of its own, with this terminal as the controlling one.
        let mut session = Command::new("setsid");
        session.arg("--ctty").arg(command.get_program());
        session.args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => session.env(name, value),
                None => session.env_remove(name),
            };
        }
        let end = || Stdio::from(slave.try_clone().unwrap());
        let child = session
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let shown = Arc::<Mutex<Vec<u8>>>::default();
        let (sink, mut source) = (Arc::clone(&shown), File::from(master.try_clone().unwrap()));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = source.read(&mut buffer) {
                sink.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        Self {
            master: File::from(master),
            slave,
            child,
            shown,
        }
    }

    /// All that was shown since the start, or since it was cleared.
    pub fn shown(&self) -> String {
        text(&self.shown.lock().unwrap())
    }

    pub fn clear(&self) {
        self.shown.lock().unwrap().clear();
    }

    pub fn type_in(&self, keys: &[u8]) {
        (&self.master).write_all(keys).unwrap();
    }

    #[track_caller]
    pub fn wait_for(&self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.shown().contains(wanted) {
            assert!(
                Instant::now() < deadline,
                "waited in vain for {wanted:?} in {:?}",
                self.shown()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn resize(&self, columns: u16, rows: u16) {
        resize(&self.slave, columns, rows);
    }

    /// Whether lines are edited and keys make signals, as before.
    pub fn is_cooked(&self) -> bool {
        use rustix::termios::LocalModes;
        let modes = tcgetattr(&self.slave).unwrap().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The exit status; the terminal must be as before.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                panic!("it does not end: {:?}", self.shown());
            }
            thread::sleep(Duration::from_millis(5));
        };
        assert!(
            self.is_cooked(),
            "the terminal is left raw: {:?}",
            self.shown()
        );
        status.code().unwrap()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resize(terminal: &OwnedFd, columns: u16, rows: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}
