//! Memory of this process itself that it does not need any more.

/// Bytes of the stack below the present frame that stay, for what is called next.
const KEPT: usize = 16 << 10;
/// So far below it the stack is looked at: less than the gap that Linux leaves free below a stack (1 MiB).
const LOOKED_AT: usize = 512 << 10;
const PAGE: usize = 4096;

/// Gives free heap, and the part of the main thread's stack that is not in use, back to the system. On another thread
/// it does so with the heap only.
pub fn give_back() {
    // SAFETY: a plain call.
    unsafe { libc::malloc_trim(0) };
    let is_main = rustix::thread::gettid() == rustix::process::getpid();
    let here = std::hint::black_box(0_u8);
    let here = (&raw const here).addr();
    let (Some(start), Some(end)) = (here.checked_sub(LOOKED_AT), here.checked_sub(KEPT)) else {
        return;
    };
    let (start, end) = (start.next_multiple_of(PAGE), end - end % PAGE);
    if is_main && start < end {
        // SAFETY: below the stack pointer, and what the ABI has it keep there, is nothing that anybody reads before it
        // is written; and below the main thread's stack is nothing mapped for LOOKED_AT bytes, for which the kernel
        // sees to it. That the range is not mapped as a whole is an error which does not matter.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn sum_of_many(count: usize) -> usize {
        let bytes = std::hint::black_box([1_u8; 200 << 10]);
        bytes
            .iter()
            .take(count)
            .map(|byte| usize::from(*byte))
            .sum()
    }

    #[test]
    fn what_is_in_use_stays() {
        let on_heap: Vec<Vec<u8>> = (1..100).map(|byte| vec![byte; 3000]).collect();
        let on_stack = std::hint::black_box([7_u8; 9000]);
        for _ in 0..3 {
            assert_eq!(sum_of_many(150_000), 150_000);
            give_back();
            assert!(on_stack.iter().all(|byte| *byte == 7));
            for (byte, bytes) in (1_u8..).zip(&on_heap) {
                assert!(bytes.iter().all(|found| *found == byte));
            }
        }
    }
}
