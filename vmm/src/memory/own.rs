//! Memory of this process itself.

/// Bytes of the stack below the present frame that stay, for what is called next.
const KEPT: usize = 16 << 10;
/// So far below it the stack is looked at: less than the gap that Linux leaves free below a stack (1 MiB).
const LOOKED_AT: usize = 512 << 10;
const PAGE: usize = 4096;

/// Keeps the C library from making a heap for each thread: they allocate little, and a clone has a page or two
/// for each heap, and the calls that make it are on the path of a load.
pub fn share_one_heap() {
    // SAFETY: a plain call with numbers only.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives the part of the main thread's stack that is not in use back to the system. On another thread it does nothing.
pub fn give_back() {
    if rustix::thread::gettid() == rustix::process::getpid() {
        // SAFETY: below the main thread's stack is nothing mapped for LOOKED_AT bytes; the kernel sees to it.
        unsafe { drop_stack() };
    }
}

/// # Safety
/// What is mapped within LOOKED_AT bytes below the present frame is this thread's stack.
#[inline(never)]
unsafe fn drop_stack() {
    let here = std::hint::black_box(0_u8);
    let here = (&raw const here).addr();
    let (Some(start), Some(end)) = (here.checked_sub(LOOKED_AT), here.checked_sub(KEPT)) else {
        return;
    };
    let (start, end) = (start.next_multiple_of(PAGE), end - end % PAGE);
    // SAFETY: nobody reads what is so far below the stack pointer before it is written. That the range may not be
    // mapped as a whole is an error which does not matter.
    unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes to the stack far below the caller; where.
    #[inline(never)]
    fn use_stack() -> usize {
        let bytes = std::hint::black_box([1_u8; 200 << 10]);
        assert!(bytes.iter().all(|byte| *byte == 1));
        (&raw const bytes).addr() + (100 << 10)
    }

    fn is_there(address: usize) -> bool {
        let mut found = 0_u8;
        let page = (address - address % PAGE) as *mut libc::c_void;
        // SAFETY: one page is asked for, and its byte has room.
        assert_eq!(unsafe { libc::mincore(page, PAGE, &raw mut found) }, 0);
        found & 1 == 1
    }

    #[test]
    fn what_is_not_in_use_goes_and_what_is_stays() {
        let work = || {
            let in_use = std::hint::black_box([7_u8; 9000]);
            for _ in 0..3 {
                let below = use_stack();
                assert!(is_there(below));
                // SAFETY: the thread's stack is many times larger.
                unsafe { drop_stack() };
                assert!(!is_there(below));
                assert!(in_use.iter().all(|byte| *byte == 7));
            }
        };
        let thread = std::thread::Builder::new().stack_size(8 << 20);
        thread.spawn(work).unwrap().join().unwrap();
    }
}
