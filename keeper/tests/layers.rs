//! Disks that come to the keeper as layers over a base image, and go from it as one image.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use belljar_keeper::client::{Client, KeeperError};
use belljar_keeper::v1::{self, error::Code, reply::Result as Answer, request::Call};
use belljar_layers::{LayerId, Stack, View, create, merge};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

mod common;

use common::{Place, content, list, open, pages, refused};

const SIZE: u64 = 2 << 20;

/// A disk that a guest writes, and what it holds.
struct Disk {
    base: File,
    layers: Vec<File>,
    stack: Stack<File>,
    model: Vec<u8>,
}

fn empty() -> File {
    tempfile::tempfile().unwrap()
}

impl Disk {
    fn new() -> Self {
        let base = empty();
        base.set_len(SIZE).unwrap();
        let mut model = vec![0; SIZE as usize];
        for at in [8192, 1 << 20] {
            let data = pages(at as u64, 20);
            base.write_all_at(&data, at as u64).unwrap();
            model[at..at + data.len()].copy_from_slice(&data);
        }
        let top = empty();
        create(&top, "top", SIZE, LayerId::BASE).unwrap();
        let layers = vec![(top.try_clone().unwrap(), "top".to_owned())];
        let stack = Stack::open((base.try_clone().unwrap(), "base"), layers, true).unwrap();
        Self {
            base,
            layers: vec![top],
            stack,
            model,
        }
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.stack.write(bytes, at).unwrap();
        let at = at as usize;
        self.model[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn zero(&mut self, at: u64, length: u64) {
        self.stack.write_zeroes(at, length).unwrap();
        self.model[at as usize..(at + length) as usize].fill(0);
    }

    /// Makes all layers but a new one frozen.
    fn freeze(&mut self) {
        let next = empty();
        let opened = self.stack.next(next.try_clone().unwrap(), "next").unwrap();
        self.stack.freeze(opened).unwrap();
        self.layers.push(next);
    }

    /// Puts one layer in the place of several frozen ones, if there are so many.
    fn merge(&mut self, first: usize, count: usize) {
        let range = first..first + count;
        if range.end >= self.layers.len() {
            return;
        }
        let layers = self.layers[range.clone()].iter();
        let layers = layers.map(|layer| (layer.try_clone().unwrap(), "layer".to_owned()));
        let view = View::open(layers.collect()).unwrap();
        let merged = empty();
        merge(
            &view,
            merged.try_clone().unwrap(),
            "merged",
            &mut |_| Ok(()),
        )
        .unwrap();
        let replaced = self
            .stack
            .replace_merged(merged.try_clone().unwrap(), "merged");
        assert_eq!(replaced.unwrap(), count);
        self.layers.splice(range, [merged]);
    }

    fn frozen(&self) -> Vec<&File> {
        let count = self.layers.len() - 1;
        std::iter::once(&self.base)
            .chain(&self.layers[..count])
            .collect()
    }
}

fn keep(client: &mut Client, files: &[&File], count: u32) -> Result<String, KeeperError> {
    keep_since(client, "", files, count)
}

fn keep_since(
    client: &mut Client,
    base: &str,
    files: &[&File],
    count: u32,
) -> Result<String, KeeperError> {
    let begin = Call::Begin(v1::Begin {
        base: base.to_owned(),
        ..v1::Begin::default()
    });
    let (Answer::Begun(_), got) = client.call(begin, &[], |_| {}).unwrap() else {
        panic!("not begun")
    };
    assert_eq!(got.len(), 1, "only the state's file");
    let keep = v1::Keep {
        has_disk: true,
        sandbox: b"who it was".to_vec(),
        disk_layers: count,
        ..v1::Keep::default()
    };
    let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let (Answer::Accepted(accepted), _) = client.call(Call::Keep(keep), &files, |_| {})? else {
        panic!("not accepted")
    };
    let (Answer::Kept(_), _) = client.answer(|_| {})? else {
        panic!("not kept")
    };
    Ok(accepted.id)
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u64),
    Zero(u64, u64),
    Freeze,
    Merge(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let range = || {
        (0..SIZE / 512, 1u64..200)
            .prop_map(|(at, len)| (at * 512, (len * 512).min(SIZE - at * 512)))
    };
    prop_oneof![
        4 => (range(), any::<u64>()).prop_map(|((at, len), seed)| Step::Write(at, len, seed)),
        1 => range().prop_map(|(at, len)| Step::Zero(at, len)),
        2 => Just(Step::Freeze),
        1 => (0usize..3, 1usize..4).prop_map(|(first, count)| Step::Merge(first, count)),
    ]
}

#[test]
fn what_layers_hold_is_given_back_byte_for_byte() {
    let place = Place::new();
    let client = RefCell::new(place.connect());
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(16)
    };
    let all = prop::collection::vec(step(), 1..30);
    let mut runner = TestRunner::new(config);
    let outcome = runner.run(&all, |steps| {
        let mut disk = Disk::new();
        let mut client = client.borrow_mut();
        // What was kept, and what it was; each of it is what changed since the one before.
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        for step in steps.iter().chain([&Step::Freeze]) {
            match *step {
                Step::Write(at, length, seed) => {
                    let bytes = pages(seed, 1 + length as usize / 4096);
                    disk.write(at, &bytes[..length as usize]);
                }
                Step::Zero(at, length) => disk.zero(at, length),
                Step::Merge(first, count) => disk.merge(first, count),
                Step::Freeze => {
                    if disk.layers.len() == 8 {
                        disk.merge(2, 5);
                    }
                    disk.freeze();
                    let base = kept.last().map_or("", |(id, _)| id);
                    let files = disk.frozen();
                    let count = files.len() as u32 - 1;
                    let id = keep_since(&mut client, base, &files, count).unwrap();
                    kept.push((id, disk.model.clone()));
                }
            }
        }
        for (id, model) in &kept {
            let (opened, files) = open(&mut client, id).unwrap();
            prop_assert!(opened.has_disk && !opened.has_memory);
            prop_assert!(content(&files[0]) == *model);
        }
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn of_a_disk_whose_layers_are_known_only_new_ones_are_read() {
    let place = Place::new();
    let mut client = place.connect();
    let mut disk = Disk::new();
    disk.write(4096, &[1; 8192]);
    disk.freeze();
    let first = keep(&mut client, &disk.frozen(), 1).unwrap();
    disk.write(8192, &[2; 4096]);
    disk.zero(1 << 20, 4096);
    disk.freeze();
    // What was stored before is not looked at again: nobody would see that it is something else now.
    let at = disk.layers[0].metadata().unwrap().len() - SIZE;
    disk.layers[0].write_all_at(&[9; 4096], at + 4096).unwrap();
    let known = keep_since(&mut client, &first, &disk.frozen(), 2).unwrap();
    let (_, files) = open(&mut client, &known).unwrap();
    assert!(content(&files[0]) == disk.model);
    // Of another disk all is read, and of this one without a snapshot to build on.
    let mut other = Disk::new();
    other.write(0, &[5; 4096]);
    other.freeze();
    let of_other = keep_since(&mut client, &known, &other.frozen(), 1).unwrap();
    let (_, files) = open(&mut client, &of_other).unwrap();
    assert!(content(&files[0]) == other.model);
    let whole = keep(&mut client, &disk.frozen(), 2).unwrap();
    let (_, files) = open(&mut client, &whole).unwrap();
    disk.model[4096..8192].fill(9);
    assert!(content(&files[0]) == disk.model);
}

/// Files of packs there are.
fn packs(place: &Place) -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir(place.path().join("store/packs")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn what_the_base_has_lost_of_its_disk_is_stored_again() {
    let place = Place::new();
    let mut client = place.connect();
    let mut disk = Disk::new();
    disk.write(4096, &[1; 8192]);
    disk.freeze();
    keep(&mut client, &disk.frozen(), 1).unwrap();
    let lost = packs(&place);
    // Another state of the same content: of what it consists is known, and which layer it is of is new.
    disk.freeze();
    let base = keep(&mut client, &disk.frozen(), 2).unwrap();
    assert!(packs(&place).len() > lost.len());
    drop(client);
    place.kill();
    for pack in &lost {
        std::fs::remove_file(pack).unwrap();
    }
    common::forget_templates(&place.path());
    let mut client = place.connect();
    assert!(open(&mut client, &base).is_err(), "it has lost its disk");
    disk.write(0, &[2; 4096]);
    disk.freeze();
    let next = keep_since(&mut client, &base, &disk.frozen(), 3).unwrap();
    let (_, files) = open(&mut client, &next).unwrap();
    assert!(content(&files[0]) == disk.model);
}

#[test]
fn layers_that_are_no_frozen_disk_are_refused() {
    let place = Place::new();
    let mut client = place.connect();
    let mut disk = Disk::new();
    disk.write(4096, &[1; 4096]);
    disk.freeze();
    disk.write(0, &[2; 4096]);
    disk.freeze();
    let (base, layers) = (&disk.base, &disk.layers);
    let small = empty();
    small.set_len(SIZE / 2).unwrap();
    for (files, count, says) in [
        (vec![], 1, "should have come"),
        (vec![base], 1, "should have come"),
        (vec![base, &layers[0], &layers[1]], 3, "should have come"),
        (vec![base, &layers[1], &layers[0]], 2, "lies over layer"),
        (vec![base, &layers[1]], 1, "over a base image"),
        (vec![&small, &layers[0]], 1, "bytes"),
        (vec![base, base], 1, "layer 1"),
        (
            vec![base, &layers[0], &layers[1], &layers[2]],
            3,
            "not frozen",
        ),
        // Nothing of them at all.
        (vec![], 0, "no disk"),
    ] {
        let (code, message) = refused(keep(&mut client, &files, count));
        assert_eq!(code, Code::Invalid, "{message}");
        assert!(message.contains(says), "{message}: {says}");
    }
    assert_eq!(list(&mut client), []);
    let files = disk.frozen();
    let id = keep(&mut client, &files, 2).unwrap();
    let (_, files) = open(&mut client, &id).unwrap();
    assert!(content(&files[0]) == disk.model);
}
