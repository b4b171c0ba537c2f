//! Programs that echo, while their connections are cut, the agent's workers killed, and everything stopped for a
//! moment, at random: whoever has an agent can have it tried.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use crate::endurance::{Echo, Ends, Random};

/// An agent, and what is done to it.
pub trait Disturbed: Sync {
    /// `None`: not now.
    fn connect(&self) -> Option<UnixStream>;
    /// Returns when the next worker is there.
    fn kill_worker(&self);
    fn pause(&self, time: Duration);
}

/// What was done.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// That went to the programs and came back.
    pub bytes: usize,
    pub connections: usize,
    pub kills: u32,
    pub pauses: u32,
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
    // A hundred programs take more than a minute to start on a processor in software.
    const MANY: usize = 50;
    let still = Duration::from_secs(if echoes.len() > MANY { 240 } else { 60 });
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
            } else if now - known.1 > still {
                eprintln!("{who} stands still for {still:?}");
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

/// Tries `agent` with so many programs, of which every other one is on a terminal, and so many events; each program is
/// sent something every `pace` or so.
///
/// # Panics
/// Bytes are lost or come twice, or something stands still.
pub fn run(agent: &impl Disturbed, programs: u64, events: usize, pace: Duration) -> Done {
    let echoes: Vec<Echo> = (1..=programs)
        .map(|number| Echo::new(number, number % 2 == 0))
        .collect();
    let stop = AtomicBool::new(false);
    let step = Step::new();
    let connect = || agent.connect();
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
                    agent.kill_worker();
                    kills += 1;
                }
                2 => {
                    step.begins("pause");
                    agent.pause(Duration::from_millis(random.below(40) as u64));
                    pauses += 1;
                }
                _ => {
                    step.begins("cut");
                    let echo = &echoes[random.below(echoes.len())];
                    echo.cut.store(true, Ordering::Relaxed);
                }
            }
            if clients.iter().any(ScopedJoinHandle::is_finished) {
                break;
            }
            std::thread::sleep(Duration::from_millis(50 + random.below(100) as u64));
        }
        stop.store(true, Ordering::Relaxed);
        let bytes = |client: ScopedJoinHandle<usize>| {
            step.begins("wait for a client");
            client.join().unwrap()
        };
        clients.into_iter().map(bytes).sum()
    });
    let connections = echoes
        .iter()
        .map(|echo| echo.reconnects.load(Ordering::Relaxed))
        .sum();
    let done = Done {
        bytes,
        connections,
        kills,
        pauses,
    };
    eprintln!("{done:?}");
    assert!(bytes > 2000 * echoes.len(), "{done:?}");
    assert!(connections > echoes.len(), "{done:?}");
    assert!(kills > 0 && pauses > 0, "{done:?}");
    done
}
