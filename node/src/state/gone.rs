//! How a sandbox ended whose directory went away with its guest, for who asks later.
//!
//! `…/gone/ID.json`, written before the directory is removed. Of one that was ended by force on purpose there is none.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{DirBuilder, DirBuilderExt, SandboxDir, StateRoot, is_id};
use crate::ending::{Ended, Meaning};

/// So many are remembered, the latest.
const KEPT: usize = 64;
const DIR: &str = "gone";
const EXTENSION: &str = "json";

/// A sandbox that is no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gone {
    pub id: String,
    pub name: Option<String>,
    pub ended: Ended,
    /// Where this was read.
    #[serde(skip)]
    pub path: PathBuf,
}

impl Gone {
    /// Its name, or its id.
    #[must_use]
    pub fn called(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.id)
    }
}

impl StateRoot {
    /// The sandbox with exactly this id or name, if it is gone; of several the one that ended last.
    #[must_use]
    pub fn gone(&self, word: &str) -> Option<Gone> {
        let dir = self.sandboxes.with_file_name(DIR);
        if is_id(word) {
            return read(&file(&dir, word));
        }
        let all = files(&dir).into_iter().filter_map(|(_, path)| read(&path));
        all.filter(|gone| gone.name.as_deref() == Some(word))
            .max_by_key(|gone| gone.ended.at_ms)
    }
}

impl SandboxDir {
    /// Remembers how it ended, for when it is removed; as well as that can be done.
    pub(crate) fn remember_end(&self, name: Option<String>, ended: &Ended) {
        let Some(dir) = self.gone_dir() else { return };
        if matches!(ended.meaning, Meaning::TornDown | Meaning::Stopped) {
            return;
        }
        let gone = Gone {
            id: self.id().to_owned(),
            name,
            ended: ended.clone(),
            path: PathBuf::new(),
        };
        let path = file(&dir, self.id());
        let temporary = path.with_extension("new");
        let made = DirBuilder::new().mode(0o700).recursive(true).create(&dir);
        let text = serde_json::to_vec_pretty(&gone).unwrap_or_default();
        let _ = made
            .and_then(|()| fs::write(&temporary, text))
            .and_then(|()| fs::rename(&temporary, path));
        let mut all = files(&dir);
        all.sort();
        for (_, old) in all.iter().rev().skip(KEPT) {
            let _ = fs::remove_file(old);
        }
    }

    /// How it ended, if it is gone.
    #[must_use]
    pub fn gone(&self) -> Option<Gone> {
        read(&file(&self.gone_dir()?, self.id()))
    }

    fn gone_dir(&self) -> Option<PathBuf> {
        Some(self.path().parent()?.with_file_name(DIR))
    }
}

fn file(dir: &Path, id: &str) -> PathBuf {
    dir.join(id).with_added_extension(EXTENSION)
}

/// What cannot be read is as good as none.
fn read(path: &Path) -> Option<Gone> {
    let gone: Gone = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let path = path.to_path_buf();
    Some(Gone { path, ..gone })
}

/// With the time of each.
fn files(dir: &Path) -> Vec<(SystemTime, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let timed = |entry: fs::DirEntry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()));
    entries.filter_map(timed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(meaning: Meaning, at_ms: u64) -> Ended {
        Ended {
            meaning,
            at_ms,
            log: vec!["last words".into()],
            ..Ended::default()
        }
    }

    #[test]
    fn ends_that_nobody_asked_for_are_remembered() {
        let keep = tempfile::tempdir().unwrap();
        let root = StateRoot::at(keep.path()).unwrap();
        let mut ids = Vec::new();
        for (meaning, at) in [(Meaning::Panicked, 1), (Meaning::Signalled(11), 2)] {
            let (dir, _lock) = root.create().unwrap();
            dir.remember_end(Some("web".into()), &ended(meaning, at));
            dir.remove().unwrap();
            let gone = dir.gone().unwrap();
            assert_eq!(gone.ended, ended(meaning, at));
            assert_eq!(root.gone(dir.id()), Some(gone));
            ids.push(dir.id().to_owned());
        }
        assert_eq!(root.gone("web").unwrap().id, ids[1]);
        for word in ["we", "", ".", "../gone/x", "00000000"] {
            assert_eq!(root.gone(word), None, "{word}");
        }
        for meaning in [Meaning::TornDown, Meaning::Stopped] {
            let (dir, _lock) = root.create().unwrap();
            dir.remember_end(None, &ended(meaning, 3));
            assert_eq!(dir.gone(), None);
        }
        fs::write(&root.gone(&ids[0]).unwrap().path, "{").unwrap();
        assert_eq!(root.gone(&ids[0]), None, "it is no record any more");
    }

    #[test]
    fn only_the_latest_are_kept() {
        let keep = tempfile::tempdir().unwrap();
        let root = StateRoot::at(keep.path()).unwrap();
        let dir = |number| SandboxDir::existing(&root.dir().join(format!("{number:08x}")));
        for number in 0..KEPT + 3 {
            dir(number).remember_end(None, &ended(Meaning::Panicked, 0));
            let later = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number as u64);
            let record = fs::File::open(dir(number).gone().unwrap().path).unwrap();
            record.set_modified(later).unwrap();
        }
        // The newest had the present time when the others were counted.
        assert_eq!(dir(2).gone(), None);
        assert!(dir(3).gone().is_some() && dir(KEPT + 2).gone().is_some());
        assert_eq!(files(&keep.path().join(DIR)).len(), KEPT);
    }
}
