//! The file around the messages: what it is, which version, whether it is whole.
//!
//! ```text
//! 0   8  "BELLJAR\n"
//! 8   4  version, little-endian
//! 12  4  length of the body, little-endian
//! 16  n  body: the message `State`
//! 16+n 4 CRC-32 (IEEE 802.3) of everything before it, little-endian
//! ```
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, skip_field};

use super::{Saved, convert, wire};

pub const MAGIC: [u8; 8] = *b"BELLJAR\n";
/// Goes up when an older reader would misunderstand the file, not when a field is added.
pub const VERSION: u32 = 1;
/// Most bytes of a file: 32 vCPUs with AMX state need less than half of it.
pub const MAX_LEN: usize = 2 << 20;

const HEAD: usize = 16;
const TAIL: usize = 4;
/// Most fields of the outermost message: 32 vCPUs, 18 devices and a few more. Bounds what a file of
/// many empty messages would allocate.
const MAX_FIELDS: usize = 128;

/// A file is not a state that can be restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("it is not a state file of this VMM")]
    NotOurs,
    #[error(
        "it has format version {found}, and this VMM reads version {VERSION}: restore it with the VMM that wrote it"
    )]
    Version { found: u32 },
    #[error("it has {0} bytes, and {MAX_LEN} are the most there can be")]
    TooLarge(usize),
    #[error("it is cut off or has bytes too many: {found} bytes instead of {expected}")]
    Length { found: usize, expected: usize },
    #[error("it is damaged: its checksum does not match")]
    Checksum,
    #[error("it is not well-formed: {0}")]
    Malformed(String),
}

/// The bytes of a state file.
pub fn encode(saved: &Saved) -> Result<Vec<u8>, FormatError> {
    let body = convert::to_wire(saved)?.encode_to_vec();
    seal(&body)
}

/// What a state file says.
pub fn decode(file: &[u8]) -> Result<Saved, FormatError> {
    let body = open(file)?;
    check_field_count(body)?;
    let state = wire::State::decode(body).map_err(|e| FormatError::Malformed(e.to_string()))?;
    convert::from_wire(state)
}

pub(super) fn seal(body: &[u8]) -> Result<Vec<u8>, FormatError> {
    let whole = HEAD + body.len() + TAIL;
    let len = u32::try_from(body.len()).ok().filter(|_| whole <= MAX_LEN);
    let len = len.ok_or(FormatError::TooLarge(whole))?;
    let mut file = Vec::with_capacity(whole);
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&len.to_le_bytes());
    file.extend_from_slice(body);
    let sum = crc32fast::hash(&file);
    file.extend_from_slice(&sum.to_le_bytes());
    Ok(file)
}

/// The body of a file that is ours, of this version, whole and undamaged.
fn open(file: &[u8]) -> Result<&[u8], FormatError> {
    let rest = file.strip_prefix(&MAGIC).ok_or(FormatError::NotOurs)?;
    if file.len() > MAX_LEN {
        return Err(FormatError::TooLarge(file.len()));
    }
    let too_short = FormatError::Length {
        found: file.len(),
        expected: HEAD + TAIL,
    };
    let (version, rest) = rest.split_first_chunk().ok_or(too_short.clone())?;
    let found = u32::from_le_bytes(*version);
    if found != VERSION {
        return Err(FormatError::Version { found });
    }
    let (len, rest) = rest.split_first_chunk().ok_or(too_short)?;
    let len = u32::from_le_bytes(*len) as usize;
    if rest.len() != len.saturating_add(TAIL) {
        return Err(FormatError::Length {
            found: file.len(),
            expected: len.saturating_add(HEAD + TAIL),
        });
    }
    let (covered, sum) = file.split_last_chunk().ok_or(FormatError::Checksum)?;
    if crc32fast::hash(covered) != u32::from_le_bytes(*sum) {
        return Err(FormatError::Checksum);
    }
    rest.get(..len).ok_or(FormatError::Checksum)
}

fn check_field_count(mut body: &[u8]) -> Result<(), FormatError> {
    let malformed = |e: prost::DecodeError| FormatError::Malformed(e.to_string());
    for _ in 0..MAX_FIELDS {
        if body.is_empty() {
            return Ok(());
        }
        let (tag, kind) = decode_key(&mut body).map_err(malformed)?;
        if matches!(kind, WireType::StartGroup | WireType::EndGroup) {
            return Err(FormatError::Malformed("it has groups".into()));
        }
        skip_field(kind, tag, &mut body, DecodeContext::default()).map_err(malformed)?;
    }
    if body.is_empty() {
        Ok(())
    } else {
        Err(FormatError::Malformed("it has too many fields".into()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_checksum_is_the_well_known_one() {
        assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn other_files_and_versions_are_told_apart() {
        assert_eq!(open(b""), Err(FormatError::NotOurs));
        assert_eq!(open(b"\x7fELF............"), Err(FormatError::NotOurs));
        let mut file = seal(b"body").unwrap();
        assert_eq!(open(&file).unwrap(), b"body");
        file[8] = 2;
        assert_eq!(open(&file), Err(FormatError::Version { found: 2 }));
        assert!(open(&file).unwrap_err().to_string().contains("version 2"));
    }

    #[test]
    fn more_fields_than_a_machine_has_are_not_looked_at() {
        // Field 5, length 0: an empty device.
        assert!(check_field_count(&[0x2a, 0].repeat(MAX_FIELDS)).is_ok());
        assert!(check_field_count(&[0x2a, 0].repeat(MAX_FIELDS + 1)).is_err());
    }

    proptest! {
        #[test]
        fn any_change_is_noticed(body: Vec<u8>, at: prop::sample::Index, flip in 1u8..) {
            let mut file = seal(&body).unwrap();
            let at = at.index(file.len());
            file[at] ^= flip;
            prop_assert!(open(&file).is_err());
        }

        #[test]
        fn any_cut_is_noticed(body: Vec<u8>, at: prop::sample::Index) {
            let file = seal(&body).unwrap();
            prop_assert!(open(&file[..at.index(file.len())]).is_err());
            prop_assert!(open(&[file.as_slice(), &[0]].concat()).is_err());
        }

        #[test]
        fn hostile_bodies_are_errors(body: Vec<u8>) {
            let _ = decode(&seal(&body).unwrap());
        }
    }
}
