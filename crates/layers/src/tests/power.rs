//! Power cuts: after a flush nothing is lost, and a sector is never anything but what was written to it.
use proptest::prelude::*;

use super::medium::{Forgetful, Luck};
use crate::{CLUSTER, Error, LayerId, Stack, create};

/// Three pages of the map would be much to copy: two ends of a disk of two.
const SIZE: u64 = 24 * CLUSTER;
const SECTORS: usize = SIZE as usize / 512;

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize),
    Zero(usize, usize),
    Discard(usize, usize),
    Flush,
    Freeze,
    Close,
    /// The process ends, and another one goes on; the kernel keeps what was written.
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SECTORS, 1usize..40).prop_map(|(at, n)| (at, n.min(SECTORS - at)));
    prop_oneof![
        6 => range().prop_map(|(at, n)| Step::Write(at, n)),
        1 => range().prop_map(|(at, n)| Step::Zero(at, n)),
        1 => range().prop_map(|(at, n)| Step::Discard(at, n)),
        3 => Just(Step::Flush),
        1 => Just(Step::Freeze),
        1 => Just(Step::Close),
        1 => Just(Step::Kill),
    ]
}

/// A disk, and for each of its sectors all that it may be after a power cut: the last flushed value
/// and those since.
struct Trial {
    base: Forgetful,
    files: Vec<Forgetful>,
    /// While the layer below it is being frozen.
    next: Option<Forgetful>,
    stack: Stack<Forgetful>,
    allowed: Vec<Vec<u32>>,
    next_value: u32,
}

fn sector(value: u32) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes.as_chunks_mut::<4>().0.fill(value.to_le_bytes());
    bytes
}

fn open(base: &Forgetful, files: &[Forgetful]) -> Result<Stack<Forgetful>, Error> {
    let named = files
        .iter()
        .cloned()
        .zip((0..).map(|n| format!("layer{n}")));
    Stack::open((base.clone(), "base"), named.collect(), true)
}

impl Trial {
    fn new() -> Self {
        let base: Vec<u8> = (0..SECTORS as u32).flat_map(|n| sector(n % 3)).collect();
        let base = Forgetful::of(&base);
        let top = Forgetful::default();
        Self {
            stack: open(&base, std::slice::from_ref(&top)).unwrap(),
            base,
            files: vec![top],
            next: None,
            allowed: (0..SECTORS as u32).map(|n| vec![n % 3]).collect(),
            next_value: 1000,
        }
    }

    /// What a flush makes the only thing that each sector may be: what is read now.
    fn settle(&mut self) {
        let now = content(&self.stack);
        for (allowed, value) in self.allowed.iter_mut().zip(now) {
            assert!(allowed.contains(&value));
            *allowed = vec![value];
        }
    }

    fn take(&mut self, step: &Step) -> Result<(), Error> {
        match *step {
            Step::Write(at, count) => {
                self.next_value += 1;
                let bytes: Vec<u8> = (0..count).flat_map(|_| sector(self.next_value)).collect();
                for allowed in &mut self.allowed[at..at + count] {
                    allowed.push(self.next_value);
                }
                self.stack.write(&bytes, at as u64 * 512)?;
            }
            Step::Zero(at, count) | Step::Discard(at, count) => {
                for allowed in &mut self.allowed[at..at + count] {
                    allowed.push(0);
                }
                let (at, length) = (at as u64 * 512, count as u64 * 512);
                match step {
                    Step::Zero(..) => self.stack.write_zeroes(at, length)?,
                    _ => self.stack.discard(at, length)?,
                }
            }
            Step::Flush => {
                self.stack.flush()?;
                self.settle();
            }
            Step::Close => {
                self.stack.close()?;
                self.settle();
            }
            Step::Kill => self.stack = open(&self.base, &self.files)?,
            Step::Freeze => {
                let top = Forgetful::default();
                match self.stack.next(top.clone(), "next") {
                    Ok(next) => {
                        self.next = Some(top.clone());
                        self.stack.freeze(next)?;
                        self.next = None;
                        self.files.push(top);
                        self.settle();
                    }
                    Err(Error::TooMany) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// The power goes now, several times, each time from here on.
    fn cut(&self, luck: &mut Luck) {
        for _ in 0..4 {
            let mut files: Vec<_> = self.files.iter().map(|file| file.cut(luck)).collect();
            let mut opened = open(&self.base, &files);
            if let (Err(Error::Frozen { .. }), Some(next)) = (&opened, &self.next) {
                // That much was done; then the next layer is there too.
                files.push(next.cut(luck));
                opened = open(&self.base, &files);
            }
            let mut stack = opened.unwrap();
            let found = content(&stack);
            for (value, allowed) in found.iter().zip(&self.allowed) {
                assert!(allowed.contains(value), "{value} is none of {allowed:?}");
            }
            // It goes on from there, and what it says is durable stays that.
            stack.write(&sector(77), 512).unwrap();
            stack.flush().unwrap();
            let files: Vec<_> = files.iter().map(|file| file.cut(luck)).collect();
            let after = content(&open(&self.base, &files).unwrap());
            let mut wanted = found;
            wanted[1] = 77;
            assert_eq!(after, wanted);
        }
    }
}

fn content(stack: &Stack<Forgetful>) -> Vec<u32> {
    let mut bytes = vec![0; SIZE as usize];
    stack.read(&mut bytes, 0).unwrap();
    let sectors = bytes.as_chunks::<512>().0;
    sectors
        .iter()
        .map(|bytes| {
            let value = u32::from_le_bytes(*bytes.first_chunk().unwrap());
            assert_eq!(*bytes, sector(value), "a sector of two values");
            value
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn the_power_may_go_after_any_step(
        steps in prop::collection::vec(step(), 1..14),
        seed in any::<u64>(),
    ) {
        let mut luck = Luck(seed);
        let mut trial = Trial::new();
        for step in &steps {
            trial.take(step).unwrap();
            trial.cut(&mut luck);
        }
    }

    #[test]
    fn the_power_may_go_within_a_step(
        steps in prop::collection::vec(step(), 1..14),
        syncs in 0u64..20,
        seed in any::<u64>(),
    ) {
        let mut luck = Luck(seed);
        let mut trial = Trial::new();
        trial.files[0].fail_after(syncs);
        for step in &steps {
            if trial.take(step).is_err() {
                // Whatever was tried: nothing more is promised, and nothing less.
                prop_assert!(trial.stack.flush().is_err(), "a flush after a failed one");
                break;
            }
        }
        trial.cut(&mut luck);
    }
}

#[test]
fn a_new_layer_is_durable_before_it_is_used() {
    let mut luck = Luck(1);
    let medium = Forgetful::default();
    let id = create(&medium, "new", SIZE, LayerId([5; 16])).unwrap();
    for _ in 0..8 {
        let layer = crate::Layer::open(medium.cut(&mut luck), "new").unwrap();
        assert_eq!((layer.id(), layer.parent()), (id, LayerId([5; 16])));
    }
}
