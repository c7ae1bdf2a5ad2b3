//! One suite that every store passes: in memory, a local folder, sftp-server over a pipe, and a
//! real sshd through the system's ssh.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};

use sprat_store::{
    Access, FileName, LocalStore, ReadClass, SftpStore, SshTarget, Store, StoreError,
    StoreErrorKind,
};
use sprat_testkit::memory::MemoryStore;
use sprat_testkit::ssh_server::{OpenSshOptions, SshServer, asyncssh, openssh};
use sprat_testkit::{agent_server, needs, requires};

/// A store under test, and the local folder behind it if there is one.
struct Subject<'a> {
    store: &'a dyn Store,
    folder: Option<&'a Path>,
    /// Behind sprat-agent, which has only the names of containers and of their companions.
    agent: bool,
}

impl<'a> Subject<'a> {
    fn new(store: &'a dyn Store, folder: Option<&'a Path>) -> Self {
        Self {
            store,
            folder,
            agent: store.agent().is_some(),
        }
    }

    /// A file's name, or what stands for it: a container that is not complete yet.
    fn name(&self, text: &str) -> FileName {
        if !self.agent {
            return FileName::new(text).unwrap();
        }
        let digits = text.bytes().fold(0_u64, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        FileName::new(&format!("x.luks.new-{digits:016x}")).unwrap()
    }
}

/// Bytes that differ everywhere and are the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn kind<T>(result: Result<T, StoreError>) -> StoreErrorKind {
    match result {
        Ok(_) => panic!("succeeded"),
        Err(error) => error.kind(),
    }
}

fn run_all(subject: &Subject<'_>) {
    a_new_file_is_empty_and_exclusive(subject);
    what_was_written_is_read(subject);
    small_files_are_made_read_and_removed_whole(subject);
    reading_past_the_end_is_truncated_with_both_counts(subject);
    large_transfers_at_odd_offsets_arrive_whole(subject);
    resize_makes_holes_and_cuts(subject);
    of_many_creators_one_succeeds(subject);
    if subject.agent {
        a_container_is_never_replaced_moved_or_shortened(subject);
    } else {
        rename_replaces_and_rename_new_refuses(subject);
        an_open_file_survives_its_name(subject);
    }
    missing_names_are_not_found(subject);
    the_list_has_every_name_once(subject);
    a_read_only_handle_writes_nothing(subject);
    many_threads_at_once_see_their_own_bytes(subject);
    parts_written_durably_are_read(subject);
    flushes_and_free_space_answer(subject);
    discard_reads_zeros_or_is_unsupported(subject);
    if let Some(folder) = subject.folder {
        links_folders_and_fifos_are_not_opened(subject, folder);
        new_files_are_private(subject, folder);
    }
    for name in subject.store.list().unwrap() {
        let _ = subject.store.remove(&name);
    }
}

fn a_new_file_is_empty_and_exclusive(subject: &Subject<'_>) {
    let file = subject.store.create_new(&subject.name("new")).unwrap();
    assert_eq!(file.len().unwrap(), 0);
    file.flush().unwrap();
    assert_eq!(
        kind(subject.store.create_new(&subject.name("new"))),
        StoreErrorKind::AlreadyExists
    );
    let stat = subject.store.stat(&subject.name("new")).unwrap();
    assert!(stat.regular && stat.len == 0, "{stat:?}");
    subject.store.remove(&subject.name("new")).unwrap();
    assert_eq!(
        kind(subject.store.stat(&subject.name("new"))),
        StoreErrorKind::NotFound
    );
}

fn small_files_are_made_read_and_removed_whole(subject: &Subject<'_>) {
    let (store, small) = (subject.store, subject.name("small"));
    let read = |access, len_max| store.read_small(&small, access, len_max);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        assert_eq!(kind(read(access, 8)), StoreErrorKind::NotFound);
    }
    store
        .create_filled(&small, b"content")
        .unwrap()
        .durable()
        .unwrap();
    assert_eq!(
        kind(store.create_filled(&small, b"other")),
        StoreErrorKind::AlreadyExists
    );
    for access in [Access::ReadOnly, Access::ReadWrite] {
        for (len_max, expected) in [(100, "content"), (7, "content"), (3, "con"), (0, "")] {
            let (stat, bytes) = read(access, len_max).unwrap();
            assert_eq!((stat.len, stat.regular), (7, true));
            assert_eq!(bytes, expected.as_bytes(), "{access:?}, {len_max} bytes");
        }
    }
    store.remove_durably(&small).unwrap().durable().unwrap();
    assert_eq!(kind(store.remove_durably(&small)), StoreErrorKind::NotFound);
    store.create_filled(&small, b"").unwrap().durable().unwrap();
    let (stat, bytes) = read(Access::ReadWrite, 8).unwrap();
    assert_eq!((stat.len, bytes.len()), (0, 0));
    store.remove(&small).unwrap();
}

fn what_was_written_is_read(subject: &Subject<'_>) {
    let file = subject.store.create_new(&subject.name("bytes")).unwrap();
    file.write_at(0, b"hello").unwrap();
    file.write_at(10, b"world").unwrap();
    file.write_at(3, b"").unwrap();
    file.write_at(1000, b"").unwrap();
    assert_eq!(file.len().unwrap(), 15, "an empty write grows nothing");
    let again = subject
        .store
        .open(&subject.name("bytes"), Access::ReadOnly)
        .unwrap();
    let mut read = [1; 15];
    again.read_at(0, &mut read, ReadClass::Demand).unwrap();
    assert_eq!(&read, b"hello\0\0\0\0\0world");
    again.read_at(15, &mut [], ReadClass::Demand).unwrap();
    file.flush().unwrap();
    file.flush().unwrap();
    assert_eq!(again.stat().unwrap().len, 15);
}

fn reading_past_the_end_is_truncated_with_both_counts(subject: &Subject<'_>) {
    let file = subject.store.create_new(&subject.name("short")).unwrap();
    file.write_at(0, &noise(1, 700_000)).unwrap();
    for (offset, asked, expected) in [
        (0, 700_001, 700_000),
        (699_999, 2, 1),
        (700_000, 1, 0),
        (1 << 40, 5, 0),
    ] {
        let error = file
            .read_at(offset, &mut vec![0; asked], ReadClass::Ahead)
            .unwrap_err();
        let StoreError::Truncated {
            got,
            asked: told,
            offset: at,
            ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((got, told, at), (expected, asked as u64, offset));
    }
}

fn large_transfers_at_odd_offsets_arrive_whole(subject: &Subject<'_>) {
    let file = subject.store.create_new(&subject.name("large")).unwrap();
    let data = noise(2, 8 << 20);
    for offset in [0u64, 1, 4095, 12_345_679] {
        file.write_at(offset, &data).unwrap();
        for class in [ReadClass::Demand, ReadClass::Ahead] {
            let mut read = vec![0; data.len()];
            file.read_at(offset, &mut read, class).unwrap();
            assert!(read == data, "offset {offset}, {class:?}");
        }
    }
    file.flush().unwrap();
}

fn resize_makes_holes_and_cuts(subject: &Subject<'_>) {
    let file = subject.store.create_new(&subject.name("sized")).unwrap();
    file.write_at(0, b"abcdef").unwrap();
    let mut read = [9; 5];
    if subject.agent {
        assert_eq!(kind(file.resize(3)), StoreErrorKind::PermissionDenied);
    } else {
        file.resize(3).unwrap();
        file.resize(5).unwrap();
        file.read_at(0, &mut read, ReadClass::Demand).unwrap();
        assert_eq!(&read, b"abc\0\0");
    }
    file.resize(20 << 20).unwrap();
    assert_eq!(file.len().unwrap(), 20 << 20);
    file.read_at((20 << 20) - 5, &mut read, ReadClass::Demand)
        .unwrap();
    assert_eq!(read, [0; 5]);
}

fn of_many_creators_one_succeeds(subject: &Subject<'_>) {
    for round in 0..5 {
        let (name, wins) = (subject.name(&format!("race.{round}")), AtomicUsize::new(0));
        let start = Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    match subject.store.create_new(&name) {
                        Ok(_) => drop(wins.fetch_add(1, Ordering::SeqCst)),
                        Err(error) => assert_eq!(error.kind(), StoreErrorKind::AlreadyExists),
                    }
                });
            }
        });
        assert_eq!(wins.into_inner(), 1);
    }
}

fn rename_replaces_and_rename_new_refuses(subject: &Subject<'_>) {
    let store = subject.store;
    let (one, two) = (subject.name("from"), subject.name("to"));
    store.create_new(&one).unwrap().write_at(0, b"1").unwrap();
    store.create_new(&two).unwrap().write_at(0, b"22").unwrap();
    assert_eq!(
        kind(store.rename_new(&one, &two)),
        StoreErrorKind::AlreadyExists
    );
    assert_eq!(
        (store.stat(&one).unwrap().len, store.stat(&two).unwrap().len),
        (1, 2)
    );
    store.rename(&one, &two).unwrap();
    assert_eq!(store.stat(&two).unwrap().len, 1);
    assert_eq!(kind(store.stat(&one)), StoreErrorKind::NotFound);
    store.rename_new(&two, &one).unwrap();
    assert_eq!(store.stat(&one).unwrap().len, 1);
    assert_eq!(kind(store.stat(&two)), StoreErrorKind::NotFound);
    store.flush_folder().unwrap();
}

/// What the agent refuses, so that its past states stay what they are. A half-made container gets its name once.
fn a_container_is_never_replaced_moved_or_shortened(subject: &Subject<'_>) {
    let (store, half) = (subject.store, subject.name("half"));
    let container = FileName::new("x.luks").unwrap();
    let file = store.create_new(&half).unwrap();
    file.write_at(0, b"content").unwrap();
    drop(file);
    store.rename_new(&half, &container).unwrap();
    assert_eq!(kind(store.stat(&half)), StoreErrorKind::NotFound);
    let other = store.create_new(&half).unwrap();
    drop(other);
    let refused = |result: Result<(), StoreError>| {
        let error = result.unwrap_err();
        let mut read = [0; 7];
        let file = store.open(&container, Access::ReadOnly).unwrap();
        file.read_at(0, &mut read, ReadClass::Demand).unwrap();
        assert_eq!((&read, file.len().unwrap()), (b"content", 7));
        error.kind()
    };
    let exists = refused(store.rename_new(&half, &container));
    assert_eq!(exists, StoreErrorKind::AlreadyExists);
    let file = store.open(&container, Access::ReadWrite).unwrap();
    for result in [
        store.rename(&half, &container),
        store.rename(&container, &subject.name("elsewhere")),
        store.rename_new(&container, &subject.name("elsewhere")),
        store.remove(&container),
        file.resize(3),
    ] {
        let kind = refused(result);
        let expected = [StoreErrorKind::PermissionDenied, StoreErrorKind::Failed];
        assert!(expected.contains(&kind), "{kind:?}");
    }
}

fn missing_names_are_not_found(subject: &Subject<'_>) {
    let (store, gone, to) = (
        subject.store,
        subject.name("gone"),
        subject.name("elsewhere"),
    );
    assert_eq!(
        kind(store.open(&gone, Access::ReadOnly)),
        StoreErrorKind::NotFound
    );
    assert_eq!(
        kind(store.open(&gone, Access::ReadWrite)),
        StoreErrorKind::NotFound
    );
    assert_eq!(kind(store.stat(&gone)), StoreErrorKind::NotFound);
    assert_eq!(kind(store.remove(&gone)), StoreErrorKind::NotFound);
    // The agent refuses such a name before it looks.
    if !subject.agent {
        assert_eq!(kind(store.rename(&gone, &to)), StoreErrorKind::NotFound);
        assert_eq!(kind(store.rename_new(&gone, &to)), StoreErrorKind::NotFound);
    }
}

fn the_list_has_every_name_once(subject: &Subject<'_>) {
    // The agent allows 64 names.
    let count = if subject.agent { 40 } else { 250 };
    let mut made: Vec<FileName> = (0..count)
        .map(|n| subject.name(&format!("listed ä {n}")))
        .collect();
    let before = subject.store.list().unwrap();
    for name in &made {
        subject.store.create_new(name).unwrap();
    }
    let mut listed = subject.store.list().unwrap();
    listed.retain(|name| !before.contains(name));
    listed.sort();
    made.sort();
    assert_eq!(listed, made);
    for name in &made {
        subject.store.remove(name).unwrap();
    }
}

fn a_read_only_handle_writes_nothing(subject: &Subject<'_>) {
    subject
        .store
        .create_new(&subject.name("guarded"))
        .unwrap()
        .write_at(0, b"safe")
        .unwrap();
    let file = subject
        .store
        .open(&subject.name("guarded"), Access::ReadOnly)
        .unwrap();
    assert!(file.write_at(0, b"lost").is_err());
    assert!(file.resize(0).is_err());
    let mut read = [0; 4];
    file.read_at(0, &mut read, ReadClass::Demand).unwrap();
    assert_eq!(&read, b"safe");
}

/// Eight threads, each with its own stripes, writing, flushing and reading back in every class.
fn many_threads_at_once_see_their_own_bytes(subject: &Subject<'_>) {
    const THREADS: u64 = 8;
    const STRIPE: u64 = 300_001;
    let file = subject.store.create_new(&subject.name("shared")).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let file = Arc::clone(&file);
            scope.spawn(move || {
                for round in 0..12 {
                    let len =
                        usize::try_from(STRIPE).unwrap() - 1000 * usize::try_from(round).unwrap();
                    let (offset, data) = (
                        (round * THREADS + thread) * STRIPE,
                        noise(round * 100 + thread, len),
                    );
                    file.write_at(offset, &data).unwrap();
                    if round % 4 == thread % 4 {
                        file.flush().unwrap();
                    }
                    for class in [ReadClass::Demand, ReadClass::Ahead] {
                        let mut read = vec![0; len];
                        file.read_at(offset, &mut read, class).unwrap();
                        assert!(read == data, "thread {thread} round {round} {class:?}");
                    }
                }
            });
        }
    });
    file.flush().unwrap();
}

/// Handles stay with the file that was opened, including those that other channels open later.
fn an_open_file_survives_its_name(subject: &Subject<'_>) {
    let (store, held, other) = (subject.store, subject.name("held"), subject.name("other"));
    let file = store.create_new(&held).unwrap();
    file.write_at(0, b"x").unwrap();
    store.rename_new(&held, &other).unwrap();
    let impostor = store.create_new(&held).unwrap();
    impostor.write_at(0, b"y").unwrap();
    let data = noise(5, 3 << 20);
    for _ in 0..4 {
        file.write_at(0, &data).unwrap();
    }
    file.flush().unwrap();
    assert_eq!(store.stat(&held).unwrap().len, 1);
    assert_eq!(store.stat(&other).unwrap().len, data.len() as u64);
    let mut read = vec![0; data.len()];
    file.read_at(0, &mut read, ReadClass::Ahead).unwrap();
    assert!(read == data);
}

fn parts_written_durably_are_read(subject: &Subject<'_>) {
    let file = subject
        .store
        .create_new(&subject.name("durable-parts"))
        .unwrap();
    let (first, second) = (noise(8, 300_000), noise(9, 5000));
    file.write_at(1_000_000, b"before").unwrap();
    let parts = [(0, &first[..]), (400_000, &second[..])];
    file.write_parts_durably(&parts).unwrap().durable().unwrap();
    for (offset, expected) in [(0, &first[..]), (400_000, &second), (1_000_000, b"before")] {
        let mut found = vec![0; expected.len()];
        file.read_at(offset, &mut found, ReadClass::Demand).unwrap();
        assert!(found == expected, "at {offset}");
    }
}

fn flushes_and_free_space_answer(subject: &Subject<'_>) {
    assert!(subject.store.capabilities().durable_flush);
    assert!(subject.store.capabilities().atomic_replace);
    subject.store.flush_folder().unwrap();
    let space = subject.store.free_space().unwrap();
    assert!(
        space.available_bytes <= space.total_bytes && space.total_bytes > 0,
        "{space:?}"
    );
    assert!(!space.read_only);
    assert!(!subject.store.describe().is_empty());
}

fn discard_reads_zeros_or_is_unsupported(subject: &Subject<'_>) {
    // The agent makes holes only in a container.
    let file = if subject.agent {
        let container = FileName::new("x.luks").unwrap();
        subject.store.open(&container, Access::ReadWrite)
    } else {
        subject.store.create_new(&subject.name("holes"))
    }
    .unwrap();
    file.resize(100_000).unwrap();
    file.write_at(0, &noise(3, 100_000)).unwrap();
    match file.discard(4096, 8192) {
        Ok(()) => {
            let mut read = [1; 8192];
            file.read_at(4096, &mut read, ReadClass::Demand).unwrap();
            assert_eq!(read, [0; 8192]);
            assert_eq!(file.len().unwrap(), 100_000);
        }
        Err(error) => {
            assert_eq!(error.kind(), StoreErrorKind::Unsupported);
            assert!(!subject.store.capabilities().discard);
        }
    }
}

fn links_folders_and_fifos_are_not_opened(subject: &Subject<'_>, folder: &Path) {
    let path = |text: &str| folder.join(subject.name(text).as_str());
    std::fs::write(folder.join("target"), "secret").unwrap();
    std::os::unix::fs::symlink("target", path("link")).unwrap();
    std::os::unix::fs::symlink("nowhere", path("dangling")).unwrap();
    std::fs::create_dir(path("folder")).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let fifo = path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for odd in ["link", "dangling", "folder", "fifo"] {
        // The agent does not say more.
        if subject.agent {
            for access in [Access::ReadOnly, Access::ReadWrite] {
                assert!(subject.store.open(&subject.name(odd), access).is_err());
                assert!(
                    subject
                        .store
                        .read_small(&subject.name(odd), access, 6)
                        .is_err()
                );
            }
            assert!(subject.store.create_new(&subject.name(odd)).is_err());
            continue;
        }
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let found = kind(subject.store.open(&subject.name(odd), access));
            assert_eq!(found, StoreErrorKind::NotRegular, "{odd} {access:?}");
            let read = kind(subject.store.read_small(&subject.name(odd), access, 6));
            assert_eq!(read, StoreErrorKind::NotRegular, "{odd} {access:?}");
        }
        assert!(!subject.store.stat(&subject.name(odd)).unwrap().regular);
        assert_eq!(
            kind(subject.store.create_new(&subject.name(odd))),
            StoreErrorKind::AlreadyExists
        );
    }
    assert!(!folder.join("nowhere").exists());
    std::fs::remove_dir(path("folder")).unwrap();
}

fn new_files_are_private(subject: &Subject<'_>, folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let name = subject.name("private");
    subject.store.create_new(&name).unwrap();
    let mode = std::fs::metadata(folder.join(name.as_str()))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn memory_keeps_the_contract() {
    run_all(&Subject::new(&MemoryStore::new(), None));
}

#[test]
fn local_folder_keeps_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    let store = LocalStore::open(folder.path()).unwrap();
    run_all(&Subject::new(&store, Some(folder.path())));
}

/// Waits until all further connections, which join in the background, carry something.
fn all_in_use(store: &SftpStore) {
    let data = noise(10, 8 << 20);
    let name = Subject::new(store, None).name("much");
    let file = store.create_new(&name).unwrap();
    file.resize(data.len() as u64).unwrap();
    crate::part::eventually(|| {
        file.write_at(0, &data).unwrap();
        (store.further_connections() == (3, None)).then_some(())
    });
}

#[test]
fn sftp_over_a_pipe_keeps_the_contract() {
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    let store = SftpStore::connect(crate::part::piped(folder.path(), &[])).unwrap();
    run_all(&Subject::new(&store, Some(folder.path())));
    all_in_use(&store);
}

#[test]
fn sftp_over_one_connection_keeps_the_contract() {
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    let mut options = crate::part::piped(folder.path(), &[]);
    options.connections = 1;
    let store = SftpStore::connect(options).unwrap();
    run_all(&Subject::new(&store, Some(folder.path())));
}

#[test]
fn sftp_without_limits_or_rename_extensions_still_transfers_in_small_requests() {
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    let store = SftpStore::connect(crate::part::piped(
        folder.path(),
        &["-P", "limits,posix-rename"],
    ))
    .unwrap();
    assert!(!store.capabilities().atomic_replace);
    let subject = Subject::new(&store, Some(folder.path()));
    let name = |text| subject.name(text);
    large_transfers_at_odd_offsets_arrive_whole(&subject);
    many_threads_at_once_see_their_own_bytes(&subject);
    store.create_new(&name("from")).unwrap();
    assert_eq!(
        kind(store.rename(&name("from"), &name("large"))),
        StoreErrorKind::Unsupported
    );
    store.rename(&name("from"), &name("to")).unwrap();
}

#[test]
fn sftp_through_ssh_and_a_real_sshd_keeps_the_contract() {
    requires!(openssh::missing());
    let folder = tempfile::tempdir().unwrap();
    let sshd = SshServer::start_for(folder.path());
    let target = SshTarget::new(None, "some.host", None).unwrap();
    let options = crate::part::options(target.argv(&sshd.ssh_command()), folder.path());
    let store = SftpStore::connect(options).unwrap();
    run_all(&Subject::new(&store, Some(folder.path())));
    all_in_use(&store);
}

#[test]
fn sftp_through_sshds_own_server_keeps_the_contract() {
    requires!(openssh::missing());
    let options = OpenSshOptions {
        internal_sftp: true,
        ..Default::default()
    };
    let sshd = SshServer::start_with(&options);
    let folder = tempfile::tempdir().unwrap();
    let target = SshTarget::new(Some("root"), "127.0.0.1", Some(sshd.port())).unwrap();
    let options = crate::part::options(target.argv(&sshd.ssh_command()), folder.path());
    let store = SftpStore::connect(options).unwrap();
    run_all(&Subject::new(&store, Some(folder.path())));
    all_in_use(&store);
    assert_eq!(sshd.sftp_server_pids().len(), 4);
}

#[test]
fn sftp_of_the_agent_keeps_the_contract() {
    requires!(agent_server::missing());
    let folder = tempfile::tempdir().unwrap();
    let program = vec![agent_server::launcher(folder.path()).into()];
    let options = crate::part::options(program, folder.path());
    let store = SftpStore::connect(options).unwrap();
    let subject = Subject::new(&store, Some(folder.path()));
    assert!(subject.agent);
    run_all(&subject);
    all_in_use(&store);
}

#[test]
fn sftp_of_a_server_that_opens_no_folders_keeps_the_contract() {
    requires!(asyncssh::missing());
    let server = asyncssh::start();
    let folder = tempfile::tempdir().unwrap();
    let target = SshTarget::new(None, "some.host", None).unwrap();
    let options = crate::part::options(target.argv(&server.ssh_command()), folder.path());
    let store = SftpStore::connect(options).unwrap();
    run_all(&Subject::new(&store, Some(folder.path())));
    all_in_use(&store);
}
