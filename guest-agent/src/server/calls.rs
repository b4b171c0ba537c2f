//! From the first frame of a connection to the head of its reply.

use std::time::{Duration, Instant};

use belljar_protocol::DEFAULT_GRACE_MS;
use belljar_protocol::v1::{self, error::Code, reply::Result as Answer, request::Call};
use prost::Message;
use rustix::event::epoll::EventFlags;
use rustix::fs::{Mode, OFlags};

use super::running::{self, Running, kill_tree};
use super::{
    Ended, Gone, KIND_STDERR, KIND_STDIN, KIND_STDOUT, MAX_PROGRAMS, Phase, Server, Session,
};
use crate::exec::lifecycle::Lifecycle;
use crate::exec::plan;
use crate::exec::users::{self, Identity, UserError};
use crate::sys::spawn::{Failure, Step};

/// Most bytes read of `/etc/passwd` and `/etc/group`.
const MAX_FILE: usize = 1 << 20;

impl Server {
    /// Reads on towards the request and carries it out once it is there. False: not yet.
    pub(super) fn take_request(&mut self, id: u64, session: &mut Session) -> Result<bool, Gone> {
        let got = session.socket.receive(&mut self.scratch)?;
        if got == 0 {
            return Ok(false);
        }
        let mut bytes = self.scratch.get(..got).unwrap_or_default();
        let frame = session.decoder.feed(&mut bytes).map_err(|error| {
            crate::log!("connection dropped: {error}");
            Gone
        })?;
        let Some(frame) = frame else {
            return Ok(true);
        };
        let request = v1::Request::decode(&*frame);
        let backlog = bytes.to_vec();
        session.phase = Phase::Closing {
            linger: false,
            told: false,
        };
        let reply = match request {
            Ok(request) => self.answer(id, session, request.call, backlog),
            Err(error) => self.refusal(Code::Invalid, &format!("no request: {error}")),
        };
        session.socket.queue(&reply);
        session.socket.flush()?;
        Ok(true)
    }

    /// Carries out a call up to the head of its reply.
    fn answer(
        &mut self,
        id: u64,
        session: &mut Session,
        call: Option<Call>,
        backlog: Vec<u8>,
    ) -> v1::Reply {
        match call {
            Some(Call::Ping(_)) => self.reply(Answer::Pong(v1::Pong {
                boottime_ns: crate::boot::now_ns(),
                ..v1::Pong::default()
            })),
            Some(Call::Shutdown(shutdown)) => {
                let ended = match shutdown.mode() {
                    v1::shutdown::Mode::PowerOff => Ended::PowerOff,
                    v1::shutdown::Mode::Reboot => Ended::Reboot,
                };
                let grace = shutdown.grace_ms.unwrap_or(DEFAULT_GRACE_MS);
                let reply = self.reply(Answer::Shutdown(v1::ShutdownStarted {}));
                self.stop(ended, Duration::from_millis(grace));
                reply
            }
            Some(Call::Exec(_)) if self.stopping.is_some() => {
                self.refusal(Code::ShuttingDown, "the guest is shutting down")
            }
            Some(Call::Exec(_)) if self.programs.len() >= MAX_PROGRAMS => {
                self.refusal(Code::Busy, &format!("{MAX_PROGRAMS} programs run already"))
            }
            Some(Call::Exec(exec)) => match self.start(id, session, &exec, backlog) {
                Ok(pid) => self.reply(Answer::Exec(v1::ExecStarted {
                    pid,
                    ..v1::ExecStarted::default()
                })),
                Err(NotStarted::Invalid(error)) => self.refusal(Code::Invalid, &error.to_string()),
                Err(NotStarted::Failed(failure)) => self.reply(Answer::SpawnFailure(failure)),
            },
            _ => self.refusal(
                Code::Unimplemented,
                "this agent does not know the call; its generation is in this reply",
            ),
        }
    }

    /// Starts a program for a session.
    fn start(
        &mut self,
        id: u64,
        session: &mut Session,
        exec: &v1::Exec,
        backlog: Vec<u8>,
    ) -> Result<u32, NotStarted> {
        let identity = identity(&exec.user)?;
        let program = plan::program(exec, identity)?;
        let with_stdin = exec.stdin() == v1::exec::Stdin::Stream;
        let failed = |failure: &Failure| NotStarted::Failed(plan::failure(failure, exec));
        let prepared = |errno: rustix::io::Errno| {
            failed(&Failure {
                step: Step::Descriptors,
                errno: errno.raw_os_error(),
            })
        };
        let (own, child) = running::pipes(with_stdin).map_err(prepared)?;
        if let Some(ids) = &program.ids {
            child.give_to(ids.uid, ids.gid);
        }
        let leaf = self.cgroups.as_mut().and_then(|cgroups| {
            let leaf = cgroups.take();
            leaf.inspect_err(|error| crate::log!("no cgroup for a program: {error}"))
                .ok()
        });
        let started = self.spawner.spawn(
            &program,
            child.stdio(&self.null),
            leaf.as_ref().map(crate::exec::cgroup::Leaf::folder),
        );
        drop(child);
        let pid = match started {
            Ok(pid) => pid,
            Err(failure) => {
                self.give_back(leaf);
                return Err(failed(&failure));
            }
        };
        self.has_children = true;
        let events = EventFlags::IN | EventFlags::ET;
        let watched = self
            .watch(&own.stdout, id, KIND_STDOUT, events)
            .and_then(|()| self.watch(&own.stderr, id, KIND_STDERR, events))
            .and_then(|()| match &own.stdin {
                Some(stdin) => self.watch(stdin, id, KIND_STDIN, EventFlags::OUT | EventFlags::ET),
                None => Ok(()),
            });
        if let Err(errno) = watched {
            kill_tree(pid, leaf.as_ref());
            self.orphans.insert(pid, leaf);
            return Err(prepared(errno));
        }
        self.programs.insert(pid, id);
        session.expires = None;
        session.phase = Phase::Exec(Box::new(Running {
            pid,
            leaf,
            life: Lifecycle::new(plan::limit(exec, Instant::now())),
            stdin: own.stdin,
            stdout: Some(own.stdout),
            stderr: Some(own.stderr),
            backlog,
        }));
        Ok(pid.unsigned_abs())
    }
}

enum NotStarted {
    Invalid(plan::Invalid),
    Failed(v1::SpawnFailure),
}

impl From<plan::Invalid> for NotStarted {
    fn from(error: plan::Invalid) -> Self {
        Self::Invalid(error)
    }
}

impl From<UserError> for NotStarted {
    fn from(error: UserError) -> Self {
        Self::Failed(v1::SpawnFailure {
            kind: error.kind().into(),
            errno: 0,
            message: error.to_string(),
        })
    }
}

fn identity(user: &str) -> Result<Identity, UserError> {
    if user.is_empty() {
        return Ok(Identity::root());
    }
    users::resolve(
        user,
        &read_small_file("/etc/passwd"),
        &read_small_file("/etc/group"),
    )
}

/// The content of a regular file up to [`MAX_FILE`] bytes; nothing where it is missing or something
/// else, like a FIFO that would block.
fn read_small_file(path: &str) -> Vec<u8> {
    let mut content = Vec::new();
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let Ok(fd) = rustix::fs::open(path, flags, Mode::empty()) else {
        return content;
    };
    let is_file = rustix::fs::fstat(&fd)
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file());
    if is_file {
        use std::io::Read;
        let file = std::fs::File::from(fd);
        // What could be read counts.
        let _ = file.take(MAX_FILE as u64).read_to_end(&mut content);
    }
    content
}
