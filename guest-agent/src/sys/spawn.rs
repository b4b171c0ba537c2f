//! Starting a program without copying this process: the child borrows its memory, on a stack of
//! its own, until it runs the new program (`clone3` with CLONE_VM and CLONE_VFORK). It makes raw
//! system calls only, so it touches no lock or cache of the C library.

use super::{CString, RawFd, c_char, c_int, c_void, io, ptr, size_of};

/// Enough for the child's few frames; system calls run on the kernel's stack.
const STACK_SIZE: usize = 32 << 10;

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` of linux/sched.h, its version of 88 bytes (Linux 5.7).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// User, group and supplementary groups that a program gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// All that the child needs, made ready before it exists.
#[derive(Debug)]
pub(crate) struct Program {
    /// Paths to try in this order.
    pub(crate) candidates: Vec<CString>,
    pub(crate) argv: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    /// `None`: as this process.
    pub(crate) ids: Option<Ids>,
    /// In this order, before the user is changed.
    pub(crate) limits: Vec<ResourceLimit>,
    /// Descriptor 0 becomes the controlling terminal of its session.
    pub(crate) has_terminal: bool,
}

/// One of setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ResourceLimit {
    /// RLIMIT_*
    pub(crate) resource: u32,
    /// Soft and hard limit, as the kernel's `rlimit64`.
    pub(crate) values: [u64; 2],
}

/// What the child was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Clone,
    Session,
    Descriptors,
    Terminal,
    Limits,
    Groups,
    Group,
    User,
    Directory,
    Execute,
}

impl Step {
    /// Its place among [`STEPS`], for messages.
    pub(crate) fn number(self) -> u32 {
        let at = STEPS.iter().position(|step| *step == self).unwrap_or(0);
        u32::try_from(at).unwrap_or(0)
    }

    /// The step of a number; what is none counts as the first.
    pub(crate) fn of_number(number: u32) -> Self {
        let at = usize::try_from(number).unwrap_or(usize::MAX);
        STEPS.get(at).copied().unwrap_or(Self::Clone)
    }
}

const STEPS: [Step; 10] = [
    Step::Clone,
    Step::Session,
    Step::Descriptors,
    Step::Terminal,
    Step::Limits,
    Step::Groups,
    Step::Group,
    Step::User,
    Step::Directory,
    Step::Execute,
];

/// Why no program runs.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) step: Step,
    pub(crate) errno: c_int,
}

/// What parent and child share while the child borrows the memory.
struct Shared<'a> {
    program: &'a Program,
    stdio: &'a [RawFd],
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    no_signals: u64,
    step: Step,
    errno: c_int,
}

/// Starts programs; owns the stack on which each child runs for its short borrowed life.
pub(crate) struct Spawner {
    stack: Box<[u128]>,
}

impl Spawner {
    pub(crate) fn new() -> Self {
        Self {
            stack: vec![0; STACK_SIZE / size_of::<u128>()].into_boxed_slice(),
        }
    }

    /// Starts a program in a session and process group of its own with no signal blocked; returns
    /// its process id once it runs. All signals must be blocked in the caller. `stdio` become its
    /// descriptors 0, 1, 2 and so on, and none of them may be one of those now; `cgroup` is a
    /// directory of the cgroup file system.
    pub(crate) fn spawn(
        &mut self,
        program: &Program,
        stdio: &[RawFd],
        cgroup: Option<RawFd>,
    ) -> Result<i32, Failure> {
        let mut shared = Shared {
            program,
            stdio,
            argv: pointers(&program.argv),
            env: pointers(&program.env),
            no_signals: 0,
            step: Step::Clone,
            errno: 0,
        };
        let mut arguments = CloneArgs {
            flags: (libc::CLONE_VM | libc::CLONE_VFORK) as u64,
            exit_signal: libc::SIGCHLD as u64,
            stack: self.stack.as_mut_ptr() as u64,
            stack_size: size_of_val(&*self.stack) as u64,
            ..CloneArgs::default()
        };
        if let Some(cgroup) = cgroup {
            arguments.flags |= CLONE_INTO_CGROUP;
            arguments.cgroup = cgroup as u64;
        }
        // SAFETY: the stack belongs to this spawner, is aligned to 16 bytes, and no other child
        // uses it: the kernel holds this thread until the child has left it (CLONE_VFORK), and
        // `&mut self` keeps others away. `shared` outlives the child's use of it for the same reason.
        let pid = unsafe { clone_vfork(&raw mut arguments, &raw mut shared) };
        // SAFETY: the child wrote these through a pointer, so they are read as volatile.
        let (step, errno) = unsafe {
            (
                ptr::read_volatile(&raw const shared.step),
                ptr::read_volatile(&raw const shared.errno),
            )
        };
        if pid < 0 {
            return Err(Failure {
                step: Step::Clone,
                errno: pid.wrapping_neg() as c_int,
            });
        }
        let pid = pid as i32;
        if errno != 0 {
            // SAFETY: a plain call; the child has ended, and nobody else waits for it yet.
            unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
            return Err(Failure { step, errno });
        }
        Ok(pid)
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// `clone3`; the child calls [`child`] on the new stack. Returns the pid or a negative errno.
///
/// # Safety
/// `arguments` must ask for CLONE_VM and CLONE_VFORK and name a stack that nothing else uses.
unsafe fn clone_vfork(arguments: *mut CloneArgs, shared: *mut Shared<'_>) -> isize {
    let result: isize;
    // SAFETY: the parent comes back from the system call with its own stack and registers, apart
    // from those declared here. The child has a fresh stack (its top is aligned to 16 bytes) and
    // never leaves `child`.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") arguments,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") shared,
            in("r13") child as *const c_void,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// The child's whole life in borrowed memory.
unsafe extern "C" fn child(shared: *mut Shared<'_>) -> ! {
    // SAFETY: `shared` is valid until this function ends the process or runs a new program.
    let (step, errno) = unsafe { prepare_and_execute(&*shared) };
    // SAFETY: as above; the parent reads these when this process is gone.
    unsafe {
        ptr::write_volatile(&raw mut (*shared).step, step);
        ptr::write_volatile(&raw mut (*shared).errno, errno);
        libc::_exit(127)
    }
}

fn errno() -> c_int {
    io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

/// Returns what failed; on success it does not return.
///
/// # Safety
/// Only for [`child`]: it changes the process it runs in.
unsafe fn prepare_and_execute(shared: &Shared<'_>) -> (Step, c_int) {
    let program = shared.program;
    // SAFETY: raw system calls on pointers into `shared`, which outlives them. Identity is changed
    // with raw calls because the C library's would try to tell other threads of the parent.
    unsafe {
        if libc::syscall(libc::SYS_setsid) < 0 {
            return (Step::Session, errno());
        }
        for (target, fd) in shared.stdio.iter().enumerate() {
            if libc::syscall(libc::SYS_dup2, *fd, target) < 0 {
                return (Step::Descriptors, errno());
            }
        }
        if program.has_terminal && libc::syscall(libc::SYS_ioctl, 0, libc::TIOCSCTTY, 0) < 0 {
            return (Step::Terminal, errno());
        }
        for limit in &program.limits {
            let new = limit.values.as_ptr();
            if libc::syscall(
                libc::SYS_prlimit64,
                0,
                limit.resource,
                new,
                ptr::null_mut::<u64>(),
            ) < 0
            {
                return (Step::Limits, errno());
            }
        }
        if let Some(ids) = &program.ids {
            if libc::syscall(libc::SYS_setgroups, ids.groups.len(), ids.groups.as_ptr()) < 0 {
                return (Step::Groups, errno());
            }
            if libc::syscall(libc::SYS_setresgid, ids.gid, ids.gid, ids.gid) < 0 {
                return (Step::Group, errno());
            }
            if libc::syscall(libc::SYS_setresuid, ids.uid, ids.uid, ids.uid) < 0 {
                return (Step::User, errno());
            }
        }
        if libc::syscall(libc::SYS_chdir, program.cwd.as_ptr()) < 0 {
            return (Step::Directory, errno());
        }
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const shared.no_signals,
            ptr::null::<u64>(),
            size_of::<u64>(),
        );
        let mut told = libc::ENOENT;
        for path in &program.candidates {
            libc::syscall(
                libc::SYS_execve,
                path.as_ptr(),
                shared.argv.as_ptr(),
                shared.env.as_ptr(),
            );
            match errno() {
                // As a shell does: a program further on may still be the one, and if there is
                // none, "permission denied" says more than "not found".
                libc::EACCES => told = libc::EACCES,
                libc::ENOENT | libc::ENOTDIR => {}
                other => return (Step::Execute, other),
            }
        }
        (Step::Execute, told)
    }
}
