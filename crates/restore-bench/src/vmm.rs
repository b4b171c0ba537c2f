//! One VMM process from its start to its end, driven as any client of its API would.

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use serde_json::{Value, json};

use crate::failure::{Attempt, Failure, Result};
use crate::http::Client;

/// Nothing takes longer, even with processors in software.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A binary that is measured.
#[derive(Clone, Debug)]
pub struct Binary {
    pub name: String,
    pub path: PathBuf,
}

/// What the last VMM's end left to the host's kernel is done by then.
pub const SETTLING: Duration = Duration::from_millis(100);

/// Between attempts to connect to a socket that is there but not listened on; the kernel's timer slack comes on top.
const RETRY: Duration = Duration::from_micros(10);

/// What every guest gets, whichever VMM runs it.
#[derive(Clone, Debug)]
pub struct Machine {
    pub kernel: PathBuf,
    pub vcpus: u32,
    pub memory_mib: u64,
    pub boot_args: String,
}

/// A drive of a guest.
#[derive(Clone, Debug)]
pub struct Drive {
    pub id: &'static str,
    pub path: PathBuf,
    pub read_only: bool,
    /// `Sync` or `Async`.
    pub engine: &'static str,
    /// The file of its one layer, which is new each time; only of our own VMM.
    pub layer: Option<PathBuf>,
}

impl Drive {
    fn document(&self) -> Result<Value> {
        let mut document = json!({"drive_id": self.id, "path_on_host": self.path, "is_root_device": false,
            "is_read_only": self.read_only, "io_engine": self.engine});
        if let Some(layer) = &self.layer {
            fs::File::create(layer).attempt("cannot make a layer")?;
            let fields = [("format", json!("layers")), ("layers", json!([layer]))];
            if let Some(document) = document.as_object_mut() {
                document.extend(fields.map(|(name, value)| (name.to_owned(), value)));
            }
        }
        Ok(document)
    }
}

/// A process with an API that has answered once. Killed when dropped; its directory goes with it.
pub struct Vmm {
    child: Child,
    directory: PathBuf,
    pub api: Client,
    /// From before the start of the process to the answer of its API.
    pub answered: Duration,
}

impl Vmm {
    /// Starts `command` with `--api-sock PATH` and waits for the first answer. Costs no processor time while
    /// it waits: the socket file's creation wakes it up, then it connects, within some 60 us of when that can succeed.
    pub fn start(command: Command, directory: PathBuf) -> Result<Self> {
        std::thread::sleep(SETTLING);
        Self::start_now(command, directory)
    }

    /// The same, without waiting for what earlier ones left to the host's kernel.
    pub fn start_now(mut command: Command, directory: PathBuf) -> Result<Self> {
        fs::create_dir(&directory).attempt(format!("cannot make {}", directory.display()))?;
        let socket = directory.join("api");
        let log = fs::File::create(directory.join("log")).attempt("cannot make a log")?;
        let watch = watch(&directory)?;
        command.arg("--api-sock").arg(&socket);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let start = Instant::now();
        let child = command
            .spawn()
            .attempt(format!("cannot start {}", command.get_program().display()))?;
        let answer = first_answer(&watch, &socket);
        let answered = start.elapsed();
        match answer {
            Ok(api) => Ok(Self {
                child,
                directory,
                api,
                answered,
            }),
            Err(failure) => {
                let said = end(child, &directory);
                Err(Failure(format!("{failure}; it said: {said}")))
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where the VMM puts its vsock; the guest's connections to port P arrive at `…_P`.
    pub fn vsock(&self) -> PathBuf {
        self.directory.join("vsock")
    }

    /// Configures a guest, not started yet.
    pub fn configure(&mut self, machine: &Machine, initrd: &Path, drives: &[Drive]) -> Result<()> {
        self.api.put(
            "/machine-config",
            &json!({"vcpu_count": machine.vcpus, "mem_size_mib": machine.memory_mib}),
        )?;
        self.api.put(
            "/boot-source",
            &json!({"kernel_image_path": machine.kernel, "initrd_path": initrd, "boot_args": machine.boot_args}),
        )?;
        for drive in drives {
            self.api
                .put(&format!("/drives/{}", drive.id), &drive.document()?)?;
        }
        let vsock = self.vsock();
        self.api
            .put("/vsock", &json!({"guest_cid": 3, "uds_path": vsock}))
    }

    /// Starts the guest and takes the first `length` bytes that it sends to `port`.
    pub fn boot(&mut self, port: u32, length: usize) -> Result<Booted> {
        let path = format!("{}_{port}", self.vsock().display());
        let listener = UnixListener::bind(&path).attempt(format!("cannot listen on {path}"))?;
        let action: Value = json!({"action_type": "InstanceStart"});
        let start = Instant::now();
        self.api.begin_put("/actions", &action)?;
        wait(&self.api).map_err(|failure| self.explain(&failure))?;
        self.api.answer("/actions")?;
        let returned = start.elapsed();
        wait(&listener).map_err(|failure| self.explain(&failure))?;
        let (mut stream, _) = listener.accept().attempt("the guest's connection")?;
        stream
            .set_read_timeout(Some(PATIENCE))
            .attempt("the guest's connection")?;
        let mut first = vec![0; length];
        stream
            .read_exact(&mut first)
            .attempt("the guest's first words")?;
        Ok(Booted {
            started: start,
            returned,
            replied: start.elapsed(),
            first,
            stream,
        })
    }

    /// Connects to a port of the guest, by the `CONNECT` handshake.
    pub fn connect(&self, port: u32) -> Result<UnixStream> {
        connect(&self.vsock(), port)
    }

    /// What the process said, added to a failure.
    #[must_use]
    pub fn explain(&self, failure: &Failure) -> Failure {
        let said = fs::read_to_string(self.directory.join("log")).unwrap_or_default();
        Failure(format!("{failure}; the VMM said: {said}"))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A guest that has said its first words.
pub struct Booted {
    /// Just before `InstanceStart`.
    pub started: Instant,
    /// From `InstanceStart` to its answer.
    pub returned: Duration,
    /// From `InstanceStart` to the first words.
    pub replied: Duration,
    pub first: Vec<u8>,
    pub stream: UnixStream,
}

/// One connection to a guest's port behind its VMM's socket.
pub fn connect(socket: &Path, port: u32) -> Result<UnixStream> {
    use std::io::Write;
    let mut stream = UnixStream::connect(socket).attempt("cannot connect to the vsock socket")?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .attempt("CONNECT")?;
    let mut line = [0; 32];
    let length = stream.read(&mut line).attempt("no answer to CONNECT")?;
    // The line comes in one piece: the VMM writes it so, and the guest does not speak first.
    match line.get(..length) {
        Some([b'O', b'K', b' ', .., b'\n']) => Ok(stream),
        _ => Err(Failure(format!("CONNECT {port} was not answered"))),
    }
}

/// Ends a process that did not do what it should; returns what it said.
fn end(mut child: Child, directory: &Path) -> String {
    let _ = child.kill();
    let _ = child.wait();
    let said = fs::read_to_string(directory.join("log")).unwrap_or_default();
    let _ = fs::remove_dir_all(directory);
    said
}

fn watch(directory: &Path) -> Result<OwnedFd> {
    let flags = inotify::CreateFlags::CLOEXEC;
    let watch = inotify::init(flags).attempt("inotify")?;
    let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
    inotify::add_watch(&watch, directory, events).attempt("inotify")?;
    Ok(watch)
}

fn first_answer(watch: &OwnedFd, socket: &Path) -> Result<Client> {
    let deadline = Instant::now() + PATIENCE;
    wait(watch)?;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                let mut client = Client::new(stream);
                client.get("/")?;
                return Ok(client);
            }
            Err(error) if Instant::now() > deadline => {
                return Err(Failure(format!("cannot connect to the API: {error}")));
            }
            // Made, but nobody listens yet. Yielding would not do: on one CPU the scheduler may let the VMM
            // wait for its next tick all the same, 4 ms later.
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

/// Waits until there is something to read.
fn wait(source: &impl std::os::fd::AsFd) -> Result<()> {
    let limit = Timespec {
        tv_sec: PATIENCE.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    let mut sources = [PollFd::new(source, PollFlags::IN)];
    match poll(&mut sources, Some(&limit)).attempt("poll")? {
        0 => Err(Failure(format!(
            "nothing came for {} s",
            PATIENCE.as_secs()
        ))),
        _ => Ok(()),
    }
}
