//! Putting a guest together from its configuration: KVM, RAM, kernel, buses, devices, vCPUs.
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvm_bindings::CpuId;
use vm_memory::{Bytes, GuestAddress};
use vm_superio::serial::SerialState;
use vmm_sys_util::eventfd::EventFd;

use super::events::{DeviceEvents, Notice, Notifier};
use super::guest::{DriveHandle, Guest, GuestMemory};
use super::image::Image;
use super::ready::ReadyMemory;
use crate::arch::x86_64::acpi::{self, AcpiError, MmioDevice};
use crate::arch::x86_64::boot::{self, BootError, BootInfo};
use crate::arch::x86_64::cpuid::{self, CpuidError, OtherCpu};
use crate::arch::x86_64::kernel::{KernelError, LoadedKernel};
use crate::arch::x86_64::mptable::{self, MpTableError};
use crate::arch::x86_64::{layout, registers};
use crate::backend::disk::{Disk, FileId};
use crate::backend::layers::{self, Named};
use crate::backend::page_handler::HandlerError;
use crate::backend::unix::{ListenError, Listener, SocketFile};
use crate::bus::{BusDevice, BusError};
use crate::config::{
    Descriptors, Discovery, Drive, Expect, Format, MachineConfig, OpenError, Source, VmConfig,
};
use crate::kvm::{GuestBus, Vcpu, VcpuError, VcpuThread, Vm, VmError};
use crate::legacy::{self, MachineEvents, SerialRegisters};
use crate::log_debug;
use crate::memory::registers::{RegisterPage, register_pages};
use crate::memory::{GuestRam, MemoryError, slots};
use crate::metrics::Registry;
use crate::virtio::balloon::{Balloon, BalloonHandle};
use crate::virtio::blk;
use crate::virtio::console::{Console, ConsoleConfig, ConsoleHandle};
use crate::virtio::device::{Interrupt, RestoreError, VirtioDevice};
use crate::virtio::mmio::{Transport, register};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{self, Counters, Dial, Vsock};

#[derive(Debug, thiserror::Error)]
pub(super) enum AssembleError {
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("kernel_image_path: {path} {source}")]
    Kernel { path: String, source: KernelError },
    #[error("initrd_path: {path} {source}")]
    Initrd { path: String, source: KernelError },
    #[error("boot_args: {0}")]
    Boot(#[from] BootError),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error("drive {id:?}: {what}")]
    Drive { id: String, what: String },
    #[error("{field}: {source}")]
    Socket {
        field: &'static str,
        source: ListenError,
    },
    #[error("{what}: {source}")]
    Device {
        what: &'static str,
        source: io::Error,
    },
    #[error("mem_backend: {path}: {source}")]
    Handler { path: String, source: HandlerError },
    #[error("no kernel is configured")]
    NoKernel,
    #[error(
        "the guest has more devices than the {} interrupt lines allow",
        layout::VIRTIO_MAX_DEVICES
    )]
    TooManyDevices,
    #[error("guest RAM cannot be written: {0}")]
    Ram(vm_memory::GuestMemoryError),
    #[error("the snapshot cannot be used on this host: {0}")]
    OtherCpu(#[from] OtherCpu),
    #[error("the snapshot has {saved} devices, and its configuration makes {made}")]
    DeviceCount { saved: usize, made: usize },
    #[error("the snapshot's {device}: {source}")]
    Restore {
        device: String,
        source: RestoreError,
    },
}

pub(super) type Result<T> = std::result::Result<T, AssembleError>;

/// What can be made before it is known which guest it will be: creating a VM can take tens
/// of milliseconds on a busy host.
pub(super) struct Prepared {
    pub(super) vm: Vm,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) cpuid: CpuId,
    pub(super) memory: Option<ReadyMemory>,
}

impl Prepared {
    /// Adds vCPUs until there are so many.
    pub(super) fn grow(&mut self, vcpu_count: u8) -> Result<()> {
        let there = u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX);
        for index in there..vcpu_count {
            self.vcpus.push(self.vm.create_vcpu(index)?);
        }
        Ok(())
    }

    /// Has KVM map runs of guest-physical memory, as long as it can.
    pub(super) fn pre_fault(&self) -> impl FnMut(u64, u64) + '_ {
        pre_fault(&self.vcpus)
    }
}

/// Has KVM map runs of guest-physical memory, as long as it can.
pub(super) fn pre_fault(vcpus: &[Vcpu]) -> impl FnMut(u64, u64) + '_ {
    let mut first = vcpus.first();
    move |start, len| first = first.filter(|vcpu| vcpu.pre_fault(start, len))
}

pub(super) fn prepare(vcpu_count: u8, dev_kvm: Option<OwnedFd>) -> Result<Prepared> {
    let vm = Vm::new(dev_kvm)?;
    let cpuid = vm.supported_cpuid()?;
    let mut prepared = Prepared {
        vm,
        vcpus: Vec::new(),
        cpuid,
        memory: None,
    };
    prepared.grow(vcpu_count)?;
    Ok(prepared)
}

/// Everything `build` needs beside the VM.
pub(super) struct Parts<'a> {
    pub(super) config: &'a VmConfig,
    pub(super) descriptors: &'a Descriptors,
    pub(super) notifier: &'a Notifier,
    pub(super) metrics: &'a Registry,
    /// Socket files that the guest's devices made, to be removed at the end.
    pub(super) sockets: &'a mut Vec<SocketFile>,
}

/// Builds the guest; its vCPUs are paused.
pub(super) fn build(prepared: Prepared, image: &Image, parts: Parts<'_>) -> Result<Guest> {
    let built = put_together(prepared, image, parts);
    if built.is_err() {
        // Whoever tries again until a drive is there must not pay for every kernel loaded.
        image.discard();
    }
    built
}

fn put_together(prepared: Prepared, image: &Image, parts: Parts<'_>) -> Result<Guest> {
    let Image {
        ram,
        kernel,
        initrd,
        ..
    } = image;
    let Prepared {
        mut vm,
        vcpus,
        cpuid,
        ..
    } = prepared;
    let started = Instant::now();
    let stage = |what: &str| {
        log_debug!(
            "{what}: {} us into the build",
            started.elapsed().as_micros()
        );
    };
    let mut builder = Builder::new(&mut vm, GuestMemory::booted(Arc::clone(ram)), parts);
    let handles = builder.add_devices(&SerialState::default())?;
    stage("devices made");
    builder.vm.map_ram(ram)?;
    builder.write_boot_data(kernel, *initrd)?;
    stage("boot data written");
    let machine = &builder.parts.config.machine_config;
    set_up_vcpus(&vcpus, ram, &cpuid, kernel, machine)?;
    let running = builder.start(vcpus)?;
    stage("vCPUs made");
    Ok(running.into_guest(vm, handles))
}

/// What reaches the devices of a guest beside its driver.
pub(super) struct Handles {
    drives: BTreeMap<String, DriveHandle>,
    balloon: Option<BalloonHandle>,
    console: ConsoleHandle,
    serial: SerialRegisters,
}

/// A guest but for its VM.
pub(super) struct Running {
    vcpus: Vec<VcpuThread>,
    bus: Arc<GuestBus>,
    devices: Vec<DeviceEvents>,
    swallowed: Vec<EventFd>,
    memory: GuestMemory,
}

impl Running {
    pub(super) fn into_guest(self, vm: Vm, handles: Handles) -> Guest {
        Guest {
            vm,
            _swallowed: self.swallowed,
            vcpus: self.vcpus,
            bus: self.bus,
            devices: self.devices,
            memory: self.memory,
            drives: handles.drives,
            balloon: handles.balloon,
            console: handles.console,
            serial: handles.serial,
            origin: None,
        }
    }
}

pub(super) struct Builder<'a> {
    pub(super) vm: &'a mut Vm,
    pub(super) memory: GuestMemory,
    bus: GuestBus,
    pub(super) devices: Vec<DeviceEvents>,
    windows: Vec<MmioDevice>,
    /// Of all virtio devices, if the guest reads them without exits.
    pages: Vec<RegisterPage>,
    /// Event fds that nobody reads.
    swallowed: Vec<EventFd>,
    /// Files of the drives so far: which, whether read-only, of which drive.
    claimed: Vec<(FileId, bool, String)>,
    pub(super) parts: Parts<'a>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(vm: &'a mut Vm, memory: GuestMemory, parts: Parts<'a>) -> Self {
        Self {
            vm,
            bus: GuestBus {
                ram: slots(&memory.ram)
                    .iter()
                    .map(|slot| slot.guest_start..slot.guest_start + slot.len)
                    .collect(),
                faults: memory.faults.clone(),
                ..GuestBus::default()
            },
            memory,
            devices: Vec::new(),
            windows: Vec::new(),
            claimed: Vec::new(),
            pages: Vec::new(),
            swallowed: Vec::new(),
            parts,
        }
    }

    /// Makes all that the configuration names, in the order in which guests find it.
    pub(super) fn add_devices(&mut self, serial: &SerialState) -> Result<Handles> {
        self.share_registers()?;
        let drives = self.add_drives()?;
        self.add_vsock()?;
        self.add_rng()?;
        let balloon = self.add_balloon()?;
        let console = self.add_console()?;
        let serial = self.add_platform(serial)?;
        Ok(Handles {
            drives,
            balloon,
            console,
            serial,
        })
    }

    /// Gives the vCPUs their threads; they are paused.
    pub(super) fn start(self, vcpus: Vec<Vcpu>) -> Result<Running> {
        let bus = Arc::new(self.bus);
        let notifier = self.parts.notifier;
        let vcpus = vcpus
            .into_iter()
            .map(|vcpu| {
                let notifier = notifier.clone();
                let on_fault = Box::new(move |fault| notifier.send(Notice::Fault(fault)));
                vcpu.start(Arc::clone(&bus), on_fault)
            })
            .collect::<std::result::Result<_, _>>()?;
        Ok(Running {
            vcpus,
            bus,
            devices: self.devices,
            swallowed: self.swallowed,
            memory: self.memory,
        })
    }

    fn share_registers(&mut self) -> Result<()> {
        let pages = register_pages(layout::VIRTIO_MAX_DEVICES).map_err(device("registers"))?;
        if self.vm.map_registers(layout::VIRTIO_MMIO_START, &pages)? {
            self.pages = pages;
        }
        Ok(())
    }

    fn add_drives(&mut self) -> Result<BTreeMap<String, DriveHandle>> {
        let mut handles = BTreeMap::new();
        for drive in &self.parts.config.drives {
            let handle = self.add_drive(drive)?;
            handles.insert(drive.drive_id.clone(), handle);
        }
        Ok(handles)
    }

    fn add_drive(&mut self, drive: &Drive) -> Result<DriveHandle> {
        let (disk, layers) = self.open_drive(drive)?;
        let failed = |what: String| AssembleError::Drive {
            id: drive.drive_id.clone(),
            what,
        };
        let options = blk::Options {
            id: drive.drive_id.clone(),
            serial: drive.serial().to_owned(),
            read_only: drive.is_read_only,
            cache_type: drive.cache_type,
            engine: drive.io_engine,
        };
        let device = blk::Block::new(disk, &options).map_err(|e| failed(e.to_string()))?;
        let handle = DriveHandle {
            control: device.control(),
            stats: device.stats(),
            read_only: drive.is_read_only,
            layers,
        };
        self.add_virtio(Box::new(device))?;
        Ok(handle)
    }

    fn open_drive(&mut self, drive: &Drive) -> Result<(Box<dyn Disk>, Option<layers::Handle>)> {
        let failed = |what: String| AssembleError::Drive {
            id: drive.drive_id.clone(),
            what,
        };
        let read_only = drive.is_read_only;
        if drive.format == Format::Raw {
            let Named { file, name } =
                self.open_file(drive, "path_on_host", &drive.path_on_host, read_only)?;
            let disk = blk::open_disk(file, &name, read_only, drive.io_engine)
                .map_err(|e| failed(e.to_string()))?;
            return Ok((disk, None));
        }
        let base = self.open_file(drive, "path_on_host", &drive.path_on_host, true)?;
        let top = drive.layers.len().checked_sub(1).filter(|_| !read_only);
        let mut files = Vec::new();
        for (index, source) in drive.layers.iter().enumerate() {
            files.push(self.open_file(drive, "layers", source, Some(index) != top)?);
        }
        let (disk, handle) = layers::open(base, files, read_only, drive.io_engine)
            .map_err(|e| failed(e.to_string()))?;
        Ok((disk, Some(handle)))
    }

    /// A file of a drive, which no other drive may have if one of them writes it.
    fn open_file(
        &mut self,
        drive: &Drive,
        field: &str,
        source: &Source,
        read_only: bool,
    ) -> Result<Named> {
        let expect = if read_only {
            Expect::ReadDisk
        } else {
            Expect::WriteDisk
        };
        let field = format!("drive {:?}: {field}", drive.drive_id);
        let file = self.parts.descriptors.open(&field, source, expect)?;
        let claimed = self.claim(&file, source, read_only, &drive.drive_id);
        claimed.map_err(|what| AssembleError::Drive {
            id: drive.drive_id.clone(),
            what,
        })?;
        Ok(Named {
            file,
            name: source.to_string(),
        })
    }

    /// Two drives on one open file share its lock, so the lock cannot tell that it is there twice.
    fn claim(
        &mut self,
        file: &File,
        source: &Source,
        read_only: bool,
        drive: &str,
    ) -> std::result::Result<(), String> {
        let id = FileId::of(file).map_err(|e| e.to_string())?;
        let shared = self
            .claimed
            .iter()
            .find(|(other, other_read_only, _)| *other == id && !(*other_read_only && read_only));
        if let Some((_, _, other)) = shared {
            return Err(format!(
                "{source} is drive {other:?} already; only read-only drives can share a file"
            ));
        }
        self.claimed.push((id, read_only, drive.to_owned()));
        Ok(())
    }

    fn add_vsock(&mut self) -> Result<()> {
        let Some(config) = &self.parts.config.vsock else {
            return Ok(());
        };
        let failed = |source| AssembleError::Socket {
            field: "vsock uds_path",
            source,
        };
        let descriptors = self.parts.descriptors;
        let (listener, dial) = match &config.uds_path {
            Source::Path(path) => {
                let (listener, dial) = vsock::listen(path).map_err(failed)?;
                self.parts.sockets.extend(listener.socket_file());
                (listener, dial)
            }
            Source::Fd(name) => {
                let fd = descriptors.duplicate("uds_path", name)?;
                let directory = format!("{name}.dir");
                let dial = if descriptors.contains(&directory) {
                    Dial::Under(descriptors.duplicate("uds_path", &directory)?)
                } else {
                    Dial::Nowhere
                };
                (Listener::from_fd(fd).map_err(failed)?, dial)
            }
        };
        let counters = Counters::new(self.parts.metrics);
        let device =
            Vsock::new(config.guest_cid, listener, dial, counters).map_err(device("vsock"))?;
        self.add_virtio(Box::new(device))
    }

    fn listen(&mut self, field: &'static str, source: &Source) -> Result<Listener> {
        let failed = |source| AssembleError::Socket { field, source };
        match source {
            Source::Path(path) => {
                let listener = Listener::bind(path).map_err(failed)?;
                self.parts.sockets.extend(listener.socket_file());
                Ok(listener)
            }
            Source::Fd(name) => {
                let fd = self.parts.descriptors.duplicate(field, name)?;
                Listener::from_fd(fd).map_err(failed)
            }
        }
    }

    fn add_rng(&mut self) -> Result<()> {
        if self.parts.config.entropy.is_none() {
            return Ok(());
        }
        let rng = Rng::new().map_err(device("entropy device"))?;
        self.add_virtio(Box::new(rng))
    }

    fn add_balloon(&mut self) -> Result<Option<BalloonHandle>> {
        let Some(config) = &self.parts.config.balloon else {
            return Ok(None);
        };
        let balloon = Balloon::new(config, self.memory.pages()).map_err(device("balloon"))?;
        let handle = balloon.handle();
        self.add_virtio(Box::new(balloon))?;
        Ok(Some(handle))
    }

    fn add_console(&mut self) -> Result<ConsoleHandle> {
        let config = self.parts.config.console.clone().unwrap_or_default();
        let listener = match &config.socket_path {
            Some(source) => {
                let listener = self.listen("console socket_path", source)?;
                Some(listener.into_fd().map_err(device("console socket"))?.into())
            }
            None => None,
        };
        let console = Console::new(ConsoleConfig {
            scrollback: config.scrollback_bytes as usize,
            listener,
            ..ConsoleConfig::default()
        })
        .map_err(device("console"))?;
        let handle = console.handle();
        self.add_virtio(Box::new(console))?;
        Ok(handle)
    }

    fn add_virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<()> {
        let index = self.devices.len();
        if index >= layout::VIRTIO_MAX_DEVICES {
            return Err(AssembleError::TooManyDevices);
        }
        let address = layout::VIRTIO_MMIO_START + index as u64 * layout::VIRTIO_MMIO_LEN;
        let gsi = layout::VIRTIO_FIRST_GSI + index as u32;
        let line = Arc::new(self.vm.irq_line(gsi));
        let page = self.pages.get(index).copied();
        let status = page.and_then(|page| page.word(register::INTERRUPT_STATUS));
        let irq = match status {
            Some(status) => Interrupt::with_register(line, status),
            None => Interrupt::new(line),
        };
        let mut transport = Transport::new(device, Arc::clone(&self.memory.ram), irq)
            .ok_or(AssembleError::TooManyDevices)?;
        if let Some(page) = page {
            transport.show_in(page);
            // Acknowledging used buffers changes nothing then: KVM swallows it.
            let swallowed = self
                .vm
                .ioeventfd(address + register::INTERRUPT_ACK, Some(1))?;
            self.swallowed.push(swallowed);
        }
        let mut kicks = Vec::new();
        for queue in transport.polled_queues() {
            let notify = address + register::QUEUE_NOTIFY;
            kicks.push((queue, self.vm.ioeventfd(notify, Some(queue))?));
        }
        let transport = Arc::new(Mutex::new(transport));
        let on_bus: Arc<Mutex<dyn BusDevice>> = transport.clone();
        self.bus
            .mmio
            .insert(address, layout::VIRTIO_MMIO_LEN, on_bus)?;
        self.windows.push(MmioDevice { address, gsi });
        self.devices.push(DeviceEvents {
            transport,
            kicks: kicks.into(),
        });
        Ok(())
    }

    /// Serial port, reset, sleep registers, pvpanic, boot marker.
    fn add_platform(&mut self, serial: &SerialState) -> Result<SerialRegisters> {
        let notifier = self.parts.notifier.clone();
        let events: MachineEvents = Arc::new(move |event| notifier.send(Notice::Event(event)));
        let serial = self.serial(serial)?;
        let registers = serial.registers();
        let ports = &mut self.bus.ports;
        ports.insert(layout::COM1_PORT, 8, shared(serial))?;
        let reset = legacy::ResetController::new(events.clone());
        ports.insert(layout::I8042_PORT, 5, shared(reset))?;
        let mmio = &mut self.bus.mmio;
        mmio.insert(
            layout::PVPANIC,
            1,
            shared(legacy::PvPanic::new(events.clone())),
        )?;
        mmio.insert(
            layout::SLEEP_REGISTERS,
            legacy::sleep::LEN,
            shared(legacy::SleepRegisters::new(events.clone())),
        )?;
        mmio.insert(
            layout::BOOT_MARKER,
            8,
            shared(legacy::BootMarker::new(events)),
        )?;
        Ok(registers)
    }

    fn serial(&self, state: &SerialState) -> Result<legacy::Serial> {
        let path = self
            .parts
            .config
            .serial
            .as_ref()
            .and_then(|serial| serial.serial_out_path.as_ref());
        let output = match path {
            Some(source) => {
                let open = self
                    .parts
                    .descriptors
                    .open("serial_out_path", source, Expect::Output);
                Some(OwnedFd::from(open?))
            }
            None => rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3).ok(),
        };
        let line = Arc::new(self.vm.irqfd(layout::COM1_GSI)?);
        legacy::Serial::from_state(state, line, output, SERIAL_LIMIT).map_err(device("serial port"))
    }

    fn write_boot_data(&mut self, kernel: &LoadedKernel, initrd: Option<(u64, u64)>) -> Result<()> {
        let cpus = self.parts.config.machine_config.vcpu_count;
        let Some(source) = &self.parts.config.boot_source else {
            return Ok(());
        };
        // With ACPI too: a kernel that finds the table at once need not search 64 KiB for it,
        // word by word; what it then uses is ACPI's.
        mptable::write(&self.memory.ram, cpus)?;
        let rsdp = match source.discovery {
            Discovery::Acpi => {
                self.write_generation_id()?;
                Some(acpi::write(&self.memory.ram, cpus, &self.windows)?)
            }
            Discovery::CommandLine => {
                self.vm.create_pit()?;
                None
            }
        };
        let command_line = command_line(self.parts.config, &self.windows);
        let info = BootInfo {
            command_line: &command_line,
            initrd,
            rsdp,
        };
        Ok(boot::write(&self.memory.ram, kernel, &info)?)
    }

    /// A new one, which nobody has had.
    pub(super) fn write_generation_id(&self) -> Result<()> {
        write_generation_id(&self.memory.ram)
    }
}

/// A new one, which nobody has had.
pub(super) fn write_generation_id(ram: &GuestRam) -> Result<()> {
    let mut id = [0u8; 16];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut id))
        .map_err(device("VM generation id"))?;
    ram.write_slice(&id, GuestAddress(layout::VM_GENERATION_ID))
        .map_err(AssembleError::Ram)
}

/// Bytes of serial output that are passed on: it is for early debugging, not a log.
const SERIAL_LIMIT: u64 = 16 << 20;

fn device(what: &'static str) -> impl FnOnce(io::Error) -> AssembleError {
    move |source| AssembleError::Device { what, source }
}

fn shared<D: BusDevice + 'static>(device: D) -> Arc<Mutex<dyn BusDevice>> {
    Arc::new(Mutex::new(device))
}

/// The kernel's command line: what was asked for, the root drive, and the devices where the
/// guest does not find them by ACPI.
fn command_line(config: &VmConfig, windows: &[MmioDevice]) -> String {
    let Some(boot) = &config.boot_source else {
        return String::new();
    };
    let mut line = boot.boot_args().to_owned();
    let mut add = |word: &str| {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    };
    if let Some(root) = config.drives.iter().find(|d| d.is_root_device) {
        match &root.partuuid {
            Some(id) => add(&format!("root=PARTUUID={id}")),
            None => add("root=/dev/vda"),
        }
        add(if root.is_read_only { "ro" } else { "rw" });
    }
    if boot.discovery == Discovery::CommandLine {
        for window in windows {
            add(&format!(
                "virtio_mmio.device={}@{:#x}:{}",
                layout::VIRTIO_MMIO_LEN,
                window.address,
                window.gsi
            ));
        }
    }
    line
}

fn set_up_vcpus(
    vcpus: &[Vcpu],
    ram: &GuestRam,
    supported: &CpuId,
    kernel: &LoadedKernel,
    machine: &MachineConfig,
) -> Result<()> {
    for (vcpu, index) in vcpus.iter().zip(0u8..) {
        let cpuid = cpuid::for_vcpu(supported, index, machine.vcpu_count, machine.cpu_baseline)?;
        vcpu.set_cpuid(&cpuid)?;
        vcpu.enable_states(cpuid::state_components(&cpuid))?;
        vcpu.set_msrs(&registers::boot_msrs())?;
        let mut lapic = vcpu.lapic()?;
        registers::wire_lapic(&mut lapic);
        vcpu.set_lapic(&lapic)?;
        if index == 0 {
            let mut sregs = vcpu.sregs()?;
            registers::system(ram, &mut sregs, kernel.entry).map_err(AssembleError::Ram)?;
            vcpu.set_sregs(&sregs)?;
            vcpu.set_regs(&registers::general(kernel.entry))?;
        }
    }
    Ok(())
}
