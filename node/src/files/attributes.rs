//! Extended attributes that go along with a single file. (A tree's stream carries its own.)

use std::fs::File;
use std::os::fd::AsFd;

use belljar_protocol::v1;

use super::copy::Copied;
use super::{Guest, xattrs};
use crate::guest::GuestError;

/// Of a file of this machine. `Err`: why they cannot be read.
pub(super) fn of_host(file: &File) -> std::io::Result<Vec<v1::Xattr>> {
    let list = belljar_tree::attributes::of_file(file.as_fd())?;
    let xattr = |(name, value): (std::ffi::CString, _)| v1::Xattr {
        name: name.into_bytes(),
        value,
    };
    Ok(list.into_iter().map(xattr).collect())
}

/// Of a guest's file.
pub(super) fn of_guest(
    guest: &dyn Guest,
    path: &[u8],
    user: &str,
) -> Result<Vec<v1::Xattr>, GuestError> {
    let message = v1::Xattrs {
        path: path.to_vec(),
        user: user.to_owned(),
        follow: true,
        ..v1::Xattrs::default()
    };
    Ok(xattrs(guest, message)?.xattrs)
}

/// Gives them to a guest's file, one by one: what its file system or the user's rights do not allow is a problem
/// of that attribute alone.
pub(super) fn give(
    all: Vec<v1::Xattr>,
    guest: &dyn Guest,
    path: &[u8],
    user: &str,
    copied: &mut Copied,
) -> Result<(), GuestError> {
    for xattr in all {
        let message = v1::Xattrs {
            path: path.to_vec(),
            user: user.to_owned(),
            follow: true,
            set: vec![xattr],
            remove: Vec::new(),
        };
        match xattrs(guest, message) {
            Err(error) if error.refusal().is_some() => copied.problem(error.to_string()),
            other => drop(other?),
        }
    }
    Ok(())
}
