//! The commands together, as a person or a script uses them: config, several jobs, JSON, lock.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use sprat_testkit::machine::{CHEAP, CONTAINER, TestMachine};
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};

/// A machine with a config of two jobs in one container.
fn with_jobs() -> TestMachine {
    let machine = TestMachine::new();
    let folder = machine.folder().display().to_string();
    machine.write(
        "config/sprat.toml",
        format!(
            "[container.disk]\ntarget = \"{folder}/store/x.luks\"\n\n\
             [job.one]\ncontainer = \"disk\"\nsources = \"{folder}/src\"\nexclude = [\"*.tmp\"]\n\n\
             [job.two]\ncontainer = \"disk\"\nsources = [\"{folder}/other\"]\n"
        ),
    );
    machine.write("src/a", "alpha\n");
    machine.write("src/b.tmp", "left out\n");
    machine.write("other/c", "gamma\n");
    machine.init(&["disk", "--size", "1G"]);
    machine
}

#[test]
fn init_makes_a_key_file_that_only_root_reads_and_remembers_the_pins() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let ran = machine.sprat(&[
        "init",
        CONTAINER,
        "--size",
        "1G",
        "--cheap-kdf-for-tests",
        "--json",
    ]);
    let said = ran.json();
    let key = fs::metadata(machine.path("config/keys/x.key")).unwrap();
    assert_eq!((key.len(), key.mode() & 0o7777), (4096, 0o600));
    assert_eq!(
        fs::metadata(machine.path("config/keys")).unwrap().mode() & 0o7777,
        0o700
    );
    assert_eq!(said["key_file_made"], true);
    assert_eq!(said["recovery_sheet"]["secret"], true);
    let pinned = fs::read_dir(machine.path("state/containers"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let pinned = fs::read_to_string(pinned.path()).unwrap();
    assert!(
        pinned.contains(said["fingerprint"].as_str().unwrap()),
        "{pinned}"
    );
    let recovery_key = said["recovery_sheet"]["recovery_key"].as_str().unwrap();
    assert!(!pinned.contains(recovery_key) && !ran.stderr.contains(recovery_key));
}

#[test]
fn key_file_that_others_can_read_gets_a_warning() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let key = machine.path("config/keys/x.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let ran = machine.sprat(&["snapshots", CONTAINER]);
    assert_eq!(ran.code, 0);
    assert!(
        ran.stderr
            .contains("can be read by other users (mode 0644)"),
        "{}",
        ran.whole()
    );
}

#[test]
fn config_jobs_share_a_session_and_one_failure_stops_no_other() {
    requires!(needs::root());
    let machine = with_jobs();
    let ran = machine.ok(&["backup", "--json"]);
    let said = ran.json();
    assert_eq!(said["jobs"].as_array().unwrap().len(), 2);
    assert_eq!(said["sessions"].as_array().unwrap().len(), 1);
    assert_eq!(said["sessions"][0]["durable"], true);

    fs::remove_dir_all(machine.path("src")).unwrap();
    let ran = machine.sprat(&["backup", "--json"]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    let said = ran.json();
    assert_eq!(said["jobs"][0]["failure"]["code"], 1);
    assert_eq!(said["jobs"][1]["result"]["exit"], "done");
    assert!(ran.stderr.contains("\"failure\""), "{}", ran.whole());

    let listed = machine.sprat(&["snapshots", "disk", "--json"]).json();
    let count = |job: &str| {
        let all = listed["snapshots"].as_array().unwrap();
        all.iter()
            .filter(|entry| entry["job"] == job && entry["kind"] == "good")
            .count()
    };
    assert_eq!((count("one"), count("two")), (1, 2));
}

#[test]
fn restore_brings_back_a_path_and_a_dry_run_touches_nothing() {
    requires!(needs::root());
    let machine = with_jobs();
    machine.ok(&["backup", "one", "-q"]);
    let path = format!("one:{}/src/a", machine.folder().display());
    let restore = |more: &[&str]| {
        let mut all = vec!["restore", "disk", &path, "--to", "back"];
        all.extend(more);
        machine.sprat(&all)
    };
    let ran = restore(&["--dry-run"]).succeeded();
    assert!(ran.stdout.contains("would restore one/"), "{}", ran.whole());
    assert!(!machine.path("back/a").exists());
    assert_eq!(restore(&[]).code, 0);
    assert_eq!(fs::read(machine.path("back/a")).unwrap(), b"alpha\n");
    machine.ok(&["restore", "disk", "one", "--to", "whole"]);
    let excluded = machine.path("src/b.tmp");
    assert!(
        !machine
            .path("whole")
            .join(excluded.strip_prefix("/").unwrap())
            .exists()
    );
}

#[test]
fn quiet_backup_prints_only_its_result() {
    requires!(needs::root());
    let machine = with_jobs();
    let ran = machine.sprat(&["backup", "one", "-q"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    assert!(ran.stdout.starts_with("one: snapshot 2"), "{}", ran.stdout);
}

#[test]
fn lock_of_another_machine_stops_a_backup_until_it_is_removed() {
    requires!(needs::root());
    let machine = with_jobs();
    // Not readable as a lease, so its owner is unknown.
    machine.write("store/x.luks.lock.2000000", "x");
    let ran = machine.sprat(&["backup", "one"]);
    assert_eq!(ran.code, 11, "{}", ran.whole());
    assert!(ran.stderr.contains("sprat unlock"), "{}", ran.whole());
    // Reading while another writes would give a mixture of two states.
    assert_eq!(machine.sprat(&["snapshots", "disk"]).code, 11);
    // That machine may be gone for good, and the account may be one that can't remove its lock.
    let ran = machine.ok(&["snapshots", "disk", "--ignore-lock"]);
    assert!(ran.stderr.contains("is ignored"), "{}", ran.whole());
    assert_eq!(machine.sprat(&["backup", "one", "--ignore-lock"]).code, 2);
    // That machine may have died during a rewrite.
    let left = ["x.luks.trim", "x.luks.trim-0123456789abcdef"];
    let left = left.map(|name| machine.write(&format!("store/{name}"), ""));
    let off = ["--watch", "0.1", "--that-machine-is-off", "--json"];
    let ran = machine.ok(&[&["unlock", "disk"][..], &off].concat());
    assert_eq!(ran.json()["taken_over"], "x.luks.lock.2000000");
    assert_eq!(ran.json()["ways"][0]["way"], "off");
    assert!(left.iter().all(|left| !left.exists()));
    machine.ok(&["backup", "one"]);
    assert_eq!(
        machine.sprat(&["unlock", "disk"]).code,
        0,
        "not locked is no failure"
    );
}

#[test]
fn a_result_that_can_not_be_written_stops_no_job_of_another_container() {
    requires!(needs::root());
    let machine = with_jobs();
    let folder = machine.folder().display().to_string();
    let config = fs::read_to_string(machine.path("config/sprat.toml")).unwrap();
    machine.write(
        "config/sprat.toml",
        format!(
            "{config}\n[container.second]\ntarget = \"{folder}/store/y.luks\"\n\n\
             [job.three]\ncontainer = \"second\"\nsources = \"{folder}/other\"\n"
        ),
    );
    machine.init(&["second", "--size", "1G"]);
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let ran = machine.run(machine.command().arg("backup").stdout(full));
    assert_eq!(ran.code, 1, "{}", ran.whole());
    for job in ["one", "two", "three"] {
        let state = format!("job {job}: snapshot 2");
        assert!(ran.stderr.contains(&state), "{state}: {}", ran.whole());
    }
    let listed = machine.sprat(&["snapshots", "second", "--json"]).json();
    assert_eq!(listed["snapshots"][0]["kind"], "good");
}

#[test]
fn job_with_two_containers_makes_a_copy_in_each_and_the_worst_code_counts() {
    requires!(needs::root());
    let machine = with_jobs();
    let folder = machine.folder().display().to_string();
    machine.write(
        "config/conf.d/usb.toml",
        format!(
            "[container.usb]\ntarget = \"{folder}/store/y.luks\"\n\
             [job.both]\ncontainer = [\"usb\", \"disk\"]\nsources = \"{folder}/other\"\n"
        ),
    );
    // The container on the second disk is not there: the other copies are made.
    let ran = machine.sprat(&["backup", "--json"]);
    assert_eq!(ran.code, 10, "{}", ran.whole());
    let said = ran.json();
    let made = |said: &serde_json::Value| -> Vec<String> {
        let jobs = said["jobs"].as_array().unwrap().iter();
        jobs.map(|job| {
            format!(
                "{}@{}: {}",
                job["job"], job["container"], job["result"]["code"]
            )
        })
        .map(|line| line.replace('"', ""))
        .collect()
    };
    let all = ["one@disk: 0", "two@disk: 0", "both@disk: 0", "both@usb: 10"];
    assert_eq!(made(&said), all);

    machine.init(&["usb", "--size", "1G"]);
    let ran = machine.ok(&["backup", "both"]);
    for copy in ["both@disk: snapshot 2", "both@usb: snapshot 2"] {
        assert!(ran.stdout.contains(copy), "{}", ran.whole());
    }
    let said = machine.ok(&["backup", "both@usb", "--json"]).json();
    assert_eq!(made(&said), ["both@usb: 0"]);
    let status = machine.sprat(&["status", "--offline", "--json"]).json();
    for container in status["containers"].as_array().unwrap() {
        let last = &container["jobs"]["both"]["last_run"]["exit"];
        assert_eq!(last, "done", "{container}");
    }
}

#[test]
fn paths_that_are_no_text_are_escaped_in_json() {
    requires!(needs::root());
    use std::os::unix::ffi::OsStrExt;
    let machine = with_jobs();
    machine.ok(&["backup", "one", "-q"]);
    let to = std::ffi::OsStr::from_bytes(b"back\xff");
    let json = |arguments: &[&str]| {
        let mut command = machine.command();
        for word in arguments {
            match *word {
                "TO" => command.arg(to),
                word => command.arg(word),
            };
        }
        let ran = machine.run(command.arg("--json")).succeeded();
        ran.json()
    };
    let escaped = "[DIR]/back\\#377";
    assert_eq!(
        json(&["restore", "disk", "one", "--to", "TO"])["to"],
        escaped
    );
    assert_eq!(json(&["mount", "disk", "TO"])["dir"], escaped);
    assert_eq!(json(&["umount", "TO"])["dir"], escaped);
}

#[test]
fn restore_deletes_excluded_files_only_on_request() {
    requires!(needs::root());
    let machine = with_jobs();
    machine.ok(&["backup", "one", "-q"]);
    let left_out = machine.path("src/b.tmp");
    let restore = |more: &[&str]| {
        let all = [&["restore", "disk", "one", "--to", "/"], more].concat();
        machine.sprat(&all)
    };
    let ran = restore(&["--delete"]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert!(ran.stderr.contains("--delete-excluded"), "{}", ran.whole());
    let ran = restore(&["--delete", "--dry-run"]).succeeded();
    assert!(ran.stdout.contains("b.tmp"), "{}", ran.whole());
    assert!(left_out.exists());
    assert_eq!(restore(&["--delete-excluded"]).code, 2);
    assert_eq!(restore(&["--delete", "--delete-excluded"]).code, 0);
    assert!(!left_out.exists());
}

#[test]
fn source_that_is_a_link_is_reported_before_anything_starts() {
    requires!(needs::root());
    let machine = with_jobs();
    fs::rename(machine.path("other"), machine.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", machine.path("other")).unwrap();
    let ran = machine.sprat(&["backup"]);
    assert_eq!(ran.code, 2, "{}", ran.whole());
    let printed = "job two: source [DIR]/other: is a symbolic link to elsewhere";
    assert!(ran.stderr.contains(printed), "{}", ran.whole());
    let listed = machine.sprat(&["snapshots", "disk", "--json"]).json();
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 0);
}

#[test]
fn containers_and_their_reserves_never_enter_a_snapshot() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    // The copies of a job may go to several containers, and one of them may lie in a source.
    let other = machine.path("store/y.luks").display().to_string();
    let config = format!("[container.other]\ntarget = \"{other}\"\n");
    machine.write("config/sprat.toml", config);
    machine.write("store/y.luks", "another");
    machine.write("store/y.luks.lock.1000001", "its lease");
    machine.write("store/x.luks.reserve", "noise");
    machine.write("store/kept", "x");
    machine.ok(&["backup", CONTAINER, "--name", "all", "store"]);
    let what = format!("all:{}", machine.path("store").display());
    machine.ok(&["restore", CONTAINER, &what, "--to", "back"]);
    let back = fs::read_dir(machine.path("back/store")).unwrap();
    let names: Vec<_> = back.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["kept"]);
}

#[test]
fn missing_disk_is_reported_at_each_backup_until_confirmed() {
    requires!(needs::root());
    let machine = with_jobs();
    fs::create_dir(machine.path("src/disk")).unwrap();
    let disk = Tmpfs::mount(&machine.path("src/disk"), 1);
    machine.write("src/disk/precious", "x");
    let backup = |more: &[&str]| {
        let ran = machine.ok(&[&["backup", "one"], more].concat());
        ran.stderr
    };
    assert!(!backup(&[]).contains("is not mounted"));
    drop(disk);
    for _ in 0..3 {
        let said = backup(&[]);
        assert!(said.contains("src/disk is not mounted"), "{said}");
        assert!(said.contains("--disk-gone [DIR]/src/disk"), "{said}");
    }
    let prune = ["prune", "disk", "--job", "one", "--keep-last", "1"];
    let ran = machine.sprat(&prune);
    let why = "the newest copy of a disk or source that the newest complete one lacks";
    assert!(ran.stdout.contains(why), "{}", ran.whole());
    // Nobody is asked, so the last copy of it stays.
    let listed = machine.ok(&["snapshots", "disk", "--json"]).json();
    let first = listed["snapshots"][0]["folder"].as_str().unwrap();
    let remove = ["remove", "disk", &format!("one/{first}"), "--yes"];
    let said = machine.sprat(&remove).failed_with(2);
    assert!(
        said.contains("the newest copy of a disk or source"),
        "{said}"
    );
    assert!(said.contains("--allow-last-copy"), "{said}");
    for more in [&["--disk-gone", "src/disk"][..], &[]] {
        let said = backup(more);
        assert!(!said.contains("is not mounted"), "{said}");
    }
    let ran = machine.sprat(&prune);
    assert!(!ran.stdout.contains(why), "{}", ran.whole());
}

/// Where `/` is not a shared mount, a copy of the mounts stays as it was made.
#[test]
fn a_session_sees_later_disks_and_keeps_no_other_disk_busy() {
    requires!(
        needs::root(),
        needs::program("unshare"),
        needs::program("mkfs.ext4")
    );
    let machine = with_jobs();
    for folder in ["other/disk", "foreign"] {
        fs::create_dir(machine.path(folder)).unwrap();
    }
    let big: Vec<u8> = (0..150_u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    fs::write(machine.path("src/big"), big).unwrap();
    // The backup runs meanwhile: when rsync copies the first job, one disk comes and another goes.
    let script = "set -e; sprat=$1; src=$2; other=$3; foreign=$4; image=$5; shift 5\n\
        truncate -s 8M \"$image\"; mkfs.ext4 -q -F \"$image\"; mount -o loop \"$image\" \"$foreign\"\n\
        loop=$(losetup -n -O NAME -j \"$image\")\n\
        \"$sprat\" backup & session=$!\n\
        copies() { for p in $(pgrep -x rsync); do\n\
          tr '\\0' '\\n' < /proc/$p/cmdline 2> /dev/null | grep -qxF \"$src\" && return; done; return 1; }\n\
        until copies; do kill -0 $session; sleep 0.02; done\n\
        mount -t tmpfs later \"$other/disk\"; echo x > \"$other/disk/precious\"\n\
        umount \"$foreign\"\n\
        kill -0 $session; sleep 0.3; if losetup \"$loop\" 2> /dev/null | grep -qF \"$image\"; then echo BUSY; fi\n\
        wait $session; umount \"$other/disk\"";
    let text = |name: &str| machine.path(name).to_str().unwrap().to_owned();
    let mut command = machine.command_of("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-c", script, "sh"]);
    command.args([
        sprat_testkit::program::sprat().display().to_string(),
        text("src"),
        text("other"),
    ]);
    command.args([text("foreign"), text("image")]);
    let ran = machine.run(&mut command).succeeded();
    assert!(!ran.whole().contains("BUSY"), "{}", ran.whole());
    machine.ok(&["restore", "disk", "two", "--to", &text("back")]);
    let source = machine.path("other/disk/precious");
    let back = machine.path("back").join(source.strip_prefix("/").unwrap());
    assert!(back.exists(), "{}", ran.whole());
}

#[test]
fn ps_shows_the_role_and_the_container_of_each_process() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt"]);
    let processes = machine.processes().into_iter();
    let mut names: Vec<String> = processes.map(|process| process.words[0].clone()).collect();
    machine.ok(&["umount", "mnt"]);
    names.sort();
    names.dedup();
    assert_eq!(names, ["sprat: mount x", "sprat: volume x"]);
    machine.nothing_is_left();
}

#[test]
fn init_if_missing_makes_a_container_once_and_proves_its_key() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let arguments = ["init", CONTAINER, "--if-missing", "--size", "1G", CHEAP];
    machine.ok(&arguments);
    let before = fs::read(machine.path("config/keys/x.key")).unwrap();
    let file = machine.path(CONTAINER).metadata().unwrap();
    let again = machine.sprat(&arguments);
    assert_eq!(again.code, 5, "{}", again.whole());
    assert!(
        again.stdout.contains("the key opens it"),
        "{}",
        again.whole()
    );
    let after = machine.path(CONTAINER).metadata().unwrap();
    assert_eq!(file.modified().unwrap(), after.modified().unwrap());
    assert_eq!(fs::read(machine.path("config/keys/x.key")).unwrap(), before);
    // A wrong key is a failure: a script must not go on.
    machine.write("config/keys/x.key", [7; 4096]);
    machine.sprat(&arguments).failed_with(12);
    // Without the option it stays an error.
    machine.write("config/keys/x.key", before);
    machine.sprat(&["init", CONTAINER, CHEAP]).failed_with(1);
}

#[test]
fn init_reports_the_inode_limit_and_warns_of_larger_sources() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let folder = machine.folder().display().to_string();
    machine.write(
        "config/sprat.toml",
        format!(
            "[container.disk]\ntarget = \"{folder}/store/x.luks\"\n\n\
             [job.one]\ncontainer = \"disk\"\nsources = \"{folder}/src\"\n"
        ),
    );
    fs::create_dir(machine.path("src")).unwrap();
    let _disk = Tmpfs::mount(&machine.path("src"), 8);
    for n in 0..1500 {
        machine.write(&format!("src/{n}"), "");
    }
    // mke2fs rounds the size; the reported number is the real one.
    for (options, more) in [
        (&["--size", "64M"][..], false),
        (&["--size", "600M"], false),
        (&["--size", "64M", "--inodes", "1000"], true),
        (&["--size", "64M", "--inodes", "5000"], false),
    ] {
        let _ = fs::remove_file(machine.path("store/x.luks"));
        let _ = fs::remove_dir_all(machine.path("state"));
        let init = ["init", "disk", "--cheap-kdf-for-tests", "--no-cache"];
        let made = machine.ok(&[&init[..], options].concat());
        let (_, said) = made
            .stderr
            .split_once("the container has room for about ")
            .unwrap();
        let digits = said.chars().take_while(|c| *c == ',' || c.is_ascii_digit());
        let said: String = digits.filter(char::is_ascii_digit).collect();
        let said: u64 = said.parse().unwrap();
        let warned = made.stderr.contains("with --inodes 30");
        assert_eq!(warned, more, "{options:?}: {}", made.stderr);
        machine.ok(&["snapshots", "disk"]);
        let status = machine
            .sprat(&["status", "disk", "--offline", "--json"])
            .json();
        let there = status["containers"][0]["volume"]["inodes"]
            .as_u64()
            .unwrap();
        assert!(
            there.abs_diff(said) <= there / 20,
            "{options:?}: {said}, {there}"
        );
    }
}
