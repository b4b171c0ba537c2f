//! Waiting until something is so in the guest. Nothing is looked at unless somebody waits for it, and
//! whoever hangs up waits no longer.

mod http;
mod output;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use belljar_protocol::v1::{self, r#await::What, error::Code, reply::Result as Answer};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use self::http::{Request, StatusReader};
use super::conn::{Conn, ConnError, timespec};
use super::ports::{self, connect::Target};
use super::{Answered, Context, Failure, Outcome, refusal};

/// Between two looks: with the time a look takes, and a busy CPU, less than 5 ms.
const PAUSE: Duration = Duration::from_millis(2);

/// A look that takes long leaves the guest most of the time.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// How long a server may take to answer before it is asked again.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Longest path, of files and of requests.
const MAX_PATH: usize = 4095;

/// Carries out the call: its reply comes when it is so.
pub(super) fn wait(
    context: &Context,
    conn: &mut Conn,
    call: v1::Await,
    deadline_ms: u64,
) -> Answered {
    let limits = [call.time_limit_ms, deadline_ms];
    let limit = limits.into_iter().filter(|limit| *limit != 0).min();
    let now = Instant::now();
    let mut waiting = Waiting {
        host: conn.as_fd(),
        deadline: limit.and_then(|limit| now.checked_add(Duration::from_millis(limit))),
    };
    let awaited = match call.what {
        Some(What::Port(port)) => waiting.port(port),
        Some(What::Http(http)) => waiting.http(&http),
        Some(What::Output(output)) => output::wait(context, &waiting, &output),
        Some(What::Path(path)) => waiting.path(&path),
        None => Err(refusal(Code::Invalid, "what: nothing to wait for").into()),
    };
    Ok(Outcome::Reply(Answer::Await(awaited?)))
}

/// No attempt is begun so short before the deadline.
const LAST_ATTEMPT: Duration = Duration::from_millis(5);

/// What every wait has.
struct Waiting<'a> {
    host: BorrowedFd<'a>,
    deadline: Option<Instant>,
}

impl Waiting<'_> {
    /// Waits until one of `set` is ready or `time` is over: then 0. Ends with an error at the deadline,
    /// whose message ends with `state`, and when the host hangs up.
    fn pause(
        &self,
        set: &[(BorrowedFd<'_>, PollFlags)],
        time: Option<Duration>,
        state: &str,
    ) -> Result<usize, Failure> {
        let left = self
            .deadline
            .map(|at| at.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(refusal(Code::Deadline, format!("it is not so by then: {state}")).into());
        }
        let time = match (left, time) {
            (Some(left), Some(time)) => Some(left.min(time)),
            (left, time) => left.or(time),
        };
        let mut all: Vec<_> = set
            .iter()
            .map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
            .collect();
        all.push(PollFd::from_borrowed_fd(self.host, PollFlags::RDHUP));
        let ready = match poll(&mut all, time.map(timespec).as_ref()) {
            Err(Errno::INTR) => 0,
            ready => ready.map_err(ConnError::from)?,
        };
        if all.pop().is_some_and(|host| !host.revents().is_empty()) {
            return Err(ConnError::HungUp.into());
        }
        Ok(ready)
    }

    fn port(&mut self, port: u32) -> Result<v1::Awaited, Failure> {
        let port = checked_port(port)?;
        loop {
            let begin = Instant::now();
            if ports::listening()?.iter().any(|socket| socket.port == port) {
                return Ok(v1::Awaited::default());
            }
            self.pause(
                &[],
                Some(pause_after(begin)),
                &format!("nothing listens on port {port}"),
            )?;
        }
    }

    fn path(&mut self, path: &[u8]) -> Result<v1::Awaited, Failure> {
        if path.is_empty() || path.len() > MAX_PATH || path.contains(&0) {
            let message = "path: empty, too long, or with a zero byte";
            return Err(refusal(Code::Invalid, message).into());
        }
        let absolute = [b"/", path.strip_prefix(b"/").unwrap_or(path)].concat();
        loop {
            let begin = Instant::now();
            match rustix::fs::stat(absolute.as_slice()) {
                Ok(_) => return Ok(v1::Awaited::default()),
                Err(errno) => {
                    let state = format!("{}: {errno}", String::from_utf8_lossy(&absolute));
                    self.pause(&[], Some(pause_after(begin)), &state)?;
                }
            }
        }
    }

    fn http(&mut self, call: &v1::HttpAnswer) -> Result<v1::Awaited, Failure> {
        let port = checked_port(call.port)?;
        let request = Request::new(&call.path, &call.host, port)
            .ok_or_else(|| refusal(Code::Invalid, "path or host: cannot be asked for"))?;
        let wanted = match (call.status_from, call.status_to) {
            (0, 0) => 200..=399,
            (from, 0) => from..=from,
            (from, to) => from..=to,
        };
        if wanted.is_empty() {
            return Err(refusal(Code::Invalid, "status_from: above status_to").into());
        }
        let mut state = String::new();
        loop {
            let begin = Instant::now();
            if state.is_empty() || !self.is_almost_over() {
                state = match self.ask(port, &request, &state)? {
                    Ok(status) if wanted.contains(&status) => {
                        return Ok(v1::Awaited {
                            status,
                            ..v1::Awaited::default()
                        });
                    }
                    Ok(status) => format!("port {port} answers with status {status}"),
                    Err(_) if self.is_over() && !state.is_empty() => state,
                    Err(state) => state,
                };
            }
            self.pause(&[], Some(pause_after(begin)), &state)?;
        }
    }

    /// An attempt that the deadline cuts off would only hide why the one before failed.
    fn is_almost_over(&self) -> bool {
        self.deadline
            .is_some_and(|at| at.saturating_duration_since(Instant::now()) < LAST_ATTEMPT)
    }

    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|at| at <= Instant::now())
    }

    /// One request. `Ok(Err)`: why there is no status. `before`: what came of the last one, if there was one.
    fn ask(
        &mut self,
        port: u16,
        request: &Request,
        before: &str,
    ) -> Result<Result<u32, String>, Failure> {
        let state = if before.is_empty() {
            "no answer yet"
        } else {
            before
        };
        let left = self.deadline.map_or(ANSWER_TIME, |at| {
            at.saturating_duration_since(Instant::now())
                .min(ANSWER_TIME)
        });
        let until = Instant::now().checked_add(left);
        let stream = match ports::connect::connect(&Target::loopback(port), left, self.host) {
            Ok(stream) => stream,
            Err(Failure::Refused(error)) => return Ok(Err(error.message)),
            Err(gone) => return Err(gone),
        };
        let late = || {
            Ok(Err(format!(
                "port {port} takes a request, but does not answer it"
            )))
        };
        let mut unsent = request.bytes();
        while !unsent.is_empty() {
            match rustix::net::send(&stream, unsent, SendFlags::NOSIGNAL) {
                Ok(sent) => unsent = unsent.get(sent..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.ready(&stream, PollFlags::OUT, until, state)? => {}
                Err(Errno::AGAIN) => return late(),
                Err(errno) => return Ok(Err(format!("sending to port {port}: {errno}"))),
            }
        }
        let mut reader = StatusReader::default();
        let mut buffer = [0; 2048];
        loop {
            let got = match rustix::net::recv(&stream, &mut buffer[..], RecvFlags::empty()) {
                Ok((_, got)) => got,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) if self.ready(&stream, PollFlags::IN, until, state)? => continue,
                Err(Errno::AGAIN) => return late(),
                Err(errno) => return Ok(Err(format!("reading from port {port}: {errno}"))),
            };
            match reader.feed(buffer.get(..got).unwrap_or_default()) {
                Ok(Some(status)) => return Ok(Ok(status.into())),
                Ok(None) if got != 0 => {}
                _ => {
                    return Ok(Err(format!(
                        "what listens on port {port} does not speak HTTP"
                    )));
                }
            }
        }
    }

    /// False: the time for one answer is over.
    fn ready(
        &self,
        fd: &OwnedFd,
        flags: PollFlags,
        until: Option<Instant>,
        state: &str,
    ) -> Result<bool, Failure> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let ready = self.pause(&[(fd.as_fd(), flags)], left, state)?;
        Ok(ready != 0 || left.is_none_or(|left| !left.is_zero()))
    }
}

/// Twice the time of the look that began then, within limits.
fn pause_after(begin: Instant) -> Duration {
    begin
        .elapsed()
        .saturating_mul(2)
        .clamp(PAUSE, LONGEST_PAUSE)
}

fn checked_port(port: u32) -> Result<u16, v1::Error> {
    let checked = u16::try_from(port).ok().filter(|port| *port != 0);
    checked.ok_or_else(|| refusal(Code::Invalid, format!("port: {port} is no TCP port")))
}
