//! Growing, as far as it can be tried where the capability for it may be missing.

use std::fs;

use sprat_testkit::requires;
use sprat_testkit_session::session_harness::{SessionHarness, fill, missing};

#[test]
fn without_the_capability_nothing_is_changed() {
    requires!(missing().or_else(|| sprat_testkit::needs::program("setpriv")));
    let harness = SessionHarness::local();
    harness.create();
    let before = fs::read(harness.container()).unwrap();
    let target = harness.target().to_string();
    // A process with the capability drops it first.
    let mut command = std::process::Command::new("setpriv");
    command.args([
        "--bounding-set",
        "-sys_resource",
        "--inh-caps",
        "-sys_resource",
    ]);
    let sprat = harness.command(&["grow", &target, "1T"]);
    command.arg(sprat.get_program()).args(sprat.get_args());
    for (name, value) in sprat.get_envs() {
        command.env(name, value.unwrap());
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("CAP_SYS_RESOURCE"), "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
    assert!(before == fs::read(harness.container()).unwrap());
    assert_eq!(harness.server_files(), ["x.luks"]);
}

/// What a grow leaves that was killed after its first step.
#[test]
fn a_file_that_is_longer_than_its_file_system_is_used_as_before() {
    requires!(missing());
    let harness = SessionHarness::local();
    harness.create();
    fill(&harness.path("source"), 10, 50_000, 7);
    harness.backup().unwrap();
    let file = harness.container_file();
    file.set_len(harness.size_bytes / 4096 * 4096 + (1 << 30))
        .unwrap();
    harness.restore_and_compare();
    fill(&harness.path("source/more"), 10, 50_000, 8);
    harness.backup().unwrap();
    harness.restore_and_compare();
    harness.assert_clean();
}
