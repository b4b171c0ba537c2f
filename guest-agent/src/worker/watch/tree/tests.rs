//! The tree against a model of a file system and of inotify: whatever happens, and however late it is
//! looked at, what was told leads to the tree as it is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;

use super::*;

/// Paths and whether each is a directory.
type View = BTreeMap<String, bool>;

#[derive(Debug, Default)]
struct Inode {
    /// `None`: a file.
    entries: Option<BTreeMap<String, usize>>,
    wd: Option<i32>,
}

/// A file system, its inotify, and the program that looks at both.
struct Model {
    inodes: Vec<Inode>,
    queue: VecDeque<(i32, ReadFlags, u32, String)>,
    next_wd: i32,
    cookie: u32,
    tree: Tree,
    view: View,
    now: Duration,
    anew: bool,
    /// Whether a scan may have shown names whose events were still under way.
    told: Vec<What>,
}

const ROOT: usize = 0;

impl Model {
    fn new() -> Self {
        let mut root = Inode {
            entries: Some(BTreeMap::new()),
            wd: Some(1),
        };
        root.wd = Some(1);
        Self {
            inodes: vec![root],
            queue: VecDeque::new(),
            next_wd: 2,
            cookie: 0,
            tree: Tree::new(1, true),
            view: View::new(),
            now: Duration::ZERO,
            anew: false,
            told: Vec::new(),
        }
    }

    fn inode(&self, path: &str) -> Option<usize> {
        path.split('/')
            .filter(|part| !part.is_empty())
            .try_fold(ROOT, |at, part| {
                self.inodes[at].entries.as_ref()?.get(part).copied()
            })
    }

    fn truth(&self) -> View {
        let mut all = View::new();
        let mut open = vec![(String::new(), ROOT)];
        while let Some((path, at)) = open.pop() {
            for (name, child) in self.inodes[at].entries.iter().flatten() {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}/{name}")
                };
                all.insert(path.clone(), self.inodes[*child].entries.is_some());
                open.push((path, *child));
            }
        }
        all
    }

    fn notify(&mut self, inode: usize, kind: ReadFlags, cookie: u32, name: &str) {
        if let Some(wd) = self.inodes[inode].wd {
            let event = (wd, kind, cookie, name.to_owned());
            if self.queue.back() != Some(&event) {
                self.queue.push_back(event);
            }
        }
    }

    fn kind(&self, inode: usize, kind: ReadFlags) -> ReadFlags {
        if self.inodes[inode].entries.is_some() {
            kind | ReadFlags::ISDIR
        } else {
            kind
        }
    }

    fn split(path: &str) -> (&str, &str) {
        path.rsplit_once('/').unwrap_or(("", path))
    }

    fn create(&mut self, path: &str, directory: bool) {
        let (parent, name) = Self::split(path);
        let Some(parent) = self.inode(parent) else {
            return;
        };
        let new = self.inodes.len();
        match &mut self.inodes[parent].entries {
            Some(entries) if !entries.contains_key(name) => entries.insert(name.to_owned(), new),
            _ => return,
        };
        self.inodes.push(Inode {
            entries: directory.then(BTreeMap::new),
            wd: None,
        });
        self.notify(parent, self.kind(new, ReadFlags::CREATE), 0, name);
    }

    fn remove(&mut self, path: &str) {
        let (Some(at), (parent, name)) = (self.inode(path), Self::split(path)) else {
            return;
        };
        if at == ROOT
            || self.inodes[at]
                .entries
                .as_ref()
                .is_some_and(|entries| !entries.is_empty())
        {
            return;
        }
        let Some(parent) = self.inode(parent) else {
            return;
        };
        self.inodes[parent].entries.as_mut().unwrap().remove(name);
        // As Linux does it, unless somebody has it open.
        if !self.inodes.len().is_multiple_of(4) {
            self.evict(at);
        }
        self.notify(parent, self.kind(at, ReadFlags::DELETE), 0, name);
        self.evict(at);
    }

    fn evict(&mut self, at: usize) {
        self.notify(at, ReadFlags::DELETE_SELF, 0, "");
        self.notify(at, ReadFlags::IGNORED, 0, "");
        self.inodes[at].wd = None;
    }

    fn rename(&mut self, from: &str, to: &str) {
        let Some(at) = self.inode(from) else { return };
        let directory = self.inodes[at].entries.is_some();
        if at == ROOT || to == from || format!("{to}/").starts_with(&format!("{from}/")) {
            return;
        }
        let ((from_dir, from_name), (to_dir, to_name)) = (Self::split(from), Self::split(to));
        let (Some(from_dir), Some(to_dir)) = (self.inode(from_dir), self.inode(to_dir)) else {
            return;
        };
        if self.inodes[to_dir].entries.is_none() {
            return;
        }
        let replaced = self.inode(to);
        if let Some(replaced) = replaced {
            let other = &self.inodes[replaced].entries;
            if other.is_some() != directory
                || other.as_ref().is_some_and(|e| !e.is_empty())
                || replaced == at
            {
                return;
            }
        }
        self.inodes[from_dir]
            .entries
            .as_mut()
            .unwrap()
            .remove(from_name);
        self.inodes[to_dir]
            .entries
            .as_mut()
            .unwrap()
            .insert(to_name.to_owned(), at);
        self.cookie += 1;
        let cookie = self.cookie;
        self.notify(
            from_dir,
            self.kind(at, ReadFlags::MOVED_FROM),
            cookie,
            from_name,
        );
        self.notify(to_dir, self.kind(at, ReadFlags::MOVED_TO), cookie, to_name);
        self.notify(at, ReadFlags::MOVE_SELF, 0, "");
        if let Some(replaced) = replaced {
            self.evict(replaced);
        }
    }

    /// Takes one event, and does what it leads to.
    fn step(&mut self, tell: bool) {
        let Some((wd, kind, cookie, name)) = self.queue.pop_front() else {
            let mut out = Out::default();
            self.tree.drained(&mut out);
            self.carry_out(out, tell);
            return;
        };
        let raw = Raw {
            wd,
            kind,
            cookie,
            name: name.as_bytes(),
        };
        let mut out = Out::default();
        self.tree.event(raw, self.now, &mut out);
        self.carry_out(out, tell);
    }

    fn carry_out(&mut self, mut out: Out, tell: bool) {
        while let Some(command) = out.commands.pop_front() {
            match command {
                Command::Scan { parent, name } => self.scan(parent, &name, tell, &mut out),
                Command::Compare { parent, name } => {
                    let path = String::from_utf8(self.tree.path(parent, &name)).unwrap();
                    let at = self.inode(&path);
                    let at = at.filter(|at| self.inodes[*at].entries.is_some());
                    let wd = at.map(|at| self.watch(at));
                    self.tree.is_at(parent, &name, wd, &mut out);
                }
                Command::Unwatch(wd) => {
                    for at in 0..self.inodes.len() {
                        if self.inodes[at].wd == Some(wd) {
                            self.notify(at, ReadFlags::IGNORED, 0, "");
                            self.inodes[at].wd = None;
                        }
                    }
                }
                Command::CheckRoot => {}
                Command::StartAnew(_) => self.anew = true,
            }
        }
        for told in out.told {
            self.apply(told);
        }
    }

    fn scan(&mut self, parent: i32, name: &[u8], tell: bool, out: &mut Out) {
        let path = String::from_utf8(self.tree.path(parent, name)).unwrap();
        let Some(at) = self.inode(&path) else {
            return self.tree.missed(parent, name, out);
        };
        if self.inodes[at].entries.is_none() {
            return self.tree.missed(parent, name, out);
        }
        let wd = self.watch(at);
        if self.tree.added(parent, name, wd, out) {
            for (name, child) in self.inodes[at].entries.clone().unwrap() {
                let directory = self.inodes[child].entries.is_some();
                self.tree.found(wd, name.as_bytes(), directory, tell, out);
            }
        }
    }

    fn watch(&mut self, at: usize) -> i32 {
        let next = &mut self.next_wd;
        *self.inodes[at].wd.get_or_insert_with(|| {
            *next += 1;
            *next
        })
    }

    fn apply(&mut self, told: Told) {
        let text = |path: &[u8]| String::from_utf8(path.to_vec()).unwrap();
        match &told.what {
            What::Created(path) => {
                let path = text(path);
                if self.view.get(&path) != Some(&told.is_directory) {
                    self.forget(&path);
                    self.view.insert(path, told.is_directory);
                }
            }
            What::Removed(path) => self.forget(&text(path)),
            What::Moved { from, to } => {
                let (from, to) = (text(from), text(to));
                let below = format!("{from}/");
                let moved: Vec<String> = self
                    .view
                    .keys()
                    .filter(|path| path.starts_with(&below))
                    .cloned()
                    .collect();
                let moved: Vec<(String, bool)> = moved
                    .into_iter()
                    .map(|path| {
                        (
                            format!("{to}/{}", &path[below.len()..]),
                            self.view.remove(&path).unwrap(),
                        )
                    })
                    .collect();
                self.forget(&from);
                self.forget(&to);
                self.view.insert(to, told.is_directory);
                self.view.extend(moved);
            }
            _ => {}
        }
        self.told.push(told.what);
    }

    fn forget(&mut self, path: &str) {
        let below = format!("{path}/");
        self.view
            .retain(|known, _| known != path && !known.starts_with(&below));
    }

    fn settle(&mut self) {
        while !self.queue.is_empty() {
            self.step(true);
        }
        self.step(true);
        while !self.queue.is_empty() {
            self.step(true);
        }
        self.now += Duration::from_secs(1);
        let mut out = Out::default();
        self.tree.expire(self.now, &mut out);
        self.carry_out(out, true);
        while !self.queue.is_empty() {
            self.step(true);
        }
    }
}

#[derive(Debug, Clone)]
enum Op {
    File(String),
    Directory(String),
    Remove(String),
    Rename(String, String),
    Look(usize),
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof!["a", "b", "c"], 1..4).prop_map(|parts| parts.join("/"))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => path().prop_map(Op::File),
        4 => path().prop_map(Op::Directory),
        2 => path().prop_map(Op::Remove),
        3 => (path(), path()).prop_map(|(from, to)| Op::Rename(from, to)),
        3 => (0..6_usize).prop_map(Op::Look),
    ]
}

#[test]
fn a_directory_that_took_the_place_of_one_that_moved_is_not_taken_for_it() {
    let mut model = Model::new();
    model.create("b", true);
    model.create("a", false);
    model.rename("b", "c");
    model.create("b", true);
    // The first creation is looked at only now: the second directory is found at its path.
    model.step(true);
    model.rename("b", "c/a");
    model.settle();
    assert!(
        model.anew || model.view == model.truth(),
        "{:?}",
        model.told
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn what_is_told_leads_to_the_tree_as_it_is(ops in proptest::collection::vec(op(), 1..60)) {
        let mut model = Model::new();
        for op in ops {
            match op {
                Op::File(path) => model.create(&path, false),
                Op::Directory(path) => model.create(&path, true),
                Op::Remove(path) => model.remove(&path),
                Op::Rename(from, to) => model.rename(&from, &to),
                Op::Look(steps) => (0..steps).for_each(|_| model.step(true)),
            }
        }
        model.settle();
        prop_assume!(!model.anew);
        prop_assert_eq!(&model.view, &model.truth(), "told: {:?}", model.told);
        let watched: BTreeSet<i32> = model.tree.nodes.keys().copied().collect();
        let truly: BTreeSet<i32> = model.inodes.iter().filter_map(|inode| inode.wd).collect();
        prop_assert_eq!(watched, truly);
    }

    #[test]
    fn looked_at_at_once_it_never_has_to_begin_anew(ops in proptest::collection::vec(op(), 1..60)) {
        let mut model = Model::new();
        for op in ops {
            match op {
                Op::File(path) => model.create(&path, false),
                Op::Directory(path) => model.create(&path, true),
                Op::Remove(path) => model.remove(&path),
                Op::Rename(from, to) => model.rename(&from, &to),
                Op::Look(_) => {}
            }
            while !model.queue.is_empty() {
                model.step(true);
            }
            model.step(true);
            prop_assert!(!model.anew);
            prop_assert_eq!(&model.view, &model.truth(), "told: {:?}", model.told);
        }
    }

    #[test]
    fn no_events_make_it_panic(events in proptest::collection::vec((0..5_i32, any::<u32>(), 0..3_u32, "[ab]?"), 0..50)) {
        let mut tree = Tree::new(1, true);
        let mut out = Out::default();
        for (step, (wd, kind, cookie, name)) in events.into_iter().enumerate() {
            let now = Duration::from_millis(step as u64 * 15);
            let kind = ReadFlags::from_bits_retain(kind);
            tree.event(Raw { wd, kind, cookie, name: name.as_bytes() }, now, &mut out);
            tree.added(wd, name.as_bytes(), wd + 1, &mut out);
            tree.expire(now, &mut out);
        }
    }
}

fn told(tree: &mut Tree, kind: ReadFlags, cookie: u32, name: &str, now: u64) -> Vec<What> {
    let mut out = Out::default();
    let raw = Raw {
        wd: 1,
        kind,
        cookie,
        name: name.as_bytes(),
    };
    tree.event(raw, Duration::from_millis(now), &mut out);
    out.told.into_iter().map(|told| told.what).collect()
}

fn expired(tree: &mut Tree, now: u64) -> Vec<What> {
    let mut out = Out::default();
    tree.expire(Duration::from_millis(now), &mut out);
    out.told.into_iter().map(|told| told.what).collect()
}

#[test]
fn a_file_is_told_once_a_second_while_it_is_written_and_when_it_is_closed() {
    let mut tree = Tree::new(1, true);
    let changed = vec![What::Changed(b"x".to_vec())];
    let mut count = 0;
    for now in (0..5000).step_by(10) {
        assert_eq!(told(&mut tree, ReadFlags::MODIFY, 0, "x", now), []);
        count += expired(&mut tree, now).len();
    }
    assert!((5..8).contains(&count), "{count}");
    assert_eq!(
        told(&mut tree, ReadFlags::CLOSE_WRITE, 0, "x", 5000),
        changed
    );
    assert_eq!(expired(&mut tree, 9000), []);
    assert_eq!(tree.next_due(Duration::ZERO), None);
}

#[test]
fn half_a_move_is_a_removal_or_a_creation() {
    let mut tree = Tree::new(1, true);
    assert_eq!(told(&mut tree, ReadFlags::MOVED_FROM, 1, "x", 0), []);
    assert_eq!(expired(&mut tree, 10), []);
    assert_eq!(expired(&mut tree, 20), [What::Removed(b"x".to_vec())]);
    assert_eq!(
        told(&mut tree, ReadFlags::MOVED_TO, 2, "y", 30),
        [What::Created(b"y".to_vec())]
    );
    // A name that is used again settles its own half at once.
    assert_eq!(told(&mut tree, ReadFlags::MOVED_FROM, 3, "y", 40), []);
    let both = [What::Removed(b"y".to_vec()), What::Created(b"y".to_vec())];
    assert_eq!(told(&mut tree, ReadFlags::CREATE, 0, "y", 41), both);
    // Both halves, with others between.
    assert_eq!(told(&mut tree, ReadFlags::MOVED_FROM, 4, "y", 50), []);
    assert_eq!(
        told(&mut tree, ReadFlags::CREATE, 0, "z", 51),
        [What::Created(b"z".to_vec())]
    );
    let moved = What::Moved {
        from: b"y".to_vec(),
        to: b"w".to_vec(),
    };
    assert_eq!(told(&mut tree, ReadFlags::MOVED_TO, 4, "w", 52), [moved]);
}

#[test]
fn the_end_of_the_root_is_told() {
    for (kind, reason) in [
        (ReadFlags::DELETE_SELF, "it was removed"),
        (ReadFlags::MOVE_SELF, "it was moved away"),
        (ReadFlags::UNMOUNT, "it was removed"),
    ] {
        assert_eq!(
            told(&mut Tree::new(1, true), kind, 0, "", 0),
            [What::Gone(reason)]
        );
    }
    let mut out = Out::default();
    let overflow = Raw {
        wd: -1,
        kind: ReadFlags::QUEUE_OVERFLOW,
        cookie: 0,
        name: b"",
    };
    Tree::new(1, true).event(overflow, Duration::ZERO, &mut out);
    assert!(matches!(
        out.commands.pop_front(),
        Some(Command::StartAnew(_))
    ));
}
