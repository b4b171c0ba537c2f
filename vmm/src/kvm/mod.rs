//! The KVM objects: VM, vCPUs, interrupt lines, event fds.
#![allow(unsafe_code)]
