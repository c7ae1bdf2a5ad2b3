//! Errors of a container, a server or a connection, and how a session ends then.

mod taken_over;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use sprat::Exit;
use sprat_luks::Secret;
use sprat_session as session;
use sprat_session::{Access, Notice, Phase, Session, UnlockWish, unlock};
use sprat_snapshot::RestoreSpec;
use sprat_testkit::leftovers::LIMIT;
use sprat_testkit::ssh_server::OpenSshOptions;
use sprat_testkit::{leases, requires};
use sprat_testkit_session::session_harness::{
    Observed, SessionHarness, assert_exit, fill, job, known, missing, never, ssh_missing,
};

#[test]
fn wrong_key_is_reported_and_releases_the_lock() {
    requires!(missing());
    let harness = SessionHarness::local();
    harness.create();
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let wrong = Secret::key_file(b"another".to_vec());
        let opened = Session::open(
            harness.options(access),
            &wrong,
            &mut Observed::default(),
            &never(),
        );
        assert_exit(opened, Exit::WrongKey);
        assert_eq!(harness.server_files(), ["x.luks"]);
    }
    harness.assert_nothing_remains();
}

#[test]
fn missing_container_and_no_luks_differ_from_damage() {
    requires!(missing());
    let harness = SessionHarness::local();
    assert_exit(harness.open(Access::ReadWrite), Exit::NoContainer);
    fs::write(harness.container(), vec![7; 1 << 20]).unwrap();
    assert_exit(harness.open(Access::ReadWrite), Exit::NoContainer);
    assert_exit(harness.open(Access::ReadOnly), Exit::NoContainer);
    assert_eq!(harness.server_files(), ["x.luks"]);
}

#[test]
fn a_container_that_was_cut_short_is_not_written_to() {
    requires!(missing());
    let harness = SessionHarness::local();
    harness.create();
    for keep in [
        harness.size_bytes / 2 / 4096 * 4096,
        20 << 20,
        8 << 20,
        4096,
    ] {
        let file = harness.container_file();
        file.set_len(keep).unwrap();
        let failure = assert_exit(harness.open(Access::ReadWrite), Exit::Damaged);
        assert!(failure.hint.is_some(), "{failure:?}");
        assert_eq!(fs::metadata(harness.container()).unwrap().len(), keep);
    }
    assert_eq!(harness.server_files(), ["x.luks"]);
}

#[test]
fn another_container_under_the_same_name_gets_no_key() {
    requires!(missing());
    let harness = SessionHarness::local();
    let first = harness.create();
    fs::remove_file(harness.container()).unwrap();
    harness.create();
    let opened = Session::open(
        known(harness.options(Access::ReadWrite), &first),
        &harness.secret,
        &mut Observed::default(),
        &never(),
    );
    assert_exit(opened, Exit::Damaged);
    assert_eq!(harness.server_files(), ["x.luks"]);
}

#[test]
fn one_damaged_header_copy_is_reported_and_the_other_used() {
    requires!(missing());
    let harness = SessionHarness::local();
    harness.create();
    let file = harness.container_file();
    file.write_all_at(&[0; 512], 100).unwrap();
    let mut seen = Observed::default();
    let session = Session::open(
        harness.options(Access::ReadOnly),
        &harness.secret,
        &mut seen,
        &never(),
    )
    .unwrap();
    assert!(
        seen.notices
            .iter()
            .any(|notice| matches!(notice, Notice::HeaderCopyDamaged { .. })),
        "{:?}",
        seen.notices
    );
    session.close(&mut seen, &never()).unwrap();
    file.write_all_at(&[0; 512], 16384 + 100).unwrap();
    assert_exit(harness.open(Access::ReadOnly), Exit::Damaged);
}

#[test]
fn init_never_overwrites_and_clears_what_a_dead_init_left() {
    requires!(missing());
    let harness = SessionHarness::local();
    for left in ["x.luks.new", "x.luks.new-0123456789abcdef"] {
        fs::write(harness.path("store").join(left), "left over").unwrap();
    }
    harness.create();
    let before = fs::read(harness.container()).unwrap();
    let again = session::create(harness.create_options(), &mut Observed::default(), &never());
    assert_exit(again, Exit::Failed);
    assert!(fs::read(harness.container()).unwrap() == before);
    assert_eq!(harness.server_files(), ["x.luks"]);
    let mut small = harness.create_options();
    small.size_bytes = 1 << 20;
    assert_exit(
        session::create(small, &mut Observed::default(), &never()),
        Exit::Usage,
    );
}

#[test]
fn two_sessions_never_meet() {
    requires!(missing());
    let harness = SessionHarness::local();
    harness.create();
    let mut first = harness.open(Access::ReadWrite).unwrap();
    assert_exit(harness.open(Access::ReadWrite), Exit::Locked);
    // This machine may read meanwhile.
    let reading = harness.open(Access::ReadOnly).unwrap();
    reading.close(&mut Observed::default(), &never()).unwrap();
    // Another machine.
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let mut elsewhere = harness.options(access);
        elsewhere.state_dir = harness.path("other-state");
        let opened = Session::open(
            elsewhere,
            &harness.secret,
            &mut Observed::default(),
            &never(),
        );
        let failure = assert_exit(opened, Exit::Locked);
        let what = "container x.luks is locked by another machine: ";
        assert!(failure.what.starts_with(what), "{failure:?}");
    }
    fill(&harness.path("source"), 3, 1000, 3);
    first
        .take_snapshot(harness.spec(), &mut Observed::default(), &never())
        .unwrap();
    first.close(&mut Observed::default(), &never()).unwrap();
    harness.restore_and_compare();
}

#[test]
fn session_that_lost_its_lock_sends_nothing_more() {
    requires!(missing());
    let harness = SessionHarness::local();
    harness.create();
    fill(&harness.path("source"), 20, 100_000, 4);
    let mut session = harness.open(Access::ReadWrite).unwrap();
    let lock = leases::held(&harness.path("store")).remove(0);
    let number: u64 = lock.extension().unwrap().to_str().unwrap().parse().unwrap();
    fs::copy(&lock, lock.with_extension((number + 1).to_string())).unwrap();
    let taken = session.take_snapshot(harness.spec(), &mut Observed::default(), &never());
    let ended = session.close(&mut Observed::default(), &never());
    let failure = assert_exit(taken.and(ended.map(drop)), Exit::Locked);
    assert!(failure.hint.is_some());
    harness.assert_nothing_remains();
    assert_exit(harness.open(Access::ReadWrite), Exit::Locked);
}

#[test]
fn servers_that_do_not_let_us_in_are_exit_14() {
    requires!(ssh_missing());
    let mut harness = SessionHarness::ssh();
    harness.create();
    harness.sshd().forget_host_key().unwrap();
    assert_exit(harness.open(Access::ReadWrite), Exit::Unreachable);
    let mut harness = SessionHarness::ssh();
    harness.sshd().use_unknown_user_key().unwrap();
    assert_exit(harness.open(Access::ReadOnly), Exit::Unreachable);
    harness.sshd().stop();
    assert_exit(harness.open(Access::ReadOnly), Exit::Unreachable);
    harness.assert_nothing_remains();
}

#[test]
fn a_read_only_account_still_restores() {
    requires!(ssh_missing());
    let harness = SessionHarness::local();
    harness.create();
    fill(&harness.path("source"), 5, 10_000, 5);
    harness.backup().unwrap();
    let mut reader = SessionHarness::ssh_with(&OpenSshOptions {
        sftp_arguments: vec!["-R".to_owned()],
        ..OpenSshOptions::default()
    });
    reader.size_bytes = harness.size_bytes;
    fs::copy(harness.container(), reader.container()).unwrap();
    let before = fs::read(reader.container()).unwrap();
    let mut session = reader.open(Access::ReadOnly).unwrap();
    let spec = RestoreSpec::new(job(), reader.path("out"));
    session
        .restore(spec, &mut Observed::default(), &never())
        .unwrap();
    session.close(&mut Observed::default(), &never()).unwrap();
    let restored = reader
        .path("out")
        .join(harness.path("source").strip_prefix("/").unwrap());
    assert!(restored.join("d0/f0").exists());
    assert!(fs::read(reader.container()).unwrap() == before);
    assert_eq!(reader.server_files(), ["x.luks"]);
    assert_exit(reader.open(Access::ReadWrite), Exit::Failed);
}

#[test]
fn cut_connection_ends_or_continues_the_run_as_configured() {
    requires!(ssh_missing());
    let mut harness = SessionHarness::ssh();
    harness.create();
    for (reconnect_s, exit) in [(0, Some(Exit::Unreachable)), (30, None)] {
        fill(
            &harness.path(format!("source/{reconnect_s}")),
            60,
            1 << 20,
            6 + reconnect_s,
        );
        let mut options = harness.options(Access::ReadWrite);
        options.reconnect_max = Duration::from_secs(reconnect_s);
        let mut session =
            Session::open(options, &harness.secret, &mut Observed::default(), &never()).unwrap();
        let pids = harness.sshd().sftp_server_pids();
        let mut seen = Observed::default();
        harness.once_written(4 << 20, move || {
            pids.into_iter()
                .for_each(sprat_testkit_session::session_harness::kill);
        });
        let taken = session.take_snapshot(harness.spec(), &mut seen, &never());
        let closed = session.close(&mut seen, &never());
        match exit {
            Some(exit) => {
                assert_exit(taken.map(drop).and(closed.map(drop)), exit);
            }
            None => {
                taken.unwrap();
                assert!(closed.unwrap().volume.losses > 0);
            }
        }
        harness.assert_nothing_remains();
        harness.assert_clean();
    }
    harness.restore_and_compare();
}

/// A small file system as the server's folder.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(dir: &'a Path, bytes: u64) -> Self {
        rustix::mount::mount(
            "none",
            dir,
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            Some(
                std::ffi::CString::new(format!("size={bytes}"))
                    .unwrap()
                    .as_c_str(),
            ),
        )
        .unwrap();
        Self(dir)
    }

    fn grow(&self, bytes: u64) {
        rustix::mount::mount_remount(
            self.0,
            rustix::mount::MountFlags::empty(),
            std::ffi::CString::new(format!("size={bytes}"))
                .unwrap()
                .as_c_str(),
        )
        .unwrap();
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn full_server_damages_nothing_finished() {
    requires!(ssh_missing());
    let harness = SessionHarness::ssh();
    let store = harness.path("store");
    let disk = SmallDisk::mount(&store, 400 << 10);
    let made = session::create(harness.create_options(), &mut Observed::default(), &never());
    let failure = assert_exit(made, Exit::Failed);
    assert!(failure.hint.unwrap().contains("removed"));
    assert_eq!(harness.server_files(), [""; 0], "what init made is removed");

    disk.grow(40 << 20);
    harness.create();
    fill(&harness.path("source"), 10, 100_000, 8);
    harness.backup().unwrap();
    fill(&harness.path("source/more"), 60, 1 << 20, 9);
    assert_exit(harness.backup().map(drop), Exit::Failed);
    harness.assert_nothing_remains_but_store();
    // Nothing is written for reading, so it works on the full disk.
    let mut session = harness.open(Access::ReadOnly).unwrap();
    let spec = RestoreSpec::new(job(), harness.path("out"));
    session
        .restore(spec, &mut Observed::default(), &never())
        .unwrap();
    session.close(&mut Observed::default(), &never()).unwrap();
    let source = harness.path("source/d1/f1");
    let restored = harness.path("out").join(source.strip_prefix("/").unwrap());
    assert!(fs::read(restored).unwrap() == fs::read(source).unwrap());
    disk.grow(200 << 20);
    std::thread::sleep(Duration::from_millis(1100));
    harness.backup().unwrap();
    harness.restore_and_compare();
    harness.assert_clean();
}

#[test]
fn an_interrupt_in_any_phase_ends_in_order() {
    requires!(ssh_missing());
    let harness = SessionHarness::ssh();
    for phase in [
        Phase::Connecting,
        Phase::Locking,
        Phase::Creating,
        Phase::Mounting,
        Phase::MakingFileSystem,
        Phase::Unmounting,
    ] {
        let (interrupt, mut seen) = interrupted_at(phase);
        let made = session::create(harness.create_options(), &mut seen, &interrupt);
        assert_exit(made, Exit::Interrupted);
        assert_eq!(harness.server_files(), [""; 0], "{phase:?}");
        harness.assert_nothing_remains();
    }
    harness.create();
    fill(&harness.path("source"), 5, 10_000, 11);
    for phase in [
        Phase::Connecting,
        Phase::Locking,
        Phase::Unlocking,
        Phase::Mounting,
    ] {
        let (interrupt, mut seen) = interrupted_at(phase);
        let opened = Session::open(
            harness.options(Access::ReadWrite),
            &harness.secret,
            &mut seen,
            &interrupt,
        );
        assert_exit(opened, Exit::Interrupted);
        harness.assert_nothing_remains();
        assert_eq!(harness.server_files(), ["x.luks"], "{phase:?}");
    }
    // While rsync runs: a `.partial` stays, and everything is closed in order.
    fill(&harness.path("source/big"), 60, 1 << 20, 12);
    let interrupt = never();
    let asked = interrupt.clone();
    let mut seen = asking_while_copying(asked, 1);
    let mut session = harness.open(Access::ReadWrite).unwrap();
    let taken = session.take_snapshot(harness.slow_spec(), &mut seen, &interrupt);
    assert_exit(taken.map(drop), Exit::Interrupted);
    session.close(&mut seen, &interrupt).unwrap();
    assert_eq!(harness.server_files(), ["x.luks"]);
    harness.assert_nothing_remains();
    harness.backup().unwrap();
    harness.restore_and_compare();
}

#[test]
fn a_second_interrupt_ends_everything_at_once() {
    requires!(ssh_missing());
    let harness = SessionHarness::ssh();
    harness.create();
    fill(&harness.path("source"), 60, 1 << 20, 13);
    let interrupt = never();
    let asked = interrupt.clone();
    let mut seen = asking_while_copying(asked, 2);
    let mut session = harness.open(Access::ReadWrite).unwrap();
    let taken = session.take_snapshot(harness.slow_spec(), &mut seen, &interrupt);
    assert_exit(taken.map(drop), Exit::Interrupted);
    assert_exit(
        session.close(&mut seen, &interrupt).map(drop),
        Exit::Interrupted,
    );
    harness.assert_nothing_remains();
    harness.assert_clean();
    harness.backup().unwrap();
    harness.restore_and_compare();
}

/// Interrupts `times` as soon as rsync copies.
fn asking_while_copying(asked: sprat_session::interrupt::Interrupt, times: usize) -> Observed {
    Observed {
        on_progress: Some(Box::new(move |progress| {
            let copying = progress
                .rsync
                .is_some_and(|rsync| rsync.phase == sprat_snapshot::Phase::Copying);
            if copying && !asked.requested() {
                (0..times).for_each(|_| asked.request());
            }
        })),
        ..Observed::default()
    }
}

fn interrupted_at(phase: Phase) -> (sprat_session::interrupt::Interrupt, Observed) {
    let interrupt = never();
    let asked = interrupt.clone();
    let seen = Observed {
        on_phase: Some(Box::new(move |now| {
            if now == phase && !asked.requested() {
                asked.request();
            }
        })),
        ..Observed::default()
    };
    (interrupt, seen)
}

#[test]
fn an_interrupt_while_connecting_does_not_wait_for_the_server() {
    requires!(ssh_missing());
    let harness = SessionHarness::ssh();
    harness.create();
    let (interrupt, mut seen) = interrupted_at(Phase::Connecting);
    let mut options = harness.options(Access::ReadWrite);
    // A server that never answers; the search for leftovers uses the tag.
    let tag = harness.path("source").display().to_string();
    options.ssh.command = ["sh", "-c", "sleep 600; exit 1", &tag]
        .map(std::ffi::OsString::from)
        .to_vec();
    let begun = Instant::now();
    let opened = Session::open(options, &harness.secret, &mut seen, &interrupt);
    assert_exit(opened, Exit::Interrupted);
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    harness.assert_nothing_remains();
    harness
        .open(Access::ReadWrite)
        .unwrap()
        .close(&mut Observed::default(), &never())
        .unwrap();
}

#[test]
fn another_container_found_after_a_reconnect_gets_no_byte() {
    requires!(ssh_missing());
    let mut harness = SessionHarness::ssh();
    harness.create();
    let another = SessionHarness::local();
    another.create();
    fs::File::options()
        .write(true)
        .open(another.container())
        .unwrap()
        .set_len(harness.size_bytes / 4096 * 4096)
        .unwrap();
    fill(&harness.path("source"), 10, 1 << 20, 51);
    let mut session = harness.open(Access::ReadWrite).unwrap();
    harness.sshd().kill_sessions();
    fs::rename(another.container(), harness.container()).unwrap();
    let before = fs::read(harness.container()).unwrap();
    let taken = session.take_snapshot(harness.spec(), &mut Observed::default(), &never());
    let closed = session.close(&mut Observed::default(), &never());
    assert_exit(taken.map(drop).and(closed.map(drop)), Exit::Damaged);
    assert!(fs::read(harness.container()).unwrap() == before);
    harness.assert_nothing_remains();
}

#[test]
fn session_that_reconnects_to_another_owner_sends_nothing_more() {
    requires!(ssh_missing());
    let mut harness = SessionHarness::ssh();
    harness.create();
    fill(&harness.path("source"), 10, 1 << 20, 52);
    let mut first = harness.open(Access::ReadWrite).unwrap();
    // Another machine used force.
    let store = sprat_store::LocalStore::open(&harness.path("store")).unwrap();
    let name = sprat_store::FileName::new("x.luks").unwrap();
    let mut elsewhere = harness.options(Access::ReadWrite);
    elsewhere.state_dir = harness.path("other-state");
    let wish = UnlockWish {
        force: true,
        is_off: true,
        watch: Duration::ZERO,
        answer_wait: Duration::ZERO,
        ..UnlockWish::default()
    };
    let unlocked = unlock(&elsewhere, &wish, &never(), &mut |_| ()).unwrap();
    assert_eq!(unlocked.ways.len(), 1);
    let second = Session::open(
        elsewhere,
        &harness.secret,
        &mut Observed::default(),
        &never(),
    )
    .unwrap();
    let pids = harness.sshd().sftp_server_pids();
    pids.into_iter()
        .for_each(sprat_testkit_session::session_harness::kill);
    let taken = first.take_snapshot(harness.spec(), &mut Observed::default(), &never());
    let closed = first.close(&mut Observed::default(), &never());
    assert_exit(taken.map(drop).and(closed.map(drop)), Exit::Locked);
    second.close(&mut Observed::default(), &never()).unwrap();
    harness.assert_nothing_remains();
    harness.assert_clean();
    let left = sprat_store::lock::inspect(&store, &name, None).unwrap();
    assert_eq!(left.held, None, "the lost lease is not the highest");
}
