//! A limit on a VMM's CPU time, by a cgroup of its own (cgroup v2).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Microseconds in which a quota is spent (`cpu.max`).
const PERIOD_US: u64 = 100_000;
/// What the names of our cgroups begin with.
const PREFIX: &str = "belljar-";

/// No cgroup could be made that limits CPU time.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    #[error(
        "a fraction of a CPU needs cgroup v2, which is not mounted on this machine; use a whole number with --cpus"
    )]
    NoCgroups,
    #[error(
        "a fraction of a CPU needs a cgroup with the cpu controller, and this user may make none ({}: {source}); \
         use a whole number with --cpus, run as root, or below 'systemd-run --user --scope -p Delegate=yes'",
        path.display()
    )]
    NotAllowed { path: PathBuf, source: io::Error },
}

/// Puts a process into a new cgroup with a quota of `milli` thousandths of a CPU. It is made as near to this
/// process's own cgroup as the machine allows.
///
/// # Errors
/// No cgroup with the cpu controller can be made.
pub fn limit(id: &str, milli: u32, pid: u32) -> Result<PathBuf, LimitError> {
    try_each(&format!("{PREFIX}{id}"), |parent, path| {
        make(parent, path, milli)?;
        fs::write(path.join("cgroup.procs"), pid.to_string())
    })
}

/// Whether [`limit`] can work here, and where; leaves nothing.
///
/// # Errors
/// As [`limit`].
pub fn probe() -> Result<PathBuf, LimitError> {
    let name = format!("{PREFIX}probe-{}", std::process::id());
    let path = try_each(&name, |parent, path| make(parent, path, 1000))?;
    let _ = fs::remove_dir(&path);
    Ok(path.parent().map(Path::to_path_buf).unwrap_or_default())
}

fn try_each(
    name: &str,
    make: impl Fn(&Path, &Path) -> io::Result<()>,
) -> Result<PathBuf, LimitError> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mount = mount_point(&mounts).ok_or(LimitError::NoCgroups)?;
    let own = own_path(&own).ok_or(LimitError::NoCgroups)?;
    let mut refused = None;
    for parent in parents(&mount, &own) {
        let path = parent.join(name);
        match make(&parent, &path) {
            Ok(()) => return Ok(path),
            Err(source) => {
                let _ = fs::remove_dir(&path);
                refused = Some(LimitError::NotAllowed {
                    path: parent,
                    source,
                });
            }
        }
    }
    Err(refused.unwrap_or(LimitError::NoCgroups))
}

fn make(parent: &Path, path: &Path, milli: u32) -> io::Result<()> {
    match fs::create_dir(path) {
        // A crash left it.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let quota = path.join("cpu.max");
    if !quota.exists() {
        fs::write(parent.join("cgroup.subtree_control"), "+cpu")?;
    }
    let quota_us = u64::from(milli).saturating_mul(PERIOD_US / 1000);
    fs::write(quota, format!("{quota_us} {PERIOD_US}"))
}

/// Removes a cgroup that [`limit`] made, once nothing runs in it. The path comes from a record, so anything else
/// is left alone.
pub fn remove(path: &Path) {
    let ours = path
        .file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with(PREFIX));
    if ours {
        // What is killed leaves its cgroup a moment later.
        for _ in 0..50 {
            match fs::remove_dir(path) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                _ => return,
            }
        }
    }
}

/// Where cgroup v2 is mounted (`proc_pid_mountinfo(5)`).
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        kind.starts_with("cgroup2 ").then(|| PathBuf::from(point))
    })
}

/// The path of this process in the hierarchy of cgroup v2.
fn own_path(cgroup: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(PathBuf::from(path))
}

/// The process's own cgroup and those above it, the nearest first.
fn parents(mount: &Path, own: &Path) -> Vec<PathBuf> {
    own.ancestors().map(|path| mount.join(path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_found() {
        let mounts = "30 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      31 24 0:28 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        let mount = mount_point(mounts).unwrap();
        assert_eq!(mount, Path::new("/sys/fs/cgroup/unified"));
        let own = own_path("1:cpu:/\n0::/user.slice/x.scope\n").unwrap();
        let parents = parents(&mount, &own);
        assert_eq!(parents.len(), 3);
        assert!(parents[0].ends_with("unified/user.slice/x.scope"));
        assert!(parents[2].ends_with("cgroup/unified"));
        assert_eq!(mount_point(""), None);
        assert_eq!(own_path("1:cpu:/\n"), None);
    }

    #[test]
    fn only_our_own_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, other) = (
            dir.path().join("belljar-1"),
            dir.path().join("system.slice"),
        );
        fs::create_dir(&ours).unwrap();
        fs::create_dir(&other).unwrap();
        remove(&ours);
        remove(&other);
        assert!(!ours.exists() && other.exists());
    }
}
