//! The whole configuration as one document: `--config-file`, `GET /vm/config`.
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::{
    Balloon, BootSource, ConfigError, Console, Drive, Logger, MachineConfig, Metrics,
    NO_RATE_LIMITER, Serial, Source, Vsock, machine, refuse,
};

/// `PUT /entropy`: a virtio-rng device; there is nothing to set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawEntropy")]
pub struct Entropy {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntropy {
    #[serde(default)]
    rate_limiter: Option<IgnoredAny>,
}

impl TryFrom<RawEntropy> for Entropy {
    type Error = ConfigError;
    fn try_from(raw: RawEntropy) -> Result<Self, ConfigError> {
        refuse("rate_limiter", raw.rate_limiter.as_ref(), NO_RATE_LIMITER)?;
        Ok(Self {})
    }
}

/// `PUT /prepare` (ours): make VM, vCPUs and interrupt controllers ahead of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawPrepare")]
pub struct Prepare {
    /// 1..=32
    pub vcpu_count: u8,
    /// RAM, if it is known already from which snapshot it will be.
    pub memory: Option<PreparedMemory>,
}

/// RAM that is mapped ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparedMemory {
    pub mem_file_path: Source,
    /// What is brought in then.
    pub working_set: Option<Source>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPrepare {
    vcpu_count: u64,
    #[serde(default)]
    mem_file_path: Option<Source>,
    #[serde(default)]
    working_set: Option<Source>,
}

impl TryFrom<RawPrepare> for Prepare {
    type Error = ConfigError;
    fn try_from(raw: RawPrepare) -> Result<Self, ConfigError> {
        let vcpu_count = machine::vcpu_count(raw.vcpu_count)?;
        let memory = match (raw.mem_file_path, raw.working_set) {
            (Some(mem_file_path), working_set) => Some(PreparedMemory {
                mem_file_path,
                working_set,
            }),
            (None, Some(_)) => {
                return Err(ConfigError::new(
                    "working_set",
                    "it goes with mem_file_path",
                ));
            }
            (None, None) => None,
        };
        Ok(Self { vcpu_count, memory })
    }
}

/// `PUT /workplace` (ours): where a VMM that was started ahead works from now on, and for whom.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawWorkplace")]
pub struct Workplace {
    /// The directory that relative paths begin in.
    pub directory: Source,
    /// Takes the place of `--id`.
    pub id: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWorkplace {
    directory: Source,
    id: String,
}

impl TryFrom<RawWorkplace> for Workplace {
    type Error = ConfigError;
    fn try_from(raw: RawWorkplace) -> Result<Self, ConfigError> {
        let RawWorkplace { directory, id } = raw;
        if !is_instance_id(&id) {
            return Err(ConfigError::new(
                "id",
                format_args!("{id:?} is not 1 to 64 ASCII letters, digits and '-'"),
            ));
        }
        Ok(Self { directory, id })
    }
}

/// Whether a microVM can be called so.
pub(crate) fn is_instance_id(id: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    !id.is_empty() && id.len() <= 64 && id.bytes().all(good)
}

/// Everything that is configured. Parsed from a file it is the same as the calls one by one:
/// [`crate::api::Configurator::load`] checks what concerns several documents at once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Raw", rename_all = "kebab-case")]
pub struct VmConfig {
    pub machine_config: MachineConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// In the order of their first appearance, which is the order the guest finds them in; a
    /// root device stands first.
    pub drives: Vec<Drive>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// `None`: the 16550 writes to standard output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// `None`: a console with the defaults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Raw {
    #[serde(default)]
    machine_config: Option<MachineConfig>,
    #[serde(default)]
    boot_source: Option<BootSource>,
    #[serde(default)]
    drives: Vec<Drive>,
    #[serde(default)]
    vsock: Option<Vsock>,
    #[serde(default)]
    entropy: Option<Entropy>,
    #[serde(default)]
    balloon: Option<Balloon>,
    #[serde(default)]
    serial: Option<Serial>,
    #[serde(default)]
    console: Option<Console>,
    #[serde(default)]
    logger: Option<Logger>,
    #[serde(default)]
    metrics: Option<Metrics>,
    #[serde(default)]
    network_interfaces: Vec<IgnoredAny>,
    #[serde(default)]
    pmem: Vec<IgnoredAny>,
    #[serde(default)]
    cpu_config: Option<IgnoredAny>,
    #[serde(default)]
    mmds_config: Option<IgnoredAny>,
    #[serde(default)]
    memory_hotplug: Option<IgnoredAny>,
}

impl TryFrom<Raw> for VmConfig {
    type Error = ConfigError;
    fn try_from(raw: Raw) -> Result<Self, ConfigError> {
        refuse(
            "network-interfaces",
            raw.network_interfaces.first(),
            "this version has no network",
        )?;
        refuse("pmem", raw.pmem.first(), "there are no pmem devices")?;
        refuse(
            "cpu-config",
            raw.cpu_config.as_ref(),
            "there are no CPU templates",
        )?;
        refuse(
            "mmds-config",
            raw.mmds_config.as_ref(),
            "there is no metadata service",
        )?;
        refuse(
            "memory-hotplug",
            raw.memory_hotplug.as_ref(),
            "RAM has a fixed size",
        )?;
        Ok(Self {
            machine_config: raw.machine_config.unwrap_or_default(),
            boot_source: raw.boot_source,
            drives: raw.drives,
            vsock: raw.vsock,
            entropy: raw.entropy,
            balloon: raw.balloon,
            serial: raw.serial,
            console: raw.console,
            logger: raw.logger,
            metrics: raw.metrics,
        })
    }
}
