//! What crashes and reboots left of sandboxes, and how it is cleaned up. Nothing that a user wanted to
//! keep is removed by that.

use crate::lifecycle::{self, LifeError, Stop};
use crate::registry::{Found, Listed, State};
use crate::state::spec::Life;

/// What is to be done about a sandbox that is not in an orderly state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Nothing.
    Fine,
    /// It keeps its disk; starting or removing it is up to its user.
    Keep,
    /// Its VMM is ended, and it keeps its disk.
    End,
    /// It is removed.
    Remove,
    /// This program cannot help.
    ByHand,
}

/// Judges a sandbox by its state.
#[must_use]
pub fn advise(listed: &Listed) -> Advice {
    let stays = listed
        .spec
        .as_ref()
        .is_some_and(|spec| spec.life == Life::Persistent);
    match &listed.state {
        State::Busy | State::Created | State::Running(_) | State::Paused(_) | State::Stopped(_) => {
            Advice::Fine
        }
        State::Crashed(_) if stays => Advice::Keep,
        State::Orphaned(_) if stays => Advice::End,
        State::Crashed(_)
        | State::Orphaned(_)
        | State::HalfMade
        | State::HalfRemoved
        | State::Left(_) => Advice::Remove,
        State::Unreadable(_) => Advice::ByHand,
    }
}

/// Does what is advised; `false` if there was nothing to do.
///
/// # Errors
/// Somebody else has it in hand, or something cannot be removed.
pub fn clean(listed: &Listed) -> Result<bool, LifeError> {
    let found: &Found = &listed.found;
    match advise(listed) {
        Advice::Fine | Advice::Keep | Advice::ByHand => Ok(false),
        Advice::End => lifecycle::stop(found, Stop::FORCE).map(|_| true),
        Advice::Remove => lifecycle::remove(found, true).map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::list;
    use crate::state::spec::{SPEC_VERSION, SandboxSpec};
    use crate::state::{CONFIG, OWNER, Owner, ProcessRecord, SandboxDir, StateRoot};

    fn left(root: &StateRoot, life: Option<Life>, owner: Option<Owner>) -> SandboxDir {
        let (dir, _lock) = root.create().unwrap();
        if let Some(life) = life {
            let spec = SandboxSpec {
                version: SPEC_VERSION,
                life,
                ..SandboxSpec::default()
            };
            dir.write_record(CONFIG, &spec).unwrap();
        }
        if let Some(owner) = owner {
            dir.write_record(OWNER, &owner).unwrap();
        }
        dir
    }

    #[test]
    fn what_a_user_wanted_to_keep_is_kept_and_the_rest_is_removed() {
        let keep = tempfile::tempdir().unwrap();
        let root = StateRoot::at(keep.path()).unwrap();
        let dead = ProcessRecord {
            pid: std::process::id(),
            start_time: 0,
        };
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let living = ProcessRecord::of(child.id()).unwrap();
        let owner = |boot: &str, vmm| Owner {
            boot_id: boot.to_owned(),
            ..Owner::new(dead, Some(vmm), true)
        };
        let now = crate::state::boot_id();

        let kept = [
            left(&root, Some(Life::Persistent), None),
            left(
                &root,
                Some(Life::Persistent),
                Some(owner("earlier", living)),
            ),
            left(&root, Some(Life::Persistent), Some(owner(&now, living))),
        ];
        let doomed = [
            left(&root, None, None),
            left(&root, Some(Life::Owned), None),
            left(&root, Some(Life::Detached), Some(owner("earlier", living))),
        ];
        let advice = |dir: &SandboxDir| advise(&Found::at(dir.clone()).look());
        assert_eq!(
            kept.each_ref().map(advice),
            [Advice::Fine, Advice::Keep, Advice::End]
        );
        assert_eq!(doomed.each_ref().map(advice), [Advice::Remove; 3]);
        let cleaned = list(&root)
            .unwrap()
            .iter()
            .filter(|one| clean(one).unwrap())
            .count();
        assert_eq!(cleaned, 4);
        assert!(kept.iter().all(|dir| dir.path().exists()));
        assert!(doomed.iter().all(|dir| !dir.path().exists()));
        // The orphan was killed, and the process that only has the same pid after a reboot was not meant.
        assert!(!child.wait().unwrap().success());
        assert!(matches!(
            Found::at(kept[2].clone()).state(),
            State::Stopped(_)
        ));
    }

    #[test]
    fn what_somebody_has_in_hand_is_left_alone() {
        let keep = tempfile::tempdir().unwrap();
        let root = StateRoot::at(keep.path()).unwrap();
        let (_dir, _lock) = root.create().unwrap();
        for listed in list(&root).unwrap() {
            assert_eq!(advise(&listed), Advice::Fine);
            assert!(!clean(&listed).unwrap());
        }
    }
}
