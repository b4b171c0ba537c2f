//! Which method and path is which call. Pure.
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::http::Method;
use super::{Action, Fault, Request};
use crate::config::{self, Drive, DrivePatch, HintingStart};

/// Turns method, path and body into a typed call, or says what is wrong with it.
pub fn route(method: Method, path: &str, body: &[u8]) -> Result<Request, Fault> {
    use Request as R;
    let inner = path.strip_prefix('/').unwrap_or(path);
    let inner = inner.strip_suffix('/').unwrap_or(inner);
    let mut parts = inner.split('/');
    let first = parts.next().unwrap_or("");
    let second = parts.next();
    let third = parts.next();
    if parts.next().is_some() {
        return Err(unknown(method, path));
    }
    if let Some(why) = not_offered(first) {
        return Err(Fault::new(format!(
            "{} /{first}: not offered: {why}",
            method.name()
        )));
    }
    check_body(method, first, second, body)?;
    match (method, first, second, third) {
        (Method::Get, "", None, None) => Ok(R::GetInstanceInfo),
        (Method::Get, "version", None, None) => Ok(R::GetVersion),
        (Method::Get, "vm", Some("config"), None) => Ok(R::GetVmConfig),
        (Method::Get, "machine-config", None, None) => Ok(R::GetMachineConfig),
        (Method::Get, "balloon", None, None) => Ok(R::GetBalloon),
        (Method::Get, "balloon", Some("statistics"), None) => Ok(R::GetBalloonStats),
        (Method::Get, "balloon", Some("hinting"), Some("status")) => Ok(R::GetHintingStatus),

        (Method::Put, "machine-config", None, None) => json(body).map(R::PutMachineConfig),
        (Method::Put, "boot-source", None, None) => json(body).map(R::PutBootSource),
        (Method::Put, "drives", Some(id), None) => put_drive(id, body),
        (Method::Put, "vsock", None, None) => json(body).map(R::PutVsock),
        (Method::Put, "entropy", None, None) => json(body).map(R::PutEntropy),
        (Method::Put, "balloon", None, None) => json(body).map(R::PutBalloon),
        (Method::Put, "serial", None, None) => json(body).map(R::PutSerial),
        (Method::Put, "console", None, None) => json(body).map(R::PutConsole),
        (Method::Put, "logger", None, None) => json(body).map(R::PutLogger),
        (Method::Put, "metrics", None, None) => json(body).map(R::PutMetrics),
        (Method::Put, "prepare", None, None) => json(body).map(R::Prepare),
        (Method::Put, "workplace", None, None) => json(body).map(R::PutWorkplace),
        (Method::Put, "actions", None, None) => action(body),
        (Method::Put, "snapshot", Some("create"), None) => json(body).map(R::CreateSnapshot),
        (Method::Put, "snapshot", Some("look-ahead"), None) => json(body).map(R::LookAhead),
        (Method::Put, "snapshot", Some("load"), None) => json(body).map(R::LoadSnapshot),
        (Method::Put, "snapshot", Some("reset"), None) => json(body).map(R::ResetSnapshot),
        (Method::Put, "snapshot", Some("working-set"), None) => json(body).map(R::RecordWorkingSet),

        (Method::Patch, "machine-config", None, None) => json(body).map(R::PatchMachineConfig),
        (Method::Patch, "drives", Some(id), None) => patch_drive(id, body),
        (Method::Patch, "balloon", None, None) => json(body).map(R::PatchBalloon),
        (Method::Patch, "balloon", Some("statistics"), None) => {
            json(body).map(R::PatchBalloonStats)
        }
        (Method::Patch, "balloon", Some("hinting"), Some("start")) if body.is_empty() => {
            Ok(R::StartHinting(HintingStart::default()))
        }
        (Method::Patch, "balloon", Some("hinting"), Some("start")) => {
            json(body).map(R::StartHinting)
        }
        (Method::Patch, "balloon", Some("hinting"), Some("stop")) => Ok(R::StopHinting),
        (Method::Patch, "vm", None, None) => vm_state(body),
        _ => Err(unknown(method, path)),
    }
}

fn unknown(method: Method, path: &str) -> Fault {
    Fault::new(format!(
        "Invalid request method and/or path: {} {path}.",
        method.name()
    ))
}

/// What Firecracker offers and we do not, or not yet.
fn not_offered(first: &str) -> Option<&'static str> {
    Some(match first {
        "network-interfaces" => "this version has no network devices",
        "mmds" => "there is no metadata service",
        "cpu-config" => "there are no CPU templates",
        "pmem" => "there are no pmem devices",
        "hotplug" => "RAM has a fixed size",
        _ => return None,
    })
}

/// GETs have no body; PUTs and PATCHes have one, but for hinting's commands.
fn check_body(method: Method, first: &str, second: Option<&str>, body: &[u8]) -> Result<(), Fault> {
    match method {
        Method::Get if !body.is_empty() => Err(Fault::new("GET request cannot have a body.")),
        Method::Patch if (first, second) == ("balloon", Some("hinting")) => Ok(()),
        Method::Put | Method::Patch if body.is_empty() => {
            Err(Fault::new(format!("Empty {} request.", method.name())))
        }
        _ => Ok(()),
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    config::parse(body).map_err(|e| {
        Fault::new(format!(
            "An error occurred when deserializing the json body of a request: {e}."
        ))
    })
}

fn check_id(path: &str, body: &str) -> Result<(), Fault> {
    if path == body {
        return Ok(());
    }
    Err(Fault::new(format!(
        "drive_id: the id from the path [{path}] does not match the id from the body [{body}]!"
    )))
}

fn put_drive(id: &str, body: &[u8]) -> Result<Request, Fault> {
    let drive: Drive = json(body)?;
    check_id(id, &drive.drive_id)?;
    Ok(Request::PutDrive(drive))
}

fn patch_drive(id: &str, body: &[u8]) -> Result<Request, Fault> {
    let patch: DrivePatch = json(body)?;
    check_id(id, &patch.drive_id)?;
    Ok(Request::PatchDrive(patch))
}

fn action(body: &[u8]) -> Result<Request, Fault> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Wire {
        action_type: Name,
    }
    #[derive(Deserialize)]
    enum Name {
        InstanceStart,
        FlushMetrics,
        SendCtrlAltDel,
        Stop,
    }
    let wire: Wire = json(body)?;
    Ok(Request::Action(match wire.action_type {
        Name::InstanceStart => Action::InstanceStart,
        Name::FlushMetrics => Action::FlushMetrics,
        Name::SendCtrlAltDel => Action::SendCtrlAltDel,
        Name::Stop => Action::Stop,
    }))
}

fn vm_state(body: &[u8]) -> Result<Request, Fault> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Wire {
        state: State,
    }
    #[derive(Deserialize)]
    enum State {
        Paused,
        Resumed,
    }
    let wire: Wire = json(body)?;
    Ok(match wire.state {
        State::Paused => Request::Pause,
        State::Resumed => Request::Resume,
    })
}
