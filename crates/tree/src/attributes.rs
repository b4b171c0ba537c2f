//! Extended attributes, read whole.

use std::ffi::{CStr, CString};
use std::os::fd::BorrowedFd;

use rustix::fs::{fgetxattr, flistxattr, getxattr, listxattr};
use rustix::io::Errno;

/// Linux's own limits (`linux/limits.h`): XATTR_LIST_MAX, XATTR_SIZE_MAX.
const MAX: usize = 64 << 10;

/// Names and values, by a path that is followed. A file system without attributes has none.
pub fn of_path(path: &CStr) -> Result<Vec<(CString, Vec<u8>)>, Errno> {
    collect(
        |buffer| listxattr(path, buffer),
        |name, buffer| getxattr(path, name, buffer),
    )
}

/// The same of an open file.
pub fn of_file(file: BorrowedFd<'_>) -> Result<Vec<(CString, Vec<u8>)>, Errno> {
    collect(
        |buffer| flistxattr(file, buffer),
        |name, buffer| fgetxattr(file, name, buffer),
    )
}

fn collect(
    list: impl Fn(&mut [u8]) -> Result<usize, Errno>,
    get: impl Fn(&CStr, &mut [u8]) -> Result<usize, Errno>,
) -> Result<Vec<(CString, Vec<u8>)>, Errno> {
    // Nearly no file has any: ask with little first.
    let mut small = [0; 256];
    let mut large = Vec::new();
    let names = match list(&mut small) {
        Ok(length) => small.get(..length).unwrap_or_default(),
        Err(Errno::RANGE) => {
            large.resize(MAX, 0);
            let length = list(&mut large)?;
            large.get(..length).unwrap_or_default()
        }
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Vec::new()),
        Err(errno) => return Err(errno),
    };
    let mut found = Vec::new();
    let mut value = Vec::new();
    for name in names.split_inclusive(|&byte| byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        value.resize(MAX, 0);
        match get(name, &mut value) {
            Ok(length) => {
                let value = value.get(..length).unwrap_or_default().to_vec();
                found.push((name.to_owned(), value));
            }
            // Removed meanwhile, or not to be seen by this user.
            Err(Errno::NODATA | Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno),
        }
    }
    found.sort();
    Ok(found)
}
