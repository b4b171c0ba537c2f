//! Names, modes, owners, times.

use std::ffi::OsString;
use std::time::{SystemTime, UNIX_EPOCH};

use belljar_node::{files, v1};

use super::{Where, bytes, each};
use crate::failure::Failure;

/// Make directories
#[derive(Debug, clap::Args)]
pub(super) struct Mkdir {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,

    /// Those above it too, and none that is there is an error
    #[arg(short, long)]
    parents: bool,

    /// Permissions [default: 755]
    #[arg(short, long, value_name = "OCTAL", value_parser = octal)]
    mode: Option<u32>,

    /// Whom they are given to
    #[arg(
        long,
        value_name = "USER[:GROUP]",
        default_value = "",
        hide_default_value = true
    )]
    owner: String,
}

impl Mkdir {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let found = self.at.find()?;
        each(&self.paths, |path| {
            let message = v1::MakeDirectory {
                path,
                user: self.at.user(),
                permissions: self.mode,
                parents: self.parents,
                owner: self.owner.clone(),
            };
            files::make_directory(&found, message).map(drop)
        })
    }
}

/// Remove files, empty directories, or trees
#[derive(Debug, clap::Args)]
pub(super) struct Rm {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,

    /// Directories with all that is in them; never follows symlinks, never leaves the file system
    #[arg(short, long)]
    recursive: bool,

    /// What does not exist is no error
    #[arg(short, long)]
    force: bool,
}

impl Rm {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let found = self.at.find()?;
        each(&self.paths, |path| {
            let message = v1::Remove {
                path,
                user: self.at.user(),
                recursive: self.recursive,
                missing_ok: self.force,
            };
            files::remove(&found, message).map(drop)
        })
    }
}

/// Give a file another name
#[derive(Debug, clap::Args)]
pub(super) struct Mv {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "FROM")]
    from: OsString,

    /// The new path itself, not a directory to put it in
    #[arg(value_name = "TO")]
    to: OsString,

    /// Fail if TO exists
    #[arg(short, long)]
    no_clobber: bool,

    /// Swap both
    #[arg(long, conflicts_with = "no_clobber")]
    exchange: bool,
}

impl Mv {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let message = v1::Rename {
            from: bytes(&self.from),
            to: bytes(&self.to),
            user: self.at.user(),
            no_replace: self.no_clobber,
            exchange: self.exchange,
        };
        files::rename(&self.at.find()?, message)?;
        Ok(0)
    }
}

/// Copy within the sandbox
///
/// With modes, times, attributes and holes; without reading the data where the file system can share it.
#[derive(Debug, clap::Args)]
pub(super) struct Cp {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "FROM")]
    from: OsString,

    /// The new path itself, not a directory to put it in
    #[arg(value_name = "TO")]
    to: OsString,

    /// Directories with all that is in them
    #[arg(short, long)]
    recursive: bool,

    /// If FROM is a symlink, what it points to
    #[arg(short = 'L', long)]
    follow: bool,
}

impl Cp {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let message = v1::CopyPath {
            from: bytes(&self.from),
            to: bytes(&self.to),
            user: self.at.user(),
            recursive: self.recursive,
            follow: self.follow,
        };
        files::copy(&self.at.find()?, message)?;
        Ok(0)
    }
}

/// Make a link: a second name for a file, or with -s a symlink
#[derive(Debug, clap::Args)]
pub(super) struct Ln {
    #[command(flatten)]
    at: Where,

    /// What it points to; of a symlink any text
    #[arg(value_name = "TARGET")]
    target: OsString,

    #[arg(value_name = "LINK")]
    link: OsString,

    /// A symlink
    #[arg(short, long)]
    symbolic: bool,
}

impl Ln {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let message = v1::MakeLink {
            path: bytes(&self.link),
            target: bytes(&self.target),
            user: self.at.user(),
            hard: !self.symbolic,
        };
        files::make_link(&self.at.find()?, message)?;
        Ok(0)
    }
}

/// Change permissions
#[derive(Debug, clap::Args)]
pub(super) struct Chmod {
    #[command(flatten)]
    at: Where,

    /// Permission bits: 644, 4755
    #[arg(value_name = "OCTAL", value_parser = octal)]
    mode: u32,

    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,

    /// Directories with all that is in them
    #[arg(short = 'R', long)]
    recursive: bool,
}

impl Chmod {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let found = self.at.find()?;
        each(&self.paths, |path| {
            let message = v1::Change {
                path,
                user: self.at.user(),
                follow: true,
                permissions: Some(self.mode),
                recursive: self.recursive,
                ..v1::Change::default()
            };
            files::change(&found, message).map(drop)
        })
    }
}

/// Give files away
#[derive(Debug, clap::Args)]
pub(super) struct Chown {
    #[command(flatten)]
    at: Where,

    /// USER, USER:GROUP or :GROUP, names or numbers of the guest
    #[arg(value_name = "OWNER")]
    owner: String,

    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,

    /// Directories with all that is in them
    #[arg(short = 'R', long)]
    recursive: bool,

    /// Symlinks themselves
    #[arg(short = 'n', long)]
    no_dereference: bool,
}

impl Chown {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let found = self.at.find()?;
        each(&self.paths, |path| {
            let message = v1::Change {
                path,
                user: self.at.user(),
                follow: !self.no_dereference,
                owner: self.owner.clone(),
                recursive: self.recursive,
                ..v1::Change::default()
            };
            files::change(&found, message).map(drop)
        })
    }
}

/// Make files that are missing, and set the times of others
#[derive(Debug, clap::Args)]
pub(super) struct Touch {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,

    /// Seconds since 1970, with a fraction if need be [default: now, by this machine's clock]
    #[arg(short, long, value_name = "SECONDS", value_parser = seconds, allow_hyphen_values = true)]
    date: Option<i64>,

    /// Make none
    #[arg(short = 'c', long)]
    no_create: bool,
}

impl Touch {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let found = self.at.find()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| i64::try_from(now.as_nanos()).unwrap_or(i64::MAX));
        let at = self.date.unwrap_or(now);
        each(&self.paths, |path| {
            if !self.no_create {
                let message = v1::WriteFile {
                    path: path.clone(),
                    user: self.at.user(),
                    mode: v1::write_file::Mode::AtOffset.into(),
                    ..v1::WriteFile::default()
                };
                // A directory can be touched, but not written.
                match files::write(&found, message) {
                    Ok(upload) => drop(upload.finish()),
                    Err(error) if is_directory(&error) => {}
                    Err(error) => return Err(error),
                }
            }
            let message = v1::Change {
                path,
                user: self.at.user(),
                follow: true,
                modified_ns: Some(at),
                accessed_ns: Some(at),
                ..v1::Change::default()
            };
            files::change(&found, message).map(drop)
        })
    }
}

fn is_directory(error: &belljar_node::guest::GuestError) -> bool {
    const EISDIR: u32 = 21;
    error.refusal().is_some_and(|(_, errno)| errno == EISDIR)
}

pub(super) fn octal(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| format!("'{text}' is no octal number up to 7777"))
}

/// Nanoseconds.
fn seconds(text: &str) -> Result<i64, String> {
    let bad = || format!("'{text}' is no number of seconds");
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = fraction.len();
    if digits > 9 || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    let seconds: i64 = whole.parse().map_err(|_| bad())?;
    let fraction: i64 = format!("{fraction:0<9}").parse().map_err(|_| bad())?;
    let sign = if whole.starts_with('-') { -1 } else { 1 };
    seconds
        .checked_mul(1_000_000_000)
        .and_then(|ns| ns.checked_add(fraction * sign))
        .ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_times_are_read() {
        assert_eq!(octal("0644"), Ok(0o644));
        assert!(octal("8").is_err() && octal("10000").is_err() && octal("").is_err());
        assert_eq!(seconds("1.5"), Ok(1_500_000_000));
        assert_eq!(seconds("-1.5"), Ok(-1_500_000_000));
        assert_eq!(seconds("7"), Ok(7_000_000_000));
        assert!(
            seconds("x").is_err() && seconds("1.x").is_err() && seconds("99999999999999").is_err()
        );
    }
}
