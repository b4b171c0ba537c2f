//! What host and guest say to each other: fixed-size records of little-endian 64-bit words.
//!
//! The guest connects to [`BOOT_PORT`] of the host and sends a [`Boot`]; when it listens on its own
//! ports it sends one more byte there. The host then connects to the guest's ports.

/// Host port of the boot reply.
pub const BOOT_PORT: u32 = 5000;
/// Guest port that sends every byte back.
pub const ECHO_PORT: u32 = 5001;
/// Guest port that answers [`Bulk`] requests, one after the other.
pub const BULK_PORT: u32 = 5002;
/// Guest port that answers [`Block`] requests, one after the other.
pub const BLOCK_PORT: u32 = 5003;
/// Guest port that answers [`Ram`] requests, one connection after the other.
pub const RAM_PORT: u32 = 5004;

/// Begins every [`Boot`], so that nothing else is taken for one.
const MAGIC: u64 = u64::from_le_bytes(*b"BJBENCH1");

/// Splits `N` words out of bytes.
fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = chunk
            .iter()
            .rev()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    }
    words
}

fn bytes<const N: usize>(words: &[u64]) -> [u8; N] {
    let mut bytes = [0; N];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// The guest's first words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// `CLOCK_BOOTTIME` at the first line of PID 1, nanoseconds since the kernel's clock began.
    pub init_ns: u64,
    /// The same clock just before this record is sent.
    pub sent_ns: u64,
}

impl Boot {
    /// Bytes of a record.
    pub const SIZE: usize = 24;

    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        bytes(&[MAGIC, self.init_ns, self.sent_ns])
    }

    /// `None`: the bytes are something else.
    #[must_use]
    pub fn decode(record: &[u8; Self::SIZE]) -> Option<Self> {
        let [magic, init_ns, sent_ns] = words(record);
        (magic == MAGIC).then_some(Self { init_ns, sent_ns })
    }
}

/// A request on [`BULK_PORT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bulk {
    /// True: the guest sends `total` bytes. False: it takes them and answers with one byte.
    pub from_guest: bool,
    pub total: u64,
    /// Bytes per `read` or `write`.
    pub chunk: u64,
}

impl Bulk {
    /// Bytes of a record.
    pub const SIZE: usize = 24;

    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        bytes(&[u64::from(self.from_guest), self.total, self.chunk])
    }

    #[must_use]
    pub fn decode(record: &[u8; Self::SIZE]) -> Self {
        let [from_guest, total, chunk] = words(record);
        Self {
            from_guest: from_guest != 0,
            total,
            chunk,
        }
    }
}

/// What a [`Block`] request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    RandomRead,
    RandomWrite,
    SequentialRead,
}

/// A request on [`BLOCK_PORT`]. Answer: the count as a word, then as many words with the
/// nanoseconds of each operation; or [`Block::FAILED`] and the errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub access: Access,
    /// 0 is `/dev/vda`.
    pub drive: u64,
    /// Bytes per operation; a multiple of 4096.
    pub size: u64,
    /// Operations.
    pub count: u64,
}

impl Block {
    /// Bytes of a record.
    pub const SIZE: usize = 32;
    /// In place of the count: it did not work.
    pub const FAILED: u64 = u64::MAX;

    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let access = match self.access {
            Access::RandomRead => 0,
            Access::RandomWrite => 1,
            Access::SequentialRead => 2,
        };
        bytes(&[access, self.drive, self.size, self.count])
    }

    #[must_use]
    pub fn decode(record: &[u8; Self::SIZE]) -> Self {
        let [access, drive, size, count] = words(record);
        Self {
            access: match access {
                0 => Access::RandomRead,
                1 => Access::RandomWrite,
                _ => Access::SequentialRead,
            },
            drive,
            size,
            count,
        }
    }
}

/// What a [`Ram`] request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Fills that many bytes with [`noise`] of the salt; they take the place of those before.
    Fill,
    /// Changes one byte in each of that many pages, from the first on: [`touch`].
    Touch,
    /// Hashes all that is filled, salted: [`hash`].
    Hash,
    /// Mixes the amount with the number of such requests before: see [`mix`].
    Prove,
}

/// A request on [`RAM_PORT`]. Answer: one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ram {
    pub act: Act,
    pub amount: u64,
    /// Chosen anew by who asks, so that no answer can be prepared.
    pub salt: u64,
}

impl Ram {
    /// Bytes of a record.
    pub const SIZE: usize = 24;
    const ACTS: [Act; 4] = [Act::Fill, Act::Touch, Act::Hash, Act::Prove];

    /// A request without salt.
    #[must_use]
    pub fn new(act: Act, amount: u64) -> Self {
        Self {
            act,
            amount,
            salt: 0,
        }
    }

    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let act = Self::ACTS.iter().position(|act| *act == self.act);
        bytes(&[act.unwrap_or(0) as u64, self.amount, self.salt])
    }

    /// `None`: there is no such act.
    #[must_use]
    pub fn decode(record: &[u8; Self::SIZE]) -> Option<Self> {
        let [act, amount, salt] = words(record);
        let act = *Self::ACTS.get(usize::try_from(act).ok()?)?;
        Some(Self { act, amount, salt })
    }
}

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Bytes without structure, the same for the same salt.
#[must_use]
pub fn noise(len: usize, salt: u64) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d ^ salt;
    if state == 0 {
        state = 1;
    }
    let mut bytes = Vec::with_capacity(len.saturating_add(8));
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Changes one byte in each of the first `pages` pages.
pub fn touch(filled: &mut [u8], pages: usize) {
    for byte in filled.iter_mut().step_by(PAGE).take(pages) {
        *byte = byte.wrapping_add(1);
    }
}

/// FNV-1a over words, after the salt.
#[must_use]
pub fn hash(bytes: &[u8], salt: u64) -> u64 {
    let (words, _) = bytes.as_chunks();
    words
        .iter()
        .fold(0xcbf2_9ce4_8422_2325 ^ salt, |hash: u64, word| {
            (hash ^ u64::from_le_bytes(*word)).wrapping_mul(0x100_0000_01b3)
        })
}

/// What a guest that has answered `counter` times before makes of a nonce.
#[must_use]
pub fn mix(nonce: u64, counter: u64) -> u64 {
    nonce
        .wrapping_add(counter)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(29)
}

/// One word of an answer.
#[must_use]
pub fn word(bytes: [u8; 8]) -> u64 {
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fills_the_ram_depends_on_the_salt_and_on_each_page() {
        let mut filled = noise(3 * PAGE, 7);
        assert_eq!(filled.len(), 3 * PAGE);
        assert_ne!(noise(64, 7), noise(64, 8));
        assert_eq!(noise(9, 0x2545_f491_4f6c_dd1d).len(), 9, "never all zeros");
        let before = hash(&filled, 1);
        assert_ne!(before, hash(&filled, 2));
        touch(&mut filled, 2);
        let after = hash(&filled, 1);
        assert_ne!(before, after);
        assert_eq!(filled.get(2 * PAGE), noise(3 * PAGE, 7).get(2 * PAGE));
    }

    #[test]
    fn records_come_back_as_they_were() {
        let boot = Boot {
            init_ns: 7,
            sent_ns: u64::MAX,
        };
        assert_eq!(Boot::decode(&boot.encode()), Some(boot));
        assert_eq!(Boot::decode(&[0; Boot::SIZE]), None);
        let bulk = Bulk {
            from_guest: true,
            total: 1 << 40,
            chunk: 65536,
        };
        assert_eq!(Bulk::decode(&bulk.encode()), bulk);
        for act in [Act::Fill, Act::Touch, Act::Hash, Act::Prove] {
            let ram = Ram {
                act,
                amount: 9,
                salt: 5,
            };
            assert_eq!(Ram::decode(&ram.encode()), Some(ram));
        }
        assert_eq!(Ram::decode(&[9; Ram::SIZE]), None);
        for access in [
            Access::RandomRead,
            Access::RandomWrite,
            Access::SequentialRead,
        ] {
            let block = Block {
                access,
                drive: 1,
                size: 4096,
                count: 300,
            };
            assert_eq!(Block::decode(&block.encode()), block);
        }
    }
}
