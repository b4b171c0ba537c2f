//! Options that several verbs share.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_node::assets::Assets;
use belljar_node::cpu;
use belljar_node::drive::DriveSpec;
use belljar_node::registry::{self, Found, Listed};
use belljar_node::sandbox::{DiskChoice, GuestSpec, ImageChoice, NewSandbox, Programs};
use belljar_node::size::Size;
use belljar_node::snapshots::{self, Keeper, NewClone};
use belljar_node::state::StateRoot;
use belljar_node::state::spec::Life;
use clap::Args;

use crate::failure::Failure;
use crate::values::{self, Cpus, Label};

/// A guest that is up answers a connection within this time.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The argument of verbs that work on one sandbox.
#[derive(Debug, Args)]
pub(crate) struct BoxArg {
    /// Id or name of the sandbox, or the beginning of either
    #[arg(value_name = "BOX")]
    pub(crate) sandbox: String,
}

impl BoxArg {
    /// The sandbox that is meant.
    pub(crate) fn find(&self) -> Result<Found, Failure> {
        find(&self.sandbox)
    }
}

/// The sandbox that a word means.
pub(crate) fn find(word: &str) -> Result<Found, Failure> {
    Ok(registry::find(&StateRoot::locate()?, word)?)
}

/// When a connection to a guest that is up is given up.
pub(crate) fn connect_deadline() -> Instant {
    Instant::now() + CONNECT_LIMIT
}

/// The sandboxes that a verb works on: named, or all of a kind.
#[derive(Debug, Args)]
pub(crate) struct Selection {
    /// Ids or names of sandboxes, or the beginnings of either
    #[arg(
        value_name = "BOX",
        required_unless_present_any = ["all", "label"],
        conflicts_with_all = ["all", "label"]
    )]
    sandboxes: Vec<String>,

    /// All sandboxes that this can be done to
    #[arg(long)]
    all: bool,

    /// All of these that have the label; several must all be there
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = values::label)]
    label: Vec<Label>,
}

impl Selection {
    /// The sandboxes; of those that were not named one by one only those in a fitting state.
    pub(crate) fn find(&self, fits: impl Fn(&str) -> bool) -> Result<Vec<Found>, Failure> {
        let root = StateRoot::locate()?;
        if self.sandboxes.is_empty() {
            let listed = registry::list(&root)?.into_iter();
            return Ok(listed
                .filter(|listed| fits(listed.state.word()) && has_labels(listed, &self.label))
                .map(|listed| listed.found)
                .collect());
        }
        let words = self.sandboxes.iter();
        Ok(words
            .map(|word| registry::find(&root, word))
            .collect::<Result<_, _>>()?)
    }
}

/// Whether all the labels are there.
pub(crate) fn has_labels(listed: &Listed, labels: &[Label]) -> bool {
    labels
        .iter()
        .all(|label| listed.has_label(&label.key, label.value.as_deref()))
}

/// What a new sandbox is called.
#[derive(Debug, Args)]
pub(crate) struct NameOptions {
    /// A name that no other sandbox has; a sandbox with a name stays when its guest ends
    #[arg(short, long, value_parser = values::name)]
    pub(crate) name: Option<String>,

    /// A label to find it by; may be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = values::label)]
    label: Vec<Label>,
}

impl NameOptions {
    /// The clone to make.
    pub(crate) fn clone_of(&self, life: Life) -> NewClone {
        NewClone {
            name: self.name.clone(),
            labels: values::labels(&self.label),
            life,
        }
    }

    /// The sandbox to make.
    pub(crate) fn describe(&self, life: Life, guest: GuestSpec) -> Result<NewSandbox, Failure> {
        Ok(NewSandbox {
            name: self.name.clone(),
            labels: values::labels(&self.label),
            life,
            guest,
        })
    }
}

/// What a guest is made of.
#[derive(Debug, Args)]
#[command(next_help_heading = "The guest")]
pub(crate) struct GuestOptions {
    /// Number of virtual processors, 1 to 32; a fraction (0.5, 1.5) also limits the host's CPU time
    #[arg(long, value_name = "N", default_value = "1", value_parser = values::cpus)]
    pub(crate) cpus: Cpus,

    /// Memory of the guest: 128M, 2G
    #[arg(short, long, value_name = "SIZE", default_value = "256M")]
    pub(crate) memory: Size,

    /// Size of the writable disk that goes away with the sandbox; 'none' keeps what is written in memory
    /// [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = values::disk)]
    pub(crate) disk: Option<DiskChoice>,

    /// Add a drive: a raw disk image or block device
    #[arg(long, value_name = "PATH[:ro][:id=NAME]")]
    pub(crate) drive: Vec<DriveSpec>,

    /// Root file system, an EROFS image; 'none' runs commands in the initramfs
    #[arg(long, value_name = "FILE", value_parser = values::image)]
    pub(crate) image: Option<ImageChoice>,

    /// Kernel: an x86-64 vmlinux or bzImage
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,

    /// Initramfs that holds the agent
    #[arg(long, value_name = "FILE")]
    pub(crate) initramfs: Option<PathBuf>,

    /// Words to add to the kernel's command line
    #[arg(long, value_name = "WORDS")]
    pub(crate) boot_args: Option<String>,
}

impl GuestOptions {
    /// As the node wants it.
    pub(crate) fn spec(&self, machine: &MachineOptions) -> Result<GuestSpec, Failure> {
        Ok(GuestSpec {
            assets: machine.assets()?,
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            image: self.image.clone().unwrap_or_default(),
            disk: self.disk.clone().unwrap_or_default(),
            drives: self.drive.clone(),
            vcpus: self.cpus.vcpus,
            cpu_limit_milli: self.cpus.limit_milli,
            memory: self.memory,
            boot_args: self.boot_args.clone(),
        })
    }
}

/// Where things are on this machine.
#[derive(Debug, Args)]
#[command(next_help_heading = "This machine")]
pub(crate) struct MachineOptions {
    /// Directory with kernel, initramfs, image and disks [default: the cache that 'make' fills]
    #[arg(long, value_name = "DIR", env = "BELLJAR_ASSETS")]
    pub(crate) assets: Option<PathBuf>,

    /// The VMM's program [default: belljar-vmm beside this one]
    #[arg(long, value_name = "FILE", env = "BELLJAR_VMM")]
    pub(crate) vmm: Option<PathBuf>,
}

impl MachineOptions {
    /// The guest's parts.
    pub(crate) fn assets(&self) -> Result<Assets, Failure> {
        Ok(Assets::locate(self.assets.as_deref())?)
    }

    /// The programs that make a sandbox.
    pub(crate) fn programs(&self) -> Programs {
        Programs {
            supervisor: PathBuf::from("/proc/self/exe"),
            vmm: program(self.vmm.as_deref(), "belljar-vmm"),
        }
    }
}

/// How long a guest may take to boot.
#[derive(Debug, Args)]
#[command(next_help_heading = "This machine")]
pub(crate) struct BootOptions {
    /// Give up on a guest that is not up after this time [default: 30s; 60s inside another virtual machine]
    #[arg(long, value_name = "TIME", value_parser = values::time, env = "BELLJAR_BOOT_TIMEOUT")]
    boot_timeout: Option<Duration>,
}

impl BootOptions {
    pub(crate) fn limit(&self) -> Duration {
        // A virtual machine in a virtual machine boots slowly.
        let default = || Duration::from_secs(if cpu::is_virtual() { 60 } else { 30 });
        self.boot_timeout.unwrap_or_else(default)
    }
}

/// The keeper of snapshots.
#[derive(Debug, Args)]
#[command(next_help_heading = "This machine")]
pub(crate) struct KeeperOptions {
    /// The keeper's program [default: belljar-keeper beside this one]
    #[arg(
        id = "keeper_program",
        long = "keeper",
        value_name = "FILE",
        env = "BELLJAR_KEEPER"
    )]
    keeper: Option<PathBuf>,
}

impl KeeperOptions {
    /// The keeper of these sandboxes.
    pub(crate) fn keeper(&self, root: &StateRoot) -> Keeper {
        snapshots::keeper_of(root, program(self.keeper.as_deref(), "belljar-keeper"))
    }
}

/// The program named, or the one of that name beside this one.
pub(crate) fn program(named: Option<&Path>, name: &str) -> PathBuf {
    named.map_or_else(
        || {
            let beside = std::env::current_exe().unwrap_or_default();
            beside.with_file_name(name)
        },
        // It runs in another directory.
        |path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()),
    )
}

/// The sandboxes that a verb looks at: named, or all that run.
#[derive(Debug, Args)]
pub(crate) struct Several {
    /// Ids or names of sandboxes, or the beginnings of either; none: all that run
    #[arg(value_name = "BOX")]
    sandboxes: Vec<String>,
}

impl Several {
    /// Those named, whatever they do; else those that run.
    pub(crate) fn running(&self) -> Result<Vec<Found>, Failure> {
        let root = StateRoot::locate()?;
        if self.sandboxes.is_empty() {
            let running = |listed: &Listed| listed.state.word() == "running";
            let all = registry::list(&root)?.into_iter();
            return Ok(all.filter(running).map(|listed| listed.found).collect());
        }
        self.sandboxes.iter().map(|word| find(word)).collect()
    }
}
