//! `/snapshot/create` and `/snapshot/load`: when they are allowed.
use super::{Configurator, Effect, Outcome, Phase};
use crate::api::Fault;
use crate::config::{Format, MachineConfig, SnapshotCreate, SnapshotLoad, SnapshotType, VmConfig};

impl Configurator {
    pub(super) fn create_snapshot(&self, create: SnapshotCreate) -> Outcome {
        self.after_start("/snapshot/create")?;
        if self.phase != Phase::Paused && !create.resume_vm {
            return Err(Fault::new(
                "/snapshot/create: the guest is running; PATCH /vm {\"state\": \"Paused\"} first, or have \
                 it run on with \"resume_vm\": true",
            ));
        }
        if create.snapshot_path == create.mem_file_path {
            return Err(Fault::new(
                "mem_file_path: it is the same file as snapshot_path",
            ));
        }
        if create.hint_free_pages_ms > 0 {
            self.check_hinting(&create)?;
        }
        self.check_source("snapshot_path", Some(&create.snapshot_path))?;
        self.check_source("mem_file_path", Some(&create.mem_file_path))?;
        if create.taken.is_some() && !create.resume_vm {
            return Err(Fault::new(
                "taken: it tells when the guest runs on, which takes \"resume_vm\": true",
            ));
        }
        self.check_source("taken", create.taken.as_ref())?;
        for (id, source) in &create.next_layers {
            self.check_source("next_layers", Some(source))?;
            let drive = self.config.drives.iter().find(|d| d.drive_id == *id);
            let writable = drive.is_some_and(|d| d.format == Format::Layers && !d.is_read_only);
            if !writable {
                return Err(Fault::new(format!(
                    "next_layers: there is no writable drive {id:?} with format \"layers\""
                )));
            }
        }
        Ok(Effect::CreateSnapshot(create))
    }

    fn check_hinting(&self, create: &SnapshotCreate) -> Result<(), Fault> {
        let why = if !self
            .config
            .balloon
            .as_ref()
            .is_some_and(|b| b.free_page_hinting)
        {
            "there is no balloon with free_page_hinting"
        } else if self.phase == Phase::Paused {
            "a paused guest cannot name its free pages; pause it after /balloon/hinting/start, or have the \
             snapshot pause it with \"resume_vm\": true"
        } else if create.snapshot_type == SnapshotType::Increment {
            // Each page would count as changed.
            "it would make an increment larger"
        } else {
            return Ok(());
        };
        Err(Fault::new(format!("hint_free_pages_ms: {why}")))
    }

    pub(super) fn load_snapshot(&self, load: SnapshotLoad) -> Outcome {
        if !matches!(self.phase, Phase::Configuring { .. }) {
            return Err(Fault::new(
                "/snapshot/load: this VMM has a guest already, and serves one in its life; \
                 start another one",
            ));
        }
        if let Some(what) = self.configured() {
            return Err(Fault::new(format!(
                "/snapshot/load: {what} was configured, but comes from the snapshot; load it \
                 into a fresh VMM, with overrides where it should differ"
            )));
        }
        for (field, source) in load.sources() {
            self.check_source(field, Some(source))?;
        }
        Ok(Effect::LoadSnapshot(load))
    }

    /// What was set that has to do with files, so that it depends on where this process works.
    pub(super) fn placed(&self) -> Option<&'static str> {
        let own = [
            ("/console", self.config.console.is_some()),
            ("/serial", self.config.serial.is_some()),
        ];
        let own = own.into_iter().find(|(_, set)| *set).map(|(what, _)| what);
        own.or_else(|| self.configured())
    }

    /// What was set that a snapshot brings along.
    fn configured(&self) -> Option<&'static str> {
        let config = &self.config;
        [
            (
                "/machine-config",
                config.machine_config != MachineConfig::default(),
            ),
            ("/boot-source", config.boot_source.is_some()),
            ("/drives", !config.drives.is_empty()),
            ("/vsock", config.vsock.is_some()),
            ("/entropy", config.entropy.is_some()),
            ("/balloon", config.balloon.is_some()),
        ]
        .into_iter()
        .find_map(|(what, set)| set.then_some(what))
    }

    /// The configuration of the guest that a snapshot brought.
    pub fn adopt(&mut self, config: VmConfig) {
        self.config = config;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Request;
    use crate::config::parse;

    fn load(configurator: &mut Configurator) -> Outcome {
        let load = br#"{"snapshot_path": "s", "mem_file_path": "m", "resume_vm": true}"#;
        configurator.apply(Request::LoadSnapshot(parse(load).unwrap()))
    }

    fn create(configurator: &mut Configurator, ram: &str) -> Outcome {
        let text = format!(r#"{{"snapshot_path": "s", "mem_file_path": "{ram}"}}"#);
        configurator.apply(Request::CreateSnapshot(parse(text.as_bytes()).unwrap()))
    }

    #[test]
    fn one_guest_is_loaded_then_paused_and_saved() {
        let mut configurator = Configurator::default();
        assert!(create(&mut configurator, "m").is_err(), "there is no guest");
        let effect = load(&mut configurator).unwrap();
        configurator.adopt(VmConfig::default());
        configurator.done(&effect);
        assert_eq!(configurator.phase(), Phase::Running);
        assert!(load(&mut configurator).is_err(), "there is one already");
        let running = create(&mut configurator, "m").unwrap_err();
        assert!(running.message.contains("Paused"), "{running}");
        let effect = configurator.apply(Request::Pause).unwrap();
        configurator.done(&effect);
        assert!(create(&mut configurator, "m").is_ok());
        assert!(create(&mut configurator, "s").is_err(), "one file for both");
        assert!(create(&mut configurator, "fd:none").is_err());
    }

    #[test]
    fn only_a_running_guest_with_a_balloon_can_name_its_free_pages() {
        let mut configurator = Configurator::default();
        let mut hinting = VmConfig::default();
        let balloon = br#"{"amount_mib": 0, "deflate_on_oom": true, "free_page_hinting": true}"#;
        hinting.balloon = Some(parse(balloon).unwrap());
        let effect = load(&mut configurator).unwrap();
        configurator.adopt(VmConfig::default());
        configurator.done(&effect);
        let create = |kind: &str| {
            let text = format!(
                r#"{{"snapshot_path": "s", "mem_file_path": "m", "resume_vm": true, "hint_free_pages_ms": 9,
                "snapshot_type": "{kind}"}}"#
            );
            Request::CreateSnapshot(parse(text.as_bytes()).unwrap())
        };
        let refused = configurator.apply(create("Full")).unwrap_err();
        assert!(refused.message.contains("no balloon"), "{refused}");
        configurator.adopt(hinting);
        assert!(configurator.apply(create("Full")).is_ok());
        let refused = configurator.apply(create("Increment")).unwrap_err();
        assert!(refused.message.contains("larger"), "{refused}");
        let effect = configurator.apply(Request::Pause).unwrap();
        configurator.done(&effect);
        let refused = configurator.apply(create("Full")).unwrap_err();
        assert!(refused.message.contains("paused"), "{refused}");
    }

    #[test]
    fn what_the_snapshot_brings_is_not_configured_before() {
        let mut configurator = Configurator::default();
        let drive = br#"{"drive_id": "a", "path_on_host": "a", "is_root_device": false}"#;
        let drive = Request::PutDrive(parse(drive).unwrap());
        configurator.apply(drive).unwrap();
        let refused = load(&mut configurator).unwrap_err();
        assert!(refused.message.contains("/drives"), "{refused}");
    }
}
