//! Guests whose pages another process brings in.
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Instant;

use super::*;

/// Killed when dropped.
struct Handler {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Handler {
    fn start(dir: &Path, more: &[&str]) -> Self {
        let script = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/e2e/tools/page_handler.py"
        );
        let _ = fs::remove_file(dir.join("handler"));
        let mut child = Command::new("python3")
            .args([script, "handler", "ram"])
            .args(more)
            .current_dir(dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut handler = Self { child, out };
        assert_eq!(handler.line(), "ready");
        handler
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let read = self.out.read_line(&mut line).unwrap();
        assert!(read > 0, "the handler has ended");
        line.trim().to_owned()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.kill();
    }
}

const LOAD: &str = r#"{"snapshot_path": "state", "resume_vm": true,
    "mem_backend": {"backend_type": "Uffd", "backend_path": "handler"}}"#;

/// A directory with a snapshot, `state` and `ram`, and the output before it.
fn saved() -> tempfile::TempDir {
    let dir = directory();
    let vmm = computing(dir.path(), "out1");
    wait_for(&dir.path().join("out1"), 4000);
    vmm.patch(PAUSE);
    save(&vmm, "Full", "state", "ram");
    vmm.kill();
    dir
}

/// The page in which the guest computes, and that nothing else touches.
const NUMBERS: u64 = 0x20_0000;

fn is_possible() -> bool {
    let there = File::open("/dev/userfaultfd").is_ok();
    if !there {
        eprintln!("skipped: /dev/userfaultfd cannot be opened");
    }
    there && has_kvm()
}

fn ended_within(vmm: &mut Vmm, time: Duration, status: i32) -> String {
    let started = Instant::now();
    assert_eq!(vmm.wait(), Some(status), "{}", vmm.log());
    assert!(started.elapsed() < time, "{:?}", started.elapsed());
    vmm.log()
}

/// The guest has not come to a number with what is in RAM: at most the whole of the one that it was about to say.
#[track_caller]
fn said_nothing(dir: &Path, out: &str) {
    let len = fs::metadata(dir.join(out)).unwrap().len();
    assert!(len <= 8, "{len} bytes");
}

#[test]
fn a_guest_computes_on_with_pages_that_somebody_brings() {
    if !is_possible() {
        return;
    }
    let dir = saved();
    let dir = dir.path();
    let mut handler = Handler::start(dir, &[]);
    let vmm = loading(dir, "out2", LOAD);
    let regions = handler.line();
    assert!(
        regions.contains(&format!(
            r#""size": {}, "offset": 0, "page_size": 4096"#,
            MIB << 20
        )),
        "{regions}"
    );
    wait_for(&dir.join("out2"), 4000);
    vmm.patch(PAUSE);
    for (call, why) in [
        ("/snapshot/reset", "{}"),
        ("/snapshot/working-set", r#"{"path": "set"}"#),
    ] {
        let refused = vmm.call("PUT", call, why);
        assert!(
            refused.refused().contains("page-fault handler"),
            "{refused:?}"
        );
    }
    // What it has touched, over what it was loaded from, is what all of it is.
    save(&vmm, "Diff", "state2", "diff");
    assert!(fs::metadata(dir.join("diff")).unwrap().blocks() * 512 < 8 << 20);
    save(&vmm, "Full", "state2", "ram2");
    fs::copy(dir.join("ram"), dir.join("merged")).unwrap();
    merge(&dir.join("merged"), &dir.join("diff"));
    assert!(fs::read(dir.join("merged")).unwrap() == fs::read(dir.join("ram2")).unwrap());
    assert!(
        fs::metadata(dir.join("ram2")).unwrap().blocks() * 512 < 8 << 20,
        "it is not sparse"
    );
    // From here on increments work as ever.
    vmm.patch(RESUME);
    wait_for(&dir.join("out2"), 800);
    let answer = vmm.call(
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path": "state3", "mem_file_path": "diff3", "snapshot_type": "Increment", "resume_vm": true}"#,
    );
    assert!(answer.body.contains("paused_us"), "{answer:?}");
    vmm.patch(PAUSE);
    vmm.kill();
    handler.kill();
    merge(&dir.join("ram2"), &dir.join("diff3"));
    let third = loading(
        dir,
        "out3",
        r#"{"snapshot_path": "state3", "mem_file_path": "ram2", "resume_vm": true}"#,
    );
    wait_for(&dir.join("out3"), 800);
    third.kill();
}

#[test]
fn a_template_that_somebody_fills_is_shared_and_stays_as_it_was() {
    if !is_possible() {
        return;
    }
    let dir = saved();
    let dir = dir.path();
    // On tmpfs, as userfaultfd watches no other files.
    let template = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    template.as_file().set_len(MIB << 20).unwrap();
    let path = template.path().to_str().unwrap();
    let _handler = Handler::start(dir, &["--fill", path]);
    let load = format!(
        r#"{{"snapshot_path": "state", "resume_vm": true, "mem_backend":
        {{"backend_type": "Uffd", "backend_path": "handler", "template_path": "{path}"}}}}"#
    );
    let vmm = loading(dir, "out2", &load);
    wait_for(&dir.join("out2"), 4000);
    vmm.patch(PAUSE);
    let touched = fs::metadata(path).unwrap().blocks() * 512;
    assert!(touched > 0 && touched < 8 << 20, "{touched}");
    save(&vmm, "Diff", "state2", "diff");
    vmm.put("/snapshot/reset", r#"{"resume_vm": true}"#);
    wait_for(&dir.join("out2"), 4000);
    vmm.patch(PAUSE);
    save(&vmm, "Full", "state3", "ram3");
    vmm.kill();
    assert!(
        fs::read(path).unwrap() == fs::read(dir.join("ram")).unwrap(),
        "the template"
    );
    merge(&dir.join("ram"), &dir.join("diff"));
    for (state, ram) in [("state2", "ram"), ("state3", "ram3")] {
        let load = format!(
            r#"{{"snapshot_path": "{state}", "mem_file_path": "{ram}", "resume_vm": true}}"#
        );
        let vmm = loading(dir, &format!("out-{state}"), &load);
        wait_for(&dir.join(format!("out-{state}")), 800);
        vmm.kill();
    }
}

#[test]
fn without_its_handler_a_guest_ends_and_says_so() {
    if !is_possible() {
        return;
    }
    let dir = saved();
    let dir = dir.path();
    // While it computes.
    let mut handler = Handler::start(dir, &[]);
    let mut vmm = loading(dir, "out2", LOAD);
    wait_for(&dir.join("out2"), 800);
    handler.kill();
    let log = ended_within(&mut vmm, Duration::from_secs(3), 21);
    assert!(log.contains("page-fault handler has ended"), "{log}");
    assert!(!dir.join("v.sock").exists());
    // While it waits for a page; until then its API answers. The vCPU runs until the process has ended, and the
    // page must not be one of zeros even then.
    let mute = NUMBERS.to_string();
    let mut handler = Handler::start(dir, &["--mute", &mute]);
    let mut vmm = loading(dir, "out3", LOAD);
    handler.line();
    assert!(vmm.call("GET", "/", "").body.contains("Running"));
    handler.kill();
    ended_within(&mut vmm, Duration::from_secs(3), 21);
    said_nothing(dir, "out3");
    // And it can be stopped.
    let _handler = Handler::start(dir, &["--mute", &mute]);
    let mut vmm = loading(dir, "out4", LOAD);
    vmm.put("/actions", r#"{"action_type": "Stop"}"#);
    ended_within(&mut vmm, Duration::from_secs(3), 20);
}

#[test]
fn a_page_that_cannot_be_had_ends_the_guest() {
    if !is_possible() {
        return;
    }
    let dir = saved();
    let dir = dir.path();
    let _handler = Handler::start(dir, &["--poison", &NUMBERS.to_string()]);
    let mut vmm = loading(dir, "out2", LOAD);
    let log = ended_within(&mut vmm, Duration::from_secs(5), 21);
    assert!(log.contains("page at 0x200000"), "{log}");
    said_nothing(dir, "out2");
    // A page that only a full snapshot needs: that fails, and the guest goes on.
    let unused = (40u64 << 20).to_string();
    let _handler = Handler::start(dir, &["--poison", &unused]);
    let vmm = loading(dir, "out3", LOAD);
    wait_for(&dir.join("out3"), 800);
    vmm.patch(PAUSE);
    let refused = vmm.call(
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path": "s", "mem_file_path": "m"}"#,
    );
    assert!(
        refused
            .refused()
            .contains("did not give the page at 0x2800000"),
        "{refused:?}"
    );
    assert!(!dir.join("m").exists());
    // From now on it may be one that the guest had, as far as the kernel tells: it is told, whoever writes.
    for resume in ["false", "true"] {
        let body = format!(
            r#"{{"snapshot_type": "Diff", "snapshot_path": "s", "mem_file_path": "m{resume}", "resume_vm": {resume}}}"#
        );
        let refused = vmm.call("PUT", "/snapshot/create", &body);
        assert!(
            refused.refused().contains("RAM cannot be had"),
            "{refused:?}"
        );
        assert!(!dir.join(format!("m{resume}")).exists());
        vmm.patch(PAUSE);
    }
    vmm.patch(RESUME);
    wait_for(&dir.join("out3"), 800);
    vmm.kill();
    check(dir, &["out1", "out3"]);
}

#[test]
fn an_increment_with_a_page_that_cannot_be_had_fails_and_the_guest_goes_on() {
    if !is_possible() {
        return;
    }
    let dir = saved();
    let dir = dir.path();
    let unused = (40u64 << 20).to_string();
    let mut handler = Handler::start(dir, &["--poison", &unused]);
    let vmm = loading(dir, "out2", LOAD);
    wait_for(&dir.join("out2"), 800);
    let create = |kind: &str, name: &str| {
        let body = format!(
            r#"{{"snapshot_type": "{kind}", "snapshot_path": "s{name}", "mem_file_path": "m{name}", "resume_vm": true}}"#
        );
        vmm.call("PUT", "/snapshot/create", &body)
    };
    for (kind, name) in [("Diff", "1"), ("Increment", "2")] {
        let taken = create(kind, name);
        assert!(taken.body.contains("paused_us"), "{taken:?}");
    }
    // Whoever brings pages in finds that it has not this one. It is all that differs, but for what the guest computes
    // with: so little is copied while the guest stands still.
    handler.signal(rustix::process::Signal::USR1);
    while handler.line() != "poisoned" {}
    for name in ["3", "4"] {
        let refused = create("Increment", name);
        let why = refused.refused();
        assert!(why.contains("RAM cannot be had"), "{refused:?}");
        assert!(!dir.join(format!("m{name}")).exists());
        wait_for(&dir.join("out2"), 800);
    }
    vmm.kill();
    check(dir, &["out1", "out2"]);
}

#[test]
fn what_is_no_handler_is_refused_and_the_load_can_be_made_again() {
    if !is_possible() {
        return;
    }
    let dir = saved();
    let dir = dir.path();
    let vmm = Vmm::start(dir, &[]);
    vmm.put("/serial", r#"{"serial_out_path": "out2"}"#);
    let load = |backend: &str| {
        vmm.call(
            "PUT",
            "/snapshot/load",
            &format!(r#"{{"snapshot_path": "state", "resume_vm": true, "mem_backend": {{"backend_type": "Uffd", {backend}}}}}"#),
        )
    };
    for (backend, why) in [
        (
            r#""backend_path": "nowhere""#,
            "nowhere: nobody can be reached",
        ),
        (r#""backend_path": "ram""#, "ram: nobody can be reached"),
        (r#""backend_path": "fd:none""#, "no descriptor"),
        (
            r#""backend_path": "handler", "template_path": "out1""#,
            "not the memory file",
        ),
        (r#""backend_path": "handler", "colour": "red""#, "colour"),
    ] {
        let refused = load(backend);
        assert!(refused.refused().contains(why), "{refused:?}");
    }
    let _handler = Handler::start(dir, &[]);
    assert!(load(r#""backend_path": "handler""#).body.is_empty());
    wait_for(&dir.join("out2"), 800);
    vmm.kill();
    check(dir, &["out1", "out2"]);
}

#[test]
fn a_load_that_is_refused_for_a_drive_can_be_made_again_with_another_handler() {
    if !is_possible() {
        return;
    }
    let dir = saved();
    let dir = dir.path();
    let vmm = Vmm::start(dir, &[]);
    vmm.put("/serial", r#"{"serial_out_path": "out2"}"#);
    let mut first = Handler::start(dir, &[]);
    let with_drive = LOAD.replacen(
        '{',
        r#"{"drive_overrides": [{"drive_id": "disk", "path_on_host": "gone"}], "#,
        1,
    );
    let refused = vmm.call("PUT", "/snapshot/load", &with_drive);
    assert!(refused.refused().contains("gone"), "{refused:?}");
    let _second = Handler::start(dir, &[]);
    vmm.put("/snapshot/load", LOAD);
    // The guest is not the first one's.
    first.kill();
    wait_for(&dir.join("out2"), 4000);
    vmm.patch(PAUSE);
    check(dir, &["out1", "out2"]);
}

#[test]
fn a_connected_socket_is_a_handler_until_it_is_closed() {
    if !is_possible() {
        return;
    }
    let dir = saved();
    let dir = dir.path();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let inherited = rustix::io::dup(&ours).unwrap();
    let fd = format!("handler={}", inherited.as_raw_fd());
    let mut vmm = Vmm::start(dir, &["--fd", &fd]);
    drop((ours, inherited));
    let load = LOAD.replace(r#""handler""#, r#""fd:handler""#);
    thread::scope(|scope| {
        // Nobody gives a page, and so it has no answer.
        let call = scope.spawn(|| vmm.call("PUT", "/snapshot/load", &load));
        let mut first = [0];
        (&theirs).read_exact(&mut first).unwrap();
        assert_eq!(&first, b"[");
        thread::sleep(Duration::from_millis(300));
        assert!(vmm.call("GET", "/", "").body.contains("Not started"));
        drop(theirs);
        assert!(call.join().is_err());
    });
    let log = ended_within(&mut vmm, Duration::from_secs(3), 21);
    assert!(log.contains("closed its socket"), "{log}");
}
