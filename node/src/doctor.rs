//! Checks of this machine, each with what to do about it.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

use crate::assets::{AssetError, Assets};
use crate::cgroup;
use crate::cpu;
use crate::leftovers::{self, Advice};
use crate::lifecycle::LifeError;
use crate::registry::{self, Listed};
use crate::sandbox::Programs;
use crate::state::{StateError, StateRoot};
use crate::sys::{self, Kvm};

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// Works, or is not needed yet.
    Note,
    Failed,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub verdict: Verdict,
    /// What there is.
    pub found: String,
    /// What to do; empty if nothing.
    pub remedy: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self::new(name, Verdict::Ok, found, "")
    }

    fn failed(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(name, Verdict::Failed, found, remedy)
    }

    fn note(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(name, Verdict::Note, found, remedy)
    }

    fn new(
        name: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            name,
            verdict,
            found: found.into(),
            remedy: remedy.into(),
        }
    }
}

/// KVM's extensions the VMM needs (`KVM_CAP_…`, linux/kvm.h).
const EXTENSIONS: [(&str, u64); 7] = [
    ("irqchip", 0),
    ("user memory", 3),
    ("TSS address", 4),
    ("extended CPUID", 7),
    ("irqfd", 32),
    ("ioeventfd", 36),
    ("MP state", 14),
];
/// The only version of KVM's interface there is (KVM api.rst 4.1).
const KVM_VERSION: i32 = 12;

/// All checks. `clean` removes what crashed sandboxes left.
#[must_use]
pub fn examine(
    assets: Result<Assets, AssetError>,
    root: Result<StateRoot, StateError>,
    programs: &Programs,
    clean: bool,
) -> Vec<Check> {
    let mut checks = vec![processor(), kvm()];
    checks.extend(guest_parts(assets));
    checks.push(vmm(&programs.vmm));
    match root {
        Ok(root) => {
            checks.push(state_directory(&root));
            checks.extend(leftovers(&root, clean));
        }
        Err(error) => checks.push(Check::failed(
            "state directory",
            error.to_string(),
            "set HOME or BELLJAR_STATE",
        )),
    }
    checks.push(host_kernel());
    checks.push(cpu_limits());
    checks.push(tun());
    checks.push(userfaultfd());
    checks
}

/// Whether one of the checks failed.
#[must_use]
pub fn has_failures(checks: &[Check]) -> bool {
    checks.iter().any(|check| check.verdict == Verdict::Failed)
}

fn processor() -> Check {
    let cpu = cpu::read();
    let name = "processor";
    match cpu.virtualisation {
        Some(flag) => {
            let nested = if cpu.is_virtual {
                ", itself virtual"
            } else {
                ""
            };
            Check::ok(name, format!("{} ({flag}{nested})", cpu.model))
        }
        None => Check::failed(
            name,
            format!("{} has neither vmx nor svm", cpu.model),
            "switch virtualisation on in the firmware, or nested virtualisation on in the cloud; without it \
             use the emulated host: 'make run', or tests/host/run -- belljar …",
        ),
    }
}

fn kvm() -> Check {
    let name = "/dev/kvm";
    match ask_kvm() {
        Ok(found) => found,
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => Check::failed(
                name,
                "is not there",
                "load the module: 'modprobe kvm_intel' or 'modprobe kvm_amd'",
            ),
            io::ErrorKind::PermissionDenied => Check::failed(
                name,
                "this user may not open it",
                "add the user to its group ('usermod -aG kvm USER', then log in again)",
            ),
            _ => Check::failed(
                name,
                error.to_string(),
                "'dmesg | grep kvm' says more; another hypervisor may hold the processor",
            ),
        },
    }
}

fn ask_kvm() -> io::Result<Check> {
    let name = "/dev/kvm";
    let device = Kvm::open()?;
    let version = device.api_version()?;
    if version != KVM_VERSION {
        return Ok(Check::failed(
            name,
            format!("its interface has version {version} instead of {KVM_VERSION}"),
            "use a Linux kernel of this century",
        ));
    }
    let missing: Vec<&str> = EXTENSIONS
        .iter()
        .filter(|(_, number)| !device.extension(*number).is_ok_and(|answer| answer > 0))
        .map(|(extension, _)| *extension)
        .collect();
    if !missing.is_empty() {
        return Ok(Check::failed(
            name,
            format!("it lacks: {}", missing.join(", ")),
            "use a newer host kernel",
        ));
    }
    device.create_vm()?;
    Ok(Check::ok(name, "makes virtual machines"))
}

fn guest_parts(assets: Result<Assets, AssetError>) -> Vec<Check> {
    let assets = match assets {
        Ok(assets) => assets,
        Err(error) => {
            return vec![Check::failed(
                "guest parts",
                error.to_string(),
                error.remedy(),
            )];
        }
    };
    let part = |name, found: Result<std::path::PathBuf, AssetError>| match found {
        Ok(path) => match File::open(&path) {
            Ok(_) => Check::ok(name, path.display().to_string()),
            Err(error) => Check::failed(
                name,
                format!("{}: {error}", path.display()),
                "make it readable for this user",
            ),
        },
        Err(error) => Check::failed(name, error.to_string(), error.remedy()),
    };
    let sizes = assets.disk_sizes();
    let disks = if sizes.is_empty() {
        let error = AssetError::NoDiskOfSize {
            size: crate::assets::DEFAULT_DISK,
            sizes,
        };
        Check::failed("empty disks", "there are none", error.remedy())
    } else {
        let names: Vec<String> = sizes.iter().map(ToString::to_string).collect();
        Check::ok("empty disks", names.join(", "))
    };
    vec![
        part("guest kernel", assets.kernel()),
        part("initramfs", assets.initramfs()),
        part("guest image", assets.image()),
        disks,
    ]
}

fn vmm(program: &Path) -> Check {
    let name = "VMM";
    let ours = env!("CARGO_PKG_VERSION");
    let output = match Command::new(program).arg("--version").output() {
        Ok(output) => output,
        Err(error) => {
            return Check::failed(
                name,
                format!("{}: {error}", program.display()),
                "run 'make build', or name it with --vmm",
            );
        }
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let said = said.lines().next().unwrap_or("").trim();
    if said.contains(ours) {
        Check::ok(name, format!("{said} ({})", program.display()))
    } else {
        Check::note(
            name,
            format!(
                "{} says '{said}', this is version {ours}",
                program.display()
            ),
            "build both from one checkout: 'make build'",
        )
    }
}

fn state_directory(root: &StateRoot) -> Check {
    let name = "state directory";
    let dir = root.dir();
    match root.create().and_then(|(probe, _lock)| probe.remove()) {
        Ok(()) => Check::ok(name, dir.display().to_string()),
        Err(error) => Check::failed(
            name,
            error.to_string(),
            "make it writable, or name another with BELLJAR_STATE",
        ),
    }
}

fn leftovers(root: &StateRoot, clean: bool) -> Vec<Check> {
    let name = "sandboxes";
    let found = match registry::list(root) {
        Ok(found) => found,
        Err(error) => return vec![Check::failed(name, error.to_string(), "make it readable")],
    };
    let up = found.iter().filter(|listed| listed.state.is_up()).count();
    let mut checks = vec![Check::ok(
        name,
        format!("{} in all, {up} running", found.len()),
    )];
    checks.extend(
        found
            .iter()
            .filter_map(|listed| leftover_check(listed, clean)),
    );
    checks
}

/// What is wrong with a sandbox, and what becomes of it; `None` if nothing is.
fn leftover_check(listed: &Listed, clean: bool) -> Option<Check> {
    let name = "leftovers";
    let id = listed.found.id();
    let found = format!("sandbox {}: {}", listed.called(), listed.state.reason());
    let done = match leftovers::advise(listed) {
        Advice::Fine => return None,
        Advice::Keep => {
            let remedy = format!(
                "its disk is kept: 'belljar start {id}' starts it again, 'belljar rm {id}' removes it"
            );
            return Some(Check::note(name, found, remedy));
        }
        Advice::ByHand => return Some(Check::failed(name, found, "remove it by hand")),
        Advice::End => "ended, its disk is kept",
        Advice::Remove => "removed",
    };
    if !clean {
        let remedy = format!("'belljar doctor --clean' cleans it up ({done})");
        return Some(Check::failed(name, found, remedy));
    }
    Some(match leftovers::clean(listed) {
        Ok(_) => Check::ok(name, format!("{found}; {done}")),
        Err(error @ LifeError::Busy(_)) => Check::note(name, found, error.to_string()),
        Err(error) => Check::failed(name, error.to_string(), "remove it by hand"),
    })
}

fn host_kernel() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let name = "host kernel";
    if at_least(release, (6, 7)) {
        Check::ok(name, release)
    } else {
        Check::note(
            name,
            release,
            "6.7 or later finds a snapshot's changed pages faster (PAGEMAP_SCAN); not needed yet",
        )
    }
}

fn at_least(release: &str, wanted: (u32, u32)) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= wanted
}

fn cpu_limits() -> Check {
    let name = "CPU limits";
    match cgroup::probe() {
        Ok(parent) => Check::ok(name, format!("cgroups below {}", parent.display())),
        Err(error) => Check::note(
            name,
            "this user can make no cgroup with the cpu controller",
            error.to_string(),
        ),
    }
}

fn tun() -> Check {
    let name = "/dev/net/tun";
    match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Check::ok(name, "can be opened (for networks, later)"),
        Err(error) => Check::note(
            name,
            error.to_string(),
            "'modprobe tun', and rights to the device; needed for networks, not yet",
        ),
    }
}

fn userfaultfd() -> Check {
    let name = "userfaultfd";
    let privileged = rustix::process::geteuid().is_root();
    let open_to_all = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
        .is_ok_and(|text| text.trim() == "1");
    if sys::has_userfaultfd() && (privileged || open_to_all) {
        Check::ok(
            name,
            "available (for guests that run before all of their memory is here)",
        )
    } else {
        Check::note(
            name,
            "not available to this user",
            "'sysctl vm.unprivileged_userfaultfd=1', or rights to /dev/userfaultfd; needed for snapshots, not yet",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_as_numbers() {
        assert!(at_least("6.12.1-cloud", (6, 7)));
        assert!(at_least("6.7", (6, 7)));
        assert!(!at_least("6.1.0-28", (6, 7)));
        assert!(at_least("10.0-rc1", (6, 7)));
        assert!(!at_least("", (6, 7)));
    }

    #[test]
    fn leftovers_are_told_with_their_remedy_and_cleaned() {
        let keep = tempfile::tempdir().unwrap();
        let root = StateRoot::at(keep.path()).unwrap();
        let (dir, lock) = root.create().unwrap();
        assert!(!has_failures(&leftovers(&root, false)));
        drop(lock);
        let told = leftovers(&root, false);
        assert!(has_failures(&told));
        assert!(told[1].found.contains(dir.id()) && told[1].remedy.contains("--clean"));
        assert!(!has_failures(&leftovers(&root, true)));
        assert!(!dir.path().exists());
    }

    #[test]
    fn a_missing_part_and_a_missing_vmm_fail_with_a_remedy() {
        let keep = tempfile::tempdir().unwrap();
        let programs = Programs {
            supervisor: "/nonexistent".into(),
            vmm: "/nonexistent/belljar-vmm".into(),
        };
        let checks = examine(
            Assets::locate(Some(keep.path())),
            StateRoot::at(keep.path()),
            &programs,
            false,
        );
        for name in [
            "guest kernel",
            "initramfs",
            "guest image",
            "empty disks",
            "VMM",
        ] {
            let check = checks.iter().find(|check| check.name == name).unwrap();
            assert_eq!(check.verdict, Verdict::Failed, "{name}");
            assert!(!check.remedy.is_empty(), "{name}");
        }
    }
}
