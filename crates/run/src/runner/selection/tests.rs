//! Which copies a run makes, at a time that is passed in.

use std::time::Duration;

use sprat_session::Exit;
use sprat_snapshot::FileSystem;
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};

use super::*;
use crate::config::{Config, ConfigPlaces, load};
use crate::copy_state::{Attempt, Held};
use crate::due::spread_part;

const NOW: &str = "2026-11-28T09:00:00Z";

fn config(text: &str) -> Config {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sprat.toml");
    std::fs::write(&path, text).unwrap();
    let loaded = load(&[path], &ConfigPlaces::default());
    loaded.without_mistakes().unwrap()
}

fn with_job(more: &str) -> Config {
    config(&format!(
        "[container.nas]\ntarget = \"host:x.luks\"\n[container.usb]\ntarget = \"/usb/x.luks\"\n\
         [job.home]\ncontainer = [\"nas\", \"usb\"]\nsources = \"/home\"\n{more}"
    ))
}

/// A machine on battery, on a network without a gateway, and without a message bus.
fn machine(folder: &Path) -> Machine {
    let battery = folder.join("sys/class/power_supply/BAT0");
    std::fs::create_dir_all(&battery).unwrap();
    for (name, value) in [("type", "Battery"), ("status", "Discharging")] {
        std::fs::write(battery.join(name), value).unwrap();
    }
    Machine {
        sys: folder.join("sys"),
        proc: folder.join("proc"),
        bus: Some(folder.join("no-bus")),
        may_send: false,
    }
}

/// Whether the copy in `nas` is tried, and why.
fn decided(config: &Config, state: &CopyState, now: &str, anyway: bool) -> (bool, String) {
    let folder = tempfile::tempdir().unwrap();
    let machine = machine(folder.path());
    let selecting = Selecting {
        zone: &TimeZone::UTC,
        machine_id: "m",
        machine: &machine,
        anyway,
        now: now.parse().unwrap(),
    };
    let copy = config.copies().next().unwrap();
    let selected = selecting.select(copy, state);
    (selected.is_tried(), selected.reason())
}

fn success(at: &str) -> CopyState {
    let mut state = CopyState::default();
    state.attempted(Attempt {
        run: "r".to_owned(),
        started: at.parse().unwrap(),
        ended: at.parse().unwrap(),
        exit: Exit::Done,
        reason: None,
        inputs: String::new(),
    });
    state
}

#[test]
fn a_copy_is_tried_when_it_is_due_or_asked_for() {
    let config = with_job("at = \"02:30\"\n");
    let fresh = CopyState::default();
    let case = |state: &CopyState, now, anyway| decided(&config, state, now, anyway);
    let tried = |why: &str| (true, why.to_owned());
    assert_eq!(case(&fresh, NOW, false), tried("no backup yet"));
    let today = success("2026-11-28T02:31:00Z");
    assert_eq!(case(&today, NOW, false), (false, "not due yet".to_owned()));
    assert_eq!(case(&today, NOW, true), tried("asked for"));
    let next = "2026-11-29T02:31:00Z";
    assert_eq!(case(&today, next, false), tried("due by its schedule"));
    // `spread` makes it later, by a part that is the copy's own.
    let config = with_job("at = \"02:30\"\nspread = \"12 h\"\n");
    let later = spread_part(Duration::from_secs(12 * 3600), "m", "home", "nas");
    assert!(later > Duration::from_secs(120), "{later:?}");
    let today = success("2026-11-28T20:00:00Z");
    assert!(!decided(&config, &today, next, false).0);
    let next = next.parse::<Timestamp>().unwrap() + later;
    assert!(decided(&config, &today, &next.to_string(), false).0);
}

#[test]
fn conditions_skip_what_is_due_and_held_copies_wait_for_a_person() {
    let state = CopyState::default();
    let on_ac = with_job("only_on_ac = true\n");
    let skipped = (false, "the machine runs on battery".to_owned());
    assert_eq!(decided(&on_ac, &state, NOW, false), skipped);
    assert!(decided(&on_ac, &state, NOW, true).0);
    let window = with_job("window = \"22:00-06:00\"\n");
    let skipped = (false, "it is not between 22:00 and 06:00".to_owned());
    assert_eq!(decided(&window, &state, NOW, false), skipped);
    // What is not due is not checked.
    let today = success("2026-11-28T02:31:00Z");
    assert_eq!(decided(&window, &today, NOW, false).1, "not due yet");
    for (what, tried) in [(HeldWhat::Copy, false), (HeldWhat::Prune, true)] {
        let state = CopyState {
            held: Some(Held {
                what,
                since: NOW.parse().unwrap(),
                reason: "much larger than usual".to_owned(),
            }),
            ..CopyState::default()
        };
        assert_eq!(decided(&with_job(""), &state, NOW, true).0, tried);
    }
}

#[test]
fn metered_counts_only_for_what_needs_a_network() {
    let config = with_job("");
    let metered = |copy| conditions(copy).skip_on_metered;
    let copies: Vec<bool> = config.copies().map(metered).collect();
    assert_eq!(copies, [true, false], "nas, usb");
}

#[test]
fn a_disk_that_is_away_skips_unless_a_hook_may_mount_it() {
    requires!(needs::root());
    let folder = TestFolder::new("sprat-disk-");
    let at = folder.path().join("disk");
    std::fs::create_dir(&at).unwrap();
    let disk = Tmpfs::mount(&at, 1);
    let file = at.join("x.luks");
    std::fs::write(&file, "").unwrap();
    let state = CopyState {
        file_system: FileSystem::holding(&file),
        ..CopyState::default()
    };
    drop(disk);
    let text = format!(
        "[job.j]\ncontainer = \"usb\"\nsources = \"/s\"\n[container.usb]\ntarget = \"{}\"\n",
        file.display()
    );
    let (tried, why) = decided(&config(&text), &state, NOW, true);
    assert!(!tried && why.ends_with("is not there"), "{why}");
    let mounts = text + "before = \"mount /usb\"\n";
    assert!(decided(&config(&mounts), &state, NOW, true).0);
}

#[test]
fn inputs_change_with_the_config_and_the_key_file() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, "1").unwrap();
    let name = |more: &str| {
        let key = key.display();
        let text = format!(
            "[job.j]\ncontainer = \"x\"\nsources = \"/s\"\n{more}\
             [container.x]\ntarget = \"h:x.luks\"\nkey_file = \"{key}\"\n"
        );
        inputs(config(&text).copies().next().unwrap())
    };
    let first = name("keep_last = 1\n");
    assert_eq!(name("keep_last = 1\n"), first);
    assert_ne!(name("keep_last = 2\n"), first);
    std::fs::write(&key, "22").unwrap();
    assert_ne!(name("keep_last = 1\n"), first);
}
