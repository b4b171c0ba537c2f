//! Descriptors that this process was started with (`--fd NAME=N`).
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Takes ownership of inherited descriptors, which stay open across `exec` no longer. Works
/// once per process, and must come before anything else opens descriptors.
///
/// `list` has no number twice and none below 3 (checked where the command line is parsed).
/// Fails with the name of a descriptor that is not open.
pub fn adopt(list: &[(String, RawFd)]) -> Result<Vec<(String, OwnedFd)>, (String, io::Error)> {
    static ADOPTED: AtomicBool = AtomicBool::new(false);
    if list.is_empty() {
        return Ok(Vec::new());
    }
    if ADOPTED.swap(true, Ordering::AcqRel) {
        let name = list.first().map(|(n, _)| n.clone()).unwrap_or_default();
        return Err((name, io::ErrorKind::AlreadyExists.into()));
    }
    let mut owned = Vec::with_capacity(list.len());
    for (i, (name, number)) in list.iter().enumerate() {
        let twice = list.iter().take(i).any(|(_, other)| other == number);
        if *number < 3 || twice {
            return Err((name.clone(), io::ErrorKind::InvalidInput.into()));
        }
        // SAFETY: F_SETFD takes no pointers; it fails with EBADF if the descriptor is not open.
        let set = unsafe { libc::fcntl(*number, libc::F_SETFD, libc::FD_CLOEXEC) };
        if set < 0 {
            return Err((name.clone(), io::Error::last_os_error()));
        }
        // SAFETY: it is open (see above), named once in the list, not a standard stream, and
        // this function runs once, before the process has opened any other: nobody owns it.
        owned.push((name.clone(), unsafe { OwnedFd::from_raw_fd(*number) }));
    }
    Ok(owned)
}
