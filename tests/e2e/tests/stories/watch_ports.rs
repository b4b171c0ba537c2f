//! Ports of a guest, waiting for them and for other things, and watching its files.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use belljar_e2e::{PATIENCE, Running, Sandbox, User, eventually};
use serde_json::Value;

/// Reads to the end of what is sent, then answers; `%` is the socket.
const ANSWERER: &str = "\
import socket\n%\ns.listen()\nwhile True:\n c, _ = s.accept()\n got = b''\n \
while data := c.recv(65536): got += data\n c.sendall(b'got %d bytes' % len(got))\n c.close()\n";

/// Files that a watch has to tell of.
const FILES: usize = 5_000;

/// Starts a program in the guest that goes on by itself.
fn background(sandbox: &Sandbox<'_>, name: &str, words: &[&str]) {
    let mut all = vec!["exec", "-d", "--name", name, sandbox.id()];
    all.extend(words);
    let said = sandbox.user().says(&all);
    assert_eq!(said.code(), 0, "{}", said.err);
}

fn inside(sandbox: &Sandbox<'_>, script: &str) -> String {
    let said = sandbox.says("exec", &["sh", "-c", script]);
    assert_eq!(said.code(), 0, "{script}: {}", said.err);
    said.text().trim().to_owned()
}

fn documents(running: &Running) -> Vec<Value> {
    let text = String::from_utf8(running.out_so_far()).unwrap();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// `belljar port BOX WHAT` under way, and where it listens.
fn forward(sandbox: &Sandbox<'_>, what: &str) -> (Running, String) {
    let running = sandbox.start("port", &[what]);
    eventually("the address to be printed", || {
        !documents(&running).is_empty()
    });
    let listen = documents(&running)[0]["listen"]
        .as_str()
        .unwrap()
        .to_owned();
    (running, listen)
}

/// Sends, ends its side, and hears all that comes back.
fn ask(address: &str, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(question)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn ended(running: Running) {
    running.signal(rustix::process::Signal::INT);
    assert_eq!(running.wait().code(), 0);
}

#[test]
fn ports_are_reached_listed_and_waited_for() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    sandbox.says("port", &["-o", "json"]).is(0, "[]\n");

    // Not yet, and in time.
    let said = sandbox.says("wait", &["--port", "8000", "--timeout", "200ms"]);
    assert_eq!(said.code(), 124);
    said.explains(&["nothing listens on port 8000"]);
    let waiting = sandbox.start("wait", &["--http", "8000/", "--status", "200"]);
    background(
        &sandbox,
        "web",
        &[
            "python3",
            "-u",
            "-m",
            "http.server",
            "-b",
            "127.0.0.1",
            "8000",
        ],
    );
    sandbox
        .says("wait", &["--output", "web", "^Serving HTTP"])
        .is(0, "");
    sandbox.says("wait", &["--port", "8000"]).is(0, "");
    assert_eq!(waiting.wait().code(), 0);
    let said = sandbox.says("wait", &["--http", "8000/none", "--timeout", "3s"]);
    assert_eq!(said.code(), 124);
    said.explains(&["status 404"]);
    sandbox
        .says("wait", &["--http", "8000/none", "--status", "400-499"])
        .is(0, "");
    let ports: Value = serde_json::from_slice(&sandbox.says("port", &["-o", "json"]).out).unwrap();
    assert_eq!(ports[0]["port"], 8000);
    assert_eq!(ports[0]["address"], "127.0.0.1");
    assert!(
        ports[0]["program"].as_str().unwrap().starts_with("python3"),
        "{ports}"
    );

    // The loopback of the guest from this machine.
    let (running, address) = forward(&sandbox, "0:8000");
    let answer = ask(&address, b"GET / HTTP/1.0\r\n\r\n").unwrap();
    assert!(answer.starts_with(b"HTTP/1.0 200 OK"));
    ended(running);
    assert!(TcpStream::connect(&address).is_err());

    // Each side may end first; Unix sockets with and without a path.
    for (name, socket, target) in [
        ("tcp", "s = socket.create_server(('127.0.0.1', 7))", "0:7"),
        (
            "path",
            "s = socket.socket(socket.AF_UNIX); s.bind('/run/x.sock')",
            "0:/run/x.sock",
        ),
        (
            "abstract",
            "s = socket.socket(socket.AF_UNIX); s.bind('\\0name')",
            "0:@name",
        ),
    ] {
        background(
            &sandbox,
            name,
            &["python3", "-c", &ANSWERER.replacen('%', socket, 1)],
        );
        let (running, address) = forward(&sandbox, target);
        let question = vec![b'q'; 3_000_000];
        let start = Instant::now();
        // It may not listen yet; then the connection is reset, and that is told.
        let answer = loop {
            match ask(&address, &question) {
                Ok(answer) if !answer.is_empty() => break answer,
                _ => assert!(start.elapsed() < PATIENCE),
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        assert_eq!(
            String::from_utf8(answer).unwrap(),
            "got 3000000 bytes",
            "{name}"
        );
        ended(running);
    }
    // Another address of the guest than its loopback's first one.
    let socket = "s = socket.create_server(('127.0.0.2', 7))";
    background(
        &sandbox,
        "second",
        &["python3", "-c", &ANSWERER.replacen('%', socket, 1)],
    );
    let (running, address) = forward(&sandbox, "0:127.0.0.2:7");
    eventually("the answer of the other address", || {
        ask(&address, b"who?").is_ok_and(|answer| answer == b"got 4 bytes")
    });
    ended(running);
    let (running, address) = forward(&sandbox, "0:127.0.0.3:7");
    assert!(ask(&address, b"who?").is_err());
    running.signal(rustix::process::Signal::INT);
    running.wait().explains(&["127.0.0.3:7", "refused"]);
    let (running, address) = forward(&sandbox, "0:9");
    assert!(ask(&address, b"anybody?").is_err());
    running.signal(rustix::process::Signal::INT);
    let said = running.wait();
    said.explains(&["connecting to 127.0.0.1:9", "refused"]);
    let said = sandbox.says("port", &["1.2.3.4.5:80"]);
    assert_eq!(said.code(), 125);

    // The other way, by the convention of the vsock socket's name.
    let listener = UnixListener::bind(sandbox.dir().join("v.sock_5000")).unwrap();
    background(
        &sandbox,
        "caller",
        &[
            "python3",
            "-c",
            "import socket\ns = socket.socket(socket.AF_VSOCK)\ns.connect((2, 5000))\ns.sendall(b'from inside')",
        ],
    );
    let mut heard = String::new();
    listener
        .accept()
        .unwrap()
        .0
        .read_to_string(&mut heard)
        .unwrap();
    assert_eq!(heard, "from inside");

    other_things_are_waited_for(&sandbox);
    a_raw_pipe(&sandbox);
    the_agent_is_for_the_host_alone(&sandbox);
}

/// Sends back what comes; says how much it was when the other side has ended its own.
const ECHO: &str = "\
import socket\ns = socket.socket(socket.AF_VSOCK)\ns.bind((socket.VMADDR_CID_ANY, 6000))\ns.listen()\n\
c, _ = s.accept()\nn = 0\nwhile data := c.recv(65536):\n n += len(data)\n c.sendall(data)\n\
c.sendall(b'end of %d' % n)\nc.close()\n";

fn a_raw_pipe(sandbox: &Sandbox<'_>) {
    let arguments = ["debug", "vsock", sandbox.id(), "6000"];
    let said = sandbox.user().says(&arguments);
    assert_eq!(said.code(), 125, "nobody listens");
    said.explains(&["6000"]);
    background(sandbox, "echo", &["python3", "-c", ECHO]);
    let begin = Instant::now();
    let every: Vec<u8> = (0..=255).cycle().take(500_000).collect();
    loop {
        let mut pipe = Running::start(&mut sandbox.user().belljar(&arguments));
        let mut stdin = pipe.child.stdin.take().unwrap();
        // It may not listen yet.
        if stdin.write_all(&every).is_err() {
            assert_eq!(pipe.wait().code(), 125);
            assert!(begin.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(100));
            continue;
        }
        // Bytes go both ways while both are open.
        eventually("all of it to come back", || {
            pipe.out_so_far().len() == every.len()
        });
        drop(stdin);
        let said = pipe.wait();
        assert_eq!((said.code(), said.err.as_str()), (0, ""));
        assert!(said.out.starts_with(&every));
        assert_eq!(&said.out[every.len()..], b"end of 500000");
        break;
    }
}

/// Tries to reach the agent from within, and the host where nobody listens.
const TRIES: &str = "\
import fcntl, socket, struct\nown = struct.unpack('I', fcntl.ioctl(open('/dev/vsock'), \
socket.IOCTL_VM_SOCKETS_GET_LOCAL_CID, b'    '))[0]\n\
for cid, port in (own, 1024), (2, 4321), (2, 1024):\n \
s = socket.socket(socket.AF_VSOCK)\n s.settimeout(60)\n try:\n  s.connect((cid, port))\n  \
got = s.recv(100)\n  print('closed' if got == b'' else got)\n \
except TimeoutError: print('hangs')\n except OSError: print('closed')\n";

fn the_agent_is_for_the_host_alone(sandbox: &Sandbox<'_>) {
    let said = sandbox.says("exec", &["python3", "-c", TRIES]);
    said.is(0, "closed\nclosed\nclosed\n");
    sandbox.says("exec", &["echo", "well"]).is(0, "well\n");
}

fn other_things_are_waited_for(sandbox: &Sandbox<'_>) {
    let said = sandbox.says("wait", &["--file", "/run/ready", "-t", "100ms"]);
    assert_eq!(said.code(), 124);
    let waiting = sandbox.start("wait", &["--file", "/run/ready"]);
    let never = sandbox.start("wait", &["--output", "brief", "never said"]);
    assert_eq!(never.wait().code(), 125, "there is no such process yet");
    background(
        sandbox,
        "brief",
        &["sh", "-c", "sleep 0.5; touch /run/ready; exit 7"],
    );
    assert_eq!(waiting.wait().code(), 0);
    assert_eq!(
        sandbox
            .says("wait", &["--output", "brief", "never said"])
            .code(),
        1
    );
    sandbox.says("wait", &["--end", "brief"]).is(0, "7\n");
    let said = sandbox.says("wait", &["--end", "web", "--timeout", "100ms"]);
    assert_eq!(said.code(), 124);
    let said = sandbox.says("wait", &["--output", "nothing", "x"]);
    assert_eq!(said.code(), 125);
    said.explains(&["no such process", "belljar ps -a"]);
    let said = sandbox.says("wait", &["--output", "web", "("]);
    assert_eq!(said.code(), 125);
    said.explains(&["pattern"]);
}

/// `EVENT PATH`, as told so far.
fn told(running: &Running) -> Vec<String> {
    let word = |document: &Value, key: &str| document[key].as_str().unwrap_or("").to_owned();
    let all = documents(running);
    all.iter()
        .map(|event| {
            let to = word(event, "to");
            let line = format!("{} {} {to}", word(event, "event"), word(event, "path"));
            line.trim_end().to_owned()
        })
        .collect()
}

#[test]
fn a_tree_is_watched_whatever_happens_to_the_agent() {
    let user = User::new();
    let sandbox = user.sandbox(&["--memory", "512M"]);
    let said = sandbox.says("watch", &["/no/such/tree"]);
    assert_eq!(said.code(), 125);
    said.explains(&["/no/such/tree", "No such file"]);

    inside(
        &sandbox,
        "mkdir -p /tmp/tree/a /root/w; echo x > /tmp/tree/a/old",
    );
    // It is piped here.
    let watch = sandbox.start("watch", &["/tmp/tree", "-r"]);
    let has = |event: &str| eventually(event, || told(&watch).iter().any(|line| line == event));
    // It says nothing when it is ready: the first sign of it is the first event.
    eventually("the watch to be set", || {
        inside(&sandbox, "mkdir /tmp/tree/s; rmdir /tmp/tree/s");
        !documents(&watch).is_empty()
    });
    inside(
        &sandbox,
        "cd /tmp/tree; mkdir -p n/e/w; echo y > n/e/w/file; mv a/old n/older; chmod 600 n/older; rm n/older",
    );
    has("created n/e/w/file");
    has("changed n/e/w/file");
    has("moved a/old n/older");
    has("attributes n/older");
    has("removed n/older");
    inside(&sandbox, "mkdir \"$(printf '/tmp/tree/\\377')\"");
    eventually("a name that is no text", || {
        let all = documents(&watch);
        all.iter()
            .any(|event| event["path_bytes"] == serde_json::json!([255]))
    });

    // After a break it goes on where it was.
    let last = documents(&watch).last().unwrap().clone();
    let cursor = format!(
        "{}:{}",
        last["watch"].as_str().unwrap(),
        last["sequence"].as_u64().unwrap() + 1
    );
    ended_by_signal(watch);
    inside(&sandbox, "mkdir /tmp/tree/meanwhile");
    let watch = sandbox.start("watch", &["/tmp/tree", "-r", "--json", "--from", &cursor]);
    let has = |event: &str| eventually(event, || told(&watch).iter().any(|line| line == event));
    has("created meanwhile");
    assert_eq!(told(&watch)[0], "created meanwhile");

    // Many files at once.
    let script = format!(
        "import os\nfor d in range({FILES} // 1000):\n os.mkdir(f'/tmp/tree/{{d}}')\n for f in range(999):\n  \
         os.close(os.open(f'/tmp/tree/{{d}}/{{f}}', os.O_CREAT))\nos.mkdir('/tmp/tree/end')"
    );
    assert_eq!(sandbox.says("exec", &["python3", "-c", &script]).code(), 0);
    has("created end");
    let all = told(&watch);
    let created = all
        .iter()
        .filter(|line| line.starts_with("created"))
        .count();
    assert!(!all.iter().any(|line| line.starts_with("overflow")));
    assert_eq!(created, FILES + 2);

    // A worker that is replaced knows nothing of it: that is told, and it goes on.
    background(
        &sandbox,
        "killer",
        &["sh", "-c", "kill -9 $(pgrep -f -- '--worker$')"],
    );
    has("overflow");
    inside(&sandbox, "mkdir /tmp/tree/afterwards");
    has("created afterwards");

    inside(&sandbox, "rm -r /tmp/tree");
    let said = watch.wait();
    assert_eq!(said.code(), 0);
    said.explains(&["is gone"]);

    more_than_is_kept(&sandbox);

    // A line for people; a file in the root's own file system; the sandbox's end.
    let watch = sandbox.start("watch", &["/root/w", "-o", "table"]);
    eventually("a line", || {
        inside(&sandbox, "rm -f /root/w/x; : > /root/w/x");
        String::from_utf8_lossy(&watch.out_so_far()).contains("created     x\n")
    });
    assert_eq!(sandbox.says("stop", &[]).code(), 0);
    assert_eq!(watch.wait().code(), 125);
}

/// Many events with long paths while nobody reads: what is lost is told, and then it goes on.
fn more_than_is_kept(sandbox: &Sandbox<'_>) {
    inside(sandbox, "mkdir /tmp/deep");
    let watch = sandbox.start("watch", &["/tmp/deep", "-r", "--json"]);
    eventually("the watch to be set", || {
        inside(sandbox, "mkdir /tmp/deep/s; rmdir /tmp/deep/s");
        !documents(&watch).is_empty()
    });
    let last = documents(&watch).last().unwrap().clone();
    ended_by_signal(watch);
    let next = last["sequence"].as_u64().unwrap() + 1;
    let cursor = format!("{}:{next}", last["watch"].as_str().unwrap());
    let script = "import os\nos.chdir('/tmp/deep')\nfor _ in range(12):\n os.mkdir('d' * 250)\n os.chdir('d' * 250)\n\
        for f in range(3000):\n os.close(os.open(str(f), os.O_CREAT))\nos.mkdir('/tmp/deep/end')";
    assert_eq!(sandbox.says("exec", &["python3", "-c", script]).code(), 0);
    let watch = sandbox.start("watch", &["/tmp/deep", "-r", "--json", "--from", &cursor]);
    eventually("the last event", || {
        told(&watch).iter().any(|line| line == "created end")
    });
    let all = told(&watch);
    assert!(all[0].starts_with("overflow"), "{}", all[0]);
    ended_by_signal(watch);
    let events = sandbox.says("events", &["-o", "json"]);
    assert!(
        events.text().contains("\"watch_overflow\""),
        "{}",
        events.text()
    );
}

fn ended_by_signal(running: Running) {
    running.signal(rustix::process::Signal::KILL);
    assert_eq!(running.wait().code(), -1);
}
