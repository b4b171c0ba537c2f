//! What the user reads about failures and stages: always on standard error.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _, stderr};
use std::time::Duration;

use belljar_node::sandbox::BootError;
use belljar_node::stages::Stages;

/// Prints one message with what to do about it.
pub(crate) fn failure(message: &str, remedy: Option<&str>) {
    let mut text = format!("{}: {message}\n", paint("belljar", "1;31"));
    if let Some(remedy) = remedy {
        let _ = writeln!(text, "  {} {remedy}", paint("what to do:", "1"));
    }
    print(&text);
}

/// Prints what the user should know, and need not act upon.
pub(crate) fn note(message: &str) {
    print(&format!("{}: {message}\n", paint("belljar", "1;33")));
}

/// Prints what is good to know, for people only: nothing if standard error is no terminal.
pub(crate) fn aside(message: &str) {
    if stderr().is_terminal() {
        print(&format!("{}: {message}\n", paint("belljar", "1")));
    }
}

/// Prints why a boot failed, with the last lines of whoever knows more.
pub(crate) fn boot_failure(error: &BootError) {
    let mut text = String::new();
    quote(
        &mut text,
        "last lines of the guest's console",
        error.console(),
    );
    quote(&mut text, "last lines of the VMM's log", error.log());
    print(&text);
    failure(&error.to_string(), error.remedy().as_deref());
}

pub(crate) fn quote(text: &mut String, title: &str, lines: &[String]) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(text, "{}", paint(&format!("{title}:"), "1"));
    for line in lines {
        let _ = writeln!(text, "  {} {line}", paint("|", "2"));
    }
}

/// Prints the boot time and its stages.
pub(crate) fn stages(stages: &Stages) {
    print(&stage_table(stages));
}

fn stage_table(stages: &Stages) -> String {
    let mut text = String::new();
    if let Some(boot) = stages.reached("agent ready") {
        let _ = writeln!(text, "boot time {} ms", millis(boot));
    }
    for (stage, took, at) in stages.rows() {
        let _ = writeln!(
            text,
            "  {stage:<16} {:>9} ms  (at {:>9} ms)",
            millis(took),
            millis(at)
        );
    }
    text
}

fn millis(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1000.0)
}

/// Prints something that happens meanwhile; `end` is the end of the line, another one on a raw terminal.
pub(crate) fn meanwhile(message: &str, end: &str) {
    print(&format!("{}: {message}{end}", paint("belljar", "1")));
}

pub(crate) fn print(text: &str) {
    // Nobody to tell if standard error is closed.
    let _ = stderr().write_all(text.as_bytes());
}

/// Colour on terminals, unless `NO_COLOR` is set.
fn paint(text: &str, code: &str) -> String {
    let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if wanted && stderr().is_terminal() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn the_table_names_every_stage() {
        let mut stages = Stages::new(Instant::now());
        stages.mark("prepared");
        stages.mark("agent ready");
        let text = stage_table(&stages);
        assert!(text.starts_with("boot time "), "{text}");
        assert!(
            text.contains("  prepared") && text.lines().count() == 3,
            "{text}"
        );
    }
}
