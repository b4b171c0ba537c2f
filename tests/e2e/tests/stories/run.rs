//! A command in a fresh guest.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use belljar_e2e::{Running, User};

#[test]
fn output_and_errors_come_out_separately() {
    let user = User::new();
    let said = user.sh("echo to out; echo to err >&2");
    said.is(0, "to out\n");
    assert_eq!(said.err, "to err\n");
}

#[test]
fn the_exit_status_is_the_commands_own() {
    let user = User::new();
    user.run(&["--", "true"]).is(0, "");
    user.sh("exit 7").is(7, "");
    user.sh("kill -TERM $$").is(128 + 15, "");
    let said = user.run(&["--", "no-such-program"]);
    said.is(127, "");
    said.explains(&["no-such-program"]);
    let said = user.run(&["--", "/etc/passwd"]);
    said.is(126, "");
    said.explains(&["/etc/passwd"]);
}

#[test]
fn python_and_pipelines_run() {
    let user = User::new();
    user.run(&["--", "python3", "-c", "print(6 * 7)"])
        .is(0, "42\n");
    user.sh("printf 'b\\na\\nb\\n' | sort | uniq -c | wc -l")
        .is(0, "2\n");
}

#[test]
fn a_time_limit_ends_the_command_with_124() {
    let user = User::new();
    let begin = Instant::now();
    let said = user.run(&[
        "--timeout",
        "5s",
        "--",
        "sh",
        "-c",
        "echo begun; sleep 1000",
    ]);
    said.is(124, "begun\n");
    assert!(begin.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_time_limit_holds_when_the_command_ignores_it_and_nobody_reads() {
    let user = User::new();
    // The output is a pipe that is full: nobody reads it until the end.
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = user.belljar(&[
        "run",
        "--timeout",
        "1s",
        "--",
        "sh",
        "-c",
        "trap '' TERM; while :; do echo xxxxxxxxxxxxxxxxxx; done",
    ]);
    command.stdout(writer);
    let said = Running::start(&mut command).wait();
    drop(reader);
    assert_eq!(said.code(), 124, "{}", said.err);
}

#[test]
fn standard_input_is_passed_on_when_asked_for() {
    let user = User::new();
    let mut running = Running::start(&mut user.belljar(&["run", "-i", "--", "tr", "a-z", "A-Z"]));
    let mut stdin = running.child.stdin.take().unwrap();
    stdin.write_all(b"hello\n").unwrap();
    drop(stdin);
    running.wait().is(0, "HELLO\n");
}

#[test]
fn much_input_arrives_whole() {
    let user = User::new();
    let mut running =
        Running::start(&mut user.belljar(&["run", "-i", "--", "sh", "-c", "wc -c; cat"]));
    let mut stdin = running.child.stdin.take().unwrap();
    stdin.write_all(&vec![b'x'; 8_000_000]).unwrap();
    drop(stdin);
    running.wait().is(0, "8000000\n");
}

#[test]
fn without_asking_for_it_the_command_reads_nothing() {
    let user = User::new();
    // Standard input of the command line is an open pipe here, and stays so.
    user.run(&["--", "cat"]).is(0, "");
}

#[test]
fn an_input_that_never_ends_does_not_hold_up_the_end() {
    let user = User::new();
    user.run(&["-i", "--", "sh", "-c", "echo done; exit 3"])
        .is(3, "done\n");
}

#[test]
fn much_output_comes_out_whole() {
    let user = User::new();
    let said = user.sh("seq 1 2000000");
    assert_eq!(said.code(), 0, "{}", said.err);
    let text = said.text();
    let mut lines = 0;
    for (line, expected) in text.lines().zip(1..) {
        assert_eq!(line, expected.to_string());
        lines = expected;
    }
    assert_eq!(lines, 2_000_000);
}

#[test]
fn user_directory_and_environment_are_as_asked_for() {
    let user = User::new();
    let said = user.run(&[
        "--user",
        "nobody",
        "--workdir",
        "/usr/bin",
        "--env",
        "COLOUR=blue",
        "--env",
        "EMPTY=",
        "--",
        "sh",
        "-c",
        "id -un; pwd; echo $COLOUR-${EMPTY-unset}-${OTHER-unset}",
    ]);
    said.is(0, "nobody\n/usr/bin\nblue--unset\n");
    user.run(&["--user", "12:34", "--", "sh", "-c", "id -u; id -g"])
        .is(0, "12\n34\n");
    let said = user.run(&["--user", "no-such-user", "--", "true"]);
    said.is(125, "");
    said.explains(&["no-such-user"]);
    let said = user.run(&["--workdir", "/no/such/place", "--", "true"]);
    said.is(125, "");
    said.explains(&["/no/such/place"]);
}

#[test]
fn a_guest_is_a_computer_of_its_own() {
    let user = User::new();
    user.sh("echo mine > /etc/mark && mkdir /srv/x && cat /etc/mark")
        .is(0, "mine\n");
    user.sh("ls /etc/mark /srv/x 2>/dev/null").is(2, "");
    user.sh("test $$ -ne 1 && test $(id -u) -eq 0 && hostname >/dev/null")
        .is(0, "");
}

#[test]
fn the_disk_has_the_size_asked_for_and_takes_data() {
    let user = User::new();
    let said = user.run(&[
        "--disk", "512M", "--", "sh", "-c",
        "dd if=/dev/urandom of=/big bs=1M count=100 2>/dev/null && sync && cp /big /copy && cmp /big /copy && \
         df -m --output=size / | tail -1",
    ]);
    assert_eq!(said.code(), 0, "{}", said.err);
    let mib: u32 = said.text().trim().parse().unwrap();
    assert!((400..=512).contains(&mib), "{mib} MiB");
    // One that was never made before is made.
    let said = user.run(&[
        "--disk",
        "300M",
        "--",
        "sh",
        "-c",
        "df -m --output=size / | tail -1",
    ]);
    assert_eq!(said.code(), 0, "{}", said.err);
    let mib: u32 = said.text().trim().parse().unwrap();
    assert!((220..=300).contains(&mib), "{mib} MiB");
    let said = user.run(&["--disk", "12", "--", "true"]);
    assert_eq!(said.code(), 125, "{}", said.err);
}

#[test]
fn a_full_disk_is_an_error_of_the_command_only() {
    let user = User::new();
    let said = user.run(&[
        "--disk",
        "256M",
        "--",
        "sh",
        "-c",
        "dd if=/dev/zero of=/big bs=1M; echo still here",
    ]);
    said.is(0, "still here\n");
    said.explains(&["No space left"]);
}

#[test]
fn without_a_disk_what_is_written_goes_to_memory() {
    let user = User::new();
    user.run(&[
        "--disk",
        "none",
        "--",
        "sh",
        "-c",
        "echo x > /etc/y && cat /etc/y",
    ])
    .is(0, "x\n");
}

#[test]
fn a_writable_drive_keeps_what_was_written() {
    let user = User::new();
    let drive = user.home().join("data.img");
    fs::write(&drive, vec![0u8; 1 << 20]).unwrap();
    let option = format!("{}:id=data", drive.display());
    let said = user.run(&[
        "--drive",
        &option,
        "--",
        "sh",
        "-c",
        "cat /sys/block/vdc/serial; echo; echo persistent > /dev/vdc",
    ]);
    said.is(0, "data\n");
    assert!(fs::read(&drive).unwrap().starts_with(b"persistent\n"));
}

#[test]
fn a_read_only_drive_stays_as_it_is() {
    let user = User::new();
    let drive = user.home().join("data.img");
    let mut content = b"precious\n".to_vec();
    content.resize(1 << 20, b'.');
    fs::write(&drive, &content).unwrap();
    let before = fs::metadata(&drive).unwrap().mtime_nsec();
    let option = format!("{}:ro", drive.display());
    let said = user.run(&[
        "--drive", &option, "--", "sh", "-c",
        "head -1 /dev/vdc; blockdev --setrw /dev/vdc 2>/dev/null; echo gone 2>/dev/null > /dev/vdc || echo refused; cat /sys/block/vdc/ro",
    ]);
    said.is(0, "precious\nrefused\n1\n");
    assert!(fs::read(&drive).unwrap() == content);
    assert_eq!(fs::metadata(&drive).unwrap().mtime_nsec(), before);
}

#[test]
fn processors_are_as_many_as_asked_for() {
    let user = User::new();
    for cpus in ["1", "2", "4"] {
        user.run(&["--cpus", cpus, "--", "nproc"])
            .is(0, &format!("{cpus}\n"));
    }
}

#[test]
fn memory_is_as_large_as_asked_for() {
    let user = User::new();
    for mib in [128, 600, 5000] {
        let said = user.run(&[
            "--memory", &format!("{mib}M"), "--", "sh", "-c",
            "while read name kib rest; do if [ $name = MemTotal: ]; then echo $((kib / 1024)); fi; done < /proc/meminfo",
        ]);
        assert_eq!(said.code(), 0, "{}", said.err);
        let total: i32 = said.text().trim().parse().unwrap();
        assert!(
            total <= mib && total > mib - 60 - mib / 20,
            "{total} of {mib} MiB"
        );
    }
}

#[test]
fn an_argument_is_passed_on_byte_by_byte() {
    use std::os::unix::ffi::OsStringExt;
    let user = User::new();
    let odd = std::ffi::OsString::from_vec(b"a b\t'\"\\\xff\n*".to_vec());
    let mut arguments: Vec<std::ffi::OsString> = ["run", "--", "printf", "%s|"]
        .into_iter()
        .map(Into::into)
        .collect();
    arguments.extend([odd, "".into(), "--help".into()]);
    let said = user.says(&arguments);
    assert_eq!(said.out, b"a b\t'\"\\\xff\n*||--help|");
}

#[test]
fn the_boot_time_is_told_by_stages_on_request() {
    let user = User::new();
    let said = user.run(&["--boot-time", "--", "echo", "hello"]);
    said.is(0, "hello\n");
    said.explains(&[
        "boot time ",
        "VMM process",
        "API",
        "InstanceStart",
        "guest kernel",
        "init and mounts",
        "agent ready",
        "exec",
        "end",
    ]);
}

#[test]
fn several_guests_at_once_do_not_disturb_each_other() {
    let user = User::new();
    let running: Vec<_> = (0..3)
        .map(|number| {
            let script = format!("sleep 0.5; exit {number}");
            Running::start(&mut user.belljar(&["run", "--", "sh", "-c", &script]))
        })
        .collect();
    for (number, running) in running.into_iter().enumerate() {
        let said = running.wait();
        assert_eq!(said.code(), i32::try_from(number).unwrap(), "{}", said.err);
    }
}

#[test]
fn the_guests_kernel_warns_of_nothing() {
    let user = User::new();
    let said = user.run(&[
        "--cpus", "2", "--", "python3", "-c",
        "import os\nlog = os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)\n\
         while True:\n    try: line = os.read(log, 8192).decode(errors='replace')\n    except BlockingIOError: break\n    \
         head, text = line.split(';', 1)\n    level = int(head.split(',')[0]) & 7\n    \
         if level <= 2 or 'WARNING' in text or 'Call Trace' in text: print(text.strip())",
    ]);
    said.is(0, "");
}
