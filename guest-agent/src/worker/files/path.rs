//! Paths of the guest as calls give them.

use std::ffi::{CStr, CString};
use std::fmt;

use belljar_protocol::v1::{self, error::Code};
use rustix::io::Errno;

use crate::worker::{refusal, system_error};

/// Longest path, PATH_MAX without its NUL.
const MAX: usize = 4095;

/// A path that the kernel can be asked about, absolute.
#[derive(Debug, Clone)]
pub(super) struct GuestPath(CString);

impl GuestPath {
    /// Checks a path; one that is not absolute begins at "/".
    pub(super) fn new(bytes: &[u8]) -> Result<Self, v1::Error> {
        if bytes.is_empty() {
            return Err(refusal(Code::Invalid, "a path is empty"));
        }
        let mut path = Vec::with_capacity(bytes.len() + 1);
        if !bytes.starts_with(b"/") {
            path.push(b'/');
        }
        path.extend_from_slice(bytes);
        let Ok(path) = CString::new(path) else {
            return Err(refusal(Code::Invalid, "a path holds a NUL byte"));
        };
        let path = Self(path);
        if path.0.as_bytes().len() > MAX {
            return Err(system_error(
                format_args!("cannot use a path of {} bytes", bytes.len()),
                Errno::NAMETOOLONG,
            ));
        }
        Ok(path)
    }

    pub(super) fn as_c_str(&self) -> &CStr {
        &self.0
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The directory it lies in and its name there. "/", "." and ".." have none.
    pub(super) fn split(&self) -> Result<(Self, CString), v1::Error> {
        let bytes = self.bytes();
        let end = bytes
            .iter()
            .rposition(|&byte| byte != b'/')
            .map_or(0, |last| last + 1);
        let trimmed = bytes.get(..end).unwrap_or_default();
        let start = trimmed
            .iter()
            .rposition(|&byte| byte == b'/')
            .map_or(0, |slash| slash + 1);
        let name = trimmed.get(start..).unwrap_or_default();
        if matches!(name, b"" | b"." | b"..") {
            return Err(refusal(
                Code::Invalid,
                format!("{self} does not end with a name"),
            ));
        }
        let above = trimmed.get(..start).unwrap_or(b"/");
        match (CString::new(above), CString::new(name)) {
            (Ok(above), Ok(name)) => Ok((Self(above), name)),
            _ => Err(refusal(Code::Invalid, "a path holds a NUL byte")),
        }
    }
}

impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(path: &str) -> Option<(String, String)> {
        let (above, name) = GuestPath::new(path.as_bytes()).ok()?.split().ok()?;
        Some((above.to_string(), name.into_string().ok()?))
    }

    #[test]
    fn a_path_has_a_directory_and_a_name() {
        let pair = |above: &str, name: &str| Some((above.to_owned(), name.to_owned()));
        assert_eq!(split("/a/b"), pair("/a/", "b"));
        assert_eq!(split("a/b//"), pair("/a/", "b"));
        assert_eq!(split("/a"), pair("/", "a"));
        assert_eq!(split("a"), pair("/", "a"));
        for path in ["/", "//", ".", "/a/..", "/a/./"] {
            assert_eq!(split(path), None, "{path}");
        }
    }

    #[test]
    fn what_the_kernel_cannot_take_is_refused() {
        assert!(GuestPath::new(b"").is_err());
        assert!(GuestPath::new(b"/a\0b").is_err());
        assert!(GuestPath::new(&[b'x'; MAX - 1]).is_ok());
        let error = GuestPath::new(&[b'x'; MAX]).unwrap_err();
        assert_eq!(
            error.errno,
            Errno::NAMETOOLONG.raw_os_error().unsigned_abs()
        );
    }
}
