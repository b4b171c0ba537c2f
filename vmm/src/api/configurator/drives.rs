//! Drives: which there may be, and what is behind them.
use super::{Configurator, Effect, MAX_DRIVES, Outcome, Phase};
use crate::api::Fault;
use crate::config::{Drive, DrivePatch, Source};

impl Configurator {
    pub(super) fn put_drive(&mut self, drive: Drive) -> Outcome {
        self.before_start("/drives")?;
        self.check_source("path_on_host", Some(&drive.path_on_host))?;
        for layer in &drive.layers {
            self.check_source("layers", Some(layer))?;
        }
        let is_other_root = |d: &&Drive| d.is_root_device && d.drive_id != drive.drive_id;
        if drive.is_root_device
            && let Some(other) = self.config.drives.iter().find(is_other_root)
        {
            return Err(Fault::new(format!(
                "is_root_device: a root block device already exists: {:?}",
                other.drive_id
            )));
        }
        let drives = &mut self.config.drives;
        let full = drives.len() >= MAX_DRIVES;
        match drives.iter_mut().find(|d| d.drive_id == drive.drive_id) {
            Some(known) => *known = drive,
            None if full => {
                return Err(Fault::new(format!(
                    "/drives: at most {MAX_DRIVES} drives are possible"
                )));
            }
            None => drives.push(drive),
        }
        // Stable: the others keep their order.
        self.config.drives.sort_by_key(|d| !d.is_root_device);
        Ok(Effect::Done)
    }

    pub(super) fn patch_drive(&mut self, patch: DrivePatch) -> Outcome {
        self.after_start("PATCH /drives")?;
        if !self
            .config
            .drives
            .iter()
            .any(|d| d.drive_id == patch.drive_id)
        {
            return Err(Fault::new(format!(
                "drive_id: there is no drive {:?}",
                patch.drive_id
            )));
        }
        if (!patch.layers.is_empty() || patch.next_layer.is_some()) && self.phase != Phase::Paused {
            return Err(Fault::new(
                "PATCH /drives: the guest is running; PATCH /vm {\"state\": \"Paused\"} before its layers change",
            ));
        }
        self.check_source("path_on_host", patch.path_on_host.as_ref())?;
        for layer in &patch.layers {
            self.check_source("layers", Some(layer))?;
        }
        self.check_source("next_layer", patch.next_layer.as_ref())?;
        let merged = patch.merged_layers.as_ref();
        self.check_source("merged_layers", merged.map(|merged| &merged.path_on_host))?;
        Ok(Effect::UpdateDrive(patch))
    }

    pub(super) fn drive_updated(&mut self, patch: &DrivePatch) {
        let mut drives = self.config.drives.iter_mut();
        let known = drives.find(|d| d.drive_id == patch.drive_id);
        if let (Some(drive), Some(path)) = (known, &patch.path_on_host) {
            drive.path_on_host.clone_from(path);
        }
        self.descriptors.clear();
    }

    /// A layered drive has these layers now.
    pub fn layers_are(&mut self, drive_id: &str, layers: Vec<Source>) {
        let mut drives = self.config.drives.iter_mut();
        if let Some(drive) = drives.find(|d| d.drive_id == drive_id) {
            drive.layers = layers;
        }
    }
}
