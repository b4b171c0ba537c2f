//! Copies between this machine and guests, with the habits of `docker cp`.
//!
//! | source | destination | becomes |
//! | --- | --- | --- |
//! | a file | missing | that file |
//! | a file | a file | its content |
//! | a file | a directory | a file in it |
//! | a directory | missing | that directory |
//! | a directory | a directory | a directory in it; of `dir/.` the content |
//! | a directory | a file | an error |

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use belljar_protocol::transfer::Piece;
use belljar_protocol::v1::{self, FileType, write_file::Mode};
use belljar_tree::pack::{Options, PackError, Root, pack};
use belljar_tree::problems::Problems;
use belljar_tree::unpack::{Owner, Rules, UnpackError, Unpacker};

use super::attributes;
use super::host::{HostFile, Sending, TreeSink, failed as host_failed, send_file};
use super::places::{above, base_name, below, ends_with_slash, host_below, means_content};
use super::{Guest, failed, make_link, read, read_tree, stat, write, write_tree};
use crate::guest::GuestError;

const ENOENT: u32 = 2;

/// How a copy is made.
#[derive(Debug, Clone, Default)]
pub struct CopyOptions {
    /// With whose rights in the guest, and whose the copies are; empty: root.
    pub user: String,
    /// If the source itself is a symlink: what it points to.
    pub follow: bool,
    /// Owners are kept, by number; between guests and into one, as root.
    pub archive: bool,
}

/// What was copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copied {
    /// Of content; holes count for files, not for trees.
    pub bytes: u64,
    /// What was left out or is not quite the same: the first few, in words.
    pub problems: Vec<String>,
    /// How many there were.
    pub problems_total: u64,
}

/// A copy failed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("cannot {doing} {}: {source}", path.display())]
    Host {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot unpack to {}: {source}", path.display())]
    Unpack { path: PathBuf, source: UnpackError },
    #[error("cannot read {}: {source}", path.display())]
    Pack {
        path: PathBuf,
        source: belljar_tree::TreeError,
    },
    #[error("{0}")]
    Refused(String),
}

/// Tells how far a copy is: bytes so far, and in all if that is known.
pub type Progress<'a> = &'a mut dyn FnMut(u64, Option<u64>);

/// Adds up what [`Progress`] is told.
pub(super) struct Counter<'a> {
    done: u64,
    total: Option<u64>,
    tell: Progress<'a>,
}

impl<'a> Counter<'a> {
    fn new(total: Option<u64>, tell: Progress<'a>) -> Self {
        Self {
            done: 0,
            total,
            tell,
        }
    }

    pub(super) fn add(&mut self, count: u64) {
        self.done = self.done.saturating_add(count);
        (self.tell)(self.done, self.total);
    }

    fn piece(&mut self, piece: &Piece<'_>) {
        match piece {
            Piece::Data(data) => self.add(data.len() as u64),
            Piece::Hole(length) => self.add(*length),
            Piece::End(_) | Piece::Error(_) => {}
        }
    }
}

/// What a path of a guest is, if anything.
fn look(
    guest: &dyn Guest,
    path: &[u8],
    follow: bool,
    user: &str,
) -> Result<Option<v1::FileInfo>, GuestError> {
    let message = v1::Stat {
        path: absolute(path),
        user: user.to_owned(),
        follow,
    };
    match stat(guest, message) {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.refusal().is_some_and(|(_, errno)| errno == ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// An empty path is the root; others begin there.
fn absolute(path: &[u8]) -> Vec<u8> {
    if path.starts_with(b"/") {
        return path.to_vec();
    }
    below(b"/", path)
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// Where in a guest a source of this name goes: (path, whether a directory is there already).
fn guest_target(
    guest: &dyn Guest,
    to: &[u8],
    source: Option<&[u8]>,
    is_directory: bool,
    user: &str,
) -> Result<Vec<u8>, CopyError> {
    let to = absolute(to);
    let found = look(guest, &to, true, user)?;
    match found.map(|info| info.r#type()) {
        Some(FileType::Directory) => Ok(match source {
            Some(name) => below(&to, name),
            None => to,
        }),
        Some(_) if is_directory => Err(CopyError::Refused(format!(
            "{}:{} is no directory, and cannot become one",
            guest.called(),
            show(&to)
        ))),
        Some(_) => Ok(to),
        None if ends_with_slash(&to) && !is_directory => Err(CopyError::Refused(format!(
            "there is no directory {}:{}",
            guest.called(),
            show(&to)
        ))),
        None => {
            let above = above(&to);
            match look(guest, &above, true, user)? {
                Some(info) if info.r#type() == FileType::Directory => Ok(to),
                _ => Err(CopyError::Refused(format!(
                    "there is no directory {}:{}",
                    guest.called(),
                    show(&above)
                ))),
            }
        }
    }
}

/// Copies a file or a directory of this machine into a guest.
///
/// # Errors
/// What cannot be read, reached or written; what is left out of a tree is told in [`Copied`].
pub fn in_to_guest(
    from: &Path,
    guest: &dyn Guest,
    to: &[u8],
    options: &CopyOptions,
    progress: Progress<'_>,
) -> Result<Copied, CopyError> {
    let error = |source| host_failed("read", from, source);
    let itself = from.symlink_metadata().map_err(error)?;
    let path_bytes = from.as_os_str().as_bytes();
    let name = match base_name(path_bytes) {
        Some(name) => Some(name.to_vec()),
        None if means_content(path_bytes) => None,
        None => from
            .canonicalize()
            .ok()
            .and_then(|path| Some(path.file_name()?.as_bytes().to_vec())),
    };
    let named = |is_directory| {
        let name = name.as_deref().filter(|_| !means_content(path_bytes));
        guest_target(guest, to, name, is_directory, &options.user)
    };
    if itself.file_type().is_symlink() && !options.follow && !ends_with_slash(path_bytes) {
        // A pipe of the shell (`<(…)`) is a link to something without a path.
        let is_plain = from
            .metadata()
            .map_or(true, |info| info.is_file() || info.is_dir());
        if is_plain {
            let target = std::fs::read_link(from).map_err(error)?;
            let message = v1::MakeLink {
                path: named(false)?,
                target: target.into_os_string().as_bytes().to_vec(),
                user: options.user.clone(),
                hard: false,
            };
            make_link(guest, message)?;
            return Ok(Copied::default());
        }
    }
    let file = File::open(from).map_err(error)?;
    let info = file.metadata().map_err(error)?;
    if info.is_dir() {
        return tree_in(file.into(), from, guest, &named(true)?, options, progress);
    }
    let target = named(false)?;
    let message = v1::WriteFile {
        path: target.clone(),
        user: options.user.clone(),
        mode: Mode::Truncate.into(),
        permissions: Some(permissions(info.permissions().mode(), options)),
        set_permissions: options.archive,
        modified_ns: info.is_file().then(|| {
            info.mtime()
                .saturating_mul(1_000_000_000)
                .saturating_add(info.mtime_nsec())
        }),
        owner: if options.archive {
            format!("{}:{}", info.uid(), info.gid())
        } else {
            String::new()
        },
        ..v1::WriteFile::default()
    };
    let mut upload = write(guest, message)?;
    let mut counter = Counter::new(info.is_file().then_some(info.len()), progress);
    match send_file(&file, from, &mut upload, &mut counter) {
        Ok(()) => {}
        Err(Sending::Guest(error)) => return Err(failed(guest, error).into()),
        Err(Sending::Host(error)) => {
            // Best effort: the guest would see the cut connection anyway.
            let _ = upload.abort(v1::Error::default());
            return Err(error);
        }
    }
    let done = upload.finish().map_err(|error| failed(guest, error))?;
    let mut copied = Copied {
        bytes: done.bytes,
        ..Copied::default()
    };
    if options.archive {
        match attributes::of_host(&file) {
            Ok(all) => attributes::give(all, guest, &target, &options.user, &mut copied)?,
            Err(source) => {
                copied.problem(host_failed("read the attributes of", from, source).to_string());
            }
        }
    }
    Ok(copied)
}

fn tree_in(
    root: OwnedFd,
    from: &Path,
    guest: &dyn Guest,
    to: &[u8],
    options: &CopyOptions,
    progress: Progress<'_>,
) -> Result<Copied, CopyError> {
    let mut upload = write_tree(guest, tree_target(to, options))?;
    let how = Options {
        name: b".".to_vec(),
        xattrs: options.archive,
    };
    let mut counter = Counter::new(None, progress);
    let mut sink = TreeSink {
        upload: &mut upload,
        counter: &mut counter,
    };
    let report = match pack(Root::Directory(root), &how, &mut sink) {
        Ok(report) => report,
        Err(PackError::Sink(error)) => return Err(failed(guest, error).into()),
        Err(PackError::Tree(source)) => {
            // Best effort: the guest would see the cut connection anyway.
            let _ = upload.abort(v1::Error::default());
            return Err(CopyError::Pack {
                path: from.to_owned(),
                source,
            });
        }
    };
    let done = upload.finish().map_err(|error| failed(guest, error))?;
    let mut copied = told(&report.problems, from);
    copied.add(&done.problems, done.problems_total);
    copied.bytes = done.bytes;
    Ok(copied)
}

/// Set-id bits belong to an owner, who is kept only by an archive.
const fn permissions(mode: u32, options: &CopyOptions) -> u32 {
    mode & if options.archive { 0o7777 } else { 0o777 }
}

fn tree_target(to: &[u8], options: &CopyOptions) -> v1::WriteTree {
    let owner = if options.user.is_empty() && !options.archive {
        // Numbers of this machine mean nobody in the guest.
        "0:0".to_owned()
    } else {
        String::new()
    };
    v1::WriteTree {
        path: to.to_vec(),
        user: options.user.clone(),
        parents: true,
        owner,
        no_replace: false,
    }
}

fn told(problems: &Problems, at: &Path) -> Copied {
    let first = problems.first.iter();
    Copied {
        bytes: 0,
        problems: first
            .map(|error| format!("{}: {error}", at.display()))
            .collect(),
        problems_total: problems.total,
    }
}

impl Copied {
    pub(super) fn problem(&mut self, what: String) {
        self.problems.push(what);
        self.problems_total = self.problems_total.saturating_add(1);
    }

    fn add(&mut self, problems: &[v1::Error], total: u64) {
        let first = problems.iter().map(|error| error.message.clone());
        self.problems.extend(first);
        self.problems_total = self.problems_total.saturating_add(total);
    }
}

/// Copies a file or a directory out of a guest. Nothing of it is believed but names, modes and times.
///
/// # Errors
/// As [`in_to_guest`].
pub fn out_of_guest(
    guest: &dyn Guest,
    from: &[u8],
    to: &Path,
    options: &CopyOptions,
    progress: Progress<'_>,
) -> Result<Copied, CopyError> {
    let from = absolute(from);
    let info = source_info(guest, &from, options)?;
    let name = base_name(&from).filter(|_| !means_content(&from));
    let is_directory = info.r#type() == FileType::Directory;
    // The last part of the path is the user's own word if it is not that of the guest.
    let (target, may_follow) = match (to.metadata(), name) {
        (Ok(there), Some(name)) if there.is_dir() => (host_below(to, name), false),
        (Ok(there), _) if is_directory && !there.is_dir() => {
            return Err(CopyError::Refused(format!(
                "{} is no directory, and cannot become one",
                to.display()
            )));
        }
        (Err(_), _) if ends_with_slash(to.as_os_str().as_bytes()) && !is_directory => {
            return Err(CopyError::Refused(format!(
                "there is no directory {}",
                to.display()
            )));
        }
        _ => (to.to_owned(), true),
    };
    match info.r#type() {
        FileType::Directory => tree_out(guest, &from, &target, may_follow, options, progress),
        FileType::Symlink => {
            let link = OsStr::from_bytes(&info.target);
            let error = |source| host_failed("make symlink", &target, source);
            match std::os::unix::fs::symlink(link, &target) {
                Err(exists) if exists.kind() == io::ErrorKind::AlreadyExists => {
                    std::fs::remove_file(&target).map_err(error)?;
                    std::os::unix::fs::symlink(link, &target).map_err(error)?;
                }
                other => other.map_err(error)?,
            }
            Ok(Copied::default())
        }
        _ => file_out(
            guest, &from, info.size, &target, may_follow, options, progress,
        ),
    }
}

fn source_info(
    guest: &dyn Guest,
    from: &[u8],
    options: &CopyOptions,
) -> Result<v1::FileInfo, CopyError> {
    let message = v1::Stat {
        path: from.to_vec(),
        user: options.user.clone(),
        follow: options.follow || ends_with_slash(from) || means_content(from),
    };
    Ok(stat(guest, message)?)
}

fn reading(from: &[u8], options: &CopyOptions) -> v1::ReadFile {
    v1::ReadFile {
        path: from.to_vec(),
        user: options.user.clone(),
        sparse: true,
        no_follow: !options.follow,
        ..v1::ReadFile::default()
    }
}

fn file_out(
    guest: &dyn Guest,
    from: &[u8],
    size: u64,
    to: &Path,
    may_follow: bool,
    options: &CopyOptions,
    progress: Progress<'_>,
) -> Result<Copied, CopyError> {
    let mut counter = Counter::new((size > 0).then_some(size), progress);
    let mut file = None;
    let info = read(guest, reading(from, options), |piece| {
        // Only now is it known that the guest lets us read.
        if file.is_none() {
            file = Some(HostFile::create(to, may_follow)?);
        }
        if let Some(file) = &mut file {
            file.take(&piece)?;
        }
        counter.piece(&piece);
        Ok::<(), CopyError>(())
    })?;
    let file = match file {
        Some(file) => file,
        None => HostFile::create(to, may_follow)?,
    };
    file.finish(&info)?;
    Ok(Copied {
        bytes: counter.done,
        ..Copied::default()
    })
}

/// Mode bits of a guest's file that count here: none that give power.
const MODE_MASK: u32 = 0o777;

fn tree_out(
    guest: &dyn Guest,
    from: &[u8],
    to: &Path,
    may_follow: bool,
    options: &CopyOptions,
    progress: Progress<'_>,
) -> Result<Copied, CopyError> {
    let error = |source| host_failed("make directory", to, source);
    let new_root = match std::fs::create_dir(to) {
        Ok(()) => true,
        Err(exists) if exists.kind() == io::ErrorKind::AlreadyExists => false,
        Err(source) => return Err(error(source)),
    };
    let mut flags = libc::O_DIRECTORY;
    if !may_follow {
        // Its name is the guest's: a symlink that an earlier copy left there leads nowhere.
        flags |= libc::O_NOFOLLOW;
    }
    let root = File::options()
        .read(true)
        .custom_flags(flags)
        .open(to)
        .map_err(error)?;
    let rules = Rules {
        owner: Owner::Unpacker,
        mode_mask: MODE_MASK,
        xattrs: false,
        nodes: false,
        no_replace: false,
        new_root,
    };
    let unpacking = |source| CopyError::Unpack {
        path: to.to_owned(),
        source,
    };
    let mut unpacker = Unpacker::new(root.into(), rules);
    let mut counter = Counter::new(None, progress);
    let message = tree_source(from, options, false);
    let end = read_tree(guest, message, |piece| {
        if let Piece::Data(data) = piece {
            unpacker.feed(data).map_err(unpacking)?;
            counter.add(data.len() as u64);
        }
        Ok::<(), CopyError>(())
    })?;
    let report = unpacker.finish().map_err(unpacking)?;
    let mut copied = told(&report.problems, to);
    copied.add(&end.problems, end.problems_total);
    copied.bytes = report.bytes;
    Ok(copied)
}

fn tree_source(from: &[u8], options: &CopyOptions, xattrs: bool) -> v1::ReadTree {
    v1::ReadTree {
        path: from.to_vec(),
        user: options.user.clone(),
        name: b".".to_vec(),
        follow: options.follow || ends_with_slash(from) || means_content(from),
        xattrs,
    }
}

/// Copies from one guest to another, through this machine but not onto it.
///
/// # Errors
/// As [`in_to_guest`].
pub fn between(
    source: &dyn Guest,
    from: &[u8],
    guest: &dyn Guest,
    to: &[u8],
    options: &CopyOptions,
    progress: Progress<'_>,
) -> Result<Copied, CopyError> {
    let from = absolute(from);
    let info = source_info(source, &from, options)?;
    let kind = info.r#type();
    let name = base_name(&from).filter(|_| !means_content(&from));
    let is_directory = kind == FileType::Directory;
    let target = guest_target(guest, to, name, is_directory, &options.user)?;
    let size = (info.size > 0 && !is_directory).then_some(info.size);
    let mut counter = Counter::new(size, progress);
    match kind {
        FileType::Directory => {
            let mut upload = write_tree(guest, tree_target(&target, options))?;
            let end = read_tree(source, tree_source(&from, options, true), |piece| {
                counter.piece(&piece);
                match piece {
                    Piece::Data(data) => upload.put(data).map_err(|error| failed(guest, error)),
                    _ => Ok(()),
                }
            })?;
            let done = upload.finish().map_err(|error| failed(guest, error))?;
            let mut copied = Copied {
                bytes: done.bytes,
                ..Copied::default()
            };
            copied.add(&end.problems, end.problems_total);
            copied.add(&done.problems, done.problems_total);
            Ok(copied)
        }
        FileType::Symlink => {
            let message = v1::MakeLink {
                path: target,
                target: info.target,
                user: options.user.clone(),
                hard: false,
            };
            make_link(guest, message)?;
            Ok(Copied::default())
        }
        _ => {
            let message = v1::WriteFile {
                path: target.clone(),
                user: options.user.clone(),
                mode: Mode::Truncate.into(),
                permissions: Some(permissions(info.mode, options)),
                set_permissions: options.archive,
                modified_ns: Some(info.modified_ns),
                owner: if options.archive {
                    format!("{}:{}", info.uid, info.gid)
                } else {
                    String::new()
                },
                ..v1::WriteFile::default()
            };
            let mut upload = write(guest, message)?;
            read(source, reading(&from, options), |piece| {
                counter.piece(&piece);
                let sent = match piece {
                    Piece::Data(data) => upload.put(data),
                    Piece::Hole(length) => upload.hole(length),
                    Piece::End(_) | Piece::Error(_) => Ok(()),
                };
                sent.map_err(|error| failed(guest, error))
            })?;
            let done = upload.finish().map_err(|error| failed(guest, error))?;
            let mut copied = Copied {
                bytes: done.bytes,
                ..Copied::default()
            };
            if options.archive {
                let all = attributes::of_guest(source, &from, &options.user)?;
                attributes::give(all, guest, &target, &options.user, &mut copied)?;
            }
            Ok(copied)
        }
    }
}

/// Unpacks a tar stream into a directory of a guest.
///
/// # Errors
/// As [`in_to_guest`].
pub fn from_tar(
    mut stream: impl io::Read,
    guest: &dyn Guest,
    to: &[u8],
    options: &CopyOptions,
    progress: Progress<'_>,
) -> Result<Copied, CopyError> {
    let message = v1::WriteTree {
        parents: false,
        ..tree_target(&absolute(to), options)
    };
    let mut upload = write_tree(guest, message)?;
    let mut counter = Counter::new(None, progress);
    loop {
        match stream.read(upload.space()) {
            Ok(0) => break,
            Ok(got) => {
                upload.filled(got).map_err(|error| failed(guest, error))?;
                counter.add(got as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(host_failed("read", Path::new("-"), source)),
        }
    }
    let done = upload.finish().map_err(|error| failed(guest, error))?;
    let mut copied = Copied {
        bytes: done.bytes,
        ..Copied::default()
    };
    copied.add(&done.problems, done.problems_total);
    Ok(copied)
}

/// Writes a file or directory of a guest as a tar stream.
///
/// # Errors
/// As [`in_to_guest`].
pub fn to_tar(
    guest: &dyn Guest,
    from: &[u8],
    mut stream: impl io::Write,
    options: &CopyOptions,
    progress: Progress<'_>,
) -> Result<Copied, CopyError> {
    let from = absolute(from);
    let mut message = tree_source(&from, options, true);
    if let Some(name) = base_name(&from).filter(|_| !means_content(&from)) {
        message.name = name.to_vec();
    }
    let mut counter = Counter::new(None, progress);
    let writing = |source| host_failed("write", Path::new("-"), source);
    let end = read_tree(guest, message, |piece| {
        if let Piece::Data(data) = piece {
            stream.write_all(data).map_err(writing)?;
            counter.add(data.len() as u64);
        }
        Ok::<(), CopyError>(())
    })?;
    stream.flush().map_err(writing)?;
    let mut copied = Copied {
        bytes: counter.done,
        ..Copied::default()
    };
    copied.add(&end.problems, end.problems_total);
    Ok(copied)
}
