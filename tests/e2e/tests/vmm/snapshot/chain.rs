//! Saved, killed, loaded, again and again: a guest under load notices nothing. `BELLJAR_SOAK=1` makes it
//! 500 times.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use belljar_e2e::guest::{Guest, Spec};
use belljar_e2e::vmm::Vmm;
use serde_json::json;

/// Four workers that check their own work and count rounds; what is wrong goes to `/dev/shm/wrong`.
const WORK: &str = r#"
import hashlib, os, random, time, tty

def wrong(what):
    with open('/dev/shm/wrong', 'a') as file: file.write(what + '\n')

def rounds(name, step):
    n = 0
    while True:
        n += 1
        step(n)
        with open('/dev/shm/new.' + name, 'w') as file: file.write(str(n))
        os.rename('/dev/shm/new.' + name, '/dev/shm/count.' + name)

def page(seed): return hashlib.sha256(str(seed).encode()).digest() * 128

def memory():
    seeds = list(range(2048))
    pages = bytearray().join(page(seed) for seed in seeds)
    def step(n):
        for _ in range(32):
            at = random.randrange(2048)
            if pages[at * 4096:at * 4096 + 4096] != page(seeds[at]): wrong(f'memory: page {at}, round {n}')
            seeds[at] = random.getrandbits(64)
            pages[at * 4096:at * 4096 + 4096] = page(seeds[at])
        time.sleep(0.01)
    rounds('memory', step)

def drive():
    fd = os.open('/dev/vdb', os.O_RDWR)
    def step(n):
        block = page(n) * 16
        at = n % 64 * 65536
        os.pwrite(fd, block, at)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if os.pread(fd, 65536, at) != block: wrong(f'drive: round {n}')
    rounds('drive', step)

def clocks():
    last = [time.monotonic(), time.time()]
    def step(n):
        before = time.monotonic()
        time.sleep(0.01)
        now = [time.monotonic(), time.time()]
        if now[0] - before < 0.01: wrong(f'clocks: slept {now[0] - before}')
        if now[0] - before > 60: wrong(f'clocks: leapt {now[0] - before}')
        if now[0] < last[0] or now[1] < last[1]: wrong(f'clocks: from {last} back to {now}')
        last[:] = now
    rounds('clocks', step)

def terminal():
    import pty
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    if os.fork() == 0:
        while True: os.write(theirs, os.read(theirs, 4096).upper())
    def step(n):
        line = f'line {n} of a terminal'.encode()
        os.write(ours, line)
        answer = b''
        while len(answer) < len(line): answer += os.read(ours, 4096)
        if answer != line.upper(): wrong(f'terminal: {answer}')
        time.sleep(0.005)
    rounds('terminal', step)

for worker in (memory, drive, clocks, terminal):
    if os.fork() == 0:
        try: worker()
        except BaseException as error: wrong(f'{worker.__name__}: {error!r}')
        os._exit(1)
while True: time.sleep(1000)
"#;

const WORKERS: [&str; 4] = ["memory", "drive", "clocks", "terminal"];

/// The rounds of all workers, if nothing went wrong; and what else lives in RAM alone.
const STATE: &str = "cat /dev/shm/wrong 2>/dev/null && exit 1
    for worker in memory drive clocks terminal; do cat /dev/shm/count.$worker 2>/dev/null || echo 0; echo; done
    sha256sum < /dev/shm/fill; cat /proc/sys/kernel/random/boot_id";

/// (rounds by worker, the rest)
fn state(guest: &Guest) -> (Vec<u64>, String) {
    let text = guest.sh(STATE);
    let mut lines = text.lines();
    let counts = lines.by_ref().filter(|line| !line.is_empty());
    let counts = counts.take(WORKERS.len());
    let counts = counts.map(|line| line.parse().unwrap()).collect();
    (counts, lines.collect())
}

/// Waits until every worker has done more rounds than `before`.
fn goes_on(guest: &Guest, before: &[u64]) -> (Vec<u64>, String) {
    let until = Instant::now() + belljar_e2e::PATIENCE;
    loop {
        let (now, rest) = state(guest);
        if now.iter().zip(before).all(|(now, before)| now > before) {
            return (now, rest);
        }
        assert!(
            Instant::now() < until,
            "{WORKERS:?} stand still: {before:?}, then {now:?}"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// Writes what has changed over the memory file, as `docs/vm-state-format.md` says.
fn merge(base: &Path, diff: &Path) {
    use rustix::fs::{SeekFrom, seek};
    let base = File::options().write(true).open(base).unwrap();
    let diff = File::open(diff).unwrap();
    let mut end = 0;
    while let Ok(start) = seek(&diff, SeekFrom::Data(end)) {
        end = seek(&diff, SeekFrom::Hole(start)).unwrap();
        let mut data = vec![0; usize::try_from(end - start).unwrap()];
        diff.read_exact_at(&mut data, start).unwrap();
        base.write_all_at(&data, start).unwrap();
    }
}

#[test]
fn a_chain_of_snapshots_under_load_loses_nothing() {
    let links = if std::env::var_os("BELLJAR_SOAK").is_some() {
        500
    } else {
        4
    };
    let dir = tempfile::tempdir().unwrap();
    let (disk, ram) = (dir.path().join("disk"), dir.path().join("ram"));
    File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    let shape = Spec {
        vcpus: 2,
        memory_mib: 192,
        ..Spec::default()
    };
    let mut guest = Guest::boot_with(&shape, |vmm| {
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
    });
    guest.sh("head -c 8M /dev/urandom > /dev/shm/fill");
    guest.detach(&["python3", "-c", WORK]);
    let (mut counts, remembered) = goes_on(&guest, &[0; 4]);
    let begun = Instant::now();
    for link in 0..links {
        guest.vmm.patch("/vm", &json!({"state": "Paused"}));
        // Whole and changed pages by turns.
        let whole = link % 2 == 0;
        let memory = dir.path().join(if whole { "ram" } else { "diff" });
        guest.vmm.put(
            "/snapshot/create",
            &json!({
                "snapshot_type": if whole { "Full" } else { "Diff" },
                "snapshot_path": dir.path().join("state"), "mem_file_path": memory,
            }),
        );
        // As if the host had crashed.
        drop(guest);
        if !whole {
            merge(&ram, &memory);
        }
        let vmm = Vmm::new();
        vmm.put("/console", &json!({"socket_path": "console.sock"}));
        vmm.put(
            "/snapshot/load",
            &json!({
                "snapshot_path": dir.path().join("state"),
                "mem_backend": {"backend_type": "File", "backend_path": ram},
                "resume_vm": true,
            }),
        );
        guest = Guest::loaded(vmm);
        let (now, still) = goes_on(&guest, &counts);
        assert_eq!(still, remembered, "link {link}");
        println!("link {link}: {now:?}");
        counts = now;
    }
    println!(
        "{links} links in {:?}; rounds of {WORKERS:?}: {counts:?}",
        begun.elapsed()
    );
    let _ = fs::remove_file(dir.path().join("diff"));
    guest.ends_well();
}
