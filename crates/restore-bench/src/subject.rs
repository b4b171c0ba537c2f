//! A VMM that is measured: it saves a guest, then that guest is restored in new processes of it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use belljar_protocol::client::{Exec, ping, receive_ready};
use belljar_protocol::v1::{self, end::How};
use belljar_protocol::{AGENT_PORT, READY_PORT, hybrid};
use serde_json::{Value, json};

use crate::archive::{Entry, pack};
use crate::failure::{Attempt, Failure, Result};
use crate::lazy::Chunks;
use crate::record::{Memory, Times};
use crate::settings::{Ahead, Cache, Guest, Settings, Way};
use crate::vmm::{Binary, Machine, PATIENCE, Vmm};
use crate::wire::{self, Act, BOOT_PORT, Boot, PAGE, RAM_PORT, Ram, mix, word};

/// Where the guest keeps the benchmark's program.
const PROGRAM: &str = "/bench";
/// The same for all VMMs. They add what they need themselves.
pub const BOOT_ARGS: &str = "quiet loglevel=1 panic=-1 reboot=t 8250.nr_uarts=0 pci=off";
/// Between attempts to reach a program in the guest that starts.
const RETRY: Duration = Duration::from_millis(5);

/// Pages in a MiB.
const MIB_PAGES: u64 = (1 << 20) / PAGE as u64;

/// Random bits, so that nothing can be answered from memory.
pub fn random() -> Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .attempt("no random numbers")?;
    Ok(word(bytes))
}

/// Makes the initramfs of a kind of guest.
pub fn initramfs(settings: &Settings) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).attempt(format!("cannot read {}", path.display()));
    let program = read(&settings.program)?;
    Ok(match settings.guest {
        Guest::Agent => {
            let mut all = read(&settings.initramfs)?;
            all.resize(all.len().next_multiple_of(4), 0);
            all.extend(pack(&[Entry::Program("bench", &program)]));
            all
        }
        Guest::Program => pack(&[
            Entry::Directory("dev"),
            Entry::Device("dev/console", 5, 1),
            Entry::Device("dev/null", 1, 3),
            Entry::Program("init", &program),
        ]),
    })
}

/// A VMM, and how its guests are made.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    pub binary: &'a Binary,
    /// Whether it is this project's, with calls of its own.
    pub ours: bool,
    pub settings: &'a Settings,
    pub initramfs: &'a Path,
}

/// A saved guest and what it will answer.
#[derive(Clone, Debug)]
pub struct Saved {
    pub state: PathBuf,
    pub ram: PathBuf,
    /// Of working sets, by their size in MiB.
    recordings: Vec<(u64, PathBuf)>,
    /// The same snapshot in a store, if guests are restored from there.
    pub chunks: Option<Chunks>,
    /// What of the memory file that is dense is in huge pages, 0 to 1.
    pub huge_share: f64,
    /// Proofs that it gave before.
    counter: u64,
    /// Salt and length of what fills it.
    salt: u64,
    filled: usize,
}

impl Saved {
    /// What the guest's RAM must hash to with `pages` touched.
    #[must_use]
    pub fn expected_hash(&self, pages: u64, salt: u64) -> u64 {
        let mut filled = wire::noise(self.filled, self.salt);
        wire::touch(&mut filled, usize::try_from(pages).unwrap_or(usize::MAX));
        wire::hash(&filled, salt)
    }

    /// Removes its files.
    pub fn remove(&self) {
        let recordings = self.recordings.iter().map(|(_, path)| path);
        for file in recordings.chain([&self.state, &self.ram]) {
            let _ = fs::remove_file(file);
        }
        if let Some(chunks) = &self.chunks {
            chunks.remove();
        }
    }

    fn recording(&self, way: Way, set_mib: u64) -> Option<&PathBuf> {
        let of_set = |(mib, _): &&(u64, PathBuf)| way.recorded && *mib == set_mib;
        self.recordings.iter().find(of_set).map(|(_, path)| path)
    }
}

/// How much of a memory file could be brought into huge pages.
fn make_huge(ram: &Path) -> Result<f64> {
    let file = fs::File::open(ram).attempt("no memory file")?;
    let done = belljar_keeper::huge::collapse(&file).attempt("cannot make huge pages")?;
    let all = done.huge.saturating_add(done.refused);
    Ok(if all == 0 {
        0.0
    } else {
        done.huge as f64 / all as f64
    })
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn soon() -> Option<Instant> {
    Instant::now().checked_add(PATIENCE)
}

/// One request on a connection to [`RAM_PORT`].
fn ask_on(stream: &mut UnixStream, request: Ram) -> Result<u64> {
    stream
        .write_all(&request.encode())
        .attempt("a request to the guest")?;
    let mut answer = [0; 8];
    stream
        .read_exact(&mut answer)
        .attempt("the guest's answer")?;
    Ok(word(answer))
}

fn connect(vmm: &Vmm, port: u32) -> Result<UnixStream> {
    let stream = hybrid::connect(&vmm.vsock(), port, Instant::now() + PATIENCE)
        .attempt("cannot reach the guest")?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .attempt("a limit of time")?;
    Ok(stream)
}

/// One request on a connection of its own.
pub fn ask(vmm: &Vmm, request: Ram) -> Result<u64> {
    ask_on(&mut connect(vmm, RAM_PORT)?, request)
}

fn exec(words: &[&str], detached: bool) -> v1::Exec {
    v1::Exec {
        argv: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
        detached,
        ..v1::Exec::default()
    }
}

/// The output of a command that proves, by the agent.
fn run_command(vmm: &Vmm, nonce: u64) -> Result<u64> {
    let call = exec(&[PROGRAM, "--ask", &nonce.to_string()], false);
    let (out, errors, how) = Exec::start(connect(vmm, AGENT_PORT)?, call, soon())
        .and_then(|exec| exec.finish(4096, soon()))
        .attempt("the first command")?;
    let said = String::from_utf8_lossy(&out);
    match (&how, said.trim().parse()) {
        (How::Exited(exited), Ok(answer)) if exited.code == 0 => Ok(answer),
        _ => Err(Failure(format!(
            "the first command said {said:?} {:?} and ended: {how:?}",
            String::from_utf8_lossy(&errors)
        ))),
    }
}

/// `/proc/PID/smaps_rollup` of a VMM.
pub fn memory_of(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).attempt(format!("cannot read {path}"))?;
    Ok(memory(&text))
}

fn memory(rollup: &str) -> Memory {
    let field = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name));
        let value = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
        value.unwrap_or(0_u64)
    };
    Memory {
        pss_kib: field("Pss:"),
        private_kib: field("Private_Clean:").saturating_add(field("Private_Dirty:")),
    }
}

impl Subject<'_> {
    /// Starts a process in a directory of its own.
    pub fn start(&self, directory: PathBuf) -> Result<Vmm> {
        Vmm::start_now(Command::new(&self.binary.path), directory)
    }

    /// Boots a guest, fills its RAM, saves it in `directory`, and records what it touches if ways want that.
    pub fn save(&self, memory_mib: u64, directory: &Path) -> Result<Saved> {
        let mut vmm = self.start(directory.join(format!("{}-saved", self.binary.name)))?;
        let saved = self.boot_and_save(&mut vmm, memory_mib, directory);
        let mut saved = saved.map_err(|failure| vmm.explain(&failure))?;
        drop(vmm);
        if self.ours && self.settings.recorded {
            for set in self.settings.working_set_mib.clone() {
                let recording = self.record(&saved, set, directory)?;
                saved.recordings.push((set, recording));
            }
        }
        if self.ours && self.settings.caches.contains(&Cache::Lazy) {
            let program = &self.settings.keeper;
            let chunks = Chunks::of(&saved.state, &saved.ram, program, directory)?;
            saved.chunks = Some(chunks);
            if self.settings.recorded {
                self.remember(&mut saved, directory)?;
            }
        }
        // Where the file system has them; every VMM maps its file.
        saved.huge_share = make_huge(&saved.ram)?;
        Ok(saved)
    }

    fn boot_and_save(&self, vmm: &mut Vmm, memory_mib: u64, directory: &Path) -> Result<Saved> {
        let machine = Machine {
            kernel: self.settings.kernel.clone(),
            vcpus: self.settings.vcpus,
            memory_mib,
            boot_args: BOOT_ARGS.to_owned(),
        };
        vmm.configure(&machine, self.initramfs, &[])?;
        self.boot(vmm)?;
        let filled_bytes = self.settings.filled_mib << 20;
        let fill = Ram {
            act: Act::Fill,
            amount: filled_bytes,
            salt: random()?,
        };
        let filled = ask(vmm, fill)?;
        if filled != filled_bytes {
            return Err(Failure(format!("{filled} bytes were filled")));
        }
        // So many that nobody guesses it.
        let counter = random()? % 16 + 1;
        for _ in 0..counter {
            ask(vmm, Ram::new(Act::Prove, 0))?;
        }
        let name = |what: &str| directory.join(format!("{}-{memory_mib}-{what}", self.binary.name));
        let saved = Saved {
            state: name("state"),
            ram: name("ram"),
            recordings: Vec::new(),
            chunks: None,
            huge_share: 0.0,
            counter,
            salt: fill.salt,
            filled: usize::try_from(filled_bytes).attempt("too much to fill")?,
        };
        vmm.api.patch("/vm", &json!({"state": "Paused"}))?;
        vmm.api.put(
            "/snapshot/create",
            &json!({"snapshot_path": saved.state, "mem_file_path": saved.ram, "snapshot_type": "Full"}),
        )?;
        Ok(saved)
    }

    /// Starts the guest, until the benchmark's program serves in it.
    fn boot(&self, vmm: &mut Vmm) -> Result<()> {
        match self.settings.guest {
            Guest::Program => {
                let mut booted = vmm.boot(BOOT_PORT, Boot::SIZE)?;
                // One more byte says that it listens.
                booted
                    .stream
                    .read_exact(&mut [0])
                    .attempt("the guest does not listen")
            }
            Guest::Agent => {
                let booted = vmm.boot(READY_PORT, 0)?;
                receive_ready(booted.stream, soon()).attempt("the agent's Ready")?;
                let stream = connect(vmm, AGENT_PORT)?;
                Exec::start(stream, exec(&[PROGRAM, "--resident"], true), soon())
                    .attempt("the benchmark's program in the guest")?;
                let limit = Instant::now() + PATIENCE;
                while let Err(error) = hybrid::connect(&vmm.vsock(), RAM_PORT, limit) {
                    if Instant::now() > limit {
                        return Err(Failure(format!("the benchmark's program: {error}")));
                    }
                    std::thread::sleep(RETRY);
                }
                // The first command of an agent costs more than later ones: it is none of a restore.
                run_command(vmm, 0).or_else(|failure| {
                    Err(failure).attempt("a command before the guest is saved")
                })?;
                Ok(())
            }
        }
    }

    /// Prepares what shall be made ahead. Returns how long it took, in microseconds.
    pub fn prepare(&self, vmm: &mut Vmm, saved: &Saved, way: Way, set_mib: u64) -> Result<f64> {
        let begun = Instant::now();
        let mut call = json!({"vcpu_count": self.settings.vcpus});
        if let (Ahead::Memory, Some(fields)) = (way.prepared, call.as_object_mut()) {
            fields.insert("mem_file_path".to_owned(), json!(saved.ram));
            if let Some(path) = saved.recording(way, set_mib) {
                fields.insert("working_set".to_owned(), json!(path));
            }
        }
        vmm.api.put("/prepare", &call)?;
        Ok(us(begun.elapsed()))
    }

    fn load(&self, vmm: &mut Vmm, saved: &Saved, more: Option<(&str, Value)>) -> Result<()> {
        let mut body = json!({
            "snapshot_path": saved.state,
            "mem_backend": {"backend_type": "File", "backend_path": saved.ram},
            "resume_vm": true,
            "vsock_override": {"uds_path": vmm.vsock()},
        });
        if let (Some(fields), Some((name, value))) = (body.as_object_mut(), more) {
            fields.insert(name.to_owned(), value);
        }
        vmm.api.put("/snapshot/load", &body)
    }

    /// Has a keeper bring in what the guest touches.
    fn load_lazily(vmm: &mut Vmm, chunks: &Chunks) -> Result<()> {
        let opened = chunks.open()?;
        let body = json!({
            "snapshot_path": "fd:state",
            "mem_backend": {"backend_type": "Uffd", "backend_path": "fd:handler", "template_path": "fd:memory"},
            "resume_vm": true,
            "vsock_override": {"uds_path": vmm.vsock()},
        });
        let descriptors = [
            ("state", opened.state.as_fd()),
            ("memory", opened.memory.as_fd()),
            ("handler", opened.handler.as_fd()),
        ];
        vmm.api.put_with("/snapshot/load", &body, &descriptors)
    }

    /// Restores a guest from chunks once, so that the keeper knows what it touches.
    fn remember(&self, saved: &mut Saved, directory: &Path) -> Result<()> {
        let Some(mut chunks) = saved.chunks.take() else {
            return Ok(());
        };
        let keeper = chunks.forget(false)?;
        let mut vmm = self.start(directory.join(format!("{}-touching", self.binary.name)))?;
        Self::load_lazily(&mut vmm, &chunks)?;
        self.result(&vmm, saved)?;
        // It is written down when the guest has ended.
        drop(vmm);
        chunks.remember()?;
        drop(keeper);
        saved.chunks = Some(chunks);
        Ok(())
    }

    /// Writes down which pages a guest touches until its first result and for a working set.
    fn record(&self, saved: &Saved, set_mib: u64, directory: &Path) -> Result<PathBuf> {
        let mut vmm = self.start(directory.join(format!("{}-recorded", self.binary.name)))?;
        self.load(&mut vmm, saved, Some(("track_dirty_pages", json!(true))))?;
        self.result(&vmm, saved)?;
        touch(&mut connect(&vmm, RAM_PORT)?, set_mib)?;
        let path = saved.state.with_extension(format!("working-set-{set_mib}"));
        vmm.api
            .put("/snapshot/working-set", &json!({"path": path}))?;
        Ok(path)
    }

    /// The first result, proved.
    fn result(&self, vmm: &Vmm, saved: &Saved) -> Result<()> {
        let nonce = random()?;
        let answer = match self.settings.guest {
            Guest::Agent => run_command(vmm, nonce)?,
            Guest::Program => ask(vmm, Ram::new(Act::Prove, nonce))?,
        };
        // The command before the snapshot counted, too.
        let counter = match self.settings.guest {
            Guest::Agent => saved.counter.saturating_add(1),
            Guest::Program => saved.counter,
        };
        if answer != mix(nonce, counter) {
            return Err(Failure(
                "a wrong reply: it is not the guest that was saved".to_owned(),
            ));
        }
        Ok(())
    }

    /// Restores a guest in a process that is there; `process_us` and `prepare_us` are left as they are.
    pub fn restore(
        &self,
        vmm: &mut Vmm,
        saved: &Saved,
        way: Way,
        set_mib: u64,
        times: &mut Times,
    ) -> Result<()> {
        let more = saved
            .recording(way, set_mib)
            .map(|path| ("working_set", json!(path)));
        let begun = Instant::now();
        match saved.chunks.as_ref().filter(|_| way.cache == Cache::Lazy) {
            Some(chunks) => Self::load_lazily(vmm, chunks)?,
            None => self.load(vmm, saved, more)?,
        }
        times.running_us = us(begun.elapsed());
        if self.settings.guest == Guest::Agent {
            ping(connect(vmm, AGENT_PORT)?, soon()).attempt("the agent does not answer")?;
            times.ready_us = Some(us(begun.elapsed()));
        }
        self.result(vmm, saved)?;
        times.result_us = us(begun.elapsed());
        let mut stream = connect(vmm, RAM_PORT)?;
        let begun = Instant::now();
        touch(&mut stream, set_mib)?;
        times.faults_us = us(begun.elapsed());
        Ok(())
    }

    /// Compares the restored guest's RAM with what fills it.
    pub fn check_ram(vmm: &Vmm, saved: &Saved, set_mib: u64) -> Result<()> {
        let salt = random()?;
        let request = Ram {
            act: Act::Hash,
            amount: 0,
            salt,
        };
        if ask(vmm, request)? == saved.expected_hash(set_mib.saturating_mul(MIB_PAGES), salt) {
            return Ok(());
        }
        Err(Failure(
            "a wrong hash: the restored guest's RAM is not what was saved".to_owned(),
        ))
    }
}

fn touch(stream: &mut UnixStream, set_mib: u64) -> Result<()> {
    ask_on(
        stream,
        Ram::new(Act::Touch, set_mib.saturating_mul(MIB_PAGES)),
    )
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_rollup() {
        let text = "00400000-7fff rollup\nRss:  900 kB\nPss:      123 kB\nPss_Dirty: 7 kB\n\
                    Private_Clean:  4 kB\nPrivate_Dirty:  6 kB\n";
        let expected = Memory {
            pss_kib: 123,
            private_kib: 10,
        };
        assert_eq!(memory(text), expected);
        assert!(memory_of(std::process::id()).unwrap().pss_kib > 0);
    }
}
