//! Pause and resume under load.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use belljar_e2e::guest::{Guest, Spec};
use serde_json::json;

/// Sends 1, 2, 3 … as 32-bit numbers without end.
const COUNTER: &str = "
import socket, struct
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
s.connect((2, 7002))
n = 0
while True:
    s.sendall(struct.pack('<512I', *range(n, n + 512)))
    n += 512";

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
    if n == 100: print('100 rounds', flush=True)
    n += 1";

#[test]
fn a_paused_guest_stands_still_and_loses_nothing() {
    let mut guest = Guest::boot_with(
        &Spec {
            vcpus: 2,
            ..Spec::default()
        },
        |vmm| {
            vmm.file("disk", 4 << 20);
            vmm.put(
                "/drives/disk",
                &json!({
                    "drive_id": "disk", "path_on_host": "disk", "is_root_device": false,
                    "io_engine": "Async", "cache_type": "Writeback",
                }),
            );
        },
    );
    let listener = UnixListener::bind(guest.vmm.path("v.sock_7002")).unwrap();
    let counter = guest.spawn(&["python3", "-c", COUNTER]);
    let mut stream = guest.accept(&listener);
    let mut disk = guest.spawn(&["python3", "-c", DISK]);
    assert_eq!(disk.line(), "begun");

    let mut expected: u32 = 0;
    let mut held = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    // Checks what has come; every number is the one after the last.
    let mut take = |bytes: &[u8]| {
        held.extend_from_slice(bytes);
        let whole = held.len() / 4 * 4;
        for number in held.drain(..whole).as_slice().chunks_exact(4) {
            let number = u32::from_le_bytes(number.try_into().unwrap());
            assert_eq!(number, expected);
            expected += 1;
        }
    };
    for round in 0..10 {
        let count = stream.read(&mut buffer).unwrap();
        take(&buffer[..count]);
        guest.vmm.patch("/vm", &json!({"state": "Paused"}));
        guest.vmm.patch("/vm", &json!({"state": "Paused"}));
        assert_eq!(guest.vmm.get("/")["state"], "Paused");
        // What was under way comes; then there is silence.
        stream
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        while let Ok(count) = stream.read(&mut buffer) {
            assert_ne!(count, 0);
            take(&buffer[..count]);
        }
        if round == 0 {
            let clock = cpu_time(guest.vmm.pid());
            thread::sleep(Duration::from_millis(300));
            assert!(cpu_time(guest.vmm.pid()) <= clock + 5, "it does not rest");
            // A connection made now is served later.
            let vsock = guest.vsock();
            let early = std::os::unix::net::UnixStream::connect(vsock).unwrap();
            drop(early);
        }
        guest.vmm.patch("/vm", &json!({"state": "Resumed"}));
        assert_eq!(guest.vmm.get("/")["state"], "Running");
        stream
            .set_read_timeout(Some(belljar_e2e::PATIENCE))
            .unwrap();
    }
    let drain = thread::spawn(move || {
        let mut rest = vec![0; 1 << 16];
        while stream.read(&mut rest).is_ok_and(|count| count > 0) {}
    });
    assert_eq!(disk.line(), "100 rounds");
    drop(counter);
    drop(disk);
    drain.join().unwrap();
    guest.answers();
    guest.ends_well();
}

/// Clock ticks (10 ms) that a process has used.
fn cpu_time(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}
