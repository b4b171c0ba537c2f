//! The guest as a whole: figures, clock, randomness, events, freezing.

mod adopt;
mod freeze;
mod metrics;
pub(super) mod quiet;

use belljar_protocol::v1::{self, error::Code, event::What, reply::Result as Answer};
use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, Timespec};

use super::conn::Conn;
use super::holder::out_of_step;
use super::relay::wait_for_either;
use super::{Answered, Context, Outcome, refusal, system_error};
use crate::sys;
use crate::wire::{from_holder::Message as Said, to_holder::Message as Asked};

pub(super) use adopt::adopt;
pub(super) use freeze::{assume, freeze, is_guest_frozen, thaw};
pub(super) use metrics::metrics;

const BILLION: u64 = 1_000_000_000;

/// Sets the clock of the day.
pub(super) fn set_clock(context: &Context, call: v1::SetClock) -> Answered {
    let (_, after) = put_clock(context, call.unix_ns)?;
    Ok(Outcome::Reply(Answer::SetClock(v1::Clock {
        unix_ns: after,
    })))
}

/// Sets the clock of the day, and posts that. Returns what it was and what it is.
fn put_clock(context: &Context, unix_time_ns: u64) -> Result<(u64, u64), v1::Error> {
    let before = unix_ns();
    let seconds = i64::try_from(unix_time_ns / BILLION).unwrap_or(i64::MAX);
    let nanoseconds = unix_time_ns % BILLION;
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    };
    rustix::time::clock_settime(ClockId::Realtime, time)
        .map_err(|errno| system_error("setting the clock", errno))?;
    let after = unix_ns();
    post(
        context,
        What::ClockSet(v1::ClockSet {
            before_unix_ns: before,
            after_unix_ns: after,
        }),
    );
    Ok((before, after))
}

fn unix_ns() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(BILLION).saturating_add(nanoseconds)
}

/// Mixes bytes into the random pool.
pub(super) fn reseed(call: &v1::Reseed) -> Answered {
    if call.seed.is_empty() || call.seed.len() > sys::ENTROPY_MAX {
        let message = format!("seed: 1 to {} bytes are needed", sys::ENTROPY_MAX);
        return Err(refusal(Code::Invalid, message).into());
    }
    mix(&call.seed)?;
    Ok(Outcome::Reply(Answer::Reseed(v1::Reseeded {})))
}

/// Mixes bytes into the random pool, and has the kernel's generator take them up at once.
fn mix(seed: &[u8]) -> Result<(), v1::Error> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let random = rustix::fs::open("/dev/random", flags, Mode::empty())
        .map_err(|errno| system_error("opening /dev/random", errno))?;
    sys::add_entropy(std::os::fd::AsFd::as_fd(&random), seed).map_err(|error| {
        let errno = rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO);
        system_error("reseeding /dev/random", errno)
    })
}

/// Writes everything out.
pub(super) fn sync() -> Answered {
    rustix::fs::sync();
    Ok(Outcome::Reply(Answer::Sync(v1::Synced {})))
}

/// Sends the events that are kept, and those to come.
pub(super) fn events(context: &Context, conn: &mut Conn, call: v1::FollowEvents) -> Answered {
    let mut channel = context.holder.open()?;
    match channel.ask(&context.holder, Asked::Events(call))? {
        Said::Events(started) => conn.send(&context.head(Answer::Events(started)))?,
        _ => return Err(out_of_step()),
    }
    loop {
        match channel.receive(Some(std::time::Instant::now()))? {
            Some(Said::Event(event)) => conn.send(&event)?,
            Some(Said::Done(_)) => {
                context.holder.give_back(channel);
                return Ok(Outcome::Streamed);
            }
            Some(_) => return Err(out_of_step()),
            None => drop(wait_for_either(conn, &channel, None)?),
        }
    }
}

/// Adds to the event log. It is no reason to fail if that fails.
pub(super) fn post(context: &Context, what: What) {
    let event = v1::Event {
        what: Some(what),
        ..v1::Event::default()
    };
    if context.holder.ask(Asked::PostEvent(event)).is_err() {
        crate::log!("an event is lost: PID 1 does not take it");
    }
}
