//! fio writes to a mounted volume and verifies every block while the connection is cut repeatedly.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use sprat_testkit::client_and_server::{self, ClientAndServer};
use sprat_testkit::dice::Dice;
use sprat_testkit::needs;
use sprat_testkit::program::{run_within, shown};
use sprat_testkit::wire::{Loss, WireOptions};

const LIMIT: Duration = Duration::from_secs(200);

/// Random writes of 4 to 64 KiB past the page cache, each checked afterwards by its checksum.
fn fio(dir: &Path, seed: u64, more: &[&str]) {
    let mut command = Command::new(needs::find_program("fio").unwrap());
    command
        .arg(format!("--directory={}", dir.display()))
        .arg(format!("--randseed={seed}"))
        .args([
            "--name=verified",
            "--numjobs=2",
            "--size=6m",
            "--rw=randwrite",
        ])
        .args(["--bsrange=4k-64k", "--direct=1", "--ioengine=psync"])
        .args([
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ])
        .args(["--fallocate=none", "--output-format=terse"])
        .args(more);
    let output = run_within(&mut command, LIMIT);
    assert!(output.status.success(), "{}", shown(&command, &output));
}

#[test]
fn fio_reads_back_every_block_over_a_cut_connection() {
    sprat_testkit::requires!(client_and_server::missing(), needs::program("fio"));
    let seed = sprat_testkit::dice::seed();
    let mut pair = ClientAndServer::through_wire(WireOptions {
        round_trip: Duration::from_millis(5),
        bytes_per_s: Some(6_000_000),
    });
    pair.init(1);
    let dir = pair.path("mounted");
    std::fs::create_dir(&dir).unwrap();
    let shown_dir = dir.display().to_string();
    let quick = ["--quiet-time", "2"];
    let mount = ["mount", "--rw", pair.target(), &shown_dir];
    pair.ok(&[&quick[..], &mount].concat(), LIMIT);

    let line = pair.connection();
    std::thread::scope(|scope| {
        // fsyncs in between, each of which waits for the server's.
        let writing = scope.spawn(|| fio(&dir, seed, &["--fsync=40"]));
        let mut dice = Dice::new(seed);
        let mut cuts = 0;
        while !writing.is_finished() {
            let before = line.bytes().0;
            let more = (64 << 10) + dice.below(2 << 20);
            while line.bytes().0 < before + more && !writing.is_finished() {
                std::thread::sleep(Duration::from_millis(5));
            }
            // Many times, but not for ever: an epoch must get through in the end.
            if cuts < 7 {
                match dice.below(4) {
                    0 => line.lose(Loss::Silent),
                    1 => line.lose(Loss::ResetLate(Duration::from_millis(500))),
                    _ => line.lose(Loss::Reset),
                }
                cuts += 1;
            }
        }
        writing.join().unwrap();
    });
    let output = pair.ok(&["--json", "umount", &shown_dir], LIMIT);
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let losses = told.pointer("/volume/losses").unwrap().as_u64().unwrap();
    println!("{losses} losses");
    assert!(losses >= 3, "{told}");
    pair.assert_nothing_is_left();

    // And once more by a session that has nothing but the server.
    pair.ok(&[&["--no-cache"][..], &mount].concat(), LIMIT);
    fio(&dir, seed, &["--verify_only"]);
    pair.ok(&["umount", &shown_dir], LIMIT);
    pair.assert_nothing_is_left();
}
