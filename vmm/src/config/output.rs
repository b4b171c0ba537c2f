//! Where texts go: `/serial`, `/console`, `/logger`, `/metrics`.
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::{ConfigError, NO_RATE_LIMITER, Source, refuse};
use crate::log::Level;

/// `PUT /serial`: the 16550, for early debugging. Without a path the guest's bytes go to
/// standard output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawSerial")]
pub struct Serial {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<Source>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSerial {
    #[serde(default)]
    serial_out_path: Option<Source>,
    #[serde(default)]
    rate_limiter: Option<IgnoredAny>,
}

impl TryFrom<RawSerial> for Serial {
    type Error = ConfigError;
    fn try_from(raw: RawSerial) -> Result<Self, ConfigError> {
        refuse("rate_limiter", raw.rate_limiter.as_ref(), NO_RATE_LIMITER)?;
        Ok(Self {
            serial_out_path: raw.serial_out_path,
        })
    }
}

/// `PUT /console` (ours): the virtio console, which every guest has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawConsole")]
pub struct Console {
    /// Unix socket that clients attach to and leave again: each gets the scroll-back, then what
    /// follows. `None`: the scroll-back is kept, and nobody can attach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_path: Option<Source>,
    /// Bytes of the guest's last output that are kept, 0..=1048576.
    pub scrollback_bytes: u32,
}

impl Console {
    pub const DEFAULT_SCROLLBACK: u32 = 64 * 1024;
    pub const MAX_SCROLLBACK: u32 = 1024 * 1024;
}

impl Default for Console {
    fn default() -> Self {
        Self {
            socket_path: None,
            scrollback_bytes: Self::DEFAULT_SCROLLBACK,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConsole {
    #[serde(default)]
    socket_path: Option<Source>,
    #[serde(default)]
    scrollback_bytes: Option<u64>,
}

impl TryFrom<RawConsole> for Console {
    type Error = ConfigError;
    fn try_from(raw: RawConsole) -> Result<Self, ConfigError> {
        let wanted = raw
            .scrollback_bytes
            .unwrap_or(u64::from(Self::DEFAULT_SCROLLBACK));
        let scrollback_bytes = u32::try_from(wanted)
            .ok()
            .filter(|n| *n <= Self::MAX_SCROLLBACK)
            .ok_or_else(|| {
                ConfigError::new(
                    "scrollback_bytes",
                    format_args!("{wanted} is not in 0..={}", Self::MAX_SCROLLBACK),
                )
            })?;
        Ok(Self {
            socket_path: raw.socket_path,
            scrollback_bytes,
        })
    }
}

/// `PUT /logger`: what is left out stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// File or FIFO, appended to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<Source>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only lines from modules whose path starts with this (`belljar_vmm::virtio`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// `PUT /metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// File or FIFO that gets one line of JSON per flush.
    pub metrics_path: Source,
}
