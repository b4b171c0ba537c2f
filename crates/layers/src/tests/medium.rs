//! A file whose writes survive a power cut only if they were synced, or by luck.
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use crate::Medium;

/// What a disk writes at once; a write that is cut short ends between two of them.
const SECTOR: usize = 512;

/// Numbers that repeat for the same seed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Luck(pub(super) u64);

impl Luck {
    /// Below `limit`.
    fn draw(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 33) % limit
    }
}

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // Most are sectors.
enum Write {
    Sector(u64, [u8; SECTOR]),
    Hole(u64, u64),
    Length(u64),
}

/// Sectors that are not zero.
#[derive(Clone, Debug, Default)]
struct Bytes {
    length: u64,
    sectors: BTreeMap<u64, [u8; SECTOR]>,
}

impl Bytes {
    fn apply(&mut self, write: &Write) {
        match write {
            Write::Sector(at, bytes) => {
                self.sectors.insert(*at, *bytes);
            }
            Write::Hole(at, count) => self.sectors.retain(|n, _| !(*at..at + count).contains(n)),
            Write::Length(length) => self.length = *length,
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    /// What is read.
    now: Bytes,
    durable: Bytes,
    /// Since the last sync.
    pending: Vec<Write>,
    /// All syncs so far.
    syncs: u64,
    /// Syncs after which everything fails.
    fails_after: Option<u64>,
}

/// See the module. All that is written and read are whole sectors.
#[derive(Clone, Debug, Default)]
pub(super) struct Forgetful(Rc<RefCell<Inner>>);

impl Forgetful {
    pub(super) fn of(bytes: &[u8]) -> Self {
        let sectors = bytes.as_chunks::<SECTOR>().0.iter().copied();
        Self::holding(Bytes {
            length: bytes.len() as u64,
            sectors: (0..).zip(sectors).collect(),
        })
    }

    fn holding(bytes: Bytes) -> Self {
        Self(Rc::new(RefCell::new(Inner {
            now: bytes.clone(),
            durable: bytes,
            ..Inner::default()
        })))
    }

    /// Everything fails from the next but `count` sync on.
    pub(super) fn fail_after(&self, count: u64) {
        let mut inner = self.0.borrow_mut();
        inner.fails_after = Some(inner.syncs + count);
    }

    /// What a power cut now could leave: of what was not synced any part, by sectors.
    pub(super) fn cut(&self, luck: &mut Luck) -> Self {
        let inner = self.0.borrow();
        let mut bytes = inner.durable.clone();
        // All, none, or each by chance; what lands on the same place lands in order.
        let kind = luck.draw(4);
        for write in &inner.pending {
            let lands = match kind {
                0 => true,
                1 => false,
                _ => luck.draw(2) == 0,
            };
            if lands {
                bytes.apply(write);
            }
        }
        Self::holding(bytes)
    }

    fn change(&self, writes: impl IntoIterator<Item = Write>) -> io::Result<()> {
        let mut inner = self.0.borrow_mut();
        if inner.fails_after.is_some_and(|limit| inner.syncs > limit) {
            return Err(io::Error::other("no power"));
        }
        for write in writes {
            inner.now.apply(&write);
            inner.pending.push(write);
        }
        Ok(())
    }
}

impl Medium for Forgetful {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.borrow().now.length)
    }

    fn extend(&self, length: u64) -> io::Result<()> {
        self.change([Write::Length(length)])
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.0.borrow();
        if offset + bytes.len() as u64 > inner.now.length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let sectors = bytes.as_chunks_mut::<SECTOR>().0;
        for (sector, at) in sectors.iter_mut().zip(offset / SECTOR as u64..) {
            *sector = inner.now.sectors.get(&at).copied().unwrap_or([0; SECTOR]);
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let (sectors, rest) = bytes.as_chunks::<SECTOR>();
        assert!(rest.is_empty() && offset.is_multiple_of(SECTOR as u64));
        let places = offset / SECTOR as u64..;
        self.change(places.zip(sectors).map(|(at, b)| Write::Sector(at, *b)))
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        let unit = SECTOR as u64;
        self.change([Write::Hole(offset / unit, length / unit)])?;
        Ok(true)
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = self.0.borrow_mut();
        inner.syncs += 1;
        if inner.fails_after.is_some_and(|limit| inner.syncs > limit) {
            return Err(io::Error::other("no power"));
        }
        inner.durable = inner.now.clone();
        inner.pending.clear();
        Ok(())
    }

    fn next_data(&self, from: u64) -> io::Result<Option<u64>> {
        let inner = self.0.borrow();
        let next = inner.now.sectors.range(from / SECTOR as u64..).next();
        Ok(next.map(|(at, _)| (at * SECTOR as u64).max(from)))
    }

    fn next_hole(&self, _from: u64) -> io::Result<u64> {
        self.length()
    }
}
