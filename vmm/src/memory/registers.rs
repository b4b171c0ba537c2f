//! Pages of device registers that the guest reads without an exit.
//!
//! They are mapped into the guest read-only (KVM_MEM_READONLY, api.rst 4.35): a guest's read
//! is a load, and only its writes reach us. The VMM keeps them up to date.
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

/// 32-bit words of a page.
const WORDS: usize = 1024;
/// Bytes of a page.
pub const PAGE: usize = WORDS * 4;

/// One page of registers, little-endian 32-bit words. Lives as long as the process.
#[derive(Clone, Copy, Debug)]
pub struct RegisterPage(&'static [AtomicU32; WORDS]);

impl RegisterPage {
    /// The register at `offset`; `None` beyond the page or between two words.
    pub fn word(&self, offset: u64) -> Option<&'static AtomicU32> {
        let aligned = offset.is_multiple_of(4);
        let index = usize::try_from(offset / 4).ok().filter(|_| aligned)?;
        self.0.get(index)
    }

    /// Sets the register at `offset`; does nothing beyond the page.
    pub fn set(&self, offset: u64, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value.to_le(), Ordering::Release);
        }
    }

    /// Sets the words from `offset` on; an incomplete last word is left out.
    pub fn set_bytes(&self, offset: u64, bytes: &[u8]) {
        for (chunk, at) in bytes.as_chunks::<4>().0.iter().zip((offset..).step_by(4)) {
            self.set(at, u32::from_le_bytes(*chunk));
        }
    }

    /// Where the page lies on the host.
    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }
}

/// Makes `count` pages that lie one behind the other.
pub fn register_pages(count: usize) -> io::Result<Vec<RegisterPage>> {
    let len = count
        .checked_mul(PAGE)
        .filter(|len| *len > 0)
        .ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let first = base.cast::<[AtomicU32; WORDS]>();
    Ok((0..count)
        .map(|index| {
            // SAFETY: within the mapping of `count` zeroed pages made above, which is never
            // unmapped, page-aligned, and touched through atomics only (the guest just reads).
            RegisterPage(unsafe { &*first.add(index) })
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_contiguous_and_bounded() {
        let pages = register_pages(3).unwrap();
        assert_eq!(pages[2].address() - pages[0].address(), 2 * PAGE as u64);
        pages[1].set(0xffc, 7);
        assert_eq!(pages[1].word(0xffc).unwrap().load(Ordering::Acquire), 7);
        assert!(pages[1].word(0x1000).is_none());
        assert!(pages[1].word(2).is_none());
        pages[1].set(0x1000, 1);
        pages[0].set_bytes(0xff8, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(pages[0].word(0xffc).unwrap().load(Ordering::Acquire), 2);
        assert_eq!(pages[1].word(0).unwrap().load(Ordering::Acquire), 0);
        assert!(register_pages(0).is_err());
    }
}
