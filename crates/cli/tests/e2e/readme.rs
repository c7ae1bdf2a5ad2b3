//! Runs the commands of README and docs/quick-start.md word for word, in a root folder as of a new machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use sprat_testkit::client_and_server::{self, ClientAndServer};
use sprat_testkit::manifest::{Manifest, assert_same};
use sprat_testkit::tmpfs::SmallDisk;

fn page(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(name);
    fs::read_to_string(path).expect("a page of the repository")
}

/// The fenced blocks of a page that are commands to paste.
fn blocks(page: &str) -> Vec<String> {
    let blocks = page.split("```sh\n").skip(1);
    let ends = blocks.map(|rest| {
        rest.split_once("```")
            .expect("the fence closes")
            .0
            .to_owned()
    });
    ends.collect()
}

/// What a new machine has before the first command: this machine's programs, an `/etc` without any
/// file of sprat's, and something to back up. All of it is in memory, and only this script and its
/// children see it.
const ROOT: &str = r#"
set -eu
root="$STAGE/root"
mkdir "$root"
mount -t tmpfs -o mode=755 none "$root"
mkdir -m 1777 "$root/tmp"
mkdir -m 700 "$root/root" "$root/root/.ssh"
mkdir -p "$root"/{dev,proc,sys,run,var,home,etc,opt,srv} "$root$STAGE"
for folder in usr bin sbin lib lib32 lib64 libx32; do
    if [ -L "/$folder" ]; then
        cp -P "/$folder" "$root/$folder"
    elif [ -d "/$folder" ]; then
        mkdir "$root/$folder"
        mount --bind -o ro "/$folder" "$root/$folder"
    fi
done
for name in alternatives group hosts ld.so.cache login.defs mke2fs.conf nsswitch.conf pam.d passwd security; do
    if [ -e "/etc/$name" ]; then cp -a "/etc/$name" "$root/etc/$name"; fi
done
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc none "$root/proc"
mount --bind "$STAGE" "$root$STAGE"
cp -a "$STAGE/source/anna" "$root/home/anna"
touch "$root/opt/sprat"
mount --bind "$SPRAT" "$root/opt/sprat"
export PATH="/opt:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"#;

/// `ssh backup.example` reaches the test's own sshd: its key and address lie at the same path.
const README: &str = r#"
mkdir -p "$root$SSHD"
mount --bind "$SSHD" "$root$SSHD"
cp "$STAGE/ssh/config" "$root/root/.ssh/config"
exec chroot "$root" /bin/bash -euc '
cd /root
. "$STAGE/example"
cp -a /root/back "$STAGE/back"
cp -a recovery-sheet.txt "$STAGE/"'
"#;

/// The server is the same machine, in a network of its own. `systemctl` starts the sshd. Without systemd
/// the schedule is a file for cron, whose commands are run once.
const QUICK_START: &str = r#"
ip link set lo up
echo "127.0.0.1 backup.example" >> "$root/etc/hosts"
mkdir -p "$root/etc/ssh/sshd_config.d" "$root/etc/systemd/system" "$root/etc/cron.d" "$root/run/sshd"
echo 'root:*:20000:0:99999:7:::' > "$root/etc/shadow"
printf '%s\n' 'Include /etc/ssh/sshd_config.d/*.conf' 'UsePAM yes' \
    'Subsystem sftp internal-sftp' > "$root/etc/ssh/sshd_config"
cat > "$root/opt/systemctl" <<'END'
#!/bin/sh -e
case "$*" in
"reload ssh") /usr/sbin/sshd ;;
*) echo "unknown to this test: systemctl $*"; exit 1 ;;
esac
END
chmod 755 "$root/opt/systemctl"
exec chroot "$root" /bin/bash -euc '
cd /root
ssh-keygen -A > /dev/null
. "$STAGE/example"
sed -n "s/^[0-9,]* . . . . root //p" /etc/cron.d/sprat > /tmp/cron
test "$(wc -l < /tmp/cron)" = 2
sh -e /tmp/cron
cmp /root/restored/ssh/sshd_config /etc/ssh/sshd_config
cp -a recovery-sheet.txt "$STAGE/"'
"#;

/// A client with a home folder to back up.
fn with_anna() -> ClientAndServer {
    let pair = ClientAndServer::new();
    fs::create_dir_all(pair.path("source/anna/thesis")).unwrap();
    fs::write(
        pair.path("source/anna/thesis/chapter 1"),
        "It was a dark night.\n",
    )
    .unwrap();
    pair
}

/// Runs `commands` in namespaces of their own, after `setting`.
fn run_on_a_new_machine(
    pair: &ClientAndServer,
    namespaces: &[&str],
    setting: &str,
    commands: &str,
) -> Output {
    fs::write(pair.path("example"), commands).unwrap();
    let mut command = Command::new("unshare");
    command
        .args(namespaces)
        .args(["--propagation", "private", "bash", "-euc"])
        .arg(format!("{ROOT}{setting}"))
        .env("STAGE", pair.path("x").parent().unwrap())
        .env("SSHD", pair.sshd.folder())
        .env("SPRAT", sprat_testkit::program::sprat())
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
    let output = sprat_testkit::program::run_within(&mut command, Duration::from_secs(200));
    assert!(
        output.status.success(),
        "{}",
        sprat_testkit::program::shown(&command, &output)
    );
    output
}

fn assert_is_a_private_sheet(sheet: &Path) {
    let mode = fs::metadata(sheet).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600, "nobody else reads the recovery key");
    let sheet = fs::read_to_string(sheet).unwrap();
    assert!(
        sheet.contains("cryptsetup"),
        "the sheet names the stock commands: {sheet}"
    );
}

#[test]
fn readme_example_works_as_it_stands_on_a_new_machine() {
    sprat_testkit::requires!(
        client_and_server::missing(),
        sprat_testkit::needs::program("unshare")
    );
    let pair = with_anna();
    fs::create_dir(pair.path("ssh")).unwrap();
    fs::copy(pair.sshd.path("ssh_config"), pair.path("ssh/config")).unwrap();
    let should = Manifest::of(&pair.path("source/anna/thesis"));
    let example = &blocks(&page("README.md"))[0];
    let output = run_on_a_new_machine(&pair, &["--mount"], README, example);

    assert_same(&should, &pair.path("back/thesis"), "what came back");
    assert_is_a_private_sheet(&pair.path("recovery-sheet.txt"));
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(listed.contains("home"), "snapshots are listed: {listed}");
    pair.assert_nothing_is_left();
}

#[test]
fn quick_start_works_as_it_stands_up_to_the_daily_backup() {
    use sprat_testkit::needs;
    sprat_testkit::requires!(
        client_and_server::missing(),
        ["unshare", "useradd", "ip", "ssh-keyscan"]
            .into_iter()
            .find_map(needs::program)
    );
    let pair = with_anna();
    let commands = blocks(&page("docs/quick-start.md")).concat();
    // The one thing that a reader replaces.
    let placeholder = "'ssh-ed25519 AAAA… root@laptop'";
    assert!(commands.contains(placeholder));
    let commands = commands.replace(placeholder, r#""$(cat ~/.ssh/id_ed25519.pub)""#);
    let namespaces = ["--mount", "--net", "--pid", "--fork", "--kill-child"];
    let output = run_on_a_new_machine(&pair, &namespaces, QUICK_START, &commands);

    assert_is_a_private_sheet(&pair.path("recovery-sheet.txt"));
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        listed.contains("Remote working directory: /data"),
        "{listed}"
    );
    pair.assert_nothing_is_left();
}

#[test]
fn trial_reports_missing_needs_before_it_builds() {
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
    let disk = SmallDisk::new("size=16m");
    let ran = Command::new(script)
        .arg("--able")
        .env("CARGO_TARGET_DIR", disk.path().join("target"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(
        !ran.status.success() && said.contains("16 MiB are free"),
        "{said}"
    );
}
