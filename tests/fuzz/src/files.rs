//! Streams of files and trees: pieces of both sides' transfers, and tar streams.

use belljar_protocol::frame;
use belljar_protocol::transfer::{ChunkReader, Piece};
use belljar_protocol::v1::{self, file_chunk};
use belljar_tree::names;
use belljar_tree::tar::{END, Entry, Event, Kind, Parser, encode, padding, sparse_map};

/// How a stream is cut makes no difference, and no more data comes out than went in.
pub(crate) fn pieces(data: &[u8]) {
    let Some((&step, stream)) = data.split_first() else {
        return;
    };
    let whole = transfer(stream, usize::MAX);
    assert_eq!(whole, transfer(stream, usize::from(step).max(1)));
    assert!(whole.0.len() <= stream.len());
}

/// Data, the other pieces, and whether it ended in an error.
fn transfer(stream: &[u8], step: usize) -> (Vec<u8>, Vec<String>, bool) {
    let mut reader = ChunkReader::new();
    let (mut data, mut others) = (Vec::new(), Vec::new());
    for mut part in stream.chunks(step.min(stream.len().max(1))) {
        loop {
            match reader.feed(&mut part) {
                Ok(Some(Piece::Data(bytes))) => data.extend_from_slice(bytes),
                Ok(Some(piece)) => others.push(format!("{} {piece:?}", data.len())),
                Ok(None) => break,
                Err(_) => return (data, others, true),
            }
        }
    }
    (data, others, false)
}

/// The same of tar streams; names of entries lead nowhere but down.
pub(crate) fn tar(data: &[u8]) {
    let Some((&step, stream)) = data.split_first() else {
        return;
    };
    let whole = parse(stream, usize::MAX);
    assert_eq!(whole, parse(stream, usize::from(step).max(1)));
    assert!(whole.1 <= stream.len());
}

/// Entries, bytes of content, and whether it ended in an error.
fn parse(stream: &[u8], step: usize) -> (Vec<Entry>, usize, bool) {
    let mut parser = Parser::new();
    let (mut entries, mut content, mut end) = (Vec::new(), 0, 0);
    for mut part in stream.chunks(step.min(stream.len().max(1))) {
        loop {
            match parser.feed(&mut part) {
                Ok(Some(Event::Entry(entry))) => {
                    for path in [&entry.path, &entry.link] {
                        for name in names::split(path).unwrap_or_default() {
                            let name = name.to_bytes();
                            assert!(!name.contains(&b'/') && name != b".." && !name.is_empty());
                        }
                    }
                    end = 0;
                    entries.push(*entry);
                }
                Ok(Some(Event::Data { offset, bytes })) => {
                    let size = entries.last().map_or(0, |entry| entry.size);
                    assert!(offset >= end);
                    end = offset + bytes.len() as u64;
                    assert!(end <= size);
                    content += bytes.len();
                }
                Ok(Some(Event::Done | Event::End)) => {}
                Ok(None) => break,
                Err(_) => return (entries, content, true),
            }
        }
    }
    (entries, content, false)
}

pub(crate) fn piece_seeds() -> Vec<Vec<u8>> {
    let kinds = [
        file_chunk::Piece::Data(b"some bytes of a file".to_vec()),
        file_chunk::Piece::Hole(1 << 33),
        file_chunk::Piece::Data(vec![7; 300]),
        file_chunk::Piece::End(v1::TransferEnd {
            entries: 3,
            ..v1::TransferEnd::default()
        }),
    ];
    let mut bytes = vec![5];
    for kind in kinds {
        let chunk = v1::FileChunk { piece: Some(kind) };
        let _ = frame::encode(&chunk, &mut bytes);
    }
    vec![bytes]
}

pub(crate) fn tar_seeds() -> Vec<Vec<u8>> {
    let mut plain = vec![9];
    let mut add = |entry: &Entry, content: &[u8], is_sparse| {
        encode(entry, content.len() as u64, is_sparse, &mut plain);
        plain.extend_from_slice(content);
        plain.resize(plain.len() + padding(content.len() as u64), 0);
    };
    let mut file = Entry::new(b"dir/file".to_vec(), Kind::Regular);
    file.size = 5;
    file.modified_ns = 7;
    file.xattrs = vec![(c"user.tag".to_owned(), b"value".to_vec())];
    add(&file, b"12345", false);
    let mut link = Entry::new(vec![b'l'; 120], Kind::Symlink);
    link.link = b"../up".to_vec();
    add(&link, b"", false);
    add(&Entry::new(b"dir/".to_vec(), Kind::Directory), b"", false);
    let mut sparse = Entry::new(b"sparse".to_vec(), Kind::Regular);
    sparse.size = 10_000;
    let mut content = sparse_map(&[(100, 3), (5000, 4)], sparse.size);
    content.extend_from_slice(b"oneflow");
    add(&sparse, &content, true);
    plain.extend_from_slice(&END);
    vec![plain]
}
