//! Log lines with levels.
use serde::{Deserialize, Serialize};

/// How much is logged: everything up to and including the level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
#[repr(u8)]
pub enum Level {
    Off,
    Error,
    #[serde(rename = "Warning")]
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl std::str::FromStr for Level {
    type Err = String;
    /// Any case; `Warn` and `Warning` mean the same.
    fn from_str(text: &str) -> Result<Self, String> {
        const NAMES: [(&str, Level); 7] = [
            ("off", Level::Off),
            ("error", Level::Error),
            ("warn", Level::Warn),
            ("warning", Level::Warn),
            ("info", Level::Info),
            ("debug", Level::Debug),
            ("trace", Level::Trace),
        ];
        NAMES
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(text))
            .map(|(_, level)| *level)
            .ok_or_else(|| {
                format!("{text:?} is no log level; Off, Error, Warning, Info, Debug and Trace are")
            })
    }
}

impl TryFrom<String> for Level {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}
