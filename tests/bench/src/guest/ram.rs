//! RAM that is filled, changed, hashed; and a counter that only lives there.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use belljar_bench::wire::{Act, Ram, mix};

const PAGE: usize = 4096;

static FILLED: Mutex<Vec<u8>> = Mutex::new(Vec::new());
static COUNTER: AtomicU64 = AtomicU64::new(0);

pub(crate) fn serve(mut connection: File) -> io::Result<()> {
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
    match request.act {
        Act::Prove => {}
        Act::Fill => {
            let len = usize::try_from(amount).map_err(|_| io::ErrorKind::InvalidInput)?;
            *filled = noise(len);
        }
        Act::Touch => {
            let pages = usize::try_from(amount).map_err(|_| io::ErrorKind::InvalidInput)?;
            for byte in filled.iter_mut().step_by(PAGE).take(pages) {
                *byte = byte.wrapping_add(1);
            }
        }
        Act::Hash => return Ok(hash(&filled)),
    }
    Ok(filled.len() as u64)
}

/// Bytes without structure.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

/// FNV-1a over words.
fn hash(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks();
    words.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, word| {
        (hash ^ u64::from_le_bytes(*word)).wrapping_mul(0x100_0000_01b3)
    })
}
