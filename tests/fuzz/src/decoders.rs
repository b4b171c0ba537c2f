//! What reads the bytes of the other side: frames, the host's client, the agent's messages.

use std::io::{self, Read, Write};

use belljar_protocol::client::{self, Connection, Exec, Untimed};
use belljar_protocol::frame::{self, Decoder};
use belljar_protocol::v1::{self, end::How, exec_output::Output, reply::Result as Answer};
use prost::Message;

/// A peer that says these bytes, takes everything, and hangs up.
struct Said<'a>(&'a [u8]);

impl Read for Said<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Said<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Frames are the same however the stream is cut, and together never longer than it.
pub(crate) fn frames(data: &[u8]) {
    let Some((&step, stream)) = data.split_first() else {
        return;
    };
    let whole = cut(stream, usize::MAX);
    let pieces = cut(stream, usize::from(step).max(1));
    assert_eq!(whole, pieces);
    let held: usize = whole.iter().flatten().map(Vec::len).sum();
    assert!(held <= stream.len());
}

fn cut(stream: &[u8], step: usize) -> Vec<Result<Vec<u8>, String>> {
    let mut decoder = Decoder::new();
    let mut found = Vec::new();
    for piece in stream.chunks(step.min(stream.len().max(1))) {
        let mut input = piece;
        loop {
            match decoder.feed(&mut input) {
                Ok(Some(frame)) => found.push(Ok(frame.into_owned())),
                Ok(None) => break,
                Err(error) => {
                    found.push(Err(error.to_string()));
                    return found;
                }
            }
        }
    }
    found
}

/// Every function of the host's client, with a guest that says these bytes. Only `how` it fails may
/// differ; an exec always has an end.
pub(crate) fn host(data: &[u8]) {
    let _ = client::ping(Untimed(Said(data)), None);
    let _ = client::receive_ready(Untimed(Said(data)), None);
    if let Ok(exec) = Exec::start(Untimed(Said(data)), v1::Exec::default(), None) {
        let _ = exec.finish(1 << 16, None);
    }
    let mut connection = Connection::new(Untimed(Said(data)));
    let call = v1::request::Call::Ping(v1::Ping {});
    if connection.call(call, "any call", None).is_ok() {
        while let Ok(Some(_)) = connection.receive::<v1::ExecOutput>("output", None) {}
    }
    // The kinds of streams, as if their heads had been right.
    let _ = all::<v1::FileChunk>(data);
    let _ = all::<v1::DirectoryPage>(data);
    let _ = all::<v1::WatchEvent>(data);
    let _ = all::<v1::Event>(data);
}

/// What the agent reads from the host.
pub(crate) fn agent(data: &[u8]) {
    let _ = all::<v1::Request>(data);
    let _ = all::<v1::ExecInput>(data);
    let _ = all::<v1::FileChunk>(data);
}

/// Decodes every frame; what is understood is encoded and understood again as the same.
fn all<M: Message + Default + PartialEq>(data: &[u8]) -> usize {
    let mut connection = Connection::new(Untimed(Said(data)));
    let mut count = 0;
    while let Ok(Some(message)) = connection.receive::<M>("frames", None) {
        count += 1;
        let bytes = message.encode_to_vec();
        assert!(M::decode(&*bytes).is_ok_and(|again| again == message));
    }
    count
}

fn stream<M: Message>(messages: &[M]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        let _ = frame::encode(message, &mut bytes);
    }
    bytes
}

fn reply(answer: Answer) -> Vec<u8> {
    stream(&[v1::Reply {
        generation: 2,
        abilities: vec![1, 2, 3, 99],
        degraded: String::new(),
        result: Some(answer),
    }])
}

fn outputs() -> Vec<v1::ExecOutput> {
    let how = How::Exited(v1::Exited { code: 3 });
    let end = v1::End {
        how: Some(how),
        usage: Some(v1::Usage {
            cpu_us: 1,
            memory: 2,
            memory_peak: 3,
            pids: 4,
        }),
        wall_us: 5,
    };
    let gap = v1::Gap {
        stream: v1::Stream::Stdout.into(),
        from: 3,
        to: 70_000,
    };
    [
        Output::Stdout(b"some output".to_vec()),
        Output::Gap(gap),
        Output::Stderr(vec![b'x'; 300]),
        Output::InputTaken(17),
        Output::Resized(v1::Terminal {
            columns: 80,
            rows: 24,
        }),
        Output::CaughtUp(v1::CaughtUp {}),
        Output::End(end),
    ]
    .map(|output| v1::ExecOutput {
        output: Some(output),
    })
    .to_vec()
}

pub(crate) fn frame_seeds() -> Vec<Vec<u8>> {
    [1, 7, 200]
        .into_iter()
        .flat_map(|step| {
            host_seeds().into_iter().map(move |seed| {
                let mut bytes = vec![step];
                bytes.extend(seed);
                bytes
            })
        })
        .collect()
}

pub(crate) fn host_seeds() -> Vec<Vec<u8>> {
    let started = v1::ExecStarted {
        pid: 42,
        id: 7,
        existed: false,
    };
    let mut exec = reply(Answer::Exec(started));
    exec.extend(stream(&outputs()));
    let entry = v1::DirectoryEntry {
        name: b"na\xffme".to_vec(),
        r#type: v1::FileType::Regular.into(),
        info: Some(v1::FileInfo {
            mode: 0o4755,
            size: 1 << 40,
            modified_ns: -1,
            ..v1::FileInfo::default()
        }),
    };
    let page = v1::DirectoryPage {
        entries: vec![entry; 3],
        last: true,
        cursor: vec![1, 2, 3],
        error: None,
    };
    let mut listing = reply(Answer::ListDirectory(v1::ListingStarted {}));
    listing.extend(stream(&[page]));
    let moved = v1::Moved {
        from: b"a/b".to_vec(),
        to: b"c".to_vec(),
    };
    let watch = v1::WatchEvent {
        sequence: 9,
        what: Some(v1::watch_event::What::Moved(moved)),
        is_directory: true,
    };
    let event = v1::Event {
        sequence: 3,
        what: Some(v1::event::What::Missing(12)),
        ..v1::Event::default()
    };
    let chunk = |piece| v1::FileChunk { piece: Some(piece) };
    let chunks = [
        chunk(v1::file_chunk::Piece::Data(vec![0; 700])),
        chunk(v1::file_chunk::Piece::Hole(u64::MAX)),
        chunk(v1::file_chunk::Piece::End(v1::TransferEnd::default())),
    ];
    vec![
        reply(Answer::Pong(v1::Pong {
            boottime_ns: 5,
            ..v1::Pong::default()
        })),
        reply(Answer::Error(v1::Error {
            code: 3,
            message: "busy".into(),
            errno: 0,
        })),
        stream(&[v1::Ready {
            generation: 2,
            boot_id: "some id".into(),
            times: Some(v1::BootTimes::default()),
            ..v1::Ready::default()
        }]),
        exec,
        listing,
        stream(&[watch]),
        stream(&[event]),
        stream(&chunks),
    ]
}

pub(crate) fn agent_seeds() -> Vec<Vec<u8>> {
    use v1::request::Call;
    let request = |call| {
        stream(&[v1::Request {
            generation: 2,
            deadline_ms: 1000,
            call: Some(call),
        }])
    };
    let exec = v1::Exec {
        argv: vec![b"sh".to_vec(), b"-c".to_vec(), b"exit 3".to_vec()],
        env: vec![b"A=b".to_vec()],
        user: "user:group".into(),
        name: "web".into(),
        terminal: Some(v1::Terminal {
            columns: 80,
            rows: 24,
        }),
        rlimits: vec![v1::Rlimit {
            name: "nofile".into(),
            soft: 1,
            hard: u64::MAX,
        }],
        limits: Some(v1::Limits {
            memory: 1 << 20,
            cpu_milli: 500,
            pids: 10,
        }),
        keep_ms: Some(0),
        owner_key: vec![1; 16],
        ..v1::Exec::default()
    };
    let mut with_input = request(Call::Exec(exec));
    let inputs = [
        v1::exec_input::Input::Stdin(b"typed".to_vec()),
        v1::exec_input::Input::Signal(15),
        v1::exec_input::Input::StdinEof(v1::StdinEof {}),
        v1::exec_input::Input::Detach(v1::Detach {}),
    ];
    with_input.extend(stream(
        &inputs.map(|input| v1::ExecInput { input: Some(input) }),
    ));
    let by_name = v1::ProcessRef {
        r#ref: Some(v1::process_ref::Ref::Name("web".into())),
    };
    let lines = v1::Position {
        at: Some(v1::position::At::Lines(10)),
    };
    let output = v1::OutputMatch {
        process: Some(by_name.clone()),
        pattern: "(a|b)*c".into(),
        ..v1::OutputMatch::default()
    };
    vec![
        with_input,
        request(Call::Attach(v1::Attach {
            process: Some(by_name),
            stdout: Some(lines),
            follow: true,
            ..v1::Attach::default()
        })),
        request(Call::Await(v1::Await {
            time_limit_ms: 5,
            what: Some(v1::r#await::What::Output(output)),
        })),
        request(Call::WriteFile(v1::WriteFile {
            path: b"/tmp/x".to_vec(),
            permissions: Some(0o600),
            ..v1::WriteFile::default()
        })),
        request(Call::Connect(v1::Connect {
            target: Some(v1::connect::Target::Unix(b"@x".to_vec())),
            time_limit_ms: 1,
        })),
    ]
}
