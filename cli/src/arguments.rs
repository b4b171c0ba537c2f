//! What can be said on the command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use belljar_node::drive::DriveSpec;
use belljar_node::sandbox::{DiskChoice, ImageChoice};
use belljar_node::size::Size;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Small Linux computers behind hardware virtualisation, one for each session.
#[derive(Debug, Parser)]
#[command(
    name = "belljar",
    version,
    propagate_version = true,
    max_term_width = 100
)]
#[command(after_help = "\
Examples:
  belljar run -- uname -a                      run one command in a fresh guest
  belljar run -- python3 -c 'print(6*7)'
  belljar doctor                               check this machine

Exit status: the guest command's own; 128+n if a signal ended it; 124 for --timeout;
126 not executable; 127 not found; 125 if Bell Jar itself failed.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Run(Box<Run>),
    Doctor(Doctor),
}

/// Boot a fresh guest, run one command in it, and throw the guest away.
///
/// Output and exit status are the command's. Nothing is left behind, whatever happens.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  belljar run -- sh -c 'ls / | wc -l'            a pipeline needs a shell
  echo hello | belljar run -i -- tr a-z A-Z      -i passes standard input on
  belljar run --memory 1G --cpus 2 -- make -j2
  belljar run --drive data.img:ro -- mount -o ro /dev/vdc /mnt
  belljar run --timeout 10s -- ./might-hang      exit status 124 after ten seconds
  belljar run --boot-time -- true                what booting took, by stages

Ctrl-C sends SIGINT to the command in the guest; the second one kills it; the third one
gives up waiting and removes the guest.")]
pub(crate) struct Run {
    /// Program and its arguments; no shell is involved
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,

    /// Pass standard input on to the command
    #[arg(short, long)]
    pub(crate) interactive: bool,

    /// Set a variable in the command's environment; NAME alone copies it from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,

    /// Directory the command starts in
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,

    /// User the command runs as: a name or number of the guest, with a group if given
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,

    /// End the command after this time: 30s, 5m, 1h, 500ms
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) timeout: Option<Duration>,

    /// Number of virtual processors, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32), help_heading = "The guest")]
    pub(crate) cpus: u32,

    /// Memory of the guest: 128M, 2G
    #[arg(
        short,
        long,
        value_name = "SIZE",
        default_value = "256M",
        help_heading = "The guest"
    )]
    pub(crate) memory: Size,

    /// Size of the writable disk that goes away with the guest; 'none' keeps what is written in memory
    /// [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = parse_disk, help_heading = "The guest")]
    pub(crate) disk: Option<DiskChoice>,

    /// Add a drive: a raw disk image or block device
    #[arg(long, value_name = "PATH[:ro][:id=NAME]", help_heading = "The guest")]
    pub(crate) drive: Vec<DriveSpec>,

    /// Root file system, an EROFS image; 'none' runs the command in the initramfs
    #[arg(long, value_name = "FILE", value_parser = parse_image, help_heading = "The guest")]
    pub(crate) image: Option<ImageChoice>,

    /// Kernel: an x86-64 vmlinux or bzImage
    #[arg(long, value_name = "FILE", help_heading = "The guest")]
    pub(crate) kernel: Option<PathBuf>,

    /// Initramfs that holds the agent
    #[arg(long, value_name = "FILE", help_heading = "The guest")]
    pub(crate) initramfs: Option<PathBuf>,

    /// Words to add to the kernel's command line
    #[arg(long, value_name = "WORDS", help_heading = "The guest")]
    pub(crate) boot_args: Option<String>,

    /// Directory with kernel, initramfs, image and disks [default: the cache that 'make' fills]
    #[arg(
        long,
        value_name = "DIR",
        env = "BELLJAR_ASSETS",
        help_heading = "This machine"
    )]
    pub(crate) assets: Option<PathBuf>,

    /// The VMM's program [default: belljar-vmm beside this one]
    #[arg(
        long,
        value_name = "FILE",
        env = "BELLJAR_VMM",
        help_heading = "This machine"
    )]
    pub(crate) vmm: Option<PathBuf>,

    /// Give up on a guest that is not up after this time [default: 30s; 60s inside another virtual machine]
    #[arg(long, value_name = "TIME", value_parser = parse_time, env = "BELLJAR_BOOT_TIMEOUT", help_heading = "This machine")]
    pub(crate) boot_timeout: Option<Duration>,

    /// Print the boot time and its stages on standard error
    #[arg(
        short = 'v',
        long,
        visible_alias = "stages",
        help_heading = "This machine"
    )]
    pub(crate) boot_time: bool,
}

/// Check this machine, and say what to do about each thing that is missing.
///
/// Exit status 1 if a check failed.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Remove what crashed sandboxes left behind
    #[arg(long)]
    pub(crate) clean: bool,

    /// A table on a terminal, JSON when piped, unless said here
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<Format>,

    /// Directory with kernel, initramfs, image and disks [default: the cache that 'make' fills]
    #[arg(long, value_name = "DIR", env = "BELLJAR_ASSETS")]
    pub(crate) assets: Option<PathBuf>,

    /// The VMM's program [default: belljar-vmm beside this one]
    #[arg(long, value_name = "FILE", env = "BELLJAR_VMM")]
    pub(crate) vmm: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

fn parse_disk(text: &str) -> Result<DiskChoice, String> {
    if text == "none" {
        return Ok(DiskChoice::None);
    }
    text.parse()
        .map(DiskChoice::Size)
        .map_err(|error: belljar_node::size::SizeError| error.to_string())
}

#[allow(clippy::unnecessary_wraps)] // The shape clap wants.
fn parse_image(text: &str) -> Result<ImageChoice, String> {
    Ok(if text == "none" {
        ImageChoice::None
    } else {
        ImageChoice::Path(text.into())
    })
}

/// `500ms`, `30s`, `5m`, `1h`, or seconds without a suffix; fractions are allowed.
fn parse_time(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let unit = match suffix {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("write for example 500ms, 30s, 5m or 1h".into()),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| "write for example 500ms, 30s, 5m or 1h".to_owned())?;
    let seconds = number * unit;
    if seconds <= 0.0 {
        return Err("the time must be longer than nothing".into());
    }
    // Ten years: more is no limit.
    if seconds > 3.2e8 {
        return Err("the time is too long".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_are_read() {
        assert_eq!(parse_time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_time("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_time("2m"), Ok(Duration::from_secs(120)));
        for text in [
            "",
            "s",
            "-1",
            "0",
            "1d",
            "1.2.3",
            "99999999999h",
            "nan",
            "1e9",
        ] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_command_is_taken_as_it_is() {
        let cli =
            Cli::try_parse_from(["belljar", "run", "-i", "--", "ls", "--help", "-v"]).unwrap();
        let Verb::Run(run) = cli.verb else {
            panic!("not run")
        };
        assert_eq!(run.command, ["ls", "--help", "-v"]);
        assert!(run.interactive && !run.boot_time);
        assert!(Cli::try_parse_from(["belljar", "run"]).is_err());
        assert!(Cli::try_parse_from(["belljar", "run", "--cpus", "33", "--", "x"]).is_err());
        assert!(Cli::try_parse_from(["belljar", "run", "--cpus", "0", "--", "x"]).is_err());
    }

    #[test]
    fn none_is_a_choice() {
        assert_eq!(parse_disk("none"), Ok(DiskChoice::None));
        assert_eq!(parse_disk("2G"), Ok(DiskChoice::Size(Size(2 << 30))));
        assert!(parse_disk("big").is_err());
        assert_eq!(parse_image("none"), Ok(ImageChoice::None));
    }
}
