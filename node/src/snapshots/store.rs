//! What is stored, by way of the keeper.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use belljar_keeper::client::{Client, Keeper, KeeperError};
use belljar_keeper::v1::{self as keeper, reply::Result as Answer, request::Call};

use super::Origin;
use crate::registry;
use crate::state::{StateError, StateRoot};

/// The store of a state root.
#[derive(Debug)]
pub struct Stores {
    client: Client,
}

/// Snapshots that sandboxes come from: these are not removed.
///
/// # Errors
/// The state directory cannot be read.
pub fn live(root: &StateRoot) -> Result<Vec<String>, StateError> {
    let mut live = Vec::new();
    for listed in registry::list(root)? {
        // One that cannot be read may come from any of them.
        live.extend(Origin::of(&listed.found)?.snapshot);
    }
    Ok(live)
}

macro_rules! ask {
    ($self:expr, $call:expr, $with:expr, $meanwhile:expr, $pattern:pat => $value:expr) => {
        match $self.client.call($call, $with, $meanwhile)? {
            ($pattern, _) => Ok($value),
            _ => Err(KeeperError::Unexpected),
        }
    };
}

/// Passes progress on.
fn passing(mut progress: impl FnMut(u64, u64)) -> impl FnMut(Answer) {
    move |answer| {
        if let Answer::Progress(so_far) = answer {
            progress(so_far.done, so_far.total);
        }
    }
}

impl Stores {
    /// Connects to the keeper, starting it if need be.
    ///
    /// # Errors
    /// It does not come up.
    pub fn connect(keeper: &Keeper) -> Result<Self, KeeperError> {
        Ok(Self {
            client: keeper.connect()?,
        })
    }

    /// All snapshots, oldest first; those that are still being stored last.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn list(&mut self) -> Result<Vec<keeper::Snapshot>, KeeperError> {
        let mut all = Vec::new();
        let call = Call::List(keeper::List {});
        let mut collect = |answer| {
            if let Answer::Item(snapshot) = answer {
                all.push(snapshot);
            }
        };
        ask!(self, call, &[], &mut collect, Answer::Done(_) => ())?;
        Ok(all)
    }

    /// All about one.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn describe(&mut self, snapshot: &str) -> Result<keeper::Description, KeeperError> {
        let call = Call::Describe(keeper::Describe {
            snapshot: snapshot.to_owned(),
        });
        ask!(self, call, &[], |_| {}, Answer::Description(description) => description)
    }

    /// Removes one from the list; its chunks go with the next collection.
    ///
    /// # Errors
    /// It is named, pinned or in use.
    pub fn remove(&mut self, snapshot: &str, live: Vec<String>) -> Result<(), KeeperError> {
        let call = Call::Remove(keeper::Remove {
            snapshot: snapshot.to_owned(),
            live,
        });
        ask!(self, call, &[], |_| {}, Answer::Done(_) => ())
    }

    /// Changes tags, labels (an empty value takes one away) and the pin.
    ///
    /// # Errors
    /// There is no such snapshot, or a name cannot be.
    pub fn mark(
        &mut self,
        snapshot: &str,
        add_tags: Vec<String>,
        remove_tags: Vec<String>,
        labels: BTreeMap<String, String>,
        pinned: Option<bool>,
    ) -> Result<(), KeeperError> {
        let call = Call::Mark(keeper::Mark {
            snapshot: snapshot.to_owned(),
            add_tags,
            remove_tags,
            pinned,
            labels,
        });
        ask!(self, call, &[], |_| {}, Answer::Done(_) => ())
    }

    /// What is used, and by which snapshot.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn usage(&mut self) -> Result<keeper::Usage, KeeperError> {
        let call = Call::Usage(keeper::GetUsage {});
        let mut all = Vec::new();
        let mut collect = |answer| {
            if let Answer::Item(snapshot) = answer {
                all.push(snapshot);
            }
        };
        let mut usage = ask!(self, call, &[], &mut collect, Answer::Usage(usage) => usage)?;
        usage.snapshots.append(&mut all);
        Ok(usage)
    }

    /// Reads everything and compares it with its name. Progress counts packs.
    ///
    /// # Errors
    /// The store cannot be read; damage is in the result.
    pub fn verify(
        &mut self,
        progress: impl FnMut(u64, u64),
    ) -> Result<keeper::Verified, KeeperError> {
        let call = Call::Verify(keeper::Verify {});
        ask!(self, call, &[], passing(progress), Answer::Verified(verified) => verified)
    }

    /// Collects garbage that has waited for `grace_ms`; `evict`: removes snapshots that nobody named, oldest first,
    /// until the budget suffices.
    ///
    /// # Errors
    /// A manifest cannot be read: then nothing is deleted.
    pub fn collect(&mut self, call: keeper::Collect) -> Result<keeper::Collected, KeeperError> {
        let call = Call::Collect(call);
        ask!(self, call, &[], |_| {}, Answer::Collected(collected) => collected)
    }

    /// How many bytes the store may have on disk; 0 is no limit.
    ///
    /// # Errors
    /// It cannot be written down.
    pub fn set_budget(&mut self, bytes: u64) -> Result<(), KeeperError> {
        let call = Call::SetBudget(keeper::SetBudget {
            store_bytes: Some(bytes),
        });
        ask!(self, call, &[], |_| {}, Answer::Done(_) => ())
    }

    /// Writes a snapshot as one verified stream, from record `first` on. Progress counts records.
    ///
    /// # Errors
    /// It is damaged, or the stream cannot be written.
    pub fn export(
        &mut self,
        snapshot: &str,
        first: u64,
        out: BorrowedFd<'_>,
        progress: impl FnMut(u64, u64),
    ) -> Result<(), KeeperError> {
        let call = Call::Export(keeper::Export {
            snapshot: snapshot.to_owned(),
            first,
        });
        ask!(self, call, &[out], passing(progress), Answer::Done(_) => ())
    }

    /// Takes a snapshot from such a stream. Progress counts records.
    ///
    /// # Errors
    /// The stream is not good, or there is no room.
    pub fn import(
        &mut self,
        from: BorrowedFd<'_>,
        progress: impl FnMut(u64, u64),
    ) -> Result<keeper::Imported, KeeperError> {
        let call = Call::Import(keeper::Import {
            received_of: String::new(),
        });
        ask!(self, call, &[from], passing(progress), Answer::Imported(imported) => imported)
    }

    /// How much of a snapshot an import that broke off has left here.
    ///
    /// # Errors
    /// That is no whole id.
    pub fn received(&mut self, id: &str) -> Result<keeper::Imported, KeeperError> {
        let call = Call::Import(keeper::Import {
            received_of: id.to_owned(),
        });
        ask!(self, call, &[], |_| {}, Answer::Imported(imported) => imported)
    }
}
