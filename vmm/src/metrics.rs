//! Metrics as JSON lines.
