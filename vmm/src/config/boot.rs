//! `/boot-source`.
use serde::{Deserialize, Serialize};

use super::{ConfigError, Source};

/// Longest kernel command line the API takes, in bytes: Linux's COMMAND_LINE_SIZE on x86 less
/// the NUL. What the machine appends (devices without ACPI) must fit too; the loader checks that.
pub const MAX_BOOT_ARGS: usize = 2047;

/// `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Raw")]
pub struct BootSource {
    /// ELF vmlinux (64-bit entry or PVH) or bzImage.
    pub kernel_image_path: Source,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<Source>,
    /// Printable ASCII. `None`: the machine's default line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    kernel_image_path: Source,
    #[serde(default)]
    initrd_path: Option<Source>,
    #[serde(default)]
    boot_args: Option<String>,
}

impl TryFrom<Raw> for BootSource {
    type Error = ConfigError;
    fn try_from(raw: Raw) -> Result<Self, ConfigError> {
        if let Some(args) = &raw.boot_args {
            if args.len() > MAX_BOOT_ARGS {
                return Err(ConfigError::new(
                    "boot_args",
                    format_args!("{} bytes; at most {MAX_BOOT_ARGS} are possible", args.len()),
                ));
            }
            if !args.bytes().all(|b| matches!(b, b' '..=b'~')) {
                return Err(ConfigError::new(
                    "boot_args",
                    "only printable ASCII characters are possible",
                ));
            }
        }
        Ok(Self {
            kernel_image_path: raw.kernel_image_path,
            initrd_path: raw.initrd_path,
            boot_args: raw.boot_args,
        })
    }
}
