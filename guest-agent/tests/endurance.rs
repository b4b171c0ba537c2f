//! Connections that are cut, workers that are killed, an agent that is stopped for a moment: nothing is lost, nothing
//! comes twice. `BELLJAR_SOAK=1` makes it long. The same in a guest: the endurance stories of the end-to-end tests.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use belljar_e2e::trial::{self, Disturbed};

use common::{Agent, kill, wait_until};

struct Native(Agent);

impl Native {
    fn signal(&self, name: &str) {
        let pids = self.0.worker_pid().into_iter().chain([self.0.pid()]);
        let pids = pids.map(|pid| pid.to_string());
        let _ = Command::new("kill").arg(name).args(pids).status();
    }
}

impl Disturbed for Native {
    fn connect(&self) -> Option<UnixStream> {
        Some(self.0.connect())
    }

    fn kill_worker(&self) {
        let before = self.0.worker_pid();
        before.into_iter().for_each(kill);
        wait_until("there is another worker", || {
            let now = self.0.worker_pid();
            now.is_some() && now != before
        });
    }

    fn pause(&self, time: Duration) {
        self.signal("-STOP");
        std::thread::sleep(time);
        self.signal("-CONT");
    }
}

#[test]
fn cuts_killed_workers_and_pauses_lose_and_repeat_nothing() {
    let (programs, events) = match std::env::var_os("BELLJAR_SOAK") {
        Some(_) => (100, 2000),
        None => (40, 60),
    };
    trial::run(
        &Native(Agent::start()),
        programs,
        events,
        Duration::from_millis(200),
    );
}
