//! The command line itself: what it writes for shells and readers, colours, progress, names.

use std::fs;
use std::process::Command;

use belljar_e2e::pty::OnTerminal;
use belljar_e2e::{Running, User};
use serde_json::Value;

/// The ids that `ls OPTIONS` prints.
fn listed(user: &User, options: &[&str]) -> Vec<String> {
    let mut all = vec!["ls", "-q"];
    all.extend(options);
    let said = user.says(&all);
    assert_eq!(said.code(), 0, "{}", said.err);
    said.text().lines().map(str::to_owned).collect()
}

/// All that a command shows on a terminal, this text among it.
fn on_terminal(command: &Command, text: &str) -> (i32, String) {
    let mut terminal = OnTerminal::start(command, 100, 30);
    let status = terminal.wait().code().unwrap_or(-1);
    terminal.shows(text);
    (status, terminal.shown())
}

#[test]
fn completions_and_manual_pages_are_written() {
    let user = User::new();
    for (shell, text) in [
        ("bash", "complete -F _belljar_and_names"),
        ("zsh", "#compdef belljar"),
        ("fish", "complete -c belljar"),
    ] {
        let said = user.says(&["completion", shell]);
        assert_eq!(said.code(), 0, "{}", said.err);
        for word in [text, "snapshot", "detach-keys", "ls --all --names"] {
            assert!(said.text().contains(word), "no '{word}' for {shell}");
        }
    }
    let said = user.says(&["completion", "no-such-shell"]);
    assert_eq!(said.code(), 125);
    said.explains(&["no-such-shell", "bash"]);

    // What a shell makes of it.
    fs::write(
        user.home().join("belljar.bash"),
        user.says(&["completion", "bash"]).out,
    )
    .unwrap();
    let script = "belljar() { echo web-1 web-2 other; }; . ./belljar.bash; \
        COMP_WORDS=(belljar stop web); COMP_CWORD=2; _belljar_and_names belljar web stop; \
        echo \"${COMPREPLY[@]}\"; \
        COMP_WORDS=(belljar --ve); COMP_CWORD=1; _belljar_and_names belljar --ve belljar; \
        echo \"${COMPREPLY[@]}\"";
    let output = Command::new("bash")
        .args(["--norc", "-c", script])
        .current_dir(user.home())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("web-1 web-2\n") && text.contains("--version") && !text.contains("other"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );

    user.says(&["man", "pages"]).is(0, "");
    let help = user.says(&["--help"]).text();
    for (page, text) in [
        ("belljar.1", ".TH belljar 1"),
        ("belljar-exec.1", "detach\\-keys"),
        ("belljar-fs-xattr.1", "\\-\\-set"),
    ] {
        let content = fs::read_to_string(user.home().join("pages").join(page)).unwrap();
        assert!(content.contains(text), "{page}: {content}");
    }
    // Every verb that the help shows has its page.
    let verbs = ["run", "exec", "shell", "cp", "watch", "port", "doctor"];
    for verb in verbs {
        assert!(help.contains(&format!("  {verb}")), "{help}");
        assert!(user.home().join(format!("pages/belljar-{verb}.1")).exists());
    }
    fs::write(user.home().join("file"), b"").unwrap();
    let said = user.says(&["man", "file/pages"]);
    assert_eq!(said.code(), 125);
    said.explains(&["file/pages", "name a directory"]);
}

#[test]
fn sandboxes_are_found_and_shown() {
    let user = User::new();
    for name in ["web-1", "web-2", "store"] {
        let said = user.says(&["create", "--name", name]);
        assert_eq!(said.code(), 0, "{}", said.err);
    }
    assert_eq!(listed(&user, &[]), Vec::<String>::new());
    assert_eq!(listed(&user, &["--state", "created"]).len(), 3);
    for state in ["running", "stopped", "no-such-state"] {
        assert_eq!(listed(&user, &["--state", state]), Vec::<String>::new());
    }

    // The beginning of one name, of two, of none.
    assert_eq!(user.says(&["inspect", "st"]).code(), 0);
    let said = user.says(&["inspect", "web"]);
    assert_eq!(said.code(), 125);
    said.explains(&["'web' could be any of", "web-1", "web-2", "write more"]);
    let said = user.says(&["rm", "we"]);
    assert_eq!(said.code(), 125);
    assert_eq!(listed(&user, &["-a"]).len(), 3, "nothing was removed");
    let said = user.says(&["inspect", "web-3"]);
    assert_eq!(said.code(), 125);
    said.explains(&["web-3", "did you mean"]);

    // Colour on terminals only, unless it is not wanted.
    let mut asked = user.belljar(&["inspect", "web"]);
    let (status, shown) = on_terminal(&asked, "write more");
    assert_eq!(status, 125);
    assert!(shown.contains("\x1b["), "{shown:?}");
    let (status, shown) = on_terminal(asked.env("NO_COLOR", "1"), "write more");
    assert_eq!(status, 125);
    assert!(
        shown.contains("could be any of") && !shown.contains('\x1b'),
        "{shown:?}"
    );
    // A table for people, JSON for programs.
    let (status, shown) = on_terminal(user.belljar(&["ls", "-a"]).env("NO_COLOR", "1"), "web-1");
    assert_eq!(status, 0);
    assert!(
        shown.starts_with("ID") && shown.contains("web-1") && !shown.contains('\x1b'),
        "{shown:?}"
    );
    let said = user.says(&["ls", "-a"]);
    let all: Value = serde_json::from_slice(&said.out).unwrap();
    assert_eq!(all.as_array().unwrap().len(), 3);
    assert!(!said.text().contains('\x1b'));
    assert_eq!(user.says(&["rm", "--all"]).code(), 0);
    assert_eq!(listed(&user, &["-a"]), Vec::<String>::new());
}

#[test]
fn a_long_transfer_shows_its_progress_on_a_terminal_only() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    assert_eq!(
        listed(&user, &["--state", "running"]),
        [sandbox.id().to_owned()]
    );
    assert_eq!(listed(&user, &["--state", "paused"]), Vec::<String>::new());
    let home = user.home();
    fs::write(home.join("data"), vec![7; 3_000_000]).unwrap();
    let packed = Command::new("tar")
        .args(["-cf", "data.tar", "data"])
        .current_dir(home)
        .status();
    assert!(packed.unwrap().success());
    // One that stops in the middle for longer than what needs no bar.
    let slow = |options: &str| {
        let cp = user.belljar(&["cp"]);
        let script = format!(
            "{{ head -c 1000000 data.tar; sleep 1.5; tail -c +1000001 data.tar; }} | \"$0\" cp {options} - {}:/mnt",
            sandbox.id()
        );
        let mut command = Command::new("sh");
        command
            .args(["-c", &script])
            .arg(cp.get_program())
            .current_dir(home)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        for (name, value) in cp.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command
    };
    let (status, shown) = on_terminal(&slow(""), "iB/s");
    assert_eq!(status, 0, "{shown}");
    assert!(shown.contains("iB/s"), "{shown:?}");
    // Piped: nothing at all, and on a terminal nothing if so wished.
    let said = Running::start(&mut slow("")).wait();
    assert_eq!(
        (said.code(), said.text(), said.err),
        (0, String::new(), String::new())
    );
    let mut quiet = OnTerminal::start(&slow("-q"), 100, 30);
    assert_eq!(quiet.wait().code(), Some(0));
    assert_eq!(quiet.shown(), "");
    // One that fails leaves its message alone on the line.
    let said = user.says(&["cp", "data", &format!("{}:/no/where", sandbox.id())]);
    assert_eq!(said.code(), 125);
    said.explains(&["/no"]);
}
