//! System calls that rustix does not offer: the only module with `unsafe`.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::{MaybeUninit, size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::{c_char, c_int, c_void};

pub(crate) mod spawn;

/// The C entry point. Rust's own would abort where descriptors 0 to 2 are closed and `/dev/null`
/// does not exist, which is how PID 1 of some initramfs starts.
#[cfg(not(test))]
// SAFETY: the one definition of `main` in this program, with the signature that the C runtime calls.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    crate::start()
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn owned(result: c_int) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: a successful call has just made this descriptor, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Blocks every signal, and gives SIGPIPE its default action back, so that programs started from
/// here get it. Blocked as it is, it does nothing to this process.
pub(crate) fn block_signals() -> io::Result<()> {
    // SAFETY: plain calls on a set that lives on this stack frame.
    unsafe {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigfillset(all.as_mut_ptr());
        check(libc::sigprocmask(
            libc::SIG_SETMASK,
            all.as_ptr(),
            ptr::null_mut(),
        ))?;
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
    Ok(())
}

/// A descriptor that is readable when SIGCHLD is pending.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: plain calls on a set that lives on this stack frame.
    unsafe {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD);
        owned(libc::signalfd(
            -1,
            set.as_ptr(),
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        ))
    }
}

/// Sends a signal to every process but this one. Does nothing unless this is PID 1, whose guest
/// is all it can reach.
pub(crate) fn kill_everything(signal: c_int) {
    // SAFETY: plain calls with numbers only.
    unsafe {
        if libc::getpid() == 1 {
            libc::kill(-1, signal);
        }
    }
}

/// Sends a signal to a process group, by number: programs may use those without a name, too. What
/// is no signal, or no group any more, is ignored.
pub(crate) fn signal_group(leader: i32, number: u32) {
    // 0 and 1 would mean other things than a group: our own, and every process.
    if let (2.., Ok(number @ 1..=64)) = (leader, c_int::try_from(number)) {
        // SAFETY: a plain call with numbers only.
        unsafe { libc::kill(-leader, number) };
    }
}

/// Sends a signal to one process. What is no signal, or no process, is ignored.
pub(crate) fn signal_process(pid: i32, number: u32) {
    if let (2.., Ok(number @ 1..=64)) = (pid, c_int::try_from(number)) {
        // SAFETY: a plain call with numbers only.
        unsafe { libc::kill(pid, number) };
    }
}

/// A child that has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reaped {
    pub(crate) pid: i32,
    /// As of wait(2).
    pub(crate) status: c_int,
    /// User and system time of it and the children it has waited for, microseconds.
    pub(crate) cpu_us: u64,
    /// Largest resident memory of one of them, bytes.
    pub(crate) memory_peak: u64,
}

/// Takes the status of a child that has ended. `None`: none has. ECHILD: there is none.
pub(crate) fn reap() -> io::Result<Option<Reaped>> {
    let mut status: c_int = 0;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut usage: libc::rusage = unsafe { zeroed() };
    // SAFETY: both results outlive the call.
    let pid = check(unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage) })?;
    let micros = |time: libc::timeval| {
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        let micros = u64::try_from(time.tv_usec).unwrap_or(0);
        seconds.saturating_mul(1_000_000).saturating_add(micros)
    };
    Ok((pid > 0).then(|| Reaped {
        pid,
        status,
        cpu_us: micros(usage.ru_utime).saturating_add(micros(usage.ru_stime)),
        memory_peak: u64::try_from(usage.ru_maxrss)
            .unwrap_or(0)
            .saturating_mul(1024),
    }))
}

/// Takes over a descriptor that this process was started with, and closes it in programs it starts.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: a plain call; it fails if there is no such descriptor.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: the descriptor exists, and the caller takes each number once, at the start.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Leaves a descriptor open for the program that takes the place of this one.
pub(crate) fn keep_for_next(fd: RawFd) -> io::Result<()> {
    // SAFETY: a plain call; it fails if there is no such descriptor.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })?;
    Ok(())
}

/// Keeps the C library from giving each thread a heap of its own, and has it map the buffers of transfers
/// one by one: so they go back to the system when a call ends. By itself it would stop to do so after the
/// first one.
pub(crate) fn share_one_heap() {
    // SAFETY: plain calls with numbers only.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Gives memory that is not in use back to the system.
pub(crate) fn give_memory_back() {
    // SAFETY: a plain call.
    unsafe { libc::malloc_trim(0) };
}

/// Replaces this process by its own program, `/proc/self/exe`. Returns only on failure.
pub(crate) fn run_again(arguments: &[&CStr]) -> io::Error {
    let mut argv: Vec<*const c_char> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    argv.push(ptr::null());
    let environment = [ptr::null::<c_char>()];
    // SAFETY: both arrays end with a null pointer and, like the strings, outlive the call.
    unsafe {
        libc::execve(
            c"/proc/self/exe".as_ptr(),
            argv.as_ptr(),
            environment.as_ptr(),
        )
    };
    io::Error::last_os_error()
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn vsock_socket() -> io::Result<OwnedFd> {
    vsock_socket_of(libc::SOCK_NONBLOCK)
}

fn vsock_socket_of(flags: c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | flags;
    // SAFETY: a plain call.
    owned(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })
}

/// Listens on a vsock port of any local CID; blocking.
pub(crate) fn vsock_listen(port: u32, backlog: c_int) -> io::Result<OwnedFd> {
    let socket = vsock_socket_of(0)?;
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: `address` outlives the call and its size is given.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    })?;
    // SAFETY: a plain call.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog) })?;
    Ok(socket)
}

/// Lets the other side of a vsock connection send so many bytes ahead of what is read. Other sockets keep
/// what they have.
pub(crate) fn widen_vsock(socket: BorrowedFd<'_>, bytes: u64) {
    // Values of linux/vm_sockets.h; the maximum first, which bounds the other.
    const SO_VM_SOCKETS_BUFFER_SIZE: c_int = 0;
    const SO_VM_SOCKETS_BUFFER_MAX_SIZE: c_int = 2;
    for option in [SO_VM_SOCKETS_BUFFER_MAX_SIZE, SO_VM_SOCKETS_BUFFER_SIZE] {
        // SAFETY: `bytes` outlives the call and its size is given. It fails for other sockets.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::AF_VSOCK,
                option,
                (&raw const bytes).cast(),
                size_of::<u64>() as libc::socklen_t,
            )
        };
    }
}

/// Begins to connect to a vsock port; the socket is writable, or in error, when that is done.
pub(crate) fn vsock_connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let address = vsock_address(cid, port);
    // SAFETY: `address` outlives the call and its size is given.
    let result = check(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    });
    match result {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Takes a connection; it blocks. The number is the peer's CID, for vsock sockets.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Option<u32>)> {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut address: libc::sockaddr_storage = unsafe { zeroed() };
    let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: `address` has room for `length` bytes and both outlive the call.
    let socket = owned(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            (&raw mut address).cast(),
            &raw mut length,
            libc::SOCK_CLOEXEC,
        )
    })?;
    let is_vsock = c_int::from(address.ss_family) == libc::AF_VSOCK
        && length as usize >= size_of::<libc::sockaddr_vm>();
    // SAFETY: the kernel has filled in a sockaddr_vm, which is smaller than and not more aligned
    // than sockaddr_storage.
    let peer =
        is_vsock.then(|| unsafe { (*(&raw const address).cast::<libc::sockaddr_vm>()).svm_cid });
    Ok((socket, peer))
}

/// Brings the loopback interface up.
pub(crate) fn loopback_up() -> io::Result<()> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    // SAFETY: a plain call.
    let socket = owned(unsafe { libc::socket(libc::AF_INET, kind, 0) })?;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: SIOCSIFFLAGS reads a whole ifreq, which outlives the call.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    })?;
    Ok(())
}

/// Whose rights the calling thread, and no other, has for files. Returns what they were before. The kernel
/// says nothing of a refusal: ask again with -1 for both, which changes nothing.
pub(crate) fn set_file_ids(uid: u32, gid: u32) -> (u32, u32) {
    // SAFETY: plain calls with numbers only. These act on one thread, in the C library, too. They return
    // the number before, an unsigned one in a signed type.
    let before = unsafe { (libc::setfsuid(uid), libc::setfsgid(gid)) };
    (before.0 as u32, before.1 as u32)
}

/// Requests of linux/random.h and linux/fs.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
const FIFREEZE: libc::c_ulong = 0xc004_5877;
const FITHAW: libc::c_ulong = 0xc004_5878;

/// Most bytes that [`add_entropy`] takes.
pub(crate) const ENTROPY_MAX: usize = 512;

/// Mixes bytes into the kernel's random pool, credits them as entropy, and has its generator reseed.
/// `random` is /dev/random. More than [`ENTROPY_MAX`] bytes are left out.
pub(crate) fn add_entropy(random: BorrowedFd<'_>, seed: &[u8]) -> io::Result<()> {
    /// `struct rand_pool_info`
    #[repr(C)]
    struct Pool {
        entropy_count: c_int,
        buf_size: c_int,
        buf: [u8; ENTROPY_MAX],
    }
    let length = seed.len().min(ENTROPY_MAX);
    let mut pool = Pool {
        entropy_count: length as c_int * 8,
        buf_size: length as c_int,
        buf: [0; ENTROPY_MAX],
    };
    for (to, from) in pool.buf.iter_mut().zip(seed) {
        *to = *from;
    }
    let fd = random.as_raw_fd();
    // SAFETY: RNDADDENTROPY reads the two numbers and `buf_size` bytes, which the structure has.
    check(unsafe { libc::ioctl(fd, RNDADDENTROPY as _, &raw const pool) })?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { libc::ioctl(fd, RNDRESEEDCRNG as _, 0) })?;
    Ok(())
}

/// Writes a file system out and lets nothing write to it until [`thaw_file_system`]. It need not end soon.
pub(crate) fn freeze_file_system(folder: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: FIFREEZE does not look at its argument.
    check(unsafe { libc::ioctl(folder.as_raw_fd(), FIFREEZE as _, 0) }).map(drop)
}

/// Ends [`freeze_file_system`]; EINVAL if it was not frozen.
pub(crate) fn thaw_file_system(folder: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: FITHAW does not look at its argument.
    check(unsafe { libc::ioctl(folder.as_raw_fd(), FITHAW as _, 0) }).map(drop)
}
