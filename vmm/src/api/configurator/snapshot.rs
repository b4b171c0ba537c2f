//! `/snapshot/create` and `/snapshot/load`: when they are allowed.
use super::{Configurator, Effect, Outcome, Phase};
use crate::api::Fault;
use crate::config::{Format, MachineConfig, SnapshotCreate, SnapshotLoad, VmConfig};

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
        self.check_source("snapshot_path", Some(&create.snapshot_path))?;
        self.check_source("mem_file_path", Some(&create.mem_file_path))?;
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
    fn what_the_snapshot_brings_is_not_configured_before() {
        let mut configurator = Configurator::default();
        let drive = br#"{"drive_id": "a", "path_on_host": "a", "is_root_device": false}"#;
        let drive = Request::PutDrive(parse(drive).unwrap());
        configurator.apply(drive).unwrap();
        let refused = load(&mut configurator).unwrap_err();
        assert!(refused.message.contains("/drives"), "{refused}");
    }
}
