//! Calls with streams, and others about processes.

use std::os::unix::net::UnixStream;

use belljar_protocol::client::{CallError, Connection};
use belljar_protocol::v1::{
    self, end::How, exec_input::Input, exec_output::Output, position::At, process_ref::Ref,
    reply::Result as Answer, request::Call,
};

use super::{Agent, sh, soon};

/// A call whose stream is looked at frame by frame.
pub struct Stream {
    pub connection: Connection<UnixStream>,
    pub head: Answer,
}

impl Stream {
    pub fn open(agent: &Agent, call: Call) -> Self {
        let mut connection = Connection::new(agent.connect());
        let (_, head) = connection.call(call, "test", soon()).unwrap();
        Self { connection, head }
    }

    pub fn started(&self) -> &v1::ExecStarted {
        match &self.head {
            Answer::Exec(started) => started,
            other => panic!("{other:?}"),
        }
    }

    pub fn attached(&self) -> &v1::Attached {
        match &self.head {
            Answer::Attach(attached) => attached,
            other => panic!("{other:?}"),
        }
    }

    pub fn send(&mut self, input: Input) {
        let input = v1::ExecInput { input: Some(input) };
        self.connection.send(&input, "input", soon()).unwrap();
    }

    pub fn next(&mut self) -> Option<Output> {
        let message: Option<v1::ExecOutput> = self.connection.receive("output", soon()).ok()?;
        message.map(|message| message.output.unwrap())
    }

    /// All output up to the last frame: (stdout, the other frames).
    pub fn rest(&mut self) -> (Vec<u8>, Vec<Output>) {
        let (mut stdout, mut others) = (Vec::new(), Vec::new());
        while let Some(output) = self.next() {
            match output {
                Output::Stdout(bytes) => stdout.extend(bytes),
                Output::End(_) | Output::Detached(_) => {
                    others.push(output);
                    break;
                }
                other => others.push(other),
            }
        }
        (stdout, others)
    }

    /// Reads until stdout holds a text.
    pub fn until(&mut self, text: &str) -> Vec<u8> {
        let mut stdout = Vec::new();
        loop {
            if String::from_utf8_lossy(&stdout).contains(text) {
                return stdout;
            }
            match self.next() {
                Some(Output::Stdout(bytes)) => stdout.extend(bytes),
                Some(_) => {}
                None => panic!("no {text:?} in {:?}", String::from_utf8_lossy(&stdout)),
            }
        }
    }
}

pub fn call(agent: &Agent, call: Call) -> Result<Answer, CallError> {
    let (_, answer) = Connection::new(agent.connect()).call(call, "test", soon())?;
    Ok(answer)
}

pub fn refused(agent: &Agent, what: Call) -> v1::error::Code {
    match call(agent, what) {
        Err(CallError::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

pub fn by_name(name: &str) -> Option<v1::ProcessRef> {
    let r#ref = Some(Ref::Name(name.to_owned()));
    Some(v1::ProcessRef { r#ref })
}

pub fn by_id(id: u64) -> Option<v1::ProcessRef> {
    let r#ref = Some(Ref::Id(id));
    Some(v1::ProcessRef { r#ref })
}

pub fn at(at: At) -> Option<v1::Position> {
    Some(v1::Position { at: Some(at) })
}

/// Named and detached.
pub fn daemon(name: &str, script: &str) -> v1::Exec {
    v1::Exec {
        name: name.to_owned(),
        detached: true,
        ..sh(script)
    }
}

pub fn attach(process: Option<v1::ProcessRef>) -> v1::Attach {
    v1::Attach {
        process,
        follow: true,
        ..v1::Attach::default()
    }
}

pub fn wait(agent: &Agent, process: Option<v1::ProcessRef>) -> v1::ProcessInfo {
    let wait = v1::WaitEnd {
        process,
        time_limit_ms: 20_000,
    };
    match call(agent, Call::WaitEnd(wait)).unwrap() {
        Answer::WaitEnd(info) => info,
        other => panic!("{other:?}"),
    }
}

pub fn how(info: &v1::ProcessInfo) -> How {
    info.end.clone().unwrap().how.unwrap()
}

pub fn kill(agent: &Agent, process: Option<v1::ProcessRef>) -> bool {
    let signal = v1::Signal {
        process,
        number: 9,
        scope: v1::signal::Scope::Tree.into(),
    };
    match call(agent, Call::Signal(signal)).unwrap() {
        Answer::Signal(sent) => sent.was_ended,
        other => panic!("{other:?}"),
    }
}
