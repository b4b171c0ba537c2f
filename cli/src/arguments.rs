//! What can be said on the command line: the list of verbs. The arguments of each stand with it in `verbs/`.

use clap::{CommandFactory, Parser, Subcommand};

use crate::verbs;

/// Small Linux computers behind hardware virtualisation, one for each session.
#[derive(Debug, Parser)]
#[command(
    name = "belljar",
    version,
    disable_help_subcommand = true,
    max_term_width = 100
)]
#[command(after_help = "\
Examples:
  belljar run -- uname -a                      one command in a fresh guest that goes away with it
  belljar run -d --name box                    a guest that stays
  belljar ls                                   what there is
  belljar VERB --help                          more about a verb, with examples

A sandbox is named by its id, its name, or the beginning of either.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Each verb is built only when it is used or described (`defer`): a short start is worth it. A new one is
/// a line here, a line in [`Verb::carry_out`] and a word in [`GROUPS`].
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(crate) enum Verb {
    Run(Box<verbs::run::Args>),
    Create(Box<verbs::create::Args>),
    Start(verbs::start::Args),
    Stop(verbs::stop::Args),
    Restart(verbs::restart::Args),
    Rm(verbs::rm::Args),
    Ls(verbs::ls::Args),
    Pause(verbs::pause::Pause),
    Resume(verbs::pause::Resume),
    Inspect(verbs::inspect::Args),
    Snapshot(verbs::snapshot::Args),
    Snapshots(verbs::snapshot::ListArgs),
    Restore(verbs::restore::Args),
    Fork(verbs::restore::ForkArgs),
    Reset(verbs::restore::ResetArgs),
    Store(verbs::store::Args),
    Exec(Box<verbs::exec::Args>),
    Shell(verbs::shell::Args),
    Attach(verbs::attach::Args),
    Logs(verbs::logs::Args),
    Ps(verbs::ps::Args),
    Kill(verbs::kill::Args),
    Cp(verbs::cp::Args),
    Fs(verbs::fs::Args),
    Watch(verbs::watch::Args),
    Stats(verbs::stats::Args),
    Top(verbs::top::Args),
    Events(verbs::events::Args),
    Wait(verbs::wait::Args),
    Port(verbs::port::Args),
    Console(verbs::console::Args),
    Debug(verbs::debug::Args),
    System(verbs::system::Args),
    Doctor(verbs::doctor::Args),
    Bench(verbs::bench::Args),
    Completion(verbs::completion::Args),
    #[command(hide = true)]
    Man(verbs::completion::ManArgs),
    /// Describe belljar, or one of its verbs
    #[command(hide = true)]
    Help {
        verb: Vec<String>,
    },
}

impl Verb {
    /// Returns the exit status.
    pub(crate) fn carry_out(&self, begin: std::time::Instant) -> u8 {
        match self {
            Self::Run(args) => verbs::run::run(args, begin),
            Self::Create(args) => verbs::create::create(args),
            Self::Start(args) => verbs::start::start(args),
            Self::Stop(args) => verbs::stop::stop(args),
            Self::Restart(args) => verbs::restart::restart(args),
            Self::Rm(args) => verbs::rm::rm(args),
            Self::Pause(args) => verbs::pause::pause(args),
            Self::Resume(args) => verbs::pause::resume(args),
            Self::Ls(args) => verbs::ls::ls(args),
            Self::Inspect(args) => verbs::inspect::inspect(args),
            Self::Snapshot(args) => verbs::snapshot::snapshot(args),
            Self::Snapshots(args) => verbs::snapshot::snapshots(args),
            Self::Restore(args) => verbs::restore::restore(args, begin),
            Self::Fork(args) => verbs::restore::fork(args),
            Self::Reset(args) => verbs::restore::reset(args, begin),
            Self::Store(args) => verbs::store::store(args),
            Self::Exec(args) => verbs::exec::exec(args),
            Self::Shell(args) => verbs::shell::shell(args),
            Self::Attach(args) => verbs::attach::attach(args),
            Self::Logs(args) => verbs::logs::logs(args),
            Self::Ps(args) => verbs::ps::ps(args),
            Self::Kill(args) => verbs::kill::kill(args),
            Self::Cp(args) => verbs::cp::cp(args),
            Self::Fs(args) => verbs::fs::fs(args),
            Self::Watch(args) => verbs::watch::watch(args),
            Self::Stats(args) => verbs::stats::stats(args),
            Self::Top(args) => verbs::top::top(args),
            Self::Events(args) => verbs::events::events(args),
            Self::Wait(args) => verbs::wait::wait(args),
            Self::Port(args) => verbs::port::port(args),
            Self::Console(args) => verbs::console::console(args),
            Self::System(args) => verbs::system::system(args),
            Self::Debug(args) => verbs::debug::debug(args),
            Self::Bench(args) => verbs::bench::bench(args),
            Self::Doctor(args) => verbs::doctor::doctor(args),
            Self::Completion(args) => verbs::completion::completion(args),
            Self::Man(args) => verbs::completion::man(args),
            Self::Help { verb } => help(verb),
        }
    }
}

/// In which order, and under which title, `belljar --help` lists the verbs.
pub(crate) const GROUPS: [(&str, &[&str]); 6] = [
    (
        "Sandboxes",
        &[
            "run", "create", "start", "stop", "restart", "rm", "ls", "inspect", "pause", "resume",
        ],
    ),
    (
        "Snapshots",
        &[
            "snapshot",
            "snapshots",
            "restore",
            "fork",
            "reset",
            "store",
            "bench",
        ],
    ),
    (
        "Commands and terminals",
        &["exec", "shell", "attach", "logs", "ps", "kill"],
    ),
    ("Files", &["cp", "fs", "watch"]),
    (
        "Looking and waiting",
        &["stats", "top", "events", "wait", "port"],
    ),
    (
        "When something is wrong",
        &["console", "debug", "system", "doctor", "completion"],
    ),
];

/// The list of verbs in their groups, as the help shows it.
fn grouped(command: &clap::Command) -> String {
    let mut text = String::new();
    for (title, verbs) in GROUPS {
        let known = verbs
            .iter()
            .filter_map(|verb| Some((verb, command.find_subcommand(verb)?.get_about()?)));
        let lines: String = known
            .map(|(verb, about)| format!("  {verb:<11} {about}\n"))
            .collect();
        if !lines.is_empty() {
            text.push_str(&format!("{title}:\n{lines}\n"));
        }
    }
    text
}

/// The whole definition with its verbs in groups; for help, completions and manual pages.
pub(crate) fn described() -> clap::Command {
    let mut command = Cli::command();
    // Building fills in what was deferred.
    command.build();
    let verbs = grouped(&command);
    command.help_template(format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{verbs}Options:\n{{options}}{{after-help}}"
    ))
}

/// Prints the help of belljar or of a verb.
fn help(verb: &[String]) -> u8 {
    let mut command = described();
    let described = match verb.first() {
        None => Some(&mut command),
        Some(verb) => command.find_subcommand_mut(verb),
    };
    let Some(described) = described else {
        crate::report::failure(
            &format!("there is no verb '{}'", verb.join(" ")),
            Some("'belljar --help' lists all"),
        );
        return crate::OURS;
    };
    let text = if verb.is_empty() {
        described.render_help()
    } else {
        described.render_long_help()
    };
    let text = if crate::output::has_colour() {
        text.ansi().to_string()
    } else {
        text.to_string()
    };
    crate::output::print(&format!("{}\n", text.trim_end()));
    0
}

/// Whether the arguments ask for the list of verbs, which is not clap's own.
pub(crate) fn asks_for_the_list(argument: Option<&std::ffi::OsStr>) -> bool {
    argument.is_none_or(|word| word == "-h" || word == "--help")
}

/// Prints the list of verbs.
pub(crate) fn print_list(asked: bool) -> u8 {
    if asked {
        return help(&[]);
    }
    let text = described().render_help().to_string();
    crate::report::print(&format!("{}\n", text.trim_end()));
    crate::OURS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        described().debug_assert();
    }

    #[test]
    fn every_verb_is_in_one_group_and_described() {
        let command = described();
        for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let groups = GROUPS
                .iter()
                .filter(|(_, verbs)| verbs.contains(&verb.get_name()));
            assert_eq!(groups.count(), 1, "{} stands in one group", verb.get_name());
            assert!(verb.get_about().is_some(), "{}", verb.get_name());
        }
        let text = described().render_help().to_string();
        assert!(
            text.contains("  run ") && text.contains("When something is wrong"),
            "{text}"
        );
    }

    #[test]
    fn the_command_is_taken_as_it_is() {
        let cli =
            Cli::try_parse_from(["belljar", "run", "-i", "--", "ls", "--help", "-v"]).unwrap();
        let Verb::Run(run) = cli.verb else {
            panic!("not run")
        };
        assert_eq!(run.command, ["ls", "--help", "-v"]);
        assert!(run.terminal.interactive && !run.boot_time);
        for wrong in [
            &["run"][..],
            &["run", "--cpus", "33", "--", "x"],
            &["run", "--cpus", "0", "--", "x"],
            &["rm"],
            &["rm", "--all", "x"],
            &["create", "--name", "a b"],
        ] {
            let words = ["belljar"].iter().chain(wrong);
            assert!(Cli::try_parse_from(words).is_err(), "{wrong:?}");
        }
    }
}
