//! Tests of the configuration types.
use proptest::prelude::*;
use serde::de::DeserializeOwned;

use super::*;

fn good<T: DeserializeOwned>(json: &str) -> T {
    parse(json.as_bytes()).unwrap_or_else(|e| panic!("{json}: {e}"))
}

fn bad<T: DeserializeOwned>(json: &str) -> String {
    match parse::<T>(json.as_bytes()) {
        Ok(_) => panic!("{json} was accepted"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn machine_config_has_firecrackers_bounds_and_defaults() {
    let machine: MachineConfig = good(r#"{"vcpu_count":32,"mem_size_mib":32}"#);
    assert_eq!((machine.vcpu_count, machine.mem_size_mib), (32, 32));
    let shown = serde_json::to_string(&MachineConfig::default()).unwrap();
    assert!(shown.starts_with(
        r#"{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None""#
    ));
    good::<MachineConfig>(
        r#"{"vcpu_count":2,"mem_size_mib":99,"smt":false,"track_dirty_pages":false,
            "cpu_template":"None","huge_pages":"None"}"#,
    );
    good::<MachineConfig>(r#"{"vcpu_count":2,"mem_size_mib":99,"cpu_template":null,"smt":null}"#);
}

#[test]
fn bad_machine_fields_are_named() {
    for (fields, part) in [
        (
            r#""vcpu_count":0,"mem_size_mib":128"#,
            "vcpu_count: 0 is not in 1..=32",
        ),
        (r#""vcpu_count":33,"mem_size_mib":128"#, "vcpu_count: 33"),
        (r#""vcpu_count":257,"mem_size_mib":128"#, "vcpu_count: 257"),
        (r#""vcpu_count":-1,"mem_size_mib":128"#, "vcpu_count: "),
        (r#""vcpu_count":"1","mem_size_mib":128"#, "vcpu_count: "),
        (r#""vcpu_count":1,"mem_size_mib":0"#, "mem_size_mib: 0"),
        (r#""vcpu_count":1,"mem_size_mib":31"#, "mem_size_mib: 31"),
        (
            r#""vcpu_count":1,"mem_size_mib":4294967424"#,
            "mem_size_mib: 4294967424",
        ),
        (r#""vcpu_count":1"#, "mem_size_mib"),
        (r#""vcpu_count":1,"mem_size_mib":128,"smt":true"#, "smt: "),
        (
            r#""vcpu_count":1,"mem_size_mib":128,"track_dirty_pages":true"#,
            "track_dirty_pages: ",
        ),
        (
            r#""vcpu_count":1,"mem_size_mib":128,"cpu_template":"T2""#,
            "cpu_template: \"T2\"",
        ),
        (
            r#""vcpu_count":1,"mem_size_mib":128,"huge_pages":"2M""#,
            "huge_pages: \"2M\"",
        ),
        (
            r#""vcpu_count":1,"mem_size_mib":128,"ht_enabled":false"#,
            "ht_enabled",
        ),
        (
            r#""vcpu_count":1,"vcpu_count":2,"mem_size_mib":128"#,
            "vcpu_count",
        ),
        (
            r#""vcpu_count":1,"mem_size_mib":128,"gdb_socket_path":"/g""#,
            "gdb_socket_path: ",
        ),
    ] {
        let message = bad::<MachineConfig>(&format!("{{{fields}}}"));
        assert!(message.contains(part), "{fields}: {message}");
    }
    assert!(bad::<MachinePatch>(r#"{"vcpu_count":33}"#).contains("vcpu_count: 33"));
    assert!(bad::<Prepare>(r#"{"vcpu_count":0}"#).contains("vcpu_count: 0"));
    let alone = r#"{"vcpu_count":1,"working_set":"w"}"#;
    assert!(bad::<Prepare>(alone).contains("goes with mem_file_path"));
    let whole: Prepare = good(r#"{"vcpu_count":1,"mem_file_path":"m","working_set":"fd:w"}"#);
    let memory = whole.memory.unwrap();
    assert_eq!(memory.working_set.unwrap().to_string(), "fd:w");
}

#[test]
fn a_patch_changes_only_what_it_names() {
    let patch: MachinePatch = good(r#"{"mem_size_mib":256}"#);
    let machine = MachineConfig {
        vcpu_count: 4,
        ..MachineConfig::default()
    };
    let patched = machine.patched(&patch);
    assert_eq!((patched.vcpu_count, patched.mem_size_mib), (4, 256));
}

#[test]
fn sources_are_paths_or_descriptors() {
    assert_eq!(Source::parse("/a b").unwrap(), Source::Path("/a b".into()));
    assert_eq!(
        Source::parse("./fd:x").unwrap(),
        Source::Path("./fd:x".into())
    );
    assert_eq!(
        Source::parse("fd:x-1.y_z").unwrap(),
        Source::Fd("x-1.y_z".into())
    );
    for text in [
        "",
        "fd:",
        "fd:a/b",
        "fd:a b",
        "a\0b",
        &"x".repeat(4096),
        &format!("fd:{}", "x".repeat(65)),
    ] {
        assert!(Source::parse(text).is_err(), "{text}");
    }
}

#[test]
fn boot_arguments_cannot_smuggle_anything() {
    let boot: BootSource = good(r#"{"kernel_image_path":"fd:k","boot_args":"a=b c"}"#);
    assert_eq!(boot.kernel_image_path, Source::Fd("k".into()));
    for args in [r"a\u0000b", r"a\nb", "ü", &"x".repeat(MAX_BOOT_ARGS + 1)] {
        let json = format!(r#"{{"kernel_image_path":"k","boot_args":"{args}"}}"#);
        assert!(bad::<BootSource>(&json).contains("boot_args: "));
    }
    assert!(bad::<BootSource>("{}").contains("kernel_image_path"));
    assert!(bad::<BootSource>(r#"{"kernel_image_path":""}"#).contains("kernel_image_path: "));
}

#[test]
fn drives_have_firecrackers_fields_and_a_serial() {
    let drive: Drive = good(
        r#"{"drive_id":"rootfs","path_on_host":"/r","is_root_device":true,"partuuid":"0eaa91a0-01",
            "is_read_only":true,"cache_type":"Writeback","io_engine":"Async","rate_limiter":null}"#,
    );
    assert_eq!(
        (drive.cache_type, drive.io_engine),
        (CacheType::Writeback, IoEngine::Async)
    );
    assert_eq!(drive.serial(), "rootfs");
    let long: Drive = good(
        r#"{"drive_id":"a_very_long_name_of_a_drive","path_on_host":"/r","is_root_device":false}"#,
    );
    assert_eq!(long.serial(), "a_very_long_name_of_");
    for (field, part) in [
        (r#""rate_limiter":{}"#, "rate_limiter: not offered"),
        (r#""socket":"/s""#, "socket: not offered"),
        (r#""serial":"""#, "serial: "),
        (r#""serial":"123456789012345678901""#, "serial: "),
        (r#""serial":"a b""#, "serial: "),
        (r#""cache_type":"unsafe""#, "cache_type: "),
        (r#""io_engine":"Uring""#, "io_engine: "),
        (r#""partuuid":"a""#, "partuuid: "),
        (r#""readonly":true"#, "readonly"),
    ] {
        let json =
            format!(r#"{{"drive_id":"d","path_on_host":"p","is_root_device":false,{field}}}"#);
        let message = bad::<Drive>(&json);
        assert!(message.contains(part), "{field}: {message}");
    }
    for id in ["", "a/b", "a-b", "ü", &"x".repeat(65)] {
        let json = format!(r#"{{"drive_id":"{id}","path_on_host":"p","is_root_device":false}}"#);
        assert!(bad::<Drive>(&json).contains("drive_id: "), "{id}");
    }
    assert!(bad::<Drive>(r#"{"drive_id":"d","is_root_device":false}"#).contains("path_on_host"));
    let words =
        r#"{"drive_id":"d","path_on_host":"p","is_root_device":true,"partuuid":"a init=/x"}"#;
    assert!(bad::<Drive>(words).contains("partuuid: "));
}

#[test]
fn vsock_bounds() {
    for cid in ["2", "4294967295", "-3", "4294967299"] {
        let json = format!(r#"{{"guest_cid":{cid},"uds_path":"v"}}"#);
        assert!(bad::<Vsock>(&json).contains("guest_cid: "), "{cid}");
    }
    let path = |n| format!(r#"{{"guest_cid":3,"uds_path":"{}"}}"#, "x".repeat(n));
    good::<Vsock>(&path(96));
    assert!(bad::<Vsock>(&path(97)).contains("uds_path: 97 bytes"));
}

#[test]
fn small_documents() {
    assert!(!good::<Balloon>(r#"{"amount_mib":0,"deflate_on_oom":true}"#).free_page_hinting);
    assert!(bad::<Balloon>(r#"{"amount_mib":0}"#).contains("deflate_on_oom"));
    assert!(bad::<Balloon>(r#"{"amount_mib":-1,"deflate_on_oom":true}"#).contains("amount_mib: "));
    assert!(good::<HintingStart>("{}").acknowledge_on_stop);
    assert_eq!(good::<Console>("{}"), Console::default());
    assert!(bad::<Console>(r#"{"scrollback_bytes":1048577}"#).contains("scrollback_bytes: "));
    assert!(bad::<Entropy>(r#"{"rate_limiter":{}}"#).contains("rate_limiter: not offered"));
    assert!(bad::<Serial>(r#"{"rate_limiter":{}}"#).contains("rate_limiter: not offered"));
    let logger: Logger = good(r#"{"level":"WARN","show_level":true}"#);
    assert_eq!(logger.level, Some(crate::log::Level::Warn));
    assert!(bad::<Logger>(r#"{"level":"loud"}"#).contains("level: "));
    assert!(bad::<Metrics>("{}").contains("metrics_path"));
}

#[test]
fn balloon_statistics_leave_out_what_the_guest_did_not_say() {
    let mut stats = BalloonStats {
        target_pages: 256,
        actual_pages: 256,
        target_mib: 1,
        actual_mib: 1,
        ..BalloonStats::default()
    };
    assert!(stats.guest.set(4, 77));
    assert!(!stats.guest.set(16, 1));
    assert_eq!(
        serde_json::to_string(&stats).unwrap(),
        r#"{"target_pages":256,"actual_pages":256,"target_mib":1,"actual_mib":1,"free_memory":77}"#
    );
}

#[test]
fn a_whole_document_is_read_back_as_it_was_shown() {
    let config: VmConfig = good(
        r#"{"boot-source":{"kernel_image_path":"/k","initrd_path":"/i","boot_args":"quiet"},
            "machine-config":{"vcpu_count":2,"mem_size_mib":256},
            "drives":[{"drive_id":"a","path_on_host":"/a","is_root_device":true,"serial":"s"}],
            "vsock":{"guest_cid":3,"uds_path":"/v","vsock_id":"v"},
            "entropy":{},"balloon":{"amount_mib":1,"deflate_on_oom":false},
            "serial":{"serial_out_path":"/s"},"console":{"socket_path":"/c"},
            "logger":{"level":"Debug"},"metrics":{"metrics_path":"fd:m"},
            "network-interfaces":[],"cpu-config":null,"mmds-config":null,"pmem":[]}"#,
    );
    let shown = serde_json::to_string(&config).unwrap();
    assert_eq!(good::<VmConfig>(&shown), config);
    assert_eq!(good::<VmConfig>("{}"), VmConfig::default());
}

#[test]
fn what_a_document_may_not_have_is_named() {
    for (json, part) in [
        (
            r#"{"network-interfaces":[{"iface_id":"e"}]}"#,
            "network-interfaces: not offered",
        ),
        (r#"{"mmds-config":{}}"#, "mmds-config: not offered"),
        (r#"{"cpu-config":"t.json"}"#, "cpu-config: not offered"),
        (r#"{"pmem":[{}]}"#, "pmem: not offered"),
        (r#"{"memory-hotplug":{}}"#, "memory-hotplug: not offered"),
        (r#"{"machine_config":{}}"#, "machine_config"),
        (
            r#"{"drives":[{"drive_id":"d","path_on_host":3,"is_root_device":true}]}"#,
            "drives[0].path_on_host",
        ),
        (
            r#"{"machine-config":{"vcpu_count":0,"mem_size_mib":128}}"#,
            "machine-config: vcpu_count: 0",
        ),
        (r"{} {}", "after the JSON document"),
        (r"[", "EOF"),
    ] {
        let message = bad::<VmConfig>(json);
        assert!(message.contains(part), "{json}: {message}");
    }
}

#[test]
fn opening_says_what_is_wrong_and_never_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| Source::Path(dir.path().join(name));
    let fds = Descriptors::default();
    let message =
        |source: &Source, expect| fds.open("field", source, expect).unwrap_err().to_string();
    assert!(message(&path("none"), Expect::ReadFile).contains("No such file"));
    std::fs::create_dir(dir.path().join("dir")).unwrap();
    assert!(message(&path("dir"), Expect::ReadDisk).contains("is a directory"));
    assert!(message(&path("dir"), Expect::WriteDisk).contains("directory"));
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        dir.path().join("fifo"),
        rustix::fs::Mode::RWXU,
    )
    .unwrap();
    assert!(message(&path("fifo"), Expect::ReadFile).contains("a FIFO"));
    assert!(message(&Source::Fd("x".into()), Expect::ReadFile).contains("--fd x=N"));
    fds.open("field", &path("fifo"), Expect::Output).unwrap();
    fds.open("field", &path("log"), Expect::Output).unwrap();
    assert!(dir.path().join("log").exists());
}

#[test]
fn the_table_of_descriptors_is_bounded() {
    let mut fds = Descriptors::default();
    let file = || std::os::fd::OwnedFd::from(tempfile::tempfile().unwrap());
    for i in 0..Descriptors::MAX {
        assert!(fds.insert(i.to_string(), file()));
    }
    assert!(!fds.insert("more".into(), file()));
    assert!(fds.insert("0".into(), file()));
    fds.clear();
    assert!(!fds.contains("0"));
}

proptest! {
    #[test]
    fn any_text_is_survived(text in ".{0,200}") {
        let _ = parse::<VmConfig>(text.as_bytes());
        let _ = parse::<Drive>(text.as_bytes());
    }

    /// A field that does not exist is refused everywhere, by its name.
    #[test]
    fn unknown_fields_are_named(name in "zz[a-z_]{1,20}") {
        let field = format!("{{\"{name}\":1}}");
        prop_assert!(bad::<VmConfig>(&field).contains(&name));
        prop_assert!(bad::<MachineConfig>(&field).contains(&name));
        prop_assert!(bad::<BootSource>(&field).contains(&name));
        prop_assert!(bad::<Drive>(&field).contains(&name));
        prop_assert!(bad::<Vsock>(&field).contains(&name));
        prop_assert!(bad::<Entropy>(&field).contains(&name));
        prop_assert!(bad::<Balloon>(&field).contains(&name));
        prop_assert!(bad::<Serial>(&field).contains(&name));
        prop_assert!(bad::<Console>(&field).contains(&name));
        prop_assert!(bad::<Logger>(&field).contains(&name));
        prop_assert!(bad::<Metrics>(&field).contains(&name));
    }
}

#[test]
fn outputs_handed_over_as_descriptors_never_block() {
    use rustix::fs::{OFlags, fcntl_getfl};
    let (_reader, pipe) = rustix::pipe::pipe().unwrap();
    let (_peer, socket) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut fds = Descriptors::default();
    fds.insert("pipe".into(), pipe.try_clone().unwrap());
    fds.insert("socket".into(), socket.into());
    for name in ["pipe", "socket"] {
        let output = fds
            .open("log_path", &Source::Fd(name.into()), Expect::Output)
            .unwrap();
        let written = std::iter::repeat_with(|| rustix::io::write(&output, &[0; 4096]))
            .take(1024)
            .find(Result::is_err);
        assert_eq!(written, Some(Err(rustix::io::Errno::AGAIN)), "{name}");
    }
    assert!(
        !fcntl_getfl(&pipe).unwrap().contains(OFlags::NONBLOCK),
        "the others who have the pipe keep it as it was"
    );
}
