//! The API over real sockets, with a scripted machine behind it.
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;
use crate::config::{MachineConfig, VmConfig};
use crate::metrics::Registry;

struct Bench {
    dir: tempfile::TempDir,
    commands: CommandReceiver,
    published: Arc<Published>,
    stops: Arc<AtomicUsize>,
    api: Option<ApiHandle>,
}

fn bench_with(options: ServerOptions) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let (sender, commands) = channel().unwrap();
    let published = Arc::new(Published::new("box".into()));
    let stops = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&stops);
    let api = ApiServer::bind(&dir.path().join("api.sock"))
        .unwrap()
        .start(
            sender,
            Arc::clone(&published),
            &Registry::default(),
            Box::new(move || {
                counter.fetch_add(1, Ordering::SeqCst);
            }),
            options,
        )
        .unwrap();
    Bench {
        dir,
        commands,
        published,
        stops,
        api: Some(api),
    }
}

fn bench() -> Bench {
    bench_with(ServerOptions::default())
}

impl Bench {
    fn path(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        stream
    }

    /// The next command, as the machine's event loop would get it.
    fn command(&self) -> Command {
        loop {
            let mut fds = [PollFd::new(&self.commands, PollFlags::IN)];
            let limit = Timespec {
                tv_sec: 20,
                tv_nsec: 0,
            };
            assert!(poll(&mut fds, Some(&limit)).unwrap() > 0, "no command came");
            if let Some(command) = self.commands.next_command() {
                return command;
            }
        }
    }
}

fn request(method: &str, path: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Status and body of one answer.
fn read_answer(stream: &mut UnixStream) -> (u16, String) {
    let mut head = Vec::new();
    let mut byte = [0u8; 1];
    while !head.ends_with(b"\r\n\r\n") {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "closed after {head:?}");
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head
        .lines()
        .find_map(|l| l.strip_prefix("Content-Length: "))
        .map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (status, String::from_utf8(body).unwrap())
}

fn call(stream: &mut UnixStream, method: &str, path: &str, body: &str) -> (u16, String) {
    stream
        .write_all(request(method, path, body).as_bytes())
        .unwrap();
    read_answer(stream)
}

fn is_closed(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => rest.is_empty(),
        Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn published_things_are_answered_without_the_machine() {
    let bench = bench();
    let mut client = bench.connect();
    let (status, body) = call(&mut client, "GET", "/", "");
    assert_eq!(status, 200);
    assert!(body.contains(r#""state":"Not started""#) && body.contains(r#""id":"box""#));
    let (_, body) = call(&mut client, "GET", "/version", "");
    assert!(body.contains("firecracker_version"));
    bench.published.set_state(InstanceState::Paused);
    bench.published.set_config(&VmConfig {
        machine_config: MachineConfig {
            vcpu_count: 7,
            ..MachineConfig::default()
        },
        ..VmConfig::default()
    });
    let (_, body) = call(&mut client, "GET", "/", "");
    assert!(body.contains(r#""state":"Paused""#));
    let (_, body) = call(&mut client, "GET", "/machine-config", "");
    assert!(
        body.starts_with(r#"{"vcpu_count":7,"mem_size_mib":128"#),
        "{body}"
    );
    let (_, body) = call(&mut client, "GET", "/vm/config", "");
    assert!(body.contains(r#""machine-config":{"vcpu_count":7"#));
}

#[test]
fn commands_travel_to_the_machine_and_back() {
    let bench = bench();
    let mut client = bench.connect();
    client
        .write_all(request("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"/v"}"#).as_bytes())
        .unwrap();
    let command = bench.command();
    assert!(matches!(command.request, Request::PutVsock(_)));
    command.reply.send(Ok(Body::Empty));
    assert_eq!(read_answer(&mut client), (204, String::new()));
    client
        .write_all(request("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"/v"}"#).as_bytes())
        .unwrap();
    bench.command().reply.send(Err(Fault::new("too \"late\"")));
    assert_eq!(
        read_answer(&mut client),
        (400, r#"{"fault_message":"too \"late\""}"#.to_owned())
    );
}

#[test]
fn a_stuck_machine_does_not_stop_the_api() {
    let bench = bench_with(ServerOptions {
        answer_within: Duration::from_millis(200),
        ..ServerOptions::default()
    });
    let mut stuck = bench.connect();
    stuck
        .write_all(request("PATCH", "/vm", r#"{"state":"Paused"}"#).as_bytes())
        .unwrap();
    let command = bench.command();
    let mut other = bench.connect();
    assert_eq!(call(&mut other, "GET", "/", "").0, 200);
    let (status, body) = read_answer(&mut stuck);
    assert_eq!(status, 504);
    assert!(body.contains("has not answered for"), "{body}");
    // The late answer goes nowhere, above all not to the next call of that client.
    command.reply.send(Err(Fault::new("late")));
    assert_eq!(call(&mut stuck, "GET", "/", "").0, 200);
    assert_eq!(
        call(&mut stuck, "PUT", "/actions", r#"{"action_type":"Stop"}"#).0,
        204
    );
    let deadline = Instant::now() + Duration::from_secs(10);
    while bench.stops.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!bench.path().exists());
}

#[test]
fn dropped_commands_and_a_gone_machine_are_answered() {
    let mut bench = bench();
    let mut client = bench.connect();
    let pause = request("PATCH", "/vm", r#"{"state":"Paused"}"#);
    client.write_all(pause.as_bytes()).unwrap();
    drop(bench.command());
    assert!(read_answer(&mut client).1.contains("ended before"));
    bench.commands = channel().unwrap().1;
    client.write_all(pause.as_bytes()).unwrap();
    assert!(read_answer(&mut client).1.contains("ended before"));
}

#[test]
fn faults_keep_the_connection_unless_http_is_broken() {
    let bench = bench();
    let mut client = bench.connect();
    for (method, path, body, part) in [
        (
            "GET",
            "/nothing",
            "",
            "Invalid request method and/or path: GET /nothing.",
        ),
        ("PUT", "/vsock", "", "Empty PUT request."),
        ("GET", "/", "x", "GET request cannot have a body."),
        ("PUT", "/vsock", "{", "json body"),
        (
            "PUT",
            "/vsock",
            r#"{"guest_cid":3,"uds_path":"v","cid":1}"#,
            "cid",
        ),
        ("PUT", "/snapshot/load", "{}", "snapshot_path"),
        ("PUT", "/snapshot/mend", "{}", "/snapshot/mend"),
        ("GET", "/mmds", "", "/mmds: not offered"),
        (
            "PUT",
            "/network-interfaces/eth0",
            "{}",
            "/network-interfaces",
        ),
    ] {
        let (status, answer) = call(&mut client, method, path, body);
        assert_eq!(status, 400);
        assert!(answer.contains(part), "{answer}");
    }
    let (status, _) = call(&mut client, "DELETE", "/", "");
    assert_eq!(status, 400);
    assert!(is_closed(&mut client));
}

#[test]
fn a_huge_body_is_refused_while_it_is_still_being_sent() {
    let bench = bench();
    let mut client = bench.connect();
    let body = "x".repeat(300_000);
    let (status, answer) = call(&mut client, "PUT", "/vsock", &body);
    assert_eq!(status, 413);
    assert!(answer.contains("300000"));
    assert!(is_closed(&mut client));
}

#[test]
fn garbage_is_answered_and_closed() {
    let bench = bench();
    let mut client = bench.connect();
    client.write_all(b"\x16\x03\x01\x00\x00\r\n\r\n").unwrap();
    assert_eq!(read_answer(&mut client).0, 400);
    assert!(is_closed(&mut client));
    assert_eq!(call(&mut bench.connect(), "GET", "/", "").0, 200);
}

#[test]
fn requests_in_pieces_and_in_one_piece() {
    let bench = bench();
    let mut client = bench.connect();
    for byte in b"GET / HTTP/1.1\r\n\r\n" {
        client.write_all(&[*byte]).unwrap();
    }
    assert_eq!(read_answer(&mut client).0, 200);
    let many = "GET / HTTP/1.1\r\n\r\n".repeat(100);
    client.write_all(many.as_bytes()).unwrap();
    for _ in 0..100 {
        assert_eq!(read_answer(&mut client).0, 200);
    }
}

#[test]
fn a_client_that_waits_for_continue_gets_it() {
    let bench = bench();
    let mut client = bench.connect();
    client
        .write_all(b"PUT /vsock HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        .unwrap();
    assert_eq!(read_answer(&mut client).0, 100);
    client.write_all(b"{}").unwrap();
    assert_eq!(read_answer(&mut client).0, 400);
}

#[test]
fn half_closed_clients_get_their_answer() {
    let bench = bench();
    let mut client = bench.connect();
    client
        .write_all(request("PATCH", "/vm", r#"{"state":"Paused"}"#).as_bytes())
        .unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    bench.command().reply.send(Ok(Body::Empty));
    assert_eq!(read_answer(&mut client).0, 204);
    assert!(is_closed(&mut client));
}

#[test]
fn the_longest_idle_connection_makes_room() {
    let bench = bench();
    let mut first = bench.connect();
    assert_eq!(call(&mut first, "GET", "/", "").0, 200);
    let mut others: Vec<UnixStream> = (0..16).map(|_| bench.connect()).collect();
    for other in &mut others {
        assert_eq!(call(other, "GET", "/", "").0, 200);
    }
    assert!(is_closed(&mut first));
}

#[test]
fn connections_that_wait_for_an_answer_are_not_dropped() {
    let bench = bench();
    let mut waiting: Vec<UnixStream> = (0..16).map(|_| bench.connect()).collect();
    let mut commands = Vec::new();
    for client in &mut waiting {
        client
            .write_all(request("PATCH", "/vm", r#"{"state":"Paused"}"#).as_bytes())
            .unwrap();
        commands.push(bench.command());
    }
    assert_eq!(read_answer(&mut bench.connect()).0, 503);
    for command in commands {
        command.reply.send(Ok(Body::Empty));
    }
    for client in &mut waiting {
        assert_eq!(read_answer(client).0, 204);
    }
}

/// Sends `text` with `count` descriptors of /dev/null-like pipes' read ends.
fn send_with_fds(client: &UnixStream, text: &str, fds: &[std::fs::File]) {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
    let sent = sendmsg(
        client,
        &[IoSlice::new(text.as_bytes())],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    assert_eq!(sent, text.len());
}

fn with_fds_header(names: &str, body: &str) -> String {
    format!(
        "PUT /boot-source HTTP/1.1\r\nBelljar-Fds: {names}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

const KERNEL: &str = r#"{"kernel_image_path":"fd:k"}"#;

#[test]
fn descriptors_arrive_by_name() {
    let bench = bench();
    let mut client = bench.connect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"kernel").unwrap();
    let other = tempfile::tempfile().unwrap();
    send_with_fds(&client, &with_fds_header("other,k", KERNEL), &[other, file]);
    let command = bench.command();
    let mut configurator = Configurator::default();
    configurator.add_descriptors(command.fds).unwrap();
    assert_eq!(
        configurator.apply(command.request.clone()),
        Ok(Effect::Done)
    );
    let Request::PutBootSource(boot) = command.request else {
        panic!()
    };
    let file = configurator
        .descriptors()
        .open(
            "kernel_image_path",
            &boot.kernel_image_path,
            crate::config::Expect::ReadFile,
        )
        .unwrap();
    assert_eq!(file.metadata().unwrap().len(), 6);
    command.reply.send(Ok(Body::Empty));
    assert_eq!(read_answer(&mut client).0, 204);
}

#[test]
fn descriptors_that_are_not_named_are_closed() {
    let bench = bench();
    for (names, count) in [("k", 0usize), ("k", 2), ("a,b", 1)] {
        let mut client = bench.connect();
        let (reader, writer) = std::io::pipe().unwrap();
        let files: Vec<std::fs::File> = (0..count)
            .map(|_| std::os::fd::OwnedFd::from(writer.try_clone().unwrap()).into())
            .collect();
        send_with_fds(&client, &with_fds_header(names, KERNEL), &files);
        let (status, answer) = read_answer(&mut client);
        assert_eq!(status, 400);
        assert!(answer.contains("Belljar-Fds names"), "{answer}");
        // The pipe ends only when the server has closed its copies.
        drop((writer, files));
        let mut rest = Vec::new();
        { reader }.read_to_end(&mut rest).unwrap();
    }
    let client = bench.connect();
    let many: Vec<std::fs::File> = (0..33).map(|_| tempfile::tempfile().unwrap()).collect();
    send_with_fds(&client, &with_fds_header("k", KERNEL), &many);
    let (status, answer) = read_answer(&mut { client });
    assert_eq!(status, 400);
    assert!(answer.contains("at most 32"), "{answer}");
}

#[test]
fn bind_errors_say_what_to_do() {
    let bench = bench();
    let message = |path: &std::path::Path| ApiServer::bind(path).unwrap_err().to_string();
    assert!(message(&bench.path()).contains("another process listens there"));
    let stale = bench.dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(message(&stale).contains("rm "));
    let file = bench.dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(message(&file).contains("no socket"));
    let long = bench.dir.path().join("x".repeat(108));
    assert!(message(&long).contains("at most 107"));
    assert!(message(&bench.dir.path().join("no/such")).contains("No such file"));
}

#[test]
fn the_socket_file_goes_with_the_server_but_not_its_successors() {
    let mut first = bench();
    let path = first.path();
    assert!(path.exists());
    std::fs::remove_file(&path).unwrap();
    let second = ApiServer::bind(&path).unwrap();
    first.api.take().unwrap().shutdown();
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
}

#[test]
fn a_listening_descriptor_can_be_handed_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let stream = UnixStream::pair().unwrap().0;
    assert!(ApiServer::from_descriptor("s", stream.into()).is_err());
    let (sender, _commands) = channel().unwrap();
    let _api = ApiServer::from_descriptor("s", listener.into())
        .unwrap()
        .start(
            sender,
            Arc::new(Published::new("x".into())),
            &Registry::default(),
            Box::new(|| {}),
            ServerOptions::default(),
        )
        .unwrap();
    assert_eq!(
        call(&mut UnixStream::connect(&path).unwrap(), "GET", "/", "").0,
        200
    );
}

/// A guest can take all descriptors through its vsock.
#[test]
fn without_descriptors_the_api_rests_instead_of_spinning() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    use rustix::time::{ClockId, clock_gettime};
    const CHILD: &str = "BELLJAR_TEST_FEW_DESCRIPTORS";
    const NAME: &str = "api::tests::without_descriptors_the_api_rests_instead_of_spinning";
    if std::env::var_os(CHILD).is_none() {
        // The limit is the process's, and other tests must not meet it.
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME])
            .env(CHILD, "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let bench = bench();
    // A client that waits for its answer cannot be dropped to make room.
    let mut waiting = bench.connect();
    let put = request("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"/v"}"#);
    waiting.write_all(put.as_bytes()).unwrap();
    let command = bench.command();
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = Some(64);
    setrlimit(Resource::Nofile, limit).unwrap();
    let mut hoard = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        hoard.push(file);
    }
    hoard.pop();
    let mut late = bench.connect();
    late.write_all(request("GET", "/", "").as_bytes()).unwrap();

    let spent = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        Duration::new(
            u64::try_from(time.tv_sec).unwrap(),
            u32::try_from(time.tv_nsec).unwrap(),
        )
    };
    let before = spent();
    std::thread::sleep(Duration::from_millis(500));
    let burnt = spent() - before;
    assert!(burnt < Duration::from_millis(100), "{burnt:?}");

    hoard.clear();
    assert_eq!(read_answer(&mut late).0, 200);
    command.reply.send(Ok(Body::Empty));
    assert_eq!(read_answer(&mut waiting).0, 204);
}
