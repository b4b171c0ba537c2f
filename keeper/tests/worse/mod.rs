//! Surroundings in which one thing goes wrong, at a planned moment.

use std::any::Any;
use std::fs::Metadata;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use belljar_keeper::server::{Point, Surroundings};
use belljar_store::fs::{File, Folder, Fs};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The process is killed.
    Kill,
    /// One call fails.
    Eio,
    /// From then on nothing more can be written.
    Full,
    /// From then on each write takes a part only.
    Short,
    /// Packs cannot be read while a template is filled.
    EioReading,
}

const TROUBLES: [Trouble; 5] = [
    Trouble::Kill,
    Trouble::Eio,
    Trouble::Full,
    Trouble::Short,
    Trouble::EioReading,
];

/// What goes wrong, and when: at a call that changes the store, counted from 0, or at a point. It happens to one
/// process; the next one is left in peace.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    trouble: Option<Trouble>,
    write: u64,
    point: Option<Point>,
}

impl Plan {
    pub(crate) const NONE: Self = Self {
        trouble: None,
        write: 0,
        point: None,
    };

    pub(crate) fn at_write(trouble: Trouble, write: u64) -> Self {
        Self {
            trouble: Some(trouble),
            write,
            point: None,
        }
    }

    pub(crate) fn at_point(trouble: Trouble, point: Point) -> Self {
        Self {
            trouble: Some(trouble),
            write: 0,
            point: Some(point),
        }
    }

    /// For the keeper that will be started in this place.
    pub(crate) fn write(&self, place: &Path) {
        let number = |trouble| TROUBLES.iter().position(|one| *one == trouble);
        let point = |point| Point::ALL.iter().position(|one| *one == point);
        let words = [
            self.trouble.and_then(number).map(|number| number as u64),
            Some(self.write),
            self.point.and_then(point).map(|point| point as u64),
        ];
        let words = words.map(|word| word.map_or("-".to_owned(), |word| word.to_string()));
        std::fs::write(place.join("plan"), words.join(" ")).unwrap();
    }

    pub(crate) fn read(place: &Path) -> (Self, PathBuf) {
        let fired = place.join("fired");
        let text = std::fs::read_to_string(place.join("plan")).unwrap();
        let words: Vec<Option<usize>> = text.split(' ').map(|word| word.parse().ok()).collect();
        let plan = Self {
            trouble: words[0].map(|number| TROUBLES[number]),
            write: words[1].unwrap() as u64,
            point: words[2].map(|number| Point::ALL[number]),
        };
        let plan = if fired.exists() { Self::NONE } else { plan };
        (plan, fired)
    }

    pub(crate) fn has_fired(place: &Path) -> bool {
        place.join("fired").exists()
    }
}

struct State {
    plan: Plan,
    fired: PathBuf,
    writes: AtomicU64,
    fills: AtomicBool,
}

impl State {
    /// It happens now.
    fn happen(&self, trouble: Trouble) -> io::Result<()> {
        let _ = std::fs::write(&self.fired, "");
        let errno = match trouble {
            Trouble::Kill => {
                let own = rustix::process::getpid();
                let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
                loop {
                    std::thread::park();
                }
            }
            Trouble::Eio | Trouble::EioReading => rustix::io::Errno::IO,
            Trouble::Full => rustix::io::Errno::NOSPC,
            Trouble::Short => return Ok(()),
        };
        Err(errno.into())
    }

    /// A call that changes something; `takes` space, or does not.
    fn change(&self, takes: bool) -> io::Result<()> {
        let number = self.writes.fetch_add(1, Ordering::SeqCst);
        if self.plan.point.is_some() {
            return Ok(());
        }
        match self.plan.trouble {
            Some(trouble @ (Trouble::Kill | Trouble::Eio)) if number == self.plan.write => {
                self.happen(trouble)
            }
            Some(Trouble::Full) if takes && number >= self.plan.write => self.happen(Trouble::Full),
            _ => Ok(()),
        }
    }

    fn is_short(&self) -> bool {
        self.plan.trouble == Some(Trouble::Short)
    }
}

/// The system with a plan.
pub(crate) struct Worse(Arc<State>);

impl Worse {
    pub(crate) fn new((plan, fired): (Plan, PathBuf)) -> Self {
        Self(Arc::new(State {
            plan,
            fired,
            writes: AtomicU64::new(0),
            fills: AtomicBool::new(false),
        }))
    }
}

impl Surroundings for Worse {
    fn store(&self, path: &Path) -> io::Result<Arc<dyn Fs>> {
        Ok(Arc::new(WorseFs {
            folder: Folder::open(path)?,
            state: Arc::clone(&self.0),
        }))
    }

    /// What has a file `.hangs` beside it is on a server that does not answer.
    fn look(&self, path: &Path) -> io::Result<Metadata> {
        if path.with_extension("hangs").exists() {
            std::fs::write(path.with_extension("hung"), "")?;
            loop {
                std::thread::park();
            }
        }
        std::fs::metadata(path)
    }

    fn at(&self, point: Point) -> io::Result<()> {
        if point == Point::Fill {
            self.0.fills.store(true, Ordering::SeqCst);
        }
        match self.0.plan.trouble {
            Some(trouble) if self.0.plan.point == Some(point) => {
                let is_first = !self.0.fired.exists();
                if is_first {
                    self.0.happen(trouble)
                } else {
                    Ok(())
                }
            }
            _ => Ok(()),
        }
    }
}

struct WorseFs {
    folder: Folder,
    state: Arc<State>,
}

impl WorseFs {
    fn file(&self, path: &str, file: Box<dyn File>) -> Box<dyn File> {
        Box::new(WorseFile {
            is_pack: path.starts_with("packs/"),
            file,
            state: Arc::clone(&self.state),
        })
    }
}

impl Fs for WorseFs {
    fn create_dir(&self, path: &str) -> io::Result<()> {
        self.state.change(true)?;
        self.folder.create_dir(path)
    }

    fn create(&self, path: &str) -> io::Result<Box<dyn File>> {
        self.state.change(true)?;
        Ok(self.file(path, self.folder.create(path)?))
    }

    fn open(&self, path: &str) -> io::Result<Box<dyn File>> {
        Ok(self.file(path, self.folder.open(path)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.state.change(false)?;
        self.folder.rename(from, to)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.state.change(false)?;
        self.folder.remove(path)
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        self.folder.list(path)
    }

    fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.state.change(false)?;
        self.folder.sync_dir(path)
    }

    fn lock(&self, path: &str) -> io::Result<Box<dyn Any + Send + Sync>> {
        self.folder.lock(path)
    }

    fn now_ms(&self) -> u64 {
        self.folder.now_ms()
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        self.folder.random(bytes)
    }
}

struct WorseFile {
    is_pack: bool,
    file: Box<dyn File>,
    state: Arc<State>,
}

impl File for WorseFile {
    fn append(&self, bytes: &[u8]) -> io::Result<usize> {
        self.state.change(true)?;
        if self.state.is_short() {
            self.state.happen(Trouble::Short)?;
            let part = bytes.len().div_ceil(3);
            return self.file.append(&bytes[..part]);
        }
        self.file.append(bytes)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let fails = self.state.plan.trouble == Some(Trouble::EioReading);
        if self.is_pack && fails && self.state.fills.load(Ordering::SeqCst) {
            self.state.happen(Trouble::EioReading)?;
        }
        self.file.read_at(bytes, offset)
    }

    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn sync(&self) -> io::Result<()> {
        self.state.change(false)?;
        self.file.sync()
    }
}
