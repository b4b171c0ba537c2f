//! A worker that has lost its mind: whatever it sends, the holder neither panics nor grows.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use belljar_protocol::frame;
use belljar_protocol::v1::{self, process_ref::Ref};
use proptest::prelude::*;

use super::*;
use crate::wire::{HangUp, Start, ToHolder, to_holder::Message as Asked};

#[derive(Debug, Clone)]
enum Action {
    Open,
    Close(usize),
    Bytes(usize, Vec<u8>),
    Ask(usize, Box<Asked>),
    Read(usize),
}

pub(super) fn holder() -> Holder {
    let (listener, _) = UnixStream::pair().unwrap();
    Holder::without_worker(Setup {
        listener: listener.into(),
        cgroups: None,
        degraded: String::new(),
        descriptors: 1024,
        disk: None,
    })
    .unwrap()
}

fn reference() -> impl Strategy<Value = Option<v1::ProcessRef>> {
    prop_oneof![
        (0_u64..6).prop_map(Ref::Id),
        "[ab]?".prop_map(Ref::Name),
        any::<u32>().prop_map(Ref::Pid),
    ]
    .prop_map(|it| Some(v1::ProcessRef { r#ref: Some(it) }))
}

fn size() -> impl Strategy<Value = v1::Terminal> {
    (any::<u32>(), any::<u32>()).prop_map(|(columns, rows)| v1::Terminal { columns, rows })
}

fn start() -> impl Strategy<Value = Asked> {
    (
        prop::sample::select(vec!["/bin/true", "/bin/cat", "/bin/yes", "/no/such", "/\0"]),
        "[ab]?",
        any::<(bool, bool, bool, u64)>(),
        prop::option::of(size()),
        0_u64..50,
        prop::collection::vec(any::<u8>(), 0..40),
    )
        .prop_map(
            |(path, name, (stdin, detached, anew, ring), terminal, time, key)| {
                Asked::Start(Start {
                    candidates: vec![path.as_bytes().to_vec()],
                    argv: vec![b"x".to_vec()],
                    cwd: b"/".to_vec(),
                    name,
                    stdin,
                    detached,
                    replace_ended: anew,
                    ring_bytes: ring,
                    terminal,
                    time_limit_ms: time,
                    keep_ms: time,
                    owner_key: key,
                    ..Start::default()
                })
            },
        )
}

fn place() -> impl Strategy<Value = Option<v1::Position>> {
    use v1::position::At;
    let at = prop_oneof![
        any::<u64>().prop_map(At::Offset),
        Just(At::Newest(true)),
        any::<u64>().prop_map(At::SinceUnixNs),
        any::<u32>().prop_map(At::Lines),
    ];
    prop::option::of(at.prop_map(|at| v1::Position { at: Some(at) }))
}

fn attach() -> impl Strategy<Value = Asked> {
    (
        reference(),
        place(),
        place(),
        any::<(bool, bool, u64, u64)>(),
        prop::option::of(size()),
    )
        .prop_map(
            |(process, stdout, stderr, (follow, read_only, session, offset), size)| {
                Asked::Attach(v1::Attach {
                    process,
                    stdout,
                    stderr,
                    follow,
                    read_only,
                    input_session: session % 4,
                    input_offset: offset,
                    size,
                    owner_key: Vec::new(),
                })
            },
        )
}

fn asked() -> impl Strategy<Value = Asked> {
    prop_oneof![
        4 => start(),
        4 => attach(),
        2 => any::<u64>().prop_map(Asked::PassedOn),
        4 => prop::collection::vec(any::<u8>(), 0..5000).prop_map(Asked::Input),
        1 => Just(Asked::CloseInput(v1::StdinEof {})),
        1 => any::<u32>().prop_map(Asked::Signal),
        1 => size().prop_map(Asked::Resize),
        1 => Just(Asked::Detach(v1::Detach {})),
        1 => Just(Asked::HangUp(HangUp {})),
        1 => any::<bool>().prop_map(|ended| Asked::List(v1::ListProcesses { ended })),
        1 => reference().prop_map(|process| Asked::Inspect(v1::Inspect { process })),
        1 => (reference(), any::<u32>(), 0..4_i32).prop_map(|(process, number, scope)| {
            Asked::SendSignal(v1::Signal { process, number, scope })
        }),
        1 => (reference(), size()).prop_map(|(process, size)| {
            Asked::ResizeProcess(v1::Resize { process, size: Some(size) })
        }),
        1 => reference().prop_map(|process| Asked::Forget(v1::Forget { process })),
        1 => reference().prop_map(|it| Asked::WaitEnd(it.unwrap_or_default())),
        1 => any::<(u64, bool)>().prop_map(|(from, follow)| {
            Asked::Events(v1::FollowEvents { from, follow })
        }),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        2 => Just(Action::Open),
        1 => any::<usize>().prop_map(Action::Close),
        1 => (any::<usize>(), prop::collection::vec(any::<u8>(), 0..50))
            .prop_map(|(at, bytes)| Action::Bytes(at, bytes)),
        12 => (any::<usize>(), asked()).prop_map(|(at, it)| Action::Ask(at, Box::new(it))),
        3 => any::<usize>().prop_map(Action::Read),
    ]
}

/// One round of the loop, without waiting.
pub(super) fn turn(holder: &mut Holder) {
    holder.tidy_at = Some(Instant::now());
    let mut events = Vec::with_capacity(64);
    let timeout = holder.timeout();
    let waited = epoll::wait(&holder.epoll, spare_capacity(&mut events), timeout.as_ref());
    assert!(waited.is_ok());
    for event in &events {
        holder.dispatch(*event);
    }
    holder.reap();
    holder.tick();
    for id in std::mem::take(&mut holder.again) {
        holder.drive(id);
    }
    holder.flush_channels();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_messages_leave_the_holder_sound(
        actions in prop::collection::vec(action(), 1..60),
    ) {
        let mut holder = holder();
        let mut channels: Vec<UnixStream> = Vec::new();
        for action in actions {
            let count = channels.len().max(1);
            match action {
                Action::Open => {
                    let (own, other) = UnixStream::pair().unwrap();
                    own.set_nonblocking(true).unwrap();
                    channels.push(own);
                    holder.add_channel(OwnedFd::from(other));
                }
                Action::Close(at) if !channels.is_empty() => drop(channels.remove(at % count)),
                Action::Bytes(at, bytes) => {
                    if let Some(channel) = channels.get_mut(at % count) {
                        let _ = channel.write(&bytes);
                    }
                }
                Action::Ask(at, asked) => {
                    let mut bytes = Vec::new();
                    let message = ToHolder { message: Some(*asked) };
                    frame::encode(&message, &mut bytes).unwrap();
                    if let Some(channel) = channels.get_mut(at % count) {
                        let _ = channel.write(&bytes);
                    }
                }
                Action::Read(at) => {
                    if let Some(channel) = channels.get_mut(at % count) {
                        let _ = channel.read(&mut [0; 4096]);
                    }
                }
                Action::Close(_) => {}
            }
            turn(&mut holder);
            let unsent: usize = holder.channels.values().map(Channel::unsent).sum();
            prop_assert!(unsent <= holder.channels.len() * (4 << 20));
            let ids: Vec<u64> = holder.table.all().map(|process| process.id).collect();
            for id in ids {
                let input = holder.table.get(id).map(|it| it.input.unwritten().len());
                prop_assert!(input.unwrap_or(0) <= (1 << 20) * holder.channels.len().max(1));
            }
        }
        drop(channels);
        let pids: Vec<i32> = holder.table.all().map(|process| process.pid).collect();
        for pid in pids {
            sys::signal_group(pid, libc::SIGKILL as u32);
        }
        let start = Instant::now();
        while holder.table.running() > 0 || !holder.channels.is_empty() {
            prop_assert!(start.elapsed() < Duration::from_secs(20));
            turn(&mut holder);
        }
        prop_assert!(holder.table.all().all(|process| process.viewers.is_empty()));
    }
}
