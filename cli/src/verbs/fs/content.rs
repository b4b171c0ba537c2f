//! What is in files.

use std::ffi::OsString;
use std::io::{self, Read, Write as _, stdin, stdout};

use belljar_node::files::Piece;
use belljar_node::guest::GuestError;
use belljar_node::size::Size;
use belljar_node::{files, v1};

use super::{Where, bytes, each};
use crate::failure::Failure;

/// Print files, or ranges of them, as they are
#[derive(Debug, clap::Args)]
pub(super) struct Cat {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,

    /// Begin at this byte: 4096, 1M
    #[arg(long, value_name = "SIZE")]
    offset: Option<Size>,

    /// No more than so many bytes
    #[arg(long, value_name = "SIZE")]
    length: Option<Size>,

    /// Fail if a path is a symlink
    #[arg(short = 'n', long)]
    no_follow: bool,
}

/// Why printing ended.
enum Ended {
    Guest(GuestError),
    Output(io::Error),
}

impl From<GuestError> for Ended {
    fn from(error: GuestError) -> Self {
        Self::Guest(error)
    }
}

impl Cat {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let found = self.at.find()?;
        let mut status = 0;
        let mut out = stdout().lock();
        for path in &self.paths {
            let message = v1::ReadFile {
                path: bytes(path),
                user: self.at.user(),
                offset: self.offset.map_or(0, |size| size.0),
                length: self.length.map(|size| size.0),
                sparse: false,
                no_follow: self.no_follow,
            };
            let printed = files::read(&found, message, |piece| match piece {
                Piece::Data(data) => out.write_all(data).map_err(Ended::Output),
                _ => Ok(()),
            });
            match printed {
                Ok(_) => {}
                Err(Ended::Guest(error)) => status = Failure::from(error).tell(),
                // Nobody reads it any more: as after SIGPIPE.
                Err(Ended::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Ok(141);
                }
                Err(Ended::Output(error)) => {
                    return Err(Failure::new(format!(
                        "cannot write standard output: {error}"
                    )));
                }
            }
        }
        if let Err(error) = out.flush()
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            return Err(Failure::new(format!(
                "cannot write standard output: {error}"
            )));
        }
        Ok(status)
    }
}

/// Write standard input to a file
#[derive(Debug, clap::Args)]
pub(super) struct Write {
    #[command(flatten)]
    at: Where,

    #[arg(value_name = "PATH")]
    path: OsString,

    /// Behind what is in it
    #[arg(short, long, group = "how")]
    append: bool,

    /// At this byte, and leave the rest as it is
    #[arg(long, value_name = "SIZE", group = "how")]
    offset: Option<Size>,

    /// All or nothing: into a new file that takes the place of the old one at the end, synced to disk
    #[arg(long, group = "how")]
    replace: bool,

    /// Fail if it exists; it appears at the end, complete
    #[arg(long, group = "how")]
    new: bool,

    /// Permissions [default: 644 of a new file]
    #[arg(short, long, value_name = "OCTAL", value_parser = super::change::octal)]
    mode: Option<u32>,

    /// Whom it is given to
    #[arg(
        long,
        value_name = "USER[:GROUP]",
        default_value = "",
        hide_default_value = true
    )]
    owner: String,

    /// Make missing directories above it
    #[arg(short, long)]
    parents: bool,

    /// Wait until it is on the disk
    #[arg(long)]
    sync: bool,
}

impl Write {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        use v1::write_file::Mode;
        let found = self.at.find()?;
        let mode = match (self.append, self.offset, self.replace, self.new) {
            (true, ..) => Mode::Append,
            (_, Some(_), ..) => Mode::AtOffset,
            (_, _, true, _) => Mode::Replace,
            (_, _, _, true) => Mode::New,
            _ => Mode::Truncate,
        };
        let message = v1::WriteFile {
            path: bytes(&self.path),
            user: self.at.user(),
            mode: mode.into(),
            offset: self.offset.map_or(0, |size| size.0),
            permissions: self.mode,
            set_permissions: self.mode.is_some(),
            owner: self.owner.clone(),
            sync: self.sync,
            parents: self.parents,
            ..v1::WriteFile::default()
        };
        let id = found.called();
        let failed = |source| {
            Failure::from(GuestError::Call {
                id: id.clone(),
                source,
            })
        };
        let mut upload = files::write(&found, message)?;
        let mut input = stdin().lock();
        loop {
            match input.read(upload.space()) {
                Ok(0) => break,
                Ok(count) => upload.filled(count).map_err(failed)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Failure::new(format!("cannot read standard input: {error}")));
                }
            }
        }
        upload.finish().map_err(failed)?;
        Ok(0)
    }
}

/// Set the length of files
#[derive(Debug, clap::Args)]
pub(super) struct Truncate {
    #[command(flatten)]
    at: Where,

    /// What is longer is cut, what is shorter gets a hole: 0, 10M
    #[arg(short, long)]
    size: Size,

    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,
}

impl Truncate {
    pub(super) fn carry_out(&self) -> Result<u8, Failure> {
        let found = self.at.find()?;
        each(&self.paths, |path| {
            let message = v1::Change {
                path,
                user: self.at.user(),
                follow: true,
                size: Some(self.size.0),
                ..v1::Change::default()
            };
            files::change(&found, message).map(drop)
        })
    }
}
