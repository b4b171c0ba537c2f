//! From inotify's events to what happened in a tree: pure, the clock and the file system are given.
//!
//! inotify(7) watches single directories. This keeps the tree of those that are watched, says which to
//! watch next ([`Command::Scan`]), joins both halves of a move, and leaves out what was told already. What
//! it tells, applied to the tree as it was at the beginning, gives the tree as it is; where that cannot be
//! had, because names changed hands while they were looked at, it asks to begin anew.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use rustix::fs::inotify::ReadFlags;

/// The second half of a move follows the first at once, or never.
const MOVE_TIME: Duration = Duration::from_millis(20);

/// A file that is written and not closed is told this often; a little less than the second promised.
const WRITE_TIME: Duration = Duration::from_millis(750);

/// Files that are being written, and names that a scan has told; beyond, more may be told than necessary.
const MAX_NOTED: usize = 32_768;

/// The name of an entry; empty: the watched path itself.
type Name = Vec<u8>;

/// An entry: the directory's watch, and its name in there.
type Place = (i32, Name);

/// An event as the kernel tells it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raw<'a> {
    pub(super) wd: i32,
    pub(super) kind: ReadFlags,
    pub(super) cookie: u32,
    pub(super) name: &'a [u8],
}

/// What happened to a path, relative to the watched one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    Created(Vec<u8>),
    Changed(Vec<u8>),
    Attributes(Vec<u8>),
    Moved {
        from: Vec<u8>,
        to: Vec<u8>,
    },
    Removed(Vec<u8>),
    /// The watched path is gone; nothing follows.
    Gone(&'static str),
}

/// Something to be told to whoever watches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) what: What,
    pub(super) is_directory: bool,
}

/// Something to be done with the file system, in this order.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Watch this directory, report it with [`Tree::added`], then each entry with [`Tree::found`]. If it is
    /// not there, say [`Tree::missed`].
    Scan {
        parent: i32,
        name: Name,
    },
    /// Watch what is at this place and say with [`Tree::is_at`] which watch that is, if it is a directory.
    Compare {
        parent: i32,
        name: Name,
    },
    Unwatch(i32),
    /// See whether the watched file is still the one at its path.
    CheckRoot,
    /// Events are lost: build a new tree.
    StartAnew(&'static str),
}

/// What an event leads to.
#[derive(Debug, Default)]
pub(super) struct Out {
    pub(super) told: Vec<Told>,
    pub(super) commands: VecDeque<Command>,
}

impl Out {
    fn tell(&mut self, what: What, is_directory: bool) {
        self.told.push(Told { what, is_directory });
    }

    fn scan(&mut self, (parent, name): Place) {
        self.commands.push_back(Command::Scan { parent, name });
    }
}

#[derive(Debug)]
struct Node {
    /// `None`: the root.
    place: Option<Place>,
    children: HashMap<Name, i32>,
}

/// First half of a move.
#[derive(Debug)]
struct Leaving {
    cookie: u32,
    place: Place,
    is_directory: bool,
    at: Duration,
}

/// A file that is open for writing.
#[derive(Debug)]
struct Writing {
    since: Duration,
    untold: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: HashMap<i32, Node>,
    root: i32,
    recursive: bool,
    leaving: Vec<Leaving>,
    /// Told by a scan; their own events may still be in the queue.
    announced: HashSet<Place>,
    writing: HashMap<Place, Writing>,
    /// Directories that were not at their path when they were to be scanned: they, or one above them, have
    /// moved, and that is yet to be told.
    missed: HashSet<Place>,
    /// Directories that were found at their path while events from before were still under way, and whether one
    /// of those moved them: it may have meant another that had the same path before.
    fresh: HashMap<i32, bool>,
    /// Directories that are watched no more, although nobody has said yet that they are removed.
    dying: Vec<(i32, Duration)>,
}

impl Tree {
    /// With `root` watched.
    pub(super) fn new(root: i32, recursive: bool) -> Self {
        let node = Node {
            place: None,
            children: HashMap::new(),
        };
        Self {
            nodes: HashMap::from([(root, node)]),
            root,
            recursive,
            leaving: Vec::new(),
            announced: HashSet::new(),
            writing: HashMap::new(),
            missed: HashSet::new(),
            fresh: HashMap::new(),
            dying: Vec::new(),
        }
    }

    pub(super) fn directories(&self) -> usize {
        self.nodes.len()
    }

    /// Path of an entry, relative to the root.
    pub(super) fn path(&self, wd: i32, name: &[u8]) -> Vec<u8> {
        let mut parts = vec![name];
        let mut at = wd;
        while let Some(Node {
            place: Some((parent, name)),
            ..
        }) = self.nodes.get(&at)
        {
            parts.push(name);
            at = *parent;
        }
        parts.reverse();
        parts.retain(|part| !part.is_empty());
        parts.join(&b'/')
    }

    /// The directory at a place is watched now. False if it must not be listed.
    pub(super) fn added(&mut self, parent: i32, name: &[u8], wd: i32, out: &mut Out) -> bool {
        if !self.nodes.contains_key(&parent) {
            if !self.nodes.contains_key(&wd) {
                out.commands.push_back(Command::Unwatch(wd));
            }
            return false;
        }
        let place = (parent, name.to_vec());
        if let Some(known) = self.nodes.get(&wd) {
            if known.place.as_ref() == Some(&place) {
                return true;
            }
            out.commands.push_back(Command::StartAnew(
                "a directory was moved while it was looked at",
            ));
            return false;
        }
        self.detach_child(parent, name, out);
        let node = Node {
            place: Some(place),
            children: HashMap::new(),
        };
        self.nodes.insert(wd, node);
        self.fresh.insert(wd, false);
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children.insert(name.to_vec(), wd);
        }
        true
    }

    /// A scan found an entry. `tell`: it is new to whoever watches.
    pub(super) fn found(
        &mut self,
        wd: i32,
        name: &[u8],
        is_directory: bool,
        tell: bool,
        out: &mut Out,
    ) {
        let place = (wd, name.to_vec());
        if tell {
            out.tell(What::Created(self.path(wd, name)), is_directory);
            if self.announced.len() < MAX_NOTED {
                self.announced.insert(place.clone());
            }
        }
        if is_directory && self.recursive {
            out.scan(place);
        }
    }

    /// There is nothing at the path of a directory that was to be scanned.
    pub(super) fn missed(&mut self, parent: i32, name: &[u8], out: &mut Out) {
        if !self.nodes.contains_key(&parent) {
            return;
        }
        if self.missed.len() >= MAX_NOTED {
            out.commands.push_back(Command::StartAnew(
                "too many directories were moved while they were looked at",
            ));
            return;
        }
        self.missed.insert((parent, name.to_vec()));
    }

    /// Every event that was queued when the last scan ended has been taken.
    pub(super) fn drained(&mut self, out: &mut Out) {
        self.announced = HashSet::new();
        for (wd, has_moved) in std::mem::take(&mut self.fresh) {
            let place = self.nodes.get(&wd).and_then(|node| node.place.clone());
            if let (true, Some((parent, name))) = (has_moved, place) {
                out.commands.push_back(Command::Compare { parent, name });
            }
        }
        self.look_again(out);
    }

    /// Which directory is at a place really.
    pub(super) fn is_at(&mut self, parent: i32, name: &[u8], wd: Option<i32>, out: &mut Out) {
        if self.child(&(parent, name.to_vec())) != wd {
            out.commands.push_back(Command::StartAnew(
                "directories changed names while they were looked at",
            ));
        }
    }

    /// Paths are other ones now.
    fn look_again(&mut self, out: &mut Out) {
        for place in std::mem::take(&mut self.missed) {
            if self.nodes.contains_key(&place.0) {
                out.scan(place);
            }
        }
    }

    /// Takes an event of the kernel.
    pub(super) fn event(&mut self, raw: Raw<'_>, now: Duration, out: &mut Out) {
        let kind = raw.kind;
        if kind.contains(ReadFlags::QUEUE_OVERFLOW) {
            out.commands
                .push_back(Command::StartAnew("the kernel's queue was full"));
            return;
        }
        self.settle_above(raw, out);
        if !self.nodes.contains_key(&raw.wd) {
            return;
        }
        let is_directory = kind.contains(ReadFlags::ISDIR);
        let place = (raw.wd, raw.name.to_vec());
        if raw.name.is_empty() {
            self.about_itself(raw, now, out);
        } else if kind.contains(ReadFlags::CREATE) {
            self.settle(&place, out);
            self.appears(place, is_directory, out);
        } else if kind.contains(ReadFlags::MOVED_TO) {
            self.arrives(place, raw.cookie, is_directory, now, out);
        } else if kind.contains(ReadFlags::MOVED_FROM) {
            self.settle(&place, out);
            self.announced.remove(&place);
            self.missed.remove(&place);
            self.leaving.push(Leaving {
                cookie: raw.cookie,
                place,
                is_directory,
                at: now,
            });
        } else if kind.contains(ReadFlags::DELETE) {
            self.settle(&place, out);
            self.disappears(&place, is_directory, out);
        } else if kind.contains(ReadFlags::CLOSE_WRITE) {
            self.closed(&place, out);
        } else if kind.contains(ReadFlags::MODIFY) {
            self.written(place, now, out);
        } else if kind.contains(ReadFlags::ATTRIB) {
            out.tell(What::Attributes(self.path(raw.wd, raw.name)), is_directory);
        }
    }

    /// Events without a name: of a watched directory, or of the one file that is watched.
    fn about_itself(&mut self, raw: Raw<'_>, now: Duration, out: &mut Out) {
        let kind = raw.kind;
        let is_root = raw.wd == self.root;
        if kind.intersects(ReadFlags::IGNORED | ReadFlags::UNMOUNT | ReadFlags::DELETE_SELF)
            && is_root
        {
            out.tell(What::Gone("it was removed"), false);
        } else if kind.contains(ReadFlags::IGNORED) {
            // It was removed. The directory above says so next, or has said so just before.
            self.dying.push((raw.wd, now));
        } else if !is_root {
            // The directory above tells the same with a name.
        } else if kind.contains(ReadFlags::MOVE_SELF) {
            out.tell(What::Gone("it was moved away"), false);
        } else if kind.contains(ReadFlags::ATTRIB) {
            let is_directory = kind.contains(ReadFlags::ISDIR);
            out.tell(What::Attributes(Vec::new()), is_directory);
            if !is_directory {
                out.commands.push_back(Command::CheckRoot);
            }
        } else if kind.contains(ReadFlags::CLOSE_WRITE) {
            self.closed(&(raw.wd, Name::new()), out);
        } else if kind.contains(ReadFlags::MODIFY) {
            self.written((raw.wd, Name::new()), now, out);
        }
    }

    fn appears(&mut self, place: Place, is_directory: bool, out: &mut Out) {
        if self.announced.remove(&place) {
            return;
        }
        out.tell(What::Created(self.path(place.0, &place.1)), is_directory);
        if is_directory && self.recursive {
            out.scan(place);
        }
    }

    fn disappears(&mut self, place: &Place, is_directory: bool, out: &mut Out) {
        self.announced.remove(place);
        self.writing.remove(place);
        self.missed.remove(place);
        out.tell(What::Removed(self.path(place.0, &place.1)), is_directory);
        if is_directory {
            self.detach_child(place.0, &place.1, out);
        }
    }

    fn arrives(
        &mut self,
        to: Place,
        cookie: u32,
        is_directory: bool,
        now: Duration,
        out: &mut Out,
    ) {
        let index = self.leaving.iter().position(|half| half.cookie == cookie);
        let from = index.map(|index| self.leaving.swap_remove(index).place);
        self.settle(&to, out);
        let from = from.filter(|(wd, _)| self.nodes.contains_key(wd));
        let Some(from) = from else {
            // A directory that had this name is replaced.
            if self.child(&to).is_some() {
                self.disappears(&to, true, out);
            }
            self.appears(to, is_directory, out);
            return;
        };
        out.tell(
            What::Moved {
                from: self.path(from.0, &from.1),
                to: self.path(to.0, &to.1),
            },
            is_directory,
        );
        self.announced.remove(&to);
        self.writing.remove(&to);
        if let Some(writing) = self.writing.remove(&from) {
            self.writing.insert(
                to.clone(),
                Writing {
                    since: now,
                    ..writing
                },
            );
        }
        if !is_directory {
            return;
        }
        let moved = self.child(&from);
        if moved.is_none() || moved != self.child(&to) {
            self.detach_child(to.0, &to.1, out);
        }
        match moved {
            Some(wd) => {
                self.reparent(wd, &from, to, out);
                self.look_again(out);
            }
            // It moved before it was watched.
            None if self.recursive => out.scan(to),
            None => {}
        }
    }

    fn written(&mut self, place: Place, now: Duration, out: &mut Out) {
        if let Some(writing) = self.writing.get_mut(&place) {
            writing.untold = true;
        } else if self.writing.len() < MAX_NOTED {
            let writing = Writing {
                since: now,
                untold: true,
            };
            self.writing.insert(place, writing);
        } else {
            out.tell(What::Changed(self.path(place.0, &place.1)), false);
        }
    }

    fn closed(&mut self, place: &Place, out: &mut Out) {
        self.writing.remove(place);
        out.tell(What::Changed(self.path(place.0, &place.1)), false);
    }

    /// A move whose second half has not come when its first half's name is used again went out of the tree.
    fn settle(&mut self, place: &Place, out: &mut Out) {
        if let Some(index) = self.leaving.iter().position(|half| half.place == *place) {
            let half = self.leaving.swap_remove(index);
            self.disappears(&half.place, half.is_directory, out);
        }
    }

    /// Something happened in a directory of which half a move is known: it is not in the tree any more. Both
    /// halves of a move within the tree come one after the other.
    fn settle_above(&mut self, raw: Raw<'_>, out: &mut Out) {
        if self.leaving.is_empty() || raw.name.is_empty() {
            return;
        }
        let above = |half: &Leaving| {
            half.is_directory
                && self
                    .child(&half.place)
                    .is_some_and(|wd| self.is_below(raw.wd, wd))
        };
        if let Some(index) = self.leaving.iter().position(above) {
            let half = self.leaving.swap_remove(index);
            self.disappears(&half.place, true, out);
        }
    }

    fn left(&mut self, half: &Leaving, out: &mut Out) {
        if self.nodes.contains_key(&half.place.0) {
            self.disappears(&half.place, half.is_directory, out);
        }
    }

    /// Tells what is due by now.
    pub(super) fn expire(&mut self, now: Duration, out: &mut Out) {
        let due = |at: Duration, time: Duration| now >= at.saturating_add(time);
        let (late, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.leaving)
            .into_iter()
            .partition(|half| due(half.at, MOVE_TIME));
        self.leaving = kept;
        for half in &late {
            self.left(half, out);
        }
        let nodes = &self.nodes;
        self.dying.retain(|(wd, _)| nodes.contains_key(wd));
        if self.dying.iter().any(|(_, at)| due(*at, MOVE_TIME)) {
            out.commands.push_back(Command::StartAnew(
                "a directory was replaced while it was looked at",
            ));
        }
        let mut told = Vec::new();
        self.writing.retain(|place, writing| {
            if !due(writing.since, WRITE_TIME) {
                return true;
            }
            let untold = std::mem::replace(&mut writing.untold, false);
            writing.since = now;
            if untold {
                told.push(place.clone());
            }
            untold
        });
        for (wd, name) in told {
            if self.nodes.contains_key(&wd) {
                out.tell(What::Changed(self.path(wd, &name)), false);
            }
        }
    }

    /// When [`Self::expire`] is to be called at the latest.
    pub(super) fn next_due(&self, now: Duration) -> Option<Duration> {
        let halves = self.leaving.iter().map(|half| half.at);
        let dying = self.dying.iter().map(|(_, at)| *at);
        let soon = halves
            .chain(dying)
            .min()
            .map(|at| at.saturating_add(MOVE_TIME));
        // One look at all of them now and then is enough.
        let writing = (!self.writing.is_empty()).then(|| now.saturating_add(WRITE_TIME / 3));
        match (soon, writing) {
            (Some(soon), Some(writing)) => Some(soon.min(writing)),
            (soon, writing) => soon.or(writing),
        }
    }

    fn child(&self, (wd, name): &Place) -> Option<i32> {
        self.nodes.get(wd)?.children.get(name).copied()
    }

    fn reparent(&mut self, wd: i32, from: &Place, to: Place, out: &mut Out) {
        // Only names that changed hands while they were looked at can lead to this.
        if self.is_below(to.0, wd) {
            out.commands.push_back(Command::StartAnew(
                "directories were moved while they were looked at",
            ));
            return;
        }
        if let Some(old) = self.nodes.get_mut(&from.0) {
            old.children.remove(&from.1);
        }
        if let Some(new) = self.nodes.get_mut(&to.0) {
            new.children.insert(to.1.clone(), wd);
        }
        if let Some(node) = self.nodes.get_mut(&wd) {
            node.place = Some(to);
        }
        if let Some(has_moved) = self.fresh.get_mut(&wd) {
            *has_moved = true;
        }
    }

    fn is_below(&self, wd: i32, above: i32) -> bool {
        let mut at = Some(wd);
        while let Some(wd) = at {
            if wd == above {
                return true;
            }
            let node = self.nodes.get(&wd);
            at = node
                .and_then(|node| node.place.as_ref())
                .map(|(parent, _)| *parent);
        }
        false
    }

    /// Forgets the directory at a place with all below it, and stops watching them.
    fn detach_child(&mut self, wd: i32, name: &[u8], out: &mut Out) {
        let child = self
            .nodes
            .get_mut(&wd)
            .and_then(|node| node.children.remove(name));
        let mut all = VecDeque::from_iter(child);
        while let Some(wd) = all.pop_front() {
            if let Some(node) = self.nodes.remove(&wd) {
                all.extend(node.children.into_values());
                out.commands.push_back(Command::Unwatch(wd));
            }
        }
        if child.is_some() {
            let nodes = &self.nodes;
            self.writing.retain(|(wd, _), _| nodes.contains_key(wd));
            self.missed.retain(|(wd, _)| nodes.contains_key(wd));
        }
    }
}

#[cfg(test)]
mod tests;
