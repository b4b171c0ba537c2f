//! `belljar fs`: single file calls.

mod change;
mod content;
mod show;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use belljar_node::guest::GuestError;
use belljar_node::registry::Found;

use crate::failure::{Failure, status_of};
use crate::options::find;

/// Look at and change files of a sandbox, without a program in it
///
/// Works in guests that have no shell, and as any user without one. 'belljar cp' moves data in and out.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar fs ls -l box /etc                     what is in a directory
  belljar fs cat box /var/log/app.log | less
  date | belljar fs write box /tmp/now          a file from standard input
  belljar fs write --replace --sync box /etc/app.conf < app.conf
  belljar fs rm -r box /tmp/build
  belljar fs chown -R alice: box /home/alice
  belljar fs df box /

Paths are relative to '/'. Exit status: 0; 125 if it failed, for the reason told.")]
pub(crate) struct Args {
    #[command(subcommand)]
    call: Call,
}

#[derive(Debug, clap::Subcommand)]
enum Call {
    Stat(show::Stat),
    Ls(show::Ls),
    Df(show::Df),
    Xattr(show::Xattr),
    Cat(content::Cat),
    Write(content::Write),
    Truncate(content::Truncate),
    Mkdir(change::Mkdir),
    Rm(change::Rm),
    Mv(change::Mv),
    Cp(change::Cp),
    Ln(change::Ln),
    Chmod(change::Chmod),
    Chown(change::Chown),
    Touch(change::Touch),
}

/// Returns the exit status.
pub(crate) fn fs(args: &Args) -> u8 {
    status_of(match &args.call {
        Call::Stat(args) => args.carry_out(),
        Call::Ls(args) => args.carry_out(),
        Call::Df(args) => args.carry_out(),
        Call::Xattr(args) => args.carry_out(),
        Call::Cat(args) => args.carry_out(),
        Call::Write(args) => args.carry_out(),
        Call::Truncate(args) => args.carry_out(),
        Call::Mkdir(args) => args.carry_out(),
        Call::Rm(args) => args.carry_out(),
        Call::Mv(args) => args.carry_out(),
        Call::Cp(args) => args.carry_out(),
        Call::Ln(args) => args.carry_out(),
        Call::Chmod(args) => args.carry_out(),
        Call::Chown(args) => args.carry_out(),
        Call::Touch(args) => args.carry_out(),
    })
}

/// In which sandbox, and as whom.
#[derive(Debug, clap::Args)]
struct Where {
    /// With this user's rights [default: root]
    #[arg(
        short,
        long,
        value_name = "USER[:GROUP]",
        default_value = "",
        hide_default_value = true
    )]
    user: String,

    /// Id or name of the sandbox, or the beginning of either
    #[arg(value_name = "BOX")]
    sandbox: String,
}

impl Where {
    fn find(&self) -> Result<Found, Failure> {
        find(&self.sandbox)
    }

    fn user(&self) -> String {
        self.user.clone()
    }
}

fn bytes(path: &OsStr) -> Vec<u8> {
    path.as_bytes().to_vec()
}

/// Does something to each of several paths: a failure with one is told, and the others have their turn.
fn each(
    paths: &[OsString],
    mut act: impl FnMut(Vec<u8>) -> Result<(), GuestError>,
) -> Result<u8, Failure> {
    let failed = paths.iter().filter_map(|path| act(bytes(path)).err());
    Ok(failed.fold(0, |_, error| Failure::from(error).tell()))
}
