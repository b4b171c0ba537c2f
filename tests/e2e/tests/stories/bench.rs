//! `belljar bench`: what is measured is what happened, and what cannot be measured is refused.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use belljar_e2e::{User, bin_dir};
use serde_json::Value;

/// Wraps the VMM: before it restores, it changes the saved RAM where it is filled with random bytes, and only there, so
/// that the guest itself goes on.
const TAMPERING: &str = r#"#!/usr/bin/env python3
import glob, os, sys
own = os.path.dirname(os.path.abspath(sys.argv[0]))
for path in glob.glob(own + "/tampered-*-ram"):
    with open(path, "r+b") as file:
        ram = file.read()
        for start in range(0, len(ram), 4096):
            page = ram[start:start + 4096]
            if page.count(0) < 45 and page.count(255) < 45 and len(set(page)) == 256:
                file.seek(start + 2048)
                file.write(bytes([page[2048] ^ 1]))
os.execv("VMM", ["VMM", *sys.argv[1:]])
"#;

/// The smallest measurement there is, and more.
fn words<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let small = [
        "bench",
        "restore",
        "-n",
        "1",
        "--memory",
        "64M",
        "--fill",
        "1M",
        "--guest",
        "program",
        "--on-loaded-host",
    ];
    [&small[..], more].concat()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

#[test]
fn a_restored_guest_is_measured_and_one_that_was_tampered_with_is_found_out() {
    let user = User::new();
    // One guest, three ways; where processes would be found that stay.
    fs::create_dir_all(user.home().join("state")).unwrap();
    let said = user.says(&words(&[
        "--dir",
        "state",
        "--cache",
        "hot,lazy",
        "-o",
        "json",
        "--html",
        "page.html",
        "--lines",
        "lines",
    ]));
    assert_eq!(said.code(), 0, "{}", said.err);
    let all = lines(&said.text());
    assert_eq!(
        said.text(),
        fs::read_to_string(user.home().join("lines")).unwrap()
    );
    assert_eq!(all[0]["kind"], "run");
    let iterations: Vec<&Value> = all
        .iter()
        .filter(|line| line["kind"] == "iteration")
        .collect();
    let ways: Vec<_> = iterations
        .iter()
        .map(|line| (line["cache"].as_str(), line["prepared"].as_str()))
        .collect();
    let expected = [("hot", "no"), ("hot", "memory"), ("lazy", "no")];
    assert_eq!(
        ways,
        expected.map(|(cache, prepared)| (Some(cache), Some(prepared))),
        "{all:?}"
    );
    for line in iterations {
        let us = |name: &str| line[name].as_f64().unwrap();
        assert!(
            us("running_us") > 0.0 && us("running_us") < us("result_us"),
            "{line}"
        );
        assert!(us("faults_us") > 0.0 && us("pss_kib") > 0.0, "{line}");
        assert_eq!(line["hashed"], true);
        assert_eq!(line["ready_us"], Value::Null, "there is no agent");
    }
    let page = fs::read_to_string(user.home().join("page.html")).unwrap();
    assert!(page.contains("id=\"phases\"") && page.ends_with("</html>\n"));
    assert!(page.contains("belljar, hot, VM and RAM ahead") && !page.contains("http"));
    assert!(page.contains("belljar, lazy"));
    let left = user.processes("belljar-keeper");
    assert!(left.is_empty(), "the benchmark's keeper is still there");

    // A VMM whose guests have other RAM.
    let wrapper = user.home().join("tampering");
    let vmm = bin_dir().join("belljar-vmm");
    fs::write(&wrapper, TAMPERING.replace("VMM", &vmm.to_string_lossy())).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let peer = format!("tampered={}", wrapper.display());
    let said = user.says(&words(&["-o", "json", "--vs", &peer, "--prepared", "no"]));
    assert_eq!(said.code(), 125, "{}", said.text());
    said.explains(&["tampered, hot", "a wrong hash"]);
    let all = lines(&said.text());
    assert_eq!(all.last().unwrap()["kind"], "failure", "{all:?}");
}

#[test]
fn what_cannot_be_measured_is_told_at_once_with_a_remedy() {
    let user = User::new();
    for (wrong, remedy) in [
        (&["--memory", "64M"][..], "give it 80 MiB"),
        (&["--working-set", "33M"], "fill more"),
        (&["--memory", "64500K"], "32M"),
        (&["--cache", "warm", "--dir", "/dev/shm"], "--dir"),
        (&["--vs", "x=/nowhere/vmm"], "/nowhere/vmm"),
        (&["--vs", "firecracker"], "NAME=BINARY"),
        (&["--dir", "/nowhere"], "/nowhere"),
    ] {
        let said = user.says(&[&["bench", "restore", "--on-loaded-host"], wrong].concat());
        assert_eq!(said.code(), 125, "{wrong:?}: {}", said.text());
        said.explains(&[remedy]);
    }
    let small = ["bench", "load", "--memory", "256M", "--on-loaded-host"];
    let said = user.says(&small);
    assert_eq!(said.code(), 125, "{}", said.text());
    said.explains(&["200 MiB does not fit", "--memory"]);
}

#[test]
fn clones_of_a_server_answer_all_at_the_same_time() {
    let user = User::new();
    fs::create_dir_all(user.home().join("state")).unwrap();
    let words = "bench load --dir state --clones 3 -n 2 --working-set 8M --memory 192M --cpus 1 --on-loaded-host -o json";
    let said = user.says(&words.split(' ').collect::<Vec<_>>());
    assert_eq!(said.code(), 0, "{}", said.err);
    let all = lines(&said.text());
    let clones: Vec<&Value> = all.iter().filter(|line| line["kind"] == "clone").collect();
    assert_eq!(clones.len(), 3, "{all:?}");
    for clone in clones {
        let us = |name: &str| clone[name].as_f64().unwrap();
        assert!(0.0 < us("restored_us") && us("restored_us") < us("first_us"));
        assert_eq!(clone["request_us"].as_array().unwrap().len(), 2, "{clone}");
        assert!(us("pss_kib") > 0.0);
    }
    let last = all.last().unwrap();
    assert_eq!(
        (&last["kind"], &last["measure"]),
        (&"summary".into(), &"pss_kib".into())
    );
    // Nothing of it stays.
    for name in ["belljar-keeper", "belljar-vmm"] {
        assert!(user.processes(name).is_empty(), "{name} is still there");
    }
}
