//! Packets from the guest.
use super::connection::{Event, Millis};
use super::host::Host;
use super::muxer::{Id, Muxer, Verdict};
use super::packet::{HEADER_LEN, HEADER_LEN_U32, Header, Op};
use super::{TX, Vsock};
use crate::backend::unix::{IoVecs, Spare};
use crate::memory::GuestRam;
use crate::virtio::chain::{self, Chain, Outcome, bad_queue};
use crate::virtio::device::{DeviceError, DeviceIo};

/// Bytes copied at a time for a host that does not read.
const COPY: usize = 16 * 1024;

impl Vsock {
    /// Serves the transmit queue; `true`: packets are left for another call.
    pub(super) fn drain_tx(&mut self, io: &mut DeviceIo<'_>) -> Result<bool, DeviceError> {
        let Self {
            muxer,
            host,
            tx_chain,
            spare,
            ..
        } = self;
        let now = host.now();
        chain::serve(io, TX, tx_chain, |mem, chain| {
            packet(muxer, host, spare, mem, chain, now)?;
            Ok(Outcome::Used(0))
        })
    }
}

fn packet(
    muxer: &mut Muxer,
    host: &mut Host,
    spare: &mut Spare,
    mem: &GuestRam,
    chain: &Chain,
    now: Millis,
) -> Result<(), DeviceError> {
    let mut bytes = [0; HEADER_LEN];
    if chain
        .read(mem, 0, &mut bytes)
        .map_err(|e| bad_queue(TX, &e))?
        < HEADER_LEN
    {
        return Err(bad_queue(TX, &"a packet shorter than its header"));
    }
    let mut header = Header::parse(&bytes);
    if Op::from_u16(header.op) != Some(Op::Rw) {
        // Only data has a payload; whatever else follows is not looked at.
        header.len = 0;
    } else if header.len > chain.readable_len().saturating_sub(HEADER_LEN_U32) {
        // A lie about the length: no operation, so that the connection is reset.
        header.op = 0;
    }
    match muxer.guest_packet(&header, now) {
        Verdict::Done => {}
        Verdict::Dial => host.dial(&header, muxer),
        Verdict::Opened(id) => host.opened(id, muxer),
        Verdict::Deliver(id) => {
            deliver(muxer, host, spare, mem, chain, id, header.len);
            host.settle(id, muxer);
        }
        Verdict::Changed(id) => host.settle(id, muxer),
    }
    Ok(())
}

/// Passes `len` bytes of payload on: straight to the socket, and what it does not take to the
/// backlog.
fn deliver(
    muxer: &mut Muxer,
    host: &mut Host,
    spare: &mut Spare,
    mem: &GuestRam,
    chain: &Chain,
    id: Id,
    len: u32,
) {
    let Some(connection) = muxer.get(id) else {
        return;
    };
    if len == 0 {
        return;
    }
    let mut done = 0;
    if connection.backlog().is_empty() {
        let mut data = IoVecs::new(spare);
        data.push(mem, chain.readable(), HEADER_LEN_U32, len as usize);
        let sent = host.send(id, &data);
        data.recycle(spare);
        match sent {
            Ok(sent) => {
                done = u32::try_from(sent).unwrap_or(len).min(len);
                muxer.forwarded(id, done);
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => {
                muxer.forwarded(id, len);
                muxer.apply(id, Event::HostRefused, host.now());
                return;
            }
        }
    }
    let mut copy = vec![0; COPY.min((len - done) as usize)];
    while done < len {
        let want = copy.len().min((len - done) as usize);
        let Some(part) = copy.get_mut(..want) else {
            break;
        };
        let got = chain.read(mem, HEADER_LEN_U32 + done, part).unwrap_or(0);
        let kept = part
            .get(..got)
            .filter(|part| !part.is_empty())
            .map(|part| muxer.hold(id, part));
        if kept != Some(Ok(())) {
            // Either every host is too far behind, or RAM went away under the chain.
            muxer.apply(id, Event::Packet(None, 0), host.now());
            return;
        }
        done += want as u32;
    }
}
