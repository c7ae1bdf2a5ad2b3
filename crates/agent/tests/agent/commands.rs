//! The administrator's commands.

use std::fs;

use crate::client::{BLOCK, EAGER, Served, agent, blocks};

/// The exit code of a command, and what it printed.
pub fn code(served: &Served, words: &[&str]) -> (Option<i32>, String) {
    let output = served.command(words).output().unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    (output.status.code(), text)
}

fn three_states(policy: &str) -> Served {
    let served = Served::with_container(policy, &blocks(16, 1));
    for number in 0..3_u64 {
        served.overwrite(&[(number * BLOCK as u64, vec![9; BLOCK])]);
    }
    served
}

#[test]
fn past_states_are_listed_pinned_and_exported() {
    let served = three_states(EAGER);
    let name = served.head(2, "name");
    let list = served.run(&["list"]);
    assert_eq!(list.lines().count(), 3);
    assert!(
        list.contains(&name) && list.contains("saved 4.0 KiB"),
        "{list}"
    );
    served.run(&["pin", "x.luks", name.trim_end_matches(".luks")]);
    let (failed, text) = code(&served, &["expire", "x.luks", &name, "--yes"]);
    assert!(failed == Some(1) && text.contains("pinned"), "{text}");
    served.run(&["unpin", "x.luks", &name]);
    let (failed, text) = code(&served, &["expire", "x.luks", &name]);
    assert!(failed == Some(1) && text.contains("--yes"), "{text}");
    let (failed, text) = code(
        &served,
        &["expire", "x.luks", &served.head(3, "name"), "--yes"],
    );
    assert!(failed == Some(1) && text.contains("newest"), "{text}");
    let to = served.path("exported");
    // The kernel kills it at the limit: half a file has not the name of a whole one.
    let mut killed = std::process::Command::new("sh");
    killed.args(["-c", "ulimit -f 8; exec \"$@\"", "sh"]);
    killed.arg(agent()).args(["export", "x.luks", &name]);
    killed.arg(&to).arg("--root").arg(served.path(""));
    assert!(!killed.status().unwrap().success() && !to.exists());
    served.run(&["export", "x.luks", &name, to.to_str().unwrap()]);
    assert!(fs::read(&to).unwrap() == served.past(2));
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&to).unwrap());
    assert_eq!(mode & 0o777, 0o600);
    // Never over a file that is there.
    assert_eq!(
        code(&served, &["export", "x.luks", &name, to.to_str().unwrap()]).0,
        Some(1)
    );
}

#[test]
fn check_names_the_damaged_state() {
    let served = three_states(EAGER);
    assert!(
        served
            .run(&["check", "--read-data"])
            .ends_with("3 past states checked, 0 findings\n")
    );
    // The data block of the only record.
    served.flip("logs/2", BLOCK as u64 + 5);
    assert_eq!(code(&served, &["check"]).0, Some(0));
    let (failed, text) = code(&served, &["check", "--read-data"]);
    assert!(
        failed == Some(1) && text.contains(&served.head(2, "name")) && text.contains("1 findings"),
        "{text}"
    );
}

/// Garbage over most of the container.
#[test]
fn an_alarm_holds_everything_until_it_is_confirmed() {
    let policy = "keep = all 1s\nat_least = 0\nnew = burst 1000000, then 1 per 1s\nsecret = 6h\nfree_min = 0%\nheader = free\n";
    let served = Served::with_container(policy, &blocks(20_000, 1));
    served.overwrite(&[(0, vec![9; BLOCK])]);
    served.run(&["tidy"]);
    assert_eq!(code(&served, &["status"]).0, Some(0));
    let garbage: Vec<_> = (0..20_000 / 50)
        .map(|n| (n * 50 * BLOCK as u64, vec![7; 50 * BLOCK]))
        .collect();
    served.overwrite(&garbage);
    served.overwrite(&[(0, vec![1; BLOCK])]);
    std::thread::sleep(std::time::Duration::from_millis(2200));
    let text = served.run(&["tidy"]);
    assert!(text.contains("nothing expires"), "{text}");
    let (status, text) = code(&served, &["status"]);
    assert!(
        status == Some(3) && text.contains("ALARM") && text.contains("sprat-agent ack x.luks"),
        "{text}"
    );
    assert!(
        code(&served, &["status", "--json"])
            .1
            .contains("\"alarm\":true")
    );
    assert_eq!(served.numbers().len(), 3);
    served.run(&["hold", "x.luks"]);
    served.run(&["ack", "x.luks"]);
    assert!(served.run(&["tidy"]).contains("held by the administrator"));
    served.run(&["release", "x.luks"]);
    served.run(&["tidy"]);
    assert_eq!(served.numbers(), [3]);
    assert_eq!(code(&served, &["status"]).0, Some(0));
}

/// The client that gave the alarm is still connected, and its generation goes on.
#[test]
fn what_is_overwritten_after_the_ack_gives_a_further_alarm() {
    let served = Served::with_container(EAGER, &blocks(60_000, 1));
    let mut client = served.connect();
    let handle = client.open("x.luks", crate::client::READ_WRITE).unwrap();
    let mut garbage = |part: std::ops::Range<u64>| {
        for number in part.map(|part| part * 50) {
            let at = number * BLOCK as u64;
            assert_eq!(client.write(&handle, at, &[7; 50 * BLOCK]), 0);
        }
    };
    garbage(0..400);
    served.run(&["tidy"]);
    assert_eq!(code(&served, &["status"]).0, Some(3));
    served.run(&["ack", "x.luks"]);
    served.run(&["tidy"]);
    assert_eq!(code(&served, &["status"]).0, Some(0));
    garbage(400..800);
    // Damage does not hide it.
    served.flip("g.1/map", 3);
    served.run(&["tidy"]);
    let (status, text) = code(&served, &["status"]);
    assert!(status == Some(3) && text.contains("in 1 days"), "{text}");
    assert_eq!(served.numbers(), [1]);
}

#[test]
fn a_container_that_fails_stops_neither_another_one_nor_the_notify_program() {
    use std::os::unix::fs::PermissionsExt;
    let policy = "keep = all 1s\nat_least = 0\nnew = burst 1000000, then 1 per 1s\nsecret = 6h\nfree_min = 0%\nheader = free\n";
    let served = three_states(policy);
    let (program, got) = (served.path("program"), served.path("got"));
    fs::write(&program, format!("#!/bin/sh\ncat > {}\n", got.display())).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    let policy = format!("{policy}notify = {}\n", program.display());
    fs::write(served.path(".sprat-agent/policy"), policy).unwrap();
    // Before it by name, and its logs can't be read.
    fs::write(served.path("a.luks"), "").unwrap();
    fs::create_dir(served.path(".sprat-agent/a.luks")).unwrap();
    fs::write(served.path(".sprat-agent/a.luks/logs"), "no folder").unwrap();
    fs::write(served.path(".sprat-agent/x.luks/alarm"), "seen\n").unwrap();
    let (failed, text) = code(&served, &["tidy"]);
    assert!(
        failed == Some(1) && text.contains("a.luks: failed") && text.contains("x.luks: 0 past"),
        "{text}"
    );
    assert!(fs::read_to_string(&got).unwrap().contains("ALARM: seen"));
    assert!(!served.path(".sprat-agent/tidied").exists());
    fs::remove_file(served.path(".sprat-agent/a.luks/logs")).unwrap();
    served.run(&["tidy"]);
    assert!(served.path(".sprat-agent/tidied").exists());
}

/// The account could neither serve nor write what belongs to root.
#[test]
fn what_root_makes_belongs_to_the_account() {
    use std::os::unix::fs::{MetadataExt, lchown};
    sprat_testkit::requires!(sprat_testkit::needs::root());
    let served = three_states(EAGER);
    fs::write(served.path("y.luks"), blocks(1, 1)).unwrap();
    let mut all = vec![served.path("")];
    let mut owners = std::collections::BTreeMap::new();
    let mut walk = |change: bool| {
        all.truncate(1);
        let mut at = 0;
        while at < all.len() {
            let path = all[at].clone();
            if path.is_dir() {
                all.extend(
                    fs::read_dir(&path)
                        .unwrap()
                        .map(|entry| entry.unwrap().path()),
                );
            }
            if change {
                lchown(&path, Some(12345), Some(12345)).unwrap();
            }
            owners.insert(
                path.clone(),
                fs::symlink_metadata(&path).map_or(0, |found| found.uid()),
            );
            at += 1;
        }
        let foreign: Vec<_> = owners.iter().filter(|(_, uid)| **uid != 12345).collect();
        assert!(foreign.is_empty(), "{foreign:?}");
        owners.clear();
        at
    };
    let before = walk(true);
    let name = served.head(2, "name");
    served.run(&["pin", "x.luks", &name]);
    served.run(&["hold", "x.luks"]);
    served.run(&["allow-header", "x.luks"]);
    served.run(&["allow-header", "y.luks"]);
    served.run(&["tidy"]);
    served.run(&["check"]);
    served.run(&["revert", "x.luks", &name, "--yes"]);
    assert!(walk(false) > before);
}

#[test]
fn status_of_many_roots_is_one_page_with_the_gravest_code() {
    let all = tempfile::tempdir().unwrap();
    let [good, bad] = [0, 1].map(|_| Served::in_folder(all.path(), EAGER));
    for served in [&good, &bad] {
        fs::write(served.path("x.luks"), blocks(4, 1)).unwrap();
        served.overwrite(&[(0, vec![1; 10])]);
    }
    fs::create_dir(all.path().join("no-root")).unwrap();
    let page = all.path().join("page.html");
    let status = |more: &[&str]| {
        let mut command = std::process::Command::new(agent());
        command.args(["status", "--all"]).arg(all.path()).args(more);
        let output = command.output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let html = ["--html", page.to_str().unwrap()];
    assert_eq!(status(&html), (Some(0), String::new()));
    fs::write(bad.path(".sprat-agent/x.luks/alarm"), "<b>\n").unwrap();
    assert_eq!(status(&html).0, Some(3));
    let text = fs::read_to_string(&page).unwrap();
    assert!(
        text.contains("&lt;b&gt;") && !text.contains("<b>"),
        "{text}"
    );
    for served in [&good, &bad] {
        assert!(text.contains(served.path("").to_str().unwrap().trim_end_matches('/')));
    }
    assert_eq!(text.matches("<td>x.luks<td>").count(), 2, "{text}");
    let (_, text) = status(&[]);
    assert_eq!(text.matches("x.luks: 1 past states").count(), 2, "{text}");
    assert_eq!(status(&["--prometheus"]).0, Some(2));
    assert_eq!(status(&["--json"]).0, Some(2));
    // One that can't be read hides no other.
    fs::write(good.path(".sprat-agent/policy"), "nonsense").unwrap();
    let (code, text) = status(&html);
    assert_eq!((code, text.as_str()), (Some(1), ""));
    let text = fs::read_to_string(&page).unwrap();
    assert!(text.contains("&lt;b&gt;"), "{text}");
    // No root at all is no good news.
    fs::remove_dir_all(good.path("")).unwrap();
    fs::remove_dir_all(bad.path("")).unwrap();
    assert_eq!(status(&[]).0, Some(1));
}

/// The last write was two days ago.
#[test]
fn an_overdue_backup_runs_the_notify_program_once_and_holds_expiry() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let policy = "keep = all 1s\nat_least = 0\nnew = burst 1000000, then 1 per 1s\nsecret = 6h\nfree_min = 0%\nheader = free\n\
                  expect = 26h\n";
    let served = three_states(policy);
    let (program, got) = (served.path("program"), served.path("got"));
    let script = |rest: &str| {
        let text = format!("#!/bin/sh\ncat >> {}\n{rest}\n", got.display());
        fs::write(&program, text).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    };
    let policy = format!("{policy}notify = {}\n", program.display());
    fs::write(served.path(".sprat-agent/policy"), policy).unwrap();
    script("exit 7");
    // Nothing is wrong: nothing runs.
    served.run(&["tidy"]);
    assert!(!got.exists());
    served.overwrite(&[(0, vec![3; 10])]);
    served.overwrite(&[(0, vec![4; 10])]);
    let before = served.numbers();
    let two_days_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(48 * 3600);
    let live = fs::File::options()
        .write(true)
        .open(served.path("x.luks"))
        .unwrap();
    live.set_modified(two_days_ago).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(2200));
    let (failed, text) = code(&served, &["tidy"]);
    assert!(failed == Some(1) && text.contains("notify"), "{text}");
    script("exit 0");
    served.run(&["tidy"]);
    served.run(&["tidy"]);
    let text = fs::read_to_string(&got).unwrap();
    assert_eq!(text.lines().count(), 2, "the one that failed, and one more");
    assert!(
        text.contains("\"problems\":[") && text.contains("x.luks: OVERDUE"),
        "{text}"
    );
    assert_eq!(served.numbers(), before);
    // Changed past the agent, too: that is an alarm.
    assert_eq!(code(&served, &["status"]).0, Some(3));
    let (_, text) = code(&served, &["status", "--prometheus"]);
    assert!(
        text.contains("\nsprat_agent_overdue{container=\"x.luks\"} 1\n"),
        "{text}"
    );
    // Once more when all is well.
    served.overwrite(&[(0, vec![5; 10])]);
    served.run(&["ack", "x.luks"]);
    served.run(&["tidy"]);
    let text = fs::read_to_string(&got).unwrap();
    assert!(
        text.ends_with("\n") && !text.lines().last().unwrap().contains("OVERDUE"),
        "{text}"
    );
    assert!(served.numbers().len() < before.len());
    // Root runs no program that another account names.
    chown(served.path(".sprat-agent/policy"), Some(12345), None).unwrap_or_default();
    if rustix::process::geteuid().is_root() {
        let (failed, text) = code(&served, &["tidy"]);
        assert!(
            failed == Some(1) && text.contains("another account"),
            "{text}"
        );
    }
}

/// The text format of Prometheus: `name{label="value"} number`, each name with a type.
#[test]
fn figures_for_prometheus_are_in_its_text_format() {
    let served = three_states(EAGER);
    let text = served.run(&["status", "--prometheus"]);
    let mut types = 0;
    let mut values = 0;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("# TYPE ") {
            types += 1;
            assert!(name.ends_with(" gauge"), "{line}");
            continue;
        }
        if line.starts_with("# HELP ") {
            continue;
        }
        values += 1;
        let (name, value) = line.split_once(' ').unwrap();
        value.parse::<i64>().unwrap();
        let (name, label) = name.split_once('{').unwrap_or((name, ""));
        assert!(text.contains(&format!("# TYPE {name} gauge\n")), "{line}");
        assert!(
            label.is_empty() || label == "container=\"x.luks\"}",
            "{line}"
        );
    }
    assert!(types == 13 && values == 13, "{text}");
    assert!(text.contains("sprat_agent_past_states{container=\"x.luks\"} 3\n"));
}

#[test]
fn a_past_state_is_written_back_in_place() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let served = Served::new(EAGER);
    let file = fs::File::create(served.path("x.luks")).unwrap();
    file.set_len(400 * BLOCK as u64).unwrap();
    file.write_all_at(&blocks(300, 1), 0).unwrap();
    let good = served.live();
    served.overwrite(&[(0, vec![9; BLOCK])]);
    let used = fs::metadata(served.path("x.luks")).unwrap().blocks();
    // Garbage over data and holes, by a client that stays connected.
    let mut client = served.connect();
    let handle = client.open("x.luks", crate::client::READ_WRITE).unwrap();
    for number in (0..400_u64).step_by(20) {
        assert_eq!(
            client.write(&handle, number * BLOCK as u64, &[7; 20 * BLOCK]),
            0
        );
    }
    let garbage = served.live();
    let name = served.head(1, "name");
    assert_eq!(code(&served, &["revert", "x.luks", &name]).0, Some(1));
    served.run(&["revert", "x.luks", &name, "--yes"]);
    assert!(served.live() == good);
    assert_eq!(client.write(&handle, 0, &[8; 10]), 3);
    client.end_anyhow();
    assert!(served.live() == good);
    assert!(fs::metadata(served.path("x.luks")).unwrap().blocks() <= used + 8);
    let last = *served.numbers().last().unwrap();
    assert_eq!(served.head(last, "reason"), "revert");
    assert!(served.past(last) == garbage && served.past(1) == good);
    // The next session goes on.
    served.overwrite(&[(5, vec![1; 10])]);
    assert!(served.past(last) == garbage && served.past(1) == good);
}

#[test]
fn a_container_is_removed_with_everything_that_belongs_to_it() {
    let served = three_states(EAGER);
    fs::write(served.path("xx.luks"), "other").unwrap();
    fs::write(served.path("x.luks.lock.1000001"), "").unwrap();
    assert_eq!(code(&served, &["remove", "x.luks"]).0, Some(1));
    served.run(&["remove", "x.luks", "--yes"]);
    let mut names: Vec<_> = fs::read_dir(served.path(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, [".sprat-agent", "xx.luks"]);
    assert!(!served.path(".sprat-agent/x.luks").exists());
    assert!(!served.run(&["list"]).contains("-00"));
}

#[test]
fn wrong_command_lines_and_policies_are_refused() {
    let served = three_states(EAGER);
    for words in [&["lst"][..], &["pin", "x.luks"], &["--what"]] {
        assert_eq!(code(&served, words).0, Some(2), "{words:?}");
    }
    for words in [
        &["pin", "x.luks", "never"][..],
        &["hold", "y.luks"],
        &["export", "../x.luks", "a", "b"],
    ] {
        assert_eq!(code(&served, words).0, Some(1), "{words:?}");
    }
    assert!(served.run(&["policy", "check"]).contains("at most about"));
    served.run(&["clock", "accept"]);
    fs::write(served.path(".sprat-agent/policy"), "kep = all 1d\n").unwrap();
    for words in ["policy check", "serve", "tidy"] {
        let (failed, text) = code(&served, &words.split(' ').collect::<Vec<_>>());
        assert!(failed == Some(1) && text.contains("line 1"), "{text}");
    }
}

#[test]
fn adopting_twice_changes_nothing() {
    let served = three_states(EAGER);
    let first = fs::read(served.path(".sprat-agent/format")).unwrap();
    served.run(&["adopt"]);
    assert_eq!(fs::read(served.path(".sprat-agent/format")).unwrap(), first);
    // A newer agent's folder is served, and nothing in it is changed.
    let newer = "format 2\nid 0123456789abcdef\n";
    let crc = crc32fast::hash(newer.as_bytes());
    let newer = format!("{newer}crc {crc:08x}\n");
    fs::write(served.path(".sprat-agent/format"), newer).unwrap();
    let mut client = served.connect();
    assert_eq!(client.open("x.luks", crate::client::READ_WRITE), Err(3));
    assert!(client.content("x.luks").is_ok());
    client.end();
}
