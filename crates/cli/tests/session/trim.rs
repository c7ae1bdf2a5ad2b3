//! Trim, by each of its ways: what the server gets back, and what is refused. Cut off and killed it is
//! in `torture/strikes.rs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::bench::{Bench, fill, missing, ssh_missing};
use serde_json::Value;
use sprat_testkit::ssh_server::OpenSshOptions;
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};

/// The container has a snapshot less than it had: the files of `source/gone` are in none any more.
/// Returns how many bytes that frees.
fn delete_half(bench: &mut Bench, mib: u64) -> u64 {
    bench.size_bytes += (mib * 5 / 2) << 20;
    bench.create();
    let files = usize::try_from(mib).unwrap();
    fill(&bench.path("source/gone"), files, 1 << 20, 11);
    fill(&bench.path("source/kept"), files / 2, 1 << 20, 12);
    bench.backup().unwrap();
    fs::remove_dir_all(bench.path("source/gone")).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    bench.backup().unwrap();
    let mount = bench.path("mnt").display().to_string();
    ok(&mut bench.command(&["mount", &bench.target().to_string(), &mount, "--rw"]));
    // An entry holds its folder open, and the mount with it.
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
    ok(&mut bench.command(&["umount", &mount]));
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

fn trim(bench: &Bench, more: &[&str]) -> Value {
    let target = bench.target().to_string();
    let mut arguments = vec!["--json", "trim", &target];
    arguments.extend(more);
    let output = ok(&mut bench.command(&arguments));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    said["trim"].clone()
}

fn gives_back(bench: &mut Bench, mib: u64, more: &[&str], route: &str) {
    let freed = delete_half(bench, mib);
    let before = bench.allocated();
    let said = trim(bench, more);
    let given_back = before - bench.allocated();
    println!("{route}: {freed} bytes freed, {given_back} given back; {said}");
    assert_eq!(said["route"], route);
    assert!(
        given_back * 100 >= freed * 95,
        "{given_back} of {freed} bytes: {said}"
    );
    // Without a shell only what the new file takes at most is known.
    if route.starts_with("rewrite") {
        assert!(said["measure"].is_null(), "{said}");
        let kept = said["kept_bytes"].as_u64().unwrap();
        assert!(bench.allocated() <= kept, "{said}");
    } else {
        let told = said["measure"]["given_back_bytes"].as_u64().unwrap();
        assert!(told.abs_diff(given_back) < 1 << 20, "{told}, {given_back}");
    }
    bench.assert_nothing_remains();
    assert_eq!(bench.server_files(), ["x.luks"]);
    bench.assert_clean();
    bench.restore_and_compare();
    // Life goes on, and there is nothing more to give back.
    fill(&bench.path("source/new"), 5, 1 << 20, 13);
    bench.backup().unwrap();
    bench.restore_and_compare();
    bench.assert_clean();
}

/// How much is freed; the long form has a volume of 2 GiB.
fn mib() -> u64 {
    let asked = std::env::var("SPRAT_TRIM_MIB").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(60)
}

#[test]
fn a_local_container_gets_holes() {
    requires!(missing());
    gives_back(&mut Bench::local(), mib(), &[], "local_punch");
}

#[test]
fn an_account_with_a_shell_makes_the_holes() {
    requires!(ssh_missing().or_else(|| needs::program("fallocate")));
    gives_back(&mut Bench::ssh(), mib(), &[], "shell_punch");
}

/// A server whose account has SFTP and nothing else.
fn sftp_only(arguments: &str) -> Bench {
    Bench::ssh_with(&OpenSshOptions {
        config_lines: vec![format!("ForceCommand internal-sftp {arguments}")],
        ..OpenSshOptions::default()
    })
}

#[test]
fn a_server_without_shell_copies_by_itself_where_that_is_asked_for() {
    requires!(ssh_missing());
    let mut bench = sftp_only("");
    gives_back(&mut bench, mib(), &["--rewrite"], "rewrite");
    let target = bench.target().to_string();
    let refused = bench.command(&["trim", &target]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("no shell") && said.contains("trim --rewrite"),
        "{said}"
    );
    bench.assert_clean();
}

#[test]
fn without_copy_data_the_bytes_cross_the_line_only_where_that_is_asked_for() {
    requires!(ssh_missing());
    let mut bench = sftp_only("-P copy-data");
    delete_half(&mut bench, 5);
    let target = bench.target().to_string();
    let refused = bench
        .command(&["trim", &target, "--rewrite"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("--through-client"), "{said}");
    assert_eq!(bench.server_files(), ["x.luks"]);
    drop(bench);
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
    let mut bench = Bench::ssh();
    delete_half(&mut bench, 5);
    let container = bench.container();
    fs::set_permissions(&container, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&container, Some(12_345), Some(54_321)).unwrap();
    let before = bench.allocated();
    let said = trim(&bench, &["--rewrite"]);
    let told = said["measure"]["given_back_bytes"].as_u64().unwrap();
    let given_back = before - bench.allocated();
    assert!(told.abs_diff(given_back) < 1 << 20, "{told}, {given_back}");
    let found = fs::metadata(&container).unwrap();
    assert_eq!(found.mode() & 0o7777, 0o640);
    assert_eq!((found.uid(), found.gid()), (12_345, 54_321));
    bench.restore_and_compare();
}

#[test]
fn a_rewrite_that_would_give_nothing_back_is_refused() {
    requires!(missing());
    let mut bench = Bench::local();
    // Large enough for bitmaps that were never written: 8 KiB for each 128 MiB.
    bench.size_bytes += 64 << 30;
    bench.create();
    fill(&bench.path("source"), 5, 1 << 20, 11);
    bench.backup().unwrap();
    let before = bench.allocated();
    let target = bench.target().to_string();
    // The first one may still find some space; it must never take any.
    let first = bench
        .command(&["trim", &target, "--rewrite"])
        .output()
        .unwrap();
    assert!(
        bench.allocated() <= before,
        "{} of {before}",
        bench.allocated()
    );
    let refused = bench
        .command(&["trim", &target, "--rewrite"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{first:?} {said}");
    assert!(said.contains("give nothing back"), "{said}");
    assert!(bench.allocated() <= before);
    bench.assert_clean();
    bench.restore_and_compare();
}

#[test]
fn a_rewrite_that_does_not_fit_is_refused_with_the_numbers() {
    requires!(ssh_missing());
    let mut bench = sftp_only("");
    let disk = Tmpfs::mount(&bench.path("store"), 64);
    delete_half(&mut bench, 20);
    let before = fs::read(bench.container()).unwrap();
    let target = bench.target().to_string();
    disk.remount("size=40m");
    let refused = bench
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
        before == fs::read(bench.container()).unwrap(),
        "it is as it was"
    );
    assert_eq!(bench.server_files(), ["x.luks"]);
    drop(disk);
}

#[test]
fn a_second_trim_finds_nothing_and_the_cache_stays_right() {
    requires!(ssh_missing().or_else(|| needs::program("fallocate")));
    let mut bench = Bench::ssh();
    delete_half(&mut bench, 10);
    trim(&bench, &[]);
    let said = trim(&bench, &[]);
    assert_eq!(said["measure"]["given_back_bytes"], 0, "{said}");
    // Each reads what the sessions before have kept.
    for round in 0..3 {
        bench.restore_and_compare();
        fill(&bench.path(&format!("source/{round}")), 3, 100_000, round);
        bench.backup().unwrap();
    }
    bench.assert_clean();
}

#[test]
fn a_damaged_file_system_is_not_trimmed() {
    requires!(missing());
    let mut bench = Bench::local();
    delete_half(&mut bench, 5);
    // What the kernel does at an error: s_state, with the super block's checksum anew.
    let image = bench.path("plain");
    let target = bench.target().to_string();
    let mount = bench.path("mnt").display().to_string();
    ok(&mut bench.command(&["mount", &target, &mount, "--rw"]));
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
    let _ = bench.command(&["umount", &mount]).output();
    if !triggered {
        println!("skipped: {} can't be written", trigger.display());
        return;
    }
    let refused = bench.command(&["trim", &target]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(13), "{said}");
    assert!(said.contains("marked as faulty"), "{said}");
}
