//! What a guest does first after it was restored: it becomes somebody else before any program of its runs.

use belljar_protocol::v1::{self, error::Code, event::What, reply::Result as Answer};
use rustix::fs::{Mode, OFlags};

use super::super::conn::Conn;
use super::super::{Answered, Context, Outcome, refusal, system_error};
use super::{freeze, mix, post, put_clock, unix_ns};
use crate::sys;

/// Fewer bytes than these do not tell clones apart.
const SEED_MIN: usize = 32;
/// `__NEW_UTS_LEN`
const HOST_NAME_MAX: usize = 64;
const MACHINE_ID: &str = "/etc/machine-id";

/// Takes over. Without fresh randomness nothing else is done and nothing is thawed: a clone that draws the
/// same numbers as another one is worse than one that stands still. All else that fails is told.
pub(in super::super) fn adopt(context: &Context, conn: &mut Conn, call: v1::Adopt) -> Answered {
    check(&call).map_err(|message| refusal(Code::Invalid, message))?;
    mix(&call.seed)?;
    let mut adopted = v1::Adopted {
        before_unix_ns: unix_ns(),
        ..v1::Adopted::default()
    };
    let mut note = |done: Result<(), v1::Error>| {
        if let Err(error) = done {
            adopted.failed.push(error.message);
        }
    };
    if call.unix_ns != 0 {
        note(put_clock(context, call.unix_ns).map(|_| ()));
    }
    if !call.host_name.is_empty() {
        note(
            rustix::system::sethostname(call.host_name.as_bytes())
                .map_err(|errno| system_error("setting the host name", errno)),
        );
    }
    note(freeze::thaw_drive(context));
    if !call.machine_id.is_empty() {
        note(write_machine_id(&call.machine_id));
    }
    adopted.after_unix_ns = unix_ns();
    post(
        context,
        What::Adopted(v1::AdoptedAs {
            sandbox: call.sandbox,
            lineage: call.lineage,
            generation: call.generation,
        }),
    );
    // Whoever restored does not have to wait for programs, and one who has gone does not hold them up.
    let told = conn.send(&context.head(Answer::Adopt(adopted)));
    freeze::thaw_programs(context)?;
    post(context, What::Thawed(v1::Thawed {}));
    told?;
    conn.send(&v1::Thawed {})?;
    Ok(Outcome::Streamed)
}

fn check(call: &v1::Adopt) -> Result<(), String> {
    if !(SEED_MIN..=sys::ENTROPY_MAX).contains(&call.seed.len()) {
        let most = sys::ENTROPY_MAX;
        return Err(format!("seed: {SEED_MIN} to {most} bytes are needed"));
    }
    if call.host_name.len() > HOST_NAME_MAX || call.host_name.contains(char::is_control) {
        return Err(format!(
            "host_name: at most {HOST_NAME_MAX} bytes without control characters"
        ));
    }
    let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let id = &call.machine_id;
    if !(id.is_empty() || id.len() == 32 && id.bytes().all(is_hex)) {
        return Err("machine_id: 32 lower-case hexadecimal digits".to_owned());
    }
    Ok(())
}

/// A program of the guest may have put anything in the file's place: links are not followed, and a pipe
/// does not stop the agent.
fn write_machine_id(id: &str) -> Result<(), v1::Error> {
    let flags = OFlags::WRONLY
        | OFlags::CREATE
        | OFlags::TRUNC
        | OFlags::NOFOLLOW
        | OFlags::NONBLOCK
        | OFlags::NOCTTY
        | OFlags::CLOEXEC;
    let failed = |errno| system_error(format_args!("writing {MACHINE_ID}"), errno);
    let file = rustix::fs::open(MACHINE_ID, flags, Mode::from(0o444)).map_err(failed)?;
    rustix::io::write(&file, format!("{id}\n").as_bytes()).map_err(failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> v1::Adopt {
        v1::Adopt {
            seed: vec![7; 32],
            machine_id: "0123456789abcdef".repeat(2),
            host_name: "box-1".to_owned(),
            ..v1::Adopt::default()
        }
    }

    #[test]
    fn what_would_not_tell_clones_apart_is_refused() {
        assert_eq!(check(&call()), Ok(()));
        type Spoil = fn(&mut v1::Adopt);
        let spoilt: [(Spoil, &str); 6] = [
            (|call| call.seed.clear(), "seed"),
            (|call| call.seed.truncate(31), "seed"),
            (|call| call.seed.resize(513, 0), "seed"),
            (|call| call.host_name = "x".repeat(65), "host_name"),
            (|call| call.host_name.push('\n'), "host_name"),
            (|call| call.machine_id = "AB".repeat(16), "machine_id"),
        ];
        for (spoil, field) in spoilt {
            let mut call = call();
            spoil(&mut call);
            let message = check(&call).unwrap_err();
            assert!(message.starts_with(field), "{message}");
        }
    }
}
