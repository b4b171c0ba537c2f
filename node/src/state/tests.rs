use super::*;
use crate::ending::Ended;

fn root() -> (tempfile::TempDir, StateRoot) {
    let dir = tempfile::tempdir().unwrap();
    let root = StateRoot::at(dir.path()).unwrap();
    (dir, root)
}

fn dead_process() -> ProcessRecord {
    ProcessRecord {
        pid: std::process::id(),
        start_time: 0,
    }
}

#[test]
fn a_new_sandbox_is_owned_while_its_lock_is_held() {
    let (_keep, root) = root();
    assert!(root.list().unwrap().is_empty());
    let (dir, lock) = root.create().unwrap();
    assert_eq!(dir.condition().unwrap(), Condition::Owned(None));
    drop(lock);
    assert_eq!(
        dir.condition().unwrap(),
        Condition::Left(Leftover::NeverStarted)
    );
    assert_eq!(root.list().unwrap().len(), 1);
    dir.remove().unwrap();
    assert!(root.list().unwrap().is_empty());
}

#[test]
fn a_directory_that_is_being_made_is_left_alone() {
    let (_keep, root) = root();
    fs::create_dir_all(root.dir().join("cafe0001")).unwrap();
    let dir = &root.list().unwrap()[0];
    assert_eq!(dir.condition().unwrap(), Condition::Owned(None));
    assert!(!dir.file(LOCK).exists());
}

#[test]
fn leftovers_are_explained() {
    let this_boot = boot_id();
    let owner = |boot: &str, vmm| Owner {
        boot_id: boot.to_owned(),
        ..Owner::new(dead_process(), vmm, true)
    };
    let living = ProcessRecord::of(std::process::id()).unwrap();
    for (owner, expected) in [
        (None, Leftover::NeverStarted),
        (
            Some(owner("another boot", Some(living))),
            Leftover::Rebooted,
        ),
        (Some(owner(&this_boot, None)), Leftover::SupervisorDied),
        (
            Some(owner(&this_boot, Some(dead_process()))),
            Leftover::SupervisorDied,
        ),
        (
            Some(owner(&this_boot, Some(living))),
            Leftover::VmmAlone(living),
        ),
    ] {
        assert_eq!(explain(owner, None, &this_boot), expected);
    }
    let ended = Ended::default();
    assert_eq!(
        explain(
            Some(owner(&this_boot, None)),
            Some(ended.clone()),
            &this_boot
        ),
        Leftover::EndedUnremoved(Box::new(ended))
    );
}

#[test]
fn a_start_forgets_what_the_last_guest_was_loaded_from_and_not_where_it_comes_from() {
    let (_keep, root) = root();
    let (dir, _lock) = root.create().unwrap();
    for name in [ORIGIN, LOADED] {
        dir.write_record(name, &1).unwrap();
    }
    dir.forget_last_run().unwrap();
    assert!(dir.file(ORIGIN).exists());
    assert!(!dir.file(LOADED).exists());
}

#[test]
fn the_turn_to_capture_is_one_at_a_time() {
    let (_keep, root) = root();
    let (dir, _lock) = root.create().unwrap();
    let turn = dir.capture_turn(Duration::ZERO).unwrap();
    assert!(turn.is_some());
    assert!(dir.capture_turn(Duration::ZERO).unwrap().is_none());
    drop(turn);
    assert!(dir.capture_turn(Duration::ZERO).unwrap().is_some());
}

#[test]
fn records_read_back_and_bad_ones_are_named() {
    let (_keep, root) = root();
    let (dir, _lock) = root.create().unwrap();
    assert_eq!(dir.read_record::<Owner>(OWNER).unwrap(), None);
    let owner = Owner::new(dead_process(), None, true);
    dir.write_record(OWNER, &owner).unwrap();
    assert_eq!(dir.read_record(OWNER).unwrap(), Some(owner));
    fs::write(dir.file(OWNER), b"{\"version\":").unwrap();
    let error = dir.read_record::<Owner>(OWNER).unwrap_err();
    assert!(error.to_string().contains("owner.json"), "{error}");
}
