//! Paths out of streams, made harmless: names that each stay within the directory they are used in.

use std::ffi::CString;

use crate::tar::MAX_PATH;

/// A path of a stream cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It goes up.
    #[error("it leads out of the tree")]
    Up,
    /// No file system takes that.
    #[error("it holds a NUL byte")]
    Nul,
    /// Longer than a stream may say.
    #[error("it is too long")]
    Long,
}

/// The names a path goes through, from the root of the tree: none for the root itself. Slashes at the start
/// and double ones mean nothing, as for `tar` itself.
pub fn split(path: &[u8]) -> Result<Vec<CString>, NameError> {
    if path.len() > MAX_PATH {
        return Err(NameError::Long);
    }
    path.split(|&byte| byte == b'/')
        .filter(|name| !matches!(*name, b"" | b"."))
        .map(|name| match name {
            b".." => Err(NameError::Up),
            name => CString::new(name).map_err(|_| NameError::Nul),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_become_names() {
        let names = |path: &[u8]| split(path).map(|names| names.len());
        assert_eq!(names(b""), Ok(0));
        assert_eq!(names(b"."), Ok(0));
        assert_eq!(names(b"./a//b/"), Ok(2));
        assert_eq!(names(b"/etc/passwd"), Ok(2));
        assert_eq!(names(b"..."), Ok(1));
        assert_eq!(names(b"a/../b"), Err(NameError::Up));
        assert_eq!(names(b".."), Err(NameError::Up));
        assert_eq!(names(b"a\0b"), Err(NameError::Nul));
        assert_eq!(names(&vec![b'x'; MAX_PATH + 1]), Err(NameError::Long));
    }

    proptest! {
        #[test]
        fn no_name_leads_anywhere_but_down(path in proptest::collection::vec(prop_oneof![Just(b'/'), Just(b'.'), Just(0), any::<u8>()], 0..60)) {
            if let Ok(names) = split(&path) {
                for name in names {
                    let name = name.to_bytes();
                    prop_assert!(!name.is_empty() && !name.contains(&b'/') && name != b"." && name != b"..");
                }
            }
        }
    }
}
