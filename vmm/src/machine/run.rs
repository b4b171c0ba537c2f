//! The life of the process: command line, API thread, event loop, end.
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberId, SubscriberOps};
use rustix::process::{Resource, getrlimit, setrlimit};

use super::ahead::{Ahead, StartPart};
use super::assemble::{self, Parts, Prepared};
use super::ending::Ending;
use super::events::{Notice, Notices, Notifier, Subscriber, Woken};
use super::faults::{self, Completed, EndNow};
use super::guest::{Guest, GuestMemory};
use super::save::{self, Beforehand, Behind, Capture, Files, us};
use super::{ready, restore, signals};
use crate::api::args::{self, Args, Invocation};
use crate::api::{
    Action, ApiHandle, ApiServer, Body, Command, CommandReceiver, Configurator, Effect, Fault,
    InstanceState, Phase, Published, Reply, Request, ServerOptions, channel,
};
use crate::backend::inherited;
use crate::backend::unix::SocketFile;
use crate::config::{
    Expect, Logger, SnapshotCreate, SnapshotLoad, SnapshotLookAhead, SnapshotReset, SnapshotType,
    Source, VmConfig, WorkingSetRecord, Workplace,
};
use crate::legacy::MachineEvent;
use crate::memory::handled::Faults;
use crate::memory::own;
use crate::metrics::{FLUSH_PERIOD, Metrics, Registry};
use crate::virtio::balloon::BalloonHandle;
use crate::virtio::mmio::lock;
use crate::{log, log_debug, log_error, log_info, log_limited, log_warn};

/// Exit status of a command line that is wrong.
const BAD_COMMAND_LINE: i32 = 2;
/// A configuration file is a few KiB.
const MAX_CONFIG_FILE: u64 = 1 << 20;
/// The name under which a jail hands in `/dev/kvm`.
const KVM_DESCRIPTOR: &str = "kvm";

/// Runs the VMM with this process's arguments. Returns the exit status.
pub fn main() -> i32 {
    let started = Instant::now();
    crate::memory::own::share_one_heap();
    match args::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Help) => print(args::HELP),
        Ok(Invocation::Version) => print(&args::version_text()),
        Ok(Invocation::Run(args)) => run(*args, started),
        Err(error) => {
            eprintln!("belljar-vmm: {error}");
            BAD_COMMAND_LINE
        }
    }
}

/// Prints to standard output; that nobody reads it is no failure.
fn print(text: &str) -> i32 {
    use std::io::Write;
    let _ = io::stdout().write_all(text.as_bytes());
    0
}

fn run(args: Args, started: Instant) -> i32 {
    let ending = match Machine::new(args, started) {
        Ok((mut machine, api)) => {
            let ending = machine.event_loop();
            machine.finish(&ending);
            if let Some(api) = api {
                api.shutdown();
            }
            ending
        }
        Err(message) => Ending::Failed(message),
    };
    match &ending {
        Ending::Failed(message) => {
            log_error!("{message}");
            // Whoever started us by hand sees it, wherever the log goes.
            if log::to_file() {
                eprintln!("belljar-vmm: {message}");
            }
        }
        Ending::PoweredOff | Ending::Stopped => log_info!("end: {ending}"),
        _ => log_warn!("end: {ending}"),
    }
    ending.exit_code()
}

/// Socket files that devices made. Shared with the API's `Stop`, which works while the
/// machine is stuck.
type SocketFiles = Arc<Mutex<Vec<SocketFile>>>;

fn remove(sockets: &SocketFiles) {
    let mut files = sockets.lock().unwrap_or_else(PoisonError::into_inner);
    for file in files.drain(..) {
        file.remove();
    }
}

struct Machine {
    configurator: Configurator,
    published: Arc<Published>,
    commands: CommandReceiver,
    notices: Notices,
    notifier: Notifier,
    woken: Woken,
    manager: EventManager<Subscriber>,
    metrics: Metrics,
    next_flush: Option<Instant>,
    /// When the stack that loading took is given back.
    give_back: Option<Instant>,
    prepared: Option<Prepared>,
    ahead: Ahead,
    guest: Option<Guest>,
    /// Of the guest's devices while they are polled.
    polled: Vec<SubscriberId>,
    sockets: SocketFiles,
    /// A snapshot whose call is being carried out: it is answered when it is written.
    captured: Option<Captured>,
    /// Waits for the last one that was written behind the running guest.
    writing: Option<JoinHandle<()>>,
    /// RAM is being completed for a snapshot.
    completing: bool,
    /// A snapshot that waits for the guest to name its free pages.
    hinting: Option<Hinting>,
    boot_timer: bool,
    started: Instant,
    guest_started: Option<Instant>,
    ending: Option<Ending>,
}

/// A call to make a snapshot that waits until the guest has named its free pages.
struct Hinting {
    request: Request,
    reply: Reply,
    balloon: BalloonHandle,
    started: Instant,
    within: Duration,
}

/// How often it is looked whether the guest has named its free pages: it does so on the vCPU's thread.
const HINTING_LOOK: Duration = Duration::from_millis(1);

/// Then whoever waits for a guest that was loaded has its first answer.
const GIVE_BACK_AFTER: Duration = Duration::from_millis(250);

/// A snapshot that a frozen copy of this process writes.
struct Captured {
    capture: Capture,
    behind: Behind,
}

impl Machine {
    fn new(args: Args, started: Instant) -> Result<(Self, Option<ApiHandle>), String> {
        log::configure(log::Changes {
            id: Some(args.id.clone()),
            ..log::Changes::default()
        });
        allow_descriptors();
        let inherited =
            inherited::adopt(&args.fds).map_err(|(name, error)| format!("--fd {name}: {error}"))?;
        let mut configurator = Configurator::default();
        configurator
            .add_descriptors(inherited)
            .map_err(|fault| format!("--fd: {fault}"))?;
        let registry = Registry::default();
        let (sender, commands) = channel().map_err(|e| format!("command channel: {e}"))?;
        let (notifier, notices) = Notices::new().map_err(|e| format!("notices: {e}"))?;
        let published = Arc::new(Published::new(args.id.clone()));
        let sockets = SocketFiles::default();
        // Before there is a socket that a signal could leave behind.
        let signals = signals::watch().map_err(|e| format!("signal handlers: {e}"))?;
        let api = match &args.api_sock {
            Some(source) => Some(bind_api(&configurator, source)?),
            None => None,
        };
        let api = match api {
            Some(server) => {
                let files = Arc::clone(&sockets);
                let stop = Box::new(move || {
                    remove(&files);
                    std::process::exit(Ending::Stopped.exit_code());
                });
                let options = ServerOptions {
                    max_body: args.max_payload,
                    ..ServerOptions::default()
                };
                let handle = server
                    .start(sender, Arc::clone(&published), &registry, stop, options)
                    .map_err(|e| format!("API thread: {e}"))?;
                Some(handle)
            }
            None => None,
        };
        let woken = Woken::default();
        let mut manager =
            EventManager::new_with_capacity(EVENTS_A_TURN).map_err(|e| format!("epoll: {e:?}"))?;
        manager.add_subscriber(Subscriber::Control {
            sources: vec![
                (commands.as_raw_fd(), woken.commands.clone()),
                (notices.fd(), woken.notices.clone()),
                (signals, woken.signals.clone()),
            ],
        });
        let mut machine = Self {
            configurator,
            published,
            commands,
            notices,
            notifier,
            woken,
            manager,
            metrics: Metrics::new(registry),
            next_flush: None,
            give_back: None,
            prepared: None,
            ahead: Ahead::default(),
            guest: None,
            polled: Vec::new(),
            sockets,
            captured: None,
            writing: None,
            completing: false,
            hinting: None,
            boot_timer: args.boot_timer,
            started,
            guest_started: None,
            ending: None,
        };
        machine.configure(args)?;
        Ok((machine, api))
    }

    /// Applies flags and the configuration file.
    fn configure(&mut self, args: Args) -> Result<(), String> {
        self.call(Request::PutLogger(Logger {
            log_path: args.log_path,
            level: args.level,
            show_level: args.show_level.then_some(true),
            show_log_origin: args.show_log_origin.then_some(true),
            module: args.module,
        }))?;
        if let Some(metrics_path) = args.metrics_path {
            self.call(Request::PutMetrics(crate::config::Metrics { metrics_path }))?;
        }
        args.start_times.record(self.metrics.registry());
        let Some(source) = args.config_file else {
            self.get_ready();
            return Ok(());
        };
        let document = self.read_config(&source)?;
        let effects = self
            .configurator
            .load(document)
            .map_err(|fault| format!("{source}: {fault}"))?;
        for effect in effects {
            self.carry_out(&effect)
                .map_err(|fault| format!("{source}: {fault}"))?;
            self.configurator.done(&effect);
        }
        self.publish();
        self.call(Request::Action(Action::InstanceStart)).map(drop)
    }

    fn read_config(&self, source: &Source) -> Result<VmConfig, String> {
        let mut text = Vec::new();
        let descriptors = self.configurator.descriptors();
        let file = descriptors
            .open("--config-file", source, Expect::ReadFile)
            .map_err(|e| e.to_string())?;
        file.take(MAX_CONFIG_FILE)
            .read_to_end(&mut text)
            .map_err(|e| format!("{source}: {e}"))?;
        crate::config::parse(&text).map_err(|e| format!("{source}: {e}"))
    }

    /// A call of our own.
    fn call(&mut self, request: Request) -> Result<Body, String> {
        self.apply(request).map_err(|fault| fault.message)
    }

    fn apply(&mut self, request: Request) -> Result<Body, Fault> {
        let effect = self.configurator.apply(request)?;
        let body = self.carry_out(&effect)?;
        self.configurator.done(&effect);
        self.publish();
        Ok(body)
    }

    fn publish(&self) {
        self.published.set_config(self.configurator.config());
        self.published.set_state(self.configurator.state());
    }

    fn event_loop(&mut self) -> Ending {
        loop {
            let look = self.hinting.as_ref().map(|_| Instant::now() + HINTING_LOOK);
            let timers = [self.next_flush, self.give_back, look];
            let turn = match timers.into_iter().flatten().min() {
                None => self.manager.run(),
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    let ms = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
                    self.manager.run_with_timeout(ms.saturating_add(1))
                }
            };
            if let Err(error) = turn
                && !interrupted(&error)
            {
                return Ending::Failed(format!("the event loop failed: {error:?}"));
            }
            if self.woken.notices.take() {
                self.take_notices();
            }
            if self.woken.commands.take()
                && let Some(command) = self.commands.next_command()
            {
                // One a turn: more keep the descriptor readable, and the guest has its turn.
                self.take_command(command);
            }
            self.look_at_hinting();
            if self.woken.signals.take() {
                self.ending.get_or_insert(Ending::Stopped);
            }
            if self.next_flush.is_some_and(|at| Instant::now() >= at) {
                self.flush_metrics();
            }
            if self.give_back.is_some_and(|at| Instant::now() >= at) {
                self.give_back = None;
                own::give_back();
            }
            if let Some(ending) = self.ending.take() {
                return ending;
            }
        }
    }

    fn take_notices(&mut self) {
        while let Some(notice) = self.notices.next() {
            let ending = match notice {
                Notice::Event(MachineEvent::BootMarker) => {
                    self.report_boot_time();
                    None
                }
                Notice::Event(event) => Ending::of_event(event),
                Notice::Fault(fault) => Some(Ending::of_fault(fault)),
                Notice::Ending(ending) => Some(ending),
                Notice::Completed(completed) => {
                    self.go_on_with(*completed);
                    None
                }
            };
            // The first says why; what follows is its consequence.
            if let Some(ending) = ending {
                self.ending.get_or_insert(ending);
            }
        }
    }

    fn report_boot_time(&self) {
        let (true, Some(at)) = (self.boot_timer, self.guest_started) else {
            return;
        };
        log_info!(
            "Guest-boot-time = {} us, from the start of the process {} us",
            at.elapsed().as_micros(),
            self.started.elapsed().as_micros()
        );
    }

    fn take_command(&mut self, command: Command) {
        let Command {
            request,
            fds,
            reply,
        } = command;
        if let Err(fault) = self.configurator.add_descriptors(fds) {
            return reply.send(Err(fault));
        }
        match self.needs_hints(&request) {
            Ok(None) => self.take_with_complete_ram(request, reply),
            Ok(Some((balloon, within))) => {
                // It may have its pages back as soon as it has named them all.
                balloon.start_hinting(true);
                self.hinting = Some(Hinting {
                    request,
                    reply,
                    balloon,
                    started: Instant::now(),
                    within,
                });
            }
            Err(fault) => reply.send(Err(fault)),
        }
    }

    /// The balloon to ask for free pages before this call, and how long.
    fn needs_hints(
        &mut self,
        request: &Request,
    ) -> Result<Option<(BalloonHandle, Duration)>, Fault> {
        let Request::CreateSnapshot(create) = request else {
            return Ok(None);
        };
        let balloon = self.guest.as_ref().and_then(|guest| guest.balloon.clone());
        let Some(balloon) = balloon.filter(|_| create.hint_free_pages_ms > 0) else {
            return Ok(None);
        };
        // What is refused is refused at once.
        self.configurator.apply(request.clone())?;
        if self.hinting.is_some() {
            return Err(Fault::new(
                "hint_free_pages_ms: the guest is naming its free pages for another snapshot; wait for its answer",
            ));
        }
        let within = Duration::from_millis(create.hint_free_pages_ms.into());
        Ok(Some((balloon, within)))
    }

    /// Goes on with the snapshot when its guest has named its free pages, or its time is over.
    fn look_at_hinting(&mut self) {
        let is_over = |hinting: &mut Hinting| {
            !hinting.balloon.is_hinting() || hinting.started.elapsed() >= hinting.within
        };
        let Some(hinting) = self.hinting.take_if(is_over) else {
            return;
        };
        let took = hinting.started.elapsed().as_micros();
        if hinting.balloon.is_hinting() {
            hinting.balloon.stop_hinting();
            log_info!("the guest did not name all its free pages in {took} us");
        } else {
            log_debug!("free pages named in {took} us");
        }
        self.take_with_complete_ram(hinting.request, hinting.reply);
    }

    fn take_with_complete_ram(&mut self, request: Request, reply: Reply) {
        match self.needs_complete_ram(&request) {
            Ok(None) => self.take_request(request, reply),
            Ok(Some(faults)) => self.complete_for(request, reply, faults),
            Err(fault) => reply.send(Err(fault)),
        }
    }

    fn take_request(&mut self, request: Request, reply: Reply) {
        let part = StartPart::of(&request);
        let outcome = self.apply(request);
        let worked = outcome.is_ok();
        match (self.captured.take(), outcome) {
            (Some(captured), Ok(_)) => self.write_behind(captured, reply),
            (_, outcome) => reply.send(outcome),
        }
        if let (Some(part), true) = (part, worked) {
            self.get_ahead(part);
        }
    }

    /// The faults to wait for before this call: a full snapshot of a guest whose pages somebody else brings in.
    fn needs_complete_ram(&mut self, request: &Request) -> Result<Option<Arc<Faults>>, Fault> {
        let Request::CreateSnapshot(create) = request else {
            return Ok(None);
        };
        let memory = self.guest.as_ref().map(|guest| &guest.memory);
        let faults = memory.and_then(GuestMemory::incomplete);
        let Some(faults) = faults
            .filter(|_| create.snapshot_type == SnapshotType::Full)
            .cloned()
        else {
            return Ok(None);
        };
        // What is refused is refused at once.
        self.configurator.apply(request.clone())?;
        if self.completing {
            return Err(Fault::new(
                "/snapshot/create: all of RAM is being brought in for another snapshot; wait for its answer",
            ));
        }
        Ok(Some(faults))
    }

    /// The event loop goes on meanwhile.
    fn complete_for(&mut self, request: Request, reply: Reply, faults: Arc<Faults>) {
        let Some(guest) = &self.guest else {
            return;
        };
        let (ram, zeroed) = (Arc::clone(&guest.memory.ram), guest.memory.zeroed.clone());
        match faults::complete_for(request, reply, faults, ram, zeroed, self.notifier.clone()) {
            Ok(()) => self.completing = true,
            // The reply went with the thread, and says that nothing came of it.
            Err(error) => log_error!("no thread to bring in guest RAM: {error}"),
        }
    }

    fn go_on_with(&mut self, completed: Completed) {
        let Completed {
            request,
            reply,
            outcome,
        } = completed;
        self.completing = false;
        match outcome {
            // Unless the guest was reset meanwhile, it is complete.
            Ok(()) => self.take_with_complete_ram(request, reply),
            Err(error) => reply.send(Err(Fault::from_error(error))),
        }
    }

    /// Ends the process as [`Action::Stop`] does.
    fn end_now(&self) -> EndNow {
        let files = Arc::clone(&self.sockets);
        Arc::new(move |ending| {
            remove(&files);
            std::process::exit(ending.exit_code());
        })
    }

    /// What fails here fails again at the start, where somebody waits for the answer.
    fn get_ahead(&mut self, part: StartPart) {
        let (config, descriptors) = (self.configurator.config(), self.configurator.descriptors());
        self.ahead.set(part);
        self.ahead.load(config, descriptors);
        if self.prepared.is_none()
            && let Some(vcpu_count) = self.ahead.wants_vm(config)
        {
            let early = self.ahead.take_vm(vcpu_count);
            let vm = early.or_else(|| self.prepare(vcpu_count).ok());
            self.ahead.keep_vm(vcpu_count, vm);
        }
    }

    /// Whatever guest it will be, it has a VM and a vCPU, and nobody waits for an answer yet. What fails here
    /// fails again when somebody does.
    fn get_ready(&mut self) {
        let vm = self.prepare(1).ok();
        self.ahead.keep_vm(1, vm);
        ready::touch_own_pages();
    }

    /// Works in another directory from now on, all threads of it. The API's socket may have been moved there, too: it
    /// is removed at the end if it is the same one.
    fn move_to(&self, workplace: &Workplace) -> Result<(), Fault> {
        let descriptors = self.configurator.descriptors();
        let directory = descriptors
            .open("directory", &workplace.directory, Expect::Directory)
            .map_err(Fault::from_error)?;
        rustix::process::fchdir(&directory).map_err(|errno| {
            let directory = &workplace.directory;
            Fault::new(format!("directory: cannot work in {directory}: {errno}"))
        })?;
        log::configure(log::Changes {
            id: Some(workplace.id.clone()),
            ..log::Changes::default()
        });
        self.published.set_id(&workplace.id);
        Ok(())
    }

    /// Does what a call means; nothing has changed if it fails.
    fn carry_out(&mut self, effect: &Effect) -> Result<Body, Fault> {
        match effect {
            Effect::Done => {}
            Effect::Answer(body) => return Ok(body.clone()),
            Effect::Prepare(wanted) => {
                let mut prepared = self.vm_with(wanted.vcpu_count)?;
                if let Some(memory) = &wanted.memory {
                    ready::map_ahead(&mut prepared, memory, self.configurator.descriptors())?;
                }
                ready::touch_own_pages();
                self.prepared = Some(prepared);
            }
            Effect::MoveTo(workplace) => self.move_to(workplace)?,
            Effect::Start => self.start()?,
            Effect::Pause => self.pause()?,
            Effect::Resume => drop(self.resume()),
            Effect::CreateSnapshot(create) => {
                let created = self.create_snapshot(create);
                self.note_layers();
                created?;
            }
            Effect::LoadSnapshot(load) => self.load_snapshot(load)?,
            Effect::ResetSnapshot(reset) => self.reset_snapshot(reset)?,
            Effect::LookAhead(look) => self.look_ahead(*look)?,
            Effect::RecordWorkingSet(record) => self.record_working_set(record)?,
            Effect::FlushMetrics => self.write_metrics().map_err(Fault::from_error)?,
            Effect::SendCtrlAltDel => return Err(no_keyboard()),
            Effect::Stop => self.ending = Some(Ending::Stopped),
            Effect::SetLogger(logger) => self.set_logger(logger)?,
            Effect::SetMetrics(metrics) => self.set_metrics(&metrics.metrics_path)?,
            device => return self.carry_out_on_device(device),
        }
        Ok(Body::Empty)
    }

    fn carry_out_on_device(&mut self, effect: &Effect) -> Result<Body, Fault> {
        let Some(guest) = &self.guest else {
            return Err(Fault::new("the guest has not been started"));
        };
        let body = super::devices::carry_out(guest, self.configurator.descriptors(), effect)?;
        self.note_layers();
        Ok(body)
    }

    /// Drives may have other layers now, some of them even if a snapshot failed.
    fn note_layers(&mut self) {
        let drives = self.guest.iter().flat_map(|guest| &guest.drives);
        for (id, drive) in drives {
            if let Some(layers) = &drive.layers {
                self.configurator.layers_are(id, layers.names());
            }
        }
        self.publish();
    }

    /// The one that was made ahead, or a new one.
    fn vm_with(&mut self, vcpu_count: u8) -> Result<Prepared, Fault> {
        let early = self.ahead.take_vm(vcpu_count);
        early.map_or_else(|| self.prepare(vcpu_count), Ok)
    }

    fn prepare(&self, vcpu_count: u8) -> Result<Prepared, Fault> {
        let descriptors = self.configurator.descriptors();
        let dev_kvm = descriptors
            .contains(KVM_DESCRIPTOR)
            .then(|| descriptors.duplicate("/dev/kvm", KVM_DESCRIPTOR))
            .transpose()
            .map_err(Fault::from_error)?;
        assemble::prepare(vcpu_count, dev_kvm).map_err(Fault::from_error)
    }

    fn look_ahead(&self, look: SnapshotLookAhead) -> Result<(), Fault> {
        let Some(guest) = &self.guest else {
            return Ok(());
        };
        save::look_early(guest, look).map_err(Fault::from_error)
    }

    fn create_snapshot(&mut self, create: &SnapshotCreate) -> Result<(), Fault> {
        if self
            .writing
            .as_ref()
            .is_some_and(|writer| !writer.is_finished())
        {
            return Err(Fault::new(
                "/snapshot/create: the snapshot before is still being written; wait for its answer",
            ));
        }
        let Some(guest) = &self.guest else {
            return Err(Fault::new("the guest has not been started"));
        };
        let files = Files::new(guest, self.configurator.descriptors(), create)
            .map_err(Fault::from_error)?;
        if !create.resume_vm {
            let capture = self.capture(files, create, Beforehand::default())?;
            return capture.write().map_err(Fault::from_error);
        }
        let was_running = self.configurator.phase() == Phase::Running;
        let mut before = Beforehand::default();
        if let (true, Some(guest)) = (was_running, &self.guest) {
            before = save::look_ahead(guest, create).map_err(Fault::from_error)?;
        }
        let started = Instant::now();
        if was_running {
            self.pause()?;
        }
        let stopped = started.elapsed();
        let begun = self.capture(files, create, before);
        let begun = begun.and_then(|mut capture| {
            let behind = capture.begin_to_write().map_err(Fault::from_error)?;
            Ok((capture, behind))
        });
        match begun {
            Ok((mut capture, behind)) => {
                let resumed = self.resume_behind(|| capture.freeze_disk());
                capture.tell();
                capture.phases.stop_us = us(stopped);
                capture.phases.paused_us = us(resumed.duration_since(started));
                self.captured = Some(Captured { capture, behind });
                Ok(())
            }
            Err(fault) => {
                if was_running {
                    self.resume();
                }
                Err(fault)
            }
        }
    }

    fn capture(
        &self,
        files: Files,
        create: &SnapshotCreate,
        before: Beforehand,
    ) -> Result<Capture, Fault> {
        let Some(guest) = &self.guest else {
            return Err(Fault::new("the guest has not been started"));
        };
        Capture::begin(guest, self.configurator.config(), files, create, before)
            .map_err(Fault::from_error)
    }

    /// A guest that cannot be made what it was is no guest any more.
    fn reset_snapshot(&mut self, reset: &SnapshotReset) -> Result<(), Fault> {
        if self
            .guest
            .as_ref()
            .is_none_or(|guest| guest.origin.is_none())
        {
            return Err(Fault::new(
                "/snapshot/reset: this guest was not loaded from a snapshot",
            ));
        }
        if self
            .guest
            .as_ref()
            .is_some_and(|guest| !guest.memory.can_go_back())
        {
            return Err(Fault::new(
                "/snapshot/reset: a page-fault handler gave this guest its pages, and gives each once; load the \
                 snapshot into another VMM",
            ));
        }
        let started = Instant::now();
        if self.configurator.phase() == Phase::Running {
            self.pause()?;
        }
        let Some(guest) = &mut self.guest else {
            return Ok(());
        };
        if let Err(fault) = restore::go_back(guest) {
            self.ending = Some(Ending::Failed(format!("/snapshot/reset: {fault}")));
            return Err(fault);
        }
        if reset.resume_vm {
            self.resume();
        }
        log_info!("guest reset in {} us", started.elapsed().as_micros());
        Ok(())
    }

    fn record_working_set(&self, record: &WorkingSetRecord) -> Result<(), Fault> {
        let Some(guest) = &self.guest else {
            return Err(Fault::new("the guest has not been started"));
        };
        if guest.memory.faults.is_some() && guest.memory.template.is_none() {
            return Err(Fault::new(
                "/snapshot/working-set: a page-fault handler brings this guest's pages in, and sees which",
            ));
        }
        save::record_working_set(guest, self.configurator.descriptors(), record)
            .map_err(Fault::from_error)
    }

    /// Waits in a thread until the snapshot is written, and answers then.
    fn write_behind(&mut self, captured: Captured, reply: Reply) {
        let Captured { capture, behind } = captured;
        let wait = move || {
            let phases = capture.phases;
            let outcome = capture.complete_behind(behind).map_err(Fault::from_error);
            reply.send(outcome.and_then(|()| Body::json(&phases)));
        };
        let thread = std::thread::Builder::new().name("snapshot".into());
        match thread.spawn(wait) {
            Ok(writer) => self.writing = Some(writer),
            // The reply went with the closure, and says that nothing came of it.
            Err(error) => log_error!("no thread for a snapshot: {error}"),
        }
    }

    fn load_snapshot(&mut self, load: &SnapshotLoad) -> Result<(), Fault> {
        self.guest_started = Some(Instant::now());
        let descriptors = self.configurator.descriptors();
        let own = self.configurator.config();
        let snapshot =
            restore::Snapshot::open(load, own, descriptors).map_err(Fault::from_error)?;
        let vcpu_count = snapshot.config().machine_config.vcpu_count;
        if let Phase::Configuring {
            prepared: Some(ready),
        } = self.configurator.phase()
            && ready != vcpu_count
        {
            return Err(Fault::new(format!(
                "/snapshot/load: this VMM was prepared for {ready} vCPUs, and the snapshot has \
                 {vcpu_count}; start another one"
            )));
        }
        if let Some(prepared) = &self.prepared {
            snapshot.check_ready(prepared).map_err(Fault::from_error)?;
        }
        let prepared = match self.prepared.take() {
            Some(prepared) => prepared,
            None => self.vm_with(vcpu_count)?,
        };
        let config = snapshot.config().clone();
        let mut made = Vec::new();
        let restored = snapshot.restore(
            prepared,
            Parts {
                config: &config,
                descriptors: self.configurator.descriptors(),
                notifier: &self.notifier,
                metrics: self.metrics.registry(),
                sockets: &mut made,
            },
            self.end_now(),
        );
        self.guest = Some(self.keep_sockets(made, restored)?);
        self.configurator.adopt(config);
        if load.resume_vm {
            self.resume();
        }
        self.give_back = Some(Instant::now() + GIVE_BACK_AFTER);
        log_info!(
            "snapshot loaded in {} us",
            self.guest_started.map_or(0, |at| at.elapsed().as_micros())
        );
        Ok(())
    }

    /// Socket files of a guest are removed at the end, and at once if it was not built.
    fn keep_sockets(
        &self,
        mut made: Vec<SocketFile>,
        built: Result<Guest, assemble::AssembleError>,
    ) -> Result<Guest, Fault> {
        self.sockets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .append(&mut made);
        built.map_err(|error| {
            remove(&self.sockets);
            Fault::from_error(error)
        })
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.guest_started = Some(Instant::now());
        let vcpu_count = self.configurator.config().machine_config.vcpu_count;
        if self
            .prepared
            .as_ref()
            .is_some_and(|prepared| prepared.memory.is_some())
        {
            return Err(Fault::new(
                "InstanceStart: this VMM was prepared with the memory of a snapshot; load that, or start another one",
            ));
        }
        let prepared = match self.prepared.take() {
            Some(prepared) => prepared,
            None => self.vm_with(vcpu_count)?,
        };
        let image = self
            .ahead
            .take_image(self.configurator.config(), self.configurator.descriptors())
            .map_err(Fault::from_error)?;
        log_debug!(
            "VM made and kernel loaded: {} us after the call",
            self.guest_started.map_or(0, |at| at.elapsed().as_micros())
        );
        let mut made = Vec::new();
        let built = assemble::build(
            prepared,
            &image,
            Parts {
                config: self.configurator.config(),
                descriptors: self.configurator.descriptors(),
                notifier: &self.notifier,
                metrics: self.metrics.registry(),
                sockets: &mut made,
            },
        );
        self.guest = Some(self.keep_sockets(made, built)?);
        self.resume();
        log_info!("guest started");
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Fault> {
        let Some(guest) = &self.guest else {
            return Ok(());
        };
        guest.pause_vcpus().map_err(Fault::from_error)?;
        for id in self.polled.drain(..) {
            // It was added, so it can be removed.
            let _ = self.manager.remove_subscriber(id);
        }
        guest.drain_devices();
        Ok(())
    }

    /// Returns when the guest could run.
    fn resume(&mut self) -> Instant {
        let Some(guest) = &self.guest else {
            return Instant::now();
        };
        for device in &guest.devices {
            let subscriber = Subscriber::Device(device.clone());
            self.polled.push(self.manager.add_subscriber(subscriber));
        }
        guest.resume_devices();
        // Not later: where there is one processor, it is the guest's from here on.
        let now = Instant::now();
        guest.resume_vcpus();
        now
    }

    /// The same, with work for which devices must be as they were: what the guest asks of them waits for its end.
    fn resume_behind(&mut self, work: impl FnOnce()) -> Instant {
        let Some(guest) = &self.guest else {
            work();
            return Instant::now();
        };
        // A vCPU's thread carries out what it writes to a register.
        let held: Vec<_> = guest
            .devices
            .iter()
            .map(|one| lock(&one.transport))
            .collect();
        let now = Instant::now();
        guest.resume_vcpus();
        work();
        drop(held);
        for device in &guest.devices {
            let subscriber = Subscriber::Device(device.clone());
            self.polled.push(self.manager.add_subscriber(subscriber));
        }
        guest.resume_devices();
        now
    }

    fn set_logger(&self, logger: &Logger) -> Result<(), Fault> {
        let output = logger
            .log_path
            .as_ref()
            .map(|path| {
                let descriptors = self.configurator.descriptors();
                descriptors.open("log_path", path, Expect::Output)
            })
            .transpose()
            .map_err(Fault::from_error)?;
        log::configure(log::Changes {
            id: None,
            level: logger.level,
            show_level: logger.show_level,
            show_origin: logger.show_log_origin,
            module: logger.module.clone(),
            output,
        });
        Ok(())
    }

    fn set_metrics(&mut self, path: &Source) -> Result<(), Fault> {
        let descriptors = self.configurator.descriptors();
        let output = descriptors
            .open("metrics_path", path, Expect::Output)
            .map_err(Fault::from_error)?;
        self.metrics.set_output(output);
        self.next_flush = Some(Instant::now() + FLUSH_PERIOD);
        Ok(())
    }

    fn flush_metrics(&mut self) {
        if let Err(error) = self.write_metrics() {
            log_limited!(log::Level::Warn, "metrics: {error}");
        }
        self.next_flush = Some(Instant::now() + FLUSH_PERIOD);
    }

    fn write_metrics(&mut self) -> io::Result<()> {
        if let Some(guest) = &self.guest {
            super::devices::update_metrics(guest, self.metrics.registry());
        }
        self.metrics.flush()
    }

    /// Everything that must happen before the process ends.
    fn finish(&mut self, ending: &Ending) {
        if let Some(guest) = &self.guest {
            // vCPUs may still run; what they do no longer matters, but what they were told
            // is on disk must be.
            guest.drain_devices();
            guest.close_drives();
            if matches!(ending, Ending::Panicked | Ending::TripleFault) {
                log_warn!("the guest's last words on its console:");
                for line in guest.console.tail_text(PANIC_LINES, PANIC_BYTES).lines() {
                    log_warn!("{line}");
                }
            }
        }
        self.published.set_state(InstanceState::NotStarted);
        if let Some(writer) = self.writing.take() {
            let _ = writer.join();
        }
        if self.next_flush.is_some() {
            let _ = self.write_metrics();
        }
        remove(&self.sockets);
    }
}

/// Raises the limit of open descriptors, if it is allowed to: the guest's vsock may take a
/// thousand, the usual limit, and drives, clients and the API need some too.
fn allow_descriptors() {
    const ENOUGH: u64 = 4096;
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|now| now < ENOUGH) {
        limit.current = Some(limit.maximum.map_or(ENOUGH, |most| most.min(ENOUGH)));
        // A lower limit than wanted costs connections, not the guest.
        let _ = setrlimit(Resource::Nofile, limit);
    }
}

const EVENTS_A_TURN: usize = 64;
const PANIC_LINES: usize = 25;
const PANIC_BYTES: usize = 4096;

fn interrupted(error: &event_manager::Error) -> bool {
    matches!(error, event_manager::Error::Epoll(e) if e.errno() == libc::EINTR)
}

fn no_keyboard() -> Fault {
    Fault::new(
        "SendCtrlAltDel: this machine has no keyboard; ask the guest's agent to shut down, or use Stop",
    )
}

fn bind_api(configurator: &Configurator, source: &Source) -> Result<ApiServer, String> {
    let bound = match source {
        Source::Path(path) => ApiServer::bind(path),
        Source::Fd(name) => {
            let fd = configurator
                .descriptors()
                .duplicate("--api-sock", name)
                .map_err(|e| e.to_string())?;
            ApiServer::from_descriptor(name, fd)
        }
    };
    bound.map_err(|e| format!("--api-sock: {e}"))
}
