//! What this machine can do with sandboxes.
