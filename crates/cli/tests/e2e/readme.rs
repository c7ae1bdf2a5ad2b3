//! Runs README's example word for word against a real sshd, in a root folder as of a new machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::stage::Stage;
use crate::stage::manifest::{Manifest, assert_same};

/// README's first fenced block.
fn example() -> String {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let readme = fs::read_to_string(readme).expect("README.md");
    let (_, rest) = readme.split_once("```sh\n").expect("a fenced example");
    let (example, _) = rest.split_once("```").expect("the fence closes");
    example.to_owned()
}

/// What a new machine has before the first line is typed: this machine's programs, an `/etc` with
/// nothing of sprat's in it, `ssh backup.example` works, and there is something to back up. All of it
/// lies in memory and is seen by this script and what it starts only.
const SETTING: &str = r#"
set -eu
root="$STAGE/root"
mkdir "$root"
mount -t tmpfs -o mode=755 none "$root"
mkdir -m 1777 "$root/tmp"
mkdir -m 700 "$root/root" "$root/root/.ssh"
mkdir -p "$root"/{dev,proc,sys,run,var,home,etc,opt} "$root$STAGE" "$root$SSHD"
for folder in usr bin sbin lib lib32 lib64 libx32; do
    if [ -L "/$folder" ]; then
        cp -P "/$folder" "$root/$folder"
    elif [ -d "/$folder" ]; then
        mkdir "$root/$folder"
        mount --bind -o ro "/$folder" "$root/$folder"
    fi
done
for name in alternatives group hosts ld.so.cache mke2fs.conf nsswitch.conf passwd; do
    if [ -e "/etc/$name" ]; then cp -a "/etc/$name" "$root/etc/$name"; fi
done
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc none "$root/proc"
# The server's key and address, and where the result goes, at the same path.
mount --bind "$STAGE" "$root$STAGE"
mount --bind "$SSHD" "$root$SSHD"
cp "$STAGE/ssh/config" "$root/root/.ssh/config"
cp -a "$STAGE/source/anna" "$root/home/anna"
touch "$root/opt/sprat"
mount --bind "$SPRAT" "$root/opt/sprat"
PATH="/opt:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" exec chroot "$root" \
    /bin/bash -euc 'cd /root; . "$STAGE/example"; cp -a /root/back "$STAGE/back"; cp -a recovery-sheet.txt "$STAGE/"'
"#;

#[test]
fn readme_example_works_as_it_stands_on_a_new_machine() {
    sprat_testkit::requires!(
        crate::stage::missing(),
        sprat_testkit::needs::program("unshare")
    );
    let stage = Stage::new();
    fs::create_dir(stage.path("ssh")).unwrap();
    fs::copy(stage.sshd.path("ssh_config"), stage.path("ssh/config")).unwrap();
    fs::create_dir_all(stage.path("source/anna/thesis")).unwrap();
    fs::write(
        stage.path("source/anna/thesis/chapter 1"),
        "It was a dark night.\n",
    )
    .unwrap();
    let should = Manifest::of(&stage.path("source/anna/thesis"));
    fs::write(stage.path("example"), example()).unwrap();
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "bash", "-euc"])
        .arg(SETTING)
        .env("STAGE", stage.path("x").parent().unwrap())
        .env("SSHD", stage.sshd.folder())
        .env("SPRAT", crate::stage::SPRAT)
        .env("HOME", "/root")
        .stdin(Stdio::null());
    for ours in [
        "SPRAT_STATE_DIR",
        "SPRAT_RUNTIME_DIR",
        "SPRAT_CACHE_DIR",
        "SPRAT_CONFIG_DIR",
        "SPRAT_RESERVE_BYTES",
    ] {
        command.env_remove(ours);
    }
    let output = crate::stage::run_within(&mut command, Duration::from_secs(200));
    assert!(
        output.status.success(),
        "{}",
        crate::stage::shown(&command, &output)
    );

    assert_same(&should, &stage.path("back/thesis"), "what came back");
    let sheet = stage.path("recovery-sheet.txt");
    let mode = fs::metadata(&sheet).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600, "nobody else reads the recovery key");
    let sheet = fs::read_to_string(sheet).unwrap();
    assert!(
        sheet.contains("cryptsetup"),
        "the sheet names the stock commands: {sheet}"
    );
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(listed.contains("home"), "snapshots are listed: {listed}");
    stage.assert_nothing_is_left(Duration::from_secs(20));
}

#[test]
fn a_machine_that_can_not_run_the_trial_is_told_so_before_anything_is_built() {
    use sprat_testkit::needs;
    sprat_testkit::requires!(needs::root(), needs::program("setpriv"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/try");
    // What containers forbid: FUSE and mounts, and sshd's chroot.
    for (capability, named) in [("sys_admin", "SYS_ADMIN"), ("sys_chroot", "SYS_CHROOT")] {
        let ran = Command::new("setpriv")
            .args(["--bounding-set", &format!("-{capability}")])
            .args(["--inh-caps", &format!("-{capability}")])
            .arg(&script)
            .arg("--able")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(!ran.status.success() && said.contains(named), "{said}");
    }
}
