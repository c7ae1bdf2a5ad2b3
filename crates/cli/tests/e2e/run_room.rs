//! `sprat run` beside its copies: room for them, slices of the check, and the loop in the foreground.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use sprat_testkit::machine::{CONTAINER, TestMachine, noise};
use sprat_testkit::{needs, requires};

/// A machine with one job in one local container of this size.
fn machine(size: &str, container: &str, job: &str) -> TestMachine {
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", size]);
    machine.write("src/a", "alpha\n");
    configure(&machine, container, job);
    machine
}

fn configure(machine: &TestMachine, container: &str, job: &str) {
    let at = machine.folder().display();
    machine.write(
        "config/sprat.toml",
        format!(
            "[container.nas]\ntarget = \"{}\"\nkey_file = \"{}\"\n{container}\n\
             [job.home]\ncontainer = \"nas\"\nsources = \"{at}/src\"\n\
             before = \"sh -c 'echo before >> {at}/log'\"\n{job}\n",
            machine.path(CONTAINER).display(),
            machine.path("config/keys/x.key").display(),
        ),
    );
}

fn run(machine: &TestMachine, code: i32) -> Value {
    let ran = machine.sprat(&["run", "--now", "--json"]);
    assert_eq!(ran.code, code, "{}", ran.whole());
    ran.json()
}

fn snapshots(machine: &TestMachine) -> usize {
    let listed = machine.ok(&["snapshots", "nas", "--json"]).json();
    let all = listed["snapshots"].as_array().unwrap().iter();
    all.filter(|one| one["kind"] == "good").count()
}

#[test]
fn no_copy_begins_below_min_free_and_a_full_volume_is_pruned_for_a_second_try() {
    requires!(needs::root());
    let never = "check_every = \"never\"\n";
    let machine = machine("64M", &format!("{never}min_free = \"1000 TiB\""), "");
    let said = run(&machine, 0);
    let copy = &said["copies"][0];
    assert_eq!(copy["attempted"], false);
    let reason = copy["reason"].as_str().unwrap();
    assert!(reason.contains("less than min_free, 1000 TiB"), "{reason}");
    assert_eq!(said["events"][0]["kind"], "space");
    assert!(!machine.path("log").exists());

    // A snapshot takes about a third of the volume, and the rules are not due again.
    let rules = "keep_last = 1\nprune_every = \"30 days\"";
    configure(&machine, never, rules);
    let status = machine.ok(&["snapshots", "nas", "--json"]).json();
    assert_eq!(status["snapshots"], serde_json::json!([]));
    for (seed, kept) in [(1, 1), (2, 2), (3, 2), (4, 2)] {
        machine.write("src/noise", noise(16 << 20, seed));
        let said = run(&machine, 0);
        assert!(said["copies"][0]["snapshot"].is_string(), "{said}");
        assert!(
            said["events"]
                .as_array()
                .unwrap()
                .iter()
                .all(|e| e["kind"] != "failure")
        );
        assert_eq!(snapshots(&machine), kept, "{seed}");
        let public = fs::read(machine.path("state/public/status.json")).unwrap();
        let public: Value = serde_json::from_slice(&public).unwrap();
        assert_eq!(public["copies"][0]["snapshots"], kept, "{seed}");
    }
    // The second try runs `before` again.
    let log = fs::read_to_string(machine.path("log")).unwrap();
    assert_eq!(log.lines().count(), 6);
    // A prune that removes nothing does not put off the next one.
    configure(&machine, never, "keep_last = 2\nprune_every = \"30 days\"");
    machine.write("src/noise", noise(40 << 20, 5));
    let last_prune = state_of_copy(&machine)["last_prune"].clone();
    let said = run(&machine, 1);
    assert!(said["copies"][0]["snapshot"].is_null(), "{said}");
    assert!(last_prune.is_string());
    assert_eq!(state_of_copy(&machine)["last_prune"], last_prune);
    assert_eq!(snapshots(&machine), 2);
    // Without rules nothing is removed.
    configure(&machine, never, "");
    machine.write("src/noise", noise(40 << 20, 5));
    let said = run(&machine, 1);
    assert!(said["copies"][0]["snapshot"].is_null(), "{said}");
    assert_eq!(snapshots(&machine), 2);
    // `backup` prunes nothing, and min_free does not stop it.
    configure(&machine, &format!("{never}min_free = \"1000 TiB\""), rules);
    let said = machine.sprat(&["backup", "home"]).failed_with(1);
    assert!(said.contains("the volume has no space for"), "{said}");
    assert_eq!(snapshots(&machine), 2);
    machine.write("src/noise", "small");
    machine.ok(&["backup", "home"]);
    assert_eq!(snapshots(&machine), 3);
    machine.nothing_is_left();
}

/// The copies before it may take hours. Here the mains power goes meanwhile.
#[test]
fn conditions_are_checked_before_each_copy_of_a_session() {
    let power = std::path::Path::new("/sys/class/power_supply");
    let no_power = (!power.exists()).then(|| format!("{} is missing", power.display()));
    requires!(needs::root(), needs::program("unshare"), no_power);
    let machine = machine("64M", "check_every = \"never\"", "");
    let at = machine.folder().display().to_string();
    for (name, value) in [("type", "Battery"), ("status", "Charging")] {
        machine.write(&format!("power/BAT0/{name}"), value);
    }
    let job = |name: &str, more: &str| {
        format!("[job.{name}]\ncontainer = \"nas\"\nsources = \"{at}/src\"\n{more}\n")
    };
    let unplug = format!("after = \"sh -c 'echo Discharging > {at}/power/BAT0/status'\"");
    machine.write(
        "config/sprat.toml",
        format!(
            "[container.nas]\ntarget = \"{}\"\nkey_file = \"{at}/config/keys/x.key\"\n\
             check_every = \"never\"\n{}{}",
            machine.path(CONTAINER).display(),
            job("first", &unplug),
            job("second", "only_on_ac = true"),
        ),
    );
    let power = format!("mount --bind {at}/power /sys/class/power_supply && exec \"$@\"");
    let ran = machine.sprat_under(
        &["unshare", "-m", "sh", "-c", &power, "sh"],
        &["run", "--json"],
    );
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let said = ran.json();
    let copies = said["copies"].as_array().unwrap();
    let made: Vec<_> = copies
        .iter()
        .map(|copy| copy["snapshot"].is_string())
        .collect();
    assert_eq!(made, [true, false], "{said}");
    assert_eq!(copies[1]["reason"], "the machine runs on battery");
    machine.nothing_is_left();
}

fn state_of_copy(machine: &TestMachine) -> Value {
    let path = machine.path("state/schedule/home@nas.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The volume is full of what ransomware changed, and the rules would remove a snapshot from before.
#[test]
fn mass_change_that_lacks_room_removes_no_snapshot_until_it_is_accepted() {
    requires!(needs::root());
    let rules = "keep_last = 1\nprune_every = \"30 days\"";
    let machine = machine("64M", "check_every = \"never\"", rules);
    let write = |content: &str| {
        for number in 0..1200 {
            machine.write(&format!("src/many/{number}"), content);
        }
    };
    let grow = |seed: u64| machine.write("src/noise", noise(12 << 20, seed));
    write("before");
    for seed in 1..3 {
        grow(seed);
        run(&machine, 0);
    }
    assert_eq!(snapshots(&machine), 2);
    grow(3);
    write("encrypted");
    let open = |said: &Value| {
        let events = said["events"].as_array().unwrap().iter();
        let kinds = events.map(|event| event["kind"].as_str().unwrap().to_owned());
        kinds.collect::<std::collections::BTreeSet<_>>()
    };
    for _ in 0..2 {
        let said = run(&machine, 1);
        assert!(open(&said).contains("change"), "{said}");
        assert_eq!(snapshots(&machine), 2, "{said}");
    }
    // A server below `min_free` is pruned without an attempt: the same holds for it.
    let low = "check_every = \"never\"\nmin_free = \"1000 TiB\"";
    configure(&machine, low, "keep_last = 1\nprune_every = \"0 s\"");
    run(&machine, 0);
    assert_eq!(snapshots(&machine), 2);
    configure(&machine, "check_every = \"never\"", rules);
    // Once it is accepted, the rules make room for it, and it is no news.
    machine.ok(&["accept", "home@nas"]);
    let said = run(&machine, 0);
    assert_eq!(said["events"], serde_json::json!([]));
    assert_eq!(snapshots(&machine), 2);
    // The next one is.
    grow(4);
    write("encrypted again");
    run(&machine, 1);
    assert!(state_of_copy(&machine)["changed"].is_object());
    machine.nothing_is_left();
}

/// The last slice becomes older.
fn a_day_later(machine: &TestMachine) {
    let path = machine.path("state/schedule/@nas.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let long_ago = Value::from("2026-01-01T00:00:00Z");
    for key in ["sliced", "slice_tried"] {
        assert!(state[key].is_string(), "{state}");
        state[key] = long_ago.clone();
    }
    fs::write(path, state.to_string()).unwrap();
}

#[test]
fn slice_of_the_check_reads_what_is_due_and_reports_damage_with_13() {
    requires!(needs::root());
    let machine = machine("128M", "check_every = \"2 days\"", "every = \"never\"");
    for number in 0..4 {
        machine.write(&format!("src/noise{number}"), noise(4 << 20, number));
    }
    let first = run(&machine, 0);
    let slice = &first["checks"][0];
    assert_eq!(
        (&slice["container"], &slice["finished"]),
        (&"nas".into(), &false.into())
    );
    let bytes = |slice: &Value| slice["bytes_read"].as_u64().unwrap();
    assert!(bytes(slice) >= 8 << 20, "{slice}");
    // Once a day.
    assert_eq!(run(&machine, 0)["checks"], serde_json::json!([]));
    a_day_later(&machine);
    // It needs no copy that is due, and runs no hook of a job.
    let _ = fs::remove_file(machine.path("log"));
    let plan = machine.ok(&["run", "--dry-run"]).stdout;
    assert!(plan.contains("nas: a slice of the check is due"), "{plan}");
    let ran = machine.ok(&["run"]);
    assert!(
        ran.stdout.contains("now all data is checked"),
        "{}",
        ran.whole()
    );
    assert!(!machine.path("log").exists());
    assert_eq!(machine.ok(&["run", "--scheduled"]).whole(), "exit 0\n");

    // In the second copy of the header.
    a_day_later(&machine);
    let file = File::options().write(true).open(machine.path(CONTAINER));
    file.unwrap().write_all_at(&[0; 64], 20_490).unwrap();
    let ran = machine.sprat(&["run", "--json"]);
    assert_eq!(ran.code, 13, "{}", ran.whole());
    let said = ran.json();
    assert_eq!(said["events"][0]["kind"], "damage");
    assert_eq!(said["checks"][0]["result"]["code"], 13);
    assert!(
        ran.stderr.contains("the check found damage"),
        "{}",
        ran.whole()
    );
    machine.nothing_is_left();
}

/// A dump each day, beside data that stays.
#[test]
fn old_data_is_checked_although_each_day_brings_more_than_a_slice() {
    requires!(needs::root());
    let machine = machine("128M", "check_every = \"16 days\"", "every = \"never\"");
    machine.write("src/stays", noise(8 << 20, 0));
    for (day, finished) in [(1, false), (2, true)] {
        machine.write("src/dump", noise(8 << 20, day));
        let said = run(&machine, 0);
        let slice = &said["checks"][0];
        assert_eq!(slice["finished"], finished, "day {day}: {slice}");
        a_day_later(&machine);
    }
    machine.nothing_is_left();
}

#[test]
fn loop_makes_copies_until_a_signal_ends_it() {
    requires!(needs::root());
    let machine = machine("64M", "check_every = \"never\"", "");
    let mut command = machine.command();
    command
        .args(["run", "--loop"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let looping = command.spawn().unwrap();
    let begun = Instant::now();
    // The run and the check for overdue copies, each in a process of its own.
    let made = || {
        let state = fs::read_to_string(machine.path("state/schedule/home@nas.json"));
        state.is_ok_and(|state| state.contains("\"last_complete\": \"2"))
    };
    while !made() || !machine.path("state/watch.json").exists() {
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "nothing was made"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    let pid = rustix::process::Pid::from_child(&looping);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = looping.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*said), (Some(0), ""));
    assert_eq!(snapshots(&machine), 1);
    machine.nothing_is_left();
}
