//! A symbolic link on the volume never leads rsync out of it, also when rsync is spared its own checks.

use std::fs::{self, File};
use std::os::unix::fs::{lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::folder::slow_source::SlowSource;
use crate::folder::{Bench, SmallExt4, below, loop_missing, take_into};
use sprat_testkit::requires;

/// What rsync's receiving process is given while no link on the volume is followed.
const OPTION: &str = "--remote-option=--insecure-links";

/// A volume with a mount of its own. Notes for each run of rsync that copies whether rsync checks for links, and
/// whether the mount follows them.
struct Noted {
    bench: Bench,
    disk: SmallExt4,
    notes: PathBuf,
    rsync: PathBuf,
}

impl Noted {
    fn new() -> Self {
        let bench = Bench::new();
        let disk = SmallExt4::new(&bench, "96M", &[]);
        let notes = bench.path("notes");
        let note = format!(
            "flags=$(grep ' {} ' /proc/self/mountinfo); \
             case \"$*\" in *{OPTION}*) checks=no;; *) checks=yes;; esac\n\
             case \"$flags\" in *nosymfollow*) follows=no;; *) follows=yes;; esac\n\
             echo \"checks=$checks follows=$follows\" >> '{}'",
            disk.at.display(),
            notes.display()
        );
        let rsync = bench.rsync_script(&note, "rsync");
        Self {
            bench,
            disk,
            notes,
            rsync,
        }
    }

    fn spec(&self) -> sprat_snapshot::SnapshotSpec {
        let mut spec = self.bench.spec();
        spec.rsync.clone_from(&self.rsync);
        spec
    }

    /// Takes a snapshot that has everything. Returns where the source is in it, and the notes.
    fn take(&self) -> (PathBuf, String) {
        let _ = fs::remove_file(&self.notes);
        let report = take_into(&self.disk.at, &self.spec()).unwrap();
        let record = &report.record;
        assert!(record.complete && record.messages.is_empty(), "{record:?}");
        let tree = self.disk.at.join("home").join(report.name.to_string());
        let notes = fs::read_to_string(&self.notes).unwrap();
        (below(&tree, &self.bench.source()), notes)
    }
}

/// Whether this machine's rsync has checks, and can be spared them.
fn rsync_checks() -> bool {
    let mut command = Command::new("rsync");
    let tried = command.args(["--insecure-links", "--version"]).output();
    tried.unwrap().status.success()
}

fn write_dated(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_500_000_000);
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(time).unwrap();
}

#[test]
fn rsync_checks_for_links_unless_the_mount_follows_none() {
    requires!(loop_missing());
    let noted = Noted::new();
    let source = noted.bench.source();
    fs::write(source.join("file"), "x").unwrap();
    let fast = match rsync_checks() {
        true => "checks=no follows=no\n",
        false => "checks=yes follows=no\n",
    };
    for _ in 0..2 {
        assert_eq!(noted.take().1, fast);
        // The mount is as it was: links on it work again.
        assert!(noted.disk.at.join("home/latest").is_dir());
    }
    // Others could put a link above the mount, where the kernel would follow it.
    let above = noted.disk.at.parent().unwrap();
    lchown(above, Some(1234), None).unwrap();
    assert_eq!(noted.take().1, "checks=yes follows=yes\n");
    lchown(above, Some(0), None).unwrap();
    assert_eq!(noted.take().1, fast);
}

#[test]
fn nothing_is_read_through_a_link_in_an_older_snapshot() {
    requires!(loop_missing());
    let noted = Noted::new();
    let source = noted.bench.source();
    let outside = noted.bench.path("outside");
    fs::create_dir(&outside).unwrap();
    write_dated(&outside.join("file"), "wrong");
    let place = source.join("place");
    for owner in [0, 1234] {
        symlink(&outside, &place).unwrap();
        lchown(&place, Some(owner), None).unwrap();
        noted.take();
        fs::remove_file(&place).unwrap();
        fs::create_dir(&place).unwrap();
        write_dated(&place.join("file"), "right");
        let (tree, _) = noted.take();
        let kept = fs::read_to_string(tree.join("place/file")).unwrap();
        assert_eq!(kept, "right", "the link of {owner} was followed");
        fs::remove_dir_all(&place).unwrap();
    }
}

#[test]
fn nothing_is_written_through_a_link_that_appears_in_the_tree() {
    requires!(loop_missing(), sprat_testkit::needs::devices());
    let noted = Noted::new();
    let outside = noted.bench.path("outside");
    fs::create_dir(&outside).unwrap();
    let folder = noted.bench.source().join("slow");
    fs::create_dir(&folder).unwrap();
    let (source, mounted) = SlowSource::mount(&folder);
    source.answer_reads(false);
    let taken = std::thread::scope(|scope| {
        let taken = scope.spawn(|| take_into(&noted.disk.at, &noted.spec()));
        // rsync reads the first file. It has made the folder, and writes the others later.
        source.wait_for_request();
        let inflight = fs::read_dir(noted.disk.at.join("home"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.extension().is_some_and(|end| end == "inflight"));
        let made = below(&inflight.unwrap(), &folder);
        fs::rename(&made, made.with_extension("moved")).unwrap();
        symlink(&outside, &made).unwrap();
        source.answer_reads(true);
        taken.join().unwrap()
    });
    let written: Vec<_> = fs::read_dir(&outside).unwrap().collect();
    assert!(written.is_empty(), "{written:?}");
    assert!(taken.is_err() || !taken.unwrap().record.complete);
    drop(mounted);
}
