//! The list of what each run changed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sprat_snapshot::{
    Cancel, KeepCount, KeepRules, PruneSpec, SnapshotError, SnapshotSpec, Warning, unescape_name,
};
use sprat_testkit::tree::{PlainTree, set_mode};

use crate::folder::{Bench, job_name, now};

/// All lines of a list.
pub fn lines(list: &Path) -> Vec<Value> {
    let text = zstd::decode_all(fs::File::open(list).unwrap()).unwrap();
    let text = String::from_utf8(text).unwrap();
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

pub fn list_of(job: &Path, name: impl std::fmt::Display) -> PathBuf {
    job.join(format!(".sprat/{name}.changes.zst"))
}

/// The paths of a list, and how each was changed.
pub fn changed(lines: &[Value]) -> BTreeMap<PathBuf, String> {
    let paths = lines[1..lines.len() - 1].iter().map(|line| {
        let path = unescape_name(line["path"].as_str().unwrap());
        let change = line["change"].as_str().unwrap().to_owned();
        (PathBuf::from(OsStr::from_bytes(&path)), change)
    });
    paths.collect()
}

fn spec(bench: &Bench) -> SnapshotSpec {
    let mut spec = bench.spec();
    spec.change_lists = Some(bench.path("lists"));
    spec
}

#[test]
fn list_has_each_path_that_a_run_changed() {
    let bench = Bench::new();
    let source = bench.source();
    fs::create_dir(source.join("folder")).unwrap();
    for name in ["same", "changed", "mode", "gone", "renamed", "folder/inner"] {
        fs::write(source.join(name), name).unwrap();
    }
    fs::write(source.join("kind"), "a file").unwrap();
    let first = bench.try_take(&spec(&bench)).unwrap();
    let list = lines(&list_of(&bench.job(), first.name));
    assert_eq!(list[0]["since"], Value::Null);
    assert_eq!(list[0]["job"], "home");
    let all = changed(&list);
    assert!(all.values().all(|change| change == "new"), "{all:?}");
    assert_eq!(all.get(&source.join("folder/inner")).unwrap(), "new");

    let odd = source.join(OsStr::from_bytes(b"n\xffame \\#101\n"));
    fs::write(&odd, "odd").unwrap();
    fs::write(source.join("changed"), "changed more").unwrap();
    set_mode(&source.join("mode"), 0o600).unwrap();
    fs::remove_file(source.join("gone")).unwrap();
    fs::rename(source.join("renamed"), source.join("folder/to")).unwrap();
    fs::remove_file(source.join("kind")).unwrap();
    fs::create_dir(source.join("kind")).unwrap();
    let second = bench.try_take(&spec(&bench)).unwrap();
    let list = lines(&list_of(&bench.job(), second.name));
    assert_eq!(list[0]["since"], first.name.to_string());
    let wanted = [
        (odd, "new"),
        (source.join("folder/to"), "new"),
        (source.join("changed"), "content"),
        (source.join("mode"), "attributes"),
        (source.join("gone"), "gone"),
        (source.join("renamed"), "gone"),
        (source.join("kind"), "kind"),
    ];
    let wanted = wanted.map(|(path, change)| (path, change.to_owned()));
    assert_eq!(changed(&list), BTreeMap::from(wanted));
    let of_changed = list
        .iter()
        .find(|line| line["change"] == "content")
        .unwrap();
    assert_eq!(of_changed["before"]["bytes"], 7);
    assert_eq!(of_changed["after"]["bytes"], 12);
    let last = list.last().unwrap();
    let counts = ["new", "content", "kind", "attributes", "gone"].map(|key| last[key].as_u64());
    assert_eq!(counts, [2, 1, 1, 1, 2].map(Some));
    assert_eq!(last["finished"], true);

    let third = bench.try_take(&spec(&bench)).unwrap();
    assert_eq!(lines(&list_of(&bench.job(), third.name)).len(), 2);
    // The copies of this machine are the same.
    for name in [first.name, second.name, third.name] {
        let copy = bench.path(&format!("lists/{name}.changes.zst"));
        let list = fs::read(list_of(&bench.job(), name)).unwrap();
        assert_eq!(fs::read(copy).unwrap(), list);
    }
}

#[test]
fn list_of_a_removed_snapshot_stays_until_it_is_folded() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "1").unwrap();
    let first = bench.try_take(&spec(&bench)).unwrap();
    fs::write(bench.source().join("file"), "22").unwrap();
    let second = bench.try_take(&spec(&bench)).unwrap();
    let rules = KeepRules {
        last: KeepCount::new(1),
        ..KeepRules::default()
    };
    let prune = PruneSpec::new(job_name(), rules);
    sprat_snapshot::prune(&bench.volume(), &prune, &mut |_| {}, &Cancel::new()).unwrap();
    assert!(list_of(&bench.job(), first.name).exists());
    let copy = |name: &str| bench.path(&format!("lists/{name}.changes.zst"));
    fs::write(bench.path("lists/notes.txt"), "of a person").unwrap();
    let third = bench.try_take(&spec(&bench)).unwrap();
    assert!(!list_of(&bench.job(), first.name).exists());
    assert!(!copy(&first.name.to_string()).exists());
    for name in [
        second.name.to_string(),
        third.name.to_string(),
        "base".to_owned(),
    ] {
        let list = fs::read(list_of(&bench.job(), &name)).unwrap();
        assert_eq!(fs::read(copy(&name)).unwrap(), list, "{name}");
    }
    let base = lines(&list_of(&bench.job(), "base"));
    assert_eq!(base[0]["snapshot"], first.name.to_string());
    assert_eq!(base[0]["since"], Value::Null);
    assert_eq!(changed(&base)[&bench.source().join("file")], "new");
    assert!(bench.path("lists/notes.txt").exists());
}

#[test]
fn interrupted_run_lists_what_it_copied_and_nothing_as_gone() {
    let bench = Bench::new();
    fs::write(bench.source().join("z last"), "content").unwrap();
    bench.take();
    let tree = PlainTree {
        files: 300,
        bytes: 30 << 20,
        files_per_folder: 30,
        seed: 3,
    };
    tree.make(&bench.source()).unwrap();
    let mut slow = spec(&bench);
    slow.rsync = bench.rsync_script("", "rsync --bwlimit=8000");
    let cancel = Cancel::new();
    let mut progress = |progress: sprat_snapshot::Progress| {
        if progress.bytes_done > 2 << 20 {
            cancel.cancel();
        }
    };
    let stopped = sprat_snapshot::take(&bench.volume(), &slow, now(), &mut progress, &cancel);
    assert!(
        matches!(stopped, Err(SnapshotError::Cancelled)),
        "{stopped:?}"
    );
    let partial = bench.list().pop().unwrap();
    let name = partial.folder.strip_suffix(".partial").unwrap().to_owned();
    let list = lines(&list_of(&bench.job(), &name));
    let changes = changed(&list);
    assert!(changes.len() > 3, "{changes:?}");
    assert!(
        changes.values().all(|change| change == "new"),
        "{changes:?}"
    );

    let whole = bench.take();
    assert!(!list_of(&bench.job(), &name).exists());
    // The files that it copied are new in this one, too: they are in no older snapshot.
    let all = changed(&lines(&list_of(&bench.job(), whole.name)));
    assert!(changes.keys().all(|path| all.contains_key(path)));
}

#[test]
fn run_does_not_fail_because_of_its_list() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "content").unwrap();
    let mut refused = spec(&bench);
    let job = bench.job();
    // A folder has the name of the list.
    refused.rsync = bench.rsync_script(
        &format!(
            "for i in {0}/*.inflight; do mkdir {0}/.sprat/$(basename $i .inflight).changes.zst; done",
            job.display()
        ),
        "rsync",
    );
    let made = bench.try_take(&refused).unwrap();
    let warned = |warning: &Warning| matches!(warning, Warning::ChangesNotListed { .. });
    assert!(made.record.complete);
    assert!(
        made.record.warnings.iter().any(warned),
        "{:?}",
        made.record.warnings
    );
    assert!(
        !job.join(format!(".sprat/{}.changes.zst.new", made.name))
            .exists()
    );
    // The local folder can't be made.
    let mut nowhere = bench.spec();
    fs::write(bench.path("blocked"), "").unwrap();
    nowhere.change_lists = Some(bench.path("blocked"));
    let made = bench.try_take(&nowhere).unwrap();
    assert!(list_of(&job, made.name).exists());
}

/// A crash leaves the tree and a part of the list, and no record.
#[test]
fn crash_while_the_list_is_written_costs_nothing() {
    for (is_named, is_torn) in [(false, true), (true, true), (true, false)] {
        let bench = Bench::new();
        fs::write(bench.source().join("file"), "content").unwrap();
        let base = bench.take();
        fs::write(bench.source().join("new"), "content").unwrap();
        let crashed = bench.take().name;
        let list = list_of(&bench.job(), crashed);
        let mut left = fs::read(&list).unwrap();
        if is_torn {
            left.truncate(left.len() / 2);
        }
        fs::remove_file(&list).unwrap();
        let at = match is_named {
            true => list,
            false => list.with_extension("zst.new"),
        };
        fs::write(&at, left).unwrap();
        fs::remove_file(bench.job().join(format!(".sprat/{crashed}.json"))).unwrap();
        let folder = |ending: &str| bench.job().join(format!("{crashed}{ending}"));
        fs::rename(folder(""), folder(".inflight")).unwrap();
        let latest = bench.job().join("latest");
        fs::remove_file(&latest).unwrap();
        std::os::unix::fs::symlink(base.name.to_string(), &latest).unwrap();

        let next = bench.take();
        assert!(next.record.complete);
        // Within the same second, the next run gets the name that is free again.
        assert!(!at.exists() || next.name == crashed, "{}", at.display());
        let list = changed(&lines(&list_of(&bench.job(), next.name)));
        let wanted = (bench.source().join("new"), "new".to_owned());
        assert_eq!(list, BTreeMap::from([wanted]));
    }
}
