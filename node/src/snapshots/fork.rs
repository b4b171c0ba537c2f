//! Clones of a sandbox that is up: it stands still once, and all of them share one template.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use belljar_keeper::client::Keeper;
use rustix::fs::{SealFlags, fcntl_add_seals};

use super::SnapshotError;
use super::capture::{What, take};
use super::error::io_failed;
use super::restore::{Host, NewClone, Source, restore};
use crate::registry::Found;
use crate::stages::Stages;
use crate::state::spec::Life;

/// Clones that are made at the same time, for each of the host's processors.
const AT_ONCE: usize = 2;

/// The clones that are wanted.
#[derive(Debug, Clone)]
pub struct Fork {
    pub count: u32,
    /// `None`: they have no names, and go away with their guests. Else `NAME` if there is one, `NAME-1` and
    /// so on if there are several; they stay.
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
}

/// What became of a fork.
#[derive(Debug, Clone, Default)]
pub struct Forked {
    /// In the order in which they came up.
    pub ids: Vec<String>,
    /// How long the parent's programs stood still, and its processors.
    pub frozen: Duration,
    pub paused: Duration,
}

/// Makes clones, several at a time. `made` is told each one's id, and what it could not be given
/// ([`crate::sandbox::Sandbox::warnings`]).
///
/// # Errors
/// The first that could not be made; no further ones are begun then, and those that came up run.
pub fn fork(
    host: Host<'_>,
    keeper: &Keeper,
    found: &Found,
    fork: &Fork,
    made: impl FnMut(&str, &[String]) + Send,
) -> Result<Forked, SnapshotError> {
    let mut client = keeper.connect()?;
    let image = take(found, &mut client, What::Whole)?;
    let (frozen, paused) = (image.frozen, image.paused);
    for file in image.memory.iter().chain([&image.state]) {
        // The parent's VMM wrote it, and may have it open still.
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(file, seals)
            .map_err(|errno| io_failed("seal the memory that clones share")(errno.into()))?;
    }
    let source = Source {
        saved: image.saved,
        snapshot: None,
        machine: image.memory.map(|memory| (image.state, memory)),
        handler: None,
        working_set: None,
        records: None,
        ready: Mutex::default(),
        disk: image.disk,
        base_images: BTreeMap::new(),
        hot: true,
    };
    let next = AtomicU32::new(1);
    let outcome = Mutex::new((made, Vec::new(), None));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number > fork.count {
                return;
            }
            let one = make_one(host, &source, fork, number);
            let mut outcome = outcome
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let (made, ids, failed) = &mut *outcome;
            match one {
                Ok((id, warnings)) => {
                    made(&id, &warnings);
                    ids.push(id);
                }
                Err(error) => {
                    next.store(fork.count.saturating_add(1), Ordering::Relaxed);
                    failed.get_or_insert(error);
                }
            }
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = processors
        .saturating_mul(AT_ONCE)
        .min(usize::try_from(fork.count).unwrap_or(1));
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    let (_, ids, failed) = outcome
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    match failed {
        Some(error) => Err(error),
        None => Ok(Forked {
            ids,
            frozen,
            paused,
        }),
    }
}

fn make_one(
    host: Host<'_>,
    source: &Source,
    fork: &Fork,
    number: u32,
) -> Result<(String, Vec<String>), SnapshotError> {
    let name = fork.name.as_ref().map(|name| match fork.count {
        1 => name.clone(),
        _ => format!("{name}-{number}"),
    });
    let clone = NewClone {
        life: if name.is_some() {
            Life::Persistent
        } else {
            Life::Detached
        },
        name,
        labels: fork.labels.clone(),
    };
    let mut stages = Stages::new(Instant::now());
    let sandbox = restore(host, source, &clone, &mut stages)?;
    let warnings = sandbox.warnings().to_vec();
    Ok((sandbox.release()?.id().to_owned(), warnings))
}
