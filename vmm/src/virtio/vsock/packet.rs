//! The packet header (virtio 1.2 §5.10.6).
//!
//! Parsed from plain bytes: the crate virtio-vsock wants header and payload in one
//! descriptor each, and Linux's zero-copy sends spread the payload over pages.

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// The same as a length in a ring.
pub const HEADER_LEN_U32: u32 = 44;

/// The host's CID (virtio 1.2 §5.10.4).
pub const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type offered.
pub const TYPE_STREAM: u16 = 1;

/// Flags of [`Op::Shutdown`]: the sender of the packet will not receive, will not send.
pub const SHUTDOWN_RCV: u32 = 1;
pub const SHUTDOWN_SEND: u32 = 2;
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// Operations (virtio 1.2 §5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Request,
    Response,
    Rst,
    Shutdown,
    Rw,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    /// `None`: no such operation.
    pub fn from_u16(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    pub fn to_u16(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Rst => 3,
            Self::Shutdown => 4,
            Self::Rw => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// A header, every field as the peer wrote it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// The sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

/// Takes `N` bytes off `rest`; zeros past its end.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk::<N>() {
        Some((head, tail)) => {
            *rest = tail;
            *head
        }
        None => [0; N],
    }
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = bytes.as_slice();
        let rest = &mut rest;
        Self {
            src_cid: u64::from_le_bytes(take(rest)),
            dst_cid: u64::from_le_bytes(take(rest)),
            src_port: u32::from_le_bytes(take(rest)),
            dst_port: u32::from_le_bytes(take(rest)),
            len: u32::from_le_bytes(take(rest)),
            kind: u16::from_le_bytes(take(rest)),
            op: u16::from_le_bytes(take(rest)),
            flags: u32::from_le_bytes(take(rest)),
            buf_alloc: u32::from_le_bytes(take(rest)),
            fwd_cnt: u32::from_le_bytes(take(rest)),
        }
    }

    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet.
    pub fn reset_for(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Rst.to_u16(),
            ..Self::default()
        }
    }
}

/// Puts `value` in front of `rest`, which has room by the header's length.
fn put<const N: usize>(rest: &mut &mut [u8], value: [u8; N]) {
    if let Some((head, tail)) = std::mem::take(rest).split_first_chunk_mut::<N>() {
        *head = value;
        *rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_the_layout_of_the_specification() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 1025,
            len: 0x2122_2324,
            kind: TYPE_STREAM,
            op: Op::Rw.to_u16(),
            flags: 3,
            buf_alloc: 0x4000,
            fwd_cnt: 0xffff_ffff,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[16..20], [0x14, 0x13, 0x12, 0x11]);
        assert_eq!(bytes[24..28], [0x24, 0x23, 0x22, 0x21]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[40..44], [0xff; 4]);
        assert_eq!(Header::parse(&bytes), header);
    }

    #[test]
    fn operations_are_numbered_one_to_seven() {
        for number in 0..=u16::MAX {
            match Op::from_u16(number) {
                Some(op) => assert_eq!(op.to_u16(), number),
                None => assert!(number == 0 || number > 7),
            }
        }
    }
}
