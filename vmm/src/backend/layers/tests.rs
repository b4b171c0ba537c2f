//! Both engines against an array of bytes, through guest RAM.
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::backend::disk::{Op, Started};
use crate::memory::GuestRam;
use crate::memory::segment::Segment;

const SIZE: u64 = 64 * 4096;
/// Guest RAM: the upper half is where reads go.
const RAM: u64 = 1 << 20;
const INTO: u64 = RAM / 2;

fn memory(size: u64) -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("layer", flags).unwrap());
    file.set_len(size).unwrap();
    file
}

/// The same file, opened anew, as another process would have it.
fn again(file: &File, writable: bool) -> File {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut options = File::options();
    options.read(true).write(writable).open(path).unwrap()
}

fn named(file: &File, writable: bool) -> Named {
    Named {
        file: again(file, writable),
        name: "file".into(),
    }
}

fn read_only(files: &[&File]) -> Result<(Box<dyn Disk>, Handle)> {
    let (base, layers) = files.split_first().unwrap();
    let layers = layers.iter().map(|layer| named(layer, false)).collect();
    open(named(base, false), layers, true, IoEngine::Sync)
}

/// Segments of uneven lengths that are `length` bytes together.
fn segments(at: u64, length: u64) -> Vec<Segment> {
    let mut all = Vec::new();
    let mut done = 0;
    for part in [512, 1536, 4096, 512, 10_240, 1024].iter().cycle() {
        if done == length {
            break;
        }
        let len = (length - done).min(*part);
        all.push(Segment {
            addr: GuestAddress(at + done),
            len: len as u32,
        });
        done += len;
    }
    all
}

struct Drive {
    disk: Box<dyn Disk>,
    handle: Handle,
    mem: GuestRam,
    model: Vec<u8>,
    files: Vec<File>,
    /// What each frozen layer's state is.
    states: Vec<Vec<u8>>,
    started: u16,
}

impl Drive {
    fn new(engine: IoEngine) -> Self {
        let (base, top) = (memory(SIZE), memory(0));
        let content: Vec<u8> = (0..SIZE).map(|i| (i / 512) as u8 | 1).collect();
        std::os::unix::fs::FileExt::write_all_at(&base, &content, 0).unwrap();
        let (disk, handle) =
            open(named(&base, false), vec![named(&top, true)], false, engine).unwrap();
        Self {
            disk,
            handle,
            mem: GuestRam::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap(),
            model: content,
            files: vec![base, top],
            states: Vec::new(),
            started: 0,
        }
    }

    fn start(&mut self, op: Op<'_>) {
        let tag = self.started;
        match self.disk.start(&self.mem, op, tag) {
            Started::Done(result) => result.unwrap(),
            Started::InFlight => self.started += 1,
        }
    }

    /// Waits for all that was started.
    fn settle(&mut self) {
        self.disk.submit().unwrap();
        let mut done = Vec::new();
        self.disk.reap(true, &mut done).unwrap();
        let mut tags: Vec<u16> = done.iter().map(|(tag, _)| *tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, (0..self.started).collect::<Vec<_>>());
        assert!(done.iter().all(|(_, result)| result.is_ok()), "{done:?}");
        self.started = 0;
    }

    fn content(&mut self) -> Vec<u8> {
        self.settle();
        let to = segments(INTO, SIZE);
        self.start(Op::Read { to: &to, offset: 0 });
        self.settle();
        let mut bytes = vec![0; SIZE as usize];
        self.mem.read_slice(&mut bytes, GuestAddress(INTO)).unwrap();
        bytes
    }

    fn take(&mut self, step: &Step) {
        let whole = |at: u64, length: u64| at as usize..(at + length) as usize;
        match *step {
            // Each in its own place of RAM, so that several can be under way.
            Step::Write(at, length, byte) => {
                if self.started >= 8 {
                    self.settle();
                }
                let place = u64::from(self.started) * (60 * 512);
                let bytes: Vec<u8> = (0..length).map(|i| byte ^ (i / 512) as u8).collect();
                self.mem.write_slice(&bytes, GuestAddress(place)).unwrap();
                let from = segments(place, length);
                self.start(Op::Write {
                    from: &from,
                    offset: at,
                });
                self.model[whole(at, length)].copy_from_slice(&bytes);
            }
            Step::Zero(at, length) => {
                self.disk.write_zeroes(at, length, true).unwrap();
                self.model[whole(at, length)].fill(0);
            }
            Step::Discard(at, length) => {
                self.disk.discard(at, length).unwrap();
                let now = self.content();
                let clusters = now.chunks(4096).zip(self.model.chunks(4096));
                for (new, old) in clusters {
                    assert!(new == old || new.iter().all(|byte| *byte == 0));
                }
                self.model = now;
            }
            Step::Read => assert!(self.content() == self.model),
            Step::Flush => self.start(Op::Flush),
            Step::Freeze => {
                self.settle();
                let next = memory(0);
                let Ok(layer) = self.handle.next(named(&next, true)) else {
                    assert_eq!(self.files.len(), 9);
                    return;
                };
                self.handle.freeze(layer).unwrap();
                self.files.push(next);
                self.states.push(self.model.clone());
            }
            Step::Merge(first, count) => self.merge(first, count),
            Step::Replace(byte) => {
                self.settle();
                self.replace(byte);
            }
        }
    }

    /// Another image with an empty layer, as at a reset.
    fn replace(&mut self, byte: u8) {
        let (base, top) = (memory(SIZE), memory(0));
        let content: Vec<u8> = (0..SIZE).map(|i| (i / 512) as u8 ^ byte).collect();
        std::os::unix::fs::FileExt::write_all_at(&base, &content, 0).unwrap();
        // What cannot be leaves all as it was.
        let small = memory(SIZE / 2);
        let bad = vec![named(&memory(0), true)];
        assert!(
            self.handle
                .replace(named(&small, false), bad, false)
                .is_err()
        );
        assert!(self.content() == self.model);
        let layers = vec![named(&top, true)];
        self.handle
            .replace(named(&base, false), layers, false)
            .unwrap();
        // The files before belong to nobody any more.
        for file in &self.files {
            let alone = rustix::fs::FlockOperation::NonBlockingLockExclusive;
            rustix::fs::flock(again(file, false), alone).unwrap();
        }
        self.model = content;
        self.files = vec![base, top];
        self.states.clear();
    }

    /// With requests in flight, as under a running guest.
    fn merge(&mut self, first: usize, count: usize) {
        let range = first + 1..first + 1 + count;
        if range.end >= self.files.len() {
            return;
        }
        let layers = self.files[range.clone()].iter();
        let layers = layers.map(|file| (again(file, false), "layer".to_owned()));
        let view = belljar_layers::View::open(layers.collect()).unwrap();
        let merged = memory(0);
        let into = again(&merged, true);
        belljar_layers::merge(&view, into, "merged", &mut |_| Ok(())).unwrap();
        let replaced = self.handle.replace_merged(named(&merged, false));
        assert_eq!(replaced.unwrap(), count);
        self.files.splice(range, [merged]);
        self.states.drain(first..first + count - 1);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Read,
    Flush,
    Freeze,
    /// The first, and how many.
    Merge(usize, usize),
    Replace(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let range = || {
        (0..SIZE / 512, 1u64..60).prop_map(|(at, len)| (at * 512, (len * 512).min(SIZE - at * 512)))
    };
    prop_oneof![
        8 => (range(), 1u8..).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        1 => range().prop_map(|(at, len)| Step::Zero(at, len)),
        1 => range().prop_map(|(at, len)| Step::Discard(at, len)),
        1 => Just(Step::Read),
        3 => Just(Step::Flush),
        1 => Just(Step::Freeze),
        1 => (0usize..4, 1usize..7).prop_map(|(first, count)| Step::Merge(first, count)),
        1 => (1u8..).prop_map(Step::Replace),
    ]
}

/// Writes that overlap and are under way at once have no order.
fn without_races(steps: Vec<Step>) -> Vec<Step> {
    let mut open: Vec<(u64, u64)> = Vec::new();
    let mut all = Vec::new();
    for step in steps {
        match step {
            Step::Write(at, length, _) => {
                if open.iter().any(|(a, l)| at < a + l && *a < at + length) {
                    all.push(Step::Read);
                    open.clear();
                }
                open.push((at, length));
            }
            Step::Flush | Step::Merge(..) => {}
            _ => open.clear(),
        }
        all.push(step);
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_layered_drive_is_an_array_of_bytes(
        steps in prop::collection::vec(step(), 1..40).prop_map(without_races),
        asynchronous in any::<bool>(),
    ) {
        let mut drive = Drive::new(if asynchronous { IoEngine::Async } else { IoEngine::Sync });
        for step in &steps {
            drive.take(step);
        }
        prop_assert!(drive.content() == drive.model);
        // Others can read what is frozen, and see what it was.
        let mut bytes = vec![0; SIZE as usize];
        for (count, state) in (1..).zip(&drive.states) {
            let files: Vec<&File> = drive.files[..=count].iter().collect();
            let (mut disk, _) = read_only(&files).unwrap();
            let to = segments(INTO, SIZE);
            let started = disk.start(&drive.mem, Op::Read { to: &to, offset: 0 }, 0);
            prop_assert!(matches!(started, Started::Done(Ok(()))), "{:?}", started);
            drive.mem.read_slice(&mut bytes, GuestAddress(INTO)).unwrap();
            prop_assert!(bytes == *state);
        }
        // The top is in use; once it is let go it can be opened, and has all that was flushed.
        let files: Vec<&File> = drive.files.iter().collect();
        let in_use = read_only(&files).map(|_| ()).unwrap_err();
        prop_assert!(matches!(in_use, LayersError::File(DiskError::InUse { .. })), "{}", in_use);
        drive.handle.close().unwrap();
        let model = drive.model.clone();
        let files = std::mem::take(&mut drive.files);
        drop(drive);
        let mut layers: Vec<Named> = files[1..].iter().map(|f| named(f, false)).collect();
        layers.pop();
        layers.push(named(files.last().unwrap(), true));
        let (disk, handle) = open(named(&files[0], false), layers, false, IoEngine::Sync).unwrap();
        drop(disk);
        lock(&handle.0).stack.read(&mut bytes, 0).unwrap();
        prop_assert!(bytes == model);
    }
}

/// What was flushed is found by who opens the files after the process was killed.
#[test]
fn flushes_of_both_engines_reach_the_map() {
    for engine in [IoEngine::Sync, IoEngine::Async] {
        let mut drive = Drive::new(engine);
        drive.take(&Step::Write(4096, 8192, 7));
        drive.settle();
        // Several flushes at once, and a write between them.
        for _ in 0..3 {
            drive.take(&Step::Flush);
        }
        drive.take(&Step::Write(32_768, 4096, 9));
        drive.take(&Step::Flush);
        drive.settle();
        // As it is on disk now: nobody closed it.
        let files = [again(&drive.files[0], false), copy(&drive.files[1])];
        let layers = vec![named(&files[1], true)];
        let (_, handle) = open(named(&files[0], false), layers, false, IoEngine::Sync).unwrap();
        let mut bytes = vec![0; 8192];
        lock(&handle.0).stack.read(&mut bytes, 4096).unwrap();
        assert_eq!(bytes, drive.model[4096..12_288]);
    }
}

fn copy(file: &File) -> File {
    let to = memory(0);
    std::io::copy(&mut again(file, false), &mut &to).unwrap();
    to
}

#[test]
fn files_that_do_not_fit_are_refused() {
    let (base, top) = (memory(SIZE), memory(0));
    // Two drives, one file.
    let first = open(
        named(&base, false),
        vec![named(&top, true)],
        false,
        IoEngine::Sync,
    );
    let _first = first.unwrap();
    let second = open(
        named(&base, false),
        vec![named(&top, true)],
        false,
        IoEngine::Sync,
    );
    assert!(matches!(
        second.map(|_| ()),
        Err(LayersError::File(DiskError::InUse { .. }))
    ));
    // The base image is never written, so clones share it.
    let other = memory(0);
    let clone = open(
        named(&base, false),
        vec![named(&other, true)],
        false,
        IoEngine::Sync,
    );
    drop(clone.unwrap());
    let raw = open(
        named(&base, false),
        vec![named(&base, false)],
        true,
        IoEngine::Sync,
    );
    let error = raw.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("no usable disk layer"), "{error}");
    let read_only = open(
        named(&base, false),
        vec![named(&memory(0), false)],
        false,
        IoEngine::Sync,
    );
    let error = read_only.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("reading and writing"), "{error}");
}
