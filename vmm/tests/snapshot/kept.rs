//! Bare guests whose RAM the keeper keeps, and brings in while they run.
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Instant;

use belljar_keeper::client::{Client, Keeper};
use belljar_keeper::v1::{self, reply::Result as Answer, request::Call};

use super::*;

/// The page in which the guest computes: its first eight bytes. The rest of its block is this test's.
const NUMBERS: u64 = 0x20_0000;
const BLOCK: usize = 64 << 10;

/// Not a test: the keeper's process, which is a library's function.
#[test]
#[ignore = "run by other tests"]
fn as_keeper() {
    if let Some(dir) = std::env::var_os("KEPT_DIR") {
        belljar_keeper::server::run(Path::new(&dir)).unwrap();
    }
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = directory();
        let program = dir.path().join("keeper-program");
        let text = format!(
            "#!/bin/sh\nKEPT_DIR=\"$1\" exec {} --exact kept::as_keeper --ignored --nocapture\n",
            std::env::current_exe().unwrap().display()
        );
        fs::write(&program, text).unwrap();
        fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Self { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("keeper")
    }

    fn connect(&self) -> Client {
        let keeper = Keeper {
            dir: self.path(),
            program: self.dir.path().join("keeper-program"),
        };
        keeper.connect().unwrap()
    }

    fn kill(&self) {
        let wanted = format!("KEPT_DIR={}", self.path().display());
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let pid = entry.file_name().to_str().and_then(|pid| pid.parse().ok());
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            let is_ours = environment
                .split(|byte| *byte == 0)
                .any(|word| word == wanted.as_bytes());
            if let (true, Some(pid)) = (is_ours, pid.and_then(rustix::process::Pid::from_raw)) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }

    /// Has the guest's snapshot kept, as chunks only. `noise` fills the rest of the block in which it computes.
    fn keep(&self, noise: &[u8]) {
        let dir = self.dir.path();
        let vmm = computing(dir, "out1");
        wait_for(&dir.join("out1"), 4000);
        vmm.patch(PAUSE);
        save(&vmm, "Full", "state", "ram");
        vmm.kill();
        let _ = fs::remove_file(dir.join("v.sock"));
        let mut client = self.connect();
        let begin = v1::Begin {
            memory_bytes: MIB << 20,
            ..v1::Begin::default()
        };
        let (_, files) = client.call(Call::Begin(begin), &[], |_| {}).unwrap();
        let mut files = files.into_iter().map(File::from);
        let (state, memory) = (files.next().unwrap(), files.next().unwrap());
        state
            .write_all_at(&fs::read(dir.join("state")).unwrap(), 0)
            .unwrap();
        memory.set_len(MIB << 20).unwrap();
        let pages = fs::read(dir.join("ram")).unwrap();
        for (page, at) in pages.chunks(4096).zip((0..).step_by(4096)) {
            if page.iter().any(|byte| *byte != 0) {
                memory.write_all_at(page, at).unwrap();
            }
        }
        memory.write_all_at(noise, NUMBERS + 8).unwrap();
        let keep = v1::Keep {
            has_memory: true,
            sandbox: b"a bare guest".to_vec(),
            tags: vec!["guest".to_owned()],
            memory_bytes: MIB << 20,
            ..v1::Keep::default()
        };
        client.call(Call::Keep(keep), &[], |_| {}).unwrap();
        assert!(matches!(
            client.answer(|_| {}).unwrap(),
            (Answer::Kept(_), _)
        ));
        let templates = self.path().join("templates");
        let is_made = |entry: fs::DirEntry| entry.path().extension().is_some_and(|end| end == "ok");
        process::eventually("a template", || {
            fs::read_dir(&templates).unwrap().flatten().any(is_made)
        });
        drop(client);
        self.kill();
        for entry in fs::read_dir(&templates).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }

    /// Restores it, before its RAM is here.
    fn restore(&self, out: &str) -> Vmm {
        let mut client = self.connect();
        let open = v1::Open {
            snapshot: "guest".to_owned(),
            lazy: true,
            ..v1::Open::default()
        };
        let (answer, files) = client.call(Call::Open(open), &[], |_| {}).unwrap();
        assert!(matches!(answer, Answer::Opened(opened) if opened.lazy));
        let arguments = |files: &[OwnedFd]| -> Vec<String> {
            let names = ["state", "memory", "handler"].iter().zip(files);
            let pair = |(name, fd): (&&str, &OwnedFd)| {
                rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
                ["--fd".to_owned(), format!("{name}={}", fd.as_raw_fd())]
            };
            names.flat_map(pair).collect()
        };
        let arguments = arguments(&files);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let vmm = Vmm::start(self.dir.path(), &arguments);
        drop(files);
        vmm.put("/serial", &format!(r#"{{"serial_out_path": "{out}"}}"#));
        let load = r#"{"snapshot_path": "fd:state", "resume_vm": true, "mem_backend":
            {"backend_type": "Uffd", "backend_path": "fd:handler", "template_path": "fd:memory"}}"#;
        // Should it end before it has answered, its end is what counts.
        let _ = vmm.try_call("PUT", "/snapshot/load", load);
        vmm
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.kill();
    }
}

fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take((BLOCK - 8) / 8).flatten().collect()
}

fn is_possible() -> bool {
    let there = File::open("/dev/userfaultfd").is_ok();
    if !there {
        eprintln!("skipped: /dev/userfaultfd cannot be opened");
    }
    there && has_kvm()
}

#[test]
fn a_kept_guest_computes_on_before_its_ram_is_here_and_ends_with_its_keeper() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    place.keep(&noise());
    let dir = place.dir.path();
    let mut vmm = place.restore("out2");
    wait_for(&dir.join("out2"), 4000);
    check(dir, &["out1", "out2"]);
    place.kill();
    assert_eq!(vmm.wait(), Some(21), "{}", vmm.log());
    assert!(vmm.log().contains("closed its socket"), "{}", vmm.log());
}

#[test]
fn a_guest_whose_chunk_is_damaged_is_stopped_and_says_which_page() {
    if !is_possible() {
        return;
    }
    let place = Place::new();
    let noise = noise();
    place.keep(&noise);
    // What cannot be compressed lies in the pack as it is.
    let wanted = &noise[40_000..40_032];
    let mut spoilt = 0;
    for entry in fs::read_dir(place.path().join("store/packs")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let Some(at) = bytes.windows(32).position(|window| window == wanted) else {
            continue;
        };
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(&[bytes[at] ^ 4], at as u64).unwrap();
        spoilt += 1;
    }
    assert_eq!(spoilt, 1);
    let started = Instant::now();
    let mut vmm = place.restore("out2");
    assert_eq!(vmm.wait(), Some(21), "{}", vmm.log());
    assert!(
        started.elapsed() < Duration::from_secs(30),
        "{:?}",
        started.elapsed()
    );
    assert!(vmm.log().contains("page at 0x200000"), "{}", vmm.log());
    // It had computed one number when it was saved, and perhaps not said it.
    let said = fs::metadata(place.dir.path().join("out2")).map_or(0, |is| is.len());
    assert!(said <= 8, "it has computed with other bytes: {said}");
    check(place.dir.path(), &["out1", "out2"]);
    let log = fs::read_to_string(place.path().join("keeper.log")).unwrap();
    assert!(
        log.contains("the page at 0x200000 of memory cannot be had"),
        "{log}"
    );
}
