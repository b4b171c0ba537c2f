//! What is done before anybody asks for the start. Loading a kernel takes most of the time of
//! an `InstanceStart`, and making a VM can take tens of milliseconds on a busy host; both need
//! only `/machine-config` and `/boot-source`.
use super::assemble::{AssembleError, Prepared};
use super::image::Image;
use crate::api::Request;
use crate::config::{Descriptors, VmConfig};

/// A call on which the early part of a start depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StartPart {
    Machine,
    Boot,
}

impl StartPart {
    pub(super) fn of(request: &Request) -> Option<Self> {
        match request {
            Request::PutMachineConfig(_) | Request::PatchMachineConfig(_) => Some(Self::Machine),
            Request::PutBootSource(_) => Some(Self::Boot),
            _ => None,
        }
    }
}

/// How often a kernel is loaded ahead. RAM that was mapped stays mapped, though empty, so a client
/// that changes its mind for ever must not cost a mapping each time.
const MAX_LOADS: u8 = 8;

/// What was done so far. Nothing is, until both parts were set by a call: defaults may still
/// change.
#[derive(Default)]
pub(super) struct Ahead {
    loads: u8,
    machine_set: bool,
    boot_set: bool,
    image: Option<Image>,
    vm: Option<Prepared>,
    /// For how many vCPUs `vm` was made, or could not be.
    vcpus: u8,
}

impl Ahead {
    pub(super) fn set(&mut self, part: StartPart) {
        match part {
            StartPart::Machine => self.machine_set = true,
            StartPart::Boot => self.boot_set = true,
        }
    }

    /// Loads the kernel, if it can be known.
    pub(super) fn load(&mut self, config: &VmConfig, descriptors: &Descriptors) {
        if !(self.machine_set && self.boot_set) {
            return;
        }
        if let Some(image) = &self.image {
            if image.is_current(config, descriptors) {
                return;
            }
            image.discard();
            self.image = None;
        }
        if self.loads < MAX_LOADS {
            self.loads += 1;
            self.image = Image::load(config, descriptors).ok();
        }
    }

    /// For how many vCPUs a VM should be made now.
    pub(super) fn wants_vm(&self, config: &VmConfig) -> Option<u8> {
        let wanted = config.machine_config.vcpu_count;
        (self.image.is_some() && self.vcpus != wanted).then_some(wanted)
    }

    pub(super) fn keep_vm(&mut self, vcpus: u8, vm: Option<Prepared>) {
        self.vcpus = vcpus;
        self.vm = vm;
    }

    /// The VM, with this many vCPUs; none if it has more.
    pub(super) fn take_vm(&mut self, vcpus: u8) -> Option<Prepared> {
        let made_for = std::mem::take(&mut self.vcpus);
        let mut vm = self.vm.take().filter(|_| made_for <= vcpus)?;
        vm.grow(vcpus).ok()?;
        Some(vm)
    }

    /// The image, loaded now unless it was before and nothing has changed since.
    pub(super) fn take_image(
        &mut self,
        config: &VmConfig,
        descriptors: &Descriptors,
    ) -> Result<Image, AssembleError> {
        if let Some(image) = self.image.take() {
            if image.is_current(config, descriptors) {
                return Ok(image);
            }
            image.discard();
        }
        Image::load(config, descriptors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_changes_its_mind_for_ever_maps_a_bounded_amount() {
        let kernel = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(kernel.path(), b"no kernel").unwrap();
        let boot = format!(r#"{{"kernel_image_path": {:?}}}"#, kernel.path());
        let mut config = VmConfig {
            boot_source: Some(crate::config::parse(boot.as_bytes()).unwrap()),
            ..VmConfig::default()
        };
        let descriptors = Descriptors::default();
        let mappings = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            maps.lines().count()
        };
        let mut ahead = Ahead::default();
        ahead.load(&config, &descriptors);
        assert_eq!(ahead.loads, 0, "nothing before both parts were set");
        ahead.set(StartPart::Machine);
        ahead.set(StartPart::Boot);
        let before = mappings();
        for mib in 0..200 {
            config.machine_config.mem_size_mib = 32 + mib % 7;
            ahead.load(&config, &descriptors);
            assert!(ahead.wants_vm(&config).is_none(), "there is no kernel");
        }
        assert_eq!(ahead.loads, MAX_LOADS);
        assert!(mappings() <= before + 4 * usize::from(MAX_LOADS));
        assert!(ahead.take_image(&config, &descriptors).is_err());
    }
}
