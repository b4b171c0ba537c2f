//! The console's socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use belljar_e2e::guest::{Guest, Spec};
use belljar_e2e::{PATIENCE, eventually};

fn connect(guest: &Guest) -> UnixStream {
    let stream = UnixStream::connect(guest.vmm.path("console.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Reads until `text` was there; returns all.
fn read_until(stream: &mut UnixStream, text: &str) -> String {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains(text) {
        let count = stream.read(&mut buffer).unwrap_or(0);
        assert_ne!(
            count,
            0,
            "'{text}' is not in {}",
            String::from_utf8_lossy(&seen)
        );
        seen.extend(&buffer[..count]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

#[test]
fn what_was_what_is_and_what_is_typed() {
    let guest = Guest::boot(&Spec::default());
    // What was said before anybody came.
    let mut late = connect(&guest);
    read_until(&mut late, "belljar-agent: ready");
    // What is said now.
    guest.sh("echo said now >/dev/hvc0");
    read_until(&mut late, "said now");
    // What is typed comes back from the terminal, and reaches who reads it.
    let mut reader = guest.spawn(&["sh", "-c", "echo ready; head -n 1 </dev/hvc0"]);
    assert_eq!(reader.line(), "ready");
    late.write_all(b"typed here\r").unwrap();
    read_until(&mut late, "typed here");
    assert_eq!(reader.line(), "typed here");
    // Who does not read stalls nobody, however much there is.
    let slow = connect(&guest);
    guest.sh("head -c 1000000 /dev/zero | tr '\\0' x >/dev/hvc0; echo the end >/dev/hvc0");
    read_until(&mut late, "the end");
    eventually("the other reader to have it", || {
        guest.console().contains("the end")
    });
    guest.answers();
    drop(slow);
    guest.ends_well();
}
