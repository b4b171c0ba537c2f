//! Tests of the whole store: on a simulated file system, where power goes and calls fail, and on a real one.

mod basic;
mod crash;
mod density;
mod hostile;
mod manifest;
mod sim;
mod stream;

use std::sync::Mutex;

use crate::{PAGE, Reader, Sink};

/// xorshift64*: small, and the same everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit.max(1)
    }

    /// A page that compresses to about a third.
    pub(crate) fn page(&mut self) -> Vec<u8> {
        let words: Vec<u64> = (0..8).map(|_| self.next()).collect();
        let mut page = Vec::new();
        while page.len() < PAGE as usize {
            let word = words[self.below(8) as usize];
            page.extend_from_slice(&word.to_le_bytes());
            page.extend_from_slice(&(self.next() as u16).to_le_bytes());
        }
        page.truncate(PAGE as usize);
        page
    }

    /// Pages, of which a share of 1 in `zero` is zero.
    pub(crate) fn pages(&mut self, count: usize, zero: u64) -> Vec<u8> {
        let page = |_| {
            if self.below(zero) == 0 {
                vec![0; PAGE as usize]
            } else {
                self.page()
            }
        };
        (0..count).flat_map(page).collect()
    }
}

/// A sink in memory.
pub(crate) struct Memory(pub(crate) Mutex<Vec<u8>>);

impl Sink for Memory {
    fn write(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        let mut memory = self.0.lock().unwrap();
        memory[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

/// All of an image, by the parallel way.
pub(crate) fn restored(reader: &Reader, name: &str) -> crate::Result<Vec<u8>> {
    let length = reader.image(name)?.length as usize;
    let memory = Memory(Mutex::new(vec![0; length]));
    reader.restore(name, &memory, 2)?;
    Ok(memory.0.into_inner().unwrap())
}
