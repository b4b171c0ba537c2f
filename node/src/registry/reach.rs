//! From a found sandbox into its guest, and to its VMM.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_protocol::{AGENT_PORT, hybrid};

use super::{Found, State};
use crate::state::{self, Gone, SandboxDir};
use crate::vmm::{self, ApiError};

/// A VMM says within this time whether it is paused: its API has a thread of its own.
const ASK_LIMIT: Duration = Duration::from_millis(500);

/// One whose VMM has ended is removed within this time.
const END_LIMIT: Duration = Duration::from_secs(1);
const END_STEP: Duration = Duration::from_millis(10);

/// A guest's port could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("sandbox {id} is not running: it is {state}{}", because(state))]
    NotRunning { id: String, state: State },
    #[error("sandbox {id} is paused")]
    Paused { id: String },
    /// It ended just now, and went away with its guest.
    #[error("sandbox {} is gone: {}", .0.called(), .0.ended.meaning)]
    Gone(Box<Gone>),
    /// It runs, but what was asked for does not answer.
    #[error("sandbox {id}: {source}")]
    Guest {
        id: String,
        port: u32,
        source: hybrid::ConnectError,
    },
}

fn because(state: &State) -> String {
    let reason = state.reason();
    if reason.is_empty() {
        reason
    } else {
        format!(" ({reason})")
    }
}

impl ConnectError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::NotRunning { id, state } => state
                .remedy(id)
                .unwrap_or_else(|| format!("'belljar start {id}' starts it")),
            Self::Gone(gone) => super::gone_remedy(gone),
            Self::Paused { id } => format!("'belljar resume {id}' lets it go on"),
            Self::Guest { id, port, .. } if *port == AGENT_PORT => format!(
                "the guest's agent does not answer: 'belljar console {id}' shows what the guest says, 'belljar debug state {id}' what the host sees"
            ),
            Self::Guest { id, .. } => {
                format!("'belljar exec {id} -- …' can look what listens in the guest")
            }
        }
    }
}

impl Found {
    /// Connects to a vsock port of the guest.
    ///
    /// # Errors
    /// The state of the sandbox, if it is not running; else why nobody answers.
    pub fn connect(&self, port: u32, deadline: Instant) -> Result<UnixStream, ConnectError> {
        let socket = self.socket(state::VSOCK_SOCKET);
        // Only a failure is worth looking at the state: most sandboxes that are connected to run.
        hybrid::connect(socket.path(), port, deadline).map_err(|source| self.explain(port, source))
    }

    /// Connects to the agent.
    ///
    /// # Errors
    /// As [`Found::connect`].
    pub fn agent(&self, deadline: Instant) -> Result<UnixStream, ConnectError> {
        self.connect(AGENT_PORT, deadline)
    }

    /// Connects to the API of its VMM.
    ///
    /// # Errors
    /// No VMM listens there.
    pub fn api(&self) -> io::Result<UnixStream> {
        UnixStream::connect(self.socket(state::API_SOCKET).path())
    }

    /// The address of a socket in its directory.
    #[must_use]
    pub fn socket(&self, name: &str) -> SocketPath {
        SocketPath::new(&self.dir, name)
    }

    /// Whoever was taking it back to a snapshot has not finished, or is about to.
    #[must_use]
    pub fn is_half_reset(&self) -> bool {
        self.dir.file(state::RESETTING).exists()
    }

    fn explain(&self, port: u32, source: hybrid::ConnectError) -> ConnectError {
        let id = self.called();
        self.why_unreachable()
            .unwrap_or(ConnectError::Guest { id, port, source })
    }

    /// Why its guest cannot be reached; `None` if it runs. Of one that is about to end, waits a moment for the end.
    #[must_use]
    pub fn why_unreachable(&self) -> Option<ConnectError> {
        let id = self.called();
        let deadline = Instant::now() + END_LIMIT;
        loop {
            match self.state() {
                State::Running(_) => return None,
                State::Paused(_) => return Some(ConnectError::Paused { id }),
                State::Busy if Instant::now() < deadline => std::thread::sleep(END_STEP),
                state => {
                    let gone = self
                        .dir
                        .gone()
                        .map(|gone| ConnectError::Gone(Box::new(gone)));
                    return Some(gone.unwrap_or(ConnectError::NotRunning { id, state }));
                }
            }
        }
    }

    /// Its name, or its id; reads its configuration.
    #[must_use]
    pub fn called(&self) -> String {
        let spec = self.spec().ok().flatten();
        spec.and_then(|spec| spec.name)
            .unwrap_or_else(|| self.id().to_owned())
    }
}

/// Whether the VMM says that its guest is paused.
pub(super) fn is_paused(dir: &SandboxDir) -> bool {
    ask(dir).is_ok_and(|state| state == "Paused")
}

/// The state of the machine as its VMM tells it.
fn ask(dir: &SandboxDir) -> Result<String, ApiError> {
    #[derive(serde::Deserialize)]
    struct Instance {
        state: String,
    }
    let mut api = UnixStream::connect(SocketPath::new(dir, state::API_SOCKET).path())?;
    let response = vmm::request(&mut api, "GET", "/", b"", Instant::now() + ASK_LIMIT)?;
    serde_json::from_slice::<Instance>(&response.body)
        .map(|instance| instance.state)
        .map_err(|error| io::Error::from(error).into())
}

/// Longest address of a Unix socket.
const SOCKET_PATH_MAX: usize = 107;

/// The address of a socket in a sandbox's directory. A path that is too long for an address is reached
/// through the open directory, so keep this value until the socket is connected or bound.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    _dir: Option<File>,
}

impl SocketPath {
    pub(crate) fn new(dir: &SandboxDir, name: &str) -> Self {
        let path = dir.file(name);
        if path.as_os_str().len() <= SOCKET_PATH_MAX {
            return Self { path, _dir: None };
        }
        match File::open(dir.path()) {
            Ok(open) => Self {
                path: PathBuf::from(format!("/proc/self/fd/{}/{name}", open.as_raw_fd())),
                _dir: Some(open),
            },
            Err(_) => Self { path, _dir: None },
        }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn sockets_work_below_any_directory() {
        let keep = tempfile::tempdir().unwrap();
        for depth in [0, 30] {
            let deep = keep.path().join("long-name/".repeat(depth)).join("x");
            std::fs::create_dir_all(&deep).unwrap();
            let dir = SandboxDir::existing(&deep);
            let address = SocketPath::new(&dir, "v.sock_1025");
            let _listener = UnixListener::bind(address.path()).unwrap();
            UnixStream::connect(SocketPath::new(&dir, "v.sock_1025").path()).unwrap();
            assert!(dir.file("v.sock_1025").exists());
        }
    }
}
