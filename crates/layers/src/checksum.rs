//! CRC-32 (IEEE 802.3, as in zip), eight bytes a step.

const TABLES: [[u32; 256]; 8] = tables();

#[allow(clippy::indexing_slicing)]
const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = (value >> 1) ^ (0xedb8_8320 & (value & 1).wrapping_neg());
            bit += 1;
        }
        tables[0][byte] = value;
        byte += 1;
    }
    let mut byte = 0;
    while byte < 256 {
        let mut step = 1;
        while step < 8 {
            let before = tables[step - 1][byte];
            tables[step][byte] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            step += 1;
        }
        byte += 1;
    }
    tables
}

/// The checksum of `bytes`.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let [t0, t1, t2, t3, t4, t5, t6, t7] = &TABLES;
    // Every index is a byte.
    let at = |table: &[u32; 256], byte: u8| table.get(usize::from(byte)).copied().unwrap_or(0);
    let mut sum = u32::MAX;
    let (eights, rest) = bytes.as_chunks::<8>();
    for [b0, b1, b2, b3, b4, b5, b6, b7] in eights {
        let [s0, s1, s2, s3] = sum.to_le_bytes();
        sum = at(t7, b0 ^ s0)
            ^ at(t6, b1 ^ s1)
            ^ at(t5, b2 ^ s2)
            ^ at(t4, b3 ^ s3)
            ^ at(t3, *b4)
            ^ at(t2, *b5)
            ^ at(t1, *b6)
            ^ at(t0, *b7);
    }
    for byte in rest {
        let [low, ..] = sum.to_le_bytes();
        sum = (sum >> 8) ^ at(t0, low ^ byte);
    }
    !sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_well_known_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(b""), 0);
        let text: Vec<u8> = (0..1000u32).map(|i| (i * 31) as u8).collect();
        let slow = !text.iter().fold(u32::MAX, |sum, byte| {
            (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
                (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg())
            })
        });
        assert_eq!(crc32(&text), slow);
    }
}
