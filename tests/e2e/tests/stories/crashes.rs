//! Whoever dies, somebody cleans up and somebody tells.

use rustix::process::Signal;

use belljar_e2e::{User, eventually, kill};

/// A command that prints a line and then goes on for ever.
const ENDLESS: [&str; 4] = ["--", "sh", "-c", "echo begun; while :; do sleep 0.1; done"];

#[test]
fn a_killed_vmm_is_told_and_cleaned_up() {
    let user = User::new();
    let running = user.start(&ENDLESS);
    let vmm = user.processes("belljar-vmm");
    assert_eq!(vmm.len(), 1);
    kill(vmm[0]);
    let said = running.wait();
    said.is(125, "begun\n");
    said.explains(&["the VMM was killed by SIGKILL"]);
    user.has_nothing_left();
}

#[test]
fn how_a_guest_ended_that_nobody_looked_at_can_be_asked_later() {
    let user = User::new();
    let sandbox = user.sandbox(&["--rm", "--name", "web"]);
    kill(user.processes("belljar-vmm")[0]);
    // At once: the end may not have been written down yet.
    let said = sandbox.says("exec", &["--", "true"]);
    assert_eq!(said.code(), 125, "{}", said.err);
    said.explains(&[
        "sandbox web is gone: the VMM was killed by SIGKILL",
        "gone/",
    ]);
    user.has_nothing_left();
    for words in [
        &["exec", "web", "--", "true"][..],
        &["inspect", "web"],
        &["rm", sandbox.id()],
    ] {
        let said = user.says(words);
        said.explains(&["sandbox web is gone: the VMM was killed by SIGKILL"]);
    }
    let said = user.says(&["inspect", "we"]);
    said.explains(&["there is no sandbox 'we'"]);
}

#[test]
fn a_killed_supervisor_takes_the_vmm_with_it() {
    let user = User::new();
    let running = user.start(&ENDLESS);
    let supervisors = user.processes("belljar-supervisor");
    assert_eq!(supervisors.len(), 1, "all: {:?}", user.processes(""));
    kill(supervisors[0]);
    let said = running.wait();
    assert_eq!(said.code(), 125);
    said.explains(&["supervisor"]);
    user.has_nothing_left();
}

#[test]
fn a_killed_command_line_leaves_nothing() {
    let user = User::new();
    let running = user.start(&ENDLESS);
    assert_eq!(user.sandboxes().len(), 1);
    running.signal(Signal::KILL);
    let _ = running.wait();
    user.has_nothing_left();
}

#[test]
fn what_is_left_when_all_are_killed_is_explained_and_cleaned() {
    let user = User::new();
    let running = user.start(&ENDLESS);
    // Both at once: neither can clean up for the other.
    running.signal(Signal::STOP);
    kill(user.processes("belljar-supervisor")[0]);
    running.signal(Signal::KILL);
    let _ = running.wait();
    eventually("the VMM to end with its supervisor", || {
        user.processes("belljar-vmm").is_empty()
    });
    assert_eq!(user.sandboxes().len(), 1);
    let said = user.says(&["doctor", "--output", "table"]);
    assert_eq!(said.code(), 1);
    let text = said.text();
    assert!(
        text.contains("its supervisor was killed") && text.contains("--clean"),
        "{text}"
    );
    let said = user.says(&["doctor", "--clean", "--output", "table"]);
    assert_eq!(said.code(), 0, "{}", said.text());
    user.has_nothing_left();
}

#[test]
fn ctrl_c_goes_to_the_command_in_the_guest() {
    let user = User::new();
    let running = user.start(&[
        "--",
        "sh",
        "-c",
        "trap 'echo caught; exit 9' INT; echo begun; while :; do sleep 0.1; done",
    ]);
    running.signal(Signal::INT);
    running.wait().is(9, "begun\ncaught\n");

    let running = user.start(&ENDLESS);
    running.signal(Signal::INT);
    running.wait().is(130, "begun\n");
}

#[test]
fn a_second_ctrl_c_kills_a_command_that_ignores_the_first() {
    let user = User::new();
    let running = user.start(&[
        "--",
        "sh",
        "-c",
        "trap 'echo caught' INT; echo begun; while :; do sleep 0.1; done",
    ]);
    running.signal(Signal::INT);
    eventually("the command to catch the first", || {
        running.out_so_far().ends_with(b"caught\n")
    });
    running.signal(Signal::INT);
    running.wait().is(137, "begun\ncaught\n");
}

#[test]
fn a_terminated_command_line_cleans_up() {
    let user = User::new();
    let running = user.start(&ENDLESS);
    running.signal(Signal::TERM);
    running.wait().is(143, "begun\n");
    user.has_nothing_left();
}

#[test]
fn ctrl_c_while_booting_gives_up() {
    let user = User::new();
    let initramfs = belljar_e2e::files::silent_initramfs(user.home());
    let initramfs = initramfs.to_string_lossy();
    let running = belljar_e2e::Running::start(&mut user.belljar(&[
        "run",
        "--initramfs",
        &initramfs,
        "--image",
        "none",
        "--",
        "true",
    ]));
    eventually("the VMM to run", || {
        !user.processes("belljar-vmm").is_empty()
    });
    running.signal(Signal::INT);
    let said = running.wait();
    assert_eq!(said.code(), 130);
    said.explains(&["interrupted"]);
    user.has_nothing_left();
}

#[test]
fn a_guest_that_switches_itself_off_is_told() {
    let user = User::new();
    let said = user.run(&[
        "--", "python3", "-c",
        "import ctypes, time\nprint('begun', flush=True)\nctypes.CDLL(None).reboot(0x4321fedc)\ntime.sleep(100)",
    ]);
    assert_eq!(said.code(), 125, "{}", said.err);
    said.explains(&["switched itself off", "while the command was running"]);
}
