//! What processor the guest sees. Pure: entries as KVM supports them in, entries for one
//! vCPU out.
//!
//! By default a *named baseline*: features outside a fixed list are hidden, so that a
//! snapshot moves between machines of one vendor whose processors have that list.
//! `Baseline::Host` passes on all that KVM offers.
//! Leaves and bits: Intel SDM volume 2 "CPUID", AMD APM volume 3 appendix E, and
//! Documentation/virt/kvm/x86/cpuid.rst for 0x4000_0001.
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::config::CpuBaseline as Baseline;

#[derive(Debug, thiserror::Error)]
#[error("KVM offers too many CPUID leaves: {0}")]
pub struct CpuidError(usize);

#[expect(
    clippy::indexing_slicing,
    reason = "evaluated by the compiler, which has no iterators in constants"
)]
const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < list.len() {
        mask |= 1 << list[i];
        i += 1;
    }
    mask
}

/// Leaf 1: SSE3 PCLMUL SSSE3 FMA CX16 PCID SSE4 x2APIC MOVBE POPCNT TSC-deadline AES XSAVE
/// OSXSAVE AVX F16C RDRAND hypervisor.
const LEAF1_ECX: u32 = bits(&[
    0, 1, 9, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
]);
/// Leaf 1: the classic set, without ACPI thermal, debug store, self-snoop and the like.
const LEAF1_EDX: u32 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 28,
]);
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 7: FSGSBASE TSC_ADJUST BMI1 AVX2 SMEP BMI2 ERMS INVPCID RDSEED ADX SMAP CLFLUSHOPT SHA.
const LEAF7_EBX: u32 = bits(&[0, 1, 3, 5, 7, 8, 9, 10, 18, 19, 20, 23, 29]);
/// Leaf 7: UMIP.
const LEAF7_ECX: u32 = bits(&[2]);
/// Leaf 7: fast short REP MOV, and everything that guests mitigate side channels with.
const LEAF7_EDX: u32 = bits(&[4, 10, 26, 27, 28, 29, 31]);
/// Leaf 0xd: x87, SSE and AVX state, in that order 512 + 64 + 256 bytes.
const XSAVE_COMPONENTS: u32 = 0b111;
const XSAVE_SIZE: u32 = 512 + 64 + 256;
/// Leaf 0xd.1: XSAVEOPT, XSAVEC, XGETBV(1).
const LEAFD1_EAX: u32 = 0b111;
/// Leaf 0x8000_0001: LAHF CR8 LZCNT SSE4A MISALIGNSSE PREFETCHW TOPOEXT.
const EXT1_ECX: u32 = bits(&[0, 4, 5, 6, 7, 8, 22]);
/// Leaf 0x8000_0001: SYSCALL NX FXSR_OPT 1G pages RDTSCP long mode, and AMD's repetition of leaf 1.
const EXT1_EDX: u32 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 22, 23, 24, 25, 26, 27, 29,
]);
/// Leaf 0x8000_0008: XSAVE error pointers, and what guests mitigate side channels with.
const EXT8_EBX: u32 = bits(&[2, 12, 14, 15, 16, 17, 18, 24, 25, 26]);

/// Leaf 0x4000_0001: asynchronous page faults, those while a guest of the guest runs, and by interrupt.
const ASYNC_PF: u32 = bits(&[4, 10, 14]);

/// The CPUID of vCPU `index` of `count`.
pub fn for_vcpu(
    supported: &CpuId,
    index: u8,
    count: u8,
    baseline: Baseline,
) -> Result<CpuId, CpuidError> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .copied()
        .filter(|e| keep(e, baseline))
        .collect();
    complete_topology(&mut entries);
    for entry in &mut entries {
        if baseline == Baseline::Portable {
            mask(entry);
        }
        describe(entry, index, count);
    }
    CpuId::from_entries(&entries).map_err(|_| CpuidError(entries.len()))
}

/// KVM lists only the first level of the topology leaves (since Linux 6.2: "no topology"). With
/// that alone a guest would find every vCPU in a package of its own.
fn complete_topology(entries: &mut Vec<kvm_cpuid_entry2>) {
    const LEVELS: std::ops::Range<u32> = 0..3;
    for function in [0xb, 0x1f] {
        let first = entries.iter().find(|e| e.function == function).copied();
        let Some(first) = first else { continue };
        entries.retain(|e| e.function != function);
        entries.extend(LEVELS.map(|index| kvm_cpuid_entry2 {
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..first
        }));
    }
}

/// The XSAVE state components of `cpuid`, as XCR0 has them; zero without XSAVE.
pub fn state_components(cpuid: &CpuId) -> u64 {
    let leaf = cpuid
        .as_slice()
        .iter()
        .find(|e| e.function == 0xd && e.index == 0);
    leaf.map_or(0, |e| u64::from(e.edx) << 32 | u64::from(e.eax))
}

/// Whole leaves that a guest must not see.
fn keep(entry: &kvm_cpuid_entry2, baseline: Baseline) -> bool {
    let portable = baseline == Baseline::Portable;
    match (entry.function, entry.index) {
        // State components that the baseline hides.
        (0xd, 2..) => !portable || entry.index == 2,
        // Cache partitioning, SGX, processor trace, tiles, keys, AVX10.
        (0xf | 0x10 | 0x12 | 0x14 | 0x19 | 0x1d | 0x1e | 0x24, _) => !portable,
        // Nested virtualisation is not offered.
        (0x8000_000a, _) => false,
        _ => true,
    }
}

fn mask(entry: &mut kvm_cpuid_entry2) {
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ecx &= LEAF1_ECX;
            entry.edx &= LEAF1_EDX;
        }
        (7, 0) => {
            entry.eax = 0;
            entry.ebx &= LEAF7_EBX;
            entry.ecx &= LEAF7_ECX;
            entry.edx &= LEAF7_EDX;
        }
        (0xd, 0) => {
            entry.eax &= XSAVE_COMPONENTS;
            entry.ebx = entry.ebx.min(XSAVE_SIZE);
            entry.ecx = entry.ecx.min(XSAVE_SIZE);
            entry.edx = 0;
        }
        (0xd, 1) => {
            entry.eax &= LEAFD1_EAX;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        (0x8000_0001, _) => {
            entry.ecx &= EXT1_ECX;
            entry.edx &= EXT1_EDX;
        }
        // An invariant TSC is true only as long as the guest stays on this host.
        (0x8000_0007, _) => entry.edx = 0,
        (0x8000_0008, _) => entry.ebx &= EXT8_EBX,
        _ => {}
    }
}

/// What differs from vCPU to vCPU, and what the VMM itself promises.
fn describe(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) {
    let (id, count32) = (u32::from(index), u32::from(count));
    // Bits of an APIC id that number the cores of the one package.
    let shift = count32.next_power_of_two().trailing_zeros();
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xffff | count32 << 16 | id << 24;
            entry.ecx |= HYPERVISOR | TSC_DEADLINE;
            entry.edx = entry.edx & !(1 << 28) | u32::from(count > 1) << 28;
        }
        // Deterministic caches: cores per package; level 3 is shared by all of them.
        4 if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 == 3 {
                count32 - 1
            } else {
                0
            };
            entry.eax = entry.eax & 0x3fff | (count32 - 1) << 26 | sharing << 14;
        }
        // Always-running APIC timer; no thermal or power leaves.
        6 => {
            entry.eax = 1 << 2;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        // No performance counters.
        0xa => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        // Topology: one thread a core, all cores in one package.
        0xb | 0x1f => {
            entry.edx = id;
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, 1 << 8),
                1 => (shift, count32, 2 << 8 | 1),
                level => (0, 0, level),
            };
        }
        // Guests whose pages come late were seen to wait for ever, on one vCPU, for the lock that the interrupt of such
        // a fault takes (`kvm_async_pf_task_wake`); other VMMs met crashes there, and vCPUs that never rest.
        0x4000_0001 => entry.eax &= !ASYNC_PF,
        0x8000_0001 => entry.ecx &= !(1 << 2),
        0x8000_0008 => entry.ecx = shift << 12 | (count32 - 1),
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 == 3 {
                count32 - 1
            } else {
                0
            };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id;
            entry.ecx = 0;
            entry.edx = 0;
        }
        _ => {}
    }
}

/// Why a saved vCPU cannot run here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OtherCpu {
    #[error("it was saved on a processor by {saved:?}, and this one is by {here:?}")]
    Vendor { saved: String, here: String },
    #[error(
        "the guest uses processor features that this host lacks: CPUID leaf {leaf:#x}, {register}, bits {missing:#x}"
    )]
    Feature {
        leaf: u32,
        register: &'static str,
        missing: u32,
    },
}

/// Whether a guest that was told `saved` finds all of it on a host that offers `here`. Only
/// features count, and who made the processor; the rest is description.
pub fn check_portable(saved: &[kvm_cpuid_entry2], here: &CpuId) -> Result<(), OtherCpu> {
    let find = |list: &[kvm_cpuid_entry2], leaf, index| {
        let mut entries = list.iter();
        let has_index = |e: &kvm_cpuid_entry2| e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
        let found = entries.find(|e| e.function == leaf && (e.index == index || !has_index(e)));
        found.copied().unwrap_or_default()
    };
    let here = here.as_slice();
    let (was, is) = (vendor(&find(saved, 0, 0)), vendor(&find(here, 0, 0)));
    if was != is {
        return Err(OtherCpu::Vendor {
            saved: was,
            here: is,
        });
    }
    for (leaf, index, registers) in FEATURES {
        let (saved, here) = (find(saved, leaf, index), find(here, leaf, index));
        let all = [
            ("eax", saved.eax & !here.eax),
            ("ebx", saved.ebx & !here.ebx),
            ("ecx", saved.ecx & !here.ecx),
            ("edx", saved.edx & !here.edx),
        ];
        let ours = if (leaf, index) == (1, 0) { GIVEN } else { 0 };
        for (register, missing) in all {
            let missing = if register == "ecx" {
                missing & !ours
            } else {
                missing
            };
            if registers.contains(&register) && missing != 0 {
                return Err(OtherCpu::Feature {
                    leaf,
                    register,
                    missing,
                });
            }
        }
    }
    Ok(())
}

/// Bits of leaf 1, ECX, that KVM does not list, or that follow a control register (OSXSAVE).
const GIVEN: u32 = TSC_DEADLINE | HYPERVISOR | 1 << 27;

/// Where features are told: leaf, index, registers.
const FEATURES: [(u32, u32, &[&str]); 7] = [
    (1, 0, &["ecx"]),
    (7, 0, &["ebx", "ecx", "edx"]),
    (7, 1, &["eax"]),
    (0xd, 0, &["eax", "edx"]),
    (0xd, 1, &["eax"]),
    (0x8000_0001, 0, &["ecx", "edx"]),
    (0x4000_0001, 0, &["eax"]),
];

fn vendor(leaf: &kvm_cpuid_entry2) -> String {
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
    String::from_utf8_lossy(bytes.as_flattened()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn make(entries: &[kvm_cpuid_entry2], index: u8, count: u8, baseline: Baseline) -> CpuId {
        for_vcpu(
            &CpuId::from_entries(entries).unwrap(),
            index,
            count,
            baseline,
        )
        .unwrap()
    }

    fn find(cpuid: &CpuId, function: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function)
            .unwrap()
    }

    fn find_level(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    /// What KVM offers since Linux 6.2: a first level, and nothing in it.
    #[test]
    fn all_vcpus_are_cores_of_one_package() {
        let bare = kvm_cpuid_entry2 {
            function: 0xb,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..Default::default()
        };
        let cpuid = make(&[bare], 3, 8, Baseline::Portable);
        let level = |index| {
            let e = find_level(&cpuid, 0xb, index);
            assert_eq!((e.edx, e.flags), (3, KVM_CPUID_FLAG_SIGNIFCANT_INDEX));
            (e.eax, e.ebx, e.ecx)
        };
        assert_eq!(level(0), (0, 1, 1 << 8), "one thread a core");
        assert_eq!(level(1), (3, 8, 2 << 8 | 1), "eight cores in the package");
        assert_eq!(level(2), (0, 0, 2), "nothing above");
        assert_eq!(cpuid.as_slice().len(), 3);
    }

    #[test]
    fn apic_ids_and_counts_follow_the_vcpu() {
        let all = [entry(1, 0), entry(0xb, 1), entry(0x8000_0008, 0)];
        for count in 1..=32 {
            for index in 0..count {
                let cpuid = make(&all, index, count, Baseline::Portable);
                let leaf1 = find(&cpuid, 1);
                assert_eq!(leaf1.ebx >> 24, u32::from(index));
                assert_eq!(leaf1.ebx >> 16 & 0xff, u32::from(count));
                let topology = find_level(&cpuid, 0xb, 1);
                assert_eq!(topology.edx, u32::from(index));
                assert!(1 << topology.eax >= u32::from(count));
                assert_eq!(find(&cpuid, 0x8000_0008).ecx & 0xff, u32::from(count) - 1);
            }
        }
    }

    #[test]
    fn the_baseline_hides_what_is_not_on_its_list() {
        let cpuid = make(
            &[entry(1, 0), entry(7, 0), entry(0xd, 9), entry(0x14, 0)],
            0,
            1,
            Baseline::Portable,
        );
        let leaf7 = find(&cpuid, 7);
        assert_eq!(leaf7.ebx & 1 << 16, 0, "AVX-512F");
        assert_ne!(leaf7.ebx & 1 << 5, 0, "AVX2");
        assert_ne!(leaf7.edx & 1 << 26, 0, "speculation control");
        assert_eq!(find(&cpuid, 1).ecx & 1 << 5, 0, "VMX");
        assert!(cpuid.as_slice().iter().all(|e| e.function != 0xd));
        assert!(cpuid.as_slice().iter().all(|e| e.function != 0x14));
    }

    #[test]
    fn host_passthrough_keeps_features_but_not_nesting() {
        let cpuid = make(
            &[entry(7, 0), entry(0x8000_0001, 0), entry(0x8000_000a, 0)],
            0,
            1,
            Baseline::Host,
        );
        assert_ne!(find(&cpuid, 7).ebx & 1 << 16, 0);
        assert_eq!(find(&cpuid, 0x8000_0001).ecx & 1 << 2, 0, "SVM");
        assert!(cpuid.as_slice().iter().all(|e| e.function != 0x8000_000a));
    }

    #[test]
    fn a_guest_runs_where_its_features_are() {
        let host = CpuId::from_entries(&[entry(0, 0), entry(1, 0), entry(7, 0)]).unwrap();
        let mut saved = make(host.as_slice(), 0, 1, Baseline::Portable)
            .as_slice()
            .to_vec();
        assert_eq!(check_portable(&saved, &host), Ok(()));
        let mut less = entry(7, 0);
        less.ebx &= !(1 << 5);
        let poorer = CpuId::from_entries(&[entry(0, 0), entry(1, 0), less]).unwrap();
        let refused = check_portable(&saved, &poorer).unwrap_err();
        let (register, missing) = ("ebx", 1 << 5);
        assert_eq!(
            refused,
            OtherCpu::Feature {
                leaf: 7,
                register,
                missing
            }
        );
        saved[0].ebx = u32::from_le_bytes(*b"Auth");
        let refused = check_portable(&saved, &host).unwrap_err();
        assert!(refused.to_string().contains("Auth"), "{refused}");
    }

    #[test]
    fn asynchronous_page_faults_are_never_offered() {
        for baseline in [Baseline::Portable, Baseline::Host] {
            let cpuid = make(&[entry(0x4000_0001, 0)], 0, 1, baseline);
            assert_eq!(find(&cpuid, 0x4000_0001).eax, !0b100_0100_0001_0000);
        }
    }

    #[test]
    fn the_tsc_deadline_timer_is_always_offered() {
        let mut leaf = entry(1, 0);
        leaf.ecx = 0;
        for baseline in [Baseline::Portable, Baseline::Host] {
            let cpuid = make(&[leaf], 0, 2, baseline);
            assert_ne!(find(&cpuid, 1).ecx & TSC_DEADLINE, 0);
        }
    }
}
