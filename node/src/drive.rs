//! Extra drives: `PATH[:ro][:id=NAME]`.

use std::path::PathBuf;
use std::str::FromStr;

/// virtio 1.2 §5.2.6: a serial number has at most 20 bytes; the id is also the serial.
const ID_MAX: usize = 20;

/// A drive the user adds to a guest: a raw image file or a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriveSpec {
    pub path: PathBuf,
    pub read_only: bool,
    /// Serial of the drive in the guest; chosen by its position when absent.
    pub id: Option<String>,
}

/// Why a text does not describe a drive.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DriveError {
    #[error("the drive '{0}' names no file; write PATH, PATH:ro or PATH:ro:id=NAME")]
    NoPath(String),
    #[error("the drive id '{0}' is not 1 to 20 letters, digits or '_'")]
    BadId(String),
    #[error("the drive id '{0}' is used twice; give one of them another id with :id=NAME")]
    DuplicateId(String),
    #[error("the drive '{0}' gives ':{1}' twice")]
    Repeated(String, &'static str),
}

impl FromStr for DriveSpec {
    type Err = DriveError;

    /// Options are taken from the right for as long as they are known, so that a path may hold colons.
    fn from_str(text: &str) -> Result<Self, DriveError> {
        let mut rest = text;
        let mut access = None;
        let mut id = None;
        while let Some((head, option)) = rest.rsplit_once(':') {
            match option {
                "ro" | "rw" if access.replace(option == "ro").is_some() => {
                    return Err(DriveError::Repeated(text.to_owned(), "ro or :rw"));
                }
                "ro" | "rw" => {}
                _ => match option.strip_prefix("id=") {
                    Some(name) => {
                        check_id(name)?;
                        if id.replace(name.to_owned()).is_some() {
                            return Err(DriveError::Repeated(text.to_owned(), "id="));
                        }
                    }
                    None => break,
                },
            }
            rest = head;
        }
        if rest.is_empty() {
            return Err(DriveError::NoPath(text.to_owned()));
        }
        Ok(DriveSpec {
            path: PathBuf::from(rest),
            read_only: access.unwrap_or(false),
            id,
        })
    }
}

fn check_id(id: &str) -> Result<(), DriveError> {
    let fits = (1..=ID_MAX).contains(&id.len());
    let plain = id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if fits && plain {
        Ok(())
    } else {
        Err(DriveError::BadId(id.to_owned()))
    }
}

/// Gives every drive an id: its own, or `drive0`, `drive1`, … by position.
///
/// # Errors
/// Two drives with one id, or one that takes a name in `taken`.
pub fn assign_ids(drives: &[DriveSpec], taken: &[&str]) -> Result<Vec<String>, DriveError> {
    let mut ids: Vec<String> = Vec::with_capacity(drives.len());
    for (index, drive) in drives.iter().enumerate() {
        let id = drive.id.clone().unwrap_or_else(|| format!("drive{index}"));
        if ids.contains(&id) || taken.contains(&id.as_str()) {
            return Err(DriveError::DuplicateId(id));
        }
        ids.push(id);
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drive(path: &str, read_only: bool, id: Option<&str>) -> DriveSpec {
        DriveSpec {
            path: path.into(),
            read_only,
            id: id.map(str::to_owned),
        }
    }

    #[test]
    fn options_come_after_the_path_in_any_order() {
        for (text, expected) in [
            ("/a/b.img", drive("/a/b.img", false, None)),
            ("b.img:ro", drive("b.img", true, None)),
            ("b.img:rw", drive("b.img", false, None)),
            ("b.img:id=data", drive("b.img", false, Some("data"))),
            ("b.img:ro:id=data", drive("b.img", true, Some("data"))),
            ("b.img:id=data:ro", drive("b.img", true, Some("data"))),
            ("/odd:name:ro", drive("/odd:name", true, None)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn bad_drives_are_refused() {
        for (text, expected) in [
            ("", DriveError::NoPath(String::new())),
            (":ro", DriveError::NoPath(":ro".into())),
            ("a:id=", DriveError::BadId(String::new())),
            ("a:id=x y", DriveError::BadId("x y".into())),
            (
                "a:id=123456789012345678901",
                DriveError::BadId("123456789012345678901".into()),
            ),
            (
                "a:ro:rw",
                DriveError::Repeated("a:ro:rw".into(), "ro or :rw"),
            ),
            (
                "a:id=b:id=c",
                DriveError::Repeated("a:id=b:id=c".into(), "id="),
            ),
        ] {
            assert_eq!(text.parse::<DriveSpec>(), Err(expected), "{text}");
        }
    }

    #[test]
    fn ids_are_distinct() {
        let named = drive("a", false, Some("drive1"));
        let plain = drive("b", false, None);
        assert_eq!(
            assign_ids(&[plain.clone(), plain.clone()], &[]),
            Ok(vec!["drive0".into(), "drive1".into()])
        );
        assert_eq!(
            assign_ids(&[named, plain], &[]),
            Err(DriveError::DuplicateId("drive1".into()))
        );
        assert_eq!(
            assign_ids(&[drive("a", false, Some("disk"))], &["disk"]),
            Err(DriveError::DuplicateId("disk".into()))
        );
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".{0,40}") {
            if let Ok(spec) = text.parse::<DriveSpec>() {
                prop_assert!(!spec.path.as_os_str().is_empty());
            }
        }
    }
}
