//! Stream sockets of `AF_VSOCK`, whose addresses rustix does not know: the only `unsafe` here.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketType, socket};

const CID_ANY: u32 = u32::MAX;
const CID_HOST: u32 = 2;
const BACKLOG: i32 = 16;

/// `struct sockaddr_vm` (linux/vm_sockets.h).
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags_and_zero: [u8; 4],
}

impl Address {
    fn new(cid: u32, port: u32) -> Self {
        Self {
            family: AddressFamily::VSOCK.as_raw(),
            reserved: 0,
            port,
            cid,
            flags_and_zero: [0; 4],
        }
    }
}

// SAFETY: the closure gets the address and exact size of a `sockaddr_vm` that lives until it returns.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        f(
            std::ptr::from_ref(self).cast(),
            size_of::<Self>() as SocketAddrLen,
        )
    }
}

fn stream() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::VSOCK, SocketType::STREAM, None)?)
}

/// Connects to a port of the host.
pub(crate) fn connect(port: u32) -> io::Result<File> {
    let socket = stream()?;
    rustix::net::connect(&socket, &Address::new(CID_HOST, port))?;
    Ok(socket.into())
}

/// Listens on a port of this guest.
pub(crate) fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = stream()?;
    rustix::net::bind(&socket, &Address::new(CID_ANY, port))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

pub(crate) fn accept(listener: &OwnedFd) -> io::Result<File> {
    Ok(rustix::net::accept(listener)?.into())
}
