//! After a restore: the guest is told, and nothing new happens before it has heard.
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::super::packet::*;
use super::super::{EVENT, RX, TX};
use super::guest::*;
use crate::virtio::device::{DeviceState, VirtioDevice};
use crate::virtio::testing::{Buffer, EVENT_IDX};

/// A device restored under a driver that is up, whose event buffers were posted before.
fn restored() -> Guest {
    let mut guest = Guest::idle();
    let features = guest.h.device.features();
    for _ in 0..4 {
        let buffer = guest.h.alloc(8);
        guest.h.push(EVENT, &[Buffer::writable(buffer, 8)]);
    }
    guest.post_rx(128);
    guest.h.restore(features, &DeviceState::Nothing).unwrap();
    guest
}

/// A host program that wants port 7000.
fn calling(guest: &Guest) -> UnixStream {
    let mut host = UnixStream::connect(guest.path()).unwrap();
    writeln!(host, "CONNECT 7000").unwrap();
    host
}

/// Linux: acts on the event, then gives its buffer back.
fn take_event(guest: &mut Guest) {
    let used = guest.h.take_used(EVENT);
    assert_eq!(used.len(), 1);
    assert_eq!(used[0].1, 4);
    let buffer = guest.h.alloc(8);
    guest.h.push(EVENT, &[Buffer::writable(buffer, 8)]);
}

#[test]
fn a_connection_waits_until_the_guest_has_taken_the_reset() {
    let mut guest = restored();
    assert_eq!(guest.h.interrupts(), 1);
    // The driver kicks when it posts one more, and not earlier.
    assert_eq!(guest.h.avail_event(EVENT), 4);
    let _waiting = calling(&guest);
    for queue in [RX, TX, EVENT] {
        guest.h.kick(queue).unwrap();
    }
    assert_eq!(guest.recv(), []);
    take_event(&mut guest);
    guest.h.kick(EVENT).unwrap();
    let (header, _) = guest.recv_one();
    assert_eq!(Op::from_u16(header.op), Some(Op::Request));
    assert_eq!(header.dst_port, 7000);
}

/// Linux knows a connection for seconds after its end, and would take a new one between the same ports
/// for it.
#[test]
fn ports_that_the_parent_used_are_not_used_again() {
    let mut parent = Guest::idle();
    parent.up();
    parent.post_rx(128);
    let _calls = calling(&parent);
    parent.pump();
    let (first, _) = parent.recv_one();
    let state = parent.h.device.save();
    let mut guest = Guest::idle();
    guest.post_rx(128);
    guest.h.restore(guest.h.device.features(), &state).unwrap();
    let buffer = guest.h.alloc(8);
    guest.h.push(EVENT, &[Buffer::writable(buffer, 8)]);
    guest.h.kick(EVENT).unwrap();
    take_event(&mut guest);
    let _calls = calling(&guest);
    guest.h.kick(EVENT).unwrap();
    guest.pump();
    let (second, _) = guest.recv_one();
    assert!(second.src_port > first.src_port);
}

#[test]
fn what_the_guest_sent_before_it_knew_is_answered_afterwards() {
    let mut guest = restored();
    // Of a connection that the parent has.
    let stale = Peer::new(5000, 6000);
    guest.try_send(stale.data(3), b"abc").unwrap();
    assert!(guest.h.take_used(TX).is_empty(), "it is not even looked at");
    assert_eq!(guest.recv(), []);
    take_event(&mut guest);
    guest.h.kick(EVENT).unwrap();
    let (header, _) = guest.recv_one();
    assert_eq!(Op::from_u16(header.op), Some(Op::Rst));
    assert_eq!(header.dst_port, 5000);
}

#[test]
fn a_driver_that_offers_no_event_buffer_is_told_when_it_does() {
    let mut guest = Guest::idle();
    let features = guest.h.device.features();
    assert_ne!(features & EVENT_IDX, 0);
    guest.post_rx(128);
    guest.h.restore(features, &DeviceState::Nothing).unwrap();
    let mut waiting = calling(&guest);
    guest.pump();
    let buffer = guest.h.alloc(8);
    guest.h.push(EVENT, &[Buffer::writable(buffer, 8)]);
    guest.h.kick(EVENT).unwrap();
    take_event(&mut guest);
    guest.h.kick(EVENT).unwrap();
    let (request, _) = guest.recv_one();
    // A reset by the driver ends it all, as always.
    guest.reset();
    assert_eq!(Op::from_u16(request.op), Some(Op::Request));
    assert_eq!(waiting.read(&mut [0]).unwrap_or(0), 0);
}

#[test]
fn without_a_driver_there_is_nobody_to_tell() {
    let mut guest = Guest::idle();
    guest
        .h
        .device
        .restore(None, 0, &DeviceState::Nothing)
        .unwrap();
    let _waiting = calling(&guest);
    guest.up();
    guest.post_rx(128);
    guest.h.kick(RX).unwrap();
    let (header, _) = guest.recv_one();
    assert_eq!(Op::from_u16(header.op), Some(Op::Request));
}
