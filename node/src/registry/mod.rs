//! Finding sandboxes: by id, by name, or by the beginning of either; and reaching the guest inside.

mod condition;
mod reach;

use crate::state::spec::SandboxSpec;
use crate::state::{Gone, Owner, SandboxDir, StateError, StateRoot};

pub use condition::State;
pub use reach::{ConnectError, SocketPath};

/// Names that are listed in a message at most.
const LISTED: usize = 8;

/// A sandbox that exists. Finding it reads nothing but directories; what it is and how it does is read
/// when asked for.
#[derive(Debug, Clone)]
pub struct Found {
    dir: SandboxDir,
}

/// A word does not mean exactly one sandbox.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error("there is no sandbox '{word}'")]
    Unknown {
        word: String,
        /// Names and ids that look like it.
        similar: Vec<String>,
    },
    #[error("sandbox {} is gone: {}", .0.called(), .0.ended.meaning)]
    Gone(Box<Gone>),
    #[error("'{word}' could be any of: {}", matches.join(", "))]
    Ambiguous { word: String, matches: Vec<String> },
    #[error(transparent)]
    State(#[from] StateError),
}

impl FindError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Unknown { similar, .. } if !similar.is_empty() => {
                format!(
                    "did you mean {}? 'belljar ls -a' lists all sandboxes",
                    similar.join(" or ")
                )
            }
            Self::Unknown { .. } => "'belljar ls -a' lists all sandboxes".to_owned(),
            Self::Gone(gone) => gone_remedy(gone),
            Self::Ambiguous { .. } => "write more of the name or id".to_owned(),
            Self::State(_) => "'belljar doctor' checks the state directory".to_owned(),
        }
    }
}

/// What the user can do about a sandbox that is gone.
fn gone_remedy(gone: &Gone) -> String {
    format!(
        "{} has the last lines of its console and its VMM's log; a sandbox with a --name stays, and can be looked at and started again",
        gone.path.display()
    )
}

/// The sandbox that `word` means: its id or name, or the beginning of one if only one begins so.
///
/// # Errors
/// None, or more than one.
pub fn find(root: &StateRoot, word: &str) -> Result<Found, FindError> {
    if let Some(dir) = root.named(word).or_else(|| root.with_id(word)) {
        return Ok(Found { dir });
    }
    let names = root.names();
    let dirs = root.list()?;
    let mut ids: Vec<&str> = names
        .iter()
        .filter(|(name, _)| name.starts_with(word))
        .map(|(_, id)| id.as_str())
        .chain(
            dirs.iter()
                .map(SandboxDir::id)
                .filter(|id| id.starts_with(word)),
        )
        .collect();
    ids.sort_unstable();
    ids.dedup();
    let called = |id: &str| {
        let name = names.iter().find(|(_, of)| of == id);
        name.map_or_else(|| id.to_owned(), |(name, _)| name.clone())
    };
    match ids.as_slice() {
        [id] if !word.is_empty() => {
            let dir = dirs.iter().find(|dir| dir.id() == *id).cloned();
            let path = root.dir().join(id);
            Ok(Found {
                dir: dir.unwrap_or_else(|| SandboxDir::existing(&path)),
            })
        }
        [] | [_] => Err(match root.gone(word) {
            Some(gone) => FindError::Gone(Box::new(gone)),
            None => FindError::Unknown {
                word: word.to_owned(),
                similar: similar(word, names.iter().map(|(name, _)| name.as_str())),
            },
        }),
        many => {
            let mut matches: Vec<String> = many.iter().map(|id| called(id)).collect();
            matches.sort_unstable();
            matches.truncate(LISTED);
            Err(FindError::Ambiguous {
                word: word.to_owned(),
                matches,
            })
        }
    }
}

/// Every sandbox there is, the oldest first.
///
/// # Errors
/// The state directory cannot be read.
pub fn list(root: &StateRoot) -> Result<Vec<Listed>, StateError> {
    let mut all: Vec<Listed> = root
        .list()?
        .into_iter()
        .map(|dir| Found { dir }.look())
        .collect();
    all.sort_by_key(|listed| (listed.created_ms(), listed.found.id().to_owned()));
    Ok(all)
}

/// A sandbox with what was read about it.
#[derive(Debug, Clone)]
pub struct Listed {
    pub found: Found,
    pub state: State,
    /// `None`: it is not complete.
    pub spec: Option<SandboxSpec>,
}

impl Listed {
    /// Its name, or its id.
    #[must_use]
    pub fn called(&self) -> &str {
        let name = self.spec.as_ref().and_then(|spec| spec.name.as_deref());
        name.unwrap_or(self.found.id())
    }

    /// Milliseconds since 1970.
    #[must_use]
    pub fn created_ms(&self) -> u64 {
        self.spec.as_ref().map_or(0, |spec| spec.created_ms)
    }

    /// Whether it has the label; `None` as value: with any value.
    #[must_use]
    pub fn has_label(&self, key: &str, value: Option<&str>) -> bool {
        let labels = self.spec.as_ref().map(|spec| &spec.labels);
        labels
            .and_then(|labels| labels.get(key))
            .is_some_and(|is| value.is_none_or(|v| v == is))
    }
}

impl Found {
    /// The sandbox in this directory.
    #[must_use]
    pub fn at(dir: SandboxDir) -> Self {
        Self { dir }
    }

    #[must_use]
    pub fn dir(&self) -> &SandboxDir {
        &self.dir
    }

    #[must_use]
    pub fn id(&self) -> &str {
        self.dir.id()
    }

    /// What it is; `None` if it is not complete.
    ///
    /// # Errors
    /// Its configuration cannot be read.
    pub fn spec(&self) -> Result<Option<SandboxSpec>, StateError> {
        condition::read_spec(&self.dir)
    }

    /// Its supervisor and VMM as recorded at its last start.
    #[must_use]
    pub fn owner(&self) -> Option<Owner> {
        condition::read_owner(&self.dir)
    }

    /// Its state, asking its VMM whether the guest is paused.
    #[must_use]
    pub fn state(&self) -> State {
        self.look().state
    }

    /// Its state, for whoever has taken its lock.
    #[must_use]
    pub fn state_while_locked(&self) -> State {
        let spec = condition::read_spec(&self.dir).ok().flatten();
        condition::of_left(self.dir.leftover(), spec.as_ref())
    }

    /// All about it.
    #[must_use]
    pub fn look(self: &Found) -> Listed {
        let spec = condition::read_spec(&self.dir).ok().flatten();
        let state = match condition::read(&self.dir, spec.as_ref()) {
            State::Running(vmm) if reach::is_paused(&self.dir) => State::Paused(vmm),
            other => other,
        };
        Listed {
            found: self.clone(),
            state,
            spec,
        }
    }
}

/// Words that differ from `word` by little.
fn similar<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Vec<String> {
    let allowed = 1 + word.len() / 4;
    let mut close: Vec<(usize, &str)> = candidates
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .collect();
    close.sort_unstable();
    close
        .into_iter()
        .take(2)
        .map(|(_, word)| word.to_owned())
        .collect()
}

/// Levenshtein's distance in bytes; for words of bounded length.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, byte) in a.bytes().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (j, other) in b.bytes().enumerate() {
            let Some(cell) = row.get_mut(j + 1) else {
                break;
            };
            let cost = diagonal + usize::from(byte != other);
            diagonal = *cell;
            left = cost.min(left + 1).min(*cell + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests;
