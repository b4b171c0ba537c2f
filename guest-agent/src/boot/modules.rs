//! Kernel modules for kernels that are not the project's own, like a distribution's: the initramfs
//! lists them in `/modules/load`, one path a line, in the order of their dependencies.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::read_file;
use crate::log;

const FOLDER: &str = "/modules/";
const LIST: &str = "/modules/load";

/// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h.
const COMPRESSED: i32 = 4;

/// Loads the listed modules. A failure is logged; what misses it will tell.
pub(super) fn load() {
    let Ok(list) = read_file(LIST) else {
        return;
    };
    for name in list.lines().map(str::trim) {
        if name.is_empty() || name.starts_with('#') {
            continue;
        }
        if let Err(error) = load_one(name) {
            log!("cannot load the kernel module {name}: {error}");
        }
    }
}

fn load_one(name: &str) -> rustix::io::Result<()> {
    let path = if name.starts_with('/') {
        name.to_owned()
    } else {
        format!("{FOLDER}{name}")
    };
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let is_plain = name.ends_with(".ko");
    let flags = if is_plain { 0 } else { COMPRESSED };
    match rustix::system::finit_module(file, c"", flags) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}
