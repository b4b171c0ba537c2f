//! `/vsock`.
use serde::{Deserialize, Serialize};

use super::{ConfigError, Source};

/// Longest path of the host-side socket: `sun_path` has 108 bytes with its NUL, and the guest's
/// connections go to `<uds_path>_<port>`, 11 bytes more.
const MAX_UDS_PATH: usize = 108 - 1 - 11;

/// `PUT /vsock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Raw")]
pub struct Vsock {
    /// 3..=4294967294
    pub guest_cid: u32,
    /// Unix socket of the hybrid convention (design, contract 2), at most 96 bytes; or a
    /// descriptor: a listening Unix stream socket. Then connections that the guest starts go to
    /// `_<port>` in the directory `NAME.dir`, or are refused if there is none.
    pub uds_path: Source,
    /// Old clients name the device; the name is only kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    guest_cid: u64,
    uds_path: Source,
    #[serde(default)]
    vsock_id: Option<String>,
}

impl TryFrom<Raw> for Vsock {
    type Error = ConfigError;
    fn try_from(raw: Raw) -> Result<Self, ConfigError> {
        // 0 and 1 are reserved, 2 is the host, u32::MAX means any.
        let guest_cid = match u32::try_from(raw.guest_cid) {
            Ok(cid) if cid >= 3 && cid != u32::MAX => cid,
            _ => {
                return Err(ConfigError::new(
                    "guest_cid",
                    format_args!("{} is not in 3..=4294967294", raw.guest_cid),
                ));
            }
        };
        if let Source::Path(path) = &raw.uds_path
            && path.as_os_str().len() > MAX_UDS_PATH
        {
            return Err(ConfigError::new(
                "uds_path",
                format_args!(
                    "{} bytes; at most {MAX_UDS_PATH} are possible, because '_<port>' is added \
                     for connections from the guest",
                    path.as_os_str().len()
                ),
            ));
        }
        Ok(Self {
            guest_cid,
            uds_path: raw.uds_path,
            vsock_id: raw.vsock_id,
        })
    }
}
