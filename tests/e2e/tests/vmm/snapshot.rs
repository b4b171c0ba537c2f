//! A Linux guest saved in one VMM goes on in others.

mod chain;
mod handler;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use belljar_e2e::eventually;
use belljar_e2e::guest::{Guest, Spec};
use belljar_e2e::vmm::Vmm;
use serde_json::{Value, json};

/// Prints 1, 2, 3 …, a hundred a second.
const COUNT: &str = "
import time
n = 0
while True:
    n += 1; print(n, flush=True); time.sleep(0.01)";

/// Writes and reads a drive without end, and complains when it reads something else.
const DISK: &str = "
import os, hashlib
fd = os.open('/dev/vdb', os.O_RDWR)
print('begun', flush=True)
n = 0
while True:
    block = hashlib.sha512(b'%d' % n).digest() * 1024
    os.pwrite(fd, block, n % 64 * 65536); os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if os.pread(fd, 65536, n % 64 * 65536) != block: print('wrong', flush=True)
    if n == 50: print('50 rounds', flush=True)
    n += 1";

/// Writes a line on its clock every 50 ms of a timer, in the background.
const TICKS: &str = "
import signal, time
alarm = {signal.SIGALRM}
signal.pthread_sigmask(signal.SIG_BLOCK, alarm)
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
file = open('/dev/shm/ticks', 'w', buffering=1)
while True:
    signal.sigwait(alarm)
    print(time.monotonic(), time.time(), file=file)";

/// Checks that the ticks of a timer never went back and none took long, and how many there were.
const CHECK_TICKS: &str = "
lines = [tuple(map(float, line.split())) for line in open('/dev/shm/ticks') if line.endswith('\\n')]
steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(lines, lines[1:])]
print(len(lines), min(min(step) for step in steps), max(step[0] for step in steps))";

/// What a guest remembers only in RAM: a secret, its boot, 32 MiB of noise, and how long it is up.
const REMEMBER: &str =
    "cat /dev/shm/secret /proc/sys/kernel/random/boot_id; sha256sum < /dev/shm/fill";

fn uptime(guest: &Guest) -> f64 {
    let text = guest.sh("cat /proc/uptime");
    text.split(' ').next().unwrap().parse().unwrap()
}

/// Loads the snapshot in `dir` into a new VMM, with `disk` in the place of its drive.
fn load(dir: &Path, disk: &Path) -> (Vmm, Value) {
    let vmm = Vmm::new();
    vmm.put("/console", &json!({"socket_path": "console.sock"}));
    let load = json!({
        "snapshot_path": dir.join("state"),
        "mem_backend": {"backend_type": "File", "backend_path": dir.join("ram")},
        "resume_vm": true,
        "drive_overrides": [{"drive_id": "disk", "path_on_host": disk}],
    });
    (vmm, load)
}

/// How often the timer ticked by now; it never went back.
fn ticks(guest: &Guest, most: f64) -> u64 {
    let text = guest.python(CHECK_TICKS);
    let words: Vec<f64> = text.split(' ').map(|word| word.parse().unwrap()).collect();
    let [count, least, longest] = words[..] else {
        panic!("{text}");
    };
    assert!(least >= 0.0, "a clock went back by {least}");
    assert!(longest < most, "a clock leapt by {longest}");
    count as u64
}

fn clone_of(dir: &Path, disk: &Path) -> Guest {
    let (vmm, body) = load(dir, disk);
    vmm.put("/snapshot/load", &body);
    Guest::loaded(vmm)
}

#[test]
fn a_guest_goes_on_where_it_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let disk = dir.join("disk");
    fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    let parent = Guest::boot_with(
        &Spec {
            vcpus: 2,
            ..Spec::default()
        },
        |vmm| {
            vmm.put(
                "/drives/disk",
                &json!({
                    "drive_id": "disk", "path_on_host": disk, "is_root_device": false,
                    "io_engine": "Async", "cache_type": "Writeback",
                }),
            );
            vmm.put(
                "/balloon",
                &json!({"amount_mib": 0, "deflate_on_oom": true}),
            );
        },
    );
    let secret = format!("{:x}", std::process::id() ^ 0x5eed);
    parent.sh(&format!(
        "echo {secret} > /dev/shm/secret; head -c 32M /dev/urandom > /dev/shm/fill"
    ));
    let remembered = parent.sh(REMEMBER);
    assert!(remembered.starts_with(&secret));
    let mut io = parent.spawn(&["python3", "-c", DISK]);
    assert_eq!(io.line(), "begun");
    parent.detach(&["python3", "-c", TICKS]);
    let mut counter = parent.spawn(&["python3", "-c", COUNT]);
    assert_eq!(counter.line(), "1");

    // Saved under load, on all vCPUs, with connections open.
    let create = json!({"snapshot_path": dir.join("state"), "mem_file_path": dir.join("ram")});
    parent
        .vmm
        .call("PUT", "/snapshot/create", &create)
        .refuses(&["running"]);
    eventually("the timer ticks", || {
        parent.sh("cat /dev/shm/ticks 2>/dev/null | wc -l") != "0"
    });
    let before = uptime(&parent);
    let saved = Instant::now();
    parent.vmm.patch("/vm", &json!({"state": "Paused"}));
    let started = Instant::now();
    parent.vmm.put("/snapshot/create", &create);
    println!("snapshot: {:?}", started.elapsed());
    let ram = fs::metadata(dir.join("ram")).unwrap();
    assert_eq!(ram.len(), 256 << 20);
    let other_disk = dir.join("other-disk");
    fs::copy(&disk, &other_disk).unwrap();
    parent.vmm.patch("/vm", &json!({"state": "Resumed"}));

    // The parent goes on as if nothing had happened, its connections too.
    let mut expected = 2;
    while expected < 100 {
        assert_eq!(counter.line(), expected.to_string());
        expected += 1;
    }
    assert_eq!(io.line(), "50 rounds");

    // Its disk is its own: nobody else gets it while it runs.
    let (vmm, body) = load(dir, &disk);
    vmm.call("PUT", "/snapshot/load", &body)
        .refuses(&["disk", "in use"]);
    vmm.call(
        "PUT",
        "/snapshot/load",
        &json!({"snapshot_path": "nowhere", "mem_file_path": "x"}),
    )
    .refuses(&["nowhere"]);
    drop(vmm);

    // A clone beside it, and then one in its place: connections are made at once, and last.
    let first = clone_of(dir, &other_disk);
    let mut lasting = first.spawn(&["python3", "-c", COUNT]);
    for expected in 1..50 {
        assert_eq!(lasting.line(), expected.to_string());
    }
    drop((counter, io));
    drop(parent);
    fs::copy(&other_disk, &disk).unwrap();
    let second = clone_of(dir, &disk);
    for clone in [&first, &second] {
        clone.answers();
        assert_eq!(clone.sh(REMEMBER), remembered);
        let after = uptime(clone);
        assert!(after >= before, "the clock went back: {before} to {after}");
        let most = before + saved.elapsed().as_secs_f64() + 5.0;
        assert!(after < most, "the clock leapt: {before} to {after}");
        thread::sleep(Duration::from_millis(50));
        assert!(uptime(clone) > after, "the clock stands still");
        let ticked = ticks(clone, most);
        assert!(ticked > 0);
        eventually("the timer ticks", || ticks(clone, most + 300.0) > ticked);
        let log = clone.sh("dmesg");
        assert!(
            log.contains("crng reseeded due to virtual machine fork"),
            "{log}"
        );
    }
    let random = |guest: &Guest| guest.sh("head -c 16 /dev/urandom | od -An -tx1");
    assert_ne!(random(&first), random(&second));
    // Requests that were under way were finished; the file goes on, and so does a new program.
    let mut io = second.spawn(&["python3", "-c", DISK]);
    assert_eq!(io.line(), "begun");
    assert_eq!(io.line(), "50 rounds");
    drop((io, lasting));
    // Back in place, in the same process.
    second.sh("rm /dev/shm/secret; touch /dev/shm/later");
    let io = second.spawn(&["python3", "-c", DISK]);
    let reset = json!({"resume_vm": true});
    second.vmm.put("/snapshot/reset", &reset);
    drop(io);
    assert_eq!(second.sh(REMEMBER), remembered);
    second.sh("! test -e /dev/shm/later");
    // A clone of a clone.
    second.vmm.patch("/vm", &json!({"state": "Paused"}));
    second.vmm.put("/snapshot/create", &create);
    drop(second);
    let third = clone_of(dir, &disk);
    assert_eq!(third.sh(REMEMBER), remembered);
    third.ends_well();
    first.ends_well();
}
