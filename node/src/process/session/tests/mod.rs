mod hostile;
mod model;

use proptest::prelude::*;

use super::*;
use model::{Agent, Collected};

fn exec() -> v1::Exec {
    v1::Exec {
        name: "job".into(),
        owner_key: vec![7; 16],
        stdin: v1::exec::Stdin::Stream.into(),
        ..v1::Exec::default()
    }
}

fn bytes(count: usize, seed: u8) -> Vec<u8> {
    (0..count)
        .map(|at| (at as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed)
        .collect()
}

/// What happens next between a session and an agent.
#[derive(Debug, Clone)]
enum Act {
    /// So many bytes get through.
    ToGuest(usize),
    ToHost(usize),
    Type(usize),
    Say(usize),
    Take(usize),
    Cut,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (1_usize..600).prop_map(Act::ToGuest),
        6 => (1_usize..600).prop_map(Act::ToHost),
        3 => (1_usize..400).prop_map(Act::Type),
        3 => (1_usize..400).prop_map(Act::Say),
        3 => (1_usize..400).prop_map(Act::Take),
        2 => Just(Act::Cut),
    ]
}

/// Both ends, and the bytes on their way.
struct Story {
    session: Session,
    agent: Agent,
    collected: Collected,
    typed: Vec<u8>,
    input: Vec<u8>,
}

impl Story {
    fn new(session: Session, agent: Agent, input: Vec<u8>) -> Self {
        let mut story = Self {
            session,
            agent,
            collected: Collected::default(),
            typed: Vec::new(),
            input,
        };
        story.dial();
        story
    }

    fn dial(&mut self) {
        self.session.connected(Some(1024)).unwrap();
        self.agent.accept();
    }

    fn act(&mut self, act: &Act) {
        match *act {
            Act::ToGuest(count) => {
                let unsent = self.session.unsent();
                let count = count.min(unsent.len());
                let sent = unsent[..count].to_vec();
                self.session.sent(count);
                self.agent.receive(&sent);
            }
            Act::ToHost(count) => {
                let bytes = self.agent.send(count);
                let collected = &mut self.collected;
                match self.session.receive(&bytes, |event| collected.take(&event)) {
                    Ok(Step::Redial | Step::Later) => {
                        self.session.moved_on();
                        self.dial();
                    }
                    Ok(_) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            Act::Type(count) => {
                if self.session.wants_input() {
                    let from = self.typed.len();
                    let to = self.input.len().min(from + count);
                    self.session.input(&self.input[from..to]);
                    self.typed.extend_from_slice(&self.input[from..to]);
                    if to == self.input.len() {
                        self.session.input_end();
                    }
                }
            }
            Act::Say(count) => self.agent.say(count),
            Act::Take(count) => self.agent.take(count),
            Act::Cut => {
                if !self.session.is_over() {
                    self.session.disconnected().unwrap();
                    self.dial();
                }
            }
        }
    }

    /// Without further accidents, up to the end.
    fn finish(&mut self) {
        for _ in 0..4000 {
            if self.session.is_over() {
                return;
            }
            for act in [
                Act::ToGuest(5000),
                Act::Type(900),
                Act::Say(900),
                Act::Take(900),
                Act::ToHost(5000),
            ] {
                self.act(&act);
            }
        }
        panic!("it does not end: {:?}", self.session);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is cut, wherever: every byte once, in order, both ways; and one start.
    #[test]
    fn cuts_lose_and_repeat_nothing(
        acts in proptest::collection::vec(act(), 0..200),
        input in 0_usize..4000,
        out in 0_usize..4000,
        err in 0_usize..1000,
        other_first in any::<bool>(),
    ) {
        let (input, out, err) = (bytes(input, 1), bytes(out, 2), bytes(err, 3));
        let mut agent = Agent::new(out.clone(), err.clone());
        let mut exec = exec();
        if other_first {
            // Somebody's process of that name that has ended: it is to be replaced, once.
            agent.has_ended_other();
            exec.replace_ended = true;
        }
        let mut story = Story::new(Session::exec(exec, None), agent, input.clone());
        for act in &acts {
            story.act(act);
        }
        story.finish();
        prop_assert_eq!(story.agent.starts, 1);
        prop_assert_eq!(&story.collected.out, &out);
        prop_assert_eq!(&story.collected.err, &err);
        prop_assert_eq!(&story.agent.input, &input);
        prop_assert!(story.agent.input_ended);
        prop_assert_eq!(story.collected.ends, 1);
        prop_assert_eq!(story.collected.gaps, 0);
    }
}

#[test]
fn a_reply_that_was_lost_starts_nothing_twice() {
    let agent = Agent::new(b"once".to_vec(), Vec::new());
    let mut story = Story::new(Session::exec(exec(), None), agent, Vec::new());
    story.act(&Act::ToGuest(10_000));
    assert_eq!(story.agent.starts, 1);
    // Its answer does not arrive.
    story.act(&Act::Cut);
    story.finish();
    assert_eq!(story.agent.starts, 1);
    assert_eq!(story.collected.out, b"once");
    assert!(!story.collected.started.unwrap().existed);
}

#[test]
fn a_request_that_was_cut_is_simply_sent_again() {
    let agent = Agent::new(b"x".to_vec(), Vec::new());
    let mut story = Story::new(Session::exec(exec(), None), agent, Vec::new());
    story.act(&Act::ToGuest(20));
    story.act(&Act::Cut);
    story.finish();
    assert_eq!(story.agent.starts, 1);
    assert_eq!(story.agent.pings, 0);
}

#[test]
fn a_process_that_was_there_is_told_and_watched() {
    let mut agent = Agent::new(b"said before".to_vec(), Vec::new());
    agent.has_running_other();
    let mut exec = exec();
    exec.owner_key = vec![9; 16];
    let mut story = Story::new(Session::exec(exec, None), agent, b"typed".to_vec());
    story.finish();
    assert_eq!(story.agent.starts, 0);
    assert!(story.collected.started.unwrap().existed);
    assert_eq!(story.collected.out, b"said before");
    assert_eq!(story.agent.input, b"typed");
}

#[test]
fn a_detached_start_is_over_when_it_is_known_to_run() {
    let mut exec = exec();
    exec.detached = true;
    let agent = Agent::new(b"later".to_vec(), Vec::new());
    let mut story = Story::new(
        Session::exec(exec.clone(), Some("detached processes")),
        agent,
        Vec::new(),
    );
    story.finish();
    assert_eq!((story.agent.pings, story.agent.starts), (1, 1));
    assert_eq!(story.collected.started.unwrap().id, 5);
    assert_eq!(story.collected.out, b"");

    // The same with a reply that was lost.
    let agent = Agent::new(b"later".to_vec(), Vec::new());
    let mut story = Story::new(Session::exec(exec, None), agent, Vec::new());
    story.act(&Act::ToGuest(10_000));
    story.act(&Act::Cut);
    story.finish();
    assert_eq!(story.agent.starts, 1);
    assert!(!story.collected.started.unwrap().existed);
}

#[test]
fn what_the_ring_has_lost_is_told_once() {
    let out = bytes(5000, 4);
    let mut agent = Agent::new(out.clone(), Vec::new());
    agent.has_running_other();
    agent.ring = 1000;
    agent.say(5000);
    let attach = v1::Attach {
        follow: true,
        read_only: true,
        process: Some(v1::ProcessRef {
            r#ref: Some(v1::process_ref::Ref::Name("job".into())),
        }),
        stdout: Some(v1::Position {
            at: Some(v1::position::At::Offset(100)),
        }),
        ..v1::Attach::default()
    };
    let mut story = Story::new(Session::attach(attach), agent, Vec::new());
    story.act(&Act::ToGuest(10_000));
    story.act(&Act::ToHost(100));
    story.act(&Act::Cut);
    story.finish();
    assert_eq!(story.collected.gaps, 1);
    assert_eq!(story.collected.missing, 3900);
    assert_eq!(story.collected.out, out[4000..]);
}

#[test]
fn leaving_is_confirmed_even_if_the_connection_breaks_over_it() {
    let agent = Agent::new(bytes(5000, 4), Vec::new());
    let mut story = Story::new(Session::exec(exec(), None), agent, b"never ended".to_vec());
    for act in [Act::ToGuest(10_000), Act::ToHost(10_000)] {
        story.act(&act);
    }
    story.session.detach();
    assert!(!story.session.wants_input());
    story.act(&Act::ToGuest(1));
    story.act(&Act::Cut);
    story.finish();
    assert!(story.collected.detached);
    assert!(story.agent.detached);
}

#[test]
fn leaving_is_asked_for_again_if_a_worker_took_it_and_died() {
    let agent = Agent::new(bytes(5000, 4), Vec::new());
    let mut story = Story::new(Session::exec(exec(), None), agent, Vec::new());
    for act in [Act::ToGuest(10_000), Act::ToHost(10_000)] {
        story.act(&act);
    }
    story.session.detach();
    story.act(&Act::ToGuest(10_000));
    assert!(std::mem::take(&mut story.agent.detached));
    story.act(&Act::Cut);
    story.finish();
    assert!(story.collected.detached);
    assert!(story.agent.detached);
}

#[test]
fn an_old_agent_runs_commands_and_refuses_the_rest_by_its_generation() {
    let mut agent = Agent::new(b"old".to_vec(), Vec::new());
    agent.generation = 1;
    let mut story = Story::new(Session::exec(exec(), None), agent, b"in".to_vec());
    story.finish();
    assert_eq!(story.collected.out, b"old");
    assert_eq!(story.agent.input, b"in");
    assert_eq!(story.collected.started.unwrap().id, 0);

    let mut agent = Agent::new(Vec::new(), Vec::new());
    agent.generation = 1;
    agent.accept();
    let mut session = Session::exec(exec(), Some("terminals"));
    session.connected(None).unwrap();
    let sent = session.unsent().to_vec();
    agent.receive_bare(&sent);
    let answer = agent.send(1000);
    let error = session.receive(&answer, |_| ()).unwrap_err();
    assert!(error.to_string().contains("generation 1") && error.to_string().contains("terminals"));
    assert_eq!(agent.starts, 0);
    assert!(session.disconnected().is_err());
}

#[test]
fn an_old_agent_is_never_asked_to_start_twice() {
    let mut agent = Agent::new(b"old".to_vec(), Vec::new());
    agent.generation = 1;
    let mut session = Session::exec(exec(), None);
    session.connected(None).unwrap();
    let sent = session.unsent().len();
    session.sent(sent);
    session.disconnected().unwrap();
    session.connected(None).unwrap();
    let sent = session.unsent().to_vec();
    agent.accept();
    agent.receive_bare(&sent);
    assert_eq!((agent.starts, agent.pings), (0, 1));
    let error = session.receive(&agent.send(1000), |_| ()).unwrap_err();
    assert!(matches!(error, SessionError::CutBeforeStart), "{error}");

    // One that was running is lost with its connection.
    let mut session = Session::exec(exec(), None);
    session.connected(None).unwrap();
    let sent = session.unsent().to_vec();
    agent.accept();
    agent.receive_bare(&sent);
    session.receive(&agent.send(1000), |_| ()).unwrap();
    let error = session.disconnected().unwrap_err();
    assert!(
        matches!(error, SessionError::Cut { generation: 1 }),
        "{error}"
    );
}
