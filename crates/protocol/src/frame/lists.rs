//! What a frame takes in memory once it is decoded: an entry of a list is 2 bytes on the wire if it is
//! empty, and some hundred in memory. So fields are counted before anything is made of them.

use prost::Message;

/// Most fields of a frame, those of its embedded messages included where lists are due. Honest lists come
/// in pages of 48 KiB, or are of a few thousand entries.
pub const MAX_FIELDS: usize = 32_768;

/// Why a frame is not the message that was due.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Decoded, it would take far more memory than on the wire.
    #[error("a message has more than {MAX_FIELDS} fields")]
    TooManyFields,
    /// It is no such message.
    #[error(transparent)]
    Malformed(#[from] prost::DecodeError),
}

/// Decodes a frame whose own fields may be repeated.
///
/// # Errors
/// It is no such message, or has more than [`MAX_FIELDS`] fields.
pub fn decode<M: Message + Default>(frame: &[u8]) -> Result<M, MessageError> {
    count(frame, 0, &mut 0)?;
    Ok(M::decode(frame)?)
}

/// The same for a frame with messages whose fields may be repeated. Not for one with a `bytes` field of
/// content, which might look like fields.
///
/// # Errors
/// As [`decode`].
pub fn decode_lists<M: Message + Default>(frame: &[u8]) -> Result<M, MessageError> {
    count(frame, 1, &mut 0)?;
    Ok(M::decode(frame)?)
}

/// Counts fields, and those in length-delimited ones `depth` levels down. Ends where there is no field:
/// what that means is for the decoder to say.
fn count(mut rest: &[u8], depth: u32, fields: &mut usize) -> Result<(), MessageError> {
    while let Some(key) = varint(&mut rest) {
        *fields = fields.saturating_add(1);
        if *fields > MAX_FIELDS {
            return Err(MessageError::TooManyFields);
        }
        // Wire types, protobuf "Message structure". What a group holds counts as if it were outside.
        let length = match key & 7 {
            0 if varint(&mut rest).is_some() => 0,
            1 => 8,
            2 => match varint(&mut rest).map(usize::try_from) {
                Some(Ok(length)) => length,
                _ => return Ok(()),
            },
            3 | 4 => 0,
            5 => 4,
            _ => return Ok(()),
        };
        let Some((content, after)) = rest.split_at_checked(length) else {
            return Ok(());
        };
        if key & 7 == 2
            && let Some(depth) = depth.checked_sub(1)
        {
            count(content, depth, fields)?;
        }
        rest = after;
    }
    Ok(())
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::v1::{self, reply::Result as Answer};

    /// A Reply with `count` entries of two bytes.
    fn list_of_nothing(result: u64, entry: u8, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        prost::encoding::encode_varint((result << 3) | 2, &mut bytes);
        prost::encoding::encode_varint(count as u64 * 2, &mut bytes);
        bytes.extend([entry << 3 | 2, 0].repeat(count));
        bytes
    }

    #[test]
    fn a_frame_of_empty_entries_is_refused_before_it_is_large() {
        // Processes, metrics, ports and attributes.
        for (result, entry) in [(35, 1), (18, 15), (113, 1), (74, 1)] {
            let large = list_of_nothing(result, entry, 500_000);
            let refused = decode_lists::<v1::Reply>(&large);
            assert_eq!(refused, Err(MessageError::TooManyFields));
            let small = list_of_nothing(result, entry, 1000);
            assert!(decode_lists::<v1::Reply>(&small).unwrap().result.is_some());
        }
        let abilities = [0x10, 1].repeat(500_000);
        let refused = decode_lists::<v1::Reply>(&abilities);
        assert_eq!(refused, Err(MessageError::TooManyFields));
        let page = [0x0a, 0].repeat(500_000);
        let refused = decode::<v1::DirectoryPage>(&page);
        assert_eq!(refused, Err(MessageError::TooManyFields));
    }

    #[test]
    fn lists_in_several_pieces_count_together() {
        let piece = list_of_nothing(35, 1, MAX_FIELDS / 2);
        assert!(decode_lists::<v1::Reply>(&piece).is_ok());
        let refused = decode_lists::<v1::Reply>(&piece.repeat(2));
        assert_eq!(refused, Err(MessageError::TooManyFields));
    }

    #[test]
    fn what_content_looks_like_does_not_matter() {
        let like_fields = [0x0a, 0].repeat(200_000);
        let screen = v1::Screen {
            content: like_fields.clone(),
            ..v1::Screen::default()
        };
        let reply = v1::Reply {
            result: Some(Answer::Screen(screen)),
            ..v1::Reply::default()
        };
        assert_eq!(decode_lists(&reply.encode_to_vec()), Ok(reply));
        let output = v1::ExecOutput {
            output: Some(v1::exec_output::Output::Stdout(like_fields)),
        };
        assert_eq!(decode(&output.encode_to_vec()), Ok(output));
    }

    #[test]
    fn a_full_page_of_a_directory_is_far_below_the_limit() {
        let entry = v1::DirectoryEntry {
            name: b"n".to_vec(),
            ..v1::DirectoryEntry::default()
        };
        let page = v1::DirectoryPage {
            entries: vec![entry; (64 << 10) / 5],
            last: true,
            ..v1::DirectoryPage::default()
        };
        assert!(decode::<v1::DirectoryPage>(&page.encode_to_vec()).is_ok());
    }

    proptest! {
        /// Counting refuses nothing else, whatever comes.
        #[test]
        fn what_is_small_decodes_as_without_counting(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let counted = decode_lists::<v1::Reply>(&bytes);
            prop_assert_eq!(counted, v1::Reply::decode(&*bytes).map_err(MessageError::from));
        }
    }
}
