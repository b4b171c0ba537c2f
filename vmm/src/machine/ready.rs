//! What a VMM can have ready before it is asked for its guest: the VM, and RAM if it is known which snapshot it will be.
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::assemble::Prepared;
use super::guest::GuestMemory;
use super::restore::{LoadError, memory_file, read_working_set};
use crate::api::Fault;
use crate::config::{Descriptors, PreparedMemory};
use crate::memory::template;
use crate::memory::working_set::Copied;

/// Bytes of heap and stack that a load uses, about.
const HEAP: usize = 112 << 10;
const STACK: usize = 48 << 10;

/// RAM that a VM has already.
pub(super) struct ReadyMemory {
    pub(super) memory: GuestMemory,
    /// Whether a recorded working set is in it.
    pub(super) has_working_set: bool,
    file: (u64, u64),
}

impl ReadyMemory {
    /// Whether it is a view of that file.
    pub(super) fn is_of(&self, file: &File) -> bool {
        file.metadata()
            .is_ok_and(|is| (is.dev(), is.ino()) == self.file)
    }
}

/// Maps the memory file of a snapshot to come, and brings in what its guest will write first.
pub(super) fn map_ahead(
    prepared: &mut Prepared,
    wanted: &PreparedMemory,
    descriptors: &Descriptors,
) -> Result<(), Fault> {
    let memory = map(wanted, descriptors).map_err(Fault::from_error)?;
    let ram = Arc::clone(&memory.memory.ram);
    prepared.vm.map_ram(&ram).map_err(Fault::from_error)?;
    if let Some(source) = &wanted.working_set {
        let set = read_working_set(source, descriptors).map_err(Fault::from_error)?;
        let copied = match &memory.memory.template {
            Some(file) => set.copy_ahead(&ram, file),
            None => Copied::default(),
        };
        set.bring_in(&ram, &copied, prepared.pre_fault());
    }
    prepared.memory = Some(memory);
    Ok(())
}

fn map(wanted: &PreparedMemory, descriptors: &Descriptors) -> Result<ReadyMemory, LoadError> {
    let path = || wanted.mem_file_path.to_string();
    let file = memory_file("mem_file_path", &wanted.mem_file_path, None, descriptors)?;
    let unreadable = |source| LoadError::Read {
        path: path(),
        source,
    };
    let is = file.metadata().map_err(unreadable)?;
    let ram = template::map_file(&file, is.len() >> 20).map_err(|source| LoadError::Map {
        path: path(),
        source,
    })?;
    Ok(ReadyMemory {
        memory: GuestMemory::restored(Arc::new(ram), file),
        has_working_set: wanted.working_set.is_some(),
        file: (is.dev(), is.ino()),
    })
}

/// Has the kernel give this process the pages that a load will write: each costs as much as one of the guest's.
pub(super) fn touch_own_pages() {
    std::hint::black_box(vec![1_u8; HEAP]);
    std::hint::black_box([1_u8; STACK]);
}
