//! A Linux guest in a `belljar-vmm` of its own, with the agent in it.

use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use belljar_protocol::client::{Exec, ExecEvent, ping, receive_ready, shutdown};
use belljar_protocol::{AGENT_PORT, READY_PORT, hybrid, v1};
use serde_json::{Value, json};

use crate::vmm::Vmm;
use crate::{PATIENCE, assets_dir};

/// Words of the kernel's command line that every guest gets.
pub const BOOT_ARGS: &str = "console=hvc0 loglevel=6 panic=-1 reboot=k belljar.image=/dev/vda";

/// Most bytes that a script in the guest may print.
const OUTPUT_MAX: usize = 64 << 20;

/// What a guest is made of.
#[derive(Debug, Clone)]
pub struct Spec {
    pub vcpus: u32,
    pub memory_mib: u64,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// Added to [`BOOT_ARGS`].
    pub args: String,
    /// Further fields of `/boot-source`.
    pub boot: Value,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_mib: 256,
            kernel: assets_dir().join("vmlinux"),
            initramfs: assets_dir().join("initramfs"),
            args: String::new(),
            boot: json!({}),
        }
    }
}

/// A guest whose agent has said that it is ready.
#[derive(Debug)]
pub struct Guest {
    pub vmm: Vmm,
    pub ready: v1::Ready,
    console: Console,
}

/// What a guest wrote to its console. When a test fails, it is shown.
#[derive(Debug, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the guest's console:\n{}", self.text());
        }
    }
}

impl Guest {
    /// Boots a guest of this shape.
    #[must_use]
    pub fn boot(spec: &Spec) -> Self {
        Self::boot_with(spec, |_| {})
    }

    /// Boots a guest; `more` makes further calls before the start.
    #[must_use]
    pub fn boot_with(spec: &Spec, more: impl FnOnce(&Vmm)) -> Self {
        let vmm = Vmm::new();
        configure(&vmm, spec);
        more(&vmm);
        Self::start(vmm, |vmm| {
            vmm.action("InstanceStart").is_done();
        })
    }

    /// Starts a VMM that has everything it needs, and waits for the agent.
    ///
    /// # Panics
    /// The agent is not ready in time.
    #[must_use]
    pub fn start(vmm: Vmm, start: impl FnOnce(&Vmm)) -> Self {
        let listener = UnixListener::bind(vmm.path(&format!("v.sock_{READY_PORT}"))).unwrap();
        let console = Console::default();
        start(&vmm);
        follow_console(&vmm.path("console.sock"), Arc::clone(&console.0));
        let mut guest = Self {
            vmm,
            ready: v1::Ready::default(),
            console,
        };
        let stream = guest.accept(&listener);
        guest.ready = receive_ready(stream, deadline()).unwrap();
        assert_eq!(guest.ready.degraded, "");
        let _ = std::fs::remove_file(guest.vmm.path(&format!("v.sock_{READY_PORT}")));
        guest
    }

    /// A guest that a VMM has loaded from a snapshot, and that runs.
    #[must_use]
    pub fn loaded(vmm: Vmm) -> Self {
        let console = Console::default();
        follow_console(&vmm.path("console.sock"), Arc::clone(&console.0));
        Self {
            vmm,
            ready: v1::Ready::default(),
            console,
        }
    }

    /// A connection that the guest makes to a listener.
    ///
    /// # Panics
    /// It makes none.
    pub fn accept(&mut self, listener: &UnixListener) -> UnixStream {
        listener.set_nonblocking(true).unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).unwrap();
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    stream.set_write_timeout(Some(PATIENCE)).unwrap();
                    return stream;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("accept: {error}"),
            }
            assert!(
                !self.vmm.has_ended() && Instant::now() < deadline,
                "the guest does not connect; its console:\n{}",
                self.console()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// What the guest wrote to its console by now.
    #[must_use]
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// The Unix socket behind which the guest's vsock ports are.
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.vmm.path("v.sock")
    }

    /// A connection to a vsock port of the guest.
    ///
    /// # Panics
    /// Nobody listens there.
    #[must_use]
    pub fn connect(&self, port: u32) -> UnixStream {
        let stream = hybrid::connect(&self.vsock(), port, Instant::now() + PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Starts a program in the guest.
    ///
    /// # Panics
    /// It cannot be started.
    #[must_use]
    pub fn spawn(&self, words: &[&str]) -> Process {
        let exec = v1::Exec {
            argv: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
            ..v1::Exec::default()
        };
        let exec = Exec::start(self.connect(AGENT_PORT), exec, deadline())
            .unwrap_or_else(|error| panic!("{words:?}: {error}; console:\n{}", self.console()));
        Process {
            exec,
            printed: Vec::new(),
        }
    }

    /// Starts a program that goes on whatever becomes of us.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn detach(&self, words: &[&str]) {
        let exec = v1::Exec {
            argv: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
            detached: true,
            ..v1::Exec::default()
        };
        Exec::start(self.connect(AGENT_PORT), exec, deadline())
            .unwrap_or_else(|error| panic!("{words:?}: {error}; console:\n{}", self.console()));
    }

    /// Runs a program to its end: (status, standard output, standard error).
    ///
    /// # Panics
    /// It does not exit.
    #[must_use]
    pub fn run(&self, words: &[&str]) -> (u32, Vec<u8>, String) {
        let process = self.spawn(words);
        let (out, err, how) = process.exec.finish(OUTPUT_MAX, deadline()).unwrap();
        let err = String::from_utf8_lossy(&err).into_owned();
        match how {
            v1::end::How::Exited(exited) => (exited.code, out, err),
            how => panic!(
                "{words:?} ended as {how:?}: {err}; console:\n{}",
                self.console()
            ),
        }
    }

    /// What a shell script that must succeed prints, without the last line end.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.printed(&["bash", "-ec", script])
    }

    /// What a Python program that must succeed prints, without the last line end.
    #[track_caller]
    pub fn python(&self, program: &str) -> String {
        self.printed(&["python3", "-c", program])
    }

    #[track_caller]
    fn printed(&self, words: &[&str]) -> String {
        let (status, out, err) = self.run(words);
        assert_eq!(
            status,
            0,
            "{words:?}: {err}\n{}",
            String::from_utf8_lossy(&out)
        );
        String::from_utf8_lossy(&out).trim_end().to_owned()
    }

    /// The agent answers.
    #[track_caller]
    pub fn answers(&self) {
        ping(self.connect(AGENT_PORT), deadline()).unwrap();
    }

    /// The kernel has nothing to complain about.
    #[track_caller]
    pub fn is_healthy(&self) {
        let log = self.sh("dmesg");
        for word in [
            "WARNING: CPU",
            "BUG:",
            "Oops",
            "Call Trace",
            "cut here",
            "I/O error",
            "rcu_sched self-detected",
        ] {
            assert!(!log.contains(word), "{word} in the kernel's log:\n{log}");
        }
    }

    /// Checks the kernel's log, powers the guest off and checks that the VMM ends with status 0.
    #[track_caller]
    pub fn ends_well(self) {
        self.is_healthy();
        self.shutdown(v1::shutdown::Mode::PowerOff);
        self.vmm.ends_with(0);
    }

    /// Asks the agent to end the guest.
    #[track_caller]
    pub fn shutdown(&self, mode: v1::shutdown::Mode) {
        shutdown(
            self.connect(AGENT_PORT),
            mode,
            Some(Duration::ZERO),
            deadline(),
        )
        .unwrap();
    }

    /// Bytes of guest RAM that exist on the host. Not every host kernel shows the name of the mapping
    /// (`guest-ram`), but that it is left out of core dumps (`dd`) is always told.
    ///
    /// # Panics
    /// The VMM has ended.
    #[must_use]
    pub fn resident(&self) -> u64 {
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", self.vmm.pid())).unwrap();
        let (mut rss, mut sum) = (0, 0);
        for line in maps.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("Rss:") => rss = words.next().and_then(|word| word.parse().ok()).unwrap(),
                Some("VmFlags:") if words.any(|flag| flag == "dd") => sum += rss * 1024,
                _ => {}
            }
        }
        sum
    }
}

/// A program that runs in a guest. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    exec: Exec<UnixStream>,
    printed: Vec<u8>,
}

impl Process {
    /// The next line that it prints.
    ///
    /// # Panics
    /// It prints none.
    #[must_use]
    #[track_caller]
    pub fn line(&mut self) -> String {
        loop {
            if let Some(end) = self.printed.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.printed.drain(..=end).collect();
                return String::from_utf8_lossy(&line).trim_end().to_owned();
            }
            match self.exec.next(deadline()) {
                Ok(Some(ExecEvent::Stdout(bytes))) => self.printed.extend(bytes),
                Ok(Some(ExecEvent::Stderr(bytes))) => {
                    eprintln!("{}", String::from_utf8_lossy(&bytes));
                }
                other => panic!("it prints no line: {other:?}"),
            }
        }
    }
}

/// The calls that make a guest of this shape, without its start.
pub fn configure(vmm: &Vmm, spec: &Spec) {
    vmm.put(
        "/machine-config",
        &json!({"vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_mib}),
    );
    let mut boot = json!({
        "kernel_image_path": spec.kernel,
        "initrd_path": spec.initramfs,
        "boot_args": format!("{BOOT_ARGS} {}", spec.args),
    });
    for (name, value) in spec.boot.as_object().into_iter().flatten() {
        boot[name] = value.clone();
    }
    vmm.put("/boot-source", &boot);
    vmm.put(
        "/drives/image",
        &json!({
            "drive_id": "image", "path_on_host": assets_dir().join("image"),
            "is_root_device": false, "is_read_only": true,
        }),
    );
    vmm.put("/vsock", &json!({"guest_cid": 3, "uds_path": "v.sock"}));
    vmm.put("/entropy", &json!({}));
    vmm.put("/console", &json!({"socket_path": "console.sock"}));
}

fn deadline() -> Option<Instant> {
    Some(Instant::now() + PATIENCE)
}

fn follow_console(path: &Path, into: Arc<Mutex<Vec<u8>>>) {
    let Ok(mut stream) = UnixStream::connect(path) else {
        return;
    };
    thread::spawn(move || {
        let mut buffer = vec![0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            let bytes = buffer.get(..count).unwrap_or_default();
            into.lock().unwrap().extend_from_slice(bytes);
        }
    });
}
