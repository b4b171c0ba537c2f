//! A process whose system calls fail as on a disk that does: a seccomp filter answers in the kernel's place.
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// From the start of the process on, these calls fail with EIO.
pub(crate) fn with_eio(command: &mut Command, calls: &[libc::c_long]) {
    let step = |code: u32, yes: u8, no: u8, value: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: yes,
        jf: no,
        k: value,
    };
    // The number of the call is the first word of `struct seccomp_data`.
    let mut program = vec![step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    let equals = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    for (at, call) in calls.iter().enumerate() {
        let to_the_end = u8::try_from(calls.len() - at).unwrap();
        program.push(step(equals, to_the_end, 0, u32::try_from(*call).unwrap()));
    }
    let answer = libc::BPF_RET | libc::BPF_K;
    program.push(step(answer, 0, 0, libc::SECCOMP_RET_ALLOW));
    let eio = libc::SECCOMP_RET_ERRNO | libc::EIO.cast_unsigned();
    program.push(step(answer, 0, 0, eio));
    let install = move || {
        let filter = libc::sock_fprog {
            len: u16::try_from(program.len()).unwrap_or(0),
            filter: program.as_ptr().cast_mut(),
        };
        // SAFETY: takes numbers only.
        let alone = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        // SAFETY: the kernel copies the filter, which is as long as it says.
        let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) };
        match (alone, set) {
            (0, 0) => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: makes system calls only.
    unsafe { command.pre_exec(install) };
}
