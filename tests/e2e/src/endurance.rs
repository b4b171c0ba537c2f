//! Programs that send back what they are sent, and clients that are cut off again and again: what comes
//! back must be, byte for byte, what was sent.

use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use belljar_protocol::client::{CallError, Connection, Exec};
use belljar_protocol::v1::{self, exec_input::Input, exec_output::Output, reply, request::Call};

/// In flight between the client and the program: less than a terminal's input queue.
const WINDOW: usize = 2048;

/// A connection that fails is tried again for this long.
const PATIENCE: Duration = Duration::from_secs(120);

/// A small generator (xorshift64*) of repeatable choices and bytes.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 20;
        usize::try_from(mixed).unwrap_or(0) % limit.max(1)
    }
}

/// One program that echoes, and the client of it.
#[derive(Debug)]
pub struct Echo {
    /// 1, 2, …; makes its bytes and its name its own.
    pub number: u64,
    pub on_terminal: bool,
    /// Set by the story to have the client cut its connection.
    pub cut: AtomicBool,
    /// How often it was connected anew, for whatever reason.
    pub reconnects: AtomicUsize,
    /// How much has come back.
    pub progress: AtomicUsize,
    /// What its client does and how far it is, for a story that stands still.
    doing: Mutex<String>,
    ended: AtomicBool,
}

impl Echo {
    #[must_use]
    pub const fn new(number: u64, on_terminal: bool) -> Self {
        Self {
            number,
            on_terminal,
            cut: AtomicBool::new(false),
            reconnects: AtomicUsize::new(0),
            progress: AtomicUsize::new(0),
            doing: Mutex::new(String::new()),
            ended: AtomicBool::new(false),
        }
    }

    /// Whether its client is through, or failed.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// What its client does and how far it is.
    #[must_use]
    pub fn doing(&self) -> String {
        let doing = self
            .doing
            .lock()
            .map_or_else(|_| String::new(), |text| text.clone());
        format!("{} (terminal: {}): {doing}", self.name(), self.on_terminal)
    }

    /// The program's name in the guest.
    #[must_use]
    pub fn name(&self) -> String {
        format!("echo-{}", self.number)
    }

    /// Starts the program. A start whose answer is lost is repeated: the name makes that harmless.
    fn start(&self, connect: &dyn Fn() -> Option<UnixStream>) {
        let script = if self.on_terminal {
            "stty raw -echo && echo ready && exec cat"
        } else {
            "echo ready && exec cat"
        };
        let exec = v1::Exec {
            argv: ["sh", "-c", script]
                .map(|word| word.as_bytes().to_vec())
                .to_vec(),
            stdin: v1::exec::Stdin::Stream.into(),
            name: self.name(),
            detached: true,
            terminal: self.on_terminal.then(v1::Terminal::default),
            ..v1::Exec::default()
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let started = connect().map(|stream| Exec::start(stream, exec.clone(), Some(deadline)));
            match started {
                Some(Ok(_)) => return,
                Some(Err(error)) if !is_cut(&error) => panic!("{}: {error}", self.name()),
                _ => {}
            }
            assert!(Instant::now() < deadline, "{} does not start", self.name());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Runs the program and its client, which types something every `pace` or so, until `stop`, and then until
    /// all that was sent is back. Returns how many bytes that were.
    ///
    /// # Panics
    /// Bytes are missing, differ, or come twice.
    pub fn run(
        &self,
        connect: &dyn Fn() -> Option<UnixStream>,
        pace: Duration,
        stop: &AtomicBool,
    ) -> usize {
        const READY: &[u8] = b"ready\n";
        let _ends = Ends(&self.ended);
        self.start(connect);
        let mut client = Client {
            echo: self,
            connect,
            connection: None,
            content: Vec::new(),
            taken: 0,
            sent: 0,
            received: Vec::new(),
        };
        // Nothing is typed before the terminal is raw.
        while client.received.len() < READY.len() {
            client.take();
        }
        let mut next = Instant::now();
        let mut random = Random::new(self.number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        loop {
            let back = client.received.len() - READY.len();
            let ends = stop.load(Ordering::Relaxed);
            if ends && back == client.content.len() {
                break;
            }
            if client.sent < client.content.len() {
                client.give();
            } else if !ends && Instant::now() >= next && client.content.len() < back + WINDOW {
                let length = 1 + random.below(WINDOW - (client.content.len() - back));
                let piece = (0..length).map(|_| random.below(256) as u8);
                client.content.extend(piece);
                client.give();
                next = Instant::now() + pace / 2 + pace * random.below(100) as u32 / 100;
            } else {
                client.take();
            }
        }
        let body = client.received.get(READY.len()..).unwrap_or_default();
        let differs = body
            .iter()
            .zip(&client.content)
            .position(|(one, other)| one != other);
        assert_eq!(
            differs,
            None,
            "{}: the first byte that differs",
            self.name()
        );
        assert_eq!(body.len(), client.content.len(), "{}", self.name());
        body.len()
    }
}

/// Says that something has ended, also when it failed.
#[derive(Debug)]
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What of a failure is no more than a connection that was cut.
fn is_cut(error: &CallError) -> bool {
    matches!(
        error,
        CallError::Closed { .. } | CallError::Io { .. } | CallError::Timeout { .. }
    )
}

struct Client<'a> {
    echo: &'a Echo,
    connect: &'a dyn Fn() -> Option<UnixStream>,
    connection: Option<Connection<UnixStream>>,
    /// What is typed.
    content: Vec<u8>,
    /// Of the input session, as the agent said last.
    taken: usize,
    /// Of the input, on this connection or taken before.
    sent: usize,
    received: Vec<u8>,
}

impl Client<'_> {
    fn says(&self, what: &str) {
        if let Ok(mut doing) = self.echo.doing.lock() {
            *doing = format!(
                "{what}; {} typed, {} sent, {} taken, {} came back",
                self.content.len(),
                self.sent,
                self.taken,
                self.received.len()
            );
        }
    }

    /// Connected, from where both directions were.
    fn connection(&mut self) -> &mut Connection<UnixStream> {
        if self.echo.cut.swap(false, Ordering::Relaxed) {
            self.connection = None;
        }
        let deadline = Instant::now() + PATIENCE;
        while self.connection.is_none() {
            assert!(
                Instant::now() < deadline,
                "{} cannot be attached to",
                self.echo.name()
            );
            match self.attach(deadline) {
                Some(connection) => self.connection = Some(connection),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        self.connection.as_mut().unwrap()
    }

    fn attach(&mut self, deadline: Instant) -> Option<Connection<UnixStream>> {
        self.says("attaches");
        let offset = |at: usize| v1::Position {
            at: Some(v1::position::At::Offset(at as u64)),
        };
        let attach = v1::Attach {
            process: Some(v1::ProcessRef {
                r#ref: Some(v1::process_ref::Ref::Name(self.echo.name())),
            }),
            stdout: Some(offset(self.received.len())),
            follow: true,
            input_session: self.echo.number,
            input_offset: self.taken as u64,
            ..v1::Attach::default()
        };
        let mut connection = Connection::new((self.connect)()?);
        match connection.call(Call::Attach(attach), "attach", Some(deadline)) {
            Ok((_, reply::Result::Attach(attached))) => {
                assert_eq!(attached.stdout_from, self.received.len() as u64, "a gap");
                // What is sent again from here on is dropped by the agent as far as it was taken.
                self.sent = self.taken;
                self.echo.reconnects.fetch_add(1, Ordering::Relaxed);
                Some(connection)
            }
            Ok((_, other)) => panic!("attach was answered with {other:?}"),
            Err(error) if is_cut(&error) => None,
            Err(error) => panic!("{}: {error}", self.echo.name()),
        }
    }

    /// Sends what was not sent yet.
    fn give(&mut self) {
        let deadline = Some(Instant::now() + PATIENCE);
        self.connection();
        self.says("types");
        let piece = self.content.get(self.sent..).unwrap_or_default().to_vec();
        let end = self.content.len();
        let Some(connection) = &mut self.connection else {
            return;
        };
        let input = v1::ExecInput {
            input: Some(Input::Stdin(piece)),
        };
        match connection.send(&input, "typing", deadline) {
            Ok(()) => self.sent = end,
            Err(error) if is_cut(&error) => self.connection = None,
            Err(error) => panic!("{}: {error}", self.echo.name()),
        }
    }

    /// Takes one frame.
    fn take(&mut self) {
        // Short, so that a cut that the story orders is noticed while nothing comes.
        let deadline = Some(Instant::now() + Duration::from_millis(200));
        self.connection();
        self.says("reads");
        let outcome = self
            .connection()
            .receive::<v1::ExecOutput>("output", deadline);
        let output = match outcome {
            Ok(Some(message)) => message.output,
            Err(CallError::Timeout { .. }) => return,
            Ok(None) => {
                self.connection = None;
                return;
            }
            Err(error) if is_cut(&error) => {
                self.connection = None;
                return;
            }
            Err(error) => panic!("{}: {error}", self.echo.name()),
        };
        match output {
            Some(Output::Stdout(bytes)) => {
                self.received.extend(bytes);
                self.echo
                    .progress
                    .store(self.received.len(), Ordering::Relaxed);
            }
            Some(Output::InputTaken(taken)) => {
                let taken = usize::try_from(taken).unwrap_or(usize::MAX);
                assert!(
                    taken <= self.sent && taken >= self.taken,
                    "taken {taken} of {}",
                    self.sent
                );
                self.taken = taken;
            }
            Some(Output::CaughtUp(_) | Output::Resized(_)) | None => {}
            Some(other) => panic!("{}: {other:?}", self.echo.name()),
        }
    }
}
