//! A guest's driver, packet by packet, and the directory with the host's sockets.
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::super::muxer::Counters;
use super::super::packet::*;
use super::super::{RX, TX, Vsock, listen};
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::testing::{Buffer, Harness};

pub(super) const GUEST_CID: u64 = 3;
pub(super) const RX_BUFFER: u32 = 4096;
/// What a test guest says it can take.
pub(super) const GUEST_BUF: u32 = 64 * 1024;

pub(super) type Packet = (Header, Vec<u8>);

pub(super) struct Guest {
    pub(super) h: Harness<Vsock>,
    pub(super) clock: Arc<AtomicU64>,
    pub(super) dir: tempfile::TempDir,
    rx_buffers: HashMap<u16, GuestAddress>,
    rx_free: Vec<GuestAddress>,
    tx: GuestAddress,
}

impl Guest {
    /// An active device with every receive buffer posted.
    pub(super) fn new() -> Self {
        let mut guest = Self::idle();
        guest.up();
        guest.post_rx(128);
        guest.h.kick(RX).unwrap();
        guest
    }

    /// A device whose driver is not up.
    pub(super) fn idle() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (listener, dial) = listen(&dir.path().join("v.sock")).unwrap();
        let mut device = Vsock::new(GUEST_CID as u32, listener, dial, Counters::default()).unwrap();
        let clock = Arc::new(AtomicU64::new(0));
        let time = clock.clone();
        device
            .host
            .set_clock(Box::new(move || time.load(Ordering::Relaxed)));
        let mut h = Harness::new(device);
        let rx_free = (0..128).map(|_| h.alloc(RX_BUFFER)).collect();
        let tx = h.alloc(HEADER_LEN_U32 + 512 * 1024);
        Self {
            h,
            clock,
            dir,
            rx_buffers: HashMap::new(),
            rx_free,
            tx,
        }
    }

    pub(super) fn up(&mut self) {
        let features = self.h.device.features();
        self.h.activate(features);
    }

    /// The driver resets the device and comes back.
    pub(super) fn reset(&mut self) {
        self.h.reset();
        self.rx_free.extend(self.rx_buffers.drain().map(|(_, a)| a));
    }

    pub(super) fn post_rx(&mut self, count: usize) {
        for _ in 0..count {
            let Some(addr) = self.rx_free.pop() else {
                return;
            };
            let head = self.h.push(RX, &[Buffer::writable(addr, RX_BUFFER)]);
            self.rx_buffers.insert(head, addr);
        }
    }

    /// Received packets; their buffers are free, not posted.
    pub(super) fn take_rx(&mut self) -> Vec<Packet> {
        let used = self.h.take_used(RX);
        let mut packets = Vec::new();
        for (head, len) in used {
            let addr = self.rx_buffers.remove(&head).expect("an offered buffer");
            let mut bytes = self.h.bytes(addr, len as usize);
            let payload = bytes.split_off(HEADER_LEN);
            let header = Header::parse(bytes.as_slice().try_into().unwrap());
            assert_eq!(header.len as usize, payload.len());
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
            self.rx_free.push(addr);
            packets.push((header, payload));
        }
        packets
    }

    /// Received packets, with every buffer posted again.
    pub(super) fn recv(&mut self) -> Vec<Packet> {
        self.pump();
        let mut all = Vec::new();
        loop {
            let packets = self.take_rx();
            if packets.is_empty() {
                return all;
            }
            all.extend(packets);
            self.post_rx(128);
            self.h.kick(RX).unwrap();
            self.pump();
        }
    }

    /// The one packet that was received.
    pub(super) fn recv_one(&mut self) -> Packet {
        let mut packets = self.recv();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// Serves the device's descriptors until nothing is ready. A device that spins fails here.
    pub(super) fn pump(&mut self) {
        for _ in 0..2_000 {
            if self.h.poll_host(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the device keeps its descriptor readable");
    }

    /// Whether the device asks for a call.
    pub(super) fn wants_call(&self) -> bool {
        !crate::virtio::testing::hostile::readable(&self.h.device.host_events(), 0).is_empty()
    }

    pub(super) fn try_send(&mut self, header: Header, payload: &[u8]) -> Result<(), DeviceError> {
        self.h.mem.write_slice(&header.to_bytes(), self.tx).unwrap();
        let data = GuestAddress(self.tx.0 + u64::from(HEADER_LEN_U32));
        self.h.mem.write_slice(payload, data).unwrap();
        let mut buffers = vec![Buffer::readable(self.tx, HEADER_LEN_U32)];
        if !payload.is_empty() {
            buffers.push(Buffer::readable(data, payload.len() as u32));
        }
        self.h.push(TX, &buffers);
        self.h.kick(TX)
    }

    /// One packet, taken by the device at once.
    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        self.try_send(header, payload).unwrap();
        assert_eq!(self.h.take_used(TX).len(), 1);
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("v.sock")
    }

    pub(super) fn listener(&self, port: u32) -> UnixListener {
        let path = self.dir.path().join(format!("v.sock_{port}"));
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    #[allow(dead_code)]
    pub(super) fn advance(&mut self, ms: u64) {
        self.clock.fetch_add(ms, Ordering::Relaxed);
        let device = &mut self.h.device;
        device.host.expire(&mut device.muxer);
        self.h.kick(RX).unwrap();
    }

    /// A connection that the host asks for, established. Returns the host's socket and the
    /// guest's side of it.
    pub(super) fn connected(&mut self, port: u32) -> (UnixStream, Peer) {
        let mut host = UnixStream::connect(self.path()).unwrap();
        writeln!(host, "CONNECT {port}").unwrap();
        let (request, _) = self.recv_one();
        assert_eq!(request.op, Op::Request.to_u16());
        assert_eq!(request.dst_port, port);
        let peer = Peer::answering(&request);
        self.send(peer.packet(Op::Response), &[]);
        let mut line = [0; 32];
        let got = host.read(&mut line).unwrap();
        let line = std::str::from_utf8(&line[..got]).unwrap();
        assert_eq!(line, format!("OK {}\n", request.src_port));
        host.set_nonblocking(true).unwrap();
        (host, peer)
    }

    /// A connection that the guest asks for, established.
    pub(super) fn dialled(&mut self, listener: &UnixListener, peer: &Peer) -> UnixStream {
        self.send(peer.packet(Op::Request), &[]);
        let (response, _) = self.recv_one();
        assert_eq!(response.op, Op::Response.to_u16());
        let (host, _) = listener.accept().unwrap();
        host.set_nonblocking(true).unwrap();
        host
    }
}

/// The guest's side of one connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Peer {
    pub(super) fn new(guest_port: u32, host_port: u32) -> Self {
        Self {
            guest_port,
            host_port,
            buf_alloc: GUEST_BUF,
            fwd_cnt: 0,
        }
    }

    fn answering(request: &Header) -> Self {
        Self::new(request.dst_port, request.src_port)
    }

    pub(super) fn packet(&self, op: Op) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            kind: TYPE_STREAM,
            op: op.to_u16(),
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    pub(super) fn data(&self, len: usize) -> Header {
        Header {
            len: len as u32,
            ..self.packet(Op::Rw)
        }
    }

    pub(super) fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.packet(Op::Shutdown)
        }
    }
}

/// The operations of some packets.
pub(super) fn ops(packets: &[Packet]) -> Vec<Op> {
    packets
        .iter()
        .map(|(header, _)| Op::from_u16(header.op).unwrap())
        .collect()
}

/// Everything a socket has now, and whether it ended.
pub(super) fn read_now(socket: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    let mut part = [0; 4096];
    loop {
        match socket.read(&mut part) {
            Ok(0) => return (all, true),
            Ok(got) => all.extend_from_slice(&part[..got]),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return (all, false),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return (all, true),
            Err(e) => panic!("{e}"),
        }
    }
}
