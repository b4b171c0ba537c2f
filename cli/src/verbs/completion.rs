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

/// Print a script that completes verbs, options and names of sandboxes in a shell
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
    output::print(&script(args.shell));
    0
}

/// Completes the names of sandboxes where the generated function offers nothing or files.
const BASH_NAMES: &str = r#"
_belljar_and_names() {
    _belljar "$@"
    local cur=${COMP_WORDS[COMP_CWORD]}
    if [[ $COMP_CWORD -ge 2 && $cur != -* ]]; then
        COMPREPLY+=($(compgen -W "$(belljar ls --all --names 2>/dev/null)" -- "$cur"))
    fi
}
complete -F _belljar_and_names -o nosort -o bashdefault -o default belljar
"#;
const ZSH_NAMES: &str = r#"
_belljar_names() {
    local -a names
    names=(${(f)"$(belljar ls --all --names 2>/dev/null)"})
    compadd -a names
}
"#;
const FISH_NAMES: &str = r#"
complete -c belljar -n "not __fish_belljar_needs_command" -f -a "(belljar ls --all --names 2>/dev/null)"
"#;

/// What is generated, with the names of sandboxes.
fn script(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut described(), "belljar", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    match shell {
        Shell::Bash => script + BASH_NAMES,
        Shell::Fish => script + FISH_NAMES,
        Shell::Zsh => {
            // Arguments that are sandboxes are named so in the definition.
            let lines = script.lines().map(|line| {
                let is_sandbox = [":sandbox --", "*::sandboxes --", "::sandbox --"]
                    .iter()
                    .any(|name| line.contains(name));
                if is_sandbox {
                    line.replace(":_default'", ":_belljar_names'")
                } else {
                    line.to_owned()
                }
            });
            let named: Vec<String> = lines.collect();
            // Before the part that registers or calls the function.
            let text = named.join("\n") + "\n";
            match text.rfind("\nif [ \"$funcstack[1]\"") {
                Some(at) => {
                    let (head, tail) = text.split_at(at);
                    format!("{head}{ZSH_NAMES}{tail}")
                }
                None => text + ZSH_NAMES,
            }
        }
        _ => script,
    }
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
            let script = script(*shell);
            assert!(
                script.contains("inspect") && script.contains("boot-timeout"),
                "{shell}"
            );
        }
    }
}
