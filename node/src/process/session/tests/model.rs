//! An agent with one process, pure: enough of the protocol to be cut anywhere.

use std::collections::{HashMap, VecDeque};

use prost::Message;

use super::super::*;

/// What a session told.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) out: Vec<u8>,
    pub(super) err: Vec<u8>,
    pub(super) started: Option<Started>,
    pub(super) ends: u32,
    pub(super) gaps: u32,
    pub(super) missing: u64,
    pub(super) detached: bool,
}

impl Collected {
    pub(super) fn take(&mut self, event: &Event<'_>) {
        assert_eq!(self.ends, 0, "{event:?} after the end");
        match event {
            Event::Output(Channel::Stdout, bytes) => self.out.extend_from_slice(bytes),
            Event::Output(Channel::Stderr, bytes) => self.err.extend_from_slice(bytes),
            Event::Started(started) => {
                assert!(self.started.replace(*started).is_none(), "started twice");
            }
            Event::Ended(_) => self.ends += 1,
            Event::Gap { from, to, .. } => {
                self.gaps += 1;
                self.missing += to - from;
            }
            Event::Detached => self.detached = true,
            Event::Attached(_) | Event::CaughtUp | Event::Resized(_) => {}
        }
    }
}

#[derive(Debug, Default)]
struct Connection {
    greeted: bool,
    line: Vec<u8>,
    decoder: Decoder,
    asked: bool,
    closed: bool,
    /// Attached: offsets of the next bytes to send.
    out: Option<usize>,
    err: usize,
    input: (u64, u64),
    /// Bytes of the input session told as taken.
    told: u64,
    ended: bool,
    pending: VecDeque<u8>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) generation: u32,
    pub(super) starts: u32,
    pub(super) pings: u32,
    pub(super) input: Vec<u8>,
    pub(super) input_ended: bool,
    pub(super) detached: bool,
    /// Bytes kept.
    pub(super) ring: usize,
    out: Vec<u8>,
    err: Vec<u8>,
    said_out: usize,
    said_err: usize,
    /// Input that came and is not taken yet: (session, offset, bytes).
    waiting: VecDeque<(u64, u64, Vec<u8>)>,
    waiting_end: bool,
    sessions: HashMap<u64, u64>,
    key: Option<Vec<u8>>,
    exists: bool,
    /// What exists under the name is another, which has ended.
    other_ended: bool,
    connection: Connection,
}

impl Agent {
    pub(super) fn new(out: Vec<u8>, err: Vec<u8>) -> Self {
        Self {
            generation: 2,
            starts: 0,
            pings: 0,
            input: Vec::new(),
            input_ended: false,
            detached: false,
            ring: usize::MAX,
            out,
            err,
            said_out: 0,
            said_err: 0,
            waiting: VecDeque::new(),
            waiting_end: false,
            sessions: HashMap::new(),
            key: None,
            exists: false,
            other_ended: false,
            connection: Connection::default(),
        }
    }

    pub(super) fn has_ended_other(&mut self) {
        self.exists = true;
        self.other_ended = true;
        self.key = Some(b"another".to_vec());
    }

    pub(super) fn has_running_other(&mut self) {
        self.exists = true;
        self.key = Some(b"another".to_vec());
    }

    pub(super) fn accept(&mut self) {
        self.connection = Connection::default();
        // What a connection brought is with the holder at once.
        if self.generation < 2 {
            self.waiting.clear();
        }
    }

    pub(super) fn receive(&mut self, mut bytes: &[u8]) {
        while !self.connection.greeted {
            let Some((&byte, rest)) = bytes.split_first() else {
                return;
            };
            bytes = rest;
            self.connection.line.push(byte);
            if byte == b'\n' {
                assert_eq!(self.connection.line, b"CONNECT 1024\n");
                self.connection.greeted = true;
                self.connection.pending.extend(b"OK 1073741825\n");
            }
        }
        self.receive_bare(bytes);
    }

    pub(super) fn receive_bare(&mut self, mut bytes: &[u8]) {
        loop {
            if self.connection.closed {
                return;
            }
            let frame = self.connection.decoder.feed(&mut bytes).unwrap();
            let Some(frame) = frame.map(|frame| frame.into_owned()) else {
                return;
            };
            if self.connection.asked {
                let input = v1::ExecInput::decode(&*frame).unwrap();
                self.said(input.input.unwrap());
            } else {
                self.connection.asked = true;
                let request = v1::Request::decode(&*frame).unwrap();
                assert_eq!(request.generation, GENERATION);
                self.request(request.call.unwrap());
            }
        }
    }

    fn said(&mut self, input: Said) {
        let (session, offset) = self.connection.input;
        match input {
            Said::Stdin(bytes) => {
                self.connection.input.1 += bytes.len() as u64;
                self.waiting.push_back((session, offset, bytes));
            }
            Said::StdinEof(_) => self.waiting_end = true,
            Said::Detach(_) => {
                self.detached = true;
                self.put(Output::Detached(v1::Detached {}));
                self.connection.closed = true;
            }
            Said::Signal(_) | Said::Resize(_) => {}
        }
    }

    fn request(&mut self, call: Call) {
        match call {
            Call::Ping(_) => {
                self.pings += 1;
                self.reply(Answer::Pong(v1::Pong::default()));
                self.connection.closed = true;
            }
            Call::Exec(exec) => self.exec(&exec),
            Call::Attach(attach) => self.attach(&attach),
            other => panic!("{other:?}"),
        }
    }

    fn exec(&mut self, exec: &v1::Exec) {
        let old = self.generation < 2;
        if self.exists && !old && !(self.other_ended && exec.replace_ended) {
            self.reply(Answer::Exec(v1::ExecStarted {
                pid: 9,
                id: 4,
                existed: true,
            }));
            self.connection.closed = true;
            return;
        }
        self.starts += 1;
        self.exists = true;
        self.other_ended = false;
        self.key = Some(exec.owner_key.clone());
        self.sessions.insert(1, 0);
        self.connection.out = Some(0);
        self.connection.input = (1, 0);
        self.reply(Answer::Exec(v1::ExecStarted {
            pid: 9,
            id: if old { 0 } else { 5 },
            existed: false,
        }));
    }

    fn attach(&mut self, attach: &v1::Attach) {
        if !attach.owner_key.is_empty() && self.key.as_ref() != Some(&attach.owner_key) {
            self.reply(Answer::Error(v1::Error {
                code: Code::Conflict.into(),
                ..v1::Error::default()
            }));
            self.connection.closed = true;
            return;
        }
        let session = match attach.input_session {
            0 => self.sessions.len() as u64 + 1,
            given => given,
        };
        let taken = *self.sessions.entry(session).or_insert(0);
        self.connection.input = (session, attach.input_offset);
        self.connection.told = taken;
        let offset = |position: &Option<v1::Position>| match position.and_then(|p| p.at) {
            Some(v1::position::At::Offset(offset)) => offset as usize,
            None => 0,
            other => panic!("{other:?}"),
        };
        let oldest = self.said_out.saturating_sub(self.ring);
        let wanted = offset(&attach.stdout);
        self.connection.out = Some(wanted.max(oldest));
        self.connection.err = offset(&attach.stderr);
        self.reply(Answer::Attach(v1::Attached {
            process: Some(v1::ProcessInfo {
                id: if self.starts > 0 { 5 } else { 4 },
                ..v1::ProcessInfo::default()
            }),
            input_session: session,
            input_taken: taken,
            stdout_from: wanted.max(oldest) as u64,
            stderr_from: self.connection.err as u64,
        }));
        if wanted < oldest {
            self.put(Output::Gap(v1::Gap {
                stream: v1::Stream::Stdout.into(),
                from: wanted as u64,
                to: oldest as u64,
            }));
        }
    }

    fn reply(&mut self, result: Answer) {
        let mut bytes = Vec::new();
        let reply = v1::Reply {
            generation: self.generation,
            result: Some(result),
            ..v1::Reply::default()
        };
        frame::encode(&reply, &mut bytes).unwrap();
        self.connection.pending.extend(bytes);
    }

    fn put(&mut self, output: Output) {
        let mut bytes = Vec::new();
        let output = Some(output);
        frame::encode(&v1::ExecOutput { output }, &mut bytes).unwrap();
        self.connection.pending.extend(bytes);
    }

    /// The process writes.
    pub(super) fn say(&mut self, count: usize) {
        if self.exists {
            self.said_out = self.out.len().min(self.said_out + count);
            self.said_err = self.err.len().min(self.said_err + count / 2 + 1);
        }
    }

    /// The process reads input, in the order in which it came.
    pub(super) fn take(&mut self, count: usize) {
        for _ in 0..count.div_ceil(100) {
            let Some((session, offset, bytes)) = self.waiting.pop_front() else {
                self.input_ended |= self.waiting_end;
                return;
            };
            let taken = self.sessions.entry(session).or_insert(0);
            assert!(offset <= *taken, "input is missing");
            let known = (*taken - offset) as usize;
            if let Some(fresh) = bytes.get(known..) {
                self.input.extend_from_slice(fresh);
                *taken += fresh.len() as u64;
            }
        }
    }

    /// At most so many bytes for the host.
    pub(super) fn send(&mut self, count: usize) -> Vec<u8> {
        if let Some(at) = self.connection.out
            && !self.connection.closed
            && !self.connection.ended
        {
            let to = self.said_out.min(at + 700);
            if at < to {
                self.put(Output::Stdout(self.out[at..to].to_vec()));
                self.connection.out = Some(to);
            }
            let (at, err_to) = (self.connection.err, self.said_err);
            if at < err_to {
                self.put(Output::Stderr(self.err[at..err_to].to_vec()));
                self.connection.err = err_to;
            }
            let taken = self.sessions.get(&self.connection.input.0).copied();
            if let Some(taken) = taken.filter(|&taken| taken > self.connection.told)
                && self.generation > 1
            {
                self.connection.told = taken;
                self.put(Output::InputTaken(taken));
            }
            let all = to == self.out.len() && err_to == self.err.len();
            if all && self.input_ended {
                self.connection.ended = true;
                let how = v1::end::How::Exited(v1::Exited { code: 0 });
                self.put(Output::End(v1::End {
                    how: Some(how),
                    ..v1::End::default()
                }));
            }
        }
        let count = count.min(self.connection.pending.len());
        self.connection.pending.drain(..count).collect()
    }
}
