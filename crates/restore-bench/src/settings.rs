//! What is measured: which guests, how they are restored, which sweeps.

use std::path::PathBuf;

use crate::failure::{Failure, Result};
use crate::vmm::Binary;

/// What runs in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// The project's agent as PID 1; the reply is the output of a command that it runs.
    Agent,
    /// The benchmark's program alone as PID 1; the reply comes straight from it.
    Program,
}

impl Guest {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Program => "program",
        }
    }
}

/// What is in memory of the host when a guest is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cache {
    /// The snapshot is in the page cache.
    Hot,
    /// It is not, all else is.
    Warm,
    /// Nothing is that root can have dropped.
    Cold,
    /// It is there as chunks of a store alone, from which a keeper brings in what the guest touches. Of our own VMM only.
    Lazy,
}

/// What a VMM has done before it is told to restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ahead {
    Nothing,
    /// It has made its VM and vCPUs (`/prepare`).
    Vm,
    /// And it has mapped the snapshot's memory and copied the recorded pages, if there are.
    Memory,
}

impl Ahead {
    /// As it stands in JSON lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "no",
            Self::Vm => "vm",
            Self::Memory => "memory",
        }
    }
}

impl Cache {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Warm => "warm",
            Self::Cold => "cold",
            Self::Lazy => "lazy",
        }
    }
}

/// How a guest is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    pub cache: Cache,
    /// Of our own VMM only.
    pub prepared: Ahead,
    /// The pages that a recorded run touched are brought in at once. Of our own VMM only.
    pub recorded: bool,
}

impl Way {
    /// `hot`, `hot, VM ahead`, …
    #[must_use]
    pub fn name(self) -> String {
        let mut name = self.cache.name().to_owned();
        name.push_str(match self.prepared {
            Ahead::Nothing => "",
            Ahead::Vm => ", VM ahead",
            Ahead::Memory => ", VM and RAM ahead",
        });
        if self.recorded {
            name.push_str(", recorded");
        }
        name
    }
}

/// One point of the sweeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    /// RAM of the guest.
    pub memory_mib: u64,
    /// What the restored guest writes to after its reply.
    pub working_set_mib: u64,
    /// How many are restored at the same time.
    pub clones: u32,
}

/// Everything that a run is told. Of each list the first is the base; the others are swept one list at a time.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The first is this project's.
    pub vmms: Vec<Binary>,
    pub kernel: PathBuf,
    /// With the agent; for [`Guest::Agent`].
    pub initramfs: PathBuf,
    /// `belljar-bench-guest`.
    pub program: PathBuf,
    /// `belljar-keeper`; for [`Cache::Lazy`].
    pub keeper: PathBuf,
    /// Where inputs are copied, VMMs work and snapshots are.
    pub directory: PathBuf,
    pub guest: Guest,
    pub vcpus: u32,
    pub memory_mib: Vec<u64>,
    /// RAM that the guest fills with bytes without structure before it is saved.
    pub filled_mib: u64,
    pub working_set_mib: Vec<u64>,
    pub clones: Vec<u32>,
    pub caches: Vec<Cache>,
    /// At least one.
    pub prepared: Vec<Ahead>,
    /// Also with a recorded working set.
    pub recorded: bool,
    /// How often each is measured.
    pub iterations: u32,
}

/// What a kernel, the agent and page structures need beside what is filled, MiB.
const LEAST_REST_MIB: u64 = 48;

impl Settings {
    /// Refuses what cannot be measured, with what to do about it.
    pub fn check(&self) -> Result<()> {
        let least = self.filled_mib.saturating_add(LEAST_REST_MIB);
        if let Some(memory) = self.memory_mib.iter().find(|mib| **mib < least) {
            return Err(Failure(format!(
                "a guest of {memory} MiB cannot be filled with {} MiB: give it {least} MiB or fill less",
                self.filled_mib
            )));
        }
        let largest = self.working_set_mib.iter().max();
        if let Some(set) = largest.filter(|set| **set > self.filled_mib) {
            return Err(Failure(format!(
                "a working set of {set} MiB is more than the {} MiB that are filled: fill more, or write less",
                self.filled_mib
            )));
        }
        let on_disk = |cache: &&Cache| matches!(cache, Cache::Warm | Cache::Cold);
        let colder = self.caches.iter().find(on_disk);
        if let Some(cache) = colder
            && crate::cache::is_memory(&self.directory)?
        {
            return Err(Failure(format!(
                "'{}' cannot be measured in {}, which is in memory: name a directory on a disk with --dir",
                cache.name(),
                self.directory.display()
            )));
        }
        let empty = self.vmms.is_empty()
            || self.memory_mib.is_empty()
            || self.working_set_mib.is_empty()
            || self.clones.is_empty()
            || self.caches.is_empty()
            || self.prepared.is_empty()
            || self.iterations == 0;
        if empty {
            return Err(Failure("there is nothing to measure".to_owned()));
        }
        let mut names: Vec<&str> = self.vmms.iter().map(|vmm| vmm.name.as_str()).collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair.first() == pair.last()) {
            return Err(Failure(
                "two VMMs have the same name: choose another NAME for --vs NAME=BINARY".to_owned(),
            ));
        }
        Ok(())
    }

    /// The first of each list.
    #[must_use]
    pub fn base(&self) -> Case {
        Case {
            memory_mib: self.memory_mib.first().copied().unwrap_or(256),
            working_set_mib: self.working_set_mib.first().copied().unwrap_or(1),
            clones: self.clones.first().copied().unwrap_or(1),
        }
    }

    /// The base and the sweeps, those with the same RAM together.
    #[must_use]
    pub fn cases(&self) -> Vec<Case> {
        let base = self.base();
        let memory = self.memory_mib.iter().map(|memory_mib| Case {
            memory_mib: *memory_mib,
            ..base
        });
        let sets = self.working_set_mib.iter().map(|set| Case {
            working_set_mib: *set,
            ..base
        });
        let clones = self.clones.iter().map(|clones| Case {
            clones: *clones,
            ..base
        });
        let mut cases = vec![base];
        for case in sets.chain(clones).chain(memory) {
            if !cases.contains(&case) {
                cases.push(case);
            }
        }
        cases
    }

    /// How a VMM's guests are restored; only our own has more than the API of all.
    #[must_use]
    pub fn ways(&self, ours: bool) -> Vec<Way> {
        let mut ways = Vec::new();
        for cache in &self.caches {
            let plain = Way {
                cache: *cache,
                prepared: Ahead::Nothing,
                recorded: false,
            };
            let is_lazy = *cache == Cache::Lazy;
            if !ours {
                if !is_lazy {
                    ways.push(plain);
                }
                continue;
            }
            for prepared in &self.prepared {
                // There is no memory file that could be mapped ahead.
                if is_lazy && *prepared == Ahead::Memory {
                    continue;
                }
                let way = Way {
                    prepared: *prepared,
                    ..plain
                };
                ways.push(way);
                if self.recorded {
                    ways.push(Way {
                        recorded: true,
                        ..way
                    });
                }
            }
        }
        ways
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn settings() -> Settings {
        Settings {
            vmms: vec![Binary {
                name: "belljar".to_owned(),
                path: "vmm".into(),
            }],
            kernel: "kernel".into(),
            initramfs: "initramfs".into(),
            program: "program".into(),
            keeper: "keeper".into(),
            directory: "/dev/shm".into(),
            guest: Guest::Agent,
            vcpus: 1,
            memory_mib: vec![256],
            filled_mib: 32,
            working_set_mib: vec![1],
            clones: vec![1],
            caches: vec![Cache::Hot],
            prepared: vec![Ahead::Nothing],
            recorded: false,
            iterations: 3,
        }
    }

    #[test]
    fn sweeps_change_one_thing_at_a_time() {
        let settings = Settings {
            memory_mib: vec![256, 1024],
            working_set_mib: vec![1, 8],
            clones: vec![1, 100],
            caches: vec![Cache::Hot, Cache::Lazy],
            prepared: vec![Ahead::Nothing, Ahead::Memory],
            recorded: true,
            ..settings()
        };
        settings.check().unwrap();
        let cases: Vec<_> = settings
            .cases()
            .into_iter()
            .map(|case| (case.memory_mib, case.working_set_mib, case.clones))
            .collect();
        assert_eq!(
            cases,
            [(256, 1, 1), (256, 8, 1), (256, 1, 100), (1024, 1, 1)]
        );
        let names: Vec<_> = settings.ways(true).into_iter().map(Way::name).collect();
        assert_eq!(
            names,
            [
                "hot",
                "hot, recorded",
                "hot, VM and RAM ahead",
                "hot, VM and RAM ahead, recorded",
                "lazy",
                "lazy, recorded"
            ]
        );
        assert_eq!(settings.ways(false).len(), 1);
    }

    #[test]
    fn what_cannot_be_measured_is_refused_with_a_remedy() {
        let twice = [settings().vmms, settings().vmms].concat();
        for (wrong, words) in [
            (
                Settings {
                    memory_mib: vec![64],
                    ..settings()
                },
                "give it 80 MiB",
            ),
            (
                Settings {
                    working_set_mib: vec![1, 33],
                    ..settings()
                },
                "fill more",
            ),
            (
                Settings {
                    caches: vec![Cache::Warm],
                    ..settings()
                },
                "--dir",
            ),
            (
                Settings {
                    iterations: 0,
                    ..settings()
                },
                "nothing to measure",
            ),
            (
                Settings {
                    vmms: twice,
                    ..settings()
                },
                "another NAME",
            ),
        ] {
            let said = wrong.check().unwrap_err().to_string();
            assert!(said.contains(words), "{said}");
        }
    }
}
