//! Huge pages for memory that many guests share.
//!
//! A guest's RAM is a private view of a template. What it only reads is mapped 2 MiB at a time, in its VMM and in the guest, if
//! the page cache has it so; else 4 KiB at a time, each with a fault. What `MADV_COLLAPSE` makes huge stays so as
//! long as it is in memory, for everybody who maps the file at a like address; contents stay the same.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::time::Duration;

use rustix::fs::{SeekFrom, seek};

use crate::sys::Mapping;

/// What is made huge at a time.
pub const PIECE: u64 = 2 << 20;
/// A piece of which less is data stays as it is: holes become memory in one that is huge.
const LEAST_DATA: u64 = PIECE / 4;

/// Pieces with pages that are in use otherwise are tried again after these pauses.
const AGAIN: [Duration; 3] = [
    Duration::from_millis(10),
    Duration::from_millis(50),
    Duration::from_millis(250),
];

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collapsed {
    /// Pieces that are huge now, or were before.
    pub huge: u64,
    /// Those that would be worth it and are not.
    pub refused: u64,
}

/// Has the page cache hold a finished file in huge pages, where much of 2 MiB is data. It takes a file on a tmpfs, a
/// memfd, or another file system that has huge pages; elsewhere all is refused. Waits now and then for those who use
/// its pages, 0.3 s in all at the most.
///
/// # Errors
/// The file cannot be mapped or looked through.
pub fn collapse(file: &File) -> io::Result<Collapsed> {
    let length = file.metadata()?.len();
    if length < PIECE {
        return Ok(Collapsed::default());
    }
    let mapping = Mapping::new(file, length, PIECE)?;
    let pieces = dense(file, length)?;
    Ok(collapse_each(
        pieces,
        |piece| mapping.collapse(piece),
        std::thread::sleep,
    ))
}

fn collapse_each(
    mut pieces: Vec<Range<u64>>,
    mut collapse: impl FnMut(&Range<u64>) -> io::Result<()>,
    mut wait: impl FnMut(Duration),
) -> Collapsed {
    let mut all = Collapsed::default();
    let mut pauses = AGAIN.into_iter();
    loop {
        let mut later = Vec::new();
        for piece in pieces {
            match collapse(&piece) {
                Ok(()) => all.huge = all.huge.saturating_add(1),
                Err(error) if is_in_use(&error) => later.push(piece),
                Err(_) => all.refused = all.refused.saturating_add(1),
            }
            // What is refused from the start is refused to the end.
            if all.huge == 0 && all.refused >= 4 {
                return all;
            }
        }
        let Some(pause) = pauses.next().filter(|_| !later.is_empty()) else {
            all.refused = all.refused.saturating_add(later.len() as u64);
            return all;
        };
        wait(pause);
        pieces = later;
    }
}

/// Somebody holds a page of it just then, or has locked it.
fn is_in_use(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}

/// Whole pieces with enough data. A piece without any is refused by the kernel (EINVAL).
fn dense(file: &File, length: u64) -> io::Result<Vec<Range<u64>>> {
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while let Some(data) = next_data(file, at, length)? {
        let mut start = data.start;
        while start < data.end {
            let piece = start - start % PIECE;
            let end = data.end.min(piece.saturating_add(PIECE));
            let bytes = end.saturating_sub(start);
            match pieces.last_mut() {
                Some((last, sum)) if *last == piece => *sum = sum.saturating_add(bytes),
                _ => pieces.push((piece, bytes)),
            }
            start = end;
        }
        at = data.end;
    }
    let whole = |piece: u64| piece..piece.saturating_add(PIECE);
    Ok(pieces
        .into_iter()
        .filter(|(_, bytes)| *bytes >= LEAST_DATA)
        .map(|(piece, _)| whole(piece))
        .filter(|piece| piece.end <= length)
        .collect())
}

/// The next run of data that begins at `at` or later.
pub(crate) fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<Range<u64>>> {
    if at >= length {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < length => start,
        Ok(_) | Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let end = seek(file, SeekFrom::Hole(start))?.min(length);
    Ok(Some(start..end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    fn memfd(length: u64) -> File {
        let file: File = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC)
            .unwrap()
            .into();
        file.set_len(length).unwrap();
        file
    }

    #[test]
    fn contents_stay_and_what_is_nearly_empty_stays_small() {
        let file = memfd(5 * PIECE + 4096);
        let bytes: Vec<u8> = (0..PIECE as usize).map(|at| (at / 7) as u8).collect();
        // A whole one, a third with a gap in front, one page, nothing, a whole one, and an end that is none.
        file.write_all_at(&bytes, 0).unwrap();
        let third = bytes.len() / 3 / 4096 * 4096;
        file.write_all_at(&bytes[..third], PIECE + 8192).unwrap();
        file.write_all_at(&[9; 4096], 2 * PIECE).unwrap();
        file.write_all_at(&bytes, 4 * PIECE).unwrap();
        file.write_all_at(b"end", 5 * PIECE).unwrap();
        let before = read(&file);
        let pieces = dense(&file, 5 * PIECE + 4096).unwrap();
        let starts: Vec<u64> = pieces.iter().map(|piece| piece.start / PIECE).collect();
        assert_eq!(starts, [0, 1, 4]);
        let done = collapse(&file).unwrap();
        assert_eq!(done.huge + done.refused, 3, "{done:?}");
        assert!(read(&file) == before, "contents changed");
        let blocks = file.metadata().unwrap().blocks() * 512;
        assert!(blocks <= 3 * PIECE + 2 * 4096, "{blocks} bytes, {done:?}");
        // And once more: what is huge is found so. What was refused for want of memory may not be any more.
        let again = collapse(&file).unwrap();
        assert!(again.huge >= done.huge, "{done:?} {again:?}");
        assert_eq!(again.huge + again.refused, 3, "{again:?}");
    }

    #[test]
    fn far_apart_in_a_large_file_all_become_huge() {
        let apart = 128 << 20;
        let file = memfd(12 * apart);
        let bytes = vec![5; PIECE as usize];
        for number in 0..12 {
            file.write_all_at(&bytes, number * apart).unwrap();
        }
        let done = collapse(&file).unwrap();
        if done.huge == 0 {
            eprintln!("skipped: no huge pages for files here");
            return;
        }
        assert_eq!((done.huge, done.refused), (12, 0));
    }

    fn read(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn pieces_that_are_in_use_are_tried_again_but_not_for_ever() {
        let pieces: Vec<_> = (0..9).map(|at| at * PIECE..(at + 1) * PIECE).collect();
        let mut tried = std::collections::BTreeMap::<u64, u32>::new();
        let mut waited = Vec::new();
        // The first three for a while, the fourth for ever, the fifth is refused.
        let collapse = |piece: &Range<u64>| {
            let number = piece.start / PIECE;
            let times = tried.entry(number).or_default();
            *times += 1;
            let errno = match number {
                0..=2 if u64::from(*times) <= number => libc::EAGAIN,
                3 => libc::EBUSY,
                4 => libc::EINVAL,
                _ => return Ok(()),
            };
            Err(io::Error::from_raw_os_error(errno))
        };
        let done = collapse_each(pieces.clone(), collapse, |pause| waited.push(pause));
        assert_eq!((done.huge, done.refused), (7, 2));
        assert_eq!(waited, AGAIN);
        let times: Vec<u32> = tried.into_values().collect();
        assert_eq!(times, [1, 2, 3, 4, 1, 1, 1, 1, 1]);
        // Where there are no huge pages, little is tried.
        let mut tried = 0;
        let refuse = |_: &Range<u64>| {
            tried += 1;
            Err(io::Error::from_raw_os_error(libc::EINVAL))
        };
        let done = collapse_each(pieces, refuse, |_| panic!("nothing to wait for"));
        assert_eq!((done.huge, done.refused, tried), (0, 4, 4));
    }

    #[test]
    fn empty_and_short_files_are_left_alone() {
        for length in [0, 4096, PIECE, 3 * PIECE] {
            assert_eq!(collapse(&memfd(length)).unwrap(), Collapsed::default());
        }
    }
}
