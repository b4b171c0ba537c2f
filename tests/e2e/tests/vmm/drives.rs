//! Drives: order, names, what is read-only, what is written where, and what becomes a hole.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use belljar_e2e::guest::{Guest, Spec};
use belljar_e2e::vmm::Vmm;
use belljar_e2e::{eventually, files};
use belljar_layers::{View, merge};
use belljar_protocol::v1::shutdown::Mode;
use serde_json::{Value, json};

use crate::noise;

const MIB: u64 = 1 << 20;

fn add(vmm: &Vmm, id: &str, path: &Path, more: &Value) {
    let mut drive = json!({"drive_id": id, "path_on_host": path, "is_root_device": false});
    for (name, value) in more.as_object().unwrap() {
        drive[name] = value.clone();
    }
    vmm.put(&format!("/drives/{id}"), &drive);
}

/// Bytes that the file has on the host's disk.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// Discards (0x1277) or zeroes (0x127f) a part of a block device: `<linux/fs.h>`.
fn erase(device: &str, call: u32, start: u64, length: u64) -> String {
    format!(
        "import fcntl, os, struct
fd = os.open('{device}', os.O_RDWR)
fcntl.ioctl(fd, {call}, struct.pack('QQ', {start}, {length}))
os.fsync(fd)"
    )
}

#[test]
fn four_drives_of_four_kinds() {
    let protected = noise(1, 1 << 20);
    let guest = Guest::boot_with(&Spec::default(), |vmm| {
        vmm.write("protected", &protected);
        let small = vmm.path("protected");
        add(
            vmm,
            "protected",
            &small,
            &json!({"is_read_only": true, "serial": "a-serial_of+20:chars"}),
        );
        let plain = vmm.file("plain", 64 * MIB);
        add(vmm, "plain", &plain, &json!({"cache_type": "Writeback"}));
        let ring = vmm.file("ring", 64 * MIB);
        add(
            vmm,
            "ring",
            &ring,
            &json!({"cache_type": "Writeback", "io_engine": "Async"}),
        );
    });
    let path = |name: &str| guest.vmm.path(name);

    // In the order of their calls, under their names.
    assert_eq!(
        guest.sh(
            "cd /sys/block; for d in vd*; do echo $d $(cat $d/serial) $(cat $d/size) $(cat $d/ro); done | tail -n +2"
        ),
        "vdb a-serial_of+20:chars 2048 1\nvdc plain 131072 0\nvdd ring 131072 0"
    );

    for (device, name) in [("/dev/vdc", "plain"), ("/dev/vdd", "ring")] {
        let file = path(name);
        // What is written and flushed is in the file; what is read is what the file has.
        guest.sh(&format!(
            "head -c 33554432 /dev/urandom >/tmp/data; dd if=/tmp/data of={device} bs=1M conv=fsync status=none"
        ));
        let sum = sum_of(&file);
        assert_eq!(
            guest.sh("(cat /tmp/data; head -c 33554432 /dev/zero) | sha256sum"),
            sum
        );
        assert_eq!(
            guest.sh(&format!(
                "echo 3 >/proc/sys/vm/drop_caches; dd if={device} bs=1M iflag=direct status=none | sha256sum"
            )),
            sum
        );
        // Small pieces in any order, many at once.
        guest.python(&format!(
            "import os, random, threading, hashlib
fd = os.open('{device}', os.O_RDWR)
def work(n):
    r = random.Random(n)
    mine = list(range(n, 2048, 4)); r.shuffle(mine)
    for k in mine:
        os.pwrite(fd, hashlib.sha512(b'%d' % k).digest() * 64, (32 << 20) + k * 4096)
    os.fsync(fd)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for t in threads: t.start()
for t in threads: t.join()
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
for k in range(2048):
    assert os.pread(fd, 4096, (32 << 20) + k * 4096) == hashlib.sha512(b'%d' % k).digest() * 64, k"
        ));
        assert_eq!(guest.sh(&format!("sha256sum <{device}")), sum_of(&file));

        // Discards and zeroes become holes.
        let before = allocated(&file);
        assert!(before >= 40 * MIB, "{before}");
        guest.python(&erase(device, 0x1277, 0, 16 * MIB));
        assert!(allocated(&file) <= before - 16 * MIB, "discard: no hole");
        guest.python(&erase(device, 0x127f, 16 * MIB, 8 * MIB));
        assert!(allocated(&file) <= before - 24 * MIB, "zeroing: no hole");
        guest.sh(&format!(
            "test $(head -c 25165824 {device} | tr -d '\\0' | wc -c) = 0"
        ));
    }

    // A drive grows; a file takes another's place.
    fs::File::options()
        .write(true)
        .open(path("plain"))
        .unwrap()
        .set_len(96 * MIB)
        .unwrap();
    guest
        .vmm
        .patch("/drives/plain", &json!({"drive_id": "plain"}));
    eventually("the new size", || {
        guest.sh("cat /sys/block/vdc/size") == "196608"
    });
    let other = guest.vmm.file("other", 32 * MIB);
    fs::write(&other, noise(2, 32 << 20)).unwrap();
    guest.vmm.patch(
        "/drives/plain",
        &json!({"drive_id": "plain", "path_on_host": "other"}),
    );
    eventually("the other file's size", || {
        guest.sh("cat /sys/block/vdc/size") == "65536"
    });
    assert_eq!(
        guest.sh("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vdc bs=1M iflag=direct status=none | sha256sum"),
        sum_of(&other)
    );
    guest
        .vmm
        .call(
            "PATCH",
            "/drives/plain",
            &json!({"drive_id": "plain", "path_on_host": "missing"}),
        )
        .refuses(&["missing"]);
    guest
        .vmm
        .call("PATCH", "/drives/none", &json!({"drive_id": "none"}))
        .refuses(&["none"]);

    // An entropy device is there, and gives something.
    assert_eq!(
        guest.sh("cat /sys/class/misc/hw_random/rng_current; head -c 65536 /dev/hwrng | wc -c"),
        "virtio_rng.0\n65536"
    );
    // The refused write that follows stands in the kernel's log as an I/O error.
    guest.is_healthy();

    // Read-only is enforced by the device, whatever the guest thinks of it.
    guest.python(
        "import fcntl, os, struct
fd = os.open('/dev/vdb', os.O_RDONLY)
try: fcntl.ioctl(fd, 0x125d, struct.pack('i', 0))
except OSError: pass
try:
    fd = os.open('/dev/vdb', os.O_RDWR | os.O_SYNC)
    os.write(fd, b'x' * 4096)
    os.fsync(fd)
except OSError: pass
else: raise SystemExit('the write went through')",
    );
    assert_eq!(fs::read(path("protected")).unwrap(), protected);
    assert_eq!(guest.sh("sha256sum </dev/vdb"), sum_of(&path("protected")));
    guest.shutdown(Mode::PowerOff);
    guest.vmm.ends_with(0);
}

/// Random bytes in random places, many at once, all synced.
fn scribble(device: &str, seed: u32) -> String {
    format!(
        "import os, random, threading
fd = os.open('{device}', os.O_RDWR)
def work(n):
    r = random.Random({seed} * 4 + n)
    for k in range(200):
        at = r.randrange(n * 4 << 11, (n + 1) * 4 << 11) * 512
        os.pwrite(fd, r.randbytes(512 * r.randrange(1, 40))[:(16 << 20) - at], at)
    os.fsync(fd)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for t in threads: t.start()
for t in threads: t.join()"
    )
}

/// The sum of a whole device as its host has it, not as the guest's caches do.
fn direct_sum(guest: &Guest, device: &str) -> String {
    guest.sh(&format!(
        "echo 3 >/proc/sys/vm/drop_caches; dd if={device} bs=1M iflag=direct status=none | sha256sum"
    ))
}

/// What these layers hold over the drive's image.
fn layers_sum(vmm: &Vmm, id: &str, layers: &[&str]) -> String {
    let open = |name: &str| {
        let file = fs::File::open(vmm.path(&format!("{id}.{name}"))).unwrap();
        (file, name.to_owned())
    };
    let view = View::open(layers.iter().map(|name| open(name)).collect()).unwrap();
    let view = view.over(open("base").0, "base").unwrap();
    let flat = vmm.file("flat", 16 * MIB);
    let mut bytes = vec![0; 16 << 20];
    view.read(&mut bytes, 0).unwrap();
    fs::write(&flat, bytes).unwrap();
    sum_of(&flat)
}

/// A drive of layers: a snapshot freezes one under the guest, which writes on to the next; both states
/// stay right, on the host and in the guest, also after two layers became one.
#[test]
fn a_layered_drive_keeps_the_state_of_every_snapshot() {
    const DRIVES: [(&str, &str); 2] = [("/dev/vdb", "sync"), ("/dev/vdc", "ring")];
    let mut guest = Guest::boot_with(&Spec::default(), |vmm| {
        for ((_, id), engine) in DRIVES.iter().zip(["Sync", "Async"]) {
            // An image with something in it, and a hole.
            vmm.file(&format!("{id}.base"), 16 * MIB);
            let mut image = noise(3, 2 << 20);
            image.resize(16 << 20, 0);
            fs::write(vmm.path(&format!("{id}.base")), image).unwrap();
            for layer in ["one", "two", "three"] {
                vmm.write(&format!("{id}.{layer}"), b"");
            }
            let more =
                json!({"format": "layers", "layers": [format!("{id}.one")], "io_engine": engine});
            add(vmm, id, &vmm.path(&format!("{id}.base")), &more);
        }
    });
    let snapshot = |next: &str| {
        guest.vmm.patch("/vm", &json!({"state": "Paused"}));
        let next_layers = json!({"sync": format!("sync.{next}"), "ring": format!("ring.{next}")});
        guest.vmm.put(
            "/snapshot/create",
            &json!({"snapshot_path": "state", "mem_file_path": "ram", "next_layers": next_layers}),
        );
        guest.vmm.patch("/vm", &json!({"state": "Resumed"}));
    };
    let untouched: Vec<_> = DRIVES
        .iter()
        .map(|(_, id)| sum_of(&guest.vmm.path(&format!("{id}.base"))))
        .collect();

    let mut states: Vec<Vec<String>> = Vec::new();
    for (round, next) in [(1, "two"), (2, "three")] {
        let sums = DRIVES.map(|(device, _)| {
            guest.python(&scribble(device, round));
            guest.python(&erase(device, 0x1277, u64::from(round) * MIB, 3 * MIB));
            guest.python(&erase(
                device,
                0x127f,
                u64::from(round) * 5 * MIB + 512,
                2 * MIB,
            ));
            direct_sum(&guest, device)
        });
        states.push(sums.to_vec());
        snapshot(next);
    }
    for (device, _) in DRIVES {
        guest.python(&scribble(device, 3));
    }
    for (index, (device, id)) in DRIVES.iter().enumerate() {
        // What was frozen is what the guest saw then; what it sees now is more.
        assert_eq!(
            layers_sum(&guest.vmm, id, &["one"]),
            states[0][index],
            "{id}"
        );
        assert_eq!(
            layers_sum(&guest.vmm, id, &["one", "two"]),
            states[1][index],
            "{id}"
        );
        let now = direct_sum(&guest, device);
        assert_ne!(now, states[1][index], "{id}");
        // Two layers become one under the guest, which notices nothing.
        let open = |name: &str| {
            let file = fs::File::open(guest.vmm.path(&format!("{id}.{name}"))).unwrap();
            (file, name.to_owned())
        };
        let view = View::open(vec![open("one"), open("two")]).unwrap();
        let merged = guest.vmm.file(&format!("{id}.merged"), 0);
        let into = fs::File::options()
            .read(true)
            .write(true)
            .open(merged)
            .unwrap();
        merge(&view, into, "merged", &mut |_| Ok(())).unwrap();
        guest.vmm.patch(
            &format!("/drives/{id}"),
            &json!({"drive_id": id, "merged_layers": {"path_on_host": format!("{id}.merged")}}),
        );
        assert_eq!(direct_sum(&guest, device), now, "{id}");
        assert_eq!(
            layers_sum(&guest.vmm, id, &["merged"]),
            states[1][index],
            "{id}"
        );
        states[0][index] = now;
    }
    guest
        .vmm
        .call(
            "PATCH",
            "/drives/sync",
            &json!({"drive_id": "sync", "path_on_host": "sync.base"}),
        )
        .refuses(&["merged_layers"]);
    guest.is_healthy();
    guest.shutdown(Mode::PowerOff);
    eventually("the end of the VMM", || guest.vmm.has_ended());
    for (index, (_, id)) in DRIVES.iter().enumerate() {
        // Closed by the VMM, so that others can read it.
        assert_eq!(
            layers_sum(&guest.vmm, id, &["merged", "three"]),
            states[0][index],
            "{id}"
        );
        assert_eq!(
            sum_of(&guest.vmm.path(&format!("{id}.base"))),
            untouched[index],
            "{id}"
        );
    }
}

/// What `sha256sum <FILE` prints.
fn sum_of(file: &Path) -> String {
    let out = std::process::Command::new("sha256sum")
        .stdin(fs::File::open(file).unwrap())
        .output()
        .unwrap();
    String::from_utf8_lossy(&out.stdout).trim_end().to_owned()
}

#[test]
fn a_drive_has_one_user() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(MIB).unwrap();
    let first = crate::halting();
    add(&first, "disk", &disk, &json!({}));
    first.action("InstanceStart").is_done();
    let second = Vmm::new();
    let kernel = second.write("kernel", &files::halting_kernel());
    second.put("/boot-source", &json!({"kernel_image_path": kernel}));
    add(&second, "disk", &disk, &json!({}));
    second.action("InstanceStart").refuses(&["disk", "use"]);
    // The first lets it go; the same start works then.
    first.action("Stop").is_done();
    first.ends_with(20);
    second.action("InstanceStart").is_done();
    second.action("Stop").is_done();
    second.ends_with(20);
}
