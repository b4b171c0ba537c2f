//! What a file is: `stat`, `stat_fs`, and names for the numbers of users and groups.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;

use belljar_protocol::v1::{self, FileType as Kind};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Statx, StatxFlags, fstatfs, fstatvfs, statx,
};

use super::failed;
use super::path::GuestPath;
use super::rights::Rights;
use crate::exec::users;

pub(super) const PASSWD: &str = "/etc/passwd";
pub(super) const GROUP: &str = "/etc/group";

/// Most bytes taken of such a file.
const MAX_DATABASE: u64 = 4 << 20;

/// Numbers whose names one call remembers.
const MAX_NAMES: usize = 4096;

/// The content of passwd or group; empty if there is none. Any content is possible, a FIFO too.
pub(super) fn database(path: &str) -> Vec<u8> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut content = Vec::new();
    if let Ok(fd) = rustix::fs::open(path, flags, Mode::empty()) {
        // What cannot be read has no names.
        let _ = File::from(fd).take(MAX_DATABASE).read_to_end(&mut content);
    }
    content
}

/// Names for numbers, looked up once a call.
#[derive(Debug, Default)]
pub(super) struct Names {
    databases: Option<(Vec<u8>, Vec<u8>)>,
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    fn user(&mut self, uid: u32) -> String {
        let (passwd, _) = self.databases.get_or_insert_with(read_databases);
        name(&mut self.users, uid, || users::user_name(passwd, uid))
    }

    fn group(&mut self, gid: u32) -> String {
        let (_, group) = self.databases.get_or_insert_with(read_databases);
        name(&mut self.groups, gid, || users::group_name(group, gid))
    }
}

fn read_databases() -> (Vec<u8>, Vec<u8>) {
    (database(PASSWD), database(GROUP))
}

fn name<'a>(
    known: &mut HashMap<u32, String>,
    id: u32,
    find: impl FnOnce() -> Option<&'a [u8]>,
) -> String {
    if let Some(name) = known.get(&id) {
        return name.clone();
    }
    let name = String::from_utf8_lossy(find().unwrap_or_default()).into_owned();
    if known.len() < MAX_NAMES {
        known.insert(id, name.clone());
    }
    name
}

/// The type for the protocol.
pub(super) const fn kind(kind: FileType) -> Kind {
    match kind {
        FileType::RegularFile => Kind::Regular,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::CharacterDevice => Kind::CharacterDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Unknown => Kind::Unknown,
    }
}

/// What everything about a file is made of.
pub(super) const STATX: StatxFlags = StatxFlags::BASIC_STATS;

/// The type of a file.
pub(super) fn file_type(found: &Statx) -> FileType {
    FileType::from_raw_mode(found.stx_mode.into())
}

/// For the reply, without the target of a symlink.
pub(super) fn describe(found: &Statx, names: &mut Names) -> v1::FileInfo {
    let time = |time: rustix::fs::StatxTimestamp| {
        time.tv_sec
            .saturating_mul(1_000_000_000)
            .saturating_add(time.tv_nsec.into())
    };
    v1::FileInfo {
        r#type: kind(file_type(found)).into(),
        mode: u32::from(found.stx_mode) & 0o7777,
        uid: found.stx_uid,
        gid: found.stx_gid,
        size: found.stx_size,
        allocated: found.stx_blocks.saturating_mul(512),
        links: found.stx_nlink.into(),
        inode: found.stx_ino,
        device: rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor),
        rdev: rustix::fs::makedev(found.stx_rdev_major, found.stx_rdev_minor),
        modified_ns: time(found.stx_mtime),
        accessed_ns: time(found.stx_atime),
        changed_ns: time(found.stx_ctime),
        user_name: names.user(found.stx_uid),
        group_name: names.group(found.stx_gid),
        target: Vec::new(),
    }
}

/// What an open descriptor refers to.
pub(super) fn of_descriptor(fd: BorrowedFd<'_>) -> rustix::io::Result<Statx> {
    statx(fd, c"", AtFlags::EMPTY_PATH, STATX)
}

pub(super) fn stat(call: &v1::Stat) -> Result<v1::FileInfo, super::super::Failure> {
    let path = GuestPath::new(&call.path)?;
    let rights = Rights::of(&call.user)?;
    let flags = if call.follow {
        AtFlags::empty()
    } else {
        AtFlags::SYMLINK_NOFOLLOW
    };
    let found =
        statx(CWD, path.as_c_str(), flags, STATX).map_err(|errno| failed("stat", &path, errno))?;
    let mut info = describe(&found, &mut Names::default());
    if file_type(&found) == FileType::Symlink {
        // Gone meanwhile, or not: then it has no target to tell.
        info.target = rustix::fs::readlink(path.as_c_str(), Vec::new())
            .map(Into::into)
            .unwrap_or_default();
    }
    drop(rights);
    Ok(info)
}

pub(super) fn stat_fs(call: &v1::StatFs) -> Result<v1::FileSystemInfo, super::super::Failure> {
    let path = GuestPath::new(&call.path)?;
    let rights = Rights::of(&call.user)?;
    let look = || {
        let fd = rights.find(&path, true)?;
        Ok((fstatfs(&fd)?, fstatvfs(&fd)?))
    };
    let (kind, found) = look().map_err(|errno| failed("tell the file system of", &path, errno))?;
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    Ok(v1::FileSystemInfo {
        r#type: file_system(kind.f_type as u64),
        total: bytes(found.f_blocks),
        free: bytes(found.f_bfree),
        available: bytes(found.f_bavail),
        files_total: found.f_files,
        files_free: found.f_ffree,
    })
}

/// Names of file systems by their magic numbers (`linux/magic.h`).
fn file_system(magic: u64) -> String {
    match magic & 0xffff_ffff {
        0xef53 => "ext4",
        0x794c_7630 => "overlay",
        0x0102_1994 => "tmpfs",
        0xe0f5_e1e2 => "erofs",
        0x9fa0 => "proc",
        0x6265_6572 => "sysfs",
        0x6367_7270 => "cgroup2",
        0x9123_683e => "btrfs",
        0x5846_5342 => "xfs",
        0x8584_58f6 => "ramfs",
        0x1cd1 => "devpts",
        0x6573_5546 => "fuse",
        0x7371_7368 => "squashfs",
        other => return format!("{other:#x}"),
    }
    .to_owned()
}
