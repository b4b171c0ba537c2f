//! How a VMM ended, from its wait status (`docs/api.md` lists the exit statuses).

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the end of a VMM means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "value")]
pub enum Meaning {
    /// The guest switched itself off.
    #[default]
    PoweredOff,
    /// An error of the VMM, or a bad configuration.
    Failed,
    /// The VMM did not understand its command line.
    BadCommandLine,
    /// The guest reset the machine.
    Rebooted,
    /// The guest's kernel panicked.
    Panicked,
    /// The guest's CPU gave up.
    TripleFault,
    /// KVM could not go on.
    KvmFailed,
    /// Its memory could not be brought in any more.
    NoPages,
    /// Stopped through its API.
    Stopped,
    /// A status with no meaning here.
    UnknownStatus(i32),
    /// A signal killed the VMM.
    Signalled(i32),
    /// The supervisor killed it, because its work was done or its owner gone.
    TornDown,
}

impl Meaning {
    /// From an exit status.
    #[must_use]
    pub fn of_status(status: i32) -> Self {
        match status {
            0 => Self::PoweredOff,
            1 => Self::Failed,
            2 => Self::BadCommandLine,
            16 => Self::Rebooted,
            17 => Self::Panicked,
            18 => Self::TripleFault,
            19 => Self::KvmFailed,
            20 => Self::Stopped,
            21 => Self::NoPages,
            other => Self::UnknownStatus(other),
        }
    }
}

impl fmt::Display for Meaning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest switched itself off"),
            Self::Failed => f.write_str("the VMM failed"),
            Self::BadCommandLine => f.write_str("the VMM refused its command line"),
            Self::Rebooted => f.write_str("the guest rebooted"),
            Self::Panicked => f.write_str("the guest kernel panicked"),
            Self::TripleFault => f.write_str("the guest's CPU stopped with a triple fault"),
            Self::KvmFailed => f.write_str("KVM could not run the guest any further"),
            Self::NoPages => f.write_str("pages of the guest's memory could not be had any more"),
            Self::Stopped => f.write_str("the VMM was stopped through its API"),
            Self::UnknownStatus(status) => write!(f, "the VMM ended with status {status}"),
            Self::Signalled(signal) => write!(f, "the VMM was killed by {}", signal_name(*signal)),
            Self::TornDown => f.write_str("the sandbox was torn down"),
        }
    }
}

/// The record of an end.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ended {
    pub version: u32,
    pub meaning: Meaning,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// CPU time of the VMM, guest included, in microseconds.
    pub user_us: u64,
    pub system_us: u64,
    /// Peak resident memory in KiB.
    pub max_rss_kib: u64,
    /// The last lines of the guest's console.
    pub console: Vec<String>,
    /// The last lines of the VMM's log.
    pub log: Vec<String>,
}

/// `SIGKILL` for 9; the number itself for unusual ones.
#[must_use]
pub fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_documented_status_has_its_meaning() {
        for (status, meaning) in [
            (0, Meaning::PoweredOff),
            (1, Meaning::Failed),
            (2, Meaning::BadCommandLine),
            (16, Meaning::Rebooted),
            (17, Meaning::Panicked),
            (18, Meaning::TripleFault),
            (19, Meaning::KvmFailed),
            (20, Meaning::Stopped),
            (21, Meaning::NoPages),
            (3, Meaning::UnknownStatus(3)),
        ] {
            assert_eq!(Meaning::of_status(status), meaning);
        }
    }

    #[test]
    fn records_of_every_meaning_read_back() {
        for meaning in [
            Meaning::PoweredOff,
            Meaning::UnknownStatus(77),
            Meaning::Signalled(9),
        ] {
            let ended = Ended {
                meaning,
                console: vec!["last words".into()],
                ..Ended::default()
            };
            let text = serde_json::to_string(&ended).unwrap();
            assert_eq!(serde_json::from_str::<Ended>(&text).unwrap(), ended);
        }
    }

    #[test]
    fn signals_are_named() {
        assert_eq!(
            Meaning::Signalled(9).to_string(),
            "the VMM was killed by SIGKILL"
        );
        assert_eq!(signal_name(34), "signal 34");
    }
}
