//! What runs in the guests that are measured. As PID 1 it says that it is up, then echoes, moves bytes and reads disks;
//! as `--resident` it holds RAM under an agent, which `--ask NONCE` has proved.

mod block;
mod ram;
mod vsock;

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use belljar_restore_bench::wire::{
    BLOCK_PORT, BOOT_PORT, BULK_PORT, Boot, Bulk, ECHO_PORT, RAM_PORT,
};
use rustix::time::{ClockId, clock_gettime};

/// Longest piece that is moved at once.
const BUFFER: usize = 1 << 20;

fn main() {
    let init_ns = boottime_ns();
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--true"] => return,
        ["--spawn", count] => return spawn(count.parse().unwrap_or(0)),
        ["--resident"] => return resident(),
        ["--ask", nonce] => return prove(nonce),
        ["--listen", port] => return listen(port.parse().unwrap_or(0)),
        _ => {}
    }
    // A guest that cannot talk has nobody to tell; the host notices its silence.
    let _ = serve(init_ns);
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let rest = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

/// Starts itself again and again to do nothing, and prints how many nanoseconds each took.
fn spawn(count: u32) {
    for _ in 0..count {
        let start = Instant::now();
        let status = Command::new("/proc/self/exe").arg("--true").status();
        let time = start.elapsed();
        match status {
            Ok(status) if status.success() => println!("{}", time.as_nanos()),
            other => {
                eprintln!("{other:?}");
                std::process::exit(1);
            }
        }
    }
}

/// Holds RAM, for the host and for programs here.
fn resident() {
    // Whoever reaches it from outside may also ask it from inside.
    let serving = ram::listen_here().and_then(|listener| {
        on_port(RAM_PORT, ram::serve)?;
        ram::serve_here(&listener)
    });
    if let Err(error) = serving {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

/// Prints the resident's proof for a nonce.
fn prove(nonce: &str) {
    match nonce.parse().map_err(io::Error::other).and_then(ram::ask) {
        Ok(answer) => println!("{answer}"),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}

/// Listens on a TCP port once it gets a byte, until its input ends.
fn listen(port: u16) {
    let mut input = io::stdin();
    let mut byte = [0];
    // Whoever waits for the port notices if one of these fails.
    let _ = input.read(&mut byte);
    let _listener = std::net::TcpListener::bind(("127.0.0.1", port));
    let _ = input.read(&mut byte);
}

fn serve(init_ns: u64) -> io::Result<()> {
    let mut host = vsock::connect(BOOT_PORT)?;
    let boot = Boot {
        init_ns,
        sent_ns: boottime_ns(),
    };
    host.write_all(&boot.encode())?;
    on_port(ECHO_PORT, echo)?;
    on_port(BULK_PORT, bulk)?;
    on_port(BLOCK_PORT, block::serve)?;
    on_port(RAM_PORT, ram::serve)?;
    host.write_all(b"l")
}

/// Serves connections to a port, one after the other, in a thread.
fn on_port(port: u32, serve: fn(File) -> io::Result<()>) -> io::Result<()> {
    let listener = vsock::listen(port)?;
    thread::Builder::new().spawn(move || {
        while let Ok(connection) = vsock::accept(&listener) {
            // The host may hang up whenever it likes.
            let _ = serve(connection);
        }
    })?;
    Ok(())
}

fn echo(mut connection: File) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let length = connection.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        connection.write_all(buffer.get(..length).unwrap_or_default())?;
    }
}

fn bulk(mut connection: File) -> io::Result<()> {
    let mut buffer = vec![0x5a; BUFFER];
    let mut record = [0; Bulk::SIZE];
    loop {
        connection.read_exact(&mut record)?;
        let request = Bulk::decode(&record);
        let mut left = request.total;
        while left > 0 {
            let chunk = usize::try_from(left.min(request.chunk)).unwrap_or(BUFFER);
            let piece = buffer.get_mut(..chunk).ok_or(io::ErrorKind::InvalidInput)?;
            let moved = if request.from_guest {
                connection.write(piece)?
            } else {
                connection.read(piece)?
            };
            if moved == 0 {
                return Ok(());
            }
            left = left.saturating_sub(moved as u64);
        }
        if !request.from_guest {
            connection.write_all(b"d")?;
        }
    }
}
