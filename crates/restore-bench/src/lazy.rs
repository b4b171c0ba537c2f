//! A snapshot in a store of its own, from which guests are restored straight from chunks: by a keeper, as sandboxes are.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use belljar_keeper::client::{Client, Keeper};
use belljar_keeper::v1::{self, reply::Result as Answer, request::Call};
use belljar_keeper::{DIR, SOCKET};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{SeekFrom, seek};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::failure::{Attempt, Failure, Result};
use crate::vmm::PATIENCE;

/// Bytes that are copied at once.
const PIECE: usize = 1 << 20;
/// Between two looks for what the keeper writes behind a guest.
const RETRY: Duration = Duration::from_millis(5);

/// A snapshot as chunks.
#[derive(Clone, Debug)]
pub struct Chunks {
    keeper: Keeper,
    id: String,
    /// The keeper wrote down what a guest touched. It believes only files that nobody has changed or replaced, so their
    /// folder is moved.
    is_remembered: bool,
}

/// What a VMM restores it with.
pub struct Opened {
    pub state: OwnedFd,
    pub memory: OwnedFd,
    pub handler: OwnedFd,
}

impl Chunks {
    /// Keeps a snapshot's two files, with a keeper of its own in `directory`.
    pub fn of(state: &Path, memory: &Path, program: &Path, directory: &Path) -> Result<Self> {
        let keeper = Keeper {
            dir: directory.join(DIR),
            program: program.to_owned(),
        };
        let mut client = keeper.connect().attempt("the keeper")?;
        let length = fs::metadata(memory).attempt("no memory file")?.len();
        let begin = v1::Begin {
            memory_bytes: length,
            ..v1::Begin::default()
        };
        let begun = client.call(Call::Begin(begin), &[], |_| {});
        let (_, files) = begun.attempt("the keeper does not take a snapshot")?;
        let mut files = files.into_iter().map(File::from);
        for from in [state, memory] {
            let to = files.next().ok_or_else(unexpected)?;
            copy_sparse(from, &to).attempt(format!("cannot copy {}", from.display()))?;
        }
        let keep = v1::Keep {
            has_memory: true,
            memory_bytes: length,
            ..v1::Keep::default()
        };
        let accepted = client.call(Call::Keep(keep), &[], |_| {});
        let (answer, _) = accepted.attempt("the keeper does not keep a snapshot")?;
        let Answer::Accepted(accepted) = answer else {
            return Err(unexpected());
        };
        client.answer(|_| {}).attempt("a snapshot was not kept")?;
        Ok(Self {
            keeper,
            id: accepted.id,
            is_remembered: false,
        })
    }

    /// Has the keeper forget all but the chunks, and what guests touched first unless that is wanted. As long as what
    /// is returned is held, the keeper stays.
    pub fn forget(&self, keep_touched: bool) -> Result<Client> {
        end_keeper(&self.keeper)?;
        let templates = self.keeper.dir.join("templates");
        let _ = fs::remove_dir_all(&templates);
        let (folder, aside) = (self.touched_folder(), self.remembered_folder());
        let moved =
            |from: &Path, to: &Path| fs::rename(from, to).attempt("cannot keep what was touched");
        if self.is_remembered && !aside.exists() {
            moved(&folder, &aside)?;
        }
        let _ = fs::remove_dir_all(&folder);
        if keep_touched && self.is_remembered {
            moved(&aside, &folder)?;
        }
        let mut client = self.keeper.connect().attempt("the keeper")?;
        // What it does once is not part of a restore.
        let list = Call::List(v1::List {});
        client.call(list, &[], |_| {}).attempt("the keeper")?;
        Ok(client)
    }

    /// Has the keeper do nothing until it is needed again.
    pub fn rest(&self) -> Result<()> {
        end_keeper(&self.keeper)
    }

    /// Opens it for one guest.
    pub fn open(&self) -> Result<Opened> {
        let mut client = self.keeper.connect().attempt("the keeper")?;
        let open = v1::Open {
            snapshot: self.id.clone(),
            lazy: true,
            ..v1::Open::default()
        };
        let opened = client.call(Call::Open(open), &[], |_| {});
        let (answer, files) = opened.attempt("the keeper does not open the snapshot")?;
        let Answer::Opened(opened) = answer else {
            return Err(unexpected());
        };
        if !opened.lazy {
            let why = match opened.hot {
                true => "had the whole memory already",
                false => "made a template first, as if this machine had too little memory",
            };
            return Err(Failure(format!("the keeper {why}: this would not be lazy")));
        }
        match <[OwnedFd; 3]>::try_from(files) {
            Ok([state, memory, handler]) => Ok(Opened {
                state,
                memory,
                handler,
            }),
            Err(_) => Err(unexpected()),
        }
    }

    /// Remembers what the guest that was restored last touched; returns when the keeper has written it down.
    pub fn remember(&mut self) -> Result<()> {
        let limit = Instant::now() + PATIENCE;
        // The pages themselves come last.
        let last = format!("{}.pages.ok", self.id);
        while !self.touched_folder().join(&last).exists() {
            if Instant::now() > limit {
                return Err(Failure(
                    "the keeper did not write down what a guest touched".to_owned(),
                ));
            }
            std::thread::sleep(RETRY);
        }
        self.is_remembered = true;
        Ok(())
    }

    fn touched_folder(&self) -> PathBuf {
        self.keeper.dir.join("touched")
    }

    fn remembered_folder(&self) -> PathBuf {
        self.keeper.dir.join("touched.kept")
    }

    /// Ends the keeper and removes the store.
    pub fn remove(&self) {
        let _ = end_keeper(&self.keeper);
        let _ = fs::remove_dir_all(&self.keeper.dir);
    }
}

/// Kills a keeper, if it runs; when this returns it does nothing any more.
pub fn end_keeper(keeper: &Keeper) -> Result<()> {
    let Ok(stream) = UnixStream::connect(keeper.dir.join(SOCKET)) else {
        return Ok(());
    };
    let peer = rustix::net::sockopt::socket_peercred(&stream).attempt("whose socket it is")?;
    let Ok(keeper) = pidfd_open(peer.pid, PidfdFlags::empty()) else {
        return Ok(());
    };
    let _ = pidfd_send_signal(&keeper, Signal::KILL);
    let limit = Timespec {
        tv_sec: PATIENCE.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    let ended = poll(&mut [PollFd::new(&keeper, PollFlags::IN)], Some(&limit));
    match ended.attempt("poll")? {
        0 => Err(Failure("the keeper does not end".to_owned())),
        _ => Ok(()),
    }
}

fn unexpected() -> Failure {
    Failure("the keeper answered with something else than was asked for".to_owned())
}

/// Copies what is data.
fn copy_sparse(from: &Path, to: &File) -> io::Result<()> {
    let from = File::open(from)?;
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < length {
        at = match seek(&from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but holes.
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(&from, SeekFrom::Hole(at))?;
        while at < end {
            let most = usize::try_from(end.saturating_sub(at)).unwrap_or(PIECE);
            let piece = buffer.get_mut(..most.min(PIECE)).unwrap_or_default();
            from.read_exact_at(piece, at)?;
            to.write_all_at(piece, at)?;
            at = at.saturating_add(piece.len() as u64);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_keep_holes() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let file = File::create(&from).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(&vec![7; 3 << 20], 8 << 20).unwrap();
        file.set_len(64 << 20).unwrap();
        copy_sparse(&from, &File::create(&to).unwrap()).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        let blocks = |path| {
            use std::os::unix::fs::MetadataExt;
            fs::metadata(path).unwrap().blocks()
        };
        assert!(blocks(&to) <= blocks(&from).max(7 << 11));
    }
}
