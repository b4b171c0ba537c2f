//! Bytes between two sockets, both ways, in one thread: what a forwarded port is made of, on both sides.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

/// Bytes held for each direction.
const BUFFER: usize = 128 << 10;

/// A direction without bytes gives its buffer back after this time.
const IDLE: Duration = Duration::from_secs(1);

/// How long bytes whose sender has gone altogether may wait for a receiver that does not read.
const LINGER: Duration = Duration::from_secs(10);

/// How often a side that has gone is looked at meanwhile.
const HUNG_UP_PAUSE: Duration = Duration::from_millis(100);

/// One direction.
#[derive(Debug, Default)]
struct Way {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that are to be sent.
    held: std::ops::Range<usize>,
    /// The sender has said its last byte.
    ended: bool,
    /// The receiver knows the end, or takes no more.
    closed: bool,
}

impl Way {
    fn wants_to_read(&self) -> bool {
        !self.ended && !self.closed && self.held.is_empty()
    }

    fn wants_to_write(&self) -> bool {
        !self.closed && !self.held.is_empty()
    }

    /// Reads once and sends what it can. True if bytes moved.
    fn advance(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<bool, Errno> {
        let mut moved = false;
        if self.wants_to_read() {
            self.buffer.resize(BUFFER, 0);
            match rustix::net::recv(from, self.buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((_, 0)) => self.ended = true,
                Ok((_, got)) => {
                    self.held = 0..got;
                    moved = true;
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        if self.wants_to_write() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let bytes = self.buffer.get(self.held.clone()).unwrap_or_default();
            match rustix::net::send(to, bytes, flags) {
                Ok(sent) => {
                    self.held.start = self.held.start.saturating_add(sent);
                    moved = true;
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                // It reads no more. What it still has to say is heard.
                Err(Errno::PIPE) => {
                    self.closed = true;
                    self.held = 0..0;
                    let _ = rustix::net::shutdown(from, Shutdown::Read);
                }
                Err(error) => return Err(error),
            }
        }
        if self.ended && !self.closed && self.held.is_empty() {
            self.closed = true;
            let _ = rustix::net::shutdown(to, Shutdown::Write);
        }
        Ok(moved)
    }
}

/// Passes bytes on until both sides have ended, one has gone, or `stop` is readable. `unread` came from `a`
/// before. `moved` is called for every piece. An end of one direction is told to the other side, which may
/// go on in the other direction.
pub fn relay(
    a: BorrowedFd<'_>,
    b: BorrowedFd<'_>,
    unread: Vec<u8>,
    stop: Option<BorrowedFd<'_>>,
    moved: impl Fn(),
) {
    let mut there = Way {
        held: 0..unread.len(),
        buffer: unread,
        ..Way::default()
    };
    let mut back = Way::default();
    let mut gone: Option<Instant> = None;
    loop {
        // One of them failed: the other learns it by the closing of its socket.
        let (Ok(one), Ok(two)) = (there.advance(a, b), back.advance(b, a)) else {
            return;
        };
        if one || two {
            moved();
        }
        if there.closed && back.closed {
            return;
        }
        if gone.is_some_and(|gone| gone.elapsed() >= LINGER) {
            return;
        }
        match wait(&mut there, &mut back, (a, b), stop) {
            Ok(Woken::HungUp) => {
                gone.get_or_insert_with(Instant::now);
            }
            Ok(Woken::Ready) => {}
            Ok(Woken::Stopped) | Err(_) => return,
        }
    }
}

/// Why a wait is over.
enum Woken {
    Ready,
    /// One side has gone altogether, while bytes for the other wait or may still come from it.
    HungUp,
    Stopped,
}

/// Waits until something can be done.
fn wait(
    there: &mut Way,
    back: &mut Way,
    (a, b): (BorrowedFd<'_>, BorrowedFd<'_>),
    stop: Option<BorrowedFd<'_>>,
) -> Result<Woken, Errno> {
    let flags = |reads: bool, writes: bool| {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, reads);
        flags.set(PollFlags::OUT, writes);
        flags
    };
    let on_a = flags(there.wants_to_read(), back.wants_to_write());
    let on_b = flags(back.wants_to_read(), there.wants_to_write());
    let (mut with_stop, mut without);
    let set: &mut [PollFd<'_>] = match stop {
        Some(stop) => {
            with_stop = [
                PollFd::from_borrowed_fd(a, on_a),
                PollFd::from_borrowed_fd(b, on_b),
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
            ];
            &mut with_stop
        }
        None => {
            without = [
                PollFd::from_borrowed_fd(a, on_a),
                PollFd::from_borrowed_fd(b, on_b),
            ];
            &mut without
        }
    };
    let idle = there.held.is_empty() && back.held.is_empty();
    if poll_for(set, idle.then_some(IDLE))? == 0 {
        there.buffer = Vec::new();
        back.buffer = Vec::new();
        poll_for(set, None)?;
    }
    let told = |slot: usize| set.get(slot).map_or(PollFlags::empty(), PollFd::revents);
    if !told(2).is_empty() {
        return Ok(Woken::Stopped);
    }
    let (told_a, told_b) = (told(0), told(1));
    let mut woken = Woken::Ready;
    for (told, asked, other, flags) in [(told_a, on_a, b, on_b), (told_b, on_b, a, on_a)] {
        // A hang-up is told although nothing was asked for, and would be told again at once: so wait for
        // the other side only.
        if told.intersects(PollFlags::HUP | PollFlags::ERR) && !told.intersects(asked) {
            woken = Woken::HungUp;
            let mut set = [PollFd::from_borrowed_fd(other, flags)];
            poll_for(&mut set, Some(HUNG_UP_PAUSE))?;
        }
    }
    Ok(woken)
}

fn poll_for(set: &mut [PollFd<'_>], time: Option<Duration>) -> Result<usize, Errno> {
    // What is beyond the kernel's counting is no limit.
    let time = time.and_then(|time| Timespec::try_from(time).ok());
    loop {
        match poll(set, time.as_ref()) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    /// (the host's end, the target's end, the relay between)
    fn relayed(unread: &'static [u8]) -> (UnixStream, UnixStream, thread::JoinHandle<()>) {
        let (host, a) = UnixStream::pair().unwrap();
        let (target, b) = UnixStream::pair().unwrap();
        let between =
            thread::spawn(move || relay(a.as_fd(), b.as_fd(), unread.to_vec(), None, || {}));
        (host, target, between)
    }

    #[test]
    fn each_side_may_end_first_and_still_hear_the_other() {
        for swap in [false, true] {
            let (host, target, between) = relayed(b"");
            let (mut first, mut second) = if swap { (target, host) } else { (host, target) };
            first.write_all(b"question").unwrap();
            first.shutdown(std::net::Shutdown::Write).unwrap();
            let mut heard = String::new();
            second.read_to_string(&mut heard).unwrap();
            assert_eq!(heard, "question");
            second.write_all(b"answer").unwrap();
            drop(second);
            heard.clear();
            first.read_to_string(&mut heard).unwrap();
            assert_eq!(heard, "answer");
            drop(first);
            between.join().unwrap();
        }
    }

    #[test]
    fn much_in_both_directions_at_once_arrives_whole() {
        const MUCH: usize = 8 << 20;
        let (host, target, between) = relayed(b"first");
        let ends: Vec<_> = [(host, 0), (target, 5)]
            .into_iter()
            .map(|(end, more)| {
                let mut sender = end.try_clone().unwrap();
                let sending = thread::spawn(move || {
                    sender.write_all(&vec![7; MUCH]).unwrap();
                    sender.shutdown(std::net::Shutdown::Write).unwrap();
                });
                thread::spawn(move || {
                    let mut got = Vec::new();
                    (&end).read_to_end(&mut got).unwrap();
                    sending.join().unwrap();
                    assert_eq!(got.len(), MUCH + more);
                })
            })
            .collect();
        for end in ends {
            end.join().unwrap();
        }
        between.join().unwrap();
    }

    #[test]
    fn it_ends_at_a_word() {
        let ((_host, a), (mut target, b)) =
            (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let (stop, stopped) = UnixStream::pair().unwrap();
        let between = thread::spawn(move || {
            relay(
                a.as_fd(),
                b.as_fd(),
                Vec::new(),
                Some(stopped.as_fd()),
                || {},
            );
        });
        drop(stop);
        between.join().unwrap();
        assert_eq!(target.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn a_side_that_goes_ends_the_other() {
        let (host, mut target, between) = relayed(b"");
        drop(host);
        assert_eq!(target.read(&mut [0; 1]).unwrap(), 0);
        // What it says now reaches nobody.
        while target.write_all(&[0; 4096]).is_ok() {}
        between.join().unwrap();
    }
}
