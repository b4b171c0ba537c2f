//! Sandboxes that outlive the command that made them.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use belljar_e2e::pty::OnTerminal;
use belljar_e2e::{Running, Said, User, eventually, kill};
use serde_json::Value;

fn json(said: &Said) -> Value {
    assert_eq!(said.code(), 0, "{}", said.err);
    serde_json::from_slice(&said.out).unwrap_or_else(|error| panic!("{error}: {}", said.text()))
}

/// What `inspect` says about one sandbox.
fn inspected(user: &User, word: &str) -> Value {
    json(&user.says(&["inspect", word]))[0].clone()
}

fn state(user: &User, word: &str) -> String {
    inspected(user, word)["state"].as_str().unwrap().to_owned()
}

#[test]
fn a_detached_guest_stays_until_it_is_removed() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    let id_line = format!("{}\n", sandbox.id());
    assert_eq!(sandbox.state(), "running");
    user.says(&["ls", "-q"]).is(0, &id_line);

    // Not while it runs, unless it is meant.
    let said = sandbox.says("rm", &[]);
    assert_eq!(said.code(), 125);
    said.explains(&["is running", "rm -f"]);

    sandbox.says("pause", &[]).is(0, &id_line);
    assert_eq!(sandbox.state(), "paused");
    let said = sandbox.says("debug", &[]);
    assert_eq!(said.code(), 125, "debug wants to know what");
    let said = user.says(&["debug", "state", sandbox.id()]);
    assert_eq!(said.code(), 1);
    assert!(said.text().contains("it is paused"), "{}", said.text());
    sandbox.says("resume", &[]).is(0, &id_line);
    assert_eq!(sandbox.state(), "running");

    // It goes away with its guest, which is asked; so there is nothing to start again.
    let said = sandbox.says("restart", &[]);
    assert_eq!(said.code(), 125);
    said.explains(&["goes away with its guest", "run --name"]);
    assert_eq!(sandbox.state(), "running");
    let said = sandbox.says("stop", &[]);
    said.is(0, &id_line);
    assert_eq!(said.err, "");
    user.has_nothing_left();
}

#[test]
fn a_persistent_sandbox_is_made_started_stopped_and_started_again() {
    let user = User::new();
    // A size that nobody has used before.
    let said = user.says(&[
        "create",
        "--name",
        "web-front",
        "-l",
        "team=web",
        "--disk",
        "96M",
        "--memory",
        "192M",
    ]);
    assert_eq!(said.code(), 0, "{}", said.err);
    let id = said.text().trim().to_owned();
    assert_eq!(state(&user, "web-front"), "created");
    user.says(&["ls", "-q"]).is(0, "");
    user.says(&["ls", "-qa", "-l", "team=web"])
        .is(0, &format!("{id}\n"));
    user.says(&["ls", "-qa", "-l", "team=data"]).is(0, "");
    let said = user.says(&["create", "--name", "web-front"]);
    assert_eq!(said.code(), 125);
    said.explains(&["'web-front' is taken", &id]);
    let said = user.says(&["debug", "vsock", "web", "1024"]);
    assert_eq!(said.code(), 125);
    said.explains(&["not running: it is created", "belljar start"]);

    // Of two at once one wins.
    let starts = [(); 2].map(|()| Running::start(&mut user.belljar(&["start", "web"])));
    let said = starts.map(Running::wait);
    let mut codes = said.each_ref().map(Said::code);
    codes.sort_unstable();
    assert_eq!(codes, [0, 125], "{said:?}");
    let loser = said.iter().find(|said| said.code() == 125).unwrap();
    assert!(
        loser.err.contains("already") || loser.err.contains("somebody else"),
        "{}",
        loser.err
    );

    let seen = inspected(&user, "web-f");
    assert_eq!(seen["state"], "running");
    assert_eq!(seen["config"]["disk"], 96 << 20);
    assert!(
        seen["boot"]["stages"].as_array().unwrap().len() > 4,
        "{seen}"
    );
    assert!(seen["sockets"]["control"].is_string(), "{seen}");
    assert!(
        seen["cpu_time"]["vcpus_us"][0].as_u64().unwrap() > 0,
        "{seen}"
    );
    assert!(seen["resident"].as_u64().unwrap() > 10 << 20, "{seen}");

    let said = user.says(&["stop", "web"]);
    said.is(0, &format!("{id}\n"));
    let seen = inspected(&user, &id);
    assert_eq!(seen["state"], "stopped");
    assert_eq!(seen["ended"]["meaning"]["kind"], "powered-off");
    assert_eq!(user.processes(""), [] as [i32; 0]);

    let said = user.says(&["start", "-v", "web"]);
    said.is(0, &format!("{id}\n"));
    said.explains(&["agent ready"]);
    let said = user.says(&["rm", "--all"]);
    said.is(0, "");
    user.says(&["rm", "-f", "-l", "team=web"])
        .is(0, &format!("{id}\n"));
    let said = user.says(&["inspect", "web-fornt"]);
    assert_eq!(said.code(), 125);
    said.explains(&["there is no sandbox"]);
    user.has_nothing_left();
}

#[test]
fn what_a_crash_or_a_reboot_did_to_a_persistent_sandbox_is_told_and_survived() {
    let user = User::new();
    let said = user.says(&["run", "-d", "--name", "box"]);
    assert_eq!(said.code(), 0, "{}", said.err);

    // The supervisor is killed, and the VMM dies with it.
    kill(user.processes("belljar-supervisor")[0]);
    eventually("the crash to be seen", || state(&user, "box") == "crashed");
    let listed = user.says(&["ls", "-o", "table"]).text();
    assert!(
        listed.contains("crashed") && listed.contains("its supervisor was killed"),
        "{listed}"
    );
    // Cleaning does not remove what was made to stay.
    let said = user.says(&["doctor", "--clean", "-o", "table"]);
    assert_eq!(said.code(), 0, "{}", said.text());
    assert!(said.text().contains("belljar start"), "{}", said.text());

    // The machine is booted again: nothing of the earlier boot lives, whatever its pids are used for now.
    let owner = user.sandboxes()[0].join("owner.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&owner).unwrap()).unwrap();
    record["boot_id"] = "an earlier one".into();
    record["vmm"]["pid"] = std::process::id().into();
    fs::write(&owner, serde_json::to_vec(&record).unwrap()).unwrap();
    let reason = inspected(&user, "box")["reason"].clone();
    assert!(
        reason.as_str().unwrap().contains("booted again"),
        "{reason}"
    );

    // It starts again, and the killed VMM of this time is on record.
    assert_eq!(user.says(&["start", "box"]).code(), 0);
    kill(user.processes("belljar-vmm")[0]);
    eventually("the end to be on record", || {
        state(&user, "box") == "stopped"
    });
    let seen = inspected(&user, "box");
    assert_eq!(seen["reason"], "the VMM was killed by SIGKILL");
    assert_eq!(user.says(&["rm", "box"]).code(), 0);

    // Half-made and half-removed ones are explained and cleaned.
    let dir = user.home().join("state/sandboxes");
    fs::create_dir_all(dir.join("0badcafe")).unwrap();
    fs::write(dir.join("0badcafe/lock"), "").unwrap();
    fs::create_dir_all(dir.join("deadbeef.removing/x")).unwrap();
    fs::write(dir.join("deadbeef.removing/lock"), "").unwrap();
    let listed = user.says(&["ls", "-o", "table"]).text();
    assert!(
        listed.contains("half-made") && listed.contains("half-removed"),
        "{listed}"
    );
    assert_eq!(user.says(&["rm", "dead"]).code(), 0);
    assert_eq!(user.says(&["doctor", "-o", "table"]).code(), 1);
    assert_eq!(user.says(&["doctor", "--clean", "-o", "table"]).code(), 0);
    user.has_nothing_left();
}

#[test]
fn a_port_stays_with_the_sandbox_and_its_disk_survives_a_stop() {
    let user = User::new();
    let said = user.says(&["run", "-d", "--name", "web"]);
    assert_eq!(said.code(), 0, "{}", said.err);
    let server = "cd /root; echo kept >page; exec python3 -c \"\
        import socket\n\
        s = socket.create_server(('127.0.0.1', 80))\n\
        while True:\n \
            c = s.accept()[0]; c.sendall(open('page', 'rb').read()); c.close()\"";
    let said = user.says(&["exec", "-d", "web", "--", "sh", "-c", server]);
    assert_eq!(said.code(), 0, "{}", said.err);
    let forwards = json(&user.says(&["port", "-d", "web", "0:80"]));
    let address = forwards[0]["listen"].as_str().unwrap().to_owned();
    let page = || {
        let mut text = String::new();
        TcpStream::connect(&address)
            .and_then(|mut stream| stream.read_to_string(&mut text))
            .map(|_| text)
            .unwrap_or_default()
    };
    // Until the server listens, connections are reset.
    eventually("the page", || page() == "kept\n");
    let listed = json(&user.says(&["port", "--forwards", "web"]));
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert!(listed[0]["total"].as_u64().unwrap() >= 1, "{listed}");
    let port = address.rsplit(':').next().unwrap();
    assert_eq!(user.says(&["port", "web", "--remove", port]).code(), 0);
    assert_eq!(page(), "");
    let said = user.says(&["port", "web", "--remove", port]);
    assert_eq!(said.code(), 125);
    said.explains(&["nothing is forwarded"]);

    // What was written is there after a stop and a start.
    assert_eq!(user.says(&["stop", "web"]).code(), 0);
    let said = user.says(&["port", "-d", "web", "0:80"]);
    assert_eq!(said.code(), 125);
    said.explains(&["not running"]);
    assert_eq!(user.says(&["start", "web"]).code(), 0);
    user.says(&["exec", "web", "--", "cat", "/root/page"])
        .is(0, "kept\n");

    // And after both in one: it is another boot, and nothing of the first one runs.
    let boot = || inspected(&user, "web")["boot"]["guest_boot_id"].clone();
    let before = boot();
    assert!(before.is_string(), "{before}");
    assert_eq!(
        user.says(&["exec", "-d", "web", "--", "sleep", "1000"])
            .code(),
        0
    );
    let said = user.says(&["restart", "web"]);
    assert_eq!((said.code(), said.err.as_str()), (0, ""));
    assert_ne!(boot(), before);
    user.says(&["exec", "web", "--", "cat", "/root/page"])
        .is(0, "kept\n");
    assert_eq!(
        json(&user.says(&["ps", "web", "-o", "json"])),
        Value::Array(Vec::new())
    );
    // One that was stopped is started.
    assert_eq!(user.says(&["stop", "web"]).code(), 0);
    assert_eq!(user.says(&["restart", "web"]).code(), 0);
    assert_eq!(state(&user, "web"), "running");
    assert_eq!(user.says(&["rm", "-f", "web"]).code(), 0);
    assert_eq!(user.says(&["restart", "web"]).code(), 125);
}

#[test]
fn a_named_run_leaves_its_disk_and_a_killed_command_line_leaves_the_guest_to_nobody() {
    let user = User::new();
    user.run(&["--name", "job", "--", "sh", "-c", "echo done; exit 3"])
        .is(3, "done\n");
    assert_eq!(state(&user, "job"), "stopped");
    assert_eq!(user.says(&["rm", "job"]).code(), 0);
    user.run(&["--rm", "--name", "job", "--", "true"]).is(0, "");
    user.has_nothing_left();

    // A persistent one whose owner is killed ends, and stays.
    let running = user.start(&["--name", "job", "--", "sh", "-c", "echo begun; sleep 1000"]);
    running.signal(rustix::process::Signal::KILL);
    let _ = running.wait();
    eventually("its end", || state(&user, "job") == "stopped");
    assert_eq!(user.says(&["rm", "job"]).code(), 0);
}

#[test]
fn a_fraction_of_a_processor_is_a_limit() {
    let user = User::new();
    let running = user.start(&[
        "--name",
        "slow",
        "--rm",
        "--cpus",
        "0.3",
        "--",
        "sh",
        "-c",
        "echo begun; while :; do :; done",
    ]);
    let ran = || {
        let seen = inspected(&user, "slow");
        assert!(seen["owner"]["cgroup"].is_string(), "{seen}");
        let times = &seen["cpu_time"];
        let vcpu = times["vcpus_us"][0].as_u64().unwrap();
        Duration::from_micros(vcpu + times["other_us"].as_u64().unwrap())
    };
    let listed = json(&user.says(&["ls", "-o", "json"]));
    assert_eq!(
        (&listed[0]["cpus"], &listed[0]["cpu_limit_milli"]),
        (&1.into(), &300.into())
    );
    let (begin, before) = (Instant::now(), ran());
    thread::sleep(Duration::from_secs(3));
    let part = (ran() - before).as_secs_f64() / begin.elapsed().as_secs_f64();
    assert!((0.01..0.4).contains(&part), "it ran {part} of the time");
    let cgroup = inspected(&user, "slow")["owner"]["cgroup"].clone();
    running.signal(rustix::process::Signal::TERM);
    let _ = running.wait();
    user.has_nothing_left();
    assert!(!fs::exists(cgroup.as_str().unwrap()).unwrap());
}

#[test]
fn a_guest_that_hangs_is_understood() {
    let user = User::new();
    // A program that stops all others, PID 1 included, which no signal could stop.
    let stopper = "import ctypes, os, signal, time\n\
        print('begun', flush=True)\n\
        time.sleep(0.3)\n\
        SEIZE, INTERRUPT, STOP = 0x4206, 0x4207, 19\n\
        for call in (SEIZE, INTERRUPT): ctypes.CDLL(None).ptrace(call, 1, 0, 0)\n\
        os.kill(-1, STOP)\n\
        console = open('/dev/hvc0', 'r+b', 0)\n\
        signal.signal(signal.SIGINT, lambda *_: console.write(b'interrupted '))\n\
        while True: console.write(b'heard ' + console.readline())";
    let running = user.start(&["--name", "hung", "--", "python3", "-c", stopper]);
    // On a machine that does other things as well that takes a moment.
    eventually("the guest to hang, and that to be understood", || {
        let said = user.says(&["debug", "state", "hung", "-o", "table"]);
        let text = said.text();
        said.code() == 1 && text.contains("processors sleep") && text.contains("vcpu0")
    });
    let log = user.says(&["debug", "log", "hung"]);
    assert!(log.text().contains("belljar-agent"), "{}", log.text());
    let said = user.says(&["debug", "api", "hung", "/machine-config"]);
    assert_eq!(json(&said)["vcpu_count"], 1);

    // The console works without the agent, both ways.
    let mut console = Running::start(&mut user.belljar(&["console", "-i", "hung"]));
    let mut keyboard = console.child.stdin.take().unwrap();
    keyboard.write_all(b"hello\n").unwrap();
    eventually("the guest to hear it", || {
        String::from_utf8_lossy(&console.out_so_far()).contains("heard hello")
    });
    console.signal(rustix::process::Signal::TERM);
    assert_eq!(console.wait().code(), 128 + 15);
    drop(keyboard);

    // On a terminal all keys go to the guest but those that leave, and the terminal is as before then.
    let mut console = OnTerminal::start(&user.belljar(&["console", "hung"]), 80, 24);
    console.shows("heard hello");
    eventually("raw mode", || console.is_raw());
    console.press(b"\x03");
    console.shows("interrupted");
    console.press(b"again\n");
    console.shows("heard again");
    console.press(b"\x1d");
    assert_eq!(console.wait().code(), Some(0), "{}", console.shown());
    assert!(console.is_as_before());

    // A VMM that somebody stopped is another matter.
    let vmm = rustix::process::Pid::from_raw(user.processes("belljar-vmm")[0]).unwrap();
    rustix::process::kill_process(vmm, rustix::process::Signal::STOP).unwrap();
    let said = user.says(&["debug", "state", "hung", "-o", "table"]);
    assert!(said.text().contains("with a signal"), "{}", said.text());
    rustix::process::kill_process(vmm, rustix::process::Signal::CONT).unwrap();

    let said = user.says(&["stop", "--time", "2s", "hung"]);
    assert_eq!(said.code(), 0, "{}", said.err);
    said.explains(&["it was killed"]);
    assert_eq!(running.wait().code(), 125);
    let said = user.says(&["console", "hung"]);
    assert_eq!(said.code(), 125);
    said.explains(&["is stopped", "last words"]);
    assert!(said.text().contains("heard hello"), "{}", said.text());
    assert_eq!(user.says(&["rm", "hung"]).code(), 0);
}
