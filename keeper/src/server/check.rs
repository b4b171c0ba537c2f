//! Whether templates, and pages that are kept apart, are what the chunks say.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use belljar_store::{Error, FileSource, PAGE, Reader, Sink, Source};

use super::first::{self, First};
use super::templates::Part;
use super::{Shared, log};
use crate::images;

/// Bytes that are looked at in one piece.
const PIECE: u64 = 1 << 20;

/// Compares all templates with the chunks of their snapshots. Those that differ, or belong to nothing, are
/// removed: how many there were, and what was removed. One whose chunks are damaged stays, for it cannot be made
/// again.
pub(super) fn templates(shared: &Shared) -> (u64, Vec<String>) {
    let (mut count, mut bad) = (0, Vec::new());
    for (id, part) in shared.templates.all() {
        count += 1;
        let is_good = match shared.store.read(id) {
            Ok(reader) => is_good(shared, &reader, part),
            Err(Error::NoSnapshot(_)) => Ok(false),
            Err(error) => Err(error),
        };
        match is_good {
            Ok(true) => {}
            Ok(false) => {
                shared.templates.remove_part(id, part);
                if part == Part::Memory {
                    shared.hot.remove(id);
                }
                bad.push(format!("{id} {}", part.image()));
            }
            Err(error) => log::line(&format!("a template of {id} was not compared: {error}")),
        }
    }
    for id in first::all(&shared.touched) {
        let differs = shared.store.read(id).and_then(|reader| {
            let length = reader.image(images::MEMORY)?.length;
            let first = First::open(&shared.touched, id, length);
            first.map_or(Ok(false), |first| differs(&reader, &first))
        });
        match differs {
            Ok(false) | Err(Error::NoSnapshot(_)) => {}
            Ok(true) => {
                first::remove(&shared.touched, id);
                bad.push(format!("{id} pages needed first"));
            }
            Err(error) => log::line(&format!("pages kept of {id} were not compared: {error}")),
        }
    }
    (count, bad)
}

/// Whether a page is not what its chunk says.
fn differs(reader: &Reader, first: &First) -> Result<bool, Error> {
    let (mut kept, mut is) = ([0; PAGE as usize], [0; PAGE as usize]);
    for page in first.pages() {
        reader.read(images::MEMORY, page.saturating_mul(PAGE), &mut is)?;
        let read = first.read(page, &mut kept);
        if read.is_none_or(|read| read.is_err()) || kept != is {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_good(shared: &Shared, reader: &Reader, part: Part) -> Result<bool, Error> {
    let Ok(image) = reader.image(part.image()) else {
        return Ok(false);
    };
    let id = reader.manifest().id;
    let Some(file) = shared.templates.get(id, part, image.length) else {
        return Ok(false);
    };
    same(reader, part.image(), &file)
}

/// Whether a file holds exactly an image.
fn same(reader: &Reader, image: &str, file: &File) -> Result<bool, Error> {
    let all = reader.image(image)?;
    match reader.restore(image, &Compared(file), 0) {
        Ok(_) => {}
        Err(Error::Sink { .. }) => return Ok(false),
        Err(error) => return Err(error),
    }
    // What no extent names must be zero.
    let zeros = || -> io::Result<bool> {
        let source = FileSource::new(file.try_clone()?)?;
        let mut from = 0;
        while let Some(data) = source.next_data(from)? {
            let mut at = data.start;
            for extent in all.extents_in(data.start / PAGE..data.end.div_ceil(PAGE)) {
                let start = extent.page.saturating_mul(PAGE);
                if !is_zero(file, at, start.min(data.end))? {
                    return Ok(false);
                }
                at = start.saturating_add(u64::from(extent.pages).saturating_mul(PAGE));
            }
            if !is_zero(file, at, data.end)? {
                return Ok(false);
            }
            from = data.end;
        }
        Ok(true)
    };
    Ok(zeros().unwrap_or(false))
}

fn is_zero(file: &File, mut from: u64, to: u64) -> io::Result<bool> {
    let mut bytes = Vec::new();
    while from < to {
        let length = to.saturating_sub(from).min(PIECE);
        bytes.resize(usize::try_from(length).unwrap_or(0), 0);
        file.read_exact_at(&mut bytes, from)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        from = from.saturating_add(length);
    }
    Ok(true)
}

/// A file that should hold already what is written to it.
struct Compared<'a>(&'a File);

impl Sink for Compared<'_> {
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut found = vec![0; bytes.len()];
        self.0.read_exact_at(&mut found, offset)?;
        if found == bytes {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }
}
