//! The worker: started by the holder, and started again whenever it ends.

use std::ffi::CStr;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use belljar_protocol::v1::{self, event::What};
use prost::Message;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags,
    SocketType, socketpair,
};

use super::{Holder, OWN_CONTROL, high, own};
use crate::sys::spawn::{Program, START_TIME, Spawned};
use crate::wire::WorkerConfig;

/// A worker that ends sooner than this was no good.
const SHORT_LIFE: Duration = Duration::from_millis(100);

/// The wait before one more worker is started after several that were no good.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Short lives in a row that are put up with.
const PATIENCE: u32 = 3;

/// The C library keeps the stacks of threads that have ended, 40 MiB of them, for the next ones: after a
/// thousand calls at a time that would be resident for ever.
const TUNABLES: &CStr = c"GLIBC_TUNABLES=glibc.pthread.stack_cache_size=1048576";

/// Channels taken in one go.
const TAKEN: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) pid: Option<i32>,
    pub(super) config: WorkerConfig,
    /// When the next one is started, if none runs.
    pub(super) restart_at: Option<Instant>,
    listener: OwnedFd,
    control: Option<OwnedFd>,
    started: Option<Instant>,
    short_lives: u32,
}

impl Worker {
    pub(super) const fn new(listener: OwnedFd, config: WorkerConfig) -> Self {
        Self {
            pid: None,
            config,
            restart_at: None,
            listener,
            control: None,
            started: None,
            short_lives: 0,
        }
    }
}

impl Holder {
    /// Starts a worker. If that fails, it is tried again later.
    pub(super) fn start_worker(&mut self) {
        self.worker.restart_at = None;
        let now = Instant::now();
        self.worker.started = Some(now);
        match self.try_start_worker() {
            Ok(pid) => {
                self.worker.pid = Some(pid);
                protect(pid);
            }
            Err(error) => {
                crate::log!("cannot start a worker: {error}");
                self.worker.control = None;
                self.worker.restart_at = now.checked_add(LONGEST_PAUSE);
            }
        }
    }

    fn try_start_worker(&mut self) -> std::io::Result<i32> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let theirs = high(theirs)?;
        let config = self.worker.config.encode_to_vec();
        rustix::net::send(&ours, &config, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        self.watch(&ours, own(OWN_CONTROL), EventFlags::IN)?;
        let program = Program {
            candidates: vec![c"/proc/self/exe".to_owned()],
            argv: vec![c"belljar-agent".to_owned(), c"--worker".to_owned()],
            env: vec![TUNABLES.to_owned()],
            cwd: c"/".to_owned(),
            ids: None,
            limits: Vec::new(),
            has_terminal: false,
        };
        let log = high(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 8)?)?;
        let stdio = [
            self.null.as_raw_fd(),
            self.null.as_raw_fd(),
            log.as_raw_fd(),
            self.worker.listener.as_raw_fd(),
            theirs.as_raw_fd(),
        ];
        let pid = match self.spawner.spawn(program, &stdio, None, START_TIME) {
            Ok(Spawned::Running(pid)) => pid,
            Ok(Spawned::Starting(starting)) => {
                let pid = starting.pid();
                // It runs in a moment; what it still needs stays.
                drop(starting);
                pid
            }
            Err((failure, _)) => {
                return Err(rustix::io::Errno::from_raw_os_error(failure.errno).into());
            }
        };
        self.worker.control = Some(ours);
        Ok(pid)
    }

    /// The worker has ended, which it never does of its own will.
    pub(super) fn worker_ended(&mut self, status: i32) {
        // Channels that it passed on before are still in the control socket.
        self.take_channels();
        self.worker.pid = None;
        self.worker.control = None;
        if self.stopping.is_some() {
            return;
        }
        let reason = match status & 0x7f {
            0 => format!("it exited with status {}", (status >> 8) & 0xff),
            number => format!("signal {number}"),
        };
        crate::log!("the worker has ended ({reason}); starting another");
        self.worker.config.restarts = self.worker.config.restarts.saturating_add(1);
        let now = Instant::now();
        let lived = self
            .worker
            .started
            .map(|at| now.saturating_duration_since(at));
        if lived.is_some_and(|lived| lived < SHORT_LIFE) {
            self.worker.short_lives = self.worker.short_lives.saturating_add(1);
        } else {
            self.worker.short_lives = 0;
        }
        let doublings = self.worker.short_lives.saturating_sub(PATIENCE);
        if doublings == 0 {
            self.start_worker();
        } else {
            let pause = FIRST_PAUSE.saturating_mul(1 << doublings.min(10));
            self.worker.restart_at = now.checked_add(pause.min(LONGEST_PAUSE));
        }
        self.add_event(What::WorkerReplaced(v1::WorkerReplaced { reason }));
    }

    /// Takes the channels that the worker has passed on.
    pub(super) fn take_channels(&mut self) {
        for _ in 0..TAKEN {
            let Some(control) = &self.worker.control else {
                return;
            };
            match receive_channel(control) {
                Ok(Some(channel)) => self.add_channel(channel),
                // The worker is gone; its end is told by a signal.
                Ok(None) => {
                    self.worker.control = None;
                    return;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(error) => {
                    crate::log!("cannot take a channel of the worker: {error}");
                    return;
                }
            }
        }
    }
}

/// One channel out of the control socket; `None` at its end.
fn receive_channel(control: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    loop {
        let mut byte = [0_u8; 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::net::recvmsg(
            control.as_fd(),
            &mut [IoSliceMut::new(&mut byte)],
            &mut ancillary,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message
                && let Some(channel) = descriptors.next()
            {
                return Ok(Some(channel));
            }
        }
        if got.bytes == 0 {
            return Ok(None);
        }
    }
}

/// The kernel is not to choose the worker when memory runs out. PID 1 it never does.
fn protect(pid: i32) {
    let path = format!("/proc/{pid}/oom_score_adj");
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    let written = rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .and_then(|file| rustix::io::write(file, b"-1000"));
    if let Err(error) = written {
        crate::log!("cannot protect the worker from the out-of-memory killer: {error}");
    }
}
