//! Trim, by each of its ways: what the server gets back, and what is refused. Cut off and killed it is
//! in `torture/strikes.rs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use sprat_session::{Access, TrimHow, TrimReport, TrimRoute, Worthwhile};
use sprat_testkit::ssh_server::OpenSshOptions;
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};
use sprat_testkit_session::session_harness::{
    Observed, SessionHarness, fill, missing, never, ssh_missing,
};

/// The container has a snapshot less than it had: the files of `source/gone` are in none any more.
/// Returns how many bytes that frees.
fn delete_half(harness: &mut SessionHarness, mib: u64) -> u64 {
    harness.size_bytes += (mib * 5 / 2) << 20;
    harness.create();
    let files = usize::try_from(mib).unwrap();
    fill(&harness.path("source/gone"), files, 1 << 20, 11);
    fill(&harness.path("source/kept"), files / 2, 1 << 20, 12);
    harness.backup().unwrap();
    fs::remove_dir_all(harness.path("source/gone")).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    harness.backup().unwrap();
    let mount = harness.path("mnt").display().to_string();
    ok(&mut harness.command(&["mount", &harness.target().to_string(), &mount, "--rw"]));
    // A directory entry keeps its folder open, and so the mount.
    let job = fs::read_dir(&mount)
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .find(|path| !path.ends_with("lost+found"))
        .unwrap();
    let mut snapshots: Vec<PathBuf> = fs::read_dir(job)
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with("20")
        })
        .collect();
    snapshots.sort();
    fs::remove_dir_all(&snapshots[0]).unwrap();
    ok(&mut harness.command(&["umount", &mount]));
    mib << 20
}

fn ok(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn trim(harness: &SessionHarness, more: &[&str]) -> Value {
    let target = harness.target().to_string();
    let mut arguments = vec!["--json", "trim", &target];
    arguments.extend(more);
    let output = ok(&mut harness.command(&arguments));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    said["trim"].clone()
}

fn gives_back(harness: &mut SessionHarness, mib: u64, more: &[&str], route: &str) {
    let freed = delete_half(harness, mib);
    let before = harness.allocated();
    let said = trim(harness, more);
    let given_back = before - harness.allocated();
    println!("{route}: {freed} bytes freed, {given_back} given back; {said}");
    assert_eq!(said["route"], route);
    assert!(
        given_back * 100 >= freed * 95,
        "{given_back} of {freed} bytes: {said}"
    );
    // Without a shell only the largest possible size of the new file is known.
    if route.starts_with("rewrite") {
        assert!(said["measure"].is_null(), "{said}");
        let kept = said["kept_bytes"].as_u64().unwrap();
        assert!(harness.allocated() <= kept, "{said}");
    } else {
        let told = said["measure"]["given_back_bytes"].as_u64().unwrap();
        assert!(told.abs_diff(given_back) < 1 << 20, "{told}, {given_back}");
    }
    harness.assert_nothing_remains();
    assert_eq!(harness.server_files(), ["x.luks"]);
    harness.assert_clean();
    harness.restore_and_compare();
    // Backups continue, and there is nothing more to free.
    fill(&harness.path("source/new"), 5, 1 << 20, 13);
    harness.backup().unwrap();
    harness.restore_and_compare();
    harness.assert_clean();
}

/// How much is freed; the long form has a volume of 2 GiB.
fn mib() -> u64 {
    let asked = std::env::var("SPRAT_TRIM_MIB").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(60)
}

#[test]
fn a_local_container_gets_holes() {
    requires!(missing());
    gives_back(&mut SessionHarness::local(), mib(), &[], "local_punch");
}

#[test]
fn an_account_with_a_shell_makes_the_holes() {
    requires!(ssh_missing().or_else(|| needs::program("fallocate")));
    gives_back(&mut SessionHarness::ssh(), mib(), &[], "shell_punch");
}

/// The trim of `sprat run`: from a size on that is worth its session.
fn trim_if(harness: &SessionHarness, bytes: u64, percent: u64) -> TrimReport {
    let how = TrimHow::PunchIf(Worthwhile { bytes, percent });
    let (options, secret) = (harness.options(Access::ReadWrite), &harness.secret);
    let done = sprat_session::trim(options, secret, how, &mut Observed::default(), &never());
    done.unwrap().1
}

#[test]
fn trim_that_is_not_worth_it_changes_nothing() {
    requires!(ssh_missing().or_else(|| needs::program("fallocate")));
    for (mut harness, route) in [
        (SessionHarness::local(), TrimRoute::LocalPunch),
        (SessionHarness::ssh(), TrimRoute::ShellPunch),
    ] {
        let freed = delete_half(&mut harness, 20);
        let before = harness.allocated();
        for (bytes, percent) in [(freed * 2, 1), (1, 99)] {
            let report = trim_if(&harness, bytes, percent);
            assert_eq!(report.route, TrimRoute::NotWorthwhile);
            assert!(report.measure.is_none());
        }
        assert!(harness.allocated() >= before);
        let report = trim_if(&harness, freed / 2, 10);
        assert_eq!(report.route, route);
        assert!(report.measure.unwrap().given_back_bytes >= freed * 9 / 10);
        assert!(harness.allocated() < before - freed * 9 / 10);
        harness.assert_clean();
        harness.restore_and_compare();
        harness.assert_nothing_remains();
    }
    // Without a shell no hole can be made there, and nobody knows what the file takes.
    let mut harness = sftp_only("");
    delete_half(&mut harness, 5);
    assert_eq!(trim_if(&harness, 1, 1).route, TrimRoute::NotWorthwhile);
    assert_eq!(harness.server_files(), ["x.luks"]);
}

/// A server whose account has SFTP and nothing else.
fn sftp_only(arguments: &str) -> SessionHarness {
    SessionHarness::ssh_with(&OpenSshOptions {
        config_lines: vec![format!("ForceCommand internal-sftp {arguments}")],
        ..OpenSshOptions::default()
    })
}

#[test]
fn server_without_shell_copies_on_request() {
    requires!(ssh_missing());
    let mut harness = sftp_only("");
    gives_back(&mut harness, mib(), &["--rewrite"], "rewrite");
    let target = harness.target().to_string();
    let refused = harness.command(&["trim", &target]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("no shell") && said.contains("trim --rewrite"),
        "{said}"
    );
    assert_eq!(said.matches("no shell").count(), 1, "{said}");
    assert!(!said.contains("this store"), "{said}");
    harness.assert_clean();
}

#[test]
fn without_copy_data_rewrite_through_client_needs_its_option() {
    requires!(ssh_missing());
    let mut harness = sftp_only("-P copy-data");
    delete_half(&mut harness, 5);
    let target = harness.target().to_string();
    let refused = harness
        .command(&["trim", &target, "--rewrite"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("--through-client"), "{said}");
    assert_eq!(harness.server_files(), ["x.luks"]);
    drop(harness);
    gives_back(
        &mut sftp_only("-P copy-data"),
        20,
        &["--rewrite", "--through-client"],
        "rewrite_through_client",
    );
}

#[test]
fn owner_and_mode_outlive_a_rewrite() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    requires!(ssh_missing());
    let mut harness = SessionHarness::ssh();
    delete_half(&mut harness, 5);
    let container = harness.container();
    fs::set_permissions(&container, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&container, Some(12_345), Some(54_321)).unwrap();
    let before = harness.allocated();
    let said = trim(&harness, &["--rewrite"]);
    let told = said["measure"]["given_back_bytes"].as_u64().unwrap();
    let given_back = before - harness.allocated();
    assert!(told.abs_diff(given_back) < 1 << 20, "{told}, {given_back}");
    let found = fs::metadata(&container).unwrap();
    assert_eq!(found.mode() & 0o7777, 0o640);
    assert_eq!((found.uid(), found.gid()), (12_345, 54_321));
    harness.restore_and_compare();
}

#[test]
fn rewrite_that_frees_nothing_is_refused() {
    requires!(missing());
    let mut harness = SessionHarness::local();
    // Large enough for bitmaps that were never written: 8 KiB for each 128 MiB.
    harness.size_bytes += 64 << 30;
    harness.create();
    fill(&harness.path("source"), 5, 1 << 20, 11);
    harness.backup().unwrap();
    let before = harness.allocated();
    let target = harness.target().to_string();
    // The first one may still find some space; it must never take any.
    let first = harness
        .command(&["trim", &target, "--rewrite"])
        .output()
        .unwrap();
    assert!(
        harness.allocated() <= before,
        "{} of {before}",
        harness.allocated()
    );
    let refused = harness
        .command(&["trim", &target, "--rewrite"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{first:?} {said}");
    assert!(said.contains("would free nothing"), "{said}");
    assert!(harness.allocated() <= before);
    harness.assert_clean();
    harness.restore_and_compare();
}

#[test]
fn a_rewrite_that_does_not_fit_is_refused_with_the_numbers() {
    requires!(ssh_missing());
    let mut harness = sftp_only("");
    let disk = Tmpfs::mount(&harness.path("store"), 64);
    delete_half(&mut harness, 20);
    let before = fs::read(harness.container()).unwrap();
    let target = harness.target().to_string();
    disk.remount("size=40m");
    let refused = harness
        .command(&["trim", &target, "--rewrite"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("needs") && said.contains("are free"),
        "{said}"
    );
    assert!(
        before == fs::read(harness.container()).unwrap(),
        "it is as it was"
    );
    assert_eq!(harness.server_files(), ["x.luks"]);
    drop(disk);
}

#[test]
fn a_second_trim_finds_nothing_and_the_cache_stays_right() {
    requires!(ssh_missing().or_else(|| needs::program("fallocate")));
    let mut harness = SessionHarness::ssh();
    delete_half(&mut harness, 10);
    trim(&harness, &[]);
    let said = trim(&harness, &[]);
    assert_eq!(said["measure"]["given_back_bytes"], 0, "{said}");
    // Each reads what the sessions before have kept.
    for round in 0..3 {
        harness.restore_and_compare();
        fill(&harness.path(format!("source/{round}")), 3, 100_000, round);
        harness.backup().unwrap();
    }
    harness.assert_clean();
}

#[test]
fn a_damaged_file_system_is_not_trimmed() {
    requires!(missing());
    let mut harness = SessionHarness::local();
    delete_half(&mut harness, 5);
    // What the kernel does at an error: s_state, and a new checksum of the super block.
    let image = harness.path("plain");
    let target = harness.target().to_string();
    let mount = harness.path("mnt").display().to_string();
    ok(&mut harness.command(&["mount", &target, &mount, "--rw"]));
    let device = fs::read_to_string("/proc/self/mounts")
        .unwrap()
        .lines()
        .find(|line| line.contains(&mount))
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .unwrap();
    fs::write(&image, "").unwrap();
    let trigger = Path::new("/sys/fs/ext4")
        .join(device.trim_start_matches("/dev/"))
        .join("trigger_fs_error");
    let triggered = fs::write(&trigger, "a test").is_ok();
    let _ = harness.command(&["umount", &mount]).output();
    requires!((!triggered).then(|| format!("{} can't be written", trigger.display())));
    let refused = harness.command(&["trim", &target]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(13), "{said}");
    assert!(said.contains("marked as faulty"), "{said}");
}
