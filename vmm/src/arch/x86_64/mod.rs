//! x86_64: address map, kernel loading, boot protocols, CPUID baselines, MSRs, ACPI.
pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod registers;
