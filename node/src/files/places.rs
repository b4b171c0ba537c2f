//! Where a copy comes from and goes to, as the command line writes it: `PATH`, `BOX:PATH`, `-`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A path of this machine.
    Host(PathBuf),
    /// A path in a sandbox, which is named by a word.
    Guest(String, Vec<u8>),
    /// A tar stream on standard input or output.
    Stream,
}

impl Place {
    /// As docker does: what has a colon before any slash is in a sandbox; `./a:b` is a file of this machine.
    #[must_use]
    pub fn parse(text: &OsStr) -> Self {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Self::Stream;
        }
        let colon = bytes.iter().position(|&byte| matches!(byte, b':' | b'/'));
        let Some(colon) = colon.filter(|&at| at > 0 && bytes.get(at) == Some(&b':')) else {
            return Self::Host(PathBuf::from(text));
        };
        let (name, path) = bytes.split_at(colon);
        let path = path.get(1..).unwrap_or_default();
        match std::str::from_utf8(name) {
            Ok(name) => Self::Guest(name.to_owned(), path.to_vec()),
            Err(_) => Self::Host(PathBuf::from(text)),
        }
    }
}

/// Whether a path says that it is a directory.
pub(super) fn ends_with_slash(path: &[u8]) -> bool {
    path.last() == Some(&b'/')
}

/// Whether the content of a directory is meant, not the directory: `dir/.`
pub(super) fn means_content(path: &[u8]) -> bool {
    path.ends_with(b"/.") || path == b"."
}

/// The last name of a path; none of "/", "." and "..".
pub(super) fn base_name(path: &[u8]) -> Option<&[u8]> {
    let name = path
        .split(|&byte| byte == b'/')
        .rfind(|name| !name.is_empty())?;
    (!matches!(name, b"." | b"..")).then_some(name)
}

/// `directory/name`.
pub(super) fn below(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = directory.to_vec();
    if !ends_with_slash(&path) {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// The directory above a path of a guest.
pub(super) fn above(path: &[u8]) -> Vec<u8> {
    let end = path
        .iter()
        .rposition(|&byte| byte != b'/')
        .map_or(0, |at| at + 1);
    let trimmed = path.get(..end).unwrap_or_default();
    let slash = trimmed.iter().rposition(|&byte| byte == b'/');
    match slash {
        Some(at) => trimmed.get(..=at).unwrap_or(b"/").to_vec(),
        None => b"/".to_vec(),
    }
}

/// A path of this machine below a directory.
pub(super) fn host_below(directory: &Path, name: &[u8]) -> PathBuf {
    directory.join(OsString::from(OsStr::from_bytes(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_written_as_for_docker() {
        let parse = |text: &str| Place::parse(OsStr::new(text));
        let guest = |name: &str, path: &str| Place::Guest(name.into(), path.into());
        let host = |path: &str| Place::Host(path.into());
        assert_eq!(parse("box:/etc"), guest("box", "/etc"));
        assert_eq!(parse("box:"), guest("box", ""));
        assert_eq!(parse("box:a:b"), guest("box", "a:b"));
        assert_eq!(parse("./box:/etc"), host("./box:/etc"));
        assert_eq!(parse("/a:b"), host("/a:b"));
        assert_eq!(parse(":x"), host(":x"));
        assert_eq!(parse("plain"), host("plain"));
        assert_eq!(parse("-"), Place::Stream);
    }

    #[test]
    fn the_last_name_is_found() {
        assert_eq!(base_name(b"/a/b"), Some(&b"b"[..]));
        assert_eq!(base_name(b"a/b//"), Some(&b"b"[..]));
        assert_eq!(base_name(b"/"), None);
        assert_eq!(base_name(b"a/."), None);
        assert_eq!(base_name(b".."), None);
        assert!(means_content(b"a/.") && means_content(b".") && !means_content(b"a"));
        assert_eq!(above(b"/a/b/"), b"/a/");
        assert_eq!(above(b"/a"), b"/");
        assert_eq!(above(b"a"), b"/");
        assert_eq!(below(b"/a", b"b"), b"/a/b");
    }
}
