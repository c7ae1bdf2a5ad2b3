//! Sources on other hosts, which are pulled into `work`.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::checked::{read_all, rewrite};
use crate::pulled::Scene;

struct Hosts {
    _mounted: Mounted,
    scene: Scene,
}

impl Hosts {
    fn new() -> Self {
        let scene = Scene::new();
        Self {
            _mounted: mount_btrfs(&scene.bench, "512M"),
            scene,
        }
    }

    fn take(&self, spec: &SnapshotSpec) -> SnapshotReport {
        self.try_take(spec).unwrap()
    }

    fn try_take(&self, spec: &SnapshotSpec) -> Result<SnapshotReport, SnapshotError> {
        let (volume, cancel) = (self.scene.bench.volume(), Cancel::new());
        sprat_snapshot::take_into_subvolume(&volume, spec, now(), &ByProgs, &mut |_| {}, &cancel)
    }

    /// A file of the host, with an old time.
    fn write(&self, path: &str, content: &str) -> PathBuf {
        let path = self.scene.write(path, content);
        set_time(&path, 1_600_000_000, 5).unwrap();
        path
    }

    /// With a source of this machine, so that there is a snapshot without the host.
    fn spec(&self) -> SnapshotSpec {
        fs::write(self.scene.bench.source().join("local"), "here").unwrap();
        SnapshotSpec {
            sources: vec![self.scene.bench.source()],
            ..self.scene.spec(&[("web", "www")])
        }
    }

    fn assert_pulled(&self, report: &SnapshotReport) {
        assert!(report.record.complete, "{:?}", report.record);
        let pulled = self.scene.pulled(report, "web", "www");
        assert_same(&self.scene.at("www"), &pulled);
    }

    fn has_host(&self, report: &SnapshotReport) -> bool {
        self.scene.pulled(report, "web", "").exists()
    }

    fn script(&self, text: &str) -> PathBuf {
        let path = self.scene.bench.path("script");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn held(&self) -> PathBuf {
        self.scene.bench.job().join(".sprat/held@web")
    }
}

#[test]
fn each_snapshot_has_the_host_as_it_is_and_only_changes_are_pulled() {
    requires!(missing().or_else(crate::pulled::missing));
    let hosts = Hosts::new();
    for name in ["a", "b", "gone", "excluded"] {
        hosts.write(&format!("www/{name}"), "content");
    }
    fs::create_dir(hosts.scene.at("www/odd")).unwrap();
    make_odd_tree(&hosts.scene.at("www/odd")).unwrap();
    fs::hard_link(hosts.scene.at("www/a"), hosts.scene.at("www/a2")).unwrap();
    let mut spec = hosts.spec();
    let first = hosts.take(&spec);
    hosts.assert_pulled(&first);
    let unchanged = hosts.take(&spec);
    hosts.assert_pulled(&unchanged);
    assert_eq!(unchanged.record.stats.transferred, 0);
    // The source has two files now. In `work` they are one.
    fs::remove_file(hosts.scene.at("www/a2")).unwrap();
    set_mode(&hosts.write("www/a2", "content"), 0o600).unwrap();
    fs::remove_file(hosts.scene.at("www/gone")).unwrap();
    hosts.write("www/b", "new content");
    let excluded = hosts.scene.at("www/excluded");
    spec.excludes = vec![format!("/@web{}", excluded.display())];
    let third = hosts.take(&spec);
    assert!(!hosts.scene.pulled(&third, "web", "www/excluded").exists());
    let folder = hosts.scene.at("www");
    let time = fs::metadata(&folder).unwrap();
    fs::remove_file(excluded).unwrap();
    set_time(&folder, time.mtime(), time.mtime_nsec()).unwrap();
    hosts.assert_pulled(&third);
    assert_eq!(third.record.stats.transferred, 1, "{:?}", third.record);
    let old = fs::metadata(hosts.scene.pulled(&first, "web", "www/a2")).unwrap();
    assert_eq!((old.nlink(), old.mode() & 0o777), (2, 0o644));
    assert!(hosts.scene.pulled(&first, "web", "www/gone").exists());
    // A host that is no longer a source leaves the next snapshot.
    spec.pulled.clear();
    assert!(!hosts.has_host(&hosts.take(&spec)));
}

#[test]
fn host_that_was_away_is_not_pulled_again() {
    requires!(missing().or_else(crate::pulled::missing));
    let hosts = Hosts::new();
    hosts.write("www/page", "content");
    let spec = hosts.spec();
    hosts.assert_pulled(&hosts.take(&spec));
    let away = SnapshotSpec {
        ssh_command: vec!["false".to_owned()],
        ..spec.clone()
    };
    for _ in 0..2 {
        let without = hosts.take(&away);
        assert!(!without.record.complete && !hosts.has_host(&without));
    }
    let back = hosts.take(&spec);
    hosts.assert_pulled(&back);
    assert_eq!(back.record.stats.transferred, 0);
}

/// rsync has replaced some files when the connection ends. Nothing shows which of the others changed.
#[test]
fn host_that_is_lost_in_the_middle_has_no_older_content_and_is_continued() {
    requires!(missing().or_else(crate::pulled::missing));
    let hosts = Hosts::new();
    let write = |letter: &str| {
        for number in 0..40 {
            hosts.write(&format!("www/{number}"), &letter.repeat(50_000));
        }
    };
    write("a");
    let mut spec = hosts.spec();
    let first = hosts.take(&spec);
    hosts.assert_pulled(&first);
    write("bb");
    let cut = "#!/bin/sh\ncase \" $* \" in *' -n'*) exec rsync \"$@\";; esac\n\
               rsync \"$@\" | { dd bs=4096 count=300 status=none; kill -KILL 0; }\n";
    spec.rsync_path = hosts.script(cut).display().to_string();
    let lost = hosts.take(&spec);
    assert!(!lost.record.complete && !hosts.has_host(&lost));
    assert!(lost.record.pulled.is_empty());
    let place = format!("/@web{}", hosts.scene.at("www").display());
    assert_eq!(lost.record.unread.names, [place]);
    assert!(hosts.held().exists());
    spec.rsync_path = "rsync".to_owned();
    let whole = hosts.take(&spec);
    hosts.assert_pulled(&whole);
    let transferred = whole.record.stats.transferred;
    assert!(0 < transferred && transferred < 40, "{transferred}");
    assert!(!hosts.held().exists());
    let old = fs::read(hosts.scene.pulled(&first, "web", "www/7")).unwrap();
    assert!(old == [b'a'; 50_000]);
}

#[test]
fn what_an_interrupted_run_pulled_waits_for_a_host_that_is_away() {
    requires!(missing().or_else(crate::pulled::missing));
    let hosts = Hosts::new();
    hosts.write("www/page", "content");
    let mut spec = hosts.spec();
    hosts.take(&spec);
    hosts.write("www/new", "new content");
    // The volume fails after everything has arrived.
    let failed = r#"rsync: [receiver] write failed on "/v/a": Input/output error (5)"#;
    let before = format!(
        "rsync \"$@\" || exit\ncase \"$*\" in *' -n'*|*' --dry-run'*) exit;; *@web*) echo '{failed}' >&2; exit 11;; esac; exit"
    );
    spec.rsync = hosts.scene.bench.rsync_script(&before, "rsync");
    let error = hosts.try_take(&spec).unwrap_err();
    assert!(error.to_string().contains("rsync"), "{error}");
    spec.rsync = PathBuf::from("rsync");
    let away = SnapshotSpec {
        ssh_command: vec!["false".to_owned()],
        ..spec.clone()
    };
    assert!(!hosts.has_host(&hosts.take(&away)));
    assert!(hosts.held().exists());
    assert!(!hosts.has_host(&hosts.take(&away)));
    let back = hosts.take(&spec);
    hosts.assert_pulled(&back);
    assert_eq!(back.record.stats.transferred, 0, "{:?}", back.record.stats);
    assert!(!hosts.held().exists());
    // Nothing waits for a host that the job has no longer.
    btrfs(&["subvolume", "create"], &[&hosts.held()]).unwrap();
    spec.pulled.clear();
    hosts.take(&spec);
    assert!(!hosts.held().exists());
}

#[test]
fn file_of_a_host_that_changed_twice_within_a_step_is_pulled_again() {
    requires!(missing().or_else(crate::pulled::missing));
    let hosts = Hosts::new();
    let file = hosts.scene.write("www/page", "old");
    fs::hard_link(&file, hosts.scene.at("www/name")).unwrap();
    let spec = hosts.spec();
    let first = hosts.take(&spec);
    for content in [b"new", b"neo"] {
        rewrite(&file, content);
        hosts.assert_pulled(&hosts.take(&spec));
    }
    let old = fs::read(hosts.scene.pulled(&first, "web", "www/page")).unwrap();
    assert_eq!(old, b"old");
}

#[test]
fn unread_file_of_a_host_is_absent_and_not_old() {
    requires!(missing().or_else(crate::pulled::missing));
    let hosts = Hosts::new();
    let secret = hosts.write("www/secret", "content");
    hosts.write("www/page", "content");
    set_mode(&secret, 0o600).unwrap();
    for folder in secret.ancestors().skip(1) {
        if folder.starts_with("/tmp/") {
            set_mode(folder, 0o755).unwrap();
        }
    }
    let mut spec = hosts.spec();
    hosts.assert_pulled(&hosts.take(&spec));
    // rsync reads what has changed.
    fs::write(&secret, "new content").unwrap();
    spec.rsync_path = "setpriv --reuid=65534 --clear-groups rsync".to_owned();
    let without = hosts.take(&spec);
    assert_eq!(without.record.unread.count, 1, "{:?}", without.record);
    let has = |name| hosts.scene.pulled(&without, "web", name).exists();
    assert!(has("www/page") && !has("www/secret"));
    spec.rsync_path = "rsync".to_owned();
    let back = hosts.take(&spec);
    hosts.assert_pulled(&back);
}

#[test]
fn damaged_files_of_a_host_are_pulled_again() {
    requires!(missing().or_else(crate::pulled::missing));
    let hosts = Hosts::new();
    let page = hosts.write("www/page", "alpha");
    fs::hard_link(page, hosts.scene.at("www/name")).unwrap();
    let mut spec = hosts.spec();
    spec.suspects = Some(hosts.scene.bench.path("suspects.json"));
    let first = hosts.take(&spec);
    assert!(!read_all(&hosts.scene.bench).is_damaged());
    let tree = hosts.scene.bench.job().join(first.name.to_string());
    btrfs(
        &["property", "set", "-ts"],
        &[&tree, Path::new("ro"), Path::new("false")],
    )
    .unwrap();
    rewrite(&hosts.scene.pulled(&first, "web", "www/page"), b"noise");
    assert!(read_all(&hosts.scene.bench).is_damaged());
    let second = hosts.take(&spec);
    hosts.assert_pulled(&second);
    assert_eq!(second.record.healed.count, 2, "{:?}", second.record);
    assert!(second.record.stats.transferred > 0);
}

/// `/@web` is not a part of the source `/`, but the source has a file there.
#[test]
fn source_at_the_place_of_a_host_is_refused() {
    requires!(missing().or_else(crate::pulled::missing));
    let hosts = Hosts::new();
    hosts.write("www/page", "content");
    let mut spec = hosts.spec();
    let at = PathBuf::from("/@sprat-test-host");
    fs::create_dir(&at).unwrap();
    fs::write(at.join("file"), "content").unwrap();
    spec.sources = vec![at.clone()];
    let source = &mut spec.pulled[0];
    source.host = "sprat-test-host".to_owned();
    let refused = hosts.try_take(&spec);
    fs::remove_dir_all(&at).unwrap();
    let refused = refused.unwrap_err();
    assert!(
        refused.to_string().contains("/@sprat-test-host"),
        "{refused}"
    );
}

/// rsync does not report which folders of a host are mount points.
#[test]
fn hosts_are_skipped_with_one_file_system() {
    requires!(missing().or_else(crate::pulled::missing));
    let hosts = Hosts::new();
    hosts.write("www/a", "content");
    let mut spec = hosts.spec();
    assert!(hosts.has_host(&hosts.take(&spec)));
    spec.one_file_system = true;
    let report = hosts.take(&spec);
    assert!(!report.record.complete);
    let unread = &report.record.unread.names;
    assert!(
        unread.len() == 1 && unread[0].starts_with("/@web/"),
        "{unread:?}"
    );
    assert!(!hosts.has_host(&report));
    assert!(
        hosts
            .scene
            .bench
            .in_snapshot(report.name)
            .join("local")
            .exists()
    );
    spec.sources.clear();
    let none = hosts.try_take(&spec).unwrap_err();
    assert!(none.to_string().contains("one_file_system"), "{none}");
    spec.one_file_system = false;
    assert!(hosts.has_host(&hosts.take(&spec)));
}
