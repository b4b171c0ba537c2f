//! `/drives/{id}`. Contents are raw: the format of a drive is never guessed.
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::{ConfigError, NO_RATE_LIMITER, Source, check_id, refuse};

/// Longest serial of a drive (VIRTIO_BLK_ID_BYTES, virtio 1.2 §5.2.6).
pub const MAX_SERIAL: usize = 20;

/// Whether the guest is offered flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// No flush feature: what the guest syncs may be lost when the host crashes.
    #[default]
    Unsafe,
    /// The guest's flushes reach the host's disk.
    Writeback,
}

/// How requests are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    #[default]
    Sync,
    /// io_uring.
    Async,
}

/// `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Raw")]
pub struct Drive {
    pub drive_id: String,
    pub path_on_host: Source,
    /// The kernel command line gets `root=`; at most one drive.
    pub is_root_device: bool,
    /// With `is_root_device`: `root=PARTUUID=…` instead of `root=/dev/vda`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// Enforced by the host: the file is opened read-only.
    pub is_read_only: bool,
    pub cache_type: CacheType,
    pub io_engine: IoEngine,
    /// Ours: what the guest reads as the drive's serial, 1 to 20 printable ASCII characters.
    /// `None`: the first 20 characters of `drive_id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

impl Drive {
    /// The serial the guest reads, at most [`MAX_SERIAL`] ASCII bytes.
    pub fn serial(&self) -> &str {
        let serial = self.serial.as_deref().unwrap_or(&self.drive_id);
        serial.get(..MAX_SERIAL).unwrap_or(serial)
    }
}

/// `PATCH /drives/{drive_id}`: after the start, a new file behind the same drive.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawPatch")]
pub struct DrivePatch {
    pub drive_id: String,
    /// `None`: the guest is only told to read the size again.
    pub path_on_host: Option<Source>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    drive_id: String,
    #[serde(default)]
    path_on_host: Option<Source>,
    is_root_device: bool,
    #[serde(default)]
    partuuid: Option<String>,
    #[serde(default)]
    is_read_only: Option<bool>,
    #[serde(default)]
    cache_type: Option<CacheType>,
    #[serde(default)]
    io_engine: Option<IoEngine>,
    #[serde(default)]
    serial: Option<String>,
    #[serde(default)]
    rate_limiter: Option<IgnoredAny>,
    #[serde(default)]
    socket: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPatch {
    drive_id: String,
    #[serde(default)]
    path_on_host: Option<Source>,
    #[serde(default)]
    rate_limiter: Option<IgnoredAny>,
}

impl TryFrom<Raw> for Drive {
    type Error = ConfigError;
    fn try_from(raw: Raw) -> Result<Self, ConfigError> {
        check_id("drive_id", &raw.drive_id)?;
        refuse("rate_limiter", raw.rate_limiter.as_ref(), NO_RATE_LIMITER)?;
        refuse(
            "socket",
            raw.socket.as_ref(),
            "there are no vhost-user drives; use path_on_host",
        )?;
        let Some(path_on_host) = raw.path_on_host else {
            return Err(ConfigError::new("path_on_host", "missing"));
        };
        if let Some(uuid) = &raw.partuuid {
            check_partuuid(uuid, raw.is_root_device)?;
        }
        if let Some(serial) = &raw.serial
            && !(matches!(serial.len(), 1..=MAX_SERIAL)
                && serial.bytes().all(|b| matches!(b, b'!'..=b'~')))
        {
            return Err(ConfigError::new(
                "serial",
                format_args!("must be 1 to {MAX_SERIAL} printable ASCII characters"),
            ));
        }
        Ok(Self {
            drive_id: raw.drive_id,
            path_on_host,
            is_root_device: raw.is_root_device,
            partuuid: raw.partuuid,
            is_read_only: raw.is_read_only.unwrap_or(false),
            cache_type: raw.cache_type.unwrap_or_default(),
            io_engine: raw.io_engine.unwrap_or_default(),
            serial: raw.serial,
        })
    }
}

impl TryFrom<RawPatch> for DrivePatch {
    type Error = ConfigError;
    fn try_from(raw: RawPatch) -> Result<Self, ConfigError> {
        check_id("drive_id", &raw.drive_id)?;
        refuse("rate_limiter", raw.rate_limiter.as_ref(), NO_RATE_LIMITER)?;
        Ok(Self {
            drive_id: raw.drive_id,
            path_on_host: raw.path_on_host,
        })
    }
}

/// It ends up on the kernel command line, so it must not be able to add words to it.
fn check_partuuid(uuid: &str, is_root: bool) -> Result<(), ConfigError> {
    if !is_root {
        return Err(ConfigError::new(
            "partuuid",
            "means something only with is_root_device true",
        ));
    }
    let good = |b: u8| b.is_ascii_hexdigit() || b == b'-';
    if uuid.is_empty() || uuid.len() > 36 || !uuid.bytes().all(good) {
        return Err(ConfigError::new(
            "partuuid",
            "must be 1 to 36 hexadecimal digits and '-', such as 0eaa91a0-01",
        ));
    }
    Ok(())
}
