//! The ends of a process's streams: pipes, or a terminal.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use belljar_protocol::v1;
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::{InputModes, OptionalActions, Winsize};

/// Group of terminals by convention (`tty`), as the mount options of devpts say.
const TTY_GROUP: u32 = 5;

/// The child's ends, to be closed once it runs.
#[derive(Debug)]
pub(crate) struct ChildEnds {
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    is_terminal: bool,
}

/// The agent's ends, non-blocking. On a terminal, input and output are the same.
#[derive(Debug)]
pub(crate) struct OwnEnds {
    pub(crate) stdin: Option<Rc<OwnedFd>>,
    pub(crate) stdout: Rc<OwnedFd>,
    pub(crate) stderr: Option<Rc<OwnedFd>>,
}

impl ChildEnds {
    /// Descriptors for the child's 0, 1 and 2; `null` where it gets no input.
    pub(crate) fn stdio(&self, null: &OwnedFd) -> [RawFd; 3] {
        let stdin = match &self.stdin {
            None if self.is_terminal => &self.stdout,
            given => given.as_ref().unwrap_or(null),
        };
        [
            stdin.as_raw_fd(),
            self.stdout.as_raw_fd(),
            self.stderr.as_ref().unwrap_or(&self.stdout).as_raw_fd(),
        ]
    }

    /// Gives the ends to the user of the program, who may open them again by name
    /// (`/dev/stderr`), which the mode of a pipe allows to its owner only.
    pub(crate) fn give_to(&self, uid: u32, gid: u32) {
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        let ends = [
            self.stdin.as_ref(),
            Some(&self.stdout),
            self.stderr.as_ref(),
        ];
        for fd in ends.into_iter().flatten() {
            let gid = if self.is_terminal {
                Some(Gid::from_raw(TTY_GROUP))
            } else {
                gid
            };
            // Without it most programs run all the same.
            let _ = rustix::fs::fchown(fd, uid, gid);
        }
    }
}

/// Makes the pipes of a program.
pub(crate) fn pipes(with_stdin: bool) -> rustix::io::Result<(OwnEnds, ChildEnds)> {
    let (out_read, out_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (err_read, err_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::fs::fcntl_setfl(&out_read, OFlags::NONBLOCK)?;
    rustix::fs::fcntl_setfl(&err_read, OFlags::NONBLOCK)?;
    let (own_stdin, child_stdin) = if with_stdin {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        rustix::fs::fcntl_setfl(&write, OFlags::NONBLOCK)?;
        (Some(Rc::new(write)), Some(read))
    } else {
        (None, None)
    };
    let own = OwnEnds {
        stdin: own_stdin,
        stdout: Rc::new(out_read),
        stderr: Some(Rc::new(err_read)),
    };
    let child = ChildEnds {
        stdin: child_stdin,
        stdout: out_write,
        stderr: Some(err_write),
        is_terminal: false,
    };
    Ok((own, child))
}

/// Makes a terminal of a size.
pub(crate) fn terminal(size: &v1::Terminal) -> rustix::io::Result<(OwnEnds, ChildEnds)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    let mut settings = rustix::termios::tcgetattr(&slave)?;
    settings.input_modes |= InputModes::IUTF8;
    rustix::termios::tcsetattr(&slave, OptionalActions::Now, &settings)?;
    let size = Winsize {
        ws_row: u16::try_from(size.rows).unwrap_or(u16::MAX),
        ws_col: u16::try_from(size.columns).unwrap_or(u16::MAX),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&slave, size)?;
    // Others may write to a terminal only if its user lets them.
    let _ = rustix::fs::fchmod(&slave, Mode::from_raw_mode(0o620));
    rustix::fs::fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)?;
    let master = Rc::new(master);
    let own = OwnEnds {
        stdin: Some(Rc::clone(&master)),
        stdout: master,
        stderr: None,
    };
    let child = ChildEnds {
        stdin: None,
        stdout: slave,
        stderr: None,
        is_terminal: true,
    };
    Ok((own, child))
}
