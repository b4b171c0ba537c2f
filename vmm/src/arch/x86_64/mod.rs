//! x86_64: layout, boot, CPUID baselines, MSRs, ACPI.
