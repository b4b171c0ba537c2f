use super::*;
use crate::ending::Ended;
use crate::state::spec::{Life, SPEC_VERSION};
use crate::state::{CONFIG, ENDED, OWNER, ProcessRecord};
use std::fs::File;
use std::time::{Duration, Instant};

struct Keep {
    _dir: tempfile::TempDir,
    root: StateRoot,
    locks: Vec<File>,
}

impl Keep {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = StateRoot::at(dir.path()).unwrap();
        Self {
            _dir: dir,
            root,
            locks: Vec::new(),
        }
    }

    fn sandbox(&mut self, name: Option<&str>, life: Life) -> SandboxDir {
        let (dir, lock) = self.root.create().unwrap();
        if let Some(name) = name {
            self.root.claim_name(name, &dir).unwrap();
        }
        let spec = SandboxSpec {
            version: SPEC_VERSION,
            name: name.map(str::to_owned),
            life,
            ..SandboxSpec::default()
        };
        dir.write_record(CONFIG, &spec).unwrap();
        self.locks.push(lock);
        dir
    }

    fn left(&mut self, life: Life) -> SandboxDir {
        let dir = self.sandbox(None, life);
        self.locks.clear();
        dir
    }
}

fn state_of(dir: &SandboxDir) -> State {
    Found::at(dir.clone()).state()
}

#[test]
fn names_ids_and_unique_beginnings_are_found() {
    let mut keep = Keep::new();
    let web = keep.sandbox(Some("web-front"), Life::Persistent);
    let back = keep.sandbox(Some("web-back"), Life::Persistent);
    for word in ["web-front", "web-f", web.id()] {
        assert_eq!(find(&keep.root, word).unwrap().id(), web.id(), "{word}");
    }
    let error = find(&keep.root, "web").unwrap_err();
    let FindError::Ambiguous { matches, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(matches, ["web-back", "web-front"]);
    let error = find(&keep.root, "web-bakc").unwrap_err();
    assert!(error.remedy().contains("web-back"), "{}", error.remedy());
    for word in ["", "/", "..", "nothing", "ffffffff0"] {
        assert!(find(&keep.root, word).is_err(), "{word}");
    }
    back.remove().unwrap();
    assert_eq!(find(&keep.root, "web").unwrap().id(), web.id());
}

#[test]
fn every_state_is_told() {
    let mut keep = Keep::new();
    let dead = ProcessRecord {
        pid: std::process::id(),
        start_time: 0,
    };
    let living = ProcessRecord::of(std::process::id()).unwrap();

    let dir = keep.sandbox(None, Life::Persistent);
    assert_eq!(state_of(&dir), State::Busy);
    dir.write_record(OWNER, &Owner::new(living, Some(living), false))
        .unwrap();
    assert_eq!(state_of(&dir), State::Running(living));
    keep.locks.clear();
    assert_eq!(state_of(&dir), State::Orphaned(living));
    dir.write_record(OWNER, &Owner::new(dead, Some(dead), false))
        .unwrap();
    assert!(matches!(state_of(&dir), State::Crashed(_)));
    let mut rebooted = Owner::new(living, Some(living), false);
    rebooted.boot_id = "earlier".into();
    dir.write_record(OWNER, &rebooted).unwrap();
    assert!(matches!(state_of(&dir), State::Crashed(why) if why.contains("booted")));
    dir.write_record(ENDED, &Ended::default()).unwrap();
    assert!(matches!(state_of(&dir), State::Stopped(_)));

    assert_eq!(state_of(&keep.left(Life::Persistent)), State::Created);
    assert!(matches!(
        state_of(&keep.left(Life::Owned)),
        State::Crashed(_)
    ));
    let dir = keep.left(Life::Detached);
    dir.write_record(ENDED, &Ended::default()).unwrap();
    assert!(matches!(state_of(&dir), State::Left(_)));
    let (dir, lock) = keep.root.create().unwrap();
    drop(lock);
    assert_eq!(state_of(&dir), State::HalfMade);
    let doomed = SandboxDir::existing(&dir.path().with_added_extension("removing"));
    std::fs::rename(dir.path(), doomed.path()).unwrap();
    assert_eq!(state_of(&doomed), State::HalfRemoved);
    assert_eq!(find(&keep.root, dir.id()).unwrap().id(), doomed.id());
    for listed in list(&keep.root).unwrap() {
        let reason = listed.state.reason();
        let explained = matches!(listed.state, State::Created) || !reason.is_empty();
        assert!(explained, "{}", listed.state);
    }
    doomed.remove().unwrap();
    assert!(find(&keep.root, dir.id()).is_err());
}

#[test]
fn a_connection_to_what_does_not_run_says_so() {
    let mut keep = Keep::new();
    let found = Found::at(keep.left(Life::Persistent));
    let error = found
        .connect(1024, Instant::now() + Duration::from_secs(1))
        .unwrap_err();
    assert!(matches!(error, ConnectError::NotRunning { .. }), "{error}");
    assert!(
        error.remedy().contains("belljar start"),
        "{}",
        error.remedy()
    );
}
