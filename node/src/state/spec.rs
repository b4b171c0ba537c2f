//! What a sandbox is: written once into its directory, when all else in it is ready (`config.json`).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Version of [`SandboxSpec`] that this program writes. Fields are only added within a version.
pub const SPEC_VERSION: u32 = 1;
/// Longest name.
pub const NAME_MAX: usize = 63;

/// What happens to a sandbox when its owner or its guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Life {
    /// It goes away with the command that made it.
    #[default]
    Owned,
    /// It goes away when its guest ends.
    Detached,
    /// It stays until it is removed, and can be started again.
    Persistent,
}

/// The configuration of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SandboxSpec {
    pub version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    pub life: Life,
    pub vcpus: u32,
    /// Thousandths of a host CPU that the guest may use; `None`: as much as its vCPUs can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_limit_milli: Option<u32>,
    /// Bytes of RAM.
    pub memory: u64,
    /// Bytes of the writable disk; `None`: what is written goes to the guest's memory.
    #[serde(default)]
    pub disk: Option<u64>,
    /// The root file system that the disk belongs to; `None`: the guest runs in its initramfs.
    #[serde(default)]
    pub image: Option<PathBuf>,
    /// `None`: the newest one of the assets at each start.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    /// `None`: the newest one of the assets at each start.
    #[serde(default)]
    pub initramfs: Option<PathBuf>,
    #[serde(default)]
    pub drives: Vec<DriveRecord>,
    /// Appended to the kernel's command line.
    #[serde(default)]
    pub boot_args: Option<String>,
}

/// A drive of the user's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveRecord {
    pub path: PathBuf,
    pub read_only: bool,
    #[serde(default)]
    pub id: Option<String>,
}

/// A name or label that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    #[error(
        "'{0}' cannot be a name: use 1 to {NAME_MAX} letters, digits, '-', '_' or '.', a letter or digit first"
    )]
    Malformed(String),
    #[error("'{0}' looks like an id, so it cannot be a name")]
    LooksLikeId(String),
}

/// Checks a name that a user chose.
///
/// # Errors
/// It could not be told from an id or an option, or not be a file's name.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let begins_well = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if !begins_well || name.len() > NAME_MAX || !name.bytes().all(fine) {
        return Err(NameError::Malformed(name.to_owned()));
    }
    if super::is_id(name) {
        return Err(NameError::LooksLikeId(name.to_owned()));
    }
    Ok(())
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|time| u64::try_from(time.as_millis()).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_file_names_and_no_ids() {
        for name in ["a", "web-1", "A.b_c", "0", "deadbee", "deadbeef0"] {
            assert_eq!(check_name(name), Ok(()), "{name}");
        }
        for name in [
            "",
            "-a",
            ".",
            "..",
            "a/b",
            "a b",
            "ä",
            "\n",
            &"x".repeat(64),
        ] {
            assert!(
                matches!(check_name(name), Err(NameError::Malformed(_))),
                "{name}"
            );
        }
        assert!(matches!(
            check_name("deadbeef"),
            Err(NameError::LooksLikeId(_))
        ));
    }

    #[test]
    fn a_record_with_unknown_and_missing_fields_is_read() {
        let text = r#"{"version":1,"created_ms":5,"life":"persistent","vcpus":2,"memory":1048576,"later":[1]}"#;
        let spec: SandboxSpec = serde_json::from_str(text).unwrap();
        assert_eq!(
            (spec.vcpus, spec.life, spec.name),
            (2, Life::Persistent, None)
        );
    }

    proptest! {
        #[test]
        fn any_text_is_answered(name in ".{0,70}") {
            if check_name(&name).is_ok() {
                prop_assert!(!name.contains('/') && name.is_ascii() && !name.is_empty());
            }
        }
    }
}
