//! A guest whose pages another process brings in, `tests/e2e/tools/page_handler.py`.
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use belljar_e2e::guest::{Guest, Spec};
use belljar_e2e::vmm::Vmm;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::REMEMBER;

/// Killed when dropped.
struct Handler {
    child: Child,
    /// It has something to say there; if nobody listened it would end.
    _out: BufReader<ChildStdout>,
}

impl Handler {
    /// Listens on `handler` in `dir`, and serves `ram`.
    fn start(dir: &Path) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/page_handler.py");
        let _ = fs::remove_file(dir.join("handler"));
        let mut child = Command::new("python3")
            .arg(script)
            .args([dir.join("handler"), dir.join("ram")])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { child, _out: out }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn clone_of(dir: &Path) -> Guest {
    let vmm = Vmm::new();
    vmm.put("/console", &json!({"socket_path": "console.sock"}));
    vmm.put(
        "/snapshot/load",
        &json!({
            "snapshot_path": dir.join("state"), "resume_vm": true,
            "mem_backend": {"backend_type": "Uffd", "backend_path": dir.join("handler")},
        }),
    );
    Guest::loaded(vmm)
}

fn save(guest: &Guest, dir: &Path, ram: &str, more: &serde_json::Value) -> u64 {
    let mut body = json!({
        "snapshot_path": dir.join("state"), "mem_file_path": dir.join(ram), "resume_vm": true,
    });
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    guest.vmm.call("PUT", "/snapshot/create", &body).is_done();
    fs::metadata(dir.join(ram)).unwrap().blocks() * 512
}

#[test]
fn a_guest_lives_on_pages_that_somebody_brings() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let shape = Spec {
        memory_mib: 192,
        ..Spec::default()
    };
    let parent = Guest::boot_with(&shape, |vmm| {
        vmm.put(
            "/balloon",
            &json!({"amount_mib": 0, "deflate_on_oom": true, "free_page_hinting": true}),
        );
    });
    parent.sh(
        "echo s3cret > /dev/shm/secret; head -c 16M /dev/urandom > /dev/shm/fill
        head -c 48M /dev/urandom > /dev/shm/waste; rm /dev/shm/waste",
    );
    let remembered = parent.sh(REMEMBER);
    // What was freed is in a snapshot, unless the guest is asked for it first.
    let all = save(&parent, dir, "all", &json!({}));
    let used = save(&parent, dir, "ram", &json!({"hint_free_pages_ms": 5000}));
    println!(
        "{} MB, without free pages {}",
        all / 1_000_000,
        used / 1_000_000
    );
    // Linux hints free blocks of 4 MiB, and how many of the 12 have come together again differs: six to eight.
    assert!(used + (8 << 20) <= all, "{used} of {all} bytes");
    assert_eq!(parent.sh(REMEMBER), remembered);
    drop(parent);
    fs::remove_file(dir.join("all")).unwrap();

    let handler = Handler::start(dir);
    let guest = clone_of(dir);
    assert_eq!(guest.sh(REMEMBER), remembered);
    // The balloon gives back what it has, and has it again as zeros.
    guest.vmm.patch("/balloon/hinting/start", &json!({}));
    guest.sh("head -c 8M /dev/zero > /dev/shm/zeros; cmp -n 8388608 /dev/shm/zeros /dev/zero");
    // All of it, although most was never touched.
    save(&guest, dir, "whole", &json!({}));
    assert_eq!(guest.sh(REMEMBER), remembered);
    let begun = Instant::now();
    handler.signal(Signal::KILL);
    let (status, log) = guest.vmm.end();
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(status, 21, "{log}");
    assert!(log.contains("page-fault handler has ended"), "{log}");
    drop(handler);

    // That snapshot needs no handler. With one that does not answer, the VMM still does.
    fs::rename(dir.join("whole"), dir.join("ram")).unwrap();
    let handler = Handler::start(dir);
    let guest = clone_of(dir);
    assert_eq!(guest.sh(REMEMBER), remembered);
    guest.detach(&["sh", "-c", "sleep 0.5; sha256sum /dev/shm/zeros"]);
    handler.signal(Signal::STOP);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(guest.vmm.get("/")["state"], "Running");
    guest.vmm.action("Stop").is_done();
    guest.vmm.ends_with(20);
}
