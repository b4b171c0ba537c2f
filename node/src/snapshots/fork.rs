//! Clones of a sandbox that is up: it stands still once, and all of them share one template.

use std::collections::BTreeMap;
use std::time::Duration;

use belljar_keeper::client::Keeper;

use super::SnapshotError;
use super::capture::take;
use super::restore::{NewClone, Source, restore};
use crate::assets::Assets;
use crate::registry::Found;
use crate::sandbox::{Limits, Programs};
use crate::stages::Stages;
use crate::state::StateRoot;
use crate::state::spec::Life;

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
    pub ids: Vec<String>,
    /// How long the parent's programs stood still, and its processors.
    pub frozen: Duration,
    pub paused: Duration,
}

/// Makes clones. `made` is told each one's id.
///
/// # Errors
/// The first that could not be made; those before it run.
pub fn fork(
    root: &StateRoot,
    programs: &Programs,
    assets: &Assets,
    keeper: &Keeper,
    found: &Found,
    fork: &Fork,
    limits: Limits<'_>,
    mut made: impl FnMut(&str),
) -> Result<Forked, SnapshotError> {
    let mut client = keeper.connect()?;
    let image = take(found, &mut client, false)?;
    let mut forked = Forked {
        ids: Vec::new(),
        frozen: image.frozen,
        paused: image.paused,
    };
    let source = Source {
        saved: image.saved,
        snapshot: None,
        machine: image.memory.map(|memory| (image.state, memory)),
        disk: image.disk,
        base_images: BTreeMap::new(),
        hot: true,
    };
    for number in 1..=fork.count {
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
        let mut stages = Stages::new(std::time::Instant::now());
        let sandbox = restore(root, programs, &source, &clone, assets, limits, &mut stages)?;
        let dir = sandbox.release()?;
        made(dir.id());
        forked.ids.push(dir.id().to_owned());
    }
    Ok(forked)
}
