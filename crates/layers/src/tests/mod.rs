//! Layers as a whole: against a model, through power cuts, with damaged files.
mod hostile;
mod medium;
mod model;
mod power;

use std::fs::File;
use std::sync::Arc;

use crate::{LayerId, Stack, View, create};

/// A file in memory, where syncs take no time, `size` bytes long.
pub(super) fn file(size: u64) -> Arc<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("layer", flags).unwrap());
    file.set_len(size).unwrap();
    Arc::new(file)
}

/// A file on a disk, if the directory for temporary files is on one.
pub(super) fn file_on_disk(size: u64) -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    Arc::new(file)
}

pub(super) fn named(files: &[&Arc<File>]) -> Vec<(Arc<File>, String)> {
    let names = (0..).map(|n| format!("layer{n}"));
    files.iter().map(|f| Arc::clone(f)).zip(names).collect()
}

/// A disk over `base` with one new layer.
pub(super) fn disk(base: &Arc<File>, top: &Arc<File>) -> Stack<Arc<File>> {
    Stack::open((Arc::clone(base), "base"), named(&[top]), true).unwrap()
}

#[test]
fn an_empty_file_becomes_a_layer_and_is_found_again() {
    let (base, top) = (file(1 << 20), file(0));
    let mut stack = disk(&base, &top);
    stack.write(b"hello", 5000).unwrap();
    let id = stack.id();
    stack.close().unwrap();
    drop(stack);
    let stack = disk(&base, &top);
    assert_eq!(stack.id(), id);
    let mut bytes = [1; 7];
    stack.read(&mut bytes, 4999).unwrap();
    assert_eq!(&bytes, b"\0hello\0");
}

#[test]
fn what_is_frozen_is_written_by_nobody_and_clones_have_tops_of_their_own() {
    let base = file(1 << 20);
    let (first, second, other) = (file(0), file(0), file(0));
    let mut parent = disk(&base, &first);
    parent.write(&[1; 4096], 0).unwrap();
    let next = parent.next(Arc::clone(&second), "next").unwrap();
    parent.freeze(next).unwrap();
    parent.write(&[2; 4096], 0).unwrap();
    // The frozen layer cannot be a top.
    let again = Stack::open((Arc::clone(&base), "base"), named(&[&first]), true);
    assert!(matches!(again, Err(crate::Error::Frozen { .. })));
    let mut clone = Stack::open((base, "base"), named(&[&first, &other]), true).unwrap();
    clone.write(&[3; 100], 4096).unwrap();
    let mut bytes = [0; 4096];
    clone.read(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [1; 4096]);
    parent.read(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [2; 4096]);
    parent.read(&mut bytes, 4096).unwrap();
    assert_eq!(bytes, [0; 4096]);
    let view = View::open(named(&[&first])).unwrap();
    view.read(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [1; 4096]);
}

#[test]
fn layers_in_the_wrong_order_or_of_another_disk_are_refused() {
    let base = file(1 << 20);
    let (a, b, c, d) = (file(0), file(0), file(0), file(0));
    let mut stack = disk(&base, &a);
    let freeze = |stack: &mut Stack<_>, file: &Arc<File>| {
        let next = stack.next(Arc::clone(file), "next").unwrap();
        stack.freeze(next).unwrap();
    };
    freeze(&mut stack, &b);
    freeze(&mut stack, &c);
    stack.close().unwrap();
    let open = |files: &[&Arc<File>], writable| {
        let opened = Stack::open((Arc::clone(&base), "base"), named(files), writable);
        opened.map(|_| ()).map_err(|e| e.to_string())
    };
    open(&[&a, &b, &c], true).unwrap();
    open(&[&a, &b], false).unwrap();
    for (files, writable, says) in [
        (vec![&b, &a, &c], true, "lies over"),
        (vec![&a, &c], true, "lies over"),
        (vec![&a, &a, &b], true, "lies over"),
        (vec![&b, &c], true, "the base image"),
        (vec![&a, &b], true, "it is frozen"),
        (vec![&a, &c, &b], false, "lies over"),
        (vec![&a, &b, &c], false, "not frozen"),
        (vec![], true, "at least one"),
        (vec![&a; 9], true, "at most 8"),
        (vec![&base], true, "begin like"),
    ] {
        let error = open(&files, writable).unwrap_err();
        assert!(error.contains(says), "{error}: {says}");
    }
    create(&d, "d", 2 << 20, LayerId::BASE).unwrap();
    assert!(open(&[&d], true).unwrap_err().contains("2097152 bytes"));
    let odd = Stack::open((file(1000), "odd"), named(&[&file(0)]), true);
    assert!(matches!(odd, Err(crate::Error::BadSize { size: 1000 })));
}

#[test]
fn eight_layers_are_enough_and_merging_makes_room() {
    let base = file(1 << 20);
    let mut files = vec![file(0)];
    let mut stack = disk(&base, &files[0]);
    for round in 1..8u8 {
        stack
            .write(&[round; 4096], u64::from(round) * 8192)
            .unwrap();
        stack.write(&[round; 4096], 0).unwrap();
        files.push(file(0));
        let next = stack
            .next(Arc::clone(&files[usize::from(round)]), "next")
            .unwrap();
        stack.freeze(next).unwrap();
    }
    assert!(matches!(
        stack.next(file(0), "n"),
        Err(crate::Error::TooMany)
    ));
    stack.write(&[9; 4096], 8192 * 7).unwrap();
    let view = View::open(named(&files[..7].iter().collect::<Vec<_>>())).unwrap();
    let merged = file(0);
    let mut calls = 0;
    let mut count = |_| {
        calls += 1;
        Ok(())
    };
    let layer = crate::merge(&view, Arc::clone(&merged), "merged", &mut count).unwrap();
    assert_eq!((layer.id(), layer.parent()), (view.id(), LayerId::BASE));
    assert!(calls > 0);
    // One that has other clusters, and one for another place, change nothing.
    let other = file(0);
    let few = View::open(named(&files[..3].iter().collect::<Vec<_>>())).unwrap();
    let builder = crate::Builder::new(
        Arc::clone(&other),
        "o",
        stack.size(),
        few.id(),
        few.parent(),
    );
    builder.unwrap().finish().unwrap();
    for file in [&other, &files[7]] {
        stack.replace_merged(Arc::clone(file), "m").unwrap_err();
    }
    // In the middle first, then all; once more is once.
    let middle = file(0);
    let few = View::open(named(&files[2..5].iter().collect::<Vec<_>>())).unwrap();
    crate::merge(&few, Arc::clone(&middle), "middle", &mut |_| Ok(())).unwrap();
    assert_eq!(stack.replace_merged(Arc::clone(&middle), "m").unwrap(), 3);
    assert_eq!(stack.replace_merged(middle, "m").unwrap(), 1);
    assert_eq!(stack.layers().len(), 6);
    assert_eq!(
        stack.replace_merged(Arc::clone(&merged), "merged").unwrap(),
        5
    );
    assert_eq!(stack.replace_merged(merged, "merged").unwrap(), 1);
    assert_eq!(stack.layers().len(), 2);
    let mut bytes = [0; 4096];
    for round in 1..8u8 {
        stack.read(&mut bytes, u64::from(round) * 8192).unwrap();
        assert_eq!(bytes, [if round == 7 { 9 } else { round }; 4096]);
    }
    stack.read(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [7; 4096]);
    stack.next(file(0), "n").unwrap();
}
