//! Where bytes come from or go to: a path, or a descriptor that was handed over.
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// A path field of the API. `"fd:NAME"` means the descriptor that arrived under NAME, with
/// `--fd NAME=N` or over the API socket; anything else is a path on the host. A path that
/// really starts with `fd:` is written `./fd:…`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Source {
    Path(PathBuf),
    /// The NAME: 1 to 64 of ASCII letters, digits, `_`, `-` and `.`.
    Fd(String),
}

/// Linux's PATH_MAX, which counts the NUL.
const MAX_PATH: usize = 4095;

impl Source {
    /// Parses a path field.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        if let Some(name) = text.strip_prefix("fd:") {
            check_fd_name(name)?;
            return Ok(Self::Fd(name.to_owned()));
        }
        if text.is_empty() {
            return Err(ConfigError("a path must not be empty".into()));
        }
        if text.len() > MAX_PATH {
            return Err(ConfigError(format!(
                "a path may have at most {MAX_PATH} bytes, this one has {}",
                text.len()
            )));
        }
        if text.contains('\0') {
            return Err(ConfigError("a path must not contain a NUL".into()));
        }
        Ok(Self::Path(PathBuf::from(text)))
    }

    /// The NAME, if this is a descriptor.
    pub fn fd_name(&self) -> Option<&str> {
        match self {
            Self::Fd(name) => Some(name),
            Self::Path(_) => None,
        }
    }
}

/// Checks the NAME of a descriptor (`fd:NAME`, `--fd NAME=N`, `Belljar-Fds`).
pub(crate) fn check_fd_name(name: &str) -> Result<(), ConfigError> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    if name.is_empty() || name.len() > 64 || !name.bytes().all(good) {
        return Err(ConfigError(
            "a descriptor's name has 1 to 64 ASCII letters, digits, '_', '-' or '.'".into(),
        ));
    }
    Ok(())
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Fd(name) => write!(f, "fd:{name}"),
        }
    }
}

impl TryFrom<String> for Source {
    type Error = ConfigError;
    fn try_from(text: String) -> Result<Self, ConfigError> {
        Self::parse(&text)
    }
}

impl From<Source> for String {
    fn from(source: Source) -> Self {
        source.to_string()
    }
}
