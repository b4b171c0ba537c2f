//! Feature bits and configuration space of a block device (virtio 1.2 §5.2.3, §5.2.4).

/// Bytes of one sector, the unit of every position in the protocol.
pub(super) const SECTOR: u64 = 512;

pub(super) const F_SIZE_MAX: u64 = 1 << 1;
pub(super) const F_SEG_MAX: u64 = 1 << 2;
pub(super) const F_RO: u64 = 1 << 5;
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

pub(super) const QUEUE_SIZE: u16 = 256;
/// Data buffers of one request: header and status take two descriptors of a full table.
pub(super) const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of one data buffer.
pub(super) const SIZE_MAX: u32 = 512 << 10;
/// Most bytes of one request, which follows from the two above: bounds one step of work.
pub(super) const REQUEST_MAX: u32 = SEG_MAX * SIZE_MAX;

/// Sectors of one range to discard: 1 GiB.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// Ranges of one discard request.
pub(super) const DISCARD_RANGES_MAX: u32 = 32;
/// Sectors of one range to zero: 64 MiB, since zeros may have to be written.
pub(super) const ZERO_SECTORS_MAX: u32 = 1 << 17;
pub(super) const ZERO_RANGES_MAX: u32 = 1;

/// Size of `struct virtio_blk_config` up to the last field of ours.
const LEN: usize = 60;

/// Configuration space as the driver reads it.
#[derive(Clone, Debug)]
pub(super) struct ConfigSpace([u8; LEN]);

impl ConfigSpace {
    pub(super) fn new(capacity_sectors: u64, writable: bool) -> Self {
        let mut space = Self([0; LEN]);
        space.set_capacity(capacity_sectors);
        space.put(8, &SIZE_MAX.to_le_bytes());
        space.put(12, &SEG_MAX.to_le_bytes());
        space.put(20, &(SECTOR as u32).to_le_bytes());
        if writable {
            space.put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
            space.put(40, &DISCARD_RANGES_MAX.to_le_bytes());
            // discard_sector_alignment: holes are made of 4 KiB blocks.
            space.put(44, &8u32.to_le_bytes());
            space.put(48, &ZERO_SECTORS_MAX.to_le_bytes());
            space.put(52, &ZERO_RANGES_MAX.to_le_bytes());
            // write_zeroes_may_unmap.
            space.put(56, &[1]);
        }
        space
    }

    pub(super) fn set_capacity(&mut self, sectors: u64) {
        self.put(0, &sectors.to_le_bytes());
    }

    pub(super) fn capacity(&self) -> u64 {
        self.0
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// Copies from `offset`; bytes beyond the end are zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let from = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.0.get(offset..))
            .unwrap_or_default();
        for (to, byte) in data.iter_mut().zip(from) {
            *to = *byte;
        }
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        if let Some(field) = self.0.get_mut(offset..offset + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_inside_across_and_beyond_the_end() {
        let space = ConfigSpace::new(0x0102_0304_0506_0708, true);
        let mut data = [0xff; 8];
        space.read(0, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0x0102_0304_0506_0708);
        space.read(56, &mut data);
        assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0]);
        for offset in [60, u64::MAX - 3, u64::MAX] {
            let mut data = [0xff; 8];
            space.read(offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
    }

    #[test]
    fn a_read_only_drive_offers_no_discard() {
        let mut data = [0xff; 24];
        ConfigSpace::new(8, false).read(36, &mut data);
        assert_eq!(data, [0; 24]);
    }
}
