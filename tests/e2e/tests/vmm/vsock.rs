//! vsock: both directions, many connections, byte-exact.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use belljar_e2e::PATIENCE;
use belljar_e2e::guest::{Guest, Spec};
use belljar_protocol::hybrid::{self, ConnectError};

use crate::noise;

const CONNECTIONS: u64 = 64;
const LENGTH: usize = 1 << 20;

const ECHO_SERVER: &str = "
import socket, threading
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
s.bind((socket.VMADDR_CID_ANY, 7000)); s.listen(128)
print('listening', flush=True)
def serve(c):
    while data := c.recv(262144): c.sendall(data)
    c.shutdown(socket.SHUT_WR); c.close()
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()";

/// Each connection reads all that comes, then sends it back.
const CLIENTS: &str = "
import socket, threading
def call(n):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.connect((2, 7001))
    data = bytearray()
    while piece := s.recv(262144): data += piece
    s.sendall(data); s.shutdown(socket.SHUT_WR)
    assert s.recv(1) == b''
threads = [threading.Thread(target=call, args=(n,)) for n in range(64)]
for t in threads: t.start()
for t in threads: t.join()
print('done')";

#[test]
fn many_connections_in_both_directions() {
    let mut guest = Guest::boot(&Spec {
        vcpus: 2,
        memory_mib: 512,
        ..Spec::default()
    });
    let mut server = guest.spawn(&["python3", "-c", ECHO_SERVER]);
    assert_eq!(server.line(), "listening");

    // From the host, all at once.
    thread::scope(|scope| {
        for seed in 0..CONNECTIONS {
            let guest = &guest;
            scope.spawn(move || {
                let data = noise(seed, LENGTH);
                let mut reading = guest.connect(7000);
                let mut writing = reading.try_clone().unwrap();
                let sent = data.clone();
                let writer = thread::spawn(move || {
                    writing.write_all(&sent).unwrap();
                    writing.shutdown(Shutdown::Write).unwrap();
                });
                let mut back = Vec::new();
                reading.read_to_end(&mut back).unwrap();
                writer.join().unwrap();
                assert!(
                    back == data,
                    "connection {seed} is not what it was ({} bytes)",
                    back.len()
                );
            });
        }
    });

    // From the guest, all at once.
    let listener = UnixListener::bind(guest.vmm.path("v.sock_7001")).unwrap();
    let mut clients = guest.spawn(&["python3", "-c", CLIENTS]);
    let streams: Vec<_> = (0..CONNECTIONS).map(|_| guest.accept(&listener)).collect();
    thread::scope(|scope| {
        for (seed, mut stream) in (0..).zip(streams) {
            scope.spawn(move || {
                let data = noise(seed, LENGTH / 4);
                stream.write_all(&data).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut back = Vec::new();
                stream.read_to_end(&mut back).unwrap();
                assert!(
                    back == data,
                    "connection {seed} is not what it was ({} bytes)",
                    back.len()
                );
            });
        }
    });
    assert_eq!(clients.line(), "done");

    // Where nobody listens, a connection ends at once: from here and from there.
    let begin = Instant::now();
    let refused = hybrid::connect(&guest.vsock(), 7999, begin + PATIENCE);
    assert!(
        matches!(refused, Err(ConnectError::Refused { .. })),
        "{refused:?}"
    );
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(
        guest.python(
            "import socket
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
try: s.connect((2, 7998))
except OSError as error: print(type(error).__name__)"
        ),
        "ConnectionResetError"
    );

    // One that is never read stalls only itself.
    let mut stuck = guest.connect(7000);
    stuck.set_nonblocking(true).unwrap();
    let junk = vec![0; 1 << 20];
    let mut accepted = 0;
    let begin = Instant::now();
    while accepted < 16 << 20 && begin.elapsed() < Duration::from_secs(1) {
        accepted += stuck.write(&junk).unwrap_or(0);
    }
    assert!(accepted < 16 << 20, "there is no end to what is buffered");
    guest.answers();
    drop(stuck);
    guest.ends_well();
}
