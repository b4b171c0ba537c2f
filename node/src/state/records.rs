//! The records in a sandbox's directory: read whole, written by rename, forgotten before the next start.

use std::fs::{self, File};
use std::io::{self, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{
    API_SOCKET, BASES, BOOT, CONSOLE_SOCKET, CONTROL_SOCKET, ENDED, LAST, LOADED, OWNER, Owner,
    RESETTING, SandboxDir, StateError, VSOCK_SOCKET, io_error,
};

impl SandboxDir {
    /// Writes a record by rename, so that it is never seen half written.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn write_record(&self, name: &str, record: &impl Serialize) -> Result<(), StateError> {
        self.replace_record(name, record, false)
    }

    /// The same, and it is there after a power failure too.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn write_record_durably(
        &self,
        name: &str,
        record: &impl Serialize,
    ) -> Result<(), StateError> {
        self.replace_record(name, record, true)?;
        #[cfg(test)]
        failing::reach(&self.path).map_err(io_error("write back", &self.path))?;
        let synced = File::open(&self.path).and_then(|dir| dir.sync_all());
        synced.map_err(io_error("write back", &self.path))
    }

    fn replace_record(
        &self,
        name: &str,
        record: &impl Serialize,
        durably: bool,
    ) -> Result<(), StateError> {
        let path = self.file(name);
        let temporary = self.file(&format!("{name}.new"));
        let mut text =
            serde_json::to_vec_pretty(record).map_err(|source| StateError::Malformed {
                path: path.clone(),
                source,
            })?;
        text.push(b'\n');
        #[cfg(test)]
        failing::step();
        let written = File::create(&temporary).and_then(|mut file| {
            file.write_all(&text)?;
            if durably { file.sync_all() } else { Ok(()) }
        });
        written.map_err(io_error("write", &temporary))?;
        #[cfg(test)]
        failing::step();
        fs::rename(&temporary, &path).map_err(io_error("write", &path))?;
        #[cfg(test)]
        failing::step();
        Ok(())
    }

    /// Reads a record; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, or is not such a record.
    pub fn read_record<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let path = self.file(name);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| StateError::Malformed { path, source })
    }

    /// Removes a record, if there is one.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn remove_record(&self, name: &str) -> Result<(), StateError> {
        let path = self.file(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }

    /// Takes away what belongs to an earlier run of its guest: sockets first, since a new VMM makes them,
    /// the record of the end last.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn forget_last_run(&self) -> Result<(), StateError> {
        self.remove_cgroup();
        let ready = format!("{VSOCK_SOCKET}_{}", belljar_protocol::READY_PORT);
        let names = [
            API_SOCKET,
            VSOCK_SOCKET,
            &ready,
            CONSOLE_SOCKET,
            CONTROL_SOCKET,
            OWNER,
            BOOT,
            LOADED,
            BASES,
            LAST,
            RESETTING,
            ENDED,
        ];
        for name in names {
            self.remove_record(name)?;
        }
        Ok(())
    }

    /// A supervisor that was killed left it.
    pub(super) fn remove_cgroup(&self) {
        let owner: Option<Owner> = self.read_record(OWNER).ok().flatten();
        if let Some(cgroup) = owner.and_then(|owner| owner.cgroup) {
            crate::cgroup::remove(&cgroup);
        }
    }
}

/// A failing disk under the directory of a test, and a process that is killed.
#[cfg(test)]
pub(crate) mod failing {
    use std::cell::{Cell, RefCell};
    use std::io;
    use std::path::{Path, PathBuf};

    thread_local! {
        static STEPS: Cell<Option<u32>> = const { Cell::new(None) };
        static UNDER: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
    }

    /// While this runs in this thread, the names in that directory cannot be made durable.
    pub(crate) fn with<T>(dir: &Path, run: impl FnOnce() -> T) -> T {
        UNDER.set(Some(dir.to_path_buf()));
        let done = run();
        UNDER.set(None);
        done
    }

    /// This process is killed after so many more steps of this thread.
    pub(crate) fn die_after(steps: u32) {
        STEPS.set(Some(steps));
    }

    /// Something changes on disk before, or behind this.
    pub(crate) fn step() {
        match STEPS.get() {
            Some(0) => {
                let own = rustix::process::getpid();
                let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
            }
            steps => STEPS.set(steps.map(|steps| steps - 1)),
        }
    }

    pub(super) fn reach(dir: &Path) -> io::Result<()> {
        match UNDER.with_borrow(|under| under.as_deref() == Some(dir)) {
            true => Err(rustix::io::Errno::IO.into()),
            false => Ok(()),
        }
    }
}
