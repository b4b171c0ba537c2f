//! The order of calls: what is allowed when, and what the machine must do for it.
mod balloon;
mod drives;
mod snapshot;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;

use self::balloon::{check_balloon_fits, no_balloon};
use super::{Action, Body, Fault, InstanceState, Request};
use crate::config::{
    BalloonStatsUpdate, BalloonUpdate, Descriptors, DrivePatch, HintingStart, Logger, Metrics,
    Prepare, SnapshotCreate, SnapshotLoad, SnapshotLookAhead, SnapshotReset, Source, VmConfig,
    WorkingSetRecord, Workplace,
};

/// Where the microVM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Configuration is being put together; `prepared` vCPUs exist already, if any.
    Configuring {
        prepared: Option<u8>,
    },
    Running,
    Paused,
}

/// What the machine must do so that a request has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing: it is recorded.
    Done,
    /// Nothing: this is the answer.
    Answer(Body),
    /// Make VM, interrupt controllers and vCPUs, and map RAM if it is said which.
    Prepare(Prepare),
    /// Work in another directory, under another id.
    MoveTo(Workplace),
    /// Build and start the guest from [`Configurator::config`], which has a boot source.
    Start,
    Pause,
    Resume,
    /// Save the paused guest.
    CreateSnapshot(SnapshotCreate),
    /// Build a guest from a snapshot; nothing but logger, metrics, console and serial port is
    /// configured. Call [`Configurator::adopt`] before [`Configurator::done`].
    LoadSnapshot(SnapshotLoad),
    /// Make the guest what it was when it was loaded.
    ResetSnapshot(SnapshotReset),
    /// Write down which pages the guest has touched.
    RecordWorkingSet(WorkingSetRecord),
    LookAhead(SnapshotLookAhead),
    FlushMetrics,
    SendCtrlAltDel,
    /// End the VMM at once.
    Stop,
    SetLogger(Logger),
    SetMetrics(Metrics),
    /// Names a drive that exists.
    UpdateDrive(DrivePatch),
    UpdateBalloon(BalloonUpdate),
    UpdateBalloonStats(BalloonStatsUpdate),
    /// Answer with [`BalloonStats`](crate::config::BalloonStats).
    ReadBalloonStats,
    StartHinting(HintingStart),
    StopHinting,
    /// Answer with [`HintingStatus`](crate::config::HintingStatus).
    ReadHinting,
}

/// The state machine between the API and the machine. Pure: no files, no KVM.
///
/// ```text
/// let effect = configurator.apply(request)?;      // decides; refuses what does not fit
/// let answer = machine.carry_out(&effect)?;       // does
/// configurator.done(&effect);                     // records that it happened
/// published.set_config(configurator.config());
/// published.set_state(configurator.state());
/// ```
///
/// `apply` has recorded configuration before the start already when it returns
/// [`Effect::Done`]. All other effects count only once `done` is called: if the machine fails,
/// drop the effect and answer with the fault, and the call can be tried again.
#[derive(Debug)]
pub struct Configurator {
    config: VmConfig,
    phase: Phase,
    descriptors: Descriptors,
    /// Names of the descriptors that came with the call that is applied next.
    fresh: Vec<String>,
}

impl Default for Configurator {
    fn default() -> Self {
        Self {
            config: VmConfig::default(),
            phase: Phase::Configuring { prepared: None },
            descriptors: Descriptors::default(),
            fresh: Vec::new(),
        }
    }
}

type Outcome = Result<Effect, Fault>;

impl Configurator {
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// For [`Published::set_state`](super::Published::set_state).
    pub fn state(&self) -> InstanceState {
        match self.phase {
            Phase::Configuring { .. } => InstanceState::NotStarted,
            Phase::Running => InstanceState::Running,
            Phase::Paused => InstanceState::Paused,
        }
    }

    /// Opens sources; a start that failed can be tried again with the same descriptors.
    pub fn descriptors(&self) -> &Descriptors {
        &self.descriptors
    }

    /// Takes in what came with a call (also when nothing came) or `--fd`, before the call itself
    /// is applied: if that refuses the call, they are closed.
    pub fn add_descriptors(
        &mut self,
        fds: impl IntoIterator<Item = (String, OwnedFd)>,
    ) -> Result<(), Fault> {
        self.fresh.clear();
        for (name, fd) in fds {
            self.fresh.push(name.clone());
            if !self.descriptors.insert(name, fd) {
                self.forget_fresh();
                return Err(Fault::new(format!(
                    "more than {} descriptors were handed over",
                    Descriptors::MAX
                )));
            }
        }
        Ok(())
    }

    /// Takes in a whole document (`--config-file`). Logger and metrics are returned as effects
    /// to carry out; everything else is recorded. Start it with `Action::InstanceStart`.
    pub fn load(&mut self, document: VmConfig) -> Result<Vec<Effect>, Fault> {
        let VmConfig {
            machine_config,
            boot_source,
            drives,
            vsock,
            entropy,
            balloon,
            serial,
            console,
            logger,
            metrics,
        } = document;
        let mut seen: Vec<&str> = Vec::new();
        for drive in &drives {
            if seen.contains(&drive.drive_id.as_str()) {
                return Err(Fault::new(format!(
                    "drives: {:?} is there twice",
                    drive.drive_id
                )));
            }
            seen.push(&drive.drive_id);
        }
        let requests = logger
            .map(Request::PutLogger)
            .into_iter()
            .chain(metrics.map(Request::PutMetrics))
            .chain([Request::PutMachineConfig(machine_config)])
            .chain(boot_source.map(Request::PutBootSource))
            .chain(drives.into_iter().map(Request::PutDrive))
            .chain(vsock.map(Request::PutVsock))
            .chain(entropy.map(Request::PutEntropy))
            .chain(balloon.map(Request::PutBalloon))
            .chain(serial.map(Request::PutSerial))
            .chain(console.map(Request::PutConsole));
        let mut effects = Vec::new();
        for request in requests {
            match self.apply(request)? {
                Effect::Done => {}
                effect => effects.push(effect),
            }
        }
        Ok(effects)
    }

    /// Decides what `request` means now.
    pub fn apply(&mut self, request: Request) -> Outcome {
        let outcome = self.decide(request);
        if outcome.is_err() {
            self.forget_fresh();
        }
        self.fresh.clear();
        outcome
    }

    /// Closes what came with a refused call.
    fn forget_fresh(&mut self) {
        for name in self.fresh.drain(..) {
            self.descriptors.remove(&name);
        }
    }

    fn decide(&mut self, request: Request) -> Outcome {
        use Request as R;
        match request {
            // Normally answered by the API thread from what is published.
            R::GetInstanceInfo | R::GetVersion => Err(Fault::new(
                "this call is answered by the API, not by the machine",
            )),
            R::GetVmConfig => Ok(Effect::Answer(Body::json(&self.config)?)),
            R::GetMachineConfig => Ok(Effect::Answer(Body::json(&self.config.machine_config)?)),
            R::GetBalloon => match &self.config.balloon {
                Some(balloon) => Ok(Effect::Answer(Body::json(balloon)?)),
                None => Err(no_balloon()),
            },
            R::PutMachineConfig(machine) => self.put_machine(machine),
            R::PatchMachineConfig(patch) => {
                self.put_machine(self.config.machine_config.patched(&patch))
            }
            R::PutBootSource(boot) => {
                self.before_start("/boot-source")?;
                self.check_source("kernel_image_path", Some(&boot.kernel_image_path))?;
                self.check_source("initrd_path", boot.initrd_path.as_ref())?;
                self.config.boot_source = Some(boot);
                Ok(Effect::Done)
            }
            R::PutDrive(drive) => self.put_drive(drive),
            R::PatchDrive(patch) => self.patch_drive(patch),
            R::PutVsock(vsock) => {
                self.before_start("/vsock")?;
                self.check_source("uds_path", Some(&vsock.uds_path))?;
                self.config.vsock = Some(vsock);
                Ok(Effect::Done)
            }
            R::PutEntropy(entropy) => {
                self.before_start("/entropy")?;
                self.config.entropy = Some(entropy);
                Ok(Effect::Done)
            }
            R::PutSerial(serial) => {
                self.before_start("/serial")?;
                self.check_source("serial_out_path", serial.serial_out_path.as_ref())?;
                self.config.serial = Some(serial);
                Ok(Effect::Done)
            }
            R::PutConsole(console) => {
                self.before_start("/console")?;
                self.check_source("socket_path", console.socket_path.as_ref())?;
                self.config.console = Some(console);
                Ok(Effect::Done)
            }
            R::PutLogger(logger) => {
                self.check_source("log_path", logger.log_path.as_ref())?;
                Ok(Effect::SetLogger(logger))
            }
            R::PutMetrics(metrics) => {
                if self.config.metrics.is_some() {
                    return Err(Fault::new(
                        "/metrics: the metrics path is set already and cannot change",
                    ));
                }
                self.check_source("metrics_path", Some(&metrics.metrics_path))?;
                Ok(Effect::SetMetrics(metrics))
            }
            R::Prepare(prepare) => self.prepare(prepare),
            R::PutWorkplace(workplace) => {
                self.before_start("/workplace")?;
                if let Some(what) = self.placed() {
                    return Err(Fault::new(format!(
                        "/workplace: {what} was configured before, and would mean another file now; \
                         it comes first"
                    )));
                }
                self.check_source("directory", Some(&workplace.directory))?;
                Ok(Effect::MoveTo(workplace))
            }
            R::Action(action) => self.action(action),
            R::Pause => {
                self.after_start("PATCH /vm")?;
                Ok(if self.phase == Phase::Paused {
                    Effect::Done
                } else {
                    Effect::Pause
                })
            }
            R::Resume => {
                self.after_start("PATCH /vm")?;
                Ok(if self.phase == Phase::Running {
                    Effect::Done
                } else {
                    Effect::Resume
                })
            }
            R::CreateSnapshot(create) => self.create_snapshot(create),
            R::LoadSnapshot(load) => self.load_snapshot(load),
            R::LookAhead(look) => {
                self.after_start("/snapshot/look-ahead")?;
                // While the guest stands still there is nothing that could be done ahead.
                Ok(match self.phase {
                    Phase::Running => Effect::LookAhead(look),
                    _ => Effect::Done,
                })
            }
            R::ResetSnapshot(reset) => {
                self.after_start("/snapshot/reset")?;
                Ok(Effect::ResetSnapshot(reset))
            }
            R::RecordWorkingSet(record) => {
                self.after_start("/snapshot/working-set")?;
                self.check_source("path", Some(&record.path))?;
                Ok(Effect::RecordWorkingSet(record))
            }
            other => self.balloon(other),
        }
    }

    /// Records that the machine carried `effect` out.
    pub fn done(&mut self, effect: &Effect) {
        match effect {
            Effect::Prepare(prepare) => {
                self.phase = Phase::Configuring {
                    prepared: Some(prepare.vcpu_count),
                };
            }
            Effect::MoveTo(workplace) => {
                if let Some(name) = workplace.directory.fd_name() {
                    self.descriptors.remove(name);
                }
            }
            Effect::Start => {
                self.phase = Phase::Running;
                self.descriptors.clear();
            }
            Effect::LoadSnapshot(load) => {
                self.phase = if load.resume_vm {
                    Phase::Running
                } else {
                    Phase::Paused
                };
                self.descriptors.clear();
            }
            Effect::CreateSnapshot(create) => {
                if create.resume_vm {
                    self.phase = Phase::Running;
                }
                self.descriptors.clear();
            }
            Effect::ResetSnapshot(reset) => {
                self.phase = if reset.resume_vm {
                    Phase::Running
                } else {
                    Phase::Paused
                };
            }
            Effect::RecordWorkingSet(_) => self.descriptors.clear(),
            Effect::Resume => self.phase = Phase::Running,
            Effect::Pause => self.phase = Phase::Paused,
            Effect::SetLogger(logger) => self.merge_logger(logger),
            Effect::SetMetrics(metrics) => self.config.metrics = Some(metrics.clone()),
            Effect::UpdateDrive(patch) => self.drive_updated(patch),
            Effect::UpdateBalloon(update) => {
                if let Some(balloon) = &mut self.config.balloon {
                    balloon.amount_mib = update.amount_mib;
                }
            }
            Effect::UpdateBalloonStats(update) => {
                if let Some(balloon) = &mut self.config.balloon {
                    balloon.stats_polling_interval_s = update.stats_polling_interval_s;
                }
            }
            Effect::Done
            | Effect::Answer(_)
            | Effect::FlushMetrics
            | Effect::SendCtrlAltDel
            | Effect::Stop
            | Effect::ReadBalloonStats
            | Effect::StartHinting(_)
            | Effect::StopHinting
            | Effect::LookAhead(_)
            | Effect::ReadHinting => {}
        }
    }

    fn before_start(&self, what: &str) -> Result<(), Fault> {
        match self.phase {
            Phase::Configuring { .. } => Ok(()),
            Phase::Running | Phase::Paused => Err(Fault::new(format!(
                "{what}: the requested operation is not supported after starting the microVM."
            ))),
        }
    }

    pub(super) fn after_start(&self, what: &str) -> Result<(), Fault> {
        match self.phase {
            Phase::Running | Phase::Paused => Ok(()),
            Phase::Configuring { .. } => Err(Fault::new(format!(
                "{what}: the requested operation is not supported before starting the microVM."
            ))),
        }
    }

    /// A named descriptor must have arrived with this call or before it.
    pub(super) fn check_source(&self, field: &str, source: Option<&Source>) -> Result<(), Fault> {
        match source.and_then(Source::fd_name) {
            Some(name) if !self.descriptors.contains(name) => {
                match self.descriptors.duplicate(field, name) {
                    Err(e) => Err(Fault::from_error(e)),
                    Ok(_) => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    fn put_machine(&mut self, machine: crate::config::MachineConfig) -> Outcome {
        self.before_start("/machine-config")?;
        if let Phase::Configuring {
            prepared: Some(ready),
        } = self.phase
            && ready != machine.vcpu_count
        {
            return Err(Fault::new(format!(
                "vcpu_count: this VMM was prepared for {ready} vCPUs, not {}; start another one",
                machine.vcpu_count
            )));
        }
        check_balloon_fits(
            self.config.balloon.as_ref().map(|b| b.amount_mib),
            machine.mem_size_mib,
        )?;
        self.config.machine_config = machine;
        Ok(Effect::Done)
    }

    fn prepare(&mut self, prepare: Prepare) -> Outcome {
        self.before_start("/prepare")?;
        match self.phase {
            Phase::Configuring { prepared: Some(n) } => Err(Fault::new(format!(
                "/prepare: this VMM is prepared already, for {n} vCPUs"
            ))),
            _ => Ok(Effect::Prepare(prepare)),
        }
    }

    fn action(&mut self, action: Action) -> Outcome {
        match action {
            Action::FlushMetrics if self.config.metrics.is_none() => Err(Fault::new(
                "FlushMetrics: no metrics path is set; PUT /metrics first",
            )),
            Action::FlushMetrics => Ok(Effect::FlushMetrics),
            Action::Stop => Ok(Effect::Stop),
            Action::SendCtrlAltDel => {
                self.after_start("SendCtrlAltDel")?;
                Ok(Effect::SendCtrlAltDel)
            }
            Action::InstanceStart => self.start(),
        }
    }

    fn start(&self) -> Outcome {
        self.before_start("InstanceStart")?;
        if self.config.boot_source.is_none() {
            return Err(Fault::new(
                "InstanceStart: no kernel is configured; PUT /boot-source first",
            ));
        }
        if let Phase::Configuring {
            prepared: Some(ready),
        } = self.phase
            && ready != self.config.machine_config.vcpu_count
        {
            return Err(Fault::new(format!(
                "InstanceStart: this VMM was prepared for {ready} vCPUs, but {} are configured; \
                 PUT /machine-config first",
                self.config.machine_config.vcpu_count
            )));
        }
        Ok(Effect::Start)
    }

    /// A later `/logger` changes only what it names.
    fn merge_logger(&mut self, new: &Logger) {
        let mut old = self.config.logger.take().unwrap_or_default();
        if new.log_path.is_some() {
            old.log_path.clone_from(&new.log_path);
        }
        if new.module.is_some() {
            old.module.clone_from(&new.module);
        }
        old.level = new.level.or(old.level);
        old.show_level = new.show_level.or(old.show_level);
        old.show_log_origin = new.show_log_origin.or(old.show_log_origin);
        self.config.logger = Some(old);
    }
}

/// As many as fit beside the other devices in the machine's MMIO window.
const MAX_DRIVES: usize = 12;
