//! What a VMM says of its RAM: the one message of `mem_backend` `Uffd` (docs/api.md), which others know, too.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;

/// The longest message.
const LONGEST: usize = 16 << 10;
/// Regions of one guest, at most.
const MOST: usize = 64;

/// One region of RAM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Region {
    /// Where it lies in the VMM.
    base_host_virt_addr: u64,
    size: u64,
    /// Where its contents begin in the memory file.
    offset: u64,
}

/// All of a guest's RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Regions(Vec<Region>);

impl Regions {
    /// A message of a VMM whose memory file has `length` bytes. It is not trusted: what it says is of its own
    /// address space, and has to lie in the file.
    fn parse(bytes: &[u8], length: u64) -> Option<Self> {
        let regions: Vec<Region> = serde_json::from_slice(bytes).ok()?;
        let good = |region: &Region| {
            let end = region.offset.checked_add(region.size);
            let aligned = region.base_host_virt_addr | region.size | region.offset;
            aligned.is_multiple_of(belljar_store::PAGE)
                && region.size > 0
                && end.is_some_and(|end| end <= length)
                && region
                    .base_host_virt_addr
                    .checked_add(region.size)
                    .is_some()
        };
        let fitting = !regions.is_empty() && regions.len() <= MOST && regions.iter().all(good);
        fitting.then_some(Self(regions))
    }

    /// Where in the memory file an address lies.
    pub(super) fn offset(&self, address: u64) -> Option<u64> {
        self.0.iter().find_map(|region| {
            let inside = address.checked_sub(region.base_host_virt_addr)?;
            (inside < region.size).then(|| region.offset.saturating_add(inside))
        })
    }

    /// Where a part of the memory file lies.
    pub(super) fn addresses(&self, part: &Range<u64>) -> Vec<Range<u64>> {
        let of = |region: &Region| {
            let start = part.start.max(region.offset);
            let end = part.end.min(region.offset.saturating_add(region.size));
            let at = |offset: u64| {
                region
                    .base_host_virt_addr
                    .saturating_add(offset.saturating_sub(region.offset))
            };
            (start < end).then(|| at(start)..at(end))
        };
        self.0.iter().filter_map(of).collect()
    }
}

/// Waits for the message and its userfaultfd; `None` if the VMM ended before.
pub(super) fn receive(socket: &UnixStream, length: u64) -> io::Result<Option<(Regions, OwnedFd)>> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        match recvmsg(socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            other => break other?.bytes,
        }
    };
    if got == 0 {
        return Ok(None);
    }
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            descriptors.extend(more);
        }
    }
    let bad = || io::Error::other("the VMM's message about its RAM is not understood");
    let regions = Regions::parse(bytes.get(..got).unwrap_or_default(), length).ok_or_else(bad)?;
    match (descriptors.pop(), descriptors.pop()) {
        (Some(userfault), None) => Ok(Some((regions, userfault))),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MESSAGE: &str = r#"[{"base_host_virt_addr": 65536, "size": 8192, "offset": 0, "page_size": 4096},
        {"base_host_virt_addr": 1048576, "size": 8192, "offset": 8192, "page_size_kib": 4096}]"#;

    #[test]
    fn addresses_and_offsets_belong_together() {
        let regions = Regions::parse(MESSAGE.as_bytes(), 16384).unwrap();
        assert_eq!(regions.offset(65536 + 8191), Some(8191));
        assert_eq!(regions.offset(1_048_577), Some(8193));
        assert_eq!(regions.offset(65535), None);
        assert_eq!(
            regions.addresses(&(4096..12288)),
            [69632..73728, 1_048_576..1_052_672]
        );
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(Regions::parse(MESSAGE.as_bytes(), 16383).is_none());
        for change in [
            ("65536", "65537"),
            ("8192,", "0,"),
            ("65536", "18446744073709547520"),
        ] {
            let text = MESSAGE.replacen(change.0, change.1, 1);
            assert!(Regions::parse(text.as_bytes(), 16384).is_none(), "{text}");
        }
        assert!(Regions::parse(b"[]", 16384).is_none());
    }

    proptest! {
        #[test]
        fn any_numbers_are_answered(base: u64, size: u64, offset: u64, at: u64) {
            let text = format!(r#"[{{"base_host_virt_addr": {base}, "size": {size}, "offset": {offset}}}]"#);
            if let Some(regions) = Regions::parse(text.as_bytes(), u64::MAX) {
                let _ = regions.offset(at);
                let _ = regions.addresses(&(0..at));
            }
        }
    }
}
