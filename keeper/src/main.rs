//! `belljar-keeper DIR`: keeps the store in `DIR`, which is `keeper/` of a state root. Started by whoever
//! needs it; not by hand.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let (Some(dir), None) = (words.next(), words.next()) else {
        eprintln!("usage: belljar-keeper DIR\nbelljar starts it when it is needed");
        return ExitCode::from(2);
    };
    match belljar_keeper::server::run(&PathBuf::from(dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("belljar-keeper: {error}");
            ExitCode::FAILURE
        }
    }
}
