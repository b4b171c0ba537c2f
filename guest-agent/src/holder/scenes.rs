//! Scenes with real programs, seen from the worker's side of its channels.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_protocol::frame::{self, Decoder};
use belljar_protocol::v1::{self, exec_output::Output, process_ref::Ref};
use prost::Message;

use super::pump::MAX_UNWRITTEN;
use super::tests::{holder, turn};
use super::*;
use crate::wire::{
    FromHolder, HangUp, Start, ToHolder, from_holder::Message as Said, to_holder::Message as Asked,
};

/// The worker's end of a channel.
struct Caller {
    socket: UnixStream,
    decoder: Decoder,
    stdout: u64,
    gaps: u64,
    said: Vec<Said>,
}

impl Caller {
    fn open(holder: &mut Holder, asked: Asked) -> Self {
        let (socket, other) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        holder.add_channel(OwnedFd::from(other));
        let mut caller = Self {
            socket,
            decoder: Decoder::new(),
            stdout: 0,
            gaps: 0,
            said: Vec::new(),
        };
        caller.ask(asked);
        caller
    }

    fn ask(&mut self, asked: Asked) {
        let message = Some(asked);
        let mut bytes = Vec::new();
        frame::encode(&ToHolder { message }, &mut bytes).unwrap();
        // A broken channel takes nothing.
        let _ = self.socket.write_all(&bytes);
    }

    /// Reads what is there.
    fn read(&mut self) {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(got @ 1..) = self.socket.read(&mut buffer) {
            let mut bytes = &buffer[..got];
            while let Some(frame) = self.decoder.feed(&mut bytes).unwrap() {
                match FromHolder::decode(&*frame).unwrap().message.unwrap() {
                    Said::Output(v1::ExecOutput { output }) => match output.unwrap() {
                        Output::Stdout(bytes) => self.stdout += bytes.len() as u64,
                        Output::Gap(gap) => self.gaps += gap.to - gap.from,
                        output => self.said.push(Said::Output(v1::ExecOutput {
                            output: Some(output),
                        })),
                    },
                    said => self.said.push(said),
                }
            }
        }
    }

    fn has_end(&self) -> bool {
        let is_end = |said: &Said| matches!(said, Said::Output(it) if matches!(it.output, Some(Output::End(_))));
        self.said.iter().any(is_end)
    }
}

fn script(script: &str) -> Start {
    Start {
        candidates: vec![b"/bin/sh".to_vec()],
        argv: ["sh", "-c", script].map(|it| it.as_bytes().to_vec()).into(),
        cwd: b"/".to_vec(),
        keep_ms: 60_000,
        ..Start::default()
    }
}

fn attach(process: u64, owner_key: &[u8]) -> Asked {
    Asked::Attach(v1::Attach {
        process: Some(v1::ProcessRef {
            r#ref: Some(Ref::Id(process)),
        }),
        follow: true,
        owner_key: owner_key.to_vec(),
        ..v1::Attach::default()
    })
}

fn until(holder: &mut Holder, what: &str, mut is_so: impl FnMut(&mut Holder) -> bool) {
    let start = Instant::now();
    while !is_so(holder) {
        assert!(start.elapsed() < Duration::from_secs(20), "until {what}");
        turn(holder);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A program that has ended with its last bytes in the pipe: its owner passes nothing on.
fn ended_unread(holder: &mut Holder) -> (Caller, u64) {
    let start = Start {
        ring_bytes: 4096,
        owner_key: b"key".to_vec(),
        ..script("head -c 100000 /dev/zero")
    };
    let owner = Caller::open(holder, Asked::Start(start));
    until(holder, "it has ended", |holder| {
        holder.table.get(1).is_some_and(|it| it.is_settled())
    });
    assert!(holder.table.get(1).unwrap().outputs[0].ring.newest() < 100_000);
    (owner, 1)
}

#[test]
fn a_reader_after_the_end_gets_what_is_still_in_the_pipe() {
    let mut holder = holder();
    let (mut owner, id) = ended_unread(&mut holder);
    let mut late = Caller::open(&mut holder, attach(id, b""));
    for _ in 0..20 {
        turn(&mut holder);
        late.read();
        owner.read();
    }
    assert!(!late.has_end(), "{} bytes, then the end", late.stdout);
    owner.ask(Asked::PassedOn(200_000));
    until(&mut holder, "both know the end", |_| {
        owner.read();
        late.read();
        owner.has_end() && late.has_end()
    });
    assert_eq!((owner.stdout, owner.gaps), (100_000, 0));
    assert_eq!(late.stdout + late.gaps, 100_000);
}

#[test]
fn an_owner_who_comes_back_after_the_end_has_missed_nothing() {
    let mut holder = holder();
    let (owner, id) = ended_unread(&mut holder);
    drop(owner);
    for _ in 0..20 {
        turn(&mut holder);
    }
    let mut owner = Caller::open(&mut holder, attach(id, b"key"));
    until(&mut holder, "it knows the end", |_| {
        owner.read();
        if owner.stdout > 0 {
            owner.ask(Asked::PassedOn(1 << 20));
        }
        owner.has_end()
    });
    assert_eq!((owner.stdout, owner.gaps), (100_000, 0));
}

#[test]
fn bytes_of_writers_who_have_left_are_bounded_too() {
    let mut holder = holder();
    let start = Start {
        stdin: true,
        detached: true,
        ..script("sleep 100")
    };
    let starter = Caller::open(&mut holder, Asked::Start(start));
    until(&mut holder, "it runs", |it| it.table.running() == 1);
    for _ in 0..30 {
        let mut writer = Caller::open(&mut holder, attach(1, b""));
        writer.ask(Asked::Input(vec![b'x'; 200_000]));
        turn(&mut holder);
        writer.ask(Asked::HangUp(HangUp {}));
        turn(&mut holder);
        let input = &holder.table.get(1).unwrap().input;
        assert!(input.unwritten().len() < MAX_UNWRITTEN + 200_000);
    }
    let refused = Caller::open(&mut holder, attach(1, b""));
    for _ in 0..3 {
        turn(&mut holder);
    }
    let mut refused = refused;
    let before = holder.channels.len();
    refused.ask(Asked::Input(vec![b'x'; 10]));
    for _ in 0..3 {
        turn(&mut holder);
    }
    assert_eq!(holder.channels.len(), before - 1);
    // What was not taken does not count as taken.
    let mut again = Caller::open(&mut holder, attach(1, b""));
    turn(&mut holder);
    again.read();
    assert!(matches!(&again.said[..], [Said::Attached(it), ..] if it.input_taken == 0));
    sys::signal_group(holder.table.get(1).unwrap().pid, libc::SIGKILL as u32);
    drop(starter);
}

#[test]
fn what_lives_on_after_its_record_may_write() {
    let mut holder = holder();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("done");
    let text = format!(
        "(sleep 0.3; head -c 500000 /dev/zero && touch {}) & exit 0",
        file.display()
    );
    let start = Start {
        detached: true,
        keep_ms: 20,
        ..script(&text)
    };
    let mut starter = Caller::open(&mut holder, Asked::Start(start));
    until(&mut holder, "it has ended", |_| {
        starter.read();
        starter.has_end()
    });
    drop(starter);
    until(&mut holder, "it is forgotten", |it| {
        it.table.all().next().is_none()
    });
    assert!(!file.exists());
    until(&mut holder, "all is written", |_| file.exists());
    until(&mut holder, "its output is closed", |it| {
        it.abandoned.is_empty()
    });
}

#[test]
fn the_end_of_the_input_is_typed_once_in_a_session() {
    let mut holder = holder();
    let start = Start {
        terminal: Some(v1::Terminal {
            columns: 80,
            rows: 24,
        }),
        owner_key: b"key".to_vec(),
        ..script("stty -echo; cat >/dev/null; echo once; cat >/dev/null; echo twice; sleep 100")
    };
    let mut owner = Caller::open(&mut holder, Asked::Start(start));
    until(&mut holder, "it runs", |it| it.table.running() == 1);
    owner.ask(Asked::CloseInput(v1::StdinEof {}));
    until(&mut holder, "it has read the end", |_| {
        owner.read();
        owner.stdout >= 6
    });
    let session = holder.table.get(1).unwrap();
    let session = session
        .viewers
        .first()
        .and_then(|it| holder.channels.get(it));
    let session = session.and_then(Channel::viewer).unwrap().input_session;
    drop(owner);
    turn(&mut holder);
    let Asked::Attach(attach) = attach(1, b"key") else {
        unreachable!()
    };
    let mut owner = Caller::open(
        &mut holder,
        Asked::Attach(v1::Attach {
            input_session: session,
            ..attach
        }),
    );
    turn(&mut holder);
    owner.ask(Asked::CloseInput(v1::StdinEof {}));
    for _ in 0..200 {
        turn(&mut holder);
        owner.read();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(owner.stdout, "once\r\n".len() as u64);
    sys::signal_group(holder.table.get(1).unwrap().pid, libc::SIGKILL as u32);
}

#[test]
fn rings_of_owners_stay_within_the_budget() {
    const BUDGET: usize = 1 << 20;
    let mut holder = holder();
    holder.table = Table::new(BUDGET);
    let mut owners: Vec<_> = (0..24)
        .map(|_| {
            Caller::open(
                &mut holder,
                Asked::Start(script("head -c 400000 /dev/zero")),
            )
        })
        .collect();
    until(&mut holder, "all run", |it| it.table.running() == 24);
    for _ in 0..100 {
        turn(&mut holder);
        // One read is under way when the limit is reached; chunks are not full.
        assert!(
            holder.table.held() <= BUDGET + (256 << 10),
            "{}",
            holder.table.held()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    until(&mut holder, "all have ended", |_| {
        for owner in &mut owners {
            let before = owner.stdout;
            owner.read();
            if owner.stdout > before {
                owner.ask(Asked::PassedOn(1 << 20));
            }
        }
        owners.iter().all(Caller::has_end)
    });
    assert!(owners.iter().all(|it| it.stdout == 400_000));
}

#[test]
fn a_kill_from_here_is_not_taken_for_a_lack_of_memory() {
    let mut holder = holder();
    let start = Start {
        detached: true,
        ..script("sleep 100")
    };
    let starter = Caller::open(&mut holder, Asked::Start(start));
    until(&mut holder, "it runs", |it| it.table.running() == 1);
    let process = holder.table.get(1).unwrap();
    process.signal(15, v1::signal::Scope::Process);
    assert!(!process.was_killed.get());
    process.signal(9, v1::signal::Scope::Process);
    assert!(process.was_killed.get());
    until(&mut holder, "it has ended", |it| it.table.running() == 0);
    drop(starter);
}
