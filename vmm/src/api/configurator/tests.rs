//! Tests of the order of calls.
use proptest::prelude::*;

use super::super::http::Method;
use super::super::route;
use super::*;

/// Applies a call as it comes over the API, and carries its effect out.
fn call(c: &mut Configurator, method: Method, path: &str, body: &str) -> Result<Effect, String> {
    let request = route(method, path, body.as_bytes()).map_err(|f| f.message)?;
    let effect = c.apply(request).map_err(|f| f.message)?;
    c.done(&effect);
    Ok(effect)
}

fn put(c: &mut Configurator, path: &str, body: &str) -> Result<Effect, String> {
    call(c, Method::Put, path, body)
}

fn patch(c: &mut Configurator, path: &str, body: &str) -> Result<Effect, String> {
    call(c, Method::Patch, path, body)
}

fn get(c: &mut Configurator, path: &str) -> Result<Effect, String> {
    call(c, Method::Get, path, "")
}

fn action(c: &mut Configurator, name: &str) -> Result<Effect, String> {
    put(c, "/actions", &format!(r#"{{"action_type":"{name}"}}"#))
}

fn drive(c: &mut Configurator, id: &str, root: bool) -> Result<Effect, String> {
    let body = format!(r#"{{"drive_id":"{id}","path_on_host":"/{id}","is_root_device":{root}}}"#);
    put(c, &format!("/drives/{id}"), &body)
}

const BOOT: &str = r#"{"kernel_image_path":"/k"}"#;

fn running() -> Configurator {
    let mut c = Configurator::default();
    put(&mut c, "/boot-source", BOOT).unwrap();
    drive(&mut c, "a", false).unwrap();
    put(
        &mut c,
        "/balloon",
        r#"{"amount_mib":1,"deflate_on_oom":true,"stats_polling_interval_s":1,"free_page_hinting":true}"#,
    )
    .unwrap();
    assert_eq!(action(&mut c, "InstanceStart"), Ok(Effect::Start));
    assert_eq!(c.phase(), Phase::Running);
    c
}

fn assert_refused(outcome: Result<Effect, String>, part: &str) {
    let message = outcome.unwrap_err();
    assert!(message.contains(part), "{message}");
}

#[test]
fn a_start_needs_a_kernel_and_happens_once() {
    let mut c = Configurator::default();
    assert_refused(action(&mut c, "InstanceStart"), "/boot-source");
    let mut c = running();
    assert_refused(action(&mut c, "InstanceStart"), "after starting");
}

#[test]
fn a_failed_start_can_be_tried_again() {
    let mut c = Configurator::default();
    put(&mut c, "/boot-source", BOOT).unwrap();
    for _ in 0..2 {
        let start = Request::Action(Action::InstanceStart);
        assert_eq!(c.apply(start), Ok(Effect::Start));
        assert_eq!(c.state(), InstanceState::NotStarted);
    }
}

#[test]
fn configuration_is_closed_after_the_start() {
    let mut c = running();
    for (path, body) in [
        ("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128}"#),
        ("/boot-source", BOOT),
        ("/vsock", r#"{"guest_cid":3,"uds_path":"v"}"#),
        ("/entropy", "{}"),
        ("/serial", "{}"),
        ("/console", "{}"),
        ("/prepare", r#"{"vcpu_count":1}"#),
        ("/balloon", r#"{"amount_mib":1,"deflate_on_oom":true}"#),
    ] {
        assert_refused(put(&mut c, path, body), "after starting");
    }
    assert_refused(drive(&mut c, "b", false), "after starting");
    assert_refused(
        patch(&mut c, "/machine-config", r#"{"vcpu_count":2}"#),
        "after starting",
    );
}

#[test]
fn a_running_guests_calls_are_closed_before_the_start() {
    let mut c = Configurator::default();
    drive(&mut c, "a", false).unwrap();
    assert_refused(
        patch(&mut c, "/vm", r#"{"state":"Paused"}"#),
        "before starting",
    );
    assert_refused(
        patch(&mut c, "/drives/a", r#"{"drive_id":"a"}"#),
        "before starting",
    );
    assert_refused(action(&mut c, "SendCtrlAltDel"), "before starting");
    put(
        &mut c,
        "/balloon",
        r#"{"amount_mib":1,"deflate_on_oom":true,"stats_polling_interval_s":1}"#,
    )
    .unwrap();
    assert_refused(get(&mut c, "/balloon/statistics"), "before starting");
    assert_eq!(action(&mut c, "Stop"), Ok(Effect::Stop));
}

#[test]
fn drives_replace_each_other_by_id_and_the_root_comes_first() {
    let mut c = Configurator::default();
    drive(&mut c, "a", false).unwrap();
    drive(&mut c, "b", false).unwrap();
    drive(&mut c, "r", true).unwrap();
    drive(&mut c, "a", false).unwrap();
    let ids: Vec<&str> = c
        .config()
        .drives
        .iter()
        .map(|d| d.drive_id.as_str())
        .collect();
    assert_eq!(ids, ["r", "a", "b"]);
    assert_refused(drive(&mut c, "s", true), "\"r\"");
    drive(&mut c, "r", false).unwrap();
    drive(&mut c, "s", true).unwrap();
    for i in 0..MAX_DRIVES - 4 {
        drive(&mut c, &format!("x{i}"), false).unwrap();
    }
    assert_refused(drive(&mut c, "one_more", false), "at most");
    drive(&mut c, "a", false).unwrap();
}

#[test]
fn path_and_body_name_the_same_drive() {
    let body = r#"{"drive_id":"b","path_on_host":"/b","is_root_device":false}"#;
    assert_refused(
        put(&mut Configurator::default(), "/drives/a", body),
        "does not match",
    );
}

#[test]
fn where_to_work_is_said_before_anything_with_a_file() {
    let mut c = Configurator::default();
    let body = r#"{"directory": "/box", "id": "0badcafe"}"#;
    put(&mut c, "/prepare", r#"{"vcpu_count":2}"#).unwrap();
    let Ok(Effect::MoveTo(workplace)) = put(&mut c, "/workplace", body) else {
        panic!("refused");
    };
    assert_eq!(workplace.id, "0badcafe");
    for (bad, why) in [
        (r#"{"directory": "/box", "id": "a b"}"#, "id"),
        (r#"{"directory": "fd:box", "id": "a"}"#, "Belljar-Fds"),
        (r#"{"id": "a"}"#, "directory"),
    ] {
        assert_refused(put(&mut c, "/workplace", bad), why);
    }
    put(&mut c, "/console", r#"{"socket_path": "c.sock"}"#).unwrap();
    assert_refused(put(&mut c, "/workplace", body), "/console was configured");
    let mut c = Configurator::default();
    put(&mut c, "/boot-source", BOOT).unwrap();
    assert_refused(put(&mut c, "/workplace", body), "/boot-source was");
    assert_eq!(action(&mut c, "InstanceStart"), Ok(Effect::Start));
    c.done(&Effect::Start);
    assert_refused(put(&mut c, "/workplace", body), "after starting");
}

#[test]
fn prepared_vcpus_bind_the_machine_configuration() {
    let mut c = Configurator::default();
    put(&mut c, "/boot-source", BOOT).unwrap();
    let effect = put(&mut c, "/prepare", r#"{"vcpu_count":2}"#);
    let wanted = Prepare {
        vcpu_count: 2,
        memory: None,
    };
    assert_eq!(effect, Ok(Effect::Prepare(wanted)));
    assert_refused(
        put(&mut c, "/prepare", r#"{"vcpu_count":2}"#),
        "prepared already",
    );
    assert_refused(action(&mut c, "InstanceStart"), "prepared for 2 vCPUs");
    assert_refused(
        put(
            &mut c,
            "/machine-config",
            r#"{"vcpu_count":1,"mem_size_mib":128}"#,
        ),
        "prepared for 2 vCPUs",
    );
    put(
        &mut c,
        "/machine-config",
        r#"{"vcpu_count":2,"mem_size_mib":128}"#,
    )
    .unwrap();
    assert_eq!(action(&mut c, "InstanceStart"), Ok(Effect::Start));
}

#[test]
fn pause_and_resume_are_idempotent() {
    let mut c = running();
    assert_eq!(
        patch(&mut c, "/vm", r#"{"state":"Resumed"}"#),
        Ok(Effect::Done)
    );
    assert_eq!(
        patch(&mut c, "/vm", r#"{"state":"Paused"}"#),
        Ok(Effect::Pause)
    );
    assert_eq!(c.state(), InstanceState::Paused);
    assert_eq!(
        patch(&mut c, "/vm", r#"{"state":"Paused"}"#),
        Ok(Effect::Done)
    );
    assert_eq!(
        patch(&mut c, "/vm", r#"{"state":"Resumed"}"#),
        Ok(Effect::Resume)
    );
    assert_eq!(c.state(), InstanceState::Running);
}

#[test]
fn the_balloon_fits_and_keeps_its_features() {
    let mut c = Configurator::default();
    assert_refused(get(&mut c, "/balloon"), "no balloon");
    assert_refused(
        patch(&mut c, "/balloon", r#"{"amount_mib":1}"#),
        "no balloon",
    );
    let whole = r#"{"amount_mib":128,"deflate_on_oom":true}"#;
    assert_refused(put(&mut c, "/balloon", whole), "amount_mib: 128");
    put(
        &mut c,
        "/balloon",
        r#"{"amount_mib":64,"deflate_on_oom":true}"#,
    )
    .unwrap();
    assert_refused(
        patch(&mut c, "/machine-config", r#"{"mem_size_mib":64}"#),
        "amount_mib: 64",
    );
    put(&mut c, "/boot-source", BOOT).unwrap();
    action(&mut c, "InstanceStart").unwrap();
    assert_refused(get(&mut c, "/balloon/statistics"), "without statistics");
    assert_refused(
        patch(&mut c, "/balloon/hinting/start", ""),
        "free_page_hinting",
    );
    let update = r#"{"stats_polling_interval_s":1}"#;
    assert_refused(
        patch(&mut c, "/balloon/statistics", update),
        "turned on or off",
    );

    let mut c = running();
    assert_eq!(
        get(&mut c, "/balloon/statistics"),
        Ok(Effect::ReadBalloonStats)
    );
    assert_eq!(
        get(&mut c, "/balloon/hinting/status"),
        Ok(Effect::ReadHinting)
    );
    assert_eq!(
        patch(&mut c, "/balloon/hinting/stop", ""),
        Ok(Effect::StopHinting)
    );
    assert!(matches!(
        patch(&mut c, "/balloon/hinting/start", ""),
        Ok(Effect::StartHinting(_))
    ));
    patch(
        &mut c,
        "/balloon/statistics",
        r#"{"stats_polling_interval_s":9}"#,
    )
    .unwrap();
    patch(&mut c, "/balloon", r#"{"amount_mib":7}"#).unwrap();
    let Ok(Effect::Answer(Body::Json(shown))) = get(&mut c, "/balloon") else {
        panic!()
    };
    assert!(shown.contains(r#""amount_mib":7"#) && shown.contains(r#"_interval_s":9"#));
}

#[test]
fn drives_change_their_file_while_running() {
    let mut c = running();
    let body = r#"{"drive_id":"a","path_on_host":"/new"}"#;
    assert!(matches!(
        patch(&mut c, "/drives/a", body),
        Ok(Effect::UpdateDrive(_))
    ));
    assert_eq!(
        c.config().drives[0].path_on_host,
        Source::Path("/new".into())
    );
    assert_refused(
        patch(&mut c, "/drives/z", r#"{"drive_id":"z"}"#),
        "no drive \"z\"",
    );
}

#[test]
fn metrics_need_a_path_and_logger_settings_add_up() {
    let mut c = Configurator::default();
    assert_refused(action(&mut c, "FlushMetrics"), "/metrics");
    put(&mut c, "/metrics", r#"{"metrics_path":"/m"}"#).unwrap();
    assert_refused(
        put(&mut c, "/metrics", r#"{"metrics_path":"/n"}"#),
        "already",
    );
    assert_eq!(action(&mut c, "FlushMetrics"), Ok(Effect::FlushMetrics));
    put(&mut c, "/logger", r#"{"log_path":"/l"}"#).unwrap();
    put(&mut c, "/logger", r#"{"level":"Debug"}"#).unwrap();
    let logger = c.config().logger.clone().unwrap();
    assert_eq!(logger.log_path, Some(Source::Path("/l".into())));
    assert_eq!(logger.level, Some(crate::log::Level::Debug));
}

#[test]
fn descriptors_must_have_arrived_and_end_with_the_start() {
    let mut c = Configurator::default();
    let boot = r#"{"kernel_image_path":"fd:k"}"#;
    assert_refused(
        put(&mut c, "/boot-source", boot),
        "kernel_image_path: no descriptor",
    );
    let fd = OwnedFd::from(tempfile::tempfile().unwrap());
    c.add_descriptors([("k".to_owned(), fd)]).unwrap();
    put(&mut c, "/boot-source", boot).unwrap();
    action(&mut c, "InstanceStart").unwrap();
    assert!(!c.descriptors().contains("k"));
}

#[test]
fn descriptors_of_a_refused_call_are_closed() {
    let mut c = running();
    let file = || OwnedFd::from(tempfile::tempfile().unwrap());
    c.add_descriptors([("k".to_owned(), file())]).unwrap();
    assert_refused(
        put(&mut c, "/boot-source", r#"{"kernel_image_path":"fd:k"}"#),
        "after starting",
    );
    assert!(!c.descriptors().contains("k"));
    // Those that came before stay.
    let mut c = Configurator::default();
    c.add_descriptors([("k".to_owned(), file())]).unwrap();
    put(&mut c, "/entropy", "{}").unwrap();
    c.add_descriptors([("l".to_owned(), file())]).unwrap();
    assert_refused(action(&mut c, "InstanceStart"), "/boot-source");
    assert!(c.descriptors().contains("k") && !c.descriptors().contains("l"));
    let many = (0..=Descriptors::MAX).map(|i| (i.to_string(), file()));
    assert!(c.add_descriptors(many).is_err());
    assert!(c.descriptors().contains("k") && !c.descriptors().contains("0"));
}

#[test]
fn a_whole_document_is_checked_like_single_calls() {
    let load = |text: &str| {
        let mut c = Configurator::default();
        let effects = c.load(crate::config::parse(text.as_bytes()).unwrap());
        effects.map(|e| (c, e)).map_err(|f| f.message)
    };
    let (c, effects) = load(
        r#"{"boot-source":{"kernel_image_path":"/k"},"metrics":{"metrics_path":"/m"},
            "logger":{"level":"Off"},"machine-config":{"vcpu_count":3,"mem_size_mib":64}}"#,
    )
    .unwrap();
    assert_eq!(c.config().machine_config.vcpu_count, 3);
    assert!(matches!(
        effects[..],
        [Effect::SetLogger(_), Effect::SetMetrics(_)]
    ));
    let drive =
        |id, root| format!(r#"{{"drive_id":"{id}","path_on_host":"/p","is_root_device":{root}}}"#);
    let two_roots = format!(
        r#"{{"drives":[{},{}]}}"#,
        drive("a", true),
        drive("b", true)
    );
    assert!(load(&two_roots).unwrap_err().contains("root block device"));
    let twins = format!(
        r#"{{"drives":[{},{}]}}"#,
        drive("a", true),
        drive("a", true)
    );
    assert!(load(&twins).unwrap_err().contains("twice"));
}

proptest! {
    /// Whatever is called in whatever order: at most one root device, a balloon that fits,
    /// and a guest that started once stays started.
    #[test]
    fn invariants_hold_in_any_order(steps in proptest::collection::vec((0u8..12, any::<bool>(), 1u32..300), 0..60)) {
        let mut c = Configurator::default();
        let mut started = false;
        for (kind, flag, n) in steps {
            let _ = match kind {
                0 => drive(&mut c, "a", flag),
                1 => drive(&mut c, "b", flag),
                2 => put(&mut c, "/balloon", &format!(r#"{{"amount_mib":{n},"deflate_on_oom":true}}"#)),
                3 => patch(&mut c, "/balloon", &format!(r#"{{"amount_mib":{n}}}"#)),
                4 => patch(&mut c, "/machine-config", &format!(r#"{{"mem_size_mib":{n}}}"#)),
                5 => patch(&mut c, "/machine-config", &format!(r#"{{"vcpu_count":{}}}"#, n % 4)),
                6 => put(&mut c, "/prepare", &format!(r#"{{"vcpu_count":{}}}"#, n % 4)),
                7 => put(&mut c, "/boot-source", BOOT),
                8 if n < 100 => action(&mut c, "InstanceStart"),
                9 => patch(&mut c, "/vm", if flag { r#"{"state":"Paused"}"# } else { r#"{"state":"Resumed"}"# }),
                10 => get(&mut c, "/vm/config"),
                _ => put(&mut c, "/entropy", "{}"),
            };
            prop_assert!(c.config().drives.iter().filter(|d| d.is_root_device).count() <= 1);
            if let Some(balloon) = &c.config().balloon {
                prop_assert!(balloon.amount_mib < c.config().machine_config.mem_size_mib);
            }
            prop_assert!(!started || c.state() != InstanceState::NotStarted);
            started = c.state() != InstanceState::NotStarted;
            prop_assert!(!started || c.config().boot_source.is_some());
        }
    }
}
