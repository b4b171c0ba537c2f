//! Values of the platform registers that ACPI tables and the register block must agree on.

/// SLP_TYP of S5 in the sleep control register (ACPI 6.5 §4.8.3.7).
pub const SLEEP_TYPE_POWER_OFF: u8 = 5;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
