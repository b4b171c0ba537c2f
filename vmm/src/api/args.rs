//! The command line of `belljar-vmm`: Firecracker's flags, and `--fd`. Written by hand, because
//! the API must answer within a millisecond or two of the process's start.
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::RawFd;

use super::http::MAX_BODY;
use crate::config::{ConfigError, Source, check_fd_name, is_instance_id};
use crate::log::Level;
use crate::metrics::Registry;

/// Where the API listens unless `--api-sock` says otherwise.
pub const DEFAULT_API_SOCK: &str = "/run/belljar-vmm.socket";
/// Most that `--http-api-max-payload-size` may be.
const MAX_PAYLOAD: usize = 16 * 1024 * 1024;

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    Run(Box<Args>),
    /// Print [`HELP`], exit 0.
    Help,
    /// Print [`version_text`], exit 0.
    Version,
}

/// A run of the VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// `None` with `--no-api`; then `config_file` is there.
    pub api_sock: Option<Source>,
    pub id: String,
    pub config_file: Option<Source>,
    /// Log how long the guest took until it wrote the boot marker.
    pub boot_timer: bool,
    pub log_path: Option<Source>,
    pub level: Option<Level>,
    pub module: Option<String>,
    pub show_level: bool,
    pub show_log_origin: bool,
    pub metrics_path: Option<Source>,
    /// Inherited descriptors by name: adopt them with
    /// [`backend::inherited`](crate::backend::inherited) first of all.
    pub fds: Vec<(String, RawFd)>,
    /// Bytes.
    pub max_payload: usize,
    pub start_times: StartTimes,
}

/// What a launcher tells about the time before this process's `main`, in µs: wall time on the
/// monotonic clock, CPU time on this process's clock, CPU time of the parent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StartTimes {
    pub start_us: Option<u64>,
    pub start_cpu_us: Option<u64>,
    pub parent_cpu_us: Option<u64>,
}

/// The command line is wrong: exit status 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    #[error("unknown argument {0:?}; --help lists what there is")]
    Unknown(String),
    #[error("{flag}: not offered: {why}")]
    NotOffered {
        flag: &'static str,
        why: &'static str,
    },
    #[error("{0}: a value must follow")]
    NoValue(&'static str),
    #[error("{0}: takes no value")]
    UnwantedValue(&'static str),
    #[error("{0}: given twice")]
    Twice(&'static str),
    #[error("{0}: not valid UTF-8")]
    NotText(String),
    #[error("{flag}: {what}")]
    BadValue { flag: &'static str, what: String },
    #[error("--no-api: --config-file must say what to start")]
    NothingToRun,
    #[error("--no-api and --api-sock exclude each other")]
    ApiAndNoApi,
    #[error("{flag}: fd:{name} needs --fd {name}=N")]
    NoSuchDescriptor { flag: &'static str, name: String },
}

/// `--help`.
pub const HELP: &str = "\
belljar-vmm: one process, one microVM, controlled over a Unix socket (docs/api.md)

Usage: belljar-vmm [--api-sock PATH] [--config-file PATH] [OPTIONS]

  --api-sock PATH           listen there (default /run/belljar-vmm.socket)
  --no-api                  no API; needs --config-file
  --config-file PATH        configure and start the guest from this JSON document
  --id NAME                 name of the microVM (default anonymous-instance)
  --fd NAME=N               open descriptor N is meant wherever 'fd:NAME' stands for a path
  --boot-timer              log how long the guest took to boot
  --log-path PATH           append log lines to this file or FIFO (default: standard error)
  --level LEVEL             Off, Error, Warning, Info, Debug or Trace (default Info)
  --module PREFIX           log only modules that begin so
  --show-level              show the level in log lines (they do already)
  --show-log-origin         show file and line in log lines
  --metrics-path PATH       append metrics to this file or FIFO, as JSON lines
  --http-api-max-payload-size BYTES
                            longest body of a call (default 51200)
  --start-time-us, --start-time-cpu-us, --parent-cpu-time-us MICROSECONDS
                            what a launcher measured before the start, for the metrics
  --no-seccomp              no system call filters (this version has none)
  --version                 print the version
  --help                    print this

Exit status: 0 the guest powered off; 1 an error; 2 a bad command line; 16 the guest rebooted;
17 it panicked; 18 triple fault; 19 KVM could not go on; 20 stopped through the API.
";

/// `--version`.
pub fn version_text() -> String {
    format!(
        "belljar-vmm v{}\nAPI of Firecracker v{}\n",
        env!("CARGO_PKG_VERSION"),
        super::FIRECRACKER_API_VERSION
    )
}

/// Flags with a value, then without, then Firecracker's that we do not offer.
const WITH_VALUE: [&str; 12] = [
    "--api-sock",
    "--id",
    "--config-file",
    "--log-path",
    "--level",
    "--module",
    "--metrics-path",
    "--fd",
    "--http-api-max-payload-size",
    "--start-time-us",
    "--start-time-cpu-us",
    "--parent-cpu-time-us",
];
const WITHOUT_VALUE: [&str; 7] = [
    "--no-api",
    "--boot-timer",
    "--show-level",
    "--show-log-origin",
    "--no-seccomp",
    "--version",
    "--help",
];
const NOT_OFFERED: [(&str, &str); 6] = [
    (
        "--seccomp-filter",
        "system call filters are not configurable",
    ),
    ("--metadata", "there is no metadata service"),
    ("--mmds-size-limit", "there is no metadata service"),
    ("--snapshot-version", "GET /version tells versions"),
    (
        "--describe-snapshot",
        "a state file says itself whether it can be loaded",
    ),
    ("--enable-pci", "devices are on virtio-mmio"),
];

/// Parses everything behind the program's name. Values follow as the next argument or behind `=`.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, ArgsError> {
    let mut given = Given::default();
    let mut args = args.into_iter();
    while let Some(raw) = args.next() {
        let word = text(raw)?;
        let (name, inline) = match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value)),
            _ => (word.as_str(), None),
        };
        let name = if name == "-h" { "--help" } else { name };
        if let Some(&(flag, why)) = NOT_OFFERED.iter().find(|(flag, _)| *flag == name) {
            return Err(ArgsError::NotOffered { flag, why });
        }
        if let Some(&flag) = WITHOUT_VALUE.iter().find(|flag| **flag == name) {
            match (flag, inline) {
                (_, Some(_)) => return Err(ArgsError::UnwantedValue(flag)),
                ("--help", None) => return Ok(Invocation::Help),
                ("--version", None) => return Ok(Invocation::Version),
                (_, None) => given.insert(flag, String::new())?,
            }
        } else if let Some(&flag) = WITH_VALUE.iter().find(|flag| **flag == name) {
            let value = match inline {
                Some(value) => value.to_owned(),
                None => text(args.next().ok_or(ArgsError::NoValue(flag))?)?,
            };
            given.insert(flag, value)?;
        } else {
            return Err(ArgsError::Unknown(word));
        }
    }
    given.check().map(|args| Invocation::Run(Box::new(args)))
}

fn text(raw: OsString) -> Result<String, ArgsError> {
    raw.into_string()
        .map_err(|raw| ArgsError::NotText(raw.to_string_lossy().into_owned()))
}

#[derive(Default)]
struct Given {
    values: BTreeMap<&'static str, String>,
    fds: Vec<(String, RawFd)>,
}

impl Given {
    fn insert(&mut self, flag: &'static str, value: String) -> Result<(), ArgsError> {
        if flag == "--fd" {
            return self.insert_fd(&value);
        }
        if self.values.insert(flag, value).is_some() {
            return Err(ArgsError::Twice(flag));
        }
        Ok(())
    }

    fn insert_fd(&mut self, value: &str) -> Result<(), ArgsError> {
        let bad = |what: String| ArgsError::BadValue { flag: "--fd", what };
        let (name, number) = value
            .split_once('=')
            .ok_or_else(|| bad(format!("{value:?} is not of the form NAME=N")))?;
        check_fd_name(name).map_err(|e| bad(e.to_string()))?;
        let number = number
            .parse::<RawFd>()
            .ok()
            .filter(|n| *n >= 3)
            .ok_or_else(|| bad(format!("{number:?} is no descriptor above 2")))?;
        if self.fds.iter().any(|(n, fd)| n == name || *fd == number) {
            return Err(bad(format!("{value:?}: name or number is given twice")));
        }
        self.fds.push((name.to_owned(), number));
        Ok(())
    }

    fn check(mut self) -> Result<Args, ArgsError> {
        let no_api = self.has("--no-api");
        let api_sock = self.source("--api-sock")?;
        let config_file = self.source("--config-file")?;
        let api_sock = match (no_api, api_sock) {
            (true, Some(_)) => return Err(ArgsError::ApiAndNoApi),
            (true, None) if config_file.is_none() => return Err(ArgsError::NothingToRun),
            (true, None) => None,
            (false, Some(source)) => Some(source),
            (false, None) => Some(Source::Path(DEFAULT_API_SOCK.into())),
        };
        Ok(Args {
            api_sock,
            config_file,
            id: self.id()?,
            boot_timer: self.has("--boot-timer"),
            log_path: self.source("--log-path")?,
            level: self.parsed("--level", |t| t.parse())?,
            module: self.values.remove("--module"),
            show_level: self.has("--show-level"),
            show_log_origin: self.has("--show-log-origin"),
            metrics_path: self.source("--metrics-path")?,
            max_payload: self
                .parsed("--http-api-max-payload-size", payload_size)?
                .unwrap_or(MAX_BODY),
            start_times: StartTimes {
                start_us: self.parsed("--start-time-us", microseconds)?,
                start_cpu_us: self.parsed("--start-time-cpu-us", microseconds)?,
                parent_cpu_us: self.parsed("--parent-cpu-time-us", microseconds)?,
            },
            fds: self.fds,
        })
    }

    fn has(&self, flag: &str) -> bool {
        self.values.contains_key(flag)
    }

    fn parsed<T>(
        &self,
        flag: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ArgsError> {
        self.values
            .get(flag)
            .map(|value| parse(value).map_err(|what| ArgsError::BadValue { flag, what }))
            .transpose()
    }

    fn source(&self, flag: &'static str) -> Result<Option<Source>, ArgsError> {
        let source = self.parsed(flag, |value| {
            Source::parse(value).map_err(|e: ConfigError| e.to_string())
        })?;
        match source.as_ref().and_then(Source::fd_name) {
            Some(name) if !self.fds.iter().any(|(n, _)| n == name) => {
                Err(ArgsError::NoSuchDescriptor {
                    flag,
                    name: name.to_owned(),
                })
            }
            _ => Ok(source),
        }
    }

    fn id(&mut self) -> Result<String, ArgsError> {
        let id = self
            .values
            .remove("--id")
            .unwrap_or_else(|| "anonymous-instance".to_owned());
        if !is_instance_id(&id) {
            return Err(ArgsError::BadValue {
                flag: "--id",
                what: format!("{id:?} is not 1 to 64 ASCII letters, digits and '-'"),
            });
        }
        Ok(id)
    }
}

fn microseconds(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not a number of microseconds"))
}

fn payload_size(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=MAX_PAYLOAD).contains(n))
        .ok_or_else(|| format!("{text:?} is not in 1..={MAX_PAYLOAD} bytes"))
}

impl StartTimes {
    /// Writes into the metrics what the launcher measured and what has passed since: call it
    /// once, when the API listens.
    pub fn record(&self, metrics: &Registry) {
        use rustix::time::{ClockId, clock_gettime};
        let now_us = |clock| {
            let now = clock_gettime(clock);
            let (s, ns) = (
                u64::try_from(now.tv_sec).unwrap_or(0),
                u64::try_from(now.tv_nsec).unwrap_or(0),
            );
            s.saturating_mul(1_000_000).saturating_add(ns / 1000)
        };
        if let Some(start) = self.start_us {
            metrics
                .gauge("api_server", "process_startup_time_us")
                .set(now_us(ClockId::Monotonic).saturating_sub(start));
        }
        if let Some(start) = self.start_cpu_us {
            metrics
                .gauge("api_server", "process_startup_time_cpu_us")
                .set(
                    now_us(ClockId::ProcessCPUTime)
                        .saturating_sub(start)
                        .saturating_add(self.parent_cpu_us.unwrap_or(0)),
                );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(words: &[&str]) -> Result<Args, ArgsError> {
        match parse(words.iter().map(OsString::from))? {
            Invocation::Run(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    fn refused(words: &[&str]) -> String {
        run(words).unwrap_err().to_string()
    }

    #[test]
    fn defaults() {
        let args = run(&[]).unwrap();
        assert_eq!(args.api_sock, Some(Source::Path(DEFAULT_API_SOCK.into())));
        assert_eq!(args.id, "anonymous-instance");
        assert_eq!(args.max_payload, 51_200);
    }

    #[test]
    fn values_follow_or_stand_behind_an_equals_sign() {
        let args = run(&["--api-sock", "/a=b", "--id=x-1", "--level=warning"]).unwrap();
        assert_eq!(args.api_sock, Some(Source::Path("/a=b".into())));
        assert_eq!(args.id, "x-1");
        assert_eq!(args.level, Some(Level::Warn));
    }

    #[test]
    fn descriptors_are_named_whatever_the_order() {
        let args = run(&[
            "--config-file",
            "fd:c",
            "--fd",
            "c=7",
            "--fd=s=8",
            "--api-sock=fd:s",
        ]);
        let args = args.unwrap();
        assert_eq!(args.fds, [("c".to_owned(), 7), ("s".to_owned(), 8)]);
        assert_eq!(args.config_file, Some(Source::Fd("c".into())));
        assert!(refused(&["--log-path", "fd:x"]).contains("--fd x=N"));
    }

    #[test]
    fn mistakes_are_named() {
        for (words, part) in [
            (&["--api-sok", "x"][..], "--api-sok"),
            (&["stray"], "stray"),
            (&["--id"], "--id: a value must follow"),
            (&["--no-api=1"], "--no-api: takes no value"),
            (&["--id", "a", "--id", "b"], "--id: given twice"),
            (&["--id", "a b"], "--id"),
            (&["--level", "loud"], "loud"),
            (&["--no-api"], "--config-file"),
            (
                &["--no-api", "--config-file", "c", "--api-sock", "s"],
                "exclude",
            ),
            (&["--fd", "a"], "NAME=N"),
            (&["--fd", "a=2"], "above 2"),
            (&["--fd", "a=3", "--fd", "a=4"], "twice"),
            (&["--fd", "a=3", "--fd", "b=3"], "twice"),
            (&["--http-api-max-payload-size", "0"], "1..="),
            (&["--start-time-us", "-1"], "microseconds"),
            (&["--seccomp-filter", "f"], "--seccomp-filter: not offered"),
            (&["--enable-pci"], "--enable-pci: not offered"),
        ] {
            let message = refused(words);
            assert!(message.contains(part), "{words:?}: {message}");
        }
    }

    #[test]
    fn help_names_every_flag() {
        for flag in WITH_VALUE.iter().chain(&WITHOUT_VALUE) {
            let offered = NOT_OFFERED.iter().all(|(name, _)| name != flag);
            assert_eq!(HELP.contains(flag), offered, "{flag}");
        }
        assert_eq!(parse([OsString::from("-h")]), Ok(Invocation::Help));
        assert_eq!(
            parse([OsString::from("--version")]),
            Ok(Invocation::Version)
        );
    }
}
