//! Copies that lose their connections, and copies that run again after a session died at the
//! destination meanwhile: no bytes in flight are forgotten, and no lock stays without need.

use std::fs;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::copy_scene::CopyScene;
use sprat_store::{LockError, WriteJournal};
use sprat_testkit::dice::Dice;
use sprat_testkit::hostile::{ALWAYS, Act, Fault, Hostile, Kind};
use sprat_testkit::leftovers::LIMIT;
use sprat_testkit::machine::strikes::{Blow, copy_sparse, missing};
use sprat_testkit::machine::{CONTAINER, Ran};
use sprat_testkit::requires;

const COPY: &str = "server/x.luks";

impl CopyScene {
    /// sprat, struck.
    #[track_caller]
    fn struck(&self, arguments: &[&str], blow: Option<Blow>) -> Ran {
        let ran = self.machine.sprat_struck(arguments, blow);
        assert_eq!(self.machine.was_struck(), blow.is_some(), "{}", ran.whole());
        ran
    }

    /// A move of the local container over the connection that strikes.
    #[track_caller]
    fn moved(&self, blow: Option<Blow>) -> Ran {
        let to = self.machine.on_line(COPY);
        self.struck(&["copy", "--move", CONTAINER, &to, "--json"], blow)
    }

    /// A backup into the copy.
    #[track_caller]
    fn backup(&self, blow: Option<Blow>) -> Ran {
        let to = self.machine.on_line(COPY);
        self.struck(&["backup", &to, "--name", "home", "src"], blow)
    }

    /// The writes in flight in this machine's records, of all containers, and whether they may still
    /// arrive.
    fn in_flight(&self) -> (Vec<Range<u64>>, bool) {
        let folder = self.machine.path("state/locks");
        let records: Vec<WriteJournal> = self
            .names("state/locks")
            .iter()
            .filter_map(|name| name.strip_suffix(".record"))
            .map(|id| {
                // What was killed may take a moment to be gone.
                let until = Instant::now() + LIMIT;
                loop {
                    match WriteJournal::open(&folder, id) {
                        Err(LockError::HeldHere { .. }) if Instant::now() < until => {
                            std::thread::sleep(Duration::from_millis(20));
                        }
                        opened => return opened.unwrap(),
                    }
                }
            })
            .collect();
        let ranges = records.iter().flat_map(WriteJournal::in_doubt).collect();
        (ranges, records.iter().any(WriteJournal::may_arrive))
    }

    /// The copy restores all that is in the source folder.
    #[track_caller]
    fn restores_whole(&self) {
        let _ = fs::remove_file(self.machine.path(CONTAINER));
        copy_sparse(&self.machine.path(COPY), &self.machine.path(CONTAINER));
        self.machine.restores_whole(&[]);
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

#[test]
fn late_writes_of_a_dead_session_survive_a_resumed_copy() {
    requires!(missing());
    // With the source still there, and some, or nothing, of the session's bytes arrived; and when the
    // source is gone. The first write is the lock's.
    for (first, nth, code) in [
        (blow("kill", "after", "rename", 1), 40, 1),
        (blow("kill", "after", "rename", 1), 2, 0),
        (blow("kill", "before", "free", 1), 40, 0),
    ] {
        let scene = CopyScene::new();
        scene.moved(first);
        scene
            .machine
            .write("src/newer", sprat_testkit::machine::noise(8 << 20, 9));
        scene.backup(blow("kill", "before", "write", nth));
        let (ranges, may_arrive) = scene.in_flight();
        assert!(!ranges.is_empty() && may_arrive);

        let again = scene.moved(None);
        let said = again.failed_with(code);
        assert!(
            code == 0 || said.contains("is not the copy that was made"),
            "{said}"
        );
        assert!(said.contains("died while it wrote there"), "{said}");
        // Waited for, so that the next one need not.
        assert_eq!(scene.in_flight(), (ranges, false), "{said}");
        let names = scene.names("server");
        assert!(
            names.len() == 2 && names[1].contains(".lock."),
            "{names:?}: {said}"
        );

        let next = scene.backup(None).succeeded();
        assert!(next.stderr.contains("that died"), "{}", next.whole());
        assert_eq!(scene.in_flight(), (Vec::new(), false));
        assert_eq!(scene.names("server"), ["x.luks"]);
        scene.restores_whole();
        scene.machine.nothing_is_left();
    }
}

#[test]
fn backup_after_a_killed_copy_has_no_writes_in_doubt() {
    requires!(missing());
    let scene = CopyScene::new();
    let killed = scene.moved(blow("kill", "after", "rename", 1));
    scene.arrived_whole();
    assert_eq!(scene.in_flight(), (Vec::new(), false), "{}", killed.whole());
    let backup = scene.backup(None).succeeded();
    for word in ["trusted", "on the wire"] {
        assert!(!backup.stderr.contains(word), "{}", backup.whole());
    }
    assert_eq!(scene.names("server"), ["x.luks"]);
}

#[test]
fn source_lost_at_its_removal_leaves_no_lock_at_the_copy() {
    requires!(missing());
    let scene = CopyScene::new();
    let (from, to) = (
        scene.machine.on_line(CONTAINER),
        scene.machine.on_other_line(COPY),
    );
    let copy = ["copy", "--move", &from, &to, "--json"];
    let lost = scene.struck(&copy, blow("cut", "before", "remove", 1));
    let said = lost.failed_with(14);
    assert!(said.contains("was removed or is being removed"), "{said}");
    scene.arrived_whole();
    assert_eq!(scene.names("server"), ["x.luks"], "{said}");
    assert_eq!(scene.in_flight(), (Vec::new(), false), "{said}");
    let again = scene.struck(&copy, None).succeeded();
    assert_eq!(again.json()["source_removed"], true);
}

#[test]
fn lost_source_discards_nothing_that_arrived_and_no_lock() {
    requires!(missing());
    let scene = CopyScene::with_bytes(64 << 20);
    let (from, to) = (
        scene.machine.on_line(CONTAINER),
        scene.machine.on_other_line(COPY),
    );
    let copy = ["copy", &from, &to, "--json"];
    // Four readers read pieces of 4 MiB, and each asks for a whole piece at once: 17 requests of 255 KiB.
    // So after fewer than 68 requests no piece may be whole, and two whole ones may wait to be written.
    let lost = scene.struck(&copy, blow("cut", "before", "read", 200));
    let said = lost.failed_with(14);
    assert!(said.contains("read from the source"), "{said}");
    let names = scene.names("server");
    assert_eq!(names.len(), 1, "{names:?}: {said}");
    assert!(names[0].starts_with("x.luks.copying-"), "{names:?}");
    let again = scene.struck(&copy, None).succeeded();
    let resumed = again.json()["resumed_bytes"].as_u64().unwrap();
    assert!(resumed > 0, "{said}{}", again.whole());
    scene.arrived_whole();
    assert_eq!(scene.names("server"), ["x.luks"]);
}

#[test]
fn a_server_that_is_back_before_its_disk_is_waited_for() {
    requires!(missing());
    for (folder, when, kind, nth) in [
        ("server", "before", "write", 20),
        ("server", "after", "rename", 1),
        ("store", "before", "write", 20),
        ("store", "before", "remove", 1),
    ] {
        let scene = CopyScene::new();
        // The process that brings the disk back must not end with the connection, whose processes are one
        // group.
        let script = format!(
            "mv {folder} away && mkdir {folder}\n\
             setsid sh -c 'touch begun; sleep 3; rmdir {folder} && mv away {folder}' \
             >/dev/null 2>&1 &\n\
             until test -e begun; do sleep 0.01; done\n"
        );
        scene.machine.write("act", script);
        let (from, to) = (
            scene.machine.on_line(CONTAINER),
            scene.machine.on_line(COPY),
        );
        let copy = ["copy", "--move", &from, &to, "--json"];
        let ran = scene.struck(&copy, blow("leave", when, kind, nth));
        assert_eq!(ran.code, 0, "{folder} {kind}: {}", ran.whole());
        assert!(ran.stderr.contains("its disk may"), "{}", ran.whole());
        scene.arrived_whole();
        assert_eq!(scene.names("server"), ["x.luks"]);
        assert_eq!(scene.names("store"), [""; 0]);
        scene.machine.nothing_is_left();
    }
}

/// With the key that opened the first one, the second would come out as noise, and then be removed.
#[test]
fn replaced_source_is_not_copied_under_a_new_key() {
    requires!(missing());
    let scene = CopyScene::new();
    let machine = &scene.machine;
    let key = ["--key-file", "config/keys/x.key"];
    let other = ["init", "store/other.luks", "--size", "128M"];
    let cheap = ["--cheap-kdf-for-tests"];
    machine.ok(&[&cheap[..], &other, &key].concat());
    let whole = fs::read(machine.path("store/other.luks")).unwrap();
    // A machine that knows neither of them trusts what it finds.
    fs::remove_dir_all(machine.path("state")).unwrap();
    machine.write("act", "mv store/other.luks store/x.luks\n");
    let (from, to) = (machine.on_line(CONTAINER), machine.on_line(COPY));
    let copy = ["copy", "--new-key", "--move", &from, &to];
    let ran = scene.struck(
        &[&copy[..], &key].concat(),
        blow("leave", "before", "write", 20),
    );
    let said = ran.failed_with(13);
    assert!(said.contains("is not the container"), "{said}");
    assert!(fs::read(machine.path(CONTAINER)).unwrap() == whole);
    assert!(!machine.path(COPY).exists());
}

/// A copy from this machine to a server that does what `faults` say, with so many seconds for an outage.
fn copied_to_hostile(scene: &CopyScene, faults: &[Fault], reconnect_max: &str) -> (Ran, Hostile) {
    let machine = &scene.machine;
    let server = machine.path("server");
    let hostile = Hostile::start(&server, "x.luks", &machine.path("none")).unwrap();
    let ssh = hostile.ssh_command(machine.folder()).unwrap();
    hostile.set(faults.iter().copied());
    let to = format!("ssh://server{}/x.luks", server.display());
    let words = [
        ["--ssh-command", ssh[0].to_str().unwrap()],
        ["--quiet-time", "0"],
        ["--reconnect-max", reconnect_max],
        ["--connections", "2"],
    ];
    let mut words = words.concat();
    words.extend(["copy", CONTAINER, &to]);
    (machine.sprat(&words), hostile)
}

#[test]
fn two_distant_losses_do_not_end_the_verification() {
    requires!(missing());
    let scene = CopyScene::new();
    // Reading back is all that reads there.
    let apart = Act::Delay(Duration::from_secs(4));
    let faults = [
        Fault::once(Kind::Read, 40, Act::Drop),
        Fault::once(Kind::Read, 20, apart),
        Fault::once(Kind::Read, 10, Act::Drop),
    ];
    let (ran, hostile) = copied_to_hostile(&scene, &faults, "3");
    assert_eq!((ran.code, hostile.struck()), (0, 3), "{}", ran.whole());
    scene.arrived_whole();
    assert_eq!(scene.names("server"), ["x.luks"]);
}

/// Losses at random, while it writes and while it reads back: 20 in the long form (`SPRAT_STRIKES`).
#[test]
fn many_short_losses_end_no_copy() {
    requires!(missing());
    let scene = CopyScene::new();
    let mut dice = Dice::new(22);
    let mut lost = |kind, least: u64| {
        let nth = usize::try_from(least + dice.below(40)).unwrap();
        Fault::once(kind, nth, Act::Drop)
    };
    let (writing, reading) = match std::env::var_os("SPRAT_STRIKES") {
        Some(_) => (8, 12),
        None => (2, 2),
    };
    let mut faults: Vec<Fault> = (0..writing).map(|_| lost(Kind::Write, 40)).collect();
    faults.extend((0..reading).map(|_| lost(Kind::Read, 10)));
    let (ran, hostile) = copied_to_hostile(&scene, &faults, "20");
    let expected = (0, writing + reading);
    assert_eq!((ran.code, hostile.struck()), expected, "{}", ran.whole());
    scene.arrived_whole();
    assert_eq!(scene.names("server"), ["x.luks"]);
}

#[test]
fn a_server_that_starts_is_waited_for_by_a_copy() {
    requires!(missing());
    for starting in [
        // Its keys, its home or its disk are not there yet, or it greets with text.
        Fault::once(Kind::Stat, 1, Act::Status(3)).times(2),
        Fault::once(Kind::Stat, 1, Act::Status(4)).times(2),
        Fault::once(Kind::Folder, 1, Act::Status(3)),
        Fault::once(Kind::Greeting, 1, Act::Nonsense).times(2),
    ] {
        let scene = CopyScene::new();
        let faults = [Fault::once(Kind::Write, 20, Act::Drop), starting];
        let (ran, hostile) = copied_to_hostile(&scene, &faults, "60");
        let at = format!("{starting}: {}", ran.whole());
        let expected = (0, 1 + starting.times);
        assert_eq!((ran.code, hostile.struck()), expected, "{at}");
        scene.arrived_whole();
        assert_eq!(scene.names("server"), ["x.luks"], "{at}");
    }
}

#[test]
fn a_failure_without_a_reason_is_retried_by_a_copy() {
    requires!(missing());
    for kind in [Kind::Write, Kind::Fsync, Kind::Read] {
        // Behind what the lease asks for.
        let nth = if kind == Kind::Fsync { 3 } else { 30 };
        let failed = Fault::once(kind, nth, Act::Status(4));
        let scene = CopyScene::new();
        let (ran, hostile) = copied_to_hostile(&scene, &[failed], "60");
        let at = format!("{failed}: {}", ran.whole());
        assert_eq!((ran.code, hostile.struck()), (0, 1), "{at}");
        assert!(ran.stderr.contains("reported a failure"), "{at}");
        scene.arrived_whole();
    }
    // A server that accepts no writes is away for as long as it does so.
    let scene = CopyScene::new();
    let failed = Fault::once(Kind::Write, 30, Act::Status(4)).times(ALWAYS);
    let (ran, _hostile) = copied_to_hostile(&scene, &[failed], "5");
    let said = ran.failed_with(14);
    assert!(said.contains("continues where this one stopped"), "{said}");
    let (again, _hostile) = copied_to_hostile(&scene, &[], "60");
    assert_eq!(again.code, 0, "{}", again.whole());
    scene.arrived_whole();
    assert_eq!(scene.names("server"), ["x.luks"]);
}
