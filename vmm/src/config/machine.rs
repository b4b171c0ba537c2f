//! `/machine-config`.
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::{ConfigError, refuse};

/// Most vCPUs of one guest, as in Firecracker.
pub const MAX_VCPUS: u8 = 32;
/// Least guest RAM. Below this no current kernel reaches its init.
pub const MIN_MEM_MIB: u32 = 32;
/// Most guest RAM: 512 GiB, which with the hole below 4 GiB fits in 40 physical address bits.
pub const MAX_MEM_MIB: u32 = 512 * 1024;

/// What backs guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum HugePages {
    /// The host's 4 KiB pages, and whatever its transparent_hugepage setting adds.
    #[default]
    None,
}

/// What processor guests see (ours: `cpu_baseline`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuBaseline {
    /// x86-64-v3 with AES, SHA, RDRAND and what processors of the last ten years share:
    /// features outside this list are hidden, so that snapshots move between machines.
    #[default]
    Portable,
    /// Everything KVM offers on this host. Snapshots do not move.
    Host,
}

/// `PUT /machine-config`, and what GET returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Raw")]
pub struct MachineConfig {
    /// 1..=32
    pub vcpu_count: u8,
    /// MiB, 32..=524288
    pub mem_size_mib: u32,
    /// Always false: one thread per core is what the guest sees.
    pub smt: bool,
    /// Always false: what changed is found by scanning, without tracking while the guest runs.
    pub track_dirty_pages: bool,
    pub huge_pages: HugePages,
    pub cpu_baseline: CpuBaseline,
}

impl Default for MachineConfig {
    /// Firecracker's: 1 vCPU, 128 MiB.
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            cpu_baseline: CpuBaseline::Portable,
        }
    }
}

/// `PATCH /machine-config`: the fields that are there replace the present ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawPatch")]
pub struct MachinePatch {
    pub vcpu_count: Option<u8>,
    pub mem_size_mib: Option<u32>,
    pub huge_pages: Option<HugePages>,
    pub cpu_baseline: Option<CpuBaseline>,
}

impl MachineConfig {
    /// The present configuration with `patch` applied; always valid.
    #[must_use]
    pub fn patched(&self, patch: &MachinePatch) -> Self {
        Self {
            vcpu_count: patch.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(self.mem_size_mib),
            huge_pages: patch.huge_pages.unwrap_or(self.huge_pages),
            cpu_baseline: patch.cpu_baseline.unwrap_or(self.cpu_baseline),
            ..self.clone()
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    vcpu_count: u64,
    mem_size_mib: u64,
    #[serde(default)]
    smt: Option<bool>,
    #[serde(default)]
    track_dirty_pages: Option<bool>,
    #[serde(default)]
    cpu_template: Option<String>,
    #[serde(default)]
    huge_pages: Option<String>,
    #[serde(default)]
    cpu_baseline: Option<CpuBaseline>,
    #[serde(default)]
    gdb_socket_path: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPatch {
    #[serde(default)]
    vcpu_count: Option<u64>,
    #[serde(default)]
    mem_size_mib: Option<u64>,
    #[serde(default)]
    smt: Option<bool>,
    #[serde(default)]
    track_dirty_pages: Option<bool>,
    #[serde(default)]
    cpu_template: Option<String>,
    #[serde(default)]
    huge_pages: Option<String>,
    #[serde(default)]
    cpu_baseline: Option<CpuBaseline>,
    #[serde(default)]
    gdb_socket_path: Option<IgnoredAny>,
}

impl TryFrom<Raw> for MachineConfig {
    type Error = ConfigError;
    fn try_from(raw: Raw) -> Result<Self, ConfigError> {
        let patch = MachinePatch::try_from(RawPatch {
            vcpu_count: Some(raw.vcpu_count),
            mem_size_mib: Some(raw.mem_size_mib),
            smt: raw.smt,
            track_dirty_pages: raw.track_dirty_pages,
            cpu_template: raw.cpu_template,
            huge_pages: raw.huge_pages,
            cpu_baseline: raw.cpu_baseline,
            gdb_socket_path: raw.gdb_socket_path,
        })?;
        Ok(Self::default().patched(&patch))
    }
}

impl TryFrom<RawPatch> for MachinePatch {
    type Error = ConfigError;
    fn try_from(raw: RawPatch) -> Result<Self, ConfigError> {
        if raw.smt == Some(true) {
            return Err(ConfigError::new(
                "smt",
                "only false is offered: every vCPU is a core of its own",
            ));
        }
        if raw.track_dirty_pages == Some(true) {
            return Err(ConfigError::new(
                "track_dirty_pages",
                "only false is offered: this version takes no snapshots",
            ));
        }
        if let Some(template) = raw.cpu_template.filter(|t| t != "None") {
            return Err(ConfigError::new(
                "cpu_template",
                format_args!("{template:?} is not offered; only \"None\" is"),
            ));
        }
        refuse(
            "gdb_socket_path",
            raw.gdb_socket_path.as_ref(),
            "there is no debugger stub",
        )?;
        Ok(Self {
            vcpu_count: raw.vcpu_count.map(vcpu_count).transpose()?,
            mem_size_mib: raw.mem_size_mib.map(mem_size).transpose()?,
            huge_pages: raw.huge_pages.as_deref().map(huge_pages).transpose()?,
            cpu_baseline: raw.cpu_baseline,
        })
    }
}

/// Checks a number of vCPUs, for `/machine-config` and `/prepare`.
pub(super) fn vcpu_count(count: u64) -> Result<u8, ConfigError> {
    match u8::try_from(count) {
        Ok(n @ 1..=MAX_VCPUS) => Ok(n),
        _ => Err(ConfigError::new(
            "vcpu_count",
            format_args!("{count} is not in 1..={MAX_VCPUS}"),
        )),
    }
}

fn mem_size(mib: u64) -> Result<u32, ConfigError> {
    match u32::try_from(mib) {
        Ok(n @ MIN_MEM_MIB..=MAX_MEM_MIB) => Ok(n),
        _ => Err(ConfigError::new(
            "mem_size_mib",
            format_args!("{mib} is not in {MIN_MEM_MIB}..={MAX_MEM_MIB}"),
        )),
    }
}

fn huge_pages(text: &str) -> Result<HugePages, ConfigError> {
    match text {
        "None" => Ok(HugePages::None),
        other => Err(ConfigError::new(
            "huge_pages",
            format_args!(
                "{other:?} is not offered; only \"None\" is, which leaves it to the host's \
                 transparent_hugepage setting"
            ),
        )),
    }
}
