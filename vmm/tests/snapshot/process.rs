//! A `belljar-vmm` process and its API.
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// Says so where there is none: such a machine cannot run guests at all.
pub(crate) fn has_kvm() -> bool {
    let there = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !there {
        eprintln!("skipped: /dev/kvm cannot be opened");
    }
    there
}

pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Killed when dropped.
pub(crate) struct Vmm {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

#[derive(Debug)]
pub(crate) struct Answer {
    status: u16,
    pub(crate) body: String,
}

impl Answer {
    #[track_caller]
    pub(crate) fn refused(&self) -> &str {
        assert_eq!(self.status, 400, "{self:?}");
        &self.body
    }
}

impl Vmm {
    /// One that works in `dir`, with further arguments.
    pub(crate) fn start(dir: &Path, arguments: &[&str]) -> Self {
        Self::start_as(dir, arguments, |_| {})
    }

    /// The same; `change` sees to where it starts.
    pub(crate) fn start_as(
        dir: &Path,
        arguments: &[&str],
        change: impl FnOnce(&mut Command),
    ) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let socket = dir.join(format!("api{number}.sock"));
        let log = dir.join(format!("log{number}"));
        let output = File::create(&log).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_belljar-vmm"));
        command
            .arg("--api-sock")
            .arg(&socket)
            .args(arguments)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        change(&mut command);
        let child = command.spawn().unwrap();
        let vmm = Self { child, socket, log };
        eventually("the API", || UnixStream::connect(&vmm.socket).is_ok());
        vmm
    }

    pub(crate) fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        let text = self.try_call(method, path, body).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        Answer {
            status: status.unwrap_or_else(|| panic!("no answer: {text:?}; {}", self.log())),
            body: body.to_owned(),
        }
    }

    /// What it answers, if it lives that long.
    pub(crate) fn try_call(&self, method: &str, path: &str, body: &str) -> std::io::Result<String> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let len = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
        )?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Kills it, without waiting.
    pub(crate) fn end(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }

    #[track_caller]
    fn done(&self, method: &str, path: &str, body: &str) {
        let answer = self.call(method, path, body);
        assert_eq!(answer.status, 204, "{path}: {answer:?}; {}", self.log());
    }

    #[track_caller]
    pub(crate) fn put(&self, path: &str, body: &str) {
        self.done("PUT", path, body);
    }

    #[track_caller]
    pub(crate) fn patch(&self, (path, body): (&str, &str)) {
        self.done("PATCH", path, body);
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has ended by itself. Its exit status.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let mut status = None;
        eventually("the end of the VMM", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.and_then(|status| status.code())
    }

    /// As a crash would.
    pub(crate) fn kill(self) {
        drop(self);
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("its log:\n{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
