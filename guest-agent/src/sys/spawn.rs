//! Starting a program without copying this process: the child borrows its memory, on a stack of
//! its own, until it runs the new program (`clone3` with CLONE_VM). It makes raw system calls only,
//! so it touches no lock, cache or `errno` of the C library.
//!
//! Not CLONE_VFORK: the parent would wait for a child in a frozen cgroup, or one whose program lies on
//! a file system that hangs, for ever.

use super::{CString, RawFd, c_char, c_int, c_void, ptr, size_of};

/// How long a start is waited for before something else is done meanwhile.
pub(crate) const START_TIME: std::time::Duration = std::time::Duration::from_millis(20);

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
struct Shared {
    program: Program,
    stdio: Vec<RawFd>,
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    no_signals: u64,
    step: Step,
    errno: c_int,
    /// The kernel clears it when the child has left this memory: it runs the new program, or has
    /// ended.
    is_borrowed: u32,
}

type Stack = Box<[u128]>;

/// Starts programs; keeps the stack on which each child runs for its short borrowed life.
pub(crate) struct Spawner {
    stack: Option<Stack>,
}

/// What became of a start.
pub(crate) enum Spawned {
    /// The program runs: its process id.
    Running(i32),
    /// That takes a while: its file system is slow, or its cgroup is frozen.
    Starting(Starting),
}

/// A child that still borrows the memory of this process.
pub(crate) struct Starting {
    pid: i32,
    shared: Box<Shared>,
    /// `None` is never seen: taken out when all is over.
    stack: Option<Stack>,
}

impl std::fmt::Debug for Starting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Starting")
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

impl Spawner {
    pub(crate) const fn new() -> Self {
        Self { stack: None }
    }

    /// Starts a program in a session and process group of its own with no signal blocked, and waits
    /// for so long at most until it runs. All signals must be blocked in the caller. `stdio` become its
    /// descriptors 0, 1, 2 and so on, and none of them may be one of those now; `cgroup` is a
    /// directory of the cgroup file system. A child that failed is not reaped.
    pub(crate) fn spawn(
        &mut self,
        program: Program,
        stdio: &[RawFd],
        cgroup: Option<RawFd>,
        patience: std::time::Duration,
    ) -> Result<Spawned, (Failure, Option<i32>)> {
        let mut stack = self
            .stack
            .take()
            .unwrap_or_else(|| vec![0; STACK_SIZE / size_of::<u128>()].into_boxed_slice());
        let argv = pointers(&program.argv);
        let env = pointers(&program.env);
        let mut shared = Box::new(Shared {
            program,
            stdio: stdio.to_vec(),
            argv,
            env,
            no_signals: 0,
            step: Step::Clone,
            errno: 0,
            is_borrowed: 1,
        });
        let mut arguments = CloneArgs {
            flags: (libc::CLONE_VM | libc::CLONE_CHILD_CLEARTID) as u64,
            exit_signal: libc::SIGCHLD as u64,
            child_tid: (&raw mut shared.is_borrowed) as u64,
            stack: stack.as_mut_ptr() as u64,
            stack_size: size_of_val(&*stack) as u64,
            ..CloneArgs::default()
        };
        if let Some(cgroup) = cgroup {
            arguments.flags |= CLONE_INTO_CGROUP;
            arguments.cgroup = cgroup as u64;
        }
        // SAFETY: the stack is aligned to 16 bytes and belongs to this child alone until it has left
        // this memory: it, and `shared`, are kept in `Starting` until then, and leaked if that is
        // dropped.
        let pid = unsafe { clone_sharing_memory(&raw mut arguments, &raw mut *shared) };
        if pid < 0 {
            self.stack = Some(stack);
            let failure = Failure {
                step: Step::Clone,
                errno: pid.wrapping_neg() as c_int,
            };
            return Err((failure, None));
        }
        let starting = Starting {
            pid: pid as i32,
            shared,
            stack: Some(stack),
        };
        starting.wait(patience);
        match starting.check(self) {
            Ok(Ok(pid)) => Ok(Spawned::Running(pid)),
            Ok(Err(failure)) => Err((failure, Some(pid as i32))),
            Err(starting) => Ok(Spawned::Starting(starting)),
        }
    }
}

impl Starting {
    pub(crate) const fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether the program runs now, or why not; or this again, if that is not known yet.
    pub(crate) fn check(mut self, spawner: &mut Spawner) -> Result<Result<i32, Failure>, Self> {
        if self.is_borrowed() {
            return Err(self);
        }
        spawner.stack = self.stack.take();
        // SAFETY: the child wrote these through a pointer, so they are read as volatile.
        let (step, errno) = unsafe {
            (
                ptr::read_volatile(&raw const self.shared.step),
                ptr::read_volatile(&raw const self.shared.errno),
            )
        };
        if errno == 0 {
            Ok(Ok(self.pid))
        } else {
            Ok(Err(Failure { step, errno }))
        }
    }

    fn is_borrowed(&self) -> bool {
        // SAFETY: the kernel writes this word, so it is read as volatile.
        unsafe { ptr::read_volatile(&raw const self.shared.is_borrowed) != 0 }
    }

    /// Waits until the child has left this memory, for so long at most.
    fn wait(&self, time: std::time::Duration) {
        let time = libc::timespec {
            tv_sec: 0,
            tv_nsec: i64::from(time.subsec_nanos()),
        };
        let word = &raw const self.shared.is_borrowed;
        // SAFETY: both pointers are valid for the whole call. It returns at once when the word is
        // not 1 any more.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word,
                libc::FUTEX_WAIT,
                1_u32,
                &raw const time,
            )
        };
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if self.is_borrowed() {
            // The child may run at any time: what it needs is never given back.
            let program = Program {
                candidates: Vec::new(),
                argv: Vec::new(),
                env: Vec::new(),
                cwd: CString::default(),
                ids: None,
                limits: Vec::new(),
                has_terminal: false,
            };
            let empty = Box::new(Shared {
                program,
                stdio: Vec::new(),
                argv: Vec::new(),
                env: Vec::new(),
                no_signals: 0,
                step: Step::Clone,
                errno: 0,
                is_borrowed: 0,
            });
            std::mem::forget(std::mem::replace(&mut self.shared, empty));
            std::mem::forget(self.stack.take());
        }
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
/// `arguments` must ask for CLONE_VM and name a stack that nothing else uses; it and `shared` must be
/// left alone until the child has left this memory.
unsafe fn clone_sharing_memory(arguments: *mut CloneArgs, shared: *mut Shared) -> isize {
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

/// A system call that touches nothing of the C library: its `errno` is the parent's here. Returns
/// the result or a negative errno.
///
/// # Safety
/// As the system call.
unsafe fn call(number: libc::c_long, arguments: [usize; 4]) -> isize {
    let [one, two, three, four] = arguments;
    let result: isize;
    // SAFETY: the caller answers for the call; what the kernel changes is declared.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") one,
            in("rsi") two,
            in("rdx") three,
            in("r10") four,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// The child's whole life in borrowed memory.
unsafe extern "C" fn child(shared: *mut Shared) -> ! {
    // SAFETY: `shared` is valid until this function ends the process or runs a new program. The
    // parent reads what is written here when this process is gone.
    unsafe {
        let Err((step, errno)) = prepare_and_execute(&*shared);
        ptr::write_volatile(&raw mut (*shared).step, step);
        ptr::write_volatile(&raw mut (*shared).errno, errno);
        loop {
            call(libc::SYS_exit_group, [127, 0, 0, 0]);
        }
    }
}

/// Returns what failed; on success it does not return.
///
/// # Safety
/// Only for [`child`]: it changes the process it runs in.
unsafe fn prepare_and_execute(shared: &Shared) -> Result<std::convert::Infallible, (Step, c_int)> {
    let program = &shared.program;
    let attempt = |step: Step, number: libc::c_long, arguments: [usize; 4]| {
        // SAFETY: system calls with numbers, and pointers into `shared`, which outlives them.
        let result = unsafe { call(number, arguments) };
        if result < 0 {
            Err((step, result.wrapping_neg() as c_int))
        } else {
            Ok(())
        }
    };
    attempt(Step::Session, libc::SYS_setsid, [0; 4])?;
    for (target, fd) in shared.stdio.iter().enumerate() {
        let fd = *fd as usize;
        attempt(Step::Descriptors, libc::SYS_dup2, [fd, target, 0, 0])?;
    }
    if program.has_terminal {
        let request = libc::TIOCSCTTY as usize;
        attempt(Step::Terminal, libc::SYS_ioctl, [0, request, 0, 0])?;
    }
    for limit in &program.limits {
        let new = limit.values.as_ptr() as usize;
        let arguments = [0, limit.resource as usize, new, 0];
        attempt(Step::Limits, libc::SYS_prlimit64, arguments)?;
    }
    if let Some(ids) = &program.ids {
        let groups = [ids.groups.len(), ids.groups.as_ptr() as usize, 0, 0];
        attempt(Step::Groups, libc::SYS_setgroups, groups)?;
        let same = |id: u32| [id as usize, id as usize, id as usize, 0];
        attempt(Step::Group, libc::SYS_setresgid, same(ids.gid))?;
        attempt(Step::User, libc::SYS_setresuid, same(ids.uid))?;
    }
    let cwd = program.cwd.as_ptr() as usize;
    attempt(Step::Directory, libc::SYS_chdir, [cwd, 0, 0, 0])?;
    let none = (&raw const shared.no_signals) as usize;
    let mask = [libc::SIG_SETMASK as usize, none, 0, size_of::<u64>()];
    attempt(Step::Execute, libc::SYS_rt_sigprocmask, mask)?;
    let mut told = libc::ENOENT;
    for path in &program.candidates {
        let argv = shared.argv.as_ptr() as usize;
        let env = shared.env.as_ptr() as usize;
        let arguments = [path.as_ptr() as usize, argv, env, 0];
        match attempt(Step::Execute, libc::SYS_execve, arguments) {
            // As a shell does: a program further on may still be the one, and if there is none,
            // "permission denied" says more than "not found".
            Err((_, libc::EACCES)) => told = libc::EACCES,
            Ok(()) | Err((_, libc::ENOENT | libc::ENOTDIR)) => {}
            Err(other) => return Err(other),
        }
    }
    Err((Step::Execute, told))
}
