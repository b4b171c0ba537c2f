//! A sandbox that is held still for a capture goes on, whatever becomes of who is capturing it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_protocol::client::system;
use belljar_protocol::{AGENT_PORT, hybrid};

use super::log;

/// For each step.
const LIMIT: Duration = Duration::from_secs(20);

/// A sandbox that may be paused and frozen.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) dir: PathBuf,
    pub(super) was_paused: bool,
}

impl Held {
    /// Resumes the VMM and thaws the guest's programs; leaves it paused if it was before.
    pub(super) fn let_go(&self) {
        let Ok(dir) = File::open(&self.dir) else {
            return;
        };
        let near = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
        let resumed = set_state(&near, "Resumed");
        let deadline = Instant::now() + LIMIT;
        let thawed = hybrid::connect(&near.join("v.sock"), AGENT_PORT, deadline)
            .map_err(|error| error.to_string())
            .and_then(|stream| {
                system::thaw(stream, Some(deadline)).map_err(|error| error.to_string())
            });
        if self.was_paused {
            let _ = set_state(&near, "Paused");
        }
        log::line(&format!(
            "{}: whoever was capturing it has gone; resumed: {resumed}, thawed: {thawed:?}",
            self.dir.display()
        ));
    }
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
