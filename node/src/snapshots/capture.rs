//! Holding a sandbox still, and letting it write itself down.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_keeper::client::{Client, Keeper, KeeperError};
use belljar_keeper::v1::{self as keeper, reply::Result as Answer, request::Call};
use belljar_protocol::client::system;
use rustix::pipe::PipeFlags;
use serde_json::json;

use super::error::io_failed;
use super::saved::{Last, Loaded, Saved};
use super::used::used_files;
use super::{Disk, SnapshotError};
use crate::disk::copy_into;
use crate::layered::{Files, Layered};
use crate::lifecycle::{self, LifeError};
use crate::registry::{Found, State};
use crate::state::spec::{Life, SandboxSpec};
use crate::state::{self, ProcessRecord, StateError};
use crate::{accounting, inspect, vmm};

/// The guest's programs stop within this time, or there is no snapshot.
const FREEZE_LIMIT: Duration = Duration::from_secs(15);
/// Writing out file systems may take longer.
const WRITE_OUT_LIMIT: Duration = Duration::from_secs(60);
/// Writing RAM takes as long as the disk takes.
const CREATE_LIMIT: Duration = Duration::from_secs(300);
/// Of the VMM's state, about.
const STATE_BYTES: u64 = 1 << 20;
/// Changing the layers of a disk takes as long as the disk takes.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);
/// Says that a call to the VMM has ended, where the VMM would say that the guest goes on.
const ENDED: u8 = 0;
/// A capture by somebody else is over within this time.
const TURN_LIMIT: Duration = Duration::from_secs(60);

/// What is to be captured, and what it is called.
#[derive(Debug, Clone, Default)]
pub struct Capture {
    pub tags: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub pinned: bool,
    /// Without RAM: restoring it boots a guest with this disk.
    pub disk_only: bool,
    /// Return only when it is durable.
    pub wait: bool,
}

/// A snapshot that was taken.
#[derive(Debug, Clone)]
pub struct Captured {
    pub id: String,
    /// The snapshot that its memory was an increment of.
    pub base: Option<String>,
    /// How long the guest's programs stood still.
    pub frozen: Duration,
    /// How long its processors did, which is a part of that.
    pub paused: Duration,
    /// What of that the VMM accounts for.
    pub phases: Phases,
    /// What storing it took; `None` if that was not waited for.
    pub kept: Option<keeper::Kept>,
}

/// What is to be written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// Only the disk.
    Disk,
    /// All of memory.
    Whole,
    /// What has changed since its last snapshot, or since it was loaded, if the keeper has that; else all of it.
    Increment,
}

/// What a sandbox has written down of itself.
pub(super) struct Image {
    pub(super) saved: Saved,
    pub(super) state: File,
    /// `None`: only the disk.
    pub(super) memory: Option<File>,
    pub(super) disk: Option<Disk>,
    /// Files of this machine that are not in it, by the name of a base image.
    pub(super) base_files: BTreeMap<String, keeper::BaseFile>,
    /// Memory holds only what differs from that of this snapshot.
    pub(super) base: Option<String>,
    /// Whose memory it is.
    vmm: Option<ProcessRecord>,
    pub(super) frozen: Duration,
    pub(super) paused: Duration,
    pub(super) phases: Phases,
}

/// Takes a snapshot of a sandbox that is up.
///
/// # Errors
/// Where it ended early. The sandbox goes on as before.
pub fn capture(
    found: &Found,
    keeper: &Keeper,
    options: &Capture,
    progress: impl FnMut(u64, u64),
) -> Result<Captured, SnapshotError> {
    let mut client = keeper.connect()?;
    let what = if options.disk_only {
        What::Disk
    } else {
        What::Increment
    };
    let image = take(found, &mut client, what)?;
    let spec = &image.saved.spec;
    let call = keeper::Keep {
        has_memory: image.memory.is_some(),
        has_disk: image.disk.is_some(),
        sandbox: serde_json::to_vec(&image.saved).unwrap_or_default(),
        tags: options.tags.clone(),
        labels: options.labels.clone(),
        pinned: options.pinned,
        parents: image.saved.parent.iter().cloned().collect(),
        vcpus: spec.vcpus,
        memory_bytes: spec.memory,
        cpu_baseline: "portable".to_owned(),
        requirements: BTreeMap::from([("cpu-vendor".to_owned(), image.saved.cpu_vendor.clone())]),
        base_files: image.base_files,
        is_increment: image.base.is_some(),
        disk_layers: match &image.disk {
            Some(Disk::Layers(files)) => u32::try_from(files.layers.len()).unwrap_or(u32::MAX),
            _ => 0,
        },
    };
    let layers = match &image.disk {
        Some(Disk::Layers(files)) => std::iter::once(&files.base).chain(&files.layers).collect(),
        _ => Vec::new(),
    };
    let accepted = |id: &str| match image.vmm {
        // Written behind the answer: should the snapshot be lost yet, the next one has no base, and is whole.
        Some(vmm) if image.memory.is_some() => Last::write(found, id, vmm),
        _ => Ok(()),
    };
    let (id, kept) = keep(&mut client, call, &layers, options.wait, accepted, progress)?;
    Ok(Captured {
        id,
        base: image.base,
        frozen: image.frozen,
        paused: image.paused,
        phases: image.phases,
        kept,
    })
}

fn keep(
    client: &mut Client,
    call: keeper::Keep,
    layers: &[&File],
    wait: bool,
    has_id: impl FnOnce(&str) -> Result<(), StateError>,
    mut progress: impl FnMut(u64, u64),
) -> Result<(String, Option<keeper::Kept>), SnapshotError> {
    let mut tell = |answer| {
        if let Answer::Progress(so_far) = answer {
            progress(so_far.done, so_far.total);
        }
    };
    let layers: Vec<_> = layers.iter().map(|file| file.as_fd()).collect();
    let (answer, _) = client.call(Call::Keep(call), &layers, &mut tell)?;
    let Answer::Accepted(accepted) = answer else {
        return Err(KeeperError::Unexpected.into());
    };
    has_id(&accepted.id)?;
    if !wait {
        return Ok((accepted.id, None));
    }
    match client.answer(&mut tell)? {
        (Answer::Kept(kept), _) => Ok((kept.id.clone(), Some(kept))),
        _ => Err(KeeperError::Unexpected.into()),
    }
}

/// Writes a sandbox down into files of the keeper, which vanish unless somebody keeps them.
pub(super) fn take(found: &Found, client: &mut Client, what: What) -> Result<Image, SnapshotError> {
    let disk_only = what == What::Disk;
    // What is read before it is this one's turn may be what another capture made of the sandbox.
    let turn = found.dir().capture_turn(TURN_LIMIT)?;
    let Some(turn) = turn else {
        return Err(SnapshotError::Busy(found.called()));
    };
    if found.is_half_reset() {
        return Err(LifeError::HalfReset(found.called()).into());
    }
    let spec = found.spec()?;
    let look = found.state();
    let (Some(spec), true) = (spec, look.is_up()) else {
        return Err(SnapshotError::WrongState {
            id: found.called(),
            state: look,
        });
    };
    if let Some(drive) = spec.drives.iter().find(|drive| !drive.read_only) {
        return Err(SnapshotError::WritableDrive {
            id: found.called(),
            drive: drive.path.display().to_string(),
        });
    }
    if disk_only && spec.disk.is_none() {
        return Err(SnapshotError::NoDisk(found.called()));
    }
    let was_paused = matches!(look, State::Paused(_));
    let mut saved = Saved::of(found, spec)?;
    let last = Last::of(found, look.vmm())?;
    // What this very guest was loaded from: it may have been booted since it was restored.
    let loaded = Loaded::of(found)?;
    let since = match (&last, &loaded) {
        (Some(_), _) => "Increment",
        (None, _) => "Diff",
    };
    if last.is_some() {
        saved.parent.clone_from(&last);
    }
    let spec = &saved.spec;
    let base_files = match look.vmm() {
        Some(vmm) => used_files(found, spec, vmm.pid)?,
        None => BTreeMap::new(),
    };
    let base = match what {
        What::Disk | What::Increment => last.or(loaded).unwrap_or_default(),
        What::Whole => String::new(),
    };
    let mut own = Own::of(found, spec)?;
    // A view of a template has pages that are in no memory of the VMM's own; only a whole image holds them, too.
    let is_view = what == What::Whole && found.dir().file(state::ORIGIN).exists();
    let begin = keeper::Begin {
        base: base.clone(),
        memory_bytes: if disk_only { 0 } else { spec.memory },
        disk_bytes: match own {
            Own::Raw(_) => spec.disk.unwrap_or(0),
            Own::None | Own::Layers(..) => 0,
        },
        expected_bytes: expected_bytes(found, &look, spec, disk_only, is_view),
        sandbox_dir: found.dir().path().to_string_lossy().into_owned(),
        was_paused,
        in_memory: what == What::Whole,
    };
    // The keeper has a share of the lock: should this process go, nobody else may begin before the keeper has
    // let the guest go on.
    let (answer, files) = client.call(Call::Begin(begin), &[turn.as_fd()], |_| {})?;
    let mut files = files.into_iter().map(File::from);
    let (Answer::Begun(begun), Some(state)) = (answer, files.next()) else {
        return Err(KeeperError::Unexpected.into());
    };
    let mut next = |wanted: bool| match wanted.then(|| files.next()) {
        Some(None) => Err(KeeperError::Unexpected),
        file => Ok(file.flatten()),
    };
    let memory = next(!disk_only)?;
    let copy = next(matches!(own, Own::Raw(_)))?;
    let durably = spec.life == Life::Persistent;
    let next_layer = own.next_layer(found, durably)?;
    let same = |state: &State| {
        let same = state.vmm() == look.vmm();
        same.then_some(())
            .ok_or_else(|| SnapshotError::Disturbed(found.called()))
    };
    let kind = if begun.has_base { since } else { "Full" };
    if memory.is_some() && !was_paused {
        look_ahead(found, kind);
    }
    let mut hold = Hold::new(found, was_paused);
    hold.freeze(disk_only)?;
    own.write_out();
    let (frozen, paused, phases) = match &memory {
        None => {
            own.copy_to(copy.as_ref())?;
            if let Some(name) = &next_layer {
                hold.pause()?;
                same(&found.state())?;
                let change = json!({"drive_id": "disk", "next_layer": name});
                change_disk(found, &change)?;
            }
            same(&found.state())?;
            let (frozen, paused) = hold.let_go()?;
            (frozen, paused, Phases::default())
        }
        Some(memory) => {
            // The VMM stops the guest itself, for as short as it can, and freezes memory and layers at one instant. A
            // raw disk is copied here, and the guest must stand still from before that on.
            if matches!(own, Own::Raw(_)) {
                hold.pause()?;
            }
            own.copy_to(copy.as_ref())?;
            // The same VMM from here on: a connection leads to one process.
            let mut api = found.api().map_err(|error| SnapshotError::Api {
                id: found.called(),
                source: error.into(),
            })?;
            let now = found.state();
            same(&now)?;
            if matches!(now, State::Paused(_)) != hold.paused.is_some() {
                return Err(SnapshotError::Disturbed(found.called()));
            }
            // From now on the VMM counts changes from this image on, whatever becomes of it.
            found.dir().remove_record(state::LAST)?;
            hold.create(&mut api, &state, memory, kind, next_layer.as_deref())?
        }
    };
    client.call(Call::Settle(keeper::Settle {}), &[], |_| {})?;
    Ok(Image {
        saved,
        state,
        memory,
        disk: own.disk(copy),
        base_files,
        base: (begun.has_base && !disk_only).then_some(base),
        vmm: look.vmm(),
        frozen,
        paused,
        phases,
    })
}

/// What the capture will hold at most: memory that the VMM has touched, and blocks of the disk.
fn expected_bytes(
    found: &Found,
    look: &State,
    spec: &SandboxSpec,
    disk_only: bool,
    is_view: bool,
) -> u64 {
    let resident = look.vmm().and_then(accounting::resident);
    let memory = match resident {
        _ if disk_only => 0,
        // A clone's pages are in its template, too.
        Some(bytes) if !is_view => bytes.min(spec.memory),
        _ => spec.memory,
    };
    let disk = inspect::disk_used(found).unwrap_or(0);
    memory.saturating_add(disk).saturating_add(STATE_BYTES)
}

/// The disk that is captured.
enum Own {
    None,
    Raw(File),
    Layers(Layered, Option<Files>),
}

impl Own {
    fn of(found: &Found, spec: &SandboxSpec) -> Result<Self, SnapshotError> {
        if spec.disk.is_none() {
            return Ok(Self::None);
        }
        if let Some(layered) = Layered::of(found.dir())? {
            return Ok(Self::Layers(layered, None));
        }
        let raw = File::open(found.dir().file(state::DISK));
        Ok(Self::Raw(
            raw.map_err(io_failed("open the sandbox's disk"))?,
        ))
    }

    /// Makes room for one more layer, and that layer. While the guest runs: the layer that it writes is still the
    /// one below.
    fn next_layer(
        &mut self,
        found: &Found,
        durably: bool,
    ) -> Result<Option<String>, SnapshotError> {
        let Self::Layers(layered, files) = self else {
            return Ok(None);
        };
        let dir = found.dir();
        layered.merge(dir, durably, |name| {
            let merged = json!({"path_on_host": name});
            let change = json!({"drive_id": "disk", "merged_layers": merged});
            change_disk(found, &change).map_err(|error| error.to_string())
        })?;
        let (below, name) = layered.next(dir, durably)?;
        below.write_out();
        *files = Some(below);
        Ok(Some(name))
    }

    /// See [`Files::write_out`].
    fn write_out(&self) {
        if let Self::Layers(_, Some(files)) = self {
            files.write_out();
        }
    }

    /// Copies a raw disk, which stands still.
    fn copy_to(&self, copy: Option<&File>) -> Result<(), SnapshotError> {
        let (Self::Raw(own), Some(copy)) = (self, copy) else {
            return Ok(());
        };
        let pair = || Ok((own.try_clone()?, copy.try_clone()?));
        let copied = pair().and_then(|(own, copy)| copy_into(own, copy));
        copied.map_err(io_failed("copy the sandbox's disk"))
    }

    /// What was captured.
    fn disk(self, copy: Option<File>) -> Option<Disk> {
        match self {
            Self::None => None,
            Self::Raw(_) => copy.map(Disk::Image),
            Self::Layers(_, files) => files.map(Disk::Layers),
        }
    }
}

/// `PATCH /drives/disk`.
fn change_disk(found: &Found, change: &serde_json::Value) -> Result<(), SnapshotError> {
    let (body, deadline) = (change.to_string(), Instant::now() + CHANGE_LIMIT);
    let changed = found
        .api()
        .map_err(vmm::ApiError::from)
        .and_then(|mut api| {
            vmm::request(&mut api, "PATCH", "/drives/disk", body.as_bytes(), deadline)
        });
    changed.map(drop).map_err(|source| SnapshotError::Api {
        id: found.called(),
        source,
    })
}

/// Has the VMM look for what a snapshot will hold while the guest's programs still run, so that they stand still for
/// less long. What fails here fails again where it counts.
fn look_ahead(found: &Found, kind: &str) {
    let (body, deadline) = (
        json!({"snapshot_type": kind}).to_string(),
        Instant::now() + CHANGE_LIMIT,
    );
    let call = "/snapshot/look-ahead";
    if let Ok(mut api) = found.api() {
        let _ = vmm::request(&mut api, "PUT", call, body.as_bytes(), deadline);
    }
}

/// How long the VMM says that the guest did not run, and with what of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub struct Phases {
    /// In microseconds: until it stood still.
    pub stop_us: u64,
    /// State of processors and devices.
    pub state_us: u64,
    /// Looking for what has changed.
    pub scan_us: u64,
    /// The frozen copy of memory.
    pub copy_us: u64,
    /// Freezing the layers of the disk, when it ran on already.
    pub layers_us: u64,
    /// All but the layers.
    pub paused_us: u64,
}

/// Has the VMM freeze state, RAM and disk, let the guest go on, and write the first two into files; the disk goes
/// on with `next_layer`. It writes a byte to `taken` when the guest goes on. Returns when the files are written.
fn create(
    found: &Found,
    api: &mut UnixStream,
    files: [(&str, BorrowedFd<'_>); 3],
    kind: &str,
    next_layer: Option<&str>,
) -> Result<Phases, SnapshotError> {
    let next: BTreeMap<&str, &str> = next_layer.map(|name| ("disk", name)).into_iter().collect();
    let body = json!({
        "snapshot_type": kind,
        "snapshot_path": "fd:state",
        "mem_file_path": "fd:memory",
        "resume_vm": true,
        "taken": "fd:taken",
        "next_layers": next,
    })
    .to_string();
    let call = ("PUT", "/snapshot/create");
    let deadline = Instant::now() + CREATE_LIMIT;
    let done = vmm::request_with(api, call, body.as_bytes(), &files, deadline);
    let answer = done.map_err(|source| SnapshotError::Api {
        id: found.called(),
        source,
    })?;
    Ok(serde_json::from_slice(&answer.body).unwrap_or_default())
}

/// A sandbox that stands still; dropped, it goes on.
struct Hold<'a> {
    found: &'a Found,
    was_paused: bool,
    frozen: Option<Instant>,
    paused: Option<Instant>,
}

impl<'a> Hold<'a> {
    fn new(found: &'a Found, was_paused: bool) -> Self {
        Self {
            found,
            was_paused,
            frozen: None,
            paused: None,
        }
    }

    /// Stops the guest's programs. A paused guest has to run for a moment to do so.
    fn freeze(&mut self, file_systems: bool) -> Result<(), SnapshotError> {
        if self.was_paused {
            lifecycle::set_running(self.found)?;
        }
        self.frozen = Some(Instant::now());
        let limit = if file_systems {
            WRITE_OUT_LIMIT
        } else {
            FREEZE_LIMIT
        };
        let deadline = Instant::now() + limit + Duration::from_secs(5);
        let agent = self.found.agent(deadline)?;
        system::freeze(agent, limit, file_systems, Some(deadline)).map_err(|source| {
            SnapshotError::Quiesce {
                id: self.found.called(),
                source,
            }
        })
    }

    fn pause(&mut self) -> Result<(), SnapshotError> {
        self.paused = Some(Instant::now());
        Ok(lifecycle::set_paused(self.found)?)
    }

    /// Has the guest written down. Its processors go on when it is frozen, its programs right after that, while it
    /// is being written. Returns how long programs and processors stood still.
    fn create(
        mut self,
        api: &mut UnixStream,
        state: &File,
        memory: &File,
        kind: &str,
        next_layer: Option<&str>,
    ) -> Result<(Duration, Duration, Phases), SnapshotError> {
        let found = self.found;
        let asked = Instant::now();
        let until_asked = self.paused.map_or(Duration::ZERO, |since| asked - since);
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC);
        let (told, taken) = pipe().map_err(|errno| io_failed("make a pipe")(errno.into()))?;
        std::thread::scope(|scope| {
            let taken = &taken;
            let writing = scope.spawn(move || {
                let files = [
                    ("state", state.as_fd()),
                    ("memory", memory.as_fd()),
                    ("taken", taken.as_fd()),
                ];
                let done = create(found, api, files, kind, next_layer);
                // Whoever waits need not any more, whatever has become of it.
                let _ = rustix::io::write(taken, &[ENDED]);
                done
            });
            // Without it the guest is looked at below, when the call has ended.
            let mut first = [ENDED];
            let _ = rustix::io::retry_on_intr(|| rustix::io::read(&told, &mut first));
            let let_go = (first != [ENDED]).then(|| {
                self.paused = None;
                self.let_go()
            });
            let broken = |_| SnapshotError::Disturbed(found.called());
            let phases = writing.join().map_err(broken)??;
            match let_go {
                Some(let_go) => {
                    let paused = until_asked + Duration::from_micros(phases.paused_us);
                    Ok((let_go?.0, paused, phases))
                }
                None => Err(SnapshotError::Disturbed(found.called())),
            }
        })
    }

    /// Lets it go on; returns how long programs and processors stood still.
    fn let_go(mut self) -> Result<(Duration, Duration), SnapshotError> {
        let took = |since: Option<Instant>| since.map_or(Duration::ZERO, |since| since.elapsed());
        let mut paused = Duration::ZERO;
        if self.paused.is_some() {
            lifecycle::set_running(self.found)?;
            paused = took(self.paused.take());
        }
        let frozen = self.frozen;
        self.thaw()?;
        let frozen = took(frozen);
        if self.was_paused {
            lifecycle::set_paused(self.found)?;
        }
        Ok((frozen, paused))
    }

    fn thaw(&mut self) -> Result<(), SnapshotError> {
        if self.frozen.is_none() {
            return Ok(());
        }
        let deadline = Instant::now() + FREEZE_LIMIT;
        let agent = self.found.agent(deadline)?;
        system::thaw(agent, Some(deadline)).map_err(|source| SnapshotError::Quiesce {
            id: self.found.called(),
            source,
        })?;
        self.frozen = None;
        Ok(())
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if self.paused.take().is_some() {
            let _ = lifecycle::set_running(self.found);
        }
        if self.frozen.is_some() {
            let _ = self.thaw();
            if self.was_paused {
                let _ = lifecycle::set_paused(self.found);
            }
        }
    }
}
