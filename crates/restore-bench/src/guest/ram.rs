//! RAM that is filled, changed, hashed; and a counter that only lives there.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use belljar_restore_bench::wire::{Act, Ram, hash, mix, noise, touch, word};

/// Where commands in the same guest ask.
const NAME: &str = "belljar-bench";

static FILLED: Mutex<Vec<u8>> = Mutex::new(Vec::new());
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// Answers requests of the host.
pub(crate) fn serve(connection: File) -> io::Result<()> {
    answer(connection)
}

/// Where programs in this guest ask.
pub(crate) fn listen_here() -> io::Result<UnixListener> {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(NAME)?)
}

/// Answers requests of programs in this guest; does not return.
pub(crate) fn serve_here(listener: &UnixListener) -> io::Result<()> {
    loop {
        let (connection, _) = listener.accept()?;
        // Who asks may go away.
        let _ = answer(connection);
    }
}

/// Asks the program that [`serve_here`] runs in for a proof.
pub(crate) fn ask(nonce: u64) -> io::Result<u64> {
    let mut stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(NAME)?)?;
    stream.write_all(&Ram::new(Act::Prove, nonce).encode())?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer)?;
    Ok(word(answer))
}

fn answer(mut connection: impl Read + Write) -> io::Result<()> {
    let mut record = [0; Ram::SIZE];
    loop {
        connection.read_exact(&mut record)?;
        let Some(request) = Ram::decode(&record) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        connection.write_all(&act(request)?.to_le_bytes())?;
    }
}

fn act(request: Ram) -> io::Result<u64> {
    let amount = request.amount;
    if request.act == Act::Prove {
        return Ok(mix(amount, COUNTER.fetch_add(1, Ordering::Relaxed)));
    }
    let mut filled = FILLED
        .lock()
        .map_err(|_| io::Error::other("a thread panicked"))?;
    let amount = usize::try_from(amount).map_err(|_| io::ErrorKind::InvalidInput)?;
    match request.act {
        Act::Prove => {}
        Act::Fill => *filled = noise(amount, request.salt),
        Act::Touch => touch(&mut filled, amount),
        Act::Hash => return Ok(hash(&filled, request.salt)),
    }
    Ok(filled.len() as u64)
}
