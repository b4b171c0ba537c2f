//! What `/proc/cpuinfo` says about the host's processor.

use std::fs;

/// The processor's abilities that matter here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpu {
    pub model: String,
    pub vendor: String,
    /// `vmx` or `svm`.
    pub virtualisation: Option<&'static str>,
    /// It is itself a virtual one.
    pub is_virtual: bool,
}

/// The host's processor.
#[must_use]
pub fn read() -> Cpu {
    parse(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

/// The maker of the host's processor, as CPUID tells it.
#[must_use]
pub fn vendor() -> String {
    read().vendor
}

/// Whether this machine is a virtual one.
#[must_use]
pub fn is_virtual() -> bool {
    read().is_virtual
}

/// Reads the first processor's entry.
fn parse(cpuinfo: &str) -> Cpu {
    let value = |name: &str| {
        cpuinfo
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.trim() == name)
            .map_or("", |(_, value)| value.trim())
    };
    let has = |flag: &str| value("flags").split_ascii_whitespace().any(|f| f == flag);
    Cpu {
        model: value("model name").to_owned(),
        vendor: value("vendor_id").to_owned(),
        virtualisation: ["vmx", "svm"].into_iter().find(|flag| has(flag)),
        is_virtual: has("hypervisor"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_flags_count() {
        let cpu = parse(
            "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: EPYC\nflags\t\t: fpu svm_lock hypervisor\n",
        );
        assert_eq!((cpu.model.as_str(), cpu.virtualisation), ("EPYC", None));
        assert!(cpu.is_virtual);
        let cpu = parse("flags : fpu svm\nflags : vmx\n");
        assert_eq!(cpu.virtualisation, Some("svm"));
        assert_eq!(parse(""), Cpu::default());
    }
}
