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

/// What was done so far. Nothing is, until both parts were set by a call: defaults may still
/// change.
#[derive(Default)]
pub(super) struct Ahead {
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
        self.image = self.take_image(config, descriptors).ok();
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

    /// The VM, if it has this many vCPUs.
    pub(super) fn take_vm(&mut self, vcpus: u8) -> Option<Prepared> {
        let made_for = std::mem::take(&mut self.vcpus);
        self.vm.take().filter(|_| made_for == vcpus)
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
