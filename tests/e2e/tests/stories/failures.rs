//! What goes wrong is told with its cause and its remedy, and leaves nothing behind.

use std::fs::{self, File};
use std::os::unix::fs::symlink;

use belljar_e2e::files::{empty_initramfs, silent_initramfs};
use belljar_e2e::{User, assets_dir};

/// The user's own copy of the guest's parts, by links, but one.
fn assets_without(user: &User, missing: &str) -> String {
    let dir = user.home().join("assets");
    fs::create_dir(&dir).unwrap();
    for entry in fs::read_dir(assets_dir()).unwrap().flatten() {
        if entry.file_name() != missing {
            symlink(entry.path(), dir.join(entry.file_name())).unwrap();
        }
    }
    dir.to_string_lossy().into_owned()
}

#[test]
fn a_missing_part_names_the_command_that_makes_it() {
    for (part, command) in [
        ("vmlinux", "make kernel"),
        ("initramfs", "make image"),
        ("image", "make image"),
    ] {
        let user = User::new();
        let assets = assets_without(&user, part);
        let said = user.run(&["--assets", &assets, "--", "true"]);
        assert_eq!(said.code(), 125);
        said.explains(&[part, command]);
    }
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let user = User::new();
    let kernel = fs::read(assets_dir().join("vmlinux")).unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = user.home().join(name);
        fs::write(&path, content).unwrap();
        path.to_string_lossy().into_owned()
    };
    let mut other_machine = kernel[..4096].to_vec();
    other_machine[18] = 0xb7; // AArch64
    for path in [
        write("empty", b""),
        write("text", b"this is not a kernel\n"),
        write("truncated", &kernel[..kernel.len() / 2]),
        write("head", &kernel[..200]),
        write("foreign", &other_machine),
    ] {
        let said = user.run(&["--kernel", &path, "--", "true"]);
        assert_eq!(said.code(), 125, "{path}: {}", said.err);
        said.explains(&["kernel", "what to do"]);
    }
    let said = user.run(&["--kernel", "/no/such/kernel", "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&["/no/such/kernel"]);
}

#[test]
fn an_initramfs_larger_than_memory_is_refused() {
    let user = User::new();
    let path = user.home().join("initramfs");
    File::create(&path).unwrap().set_len(1 << 30).unwrap();
    let path = path.to_string_lossy();
    let said = user.run(&["--initramfs", &path, "--memory", "128M", "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&["init", "what to do"]);
}

#[test]
fn an_image_of_another_format_is_told() {
    let user = User::new();
    let path = user.home().join("image");
    fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
    let said = user.run(&["--image", &path.to_string_lossy(), "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&["/dev/vda", "what to do"]);
}

#[test]
fn bad_drives_are_told() {
    let user = User::new();
    let home = user.home().to_string_lossy().into_owned();
    let said = user.run(&["--drive", "/no/such/drive", "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&["/no/such/drive"]);
    let said = user.run(&["--drive", &home, "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&[&home, "directory"]);
    fs::write(user.home().join("a"), vec![0; 1 << 20]).unwrap();
    let said = user.run(&["--drive", "a:id=disk", "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&["disk", "twice"]);
}

#[test]
fn nonsense_on_the_command_line_is_told_at_once() {
    let user = User::new();
    for (arguments, expected) in [
        (vec!["--cpus", "0", "--", "true"], "--cpus"),
        (vec!["--cpus", "33", "--", "true"], "--cpus"),
        (vec!["--memory", "0", "--", "true"], "memory"),
        (vec!["--memory", "plenty", "--", "true"], "plenty"),
        (vec!["--timeout", "soon", "--", "true"], "soon"),
        (vec!["--no-such-option", "--", "true"], "--no-such-option"),
        (vec![], "COMMAND"),
    ] {
        let said = user.run(&arguments);
        assert_eq!(said.code(), 125, "{arguments:?}");
        said.explains(&[expected]);
    }
}

#[test]
fn too_little_memory_is_told() {
    let user = User::new();
    let said = user.run(&["--memory", "8M", "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&["mem"]);
}

#[test]
fn a_kernel_panic_is_told_with_its_last_lines() {
    let user = User::new();
    let initramfs = empty_initramfs(user.home());
    let initramfs = initramfs.to_string_lossy();
    let said = user.run(&["--initramfs", &initramfs, "--image", "none", "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&[
        "panicked",
        "last lines of the guest's console",
        "Kernel panic",
        "what to do",
    ]);
}

#[test]
fn a_panic_while_the_command_runs_is_told() {
    let user = User::new();
    let said = user.run(&[
        "--disk",
        "none",
        "--",
        "python3",
        "-c",
        "open('/proc/sys/vm/panic_on_oom', 'w').write('2')\nall = []\n\
         while True: all.append(b'x' * 1000000)",
    ]);
    assert_eq!(said.code(), 125, "{}", said.err);
    said.explains(&["panicked", "while the command was running"]);
}

#[test]
fn an_agent_that_never_starts_is_told() {
    let user = User::new();
    let initramfs = silent_initramfs(user.home());
    let initramfs = initramfs.to_string_lossy();
    let said = user.run(&[
        "--initramfs",
        &initramfs,
        "--image",
        "none",
        "--boot-timeout",
        "40s",
        "--",
        "true",
    ]);
    assert_eq!(said.code(), 125);
    said.explains(&[
        "the agent never did",
        "within 40 s",
        "last lines of the guest's console",
        "what to do",
    ]);
}

#[test]
fn a_vmm_that_is_none_is_told() {
    let user = User::new();
    let said = user.run(&["--vmm", "/no/such/vmm", "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&["/no/such/vmm", "make build"]);
    let said = user.run(&["--vmm", "/bin/false", "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&["the VMM failed", "before it opened its API"]);
    let said = user.run(&["--vmm", "/etc/passwd", "--", "true"]);
    assert_eq!(said.code(), 125);
    said.explains(&["cannot start the VMM"]);
}

#[test]
fn a_state_directory_that_cannot_be_used_is_told() {
    let user = User::new();
    let file = user.home().join("file");
    fs::write(&file, b"").unwrap();
    let mut command = user.belljar(&["run", "--", "true"]);
    command.env("BELLJAR_STATE", &file);
    let said = belljar_e2e::Running::start(&mut command).wait();
    assert_eq!(said.code(), 125);
    said.explains(&[&file.to_string_lossy(), "doctor"]);
}
