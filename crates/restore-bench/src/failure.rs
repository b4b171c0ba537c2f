//! One error type for the whole benchmark: what was attempted, and why it failed.

use std::fmt::Display;

/// A readable sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failure(pub String);

pub type Result<T> = std::result::Result<T, Failure>;

/// Says what was attempted.
pub trait Attempt<T> {
    fn attempt(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> Attempt<T> for std::result::Result<T, E> {
    fn attempt(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Failure(format!("{what}: {error}")))
    }
}
