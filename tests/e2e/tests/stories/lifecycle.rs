//! Sandboxes that outlive the command that made them.

use belljar_e2e::User;

#[test]
fn a_detached_guest_stays_until_it_is_removed() {
    let user = User::new();
    let sandbox = user.sandbox(&[]);
    assert_eq!(sandbox.state(), "running");
    let said = user.says(&["ls", "-q"]);
    said.is(0, &format!("{}\n", sandbox.id()));

    // Not while it runs, unless it is meant.
    let said = sandbox.says("rm", &[]);
    assert_eq!(said.code(), 125);
    said.explains(&["is running", "rm -f"]);

    sandbox
        .says("pause", &[])
        .is(0, &format!("{}\n", sandbox.id()));
    assert_eq!(sandbox.state(), "paused");
    sandbox
        .says("resume", &[])
        .is(0, &format!("{}\n", sandbox.id()));
    assert_eq!(sandbox.state(), "running");

    // It goes away with its guest, which is asked.
    let said = sandbox.says("stop", &[]);
    said.is(0, &format!("{}\n", sandbox.id()));
    assert_eq!(said.err, "");
    user.has_nothing_left();
}
