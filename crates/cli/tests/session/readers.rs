//! Commands that read a container which this machine has open already.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sprat::{Exit, Failure};
use sprat_inside::{CatSpec, FindSpec, ListSpec, Place};
use sprat_session as session;
use sprat_session::{Access, Session};
use sprat_snapshot::{RestoreSpec, SnapshotChoice};
use sprat_testkit::notice_servers::{PYTHON, python_module_missing};
use sprat_testkit::requires;
use sprat_testkit_session::session_harness::{
    Observed, SessionHarness, assert_exit, fill, job, missing, never, ssh_missing,
};

fn with_a_snapshot(harness: SessionHarness) -> SessionHarness {
    harness.create();
    fill(&harness.path("source"), 8, 1 << 20, 21);
    harness.backup().unwrap();
    harness
}

/// Opens the container for reading, and ends that again.
fn reading<T>(
    harness: &SessionHarness,
    read: impl FnOnce(&mut Session) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut session = harness.open(Access::ReadOnly)?;
    let done = read(&mut session);
    session.close(&mut Observed::default(), &never())?;
    done
}

fn place(harness: &SessionHarness, name: &str) -> Place {
    let path = harness.path("source").join(name);
    Place::new(job(), SnapshotChoice::LatestComplete, Some(&path))
}

fn cat(session: &mut Session, place: Place, out: OwnedFd) -> Result<u64, Failure> {
    let spec = CatSpec {
        place,
        bytes_max: None,
    };
    session.cat(spec, out, &mut Observed::default(), &never())
}

/// Each kind of order once.
fn read_everything(harness: &SessionHarness) {
    let seen = || Observed::default();
    let listed = reading(harness, |session| session.snapshots(&mut seen(), &never())).unwrap();
    assert!(!listed.is_empty());
    let spec = ListSpec {
        place: place(harness, ""),
        recursive: true,
    };
    let listing = reading(harness, |session| {
        session.list_folder(spec, &mut seen(), &never())
    });
    assert!(listing.unwrap().entries.len() >= 8);
    let spec = FindSpec {
        job: None,
        pattern: "f1".to_owned(),
        ignore_case: false,
    };
    let found = reading(harness, |session| session.find(spec, &mut seen(), &never())).unwrap();
    assert!(!found.paths.is_empty());

    let (mut from, out) = std::io::pipe().unwrap();
    let wanted = fs::read(harness.path("source/d1/f1")).unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        bytes
    });
    reading(harness, |session| {
        cat(session, place(harness, "d1/f1"), OwnedFd::from(out))
    })
    .unwrap();
    assert_eq!(reader.join().unwrap(), wanted);

    let out = harness.path("out");
    let _ = fs::remove_dir_all(&out);
    let spec = RestoreSpec::new(job(), out.clone());
    reading(harness, |session| {
        session.restore(spec, &mut seen(), &never())
    })
    .unwrap();
    let source = harness.path("source");
    let restored = out.join(source.strip_prefix("/").unwrap());
    assert_eq!(fs::read(restored.join("d1/f1")).unwrap(), wanted);
}

#[test]
fn ten_readers_in_a_row_beside_a_running_backup() {
    requires!(ssh_missing());
    let harness = with_a_snapshot(SessionHarness::ssh());
    fill(&harness.path("source/more"), 40, 1 << 20, 22);
    let mut writing = harness.open(Access::ReadWrite).unwrap();
    let read = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..10 {
                read_everything(&harness);
            }
            // Two at once.
            let other = scope.spawn(|| read_everything(&harness));
            read_everything(&harness);
            other.join().unwrap();
            read.store(true, Ordering::SeqCst);
        });
        let taken = writing.take_snapshot(harness.slow_spec(), &mut Observed::default(), &never());
        assert!(taken.unwrap().record.complete);
        let until = Instant::now() + Duration::from_secs(120);
        while !read.load(Ordering::SeqCst) {
            assert!(Instant::now() < until, "the readers don't end");
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    // A command that writes is refused as ever.
    assert_exit(harness.open(Access::ReadWrite), Exit::Locked);
    writing.close(&mut Observed::default(), &never()).unwrap();
    harness.assert_nothing_remains();
    harness.restore_and_compare();
    harness.assert_clean();
}

/// Prints the name of a terminal that nobody reads, then a second line when something was written to it.
const STALLED_TERMINAL: &str = "
import os, pty, select, sys
terminal, its_end = pty.openpty()
print(os.ttyname(its_end), flush=True)
select.select([terminal], [], [])
print('written', flush=True)
sys.stdin.read()
";

/// A write to a terminal may wait although `poll` reported it as ready.
#[test]
fn session_ends_although_the_terminal_of_a_reader_stands_still() {
    requires!(missing(), python_module_missing("pty"));
    let harness = with_a_snapshot(SessionHarness::local());
    let writing = harness.open(Access::ReadWrite).unwrap();
    let mut python = Command::new(PYTHON)
        .args(["-c", STALLED_TERMINAL])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(python.stdout.take().unwrap()).lines();
    let terminal = said.next().unwrap().unwrap();
    let terminal = fs::File::options().write(true).open(terminal).unwrap();
    std::thread::scope(|scope| {
        let harness = &harness;
        let reader = scope.spawn(move || {
            reading(harness, |session| {
                cat(session, place(harness, "d1/f1"), OwnedFd::from(terminal))
            })
        });
        assert_eq!(said.next().unwrap().unwrap(), "written");
        let closed = writing.close(&mut Observed::default(), &never()).unwrap();
        assert!(closed.durable);
        assert_exit(reader.join().unwrap(), Exit::Locked);
    });
    drop(python.stdin.take());
    python.wait().unwrap();
    harness.assert_nothing_remains();
    harness.assert_clean();
}

#[test]
fn session_ends_although_a_reader_does_not() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    let writing = harness.open(Access::ReadWrite).unwrap();
    // Nobody reads the pipe, so the file stays open.
    let (from, out) = std::io::pipe().unwrap();
    std::thread::scope(|scope| {
        let harness = &harness;
        let reader = scope.spawn(move || {
            reading(harness, |session| {
                cat(session, place(harness, "d1/f1"), OwnedFd::from(out))
            })
        });
        let mut first = [0];
        (&from).read_exact(&mut first).unwrap();
        let closed = writing.close(&mut Observed::default(), &never()).unwrap();
        assert!(closed.durable);
        assert_exit(reader.join().unwrap(), Exit::Locked);
    });
    harness.assert_nothing_remains();
    read_everything(&harness);
    harness.assert_nothing_remains();
    harness.assert_clean();
}

#[test]
fn reader_that_dies_stops_what_runs_for_it() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    let writing = harness.open(Access::ReadWrite).unwrap();
    let target = harness.target().to_string();
    let what = format!("docs:{}/d1/f1", harness.path("source").display());
    let mut reader = harness.command(&["cat", &target, &what]).spawn().unwrap();
    let mut first = [0];
    let mut out = reader.stdout.take().unwrap();
    out.read_exact(&mut first).unwrap();
    reader.kill().unwrap();
    reader.wait().unwrap();
    let begun = Instant::now();
    writing.close(&mut Observed::default(), &never()).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(60));
    drop(out);
    harness.assert_nothing_remains();
}

#[test]
fn socket_of_a_killed_session_stops_nobody() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    let run = harness.path("run");
    let sockets = || -> Vec<_> {
        let names = fs::read_dir(&run)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        names
            .filter(|path| path.extension().is_some_and(|kind| kind == "readers"))
            .collect()
    };
    let writing = harness.open(Access::ReadWrite).unwrap();
    let [socket] = &sockets()[..] else {
        panic!("one session, one socket")
    };
    fs::hard_link(socket, harness.path("kept")).unwrap();
    writing.close(&mut Observed::default(), &never()).unwrap();
    assert!(sockets().is_empty());
    // Nobody listens any more.
    fs::rename(harness.path("kept"), socket).unwrap();
    read_everything(&harness);
    assert!(sockets().is_empty());
    fs::write(socket, "").unwrap();
    harness.backup().unwrap();
    assert!(sockets().is_empty());
    harness.assert_nothing_remains();
}

#[test]
fn ten_readers_in_a_row_beside_a_mount() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let options = harness.options(access);
        let dir = harness.path("mnt");
        session::mount(
            &options,
            &harness.secret,
            &dir,
            &mut Observed::default(),
            &never(),
        )
        .unwrap();
        for _ in 0..10 {
            read_everything(&harness);
        }
        assert_exit(harness.open(Access::ReadWrite), Exit::Locked);
        let run = harness.path("run");
        session::unmount(&run, &dir, &mut Observed::default(), &never()).unwrap();
        harness.assert_nothing_remains();
    }
    harness.assert_clean();
}

#[test]
fn readers_beside_a_reader_look_up_and_restore_after_it() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    let first = harness.open(Access::ReadOnly).unwrap();
    let seen = || Observed::default();
    let listed = reading(&harness, |session| session.snapshots(&mut seen(), &never()));
    assert_eq!(listed.unwrap().len(), 1);
    std::thread::scope(|scope| {
        let restored = scope.spawn(|| {
            let spec = RestoreSpec::new(job(), harness.path("out"));
            reading(&harness, |session| {
                session.restore(spec, &mut seen(), &never())
            })
        });
        std::thread::sleep(Duration::from_secs(1));
        assert!(!restored.is_finished());
        first.close(&mut seen(), &never()).unwrap();
        assert!(restored.join().unwrap().unwrap().stats.files > 0);
    });
    harness.assert_nothing_remains();
}

#[test]
fn reader_waits_for_a_session_that_opens() {
    requires!(ssh_missing());
    let harness = with_a_snapshot(SessionHarness::ssh());
    let mut slow = harness.options(Access::ReadWrite);
    let go_on = harness.path("go-on");
    let wait = format!(
        "while [ ! -e {} ]; do sleep 0.1; done; exec \"$0\" \"$@\"",
        go_on.display()
    );
    let words = ["sh", "-c", &wait].map(Into::into);
    slow.ssh.command.splice(0..0, words);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let mut seen = Observed::default();
            let session = Session::open(slow, &harness.secret, &mut seen, &never())?;
            Ok::<_, Failure>(session.close(&mut seen, &never()))
        });
        std::thread::sleep(Duration::from_millis(300));
        let reader = scope.spawn(|| read_everything(&harness));
        // Longer than it waits for the lock of a session that does not announce itself.
        std::thread::sleep(Duration::from_secs(7));
        assert!(!reader.is_finished());
        fs::write(&go_on, "").unwrap();
        reader.join().unwrap();
        writing.join().unwrap().unwrap().unwrap();
    });
    harness.assert_nothing_remains();
}

#[test]
fn look_up_goes_on_by_itself_when_the_other_session_ends() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let other = harness.open(access).unwrap();
        let mut seen = Observed::default();
        let mut reader = harness.open(Access::ReadOnly).unwrap();
        reader.snapshots(&mut seen, &never()).unwrap();
        other.close(&mut seen, &never()).unwrap();
        assert_eq!(reader.snapshots(&mut seen, &never()).unwrap().len(), 1);
        reader.close(&mut seen, &never()).unwrap();
        harness.assert_nothing_remains();
    }
}
