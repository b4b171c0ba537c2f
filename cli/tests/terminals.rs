//! shell, attach and exec -it on a terminal of this machine, against an agent on this machine.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{ID, Sandbox, Terminal, eventually, text};
use rustix::process::Signal;

fn shell(sandbox: &Sandbox) -> Terminal {
    let terminal = Terminal::start(
        &sandbox.belljar(&["exec", "-it", "-e", "PS1=ready> ", ID, "sh"]),
        80,
        24,
    );
    terminal.wait_for("ready> ");
    terminal
}

#[test]
fn keys_go_to_the_guest_and_the_terminal_is_restored() {
    let sandbox = Sandbox::start();
    let mut terminal = shell(&sandbox);
    assert!(!terminal.is_cooked());
    terminal.type_in(b"echo $TERM; stty size; tty >/dev/null && echo is a terminal\r");
    terminal.wait_for("xterm-256color\r\n24 80\r\nis a terminal\r\n");
    // The program gets Ctrl-C and Ctrl-\, this end does not.
    // Not typed before the program runs: then it would only drop the line.
    terminal.type_in(b"echo run''ning; sleep 1000\r");
    terminal.wait_for("running\r\n");
    terminal.type_in(b"\x03");
    terminal.wait_for("^C");
    terminal.type_in(b"echo status $?\r");
    terminal.wait_for("status 130\r\n");
    terminal.type_in(b"echo run''ning again; sleep 1000\r");
    terminal.wait_for("running again\r\n");
    terminal.type_in(b"\x1c");
    terminal.wait_for("^\\");
    terminal.type_in(b"echo now $?\r");
    terminal.wait_for("now 131\r\n");
    terminal.type_in(b"exit 5\r");
    assert_eq!(terminal.wait(), 5);
}

#[test]
fn the_size_follows() {
    let sandbox = Sandbox::start();
    let mut terminal = shell(&sandbox);
    terminal.resize(123, 45);
    eventually("the new size", || {
        terminal.clear();
        terminal.type_in(b"stty size\r");
        std::thread::sleep(std::time::Duration::from_millis(50));
        terminal.shown().contains("45 123")
    });
    terminal.type_in(b"\x04");
    assert_eq!(terminal.wait(), 0);
}

#[test]
fn leaving_and_coming_back() {
    let sandbox = Sandbox::start();
    let mut terminal = shell(&sandbox);
    terminal.type_in(b"echo before; sleep 0.1\r");
    terminal.wait_for("\r\nbefore\r\n");
    terminal.type_in(b"\x10\x11");
    assert_eq!(terminal.wait(), 0);
    assert!(
        terminal.shown().contains("detached"),
        "{:?}",
        terminal.shown()
    );
    let id = text(&sandbox.says(&["ps", "-q", ID]).stdout)
        .trim()
        .to_owned();
    assert!(!id.is_empty());

    let mut two = Terminal::start(&sandbox.belljar(&["attach", "--replay", ID, &id]), 90, 30);
    two.wait_for("\r\nbefore\r\n");
    let three = Terminal::start(
        &sandbox.belljar(&["attach", "--replay", "--read-only", ID, &id]),
        90,
        30,
    );
    three.wait_for("\r\nbefore\r\n");
    three.type_in(b"echo not this\r");
    two.type_in(b"echo seen by $((1 + 1))\r");
    two.wait_for("seen by 2\r\n");
    three.wait_for("seen by 2\r\n");
    assert!(!two.shown().contains("not this"));
    // The size is that of the writer that came last.
    two.type_in(b"stty size\r");
    two.wait_for("30 90\r\n");
    two.type_in(b"exit 4\r");
    assert_eq!(two.wait(), 4);
    let mut three = three;
    assert_eq!(three.wait(), 4);
}

#[test]
fn a_watcher_leaves_by_ctrl_c_or_the_keys_and_harms_nobody() {
    let sandbox = Sandbox::start();
    let start = [
        "exec",
        "-d",
        "-t",
        "--name",
        "tty",
        ID,
        "sh",
        "-c",
        "echo shown; sleep 1000",
    ];
    sandbox.expect(&start, 0, "tty\n");
    for (keys, status) in [(&b"\x03"[..], 130), (b"\x10\x11", 0)] {
        let mut watcher = Terminal::start(
            &sandbox.belljar(&["attach", "--replay", "-r", ID, "tty"]),
            80,
            24,
        );
        watcher.wait_for("shown\r\n");
        watcher.type_in(keys);
        assert_eq!(watcher.wait(), status);
    }
    sandbox.expect(&["ps", "-q", ID], 0, "1\n");
}

#[test]
fn a_screen_is_drawn_and_goes_on() {
    let sandbox = Sandbox::start();
    let mut terminal = shell(&sandbox);
    terminal.type_in(b"printf '\\033[2J\\033[5;7Hin the mid''dle\\033[9;1H'\r");
    terminal.wait_for("in the middle");
    terminal.type_in(b"\x10\x11");
    assert_eq!(terminal.wait(), 0);
    let id = text(&sandbox.says(&["ps", "-q", ID]).stdout)
        .trim()
        .to_owned();
    let mut again = Terminal::start(&sandbox.belljar(&["attach", ID, &id]), 80, 24);
    again.wait_for("in the middle");
    again.type_in(b"echo g''oes on\r");
    again.wait_for("goes on\r\n");
    assert_eq!(again.shown().matches("in the middle").count(), 1);
    again.type_in(b"exit 9\r");
    assert_eq!(again.wait(), 9);
}

#[test]
fn other_keys_to_leave_and_none() {
    let sandbox = Sandbox::start();
    let start = |keys: &str| {
        let arguments = [
            "exec",
            "-it",
            "--detach-keys",
            keys,
            "-e",
            "PS1=ready> ",
            ID,
            "sh",
        ];
        let terminal = Terminal::start(&sandbox.belljar(&arguments), 80, 24);
        terminal.wait_for("ready> ");
        terminal
    };
    let mut terminal = start("ctrl-],x");
    terminal.type_in(b"\x10\x11\x1d");
    terminal.type_in(b"x");
    assert_eq!(terminal.wait(), 0);
    let mut terminal = start("none");
    terminal.type_in(b"\x10\x11\x15exit 6\r");
    assert_eq!(terminal.wait(), 6);
}

#[test]
fn what_a_program_switched_on_is_switched_off_when_it_is_left() {
    let sandbox = Sandbox::start();
    let mut terminal = shell(&sandbox);
    terminal.type_in(b"printf '\\033[?1049h\\033[?25l\\033[?1000h'; echo don''e\r");
    terminal.wait_for("done");
    terminal.clear();
    terminal.type_in(b"\x10\x11");
    assert_eq!(terminal.wait(), 0);
    let shown = terminal.shown();
    for off in ["\x1b[?1049l", "\x1b[?25h", "\x1b[?1000l"] {
        assert!(shown.contains(off), "{shown:?}");
    }
}

#[test]
fn whatever_ends_it_restores_the_terminal() {
    let sandbox = Sandbox::start();
    for (signal, status) in [(Signal::TERM, 143), (Signal::HUP, 129)] {
        let mut terminal = shell(&sandbox);
        terminal.signal(signal);
        assert_eq!(terminal.wait(), status);
    }
    // Its tree is gone, too.
    eventually("the shells are gone", || {
        sandbox.says(&["ps", "-q", ID]).stdout.is_empty()
    });
    // Stopped, and going on.
    let mut terminal = shell(&sandbox);
    terminal.signal(Signal::TSTP);
    eventually("it has given the terminal back", || terminal.is_cooked());
    terminal.signal(Signal::CONT);
    eventually("it has it again", || !terminal.is_cooked());
    terminal.type_in(b"exit 3\r");
    assert_eq!(terminal.wait(), 3);
}

#[test]
fn a_login_shell_of_the_user() {
    let sandbox = Sandbox::start();
    let mut terminal = Terminal::start(&sandbox.belljar(&["shell", ID]), 80, 24);
    terminal.type_in(b"echo shell=$SHELL home=$HOME in=$PWD\r");
    terminal.wait_for("shell=/bin/bash home=/root in=/root\r\n");
    terminal.type_in(b"shopt -q login_shell && echo log''in\r");
    terminal.wait_for("login\r\n");
    terminal.type_in(b"exit\r");
    assert_eq!(terminal.wait(), 0);
}

#[test]
fn a_worker_that_dies_is_not_even_noticed() {
    let sandbox = Sandbox::start();
    let mut terminal = shell(&sandbox);
    for number in 0..5 {
        sandbox.replace_worker();
        terminal.type_in(format!("echo $(({number} + 100))\r").as_bytes());
        terminal.wait_for(&format!("\r\n{}\r\n", number + 100));
    }
    let shown = terminal.shown();
    assert!(!shown.contains("belljar:"), "{shown:?}");
    terminal.type_in(b"exit 7\r");
    assert_eq!(terminal.wait(), 7);
}
