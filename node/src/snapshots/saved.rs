//! What is written down about a sandbox: in its snapshots, and in the directories of those that come from one.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cpu;
use crate::registry::Found;
use crate::state::spec::{DriveRecord, SandboxSpec};
use crate::state::{self, ProcessRecord, StateError};

/// Version of [`Saved`] and [`Origin`] that this program writes. Fields are only added within a version.
const VERSION: u32 = 1;
/// Most bytes of a saved record.
const LONGEST: usize = 1 << 20;

/// What a snapshot says about the sandbox it was taken of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    pub version: u32,
    /// Version of the program that wrote it, for people.
    pub writer: String,
    /// Id of the sandbox.
    pub sandbox: String,
    /// Id of the first sandbox of all that come from it.
    pub lineage: String,
    /// How many restores lie between that one and this.
    pub generation: u64,
    pub spec: SandboxSpec,
    /// The snapshot that it was restored from itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Maker of the processor, as CPUID tells it.
    #[serde(default)]
    pub cpu_vendor: String,
}

impl Saved {
    /// Of a sandbox that exists.
    pub(super) fn of(found: &Found, spec: SandboxSpec) -> Result<Self, StateError> {
        let origin = Origin::of(found)?;
        Ok(Self {
            version: VERSION,
            writer: env!("CARGO_PKG_VERSION").to_owned(),
            sandbox: found.id().to_owned(),
            lineage: origin.lineage,
            generation: origin.generation,
            spec,
            parent: origin.snapshot,
            cpu_vendor: cpu::vendor(),
        })
    }

    /// From a snapshot's image.
    ///
    /// # Errors
    /// It is not such a record, or of a later version.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > LONGEST {
            return Err("its record of the sandbox is too long".to_owned());
        }
        let saved: Self = serde_json::from_slice(bytes)
            .map_err(|error| format!("its record of the sandbox is not good: {error}"))?;
        if saved.version != VERSION {
            return Err(format!(
                "its record of the sandbox has version {}, and this program reads {VERSION}",
                saved.version
            ));
        }
        Ok(saved)
    }
}

/// What a drive is called among base images.
pub(super) fn drive_name(index: usize, drive: &DriveRecord) -> String {
    let id = drive.id.clone();
    id.unwrap_or_else(|| format!("drive{index}"))
}

/// The root file system among base images.
pub(super) const IMAGE: &str = "image";
/// Kernel and initramfs, if they were chosen. No drive has such a name.
pub(super) const KERNEL: &str = "boot:kernel";
pub(super) const INITRAMFS: &str = "boot:initramfs";

/// Files of this machine that a sandbox is made of, by the name of a base image.
pub(super) fn base_files(spec: &SandboxSpec) -> Vec<(String, PathBuf)> {
    let named = [
        (IMAGE, &spec.image),
        (KERNEL, &spec.kernel),
        (INITRAMFS, &spec.initramfs),
    ];
    let named = named
        .into_iter()
        .filter_map(|(name, path)| Some((name.to_owned(), path.clone()?)));
    let drives = spec.drives.iter().enumerate();
    named
        .chain(drives.map(|(index, drive)| (drive_name(index, drive), drive.path.clone())))
        .collect()
}

/// Where a sandbox comes from (`origin.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub version: u32,
    /// The snapshot it was restored from; `None` for a fork.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    pub lineage: String,
    pub generation: u64,
    pub machine_id: String,
}

impl Origin {
    /// Of a sandbox that is made from a saved one.
    pub(crate) fn next(saved: &Saved, snapshot: Option<String>, machine_id: String) -> Self {
        Self {
            version: VERSION,
            snapshot,
            lineage: saved.lineage.clone(),
            generation: saved.generation.saturating_add(1),
            machine_id,
        }
    }

    /// Of a sandbox that exists; one that was booted is the first of its lineage.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn of(found: &Found) -> Result<Self, StateError> {
        let record: Option<Self> = found.dir().read_record(state::ORIGIN)?;
        Ok(record.unwrap_or_else(|| Self {
            version: VERSION,
            snapshot: None,
            lineage: found.id().to_owned(),
            generation: 0,
            machine_id: String::new(),
        }))
    }
}

/// What the guest that runs was loaded from (`loaded.json`); a guest that was booted has none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Loaded {
    pub(crate) snapshot: String,
}

impl Loaded {
    /// The snapshot whose memory the guest's is a view of.
    pub(super) fn of(found: &Found) -> Result<Option<String>, StateError> {
        let record: Option<Self> = found.dir().read_record(state::LOADED)?;
        Ok(record.map(|loaded| loaded.snapshot))
    }
}

/// The last snapshot of the guest that runs (`last.json`): what has changed since then its VMM knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Last {
    version: u32,
    snapshot: String,
    /// The process that knows.
    vmm: ProcessRecord,
}

impl Last {
    /// Of this very process; `None` if it was never saved, or not as far as is known.
    pub(super) fn of(
        found: &Found,
        vmm: Option<ProcessRecord>,
    ) -> Result<Option<String>, StateError> {
        let record: Option<Self> = found.dir().read_record(state::LAST)?;
        let last = record.filter(|last| last.version == VERSION && Some(last.vmm) == vmm);
        Ok(last.map(|last| last.snapshot))
    }

    /// From now on changes are known since this snapshot.
    pub(super) fn write(
        found: &Found,
        snapshot: &str,
        vmm: ProcessRecord,
    ) -> Result<(), StateError> {
        let record = Self {
            version: VERSION,
            snapshot: snapshot.to_owned(),
            vmm,
        };
        found.dir().write_record(state::LAST, &record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn saved() -> Saved {
        Saved {
            version: VERSION,
            writer: "0".into(),
            sandbox: "0badcafe".into(),
            lineage: "deadbeef".into(),
            generation: 3,
            spec: SandboxSpec::default(),
            parent: None,
            cpu_vendor: "AuthenticAMD".into(),
        }
    }

    #[test]
    fn what_is_saved_is_read_and_later_versions_are_refused() {
        let bytes = serde_json::to_vec(&saved()).unwrap();
        assert_eq!(Saved::parse(&bytes), Ok(saved()));
        let later = Saved {
            version: 2,
            ..saved()
        };
        let error = Saved::parse(&serde_json::to_vec(&later).unwrap()).unwrap_err();
        assert!(error.contains("version 2"), "{error}");
        let next = Origin::next(&saved(), None, String::new());
        assert_eq!((next.generation, &*next.lineage), (4, "deadbeef"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Saved::parse(&bytes);
        }
    }
}
