//! The balloon gives memory back to the host: on request, by free-page reports, by hints.

use belljar_e2e::eventually;
use belljar_e2e::guest::{Guest, Spec};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Makes the guest touch that much memory and free it again.
fn touch_and_free(guest: &Guest, mib: u32) {
    guest.sh(&format!(
        "mount -t tmpfs -o size=90% tmpfs /mnt; head -c {mib}M /dev/zero >/mnt/file; umount /mnt"
    ));
}

#[test]
fn inflated_deflated_and_counted() {
    let guest = Guest::boot_with(
        &Spec {
            memory_mib: 128,
            ..Spec::default()
        },
        |vmm| {
            vmm.put(
                "/balloon",
                &json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1}),
            );
        },
    );
    touch_and_free(&guest, 64);
    let before = guest.resident();
    assert!(before >= 64 * MIB, "{before}");
    let statistics = || guest.vmm.get("/balloon/statistics");
    guest.vmm.patch("/balloon", &json!({"amount_mib": 50}));
    eventually("the balloon to have 50 MiB", || {
        statistics()["actual_mib"] == 50
    });
    let after = guest.resident();
    assert!(after + 32 * MIB <= before, "{before} before, {after} after");
    assert_eq!(guest.vmm.get("/balloon")["amount_mib"], 50);
    eventually("the guest's own figures", || {
        statistics()["total_memory"]
            .as_u64()
            .is_some_and(|total| total > 64 * MIB)
    });
    guest.vmm.patch("/balloon", &json!({"amount_mib": 0}));
    eventually("the balloon to be empty", || {
        statistics()["actual_mib"] == 0
    });
    // The guest has its memory again, and what it puts there stays.
    touch_and_free(&guest, 70);
    // A balloon that takes too much is emptied before programs are killed.
    guest.vmm.patch("/balloon", &json!({"amount_mib": 90}));
    eventually("most of it", || {
        statistics()["actual_mib"]
            .as_u64()
            .is_some_and(|mib| mib > 50)
    });
    guest.python("print(len(bytearray(50 << 20)))");
    for (amount, word) in [(json!(128), "amount_mib"), (json!(-1), "amount_mib")] {
        guest
            .vmm
            .call("PATCH", "/balloon", &json!({"amount_mib": amount}))
            .refuses(&[word]);
    }
    assert!(!guest.sh("dmesg").contains("Killed process"));
    guest.ends_well();
}

#[test]
fn free_pages_are_reported_and_hinted() {
    let guest = Guest::boot_with(&Spec::default(), |vmm| {
        vmm.put(
            "/balloon",
            &json!({
                "amount_mib": 0, "deflate_on_oom": false,
                "free_page_reporting": true, "free_page_hinting": true,
            }),
        );
    });
    guest.sh("mount -t tmpfs -o size=90% tmpfs /mnt; head -c 128M /dev/zero >/mnt/file");
    let full = guest.resident();
    assert!(full >= 128 * MIB, "{full}");
    guest.sh("umount /mnt");
    eventually("the free pages to be given back", || {
        guest.resident() + 96 * MIB <= full
    });
    // One round of hints, to its end.
    guest.vmm.patch("/balloon/hinting/start", &Value::Null);
    eventually("the guest to have named its free pages", || {
        let status = guest.vmm.get("/balloon/hinting/status");
        status["host_cmd"] == 1 && status["guest_cmd"] != Value::Null
    });
    guest.vmm.patch("/balloon/hinting/stop", &Value::Null);
    // Memory is sound: what is written is read.
    guest.python(
        "import hashlib
parts = [hashlib.sha512(b'%d' % n).digest() * 16384 for n in range(96)]
assert all(part == hashlib.sha512(b'%d' % n).digest() * 16384 for n, part in enumerate(parts))",
    );
    guest.ends_well();
}
