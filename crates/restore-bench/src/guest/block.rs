//! Direct reads and writes of the guest's drives, one at a time, each timed with `CLOCK_MONOTONIC`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Once;
use std::time::Instant;

use belljar_restore_bench::wire::{Access, Block};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount};

/// Alignment that direct I/O wants.
const ALIGNMENT: usize = 4096;

static DEVICES: Once = Once::new();

pub(crate) fn serve(mut connection: File) -> io::Result<()> {
    // Not before the first request: booting does not need it.
    DEVICES.call_once(|| {
        let _ = mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None);
    });
    let mut record = [0; Block::SIZE];
    loop {
        connection.read_exact(&mut record)?;
        let mut answer = Vec::new();
        match run(Block::decode(&record)) {
            Ok(times) => {
                answer.extend((times.len() as u64).to_le_bytes());
                for time in times {
                    answer.extend(time.to_le_bytes());
                }
            }
            Err(error) => {
                let errno = u64::try_from(error.raw_os_error().unwrap_or(0)).unwrap_or(0);
                answer.extend(Block::FAILED.to_le_bytes());
                answer.extend(errno.to_le_bytes());
            }
        }
        connection.write_all(&answer)?;
    }
}

/// Nanoseconds of each operation.
fn run(request: Block) -> io::Result<Vec<u64>> {
    let letter = char::from(b'a'.saturating_add(u8::try_from(request.drive).unwrap_or(u8::MAX)));
    let mut device = OpenOptions::new()
        .read(true)
        .write(request.access == Access::RandomWrite)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(format!("/dev/vd{letter}"))?;
    let blocks = device
        .seek(SeekFrom::End(0))?
        .checked_div(request.size)
        .filter(|blocks| *blocks > 0)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let size = usize::try_from(request.size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut memory = vec![0xa5; size.saturating_add(ALIGNMENT)];
    let begin = memory.as_ptr().align_offset(ALIGNMENT);
    let buffer = memory
        .get_mut(begin..begin.saturating_add(size))
        .ok_or(io::ErrorKind::InvalidInput)?;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut times = Vec::with_capacity(usize::try_from(request.count).unwrap_or(0));
    for number in 0..request.count {
        let block = match request.access {
            Access::SequentialRead => number % blocks,
            Access::RandomRead | Access::RandomWrite => {
                // xorshift64: the same places in every guest.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % blocks
            }
        };
        let offset = block.saturating_mul(request.size);
        let start = Instant::now();
        if request.access == Access::RandomWrite {
            device.write_all_at(buffer, offset)?;
        } else {
            device.read_exact_at(buffer, offset)?;
        }
        times.push(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    Ok(times)
}
