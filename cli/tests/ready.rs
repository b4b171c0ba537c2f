//! VMMs that wait for a restore, with the real programs and a guest that needs no kernel; wherever there is a
//! `/dev/kvm`, also one that emulates.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[path = "../../tests/support/mini_guest.rs"]
mod mini_guest;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use belljar_keeper::client::{Client, Keeper};
use belljar_keeper::v1::{self, order::Order, reply::Result as Answer, request::Call};
use belljar_keeper::wire::Connection;
use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 64;

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Programs of this build.
fn binary(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    let beside = Path::new(env!("CARGO_BIN_EXE_belljar"));
    let found = |name: &str| beside.with_file_name(name);
    BUILT.get_or_init(|| {
        // Whoever builds all tests has them.
        if ["belljar-vmm", "belljar-keeper"]
            .iter()
            .all(|name| found(name).exists())
        {
            return;
        }
        let built = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "-p",
                "belljar-vmm",
                "-p",
                "belljar-keeper",
            ])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        assert!(built.unwrap().success(), "the programs cannot be built");
    });
    found(name)
}

fn has_kvm() -> bool {
    let there = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !there {
        eprintln!("skipped: /dev/kvm cannot be opened");
    }
    there
}

/// A call of a VMM's API; its status and body.
fn call(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    (status.unwrap_or(0), body.to_owned())
}

#[track_caller]
fn put(socket: &Path, path: &str, body: &str) {
    let (status, said) = call(socket, "PUT", path, body);
    assert_eq!(status, 204, "{path}: {said}");
}

/// A guest that computed, saved as `state` and `ram` after it had written `out`.
fn saved(dir: &Path) {
    fs::write(dir.join("kernel"), mini_guest::kernel()).unwrap();
    let mut vmm = Command::new(binary("belljar-vmm"))
        .args(["--api-sock", "first.sock"])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let socket = dir.join("first.sock");
    eventually("the API", || UnixStream::connect(&socket).is_ok());
    let machine = format!(r#"{{"vcpu_count": 2, "mem_size_mib": {MIB}}}"#);
    put(&socket, "/machine-config", &machine);
    put(
        &socket,
        "/boot-source",
        r#"{"kernel_image_path": "kernel"}"#,
    );
    put(&socket, "/serial", r#"{"serial_out_path": "out"}"#);
    put(&socket, "/actions", r#"{"action_type": "InstanceStart"}"#);
    grows(&dir.join("out"), 800);
    let (status, _) = call(&socket, "PATCH", "/vm", r#"{"state": "Paused"}"#);
    assert_eq!(status, 204);
    put(
        &socket,
        "/snapshot/create",
        r#"{"snapshot_path": "state", "mem_file_path": "ram"}"#,
    );
    vmm.kill().unwrap();
    vmm.wait().unwrap();
}

fn grows(file: &Path, count: u64) {
    let len = || fs::metadata(file).map_or(0, |is| is.len());
    let wanted = len() + count;
    eventually("numbers of the guest", || len() >= wanted);
}

/// The directory of a sandbox that goes away with its guest, and its lock.
fn sandbox(dir: &Path) -> (PathBuf, File) {
    let path = dir.join("sandboxes/0badcafe");
    fs::create_dir_all(&path).unwrap();
    let spec =
        r#"{"version": 1, "created_ms": 1, "life": "owned", "vcpus": 2, "memory": 67108864}"#;
    fs::write(path.join("config.json"), spec).unwrap();
    let lock = File::create(path.join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    (path, lock)
}

fn is_locked(dir: &Path) -> bool {
    let lock = File::open(dir.join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err()
}

fn order(connection: &mut Connection, order: Order, descriptors: &[BorrowedFd<'_>]) {
    let order = v1::Order {
        descriptors: descriptors.len() as u32,
        order: Some(order),
    };
    connection.send(&order, descriptors).unwrap();
}

fn give(connection: &mut Connection, path: &Path, directory: &Path, lock: &File) {
    let directory = File::open(directory).unwrap();
    let dir = path.to_str().unwrap().to_owned();
    let take = Order::Take(v1::Take { dir });
    order(connection, take, &[directory.as_fd(), lock.as_fd()]);
}

/// A line of what a supervisor says.
fn said(stream: &mut UnixStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).is_ok_and(|count| count == 1) && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8_lossy(&line).into_owned()
}

/// Processes that work below a directory.
fn working_in(dir: &Path) -> Vec<i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir))
    })
    .collect()
}

/// A supervisor that was told to prepare a VMM.
struct Waits {
    child: Child,
    connection: Connection,
    place: PathBuf,
    vmm: i32,
}

impl Waits {
    fn start(dir: &Path) -> Self {
        let place = dir.join("ready");
        fs::create_dir_all(&place).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_belljar"))
            .args(["__supervise", "--ready"])
            .arg(&place)
            .arg(binary("belljar-vmm"))
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut connection = Connection::new(ours);
        connection
            .stream()
            .set_read_timeout(Some(PATIENCE))
            .unwrap();
        let ram = File::open(dir.join("ram")).unwrap();
        order(
            &mut connection,
            Order::Prepare(v1::Prepare { vcpus: 2 }),
            &[ram.as_fd()],
        );
        let waiting: v1::Waiting = connection.receive().unwrap().unwrap();
        assert_eq!(waiting.failed, "");
        Self {
            child,
            connection,
            place,
            vmm: waiting.pid as i32,
        }
    }

    fn cpu_time(&self) -> Option<String> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.vmm)).ok()?;
        let words: Vec<&str> = stat.split(' ').collect();
        Some(words[13..15].join(" "))
    }

    /// Its end, with that of all that belonged to it.
    fn leaves_nothing(mut self) {
        drop(self.connection);
        self.child.wait().unwrap();
        eventually("the VMM to be gone", || {
            working_in(&self.place).is_empty() && !is_alive(self.vmm)
        });
        assert!(!self.place.exists());
    }
}

fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.contains("belljar-vmm") && !stat.contains(") Z")
}

fn kill(pid: i32) {
    let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
}

fn load(socket: &Path, dir: &Path) {
    put(socket, "/serial", r#"{"serial_out_path": "out"}"#);
    let (state, ram) = (dir.join("state"), dir.join("ram"));
    let load =
        format!(r#"{{"snapshot_path": {state:?}, "mem_file_path": {ram:?}, "resume_vm": true}}"#);
    put(socket, "/snapshot/load", &load);
}

#[test]
fn one_that_waits_becomes_the_vmm_of_a_sandbox_like_any_other() {
    if !has_kvm() {
        return;
    }
    let keep = tempfile::tempdir().unwrap();
    let dir = keep.path();
    saved(dir);
    let mut waits = Waits::start(dir);
    // It rests as soon as it is prepared.
    let mut last = None;
    eventually("it to use no CPU time", || {
        std::thread::sleep(Duration::from_millis(50));
        std::mem::replace(&mut last, waits.cpu_time()) == last && last.is_some()
    });
    let (path, lock) = sandbox(dir);
    give(&mut waits.connection, &path, &path, &lock);
    drop(lock);
    let mut stream = waits.connection.into_stream();
    let started = said(&mut stream);
    assert!(started.contains("started"), "{started}");
    assert!(started.contains(&waits.vmm.to_string()), "{started}");
    assert!(is_locked(&path) && !waits.place.exists());
    let socket = path.join("api.sock");
    let (_, about) = call(&socket, "GET", "/", "");
    assert!(about.contains("0badcafe"), "{about}");
    let owner = fs::read_to_string(path.join("owner.json")).unwrap();
    assert!(
        owner.contains(&format!("\"pid\": {}", waits.vmm)),
        "{owner}"
    );
    assert!(path.join("control.sock").exists());
    load(&socket, dir);
    grows(&path.join("out"), 800);
    let log = fs::read_to_string(path.join("vmm.log")).unwrap();
    assert!(log.contains("snapshot loaded"), "{log}");
    // Not one number is missing, or there twice.
    let (status, _) = call(&socket, "PATCH", "/vm", r#"{"state": "Paused"}"#);
    assert_eq!(status, 204);
    fs::rename(path.join("out"), dir.join("out2")).unwrap();
    mini_guest::check(dir, &["out", "out2"]);
    // It ends like any other, and is removed.
    drop(stream);
    waits.child.wait().unwrap();
    eventually("the VMM to be gone", || !is_alive(waits.vmm));
    assert!(!path.exists());
}

#[test]
fn one_that_is_hung_up_on_killed_or_given_the_wrong_place_leaves_nothing() {
    if !has_kvm() {
        return;
    }
    let keep = tempfile::tempdir().unwrap();
    let dir = keep.path();
    saved(dir);
    Waits::start(dir).leaves_nothing();

    let mut waits = Waits::start(dir);
    kill(waits.vmm);
    let told: v1::Waiting = waits.connection.receive().unwrap().unwrap();
    assert!(told.failed.contains("ended early"), "{told:?}");
    waits.leaves_nothing();

    let waits = Waits::start(dir);
    kill(waits.child.id() as i32);
    let Waits {
        mut child,
        vmm,
        place,
        ..
    } = waits;
    child.wait().unwrap();
    eventually("the VMM to be gone", || !is_alive(vmm));
    fs::remove_dir_all(place).unwrap();

    // Another directory than it was told, and a name that is taken there: nothing of the sandbox is touched.
    let (path, lock) = sandbox(dir);
    for taken in [false, true] {
        let mut waits = Waits::start(dir);
        if taken {
            fs::write(path.join("api.sock"), b"").unwrap();
        }
        let given = if taken { path.as_path() } else { dir };
        give(&mut waits.connection, &path, given, &lock);
        let told: v1::Waiting = waits.connection.receive().unwrap().unwrap();
        assert_ne!(told.failed, "");
        waits.leaves_nothing();
        let mut names: Vec<_> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let expected: &[&str] = if taken {
            &["api.sock", "config.json", "lock"]
        } else {
            &["config.json", "lock"]
        };
        assert_eq!(names, expected);
    }
    fs::remove_file(path.join("api.sock")).unwrap();

    // Given up by who has it, also when the VMM has just ended: the directory stays, and is free for another one.
    for has_ended in [false, true] {
        let mut waits = Waits::start(dir);
        give(&mut waits.connection, &path, &path, &lock);
        let mut stream = waits.connection.into_stream();
        assert!(said(&mut stream).contains("started"));
        if has_ended {
            kill(waits.vmm);
            let ended = said(&mut stream);
            assert!(ended.contains("ended"), "{ended}");
        }
        stream.write_all(b"a").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        waits.child.wait().unwrap();
        eventually("the VMM to be gone", || !is_alive(waits.vmm));
        assert!(path.join("config.json").exists());
        for left in ["api.sock", "control.sock"] {
            let _ = fs::remove_file(path.join(left));
        }
    }
    drop(lock);
    assert!(!is_locked(&path));
}

/// A keeper in a state root, and what it is asked.
struct Root {
    dir: tempfile::TempDir,
    keeper: Keeper,
}

impl Root {
    /// One that leaves when it was idle for so long.
    fn new(idle_ms: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("keeper.sh");
        let script = format!(
            "#!/bin/sh\nBELLJAR_KEEPER_IDLE_MS={idle_ms} BELLJAR_READY_VMMS=2 exec {} \"$1\"\n",
            binary("belljar-keeper").display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let keeper = Keeper {
            dir: dir.path().join("keeper"),
            program,
        };
        Self { dir, keeper }
    }

    fn ready_dir(&self) -> PathBuf {
        self.keeper.dir.join("ready")
    }

    /// Stores what [`saved`] made.
    fn keep(&self, client: &mut Client) -> String {
        let begin = v1::Begin {
            memory_bytes: MIB << 20,
            ..v1::Begin::default()
        };
        let (_, files) = client.call(Call::Begin(begin), &[], |_| {}).unwrap();
        for (file, name) in files.into_iter().zip(["state", "ram"]) {
            let mut from = File::open(self.dir.path().join(name)).unwrap();
            let mut to = File::from(file);
            std::io::copy(&mut from, &mut to).unwrap();
        }
        let keep = v1::Keep {
            has_memory: true,
            tags: vec!["one".to_owned()],
            vcpus: 2,
            memory_bytes: MIB << 20,
            ..v1::Keep::default()
        };
        client.call(Call::Keep(keep), &[], |_| {}).unwrap();
        match client.answer(|_| {}).unwrap() {
            (Answer::Kept(kept), _) => kept.id,
            other => panic!("{other:?}"),
        }
    }

    fn open(&self, client: &mut Client) -> (v1::Opened, Vec<OwnedFd>) {
        let path = |path: PathBuf| fs::canonicalize(path).unwrap().to_str().unwrap().to_owned();
        let open = v1::Open {
            snapshot: "one".to_owned(),
            programs: Some(v1::Programs {
                supervisor: path(env!("CARGO_BIN_EXE_belljar").into()),
                vmm: path(binary("belljar-vmm")),
            }),
            ..v1::Open::default()
        };
        let (Answer::Opened(opened), files) = client.call(Call::Open(open), &[], |_| {}).unwrap()
        else {
            panic!("not opened")
        };
        (opened, files)
    }

    /// A restore that gets a VMM that waits, as soon as there is one.
    fn open_ready(&self, client: &mut Client) -> Vec<OwnedFd> {
        let mut files = Vec::new();
        eventually("a ready VMM", || {
            let (opened, got) = self.open(client);
            files = got;
            opened.ready
        });
        files
    }
}

fn usage(client: &mut Client) -> v1::Usage {
    let get = Call::Usage(v1::GetUsage {});
    match client.call(get, &[], |_| {}).unwrap() {
        (Answer::Usage(usage), _) => usage,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_keeper_has_some_ready_for_what_was_restored_last_and_none_outlives_it() {
    if !has_kvm() {
        return;
    }
    let root = Root::new(500);
    let dir = root.dir.path();
    saved(dir);
    let mut client = root.keeper.connect().unwrap();
    let id = root.keep(&mut client);
    assert_eq!(usage(&mut client).ready_vmms, 0, "nothing was restored yet");
    let (opened, _) = root.open(&mut client);
    assert!(!opened.ready);
    eventually("two of them", || usage(&mut client).ready_vmms == 2);
    assert!(usage(&mut client).ready_bytes > 0);

    // One is taken, and killing the others in between harms nobody.
    let mut files = root.open_ready(&mut client).into_iter();
    let (Some(state), Some(ram), Some(socket)) = (files.next(), files.next(), files.next()) else {
        panic!("descriptors are missing");
    };
    let (path, lock) = sandbox(dir);
    let mut connection = Connection::new(UnixStream::from(socket));
    give(&mut connection, &path, &path, &lock);
    let mut stream = connection.into_stream();
    assert!(said(&mut stream).contains("started"));
    let socket = path.join("api.sock");
    let before = working_in(&root.ready_dir());
    before.into_iter().for_each(kill);
    // It waits for the memory that was handed out, and for nothing else.
    let by_path = |file: &OwnedFd| {
        let me = std::process::id();
        format!("/proc/{me}/fd/{}", file.as_raw_fd())
    };
    let load = |ram: &str| {
        let state = by_path(&state);
        format!(r#"{{"snapshot_path": "{state}", "mem_file_path": "{ram}", "resume_vm": true}}"#)
    };
    put(&socket, "/serial", r#"{"serial_out_path": "out"}"#);
    let other = load(dir.join("ram").to_str().unwrap());
    let (status, why) = call(&socket, "PUT", "/snapshot/load", &other);
    assert_eq!(status, 400);
    assert!(why.contains("prepared with another memory file"), "{why}");
    put(&socket, "/snapshot/load", &load(&by_path(&ram)));
    grows(&path.join("out"), 800);

    // What its guest wrote is known to the next, and to those that wait for it.
    let set = dir.join("set");
    put(
        &socket,
        "/snapshot/working-set",
        &format!(r#"{{"path": {set:?}}}"#),
    );
    let record = |client: &mut Client, file: &Path| {
        let file = File::open(file).unwrap();
        let record = v1::Record {
            snapshot: "one".to_owned(),
        };
        client.call(Call::Record(record), &[file.as_fd()], |_| {})
    };
    assert!(record(&mut client, &dir.join("kernel")).is_err());
    let (opened, _) = root.open(&mut client);
    assert!(opened.wants_working_set && !opened.has_working_set);
    record(&mut client, &set).unwrap();
    let (opened, files) = root.open(&mut client);
    assert!(!opened.wants_working_set && opened.has_working_set);
    let mut told = Vec::new();
    let mut file = File::from(files.into_iter().nth(2).unwrap());
    file.read_to_end(&mut told).unwrap();
    assert!(told == fs::read(&set).unwrap());
    assert_eq!(root.open_ready(&mut client).len(), 5);
    eventually("two of them", || usage(&mut client).ready_vmms == 2);

    // Of what is removed none waits.
    let untag = v1::Mark {
        snapshot: "one".to_owned(),
        remove_tags: vec!["one".to_owned()],
        ..v1::Mark::default()
    };
    let remove = v1::Remove {
        snapshot: id,
        live: Vec::new(),
    };
    client.call(Call::Mark(untag), &[], |_| {}).unwrap();
    client.call(Call::Remove(remove), &[], |_| {}).unwrap();
    assert_eq!(usage(&mut client).ready_vmms, 0);
    let recordings = fs::read_dir(root.keeper.dir.join("recordings")).unwrap();
    assert_eq!(recordings.count(), 0);
    drop(client);
    // It leaves, with all that wait; who has one keeps it.
    eventually("the keeper to leave with them", || {
        working_in(&root.keeper.dir).is_empty()
    });
    assert!(is_locked(&path));
    let (status, _) = call(&socket, "GET", "/", "");
    assert_eq!(status, 200);
    drop(stream);
    eventually("the sandbox to end", || !path.exists());
}
