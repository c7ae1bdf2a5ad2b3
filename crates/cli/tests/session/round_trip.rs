//! A container is made, backed up to twice, listed, restored and closed: locally and over ssh.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use sprat_session::{Access, Phase};
use sprat_testkit::requires;
use sprat_testkit_session::session_harness::{
    Observed, SessionHarness, fill, job, missing, never, ssh_missing,
};

fn there_and_back(harness: &SessionHarness) {
    let created = harness.create();
    assert!(created.sent_bytes < 20 << 20, "{created:?}");
    assert_eq!(harness.server_files(), ["x.luks"]);
    fill(&harness.path("source"), 40, 100_000, 1);
    let (first, closed) = harness.backup().unwrap();
    assert!(first.record.complete);
    assert!(closed.durable);
    assert!(closed.volume.written_bytes > 4_000_000);
    assert_eq!(harness.server_files(), ["x.luks"], "the lock is given back");
    harness.restore_and_compare();

    fs::write(harness.path("source/d1/new"), "new").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let (second, closed) = harness.backup().unwrap();
    assert_eq!(second.record.stats.transferred, 1, "{second:?}");
    assert!(closed.volume.written_bytes < 4_000_000, "{closed:?}");
    harness.restore_and_compare();

    let mut session = harness.open(Access::ReadOnly).unwrap();
    let mut seen = Observed::default();
    let entries = session.snapshots(&mut seen, &never()).unwrap();
    let names: Vec<_> = entries.iter().filter_map(|entry| entry.name).collect();
    assert_eq!(names, [first.name, second.name]);
    assert!(entries.iter().all(|entry| entry.job == job().as_str()));
    let closed = session.close(&mut seen, &never()).unwrap();
    assert!(seen.phases.contains(&Phase::Unmounting));
    assert!(
        !closed.durable,
        "a read-only session has nothing to make durable"
    );
    assert_eq!(closed.volume.written_bytes, 0);
    harness.assert_clean();
    harness.assert_nothing_remains();
}

#[test]
fn a_local_container_is_backed_up_to_and_restored_from() {
    requires!(missing());
    there_and_back(&SessionHarness::local());
}

#[test]
fn a_container_behind_sshd_is_backed_up_to_and_restored_from() {
    requires!(ssh_missing());
    there_and_back(&SessionHarness::ssh());
}

/// What is done to a container's file while a session writes to it; the session may not call that a success.
fn a_container_that_is_lost_meanwhile(harness: &SessionHarness, lose: impl Fn(&std::path::Path)) {
    harness.create();
    fill(&harness.path("source"), 3, 1000, 3);
    let mut session = harness.open(Access::ReadWrite).unwrap();
    session
        .take_snapshot(harness.spec(), &mut Observed::default(), &never())
        .unwrap();
    lose(&harness.container());
    let closed = session.close(&mut Observed::default(), &never());
    let failure = sprat_testkit_session::session_harness::assert_exit(closed, sprat::Exit::Damaged);
    assert!(failure.what.contains("no longer the file"), "{failure:?}");
    harness.assert_nothing_remains();
}

#[test]
fn container_moved_away_meanwhile_is_no_success() {
    requires!(missing());
    a_container_that_is_lost_meanwhile(&SessionHarness::local(), |container| {
        fs::rename(container, container.with_extension("moved")).unwrap();
    });
}

#[test]
fn container_replaced_meanwhile_is_no_success() {
    requires!(missing());
    a_container_that_is_lost_meanwhile(&SessionHarness::local(), |container| {
        let copy = container.with_extension("copy");
        let len = fs::metadata(container).unwrap().len();
        fs::File::create(&copy).unwrap().set_len(len).unwrap();
        fs::rename(&copy, container).unwrap();
    });
}

#[test]
fn container_removed_on_the_server_meanwhile_is_no_success() {
    requires!(ssh_missing());
    a_container_that_is_lost_meanwhile(&SessionHarness::ssh(), |container| {
        fs::remove_file(container).unwrap();
    });
}

#[test]
fn five_tebibytes_are_made_with_at_most_70_mib_sent() {
    requires!(ssh_missing());
    let mut harness = SessionHarness::ssh();
    harness.size_bytes += 5 << 40;
    let begun = std::time::Instant::now();
    let created = harness.create();
    let took = begun.elapsed();
    eprintln!("5 TiB: {} bytes sent in {took:?}", created.sent_bytes);
    assert!(
        created.sent_bytes <= 70 << 20,
        "{} bytes",
        created.sent_bytes
    );
    let file = fs::metadata(harness.container()).unwrap();
    assert_eq!(file.len(), harness.size_bytes / 4096 * 4096);
    assert!(
        file.blocks() * 512 <= 71 << 20,
        "{} on disk",
        file.blocks() * 512
    );
    fill(&harness.path("source"), 5, 10_000, 2);
    harness.backup().unwrap();
    harness.restore_and_compare();
    harness.assert_nothing_remains();
}

#[test]
fn cryptsetup_opens_the_file_on_the_server() {
    requires!(missing(), sprat_testkit::needs::program("cryptsetup"));
    let harness = SessionHarness::local();
    harness.create();
    let key = harness.path("key");
    fs::write(&key, harness.secret.expose()).unwrap();
    let output = Command::new("cryptsetup")
        .args(["open", "--test-passphrase", "--key-file"])
        .arg(&key)
        .arg(harness.container())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn no_name_and_no_content_reaches_the_server_in_plain() {
    requires!(ssh_missing());
    let harness = SessionHarness::ssh();
    harness.create();
    let (name, content) = ("marker-of-a-name-7f3a", "marker-of-the-content-91bc");
    fs::write(harness.path("source").join(name), content.repeat(5000)).unwrap();
    let mut session = harness.open(Access::ReadWrite).unwrap();
    let store = harness.path("store");
    let mut checked = 0;
    let check = |checked: &mut u32| {
        for entry in fs::read_dir(&store).unwrap().flatten() {
            let bytes = sparse_bytes(&entry.path());
            for marker in [
                name,
                content,
                "docs",
                harness.path("source").to_str().unwrap(),
            ] {
                assert!(
                    !sprat_testkit::leftovers::contains(&bytes, marker.as_bytes()),
                    "{marker} in {:?}",
                    entry.file_name()
                );
            }
            *checked += 1;
        }
    };
    session
        .take_snapshot(harness.spec(), &mut Observed::default(), &never())
        .unwrap();
    check(&mut checked);
    session.close(&mut Observed::default(), &never()).unwrap();
    check(&mut checked);
    assert!(checked >= 3, "{checked} files: the lock file is missing");
}

/// The file's bytes without its holes.
fn sparse_bytes(path: &std::path::Path) -> Vec<u8> {
    use std::io::Read;
    use std::os::unix::fs::FileExt;
    let mut file = fs::File::open(path).unwrap();
    let len = file.metadata().unwrap().len();
    if len < 1 << 20 {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        return bytes;
    }
    let mut bytes = Vec::new();
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).unwrap();
        let mut run = vec![0; usize::try_from(end - data).unwrap()];
        file.read_exact_at(&mut run, data).unwrap();
        bytes.extend_from_slice(&run);
        at = end;
    }
    bytes
}
