//! What is there.

use std::ffi::OsString;
use std::io::{self, BufWriter, Write, stdout};

use belljar_node::files;
use belljar_node::guest::GuestError;
use belljar_node::v1::{self, FileType};
use serde_json::{Value, json};

use super::{Where, bytes};
use crate::failure::Failure;
use crate::output::{self, Format, OutputOption, Table, escaped, escaped_bytes, not_text};

/// Tell all about files
#[derive(Debug, clap::Args)]
pub(super) struct Stat {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,

    /// What symlinks point to
    #[arg(short = 'L', long)]
    follow: bool,

    #[command(flatten)]
    output: OutputOption,
}

impl Stat {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let found = self.at.find()?;
        let mut all = Vec::new();
        let status = super::each(&self.paths, |path| {
            let message = v1::Stat {
                path: path.clone(),
                user: self.at.user(),
                follow: self.follow,
            };
            all.push((path, files::stat(&found, message)?));
            Ok(())
        })?;
        match self.output.format() {
            Format::Json => {
                let all: Vec<Value> = all
                    .iter()
                    .map(|(path, info)| with_name("path", path, Some(info), info.r#type()))
                    .collect();
                output::print_json(&all);
            }
            Format::Table => {
                let mut table = Table::new(&[
                    "MODE",
                    "LINKS",
                    "OWNER",
                    "GROUP",
                    "SIZE",
                    "ALLOCATED",
                    "INODE",
                    "CHANGED",
                    "PATH",
                ]);
                for (path, info) in &all {
                    table.row(&[
                        &mode(info),
                        &info.links.to_string(),
                        &owner(&info.user_name, info.uid),
                        &owner(&info.group_name, info.gid),
                        &info.size.to_string(),
                        &output::size(info.allocated),
                        &info.inode.to_string(),
                        &time(info.modified_ns),
                        &named(path, Some(info)),
                    ]);
                }
                output::print(&table.render());
            }
        }
        Ok(status)
    }
}

/// List a directory
///
/// Names are printed as they come; with --limit sorted, and --after goes on behind a name.
#[derive(Debug, clap::Args)]
pub(super) struct Ls {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "PATH", default_value = "/", hide_default_value = true)]
    path: OsString,

    /// Everything about each entry
    #[arg(short, long)]
    long: bool,

    /// At most so many entries, sorted
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,

    /// Those that come behind this name, sorted
    #[arg(long, value_name = "NAME")]
    after: Option<OsString>,

    #[command(flatten)]
    output: OutputOption,
}

/// Why listing ended.
enum Ended {
    Guest(GuestError),
    Output(io::Error),
}

impl From<GuestError> for Ended {
    fn from(error: GuestError) -> Self {
        Self::Guest(error)
    }
}

impl Ls {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let found = self.at.find()?;
        let format = self.output.format();
        let mut message = v1::ListDirectory {
            path: bytes(&self.path),
            user: self.at.user(),
            details: self.long,
            limit: self.limit.unwrap_or(0),
            cursor: self.after.as_deref().map(bytes).unwrap_or_default(),
        };
        let mut out = BufWriter::new(stdout().lock());
        let mut left = self.limit;
        let mut list = || -> Result<(), Ended> {
            loop {
                let cursor = files::list(&found, message.clone(), |entry| {
                    left = left.map(|left| left.saturating_sub(1));
                    line(&entry, self.long, format, &mut out).map_err(Ended::Output)
                })?;
                // The agent may send fewer than asked for.
                if cursor.is_empty() || left == Some(0) {
                    return out.flush().map_err(Ended::Output);
                }
                message.cursor = cursor;
                message.limit = left.unwrap_or(0);
            }
        };
        match list() {
            Ok(()) => Ok(0),
            Err(Ended::Guest(error)) => Err(error.into()),
            // Nobody reads it any more: as after SIGPIPE.
            Err(Ended::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(141),
            Err(Ended::Output(error)) => Err(Failure::new(format!(
                "cannot write standard output: {error}"
            ))),
        }
    }
}

/// One entry; JSON is a document a line, since directories may be long.
fn line(
    entry: &v1::DirectoryEntry,
    long: bool,
    format: Format,
    out: &mut impl Write,
) -> io::Result<()> {
    let info = entry.info.as_ref();
    match format {
        Format::Json => {
            serde_json::to_writer(
                &mut *out,
                &with_name("name", &entry.name, info, entry.r#type()),
            )?;
            writeln!(out)
        }
        Format::Table => match info {
            Some(info) if long => writeln!(
                out,
                "{} {:>3} {:<8} {:<8} {:>12} {} {}",
                mode(info),
                info.links,
                owner(&info.user_name, info.uid),
                owner(&info.group_name, info.gid),
                info.size,
                time(info.modified_ns),
                named(&entry.name, Some(info))
            ),
            _ => writeln!(
                out,
                "{}{}",
                escaped_bytes(&entry.name),
                mark(entry.r#type())
            ),
        },
    }
}

/// Tell how full a file system is
#[derive(Debug, clap::Args)]
pub(super) struct Df {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "PATH", default_value = "/", hide_default_value = true)]
    path: OsString,

    #[command(flatten)]
    output: OutputOption,
}

impl Df {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let message = v1::StatFs {
            path: bytes(&self.path),
            user: self.at.user(),
        };
        let info = files::stat_fs(&self.at.find()?, message)?;
        match self.output.format() {
            Format::Json => output::print_json(&json!({
                "type": info.r#type,
                "total": info.total,
                "free": info.free,
                "available": info.available,
                "files_total": info.files_total,
                "files_free": info.files_free,
            })),
            Format::Table => {
                let mut table =
                    Table::new(&["TYPE", "SIZE", "USED", "AVAILABLE", "FILES", "FILES FREE"]);
                table.row(&[
                    &info.r#type,
                    &output::size(info.total),
                    &output::size(info.total.saturating_sub(info.free)),
                    &output::size(info.available),
                    &info.files_total.to_string(),
                    &info.files_free.to_string(),
                ]);
                output::print(&table.render());
            }
        }
        Ok(0)
    }
}

/// List, set and remove extended attributes
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar fs xattr box /srv/file
  belljar fs xattr --set user.origin=web box /srv/file
  belljar fs xattr --remove user.origin box /srv/file")]
pub(super) struct Xattr {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "PATH")]
    path: OsString,

    /// Set one, several times if need be
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<OsString>,

    /// Remove one, several times if need be
    #[arg(long, value_name = "NAME")]
    remove: Vec<OsString>,

    /// Of a symlink itself
    #[arg(short = 'n', long)]
    no_follow: bool,

    #[command(flatten)]
    output: OutputOption,
}

impl Xattr {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let set = self
            .set
            .iter()
            .map(|pair| {
                let pair = bytes(pair);
                let equals = pair.iter().position(|&byte| byte == b'=')?;
                let (name, value) = pair.split_at(equals);
                Some(v1::Xattr {
                    name: name.to_vec(),
                    value: value.get(1..)?.to_vec(),
                })
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| Failure::new("--set takes NAME=VALUE"))?;
        let message = v1::Xattrs {
            path: bytes(&self.path),
            user: self.at.user(),
            follow: !self.no_follow,
            set,
            remove: self.remove.iter().map(|name| bytes(name)).collect(),
        };
        let list = files::xattrs(&self.at.find()?, message)?;
        match self.output.format() {
            Format::Json => {
                let all: Vec<Value> = list
                    .xattrs
                    .iter()
                    .map(|xattr| {
                        json!({
                            "name": String::from_utf8_lossy(&xattr.name),
                            "value": String::from_utf8_lossy(&xattr.value),
                            "value_bytes": not_text(&xattr.value),
                        })
                    })
                    .collect();
                output::print_json(&all);
            }
            Format::Table => {
                let mut table = Table::new(&["NAME", "VALUE"]);
                for xattr in &list.xattrs {
                    table.row(&[
                        &String::from_utf8_lossy(&xattr.name),
                        &escaped_bytes(&xattr.value),
                    ]);
                }
                output::print(&table.render());
            }
        }
        Ok(0)
    }
}

fn with_name(key: &str, name: &[u8], info: Option<&v1::FileInfo>, kind: FileType) -> Value {
    let mut value = json!({
        key: String::from_utf8_lossy(name),
        "type": word(kind),
    });
    let Some(object) = value.as_object_mut() else {
        return value;
    };
    if let Some(bytes) = not_text(name) {
        object.insert(format!("{key}_bytes"), json!(bytes));
    }
    if let Some(info) = info {
        let more = json!({
            "mode": format!("{:04o}", info.mode),
            "uid": info.uid,
            "gid": info.gid,
            "user": info.user_name,
            "group": info.group_name,
            "size": info.size,
            "allocated": info.allocated,
            "links": info.links,
            "inode": info.inode,
            "device": info.device,
            "modified_ns": info.modified_ns,
            "accessed_ns": info.accessed_ns,
            "changed_ns": info.changed_ns,
        });
        if let Value::Object(more) = more {
            object.extend(more);
        }
        if kind == FileType::Symlink {
            let target = String::from_utf8_lossy(&info.target);
            object.insert("target".to_owned(), json!(target));
        }
    }
    value
}

const fn word(kind: FileType) -> &'static str {
    match kind {
        FileType::Unknown => "unknown",
        FileType::Regular => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
    }
}

/// As `ls -F` does.
const fn mark(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "/",
        FileType::Symlink => "@",
        FileType::Fifo => "|",
        FileType::Socket => "=",
        _ => "",
    }
}

/// `drwxr-xr-x`
fn mode(info: &v1::FileInfo) -> String {
    let kind = match info.r#type() {
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
        FileType::CharacterDevice => 'c',
        FileType::BlockDevice => 'b',
        FileType::Regular => '-',
        FileType::Unknown => '?',
    };
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = info.mode >> shift;
        text.push(if bits & 4 == 0 { '-' } else { 'r' });
        text.push(if bits & 2 == 0 { '-' } else { 'w' });
        text.push(match (info.mode & special != 0, bits & 1 != 0) {
            (false, false) => '-',
            (false, true) => 'x',
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
        });
    }
    text
}

fn owner(name: &str, id: u32) -> String {
    if name.is_empty() {
        return id.to_string();
    }
    escaped(name).into_owned()
}

fn named(name: &[u8], info: Option<&v1::FileInfo>) -> String {
    let target = info.map(|info| info.target.as_slice()).unwrap_or_default();
    if target.is_empty() {
        return escaped_bytes(name);
    }
    format!("{} -> {}", escaped_bytes(name), escaped_bytes(target))
}

/// `2026-11-22 02:30:05`, UTC.
fn time(ns: i64) -> String {
    let seconds = ns.div_euclid(1_000_000_000);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days since 1 March of the year 0, in eras of 400 years; see "chrono-compatible low-level date
    // algorithms" by Howard Hinnant, civil_from_days.
    let shifted = days + 719_468;
    let (era, day) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = year + era * 400 + carry;
    format!(
        "{year:04}-{month:02}-{day_of_month:02} {:02}:{:02}:{:02}",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_calendar_dates() {
        assert_eq!(time(0), "1970-01-01 00:00:00");
        assert_eq!(time(951_782_400_000_000_000), "2000-02-29 00:00:00");
        assert_eq!(time(1_798_761_599_000_000_000), "2026-12-31 23:59:59");
        assert_eq!(time(-1), "1969-12-31 23:59:59");
        let _ = (time(i64::MAX), time(i64::MIN));
    }

    #[test]
    fn modes_are_written_as_ls_does() {
        let text = |kind: FileType, mode| {
            super::mode(&v1::FileInfo {
                r#type: kind.into(),
                mode,
                ..v1::FileInfo::default()
            })
        };
        assert_eq!(text(FileType::Directory, 0o1777), "drwxrwxrwt");
        assert_eq!(text(FileType::Regular, 0o6644), "-rwSr-Sr--");
        assert_eq!(text(FileType::Regular, 0o4755), "-rwsr-xr-x");
    }

    #[test]
    fn names_do_not_reach_the_terminal_as_they_are() {
        let entry = v1::DirectoryEntry {
            name: b"a\x1b]0;x\x07\n\xff".to_vec(),
            r#type: FileType::Regular.into(),
            info: None,
        };
        for format in [Format::Table, Format::Json] {
            let mut out = Vec::new();
            line(&entry, false, format, &mut out).unwrap();
            assert_eq!(out.pop(), Some(b'\n'));
            assert!(!out.iter().any(u8::is_ascii_control), "{out:?}");
        }
    }
}
