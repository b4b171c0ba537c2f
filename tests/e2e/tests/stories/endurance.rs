//! Many programs, clients that are cut off, workers that are killed, guests that pause: nothing is lost,
//! nothing comes twice, nothing is left. `BELLJAR_SOAK=1` makes it long.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use belljar_e2e::endurance::{Echo, Ends, Random};
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

/// What the story itself does.
#[derive(Debug)]
struct Step {
    number: AtomicUsize,
    now: Mutex<(&'static str, Instant)>,
}

impl Step {
    fn new() -> Self {
        Self {
            number: AtomicUsize::new(0),
            now: Mutex::new(("start", Instant::now())),
        }
    }

    fn begins(&self, name: &'static str) {
        let last = std::mem::replace(&mut *self.now.lock().unwrap(), (name, Instant::now()));
        if last.1.elapsed() > Duration::from_secs(5) {
            eprintln!("'{}' took {:?}", last.0, last.1.elapsed());
        }
        self.number.fetch_add(1, Ordering::Relaxed);
    }
}

/// Ends the story, with what everyone does, when it or one of its clients stands still.
fn watch(echoes: &[Echo], step: &Step) {
    const STILL: Duration = Duration::from_secs(60);
    let clients = || echoes.iter().filter(|echo| !echo.has_ended());
    let progress = |echo: &Echo| echo.progress.load(Ordering::Relaxed);
    let mut last: HashMap<u64, (usize, Instant)> = HashMap::new();
    while clients().next().is_some() {
        std::thread::sleep(Duration::from_millis(100));
        let counters = clients().map(|echo| (echo.number, progress(echo)));
        let story = (0, step.number.load(Ordering::Relaxed));
        let now = Instant::now();
        for (who, count) in counters.chain([story]) {
            let known = last.entry(who).or_insert((count, now));
            if known.0 != count {
                *known = (count, now);
            } else if now - known.1 > STILL {
                eprintln!("{who} stands still for {STILL:?}");
                let name = step.now.lock().unwrap().0;
                eprintln!(
                    "the story: step {}, {name}",
                    step.number.load(Ordering::Relaxed)
                );
                clients().for_each(|echo| eprintln!("{}", echo.doing()));
                // Threads that wait for each other cannot be unwound.
                std::process::abort();
            }
        }
    }
}

#[test]
fn cuts_killed_workers_and_pauses_lose_and_repeat_nothing() {
    let (programs, events) = if is_long() { (100, 2000) } else { (16, 160) };
    let user = User::new();
    let guest = Guest::start(&user);
    let echoes: Vec<Echo> = (1..=programs)
        .map(|number| Echo::new(number, number % 2 == 0))
        .collect();
    // All of them share a processor in software: what they ask for must be less than it gives.
    let pace = Duration::from_millis(60 * programs);
    let stop = AtomicBool::new(false);
    let step = Step::new();
    let connect = || guest.connect();
    let (mut kills, mut pauses) = (0, 0);
    let bytes: usize = std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        scope.spawn(|| watch(&echoes, &step));
        let clients: Vec<_> = echoes
            .iter()
            .map(|echo| scope.spawn(|| echo.run(&connect, pace, &stop)))
            .collect();
        let mut random = Random::new(2026);
        for _ in 0..events {
            match random.below(20) {
                0 | 1 => {
                    step.begins("kill the worker");
                    guest.kill_worker();
                    kills += 1;
                }
                2 => {
                    step.begins("pause");
                    guest.does("pause");
                    std::thread::sleep(Duration::from_millis(random.below(40) as u64));
                    step.begins("resume");
                    guest.does("resume");
                    pauses += 1;
                }
                _ => {
                    step.begins("cut");
                    let echo = &echoes[random.below(echoes.len())];
                    echo.cut.store(true, Ordering::Relaxed);
                }
            }
            if clients
                .iter()
                .any(std::thread::ScopedJoinHandle::is_finished)
            {
                break;
            }
            std::thread::sleep(Duration::from_millis(50 + random.below(100) as u64));
        }
        stop.store(true, Ordering::Relaxed);
        let bytes = |client: std::thread::ScopedJoinHandle<usize>| {
            step.begins("wait for a client");
            client.join().unwrap()
        };
        clients.into_iter().map(bytes).sum()
    });
    let cuts: usize = echoes
        .iter()
        .map(|echo| echo.reconnects.load(Ordering::Relaxed))
        .sum();
    eprintln!("{bytes} bytes, {cuts} connections, {kills} workers killed, {pauses} pauses");
    assert!(bytes > 2000 * echoes.len() && cuts > echoes.len() && kills > 0 && pauses > 0);
    assert!(guest.restarts() >= kills, "{kills} kills");
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
    for _ in 0..rounds {
        run(in_each);
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
