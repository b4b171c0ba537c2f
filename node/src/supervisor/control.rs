//! What a supervisor does for others than its owner: ports that stay forwarded without a command line.
//!
//! `control.sock` takes one request a connection, a line of JSON, and answers with one.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ports::{Forward, Forwarding};
use crate::registry::{Found, State};
use crate::state::CONTROL_SOCKET;

/// Longest request or answer.
const LINE_MAX: u64 = 64 * 1024;
/// A client that has connected sends its request within this time, and takes the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Forwardings of one sandbox.
const FORWARDS_MAX: usize = 64;

/// What is asked of a supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Forwards a port from now on, as `[HOST:]PORT:GUESTPORT`.
    Add { forward: String },
    /// Ends the forwarding that listens there.
    Remove { listen: String },
    /// Changes nothing.
    List {},
}

/// What a supervisor answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The forwardings there are; after `Add` and `Remove` the one that was meant.
    Forwards(Vec<ForwardState>),
    Refused {
        message: String,
        remedy: Option<String>,
    },
}

/// A port that a supervisor forwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardState {
    /// Where it listens on this machine.
    pub listen: String,
    /// The guest's port or socket.
    pub target: String,
    /// Connections open now.
    pub open: usize,
    /// Connections taken so far.
    pub total: usize,
}

/// A supervisor could not be asked, or refuses.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("sandbox {id} is not running: it is {state}")]
    NotRunning { id: String, state: State },
    #[error("the supervisor of {id} cannot be asked: {source}")]
    Io { id: String, source: io::Error },
    #[error("{message}")]
    Refused {
        message: String,
        remedy: Option<String>,
    },
}

impl ControlError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::NotRunning { id, .. } => Some(format!("'belljar start {id}' starts it")),
            Self::Io { id, .. } => Some(format!("'belljar debug state {id}' tells more")),
            Self::Refused { remedy, .. } => remedy.clone(),
        }
    }
}

/// Asks the supervisor of a sandbox.
///
/// # Errors
/// It does not run, or refuses.
pub fn ask(found: &Found, request: &Request) -> Result<Vec<ForwardState>, ControlError> {
    let id = || found.called();
    match exchange(found, request) {
        Ok(Answer::Forwards(forwards)) => Ok(forwards),
        Ok(Answer::Refused { message, remedy }) => Err(ControlError::Refused { message, remedy }),
        Err(source) => {
            let state = found.state();
            Err(if state.is_up() {
                ControlError::Io { id: id(), source }
            } else {
                ControlError::NotRunning { id: id(), state }
            })
        }
    }
}

fn exchange(found: &Found, request: &Request) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(found.socket(CONTROL_SOCKET).path())?;
    send(&mut stream, request)?;
    receive(stream)
}

fn send(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn receive<T: serde::de::DeserializeOwned>(stream: UnixStream) -> io::Result<T> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = Vec::new();
    BufReader::new(stream.take(LINE_MAX)).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}

/// The forwardings of one supervisor. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Control {
    found: Found,
    forwards: Arc<Mutex<Vec<Forwarding>>>,
}

impl Control {
    pub(super) fn new(found: Found) -> Self {
        Self {
            found,
            forwards: Arc::default(),
        }
    }

    /// Takes one connection, and serves it in a thread of its own.
    pub(super) fn accept(&self, listener: &UnixListener) {
        let Ok((mut stream, _)) = listener.accept() else {
            return;
        };
        let control = self.clone();
        let serve = move || {
            let Ok(request) = stream.try_clone().and_then(receive) else {
                return;
            };
            let answer = control.carry_out(&request);
            // A client that is gone does not miss it.
            let _ = send(&mut stream, &answer);
        };
        // Without a thread the client is hung up on, and says so.
        let _ = thread::Builder::new().name("control".into()).spawn(serve);
    }

    fn carry_out(&self, request: &Request) -> Answer {
        let mut forwards = self.forwards.lock().unwrap_or_else(PoisonError::into_inner);
        match request {
            Request::List {} => Answer::Forwards(forwards.iter().map(describe).collect()),
            Request::Add { forward } => {
                if forwards.len() >= FORWARDS_MAX {
                    return refused(format!("{FORWARDS_MAX} ports are forwarded already"), None);
                }
                match self.start(forward) {
                    Ok(started) => {
                        let state = describe(&started);
                        forwards.push(started);
                        Answer::Forwards(vec![state])
                    }
                    Err(answer) => answer,
                }
            }
            Request::Remove { listen } => {
                let is_meant = |forwarding: &Forwarding| {
                    let full = forwarding.listen().to_string();
                    full == *listen || full.rsplit(':').next() == Some(listen.as_str())
                };
                let Some(index) = forwards.iter().position(is_meant) else {
                    return refused(
                        format!("nothing is forwarded from {listen}"),
                        Some("'belljar port --forwards BOX' lists what is".to_owned()),
                    );
                };
                let removed = forwards.remove(index);
                Answer::Forwards(vec![describe(&removed)])
            }
        }
    }

    fn start(&self, forward: &str) -> Result<Forwarding, Answer> {
        let forward: Forward = forward
            .parse()
            .map_err(|error| refused(format!("{error}"), None))?;
        // Whoever asked is gone when a connection fails: its client sees that it was reset.
        Forwarding::start(self.found.clone(), &forward, drop)
            .map_err(|error| refused(error.to_string(), error.remedy().map(str::to_owned)))
    }

    /// Ends all forwardings: sockets' files go, too.
    pub(super) fn close(&self) {
        let mut forwards = self.forwards.lock().unwrap_or_else(PoisonError::into_inner);
        forwards.clear();
    }
}

fn refused(message: String, remedy: Option<String>) -> Answer {
    Answer::Refused { message, remedy }
}

fn describe(forwarding: &Forwarding) -> ForwardState {
    let (open, total) = forwarding.connections();
    ForwardState {
        listen: forwarding.listen().to_string(),
        target: forwarding.target().to_string(),
        open,
        total,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateRoot;

    fn ask_all(
        found: &Found,
        requests: &[Request],
    ) -> Vec<Result<Vec<ForwardState>, ControlError>> {
        let listener = UnixListener::bind(found.socket(CONTROL_SOCKET).path()).unwrap();
        let control = Control::new(found.clone());
        let count = requests.len();
        let server = thread::spawn(move || {
            for _ in 0..count {
                control.accept(&listener);
            }
            control
        });
        let answers = requests.iter().map(|request| ask(found, request)).collect();
        server.join().unwrap().close();
        answers
    }

    #[test]
    fn ports_are_added_listed_and_removed() {
        let keep = tempfile::tempdir().unwrap();
        let root = StateRoot::at(keep.path()).unwrap();
        let (dir, _lock) = root.create().unwrap();
        let found = Found::at(dir);
        let socket = keep.path().join("web.sock");
        let add = |forward: String| Request::Add { forward };
        let listen = socket.display().to_string();
        let answers = ask_all(
            &found,
            &[
                Request::List {},
                add(format!("{listen}:80")),
                add("nonsense".into()),
                Request::List {},
                Request::Remove {
                    listen: "8080".into(),
                },
                Request::Remove {
                    listen: listen.clone(),
                },
                Request::List {},
            ],
        );
        let lengths: Vec<Option<usize>> = answers
            .iter()
            .map(|a| a.as_ref().ok().map(Vec::len))
            .collect();
        assert_eq!(
            lengths,
            [Some(0), Some(1), None, Some(1), None, Some(1), Some(0)]
        );
        let listed = answers[3].as_ref().unwrap();
        assert_eq!(
            (listed[0].listen.as_str(), listed[0].target.as_str()),
            (listen.as_str(), "80")
        );
        assert!(
            !socket.exists(),
            "the socket's file goes with the forwarding"
        );
    }

    #[test]
    fn without_a_supervisor_the_state_is_told() {
        let keep = tempfile::tempdir().unwrap();
        let root = StateRoot::at(keep.path()).unwrap();
        let (dir, lock) = root.create().unwrap();
        drop(lock);
        let error = ask(&Found::at(dir), &Request::List {}).unwrap_err();
        assert!(error.to_string().contains("half-made"), "{error}");
    }
}
