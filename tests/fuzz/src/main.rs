//! The entry point for libFuzzer (feature `libfuzzer`), for the target named in `BELLJAR_FUZZ_TARGET`.
//! Without the feature it runs one target on files: `fuzz TARGET FILE…` repeats a finding.
#![cfg_attr(feature = "libfuzzer", no_main)]

#[cfg(feature = "libfuzzer")]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    use std::sync::OnceLock;
    static RUN: OnceLock<fn(&[u8])> = OnceLock::new();
    let run = RUN.get_or_init(|| {
        let name = std::env::var("BELLJAR_FUZZ_TARGET").unwrap_or_default();
        let Some(target) = belljar_fuzz::find(&name) else {
            eprintln!("BELLJAR_FUZZ_TARGET={name}: no such target");
            std::process::exit(2);
        };
        target.run
    });
    run(data);
});

#[cfg(not(feature = "libfuzzer"))]
fn main() -> std::process::ExitCode {
    use std::process::ExitCode;
    let mut arguments = std::env::args_os().skip(1);
    let name = arguments.next().unwrap_or_default();
    match name.to_str() {
        Some("--list") => {
            for target in belljar_fuzz::TARGETS {
                println!("{}", target.name);
            }
            return ExitCode::SUCCESS;
        }
        Some("--seeds") => return write_seeds(arguments.next()),
        _ => {}
    }
    let Some(target) = name.to_str().and_then(belljar_fuzz::find) else {
        eprintln!("usage: fuzz --list | fuzz --seeds FOLDER | fuzz TARGET FILE…");
        return ExitCode::from(2);
    };
    for path in arguments {
        match std::fs::read(&path) {
            Ok(data) => (target.run)(&data),
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// Writes the seeds of each target into `FOLDER/TARGET/`.
#[cfg(not(feature = "libfuzzer"))]
fn write_seeds(folder: Option<std::ffi::OsString>) -> std::process::ExitCode {
    let Some(folder) = folder.map(std::path::PathBuf::from) else {
        eprintln!("fuzz --seeds: name a folder");
        return std::process::ExitCode::from(2);
    };
    for target in belljar_fuzz::TARGETS {
        let place = folder.join(target.name);
        let written = std::fs::create_dir_all(&place).and_then(|()| {
            (target.seeds)()
                .iter()
                .enumerate()
                .try_for_each(|(number, seed)| {
                    std::fs::write(place.join(format!("seed-{number}")), seed)
                })
        });
        if let Err(error) = written {
            eprintln!("{}: {error}", place.display());
            return std::process::ExitCode::FAILURE;
        }
    }
    std::process::ExitCode::SUCCESS
}
