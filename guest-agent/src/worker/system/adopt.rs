//! What a guest does first after it was restored: it becomes somebody else before any program of its runs.

use std::path::Path;

use belljar_protocol::v1::{self, error::Code, event::What, reply::Result as Answer};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

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
    // Programs that go on since the image was restored have drawn numbers that other clones draw, too.
    if !freeze::programs_stand_still(context)? {
        let message = "the guest's programs run: only one that was saved frozen can be taken over";
        return Err(refusal(Code::Conflict, message).into());
    }
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
        note(write_machine_id(Path::new(MACHINE_ID), &call.machine_id));
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
/// does not stop the agent. What was there is overwritten rather than emptied first, so that on a full disk it
/// is either the new one or the old one.
fn write_machine_id(path: &Path, id: &str) -> Result<(), v1::Error> {
    let flags = OFlags::WRONLY
        | OFlags::CREATE
        | OFlags::NOFOLLOW
        | OFlags::NONBLOCK
        | OFlags::NOCTTY
        | OFlags::CLOEXEC;
    let open = || rustix::fs::open(path, flags, Mode::from(0o444));
    let written = || -> Result<(), Errno> {
        let file = match open() {
            // A guest without an image has no such folder.
            Err(Errno::NOENT) => {
                let folder = path.parent().ok_or(Errno::NOENT)?;
                rustix::fs::mkdir(folder, Mode::from(0o755))?;
                open()?
            }
            opened => opened?,
        };
        let kind = rustix::fs::fstat(&file)?.st_mode;
        if !FileType::from_raw_mode(kind).is_file() {
            return Err(Errno::INVAL);
        }
        let line = format!("{id}\n");
        let taken = rustix::io::pwrite(&file, line.as_bytes(), 0)?;
        if taken < line.len() {
            return Err(Errno::NOSPC);
        }
        rustix::fs::ftruncate(&file, line.len() as u64)
    };
    written().map_err(|errno| system_error(format_args!("writing {}", path.display()), errno))
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

    #[test]
    fn a_machine_id_is_written_where_there_was_none_and_over_any_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("etc/machine-id");
        let (one, two) = ("1".repeat(32), "2".repeat(32));
        write_machine_id(&path, &one).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{one}\n"));
        std::fs::write(dir.path().join("etc/long"), "x".repeat(100)).unwrap();
        std::fs::rename(dir.path().join("etc/long"), &path).unwrap();
        write_machine_id(&path, &two).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{two}\n"));
    }

    #[test]
    fn what_is_in_the_machine_ids_place_is_not_followed_nor_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        std::fs::write(&target, "kept").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let id = "1".repeat(32);
        let error = write_machine_id(&link, &id).unwrap_err();
        assert!(error.message.contains("link"), "{error:?}");
        assert_eq!(std::fs::read(&target).unwrap(), b"kept");
        // Nobody reads from it, and somebody does.
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            Mode::from(0o600),
            0,
        )
        .unwrap();
        assert!(write_machine_id(&pipe, &id).is_err());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let _reader = rustix::fs::open(&pipe, flags, Mode::empty()).unwrap();
        assert!(write_machine_id(&pipe, &id).is_err());
        assert!(write_machine_id(dir.path(), &id).is_err());
    }
}
