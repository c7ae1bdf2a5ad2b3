//! Everything back without sprat: the recovery sheet's commands, typed as printed, and those of docs/recovery.md, in
//! a rescue system on a real kernel with dm-crypt, sshfs and mount; then sprat goes on with what stock tools wrote.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by a panic, and tells its figures"
)]

mod stage;
mod vm;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use sprat_testkit::dice::Dice;
use sprat_testkit::power::Power;
use sprat_testkit::recorder::Recorder;
use stage::manifest::{Manifest, assert_same};
use stage::plain::PlainVolume;
use stage::tree::{self, Shape};
use vm::{Guest, OpenWith, Owner, Sheet};

/// What the person in the rescue system does beyond the sheet, to leave something on the volume.
const WRITE_BY_HAND: &str = r#"
mkdir "$volume/by-hand"
cp -a /usr/bin "$volume/by-hand/programs"
head -c 20000000 /dev/urandom >"$volume/by-hand/noise"
ln "$volume/by-hand/noise" "$volume/by-hand/noise too"
(cd "$volume/by-hand" && find . -type f ! -name sums -print0 | xargs -0 sha256sum >sums)
"#;

#[test]
fn sheet_brings_every_snapshot_back_on_a_stock_kernel_and_sprat_goes_on_after_it() {
    if vm::not_asked_for() {
        return;
    }
    sprat_testkit::requires!(vm::missing());
    let begun = Instant::now();
    let owner = Owner::new(&["fresh", "many", "killed", "cut", "power"]);
    let mut guest = Guest::new(&owner);
    for number in 0..3 {
        let odd = owner.source().join(format!("odd {number}"));
        fs::create_dir(&odd).unwrap();
        sprat_testkit::tree::make_odd_tree(&odd).unwrap();
    }
    let shape = Shape {
        small_files: 5_000,
        middle_files: 60,
        large_files: 1,
    };
    tree::make(&owner.source().join("plain"), shape, 20_261_124);
    assert!(Manifest::of(&owner.source()).files().0 > 5_000);

    // One snapshot, and the key derivation that a user gets.
    let fresh = owner.init("fresh", &[]);
    owner.backup("fresh");
    guest.expect_latest("fresh");
    guest.recover(&fresh, OpenWith::RecoveryKey, "");

    // A session that is killed half way, after one that was not.
    let killed = owner.init("killed", &["--cheap-kdf-for-tests"]);
    owner.backup("killed");
    guest.expect_latest("killed");
    kill_a_backup_half_way(&owner);
    guest.recover(&killed, OpenWith::KeyFile, "");

    // A session whose lines were cut; the commands are those of docs/recovery.md.
    owner.init("cut", &["--cheap-kdf-for-tests"]);
    a_backup_with_lines_cut(&owner);
    guest.expect_latest("cut");
    guest.recover(&Sheet::of_the_docs(&owner, "cut", 0), OpenWith::KeyFile, "");

    // The server's power was cut during a session; the journal is replayed as docs/recovery.md has it.
    owner.init("power", &["--cheap-kdf-for-tests"]);
    owner.backup("power");
    guest.expect_latest("power");
    a_backup_with_the_power_cut(&owner);
    guest.recover(
        &Sheet::of_the_docs(&owner, "power", 1),
        OpenWith::KeyFile,
        "",
    );

    // Several snapshots, the files changing in between; each is looked at in its place, too.
    let many = owner.init("many", &["--cheap-kdf-for-tests"]);
    for round in 0..4 {
        change(&owner, round);
        owner.backup("many");
        guest.expect_snapshot("many");
        std::thread::sleep(Duration::from_millis(1100));
    }
    guest.expect_latest("many");
    guest.recover(&many, OpenWith::KeyFile, "");
    guest.recover_writing(&many, WRITE_BY_HAND);

    let prepared = begun.elapsed();
    guest.run(Duration::from_secs(1200));
    let recovered = begun.elapsed() - prepared;

    sprat_reads_what_was_written_by_hand(&owner);
    for container in ["many", "killed"] {
        owner.backup(container);
        let back = owner.restore(container);
        assert_same(&Manifest::of(&owner.source()), &back, container);
        let file = owner.container(container);
        let plain = PlainVolume::export(&file, &owner.key_file(container), &owner.path("plain"));
        plain.assert_clean();
    }
    owner.assert_nothing_is_left(Duration::from_secs(20));
    println!(
        "prepared in {prepared:.1?}, in the guest {recovered:.1?}, all {:.1?}",
        begun.elapsed()
    );
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
            tree::random(dice, len),
        )
        .unwrap();
    }
    let plain = owner.source().join("plain/small/000");
    fs::remove_file(plain.join(format!("small file {round}"))).unwrap();
    fs::write(plain.join(format!("small file {}", 100 + round)), "changed").unwrap();
}

/// Adds 40 MiB to the source, so that there is time for what happens to a backup.
fn add_much(owner: &Owner, name: &str, seed: u64) {
    let dice = &mut Dice::new(seed);
    let folder = owner.source().join(name);
    fs::create_dir(&folder).unwrap();
    for number in 0..40 {
        let content = tree::random(dice, 1 << 20);
        fs::write(folder.join(format!("{number}")), content).unwrap();
    }
}

fn allocated(owner: &Owner, container: &str) -> u64 {
    fs::metadata(owner.container(container)).unwrap().blocks() * 512
}

/// Every connection is cut twice while bytes are on their way; the backup ends well all the same.
fn a_backup_with_lines_cut(owner: &Owner) {
    let mut backup = owner
        .sprat(&["--quiet-time", "1", "backup", "job-cut"])
        .spawn()
        .unwrap();
    for mebibytes in [6, 20] {
        while allocated(owner, "cut") < mebibytes << 20 && backup.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(
            backup.try_wait().unwrap().is_none(),
            "the backup ended before its line was cut"
        );
        owner.sshd.kill_sessions();
    }
    assert!(backup.wait().unwrap().success());
}

/// The client is killed and the server loses its power: the file becomes what the disk had, some
/// unsynced writes being lost.
fn a_backup_with_the_power_cut(owner: &Owner) {
    add_much(owner, "after the power cut", 6);
    let mut power = Power::begin(&owner.container("power"), &owner.path("sure")).unwrap();
    let recorder = Recorder::start(&owner.server(), "power.luks").unwrap();
    let ssh = recorder.ssh_command(&owner.path("")).unwrap();
    let ssh = ssh[0].to_str().unwrap().to_owned();
    let small = ["--write-buffer-bytes-max", "2097152"];
    let words = [
        &["--ssh-command", &ssh],
        &small[..],
        &["backup", "job-power"],
    ]
    .concat();
    let mut backup = owner.sprat(&words).spawn().unwrap();
    let before = allocated(owner, "power");
    while allocated(owner, "power") < before + (4 << 20) || power.unsure() < 4 {
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
    println!("the server lost {lost} blocks");
    backup.wait().unwrap();
    owner.assert_nothing_is_left(Duration::from_secs(20));
}

/// Every process of a session is killed at once while its bytes are on their way.
fn kill_a_backup_half_way(owner: &Owner) {
    add_much(owner, "after the kill", 5);
    let allocated = || allocated(owner, "killed");
    let before = allocated();
    let mut backup = owner.sprat(&["backup", "job-killed"]).spawn().unwrap();
    while allocated() < before + (6 << 20) {
        assert!(
            backup.try_wait().unwrap().is_none(),
            "the backup ended before it was killed"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let processes = owner.processes();
    for (pid, _) in &processes {
        if let Some(pid) = rustix::process::Pid::from_raw(*pid) {
            // One may have ended because another was killed.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    backup.wait().unwrap();
    assert!(processes.len() >= 4, "{processes:?}");
    println!(
        "killed {} processes after {} bytes",
        processes.len(),
        allocated() - before
    );
    owner.assert_nothing_is_left(Duration::from_secs(20));
}

fn sprat_reads_what_was_written_by_hand(owner: &Owner) {
    let folder = owner.path("mounted");
    fs::create_dir(&folder).unwrap();
    let shown = folder.display().to_string();
    owner.ok(&["mount", "many", &shown]);
    let check = "cd \"$0/by-hand\" && sha256sum --quiet -c sums && wc -l <sums";
    let checked = stage::system("bash", &["-c", check, &shown]);
    assert!(checked.trim().parse::<u32>().unwrap() > 50, "{checked}");
    owner.ok(&["umount", &shown]);
}
