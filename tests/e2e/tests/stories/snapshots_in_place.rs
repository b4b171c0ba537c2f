//! Snapshots that cost little: going back in place, saving what has changed, clones behind a short pause.

use std::time::Instant;

use belljar_e2e::{Running, Said, User, eventually, kill};
use serde_json::Value;

fn json(said: &Said) -> Value {
    assert_eq!(said.code(), 0, "{}", said.err);
    serde_json::from_slice(&said.out).unwrap_or_else(|error| panic!("{error}: {}", said.text()))
}

/// Holds a secret in its memory alone, and tells it to whoever asks; `set` changes it.
const KEEPER_OF_A_SECRET: &str = "import os
os.chdir('/root'); os.mkfifo('in'); os.mkfifo('out'); secret = 'first'
open('ready', 'w').close()
while True:
    word = open('in').read().strip()
    if word: secret = word
    open('out', 'w').write(secret + chr(10))
";

/// What a guest holds in memory and on its disk, after `change` was written into both (if it is not empty).
fn holds(user: &User, word: &str, change: &str) -> String {
    let script = format!(
        "cd /root; [ -z '{change}' ] || echo '{change}' >f; timeout 20 sh -c 'echo {change} >in; cat out'; cat f"
    );
    let said = user.says(&["exec", word, "--", "sh", "-c", &script]);
    assert_eq!(said.code(), 0, "{word}: {} {}", said.text(), said.err);
    said.text()
}

#[test]
fn a_guest_goes_back_in_place_and_saves_what_has_changed() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    let said = sandbox.says("exec", &["-d", "--", "python3", "-c", KEEPER_OF_A_SECRET]);
    assert_eq!(said.code(), 0, "{}", said.err);
    eventually("the program to be ready", || {
        sandbox
            .says("exec", &["--", "test", "-e", "/root/ready"])
            .code()
            == 0
    });
    assert_eq!(holds(&user, sandbox.id(), "one"), "one\none\n");

    // All of it the first time, what has changed afterwards; the pause is told.
    let first = json(&sandbox.says("snapshot", &["--tag", "one", "--wait", "-o", "json"]));
    assert_eq!(first["base"], Value::Null);
    assert_eq!(holds(&user, sandbox.id(), "two"), "two\ntwo\n");
    let second = json(&sandbox.says("snapshot", &["--tag", "two", "--wait", "-o", "json"]));
    assert_eq!(second["base"], first["id"]);
    let data = |snapshot: &Value| snapshot["data_bytes"].as_u64().unwrap();
    assert!(data(&second) < data(&first) / 2, "{first} {second}");
    let paused = second["paused_us"].as_u64().unwrap();
    assert!(paused > 0 && paused <= second["frozen_us"].as_u64().unwrap());
    println!("snapshots: {first} {second}");

    // A fork in between is an image of its own; the next snapshot is right nevertheless.
    let forked = json(&sandbox.says("fork", &["--name", "twin", "-o", "json"]));
    println!("fork: {forked}");
    assert_eq!(holds(&user, "twin", ""), "two\ntwo\n");
    assert_eq!(user.says(&["rm", "-f", "twin"]).code(), 0);
    assert_eq!(holds(&user, sandbox.id(), "three"), "three\nthree\n");
    let third = json(&sandbox.says("snapshot", &["--tag", "three", "-o", "json"]));
    assert_eq!(third["base"], Value::Null);

    // Memory and disk are those of each moment.
    let said = user.says(&["restore", "two", "--name", "clone"]);
    assert_eq!(said.code(), 0, "{}", said.err);
    assert_eq!(holds(&user, "clone", "four"), "four\nfour\n");
    let vmms = || {
        let mut all = user.processes("belljar-vmm");
        all.sort_unstable();
        all
    };
    let before = vmms();
    let reset = json(&user.says(&["reset", "clone", "-o", "json"]));
    println!("reset: {reset}");
    assert_eq!(reset["in_place"], true, "{reset}");
    assert_eq!(holds(&user, "clone", ""), "two\ntwo\n");
    assert_eq!(holds(&user, "clone", "five"), "five\nfive\n");
    let saved = json(&user.says(&["snapshot", "clone", "--tag", "five", "-o", "json"]));
    assert_eq!(saved["base"], second["id"], "{saved}");
    // What was saved of it before it went back is no base any more, what it was loaded from is.
    let begin = Instant::now();
    let reset = json(&user.says(&["reset", "clone", "-o", "json"]));
    let takes = begin.elapsed();
    assert_eq!(reset["in_place"], true, "{reset}");
    assert_eq!(holds(&user, "clone", ""), "two\ntwo\n");
    let saved = json(&user.says(&["snapshot", "clone", "-o", "json"]));
    assert_eq!(saved["base"], second["id"], "{saved}");
    assert_eq!(vmms(), before, "the same processes run them");
    // To another snapshot it cannot go in place, and says so.
    let reset = json(&user.says(&["reset", "clone", "five", "-o", "json"]));
    assert_eq!(reset["in_place"], false);
    assert_eq!(reset["why_not"], "it was running from another snapshot");
    assert_eq!(holds(&user, "clone", ""), "five\nfive\n");

    // Whoever resets it is killed: it is as before, or back, or says that it is half way; and goes back then.
    for part in [4, 6] {
        assert_eq!(holds(&user, "clone", "six"), "six\nsix\n");
        let running = Running::start(&mut user.belljar(&["reset", "clone"]));
        std::thread::sleep(takes * part / 8);
        running.signal(rustix::process::Signal::KILL);
        let _ = running.wait();
        let _ = user.says(&["resume", "clone"]);
        let reset = json(&user.says(&["reset", "clone", "-o", "json"]));
        println!("after {part}/8: {reset}");
        assert_eq!(holds(&user, "clone", ""), "five\nfive\n");
    }
    // So is its VMM: then a new one is needed.
    let clones: Vec<i32> = vmms()
        .into_iter()
        .filter(|vmm| !before.contains(vmm))
        .collect();
    clones.into_iter().for_each(kill);
    eventually("its end to be seen", || {
        json(&user.says(&["inspect", "clone"]))[0]["state"] == "stopped"
    });
    let reset = json(&user.says(&["reset", "clone", "-o", "json"]));
    assert_eq!(reset["why_not"], "it was not running");
    assert_eq!(holds(&user, "clone", ""), "five\nfive\n");
    assert_eq!(user.says(&["rm", "-f", "clone"]).code(), 0);
    drop(sandbox);
    runs_before_its_memory_is_here(&user);
}

/// Nothing is left of what the keeper holds ready.
fn forget_templates(user: &User) {
    user.processes("belljar-keeper").into_iter().for_each(kill);
    let templates = user.home().join("state/keeper/templates");
    std::fs::remove_dir_all(templates).unwrap();
}

fn runs_before_its_memory_is_here(user: &User) {
    forget_templates(user);
    let said = user.says(&["restore", "two", "--name", "slow", "-v"]);
    assert_eq!(said.code(), 0, "{}", said.err);
    said.explains(&["lazy", "loaded", "agent ready", "thawed"]);
    println!("lazy: {}", said.err);
    assert_eq!(holds(user, "slow", ""), "two\ntwo\n");
    // What is saved of it is whole, wherever its pages are; and it can go back.
    let said = user.says(&["snapshot", "slow", "--tag", "half", "--wait"]);
    assert_eq!(said.code(), 0, "{}", said.err);
    assert_eq!(holds(user, "slow", "other"), "other\nother\n");
    let reset = json(&user.says(&["reset", "slow", "-o", "json"]));
    assert_eq!(reset["in_place"], true, "{reset}");
    assert_eq!(holds(user, "slow", ""), "two\ntwo\n");

    // Without the keeper it has no pages: it stops, and says why.
    forget_templates(user);
    eventually("the guest without a keeper to stop", || {
        json(&user.says(&["inspect", "slow"]))[0]["state"] == "stopped"
    });
    let seen = json(&user.says(&["inspect", "slow"]));
    assert!(
        seen.to_string()
            .contains("pages of the guest's memory could not be had"),
        "{seen}"
    );
    assert_eq!(user.says(&["rm", "-f", "slow"]).code(), 0);
    let said = user.says(&["restore", "half", "--name", "again", "-v"]);
    assert_eq!(said.code(), 0, "{}", said.err);
    said.explains(&["lazy"]);
    assert_eq!(holds(user, "again", ""), "two\ntwo\n");
    assert_eq!(user.says(&["rm", "-f", "again"]).code(), 0);
    // The next one finds a template.
    let template = || {
        let seen = json(&user.says(&["inspect", "half"]));
        seen[0]["template"] == true
    };
    eventually("the template", template);
    let said = user.says(&["restore", "half", "--name", "again", "-v"]);
    assert_eq!(said.code(), 0, "{}", said.err);
    assert!(!said.err.contains("lazy"), "{}", said.err);
    assert_eq!(holds(user, "again", ""), "two\ntwo\n");
    assert_eq!(user.says(&["rm", "-f", "again"]).code(), 0);
    assert_eq!(user.says(&["store", "verify"]).code(), 0);
}
