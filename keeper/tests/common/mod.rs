//! A keeper in a directory of its own, and calls to it.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_keeper::client::{Client, Keeper, KeeperError};
use belljar_keeper::v1::{self, error::Code, reply::Result as Answer, request::Call};

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn keeper(&self) -> Keeper {
        Keeper {
            dir: self.path(),
            program: PathBuf::from(env!("CARGO_BIN_EXE_belljar-keeper")),
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("state/keeper")
    }

    pub(crate) fn connect(&self) -> Client {
        self.keeper().connect().unwrap()
    }

    /// Pids of keepers of this place.
    pub(crate) fn pids(&self) -> Vec<i32> {
        let wanted = self.path();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).into_owned();
            words.contains("belljar-keeper") && words.contains(&*wanted.to_string_lossy())
        })
        .collect()
    }

    /// Kills them; when it returns they do nothing any more.
    pub(crate) fn kill(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let pids = self.pids();
            for pid in &pids {
                let pid = rustix::process::Pid::from_raw(*pid).unwrap();
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            if pids.is_empty() || Instant::now() > deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, KeeperError>) -> (Code, String) {
    match result {
        Err(KeeperError::Refused { code, message }) => (code, message),
        other => panic!("not refused: {other:?}"),
    }
}

pub(crate) fn begin(client: &mut Client, base: &str) -> (v1::Begun, Vec<File>) {
    let begin = v1::Begin {
        memory_bytes: 8 * MIB,
        disk_bytes: MIB,
        base: base.to_owned(),
        ..v1::Begin::default()
    };
    let (Answer::Begun(begun), files) = client.call(Call::Begin(begin), &[], |_| {}).unwrap()
    else {
        panic!("not begun")
    };
    (begun, files.into_iter().map(File::from).collect())
}

pub(crate) fn keep(client: &mut Client, keep: v1::Keep) -> Result<String, KeeperError> {
    let keep = v1::Keep {
        has_memory: true,
        has_disk: true,
        sandbox: b"who it was".to_vec(),
        memory_bytes: 8 * MIB,
        ..keep
    };
    let (Answer::Accepted(accepted), _) = client.call(Call::Keep(keep), &[], |_| {})? else {
        panic!("not accepted")
    };
    let mut told: Vec<v1::Progress> = Vec::new();
    let progress = |answer| match answer {
        Answer::Progress(so_far) => told.push(so_far),
        other => panic!("no progress: {other:?}"),
    };
    match client.answer(progress)? {
        (Answer::Kept(kept), _) => assert_eq!(kept.id, accepted.id),
        other => panic!("not kept: {other:?}"),
    }
    assert!(told.is_sorted_by_key(|so_far| so_far.done), "{told:?}");
    let last = told.last().expect("progress is told");
    assert_eq!(last.done, last.total);
    Ok(accepted.id)
}

pub(crate) fn pages(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(count * 4096);
    while bytes.len() < count * 4096 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// A capture with a hole; returns its id and what memory is.
pub(crate) fn capture(client: &mut Client, seed: u64, tag: &str) -> (String, Vec<u8>) {
    capture_after(client, seed, tag, &[])
}

/// The same, of a sandbox that comes from other snapshots.
pub(crate) fn capture_after(
    client: &mut Client,
    seed: u64,
    tag: &str,
    parents: &[String],
) -> (String, Vec<u8>) {
    let (_, files) = begin(client, "");
    files[0].write_all_at(b"state", 0).unwrap();
    files[1].set_len(8 * MIB).unwrap();
    let mut memory = vec![0; 8 << 20];
    for at in [0, 3 << 20] {
        let data = pages(seed + at as u64, 100);
        memory[at..at + data.len()].copy_from_slice(&data);
        files[1].write_all_at(&data, at as u64).unwrap();
    }
    files[2].set_len(MIB).unwrap();
    files[2].write_all_at(b"on disk", 4096).unwrap();
    let call = v1::Keep {
        tags: vec![tag.to_owned()],
        parents: parents.to_vec(),
        ..v1::Keep::default()
    };
    (keep(client, call).unwrap(), memory)
}

pub(crate) fn open(
    client: &mut Client,
    word: &str,
) -> Result<(v1::Opened, Vec<File>), KeeperError> {
    let open = v1::Open {
        snapshot: word.to_owned(),
        ..v1::Open::default()
    };
    let (Answer::Opened(opened), files) = client.call(Call::Open(open), &[], |_| {})? else {
        panic!("not opened")
    };
    Ok((opened, files.into_iter().map(File::from).collect()))
}

pub(crate) fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

pub(crate) fn list(client: &mut Client) -> Vec<v1::Snapshot> {
    let mut all = Vec::new();
    let collect = |answer| {
        if let Answer::Item(snapshot) = answer {
            all.push(snapshot);
        }
    };
    client.call(Call::List(v1::List {}), &[], collect).unwrap();
    all
}

pub(crate) fn forget_templates(place: &Path) {
    let entries = || {
        std::fs::read_dir(place.join("templates"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
    };
    // One may get its name meanwhile.
    while entries().next().is_some() {
        for path in entries() {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
                _ => {}
            }
        }
    }
}
