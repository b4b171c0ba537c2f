use proptest::prelude::*;

use super::*;
use crate::frame;

#[derive(Debug, Clone, PartialEq)]
enum Seen {
    Data(Vec<u8>),
    Hole(u64),
    End(v1::TransferEnd),
    Error(v1::Error),
}

/// Feeds in pieces of `step` bytes and joins neighbouring data.
fn read(bytes: &[u8], step: usize) -> Result<Vec<Seen>, TransferError> {
    let mut reader = ChunkReader::new();
    let mut seen = Vec::new();
    for mut part in bytes.chunks(step.max(1)) {
        while let Some(piece) = reader.feed(&mut part)? {
            match piece {
                Piece::Data(data) => match seen.last_mut() {
                    Some(Seen::Data(held)) => held.extend_from_slice(data),
                    _ => seen.push(Seen::Data(data.to_vec())),
                },
                Piece::Hole(length) => seen.push(Seen::Hole(length)),
                Piece::End(end) => seen.push(Seen::End(end)),
                Piece::Error(error) => seen.push(Seen::Error(error)),
            }
        }
        assert!(part.is_empty());
    }
    Ok(seen)
}

fn message(kind: Kind) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::encode(&v1::FileChunk { piece: Some(kind) }, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_buffer_writes_what_the_encoder_writes() {
    for length in [1, 2, 127, 128, 16_383, 16_384, 70_000, CHUNK] {
        let data: Vec<u8> = (0..length).map(|at| at as u8).collect();
        let mut buffer = ChunkBuffer::new();
        assert_eq!(buffer.put(&data), length);
        assert_eq!(
            buffer.frame(),
            message(Kind::Data(data.clone())),
            "{length}"
        );
        assert_eq!(
            [announce(length), data].concat(),
            buffer.frame(),
            "{length}"
        );
        assert_eq!(buffer.is_full(), length == CHUNK);
        buffer.clear();
        assert!(buffer.is_empty());
        assert_eq!(buffer.put(&vec![7; CHUNK + 5]), CHUNK);
    }
}

#[test]
fn lengths_that_lie_are_errors() {
    // A frame of two bytes whose data says five.
    assert_eq!(read(&[2, DATA_TAG, 5, 0], 1), Err(TransferError::BadLength));
    // A frame of one byte: a tag without a length.
    assert_eq!(read(&[1, DATA_TAG, 0], 1), Err(TransferError::BadLength));
    assert_eq!(read(&[0], 1), Err(TransferError::Unknown));
    assert!(matches!(
        read(&[0xff, 0xff, 0xff, 0x7f], 4),
        Err(TransferError::Frame(FrameError::TooLong(_)))
    ));
}

#[test]
fn an_unknown_piece_is_no_silent_loss() {
    // Field 9, a varint.
    assert_eq!(read(&[2, 0x48, 1], 3), Err(TransferError::Unknown));
    // Data, then a field of a later generation.
    let bytes = [6, DATA_TAG, 2, b'a', b'b', 0x48, 1];
    assert_eq!(read(&bytes, 1), Ok(vec![Seen::Data(b"ab".to_vec())]));
}

proptest! {
    #[test]
    fn any_cut_gives_the_same_pieces(
        pieces in proptest::collection::vec((0..4_u8, proptest::collection::vec(any::<u8>(), 1..300), any::<u64>()), 0..12),
        step in 1..700_usize,
    ) {
        let mut bytes = Vec::new();
        let mut wanted: Vec<Seen> = Vec::new();
        for (kind, data, number) in pieces {
            match kind {
                0 => {
                    bytes.extend(message(Kind::Data(data.clone())));
                    match wanted.last_mut() {
                        Some(Seen::Data(held)) => held.extend(data),
                        _ => wanted.push(Seen::Data(data)),
                    }
                }
                1 => {
                    bytes.extend(message(Kind::Hole(number)));
                    wanted.push(Seen::Hole(number));
                }
                2 => {
                    let end = v1::TransferEnd { entries: number, ..Default::default() };
                    bytes.extend(message(Kind::End(end.clone())));
                    wanted.push(Seen::End(end));
                }
                _ => {
                    let error = v1::Error { errno: 5, ..Default::default() };
                    bytes.extend(message(Kind::Error(error.clone())));
                    wanted.push(Seen::Error(error));
                }
            }
        }
        prop_assert_eq!(read(&bytes, step).unwrap(), wanted);
    }

    #[test]
    fn hostile_bytes_end_in_pieces_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..2000), step in 1..64_usize) {
        let payload: usize = read(&bytes, step).map_or(0, |seen| seen.iter().map(|piece| match piece {
            Seen::Data(data) => data.len(),
            _ => 0,
        }).sum());
        prop_assert!(payload <= bytes.len());
    }
}
