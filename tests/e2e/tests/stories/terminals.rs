//! Terminals in a guest, on a terminal of the user.

use belljar_e2e::pty::OnTerminal;
use belljar_e2e::{Sandbox, User, eventually};

#[test]
fn terminals_in_a_guest_that_stays() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    a_shell(&sandbox);
    leaving_and_coming_back(&sandbox);
    full_screen_programs(&sandbox);
    // Nothing is left of all that.
    sandbox.says("ps", &["-q"]).is(0, "");
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
