//! `belljar doctor` and help.

use belljar_e2e::User;

#[test]
fn a_machine_that_can_run_guests_passes() {
    let user = User::new();
    let said = user.says(&["doctor"]);
    assert_eq!(said.code(), 0, "{}", said.text());
    // Its output is a pipe here, so it is JSON.
    let report: serde_json::Value = serde_json::from_slice(&said.out).unwrap();
    assert_eq!(report["ok"], true);
    let names: Vec<&str> = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|check| check["name"].as_str())
        .collect();
    for name in [
        "processor",
        "/dev/kvm",
        "guest kernel",
        "VMM",
        "state directory",
        "sandboxes",
    ] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
}

#[test]
fn every_failed_check_has_a_remedy_and_the_status_tells() {
    let user = User::new();
    let assets = user.home().join("empty");
    let assets = assets.to_string_lossy();
    let said = user.says(&[
        "doctor",
        "--assets",
        &assets,
        "--vmm",
        "/no/such/vmm",
        "--output",
        "json",
    ]);
    assert_eq!(said.code(), 1);
    let report: serde_json::Value = serde_json::from_slice(&said.out).unwrap();
    let failed: Vec<_> = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|check| check["verdict"] == "failed")
        .collect();
    assert!(failed.len() >= 5, "{failed:?}");
    for check in failed {
        assert_ne!(check["remedy"], "", "{check}");
    }
}

#[test]
fn a_user_without_the_right_to_kvm_is_told_what_to_do() {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata("/dev/kvm").unwrap().permissions().mode();
    if mode & 0o006 != 0 || !rustix::process::geteuid().is_root() {
        eprintln!(
            "skipped: everybody may use /dev/kvm here, or the test cannot become another user"
        );
        return;
    }
    let user = User::new();
    std::fs::set_permissions(user.home(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let belljar = belljar_e2e::bin_dir().join("belljar");
    let mut command = std::process::Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(belljar)
        .args(["doctor", "--output", "table"])
        .env("BELLJAR_STATE", user.home().join("other"))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let said = belljar_e2e::Running::start(&mut command).wait();
    assert_eq!(said.code(), 1);
    assert!(said.text().contains("usermod -aG kvm"), "{}", said.text());
}

#[test]
fn help_teaches_by_examples() {
    let user = User::new();
    for arguments in [vec!["--help"], vec!["run", "--help"]] {
        let said = user.says(&arguments);
        assert_eq!(said.code(), 0);
        let text = said.text();
        assert!(
            text.contains("Examples:") && text.contains("belljar run --"),
            "{text}"
        );
    }
    let said = user.says(&["--version"]);
    assert_eq!(said.code(), 0);
    assert!(said.text().starts_with("belljar "));
}
