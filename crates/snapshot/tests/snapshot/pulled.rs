//! Sources on other hosts, pulled from a real sshd on loopback under several host names.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::{Timespec, Timestamps, XattrFlags, utimensat};
use sprat_snapshot::{
    Cancel, FileListener, JobSources, PruneSpec, PulledSource, RestoreSpec, ScanRules,
    SnapshotError, SnapshotErrorKind, SnapshotReport, SnapshotSpec, Warning, preview, prune,
};
use sprat_testkit::compare::assert_same;
use sprat_testkit::ssh_server::{SshServer, openssh};
use sprat_testkit::{needs, requires};

use crate::checked::{against_source, read_all, rewrite};
use crate::folder::failing_volume::FailingVolume;
use crate::folder::{Bench, SmallExt4, below, inode, job_name, loop_missing, take_into};

pub(crate) fn missing() -> Option<String> {
    openssh::missing().or_else(needs::root)
}

/// A machine, and a server that has many names.
pub(crate) struct Scene {
    pub(crate) bench: Bench,
    server: SshServer,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let scene = Self {
            bench: Bench::new(),
            server: SshServer::start(),
        };
        let of_server = scene.server.path("ssh_config");
        // `away` does not answer, and of `other-key` another key is known.
        let known = scene.server.path("known_other");
        let key = fs::read_to_string(scene.server.path("other_key.pub")).unwrap();
        let at = format!("[127.0.0.1]:{} {key}", scene.server.port());
        fs::write(&known, at).unwrap();
        let config = format!(
            "Host away\n  Port 1\nHost other-key\n  UserKnownHostsFile {}\nHost *\nInclude {}\n",
            known.display(),
            of_server.display()
        );
        fs::write(scene.server.path("config"), config).unwrap();
        scene
    }

    /// A file on the hosts, which are all this machine.
    pub(crate) fn write(&self, path: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.bench.path("hosts").join(path)
    }

    fn source(&self, login: &str, path: &str) -> PulledSource {
        let (user, host) = match login.split_once('@') {
            Some((user, host)) => (Some(user.to_owned()), host),
            None => (None, login),
        };
        PulledSource {
            user,
            host: host.to_owned(),
            path: self.at(path),
        }
    }

    pub(crate) fn spec(&self, pulled: &[(&str, &str)]) -> SnapshotSpec {
        let config = self.server.path("config").display().to_string();
        let options = [
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            "ConnectTimeout=10",
        ];
        let mut ssh = vec!["ssh".to_owned(), "-F".to_owned(), config];
        for option in options {
            ssh.extend(["-o".to_owned(), option.to_owned()]);
        }
        let pulled = pulled.iter().map(|(login, path)| self.source(login, path));
        SnapshotSpec {
            pulled: pulled.collect(),
            ssh_command: ssh,
            ..SnapshotSpec::new(job_name(), Vec::new())
        }
    }

    fn take(&self, spec: &SnapshotSpec) -> SnapshotReport {
        self.bench.try_take(spec).unwrap()
    }

    /// A path of a host in a snapshot.
    pub(crate) fn pulled(&self, report: &SnapshotReport, host: &str, path: &str) -> PathBuf {
        let below = self.at(path);
        let below = below.strip_prefix("/").unwrap();
        self.bench
            .job()
            .join(format!("{}/@{host}", report.name))
            .join(below)
    }
}

fn why(report: &SnapshotReport, source: &PulledSource) -> Option<String> {
    let wanted = source.to_string();
    report
        .record
        .warnings
        .iter()
        .find_map(|warning| match warning {
            Warning::SourceLeftOut { path, why } if *path == wanted => Some(why.clone()),
            _ => None,
        })
}

fn set_time(path: &Path, second: i64) {
    let time = Timespec {
        tv_sec: second,
        tv_nsec: 5,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(
        rustix::fs::CWD,
        path,
        &times,
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )
    .unwrap();
}

/// A guard watches the volume if it has a mount of its own. No older file can be read then.
#[test]
fn changed_files_of_a_host_reach_a_watched_volume() {
    requires!(missing().or_else(loop_missing));
    let scene = Scene::new();
    let volume = SmallExt4::new(&scene.bench, "64M", &[]);
    let spec = scene.spec(&[("web", "srv")]);
    for (round, mode) in [0o640, 0o641, 0o642].into_iter().enumerate() {
        scene.write("srv/grows", "content ".repeat(100_000 + round));
        let file = scene.write("srv/mode", "content");
        set_time(&file, 1_000_000);
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        let report = take_into(&volume.at, &spec).unwrap();
        assert!(report.record.complete, "{:?}", report.record);
        let tree = format!("{}/{}/@web", job_name(), report.name);
        let kept = below(&volume.at.join(tree), &scene.at("srv"));
        assert_same(&scene.at("srv"), &kept);
    }
}

#[test]
fn hosts_are_pulled_with_all_attributes_and_unchanged_files_are_linked() {
    requires!(missing());
    let scene = Scene::new();
    let odd = "www/a b*[x]";
    let file = scene.write(&format!("{odd}/file"), "content");
    std::os::unix::fs::chown(&file, Some(1234), Some(4321)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(&file, scene.at(&format!("{odd}/second name"))).unwrap();
    rustix::fs::setxattr(&file, "user.mark", b"kept", XattrFlags::empty()).unwrap();
    symlink("file", scene.at(&format!("{odd}/link"))).unwrap();
    let changes = scene.write("www/plain/changes", "old");
    scene.write("db/rows", "rows");
    // A shell would expand it to this one, too.
    scene.write("www/a bZx/file", "not named");
    fs::write(scene.bench.source().join("local"), "here").unwrap();
    for path in [&file, &changes, &scene.at("db/rows")] {
        set_time(path, 1_700_000_000);
    }
    let mut spec = scene.spec(&[("root@web", odd), ("root@web", "www/plain"), ("db", "db")]);
    spec.sources = vec![scene.bench.source()];
    let copied = Arc::new(Mutex::new(Vec::new()));
    spec.listener = FileListener::new(true);
    let list = Arc::clone(&copied);
    spec.listener
        .send_to(move |path| list.lock().unwrap().push(path.to_owned()));
    let first = scene.take(&spec);
    assert!(first.record.complete, "{:?}", first.record);
    let mut copied = std::mem::take(&mut *copied.lock().unwrap());
    copied.sort_unstable();
    // Of a file with several names, rsync copies any.
    let second = scene.at(&format!("{odd}/second name"));
    let copied = copied
        .iter()
        .map(|path| path.replace(&*second.to_string_lossy(), &file.to_string_lossy()));
    let copied: Vec<String> = copied.collect();
    let local = scene.bench.source().join("local").display().to_string();
    let expected = [
        format!("@db{}", scene.at("db/rows").display()),
        format!("@web{}", file.display()),
        format!("@web{}", changes.display()),
        local.trim_start_matches('/').to_owned(),
    ];
    assert_eq!(copied, expected);
    assert_eq!(first.record.pulled.len(), 3);
    assert!(first.record.pulled.iter().all(|part| part.full));
    let kept = scene.pulled(&first, "web", &format!("{odd}/file"));
    let about = fs::metadata(&kept).unwrap();
    assert_eq!(
        (about.uid(), about.gid(), about.mode() & 0o7777),
        (1234, 4321, 0o4751)
    );
    assert_eq!((about.mtime(), about.mtime_nsec()), (1_700_000_000, 5));
    let mut mark = [0; 8];
    let length = rustix::fs::getxattr(&kept, "user.mark", &mut mark[..]).unwrap();
    assert_eq!(&mark[..length], b"kept");
    let second_name = scene.pulled(&first, "web", &format!("{odd}/second name"));
    assert_eq!(inode(&second_name), inode(&kept));
    assert_eq!(
        fs::read_link(scene.pulled(&first, "web", &format!("{odd}/link"))).unwrap(),
        Path::new("file")
    );
    assert!(!scene.pulled(&first, "web", "www/a bZx").exists());
    assert_eq!(
        fs::read(scene.pulled(&first, "db", "db/rows")).unwrap(),
        b"rows"
    );

    fs::write(&changes, "new!").unwrap();
    let second = scene.take(&spec);
    assert!(second.record.complete, "{:?}", second.record);
    assert_eq!(
        second.record.stats.transferred, 1,
        "{:?}",
        second.record.stats
    );
    assert_eq!(
        second.record.stats.regular_files,
        first.record.stats.regular_files
    );
    let again = scene.pulled(&second, "web", &format!("{odd}/file"));
    assert_eq!(inode(&again), inode(&kept));
    let old = scene.pulled(&first, "web", "www/plain/changes");
    let new = scene.pulled(&second, "web", "www/plain/changes");
    assert_eq!(
        (fs::read(old).unwrap(), fs::read(new).unwrap()),
        (b"old".to_vec(), b"new!".to_vec())
    );

    // Nothing of a host is a path of this machine.
    let checked = against_source(&scene.bench);
    assert_eq!(
        (checked.gone.count, checked.lacking.count),
        (0, 0),
        "{checked:?}"
    );
    let report = scene
        .bench
        .restore(&RestoreSpec::new(job_name(), "/".into()));
    assert_eq!(report.unwrap().left_out, ["@db", "@web"]);
    let to = scene.bench.path("out");
    scene
        .bench
        .restore(&RestoreSpec::new(job_name(), to.clone()))
        .unwrap();
    let rows = scene.at("db/rows");
    let rows = to.join("@db").join(rows.strip_prefix("/").unwrap());
    assert_eq!(fs::read(rows).unwrap(), b"rows");
}

#[test]
fn host_that_is_away_or_shows_another_key_is_missing_and_keeps_its_last_copy() {
    requires!(missing());
    let scene = Scene::new();
    scene.write("www/page", "page");
    scene.write("db/rows", "rows");
    for path in ["www/page", "db/rows"] {
        set_time(&scene.at(path), 1_700_000_000);
    }
    let both = scene.spec(&[("web", "www"), ("db", "db")]);
    let first = scene.take(&both);
    assert!(first.record.complete);
    let config = fs::read_to_string(scene.server.path("config")).unwrap();
    // Three runs: the newest snapshots lack the host.
    for (is, reason) in [
        ("Port 1", "the host was not reached: ssh: connect to host"),
        (
            "UserKnownHostsFile /dev/null",
            "Host key verification failed",
        ),
        ("User nobody-here", "Permission denied"),
    ] {
        let lost = format!("Host db\n  {is}\n{config}");
        fs::write(scene.server.path("config"), lost).unwrap();
        let without = scene.take(&both);
        assert!(!without.record.complete);
        let why = why(&without, &both.pulled[1]).unwrap();
        assert!(why.contains(reason), "{why}");
        assert!(scene.pulled(&without, "web", "www/page").exists());
        assert!(
            !scene
                .bench
                .job()
                .join(format!("{}/@db", without.name))
                .exists()
        );
        let place = format!("/@db{}", scene.at("db").display());
        assert!(
            without.record.unread.names.contains(&place),
            "{:?}",
            without.record.unread
        );
        assert_eq!(without.record.stats.transferred, 0);
    }
    // The last copy of the host stays, whatever the rules say.
    let mut spec = PruneSpec::new(job_name(), sprat_snapshot::KeepRules::default());
    spec.rules.last = sprat_snapshot::KeepCount::new(1);
    spec.sources = Some(JobSources {
        parts: both.pulled.iter().map(PulledSource::place).collect(),
        ..JobSources::default()
    });
    prune(&scene.bench.volume(), &spec, &mut |_| {}, &Cancel::new()).unwrap();
    assert!(scene.pulled(&first, "db", "db/rows").exists());
    fs::write(scene.server.path("config"), config).unwrap();
    let back = scene.take(&both);
    assert!(back.record.complete);
    assert_eq!(back.record.stats.transferred, 0);
    let rows = |report| inode(&scene.pulled(report, "db", "db/rows"));
    assert_eq!(rows(&back), rows(&first));
    // Nothing is there at all.
    let away = scene
        .bench
        .try_take(&scene.spec(&[("away", "www"), ("other-key", "db")]));
    let away = away.unwrap_err();
    assert_eq!(away.kind(), SnapshotErrorKind::Unreachable, "{away}");
    let none = scene
        .bench
        .try_take(&scene.spec(&[("away", "www"), ("web", "not-there")]));
    let none = none.unwrap_err();
    assert!(
        matches!(none, SnapshotError::HostsMissing { reached: true, .. }),
        "{none}"
    );
}

#[test]
fn host_that_is_back_is_linked_to_the_last_snapshot_that_has_it() {
    requires!(missing());
    let scene = Scene::new();
    scene.write("www/same", "same");
    fs::write(scene.bench.source().join("local"), "here").unwrap();
    // No snapshot is ever complete.
    let mut spec = scene.spec(&[("web", "www"), ("away", "www")]);
    spec.sources = vec![scene.bench.source()];
    let first = scene.take(&spec);
    let is_away = SnapshotSpec {
        ssh_command: vec!["false".to_owned()],
        ..spec.clone()
    };
    for _ in 0..3 {
        let without = scene.take(&is_away);
        assert!(!scene.pulled(&without, "web", "www").exists());
    }
    let back = scene.take(&spec);
    let same = |report| inode(&scene.pulled(report, "web", "www/same"));
    assert_eq!(same(&back), same(&first));
}

#[test]
fn sources_that_a_host_lacks_or_does_not_show_are_named() {
    requires!(missing());
    let scene = Scene::new();
    let secret = scene.write("www/secret", "x");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    scene.write("www/page", "page");
    fs::create_dir_all(scene.at("unmounted/folder")).unwrap();
    symlink("www", scene.at("link")).unwrap();
    let everybody = fs::Permissions::from_mode(0o755);
    for folder in scene
        .at("www")
        .ancestors()
        .filter(|at| at.starts_with("/tmp"))
    {
        if folder != Path::new("/tmp") {
            fs::set_permissions(folder, everybody.clone()).unwrap();
        }
    }
    let mut spec = scene.spec(&[
        ("web", "www"),
        ("web", "gone"),
        ("web", "link"),
        ("web", "unmounted"),
    ]);
    // As a login of that user.
    spec.rsync_path = "setpriv --reuid=65534 --clear-groups rsync".to_owned();
    let report = scene.take(&spec);
    assert!(!report.record.complete);
    let why = |number: usize| why(&report, &spec.pulled[number]);
    assert_eq!(why(0), None);
    assert_eq!(why(1).unwrap(), "not found");
    assert!(why(2).unwrap().contains("is a symbolic link"));
    assert!(why(3).unwrap().starts_with("is empty"));
    let names = &report.record.unread.names;
    assert!(
        names.contains(&format!("/@web{}", secret.display())),
        "{names:?}"
    );
    assert!(scene.pulled(&report, "web", "www/page").exists());
    let parts = &report.record.pulled;
    assert!(
        parts
            .iter()
            .all(|part| !part.full || part.source.path == scene.at("link"))
    );
    spec.rsync_path = "no-such-rsync".to_owned();
    let refused = scene.bench.try_take(&spec).unwrap_err();
    assert!(
        refused.to_string().contains("the host has no such rsync"),
        "{refused}"
    );
}

#[test]
fn patterns_and_rules_count_on_the_host_they_name() {
    requires!(missing());
    let scene = Scene::new();
    for path in ["www/tmp/x", "www/keep", "www/a.iso", "www/from-file/x"] {
        scene.write(path, "content");
    }
    let tag = "Signature: 8a477f597d28d172789f06886806bc55\n";
    scene.write("www/cache/CACHEDIR.TAG", tag);
    scene.write("www/cache/x", "cached");
    scene.write("www/no-cache/CACHEDIR.TAG", "Signature: no");
    scene.write("www/no-cache/x", "kept");
    scene.write("www/marked/.nobackup", "");
    scene.write("www/marked/x", "x");
    scene.write("www/large", vec![1; 5000]);
    let root = scene.at("www").display().to_string();
    let list = scene.bench.path("patterns");
    fs::write(&list, format!("# a comment\n/@web{root}/from-file/\n")).unwrap();
    let mut spec = scene.spec(&[("web", "www"), ("db", "www")]);
    spec.excludes = vec![
        format!("/@web{root}/tmp/"),
        // Of this machine only.
        format!("{root}/keep"),
        "*.iso".to_owned(),
    ];
    spec.exclude_from = vec![list];
    spec.scan = ScanRules {
        caches: true,
        if_present: vec![".nobackup".to_owned()],
        larger_than: Some(4000),
    };
    let found = scene.bench.path("nowhere");
    fs::create_dir(&found).unwrap();
    let shown = preview(&found, &spec, true, &mut |_| {}, &Cancel::new()).unwrap();
    let report = scene.take(&spec);
    assert!(report.record.complete, "{:?}", report.record);
    let has = |host: &str, path: &str| scene.pulled(&report, host, path).exists();
    for path in [
        "www/keep",
        "www/cache/CACHEDIR.TAG",
        "www/no-cache/x",
        "www/marked/.nobackup",
    ] {
        assert!(has("web", path) && has("db", path), "{path}");
    }
    for path in ["www/a.iso", "www/cache/x", "www/marked/x", "www/large"] {
        assert!(!has("web", path) && !has("db", path), "{path}");
    }
    for path in ["www/tmp/x", "www/from-file/x"] {
        assert!(!has("web", path) && has("db", path), "{path}");
    }
    let listed = shown.paths.unwrap();
    assert!(listed.contains(&format!("/@web{root}/keep")), "{listed:?}");
    assert!(!listed.iter().any(|path| path.ends_with("/large")));
    assert_eq!(shown.files, report.record.stats.regular_files);
    let rules: Vec<&str> = shown.excluded.iter().map(|one| &*one.rule).collect();
    assert!(
        rules.contains(&"*.iso") && rules.contains(&"exclude_larger_than"),
        "{rules:?}"
    );
    assert_eq!(fs::read_dir(&found).unwrap().count(), 0);
}

#[test]
fn file_that_changed_twice_within_a_step_is_pulled_again_with_all_its_names() {
    requires!(missing());
    let scene = Scene::new();
    let file = scene.write("www/page", "old");
    fs::hard_link(&file, scene.at("www/name")).unwrap();
    scene.write("www/same", "same");
    let spec = scene.spec(&[("web", "www")]);
    let first = scene.take(&spec);
    let time = fs::metadata(&file).unwrap().modified().unwrap();
    let again = fs::OpenOptions::new().write(true).open(&file).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&again, b"new", 0).unwrap();
    again.set_modified(time).unwrap();
    let second = scene.take(&spec);
    assert!(second.record.complete, "{:?}", second.record);
    let read = |report, path| fs::read(scene.pulled(report, "web", path)).unwrap();
    for name in ["www/page", "www/name"] {
        assert_eq!(read(&second, name), b"new", "{name}");
        assert_eq!(read(&first, name), b"old", "{name}");
    }
    let at = |report, path| inode(&scene.pulled(report, "web", path));
    assert_eq!(at(&second, "www/page"), at(&second, "www/name"));
    assert_eq!(at(&second, "www/same"), at(&first, "www/same"));
}

#[test]
fn folder_that_vanishes_on_a_host_makes_the_snapshot_incomplete() {
    requires!(missing());
    let scene = Scene::new();
    scene.write("www/page", "page");
    let moved = scene.write("www/moved/1", "x").parent().unwrap().to_owned();
    let mut spec = scene.spec(&[("web", "www")]);
    let vanish = format!(
        "case \" $* \" in *' -n'*) exec rsync \"$@\";; esac\nrsync \"$@\"; rm -r '{at}'\n\
         echo 'file has vanished: \"{at}/1\"' >&2; exit 24",
        at = moved.display()
    );
    spec.rsync = scene.bench.rsync_script(&vanish, "rsync");
    let record = scene.take(&spec).record;
    assert!(!record.complete);
    let vanished = Warning::FoldersVanished { folders: 1 };
    assert!(record.warnings.contains(&vanished), "{record:?}");
    let name = format!("/@web{}", moved.display());
    assert_eq!(record.unread.names, [name]);
}

/// A file that the volume refuses makes rsync run once more. Meanwhile another file changed on the host.
#[test]
fn second_run_for_a_host_changes_no_older_snapshot() {
    requires!(missing().or_else(needs::devices));
    let scene = Scene::new();
    let same = scene.write("www/same", "same");
    let mode = |mode| fs::set_permissions(&same, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    let volume = FailingVolume::mount(&scene.bench.volume(), 1000);
    let mut spec = scene.spec(&[("web", "www")]);
    let first = scene.take(&spec);
    scene.write("www/write-27", "refused");
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' -n'*) exec rsync \"$@\";; esac\n\
         [ -e \"$0.ran\" ] && chmod 600 '{}'\n: > \"$0.ran\"\nexec rsync \"$@\"\n",
        same.display()
    );
    let program = scene.bench.path("rsync-of-host");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    spec.rsync_path = program.display().to_string();
    let second = scene.take(&spec);
    let mode_in = |report| {
        let file = scene.pulled(report, "web", "www/same");
        fs::metadata(file).unwrap().mode() & 0o777
    };
    let modes = (mode_in(&first), mode_in(&second));
    drop(volume);
    assert!(second.record.unread.count > 0, "{:?}", second.record);
    assert_eq!(modes, (0o644, 0o600));
}

#[test]
fn connection_lost_in_the_middle_makes_the_snapshot_incomplete() {
    requires!(missing());
    let scene = Scene::new();
    for number in 0..40 {
        scene.write(&format!("www/{number}"), vec![number; 50_000]);
    }
    scene.write("db/rows", "rows");
    let mut spec = scene.spec(&[("web", "www"), ("web", "gone")]);
    let cut = scene.bench.path("cut");
    // It ends everything of its login, but lets the dry run pass that asks for the sources.
    let script = "#!/bin/sh\ncase \" $* \" in *' -n'*) exec rsync \"$@\";; esac\n\
                  rsync \"$@\" | { dd bs=4096 count=80 status=none; kill -KILL 0; }\n";
    fs::write(&cut, script).unwrap();
    fs::set_permissions(&cut, fs::Permissions::from_mode(0o755)).unwrap();
    spec.rsync_path = cut.display().to_string();
    fs::write(scene.bench.source().join("local"), "here").unwrap();
    spec.sources = vec![scene.bench.source()];
    let report = scene.take(&spec);
    assert!(!report.record.complete);
    let why = why(&report, &spec.pulled[0]).unwrap();
    assert!(why.starts_with("not pulled in full"), "{why}");
    assert!(report.record.pulled.iter().all(|part| !part.full));
    let arrived = fs::read_dir(scene.pulled(&report, "web", "www")).unwrap();
    let arrived: Vec<PathBuf> = arrived.map(|entry| entry.unwrap().path()).collect();
    assert!(arrived.len() < 40);
    for file in &arrived {
        // None of them is cut short.
        assert_eq!(fs::metadata(file).unwrap().len(), 50_000, "{file:?}");
    }
    spec.rsync_path = "rsync".to_owned();
    spec.pulled.pop();
    let whole = scene.take(&spec);
    assert!(whole.record.complete, "{:?}", whole.record);
    assert_eq!(whole.record.stats.transferred, 40 - arrived.len() as u64);
}

#[test]
fn damaged_files_are_read_from_the_host_again() {
    requires!(missing());
    let scene = Scene::new();
    for name in ["www/page", "www/other"] {
        set_time(&scene.write(name, "alpha"), 1_700_000_000);
    }
    fs::hard_link(scene.at("www/page"), scene.at("www/name")).unwrap();
    let mut spec = scene.spec(&[("web", "www")]);
    spec.suspects = Some(scene.bench.path("suspects.json"));
    let first = scene.take(&spec);
    let in_first = scene.pulled(&first, "web", "www/page");
    assert!(!read_all(&scene.bench).is_damaged());
    rewrite(&in_first, b"noise");
    assert_eq!(read_all(&scene.bench).damaged.count, 1);
    let second = scene.take(&spec);
    for name in ["www/page", "www/name"] {
        let path = scene.pulled(&second, "web", name);
        assert_eq!(fs::read(path).unwrap(), b"alpha", "{name}");
    }
    assert_eq!(second.record.healed.count, 2, "{:?}", second.record);
    // The older snapshot is unchanged, and what is not damaged is linked.
    assert_eq!(fs::read(&in_first).unwrap(), b"noise");
    let other = |report| inode(&scene.pulled(report, "web", "www/other"));
    assert_eq!(other(&second), other(&first));
}

/// rsync's generator finds that the connection is lost before its receiver does.
#[test]
fn connection_that_takes_no_more_requests_makes_the_snapshot_incomplete() {
    requires!(missing());
    let scene = Scene::new();
    for number in 0..1200 {
        scene.write(&format!("www/{}/file-{number}", number % 20), "x");
    }
    let mut spec = scene.spec(&[("web", "www")]);
    let cut = scene.bench.path("cut");
    // Closes rsync's pipe after some requests. The connection, and its answers, stay for a while.
    let script = "#!/bin/sh\ncase \" $* \" in *' -n'*) exec ssh \"$@\";; esac\n\
                  mkfifo \"$0.in\"; exec 3<&0\n\
                  { dd bs=1 count=1000 status=none; exec 0<&-; sleep 3; } <&3 3<&- >\"$0.in\" &\n\
                  exec 0<\"$0.in\" 3<&-\nexec ssh \"$@\"\n";
    fs::write(&cut, script).unwrap();
    fs::set_permissions(&cut, fs::Permissions::from_mode(0o755)).unwrap();
    spec.ssh_command[0] = cut.display().to_string();
    fs::write(scene.bench.source().join("local"), "here").unwrap();
    spec.sources = vec![scene.bench.source()];
    let report = scene.take(&spec);
    assert!(!report.record.complete);
    let why = why(&report, &spec.pulled[0]).unwrap();
    assert!(why.starts_with("not pulled in full"), "{why}");
}
