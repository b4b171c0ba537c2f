//! `belljar`: the command line. Thin: every verb is a function of `belljar-node`.
#![forbid(unsafe_code)]

mod arguments;
mod failure;
mod options;
mod output;
mod progress;
mod report;
mod session;
mod values;
mod verbs;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

/// Exit status when the failure is ours and not the command's.
const OURS: u8 = 125;

fn main() -> ExitCode {
    let begin = Instant::now();
    let mut words = std::env::args_os().skip(1).peekable();
    let first = words.next();
    if first
        .as_ref()
        .is_some_and(|mode| mode == belljar_node::supervisor::MODE)
    {
        return ExitCode::from(belljar_node::supervisor::main(words));
    }
    if arguments::asks_for_the_list(first.as_deref()) {
        return ExitCode::from(arguments::print_list(first.is_some()));
    }
    let cli = match arguments::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { OURS } else { 0 });
        }
    };
    ExitCode::from(cli.verb.carry_out(begin))
}
