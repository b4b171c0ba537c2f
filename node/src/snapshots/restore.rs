//! From what was saved to a sandbox of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use belljar_keeper::client::{Keeper, KeeperError};
use belljar_keeper::v1::{self as keeper, reply::Result as Answer, request::Call};

use rustix::fs::Access;

use super::SnapshotError;
use super::error::io_failed;
use super::saved::{IMAGE, INITRAMFS, KERNEL, Saved, base_files, drive_name};
use crate::assets::Assets;
use crate::cpu;
use crate::layered::Files;
use crate::sandbox::{Limits, Programs, Sandbox, create_with};
use crate::stages::Stages;
use crate::state::spec::{Life, SandboxSpec, now_ms};
use crate::state::{SandboxDir, StateRoot};
use crate::supervisor::Ready;

/// What every VMM needs beside the guest's memory, about.
const VMM_BYTES: u64 = 32 << 20;

/// What a clone is called.
#[derive(Debug, Clone)]
pub struct NewClone {
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub life: Life,
}

/// What the disks of clones begin as. None of these files is ever written.
#[derive(Debug)]
pub enum Disk {
    /// One image.
    Image(File),
    /// An image, and frozen layers over it.
    Layers(Files),
}

/// A keeper that does not take a recording within this time does without.
const RECORD_LIMIT: Duration = Duration::from_secs(2);

/// What clones are made from.
#[derive(Debug)]
pub struct Source {
    pub saved: Saved,
    /// `None` for a fork.
    pub snapshot: Option<String>,
    /// State and memory; `None`: a guest is booted with the disk.
    pub machine: Option<(File, File)>,
    /// Memory comes while the guest runs: the socket of who brings it. For one guest.
    pub handler: Option<OwnedFd>,
    /// Which pages an earlier guest wrote first.
    pub(crate) working_set: Option<File>,
    /// Who wants to know that of this guest.
    pub(crate) records: Option<Keeper>,
    /// A VMM that waits for just this memory: for one guest.
    pub(crate) ready: Mutex<Option<Ready>>,
    pub disk: Option<Disk>,
    /// Where the base images are, by drive.
    pub base_images: BTreeMap<String, String>,
    /// Everything was there already, and nothing had to be read from chunks.
    pub hot: bool,
}

impl Source {
    /// Has the keeper prepare a snapshot, and have a VMM of these programs ready if there is one; `image` names the root file system's file if it is not where it was.
    ///
    /// # Errors
    /// There is no such snapshot, or it cannot be restored on this machine.
    pub fn open(
        keeper: &Keeper,
        snapshot: &str,
        assets: &Assets,
        programs: &Programs,
        image: Option<PathBuf>,
    ) -> Result<Self, SnapshotError> {
        Self::open_for(keeper, snapshot, assets, image, Some(programs), |_| false)
    }

    /// The same; without a ready VMM if no programs are named, and without state and memory if `disk_only` says so of the snapshot's id.
    ///
    /// # Errors
    /// As [`Source::open`].
    pub(super) fn open_for(
        keeper: &Keeper,
        snapshot: &str,
        assets: &Assets,
        image: Option<PathBuf>,
        programs: Option<&Programs>,
        disk_only: impl FnOnce(&str) -> bool,
    ) -> Result<Self, SnapshotError> {
        let mut client = keeper.connect()?;
        let describe = Call::Describe(keeper::Describe {
            snapshot: snapshot.to_owned(),
        });
        let (Answer::Description(description), _) = client.call(describe, &[], |_| {})? else {
            return Err(KeeperError::Unexpected.into());
        };
        let saved = check(&description)?;
        let candidates = candidates(&saved, assets, image);
        let open = Call::Open(keeper::Open {
            snapshot: id_of(&description),
            candidates,
            disk_only: disk_only(&id_of(&description)),
            lazy: can_wait_for_pages(),
            programs: programs
                .filter(|_| lives_as_here(client.keeper_pid()))
                .and_then(found),
        });
        let (Answer::Opened(opened), files) = client.call(open, &[], |_| {})? else {
            return Err(KeeperError::Unexpected.into());
        };
        let mut files = files.into_iter();
        let mut next = || files.next().ok_or(KeeperError::Unexpected);
        let machine = match opened.has_memory {
            true => Some((File::from(next()?), File::from(next()?))),
            false => None,
        };
        let disk = opened.has_disk.then(&mut next).transpose()?;
        let disk = disk.map(|disk| Disk::Image(disk.into()));
        let handler = opened.lazy.then(&mut next).transpose()?;
        let working_set = opened.has_working_set.then(&mut next).transpose()?;
        let ready = match opened.ready {
            true => Some(Ready::new(next()?.into(), next()?)),
            false => None,
        };
        Ok(Self {
            handler,
            working_set: working_set.map(File::from),
            records: opened.wants_working_set.then(|| keeper.clone()),
            ready: Mutex::new(ready),
            saved,
            snapshot: Some(id_of(&description)),
            machine,
            disk,
            base_images: opened.base_images,
            hot: opened.hot,
        })
    }

    /// The configuration of a clone. Of the files it is made of only those are named whose content the keeper
    /// has found right.
    ///
    /// # Errors
    /// The record names a file whose content is not known.
    pub(crate) fn spec(&self, clone: &NewClone) -> Result<SandboxSpec, SnapshotError> {
        let mut spec = self.saved.spec.clone();
        spec.name.clone_from(&clone.name);
        spec.labels.clone_from(&clone.labels);
        spec.life = clone.life;
        spec.created_ms = now_ms();
        if self.snapshot.is_none() {
            // A fork: the parent's own.
            return Ok(spec);
        }
        let unknown = |name: &str| SnapshotError::Unfit {
            id: self.snapshot.clone().unwrap_or_default(),
            why: format!("its record names a file for '{name}' that it does not describe"),
            remedy: "it was not written by Bell Jar as it is; do not trust it".to_owned(),
        };
        let find = |name: &str, path: &mut PathBuf| -> Result<(), SnapshotError> {
            let found = self.base_images.get(name).ok_or_else(|| unknown(name))?;
            *path = PathBuf::from(found);
            Ok(())
        };
        let named = [
            (IMAGE, &mut spec.image),
            (KERNEL, &mut spec.kernel),
            (INITRAMFS, &mut spec.initramfs),
        ];
        for (name, path) in named {
            if let Some(path) = path {
                find(name, path)?;
            }
        }
        for (index, drive) in spec.drives.iter_mut().enumerate() {
            let name = drive_name(index, drive);
            if !drive.read_only {
                return Err(unknown(&name));
            }
            find(&name, &mut drive.path)?;
        }
        Ok(spec)
    }
}

/// Whether a VMM of this user may have faults of its guest's memory answered by another process, and nobody
/// wants memory complete before the guest runs (`BELLJAR_LAZY=0`).
fn can_wait_for_pages() -> bool {
    std::env::var_os("BELLJAR_LAZY").is_none_or(|on| on != "0")
        && rustix::fs::access("/dev/userfaultfd", Access::READ_OK | Access::WRITE_OK).is_ok()
}

/// Whether what that process starts is where what this one starts would be: a sandbox shall be in its caller's cgroup
/// and namespaces, whoever started the keeper.
fn lives_as_here(pid: u32) -> bool {
    let cgroup = |of: &str| std::fs::read(format!("/proc/{of}/cgroup")).ok();
    let space = |of: &str, kind: &str| std::fs::read_link(format!("/proc/{of}/ns/{kind}")).ok();
    let pid = pid.to_string();
    let kinds = ["pid", "mnt", "net", "user", "ipc", "uts"];
    cgroup("self").is_some_and(|own| Some(own) == cgroup(&pid))
        && kinds
            .iter()
            .all(|kind| space("self", kind).is_some_and(|own| Some(own) == space(&pid, kind)))
}

/// Programs as the keeper can start them, which works elsewhere.
fn found(programs: &Programs) -> Option<keeper::Programs> {
    let text = |path: &PathBuf| -> Option<String> {
        // Such as /proc/self/exe.
        let path = std::fs::canonicalize(path).ok()?;
        Some(path.to_str()?.to_owned())
    };
    Some(keeper::Programs {
        supervisor: text(&programs.supervisor)?,
        vmm: text(&programs.vmm)?,
    })
}

fn id_of(description: &keeper::Description) -> String {
    let snapshot = description.snapshot.as_ref();
    snapshot
        .map(|snapshot| snapshot.id.clone())
        .unwrap_or_default()
}

/// Where base images may be: where they were, and where new sandboxes have theirs.
fn candidates(saved: &Saved, assets: &Assets, image: Option<PathBuf>) -> Vec<keeper::BaseImage> {
    let of = |drive: &str, path: PathBuf| keeper::BaseImage {
        drive: drive.to_owned(),
        path: path.to_string_lossy().into_owned(),
    };
    let image = image.into_iter().chain(assets.image().ok());
    let recorded = base_files(&saved.spec).into_iter();
    let elsewhere = image.map(|path| (IMAGE.to_owned(), path));
    recorded
        .chain(elsewhere)
        .map(|(name, path)| of(&name, path))
        .collect()
}

/// Whether this machine can restore it: told before anything is made. Base images are the keeper's to check.
///
/// # Errors
/// Why it cannot.
pub fn check(description: &keeper::Description) -> Result<Saved, SnapshotError> {
    let id = id_of(description);
    let unfit = |why: String, remedy: &str| SnapshotError::Unfit {
        id: id.clone(),
        why,
        remedy: remedy.to_owned(),
    };
    let saved = Saved::parse(&description.sandbox).map_err(|why| {
        unfit(
            why,
            "use the version of Bell Jar that wrote it, or a newer one",
        )
    })?;
    let has_memory = description
        .images
        .iter()
        .any(|image| image.name == "memory");
    for (need, value) in &description.requirements {
        match need.as_str() {
            "cpu-vendor" if !has_memory || *value == cpu::vendor() => {}
            "cpu-vendor" => {
                return Err(unfit(
                    format!(
                        "it was taken on a processor of {value}, and this one is of {}",
                        cpu::vendor()
                    ),
                    "restore it on a machine with such a processor",
                ));
            }
            other => {
                return Err(unfit(
                    format!("it needs '{other}', which this version does not know"),
                    "use the version of Bell Jar that wrote it, or a newer one",
                ));
            }
        }
    }
    check_contents(description, &saved).map_err(|why| {
        unfit(
            why,
            "it was not written by Bell Jar as it is; do not trust it",
        )
    })?;
    check_memory(description, &unfit)?;
    Ok(saved)
}

/// Whether its images are those that its record speaks of.
fn check_contents(description: &keeper::Description, saved: &Saved) -> Result<(), String> {
    let length = |name: &str| {
        let image = description.images.iter().find(|image| image.name == name);
        image.map(|image| image.length)
    };
    let (memory, disk) = (length("memory"), length("disk:disk"));
    if memory.is_some() && length("state").is_none() {
        return Err("it holds memory, and no state of processors and devices".to_owned());
    }
    let spec = &saved.spec;
    if memory.is_some_and(|bytes| bytes != spec.memory || bytes != description.memory_bytes) {
        return Err(format!(
            "it holds {} bytes of memory, and its record speaks of {}",
            memory.unwrap_or(0),
            spec.memory
        ));
    }
    if disk != spec.disk {
        return Err(format!(
            "it holds a disk of {} bytes, and its record speaks of {}",
            disk.unwrap_or(0),
            spec.disk.unwrap_or(0)
        ));
    }
    if memory.is_none() && disk.is_none() {
        return Err("it holds neither memory nor a disk".to_owned());
    }
    Ok(())
}

/// Clones share what they only read, so the guest's whole RAM need not be free; but some of it must be.
fn check_memory(
    description: &keeper::Description,
    unfit: &dyn Fn(String, &str) -> SnapshotError,
) -> Result<(), SnapshotError> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok())
    };
    let (Some(total), Some(available)) = (kib("MemTotal:"), kib("MemAvailable:")) else {
        return Ok(());
    };
    let swap = kib("SwapTotal:").unwrap_or(0);
    let (all, free) = (total.saturating_add(swap) << 10, available << 10);
    if description.memory_bytes > all {
        return Err(unfit(
            format!(
                "its guest has {} MiB of memory, and this machine {} MiB",
                description.memory_bytes >> 20,
                all >> 20
            ),
            "restore it on a larger machine",
        ));
    }
    if free < VMM_BYTES {
        return Err(unfit(
            format!("only {} MiB of this machine's memory are free", free >> 20),
            "'belljar ls' lists what runs; stop something",
        ));
    }
    Ok(())
}

/// Where sandboxes are made, and from what.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a> {
    pub root: &'a StateRoot,
    pub programs: &'a Programs,
    pub assets: &'a Assets,
    pub limits: Limits<'a>,
}

/// Makes a sandbox from what was saved, and returns when its agent has taken over.
///
/// # Errors
/// Where it ended early. Nothing is left behind then.
pub fn restore(
    host: Host<'_>,
    source: &Source,
    clone: &NewClone,
    stages: &mut Stages,
) -> Result<Sandbox, SnapshotError> {
    let spec = source.spec(clone)?;
    // Whatever ends this half-way, nothing of it stays: it is kept from the moment on that its programs run.
    let made = SandboxSpec {
        life: match spec.life {
            // One that is booted is no worse for being booted later.
            Life::Persistent if source.machine.is_some() => Life::Detached,
            life => life,
        },
        ..spec.clone()
    };
    let (dir, lock) = create_with(host.root, &made, |dir| source.fill(dir, spec.life))?;
    stages.mark("prepared");
    let stays = spec.life == Life::Persistent;
    let restored = bring_up(host, source, (&dir, lock), stays, stages);
    if restored.is_err() {
        // One that never came up is not kept, even with a name.
        let _ = dir.remove();
    }
    let mut restored = restored?;
    if spec.life == Life::Persistent {
        restored.keep(&spec)?;
    }
    if let (Some(keeper), Some(snapshot)) = (&source.records, &source.snapshot) {
        // The next one is only not as fast.
        let _ = record(keeper, snapshot, &restored, host.limits);
    }
    Ok(restored)
}

/// Tells the keeper which pages the guest has written by now.
fn record(
    keeper: &Keeper,
    snapshot: &str,
    restored: &Sandbox,
    limits: Limits<'_>,
) -> Result<(), SnapshotError> {
    let file = restored
        .working_set(limits)
        .map_err(io_failed("record what the guest has written"))?;
    let record = Call::Record(keeper::Record {
        snapshot: snapshot.to_owned(),
    });
    let mut client = keeper.connect()?;
    client.limit(RECORD_LIMIT)?;
    client.call(record, &[file.as_fd()], |_| {})?;
    Ok(())
}

/// Starts a sandbox whose directory holds what it needs; `stays`: its disk outlives the guest.
pub(super) fn bring_up(
    host: Host<'_>,
    source: &Source,
    (dir, lock): (&SandboxDir, File),
    stays: bool,
    stages: &mut Stages,
) -> Result<Sandbox, SnapshotError> {
    let (programs, limits) = (host.programs, host.limits);
    Ok(if source.machine.is_some() {
        Sandbox::restore(dir, lock, programs, source, stays, limits, stages)?
    } else {
        // Only the disk was saved: the guest is booted.
        Sandbox::start(dir, lock, programs, host.assets, limits, stages)?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_keeper_with_the_same_cgroup_and_namespaces_starts_things_for_this_process() {
        assert!(lives_as_here(std::process::id()));
        assert!(!lives_as_here(u32::MAX));
    }

    const RECORD: &str = r#"{"version": 1, "writer": "0", "sandbox": "0badcafe", "lineage": "0badcafe",
        "generation": 0, "spec": {"version": 1, "created_ms": 1, "life": "owned", "vcpus": 1, "memory": 268435456, "disk": 1048576}}"#;

    fn description() -> keeper::Description {
        let image = |name: &str, length| keeper::Image {
            name: name.to_owned(),
            length,
            ..keeper::Image::default()
        };
        keeper::Description {
            sandbox: RECORD.as_bytes().to_vec(),
            memory_bytes: 256 << 20,
            requirements: BTreeMap::from([("cpu-vendor".to_owned(), cpu::vendor())]),
            images: vec![
                image("state", 9000),
                image("memory", 256 << 20),
                image("disk:disk", 1 << 20),
            ],
            ..keeper::Description::default()
        }
    }

    fn why(change: impl FnOnce(&mut keeper::Description)) -> String {
        let mut description = description();
        change(&mut description);
        check(&description).unwrap_err().to_string()
    }

    #[test]
    fn what_this_machine_cannot_restore_is_told_with_the_reason() {
        assert!(check(&description()).is_ok());
        let other = "cpu-vendor".to_owned();
        let text = why(|of| drop(of.requirements.insert(other, "Another".into())));
        assert!(text.contains("a processor of Another"), "{text}");
        let text = why(|of| drop(of.requirements.insert("quantum".into(), "1".into())));
        assert!(text.contains("needs 'quantum'"), "{text}");
        let text = why(|of| {
            of.memory_bytes = 1 << 50;
            of.images[1].length = 1 << 50;
            let much = RECORD.replace("268435456", &(1_u64 << 50).to_string());
            of.sandbox = much.into_bytes();
        });
        assert!(text.contains("this machine"), "{text}");
        let later = RECORD.replacen("\"version\": 1", "\"version\": 9", 1);
        let text = why(|of| of.sandbox = later.into_bytes());
        assert!(text.contains("version 9"), "{text}");
        let text = why(|of| of.sandbox.clear());
        assert!(text.contains("is not good"), "{text}");
    }

    #[test]
    fn images_that_the_record_does_not_speak_of_are_told() {
        for (change, says) in [
            (
                (|of| drop(of.images.remove(0))) as fn(&mut keeper::Description),
                "no state",
            ),
            (|of| of.images[1].length -= 4096, "bytes of memory"),
            (|of| of.memory_bytes -= 4096, "bytes of memory"),
            (|of| of.images[2].length += 1, "a disk of 1048577"),
            (|of| drop(of.images.pop()), "a disk of 0"),
            (|of| of.images.clear(), "a disk of 0"),
        ] {
            let text = why(change);
            assert!(
                text.contains(says) && text.contains("cannot be restored"),
                "{text}"
            );
        }
    }

    #[test]
    fn another_processor_does_not_matter_to_a_disk() {
        let mut disk = description();
        disk.images.drain(..2);
        disk.requirements
            .insert("cpu-vendor".to_owned(), "Another".to_owned());
        assert!(check(&disk).is_ok());
    }
}
