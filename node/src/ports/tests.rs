//! Forwarding to a guest that is a thread of this test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use belljar_protocol::frame::{self, Decoder};
use belljar_protocol::v1::{self, reply, request};
use prost::Message;

use super::*;
use crate::state::{self, SandboxDir};

/// A sandbox whose guest echoes on port 7 and refuses every other one.
fn guest() -> (tempfile::TempDir, Found) {
    let keep = tempfile::tempdir().unwrap();
    let dir = SandboxDir::existing(keep.path());
    let listener = UnixListener::bind(dir.file(state::VSOCK_SOCKET)).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || answer(stream.unwrap()));
        }
    });
    (keep, Found::at(dir))
}

fn answer(mut stream: UnixStream) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, "CONNECT 1024\n");
    stream.write_all(b"OK 1\n").unwrap();
    let mut decoder = Decoder::new();
    let request = loop {
        let mut byte = [0];
        if reader.read_exact(&mut byte).is_err() {
            return;
        }
        if let Some(frame) = decoder.feed(&mut byte.as_slice()).unwrap() {
            break v1::Request::decode(&*frame).unwrap();
        }
    };
    let Some(request::Call::Connect(v1::Connect {
        target: Some(v1::connect::Target::Tcp(target)),
        ..
    })) = request.call
    else {
        panic!("another call: {request:?}");
    };
    let result = if target.port == 7 {
        reply::Result::Connect(v1::Connected {})
    } else {
        reply::Result::Error(v1::Error {
            code: v1::error::Code::System.into(),
            message: "refused".to_owned(),
            errno: 111,
        })
    };
    let mut bytes = Vec::new();
    let reply = v1::Reply {
        result: Some(result),
        ..v1::Reply::default()
    };
    frame::encode(&reply, &mut bytes).unwrap();
    // In one piece with the first bytes of the stream.
    if target.port == 7 {
        bytes.extend(b"hi:");
    }
    stream.write_all(&bytes).unwrap();
    if target.port == 7 {
        std::io::copy(&mut reader, &mut stream).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    }
}

fn start(found: &Found, forward: &str) -> (Forwarding, mpsc::Receiver<String>) {
    let (notes, noted) = mpsc::channel();
    let note = move |note: Note| {
        let _ = notes.send(format!("{note:?}"));
    };
    let forward = forward.parse().unwrap();
    (
        Forwarding::start(found.clone(), &forward, note).unwrap(),
        noted,
    )
}

fn connect(forwarding: &Forwarding) -> TcpStream {
    let Listen::Tcp(address) = forwarding.listen() else {
        panic!("no TCP");
    };
    let stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
}

#[test]
fn connections_are_passed_on_both_ways() {
    let (_keep, found) = guest();
    let (forwarding, _) = start(&found, "0:7");
    for _ in 0..3 {
        let mut stream = connect(&forwarding);
        stream.write_all(b"hello").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut heard = String::new();
        stream.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "hi:hello");
    }
    assert_eq!(forwarding.connections().1, 3);
}

#[test]
fn a_refused_connection_is_reset_and_noted() {
    let (_keep, found) = guest();
    let (forwarding, noted) = start(&found, "0:8");
    let mut stream = connect(&forwarding);
    // Whichever comes after it is told of the reset, once.
    let wrote = stream.write_all(b"hello");
    let heard = stream.read(&mut [0; 8]);
    assert!(wrote.is_err() || heard.is_err(), "{heard:?}");
    let note = noted.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(note.contains("errno: 111"), "{note}");
}

/// Dropping it joins its threads.
#[test]
fn the_end_of_a_forwarding_ends_its_connections() {
    let (keep, found) = guest();
    let path = keep.path().join("here");
    let (forwarding, _) = start(&found, &format!("{}:7", path.display()));
    let mut streams: Vec<UnixStream> = (0..20)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    for stream in &mut streams {
        let mut heard = [0; 3];
        stream.read_exact(&mut heard).unwrap();
    }
    drop(forwarding);
    for stream in &mut streams {
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
    assert!(!path.exists());
}

#[test]
fn a_socket_left_behind_is_taken_over_and_one_in_use_is_not() {
    let (keep, found) = guest();
    let path = keep.path().join("here");
    drop(UnixListener::bind(&path).unwrap());
    let text = format!("{}:7", path.display());
    let (_first, _) = start(&found, &text);
    let second = Forwarding::start(found, &text.parse().unwrap(), |_| {});
    assert!(matches!(second, Err(ForwardError::Listen { .. })));
}
