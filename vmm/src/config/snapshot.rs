//! `/snapshot/create` and `/snapshot/load`.
use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{CacheType, ConfigError, Source, check_id, refuse};

/// How much of RAM a snapshot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum SnapshotType {
    #[default]
    Full,
    /// What may differ from the memory file the guest was loaded from, or from zeros.
    Diff,
    /// Ours: what has changed since the guest's last snapshot in this process; without one, as `Diff`.
    Increment,
}

/// `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Where the state goes. A file at that path is replaced, never changed; a descriptor must be
    /// an empty regular file.
    pub snapshot_path: Source,
    /// Where RAM goes, the same way.
    pub mem_file_path: Source,
    /// Ours: by `drive_id`, the files that are written from this moment on. The layers that were
    /// written before are frozen.
    #[serde(default)]
    pub next_layers: BTreeMap<String, Source>,
    /// The guest runs on as soon as its memory is frozen, before the files are written. It need not be
    /// paused before.
    #[serde(default)]
    pub resume_vm: bool,
    /// Ours, with `resume_vm`: one byte is written there as soon as the guest runs on.
    #[serde(default)]
    pub taken: Option<Source>,
    /// Ours: how long the running guest may take to name its free pages before, in milliseconds; 0: it is not asked.
    #[serde(default)]
    pub hint_free_pages_ms: u16,
}

/// `PUT /snapshot/look-ahead`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLookAhead {
    /// Of the snapshot that will follow.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
}

/// `PUT /snapshot/reset`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotReset {
    /// Whether the guest runs at once.
    #[serde(default)]
    pub resume_vm: bool,
}

/// `PUT /snapshot/working-set`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSetRecord {
    /// Where it goes: a path, or a descriptor of an empty regular file.
    pub path: Source,
}

/// `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawLoad")]
pub struct SnapshotLoad {
    pub snapshot_path: Source,
    pub memory: MemoryBackend,
    /// Whether the guest runs at once.
    pub resume_vm: bool,
    /// Pages to bring in before the guest runs, as recorded by `/snapshot/working-set`.
    pub working_set: Option<Source>,
    /// Whether changes are watched from the start.
    pub track_dirty_pages: bool,
    /// Whether the guest's clocks go on by the time that has passed, or from where they stood.
    pub clock_realtime: bool,
    /// Takes the place of the socket in the snapshot.
    pub vsock: Option<Source>,
    /// Take the place of files in the snapshot, by `drive_id`.
    pub drives: BTreeMap<String, DriveOverride>,
    /// Ours: nothing is opened by a path in the snapshot; what has no override is refused.
    pub only_overrides: bool,
}

/// Where a guest's RAM comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryBackend {
    /// A memory file, which must not change while the guest runs.
    File(Source),
    /// A process that brings pages in when they are first touched.
    Handler {
        /// The Unix socket that it listens on, or one that is connected to it.
        socket: Source,
        /// Ours: the memory file that it fills. `None`: RAM is anonymous.
        template: Option<Source>,
    },
}

impl MemoryBackend {
    fn sources(&self) -> impl Iterator<Item = (&'static str, &Source)> {
        let (path, template) = match self {
            Self::File(path) => (path, None),
            Self::Handler { socket, template } => (socket, template.as_ref()),
        };
        let template = template.map(|path| ("mem_backend.template_path", path));
        [("mem_backend", path)].into_iter().chain(template)
    }
}

impl TryFrom<RawBackend> for MemoryBackend {
    type Error = ConfigError;
    fn try_from(raw: RawBackend) -> Result<Self, ConfigError> {
        match raw.backend_type {
            RawBackendType::Uffd => Ok(Self::Handler {
                socket: raw.backend_path,
                template: raw.template_path,
            }),
            RawBackendType::File if raw.template_path.is_some() => Err(ConfigError::new(
                "mem_backend.template_path",
                "it goes with \"backend_type\": \"Uffd\"",
            )),
            RawBackendType::File => Ok(Self::File(raw.backend_path)),
        }
    }
}

/// Other files for a drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveOverride {
    /// `None`: as in the snapshot.
    pub path_on_host: Option<Source>,
    /// Of a layered drive; empty: as in the snapshot.
    pub layers: Vec<Source>,
    /// `None`: as in the snapshot. Layered drives know only one.
    pub cache_type: Option<CacheType>,
}

impl DriveOverride {
    fn sources(&self) -> impl Iterator<Item = &Source> {
        self.path_on_host.iter().chain(&self.layers)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLoad {
    snapshot_path: Source,
    #[serde(default)]
    mem_file_path: Option<Source>,
    #[serde(default)]
    mem_backend: Option<RawBackend>,
    #[serde(default)]
    enable_diff_snapshots: Option<bool>,
    #[serde(default)]
    track_dirty_pages: Option<bool>,
    #[serde(default)]
    resume_vm: bool,
    #[serde(default)]
    clock_realtime: bool,
    #[serde(default)]
    working_set: Option<Source>,
    #[serde(default)]
    network_overrides: Vec<IgnoredAny>,
    #[serde(default)]
    vsock_override: Option<RawVsock>,
    #[serde(default)]
    drive_overrides: Vec<RawDrive>,
    #[serde(default)]
    only_overrides: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBackend {
    backend_type: RawBackendType,
    backend_path: Source,
    #[serde(default)]
    template_path: Option<Source>,
}

#[derive(Deserialize)]
enum RawBackendType {
    File,
    Uffd,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVsock {
    uds_path: Source,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDrive {
    drive_id: String,
    #[serde(default)]
    path_on_host: Option<Source>,
    #[serde(default)]
    layers: Vec<Source>,
    #[serde(default)]
    cache_type: Option<CacheType>,
}

impl TryFrom<RawLoad> for SnapshotLoad {
    type Error = ConfigError;
    fn try_from(raw: RawLoad) -> Result<Self, ConfigError> {
        let memory = match (raw.mem_file_path, raw.mem_backend) {
            (Some(path), None) => MemoryBackend::File(path),
            (None, Some(backend)) => backend.try_into()?,
            _ => {
                return Err(ConfigError::new(
                    "mem_backend",
                    "exactly one of mem_backend and mem_file_path is needed",
                ));
            }
        };
        let handled = matches!(memory, MemoryBackend::Handler { template: None, .. });
        if handled && raw.working_set.is_some() {
            return Err(ConfigError::new(
                "working_set",
                "with \"Uffd\" the page-fault handler brings pages in: give it the recording",
            ));
        }
        refuse(
            "network_overrides",
            raw.network_overrides.first(),
            "this version has no network devices",
        )?;
        let mut drives = BTreeMap::new();
        for RawDrive {
            drive_id,
            path_on_host,
            layers,
            cache_type,
        } in raw.drive_overrides
        {
            check_id("drive_overrides.drive_id", &drive_id)?;
            let files = DriveOverride {
                path_on_host,
                layers,
                cache_type,
            };
            if files.sources().next().is_none() {
                return Err(ConfigError::new(
                    "drive_overrides",
                    format_args!("{drive_id:?} has neither path_on_host nor layers"),
                ));
            }
            if drives.insert(drive_id.clone(), files).is_some() {
                return Err(ConfigError::new(
                    "drive_overrides",
                    format_args!("{drive_id:?} is there twice"),
                ));
            }
        }
        Ok(Self {
            snapshot_path: raw.snapshot_path,
            memory,
            resume_vm: raw.resume_vm,
            working_set: raw.working_set,
            track_dirty_pages: raw.enable_diff_snapshots == Some(true)
                || raw.track_dirty_pages == Some(true),
            clock_realtime: raw.clock_realtime,
            vsock: raw.vsock_override.map(|vsock| vsock.uds_path),
            drives,
            only_overrides: raw.only_overrides,
        })
    }
}

impl SnapshotLoad {
    /// All sources, each with the field it stands in.
    pub fn sources(&self) -> impl Iterator<Item = (&'static str, &Source)> {
        [("snapshot_path", &self.snapshot_path)]
            .into_iter()
            .chain(self.memory.sources())
            .chain(
                self.working_set
                    .iter()
                    .map(|source| ("working_set", source)),
            )
            .chain(self.vsock.iter().map(|source| ("vsock_override", source)))
            .chain(
                self.drives
                    .values()
                    .flat_map(DriveOverride::sources)
                    .map(|source| ("drive_overrides", source)),
            )
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    fn load(text: &str) -> Result<SnapshotLoad, String> {
        parse(text.as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn a_load_as_its_clients_send_it() {
        let load = load(
            r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": "fd:ram"},
                "enable_diff_snapshots": false, "resume_vm": true, "network_overrides": [],
                "vsock_override": {"uds_path": "v.sock"},
                "drive_overrides": [{"drive_id": "a", "path_on_host": "other"}]}"#,
        )
        .unwrap();
        assert_eq!(load.memory, MemoryBackend::File(Source::Fd("ram".into())));
        assert!(load.resume_vm && !load.clock_realtime);
        assert_eq!(load.drives.len(), 1);
        assert_eq!(load.sources().count(), 4);
    }

    #[test]
    fn what_is_not_offered_is_named() {
        for (fields, text) in [
            ("", "exactly one"),
            (
                r#","mem_file_path":"m","mem_backend":{"backend_type":"File","backend_path":"m"}"#,
                "exactly one",
            ),
            (
                r#","mem_backend":{"backend_type":"File","backend_path":"m","template_path":"t"}"#,
                "template_path",
            ),
            (
                r#","mem_backend":{"backend_type":"Uffd","backend_path":"m"},"working_set":"w""#,
                "working_set",
            ),
            (
                r#","mem_file_path":"m","network_overrides":[{}]"#,
                "network_overrides",
            ),
            (r#","mem_file_path":"m","colour":"red""#, "colour"),
            (
                r#","mem_file_path":"m","drive_overrides":[{"drive_id":"a","path_on_host":"x"},{"drive_id":"a","path_on_host":"y"}]"#,
                "twice",
            ),
            (
                r#","mem_file_path":"m","drive_overrides":[{"drive_id":"a"}]"#,
                "neither",
            ),
        ] {
            let error = load(&format!(r#"{{"snapshot_path":"s"{fields}}}"#)).unwrap_err();
            assert!(error.contains(text), "{error} does not say {text}");
        }
    }

    #[test]
    fn a_handler_may_fill_a_template() {
        let load = |more: &str| {
            load(&format!(
                r#"{{"snapshot_path": "s", "mem_backend": {{"backend_type": "Uffd", "backend_path": "fd:h"{more}}}}}"#
            ))
            .unwrap()
        };
        let MemoryBackend::Handler { socket, template } = load("").memory else {
            panic!("not handled");
        };
        assert_eq!((socket, template), (Source::Fd("h".into()), None));
        let both = load(r#", "template_path": "fd:ram""#);
        assert_eq!(both.sources().count(), 3);
    }

    #[test]
    fn a_create_is_full_unless_it_says_diff() {
        let create = |text: &str| parse::<SnapshotCreate>(text.as_bytes());
        let paths = r#""snapshot_path": "s", "mem_file_path": "m""#;
        assert_eq!(
            create(&format!("{{{paths}}}")).unwrap().snapshot_type,
            SnapshotType::Full
        );
        let diff = create(&format!(r#"{{{paths}, "snapshot_type": "Diff"}}"#)).unwrap();
        assert_eq!(diff.snapshot_type, SnapshotType::Diff);
        assert!(create(r#"{"snapshot_path": "s"}"#).is_err());
    }
}
