//! Log lines with levels.
