//! `/drives/{id}`. The format of a drive is declared, never guessed.
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
    /// Ours: the guest may flush, but that does not reach the host's disk. Unlike `Unsafe`, a guest that is saved
    /// with it can go on with `Writeback`.
    Volatile,
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

/// Ours: what a drive's bytes are in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One file with the drive's bytes.
    #[default]
    Raw,
    /// Layers over a raw image (`docs/disk-layers.md`).
    Layers,
}

/// Most layers of a drive, the one that is written included.
pub const MAX_LAYERS: usize = belljar_layers::MAX_LAYERS;

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
    /// Ours. With [`Format::Layers`] `path_on_host` is the base image, which is only read.
    #[serde(skip_serializing_if = "is_raw")]
    pub format: Format,
    /// Ours: with [`Format::Layers`] 1 to [`MAX_LAYERS`] of them, lowest first, else none. Unless the drive
    /// is read-only the last one is written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Source>,
}

fn is_raw(format: &Format) -> bool {
    *format == Format::Raw
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
    /// Ours: all other layers, with the base image as `path_on_host`, behind a layered drive of a paused guest.
    /// What was written to the ones before is lost to it.
    pub layers: Vec<Source>,
    /// Ours: for a layered drive of a paused guest, and then alone. The top layer is frozen, and this file is
    /// written from then on.
    pub next_layer: Option<Source>,
    /// Ours: for a layered drive, and then alone.
    pub merged_layers: Option<MergedLayers>,
}

/// One frozen layer takes the place of several.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergedLayers {
    pub path_on_host: Source,
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
    format: Option<Format>,
    #[serde(default)]
    layers: Vec<Source>,
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
    layers: Vec<Source>,
    #[serde(default)]
    next_layer: Option<Source>,
    #[serde(default)]
    merged_layers: Option<MergedLayers>,
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
        let format = raw.format.unwrap_or_default();
        check_layers(format, &raw.layers)?;
        Ok(Self {
            drive_id: raw.drive_id,
            path_on_host,
            is_root_device: raw.is_root_device,
            partuuid: raw.partuuid,
            is_read_only: raw.is_read_only.unwrap_or(false),
            cache_type: cache_type(format, raw.cache_type)?,
            io_engine: raw.io_engine.unwrap_or_default(),
            serial: raw.serial,
            format,
            layers: raw.layers,
        })
    }
}

impl TryFrom<RawPatch> for DrivePatch {
    type Error = ConfigError;
    fn try_from(raw: RawPatch) -> Result<Self, ConfigError> {
        check_id("drive_id", &raw.drive_id)?;
        refuse("rate_limiter", raw.rate_limiter.as_ref(), NO_RATE_LIMITER)?;
        if !raw.layers.is_empty() {
            check_layers(Format::Layers, &raw.layers)?;
            if raw.path_on_host.is_none() {
                return Err(ConfigError::new(
                    "layers",
                    "path_on_host, the base image that they lie over, is missing",
                ));
            }
        }
        let files = raw.path_on_host.is_some();
        let next = raw.next_layer.is_some();
        if raw.merged_layers.is_some() && (files || next) {
            return Err(ConfigError::new(
                "merged_layers",
                "stands alone: the file of the merged layer is its own path_on_host",
            ));
        }
        if next && files {
            return Err(ConfigError::new("next_layer", "stands alone"));
        }
        Ok(Self {
            drive_id: raw.drive_id,
            path_on_host: raw.path_on_host,
            layers: raw.layers,
            next_layer: raw.next_layer,
            merged_layers: raw.merged_layers,
        })
    }
}

/// Layers for the drives that have them, and a number that can be.
pub(super) fn check_layers(format: Format, layers: &[Source]) -> Result<(), ConfigError> {
    let count = layers.len();
    match format {
        Format::Raw if count > 0 => Err(ConfigError::new(
            "layers",
            "only a drive with format \"layers\" has any",
        )),
        Format::Layers if !(1..=MAX_LAYERS).contains(&count) => Err(ConfigError::new(
            "layers",
            format_args!("1 to {MAX_LAYERS} are possible, these are {count}"),
        )),
        _ => Ok(()),
    }
}

/// A layer's map becomes durable when the guest flushes. With `Volatile` it does so only at a snapshot and when the
/// VMM ends in order; a guest without flushes could not go on with `Writeback`.
fn cache_type(format: Format, given: Option<CacheType>) -> Result<CacheType, ConfigError> {
    match (format, given) {
        (Format::Raw, given) => Ok(given.unwrap_or_default()),
        (Format::Layers, Some(CacheType::Unsafe)) => Err(ConfigError::new(
            "cache_type",
            "a drive with format \"layers\" is \"Writeback\", or \"Volatile\" if it need not outlive the VMM",
        )),
        (Format::Layers, given) => Ok(given.unwrap_or(CacheType::Writeback)),
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

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    fn drive(fields: &str) -> Result<Drive, String> {
        let text = format!(
            r#"{{"drive_id": "d", "path_on_host": "base", "is_root_device": false{fields}}}"#
        );
        parse(text.as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn layers_are_declared_and_come_back_as_they_were() {
        let layered = drive(r#", "format": "layers", "layers": ["one", "fd:two"]"#).unwrap();
        assert_eq!(layered.format, Format::Layers);
        assert_eq!(layered.cache_type, CacheType::Writeback);
        assert_eq!(layered.layers[1], Source::Fd("two".into()));
        let text = serde_json::to_string(&layered).unwrap();
        assert_eq!(parse::<Drive>(text.as_bytes()).unwrap(), layered);
        // Drives as others know them stay without our fields.
        let raw = serde_json::to_string(&drive("").unwrap()).unwrap();
        assert!(!raw.contains("layers") && !raw.contains("format"), "{raw}");
    }

    #[test]
    fn layers_that_cannot_be_are_refused() {
        let nine = format!(
            r#", "format": "layers", "layers": ["a"{}]"#,
            r#","a""#.repeat(8)
        );
        for (fields, says) in [
            (r#", "layers": ["a"]"#, "format"),
            (r#", "format": "raw", "layers": ["a"]"#, "format"),
            (r#", "format": "layers""#, "1 to 8"),
            (&nine, "1 to 8"),
            (r#", "format": "qcow2""#, "qcow2"),
            (
                r#", "format": "layers", "layers": ["a"], "cache_type": "Unsafe""#,
                "Writeback",
            ),
        ] {
            let error = drive(fields).unwrap_err();
            assert!(error.contains(says), "{error}: {says}");
        }
        let merged = r#""merged_layers": {"path_on_host": "b"}"#;
        for (fields, says) in [
            (&*format!(r#""path_on_host": "a", {merged}"#), "alone"),
            (&format!(r#""next_layer": "a", {merged}"#), "alone"),
            (r#""path_on_host": "a", "next_layer": "b""#, "alone"),
            (r#""layers": ["a"]"#, "path_on_host"),
            (
                r#""path_on_host": "a", "layers": ["a","a","a","a","a","a","a","a","a"]"#,
                "1 to 8",
            ),
        ] {
            let patch = format!(r#"{{"drive_id": "d", {fields}}}"#);
            let error = parse::<DrivePatch>(patch.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(says), "{error}: {says}");
        }
    }

    #[test]
    fn layers_that_need_not_outlive_the_vmm_are_volatile() {
        let fields = r#", "format": "layers", "layers": ["a"], "cache_type": "Volatile""#;
        assert_eq!(drive(fields).unwrap().cache_type, CacheType::Volatile);
    }
}
