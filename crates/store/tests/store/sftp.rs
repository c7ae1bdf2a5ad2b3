//! The SFTP store against real servers in trouble: read-only, full, without fsync, stopped, killed;
//! and refusals of ssh itself. No process may stay behind.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use sprat_store::{
    Access, FileName, Lock, LockError, OwnerNote, ReadClass, SftpOptions, SftpStore, SshTarget,
    Store, StoreError, StoreErrorKind, WriteJournal,
};
use sprat_testkit::leftovers::LIMIT;
use sprat_testkit::ssh_server::{OpenSshOptions, SshServer, openssh};
use sprat_testkit::{agent_server, needs, requires};

fn name(text: &str) -> FileName {
    FileName::new(text).unwrap()
}

fn through(sshd: &SshServer, folder: &Path) -> SftpOptions {
    let target = SshTarget::new(None, "some.host", None).unwrap();
    crate::part::options(target.argv(&sshd.ssh_command()), folder)
}

fn kind<T>(result: Result<T, StoreError>) -> StoreErrorKind {
    result.map(drop).unwrap_err().kind()
}

/// Direct children of this process except the test's sshd; a zombie counts.
fn children() -> Vec<String> {
    let mut children = Vec::new();
    for thread in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = thread.unwrap().path().join("children");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let comm = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/comm"));
        children.extend(text.split_whitespace().filter_map(|pid| comm(pid).ok()));
    }
    children.retain(|name| name != "sshd\n");
    children
}

fn threads() -> Vec<String> {
    let ours = ["sftp-reader\n", "sftp-writer\n", "sftp-stderr\n"];
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
    names
        .filter_map(Result::ok)
        .filter(|name| ours.contains(&name.as_str()))
        .collect()
}

#[test]
fn read_only_account_reads_and_refuses_to_write() {
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x"), vec![7; 100_000]).unwrap();
    let store = SftpStore::connect(crate::part::piped(folder.path(), &["-R"])).unwrap();
    assert!(
        !store.capabilities().durable_flush,
        "fsync is not offered to such an account"
    );
    let file = store.open(&name("x"), Access::ReadOnly).unwrap();
    let mut read = vec![0; 100_000];
    file.read_at(0, &mut read, ReadClass::Ahead).unwrap();
    assert!(read.iter().all(|byte| *byte == 7));
    for result in [
        store.open(&name("x"), Access::ReadWrite).map(drop),
        store.create_new(&name("y")).map(drop),
        store.remove(&name("x")),
        store.rename_new(&name("x"), &name("z")),
    ] {
        assert_eq!(kind(result), StoreErrorKind::PermissionDenied);
    }
    assert_eq!(store.list().unwrap(), [name("x")]);
}

#[test]
fn server_without_fsync_is_refused_unless_explicitly_allowed() {
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    for insist in [false, true] {
        let mut options = crate::part::piped(folder.path(), &["-P", "fsync"]);
        options.insist_without_fsync = insist;
        let store = SftpStore::connect(options).unwrap();
        assert!(!store.capabilities().durable_flush);
        let file = store.create_new(&name(&format!("x{insist}"))).unwrap();
        file.write_at(0, b"x").unwrap();
        for result in [file.flush(), store.flush_folder()] {
            match (insist, result) {
                (true, Ok(())) | (false, Err(StoreError::Unsupported { .. })) => {}
                (_, other) => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn full_disk_is_no_space_and_the_session_lives() {
    requires!(needs::sftp_server_missing(), needs::root());
    let disk = sprat_testkit::tmpfs::SmallDisk::new("size=4m");
    let store = SftpStore::connect(crate::part::piped(disk.path(), &[])).unwrap();
    let file = store.create_new(&name("x")).unwrap();
    file.write_at(0, &vec![1; 1 << 20]).unwrap();
    let error = file.write_at(1 << 20, &vec![2; 8 << 20]).unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::NoSpace {
                available_bytes: 0,
                ..
            }
        ),
        "{error}"
    );
    let mut read = vec![0; 1 << 20];
    file.read_at(0, &mut read, ReadClass::Demand).unwrap();
    assert!(
        read.iter().all(|byte| *byte == 1),
        "what was answered before is untouched"
    );
    file.resize(1 << 20).unwrap();
    file.write_at(1 << 20, &vec![2; 1 << 20]).unwrap();
    file.flush().unwrap();
}

#[test]
fn missing_folder_or_a_file_is_reported_at_once() {
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "").unwrap();
    let connect = |below: &str| {
        SftpStore::connect(crate::part::piped(&folder.path().join(below), &[])).map(drop)
    };
    assert_eq!(kind(connect("missing")), StoreErrorKind::NotFound);
    assert_eq!(kind(connect("file")), StoreErrorKind::Failed);
    assert_eq!(children(), Vec::<String>::new());
}

#[test]
fn killed_connection_ends_every_call_and_leaves_nothing_behind() {
    requires!(openssh::missing());
    let folder = tempfile::tempdir().unwrap();
    let sshd = SshServer::start_for(folder.path());
    for victim in 0..4 {
        let store = SftpStore::connect(through(&sshd, folder.path())).unwrap();
        let file = store.create_new(&name(&format!("x{victim}"))).unwrap();
        // A file that grows while a connection joins it may look like another one.
        file.resize(16 << 20).unwrap();
        crate::part::eventually(|| {
            file.write_at(0, &vec![1; 8 << 20]).unwrap();
            (store.further_connections().0 == 3).then_some(())
        });
        file.write_at(0, &vec![1; 8 << 20]).unwrap();
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..4)
                .map(|writer| {
                    let file = &file;
                    scope.spawn(move || {
                        let begun = Instant::now();
                        loop {
                            match file.write_at(writer << 22, &vec![2; 1 << 20]) {
                                Ok(()) => assert!(begun.elapsed() < LIMIT),
                                Err(error) => return error.kind(),
                            }
                        }
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(50));
            let pids = sshd.sftp_server_pids();
            crate::part::kill(pids[victim % pids.len()], 9);
            for writer in writers {
                assert_eq!(writer.join().unwrap(), StoreErrorKind::Disconnected);
            }
        });
        for result in [
            file.flush(),
            file.len().map(drop),
            file.read_at(0, &mut [0], ReadClass::Demand),
            store.list().map(drop),
            store.open(&name("x0"), Access::ReadOnly).map(drop),
        ] {
            assert_eq!(kind(result), StoreErrorKind::Disconnected);
        }
        drop((file, store));
        assert_eq!((children(), threads()), (vec![], vec![]));
    }
    crate::part::eventually(|| sshd.sftp_server_pids().is_empty().then_some(()));
}

#[test]
fn stopped_server_is_a_lost_connection_after_the_timeout() {
    requires!(openssh::missing());
    let folder = tempfile::tempdir().unwrap();
    let sshd = SshServer::start_for(folder.path());
    let mut options = through(&sshd, folder.path());
    options.answer_timeout = Duration::from_secs(5);
    let store = SftpStore::connect(options).unwrap();
    let file = store.create_new(&name("x")).unwrap();
    let stopped = sshd.sftp_server_pids();
    stopped.iter().for_each(|pid| crate::part::kill(*pid, 19));
    let begun = Instant::now();
    assert_eq!(
        kind(file.write_at(0, &vec![1; 4 << 20])),
        StoreErrorKind::Disconnected
    );
    assert!(begun.elapsed() < LIMIT);
    drop((file, store));
    assert_eq!((children(), threads()), (vec![], vec![]));
    drop(sshd);
    // A zombie has no command line and must not count: a first process may reap no orphans.
    let alive = |pid: &i32| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
    };
    assert!(!stopped.is_empty());
    crate::part::eventually(|| (!stopped.iter().any(alive)).then_some(()));
}

#[test]
fn ended_session_leaves_no_process_here_or_there() {
    requires!(openssh::missing());
    let folder = tempfile::tempdir().unwrap();
    let sshd = SshServer::start_for(folder.path());
    let store = SftpStore::connect(through(&sshd, folder.path())).unwrap();
    let file = store.create_new(&name("x")).unwrap();
    file.write_at(0, &vec![1; 8 << 20]).unwrap();
    drop(store);
    file.write_at(0, b"a file keeps its connection").unwrap();
    drop(file);
    assert_eq!((children(), threads()), (vec![], vec![]));
    crate::part::eventually(|| sshd.sftp_server_pids().is_empty().then_some(()));
}

#[test]
fn journal_stays_locked_while_an_ssh_runs() {
    requires!(openssh::missing());
    let (folder, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sshd = SshServer::start_for(folder.path());
    let record = WriteJournal::open(state.path(), "id").unwrap();
    let mut options = through(&sshd, folder.path());
    options.inherit_fds = vec![record.fd().try_clone_to_owned().unwrap()];
    let store = SftpStore::connect(options).unwrap();
    drop(record);
    assert!(store.list().unwrap().is_empty());
    let refused = WriteJournal::open(state.path(), "id");
    assert!(matches!(refused, Err(LockError::HeldHere { .. })));
    // ssh itself has closed it; the shell that waits for ssh has not.
    let holders = crate::part::holders(&state.path().join("id.lock"));
    assert!(
        holders.iter().any(|holder| holder.ends_with("sh")),
        "{holders:?}"
    );
    assert!(
        !holders.iter().any(|holder| holder.ends_with("ssh")),
        "{holders:?}"
    );
    drop(store);
    WriteJournal::open(state.path(), "id").unwrap();
}

#[test]
fn ssh_refusals_are_distinguished() {
    requires!(openssh::missing());
    let folder = tempfile::tempdir().unwrap();
    let mut sshd = SshServer::start_for(folder.path());
    let connect = |sshd: &SshServer| SftpStore::connect(through(sshd, folder.path())).map(drop);
    connect(&sshd).unwrap();
    sshd.forget_host_key().unwrap();
    assert_eq!(kind(connect(&sshd)), StoreErrorKind::HostKey);
    let port = sshd.port();
    let other = std::fs::read_to_string(sshd.path("other_key.pub")).unwrap();
    std::fs::write(
        sshd.path("known_hosts"),
        format!("[127.0.0.1]:{port} {other}"),
    )
    .unwrap();
    assert_eq!(kind(connect(&sshd)), StoreErrorKind::HostKey);
    let host = std::fs::read_to_string(sshd.path("host_key.pub")).unwrap();
    std::fs::write(
        sshd.path("known_hosts"),
        format!("[127.0.0.1]:{port} {host}"),
    )
    .unwrap();
    connect(&sshd).unwrap();
    sshd.use_unknown_user_key().unwrap();
    assert_eq!(kind(connect(&sshd)), StoreErrorKind::LoginRefused);
    sshd.stop();
    let error = connect(&sshd).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unreachable);
    assert!(error.to_string().contains("Connection refused"), "{error}");
    assert_eq!((children(), threads()), (vec![], vec![]));
}

#[test]
fn server_without_sftp_is_reported() {
    requires!(openssh::missing());
    let sshd = SshServer::start_with(&OpenSshOptions {
        no_sftp: true,
        ..OpenSshOptions::default()
    });
    let folder = tempfile::tempdir().unwrap();
    let error = SftpStore::connect(through(&sshd, folder.path()))
        .map(drop)
        .unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Unreachable);
    assert!(error.to_string().contains("no SFTP"), "{error}");
}

#[test]
fn folder_may_be_relative_to_the_home() {
    requires!(needs::sftp_server_missing());
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join("in side")).unwrap();
    let server = agent_server::sftp_server(home.path()).unwrap();
    let program: Vec<OsString> = vec![server.into(), "-d".into(), home.path().into()];
    for (folder, found) in [
        ("in side", "in side/x"),
        ("", "y"),
        ("in side/", "in side/z"),
    ] {
        let store = SftpStore::connect(SftpOptions::new(program.clone(), "host", folder)).unwrap();
        let file = Path::new(found).file_name().unwrap().to_str().unwrap();
        store.create_new(&name(file)).unwrap();
        assert!(home.path().join(found).is_file(), "{folder:?}");
        store.flush_folder().unwrap();
        assert!(store.describe().starts_with("host:"));
    }
}

#[test]
fn hosts_that_look_like_an_ssh_option_are_refused() {
    for host in ["-oProxyCommand=x", "", "a b", "a\nb"] {
        assert_eq!(
            kind(SshTarget::new(None, host, None)),
            StoreErrorKind::Unreachable
        );
        assert_eq!(
            kind(SshTarget::new(Some(host), "host", None)),
            StoreErrorKind::Unreachable
        );
    }
    let target = SshTarget::new(Some("me"), "host", Some(2222)).unwrap();
    let argv = target.argv(&["ssh".into(), "-F".into(), "f".into()]);
    let tail: Vec<&str> = argv[argv.len() - 8..]
        .iter()
        .map(|arg| arg.to_str().unwrap())
        .collect();
    assert_eq!(tail, ["-p", "2222", "-l", "me", "-s", "--", "host", "sftp"]);
}

/// Prints rates if `SPRAT_MEASURE` is set (and `--no-capture`); a measurement proves nothing.
#[test]
fn measure_transfer_rates() {
    if std::env::var_os("SPRAT_MEASURE").is_none() {
        return;
    }
    requires!(openssh::missing());
    let folder = tempfile::tempdir().unwrap();
    let sshd = SshServer::start_for(folder.path());
    for (what, mut options) in [
        ("pipe", crate::part::piped(folder.path(), &[])),
        ("ssh", through(&sshd, folder.path())),
    ] {
        options.connections = 5;
        let store = SftpStore::connect(options).unwrap();
        let file = store.create_new(&name(what)).unwrap();
        let data = vec![5; 1 << 20];
        for round in ["cold", "warm"] {
            let begun = Instant::now();
            std::thread::scope(|scope| {
                for thread in 0..8u64 {
                    let (file, data) = (&file, &data);
                    scope.spawn(move || {
                        for n in 0..64 {
                            file.write_at((n * 8 + thread) << 20, data).unwrap();
                        }
                    });
                }
            });
            let written = 512.0 / begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            file.flush().unwrap();
            let flushed = begun.elapsed();
            let begun = Instant::now();
            let mut read = vec![0; 64 << 20];
            for part in 0..8 {
                file.read_at(part << 26, &mut read, ReadClass::Ahead)
                    .unwrap();
            }
            let read = 512.0 / begun.elapsed().as_secs_f64();
            println!(
                "{what} {round}: write {written:.0} MiB/s, flush {flushed:?}, read {read:.0} MiB/s"
            );
        }
    }
}

/// A name that leads to each of two servers in turn, into a folder that the server chooses.
fn in_turn(sshds: &[SshServer; 2], scratch: &Path) -> SftpOptions {
    let script = scratch.join("proxy");
    let text = format!(
        "#!/bin/bash\nfor turn in {{0..99}}; do mkdir {}/turn.$turn 2>/dev/null && break; done\n\
         ports=({} {})\nexec 3<>/dev/tcp/127.0.0.1/${{ports[turn % 2]}}\ncat <&3 &\ncat >&3\n",
        scratch.display(),
        sshds[0].port(),
        sshds[1].port()
    );
    std::fs::write(&script, text).unwrap();
    let mut command = sshds[0].ssh_command();
    for option in [
        format!("ProxyCommand=bash {}", script.display()),
        format!("IdentityFile={}", sshds[0].path("user_key").display()),
        format!("IdentityFile={}", sshds[1].path("user_key").display()),
        "StrictHostKeyChecking=no".to_owned(),
        "UserKnownHostsFile=/dev/null".to_owned(),
    ] {
        command.extend(["-o".into(), option.into()]);
    }
    let target = SshTarget::new(None, "cluster", None).unwrap();
    crate::part::options(target.argv(&command), Path::new("."))
}

#[test]
fn connections_to_machines_with_other_files_end_the_session() {
    requires!(openssh::missing());
    for second in [
        "the same folder",
        "no lease",
        "an older lease",
        "no lease, for a reader",
    ] {
        let [one, two, state, again] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
        let shared = second == "the same folder";
        let folders = [&one, if shared { &one } else { &two }];
        let sshds = folders.map(|folder| {
            SshServer::start_with(&OpenSshOptions {
                sftp_arguments: vec!["-d".to_owned(), folder.path().display().to_string()],
                ..OpenSshOptions::default().serving(folder.path())
            })
        });
        // There is a copy of the container on the other machine, too.
        for folder in [&one, &two] {
            std::fs::write(folder.path().join("x"), vec![0; 8 << 20]).unwrap();
        }
        let store = SftpStore::connect(in_turn(&sshds, state.path())).unwrap();
        let record = WriteJournal::open(state.path(), "id").unwrap();
        let owner = OwnerNote {
            host: "h".to_owned(),
            version: "v".to_owned(),
        };
        let lease = Lock::acquire(&store, &name("x"), &record, owner).unwrap();
        let store = match second {
            "no lease, for a reader" => {
                let number = Some(lease.number());
                // It connected again.
                let again = SftpStore::connect(in_turn(&sshds, again.path())).unwrap();
                sprat_store::lock::inspect_near(&again, &name("x"), number).unwrap();
                again
            }
            _ => store,
        };
        if second == "an older lease" {
            let file = lease.file().to_string();
            std::fs::copy(one.path().join(&file), two.path().join(&file)).unwrap();
            lease.renew(&store).unwrap();
        }
        let file = store.open(&name("x"), Access::ReadWrite).unwrap();
        let begun = Instant::now();
        let mut all_up_for = 0;
        let error = loop {
            if let Err(error) = file.write_at(0, &vec![1; 4 << 20]) {
                break Some(error);
            }
            all_up_for += u32::from(store.further_connections().0 == 3);
            if shared && all_up_for > 20 {
                break None;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{second}");
        };
        if shared {
            assert!(error.is_none(), "{error:?}");
            continue;
        }
        let error = error.unwrap();
        assert_eq!(error.kind(), StoreErrorKind::Elsewhere, "{error}");
        assert!(error.to_string().contains("different machines"), "{error}");
        assert_eq!(kind(store.stat(&name("x"))), StoreErrorKind::Elsewhere);
        let other = std::fs::read(two.path().join("x")).unwrap();
        assert!(other.iter().all(|byte| *byte == 0), "{second}");
    }
}
