use proptest::prelude::*;

use super::*;
use crate::v1;

fn framed(messages: &[Vec<u8>]) -> Vec<u8> {
    let mut stream = Vec::new();
    for message in messages {
        put_varint(message.len() as u64, &mut stream);
        stream.extend_from_slice(message);
    }
    stream
}

fn decode_all(decoder: &mut Decoder, stream: &[u8], pieces: &[usize]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut rest = stream;
    let mut sizes = pieces.iter().copied().cycle();
    while !rest.is_empty() {
        let size = sizes.next().unwrap_or(1).clamp(1, rest.len());
        let (mut piece, tail) = rest.split_at(size);
        rest = tail;
        while let Some(frame) = decoder.feed(&mut piece).unwrap() {
            frames.push(frame.into_owned());
        }
        assert!(piece.is_empty());
    }
    frames
}

#[test]
fn a_frame_over_the_limit_is_refused_before_its_bytes_arrive() {
    let mut stream = Vec::new();
    put_varint(MAX_FRAME as u64 + 1, &mut stream);
    let mut decoder = Decoder::new();
    let mut input = stream.as_slice();
    assert_eq!(
        decoder.feed(&mut input),
        Err(FrameError::TooLong(MAX_FRAME as u64 + 1))
    );
    // It stays failed: the boundary of the next frame is unknown.
    assert!(decoder.feed(&mut [1, 0].as_slice()).is_err());
    assert!(!decoder.is_at_boundary());
}

#[test]
fn the_longest_frame_passes_byte_by_byte_prefix() {
    let message = vec![7_u8; MAX_FRAME];
    let stream = framed(std::slice::from_ref(&message));
    let frames = decode_all(&mut Decoder::new(), &stream, &[1, 1, 1, 1, 100_000]);
    assert_eq!(frames, vec![message]);
}

#[test]
fn an_endless_prefix_is_refused() {
    let mut decoder = Decoder::new();
    assert_eq!(
        decoder.feed(&mut [0x80_u8; 16].as_slice()),
        Err(FrameError::BadPrefix)
    );
}

#[test]
fn an_announced_frame_takes_no_memory_ahead_of_its_bytes() {
    let mut stream = Vec::new();
    put_varint(MAX_FRAME as u64, &mut stream);
    stream.push(1);
    let mut decoder = Decoder::new();
    assert_eq!(decoder.feed(&mut stream.as_slice()), Ok(None));
    let State::Body { held, .. } = &decoder.state else {
        panic!("not in a body")
    };
    assert!(held.capacity() <= FIRST_RESERVE);
}

#[test]
fn a_message_that_does_not_fit_is_refused_and_leaves_no_trace() {
    let mut out = vec![9];
    let message = v1::Error {
        code: 0,
        message: "x".repeat(MAX_FRAME),
        ..v1::Error::default()
    };
    assert!(encode(&message, &mut out).is_err());
    assert_eq!(out, [9]);
}

proptest! {
    #[test]
    fn any_cut_of_a_stream_gives_the_same_frames(
        messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..8),
        pieces in proptest::collection::vec(1_usize..400, 1..8),
    ) {
        let stream = framed(&messages);
        let mut decoder = Decoder::new();
        prop_assert_eq!(decode_all(&mut decoder, &stream, &pieces), messages);
        prop_assert!(decoder.is_at_boundary());
    }

    #[test]
    fn garbage_never_panics_and_never_grows(
        stream in proptest::collection::vec(any::<u8>(), 0..4096),
        cut in 1_usize..64,
    ) {
        let mut decoder = Decoder::new();
        'stream: for mut piece in stream.chunks(cut) {
            loop {
                match decoder.feed(&mut piece) {
                    Ok(Some(frame)) => prop_assert!(frame.len() <= stream.len()),
                    Ok(None) => break,
                    Err(_) => break 'stream,
                }
            }
            if let State::Body { held, .. } = &decoder.state {
                prop_assert!(held.capacity() <= 2 * stream.len() + FIRST_RESERVE);
            }
        }
    }

    #[test]
    fn a_chunk_is_encoded_as_the_message_would_be(
        data in proptest::collection::vec(any::<u8>(), 0..70_000),
        stderr in any::<bool>(),
    ) {
        use v1::exec_output::Output;
        let mut by_hand = Vec::new();
        let taken = encode_chunk(if stderr { 2 } else { 1 }, &data, &mut by_hand);
        prop_assert_eq!(taken, data.len().min(MAX_CHUNK));
        let bytes = data[..taken].to_vec();
        let output = Some(if stderr { Output::Stderr(bytes) } else { Output::Stdout(bytes) });
        let mut by_prost = Vec::new();
        encode(&v1::ExecOutput { output }, &mut by_prost).unwrap();
        prop_assert_eq!(by_hand, by_prost);
    }

    #[test]
    fn messages_survive_the_round_trip(
        argv in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..6),
        generation in any::<u32>(),
        deadline_ms in any::<u64>(),
    ) {
        let exec = v1::Exec { argv, ..Default::default() };
        let call = Some(v1::request::Call::Exec(exec));
        let request = v1::Request { generation, deadline_ms, call };
        let mut stream = Vec::new();
        encode(&request, &mut stream).unwrap();
        let mut input = stream.as_slice();
        let frame = Decoder::new().feed(&mut input).unwrap().unwrap();
        prop_assert_eq!(v1::Request::decode(&*frame).unwrap(), request);
    }

    #[test]
    fn garbage_messages_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = v1::Request::decode(bytes.as_slice());
        let _ = v1::Reply::decode(bytes.as_slice());
        let _ = v1::ExecInput::decode(bytes.as_slice());
        let _ = v1::ExecOutput::decode(bytes.as_slice());
        let _ = v1::Ready::decode(bytes.as_slice());
    }
}
