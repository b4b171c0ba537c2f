//! Directories: a stream of pages, or one page with a cursor.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use belljar_protocol::v1::{self, reply::Result as Answer};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, statx};
use rustix::io::Errno;

use super::info::{Names, STATX, describe, file_type, kind};
use super::path::GuestPath;
use super::rights::Rights;
use super::{failed, system_error};
use crate::worker::conn::Conn;
use crate::worker::{Answered, Context, Outcome};

/// Bytes of entries asked of the kernel at once.
const BUFFER: usize = 64 << 10;

/// A page is sent when it has about this many bytes.
const PAGE: usize = 48 << 10;

/// Most entries of one call with a limit: they are sorted in memory.
const MAX_LIMIT: usize = 16_384;

/// Bytes of an entry beside its names, about.
const ENTRY: usize = 12;
const DETAILS: usize = 90;

pub(super) fn list(context: &Context, conn: &mut Conn, call: &v1::ListDirectory) -> Answered {
    let path = GuestPath::new(&call.path)?;
    let rights = Rights::of(&call.user)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let folder = rights
        .open(&path, flags, Mode::empty())
        .map_err(|errno| failed("list directory", &path, errno))?;
    let started = context.head(Answer::ListDirectory(v1::ListingStarted {}));
    let mut pages = Pages {
        conn,
        folder: folder.as_fd(),
        details: call.details,
        names: Names::default(),
        page: v1::DirectoryPage::default(),
        bytes: 0,
    };
    pages.conn.send(&started)?;
    let listed = match usize::try_from(call.limit).unwrap_or(MAX_LIMIT) {
        0 if call.cursor.is_empty() => all(&mut pages),
        limit => some(&mut pages, &call.cursor, limit),
    };
    match listed {
        Ok(cursor) => pages.page.cursor = cursor,
        Err(Stop::System(errno)) => {
            pages.page.error = Some(system_error(
                format_args!("cannot list directory {path}"),
                errno,
            ));
        }
        Err(Stop::Gone(error)) => return Err(error.into()),
    }
    pages.page.last = true;
    pages.flush()?;
    Ok(Outcome::Streamed)
}

/// Why a listing ends early.
enum Stop {
    System(Errno),
    Gone(crate::worker::conn::ConnError),
}

/// Each entry but "." and "..", in the order of the file system.
fn each(
    folder: BorrowedFd<'_>,
    mut take: impl FnMut(&CStr, FileType) -> Result<(), Stop>,
) -> Result<(), Stop> {
    let mut buffer = vec![MaybeUninit::uninit(); BUFFER];
    let mut entries = RawDir::new(folder, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(Stop::System)?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            take(entry.file_name(), entry.file_type())?;
        }
    }
    Ok(())
}

fn all(pages: &mut Pages<'_, '_>) -> Result<Vec<u8>, Stop> {
    each(pages.folder, |name, said| pages.add(name, said))?;
    Ok(Vec::new())
}

/// The first `limit` names behind the cursor, in the order of their bytes. The whole directory is read
/// each time: offsets into a directory do not outlive a change of it on every file system.
fn some(pages: &mut Pages<'_, '_>, cursor: &[u8], limit: usize) -> Result<Vec<u8>, Stop> {
    let mut first = Smallest::new(limit, cursor);
    each(pages.folder, |name, said| {
        first.offer(name, said);
        Ok(())
    })?;
    let cursor = first.cursor();
    for (name, said) in &first.names {
        pages.add(name, *said)?;
    }
    Ok(cursor)
}

/// The smallest few names behind a cursor.
struct Smallest<'a> {
    limit: usize,
    cursor: &'a [u8],
    names: BTreeMap<CString, FileType>,
    more: bool,
}

impl<'a> Smallest<'a> {
    fn new(limit: usize, cursor: &'a [u8]) -> Self {
        let limit = if limit == 0 { MAX_LIMIT } else { limit };
        Self {
            limit: limit.min(MAX_LIMIT),
            cursor,
            names: BTreeMap::new(),
            more: false,
        }
    }

    fn offer(&mut self, name: &CStr, said: FileType) {
        if name.to_bytes() <= self.cursor {
            return;
        }
        if self.names.len() >= self.limit {
            self.more = true;
            if self
                .names
                .last_key_value()
                .is_some_and(|(last, _)| last.as_c_str() <= name)
            {
                return;
            }
        }
        self.names.insert(name.to_owned(), said);
        if self.names.len() > self.limit {
            self.names.pop_last();
        }
    }

    fn cursor(&self) -> Vec<u8> {
        match self.names.last_key_value() {
            Some((last, _)) if self.more => last.to_bytes().to_vec(),
            _ => Vec::new(),
        }
    }
}

struct Pages<'a, 'b> {
    conn: &'a mut Conn,
    folder: BorrowedFd<'b>,
    details: bool,
    names: Names,
    page: v1::DirectoryPage,
    /// Of the page, about.
    bytes: usize,
}

impl Pages<'_, '_> {
    fn add(&mut self, name: &CStr, said: FileType) -> Result<(), Stop> {
        let mut entry = v1::DirectoryEntry {
            name: name.to_bytes().to_vec(),
            r#type: kind(said).into(),
            info: None,
        };
        self.bytes += entry.name.len() + ENTRY;
        if self.details || said == FileType::Unknown {
            match statx(self.folder, name, AtFlags::SYMLINK_NOFOLLOW, STATX) {
                Ok(found) => {
                    let is = file_type(&found);
                    entry.r#type = kind(is).into();
                    if self.details {
                        let mut info = describe(&found, &mut self.names);
                        if is == FileType::Symlink {
                            info.target = rustix::fs::readlinkat(self.folder, name, Vec::new())
                                .map(Into::into)
                                .unwrap_or_default();
                        }
                        self.bytes += DETAILS + info.target.len();
                        entry.info = Some(info);
                    }
                }
                // Removed meanwhile.
                Err(Errno::NOENT) => return Ok(()),
                // The directory may be read but not searched: the name is all there is.
                Err(_) => {}
            }
        }
        self.page.entries.push(entry);
        if self.bytes >= PAGE {
            self.flush().map_err(Stop::Gone)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), crate::worker::conn::ConnError> {
        self.conn.send(&self.page)?;
        self.page.entries.clear();
        self.bytes = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pages_hold_each_name_once_whatever_comes_and_goes(
            stay in proptest::collection::btree_set("[a-z]{1,4}", 0..60),
            pass in proptest::collection::vec("[a-z]{1,4}", 0..20),
            limit in 1..20_usize,
        ) {
            let mut cursor = Vec::new();
            let mut listed = Vec::new();
            for round in 0.. {
                // Some other name is there in one round and not in the next.
                let mut now: BTreeSet<&String> = stay.iter().collect();
                now.extend(pass.get(round % 21..).and_then(<[_]>::first));
                let mut page = Smallest::new(limit, &cursor);
                for name in now.iter().rev() {
                    page.offer(&CString::new(name.as_str()).unwrap(), FileType::RegularFile);
                }
                prop_assert!(page.names.len() <= limit);
                listed.extend(page.names.keys().map(|name| name.clone().into_string().unwrap()));
                cursor = page.cursor();
                if cursor.is_empty() {
                    break;
                }
            }
            let once: BTreeSet<_> = listed.iter().collect();
            prop_assert_eq!(once.len(), listed.len());
            prop_assert!(stay.iter().all(|name| once.contains(name)));
        }
    }
}
