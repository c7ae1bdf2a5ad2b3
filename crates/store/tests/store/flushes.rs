//! What an fsync covers: which changes need one, and that a failed one is never repaired by the
//! next; with a scripted server, and on a real disk that gets full below a file system.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use sprat_store::{
    Access, FileName, LocalStore, ReadClass, SftpStore, Store, StoreErrorKind, StoreFile,
};
use sprat_testkit::test_folder::TestFolder;
use sprat_testkit::tmpfs::SmallDisk;
use sprat_testkit::{needs, requires};

use crate::part::scripted::{
    EXTENDED, LSTAT, Next, WRITE, connect_by, connect_to, greeting, serial_greeting, status,
};

fn name() -> FileName {
    FileName::new("x").unwrap()
}

/// The fsyncs that a server received, and those that wait for their answer.
#[derive(Default)]
struct Fsyncs {
    asked: usize,
    hold: bool,
    held: Option<(u32, UnixStream)>,
}

fn counting() -> (SftpStore, Arc<dyn StoreFile>, Arc<Mutex<Fsyncs>>) {
    let fsyncs = Arc::new(Mutex::new(Fsyncs::default()));
    let counted = Arc::clone(&fsyncs);
    let script = move |kind: u8, id: u32, rest: &[u8], stream: &mut UnixStream| {
        if kind != EXTENDED || !rest[4..].starts_with(b"fsync") {
            return None;
        }
        let mut fsyncs = counted.lock().unwrap();
        fsyncs.asked += 1;
        if !fsyncs.hold {
            return None;
        }
        fsyncs.held = Some((id, stream.try_clone().unwrap()));
        Some(Next::Answered)
    };
    let store = connect_to(&greeting(&["fsync@openssh.com"]), script).unwrap();
    let file = store.open(&name(), Access::ReadWrite).unwrap();
    (store, file, fsyncs)
}

#[test]
fn write_answered_during_an_fsync_belongs_to_the_next_flush() {
    let (_store, file, fsyncs) = counting();
    file.write_at(0, b"before").unwrap();
    fsyncs.lock().unwrap().hold = true;
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| file.flush());
        let (id, mut stream) = crate::part::eventually(|| fsyncs.lock().unwrap().held.take());
        file.write_at(4096, b"meanwhile").unwrap();
        assert!(!flush.is_finished());
        fsyncs.lock().unwrap().hold = false;
        stream.write_all(&status(id, 0)).unwrap();
        flush.join().unwrap().unwrap();
    });
    assert_eq!(fsyncs.lock().unwrap().asked, 1);
    file.flush().unwrap();
    assert_eq!(fsyncs.lock().unwrap().asked, 2);
    file.flush().unwrap();
    assert_eq!(fsyncs.lock().unwrap().asked, 2, "nothing is left to sync");
}

#[test]
fn new_length_and_outside_changes_are_synced_by_the_next_flush() {
    let (store, file, fsyncs) = counting();
    let asked = || fsyncs.lock().unwrap().asked;
    file.flush().unwrap();
    assert_eq!(asked(), 0, "nothing was changed yet");
    file.resize(5000).unwrap();
    file.flush().unwrap();
    assert_eq!(asked(), 1);
    file.changed_elsewhere();
    file.flush().unwrap();
    assert_eq!(asked(), 2);
    file.flush().unwrap();
    assert_eq!(asked(), 2);
    let new = store.create_new(&name()).unwrap();
    new.flush().unwrap();
    assert_eq!(asked(), 3, "an empty new file has an inode");
}

/// What the connections of a server carried, in the order of arrival.
type Carried = Arc<Mutex<Vec<(RawFd, Carry)>>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Carry {
    Write,
    Fsync,
}

/// A file that is open on three connections, each of which has carried a write. `unsynced`: no
/// fsync was sent since.
fn on_three_connections(
    greeting: &[u8],
    unsynced: bool,
) -> (SftpStore, Arc<dyn StoreFile>, Carried) {
    let fails = Arc::new(AtomicUsize::new(0));
    on_three_connections_failing(greeting, unsynced, fails)
}

/// The same; the fsync of that number fails, counted from when it is set.
fn on_three_connections_failing(
    greeting: &[u8],
    unsynced: bool,
    fails: Arc<AtomicUsize>,
) -> (SftpStore, Arc<dyn StoreFile>, Carried) {
    let carried = Carried::default();
    let noted = Arc::clone(&carried);
    let script = move |kind: u8, id: u32, rest: &[u8], stream: &mut UnixStream| {
        let carry = match kind {
            WRITE => {
                // Slow enough that one connection alone is never the least busy one.
                std::thread::sleep(std::time::Duration::from_millis(3));
                Carry::Write
            }
            EXTENDED if rest[4..].starts_with(b"fsync") => Carry::Fsync,
            _ => return None,
        };
        noted.lock().unwrap().push((stream.as_raw_fd(), carry));
        let left = fails.load(Ordering::SeqCst);
        if carry == Carry::Fsync && left > 0 {
            fails.store(left - 1, Ordering::SeqCst);
            if left == 1 {
                stream.write_all(&status(id, 4)).unwrap();
                return Some(Next::Answered);
            }
        }
        None
    };
    let store = connect_by(greeting, 3, script).unwrap();
    let file = store.open(&name(), Access::ReadWrite).unwrap();
    // The first connection carries everything until it is full, and the others once they joined.
    file.write_at(0, &[1; 4096]).unwrap();
    let mut offset = 0;
    crate::part::eventually(|| {
        file.write_at(offset, &vec![1; 4 << 20]).unwrap();
        offset += 4 << 20;
        (connections(&carried.lock().unwrap()).len() == 3).then_some(())
    });
    if !unsynced {
        file.flush().unwrap();
    }
    (store, file, carried)
}

fn connections(carried: &[(RawFd, Carry)]) -> std::collections::BTreeSet<RawFd> {
    carried.iter().map(|(connection, _)| *connection).collect()
}

/// The connections that carried a write without an fsync behind it.
fn uncovered(carried: &[(RawFd, Carry)]) -> Vec<RawFd> {
    let last = |connection: &RawFd| carried.iter().rfind(|(on, _)| on == connection);
    let open =
        |connection: &RawFd| last(connection).is_some_and(|(_, carry)| *carry == Carry::Write);
    connections(carried).into_iter().filter(open).collect()
}

/// OpenSSH's server and one of unknown order: only the first gets write and fsync in one round
/// trip.
fn both_greetings() -> [Vec<u8>; 2] {
    [serial_greeting(), greeting(&["fsync@openssh.com"])]
}

#[test]
fn flush_syncs_each_connection_that_carried_a_write() {
    for greeting in both_greetings() {
        let (_store, file, carried) = on_three_connections(&greeting, true);
        assert_eq!(uncovered(&carried.lock().unwrap()).len(), 3);
        file.flush().unwrap();
        assert_eq!(uncovered(&carried.lock().unwrap()), [0; 0]);
    }
}

#[test]
fn durable_write_syncs_each_connection_that_carried_a_part() {
    for greeting in both_greetings() {
        let (_store, file, carried) = on_three_connections(&greeting, false);
        let parts: Vec<(u64, Vec<u8>)> =
            (0..64).map(|part| (part << 20, vec![2; 1 << 18])).collect();
        let parts: Vec<(u64, &[u8])> = parts.iter().map(|(at, data)| (*at, &data[..])).collect();
        carried.lock().unwrap().clear();
        file.write_parts_durably(&parts).unwrap().durable().unwrap();
        let carried = carried.lock().unwrap();
        assert!(
            connections(&carried).len() > 1,
            "one connection carried all of it"
        );
        assert_eq!(uncovered(&carried), [0; 0]);
    }
}

#[test]
fn durable_write_syncs_connections_with_earlier_writes() {
    for greeting in both_greetings() {
        let (_store, file, carried) = on_three_connections(&greeting, true);
        // One small write goes over one connection; the other two carried the earlier ones.
        file.write_parts_durably(&[(0, &[2; 4096])])
            .unwrap()
            .durable()
            .unwrap();
        assert_eq!(uncovered(&carried.lock().unwrap()), [0; 0]);
    }
}

#[test]
fn failed_fsync_on_any_connection_is_a_failed_flush() {
    for greeting in both_greetings() {
        for nth in 1..=3 {
            for durably in [true, false] {
                let fails = Arc::new(AtomicUsize::new(0));
                let failing = Arc::clone(&fails);
                let (_store, file, _) = on_three_connections_failing(&greeting, true, failing);
                fails.store(nth, Ordering::SeqCst);
                let flushed = match durably {
                    true => {
                        let written = file.write_parts_durably(&[(0, &[2; 4096])]);
                        written.unwrap().durable()
                    }
                    false => file.flush(),
                };
                assert_eq!(flushed.unwrap_err().kind(), StoreErrorKind::Failed, "{nth}");
                file.flush().unwrap_err();
            }
        }
    }
}

/// As in the release of a lease: "free", and then a check of the next number.
#[test]
fn check_behind_a_write_keeps_the_order_and_reports_its_failure() {
    let next = FileName::new("next").unwrap();
    for (greeting, together) in both_greetings().into_iter().zip([true, false]) {
        for written in [0, 4] {
            let waits = Arc::new(AtomicBool::new(false));
            let overtaken = Arc::new(AtomicBool::new(false));
            let seen = Arc::clone(&overtaken);
            let script = move |kind: u8, id: u32, rest: &[u8], stream: &mut UnixStream| {
                if kind == WRITE {
                    waits.store(true, Ordering::SeqCst);
                    let (waits, mut stream) = (Arc::clone(&waits), stream.try_clone().unwrap());
                    std::thread::spawn(move || {
                        std::thread::sleep(std::time::Duration::from_millis(500));
                        waits.store(false, Ordering::SeqCst);
                        stream.write_all(&status(id, written)).unwrap();
                    });
                    return Some(Next::Answered);
                }
                if kind == LSTAT && rest.ends_with(b"next") {
                    if waits.load(Ordering::SeqCst) {
                        seen.store(true, Ordering::SeqCst);
                    }
                    stream.write_all(&status(id, 2)).unwrap();
                    return Some(Next::Answered);
                }
                None
            };
            let store = connect_to(&greeting, script).unwrap();
            let looked = store.overwrite_and_stat(&name(), &[1; 4096], &next);
            match written {
                0 => assert_eq!(looked.unwrap(), None),
                _ => assert_eq!(looked.unwrap_err().kind(), StoreErrorKind::Failed),
            }
            // Only a server that is known to keep the order gets both at once.
            assert_eq!(overtaken.load(Ordering::SeqCst), together);
        }
    }
}

#[test]
fn attributes_behind_a_flush_are_those_after_the_last_write() {
    for (greeting, serial) in both_greetings().into_iter().zip([true, false]) {
        for overtakes in [false, true] {
            let script = move |kind: u8, id: u32, rest: &[u8], stream: &mut UnixStream| {
                if !overtakes || kind != EXTENDED || !rest[4..].starts_with(b"fsync") {
                    return None;
                }
                let mut stream = stream.try_clone().unwrap();
                std::thread::spawn(move || {
                    std::thread::sleep(std::time::Duration::from_millis(500));
                    stream.write_all(&status(id, 0)).unwrap();
                });
                Some(Next::Answered)
            };
            let store = connect_to(&greeting, script).unwrap();
            let file = store.open(&name(), Access::ReadWrite).unwrap();
            let durably = |parts: &[(u64, &[u8])]| {
                let written = file.write_parts_durably(parts).unwrap();
                written.durable().unwrap();
            };
            assert!(file.stat_behind_flush().is_none());
            durably(&[(0, &[1; 4096])]);
            let stat = file.stat_behind_flush();
            assert_eq!(stat.is_some(), serial && !overtakes);
            assert!(stat.is_none_or(|stat| stat.modified_s == Some(8)));
            file.write_at(0, &[2; 4096]).unwrap();
            assert!(file.stat_behind_flush().is_none(), "it was written to");
            durably(&[(0, &[1; 4096])]);
            file.resize(1 << 30).unwrap();
            assert!(file.stat_behind_flush().is_none(), "it got another length");
        }
    }
}

#[test]
fn prepared_overwrite_opens_once_and_never_writes_to_a_renamed_file() {
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    let store = SftpStore::connect(crate::part::piped(folder.path(), &[])).unwrap();
    let path = |name: &str| folder.path().join(name);
    let (next, old) = (
        FileName::new("next").unwrap(),
        FileName::new("old").unwrap(),
    );
    std::fs::write(path("x"), [0; 4]).unwrap();
    store.prepare_overwrite(&name());
    // Somebody else gives the name to another file: it was opened before.
    std::fs::rename(path("x"), path("moved")).unwrap();
    std::fs::write(path("x"), [0; 4]).unwrap();
    store.overwrite_and_stat(&name(), &[1; 4], &next).unwrap();
    assert_eq!(std::fs::read(path("moved")).unwrap(), [1; 4]);
    // Once: the next one opens the file again.
    store.overwrite_and_stat(&name(), &[2; 4], &next).unwrap();
    assert_eq!(std::fs::read(path("x")).unwrap(), [2; 4]);
    store.prepare_overwrite(&name());
    store.rename(&name(), &old).unwrap();
    std::fs::write(path("x"), [0; 4]).unwrap();
    store.overwrite_and_stat(&name(), &[3; 4], &next).unwrap();
    assert_eq!(std::fs::read(path("x")).unwrap(), [3; 4]);
    assert_eq!(std::fs::read(path("old")).unwrap(), [2; 4]);
    // Removed meanwhile: nobody would read what is written there.
    store.prepare_overwrite(&name());
    std::fs::remove_file(path("x")).unwrap();
    let gone = store.overwrite_and_stat(&name(), &[5; 4], &next);
    assert_eq!(gone.unwrap_err().kind(), StoreErrorKind::NotFound);
    std::fs::write(path("x"), [0; 4]).unwrap();
    // Prepared for one file, used for another.
    store.prepare_overwrite(&old);
    store.overwrite_and_stat(&name(), &[4; 4], &next).unwrap();
    assert_eq!(std::fs::read(path("x")).unwrap(), [4; 4]);
}

/// The file is opened again by its name on each further connection.
#[test]
fn file_that_replaced_the_opened_one_is_never_written_to() {
    requires!(needs::sftp_server_missing());
    const SMALL: u64 = 10_000;
    type Replace = fn(&SftpStore, &Path);
    let cases: [(&str, Replace); 4] = [
        ("longer", |_, folder| {
            replace(folder, SMALL + 1, 0o600);
        }),
        ("shorter", |_, folder| {
            replace(folder, 0, 0o600);
        }),
        ("of another mode", |_, folder| {
            replace(folder, SMALL, 0o640);
        }),
        ("alike, after a rename by ourselves", |store, folder| {
            store
                .rename(&name(), &FileName::new("old").unwrap())
                .unwrap();
            place(folder, SMALL, 0o600);
        }),
    ];
    for (what, replace) in cases {
        let folder = tempfile::tempdir().unwrap();
        let mut options = crate::part::piped(folder.path(), &[]);
        options.connections = 3;
        let store = SftpStore::connect(options).unwrap();
        let other = store.create_new(&FileName::new("other").unwrap()).unwrap();
        other.resize(4 << 20).unwrap();
        crate::part::eventually(|| {
            other.write_at(0, &vec![1; 4 << 20]).unwrap();
            (store.further_connections().0 == 2).then_some(())
        });
        let file = store.create_new(&name()).unwrap();
        file.resize(SMALL).unwrap();
        set_mode(&folder.path().join("x"), 0o600);
        drop(file);
        let file = store.open(&name(), Access::ReadWrite).unwrap();
        replace(&store, folder.path());
        let there = std::fs::read(folder.path().join("x")).unwrap();
        let len = 4 << 20;
        // More than one connection carries at once, until the others had the time to join.
        let begun = std::time::Instant::now();
        while begun.elapsed() < std::time::Duration::from_millis(300) {
            file.write_at(0, &vec![7; len]).unwrap();
        }
        file.flush().unwrap();
        let mut first = [0; 10];
        file.read_at(0, &mut first, ReadClass::Ahead).unwrap();
        assert_eq!(first, [7; 10], "{what}");
        let now = std::fs::read(folder.path().join("x")).unwrap();
        assert!(now == there, "{what}: the other file was written to");
        let old = std::fs::read(folder.path().join("old")).unwrap();
        assert!(old == vec![7; len], "{what}");
    }
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn place(folder: &Path, len: u64, mode: u32) {
    let path = folder.join("x");
    std::fs::File::create_new(&path)
        .unwrap()
        .set_len(len)
        .unwrap();
    set_mode(&path, mode);
}

fn replace(folder: &Path, len: u64, mode: u32) {
    std::fs::rename(folder.join("x"), folder.join("old")).unwrap();
    place(folder, len, mode);
}

/// An ext4 without a journal in a sparse file on a small disk: the space it counts on can be gone.
struct Overcommitted {
    disk: SmallDisk,
    mount: TestFolder,
}

const DISK_BYTES: u64 = 24 << 20;

impl Overcommitted {
    fn mount() -> Self {
        let disk = SmallDisk::new(&format!("size={DISK_BYTES}"));
        let mount = TestFolder::new("sprat-flushes-");
        std::fs::create_dir(mount.path().join("at")).unwrap();
        let image = disk.path().join("image");
        let file = std::fs::File::create_new(&image).unwrap();
        file.set_len(64 << 20).unwrap();
        run(Command::new("mkfs.ext4")
            .args(["-q", "-O", "^has_journal"])
            .arg(&image));
        let options = "loop,errors=continue";
        run(Command::new("mount")
            .args(["-o", options])
            .arg(&image)
            .arg(mount.path().join("at")));
        Self { disk, mount }
    }

    fn path(&self) -> PathBuf {
        self.mount.path().join("at")
    }
}

impl Drop for Overcommitted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {done:?}");
}

#[test]
fn failed_local_flush_fails_for_ever_despite_the_kernels_success() {
    requires!(
        needs::root(),
        needs::program("mkfs.ext4"),
        needs::program("mount")
    );
    let over = Overcommitted::mount();
    let store = LocalStore::open(&over.path()).unwrap();
    let file = store.create_new(&name()).unwrap();
    file.write_at(0, &[1; 4096]).unwrap();
    file.flush().unwrap();
    // Of this file system only: another one on this machine may not answer.
    run(Command::new("sync").arg("-f").arg(over.path()));
    // No space is left below; the file system does not know that.
    let filler = over.disk.path().join("filler");
    let mut full = std::fs::File::create_new(&filler).unwrap();
    while full.write_all(&[1; 65536]).is_ok() {}
    file.write_at(0, &vec![2; 8 << 20]).unwrap();
    file.flush().unwrap_err();
    std::fs::remove_file(&filler).unwrap();
    drop(full);
    // A process that opens it now gets no error.
    let raw = std::fs::File::options()
        .write(true)
        .open(over.path().join("x"))
        .unwrap();
    raw.sync_all().unwrap();
    for _ in 0..2 {
        assert_eq!(file.flush().unwrap_err().kind(), StoreErrorKind::Failed);
    }
    file.write_at(0, &[3; 4096]).unwrap();
    assert_eq!(file.flush().unwrap_err().kind(), StoreErrorKind::Failed);
}
