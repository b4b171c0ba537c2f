//! How a protobuf message is sealed in a file: magic, kind, version, length, message, BLAKE3 over all of it.

use crate::error::{Error, Result};
use crate::fs::{Fs, append_all, read_exact_at};

const MAGIC: &[u8; 8] = b"BELLJAR\n";
const HEAD: usize = 24;
const SUM: usize = 32;
/// The version that is written. This one and the one before are read; there is none before.
pub(crate) const VERSION: u32 = 1;

/// What a sealed file holds. The limits keep hostile lengths from taking memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Identity,
    Names,
    Manifest,
    Incoming,
}

impl Kind {
    const fn code(self) -> u32 {
        match self {
            Self::Identity => 1,
            Self::Names => 2,
            Self::Manifest => 3,
            Self::Incoming => 4,
        }
    }

    /// Most bytes of a message.
    pub(crate) const fn limit(self) -> u64 {
        match self {
            Self::Identity => 4 << 10,
            Self::Names => 4 << 20,
            Self::Manifest => 64 << 20,
            Self::Incoming => 256 << 20,
        }
    }
}

/// The bytes of a file that holds the message.
pub(crate) fn seal(kind: Kind, message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + message.len() + SUM);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&kind.code().to_le_bytes());
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(message.len() as u64).to_le_bytes());
    bytes.extend_from_slice(message);
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    bytes
}

/// The message in the bytes of a file.
pub(crate) fn unseal<'a>(kind: Kind, path: &str, bytes: &'a [u8]) -> Result<&'a [u8]> {
    let damaged = |what: &str| Error::damaged(path, what);
    let (head, rest) = bytes
        .split_at_checked(HEAD)
        .ok_or_else(|| damaged("it is shorter than its head"))?;
    let (magic, head) = head.split_at_checked(8).unwrap_or_default();
    if magic != MAGIC {
        return Err(damaged("it does not begin as a file of a store"));
    }
    let number = |from: usize| {
        let bytes = head.get(from..from.saturating_add(4));
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    };
    if number(0) != kind.code() {
        return Err(damaged("it is another kind of file"));
    }
    // Before the checksum: a later version may have put that elsewhere.
    if number(4) == 0 || number(4) > VERSION {
        return Err(Error::Version {
            path: path.to_owned(),
            found: number(4),
            known: VERSION,
        });
    }
    let length = u64::from(number(8)) | u64::from(number(12)) << 32;
    if rest.len().checked_sub(SUM).map(|len| len as u64) != Some(length) {
        return Err(damaged("it is not as long as it says"));
    }
    let (message, sum) = rest
        .split_at_checked(rest.len().saturating_sub(SUM))
        .unwrap_or_default();
    let summed = bytes.get(..bytes.len().saturating_sub(SUM));
    if blake3::hash(summed.unwrap_or_default()).as_bytes() != sum {
        return Err(damaged("its checksum does not match"));
    }
    Ok(message)
}

/// Writes a sealed file: new file, sync, rename. The folder is not synced yet.
pub(crate) fn write(
    fs: &dyn Fs,
    kind: Kind,
    path: &str,
    temporary: &str,
    message: &[u8],
) -> Result<()> {
    if message.len() as u64 > kind.limit() {
        return Err(Error::damaged(
            path,
            "it would be larger than any reader takes",
        ));
    }
    let done = (|| {
        let created = match fs.create(temporary) {
            // Left by an earlier failure, whose removal failed too; no two write under one name.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                fs.remove(temporary).and_then(|()| fs.create(temporary))
            }
            other => other,
        };
        let file = created.map_err(Error::io("create", temporary))?;
        append_all(&*file, &seal(kind, message)).map_err(Error::io("write", temporary))?;
        file.sync().map_err(Error::io("sync", temporary))?;
        fs.rename(temporary, path)
            .map_err(Error::io("rename to", path))
    })();
    if done.is_err() {
        // What cannot be removed now is removed when the store is opened.
        let _ = fs.remove(temporary);
    }
    done
}

/// Reads a sealed file's message.
pub(crate) fn read(fs: &dyn Fs, kind: Kind, path: &str) -> Result<Vec<u8>> {
    let file = fs.open(path).map_err(Error::io("open", path))?;
    let length = file.length().map_err(Error::io("read", path))?;
    if length > kind.limit() + (HEAD + SUM) as u64 {
        return Err(Error::damaged(path, "it is larger than such a file can be"));
    }
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let mut bytes = vec![0; length];
    read_exact_at(&*file, &mut bytes, 0).map_err(Error::io("read", path))?;
    unseal(kind, path, &bytes)?;
    bytes.truncate(length.saturating_sub(SUM));
    bytes.drain(..HEAD.min(length));
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_foreign_version_is_told_apart_from_damage() {
        let mut bytes = seal(Kind::Names, b"message");
        bytes[12] = 2;
        let error = unseal(Kind::Names, "names", &bytes).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Version {
                    found: 2,
                    known: 1,
                    ..
                }
            ),
            "{error}"
        );
        let bytes = seal(Kind::Manifest, b"message");
        assert!(matches!(
            unseal(Kind::Names, "names", &bytes),
            Err(Error::Damaged { .. })
        ));
    }

    proptest! {
        #[test]
        fn what_is_sealed_comes_back_and_one_flipped_bit_or_cut_is_seen(
            message in proptest::collection::vec(any::<u8>(), 0..200), bit in any::<usize>(), cut in any::<usize>(),
        ) {
            let bytes = seal(Kind::Names, &message);
            prop_assert_eq!(unseal(Kind::Names, "x", &bytes).unwrap(), &message[..]);
            let mut flipped = bytes.clone();
            let bit = bit % (bytes.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(unseal(Kind::Names, "x", &flipped).is_err());
            prop_assert!(unseal(Kind::Names, "x", &bytes[..cut % bytes.len()]).is_err());
        }
    }
}
