//! What state a sandbox is in, from its directory alone: also after crashes and reboots.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::ending::Ended;
use crate::state::spec::{Life, SandboxSpec};
use crate::state::{
    CONFIG, Condition, ENDED, Leftover, OWNER, Owner, ProcessRecord, SandboxDir, StateError,
};

/// The state of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Somebody is making, starting or removing it at this moment.
    Busy,
    /// Ready to be started, and never was.
    Created,
    Running(ProcessRecord),
    /// Its vCPUs stand still.
    Paused(ProcessRecord),
    /// It ended, and can be started again.
    Stopped(Box<Ended>),
    /// It ended against everybody's will, and nobody wrote down how.
    Crashed(&'static str),
    /// Its VMM runs without a supervisor.
    Orphaned(ProcessRecord),
    /// Whoever was making it died before it was ready.
    HalfMade,
    /// Whoever was removing it died.
    HalfRemoved,
    /// It was to go away when it ended, and did not.
    Left(Box<Ended>),
    /// Its directory cannot be read.
    Unreadable(String),
}

impl State {
    /// One word.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Created => "created",
            Self::Running(_) => "running",
            Self::Paused(_) => "paused",
            Self::Stopped(_) => "stopped",
            Self::Crashed(_) => "crashed",
            Self::Orphaned(_) => "orphaned",
            Self::HalfMade => "half-made",
            Self::HalfRemoved => "half-removed",
            Self::Left(_) => "ended",
            Self::Unreadable(_) => "unreadable",
        }
    }

    /// What the word does not say; empty if nothing.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::Busy => "somebody is making, starting or removing it".to_owned(),
            Self::Created | Self::Running(_) | Self::Paused(_) => String::new(),
            Self::Stopped(ended) => ended.meaning.to_string(),
            Self::Crashed(why) => (*why).to_owned(),
            Self::Orphaned(vmm) => format!(
                "its supervisor was killed, its VMM (pid {}) still runs",
                vmm.pid
            ),
            Self::HalfMade => "it was never completely made".to_owned(),
            Self::HalfRemoved => "its removal was not finished".to_owned(),
            Self::Left(ended) => format!("{}, and nobody removed it", ended.meaning),
            Self::Unreadable(error) => error.clone(),
        }
    }

    /// What can be done about it; `None` if it is a state that sandboxes ought to be in.
    #[must_use]
    pub fn remedy(&self, id: &str) -> Option<String> {
        match self {
            Self::Busy | Self::Created | Self::Running(_) | Self::Paused(_) | Self::Stopped(_) => {
                None
            }
            Self::Crashed(_) => Some(format!(
                "'belljar start {id}' starts a persistent one again, 'belljar rm {id}' removes it"
            )),
            Self::Orphaned(_) => Some(format!("'belljar rm -f {id}' ends and removes it")),
            Self::HalfMade | Self::HalfRemoved | Self::Left(_) | Self::Unreadable(_) => Some(
                format!("'belljar rm {id}' or 'belljar doctor --clean' removes what is left"),
            ),
        }
    }

    /// The VMM's process, if it runs.
    #[must_use]
    pub fn vmm(&self) -> Option<ProcessRecord> {
        match self {
            Self::Running(vmm) | Self::Paused(vmm) | Self::Orphaned(vmm) => Some(*vmm),
            _ => None,
        }
    }

    /// Its guest exists, be it paused.
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(self, Self::Running(_) | Self::Paused(_))
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

/// What the directory says. A paused guest is told from a running one by its VMM only, which is not asked here.
pub(super) fn read(dir: &SandboxDir, spec: Option<&SandboxSpec>) -> State {
    let condition = match dir.condition() {
        Ok(condition) => condition,
        // It was removed between two looks.
        Err(_) if !dir.path().exists() => return State::HalfRemoved,
        Err(error) => return State::Unreadable(error.to_string()),
    };
    let left = match condition {
        Condition::Owned(owner) => return of_owned(owner, dir),
        Condition::Left(_) if dir.is_being_removed() => return State::HalfRemoved,
        Condition::Left(left) => left,
    };
    of_left(left, spec)
}

/// The state of a sandbox that nobody owns, or whose lock the caller has taken.
pub(super) fn of_left(left: Leftover, spec: Option<&SandboxSpec>) -> State {
    let Some(spec) = spec else {
        return match left {
            Leftover::VmmAlone(vmm) => State::Orphaned(vmm),
            _ => State::HalfMade,
        };
    };
    let stays = spec.life == Life::Persistent;
    match left {
        Leftover::Rebooted => State::Crashed("this machine was booted again while it ran"),
        Leftover::SupervisorDied => {
            State::Crashed("its supervisor was killed, and its VMM with it")
        }
        Leftover::VmmAlone(vmm) => State::Orphaned(vmm),
        Leftover::EndedUnremoved(ended) if stays => State::Stopped(ended),
        Leftover::EndedUnremoved(ended) => State::Left(ended),
        Leftover::NeverStarted if stays => State::Created,
        Leftover::NeverStarted => State::Crashed("whoever was starting it died"),
    }
}

fn of_owned(owner: Option<Owner>, dir: &SandboxDir) -> State {
    // A record of an earlier start may still be there while the next one begins.
    let Some(vmm) = owner.and_then(|owner| {
        let current = owner.boot_id == crate::state::boot_id();
        owner.vmm.filter(|vmm| current && vmm.is_alive())
    }) else {
        return State::Busy;
    };
    match dir.read_record::<Ended>(ENDED) {
        Ok(None) => State::Running(vmm),
        _ => State::Busy,
    }
}

/// The configuration of the sandbox, if it is complete.
pub(super) fn read_spec(dir: &SandboxDir) -> Result<Option<SandboxSpec>, StateError> {
    dir.read_record(CONFIG)
}

/// Who owns it, as recorded.
pub(super) fn read_owner(dir: &SandboxDir) -> Option<Owner> {
    dir.read_record(OWNER).ok().flatten()
}
