//! The API under abuse, while a guest runs.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use belljar_e2e::guest::{Guest, Spec};
use belljar_e2e::vmm::{Vmm, read_answer};
use serde_json::{Value, json};

use crate::noise;

/// What comes back until the end, or until nothing comes for a while.
fn rest(stream: &mut UnixStream) -> Vec<u8> {
    stream
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        all.extend(&buffer[..count]);
    }
    all
}

fn answers(vmm: &Vmm) {
    let begin = Instant::now();
    assert_eq!(vmm.get("/")["state"], "Running");
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
}

#[test]
fn garbage_half_slow_and_huge_requests() {
    let guest = Guest::boot(&Spec::default());
    let vmm = &guest.vmm;

    for request in [
        noise(7, 4096),
        vec![0; 65536],
        b"\r\n\r\n\r\n".to_vec(),
        b"GET\r\n\r\n".to_vec(),
        b"DELETE / HTTP/1.1\r\n\r\n".to_vec(),
        b"PUT /actions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
            .to_vec(),
        b"PUT /actions HTTP/1.1\r\nContent-Length: -1\r\n\r\n".to_vec(),
        b"PUT /actions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n".to_vec(),
        b"PUT /actions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!".to_vec(),
        [b"GET / HTTP/1.1\r\n".to_vec(), b"A: b\r\n".repeat(100_000)].concat(),
        [b"GET /".to_vec(), vec![b'a'; 1 << 20]].concat(),
    ] {
        let mut stream = vmm.connect();
        // It may hang up before it has taken all of it.
        let _ = stream.write_all(&request);
        let _ = stream.shutdown(Shutdown::Write);
        let back = rest(&mut stream);
        let shown = String::from_utf8_lossy(&back);
        assert!(
            back.is_empty() || shown.starts_with("HTTP/1.1 4"),
            "{:?}: {shown}",
            String::from_utf8_lossy(&request[..request.len().min(60)])
        );
        answers(vmm);
    }

    // Too long a body is refused for its length alone.
    let mut stream = vmm.connect();
    stream
        .write_all(b"PUT /actions HTTP/1.1\r\nContent-Length: 60000\r\n\r\n")
        .unwrap();
    assert_eq!(read_answer(&mut stream).unwrap().status, 413);

    // As many that say nothing, or only half, as there can be: the next one is served.
    let mut silent: Vec<UnixStream> = Vec::new();
    for number in 0..40 {
        let mut stream = vmm.connect();
        if number % 2 == 0 {
            let _ = stream.write_all(b"PUT /actions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{");
        }
        silent.push(stream);
    }
    answers(vmm);

    // Many good calls at once, some of them byte by byte.
    thread::scope(|scope| {
        for number in 0..8 {
            scope.spawn(move || {
                for _ in 0..10 {
                    let mut stream = vmm.connect();
                    let request = b"GET /machine-config HTTP/1.1\r\nHost: x\r\n\r\n";
                    let pieces = if number == 0 { 1 } else { request.len() };
                    for piece in request.chunks(pieces) {
                        stream.write_all(piece).unwrap();
                    }
                    assert_eq!(read_answer(&mut stream).unwrap().body["vcpu_count"], 1);
                }
            });
        }
    });
    // Several calls on one connection, sent together.
    let mut stream = vmm.connect();
    stream
        .write_all(&b"GET /version HTTP/1.1\r\n\r\n".repeat(20))
        .unwrap();
    for _ in 0..20 {
        assert_eq!(read_answer(&mut stream).unwrap().status, 200);
    }
    drop(silent);

    // A second start, and what may only be said before one.
    vmm.action("InstanceStart").refuses(&["start"]);
    for (path, body) in [
        (
            "/machine-config",
            json!({"vcpu_count": 2, "mem_size_mib": 128}),
        ),
        ("/boot-source", json!({"kernel_image_path": "kernel"})),
        (
            "/drives/late",
            json!({"drive_id": "late", "path_on_host": "late", "is_root_device": false}),
        ),
        ("/vsock", json!({"guest_cid": 4, "uds_path": "late.sock"})),
        ("/entropy", json!({})),
        ("/balloon", json!({"amount_mib": 1, "deflate_on_oom": true})),
        ("/console", json!({"socket_path": "late.sock"})),
        ("/prepare", json!({"vcpu_count": 1})),
    ] {
        let answer = vmm.call("PUT", path, &body);
        assert_eq!(answer.status, 400, "{path}: {answer:?}");
    }
    vmm.action("SendCtrlAltDel").refuses(&["SendCtrlAltDel"]);
    vmm.action("Explode").refuses(&["Explode"]);
    vmm.call("PUT", "/snapshot/create", &json!({}))
        .refuses(&["snapshot_path"]);
    vmm.call("GET", "/nowhere", &Value::Null)
        .refuses(&["/nowhere"]);
    guest.answers();
    guest.ends_well();
}

#[test]
fn a_log_that_nobody_reads_stalls_nothing() {
    let vmm = crate::halting();
    let fifo = vmm.path("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from(0o600)).unwrap();
    let reader = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&fifo)
        .unwrap();
    vmm.put("/logger", &json!({"log_path": "fifo", "level": "Debug"}));
    vmm.put("/metrics", &json!({"metrics_path": "metrics"}));
    vmm.action("InstanceStart").is_done();
    // Refused calls are logged; nobody reads.
    for _ in 0..1500 {
        let answer = vmm.call("GET", "/nowhere", &Value::Null);
        assert_eq!(answer.status, 400);
    }
    answers(&vmm);
    vmm.action("FlushMetrics").is_done();
    let metrics = std::fs::read_to_string(vmm.path("metrics")).unwrap();
    let line: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert!(
        line["utc_timestamp_ms"]
            .as_u64()
            .is_some_and(|time| time > 0),
        "{line}"
    );
    vmm.action("Stop").is_done();
    vmm.ends_with(20);
    drop(reader);
}
