//! Copies end early, or are gone on with after others were there: nothing is lost, nothing is claimed.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::copy_scene::CopyScene;
use sprat_testkit::machine::strikes::{Blow, copy_sparse, missing, same_bytes};
use sprat_testkit::machine::{CONTAINER, Ran};
use sprat_testkit::{leases, needs, requires};

/// Sends Ctrl-C to sprat.
const INTERRUPT: &str = "kill -INT $SPRAT\n";
/// The destination's fsyncs before that of the first pieces: of the lock, and of its folder.
const LOCK_FSYNCS: usize = 2;

impl CopyScene {
    /// `sprat copy` to the server, struck.
    fn copy(&self, more: &[&str], blow: Option<Blow>) -> Ran {
        let to = self.machine.on_line("server/x.luks");
        let mut all = vec!["copy", CONTAINER, &to, "--json"];
        all.extend(more);
        let ran = self.machine.sprat_struck(&all, blow);
        assert_eq!(self.machine.was_struck(), blow.is_some(), "{}", ran.whole());
        ran
    }

    /// Swaps our state folder with that of another machine.
    fn swap_machines(&self) {
        let path = |name| self.machine.path(name);
        if !path("other-state").exists() {
            fs::create_dir(path("other-state")).unwrap();
        }
        for (from, to) in [
            ("state", "aside"),
            ("other-state", "state"),
            ("aside", "other-state"),
        ] {
            fs::rename(path(from), path(to)).unwrap();
        }
    }
}

fn blow(how: &'static str, when: &'static str, kind: &'static str, nth: usize) -> Option<Blow> {
    Some(Blow {
        how,
        when,
        nth,
        kind: Some(kind),
    })
}

#[track_caller]
fn ok(ran: &Ran) -> serde_json::Value {
    assert_eq!(ran.code, 0, "{}", ran.whole());
    ran.json()
}

#[test]
fn an_interrupted_copy_ends_in_order_and_writes_no_piece_twice() {
    requires!(missing());
    let scene = CopyScene::new();
    scene.machine.write("act", INTERRUPT);
    let stopped = scene.copy(&[], blow("act", "before", "write", 20));
    let said = stopped.failed_with(130);
    assert!(said.contains("continues where this one stopped"), "{said}");
    // Both locks are released.
    assert_eq!(scene.names("store"), ["x.luks"]);
    let unfinished = scene.names("server");
    assert_eq!(unfinished.len(), 1, "{unfinished:?}");
    assert!(unfinished[0].starts_with("x.luks.copying-"));

    let went_on = ok(&scene.copy(&[], None));
    let bytes = |said: &serde_json::Value, what: &str| said[what].as_u64().unwrap();
    assert!(bytes(&went_on, "resumed_bytes") > 0, "{went_on}");
    scene.arrived_whole();
    assert_eq!(scene.names("server"), ["x.luks"]);
    fs::remove_file(scene.machine.path("server/x.luks")).unwrap();
    let at_once = ok(&scene.copy(&[], None));
    assert_eq!(bytes(&at_once, "resumed_bytes"), 0);
    let saved = bytes(&at_once, "written_bytes") - bytes(&went_on, "written_bytes");
    assert!(saved > 0, "{went_on} {at_once}");
    assert!(saved <= bytes(&went_on, "resumed_bytes"), "{went_on}");
    scene.machine.nothing_is_left();
}

#[test]
fn source_changed_after_an_interruption_is_copied_from_the_start() {
    requires!(missing());
    let scene = CopyScene::new();
    scene.machine.write("act", INTERRUPT);
    let blow = blow("act", "before", "write", 20);
    scene.copy(&[], blow).failed_with(130);
    scene.machine.write("src/newer", "newer\n");
    scene.machine.backup(&[]).succeeded();
    let ran = scene.copy(&[], None);
    assert!(
        ran.stderr.contains("starts from the beginning"),
        "{}",
        ran.whole()
    );
    assert_eq!(ok(&ran)["resumed_bytes"], 0);
    let copy = scene.machine.path("server/x.luks");
    assert!(same_bytes(&scene.machine.path(CONTAINER), &copy));
    assert_eq!(scene.names("server"), ["x.luks"]);
}

#[test]
fn pieces_of_another_machine_do_not_count_as_verified() {
    requires!(missing());
    let scene = CopyScene::new();
    // Ctrl-C while the last pieces are made durable: what is read back then is noted as that.
    scene.machine.write("act", INTERRUPT);
    let first = blow("act", "before", "fsync", LOCK_FSYNCS + 1);
    scene.copy(&["--move"], first).failed_with(130);
    scene.swap_machines();
    // The other machine starts from the beginning, and dies when a part has arrived.
    scene.copy(&[], blow("kill", "before", "write", 40));
    let unfinished = scene.names("server");
    assert_eq!(unfinished.len(), 2, "{unfinished:?}");
    for folder in ["store", "server"] {
        leases::remove_all(&scene.machine.path(folder));
    }
    scene.swap_machines();
    let moved = ok(&scene.copy(&["--move"], None));
    assert_eq!(moved["source_removed"], true);
    scene.arrived_whole();
    assert_eq!(scene.names("server"), ["x.luks"]);
}

#[test]
fn wrong_content_under_the_name_keeps_the_source() {
    requires!(missing());
    let scene = CopyScene::new();
    scene.copy(&["--move"], blow("kill", "before", "rename", 1));
    // A copy that a person made, without its last part.
    let copy = scene.machine.path("server/x.luks");
    copy_sparse(&scene.pristine, &copy);
    let file = fs::File::options().write(true).open(&copy).unwrap();
    file.set_len(32 << 20).unwrap();
    file.set_len(128 << 20).unwrap();
    drop(file);
    let refused = scene.copy(&["--move"], None).failed_with(1);
    assert!(
        refused.contains("is not the copy that was made"),
        "{refused}"
    );
    assert!(same_bytes(&scene.pristine, &scene.machine.path(CONTAINER)));
}

#[test]
fn copy_older_than_its_source_is_reported_and_removes_nothing() {
    requires!(missing());
    for more in [&[][..], &["--move"]] {
        let scene = CopyScene::new();
        scene.copy(more, blow("kill", "after", "rename", 1));
        scene.machine.write("src/newer", "newer\n");
        scene.machine.backup(&[]).succeeded();
        let refused = scene.copy(more, None).failed_with(1);
        assert!(refused.contains("was changed after"), "{refused}");
        assert!(!refused.contains("continues where"), "{refused}");
        scene.machine.restores_whole(&[]);
        scene.arrived_whole();
        assert_eq!(scene.names("store"), ["x.luks"]);
        assert_eq!(scene.names("server"), ["x.luks"]);
    }
}

#[test]
fn failed_verification_ends_with_13_and_no_name() {
    requires!(missing());
    let scene = CopyScene::new();
    // A disk that stores other bytes than it was sent.
    let harm = "for file in server/*.copying-*; do\n\
                printf harm | dd of=\"$file\" bs=1 seek=4096 conv=notrunc 2>/dev/null\ndone\n";
    scene.machine.write("act", harm);
    let each = blow("acts", "before", "fsync", LOCK_FSYNCS + 1);
    let refused = scene.copy(&["--move"], each).failed_with(13);
    assert!(refused.contains("don't read back"), "{refused}");
    assert!(!scene.machine.path("server/x.luks").exists());
    assert!(same_bytes(&scene.pristine, &scene.machine.path(CONTAINER)));
}

#[test]
fn lost_connection_leaves_no_lock_at_the_other_end() {
    requires!(missing());
    let scene = CopyScene::new();
    scene
        .copy(&[], blow("cut", "before", "write", 10))
        .failed_with(14);
    assert_eq!(scene.names("store"), ["x.luks"]);
    // That end is free for others.
    scene.swap_machines();
    scene.machine.backup(&[]).succeeded();
}

#[test]
fn swapped_copy_is_refused_and_its_identity_kept() {
    requires!(missing(), needs::program("cryptsetup"));
    let scene = CopyScene::new();
    // Only the release of the lock is left to do.
    scene.copy(&["--move"], blow("kill", "before", "free", 1));
    assert!(leases::held(&scene.machine.path("store")).len() <= 1);
    assert!(!scene.machine.path(CONTAINER).exists());
    let pins = || {
        let folder = scene.machine.path("state/containers");
        let files = fs::read_dir(folder).unwrap();
        files
            .map(|file| fs::read_to_string(file.unwrap().path()).unwrap())
            .collect::<Vec<_>>()
    };
    let before = pins();
    assert_eq!(before.len(), 1, "{before:?}");
    // Another container with the identity of this one.
    fs::create_dir(scene.machine.path("other")).unwrap();
    scene.machine.init(&["other/x.luks", "--size", "128M"]);
    let other = scene.machine.path("other/x.luks");
    let uuid = |more: &[&str]| {
        let mut command = Command::new("cryptsetup");
        command.args(["luksUUID", "--batch-mode"]).args(more);
        let output = command.output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let ours = uuid(&[scene.pristine.to_str().unwrap()]);
    uuid(&[other.to_str().unwrap(), "--uuid", &ours]);
    fs::rename(&other, scene.machine.path("server/x.luks")).unwrap();
    scene.copy(&["--move"], None).failed_with(13);
    assert!(pins().contains(&before[0]));
}

#[test]
fn name_occupied_at_the_last_moment_gets_no_identity() {
    requires!(missing());
    let scene = CopyScene::new();
    let pins = scene.names("state/containers");
    scene.machine.write("act", "echo other >server/x.luks\n");
    let refused = scene.copy(&["--move"], blow("act", "before", "rename", 1));
    let said = refused.failed_with(1);
    assert!(said.contains("exists already"), "{said}");
    assert_eq!(scene.names("state/containers"), pins);
    let other = fs::read(scene.machine.path("server/x.luks")).unwrap();
    assert_eq!(other, b"other\n");
    assert!(same_bytes(&scene.pristine, &scene.machine.path(CONTAINER)));
}

#[test]
fn unreachable_source_is_not_reported_as_removed() {
    requires!(missing());
    let scene = CopyScene::new();
    scene.copy(&["--move"], blow("kill", "after", "rename", 1));
    // Its disk is not mounted, and the folder is empty.
    let mounted = scene.machine.path(CONTAINER);
    let away = scene.machine.path("away");
    fs::rename(&mounted, &away).unwrap();
    let pins = scene.names("state/containers");
    let refused = scene.copy(&["--move"], None).failed_with(10);
    assert!(refused.contains("is not mounted"), "{refused}");
    // A copy that is not a move has nothing left to do.
    let copied = ok(&scene.copy(&[], None));
    assert_eq!(copied["source_removed"], false);
    assert_eq!(copied["source_found"], false);
    scene.arrived_whole();
    assert!(
        pins.iter()
            .all(|file| scene.names("state/containers").contains(file))
    );
}

#[test]
fn interrupted_removal_is_not_reported_as_done() {
    requires!(missing());
    let scene = CopyScene::new();
    // Now the source is behind the connection.
    let from = scene.machine.on_line(CONTAINER);
    let copy = ["copy", "--move", &from, "server/x.luks", "--json"];
    let struck = scene
        .machine
        .sprat_struck(&copy, blow("kill", "after", "remove", 1));
    assert!(scene.machine.was_struck(), "{}", struck.whole());
    assert!(!scene.machine.path(CONTAINER).exists());
    let pins = scene.names("state/containers");
    let again = ok(&scene.machine.sprat_struck(&copy, None));
    assert_eq!(again["source_removed"], false);
    assert_eq!(again["source_found"], false);
    scene.arrived_whole();
    assert_eq!(scene.names("store"), [""; 0]);
    assert_eq!(scene.names("server"), ["x.luks"]);
    assert_eq!(scene.names("state/containers"), pins);
    assert_eq!(scene.names("state/copies"), [""; 0]);
}

#[test]
fn a_source_that_was_set_aside_gets_its_name_back_and_the_move_ends() {
    requires!(missing());
    let scene = CopyScene::new();
    let from = scene.machine.on_line(CONTAINER);
    let copy = ["copy", "--move", &from, "server/x.luks", "--json"];
    scene
        .machine
        .sprat_struck(&copy, blow("kill", "after", "rename", 1));
    assert!(scene.machine.was_struck());
    let names = scene.names("store");
    let aside = names.iter().find(|name| name.contains(".moved-")).unwrap();
    assert!(!names.contains(&"x.luks".to_owned()), "{names:?}");
    assert!(same_bytes(
        &scene.pristine,
        &scene.machine.path(format!("store/{aside}"))
    ));
    let said = scene
        .machine
        .sprat(&["snapshots", CONTAINER])
        .failed_with(10);
    assert!(said.contains(aside), "{said}");
    // The only copy that has a name is never removed.
    let key = [
        "--new-key",
        "--cheap-kdf-for-tests",
        "--sheet",
        "sheet",
        "--key-file",
        "config/keys/x.key",
    ];
    let said = scene
        .machine
        .sprat_struck(&[&copy[..], &key].concat(), None)
        .failed_with(2);
    assert!(said.contains("without --new-key"), "{said}");
    assert!(!said.contains("remove"), "{said}");
    assert!(same_bytes(&scene.pristine, &scene.machine.path(CONTAINER)));
    let again = ok(&scene.machine.sprat_struck(&copy, None));
    assert_eq!(again["source_removed"], true);
    scene.arrived_whole();
    assert_eq!(scene.names("store"), [""; 0]);
    assert_eq!(scene.names("server"), ["x.luks"]);
}

/// A machine that took the container over while this one slept: the file that it has open was
/// renamed, and it still writes to the file.
#[test]
fn a_source_that_is_written_to_while_it_is_set_aside_keeps_its_name() {
    requires!(missing());
    let scene = CopyScene::new();
    let from = scene.machine.on_line(CONTAINER);
    let folder = scene.machine.path("store");
    let act = format!(
        "dd if=/dev/urandom of=$(ls {}/x.luks.moved-*) bs=4096 seek=4096 count=1 conv=notrunc \
         status=none",
        folder.display()
    );
    scene.machine.write("act", act);
    let copy = ["copy", "--move", &from, "server/x.luks", "--json"];
    let ran = scene
        .machine
        .sprat_struck(&copy, blow("act", "after", "rename", 1));
    assert!(scene.machine.was_struck());
    let said = ran.failed_with(1);
    assert!(said.contains("was changed after"), "{said}");
    assert_eq!(scene.names("store"), ["x.luks"]);
    assert!(!same_bytes(&scene.pristine, &scene.machine.path(CONTAINER)));
    scene.arrived_whole();
}

#[test]
fn a_copy_that_gets_no_threads_leaves_no_lease() {
    requires!(needs::root().or_else(|| needs::program("prlimit")));
    let scene = CopyScene::new();
    let machine = &scene.machine;
    // Only a user who is not root has a limit on threads.
    let nobody = Command::new("chown")
        .args(["-R", "65534:65534"])
        .arg(machine.folder())
        .status();
    assert!(nobody.unwrap().success());
    assert_eq!(machine.sprat_as_nobody(&["--version"]).code, 0);
    let mut codes = Vec::new();
    for most in 1..40 {
        let limit = format!("--nproc={most}");
        let mut limited = machine.command_of("prlimit");
        let words = [&limit, "--", "./sprat", "copy", CONTAINER, "server/x.luks"];
        let ran = machine.run(limited.args(words).uid(65534).gid(65534));
        assert!(!ran.stderr.contains("panicked"), "{most}: {}", ran.whole());
        codes.push(ran.code);
        for folder in ["store", "server"] {
            let mut left = scene.names(folder);
            left.retain(|name| name.contains(".lock."));
            assert!(left.is_empty(), "{most}: {left:?}: {}", ran.whole());
        }
        if ran.code == 0 {
            break;
        }
    }
    // Some at each place where threads are made.
    assert!(codes.len() > 4 && codes.last() == Some(&0), "{codes:?}");
    scene.arrived_whole();
}

#[test]
fn a_copy_with_a_new_key_that_is_killed_goes_on_with_the_same_key() {
    requires!(missing());
    let scene = CopyScene::new();
    let to = scene.machine.on_line("server/x.luks");
    let key = ["--key-file", "config/keys/x.key"];
    let copy = |blow: Option<Blow>| {
        let all = [
            &[
                "copy",
                "--new-key",
                "--move",
                CONTAINER,
                &to,
                "--sheet",
                "sheet",
            ][..],
            &["--json", "--cheap-kdf-for-tests"],
            &key,
        ];
        let ran = scene.machine.sprat_struck(&all.concat(), blow);
        assert_eq!(
            scene.machine.was_struck(),
            blow.is_some(),
            "{}",
            ran.whole()
        );
        ran
    };
    scene.machine.write("act", INTERRUPT);
    copy(blow("act", "before", "write", 20)).failed_with(130);
    let sheet = fs::read_to_string(scene.machine.path("sheet")).unwrap();
    for (when, kind) in [("before", "rename"), ("after", "rename")] {
        copy(blow("kill", when, kind, 1));
        assert!(same_bytes(&scene.pristine, &scene.machine.path(CONTAINER)));
    }
    let moved = ok(&copy(None));
    assert_eq!(moved["source_removed"], true, "{moved}");
    assert_eq!(scene.names("server"), ["x.luks"]);
    assert_eq!(scene.names("store"), [""; 0]);
    assert_eq!(scene.names("state/copies"), [""; 0]);
    let fingerprint = moved["fingerprint"].as_str().unwrap();
    assert!(sheet.contains(fingerprint), "{moved} {sheet}");
    let recovery = sheet
        .lines()
        .find_map(|line| line.strip_prefix("RECOVERY KEY"));
    scene.machine.write("recovery", recovery.unwrap().trim());
    for key in [&key[..], &["--passphrase-file", "recovery"]] {
        let check = ["check", "server/x.luks", "--read-data", "--json"];
        ok(&scene.machine.sprat(&[&check[..], key].concat()));
    }
    scene.machine.nothing_is_left();
}

#[test]
fn restarted_copy_has_the_key_of_its_sheet() {
    requires!(missing());
    let scene = CopyScene::new();
    let to = scene.machine.on_line("server/x.luks");
    let copy = |blow: Option<Blow>, more: &[&str]| {
        let all = ["copy", CONTAINER, &to, "--json", "--cheap-kdf-for-tests"];
        let key = ["--key-file", "config/keys/x.key"];
        scene
            .machine
            .sprat_struck(&[&all[..], &key, more].concat(), blow)
    };
    let new = ["--new-key", "--sheet", "sheet"];
    scene.machine.write("act", INTERRUPT);
    copy(blow("act", "before", "write", 20), &new).failed_with(130);
    let sheet = fs::read_to_string(scene.machine.path("sheet")).unwrap();
    scene.machine.write("src/newer", "newer\n");
    scene.machine.backup(&[]).succeeded();
    let ran = copy(None, &new);
    assert!(
        ran.stderr.contains("starts from the beginning"),
        "{}",
        ran.whole()
    );
    let fingerprint = ok(&ran)["fingerprint"].as_str().unwrap().to_owned();
    assert!(sheet.contains(&fingerprint), "{sheet} {}", ran.whole());

    let copied = scene.machine.path("server/x.luks");
    fs::remove_file(&copied).unwrap();
    fs::remove_file(scene.machine.path("sheet")).unwrap();
    copy(blow("act", "before", "write", 20), &new).failed_with(130);
    let ran = copy(None, &[]);
    assert!(ran.stderr.contains("with another key"), "{}", ran.whole());
    ok(&ran);
    assert!(same_bytes(&scene.machine.path(CONTAINER), &copied));
    assert_eq!(scene.names("state/copies"), [""; 0]);
}
