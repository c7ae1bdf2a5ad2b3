//! Everything back without sprat: the recovery sheet's commands, typed as printed, in a rescue system on
//! a real kernel with dm-crypt, sshfs and mount; then sprat goes on with what stock tools wrote.

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
use stage::manifest::{Manifest, assert_same};
use stage::plain::PlainVolume;
use stage::tree::{self, Shape};
use vm::{Guest, OpenWith, Owner};

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
    let owner = Owner::new(&["fresh", "many", "killed"]);
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
    guest.look(&fresh, OpenWith::KeyFile);
    guest.recover(&fresh, OpenWith::RecoveryKey, "");

    // A session that is killed half way, after one that was not.
    let killed = owner.init("killed", &["--cheap-kdf-for-tests"]);
    owner.backup("killed");
    guest.expect_latest("killed");
    kill_a_backup_half_way(&owner);
    guest.recover(&killed, OpenWith::KeyFile, "");
    guest.look(&killed, OpenWith::RecoveryKey);

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
    guest.run(Duration::from_secs(500));
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

/// Every process of a session is killed at once while its bytes are on their way.
fn kill_a_backup_half_way(owner: &Owner) {
    let dice = &mut Dice::new(5);
    let folder = owner.source().join("after the kill");
    fs::create_dir(&folder).unwrap();
    for number in 0..40 {
        fs::write(
            folder.join(format!("{number}")),
            tree::random(dice, 1 << 20),
        )
        .unwrap();
    }
    let container = owner.container("killed");
    let allocated = || fs::metadata(&container).unwrap().blocks() * 512;
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
