//! `belljar cp`.

use std::ffi::OsString;
use std::io::{IsTerminal, stdin, stdout};
use std::path::Path;

use belljar_node::files::{self, Copied, CopyOptions, Place};
use belljar_node::guest::GuestError;
use belljar_node::registry::Found;
use belljar_node::v1;

use crate::failure::{Failure, status_of};
use crate::options;
use crate::output::escaped;
use crate::progress::Bar;
use crate::report;

/// The exit status when something was left out.
const PARTIAL: u8 = 1;

/// Copy files and directories into a sandbox, out of it, or from one to another
///
/// Directories are copied with all that is in them. A directory that goes where one is already goes into
/// it; of 'dir/.' only what is in it does. Times, modes and holes are kept.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar cp box:/etc/os-release .           out of a sandbox
  belljar cp src Makefile box:/root/         several things into one
  belljar cp -u alice notes.txt box:/home/alice/
  belljar cp one:/data two:/data             from one sandbox to another
  belljar cp box:/var/log - | tar -tv        a tar stream on standard output
  tar -c . | belljar cp - box:/srv           a tar stream from standard input
  belljar cp ./odd:name box:/tmp/            './' tells a file with a colon from a sandbox

What comes out of a sandbox belongs to you, without set-id bits, attributes, devices and FIFOs.

Exit status: 0 all was copied; 1 some of it was left out, as told; 125 it failed.")]
pub(crate) struct Args {
    /// What to copy: PATH, BOX:PATH, or '-' for a tar stream
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<OsString>,

    /// Where to: PATH, BOX:PATH, or '-' for a tar stream
    #[arg(value_name = "DESTINATION", required = true)]
    destination: OsString,

    /// If a source is a symlink, copy what it points to
    #[arg(short = 'L', long)]
    follow_link: bool,

    /// With this user's rights in the sandbox, and to them [default: root]
    #[arg(
        short,
        long,
        value_name = "USER[:GROUP]",
        default_value = "",
        hide_default_value = true
    )]
    user: String,

    /// Keep owners (by number), attributes and set-id bits where root of a sandbox unpacks
    #[arg(short, long)]
    archive: bool,

    /// No progress bar
    #[arg(short, long)]
    quiet: bool,

    /// Directories are always copied whole; accepted for the habit
    #[arg(short, long, hide = true)]
    recursive: bool,
}

/// Returns the exit status.
pub(crate) fn cp(args: &Args) -> u8 {
    status_of(copy(args))
}

fn copy(args: &Args) -> Result<u8, Failure> {
    let destination = Place::parse(&args.destination);
    let to = Target::new(&destination)?;
    if args.sources.len() > 1 {
        to.must_be_directory(&args.user)?;
    }
    let mut status = 0;
    for source in &args.sources {
        let from = Place::parse(source);
        status = match one(args, &from, &to) {
            Ok(copied) => status.max(tell(&copied)),
            // The others are copied nevertheless.
            Err(failure) => failure.tell(),
        };
    }
    Ok(status)
}

/// The destination, found once.
enum Target<'a> {
    Host(&'a Path),
    Guest(Found, &'a [u8]),
    Stream,
}

impl<'a> Target<'a> {
    fn new(place: &'a Place) -> Result<Self, Failure> {
        Ok(match place {
            Place::Host(path) => Self::Host(path),
            Place::Guest(name, path) => Self::Guest(options::find(name)?, path),
            Place::Stream => Self::Stream,
        })
    }

    fn must_be_directory(&self, user: &str) -> Result<(), Failure> {
        let (is_directory, name) = match self {
            Self::Host(path) => (path.is_dir(), path.display().to_string()),
            Self::Guest(found, path) => {
                let mut whole = b"/".to_vec();
                whole.extend_from_slice(path);
                let message = v1::Stat {
                    path: whole,
                    user: user.to_owned(),
                    follow: true,
                };
                let kind = files::stat(found, message).map(|info| info.r#type());
                let is_directory = matches!(kind, Ok(v1::FileType::Directory));
                if let Err(error @ GuestError::Connect(_)) = kind {
                    return Err(error.into());
                }
                let path = String::from_utf8_lossy(path);
                (is_directory, format!("{}:{path}", found.called()))
            }
            Self::Stream => return Err(Failure::new("one source makes one tar stream")),
        };
        if is_directory {
            return Ok(());
        }
        Err(Failure::new(format!(
            "{name} is no directory: several sources need one"
        )))
    }
}

fn one(args: &Args, from: &Place, to: &Target<'_>) -> Result<Copied, Failure> {
    let how = CopyOptions {
        user: args.user.clone(),
        follow: args.follow_link,
        archive: args.archive,
    };
    let mut bar = Bar::new(args.quiet);
    let progress = &mut |done, total| bar.tell(done, total);
    let copied = match (from, to) {
        (Place::Host(path), Target::Guest(found, to)) => {
            files::in_to_guest(path, found, to, &how, progress)
        }
        (Place::Guest(name, path), Target::Host(to)) => {
            files::out_of_guest(&options::find(name)?, path, to, &how, progress)
        }
        (Place::Guest(name, path), Target::Guest(found, to)) => {
            files::between(&options::find(name)?, path, found, to, &how, progress)
        }
        (Place::Stream, Target::Guest(found, to)) => {
            if stdin().is_terminal() {
                return Err(Failure::new(
                    "standard input is a terminal, not a tar stream",
                ));
            }
            files::from_tar(stdin().lock(), found, to, &how, progress)
        }
        (Place::Guest(name, path), Target::Stream) => {
            if stdout().is_terminal() {
                return Err(Failure::with_remedy(
                    "a tar stream would go to the terminal",
                    "send it to a file or a pipe; 'belljar fs cat' prints a file",
                ));
            }
            files::to_tar(&options::find(name)?, path, stdout().lock(), &how, progress)
        }
        (Place::Host(_) | Place::Stream, Target::Host(_) | Target::Stream) => {
            return Err(Failure::with_remedy(
                "neither side is in a sandbox",
                "write BOX:PATH for a path in a sandbox",
            ));
        }
    };
    bar.finish();
    Ok(copied?)
}

/// Tells what was left out; returns the exit status.
fn tell(copied: &Copied) -> u8 {
    if copied.problems_total == 0 {
        return 0;
    }
    for problem in &copied.problems {
        report::print(&format!("belljar: {}\n", escaped(problem)));
    }
    let told = copied.problems.len() as u64;
    let more = copied.problems_total.saturating_sub(told);
    if more > 0 {
        report::print(&format!("belljar: and {more} more\n"));
    }
    PARTIAL
}
