//! A disk with its guest played by [`Stack`]: whatever is cut off, what was flushed is there, and what was captured
//! stays what it was.
use super::*;
use crate::sandbox::small_disk;
use crate::state::failing;
use belljar_layers::Stack;
use proptest::prelude::*;
use std::os::unix::fs::FileExt;

const SIZE: u64 = 32 * 4096;

/// A directory of a sandbox, its VMM, and what its disk should hold.
struct Played {
    _place: tempfile::TempDir,
    dir: SandboxDir,
    vmm: Option<Stack<File>>,
    model: Vec<u8>,
    /// The layer that the VMM was asked to go on with, and does not yet.
    asked: Option<String>,
    /// What was captured, and what the disk held then.
    captured: Vec<(Files, Vec<u8>)>,
}

fn file(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

/// In memory where that can be: what is made durable here is nothing that anybody keeps.
fn place() -> (tempfile::TempDir, SandboxDir) {
    let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let place = place.unwrap();
    let dir = SandboxDir::existing(place.path());
    (place, dir)
}

fn content_of(files: &Files) -> Vec<u8> {
    let again = |file: &File| file.try_clone().unwrap();
    let layers = files
        .layers
        .iter()
        .map(|layer| (again(layer), "layer".to_owned()));
    let view = View::open(layers.collect()).unwrap();
    let view = view.over(again(&files.base), "base").unwrap();
    let mut bytes = vec![0; SIZE as usize];
    view.read(&mut bytes, 0).unwrap();
    bytes
}

fn names(dir: &SandboxDir) -> Vec<String> {
    let entries = std::fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

impl Played {
    fn new(base: &File, frozen: &[File], model: Vec<u8>) -> Self {
        Self::new_in(place(), base, frozen, model)
    }

    fn new_in(
        (place, dir): (tempfile::TempDir, SandboxDir),
        base: &File,
        frozen: &[File],
        model: Vec<u8>,
    ) -> Self {
        let disk = Layered::make(&dir, base, frozen, true).unwrap();
        disk.install(&dir, true).unwrap();
        let mut new = Self {
            _place: place,
            dir,
            vmm: None,
            model,
            asked: None,
            captured: Vec::new(),
        };
        new.start();
        new
    }

    fn fresh() -> Self {
        let model: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8 | 1).collect();
        Self::new(&file(&model), &[], model)
    }

    fn vmm(&mut self) -> &mut Stack<File> {
        self.vmm.as_mut().unwrap()
    }

    /// Whatever was left goes, and a VMM takes the disk.
    fn start(&mut self) {
        self.asked = None;
        let disk = Layered::settled(&self.dir, true).unwrap().unwrap();
        disk.sweep(&self.dir);
        let open = |name: &String, write: bool| {
            let path = self.dir.file(name);
            File::options().read(true).write(write).open(path).unwrap()
        };
        let last = disk.layers.len() - 1;
        let layers = disk.layers.iter().enumerate();
        let layers = layers.map(|(at, name)| (open(name, at == last), name.clone()));
        let base = (open(&disk.base, false), "base");
        self.vmm = Some(Stack::open(base, layers.collect(), true).unwrap());
        // Nothing is there that is not needed.
        let mut wanted: Vec<_> = disk.names().cloned().collect();
        wanted.push(state::DISK_RECORD.to_owned());
        wanted.sort();
        assert_eq!(names(&self.dir), wanted);
        self.check();
    }

    fn check(&mut self) {
        let mut bytes = vec![0; SIZE as usize];
        self.vmm().read(&mut bytes, 0).unwrap();
        assert!(bytes == self.model);
    }

    fn write(&mut self, at: u64, length: u64, byte: u8) {
        let bytes = vec![byte; length as usize];
        self.vmm().write(&bytes, at).unwrap();
        self.model[at as usize..(at + length) as usize].copy_from_slice(&bytes);
    }

    /// A snapshot that gets so far: 0 only merges, 1 writes the next layer down, 2 freezes, 3 has it all.
    fn capture(&mut self, far: u8, merges: bool) {
        let dir = self.dir.clone();
        let mut disk = Layered::of(&dir).unwrap().unwrap();
        let vmm = self.vmm.as_mut().unwrap();
        let merged = disk.merge(&dir, true, |name| {
            if !merges {
                return Err("refused".to_owned());
            }
            let file = File::open(dir.file(name)).unwrap();
            let replaced = vmm.replace_merged(file, name);
            replaced.map(drop).map_err(|error| error.to_string())
        });
        if merged.is_err() {
            let expected = !merges || dir.file("disk.json.new").exists();
            assert!(expected && disk.layers.len() == MAX_LAYERS, "{merged:?}");
            return;
        }
        assert_eq!(Layered::of(&dir).unwrap().unwrap(), disk);
        if far == 0 {
            return;
        }
        let (files, name) = disk.next(&dir, true).unwrap();
        files.write_out();
        assert_eq!(Layered::of(&dir).unwrap().unwrap(), disk);
        if far == 1 {
            self.asked = Some(name);
            return;
        }
        // What it was asked before by somebody who has gone it may do now, or never.
        self.asked = None;
        self.freeze(&name);
        if far == 2 {
            return;
        }
        assert!(content_of(&files) == self.model);
        self.captured.push((files, self.model.clone()));
    }

    fn freeze(&mut self, name: &str) {
        let path = self.dir.file(name);
        let next = File::options().read(true).write(true).open(path).unwrap();
        let vmm = self.vmm();
        let next = vmm.next(next, name).unwrap();
        vmm.freeze(next).unwrap();
    }

    /// Merges; whoever does is cut off when the VMM uses it already and nothing says so yet.
    fn merge_cut_off(&mut self) {
        let obstacle = self.dir.file("disk.json.new");
        std::fs::create_dir(&obstacle).unwrap();
        self.capture(0, true);
        std::fs::remove_dir(&obstacle).unwrap();
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::MergeCutOff => self.merge_cut_off(),
            Step::Late => {
                if let Some(name) = self.asked.take() {
                    self.freeze(&name);
                }
            }
            Step::Write(at, length, byte) => self.write(at, length, byte),
            Step::Capture(far, merges) => self.capture(far, merges),
            Step::Kill => {
                self.vmm().flush().unwrap();
                self.start();
            }
            Step::Stop => {
                self.vmm().close().unwrap();
                self.start();
            }
            Step::Reset(of) => {
                // To what was captured, as a fork of it would be.
                let Some((files, model)) = self.captured.get(of % self.captured.len().max(1))
                else {
                    return;
                };
                let disk = Layered::make(&self.dir, &files.base, &files.layers, true).unwrap();
                self.model.clone_from(model);
                disk.install(&self.dir, true).unwrap();
                self.start();
            }
        }
        self.check();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Capture(u8, bool),
    MergeCutOff,
    /// The VMM gets to what somebody asked of it who has gone.
    Late,
    Kill,
    Stop,
    Reset(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..SIZE / 512, 1u64..40)
        .prop_map(|(at, len)| (at * 512, (len * 512).min(SIZE - at * 512)));
    prop_oneof![
        4 => (range, any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        6 => (0u8..6, any::<bool>()).prop_map(|(far, merges)| Step::Capture(far.min(3), merges)),
        1 => Just(Step::MergeCutOff),
        1 => Just(Step::Late),
        1 => Just(Step::Kill),
        1 => Just(Step::Stop),
        1 => any::<usize>().prop_map(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_is_cut_off_the_disk_is_what_was_written_and_captures_stay(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let mut one = Played::fresh();
        for step in &steps {
            one.take(step);
        }
        for (files, model) in &one.captured {
            prop_assert!(content_of(files) == *model);
            // A clone of it, whose files may have no name any more.
            Played::new(&files.base, &files.layers, model.clone());
        }
    }
}

#[test]
fn many_snapshots_stay_possible_and_cost_few_files() {
    let mut one = Played::fresh();
    for number in 0..20 {
        one.write(u64::from(number) * 4096, 4096, number);
        one.capture(3, true);
        let disk = Layered::of(&one.dir).unwrap().unwrap();
        assert!(disk.layers.len() <= MERGE_FROM, "{disk:?}");
        assert_eq!(names(&one.dir).len(), disk.layers.len() + 2);
    }
    assert_eq!(one.captured.len(), 20);
    for (files, model) in &one.captured {
        assert!(content_of(files) == *model);
    }
    // Without merging there is an end, which is told; the sandbox goes on.
    for _ in 0..10 {
        one.capture(3, false);
    }
    let mut disk = Layered::of(&one.dir).unwrap().unwrap();
    assert_eq!(disk.layers.len(), MAX_LAYERS);
    let error = disk.merge(&one.dir, true, |_| Err("refused".to_owned()));
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("8 layers") && error.contains("refused"),
        "{error}"
    );
    one.write(0, 4096, 9);
    one.take(&Step::Kill);
}

#[test]
fn what_is_large_is_not_written_again_for_what_is_small() {
    for (sizes, first) in [
        (&[5, 5, 5, 5, 5][..], 0),
        (&[100, 5, 5, 5, 5], 1),
        (&[100, 50, 20, 1, 9], 3),
        (&[1, 50, 9, 1, 9], 2),
        (&[1, 2], 0),
        (&[0, 0, 0], 0),
        (&[1], 0),
        (&[], 0),
    ] {
        assert_eq!(worth_merging(sizes), first, "{sizes:?}");
    }
}

#[test]
fn a_merge_that_was_cut_off_after_the_vmm_knew_does_not_end_merging() {
    let mut one = Played::fresh();
    for round in 0..12 {
        one.write(u64::from(round) * 4096, 4096, round);
        one.capture(3, true);
        one.merge_cut_off();
        let disk = Layered::of(&one.dir).unwrap().unwrap();
        assert!(disk.layers.len() <= MERGE_FROM + 1, "{disk:?}");
        one.check();
    }
    one.take(&Step::Kill);
    for (files, model) in &one.captured {
        assert!(content_of(files) == *model);
    }
}

#[test]
fn merging_on_a_full_disk_leaves_the_disk_as_it_was() {
    let name = "layered::tests::merging_on_a_full_disk_leaves_the_disk_as_it_was";
    if !small_disk::in_a_namespace(name) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    small_disk::mount_small(2, place.path());
    let dir = SandboxDir::existing(place.path());
    let model: Vec<u8> = vec![3; SIZE as usize];
    let mut one = Played::new_in((place, dir.clone()), &file(&model), &[], model);
    for number in 1..MERGE_FROM {
        // All of it each time, so that one for all needs as much again.
        one.write(0, SIZE, number as u8);
        one.capture(3, true);
    }
    let before = Layered::of(&dir).unwrap().unwrap();
    assert_eq!(before.layers.len(), MERGE_FROM);
    let files = names(&dir);
    let (mut failed, mut merged) = (0, false);
    for left in (0..2 * SIZE).step_by(8 << 10) {
        let ballast = small_disk::Ballast::leaving(dir.path(), left);
        one.capture(0, true);
        drop(ballast);
        let now = Layered::of(&dir).unwrap().unwrap();
        one.check();
        if now != before {
            merged = true;
            break;
        }
        failed += 1;
        // With room for the layer and none for the record, the VMM has the layer.
        let more: Vec<_> = names(&dir)
            .into_iter()
            .filter(|name| !files.contains(name))
            .collect();
        assert!(more.len() <= 2, "{more:?}");
    }
    assert!(merged && failed > 3, "{failed}");
    one.take(&Step::Kill);
    one.capture(3, true);
    for (files, model) in &one.captured {
        assert!(content_of(files) == *model);
    }
}

#[test]
fn clones_share_files_by_links_and_never_the_one_that_is_written() {
    let (_place, dir) = place();
    let path = dir.file("image");
    std::fs::write(&path, vec![7; SIZE as usize]).unwrap();
    let image = File::open(&path).unwrap();
    let mut parent = Played::new(&image, &[], vec![7; SIZE as usize]);
    parent.write(4096, 4096, 1);
    parent.capture(3, true);
    let (files, model) = parent.captured.pop().unwrap();
    let mut clone = Played::new(&files.base, &files.layers, model);
    let inode = |dir: &SandboxDir, name: &str| std::fs::metadata(dir.file(name)).unwrap().ino();
    let (ours, theirs) = (
        Layered::of(&parent.dir).unwrap().unwrap(),
        Layered::of(&clone.dir).unwrap().unwrap(),
    );
    assert_eq!(
        inode(&parent.dir, &ours.base),
        inode(&clone.dir, &theirs.base)
    );
    assert_eq!(
        inode(&parent.dir, &ours.layers[0]),
        inode(&clone.dir, &theirs.layers[0])
    );
    assert_ne!(
        inode(&parent.dir, &ours.layers[1]),
        inode(&clone.dir, &theirs.layers[1])
    );
    // What is shared is nobody's own.
    assert!(ours.used(&parent.dir) <= 64 << 10);
    clone.write(0, 8192, 2);
    parent.write(0, 4096, 3);
    clone.check();
    parent.check();
    // The image may be replaced, or removed.
    std::fs::remove_file(&path).unwrap();
    parent.take(&Step::Kill);
    // Without names they are copied.
    let gone = file(&vec![5; SIZE as usize]);
    Played::new(&gone, &[], vec![5; SIZE as usize]);
}

#[test]
fn what_cannot_be_made_leaves_nothing_and_bad_records_are_told() {
    let mut one = Played::fresh();
    let before = names(&one.dir);
    let mut disk = Layered::of(&one.dir).unwrap().unwrap();
    // A layer that is still written cannot be shared.
    let files = disk.open(&one.dir).unwrap();
    let error = Layered::make(&one.dir, &files.base, &files.layers, false).unwrap_err();
    assert!(error.to_string().contains("not frozen"), "{error}");
    assert_eq!(names(&one.dir), before);
    // The record cannot be written.
    let obstacle = one.dir.file("disk.json.new");
    std::fs::create_dir(&obstacle).unwrap();
    assert!(disk.next(&one.dir, true).is_err());
    assert_eq!(disk, Layered::of(&one.dir).unwrap().unwrap());
    let made = Layered::make(&one.dir, &files.base, &[], true).unwrap();
    assert!(made.install(&one.dir, true).is_err());
    made.discard(&one.dir);
    std::fs::remove_dir(&obstacle).unwrap();
    assert_eq!(names(&one.dir), before);
    // What was swept away meanwhile is not installed.
    let made = Layered::make(&one.dir, &files.base, &[], true).unwrap();
    made.discard(&one.dir);
    assert!(made.install(&one.dir, true).is_err());
    one.take(&Step::Kill);
    // A layer with something in it over one that is not frozen is nothing that a snapshot left.
    let (_, top) = disk.next(&one.dir, true).unwrap();
    let bytes = vec![1; 4096];
    {
        let open = |name: &str| {
            File::options()
                .read(true)
                .write(true)
                .open(one.dir.file(name))
        };
        let other = (tempfile::tempfile().unwrap(), "other");
        other.0.set_len(SIZE).unwrap();
        let id = layers::head(&open(&top).unwrap(), "top").unwrap().parent;
        let below = tempfile::tempfile().unwrap();
        let frozen = layers::Builder::new(below, "below", SIZE, id, LayerId::BASE).unwrap();
        let below = frozen.finish().unwrap().medium().try_clone().unwrap();
        let layers = vec![
            (below, "below".to_owned()),
            (open(&top).unwrap(), top.clone()),
        ];
        let mut stack = Stack::open(other, layers, true).unwrap();
        stack.write(&bytes, 0).unwrap();
        stack.close().unwrap();
    }
    let error = Layered::settled(&one.dir, true).unwrap_err().to_string();
    assert!(error.contains("not frozen"), "{error}");
    for (record, says) in [
        (
            r#"{"version": 2, "base": "disk-0.base", "layers": ["disk-1.layer"]}"#,
            "version 2",
        ),
        (
            r#"{"version": 1, "base": "../a", "layers": ["disk-1.layer"]}"#,
            "'../a'",
        ),
        (
            r#"{"version": 1, "base": "disk-0.base", "layers": ["disk-1/../x"]}"#,
            "disk-1/",
        ),
        (
            r#"{"version": 1, "base": "disk-0.base", "layers": []}"#,
            "0 layers",
        ),
        ("{}", "record"),
    ] {
        std::fs::write(one.dir.file(state::DISK_RECORD), record).unwrap();
        let error = Layered::of(&one.dir).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    std::fs::remove_file(one.dir.file(state::DISK_RECORD)).unwrap();
    assert_eq!(Layered::of(&one.dir).unwrap(), None);
    assert!(fits(1 << 40) && !fits((1 << 40) + 4096) && !fits(0) && !fits(4097));
}

#[test]
fn a_record_that_was_written_and_cannot_be_made_durable_names_files_that_are_there() {
    let mut one = Played::fresh();
    one.take(&Step::Write(0, 1024, 7));
    let path = one.dir.path().to_path_buf();
    // A snapshot: what it wrote down is a spare layer, for the next one or to go before the next start.
    let mut disk = Layered::of(&one.dir).unwrap().unwrap();
    let failed = failing::with(&path, || disk.next(&one.dir, true).map(drop));
    assert!(failed.unwrap_err().to_string().contains("write back"));
    assert_eq!(Layered::of(&one.dir).unwrap().unwrap(), disk);
    assert_eq!(disk.layers.len(), 2);
    disk.open(&one.dir).unwrap();
    let (_, name) = disk.next(&one.dir, true).unwrap();
    assert_eq!(Some(&name), disk.layers.last());
    one.take(&Step::Kill);
    // A reset: whoever puts the disk in its place, and then gives it up, leaves both.
    let before = Layered::of(&one.dir).unwrap().unwrap();
    let other = vec![9; SIZE as usize];
    let made = Layered::make(&one.dir, &file(&other), &[], true).unwrap();
    assert!(failing::with(&path, || made.install(&one.dir, true)).is_err());
    made.discard(&one.dir);
    assert_eq!(Layered::of(&one.dir).unwrap().as_ref(), Some(&made));
    made.open(&one.dir).unwrap();
    before.open(&one.dir).unwrap();
    one.vmm = None;
    one.model = other;
    one.start();
}
