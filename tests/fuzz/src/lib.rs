//! Fuzz targets: functions from bytes to nothing that must return, whatever the bytes are.
//!
//! Each runs in two ways: with libFuzzer for hours (`make fuzz`), where coverage guides it, and in
//! the unit tests with some thousand seeded mutations of good input.
#![forbid(unsafe_code)]
#![allow(missing_docs)]

mod decoders;
mod files;
mod layers;
pub mod mutate;
mod store;
mod vm_state;

/// A target with some good input to begin with.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "frames",
        run: decoders::frames,
        seeds: decoders::frame_seeds,
    },
    Target {
        name: "host",
        run: decoders::host,
        seeds: decoders::host_seeds,
    },
    Target {
        name: "agent",
        run: decoders::agent,
        seeds: decoders::agent_seeds,
    },
    Target {
        name: "pieces",
        run: files::pieces,
        seeds: files::piece_seeds,
    },
    Target {
        name: "tar",
        run: files::tar,
        seeds: files::tar_seeds,
    },
    Target {
        name: "store-sealed",
        run: store::sealed,
        seeds: store::sealed_seeds,
    },
    Target {
        name: "store-pack",
        run: store::pack,
        seeds: store::pack_seeds,
    },
    Target {
        name: "store-stream",
        run: store::stream,
        seeds: store::stream_seeds,
    },
    Target {
        name: "vm-state",
        run: vm_state::state,
        seeds: vm_state::seeds,
    },
    Target {
        name: "layer",
        run: layers::layer,
        seeds: layers::seeds,
    },
    Target {
        name: "layer-resealed",
        run: layers::resealed,
        seeds: layers::seeds,
    },
];

/// The target of that name.
#[must_use]
pub fn find(name: &str) -> Option<Target> {
    TARGETS.iter().find(|target| target.name == name).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Enough that every seed is mutated some hundred times; the whole takes a few seconds.
    const ROUNDS: u64 = 60_000;

    #[test]
    fn every_target_takes_its_seeds_and_mutations_of_them() {
        for target in TARGETS {
            let seeds = (target.seeds)();
            assert!(!seeds.is_empty(), "{}", target.name);
            for seed in &seeds {
                (target.run)(seed);
            }
            let mut random = mutate::Random::new(0x0BE1_17A2);
            for _ in 0..ROUNDS {
                (target.run)(&random.mutated(&seeds));
            }
        }
    }

    #[test]
    fn mutations_repeat_for_the_same_seed_and_differ_from_their_source() {
        let seeds = decoders::host_seeds();
        let all = |seed| -> Vec<_> {
            let mut random = mutate::Random::new(seed);
            (0..100).map(|_| random.mutated(&seeds)).collect()
        };
        assert_eq!(all(1), all(1));
        assert_ne!(all(1), all(2));
        let changed = all(1).iter().filter(|bytes| !seeds.contains(bytes)).count();
        assert!(changed > 80, "{changed}");
    }
}
