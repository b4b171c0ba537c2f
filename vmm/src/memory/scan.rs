//! Which pages of a private mapping are its own: changed, or there at all if it is anonymous.
//!
//! Linux tells them by `PAGEMAP_SCAN` (6.7), before that by `/proc/self/pagemap`
//! (Documentation/admin-guide/mm/pagemap.rst). Pages in swap count; the shared page of zeros, which
//! reading makes, does not where that can be told.
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;
/// Ranges with no more than this between them are looked at in one call.
const NEAR: usize = 32 * PAGE;
/// Most ranges that one call tells: as many as Linux collects at once, for with more room it lost some (6.18).
const REGIONS: usize = 512;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const IS_WRITTEN: u64 = 1 << 1;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_ZERO_PAGE: u64 = 1 << 5;
const IS_HUGE: u64 = 1 << 6;
const WP_MATCHING: u64 = 1 << 0;
const CHECK_WPASYNC: u64 = 1 << 1;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 3 << 30 | (size_of::<ScanArg>() as u64) << 16 | 0x66 << 8 | 16;

/// Own pages between the addresses `range` of this process, as offsets from its start.
pub(super) fn private_pages(range: &Range<usize>) -> io::Result<Vec<Range<usize>>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    match scan(&pagemap, range, ScanArg::default()) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            read_entries(&pagemap, range)
        }
        done => done,
    }
}

/// Own pages between these addresses that were written since they were last asked for; each of them is protected
/// again in the same step. The range is registered for asynchronous write protection.
///
/// Where nothing was written takes little: at first the kernel is not asked whose pages they are, for which it would
/// look at each page itself, nor to protect any, for which it would take all of the range from the guest.
pub(super) fn written(pagemap: &File, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
    // Never pages that are not there: protected, they would look as if they were in swap.
    let look = ScanArg {
        category_mask: IS_WRITTEN,
        category_anyof_mask: IS_PRESENT | IS_SWAPPED,
        ..ScanArg::default()
    };
    let protect = ScanArg {
        flags: WP_MATCHING | CHECK_WPASYNC,
        category_mask: IS_WRITTEN,
        ..ScanArg::default()
    };
    let whole = range.start as usize..range.end as usize;
    let found = scan_for(pagemap, &whole, look)?;
    let is_near = |one: &Range<usize>, next: &Range<usize>| next.start - one.end <= NEAR;
    let mut own = Vec::new();
    for near in found.chunk_by(is_near) {
        let (Some(first), Some(last)) = (near.first(), near.last()) else {
            continue;
        };
        let around = whole.start + first.start..whole.start + last.end;
        for range in scan(pagemap, &around, protect)? {
            own.push((first.start + range.start) as u64..(first.start + range.end) as u64);
        }
    }
    Ok(own)
}

/// What is mapped in huge pages between the addresses `range` of this process, as offsets from its start. Linux before
/// 6.7 cannot tell: an error.
pub(super) fn huge_pages(range: &Range<usize>) -> io::Result<Vec<Range<usize>>> {
    let huge = ScanArg {
        category_mask: IS_HUGE | IS_PRESENT,
        ..ScanArg::default()
    };
    scan_for(&File::open("/proc/self/pagemap")?, range, huge)
}

/// Own pages, with what `also` asks beside.
fn scan(pagemap: &File, range: &Range<usize>, also: ScanArg) -> io::Result<Vec<Range<usize>>> {
    let own = ScanArg {
        category_inverted: IS_FILE | IS_ZERO_PAGE,
        category_mask: IS_FILE | IS_ZERO_PAGE | also.category_mask,
        category_anyof_mask: IS_PRESENT | IS_SWAPPED,
        ..also
    };
    scan_for(pagemap, range, own)
}

fn scan_for(
    pagemap: &File,
    range: &Range<usize>,
    wanted: ScanArg,
) -> io::Result<Vec<Range<usize>>> {
    let mut found = Vec::new();
    let mut regions = vec![PageRegion::default(); REGIONS];
    let mut at = range.start as u64;
    while at < range.end as u64 {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: at,
            end: range.end as u64,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            ..wanted
        };
        // SAFETY: the argument is of the size it names, and `vec` has room for `vec_len` regions; the call
        // changes nothing but these, and what is protected in a way that the kernel resolves itself.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for region in regions.iter().take(count) {
            let (start, end) = (region.start as usize, region.end as usize);
            add(&mut found, start - range.start..end - range.start);
        }
        if arg.walk_end <= at {
            return Err(io::Error::other("PAGEMAP_SCAN does not get on"));
        }
        at = arg.walk_end;
    }
    Ok(found)
}

fn read_entries(pagemap: &File, range: &Range<usize>) -> io::Result<Vec<Range<usize>>> {
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;
    const FILE: u64 = 1 << 61;
    let mut found = Vec::new();
    let mut entries = vec![0; 8 << 10];
    let mut page = range.start / PAGE;
    let end = range.end / PAGE;
    while page < end {
        let wanted = entries.len().min((end - page) * 8);
        let got = pagemap.read_at(
            entries.get_mut(..wanted).unwrap_or_default(),
            page as u64 * 8,
        )?;
        let (entries, _) = entries.get(..got).unwrap_or_default().as_chunks();
        if entries.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for entry in entries {
            let entry = u64::from_ne_bytes(*entry);
            if entry & PRESENT_OR_SWAPPED != 0 && entry & FILE == 0 {
                let start = page * PAGE - range.start;
                add(&mut found, start..start + PAGE);
            }
            page += 1;
        }
    }
    Ok(found)
}

fn add(found: &mut Vec<Range<usize>>, range: Range<usize>) {
    match found.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => found.push(range),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::{GuestRam, allocate, slots, template};
    use super::*;

    fn pages(ram: &GuestRam, numbers: &[u64]) {
        for number in numbers {
            ram.write_obj(1u8, GuestAddress(number * PAGE as u64))
                .unwrap();
        }
    }

    fn whole(ram: &GuestRam) -> Range<usize> {
        let slot = slots(ram)[0];
        slot.host_start as usize..(slot.host_start + slot.len) as usize
    }

    #[test]
    fn both_ways_find_exactly_what_was_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 << 20).unwrap();
        file.write_all_at(&[3; 1 << 20], 0).unwrap();
        let ram = template::map_file(&file, 32).unwrap();
        let all: u64 = ram.read_obj(GuestAddress(0)).unwrap();
        assert_eq!(all, 0x0303_0303_0303_0303, "reading makes no page its own");
        pages(&ram, &[0, 1, 7, 255, 8191]);
        let expected = [(0, 2), (7, 1), (255, 1), (8191, 1)]
            .map(|(page, count)| page * PAGE..(page + count) * PAGE);
        assert_eq!(private_pages(&whole(&ram)).unwrap(), expected);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        assert_eq!(read_entries(&pagemap, &whole(&ram)).unwrap(), expected);
    }

    #[test]
    fn many_single_pages_are_all_found() {
        let ram = allocate(32).unwrap();
        // Huge pages would fill the gaps.
        // SAFETY: the range is RAM of this test.
        unsafe {
            let range = whole(&ram);
            libc::madvise(range.start as *mut _, range.len(), libc::MADV_NOHUGEPAGE);
        }
        let odd: Vec<u64> = (0..4096).map(|n| n * 2 + 1).collect();
        pages(&ram, &odd);
        let found = private_pages(&whole(&ram)).unwrap();
        assert_eq!(found.len(), 4096);
        assert!(
            found
                .iter()
                .zip(odd)
                .all(|(f, n)| f.start == n as usize * PAGE)
        );
    }
}
