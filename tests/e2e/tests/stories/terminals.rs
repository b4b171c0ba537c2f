//! Terminals in a guest, on a terminal of the user.

use belljar_e2e::pty::OnTerminal;
use belljar_e2e::{Sandbox, User, eventually, kill};
use rustix::process::{Pid, Signal, kill_process};

#[test]
fn terminals_in_a_guest_that_stays() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    a_shell(&sandbox);
    leaving_and_coming_back(&sandbox);
    full_screen_programs(&sandbox);
    // Nothing is left of all that.
    sandbox.says("ps", &["-q"]).is(0, "");
    ended_by_a_signal(&sandbox);
    // Somebody else stops the guest.
    let mut shell = a_busy_shell(&sandbox);
    assert_eq!(sandbox.says("stop", &[]).code(), 0);
    assert_ne!(shell.wait().code(), Some(0));
    is_left_in_order(&shell);
}

#[test]
fn terminals_that_several_look_at() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    the_last_writer_sets_the_size(&sandbox);
    a_stopped_viewer_waits_alone(&sandbox);
    keys_that_detach(&sandbox);
    // The machine below the shell is gone.
    let mut shell = a_busy_shell(&sandbox);
    let vmms = user.processes("belljar-vmm");
    assert_eq!(vmms.len(), 1);
    kill(vmms[0]);
    assert_eq!(shell.wait().code(), Some(125), "{}", shell.shown());
    shell.shows("belljar");
    assert!(shell.shown().contains(sandbox.id()), "{}", shell.shown());
    is_left_in_order(&shell);
}

fn open(sandbox: &Sandbox<'_>, arguments: &[&str], columns: u16, rows: u16) -> OnTerminal {
    OnTerminal::start(&sandbox.user().belljar(arguments), columns, rows)
}

fn a_shell(sandbox: &Sandbox<'_>) {
    let mut terminal = open(sandbox, &["shell", sandbox.id()], 90, 30);
    terminal.press(b"echo $TERM $HOME $PWD; stty size\r");
    terminal.shows("xterm-256color /root /root\r\n30 90\r\n");
    assert!(terminal.is_raw());
    // Ctrl-C and Ctrl-\ reach the program; the shell goes on.
    for (key, status) in [(&b"\x03"[..], "130"), (b"\x1c", "131")] {
        // Said by the program itself: until it runs, the keys would be for the shell, which ignores one of them.
        let line = format!("sh -c 'echo run\"\"ning {status}; exec sleep 1000'\r");
        terminal.press(line.as_bytes());
        terminal.shows(&format!("running {status}\r\n"));
        terminal.press(key);
        terminal.press(b"echo it was $?\r");
        terminal.shows(&format!("it was {status}\r\n"));
    }
    terminal.resize(70, 20);
    eventually("the new size", || {
        terminal.press(b"stty size\r");
        std::thread::sleep(std::time::Duration::from_millis(200));
        terminal.shown().contains("20 70")
    });
    terminal.press(b"exit 5\r");
    assert_eq!(terminal.wait().code(), Some(5));
    assert!(terminal.is_as_before());
}

fn leaving_and_coming_back(sandbox: &Sandbox<'_>) {
    let mut first = open(
        sandbox,
        &["exec", "-it", "--name", "work", sandbox.id(), "bash"],
        80,
        24,
    );
    first.press(b"echo be''fore\r");
    first.shows("before\r\n");
    first.press(b"\x10\x11");
    assert_eq!(first.wait().code(), Some(0));
    assert!(first.is_as_before());
    first.shows("detached");

    let mut writer = open(sandbox, &["attach", sandbox.id(), "work"], 100, 40);
    writer.shows("before");
    let mut watcher = open(
        sandbox,
        &["attach", "--read-only", sandbox.id(), "work"],
        80,
        24,
    );
    watcher.shows("before");
    watcher.press(b"echo not this\r");
    writer.press(b"echo seen by $((1 + 1)); stty size\r");
    writer.shows("seen by 2\r\n40 100\r\n");
    watcher.shows("seen by 2\r\n");
    assert!(!writer.shown().contains("not this"));
    writer.press(b"exit 4\r");
    assert_eq!(writer.wait().code(), Some(4));
    assert_eq!(watcher.wait().code(), Some(4));
    assert!(writer.is_as_before() && watcher.is_as_before());
}

fn full_screen_programs(sandbox: &Sandbox<'_>) {
    let mut editor = open(
        sandbox,
        &[
            "exec",
            "-it",
            "--name",
            "edit",
            sandbox.id(),
            "vim",
            "/tmp/story",
        ],
        80,
        24,
    );
    editor.shows("[New");
    editor.press(b"ionce upon a time\x1b");
    editor.shows("once upon a time");
    // Left in the middle: the terminal is as before, its screen too.
    editor.press(b"\x10\x11");
    assert_eq!(editor.wait().code(), Some(0));
    assert!(editor.shown().contains("\x1b[?1049l"));
    let mut again = open(sandbox, &["attach", sandbox.id(), "edit"], 80, 24);
    again.shows("once upon a time");
    again.press(b":wq\r");
    assert_eq!(again.wait().code(), Some(0));
    assert!(again.is_as_before());
    let said = sandbox
        .user()
        .says(&["exec", sandbox.id(), "cat", "/tmp/story"]);
    said.is(0, "once upon a time\n");

    let mut top = open(sandbox, &["exec", "-it", sandbox.id(), "top"], 80, 24);
    top.shows("load average");
    top.press(b"q");
    assert_eq!(top.wait().code(), Some(0));
}

/// A shell that has switched on what must not stay on.
fn a_busy_shell(sandbox: &Sandbox<'_>) -> OnTerminal {
    let mut shell = open(sandbox, &["shell", sandbox.id()], 80, 24);
    shell.press(b"printf '\\033[?1049h\\033[?25l\\033[?1000h'; echo bu''sy\r");
    shell.shows("busy\r\n");
    assert!(shell.is_raw());
    shell
}

/// The terminal is as before: settings, screen, cursor, mouse.
#[track_caller]
fn is_left_in_order(terminal: &OnTerminal) {
    assert!(terminal.is_as_before());
    for off in ["\x1b[?1049l", "\x1b[?25h", "\x1b[?1000l"] {
        terminal.shows(off);
    }
}

fn ended_by_a_signal(sandbox: &Sandbox<'_>) {
    for (signal, status) in [(Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut shell = a_busy_shell(sandbox);
        kill_process(Pid::from_child(&shell.child), signal).unwrap();
        assert_eq!(shell.wait().code(), Some(status), "{}", shell.shown());
        is_left_in_order(&shell);
    }
    // The shells are gone with their users.
    eventually("no shell to be left", || {
        sandbox.says("ps", &["-q"]).text().is_empty()
    });
}

fn detached(sandbox: &Sandbox<'_>, name: &str, options: &[&str], command: &[&str]) {
    let mut all = vec!["exec", "-d", "-t", "--name", name];
    all.extend(options);
    all.push(sandbox.id());
    all.extend(command);
    sandbox.user().says(&all).is(0, &format!("{name}\n"));
}

fn the_last_writer_sets_the_size(sandbox: &Sandbox<'_>) {
    detached(sandbox, "both", &[], &["bash"]);
    let mut small = open(sandbox, &["attach", sandbox.id(), "both"], 60, 20);
    small.press(b"echo first $(stty size)\r");
    small.shows("first 20 60\r\n");
    let mut large = open(sandbox, &["attach", sandbox.id(), "both"], 110, 45);
    large.press(b"echo second $(stty size)\r");
    large.shows("second 45 110\r\n");
    // Each becomes the one that counts by typing.
    for _ in 0..2 {
        small.press(b"echo small $(stty size)\r");
        small.shows("small 20 60\r\n");
        large.press(b"echo large $(stty size)\r");
        large.shows("large 45 110\r\n");
        small.shows("large 45 110\r\n");
        small.press(b"clear\r");
    }
    small.press(b"exit 6\r");
    assert_eq!(small.wait().code(), Some(6));
    assert_eq!(large.wait().code(), Some(6));
    assert!(small.is_as_before() && large.is_as_before());
}

/// One whose terminal takes nothing is paused; neither the program nor another viewer is.
fn a_stopped_viewer_waits_alone(sandbox: &Sandbox<'_>) {
    detached(sandbox, "loud", &["--ring", "64K"], &["bash"]);
    let attach = ["attach", sandbox.id(), "loud"];
    let mut writer = open(sandbox, &attach, 80, 24);
    writer.press(b"echo rea''dy\r");
    writer.shows("ready\r\n");
    let mut stopped = open(
        sandbox,
        &["attach", "--read-only", sandbox.id(), "loud"],
        80,
        24,
    );
    stopped.shows("ready");
    let viewer = Pid::from_child(&stopped.child);
    kill_process(viewer, Signal::STOP).unwrap();
    writer.press(b"seq 1 200000; echo all sa''id\r");
    writer.shows("all said\r\n");
    assert!(!stopped.shown().contains("all said"));
    kill_process(viewer, Signal::CONT).unwrap();
    writer.press(b"echo aft''erwards\r");
    writer.shows("afterwards\r\n");
    // What it missed is told, and it goes on with what comes.
    stopped.shows("bytes of output are missing");
    stopped.shows("afterwards\r\n");
    writer.press(b"exit\r");
    assert_eq!(writer.wait().code(), Some(0));
    assert_eq!(stopped.wait().code(), Some(0));
    assert!(stopped.is_as_before());
}

fn keys_that_detach(sandbox: &Sandbox<'_>) {
    let said = sandbox.says("attach", &["--detach-keys", "no-such-key", "keys"]);
    assert_ne!(said.code(), 0);
    said.explains(&["no-such-key"]);
    let script = "stty raw -echo; echo be''gins; exec cat -v";
    detached(sandbox, "keys", &[], &["sh", "-c", script]);
    let with = |keys: &str| {
        let arguments = ["attach", "--detach-keys", keys, sandbox.id(), "keys"];
        let terminal = open(sandbox, &arguments, 80, 24);
        terminal.shows("begins");
        terminal
    };
    // Others than usual; the usual ones are typed.
    let mut terminal = with("ctrl-x,d");
    terminal.press(b"one\x10\x11");
    terminal.shows("one^P^Q");
    // The first of the two alone is typed as well.
    terminal.press(b"\x18e");
    terminal.shows("^Xe");
    terminal.press(b"\x18d");
    assert_eq!(terminal.wait().code(), Some(0));
    terminal.shows("detached");
    assert!(terminal.is_as_before());
    // None at all.
    let mut terminal = with("none");
    terminal.press(b"two\x10\x11");
    terminal.shows("two^P^Q");
    sandbox.says("kill", &["-s", "KILL", "keys"]).is(0, "");
    assert_eq!(terminal.wait().code(), Some(137));
    assert!(terminal.is_as_before());
}
