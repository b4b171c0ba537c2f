//! `belljar completion` and `belljar man`: generated from the definition of the command line.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::arguments::described;
use crate::failure::{Failure, status_of};
use crate::output;

/// Print a script that completes verbs and options in a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  belljar completion bash >~/.local/share/bash-completion/completions/belljar
  belljar completion zsh >~/.zfunc/_belljar      with fpath+=(~/.zfunc) before compinit in ~/.zshrc
  belljar completion fish >~/.config/fish/completions/belljar.fish")]
pub(crate) struct Args {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Write the manual pages, one for each verb, into a directory
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  belljar man ~/.local/share/man/man1 && man belljar-run")]
pub(crate) struct ManArgs {
    /// Made if it does not exist
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Returns the exit status.
pub(crate) fn completion(args: &Args) -> u8 {
    let mut script = Vec::new();
    let mut command = described();
    clap_complete::generate(args.shell, &mut command, "belljar", &mut script);
    output::print(&String::from_utf8_lossy(&script));
    0
}

/// Returns the exit status.
pub(crate) fn man(args: &ManArgs) -> u8 {
    let dir = &args.dir;
    let written = fs::create_dir_all(dir).and_then(|()| write_pages(described(), "belljar", dir));
    status_of(written.map(|()| 0).map_err(|error| {
        Failure::with_remedy(
            format!("cannot write manual pages to {}: {error}", dir.display()),
            "name a directory that can be written",
        )
    }))
}

/// The page of a command, and of those below it.
fn write_pages(command: Command, name: &str, dir: &Path) -> io::Result<()> {
    let below: Vec<Command> = command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .cloned()
        .collect();
    for below in below {
        let name = format!("{name}-{}", below.get_name());
        write_pages(below, &name, dir)?;
    }
    // Pages are found by their file's name, which is also what the page calls itself.
    let mut page = Vec::new();
    Man::new(command.display_name(name))
        .title(name)
        .render(&mut page)?;
    fs::write(dir.join(format!("{name}.1")), page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn every_verb_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            man(&ManArgs {
                dir: dir.path().join("man1")
            }),
            0
        );
        let page = |name: &str| fs::read_to_string(dir.path().join("man1").join(name)).unwrap();
        assert!(
            page("belljar.1").contains("belljar\\-run"),
            "{}",
            page("belljar.1")
        );
        assert!(page("belljar-run.1").contains("timeout"));
        assert!(page("belljar-debug-vsock.1").contains("PORT"));
    }

    #[test]
    fn every_shell_has_a_script() {
        for shell in Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut described(), "belljar", &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(
                script.contains("inspect") && script.contains("boot-timeout"),
                "{shell}"
            );
        }
    }
}
