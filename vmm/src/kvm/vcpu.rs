//! vCPUs: one thread each, that runs the guest and hands its exits to the buses.
//!
//! A vCPU is paused by a flag and a signal. The signal may arrive between the check of the
//! flag and KVM_RUN and be lost, so whoever pauses repeats it until the thread has answered;
//! that costs a millisecond in the rare case and needs no handler state.
use std::cell::OnceCell;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::state::{self, VcpuState};
use crate::bus::Bus;
use crate::memory::handled::Faults;

/// `struct kvm_pre_fault_memory` (KVM api.rst 4.143).
#[repr(C)]
struct PreFault {
    gpa: u64,
    size: u64,
    flags: u64,
    padding: [u64; 5],
}

/// `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)`.
const PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;

#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    #[error("vCPU {index}: KVM refused to {what}: {source}")]
    Ioctl {
        index: u8,
        what: &'static str,
        source: io::Error,
    },
    #[error("vCPU {index} cannot have a thread: {source}")]
    Thread { index: u8, source: io::Error },
    #[error("vCPU {index} did not stop in time")]
    Stuck { index: u8 },
    #[error("vCPU {index}: KVM refused to take MSR {msr:#x} with the value {value:#x}")]
    Msr { index: u8, msr: u32, value: u64 },
}

/// Why a vCPU can run no further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The guest's exception handlers failed three deep: KVM_EXIT_SHUTDOWN.
    TripleFault,
    /// The page of RAM at this guest-physical address cannot be had on the host.
    NoPage(u64),
    /// KVM could not go on; the text says how it put it.
    Internal(String),
}

/// Exits to user space by kind, for metrics and benchmarks.
#[derive(Debug, Default)]
pub struct ExitCounters {
    pub mmio_read: AtomicU64,
    pub mmio_write: AtomicU64,
    pub port_in: AtomicU64,
    pub port_out: AtomicU64,
    pub interrupted: AtomicU64,
}

impl ExitCounters {
    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Where the exits of a guest go.
#[derive(Default)]
pub struct GuestBus {
    pub ports: Bus,
    pub mmio: Bus,
    pub exits: ExitCounters,
    /// Guest-physical addresses of RAM, where no exit comes from as long as its pages can be had.
    pub ram: Vec<Range<u64>>,
    /// What makes a vCPU wait for a page that is not there. It stays as long as a vCPU's thread, which only the
    /// end of the process ends: without it, the page would be one of zeros.
    pub faults: Option<Arc<Faults>>,
}

impl GuestBus {
    /// Where KVM cannot reach a page on the host, it takes the address for that of a device.
    fn check_no_ram(&self, address: u64) -> Result<(), Fault> {
        if self.ram.iter().any(|range| range.contains(&address)) {
            return Err(Fault::NoPage(address));
        }
        Ok(())
    }
}

/// A vCPU before it has a thread.
pub struct Vcpu {
    index: u8,
    pub(super) fd: VcpuFd,
    /// Bytes of the XSAVE area on this host.
    pub(super) xsave_len: usize,
    /// As it was given. Some KVMs (one in software is known) tell another one when asked.
    pub(super) cpuid: OnceCell<Vec<kvm_cpuid_entry2>>,
}

impl Vcpu {
    pub(super) fn new(index: u8, fd: VcpuFd, xsave_len: usize) -> Self {
        Self {
            index,
            fd,
            xsave_len,
            cpuid: OnceCell::new(),
        }
    }

    pub(super) fn index(&self) -> u8 {
        self.index
    }

    /// Everything KVM knows of the vCPU, which must not run; and when its TSC was read.
    pub fn save(&self) -> Result<(VcpuState, Instant), VcpuError> {
        state::save(self)
    }

    /// Makes the vCPU one that was saved. Memory slots and interrupt controllers exist. Returns when its TSC
    /// was set.
    pub fn restore(&self, saved: &VcpuState) -> Result<Instant, VcpuError> {
        state::restore(self, saved)
    }

    /// Fills the guest's second-stage page tables for these guest-physical addresses ahead of need
    /// (KVM_PRE_FAULT_MEMORY, 6.11). Returns whether this KVM can.
    pub fn pre_fault(&self, start: u64, len: u64) -> bool {
        let mut left = PreFault {
            gpa: start,
            size: len,
            flags: 0,
            padding: [0; 5],
        };
        while left.size > 0 {
            // SAFETY: the argument is the structure that the call names; KVM writes to it alone.
            let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), PRE_FAULT_MEMORY, &mut left) };
            let error = io::Error::last_os_error();
            if done != 0 && error.raw_os_error() != Some(libc::EINTR) {
                return false;
            }
        }
        true
    }

    pub(super) fn err(&self, what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuError {
        let index = self.index;
        move |e| VcpuError::Ioctl {
            index,
            what,
            source: io::Error::from_raw_os_error(e.errno()),
        }
    }

    /// Must come before `set_sregs` with long mode: kvm-amd checks the one against the other.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), VcpuError> {
        self.fd
            .set_cpuid2(cpuid)
            .map_err(self.err("take its CPUID"))?;
        // It is given once, before the vCPU runs.
        let _ = self.cpuid.set(cpuid.as_slice().to_vec());
        Ok(())
    }

    /// Sets XCR0 to `components` (zero: leaves it alone). Guests set the same when they enable
    /// XSAVE; under a KVM that itself runs on emulated SVM their XSETBV goes unnoticed, and they
    /// would find that CPUID does not add up.
    pub fn enable_states(&self, components: u64) -> Result<(), VcpuError> {
        if components == 0 {
            return Ok(());
        }
        let mut xcrs = self
            .fd
            .get_xcrs()
            .map_err(self.err("give its extended control registers"))?;
        xcrs.nr_xcrs = 1;
        if let Some(xcr0) = xcrs.xcrs.first_mut() {
            xcr0.xcr = 0;
            xcr0.value = components;
        }
        self.fd
            .set_xcrs(&xcrs)
            .map_err(self.err("take its extended control registers"))
    }

    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), VcpuError> {
        let too_many = |_| self.err("take that many MSRs")(kvm_ioctls::Error::new(libc::E2BIG));
        let msrs = Msrs::from_entries(entries).map_err(too_many)?;
        let set = self.fd.set_msrs(&msrs).map_err(self.err("take its MSRs"))?;
        if set == entries.len() {
            Ok(())
        } else {
            Err(self.err("take one of its MSRs")(kvm_ioctls::Error::new(
                libc::EINVAL,
            )))
        }
    }

    pub fn sregs(&self) -> Result<kvm_sregs, VcpuError> {
        self.fd
            .get_sregs()
            .map_err(self.err("give its system registers"))
    }

    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), VcpuError> {
        self.fd
            .set_sregs(sregs)
            .map_err(self.err("take its system registers"))
    }

    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), VcpuError> {
        self.fd
            .set_regs(regs)
            .map_err(self.err("take its registers"))
    }

    pub fn lapic(&self) -> Result<kvm_lapic_state, VcpuError> {
        self.fd.get_lapic().map_err(self.err("give its local APIC"))
    }

    pub fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), VcpuError> {
        self.fd
            .set_lapic(lapic)
            .map_err(self.err("take its local APIC"))
    }

    /// Gives the vCPU a thread, paused. `on_fault` is called on that thread, once.
    pub fn start(
        self,
        bus: Arc<GuestBus>,
        on_fault: Box<dyn FnOnce(Fault) + Send>,
    ) -> Result<VcpuThread, VcpuError> {
        let index = self.index;
        let thread_error = |source| VcpuError::Thread { index, source };
        register_signal_handler(kick_signal(), on_kick)
            .map_err(|e| thread_error(io::Error::from_raw_os_error(e.errno())))?;
        let control = Arc::new(Control::default());
        let mut runner = Runner {
            vcpu: self,
            bus,
            control: Arc::clone(&control),
            on_fault: Some(on_fault),
        };
        let handle = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(VCPU_STACK)
            .spawn(move || runner.main())
            .map_err(thread_error)?;
        Ok(VcpuThread {
            index,
            control,
            handle,
        })
    }
}

/// Exits are handled without recursion or large buffers.
const VCPU_STACK: usize = 256 << 10;

fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// The signal only has to interrupt KVM_RUN.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wanted {
    #[default]
    Pause,
    Run,
}

#[derive(Default)]
struct State {
    wanted: Wanted,
    /// The thread waits, outside KVM_RUN, with no exit half handled.
    paused: bool,
    /// Somebody wants something of the vCPU.
    asked: Option<Ask>,
}

/// What a paused vCPU's thread is asked for.
enum Ask {
    /// Its state, and when its TSC was read.
    Save(SyncSender<Result<(VcpuState, Instant), VcpuError>>),
    /// To become what was saved. The answer: when its TSC was set.
    Restore(Box<VcpuState>, SyncSender<Result<Instant, VcpuError>>),
}

/// Shared between the thread and whoever commands it.
#[derive(Default)]
struct Control {
    /// Look at `state` before the next KVM_RUN.
    attention: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, wanted: Wanted) {
        self.lock().wanted = wanted;
        self.attention.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

/// A vCPU with its thread, seen from outside.
pub struct VcpuThread {
    index: u8,
    control: Arc<Control>,
    handle: JoinHandle<()>,
}

impl VcpuThread {
    pub fn resume(&self) {
        self.control.want(Wanted::Run);
    }

    /// Asks the vCPU to stop; `wait_paused` waits until it has. Two steps, so that many
    /// vCPUs stop at the same time.
    pub fn request_pause(&self) {
        self.control.want(Wanted::Pause);
        self.kick();
    }

    pub fn wait_paused(&self, deadline: Instant) -> Result<(), VcpuError> {
        let mut state = self.control.lock();
        while !state.paused {
            if Instant::now() >= deadline {
                let index = self.index;
                return Err(VcpuError::Stuck { index });
            }
            let waited = self
                .control
                .changed
                .wait_timeout(state, Duration::from_millis(1));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if !state.paused {
                self.kick();
            }
        }
        Ok(())
    }

    /// The state of a vCPU that is paused.
    pub fn save(&self, deadline: Instant) -> Result<(VcpuState, Instant), VcpuError> {
        self.ask(Ask::Save, deadline)
    }

    /// Makes a vCPU that is paused what it was. Returns when its TSC was set.
    pub fn restore(&self, saved: &VcpuState, deadline: Instant) -> Result<Instant, VcpuError> {
        let saved = Box::new(saved.clone());
        self.ask(|sender| Ask::Restore(saved, sender), deadline)
    }

    fn ask<T>(
        &self,
        ask: impl FnOnce(SyncSender<Result<T, VcpuError>>) -> Ask,
        deadline: Instant,
    ) -> Result<T, VcpuError> {
        let index = self.index;
        let (sender, receiver) = sync_channel(1);
        self.control.lock().asked = Some(ask(sender));
        self.control.changed.notify_all();
        let left = deadline.saturating_duration_since(Instant::now());
        receiver
            .recv_timeout(left)
            .unwrap_or(Err(VcpuError::Stuck { index }))
    }

    fn kick(&self) {
        // Fails only when the thread is gone, and then it does not run the guest either.
        let _ = self.handle.kill(kick_signal());
    }
}

struct Runner {
    vcpu: Vcpu,
    bus: Arc<GuestBus>,
    control: Arc<Control>,
    on_fault: Option<Box<dyn FnOnce(Fault) + Send>>,
}

impl Runner {
    fn main(&mut self) {
        self.control.attention.store(true, Ordering::Release);
        loop {
            if self.control.attention.load(Ordering::Acquire) {
                self.attend();
            }
            if let Err(fault) = self.run_once() {
                self.report(fault);
                self.control.want(Wanted::Pause);
            }
        }
    }

    /// Waits while a pause is wanted. Threads of vCPUs end with the process.
    fn attend(&mut self) {
        if let Err(fault) = self.finish_exit() {
            self.report(fault);
        }
        let control = Arc::clone(&self.control);
        let mut state = control.lock();
        while state.wanted == Wanted::Pause {
            if !state.paused {
                state.paused = true;
                control.changed.notify_all();
            }
            if let Some(ask) = state.asked.take() {
                drop(state);
                // Whoever asked may have given up.
                match ask {
                    Ask::Save(reply) => {
                        let _ = reply.send(self.vcpu.save());
                    }
                    Ask::Restore(saved, reply) => {
                        let _ = reply.send(self.vcpu.restore(&saved));
                    }
                }
                state = control.lock();
                continue;
            }
            state = control
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.paused = false;
        control.attention.store(false, Ordering::Release);
    }

    fn report(&mut self, fault: Fault) {
        if let Some(report) = self.on_fault.take() {
            report(fault);
        }
    }

    /// KVM completes an I/O exit on the next KVM_RUN (api.rst 4.10): enter with immediate_exit,
    /// so that the registers are whole before anybody looks at them. Completing one exit can
    /// bring the next of the same instruction (a wide or repeated MMIO access), which must be
    /// served like any other. KVM emulates at most 1,024 repetitions in a row.
    fn finish_exit(&mut self) -> Result<(), Fault> {
        const MOST: usize = 4096;
        self.vcpu.fd.set_kvm_immediate_exit(1);
        let mut finished = Ok(());
        for _ in 0..MOST {
            match self.vcpu.fd.run() {
                // Nothing is left to complete.
                Ok(VcpuExit::Intr) | Err(_) => break,
                Ok(exit) => finished = handle(&self.bus, exit),
            }
            if finished.is_err() {
                break;
            }
        }
        self.vcpu.fd.set_kvm_immediate_exit(0);
        finished
    }

    fn run_once(&mut self) -> Result<(), Fault> {
        let bus = &*self.bus;
        match self.vcpu.fd.run() {
            Ok(exit) => handle(bus, exit),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                ExitCounters::count(&bus.exits.interrupted);
                Ok(())
            }
            Err(e) if e.errno() == libc::EFAULT => Err(Fault::Internal(
                "a page of guest RAM cannot be had (KVM_RUN: EFAULT)".into(),
            )),
            Err(e) => Err(Fault::Internal(format!("KVM_RUN failed: {e}"))),
        }
    }
}

fn handle(bus: &GuestBus, exit: VcpuExit<'_>) -> Result<(), Fault> {
    match exit {
        VcpuExit::MmioRead(address, data) => {
            bus.check_no_ram(address)?;
            ExitCounters::count(&bus.exits.mmio_read);
            bus.mmio.read(address, data);
        }
        VcpuExit::MmioWrite(address, data) => {
            bus.check_no_ram(address)?;
            ExitCounters::count(&bus.exits.mmio_write);
            bus.mmio.write(address, data);
        }
        // All port devices are byte-wide; a string instruction brings many bytes at once.
        VcpuExit::IoIn(port, data) => {
            ExitCounters::count(&bus.exits.port_in);
            for byte in data.chunks_mut(1) {
                bus.ports.read(u64::from(port), byte);
            }
        }
        VcpuExit::IoOut(port, data) => {
            ExitCounters::count(&bus.exits.port_out);
            for byte in data.chunks(1) {
                bus.ports.write(u64::from(port), byte);
            }
        }
        VcpuExit::Shutdown => return Err(Fault::TripleFault),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Nmi => {
            ExitCounters::count(&bus.exits.interrupted);
        }
        VcpuExit::FailEntry(reason, cpu) => {
            return Err(Fault::Internal(format!(
                "the processor refused to enter the guest: reason {reason:#x}, host CPU {cpu}"
            )));
        }
        VcpuExit::SystemEvent(kind, _) => {
            return Err(Fault::Internal(format!("unexpected system event {kind}")));
        }
        other => return Err(Fault::Internal(format!("unexpected exit {other:?}"))),
    }
    Ok(())
}
