//! Runs README's example word for word against a real sshd, in a private mount namespace.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by a panic, and tells its figures"
)]

mod stage;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use stage::Stage;
use stage::manifest::{Manifest, assert_same};

/// README's first fenced block.
fn example() -> String {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let readme = fs::read_to_string(readme).expect("README.md");
    let (_, rest) = readme.split_once("```sh\n").expect("a fenced example");
    let (example, _) = rest.split_once("```").expect("the fence closes");
    example.to_owned()
}

/// What a new machine has before the first line is typed: `ssh backup.example` works, and there is
/// something to back up. The folders that the example names are laid over with our own, where only
/// this script and what it starts see them.
const SETTING: &str = r#"
set -eu
for folder in /etc/sprat /home /root/.ssh; do mkdir -p "$folder"; done
mount --bind "$STAGE/etc" /etc/sprat
mount --bind "$STAGE/source" /home
mount --bind "$STAGE/ssh" /root/.ssh
cd "$STAGE/work"
PATH="$STAGE/bin:$PATH"
"#;

#[test]
fn readme_example_works_as_it_stands() {
    sprat_testkit::requires!(stage::missing(), sprat_testkit::needs::program("unshare"));
    let stage = Stage::new();
    for name in ["etc", "ssh", "bin", "work"] {
        fs::create_dir(stage.path(name)).unwrap();
    }
    fs::copy(stage.sshd.path("ssh_config"), stage.path("ssh/config")).unwrap();
    std::os::unix::fs::symlink(stage::SPRAT, stage.path("bin/sprat")).unwrap();
    fs::create_dir_all(stage.path("source/anna/thesis")).unwrap();
    fs::write(
        stage.path("source/anna/thesis/chapter 1"),
        "It was a dark night.\n",
    )
    .unwrap();
    let should = Manifest::of(&stage.path("source/anna/thesis"));

    let made = ["/etc/sprat", "/root/.ssh"].map(|folder| (folder, !Path::new(folder).exists()));
    let back = stage.path("back");
    // The one place that a reader would choose, and that isn't ours to write to.
    let script = example().replace("/tmp/back", &back.display().to_string());
    assert_ne!(script, example(), "the example restores to /tmp/back");
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "bash", "-euc"])
        .arg(format!("{SETTING}{script}"))
        .env("STAGE", stage.path(""))
        .env("SPRAT_STATE_DIR", stage.path("state"))
        .env("SPRAT_RUNTIME_DIR", stage.path("run"))
        .env("SPRAT_CACHE_DIR", stage.path("cache"))
        .env("SPRAT_RESERVE_BYTES", "0")
        .stdin(Stdio::null());
    let output = stage::run_within(&mut command, Duration::from_secs(200));
    for (folder, was_made) in made {
        if was_made {
            let _ = fs::remove_dir(folder);
        }
    }
    assert!(
        output.status.success(),
        "{}",
        stage::shown(&command, &output)
    );

    assert_same(&should, &back.join("thesis"), "what came back");
    let sheet = fs::read_to_string(stage.path("work/recovery-sheet.txt")).unwrap();
    assert!(
        sheet.contains("cryptsetup"),
        "the sheet names the stock commands: {sheet}"
    );
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(listed.contains("home"), "snapshots are listed: {listed}");
    stage.assert_nothing_is_left(Duration::from_secs(20));
}
