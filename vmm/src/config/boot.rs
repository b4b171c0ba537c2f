//! `/boot-source`.
use serde::{Deserialize, Serialize};

use super::{ConfigError, Source};

/// Longest kernel command line the API takes, in bytes: Linux's COMMAND_LINE_SIZE on x86 less
/// the NUL. What the machine appends (devices without ACPI) must fit too; the loader checks that.
pub const MAX_BOOT_ARGS: usize = 2047;

/// Where a kernel is entered (ours: `boot_protocol`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootProtocol {
    /// The 64-bit entry of the Linux boot protocol: ELF vmlinux and bzImage.
    #[default]
    Linux,
    /// PVH: an ELF kernel with a PVH note.
    Pvh,
}

/// How a guest finds its devices (ours: `device_discovery`). Never both ways: a kernel that
/// does both probes every device twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Discovery {
    #[default]
    Acpi,
    /// `virtio_mmio.device=` on the kernel command line and an MP table, for kernels without
    /// ACPI.
    CommandLine,
}

/// The kernel command line where the API names none: messages to the virtio console, an end
/// at a panic, no probes for devices that are not there.
pub const DEFAULT_BOOT_ARGS: &str = "console=hvc0 panic=-1 reboot=k 8250.nr_uarts=0 \
     i8042.noaux i8042.nomux i8042.dumbkbd";

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
    #[serde(rename = "boot_protocol")]
    pub entry: BootProtocol,
    #[serde(rename = "device_discovery")]
    pub discovery: Discovery,
}

impl BootSource {
    /// The command line asked for, or the default one.
    pub fn boot_args(&self) -> &str {
        self.boot_args.as_deref().unwrap_or(DEFAULT_BOOT_ARGS)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    kernel_image_path: Source,
    #[serde(default)]
    initrd_path: Option<Source>,
    #[serde(default)]
    boot_args: Option<String>,
    #[serde(default)]
    boot_protocol: BootProtocol,
    #[serde(default)]
    device_discovery: Discovery,
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
            entry: raw.boot_protocol,
            discovery: raw.device_discovery,
        })
    }
}
