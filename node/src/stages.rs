//! When each stage of a sandbox's life was reached.

use std::time::{Duration, Instant};

use belljar_protocol::v1::BootTimes;

/// Marks on the host's clock, and the guest's own account of its boot.
#[derive(Debug, Clone)]
pub struct Stages {
    begin: Instant,
    marks: Vec<(&'static str, Duration)>,
}

impl Stages {
    /// Counts from `begin`.
    #[must_use]
    pub fn new(begin: Instant) -> Self {
        Self {
            begin,
            marks: Vec::new(),
        }
    }

    /// `stage` is finished now.
    pub fn mark(&mut self, stage: &'static str) {
        self.marks.push((stage, self.begin.elapsed()));
    }

    /// The guest's boot is finished now; `times` divides the time since the last mark, as far as the
    /// guest's account fits into it.
    pub fn mark_guest(&mut self, times: &BootTimes) {
        let end = self.begin.elapsed();
        let start = self.marks.last().map_or(Duration::ZERO, |(_, at)| *at);
        let mut reached = start;
        for (stage, guest_ns) in [
            ("guest kernel", times.init_ns),
            ("init and mounts", times.mounted_ns),
        ] {
            let at = start.saturating_add(Duration::from_nanos(guest_ns));
            // The guest is not trusted, with times neither.
            reached = at.clamp(reached, end.max(reached));
            self.marks.push((stage, reached));
        }
        self.marks.push(("agent ready", end));
    }

    /// Each stage with the time it took and the time since the beginning.
    pub fn rows(&self) -> impl Iterator<Item = (&'static str, Duration, Duration)> + '_ {
        let before = std::iter::once(Duration::ZERO).chain(self.marks.iter().map(|(_, at)| *at));
        self.marks
            .iter()
            .zip(before)
            .map(|((stage, at), before)| (*stage, at.saturating_sub(before), *at))
    }

    /// When a stage was reached, counted from the beginning.
    #[must_use]
    pub fn reached(&self, stage: &str) -> Option<Duration> {
        let mark = self.marks.iter().find(|(name, _)| *name == stage)?;
        Some(mark.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stages_add_up_whatever_the_guest_says() {
        for (init_ns, mounted_ns) in [(0, 0), (u64::MAX, 1), (1, u64::MAX), (1000, 2000)] {
            let mut stages = Stages::new(Instant::now());
            stages.mark("VMM process");
            stages.mark_guest(&BootTimes {
                init_ns,
                mounted_ns,
                ..BootTimes::default()
            });
            let sum: Duration = stages.rows().map(|(_, took, _)| took).sum();
            assert_eq!(stages.reached("agent ready"), Some(sum));
            assert_eq!(stages.rows().count(), 4);
        }
    }
}
