//! Requests (virtio 1.2 §5.2.6): from a descriptor chain to a checked operation. Pure: it
//! reads the chain and guest RAM, and does nothing.
use vm_memory::GuestAddress;

use super::config::{
    DISCARD_RANGES_MAX, DISCARD_SECTORS_MAX, F_DISCARD, F_WRITE_ZEROES, REQUEST_MAX, SECTOR,
    ZERO_RANGES_MAX, ZERO_SECTORS_MAX,
};
use crate::memory::GuestRam;
use crate::virtio::chain::{Chain, OutsideRam};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Bytes of the answer to GET_ID.
pub(super) const ID_BYTES: usize = 20;

/// Bytes of `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: u32 = 16;
const FLAG_UNMAP: u32 = 1;

/// What the drive allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Bytes.
    pub(super) size: u64,
    pub(super) read_only: bool,
    /// Agreed with the driver.
    pub(super) features: u64,
}

/// The answer to the driver (virtio 1.2 §5.2.6: VIRTIO_BLK_S_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What the driver wants, inside the drive and allowed. Buffers stay in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Into all writable buffers.
    Read {
        offset: u64,
    },
    /// From all readable buffers.
    Write {
        offset: u64,
    },
    Flush,
    GetId,
    /// The readable buffers hold `ranges` ranges, see [`range`].
    Discard {
        ranges: u32,
    },
    WriteZeroes {
        ranges: u32,
    },
}

/// A parsed chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parsed {
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    /// `Err`: to be answered with that status at once.
    pub(super) request: Result<Request, Status>,
}

/// The chain cannot even be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("a request is shorter than its header")]
    NoHeader,
    #[error("a request has no room for a status")]
    NoStatus,
    #[error(transparent)]
    OutsideRam(#[from] OutsideRam),
}

/// Takes header and status off `chain`, which leaves the data, and checks the request.
pub(super) fn parse(mem: &GuestRam, chain: &mut Chain, rules: Rules) -> Result<Parsed, Malformed> {
    let mut header = [0; 16];
    if !chain.take_header(mem, &mut header)? {
        return Err(Malformed::NoHeader);
    }
    let status = chain.take_last_writable().ok_or(Malformed::NoStatus)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let request = check(u32::from_le_bytes([t0, t1, t2, t3]), sector, chain, rules);
    Ok(Parsed { status, request })
}

fn check(kind: u32, sector: u64, chain: &Chain, rules: Rules) -> Result<Request, Status> {
    match kind {
        T_IN => {
            let offset = bytes_at(sector, chain.writable_len(), rules.size)?;
            Ok(Request::Read { offset })
        }
        // Whatever the driver agreed to: the host decides that a drive is read-only.
        T_OUT | T_DISCARD | T_WRITE_ZEROES if rules.read_only => Err(Status::IoError),
        T_OUT => {
            let offset = bytes_at(sector, chain.readable_len(), rules.size)?;
            Ok(Request::Write { offset })
        }
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID => Ok(Request::GetId),
        T_DISCARD if rules.features & F_DISCARD != 0 => Ok(Request::Discard {
            ranges: ranges(chain.readable_len(), DISCARD_RANGES_MAX)?,
        }),
        T_WRITE_ZEROES if rules.features & F_WRITE_ZEROES != 0 => Ok(Request::WriteZeroes {
            ranges: ranges(chain.readable_len(), ZERO_RANGES_MAX)?,
        }),
        _ => Err(Status::Unsupported),
    }
}

/// Where a transfer of `len` bytes from `sector` on starts, if it lies on the drive.
fn bytes_at(sector: u64, len: u32, size: u64) -> Result<u64, Status> {
    if !u64::from(len).is_multiple_of(SECTOR) || len > REQUEST_MAX {
        return Err(Status::IoError);
    }
    inside(sector, u64::from(len), size)
}

fn inside(sector: u64, len: u64, size: u64) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(offset),
        _ => Err(Status::IoError),
    }
}

fn ranges(len: u32, max: u32) -> Result<u32, Status> {
    let count = len / RANGE_LEN;
    if !len.is_multiple_of(RANGE_LEN) || count == 0 || count > max {
        return Err(Status::IoError);
    }
    Ok(count)
}

/// A range of a discard or write-zeroes request, in bytes and on the drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The driver allows that the space is given back.
    pub(super) unmap: bool,
}

/// Range number `index` of `request`, read and checked (virtio 1.2 §5.2.6.2).
pub(super) fn range(
    mem: &GuestRam,
    chain: &Chain,
    request: Request,
    index: u32,
    size: u64,
) -> Result<ByteRange, Status> {
    let mut raw = [0; RANGE_LEN as usize];
    let at = index.checked_mul(RANGE_LEN).ok_or(Status::IoError)?;
    if chain.read(mem, at, &mut raw) != Ok(raw.len()) {
        return Err(Status::IoError);
    }
    let [
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        n0,
        n1,
        n2,
        n3,
        f0,
        f1,
        f2,
        f3,
    ] = raw;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let (max, known) = match request {
        Request::Discard { .. } => (DISCARD_SECTORS_MAX, 0),
        _ => (ZERO_SECTORS_MAX, FLAG_UNMAP),
    };
    if flags & !known != 0 {
        return Err(Status::Unsupported);
    }
    if sectors > max {
        return Err(Status::IoError);
    }
    let len = u64::from(sectors) * SECTOR;
    Ok(ByteRange {
        offset: inside(sector, len, size)?,
        len,
        unmap: flags & FLAG_UNMAP != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn accepted_transfers_lie_on_the_drive(
            sector in prop_oneof![0u64..5000, any::<u64>()],
            len in prop_oneof![(0u32..3000).prop_map(|n| n * 512), any::<u32>()],
            size in prop_oneof![(1u64..4000).prop_map(|n| n * SECTOR), any::<u64>()],
        ) {
            let fits = u128::from(sector) * 512 + u128::from(len) <= u128::from(size);
            let good = fits && len % 512 == 0 && len <= REQUEST_MAX;
            match bytes_at(sector, len, size) {
                Ok(offset) => {
                    prop_assert!(good);
                    prop_assert_eq!(offset, sector * 512);
                }
                Err(status) => {
                    prop_assert!(!good);
                    prop_assert_eq!(status, Status::IoError);
                }
            }
        }

        #[test]
        fn accepted_range_lists_are_whole_and_short(len in any::<u32>(), max in 1u32..64) {
            let whole = len % RANGE_LEN == 0 && (1..=max).contains(&(len / RANGE_LEN));
            prop_assert_eq!(ranges(len, max), if whole { Ok(len / RANGE_LEN) } else { Err(Status::IoError) });
        }
    }
}
