//! Seeded mutations, for runs that repeat.

/// xorshift64*: small, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(if seed == 0 { 1 } else { seed })
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 16).unwrap_or(0) % limit.max(1)
    }

    /// A few changes to one of the seeds.
    pub fn mutated(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds
            .get(self.below(seeds.len()))
            .cloned()
            .unwrap_or_default();
        for _ in 0..=self.below(4) {
            self.change(&mut bytes, seeds);
        }
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        const TELLING: [u8; 8] = [0, 1, 0x7f, 0x80, 0xff, 0x10, 0x3f, 0x40];
        let at = self.below(bytes.len());
        match self.below(6) {
            0 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
            1 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = TELLING.get(self.below(TELLING.len())).copied().unwrap_or(0);
                }
            }
            2 => bytes.truncate(at),
            3 => {
                let end = at.saturating_add(self.below(16)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
            4 => {
                let count = self.below(12);
                let added: Vec<u8> = (0..count).map(|_| self.next() as u8).collect();
                bytes.splice(at..at, added);
            }
            _ => {
                let other = seeds
                    .get(self.below(seeds.len()))
                    .map_or(&[][..], |seed| seed);
                let from = self.below(other.len());
                bytes.extend_from_slice(other.get(from..).unwrap_or_default());
            }
        }
    }
}
