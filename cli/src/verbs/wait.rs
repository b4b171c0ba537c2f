//! `belljar wait`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use belljar_node::process::{self, Selector};
use belljar_node::registry::Found;
use belljar_node::v1::{self, r#await::What};
use belljar_node::wait::{Waited, wait_for};

use crate::failure::{Failure, status_of};
use crate::options::BoxArg;
use crate::output;
use crate::report;
use crate::session::status_of_end;
use crate::values;

/// Exit status when the time was over first.
const TIMED_OUT: u8 = 124;

/// Exit status when it can not become so any more.
const NEVER: u8 = 1;

/// Wait until something is so in a sandbox
///
/// Returns within milliseconds once it is so, or has been before.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
#[command(after_help = "\
Examples:
  belljar wait box --port 8080                     something listens on the port
  belljar wait box --http 8080/health              a server answers with 200 to 399
  belljar wait box --http 8080/x --status 503      or with another status, or a range: 200-204
  belljar wait box --output web 'ready on .*'      process 'web' writes it, on a line or across pieces
  belljar wait box --file /run/ready --timeout 30s
  belljar wait box --end web                       the process ends: prints its exit status

Exit status: 0 it is so; 124 not in time; 1 the process has ended without writing it.")]
pub(crate) struct Args {
    #[command(flatten)]
    sandbox: BoxArg,

    /// A TCP port that something listens on
    #[arg(long, group = "what", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,

    /// A TCP port, and perhaps a path, that answers an HTTP request
    #[arg(long, group = "what", value_name = "PORT[/PATH]", value_parser = http)]
    http: Option<(u16, String)>,

    /// The status that it answers with
    #[arg(long, value_name = "FROM[-TO]", requires = "http", value_parser = status)]
    status: Option<(u32, u32)>,

    /// A process, and a regular expression that it writes
    #[arg(long, group = "what", num_args = 2, value_names = ["PROCESS", "REGEX"])]
    output: Option<Vec<String>>,

    /// A path that exists
    #[arg(long, group = "what", value_name = "PATH")]
    file: Option<OsString>,

    /// A process that has ended
    #[arg(long, group = "what", value_name = "PROCESS")]
    end: Option<Selector>,

    /// Give up after this time
    #[arg(short, long, value_name = "TIME", value_parser = values::time)]
    timeout: Option<Duration>,
}

fn http(text: &str) -> Result<(u16, String), String> {
    let (port, path) = values::pair(text, '/');
    let port: u16 = port
        .parse()
        .ok()
        .filter(|port| *port != 0)
        .ok_or("write PORT or PORT/PATH")?;
    Ok((
        port,
        path.map_or_else(String::new, |path| format!("/{path}")),
    ))
}

fn status(text: &str) -> Result<(u32, u32), String> {
    let number = |text: &str| {
        text.parse()
            .ok()
            .filter(|status| (100..=999).contains(status))
    };
    let (from, to) = values::pair(text, '-');
    let range = || Some((number(from)?, number(to.unwrap_or(from))?));
    range()
        .filter(|(from, to)| from <= to)
        .ok_or_else(|| "write a status such as 200, or a range such as 200-299".to_owned())
}

/// Returns the exit status.
pub(crate) fn wait(args: &Args) -> u8 {
    status_of(args.sandbox.find().and_then(|found| match &args.end {
        Some(process) => wait_end(&found, process, args.timeout),
        None => wait_so(&found, args),
    }))
}

fn wait_end(found: &Found, which: &Selector, limit: Option<Duration>) -> Result<u8, Failure> {
    let Some(info) = process::wait(found, which, limit)? else {
        report::failure("the process has not ended in time", None);
        return Ok(TIMED_OUT);
    };
    if let Some(end) = &info.end {
        output::print(&format!("{}\n", status_of_end(end)));
    }
    Ok(0)
}

fn wait_so(found: &Found, args: &Args) -> Result<u8, Failure> {
    let what = what(args)?;
    match wait_for(found, &what, args.timeout)? {
        Waited::So(awaited) if awaited.ended_without => {
            report::failure("the process has ended and has not written it", None);
            Ok(NEVER)
        }
        Waited::So(_) => Ok(0),
        Waited::Late(state) => {
            report::failure(&output::escaped(&state), None);
            Ok(TIMED_OUT)
        }
    }
}

fn what(args: &Args) -> Result<What, Failure> {
    if let Some(port) = args.port {
        return Ok(What::Port(port.into()));
    }
    if let Some((port, path)) = &args.http {
        let (status_from, status_to) = args.status.unwrap_or_default();
        return Ok(What::Http(v1::HttpAnswer {
            port: (*port).into(),
            path: path.clone(),
            status_from,
            status_to,
            host: String::new(),
        }));
    }
    if let Some([process, pattern]) = args.output.as_deref() {
        let process: Selector = process.parse().map_err(Failure::new)?;
        return Ok(What::Output(v1::OutputMatch {
            process: Some(process.message()),
            pattern: pattern.clone(),
            ..v1::OutputMatch::default()
        }));
    }
    let file = args
        .file
        .as_ref()
        .ok_or_else(|| Failure::new("nothing to wait for"))?;
    Ok(What::Path(file.as_bytes().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read() {
        assert_eq!(http("80"), Ok((80, String::new())));
        assert_eq!(http("80/"), Ok((80, "/".to_owned())));
        assert_eq!(http("80/a/b?c"), Ok((80, "/a/b?c".to_owned())));
        for text in ["", "0", "x/", "70000", "/a"] {
            assert!(http(text).is_err(), "{text}");
        }
        assert_eq!(status("200"), Ok((200, 200)));
        assert_eq!(status("200-299"), Ok((200, 299)));
        for text in ["", "20", "300-200", "200-", "1000", "a-b"] {
            assert!(status(text).is_err(), "{text}");
        }
    }
}
