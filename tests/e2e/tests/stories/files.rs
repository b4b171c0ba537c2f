//! Files in and out of a guest, and single calls about them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use belljar_e2e::{Running, Said, Sandbox, User};
use serde_json::Value;

/// RAM of the guest, MiB: less than what goes through it.
const MEMORY: u64 = 128;

/// Bytes that repeat nowhere within reach of a mistake about offsets.
fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        bytes.extend_from_slice(&seed.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// What a shell in the guest prints.
fn inside(sandbox: &Sandbox<'_>, script: &str) -> String {
    let said = sandbox.says("exec", &["--", "sh", "-c", script]);
    assert_eq!(said.code(), 0, "{script}: {}", said.err);
    said.text().trim().to_owned()
}

fn cp(user: &User, arguments: &[&str]) -> Said {
    let mut all = vec!["cp"];
    all.extend(arguments);
    user.says(&all)
}

#[track_caller]
fn copied(said: &Said) {
    assert_eq!((said.code(), said.err.as_str()), (0, ""));
}

/// `belljar fs CALL BOX ARGUMENTS`.
fn fs_call(sandbox: &Sandbox<'_>, call: &str, arguments: &[&str]) -> Said {
    let mut all = vec!["fs", call, sandbox.id()];
    all.extend(arguments);
    sandbox.user().says(&all)
}

fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn files_go_in_and_out_whole() {
    let user = User::new();
    let memory = format!("{MEMORY}M");
    let sandbox = user.sandbox(&["--memory", &memory, "--disk", "1G"]);
    single_files(&user, &sandbox);
    larger_than_memory(&user, &sandbox);
    ten_thousand_files(&user, &sandbox);
}

#[test]
fn files_of_any_name_and_anybody() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    fs::write(user.home().join("a"), b"a").unwrap();
    fs::write(user.home().join("b"), b"b").unwrap();
    fs::write(user.home().join("noise"), noise(9_000_001, 7)).unwrap();
    names_that_are_no_text(&user, &sandbox);
    streams(&user, &sandbox);
    failures(&user, &sandbox);
}

#[test]
fn a_tree_larger_than_memory_and_every_single_call() {
    let user = User::new();
    let sandbox = user.sandbox(&["--memory", "96M", "--disk", "1G"]);
    content_in_pieces(&sandbox);
    names_and_links(&sandbox);
    rights_and_times(&sandbox);
    attributes(&sandbox);
    copies_of_links_and_owners(&user, &sandbox);
    a_dense_tree(&user, &sandbox);
}

/// `belljar fs write OPTIONS BOX PATH` with this input.
fn write(sandbox: &Sandbox<'_>, options: &[&str], path: &str, input: &[u8]) -> Said {
    let mut all = vec!["fs", "write"];
    all.extend(options);
    all.extend([sandbox.id(), path]);
    let mut running = Running::start(&mut sandbox.user().belljar(&all));
    // One that fails early reads nothing.
    let _ = running.child.stdin.take().unwrap().write_all(input);
    running.wait()
}

/// `belljar fs CALL BOX ARGUMENTS` that fails and says all these.
#[track_caller]
fn refuses(sandbox: &Sandbox<'_>, call: &str, arguments: &[&str], texts: &[&str]) {
    let said = fs_call(sandbox, call, arguments);
    assert_eq!(said.code(), 125, "{call} {arguments:?}");
    said.explains(texts);
}

/// `belljar fs CALL BOX ARGUMENTS` that has nothing to say.
#[track_caller]
fn does(sandbox: &Sandbox<'_>, call: &str, arguments: &[&str]) {
    fs_call(sandbox, call, arguments).is(0, "");
}

fn content_in_pieces(sandbox: &Sandbox<'_>) {
    inside(sandbox, "mkdir /w");
    write(sandbox, &[], "/w/text", b"one two three").is(0, "");
    write(sandbox, &["--append"], "/w/text", b" four").is(0, "");
    write(sandbox, &["--offset", "4"], "/w/text", b"TWO").is(0, "");
    fs_call(sandbox, "cat", &["/w/text"]).is(0, "one TWO three four");
    let range = ["--offset", "4", "--length", "3", "/w/text"];
    fs_call(sandbox, "cat", &range).is(0, "TWO");
    // Less than asked for at the end, and nothing behind it.
    let range = ["--offset", "14", "--length", "1K", "/w/text"];
    fs_call(sandbox, "cat", &range).is(0, "four");
    fs_call(sandbox, "cat", &["--offset", "1M", "/w/text"]).is(0, "");
    let said = write(sandbox, &["--new"], "/w/text", b"other");
    assert_eq!(said.code(), 125);
    said.explains(&["/w/text", "exists"]);
    let said = write(sandbox, &[], "/w/none/text", b"x");
    assert_eq!(said.code(), 125);
    said.explains(&["/w/none", "No such file"]);
    refuses(sandbox, "cat", &["/w"], &["/w", "directory"]);

    does(sandbox, "truncate", &["-s", "3", "/w/text"]);
    fs_call(sandbox, "cat", &["/w/text"]).is(0, "one");
    does(sandbox, "truncate", &["-s", "5", "/w/text"]);
    fs_call(sandbox, "cat", &["/w/text"]).is(0, "one\0\0");
    refuses(
        sandbox,
        "truncate",
        &["-s", "1", "/w"],
        &["/w", "directory"],
    );
}

fn names_and_links(sandbox: &Sandbox<'_>) {
    inside(sandbox, "cd /w; echo a > a; echo b > b");
    refuses(sandbox, "mv", &["-n", "/w/a", "/w/b"], &["/w/b", "exists"]);
    does(sandbox, "mv", &["--exchange", "/w/a", "/w/b"]);
    assert_eq!(inside(sandbox, "cat /w/a /w/b"), "b\na");
    does(sandbox, "mv", &["-n", "/w/a", "/w/c"]);
    does(sandbox, "mv", &["/w/c", "/w/b"]);
    assert_eq!(inside(sandbox, "cat /w/b; ls /w"), "b\nb\ntext");
    refuses(sandbox, "mv", &["/w/none", "/w/d"], &["/w/none", "No such"]);

    does(sandbox, "ln", &["/w/b", "/w/hard"]);
    does(sandbox, "ln", &["-s", "b", "/w/soft"]);
    let found = inside(sandbox, "stat -c %h /w/hard; readlink /w/soft");
    assert_eq!(found, "2\nb");
    refuses(sandbox, "ln", &["/w/b", "/w/soft"], &["/w/soft", "exists"]);

    does(sandbox, "cp", &["/w/b", "/w/copy"]);
    does(sandbox, "cp", &["/w/soft", "/w/soft-copy"]);
    does(sandbox, "cp", &["-L", "/w/soft", "/w/followed"]);
    does(sandbox, "cp", &["-r", "/w", "/w2"]);
    let found = inside(
        sandbox,
        "cat /w/copy; readlink /w/soft-copy; stat -c %F /w/followed; ls /w2",
    );
    let names = "b\ncopy\nfollowed\nhard\nsoft\nsoft-copy\ntext";
    assert_eq!(found, format!("b\nb\nregular file\n{names}"));
    refuses(sandbox, "cp", &["/w2", "/w3"], &["/w2", "directory"]);
}

/// The one document of `belljar fs stat`.
fn stat(sandbox: &Sandbox<'_>, arguments: &[&str]) -> Value {
    let said = fs_call(sandbox, "stat", arguments);
    assert_eq!(said.code(), 0, "{}", said.err);
    let all: Value = serde_json::from_slice(&said.out).unwrap();
    all[0].clone()
}

fn rights_and_times(sandbox: &Sandbox<'_>) {
    does(sandbox, "chmod", &["4750", "/w/b"]);
    does(sandbox, "chown", &["nobody:12", "/w/copy"]);
    let found = inside(sandbox, "stat -c %a /w/b; stat -c '%U %g' /w/copy");
    assert_eq!(found, "4750\nnobody 12");
    does(sandbox, "chown", &["-R", "nobody", "/w2"]);
    does(sandbox, "chmod", &["-R", "700", "/w2"]);
    let others = "find /w2 ! -user nobody; find /w2 ! -type l ! -perm 700";
    assert_eq!(inside(sandbox, others), "");
    does(sandbox, "touch", &["-d", "1700000000.5", "/w/b", "/w/new"]);
    let info = stat(sandbox, &["/w/b"]);
    assert_eq!(info["type"], "file", "{info}");
    assert_eq!(info["size"], 2);
    assert_eq!(info["links"], 2);
    assert_eq!(info["modified_ns"], 1_700_000_000_500_000_000_u64);
    let link = stat(sandbox, &["/w/soft"]);
    assert_eq!(link["type"], "symlink", "{link}");
    assert_eq!(link["target"], "b");
    assert_eq!(
        stat(sandbox, &["-L", "/w/soft"])["inode"],
        info["inode"],
        "{link}"
    );
    let nothing_made = ["-c", "/w/not-made"];
    refuses(sandbox, "touch", &nothing_made, &["/w/not-made", "No such"]);
    refuses(
        sandbox,
        "stat",
        &["/w/not-made"],
        &["/w/not-made", "No such"],
    );
    refuses(sandbox, "chown", &["nosuchuser", "/w/b"], &["nosuchuser"]);
    let as_nobody = ["-u", "nobody", "777", "/w/b"];
    refuses(sandbox, "chmod", &as_nobody, &["/w/b", "not permitted"]);
    let as_nobody = ["-u", "nobody", "/w/by-nobody"];
    refuses(sandbox, "touch", &as_nobody, &["Permission denied"]);
}

fn attributes(sandbox: &Sandbox<'_>) {
    let list = |more: &[&str]| {
        let said = fs_call(sandbox, "xattr", more);
        assert_eq!(said.code(), 0, "{}", said.err);
        let all: Value = serde_json::from_slice(&said.out).unwrap();
        let all = all.as_array().unwrap().clone();
        let pair = |it: &Value| format!("{}={}", it["name"], it["value"]).replace('"', "");
        let mut all: Vec<String> = all.iter().map(pair).collect();
        all.sort();
        all.join(" ")
    };
    assert_eq!(list(&["/w/b"]), "");
    let two = ["--set", "user.one=1=a", "--set", "user.two=", "/w/b"];
    assert_eq!(list(&two), "user.one=1=a user.two=");
    // By another name, it is the same file.
    assert_eq!(list(&["/w/soft"]), "user.one=1=a user.two=");
    assert_eq!(list(&["-n", "/w/soft"]), "");
    assert_eq!(
        list(&["--set", "user.one=2", "/w/b"]),
        "user.one=2 user.two="
    );
    assert_eq!(list(&["--remove", "user.one", "/w/b"]), "user.two=");
    refuses(sandbox, "xattr", &["/w/none"], &["/w/none", "No such file"]);
    refuses(
        sandbox,
        "xattr",
        &["--remove", "user.one", "/w/b"],
        &["user.one"],
    );
    refuses(
        sandbox,
        "xattr",
        &["--set", "no.such=x", "/w/b"],
        &["no.such"],
    );
}

fn copies_of_links_and_owners(user: &User, sandbox: &Sandbox<'_>) {
    let at = |path: &str| format!("{}:{path}", sandbox.id());
    let home = user.home();
    fs::write(home.join("real"), b"real").unwrap();
    symlink("real", home.join("link")).unwrap();
    copied(&cp(user, &["link", &at("/w/as-link")]));
    copied(&cp(user, &["-L", "link", &at("/w/as-file")]));
    let found = inside(sandbox, "readlink /w/as-link; cat /w/as-file");
    assert_eq!(found, "real\nreal");
    copied(&cp(user, &["-L", &at("/w/soft"), "followed"]));
    copied(&cp(user, &[&at("/w/soft"), "kept"]));
    assert_eq!(fs::read(home.join("followed")).unwrap(), b"b\n");
    assert_eq!(fs::read_link(home.join("kept")).unwrap(), Path::new("b"));
    symlink("nowhere", home.join("broken")).unwrap();
    let said = cp(user, &["-L", "broken", &at("/w/broken")]);
    assert_eq!(said.code(), 125);
    said.explains(&["broken", "No such file"]);

    // With everything, and as files of whoever copies.
    inside(
        sandbox,
        "mkdir /keep /plain /src; mv /w/copy /src; chmod 4755 /src/copy; \
         python3 -c 'import os; os.setxattr(\"/src/copy\", \"user.a\", b\"b\")'",
    );
    copied(&cp(user, &["-a", &at("/src"), &at("/keep/")]));
    copied(&cp(user, &[&at("/src"), &at("/plain/")]));
    let found = inside(sandbox, "stat -c '%U %g %a' /keep/src/copy /plain/src/copy");
    let (kept, plain) = found.split_once('\n').unwrap();
    assert_eq!(kept, "nobody 12 4755");
    assert_eq!(plain, "root 0 755");
    // A file alone keeps as much, from a guest and from here; here an ordinary name space only.
    copied(&cp(user, &["-a", &at("/src/copy"), &at("/keep/alone")]));
    assert_eq!(
        inside(sandbox, "stat -c '%U %g %a' /keep/alone"),
        "nobody 12 4755"
    );
    for path in ["/keep/src/copy", "/keep/alone"] {
        let said = fs_call(sandbox, "xattr", &[path]);
        assert!(said.text().contains("user.a"), "{path}: {}", said.text());
    }
}

/// MiB of a tree that fits in no memory of the guest.
const DENSE: u64 = 150;

/// Files without a hole, in and out of a guest with less memory.
fn a_dense_tree(user: &User, sandbox: &Sandbox<'_>) {
    let script = format!(
        "mkdir -p dense/below && head -c {DENSE}M /dev/urandom | split -a 3 -b 9M - dense/below/part-"
    );
    let made = Command::new("sh")
        .args(["-c", &script])
        .current_dir(user.home())
        .status();
    assert!(made.unwrap().success());
    let sums = "cd dense/below && md5sum part-* | md5sum";
    let here = Command::new("sh")
        .args(["-c", sums])
        .current_dir(user.home())
        .output()
        .unwrap();
    let there = format!("{}:/srv", sandbox.id());
    copied(&cp(user, &["dense", &there]));
    let found = inside(sandbox, &format!("cd /srv && {sums}"));
    assert_eq!(found, String::from_utf8(here.stdout).unwrap().trim());
    let total = inside(
        sandbox,
        "awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo",
    );
    assert!(total.parse::<u64>().unwrap() < DENSE);
    copied(&cp(user, &[&format!("{there}/dense"), "dense-back"]));
    let same = Command::new("diff")
        .args(["-r", "dense", "dense-back"])
        .current_dir(user.home())
        .status();
    assert!(same.unwrap().success());
}

fn single_files(user: &User, sandbox: &Sandbox<'_>) {
    let home = user.home();
    let at = |path: &str| format!("{}:{path}", sandbox.id());
    fs::write(home.join("noise"), noise(9_000_001, 7)).unwrap();
    fs::set_permissions(home.join("noise"), fs::Permissions::from_mode(0o750)).unwrap();
    copied(&cp(user, &["noise", &at("/root/")]));
    let hash = sha256(&home.join("noise"));
    let found = inside(
        sandbox,
        "sha256sum < /root/noise; stat -c '%a %u %Y' /root/noise",
    );
    let modified = fs::metadata(home.join("noise")).unwrap().mtime();
    assert_eq!(found, format!("{hash}  -\n750 0 {modified}"));
    copied(&cp(user, &[&at("/root/noise"), "back"]));
    assert_eq!(sha256(&home.join("back")), hash);
    let back = fs::metadata(home.join("back")).unwrap();
    assert_eq!((back.mode() & 0o7777, back.mtime()), (0o750, modified));
    // Several into a directory; to a user.
    fs::write(home.join("a"), b"a").unwrap();
    fs::write(home.join("b"), b"b").unwrap();
    inside(sandbox, "mkdir -m 777 /drop");
    copied(&cp(user, &["-u", "nobody", "a", "b", &at("/drop")]));
    let owners = inside(sandbox, "stat -c %U /drop/a /drop/b; cat /drop/a /drop/b");
    assert_eq!(owners, "nobody\nnobody\nab");
}

/// A sparse file of 4 GiB, in and out of a guest with a fraction of that, and with less disk.
fn larger_than_memory(user: &User, sandbox: &Sandbox<'_>) {
    let (size, island) = (4_u64 << 30, noise(300_000, 99));
    let offsets = [0, (1 << 30) + 12_345, size - 300_000];
    let path = user.home().join("sparse");
    let file = File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for offset in offsets {
        file.write_all_at(&island, offset).unwrap();
    }
    let there = format!("{}:/root/sparse", sandbox.id());
    copied(&cp(user, &["sparse", &there]));
    let found = inside(sandbox, "stat -c '%s %b' /root/sparse");
    let (length, blocks) = found.split_once(' ').unwrap();
    assert_eq!(length, size.to_string());
    assert!(blocks.parse::<u64>().unwrap() < 10_000, "{blocks} blocks");
    copied(&cp(user, &[&there, "sparse-back"]));
    let back = File::open(user.home().join("sparse-back")).unwrap();
    let info = back.metadata().unwrap();
    assert_eq!(info.len(), size);
    assert!(info.blocks() < 10_000, "{} blocks", info.blocks());
    for offset in offsets {
        let mut found = vec![0; island.len()];
        back.read_exact_at(&mut found, offset).unwrap();
        assert!(found == island, "at {offset}");
    }
    fs::remove_file(&path).unwrap();
    fs::remove_file(user.home().join("sparse-back")).unwrap();
    inside(sandbox, "rm /root/sparse");
}

fn ten_thousand_files(user: &User, sandbox: &Sandbox<'_>) {
    let tree = user.home().join("tree");
    for folder in 0..100 {
        let folder_path = tree.join(format!("folder-{folder:02}"));
        fs::create_dir_all(&folder_path).unwrap();
        for file in 0..100 {
            fs::write(
                folder_path.join(format!("file-{file:02}")),
                noise(folder + file, 5),
            )
            .unwrap();
        }
    }
    symlink("folder-07/file-09", tree.join("link")).unwrap();
    fs::hard_link(tree.join("folder-00/file-50"), tree.join("second-name")).unwrap();
    let there = format!("{}:/srv", sandbox.id());
    copied(&cp(user, &["tree", &there]));
    let found = inside(
        sandbox,
        "cd /srv/tree && find . -type f | wc -l && stat -c %h second-name && readlink link",
    );
    assert_eq!(found, "10001\n2\nfolder-07/file-09");
    copied(&cp(user, &[&format!("{there}/tree"), "tree-back"]));
    let same = Command::new("diff")
        .arg("-r")
        .args([&tree, &user.home().join("tree-back")])
        .status();
    assert!(same.unwrap().success());
    // A page at a time, and all at once.
    inside(
        sandbox,
        "mkdir /many && cd /many && seq 10000 | xargs touch",
    );
    let said = fs_call(sandbox, "ls", &["/many", "-o", "table"]);
    assert_eq!(said.text().lines().count(), 10_000);
    let said = fs_call(
        sandbox,
        "ls",
        &["/many", "-o", "table", "--limit", "3", "--after", "42"],
    );
    said.is(0, "420\n4200\n4201\n");
    let said = fs_call(sandbox, "rm", &["-r", "/many", "/srv/tree"]);
    said.is(0, "");
    assert_eq!(
        inside(sandbox, "ls /srv; ls -d /many 2>/dev/null || true"),
        ""
    );
    fs::remove_dir_all(&tree).unwrap();
    fs::remove_dir_all(user.home().join("tree-back")).unwrap();
}

fn names_that_are_no_text(user: &User, sandbox: &Sandbox<'_>) {
    let odd = OsStr::from_bytes(b"odd \xff\x1b[31m\nname");
    let folder = user.home().join("odd");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join(odd), b"odd").unwrap();
    copied(&cp(user, &["odd", &format!("{}:/odd", sandbox.id())]));
    let said = fs_call(sandbox, "ls", &["/odd", "-o", "table"]);
    said.is(0, "odd \\xff\\u{1b}[31m\\nname\n");
    copied(&cp(user, &[&format!("{}:/odd", sandbox.id()), "odd-back"]));
    assert_eq!(
        fs::read(user.home().join("odd-back").join(odd)).unwrap(),
        b"odd"
    );
    let said = fs_call(sandbox, "stat", &["/odd/nothing\x1b[2J"]);
    assert_eq!(said.code(), 125);
    assert!(!said.err.contains('\x1b'), "{:?}", said.err);
}

fn streams(user: &User, sandbox: &Sandbox<'_>) {
    inside(sandbox, "mkdir -p /out/a && echo one > /out/a/one");
    let said = cp(user, &[&format!("{}:/out", sandbox.id()), "-"]);
    assert_eq!(said.code(), 0, "{}", said.err);
    let tar = user.home().join("out.tar");
    fs::write(&tar, &said.out).unwrap();
    let listed = Command::new("tar").arg("-tf").arg(&tar).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&listed.stdout),
        "out/\nout/a/\nout/a/one\n"
    );
    let there = format!("{}:/mnt", sandbox.id());
    let status = user
        .belljar(&["cp", "-", &there])
        .stdin(File::open(&tar).unwrap())
        .stdout(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    assert_eq!(inside(sandbox, "cat /mnt/out/a/one"), "one");
    // A single file through the other door.
    let status = user
        .belljar(&[
            "fs",
            "write",
            "--replace",
            "--mode",
            "600",
            sandbox.id(),
            "/etc/answer",
        ])
        .stdin(File::open(&tar).unwrap())
        .status();
    assert!(status.unwrap().success());
    assert_eq!(inside(sandbox, "stat -c %a /etc/answer"), "600");
    let said = fs_call(sandbox, "cat", &["/etc/answer"]);
    assert_eq!(said.out, fs::read(&tar).unwrap());
}

fn failures(user: &User, sandbox: &Sandbox<'_>) {
    let at = |path: &str| format!("{}:{path}", sandbox.id());
    let fails = |arguments: &[&str], texts: &[&str]| {
        let said = cp(user, arguments);
        assert_eq!(said.code(), 125, "{arguments:?}");
        said.explains(texts);
    };
    fails(&["none", &at("/")], &["none", "No such file"]);
    fails(&[&at("/none"), "."], &["/none", "No such file"]);
    fails(&["a", &at("/no/where")], &["no directory", "/no"]);
    fails(&["a", "b"], &["neither side is in a sandbox", "BOX:PATH"]);
    fails(&["a", "nosuchbox:/"], &["nosuchbox"]);
    fails(&["a", "b", &at("/etc/passwd")], &["several sources"]);
    fails(&[&at("/dev/zero"), "x"], &["character device"]);

    // Of whom it is not.
    inside(
        sandbox,
        "echo hush > /root/secret; chmod 600 /root/secret; chmod 755 /root",
    );
    fails(
        &["-u", "nobody", &at("/root/secret"), "x"],
        &["/root/secret", "Permission denied"],
    );
    fails(
        &["-u", "nobody", "a", &at("/etc/a")],
        &["/etc/a", "Permission denied"],
    );
    fails(&["-u", "nosuchuser", "a", &at("/tmp/a")], &["nosuchuser"]);
    assert!(!user.home().join("x").exists());
    inside(
        sandbox,
        "mkdir /mixed; echo 1 > /mixed/open; cp -p /root/secret /mixed/",
    );
    let said = cp(user, &["-u", "nobody", &at("/mixed"), "mixed"]);
    assert_eq!(said.code(), 1);
    said.explains(&["/mixed/secret", "Permission denied"]);
    assert!(user.home().join("mixed/open").exists());

    // No room, and no right to write to the file system.
    inside(
        sandbox,
        "mkdir /small && mount -t tmpfs -o size=2M none /small",
    );
    fails(
        &["noise", &at("/small/noise")],
        &["/small/noise", "No space left"],
    );
    let said = fs_call(sandbox, "df", &["/small", "-o", "json"]);
    assert!(said.text().contains("\"tmpfs\""), "{}", said.text());
    inside(sandbox, "rm -f /small/noise; mount -o remount,ro /small");
    fails(
        &["a", &at("/small/a")],
        &["/small/a", "Read-only file system"],
    );
    inside(sandbox, "umount /small");
    // What is mounted stays when the directory above goes.
    inside(
        sandbox,
        "mkdir -p /above/mount && mount -t tmpfs none /above/mount && touch /above/mount/kept",
    );
    let said = fs_call(sandbox, "rm", &["-r", "/above"]);
    assert_eq!(said.code(), 125);
    assert_eq!(
        inside(sandbox, "ls /above/mount && umount /above/mount"),
        "kept"
    );

    let said = fs_call(sandbox, "chmod", &["999", "/etc"]);
    assert_eq!(said.code(), 125);
    said.explains(&["999"]);
    let said = fs_call(sandbox, "mkdir", &["/etc/passwd/x", "/made"]);
    assert_eq!(said.code(), 125, "one of two failed");
    assert_eq!(inside(sandbox, "stat -c %F /made"), "directory");
    // And after all that it still works.
    copied(&cp(user, &["a", &at("/made/a")]));
}
