//! Why a guest did not come up, from what is left of it.

use std::fmt;

/// How far a guest came that never reported ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Not a word on the console.
    KernelSilent,
    /// The kernel gave up; its line says why.
    KernelPanicked(String),
    /// The kernel spoke, the agent did not.
    AgentNeverStarted,
    /// The agent spoke, but did not report ready.
    AgentNotReady,
}

/// Judges by the console's last lines.
#[must_use]
pub fn progress(console: &[String]) -> Progress {
    let with = |text: &str| console.iter().find(|line| line.contains(text));
    if let Some(line) = with("Kernel panic") {
        let reason = line.split_once("Kernel panic").map_or("", |(_, rest)| rest);
        let reason = reason.trim_start_matches(" - ").trim();
        return Progress::KernelPanicked(reason.to_owned());
    }
    if console.is_empty() {
        Progress::KernelSilent
    } else if with("belljar-agent").is_some() {
        Progress::AgentNotReady
    } else {
        Progress::AgentNeverStarted
    }
}

impl Progress {
    /// What to try.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::KernelSilent => {
                "check that --kernel is an x86-64 Linux kernel with virtio-mmio and virtio-console, or give it more time with --boot-timeout"
            }
            Self::KernelPanicked(reason) if reason.contains("init") => {
                "the initramfs holds no program the kernel can start; rebuild it with 'make image', or name another with --initramfs"
            }
            Self::KernelPanicked(_) => {
                "its last lines say why; more memory (--memory) helps when they speak of memory"
            }
            Self::AgentNeverStarted => {
                "check that the initramfs holds the agent as /init ('make image' builds it), or give it more time with --boot-timeout"
            }
            Self::AgentNotReady => {
                "the agent's lines say what it waits for; a slow machine needs a longer --boot-timeout"
            }
        }
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KernelSilent => f.write_str("the guest kernel gave no sign of life"),
            Self::KernelPanicked(reason) => write!(f, "the guest kernel panicked: {reason}"),
            Self::AgentNeverStarted => {
                f.write_str("the guest kernel started, but the agent never did")
            }
            Self::AgentNotReady => f.write_str("the agent started, but did not become ready"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_tell_how_far_it_came() {
        let lines = |text: &[&str]| {
            text.iter()
                .map(|line| (*line).to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(progress(&[]), Progress::KernelSilent);
        assert_eq!(
            progress(&lines(&["[    0.000000] Linux version 6.12"])),
            Progress::AgentNeverStarted
        );
        assert_eq!(
            progress(&lines(&[
                "Linux version 6.12",
                "belljar-agent: mounting /dev/vda"
            ])),
            Progress::AgentNotReady
        );
        let panic = progress(&lines(&[
            "belljar-agent: starting",
            "[    0.21] Kernel panic - not syncing: No working init found.",
        ]));
        assert_eq!(
            panic,
            Progress::KernelPanicked("not syncing: No working init found.".into())
        );
        assert!(panic.remedy().contains("initramfs"));
    }
}
