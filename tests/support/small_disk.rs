//! File systems that are small, or cannot be written, for tests of several crates (included with `#[path]`).
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Runs a test, named with its modules, again in a mount namespace of its own. `true`: this is that run.
pub(crate) fn in_a_namespace(name: &str) -> bool {
    if std::env::var_os("FAULTS_NAMESPACE").is_some() {
        return true;
    }
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let done = command
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("FAULTS_NAMESPACE", "1")
        .status()
        .expect("util-linux is installed");
    assert!(done.success(), "{name} failed in its namespace");
    false
}

/// Mounts a file system in memory of so many MiB.
pub(crate) fn mount_small(mib: u64, path: &Path) {
    mount(
        &["-t", "tmpfs", "-o", &format!("size={mib}m"), "small"],
        path,
    );
}

pub(crate) fn mount(arguments: &[&str], path: &Path) {
    // A process that was killed takes a moment to close its files.
    let deadline = Instant::now() + Duration::from_secs(10);
    let done = || Command::new("mount").args(arguments).arg(path).status();
    while !done().unwrap().success() {
        assert!(Instant::now() < deadline, "mount {arguments:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Takes all space of a file system but so many bytes; given back when it is dropped.
pub(crate) struct Ballast(PathBuf);

impl Ballast {
    pub(crate) fn leaving(dir: &Path, bytes: u64) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("ballast-{number}"));
        let free = rustix::fs::statvfs(dir).unwrap();
        let take = (free.f_bavail * free.f_frsize).saturating_sub(bytes);
        let file = File::create(&path).unwrap();
        if take > 0 {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, take).unwrap();
        }
        Self(path)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
