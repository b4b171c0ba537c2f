//! A sandbox that is held still for a capture goes on, whatever becomes of who is capturing it.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_protocol::client::system;
use belljar_protocol::{AGENT_PORT, hybrid};

use rustix::fs::{Mode, OFlags};

use super::log;
use super::quiet::Still;

/// For each step.
const LIMIT: Duration = Duration::from_secs(20);
/// A capture has written everything within this time, and a little.
const PATIENCE: Duration = Duration::from_secs(330);
/// Between two attempts.
const RETRY: Duration = Duration::from_millis(500);

/// A sandbox that may be paused and frozen.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) dir: PathBuf,
    pub(super) was_paused: bool,
    /// A share of the lock that keeps others from capturing, resuming or resetting it meanwhile.
    pub(super) _turn: Option<OwnedFd>,
    /// Work that can wait does.
    pub(super) _still: Still,
}

impl Held {
    /// Resumes the VMM and thaws the guest's programs; leaves it paused if it was before.
    pub(super) fn let_go(&self) {
        // Whoever began the capture chose the path: a pipe would make us wait.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(dir) = rustix::fs::open(&self.dir, flags, Mode::empty()) else {
            return;
        };
        let near = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
        // A VMM that is still writing out RAM answers when it has done so.
        let give_up = Instant::now() + PATIENCE;
        let (resumed, thawed) = loop {
            let resumed = set_state(&near, "Resumed");
            let thawed = thaw(&near);
            if thawed.is_ok() || Instant::now() >= give_up || is_gone(&near) {
                break (resumed, thawed);
            }
            std::thread::sleep(RETRY);
        };
        if self.was_paused {
            let _ = set_state(&near, "Paused");
        }
        log::line(&format!(
            "{}: whoever was capturing it has gone; resumed: {resumed}, thawed: {thawed:?}",
            self.dir.display()
        ));
    }
}

fn thaw(dir: &Path) -> Result<(), String> {
    let deadline = Instant::now() + LIMIT;
    let stream = hybrid::connect(&dir.join("v.sock"), AGENT_PORT, deadline)
        .map_err(|error| error.to_string())?;
    system::thaw(stream, Some(deadline)).map_err(|error| error.to_string())
}

/// Nobody listens at the VMM's API.
fn is_gone(dir: &Path) -> bool {
    let connected = UnixStream::connect(dir.join("api.sock"));
    connected.is_err_and(|error| {
        matches!(
            error.kind(),
            ErrorKind::NotFound | ErrorKind::ConnectionRefused
        )
    })
}

/// `PATCH /vm` of the VMM's API.
fn set_state(dir: &Path, state: &str) -> bool {
    let body = format!("{{\"state\":\"{state}\"}}");
    let request = format!(
        "PATCH /vm HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let asked = || -> std::io::Result<bool> {
        let mut api = UnixStream::connect(dir.join("api.sock"))?;
        api.set_read_timeout(Some(LIMIT))?;
        api.write_all(request.as_bytes())?;
        let mut head = [0; 12];
        api.read_exact(&mut head)?;
        Ok(head.starts_with(b"HTTP/1.1 2"))
    };
    asked().unwrap_or(false)
}
