//! Files of a guest: a function for each call, and copies between host and guests.

mod attributes;
mod copy;
mod host;
mod places;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_protocol::client::{CallError, files};
use belljar_protocol::v1;

use crate::guest::{GuestError, soon};
use crate::registry::{ConnectError, Found};

pub use belljar_protocol::client::files::{Download, Upload};
pub use belljar_protocol::transfer::Piece;
pub use copy::{
    Copied, CopyError, CopyOptions, Progress, between, from_tar, in_to_guest, out_of_guest, to_tar,
};
pub use places::Place;

/// A guest that neither sends nor takes a byte of a file for so long is given up.
pub const IDLE: Duration = Duration::from_secs(120);

/// Something that has an agent: a sandbox, or in tests an agent by itself.
pub trait Guest {
    /// Connects to the agent.
    ///
    /// # Errors
    /// It does not run, or does not answer in time.
    fn agent(&self, deadline: Instant) -> Result<UnixStream, ConnectError>;

    /// What messages call it.
    fn called(&self) -> String;
}

impl Guest for Found {
    fn agent(&self, deadline: Instant) -> Result<UnixStream, ConnectError> {
        Self::agent(self, deadline)
    }

    fn called(&self) -> String {
        Self::called(self)
    }
}

/// Connects and makes one call; `deadline` bounds it, `None`: only the connecting.
fn call<T>(
    guest: &dyn Guest,
    deadline: Option<Instant>,
    call: impl FnOnce(UnixStream, Option<Instant>) -> Result<T, CallError>,
) -> Result<T, GuestError> {
    let stream = guest.agent(deadline.unwrap_or_else(soon))?;
    call(stream, deadline).map_err(|source| failed(guest, source))
}

fn failed(guest: &dyn Guest, source: CallError) -> GuestError {
    GuestError::Call {
        id: guest.called(),
        source,
    }
}

/// Makes a function for a call with a single reply; the second form is for calls that may take long.
macro_rules! simple {
    ($(#[$doc:meta])* $name:ident, $message:ident -> $result:ty, $deadline:expr) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// The guest cannot be reached, or refuses.
        pub fn $name(guest: &dyn Guest, message: v1::$message) -> Result<$result, GuestError> {
            call(guest, $deadline, |stream, deadline| {
                files::$name(stream, message, deadline)
            })
        }
    };
}

simple! {
    /// What a path is.
    stat, Stat -> v1::FileInfo, Some(soon())
}
simple! {
    /// Makes a directory.
    make_directory, MakeDirectory -> v1::Changed, Some(soon())
}
simple! {
    /// Removes a file, or a tree.
    remove, Remove -> v1::Changed, None
}
simple! {
    /// Gives a file another name.
    rename, Rename -> v1::Changed, Some(soon())
}
simple! {
    /// Copies within the guest.
    copy, CopyPath -> v1::Changed, None
}
simple! {
    /// Makes a symlink or another name for a file.
    make_link, MakeLink -> v1::Changed, Some(soon())
}
simple! {
    /// Mode, owner, times, length, of a file or a tree.
    change, Change -> v1::Changed, None
}
simple! {
    /// Sets, removes and lists extended attributes.
    xattrs, Xattrs -> v1::XattrList, Some(soon())
}
simple! {
    /// How full a file system is.
    stat_fs, StatFs -> v1::FileSystemInfo, Some(soon())
}

/// Lists a directory; `take` gets each entry as it comes. Returns the cursor to go on with, if a limit was
/// given and there is more.
///
/// # Errors
/// The guest cannot be reached, refuses, or fails half-way; or `take` failed.
pub fn list<E: From<GuestError>>(
    guest: &dyn Guest,
    message: v1::ListDirectory,
    mut take: impl FnMut(v1::DirectoryEntry) -> Result<(), E>,
) -> Result<Vec<u8>, E> {
    let stream = guest.agent(soon()).map_err(GuestError::from)?;
    let mut own = None;
    let listed = files::list_directory(stream, message, Some(IDLE), |entry| {
        take(entry).map_err(|error| {
            own = Some(error);
            CallError::Unexpected("list_directory")
        })
    });
    match (listed, own) {
        (_, Some(error)) => Err(error),
        (Ok(cursor), None) => Ok(cursor),
        (Err(source), None) => Err(failed(guest, source).into()),
    }
}

/// Reads a file, or a range of it; `take` gets data and holes as they come.
///
/// # Errors
/// The guest cannot be reached, refuses, or fails half-way; or `take` failed.
pub fn read<E: From<GuestError>>(
    guest: &dyn Guest,
    message: v1::ReadFile,
    take: impl FnMut(Piece<'_>) -> Result<(), E>,
) -> Result<v1::FileInfo, E> {
    let started = call(guest, None, |stream, _| {
        files::read_file(stream, message, Some(soon()))
    });
    let (info, download) = started.map_err(E::from)?;
    drain(guest, download, take)?;
    Ok(info)
}

/// Reads a tree as a tar stream. The end says what was left out.
///
/// # Errors
/// The guest cannot be reached, refuses, or fails half-way; or `take` failed.
pub fn read_tree<E: From<GuestError>>(
    guest: &dyn Guest,
    message: v1::ReadTree,
    take: impl FnMut(Piece<'_>) -> Result<(), E>,
) -> Result<v1::TransferEnd, E> {
    let started = call(guest, None, |stream, _| {
        files::read_tree(stream, message, Some(soon()))
    });
    let (_, download) = started.map_err(E::from)?;
    drain(guest, download, take)
}

/// An error of the guest, or of whoever takes what it sends.
enum Either<E> {
    Call(CallError),
    Own(E),
}

impl<E> From<CallError> for Either<E> {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

fn drain<E: From<GuestError>>(
    guest: &dyn Guest,
    download: Download<UnixStream>,
    mut take: impl FnMut(Piece<'_>) -> Result<(), E>,
) -> Result<v1::TransferEnd, E> {
    let end = download.run(Some(IDLE), |piece| take(piece).map_err(Either::Own));
    end.map_err(|error| match error {
        Either::Call(source) => failed(guest, source).into(),
        Either::Own(error) => error,
    })
}

/// Begins to write a file.
///
/// # Errors
/// The guest cannot be reached, or refuses.
pub fn write(guest: &dyn Guest, message: v1::WriteFile) -> Result<Upload<UnixStream>, GuestError> {
    call(guest, None, |stream, _| {
        files::write_file(stream, message, Some(IDLE))
    })
}

/// Begins to write a tree, a tar stream.
///
/// # Errors
/// The guest cannot be reached, or refuses.
pub fn write_tree(
    guest: &dyn Guest,
    message: v1::WriteTree,
) -> Result<Upload<UnixStream>, GuestError> {
    call(guest, None, |stream, _| {
        files::write_tree(stream, message, Some(IDLE))
    })
}
