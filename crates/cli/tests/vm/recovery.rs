//! Recovery without sprat: the recovery sheet's commands, typed as printed, and those of docs/recovery.md, in
//! a rescue system on a real kernel with dm-crypt, sshfs and mount. Then sprat continues with what
//! stock tools wrote.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::qemu::guest;
use crate::qemu::{Guest, OpenWith, Owner, SERVER, Sheet};
use sprat_testkit::client_and_server::FileSystem;
use sprat_testkit::dice::Dice;
use sprat_testkit::manifest::{Manifest, assert_same};
use sprat_testkit::power::Power;
use sprat_testkit::recorder::Recorder;
use sprat_testkit::source_tree::{self, Shape};
use sprat_testkit_session::plain_volume::PlainVolume;

/// What the person in the rescue system does beyond the sheet, to leave something on the volume.
const WRITE_BY_HAND: &str = r#"
mount -o remount,rw "$volume"
mkdir "$volume/by-hand"
cp -a /usr/bin "$volume/by-hand/programs"
head -c 5000000 /dev/urandom >"$volume/by-hand/noise"
ln "$volume/by-hand/noise" "$volume/by-hand/noise too"
(cd "$volume/by-hand" && find . -type f ! -name sums -print0 | xargs -0 sha256sum >sums)
"#;

/// Each is compared eleven times in a guest without KVM.
const FILES_SHORT: u64 = 300;
const FILES_LONG: u64 = 5_000;

const CHEAP: &str = "--cheap-kdf-for-tests";

#[test]
fn sheet_restores_snapshots_on_a_stock_kernel_and_sprat_continues() {
    sprat_testkit::requires!(crate::qemu::missing(), FileSystem::Btrfs.missing());
    let begun = Instant::now();
    let mut owner = Owner::new(&["laptop", "other"]);
    make_source(&owner);
    let sheet_of_btrfs = owner.init_with("other", FileSystem::Btrfs);
    // The key derivation that a user gets.
    let sheet = owner.init("laptop");
    let owner = &owner;
    let mut guest = Guest::new(owner);
    guest::give_sprat(owner);

    owner.backup("laptop");
    guest.expect_latest("one-snapshot");
    guest.expect_snapshot("several-snapshots");
    owner.keep_state("laptop", "one-snapshot");
    guest.recover("one-snapshot", &sheet, OpenWith::RecoveryKey);

    several_snapshots(owner, &mut guest);
    guest.recover("several-snapshots", &sheet, OpenWith::KeyFile);

    with_much(owner, 5, || kill_a_backup_half_way(owner, "laptop"));
    guest.expect_as_in("several-snapshots", "killed");
    owner.keep_state("laptop", "killed");
    guest.recover("killed", &sheet, OpenWith::KeyFile);

    // The commands are those of docs/recovery.md.
    let docs = [0, 1].map(|block| Sheet::of_the_docs(owner, "laptop", block));
    with_much(owner, 6, || {
        a_backup_with_lines_cut(owner);
        guest.expect_latest("lines-cut");
    });
    owner.keep_state("laptop", "lines-cut");
    guest.recover("lines-cut", &docs[0], OpenWith::KeyFile);

    owner.backup("laptop");
    guest.expect_latest("pruned");
    owner.ok(&["prune", "laptop", "--job", "job-laptop", "--keep-last", "1"]);
    for (way, arguments) in TRIMS {
        trimmed(owner, way, arguments);
        guest.expect_as_in("pruned", way);
        // The last of them is grown, too.
        let (first, then) = match way {
            "trimmed-by-rewrite" => (grow(owner), GROWN),
            _ => (String::new(), ""),
        };
        guest.recover_after(&first, way, &sheet, OpenWith::KeyFile, then);
    }

    // The journal is replayed as docs/recovery.md has it.
    cut_the_power_until_blocks_are_lost(owner);
    owner.keep_state("laptop", "power-cut");
    guest.expect_as_in("pruned", "power-cut");
    guest.recover("power-cut", &docs[1], OpenWith::KeyFile);

    on_btrfs(owner, &mut guest);
    let modules = "modprobe xxhash_generic; modprobe btrfs";
    guest.recover_after(
        modules,
        "killed-on-btrfs",
        &sheet_of_btrfs,
        OpenWith::KeyFile,
        "",
    );

    // The container itself with other keys, and what the person does to it.
    let new_sheet = other_keys(owner);
    owner.backup("laptop");
    guest.expect_latest("now");
    fs::hard_link(owner.container("laptop"), owner.state("now")).unwrap();
    guest.recover_after("", "now", &new_sheet, OpenWith::RecoveryKey, WRITE_BY_HAND);

    let prepared = begun.elapsed();
    guest.run(Duration::from_secs(1200));
    let recovered = begun.elapsed() - prepared;

    sprat_reads_what_was_written_by_hand(owner);
    let back = owner.restore("laptop");
    assert_same(&Manifest::of(&owner.source()), &back, "after all");
    let file = owner.container("laptop");
    PlainVolume::export(&file, &owner.key_file("laptop"), &owner.path("plain")).assert_clean();
    owner.assert_nothing_is_left();
    println!(
        "prepared in {prepared:.1?}, in the guest {recovered:.1?}, all {:.1?}",
        begun.elapsed()
    );
}

/// Files, most of them small, and everything that is no plain file. `SPRAT_TORTURE_ROUNDS` asks for the long form.
fn make_source(owner: &Owner) {
    let files = match std::env::var("SPRAT_TORTURE_ROUNDS") {
        Ok(_) => FILES_LONG,
        Err(_) => FILES_SHORT,
    };
    let shape = Shape {
        small_files: files,
        middle_files: 30,
        large_files: 0,
    };
    source_tree::make(&owner.source().join("plain"), shape, 20_261_124);
    let made = Manifest::of(&owner.source()).files().0;
    assert!(made as u64 > files, "{made}");
}

/// The files change in between; the older snapshots are compared in their places, too.
fn several_snapshots(owner: &Owner, guest: &mut Guest<'_>) {
    for round in 0..2 {
        change(owner, round);
        std::thread::sleep(Duration::from_millis(1100));
        owner.backup("laptop");
        if round == 0 {
            guest.expect_snapshot("several-snapshots");
        }
    }
    guest.expect_latest("several-snapshots");
    owner.keep_state("laptop", "several-snapshots");
}

/// Two snapshots in the container with btrfs, and a backup that is killed.
fn on_btrfs(owner: &Owner, guest: &mut Guest<'_>) {
    owner.backup("other");
    guest.expect_snapshot("killed-on-btrfs");
    change(owner, 2);
    std::thread::sleep(Duration::from_millis(1100));
    owner.backup("other");
    guest.expect_latest("killed-on-btrfs");
    with_much(owner, 8, || kill_a_backup_half_way(owner, "other"));
    owner.keep_state("other", "killed-on-btrfs");
}

/// Each way to give space back, and how it is asked for.
const TRIMS: [(&str, &[&str]); 3] = [
    ("trimmed-locally", &[]),
    ("trimmed-by-shell", &[]),
    ("trimmed-by-rewrite", &["--rewrite"]),
];

/// A copy of the container is trimmed: much of it is free since a snapshot was dropped.
fn trimmed(owner: &Owner, way: &str, arguments: &[&str]) {
    owner.keep_state("laptop", way);
    let blocks = || fs::metadata(owner.state(way)).unwrap().blocks();
    let before = blocks();
    let path = owner.state(way).display().to_string();
    let (target, route) = match way {
        "trimmed-locally" => (path, "local_punch"),
        _ => (
            format!("ssh://root@{SERVER}:{}{path}", owner.sshd.port()),
            if arguments.is_empty() {
                "shell_punch"
            } else {
                "rewrite"
            },
        ),
    };
    let key = owner.key_file("laptop").display().to_string();
    let words = ["--json", "--key-file", &key, "trim", &target];
    let output = owner.ok(&[&words[..], arguments].concat());
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["trim"]["route"], route, "{said}");
    let given_back = (before - blocks()) * 512;
    assert!(
        given_back > 10 << 20,
        "{way}: {given_back} bytes given back"
    );
}

/// In the guest: growing needs CAP_SYS_RESOURCE, which a container may lack.
fn grow(owner: &Owner) -> String {
    let target = format!(
        "ssh://root@{SERVER}:{}{}",
        owner.sshd.port(),
        owner.container("laptop").display()
    );
    let key = owner.key_file("laptop").display().to_string();
    format!(
        "SPRAT_RESERVE_BYTES=0 SPRAT_STATE_DIR=/run/state SPRAT_RUNTIME_DIR=/run/sprat \\\n\
         SPRAT_CACHE_DIR=/run/cache sprat --quiet --quiet-time 1 --connections 2 --key-file '{key}' grow '{target}' 6G"
    )
}

const GROWN: &str = r#"
size=$(df --output=size -BM "$volume" | tail -n1 | tr -dc 0-9)
[ "$size" -gt 5000 ] || { echo "it has $size MiB"; exit 1; }
"#;

/// A new recovery key instead of the old one; the sheet is printed again from the new key.
fn other_keys(owner: &Owner) -> Sheet {
    let made = owner.sheet("laptop", &[CHEAP, "key", "add", "laptop", "--new-recovery"]);
    let listed = owner.ok(&["--json", "key", "list", "laptop"]);
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let keys = listed["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 3, "{listed}");
    // Made by init, behind the key file's.
    assert_eq!(keys[1]["kind"], "recovery", "{listed}");
    owner.ok(&["key", "remove", "laptop", &keys[1]["slot"].to_string()]);
    let typed = owner.path("typed");
    fs::write(&typed, made.recovery_key()).unwrap();
    let typed = typed.display().to_string();
    owner.sheet(
        "laptop",
        &["--passphrase-file", &typed, "key", "sheet", "laptop"],
    )
}

/// Some files of the source are new, others gone, others changed with length and time kept apart.
fn change(owner: &Owner, round: u64) {
    let dice = &mut Dice::new(round + 77);
    let folder = owner.source().join(format!("round {round}"));
    fs::create_dir(&folder).unwrap();
    for number in 0..20 {
        let len = dice.below(50_000);
        fs::write(
            folder.join(format!("new {number}")),
            source_tree::random(dice, len),
        )
        .unwrap();
    }
    let plain = owner.source().join("plain/small/000");
    fs::remove_file(plain.join(format!("small file {round}"))).unwrap();
    fs::write(plain.join(format!("small file {}", 100 + round)), "changed").unwrap();
}

/// Runs with 24 MiB more in the source, so that there is time for what happens to a backup.
fn with_much(owner: &Owner, seed: u64, run: impl FnOnce()) {
    let dice = &mut Dice::new(seed);
    let folder = owner.source().join("much");
    fs::create_dir(&folder).unwrap();
    for number in 0..24 {
        let content = source_tree::random(dice, 1 << 20);
        fs::write(folder.join(format!("{number}")), content).unwrap();
    }
    run();
    fs::remove_dir_all(&folder).unwrap();
}

/// A container's size on the server's disk.
fn allocated(owner: &Owner, name: &str) -> u64 {
    fs::metadata(owner.container(name)).unwrap().blocks() * 512
}

/// Every connection is cut twice while bytes are on their way; the backup ends well all the same.
fn a_backup_with_lines_cut(owner: &Owner) {
    let before = allocated(owner, "laptop");
    let mut backup = owner.sprat(&["backup", "job-laptop"]).spawn().unwrap();
    for mebibytes in [3, 10] {
        while allocated(owner, "laptop") < before + (mebibytes << 20) {
            assert!(
                backup.try_wait().unwrap().is_none(),
                "the backup ended before its line was cut"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        owner.sshd.kill_sessions();
    }
    assert!(backup.wait().unwrap().success());
}

/// An fsync that the server still answered before its power was cut may have left nothing to lose; then another backup
/// is begun.
fn cut_the_power_until_blocks_are_lost(owner: &Owner) {
    for seed in 7..12 {
        let mut lost = 0;
        with_much(owner, seed, || lost = a_backup_with_the_power_cut(owner));
        println!("the server lost {lost} blocks");
        if lost > 0 {
            return;
        }
    }
    panic!("no power cut lost a block");
}

/// The client is killed and the server loses its power: the file becomes what the disk had, some
/// unsynced writes being lost. Returns how many blocks these had.
fn a_backup_with_the_power_cut(owner: &Owner) -> usize {
    let mut power = Power::begin(&owner.container("laptop"), &owner.path("sure")).unwrap();
    let recorder = Recorder::start(&owner.server(), "laptop.luks").unwrap();
    let ssh = recorder.ssh_command(&owner.path("")).unwrap();
    let ssh = ssh[0].to_str().unwrap().to_owned();
    let small = ["--write-buffer-bytes-max", "2097152"];
    let words = [
        &["--ssh-command", &ssh],
        &small[..],
        &["backup", "job-laptop"],
    ]
    .concat();
    let mut backup = owner.sprat(&words).spawn().unwrap();
    while recorder.now() < 40 || power.unsure() < 8 {
        assert!(
            backup.try_wait().unwrap().is_none(),
            "the backup ended before the power cut"
        );
        power.advance(&recorder.log()).unwrap();
    }
    backup.kill().unwrap();
    // Half of what is not sure is kept, about.
    let seed = (0..)
        .find(|seed| sprat_testkit::power::keep_percent(*seed) == 50)
        .unwrap();
    let lost = recorder.cut_power(&mut power, seed).unwrap();
    backup.wait().unwrap();
    owner.assert_nothing_is_left();
    lost
}

/// Every process of a session is killed at once while its bytes are on their way.
fn kill_a_backup_half_way(owner: &Owner, name: &str) {
    let before = allocated(owner, name);
    let job = format!("job-{name}");
    let mut backup = owner.sprat(&["backup", &job]).spawn().unwrap();
    while allocated(owner, name) < before + (6 << 20) {
        assert!(
            backup.try_wait().unwrap().is_none(),
            "the backup ended before it was killed"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let processes = owner.processes();
    for process in &processes {
        if let Some(pid) = rustix::process::Pid::from_raw(process.pid) {
            // One may have ended because another was killed.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    backup.wait().unwrap();
    assert!(processes.len() >= 4, "{processes:?}");
    println!(
        "killed {} processes after {} bytes",
        processes.len(),
        allocated(owner, name) - before
    );
    owner.assert_nothing_is_left();
}

/// The guest wrote to the container: the state kept here is outdated. sprat reports that, and reads
/// what the guest wrote.
fn sprat_reads_what_was_written_by_hand(owner: &Owner) {
    let output = owner.ok(&["--json", "snapshots", "laptop"]);
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        printed.contains("\"notice\":\"cache_outdated\""),
        "{printed}"
    );
    let folder = owner.path("mounted");
    fs::create_dir(&folder).unwrap();
    let shown = folder.display().to_string();
    let output = owner.ok(&["mount", "laptop", &shown]);
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(printed.contains("The local cache is outdated"), "{printed}");
    let check = "cd \"$0/by-hand\" && sha256sum --quiet -c sums && wc -l <sums";
    let checked = sprat_testkit::program::system("bash", &["-c", check, &shown]);
    assert!(checked.trim().parse::<u32>().unwrap() > 50, "{checked}");
    owner.ok(&["umount", &shown]);
    owner.backup("laptop");
    let output = owner.ok(&["--json", "snapshots", "laptop"]);
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!printed.contains("cache_outdated"), "{printed}");
}
