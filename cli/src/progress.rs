//! A bar for what takes its time: on standard error, only if that is a terminal.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// What is faster needs no bar.
const PATIENCE: Duration = Duration::from_millis(800);

/// Between two drawings.
const PAUSE: Duration = Duration::from_millis(100);

/// A bar that appears when a transfer takes long.
#[derive(Debug)]
pub(crate) struct Bar {
    /// `None`: never.
    next: Option<Instant>,
    bar: Option<ProgressBar>,
}

impl Bar {
    pub(crate) fn new(is_quiet: bool) -> Self {
        let is_wanted = !is_quiet && stderr().is_terminal();
        Self {
            next: is_wanted.then(|| Instant::now() + PATIENCE),
            bar: None,
        }
    }

    /// Bytes so far, and in all if that is known.
    pub(crate) fn tell(&mut self, done: u64, total: Option<u64>) {
        let Some(next) = self.next else { return };
        let now = Instant::now();
        if now < next {
            return;
        }
        self.next = Some(now + PAUSE);
        let bar = self.bar.get_or_insert_with(|| make(total));
        bar.set_position(done);
    }

    /// Takes it away again.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn make(total: Option<u64>) -> ProgressBar {
    let (bar, form) = match total {
        Some(total) => (
            ProgressBar::new(total),
            "{wide_bar} {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta}",
        ),
        None => (
            ProgressBar::new_spinner(),
            "{spinner} {binary_bytes}  {binary_bytes_per_sec}",
        ),
    };
    match ProgressStyle::with_template(form) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// A line that tells at which step of a long work things are; where standard error is no terminal, a new one for
/// each tenth of the work.
#[derive(Debug)]
pub(crate) struct Steps {
    bar: Option<ProgressBar>,
    told: Option<u64>,
}

impl Steps {
    pub(crate) fn new() -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            match ProgressStyle::with_template("{wide_bar} {pos} of {len}  {eta}  {msg}") {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Self { bar, told: None }
    }

    pub(crate) fn tell(&mut self, done: u64, all: u64, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(all);
            bar.set_position(done);
            bar.set_message(what.to_owned());
            return;
        }
        let tenth = done.saturating_mul(10).checked_div(all).unwrap_or(0);
        if self.told != Some(tenth) {
            self.told = Some(tenth);
            crate::report::note(&format!("{done} of {all}: {what}"));
        }
    }

    /// Takes it away again.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
