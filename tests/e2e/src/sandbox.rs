//! A guest that stays up while a story does many things to it.

use std::path::PathBuf;
use std::process::Command;

use crate::{Running, Said, User};

/// A running sandbox, removed when it is dropped, whatever state it is in.
#[derive(Debug)]
pub struct Sandbox<'a> {
    user: &'a User,
    id: String,
}

impl User {
    /// `belljar run -d ARGUMENTS`: `&[]` is a plain guest, `&["--memory", "512M"]` a larger one.
    ///
    /// # Panics
    /// It does not come up.
    #[must_use]
    #[track_caller]
    pub fn sandbox(&self, arguments: &[&str]) -> Sandbox<'_> {
        let mut all = vec!["run", "-d"];
        all.extend(arguments);
        let said = self.says(&all);
        assert_eq!(said.code(), 0, "{}", said.err);
        let id = said.text().trim().to_owned();
        assert_eq!(id.len(), 8, "an id is printed: {id:?}");
        Sandbox { user: self, id }
    }
}

impl Sandbox<'_> {
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whose it is.
    #[must_use]
    pub fn user(&self) -> &User {
        self.user
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.user.state().join("sandboxes").join(&self.id)
    }

    /// `belljar VERB ID ARGUMENTS`, to its end.
    #[must_use]
    pub fn says(&self, verb: &str, arguments: &[&str]) -> Said {
        self.start(verb, arguments).wait()
    }

    /// `belljar VERB ID ARGUMENTS`, under way.
    #[must_use]
    pub fn start(&self, verb: &str, arguments: &[&str]) -> Running {
        Running::start(&mut self.belljar(verb, arguments))
    }

    /// `belljar VERB ID ARGUMENTS`, not started.
    #[must_use]
    pub fn belljar(&self, verb: &str, arguments: &[&str]) -> Command {
        let mut all = vec![verb, self.id.as_str()];
        all.extend(arguments);
        self.user.belljar(&all)
    }

    /// Its one-word state, as `inspect` tells it.
    ///
    /// # Panics
    /// It is gone.
    #[must_use]
    pub fn state(&self) -> String {
        let said = self.says("inspect", &[]);
        assert_eq!(said.code(), 0, "{}", said.err);
        let all: serde_json::Value = serde_json::from_slice(&said.out).unwrap();
        all[0]["state"].as_str().unwrap().to_owned()
    }
}

impl Drop for Sandbox<'_> {
    fn drop(&mut self) {
        // It may have been removed by the story itself.
        let _ = self.user.says(&["rm", "-f", &self.id]);
    }
}
