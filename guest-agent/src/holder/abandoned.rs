//! Outputs of forgotten processes that others still hold: what those write is read and thrown away, so
//! that they live on as they did before.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::io::Errno;

use super::Holder;
use super::process::Process;

/// Forgotten processes with open outputs. When there are more, the oldest one's are closed.
const MAX_ABANDONED: usize = 256;

/// Reads of one stream before others get their turn.
const TURNS: usize = 8;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Abandoned {
    outputs: BTreeMap<u64, Vec<Rc<OwnedFd>>>,
}

impl Abandoned {
    /// Takes the outputs of a process that nobody has closed yet.
    pub(super) fn take(&mut self, process: &mut Process) {
        let open: Vec<_> = process
            .outputs
            .iter_mut()
            .filter_map(|output| output.fd.take())
            .collect();
        if open.is_empty() {
            return;
        }
        if self.outputs.len() >= MAX_ABANDONED {
            self.outputs.pop_first();
        }
        self.outputs.insert(process.id, open);
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.outputs.is_empty()
    }

    /// Reads what there is, and closes what has come to its end. True if there is more.
    fn drain(&mut self, id: u64, scratch: &mut [u8]) -> bool {
        let Some(outputs) = self.outputs.get_mut(&id) else {
            return false;
        };
        let mut has_more = false;
        outputs.retain(|fd| {
            for _ in 0..TURNS {
                match rustix::io::read(&**fd, &mut *scratch) {
                    Ok(0) => return false,
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return true,
                    Err(_) => return false,
                }
            }
            has_more = true;
            true
        });
        if outputs.is_empty() {
            self.outputs.remove(&id);
        }
        has_more
    }
}

impl Holder {
    /// Something may have come on the outputs of a forgotten process.
    pub(super) fn drain_abandoned(&mut self, id: u64) {
        if self.abandoned.drain(id, &mut self.scratch) {
            self.again.insert(id);
        }
    }
}
