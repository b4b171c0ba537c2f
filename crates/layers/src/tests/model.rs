//! A stack against an array of bytes.
use std::fs::File;
use std::sync::Arc;

use proptest::prelude::*;

use super::{disk, file, file_on_disk, named};
use crate::{CLUSTER, Content, Stack, View, merge};

/// A little over one page of the map would be 125 MiB: the disk is small, the map is tested by itself.
const SIZE: u64 = 96 * CLUSTER;

#[derive(Clone, Debug)]
pub(super) enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Read(u64, u64),
    Flush,
    Freeze,
    /// The first, and how many.
    Merge(usize, usize),
    Reopen,
}

pub(super) fn range() -> impl Strategy<Value = (u64, u64)> {
    (0..SIZE / 512, 1u64..60).prop_map(|(at, len)| (at * 512, (len * 512).min(SIZE - at * 512)))
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (range(), 1u8..).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        2 => range().prop_map(|(at, len)| Step::Zero(at, len)),
        1 => range().prop_map(|(at, len)| Step::Discard(at, len)),
        2 => range().prop_map(|(at, len)| Step::Read(at, len)),
        1 => Just(Step::Flush),
        1 => Just(Step::Freeze),
        1 => (0usize..4, 1usize..7).prop_map(|(first, count)| Step::Merge(first, count)),
        1 => Just(Step::Reopen),
    ]
}

/// The disk and what it should hold.
struct Pair {
    base: Arc<File>,
    files: Vec<Arc<File>>,
    stack: Stack<Arc<File>>,
    model: Vec<u8>,
    /// What each frozen layer's state was.
    states: Vec<Vec<u8>>,
}

impl Pair {
    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        self.stack.read(&mut bytes, 0).unwrap();
        bytes
    }

    fn part(&mut self, at: u64, len: u64) -> &mut [u8] {
        &mut self.model[at as usize..(at + len) as usize]
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Write(at, len, byte) => {
                // Not all bytes alike, so that a shift is noticed.
                let bytes: Vec<u8> = (0..len).map(|i| byte ^ (i / 512) as u8).collect();
                self.stack.write(&bytes, at).unwrap();
                self.part(at, len).copy_from_slice(&bytes);
            }
            Step::Zero(at, len) => {
                self.stack.write_zeroes(at, len).unwrap();
                self.part(at, len).fill(0);
            }
            Step::Discard(at, len) => {
                self.stack.discard(at, len).unwrap();
                // Each cluster is as it was or zero; then that holds.
                let now = self.content();
                for (new, old) in now.chunks(4096).zip(self.model.chunks(4096)) {
                    assert!(new == old || new.iter().all(|byte| *byte == 0));
                }
                self.model = now;
            }
            Step::Read(at, len) => {
                let mut bytes = vec![0xaa; len as usize];
                self.stack.read(&mut bytes, at).unwrap();
                assert_eq!(bytes, self.part(at, len));
            }
            Step::Flush => self.stack.flush().unwrap(),
            Step::Freeze => {
                let top = file(0);
                let Ok(next) = self.stack.next(Arc::clone(&top), "next") else {
                    assert_eq!(self.files.len(), 8);
                    return;
                };
                self.stack.freeze(next).unwrap();
                self.files.push(top);
                self.states.push(self.model.clone());
            }
            Step::Merge(first, count) => self.merge(first, count),
            Step::Reopen => {
                self.stack.close().unwrap();
                let files: Vec<_> = self.files.iter().collect();
                let base = (Arc::clone(&self.base), "base");
                self.stack = Stack::open(base, named(&files), true).unwrap();
            }
        }
    }

    fn merge(&mut self, first: usize, count: usize) {
        let range = first..first + count;
        if range.end >= self.files.len() {
            return;
        }
        let files: Vec<_> = self.files[range.clone()].iter().collect();
        let view = View::open(named(&files)).unwrap();
        let merged = file(0);
        merge(&view, Arc::clone(&merged), "merged", &mut |_| Ok(())).unwrap();
        let replaced = self.stack.replace_merged(Arc::clone(&merged), "merged");
        assert_eq!(replaced.unwrap(), count);
        self.files.splice(range.clone(), [merged]);
        self.states.drain(first..range.end - 1);
    }

    /// Every frozen state is still what it was, also by its extents, and in no other byte.
    fn check(&self, base: &[u8]) {
        assert!(self.content() == self.model);
        for (count, state) in (1..).zip(&self.states) {
            let files: Vec<_> = self.files[..count].iter().collect();
            let view = View::open(named(&files)).unwrap();
            let mut by_extents = base.to_vec();
            let mut end = 0;
            for extent in view.extents() {
                let extent = extent.unwrap();
                assert!(extent.offset >= end && extent.length > 0);
                end = extent.offset + extent.length;
                let part = &mut by_extents[extent.offset as usize..end as usize];
                match extent.content {
                    Content::Zero => part.fill(0),
                    Content::Data => view.read(part, extent.offset).unwrap(),
                }
            }
            assert!(by_extents == *state);
            let view = view.over(Arc::clone(&self.base), "base").unwrap();
            let mut flat = vec![0; SIZE as usize];
            let mut at = 0;
            while let Some(data) = view.next_data(at).unwrap() {
                assert!(data.start >= at && data.end > data.start);
                let part = &mut flat[data.start as usize..data.end as usize];
                view.read(part, data.start).unwrap();
                at = data.end;
            }
            assert!(flat == *state);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]
    #[test]
    fn a_stack_is_an_array_of_bytes(
        steps in prop::collection::vec(step(), 1..40),
        islands in prop::collection::vec(range(), 0..4),
    ) {
        let base = file(SIZE);
        let mut model = vec![0; SIZE as usize];
        for (at, len) in islands {
            crate::Medium::write(&base, &vec![0xb5; len as usize], at).unwrap();
            model[at as usize..(at + len) as usize].fill(0xb5);
        }
        let top = file(0);
        let mut pair = Pair {
            stack: disk(&base, &top),
            base,
            files: vec![top],
            model: model.clone(),
            states: Vec::new(),
        };
        for step in &steps {
            pair.take(step);
        }
        pair.check(&model);
    }
}

#[test]
fn runs_are_as_long_as_can_be_and_zeros_are_holes() {
    let (base, top) = (file_on_disk(64 << 20), file_on_disk(0));
    let mut stack = disk(&base, &top);
    assert_eq!(stack.run(512, 32 << 20).length, 32 << 20);
    stack.write(&vec![1; 8 << 20], 8 << 20).unwrap();
    let runs = [
        stack.run(0, 64 << 20),
        stack.run(8 << 20, 64 << 20),
        stack.run(16 << 20, 512),
    ];
    assert_eq!(
        runs.map(|run| (run.file, run.length)),
        [(0, 8 << 20), (1, 8 << 20), (0, 512)]
    );
    let blocks = || {
        use std::os::unix::fs::MetadataExt;
        top.metadata().unwrap().blocks() * 512
    };
    assert!(blocks() >= 8 << 20);
    stack.write_zeroes(0, 64 << 20).unwrap();
    assert!(blocks() < 1 << 20, "{}", blocks());
    // The base has nothing there: the layer has no more clusters than before.
    assert_eq!(stack.run(0, 64 << 20).length, 8 << 20);
    stack.discard(0, 64 << 20).unwrap();
    assert_eq!(stack.run(0, 64 << 20).file, 0);
}
