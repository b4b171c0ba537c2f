//! Many programs, clients that are cut off, workers that are killed, guests that pause: nothing is lost,
//! nothing comes twice, nothing is left. `BELLJAR_SOAK=1` makes it long.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use belljar_e2e::trial::{self, Disturbed};
use belljar_e2e::{PATIENCE, User};
use belljar_protocol::client::{Exec, ping};
use belljar_protocol::{AGENT_PORT, hybrid, v1};

const NAME: &str = "endurance";

fn is_long() -> bool {
    std::env::var_os("BELLJAR_SOAK").is_some()
}

/// A sandbox and its vsock.
struct Guest<'a> {
    user: &'a User,
    socket: PathBuf,
}

impl<'a> Guest<'a> {
    fn start(user: &'a User) -> Self {
        let said = user.says(&["run", "-d", "--name", NAME, "--memory", "512M"]);
        assert_eq!(said.code(), 0, "{}", said.err);
        let socket = user.sandboxes()[0].join("v.sock");
        Self { user, socket }
    }

    fn connect(&self) -> Option<UnixStream> {
        hybrid::connect(&self.socket, AGENT_PORT, Instant::now() + PATIENCE).ok()
    }

    /// Runs a shell line in the guest; its output.
    fn sh(&self, script: &str) -> String {
        let exec = v1::Exec {
            argv: ["sh", "-c", script]
                .map(|word| word.as_bytes().to_vec())
                .to_vec(),
            ..v1::Exec::default()
        };
        let deadline = Some(Instant::now() + PATIENCE);
        let (out, err, how) = Exec::start(self.connect().unwrap(), exec, deadline)
            .unwrap()
            .finish(1 << 20, deadline)
            .unwrap();
        let err = String::from_utf8_lossy(&err);
        assert!(
            matches!(how, v1::end::How::Exited(_)),
            "{script}: {how:?} {err}"
        );
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Kills the worker from within, and waits for the next one.
    fn kill_worker(&self) {
        // By the shell alone, which leaves the zeros between arguments out.
        const KILL: &str = "for p in /proc/[0-9]*; do c=; read -r c < $p/cmdline; \
            case $c in belljar-agent--worker) kill -KILL ${p#/proc/};; esac; done";
        let before = self.restarts();
        let exec = v1::Exec {
            argv: ["sh", "-c", KILL]
                .map(|word| word.as_bytes().to_vec())
                .to_vec(),
            detached: true,
            ..v1::Exec::default()
        };
        let deadline = Instant::now() + PATIENCE;
        let stream = self.connect().expect("the agent takes connections");
        Exec::start(stream, exec, Some(deadline)).unwrap();
        while self.restarts() == before {
            assert!(Instant::now() < deadline, "the worker lives");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn restarts(&self) -> u32 {
        let deadline = Some(Instant::now() + PATIENCE);
        loop {
            match self.connect().map(|stream| ping(stream, deadline)) {
                Some(Ok((_, pong))) => return pong.worker_restarts,
                _ if deadline < Some(Instant::now()) => panic!("the agent does not answer"),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn remove(&self) {
        self.does("rm");
    }

    /// A verb that takes the sandbox's name.
    fn does(&self, verb: &str) {
        let said = match verb {
            "rm" => self.user.says(&["rm", "-f", NAME]),
            _ => self.user.says(&[verb, NAME]),
        };
        assert_eq!(said.code(), 0, "{verb}: {}", said.err);
    }
}

impl Disturbed for Guest<'_> {
    fn connect(&self) -> Option<UnixStream> {
        Guest::connect(self)
    }

    fn kill_worker(&self) {
        Guest::kill_worker(self);
    }

    fn pause(&self, time: Duration) {
        self.does("pause");
        std::thread::sleep(time);
        self.does("resume");
    }
}

#[test]
fn cuts_killed_workers_and_pauses_lose_and_repeat_nothing() {
    let (programs, events) = if is_long() { (100, 2000) } else { (16, 160) };
    let user = User::new();
    let guest = Guest::start(&user);
    // All of them share a processor in software: what they ask for must be less than it gives.
    let pace = Duration::from_millis(60 * programs);
    let done = trial::run(&guest, programs, events, pace);
    assert!(guest.restarts() >= done.kills, "{done:?}");
    guest.remove();
}

#[test]
fn many_execs_leave_nothing_behind() {
    let (rounds, in_each) = if is_long() { (100, 1000) } else { (3, 100) };
    let user = User::new();
    let guest = Guest::start(&user);
    let deadline = Some(Instant::now() + Duration::from_secs(3 * 3600));
    let run = |count: usize| {
        for number in 0..count {
            let exec = v1::Exec {
                argv: vec![b"true".to_vec()],
                keep_ms: Some(0),
                ..v1::Exec::default()
            };
            let (_, _, how) = Exec::start(guest.connect().unwrap(), exec, deadline)
                .unwrap()
                .finish(0, deadline)
                .unwrap();
            assert_eq!(
                how,
                v1::end::How::Exited(v1::Exited { code: 0 }),
                "{number}"
            );
        }
    };
    let look = || {
        let agent = guest.sh("for pid in 1 $(pgrep -f '^belljar-agent --worker'); do \
             ls /proc/$pid/fd | wc -l; awk '/^VmRSS/ {print $2}' /proc/$pid/status; done; \
             ls -d /sys/fs/cgroup/user/*/ | wc -l; ps -e | wc -l");
        let numbers: Vec<u64> = agent
            .lines()
            .filter_map(|line| line.trim().parse().ok())
            .collect();
        assert_eq!(numbers.len(), 6, "{agent}");
        let vmm = guest.user.processes("belljar-vmm")[0];
        let files = std::fs::read_dir(format!("/proc/{vmm}/fd"))
            .unwrap()
            .count() as u64;
        (numbers, files)
    };
    run(in_each);
    let (before, files_before) = look();
    for round in 1..=rounds {
        run(in_each);
        if is_long() {
            eprintln!("{} more: {:?}", round * in_each, look());
        }
    }
    let (after, files_after) = look();
    eprintln!("before {before:?} and {files_before}, after {after:?} and {files_after}");
    for (index, slack) in [(0, 3), (1, 400), (2, 3), (3, 400), (4, 3), (5, 3)] {
        assert!(
            after[index] <= before[index] + slack,
            "figure {index} grew: before {before:?}, after {after:?}"
        );
    }
    assert!(
        files_after <= files_before + 2,
        "{files_before} → {files_after}"
    );
    guest.remove();
}
