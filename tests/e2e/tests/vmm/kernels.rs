//! Every kernel, every way to enter it, every shape of machine: until the agent answers.

use std::path::Path;
use std::process::Command;

use belljar_e2e::guest::{Guest, Spec};
use belljar_e2e::{assets_dir, bin_dir};
use serde_json::json;

#[test]
fn the_projects_kernel_by_its_64_bit_entry() {
    let guest = Guest::boot(&Spec::default());
    guest.answers();
    assert_eq!(guest.sh("nproc"), "1");
    assert!(guest.ready.kernel_release.starts_with("6.12."));
    guest.ends_well();
}

#[test]
fn the_projects_kernel_by_pvh() {
    let guest = Guest::boot(&Spec {
        boot: json!({"boot_protocol": "Pvh"}),
        ..Spec::default()
    });
    guest.answers();
    assert_eq!(guest.sh("cat /sys/class/block/vda/ro"), "1");
    guest.ends_well();
}

#[test]
fn a_bzimage() {
    let kernel = assets_dir().join("vmlinux").canonicalize().unwrap();
    let guest = Guest::boot(&Spec {
        kernel: kernel.with_file_name("bzImage"),
        ..Spec::default()
    });
    guest.answers();
    guest.ends_well();
}

#[test]
fn devices_on_the_command_line() {
    let guest = Guest::boot(&Spec {
        vcpus: 2,
        args: "acpi=off".to_owned(),
        boot: json!({"device_discovery": "CommandLine"}),
        ..Spec::default()
    });
    guest.answers();
    assert_eq!(
        guest.sh("nproc; grep -c virtio_mmio.device /proc/cmdline"),
        "2\n1"
    );
    guest.is_healthy();
    // Without ACPI there is no power-off; a reset is what is left.
    guest.shutdown(belljar_protocol::v1::shutdown::Mode::Reboot);
    guest.vmm.ends_with(16);
}

#[test]
fn debians_unmodified_cloud_kernel() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let made = Command::new(workspace.join("rootfs/cloud-guest"))
        .arg(bin_dir().join("belljar-agent"))
        .output()
        .unwrap();
    let made = format!(
        "{}{}",
        String::from_utf8_lossy(&made.stdout),
        String::from_utf8_lossy(&made.stderr)
    );
    let part = |name: &str| {
        let line = made.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {made}")).into()
    };
    let guest = Guest::boot(&Spec {
        vcpus: 2,
        kernel: part("kernel="),
        initramfs: part("initramfs="),
        ..Spec::default()
    });
    guest.answers();
    let release = guest.sh("uname -r");
    assert!(
        release.starts_with("6.12.") && release.contains("cloud"),
        "{release}"
    );
    assert_eq!(guest.sh("nproc"), "2");
    guest.ends_well();
}

#[test]
fn four_processors_in_128_mib() {
    let guest = Guest::boot(&Spec {
        vcpus: 4,
        memory_mib: 128,
        ..Spec::default()
    });
    assert_eq!(guest.sh("nproc"), "4");
    guest.ends_well();
}

#[test]
fn thirty_two_processors() {
    let guest = Guest::boot(&Spec {
        vcpus: 32,
        ..Spec::default()
    });
    assert_eq!(guest.sh("nproc"), "32");
    guest.ends_well();
}

#[test]
fn the_least_memory() {
    let guest = Guest::boot(&Spec {
        memory_mib: 48,
        ..Spec::default()
    });
    let total: u64 = guest
        .sh("awk '/MemTotal/ { print $2 }' /proc/meminfo")
        .parse()
        .unwrap();
    assert!((24 * 1024..48 * 1024).contains(&total), "{total} KiB");
    guest.ends_well();
}

#[test]
fn memory_beyond_the_hole() {
    let guest = Guest::boot(&Spec {
        memory_mib: 5 * 1024,
        ..Spec::default()
    });
    assert_eq!(
        guest.sh("grep -o '^ *100000000-17fffffff : System RAM' /proc/iomem | tr -d ' '"),
        "100000000-17fffffff:SystemRAM"
    );
    // New pages come from the upper zone first; the page map tells where they are.
    let highest = guest.python(
        "import mmap, struct, ctypes
m = mmap.mmap(-1, 16 << 20)
for i in range(0, len(m), 4096):
    m[i:i + 8] = struct.pack('Q', i)
start = ctypes.addressof(ctypes.c_char.from_buffer(m))
with open('/proc/self/pagemap', 'rb', 0) as map:
    map.seek(start // 4096 * 8)
    frames = [entry & (1 << 55) - 1 for entry in struct.unpack('4096Q', map.read(4096 * 8))]
assert all(struct.unpack('Q', m[i:i + 8])[0] == i for i in range(0, len(m), 4096))
print(max(frames))",
    );
    assert!(
        highest.parse::<u64>().unwrap() >= 0x10_0000,
        "page frame {highest} is below 4 GiB"
    );
    guest.ends_well();
}
