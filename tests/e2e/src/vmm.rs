//! One `belljar-vmm` process in a directory of its own, and its control socket.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{PATIENCE, bin_dir, eventually};

/// A VMM. Relative paths in its calls are below [`Vmm::dir`]. Dropping it kills it.
#[derive(Debug)]
pub struct Vmm {
    dir: tempfile::TempDir,
    child: Child,
}

/// What the API answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

impl Answer {
    /// Checks that the call was refused, with all these texts in its message.
    #[track_caller]
    pub fn refuses(&self, texts: &[&str]) {
        assert_eq!(self.status, 400, "{self:?}");
        let message = self.body["fault_message"].as_str().unwrap_or_default();
        for text in texts {
            assert!(message.contains(text), "'{text}' is not in: {message}");
        }
    }

    /// Checks that the call was carried out; returns the body.
    #[track_caller]
    pub fn is_done(self) -> Value {
        assert!(matches!(self.status, 200 | 204), "{self:?}");
        self.body
    }
}

impl Default for Vmm {
    fn default() -> Self {
        Self::new()
    }
}

impl Vmm {
    /// A VMM whose API answers.
    #[must_use]
    pub fn new() -> Self {
        Self::with(|_, command| {
            command.args(["--api-sock", "api.sock"]);
        })
    }

    /// A VMM with other arguments; the socket of its API is `api.sock`, unless there is none.
    ///
    /// # Panics
    /// It does not start.
    #[must_use]
    pub fn with(arguments: impl FnOnce(&Path, &mut Command)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(bin_dir().join("belljar-vmm"));
        arguments(dir.path(), &mut command);
        Self::start(dir, &mut command)
    }

    /// Starts a command that becomes a VMM.
    ///
    /// # Panics
    /// It cannot be started, or opens no API in time.
    #[must_use]
    pub fn start(dir: tempfile::TempDir, command: &mut Command) -> Self {
        let log = File::create(dir.path().join("log")).unwrap();
        let has_api = !command.get_args().any(|argument| argument == "--no-api");
        let child = command
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("belljar-vmm can be started");
        let mut vmm = Self { dir, child };
        let socket = vmm.path("api.sock");
        eventually("the API's socket", || {
            !has_api || UnixStream::connect(&socket).is_ok() || vmm.has_ended()
        });
        vmm
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in its directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// A new sparse file of that size in its directory; returns the path.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// Writes a file in its directory; returns the name for calls.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn write(&self, name: &str, content: &[u8]) -> String {
        fs::write(self.path(name), content).unwrap();
        name.to_owned()
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it logged.
    #[must_use]
    pub fn log(&self) -> String {
        let log = fs::read(self.path("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// A new connection to the API, with time limits.
    ///
    /// # Panics
    /// Nobody listens.
    #[must_use]
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path("api.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// One call on a connection of its own; `Value::Null` sends no body.
    ///
    /// # Panics
    /// What comes back is not an answer.
    #[must_use]
    pub fn call(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.call_with(method, path, "", body, &[])
    }

    /// A call with descriptors, named in their order.
    ///
    /// # Panics
    /// As [`Vmm::call`].
    #[must_use]
    pub fn call_with_files(
        &self,
        method: &str,
        path: &str,
        body: &Value,
        names: &str,
        files: &[BorrowedFd<'_>],
    ) -> Answer {
        self.call_with(
            method,
            path,
            &format!("Belljar-Fds: {names}\r\n"),
            body,
            files,
        )
    }

    fn call_with(
        &self,
        method: &str,
        path: &str,
        header: &str,
        body: &Value,
        files: &[BorrowedFd<'_>],
    ) -> Answer {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\n{header}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = self.connect();
        if files.is_empty() {
            stream.write_all(request.as_bytes()).unwrap();
        } else {
            send_with_files(&stream, request.as_bytes(), files);
        }
        read_answer(&mut stream).unwrap_or_else(|error| {
            panic!(
                "{method} {path}: no answer ({error}); its log:\n{}",
                self.log()
            )
        })
    }

    /// A `PUT` that is carried out.
    #[track_caller]
    pub fn put(&self, path: &str, body: &Value) {
        self.call("PUT", path, body).is_done();
    }

    /// A `PATCH` that is carried out.
    #[track_caller]
    pub fn patch(&self, path: &str, body: &Value) {
        self.call("PATCH", path, body).is_done();
    }

    /// A `GET` that is answered.
    #[must_use]
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        self.call("GET", path, &Value::Null).is_done()
    }

    /// `PUT /actions`.
    #[must_use]
    pub fn action(&self, action: &str) -> Answer {
        self.call(
            "PUT",
            "/actions",
            &serde_json::json!({ "action_type": action }),
        )
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// It was waited for.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// It cannot be asked.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end; returns status and log. A VMM never ends by a signal of its own, and leaves no socket.
    ///
    /// # Panics
    /// It does not end, or not well.
    #[track_caller]
    pub fn end(mut self) -> (i32, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                Instant::now() < deadline,
                "it does not end; its log:\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(
            status.signal(),
            None,
            "ended by a signal; its log:\n{}",
            self.log()
        );
        let left: Vec<_> = fs::read_dir(self.dir())
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| {
                Path::new(name)
                    .extension()
                    .is_some_and(|extension| extension == "sock")
            })
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        (status.code().unwrap_or(-1), self.log())
    }

    /// Waits for its end and checks the status.
    #[track_caller]
    pub fn ends_with(self, expected: i32) {
        let (status, log) = self.end();
        assert_eq!(status, expected, "its log:\n{log}");
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the VMM's log:\n{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send_with_files(stream: &UnixStream, bytes: &[u8], files: &[BorrowedFd<'_>]) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(files)));
    let sent = sendmsg(
        stream.as_fd(),
        &[io::IoSlice::new(bytes)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    assert_eq!(sent, bytes.len());
}

/// Reads one answer from a connection.
///
/// # Errors
/// The connection ends, waits too long, or carries something else.
pub fn read_answer(stream: &mut UnixStream) -> io::Result<Answer> {
    let mut head = Vec::new();
    let mut byte = [0u8];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend(byte);
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let bad = || io::Error::other(format!("not an answer: {head}"));
    let status = head
        .strip_prefix("http/1.1 ")
        .or_else(|| head.strip_prefix("http/1.0 "))
        .and_then(|rest| rest.get(..3))
        .and_then(|code| code.parse().ok())
        .ok_or_else(bad)?;
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .and_then(|length| length.trim().parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let body = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&body).map_err(|_| bad())?
    };
    Ok(Answer { status, body })
}
