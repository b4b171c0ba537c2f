//! What is done to a sandbox from outside, by whoever finds it: start, stop, pause, resume, remove.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use belljar_protocol::{client, v1};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::assets::Assets;
use crate::ending::{Ended, Meaning};
use crate::poll::PollSet;
use crate::registry::{Found, State};
use crate::sandbox::{BootError, Limits, Programs, Sandbox};
use crate::stages::Stages;
use crate::state::spec::{Life, now_ms};
use crate::state::{ENDED, ProcessRecord, StateError};
use crate::vmm::{self, ApiError};

/// A supervisor writes down an end and leaves within this time.
const SUPERVISOR_PATIENCE: Duration = Duration::from_secs(10);
/// An API that has a thread of its own answers within this time.
const API_PATIENCE: Duration = Duration::from_secs(2);
/// Pausing waits for disk requests that are under way.
const PAUSE_PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 20_000 });

/// Something could not be done to a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum LifeError {
    #[error("sandbox {id} is {} already", state.word())]
    Already { id: String, state: State },
    #[error("sandbox {id} is {}", state.word())]
    WrongState { id: String, state: State },
    #[error("sandbox {0}: somebody else is starting, stopping, removing or saving it")]
    Busy(String),
    #[error("sandbox {0} goes away with its guest, and cannot be started again")]
    Ephemeral(String),
    #[error("sandbox {0} is half way back to a snapshot: whoever was resetting it has gone")]
    HalfReset(String),
    #[error("sandbox {id} did not end within {} s", limit.as_secs_f32())]
    StillRuns { id: String, limit: Duration },
    #[error("sandbox {id}: {source}")]
    Api { id: String, source: ApiError },
    #[error(transparent)]
    State(#[from] StateError),
}

impl LifeError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Already { .. } => None,
            Self::WrongState { id, state } => Some(state.remedy(id).unwrap_or_else(|| {
                if state.is_up() {
                    format!("'belljar stop {id}' stops it; 'rm -f' removes a running one")
                } else {
                    format!("'belljar start {id}' starts it")
                }
            })),
            Self::Ephemeral(_) => {
                Some("one made by 'create', or by 'run --name', stays".to_owned())
            }
            Self::HalfReset(id) => Some(format!("'belljar reset {id}' brings it there")),
            Self::Busy(id) => Some(format!(
                "try again; 'belljar stop --force {id}' waits for nobody"
            )),
            Self::StillRuns { id, .. } => Some(format!(
                "'belljar stop --force {id}' does not ask the guest"
            )),
            Self::Api { id, .. } => Some(format!("'belljar debug state {id}' tells more")),
            Self::State(_) => Some("'belljar doctor' checks the state directory".to_owned()),
        }
    }
}

/// Starts a sandbox that was created, or that ended. The caller decides whether it stays its owner or
/// releases it. Of two at the same time one wins.
///
/// # Errors
/// It runs already, or why it did not come up.
pub fn start(
    found: &Found,
    programs: &Programs,
    assets: &Assets,
    limits: Limits<'_>,
    stages: &mut Stages,
) -> Result<Sandbox, StartError> {
    let Some(lock) = found.dir().lock_soon().map_err(LifeError::from)? else {
        let id = found.called();
        return Err(match found.state() {
            state if state.is_up() => LifeError::Already { id, state },
            _ => LifeError::Busy(id),
        }
        .into());
    };
    let state = found.state_while_locked();
    match state {
        State::Created | State::Stopped(_) | State::Crashed(_) if is_persistent(found) => {}
        state => {
            let id = found.called();
            return Err(LifeError::WrongState { id, state }.into());
        }
    }
    Ok(Sandbox::start(
        found.dir(),
        lock,
        programs,
        assets,
        limits,
        stages,
    )?)
}

/// Ends the guest, if one runs, and starts it anew. What is on its disk stays; memory and what runs does not.
///
/// # Errors
/// It would go away with its guest, could not be ended, or does not come up again: then it is stopped.
pub fn restart(
    found: &Found,
    how: Stop,
    programs: &Programs,
    assets: &Assets,
    limits: Limits<'_>,
    stages: &mut Stages,
) -> Result<Restarted, StartError> {
    // Before anything is lost.
    if !is_persistent(found) {
        return Err(LifeError::Ephemeral(found.called()).into());
    }
    let stopped = match found.state() {
        State::Created | State::Stopped(_) | State::Crashed(_) => None,
        _ => Some(stop(found, how)?),
    };
    let sandbox = start(found, programs, assets, limits, stages)?;
    Ok(Restarted { stopped, sandbox })
}

/// A sandbox whose guest was started anew.
#[derive(Debug)]
pub struct Restarted {
    /// How the earlier guest was ended; `None`: none ran.
    pub stopped: Option<Stopped>,
    pub sandbox: Sandbox,
}

/// A sandbox could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Life(#[from] LifeError),
    #[error(transparent)]
    Boot(#[from] BootError),
}

/// How a guest is to end.
#[derive(Debug, Clone, Copy)]
pub struct Stop {
    /// Ask the guest, so that its programs end in order and its disk is clean.
    pub ask: bool,
    /// Between SIGTERM and SIGKILL to what runs in the guest; `None`: as the agent thinks.
    pub grace: Option<Duration>,
    /// A guest that was asked and has not ended by then is killed.
    pub limit: Duration,
}

impl Stop {
    /// Without asking.
    pub const FORCE: Self = Self {
        ask: false,
        grace: None,
        limit: Duration::ZERO,
    };
}

/// How a guest was ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped {
    /// It ended by itself after it was asked.
    pub in_order: bool,
    /// The record; `None` if it went away with the sandbox.
    pub ended: Option<Box<Ended>>,
}

/// Ends the guest and waits until its end is written down. One that is asked ends after a snapshot that is being
/// taken of it; one that is not asked ends at once, and the snapshot fails.
///
/// # Errors
/// It does not run, or cannot be ended.
pub fn stop(found: &Found, how: Stop) -> Result<Stopped, LifeError> {
    let _turn = match how.ask && found.state().is_up() {
        true => Some(turn(found)?),
        false => None,
    };
    let id = found.called();
    let state = found.state();
    let Some(vmm) = state.vmm() else {
        return Err(match state {
            State::Busy => LifeError::Busy(id),
            State::Stopped(_) | State::Created => LifeError::Already { id, state },
            state => LifeError::WrongState { id, state },
        });
    };
    if let State::Orphaned(vmm) = state {
        return end_orphan(found, vmm);
    }
    let Some(process) = open_process(vmm) else {
        return settle(found, true);
    };
    let mut in_order = false;
    if how.ask {
        if matches!(state, State::Paused(_)) {
            let _ = set_running(found);
        }
        in_order = ask_to_end(found, &process, how);
    }
    if !in_order {
        end_by_force(found, &process)?;
    }
    settle(found, in_order)
}

/// Asks the agent; whether the VMM ended by the limit.
fn ask_to_end(found: &Found, vmm: &OwnedFd, how: Stop) -> bool {
    let deadline = Instant::now() + how.limit;
    let asked = found.agent(deadline).ok().and_then(|stream| {
        let mode = v1::shutdown::Mode::PowerOff;
        client::shutdown(stream, mode, how.grace, Some(deadline)).ok()
    });
    // A guest that is switching itself off may cut the answer.
    let patience = if asked.is_some() {
        deadline
    } else {
        Instant::now() + API_PATIENCE
    };
    has_ended(vmm, patience)
}

/// Stops the VMM through its API, else kills it, else its supervisor, which takes it along.
fn end_by_force(found: &Found, vmm: &OwnedFd) -> Result<(), LifeError> {
    let stop = br#"{"action_type":"Stop"}"#;
    let _ = call(found, "PUT", "/actions", stop, API_PATIENCE);
    if has_ended(vmm, Instant::now() + API_PATIENCE) {
        return Ok(());
    }
    let _ = pidfd_send_signal(vmm, Signal::KILL);
    if has_ended(vmm, Instant::now() + SUPERVISOR_PATIENCE) {
        return Ok(());
    }
    Err(LifeError::StillRuns {
        id: found.called(),
        limit: SUPERVISOR_PATIENCE,
    })
}

/// Waits for the supervisor to write down the end and to leave.
fn settle(found: &Found, in_order: bool) -> Result<Stopped, LifeError> {
    let supervisor = found
        .owner()
        .and_then(|owner| open_process(owner.supervisor));
    if let Some(supervisor) = supervisor
        && !has_ended(&supervisor, Instant::now() + SUPERVISOR_PATIENCE)
        // One that an owner still holds waits for that owner.
        && found.dir().read_record::<Ended>(ENDED)?.is_none()
    {
        // It hangs, which nothing but its own bug can cause.
        let _ = pidfd_send_signal(&supervisor, Signal::KILL);
        let _ = has_ended(&supervisor, Instant::now() + SUPERVISOR_PATIENCE);
    }
    let ended = found.dir().read_record(ENDED).unwrap_or_default();
    Ok(Stopped { in_order, ended })
}

/// A VMM without a supervisor has nobody who would write down its end.
fn end_orphan(found: &Found, vmm: ProcessRecord) -> Result<Stopped, LifeError> {
    let Some(_lock) = found.dir().lock_soon()? else {
        return Err(LifeError::Busy(found.called()));
    };
    if let Some(process) = open_process(vmm) {
        let _ = pidfd_send_signal(&process, Signal::KILL);
        let _ = has_ended(&process, Instant::now() + SUPERVISOR_PATIENCE);
    }
    let ended = Ended {
        version: 1,
        meaning: Meaning::TornDown,
        at_ms: now_ms(),
        ..Ended::default()
    };
    found.dir().write_record(ENDED, &ended)?;
    Ok(Stopped {
        in_order: false,
        ended: Some(Box::new(ended)),
    })
}

/// Removes a sandbox; `force` ends one that runs.
///
/// # Errors
/// It runs, somebody else has it in hand, or something in it cannot be removed.
pub fn remove(found: &Found, force: bool) -> Result<(), LifeError> {
    let state = found.state();
    if state.vmm().is_some() {
        if !force {
            let id = found.called();
            return Err(LifeError::WrongState { id, state });
        }
        stop(found, Stop::FORCE)?;
    }
    if !found.dir().path().exists() {
        return Ok(());
    }
    let Some(lock) = found.dir().lock_within(SUPERVISOR_PATIENCE)? else {
        return Err(LifeError::Busy(found.called()));
    };
    let removed = found.dir().remove();
    drop(lock);
    Ok(removed?)
}

/// Stops the vCPUs.
///
/// # Errors
/// It does not run, its VMM refuses, or a snapshot of it is being taken.
pub fn pause(found: &Found) -> Result<(), LifeError> {
    let _turn = turn(found)?;
    set_paused(found)
}

/// Lets the vCPUs go on.
///
/// # Errors
/// It does not run, its VMM refuses, or a snapshot of it is being taken.
pub fn resume(found: &Found) -> Result<(), LifeError> {
    let _turn = turn(found)?;
    set_running(found)
}

/// A guest that is held still for a snapshot must stay so.
fn turn(found: &Found) -> Result<File, LifeError> {
    let turn = found.dir().capture_turn(PAUSE_PATIENCE)?;
    turn.ok_or_else(|| LifeError::Busy(found.called()))
}

/// Stops the vCPUs, for whoever holds the sandbox's capture lock.
pub(crate) fn set_paused(found: &Found) -> Result<(), LifeError> {
    set_state(found, br#"{"state":"Paused"}"#)
}

/// Lets the vCPUs go on, for whoever holds the sandbox's capture lock.
pub(crate) fn set_running(found: &Found) -> Result<(), LifeError> {
    if found.is_half_reset() {
        return Err(LifeError::HalfReset(found.called()));
    }
    set_running_again(found)
}

/// Lets the vCPUs go on after the guest went back to a snapshot.
pub(crate) fn set_running_again(found: &Found) -> Result<(), LifeError> {
    set_state(found, br#"{"state":"Resumed"}"#)
}

fn set_state(found: &Found, body: &[u8]) -> Result<(), LifeError> {
    let state = found.state();
    let id = found.called();
    if !state.is_up() {
        return Err(LifeError::WrongState { id, state });
    }
    call(found, "PATCH", "/vm", body, PAUSE_PATIENCE)
        .map_err(|source| LifeError::Api { id, source })?;
    Ok(())
}

fn call(
    found: &Found,
    method: &'static str,
    path: &str,
    body: &[u8],
    limit: Duration,
) -> Result<vmm::Response, ApiError> {
    let mut api = found.api()?;
    vmm::request(&mut api, method, path, body, Instant::now() + limit)
}

/// A descriptor of exactly the recorded process: taken first, then the record compared.
pub(crate) fn open_process(process: ProcessRecord) -> Option<OwnedFd> {
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    process.is_alive().then_some(pidfd)
}

/// Waits for the end of a process.
pub(crate) fn has_ended(process: &OwnedFd, deadline: Instant) -> bool {
    let mut set = PollSet::default();
    let slot = set.readable(process.as_fd());
    set.wait(Some(deadline))
        .is_ok_and(|polled| polled.is_ready(slot))
}

/// Whether a sandbox stays when its guest has ended.
#[must_use]
pub fn is_persistent(found: &Found) -> bool {
    let spec = found.spec().ok().flatten();
    spec.is_some_and(|spec| spec.life == Life::Persistent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::spec::SandboxSpec;
    use crate::state::{CONFIG, OWNER, Owner, StateRoot};
    use std::process::{Child, Command};

    /// Ends what stands for a VMM.
    struct Ends(Child);

    impl Drop for Ends {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn who_stops_in_order_waits_for_a_snapshot_and_force_does_not() {
        let place = tempfile::tempdir().unwrap();
        let root = StateRoot::at(place.path()).unwrap();
        let (dir, _lock) = root.create().unwrap();
        let spec = SandboxSpec {
            life: Life::Persistent,
            ..SandboxSpec::default()
        };
        dir.write_record(CONFIG, &spec).unwrap();
        let mut vmm = Ends(Command::new("sleep").arg("600").spawn().unwrap());
        let process = ProcessRecord::of(vmm.0.id()).unwrap();
        dir.write_record(OWNER, &Owner::new(process, Some(process), false))
            .unwrap();
        let found = Found::at(dir.clone());
        let ask = Stop {
            ask: true,
            ..Stop::FORCE
        };
        let turn = dir.capture_turn(Duration::ZERO).unwrap();
        assert!(turn.is_some());
        let error = stop(&found, ask).unwrap_err();
        assert!(matches!(error, LifeError::Busy(_)), "{error}");
        let remedy = error.remedy().unwrap();
        assert!(remedy.contains("stop --force"), "{remedy}");
        assert!(vmm.0.try_wait().unwrap().is_none(), "it was stopped");
        assert!(stop(&found, Stop::FORCE).is_ok());
        assert!(vmm.0.try_wait().unwrap().is_some(), "it was not stopped");
    }
}
