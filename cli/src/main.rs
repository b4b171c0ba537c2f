//! `belljar`: the command line. Thin: every verb is a function of `belljar-node`.
#![forbid(unsafe_code)]

mod arguments;
mod doctor;
mod report;
mod run;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use arguments::{Cli, Verb};

/// Exit status when the failure is ours and not the command's.
const OURS: u8 = 125;

fn main() -> ExitCode {
    let begin = Instant::now();
    let mut arguments = std::env::args_os();
    if arguments
        .nth(1)
        .is_some_and(|mode| mode == belljar_node::supervisor::MODE)
    {
        return ExitCode::from(belljar_node::supervisor::main(arguments));
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { OURS } else { 0 });
        }
    };
    ExitCode::from(match cli.verb {
        Verb::Run(options) => run::run(&options, begin),
        Verb::Doctor(options) => doctor::doctor(&options),
    })
}
