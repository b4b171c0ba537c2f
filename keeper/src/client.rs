//! A connection to the keeper, which is started if there is none.

use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::v1::{self, reply::Result as Answer, request::Call};
use crate::wire::{Connection, WireError};
use crate::{SOCKET, VERSION};

/// A keeper is up within this time, or there is something wrong.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks for a keeper that is starting.
const RETRY: Duration = Duration::from_millis(2);
/// A keeper that starts instead of one that has just left is tried again after this time.
const START_AGAIN: Duration = Duration::from_secs(2);

/// Of what a keeper says that cannot do its work.
const LONGEST_LAST_WORDS: u64 = 64 << 10;

/// The keeper could not be asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("the keeper {} cannot be started: {source}", program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("the keeper did not come up within {} s{}", limit.as_secs(), because(last))]
    NotUp { limit: Duration, last: String },
    #[error("the keeper did not come up{}", because(said))]
    Ended { said: String },
    #[error("a keeper of another version runs ({found}, this is {VERSION})")]
    Version { found: u32 },
    #[error("{message}")]
    Refused {
        code: v1::error::Code,
        message: String,
    },
    #[error("the connection to the keeper failed: {0}")]
    Wire(#[from] WireError),
    #[error("the keeper answered with something else than was asked for")]
    Unexpected,
}

fn because(last: &str) -> String {
    if last.is_empty() {
        String::new()
    } else {
        format!("; it said: {last}")
    }
}

impl KeeperError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<&'static str> {
        use v1::error::Code;
        match self {
            Self::Start { .. } => Some("run 'make build': belljar-keeper belongs beside belljar"),
            Self::NotUp { .. } | Self::Ended { .. } => {
                Some("'belljar doctor' checks the state directory")
            }
            Self::Version { .. } => {
                Some("wait until it has nothing to do and leaves, a few seconds, and try again")
            }
            Self::Wire(_) => Some("try again; keeper.log in the state directory may say why"),
            Self::Unexpected => None,
            Self::Refused { code, .. } => match code {
                Code::NoSnapshot => Some("'belljar snapshots' lists what there is"),
                Code::Ambiguous => Some("write more of the id"),
                Code::Kept => Some("'belljar inspect SNAPSHOT' tells its tags and pin"),
                Code::BaseImage => Some("name the image that it was made with (--image)"),
                Code::NoSpace => {
                    Some("'belljar store gc' makes room, 'belljar store du' tells where it is")
                }
                Code::NoMemory => Some("'belljar ls' lists what runs; stop something"),
                Code::Damaged => Some("'belljar store verify' tells which snapshots are affected"),
                _ => None,
            },
        }
    }
}

/// Where the keeper is, and what starts it.
#[derive(Debug, Clone)]
pub struct Keeper {
    /// `keeper/` of the state root.
    pub dir: PathBuf,
    /// `belljar-keeper`.
    pub program: PathBuf,
}

/// A connection to the keeper.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    pid: u32,
}

impl Keeper {
    /// Connects, starting the keeper if need be.
    ///
    /// # Errors
    /// It cannot be started, or does not come up.
    pub fn connect(&self) -> Result<Client, KeeperError> {
        let deadline = Instant::now() + START_LIMIT;
        let mut start_at = Instant::now();
        let mut started: Option<Started> = None;
        loop {
            match self.try_connect() {
                Ok(Some(client)) => return Ok(client),
                Ok(None) => {}
                Err(error) => return Err(error),
            }
            if let Some(said) = started.as_mut().and_then(Started::failure) {
                return Err(KeeperError::Ended { said });
            }
            let now = Instant::now();
            if now >= deadline {
                let log = std::fs::read_to_string(self.dir.join("keeper.log")).unwrap_or_default();
                return Err(KeeperError::NotUp {
                    limit: START_LIMIT,
                    last: log.lines().last().unwrap_or_default().to_owned(),
                });
            }
            if now >= start_at {
                started = Some(self.start()?);
                // Several may do so at once: all but one of these keepers leave again.
                start_at = now + START_AGAIN;
            }
            std::thread::sleep(RETRY);
        }
    }

    /// Connects to a keeper that runs; `None` if none does, or one that is leaving.
    fn try_connect(&self) -> Result<Option<Client>, KeeperError> {
        // The path may be too long for a socket's address.
        let Ok(dir) = File::open(&self.dir) else {
            return Ok(None);
        };
        let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
        let Ok(stream) = UnixStream::connect(path) else {
            return Ok(None);
        };
        stream
            .set_read_timeout(Some(START_LIMIT))
            .map_err(WireError::from)?;
        let mut connection = Connection::new(stream);
        let hello: v1::Hello = match connection.receive() {
            Ok(Some(hello)) => hello,
            // It was leaving.
            Ok(None) | Err(WireError::Closed) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if hello.version != VERSION {
            return Err(KeeperError::Version {
                found: hello.version,
            });
        }
        connection
            .stream()
            .set_read_timeout(None)
            .map_err(WireError::from)?;
        let pid = hello.pid;
        Ok(Some(Client { connection, pid }))
    }

    fn start(&self) -> Result<Started, KeeperError> {
        let failed = |source| KeeperError::Start {
            program: self.program.clone(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(failed)?;
        let child = Command::new(&self.program)
            .arg(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        Ok(Started(Some(child)))
    }
}

/// A keeper that this process has started. It outlives this process, or is reaped if it leaves before.
struct Started(Option<Child>);

impl Started {
    /// Why it has ended; `None`: it has not, or because another one serves, or somebody killed it.
    fn failure(&mut self) -> Option<String> {
        let child = self.0.as_mut()?;
        let status = child.try_wait().ok()??;
        let mut said = String::new();
        if let Some(stderr) = child.stderr.take() {
            let _ = stderr.take(LONGEST_LAST_WORDS).read_to_string(&mut said);
        }
        self.0 = None;
        let said = said.lines().last().unwrap_or_default();
        let said = said.trim_start_matches("belljar-keeper: ").to_owned();
        status.code().filter(|code| *code != 0).map(|_| said)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            std::thread::spawn(move || child.wait());
        }
    }
}

impl Client {
    /// The keeper's process.
    #[must_use]
    pub const fn keeper_pid(&self) -> u32 {
        self.pid
    }

    /// Nothing that the keeper says is waited for longer from now on.
    ///
    /// # Errors
    /// The limit is zero.
    pub fn limit(&self, limit: Duration) -> Result<(), KeeperError> {
        let stream = self.connection.stream();
        let limited = stream
            .set_read_timeout(Some(limit))
            .and_then(|()| stream.set_write_timeout(Some(limit)));
        Ok(limited.map_err(WireError::from)?)
    }

    /// Carries out a call; `meanwhile` sees progress and items.
    ///
    /// # Errors
    /// It was refused, or the connection failed.
    pub fn call(
        &mut self,
        call: Call,
        descriptors: &[BorrowedFd<'_>],
        meanwhile: impl FnMut(Answer),
    ) -> Result<(Answer, Vec<OwnedFd>), KeeperError> {
        let request = v1::Request {
            descriptors: u32::try_from(descriptors.len()).unwrap_or(u32::MAX),
            call: Some(call),
        };
        self.connection.send(&request, descriptors)?;
        self.answer(meanwhile)
    }

    /// The next answer that is neither progress nor item.
    ///
    /// # Errors
    /// It is a refusal, or the connection failed.
    pub fn answer(
        &mut self,
        mut meanwhile: impl FnMut(Answer),
    ) -> Result<(Answer, Vec<OwnedFd>), KeeperError> {
        loop {
            let reply: v1::Reply = self.connection.receive()?.ok_or(WireError::Closed)?;
            let descriptors = self.connection.take(reply.descriptors)?;
            match reply.result {
                None => return Err(KeeperError::Unexpected),
                Some(Answer::Error(error)) => {
                    return Err(KeeperError::Refused {
                        code: error.code(),
                        message: error.message,
                    });
                }
                Some(other @ (Answer::Progress(_) | Answer::Item(_))) => meanwhile(other),
                Some(answer) => return Ok((answer, descriptors)),
            }
        }
    }
}

/// The keeper of a state root, with the program beside this one.
#[must_use]
pub fn beside(state_root: &Path, program: PathBuf) -> Keeper {
    Keeper {
        dir: state_root.join(crate::DIR),
        program,
    }
}
