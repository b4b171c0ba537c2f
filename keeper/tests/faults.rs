//! The keeper where the system fails it, or ends it, at any moment. After each: what was said to be kept is there
//! byte by byte, what is listed can be restored, and nothing half-made is listed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[path = "../../tests/support/small_disk.rs"]
mod small_disk;
mod worse;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use belljar_keeper::client::{Client, Keeper, KeeperError};
use belljar_keeper::server::Point;
use belljar_keeper::v1::{self, error::Code, reply::Result as Answer, request::Call};
use small_disk::{Ballast, in_a_namespace, mount, mount_small};
use worse::{Plan, Trouble, Worse};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = MIB;

/// A state root with a keeper that lives in trouble.
struct Place {
    dir: tempfile::TempDir,
    is_mounted: bool,
}

impl Place {
    fn new() -> Self {
        Self::of(tempfile::tempdir().unwrap())
    }

    fn of(dir: tempfile::TempDir) -> Self {
        let program = dir.path().join("keeper-program");
        let this = std::env::current_exe().unwrap();
        let text = format!(
            "#!/bin/sh\nFAULTS_DIR=\"$1\" exec {} --exact as_keeper --ignored --nocapture\n",
            this.display()
        );
        std::fs::write(&program, text).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Self {
            dir,
            is_mounted: false,
        }
    }

    /// The same once more, with other trouble.
    fn copy(&self, plan: Plan) -> Self {
        let copy = Self::new();
        let (from, to) = (self.path(), copy.path());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        let done = Command::new("cp").arg("-a").args([&from, &to]).status();
        assert!(done.unwrap().success());
        plan.write(copy.dir.path());
        copy
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("state/keeper")
    }

    fn keeper(&self) -> Keeper {
        Keeper {
            dir: self.path(),
            program: self.dir.path().join("keeper-program"),
        }
    }

    /// What is planned may happen while it starts.
    fn connect(&self) -> Client {
        self.keeper()
            .connect()
            .or_else(|_| self.keeper().connect())
            .unwrap()
    }

    fn has_fired(&self) -> bool {
        Plan::has_fired(self.dir.path())
    }

    fn kill(&self) {
        let wanted = format!("FAULTS_DIR={}", self.path().display());
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|pid| pid.parse().ok()) else {
                continue;
            };
            let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            let mut words = environment.split(|byte| *byte == 0);
            if words.any(|word| word == wanted.as_bytes())
                && let Some(pid) = rustix::process::Pid::from_raw(pid)
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }

    /// Templates are made behind the answer.
    fn wait_for_templates(&self, count: usize) {
        let is_named = |entry: std::io::Result<std::fs::DirEntry>| {
            let name = entry.unwrap().file_name();
            name.to_string_lossy().ends_with(".ok")
        };
        let folder = self.path().join("templates");
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::fs::read_dir(&folder)
            .unwrap()
            .filter_map(|entry| is_named(entry).then_some(()))
            .count()
            < count
        {
            assert!(Instant::now() < deadline, "templates get no names");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn forget_templates(&self) {
        for entry in std::fs::read_dir(self.path().join("templates")).unwrap() {
            // The keeper may have removed it.
            let _ = std::fs::remove_file(entry.unwrap().path());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.kill();
        if self.is_mounted {
            let path = self.dir.path();
            let _ = Command::new("umount").arg("-l").arg(path).status();
        }
    }
}

#[test]
#[ignore = "the other tests start it: it is the keeper"]
fn as_keeper() {
    let dir = PathBuf::from(std::env::var_os("FAULTS_DIR").expect("a keeper's directory"));
    let plan = Plan::read(dir.ancestors().nth(2).unwrap());
    let served = belljar_keeper::server::run_in(&dir, Arc::new(Worse::new(plan)));
    if let Err(error) = served {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

/// A page that no other seed has.
fn page(seed: u64, number: u64) -> Vec<u8> {
    let mut state = (seed << 20 | number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(4096);
    while bytes.len() < 4096 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// Memory of a guest: some pages of its own, some that are everybody's, and holes.
fn memory(seed: u64) -> Vec<u8> {
    let mut memory = vec![0; MEMORY as usize];
    for (number, page) in pages(seed) {
        memory[number as usize * 4096..][..4096].copy_from_slice(&page);
    }
    memory
}

fn pages(seed: u64) -> Vec<(u64, Vec<u8>)> {
    let own = (40..60).map(|number| (number, page(seed, number)));
    let shared = (100..110).map(|number| (number, page(0, number)));
    own.chain(shared).collect()
}

/// What became of a capture.
#[derive(Debug, Default)]
struct Attempt {
    /// Once it was accepted.
    id: Option<String>,
    kept: bool,
}

fn try_capture(client: &mut Client, seed: u64, tag: &str) -> Result<Attempt, KeeperError> {
    let begin = v1::Begin {
        memory_bytes: MEMORY,
        disk_bytes: MEMORY,
        ..v1::Begin::default()
    };
    let (_, files) = client.call(Call::Begin(begin), &[], |_| {})?;
    let files: Vec<File> = files.into_iter().map(File::from).collect();
    let written = || -> std::io::Result<()> {
        files[0].write_all_at(b"state", 0)?;
        for file in &files[1..] {
            file.set_len(MEMORY)?;
            for (number, page) in pages(seed) {
                file.write_all_at(&page, number * 4096)?;
            }
        }
        Ok(())
    };
    if written().is_err() {
        // The disk is full, and a VMM would say so.
        return Ok(Attempt::default());
    }
    let keep = v1::Keep {
        has_memory: true,
        has_disk: true,
        sandbox: b"who it was".to_vec(),
        memory_bytes: MEMORY,
        tags: vec![tag.to_owned()],
        ..v1::Keep::default()
    };
    let (Answer::Accepted(accepted), _) = client.call(Call::Keep(keep), &[], |_| {})? else {
        panic!("not accepted")
    };
    let kept = client.answer(|_| {}).is_ok();
    Ok(Attempt {
        id: Some(accepted.id),
        kept,
    })
}

fn capture(client: &mut Client, seed: u64, tag: &str) -> String {
    let attempt = try_capture(client, seed, tag).unwrap();
    assert!(attempt.kept);
    attempt.id.unwrap()
}

fn list(client: &mut Client) -> Result<Vec<v1::Snapshot>, KeeperError> {
    let mut all = Vec::new();
    let collect = |answer| {
        if let Answer::Item(snapshot) = answer {
            all.push(snapshot);
        }
    };
    client.call(Call::List(v1::List {}), &[], collect)?;
    Ok(all)
}

fn open(client: &mut Client, word: &str) -> Result<Vec<File>, KeeperError> {
    let open = v1::Open {
        snapshot: word.to_owned(),
        candidates: vec![],
        ..v1::Open::default()
    };
    let (_, files) = client.call(Call::Open(open), &[], |_| {})?;
    Ok(files.into_iter().map(File::from).collect())
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn collect(client: &mut Client) -> Result<(), KeeperError> {
    let call = Call::Collect(v1::Collect::default());
    client.call(call, &[], |_| {}).map(|_| ())
}

fn remove(client: &mut Client, word: &str) -> Result<(), KeeperError> {
    let untag = Call::Mark(v1::Mark {
        snapshot: word.to_owned(),
        remove_tags: vec![word.to_owned()],
        ..v1::Mark::default()
    });
    let id = list(client)?
        .into_iter()
        .find(|snapshot| snapshot.tags.iter().any(|tag| tag == word))
        .map(|snapshot| snapshot.id)
        .unwrap_or_default();
    client.call(untag, &[], |_| {})?;
    let remove = Call::Remove(v1::Remove {
        snapshot: id,
        live: vec![],
    });
    client.call(remove, &[], |_| {}).map(|_| ())
}

/// Snapshots by id, and the seed of their memory.
type Known = HashMap<String, u64>;

/// Everything that is listed is known, and is what it was; everything in `certain` is listed.
fn check(place: &Place, known: &Known, certain: &[&str], what: &str) {
    place.kill();
    let mut client = place.connect();
    place.forget_templates();
    let listed = list(&mut client).unwrap();
    for id in certain {
        assert!(
            listed.iter().any(|snapshot| snapshot.id == **id),
            "{what}: {id} is lost"
        );
    }
    for snapshot in listed {
        assert!(!snapshot.pending, "{what}");
        let seed = known.get(&snapshot.id);
        let seed = *seed.unwrap_or_else(|| panic!("{what}: {} was never accepted", snapshot.id));
        let files =
            open(&mut client, &snapshot.id).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(content(&files[0]), b"state");
        assert!(
            content(&files[1]) == memory(seed),
            "{what}: memory of {}",
            snapshot.id
        );
        assert!(
            content(&files[2]) == memory(seed),
            "{what}: disk of {}",
            snapshot.id
        );
    }
    let verify = Call::Verify(v1::Verify {});
    let (Answer::Verified(verified), _) = client.call(verify, &[], |_| {}).unwrap() else {
        panic!("not verified")
    };
    let found = (
        verified.damaged,
        verified.broken.len(),
        verified.problems.len(),
    );
    assert_eq!(found, (0, 0, 0), "{what}: {verified:?}");
    // And it goes on.
    let id = capture(&mut client, 77, "next");
    let files = open(&mut client, &id).unwrap();
    assert!(content(&files[1]) == memory(77), "{what}");
}

/// A store with two snapshots, "old" and "whole".
fn prepared() -> (Place, Known, String) {
    let place = Place::new();
    Plan::NONE.write(place.dir.path());
    let mut client = place.connect();
    let old = capture(&mut client, 1, "old");
    let whole = capture(&mut client, 2, "whole");
    place.wait_for_templates(4);
    drop(client);
    place.kill();
    place.forget_templates();
    let known = Known::from([(old, 1), (whole.clone(), 2)]);
    (place, known, whole)
}

/// A day in the life of a keeper: a snapshot is taken, one restored, one removed, garbage collected.
fn day(place: &Place, known: &mut Known, certain: &mut Vec<String>) -> Result<(), KeeperError> {
    let mut client = place.keeper().connect()?;
    for (seed, tag) in [(10, "ten"), (11, "eleven")] {
        let attempt = try_capture(&mut client, seed, tag)?;
        if let Some(id) = attempt.id {
            if attempt.kept {
                certain.push(id.clone());
            }
            known.insert(id, seed);
        }
        match open(&mut client, "whole") {
            Ok(files) => assert!(
                content(&files[1]) == memory(2),
                "other bytes were given out"
            ),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    remove(&mut client, "old")?;
    collect(&mut client)
}

/// Every moment with `BELLJAR_SOAK=1`, else some.
fn sweep(trouble: Trouble) {
    let soak = std::env::var_os("BELLJAR_SOAK").is_some_and(|on| on == "1");
    let (first, step) = if soak { (0, 1) } else { (trouble as usize, 7) };
    let (master, known, whole) = prepared();
    let mut number = first as u64;
    let mut fired = 0;
    loop {
        let plan = Plan::at_write(trouble, number);
        let place = master.copy(plan);
        let (mut known, mut certain) = (known.clone(), vec![whole.clone()]);
        let _ = day(&place, &mut known, &mut certain);
        if !place.has_fired() {
            break;
        }
        fired += 1;
        let certain: Vec<&str> = certain.iter().map(String::as_str).collect();
        check(&place, &known, &certain, &format!("{plan:?}"));
        number += step as u64;
    }
    assert!(fired > 5, "{trouble:?} was tried {fired} times only");
}

#[test]
fn a_keeper_that_is_killed_before_any_write_loses_nothing_that_was_kept() {
    sweep(Trouble::Kill);
}

#[test]
fn a_write_that_fails_loses_nothing_that_was_kept() {
    sweep(Trouble::Eio);
}

#[test]
fn a_disk_that_is_full_from_some_moment_on_loses_nothing_that_was_kept() {
    sweep(Trouble::Full);
}

#[test]
fn writes_that_take_a_part_only_are_gone_on_with() {
    let (master, mut known, whole) = prepared();
    let place = master.copy(Plan::at_write(Trouble::Short, 0));
    let mut certain = vec![whole];
    day(&place, &mut known, &mut certain).unwrap();
    assert!(place.has_fired());
    assert_eq!(certain.len(), 3);
    let certain: Vec<&str> = certain.iter().map(String::as_str).collect();
    check(&place, &known, &certain, "short writes");
}

#[test]
fn at_every_named_point_it_may_be_killed_or_fail() {
    let (master, known, whole) = prepared();
    for trouble in [Trouble::Kill, Trouble::Eio, Trouble::Full] {
        for point in Point::ALL {
            let plan = Plan::at_point(trouble, point);
            let place = master.copy(plan);
            let (mut known, mut certain) = (known.clone(), vec![whole.clone()]);
            let _ = day(&place, &mut known, &mut certain);
            // Naming is behind the answer.
            let deadline = Instant::now() + Duration::from_secs(30);
            while !place.has_fired() {
                assert!(Instant::now() < deadline, "{plan:?} was never reached");
                std::thread::sleep(Duration::from_millis(5));
            }
            let certain: Vec<&str> = certain.iter().map(String::as_str).collect();
            check(&place, &known, &certain, &format!("{plan:?}"));
        }
    }
}

#[test]
fn a_pack_that_cannot_be_read_is_told_and_no_template_stays_half_filled() {
    let (master, known, whole) = prepared();
    let place = master.copy(Plan::at_write(Trouble::EioReading, 0));
    let mut client = place.connect();
    // Every read of a pack fails.
    match open(&mut client, "whole") {
        Err(KeeperError::Refused { code, message }) => {
            assert_eq!(code, Code::Failed, "{message}");
            assert!(message.contains("Input/output error"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert!(place.has_fired());
    assert_eq!(
        std::fs::read_dir(place.path().join("templates"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(list(&mut client).unwrap().len(), 2);
    drop(client);
    check(&place, &known, &[&whole], "reads that failed");
}

// ---- Real file systems that are small, or cannot be written ----

/// A place on a file system in memory of so many MiB.
fn small(mib: u64) -> Place {
    let dir = tempfile::tempdir().unwrap();
    mount_small(mib, dir.path());
    let mut place = Place::of(dir);
    place.is_mounted = true;
    Plan::NONE.write(place.dir.path());
    place
}

fn no_space<T: std::fmt::Debug>(result: Result<T, KeeperError>) {
    match result {
        Err(KeeperError::Refused { code, message }) => {
            assert_eq!(code, Code::NoSpace, "{message}");
        }
        other => panic!("there was room: {other:?}"),
    }
}

#[test]
fn on_a_full_file_system_nothing_is_half_there_and_room_helps() {
    if !in_a_namespace("on_a_full_file_system_nothing_is_half_there_and_room_helps") {
        return;
    }
    let place = small(64);
    let mut client = place.connect();
    let first = capture(&mut client, 1, "first");
    let mut known = Known::from([(first.clone(), 1)]);
    let stream = place.dir.path().join("stream");
    let export = |client: &mut Client, file: &File| {
        let call = Call::Export(v1::Export {
            snapshot: "first".to_owned(),
            first: 0,
        });
        client.call(call, &[std::os::fd::AsFd::as_fd(file)], |_| {})
    };
    export(&mut client, &File::create(&stream).unwrap()).unwrap();

    // It is told before anything is written if it is known what will be.
    {
        let _ballast = Ballast::leaving(place.dir.path(), 1024 << 10);
        let begin = v1::Begin {
            memory_bytes: MEMORY,
            expected_bytes: MEMORY,
            ..v1::Begin::default()
        };
        no_space(client.call(Call::Begin(begin), &[], |_| {}));
        let file = File::create(place.dir.path().join("full")).unwrap();
        let _rest = Ballast::leaving(place.dir.path(), 0);
        no_space(export(&mut client, &file));
    }
    // It runs full while it is stored, at one moment or another.
    let mut refused = 0;
    for left in [0, 4, 40, 80, 100, 120, 160, 240, 400, 4000] {
        let begin = v1::Begin {
            memory_bytes: MEMORY,
            ..v1::Begin::default()
        };
        let (_, files) = client.call(Call::Begin(begin), &[], |_| {}).unwrap();
        let files: Vec<File> = files.into_iter().map(File::from).collect();
        files[0].write_all_at(b"state", 0).unwrap();
        files[1].set_len(MEMORY).unwrap();
        let seed = 100 + left;
        for (number, page) in pages(seed) {
            files[1].write_all_at(&page, number * 4096).unwrap();
        }
        let _ballast = Ballast::leaving(place.dir.path(), left << 10);
        let keep = v1::Keep {
            has_memory: true,
            memory_bytes: MEMORY,
            ..v1::Keep::default()
        };
        let (Answer::Accepted(accepted), _) = client.call(Call::Keep(keep), &[], |_| {}).unwrap()
        else {
            panic!("not accepted")
        };
        let listed = |client: &mut Client| {
            let all = list(client).unwrap();
            all.iter().any(|snapshot| snapshot.id == accepted.id)
        };
        match client.answer(|_| {}) {
            Ok(_) => {
                assert!(listed(&mut client), "{left}");
                // Its template needs room of its own.
                match open(&mut client, &accepted.id) {
                    Ok(files) => assert!(content(&files[1]) == memory(seed), "{left}"),
                    refusal => no_space(refusal),
                }
            }
            refusal => {
                no_space(refusal);
                assert!(!listed(&mut client), "{left}");
                refused += 1;
            }
        }
    }
    assert!((2..=8).contains(&refused), "{refused} of ten were refused");

    // A restore needs room for a template; the snapshot itself is as good as before.
    place.forget_templates();
    {
        let _ballast = Ballast::leaving(place.dir.path(), 4000 << 10);
        no_space(open(&mut client, "first"));
    }
    let files = open(&mut client, "first").unwrap();
    assert!(content(&files[1]) == memory(1));

    // An import that runs full is begun anew where there is room.
    for snapshot in list(&mut client).unwrap() {
        if snapshot.id != first {
            let remove = Call::Remove(v1::Remove {
                snapshot: snapshot.id,
                live: vec![],
            });
            client.call(remove, &[], |_| {}).unwrap();
        }
    }
    remove(&mut client, "first").unwrap();
    collect(&mut client).unwrap();
    assert_eq!(list(&mut client).unwrap(), []);
    let import = |client: &mut Client| {
        let file = File::open(&stream).unwrap();
        let call = Call::Import(v1::Import::default());
        client.call(call, &[std::os::fd::AsFd::as_fd(&file)], |_| {})
    };
    {
        let _ballast = Ballast::leaving(place.dir.path(), 40 << 10);
        no_space(import(&mut client));
        assert_eq!(list(&mut client).unwrap(), []);
    }
    import(&mut client).unwrap();
    drop(client);
    known.retain(|id, _| *id == first);
    check(&place, &known, &[&first], "a full file system");
}

#[test]
fn a_store_that_cannot_be_written_is_told_at_once_and_is_not_harmed() {
    if !in_a_namespace("a_store_that_cannot_be_written_is_told_at_once_and_is_not_harmed") {
        return;
    }
    let place = small(64);
    let mut client = place.connect();
    let first = capture(&mut client, 1, "first");
    let known = Known::from([(first.clone(), 1)]);
    // Under a keeper that runs. Nothing of it may be open for writing then, but the log.
    place.wait_for_templates(2);
    drop(client);
    place.kill();
    let again = Instant::now();
    mount(&["-o", "remount,ro"], place.dir.path());
    match place.keeper().connect() {
        Err(error @ KeeperError::Ended { .. }) => {
            assert!(
                error.to_string().contains("Read-only file system"),
                "{error}"
            );
            assert!(error.remedy().is_some());
        }
        other => panic!("{:?}", other.map(|_| ())),
    }
    assert!(
        again.elapsed() < Duration::from_secs(10),
        "that took {:?}",
        again.elapsed()
    );
    mount(&["-o", "remount,rw"], place.dir.path());
    check(&place, &known, &[&first], "a read-only file system");
}

// ---- What is in the store is not what was written ----

/// Draws numbers, the same ones each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit.max(1) as u64).unwrap()
    }
}

fn files_of(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            files.extend(files_of(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files.sort();
    files
}

/// Damages a file in one of several ways; `other` is one of the same store.
fn spoil(path: &Path, other: &Path, dice: &mut Dice) -> String {
    let mut bytes = std::fs::read(path).unwrap();
    let at = dice.below(bytes.len());
    let what = match dice.below(7) {
        0 if !bytes.is_empty() => {
            bytes[at] ^= 1 << dice.below(8);
            "a bit flipped"
        }
        1 => {
            bytes.truncate(at);
            "cut off"
        }
        2 => {
            bytes.extend_from_slice(&[0xff; 100]);
            "longer"
        }
        3 => {
            let end = bytes.len().min(at + 4096);
            bytes[at..end].fill(0);
            "a page of zeros"
        }
        4 => {
            bytes = std::fs::read(other).unwrap();
            "another file"
        }
        // The version of sealed files, and of packs.
        5 if bytes.len() > 16 => {
            bytes[12] = 9;
            "of another version"
        }
        _ => {
            let half = bytes.len() / 2;
            bytes.rotate_left(half);
            "in another order"
        }
    };
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
    what.to_owned()
}

/// More with `BELLJAR_SOAK=1`.
#[test]
fn a_damaged_store_gives_right_bytes_or_the_reason_and_never_ends_the_keeper() {
    let soak = std::env::var_os("BELLJAR_SOAK").is_some_and(|on| on == "1");
    let (master, known, _) = prepared();
    let mut dice = Dice(0x1234_5678_9abc_def1);
    let (mut right, mut refused) = (0, 0);
    for round in 0..if soak { 2000 } else { 60 } {
        let place = master.copy(Plan::NONE);
        let files = files_of(&place.path().join("store"));
        let path = &files[dice.below(files.len())];
        let other = &files[dice.below(files.len())];
        let what = format!(
            "round {round}: {} {}",
            path.display(),
            spoil(path, other, &mut dice)
        );
        let began = Instant::now();
        let mut client = match place.keeper().connect() {
            Ok(client) => client,
            Err(KeeperError::Ended { said }) => {
                assert!(
                    !said.is_empty() && !said.contains("panicked"),
                    "{what}: {said}"
                );
                refused += 1;
                continue;
            }
            Err(error) => panic!("{what}: {error}"),
        };
        for (id, seed) in &known {
            match open(&mut client, id) {
                Ok(files) => {
                    assert!(content(&files[1]) == memory(*seed), "{what}: wrong bytes");
                    assert!(content(&files[2]) == memory(*seed), "{what}: wrong bytes");
                    right += 1;
                }
                Err(KeeperError::Refused { code, message }) => {
                    let told = matches!(code, Code::Damaged | Code::NoSnapshot | Code::Failed);
                    assert!(told && !message.is_empty(), "{what}: {code:?} {message}");
                    refused += 1;
                }
                Err(error) => panic!("{what}: {error}"),
            }
        }
        // Whatever else is asked is answered by the same keeper.
        let _ = list(&mut client);
        let verify = Call::Verify(v1::Verify {});
        let _ = client.call(verify, &[], |_| {});
        let _ = collect(&mut client);
        let (answer, _) = client.call(Call::Ping(v1::Ping {}), &[], |_| {}).unwrap();
        assert!(matches!(answer, Answer::Done(_)), "{what}");
        let took = began.elapsed();
        assert!(took < Duration::from_secs(20), "{what} took {took:?}");
    }
    assert!(
        right > 10 && refused > 10,
        "{right} right, {refused} refused"
    );
}

#[test]
fn a_program_on_a_server_that_is_gone_is_in_nobodys_way() {
    let (place, _, whole) = prepared();
    let mut client = place.connect();
    let program = place.dir.path().join("supervisor");
    std::fs::write(&program, "").unwrap();
    let path = program.to_str().unwrap().to_owned();
    let open = Call::Open(v1::Open {
        snapshot: whole,
        programs: Some(v1::Programs {
            supervisor: path.clone(),
            vmm: path,
        }),
        ..v1::Open::default()
    });
    client.call(open, &[], |_| {}).unwrap();
    std::fs::write(program.with_extension("hangs"), "").unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !program.with_extension("hung").exists() {
        assert!(Instant::now() < deadline, "nobody looks at the program");
        std::thread::sleep(Duration::from_millis(5));
    }
    // Those who are connected, and those who connect now.
    assert_eq!(list(&mut client).unwrap().len(), 2);
    let (sender, answer) = std::sync::mpsc::channel();
    let keeper = place.keeper();
    std::thread::spawn(move || {
        let listed = keeper.connect().and_then(|mut client| list(&mut client));
        let _ = sender.send(listed.map(|all| all.len()));
    });
    let listed = answer.recv_timeout(Duration::from_secs(60));
    assert_eq!(listed.expect("it is served").unwrap(), 2);
}
