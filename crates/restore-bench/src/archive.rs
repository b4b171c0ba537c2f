//! Programs added to an initramfs: cpio newc, the kernel's driver-api/early-userspace/buffer-format. Archives one
//! behind the other are unpacked one after the other.

/// Permissions of what is packed: everybody may read and run it.
const MODE: u32 = 0o755;
const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// What is packed.
#[derive(Clone, Copy, Debug)]
pub enum Entry<'a> {
    /// A directory.
    Directory(&'a str),
    /// A program with its bytes.
    Program(&'a str, &'a [u8]),
    /// A character device: major, minor.
    Device(&'a str, u32, u32),
}

/// An archive with these entries; parents come first, paths have no slash in front. Its length is a multiple of 4.
#[must_use]
pub fn pack(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, entry) in entries.iter().enumerate() {
        let inode = u32::try_from(number).unwrap_or(0).saturating_add(1);
        match *entry {
            Entry::Directory(name) => add(&mut out, inode, name, DIRECTORY | MODE, &[], (0, 0)),
            Entry::Program(name, bytes) => add(&mut out, inode, name, FILE | MODE, bytes, (0, 0)),
            Entry::Device(name, major, minor) => {
                let mode = CHARACTER_DEVICE | 0o666;
                add(&mut out, inode, name, mode, &[], (major, minor));
            }
        }
    }
    add(&mut out, 0, "TRAILER!!!", 0, &[], (0, 0));
    out
}

fn add(out: &mut Vec<u8>, inode: u32, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
    let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
    let name_size = u32::try_from(name.len()).unwrap_or(0).saturating_add(1);
    // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    let (major, minor) = device;
    let fields = [
        inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0,
    ];
    out.extend(b"070701");
    for field in fields {
        out.extend(format!("{field:08X}").as_bytes());
    }
    out.extend(name.as_bytes());
    out.push(0);
    pad(out);
    out.extend(content);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn what_is_packed_is_what_cpio_finds() {
        let archive = pack(&[
            Entry::Directory("dev"),
            Entry::Device("dev/null", 1, 3),
            Entry::Program("init", b"bytes"),
        ]);
        assert_eq!(archive.len() % 4, 0);
        let text = String::from_utf8_lossy(&archive);
        for part in ["070701", "dev/null\0", "init\0", "bytes", "TRAILER!!!\0"] {
            assert!(text.contains(part), "{part}");
        }
        let cpio = Command::new("cpio")
            .args(["-it", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        // Not every machine has the tool.
        let Ok(mut cpio) = cpio else { return };
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        let listed = cpio.wait_with_output().unwrap().stdout;
        assert_eq!(String::from_utf8_lossy(&listed), "dev\ndev/null\ninit\n");
    }
}
