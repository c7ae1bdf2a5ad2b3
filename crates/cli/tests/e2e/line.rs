//! A lost connection blocks nobody: Ctrl-C, `umount`, a timeout, a machine that slept; and a
//! server's process that outlives its connection does no harm.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::client_and_server::{self, ClientAndServer};
use sprat_testkit::manifest::{Manifest, assert_same};
use sprat_testkit::running::{Running, until_it_handles};
use sprat_testkit::source_tree;
use sprat_testkit::ssh_server::OpenSshOptions;
use sprat_testkit::wire::{Door, Loss, WireOptions};
use sprat_testkit_session::plain_volume::PlainVolume;

/// Far longer than any step here takes, on a busy machine too: after it, a step hangs.
const LIMIT: Duration = Duration::from_secs(90);

/// The 10 s after the first interrupt, with some room for a busy machine.
const PROMISED: Duration = Duration::from_secs(20);

const SLOW: WireOptions = WireOptions {
    round_trip: Duration::from_millis(10),
    bytes_per_s: Some(3_000_000),
};

/// A container behind a slow wire, and some megabytes to back up.
fn prepared(pair: ClientAndServer) -> (ClientAndServer, PathBuf) {
    let mut pair = pair.behind_wire(SLOW);
    pair.init(1);
    let source = pair.path("source");
    source_tree::make_source_like(&source, 400, 5);
    (pair, source)
}

fn sprat(pair: &ClientAndServer, quick: &[&str], arguments: &[&str]) -> Command {
    let mut command = pair.sprat();
    command.args(quick).args(arguments);
    command
}

/// A backup that has bytes in flight.
fn backup_under_way(pair: &ClientAndServer, source: &Path, quick: &[&str]) -> Running {
    let source = source.display().to_string();
    let arguments = ["backup", pair.target(), "--name", "line", &source];
    let told = ["--json", "--progress-interval", "0.02"];
    let mut running = Running::start(sprat(pair, quick, &told).args(arguments));
    assert!(running.until(LIMIT, "bytes in flight", |seen| {
        // Not more: on a busy machine the connection sends as fast as rsync writes.
        seen.phase == "working" && seen.unsynced_bytes >= 64 << 10
    }));
    running
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// What these processes are and do.
fn told(pids: &[i32]) -> Vec<String> {
    let told = pids.iter().map(|pid| {
        let file =
            |name| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let stat = file("stat");
        let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
        let state: String = after.chars().take(12).collect();
        let line = file("cmdline").replace('\0', " ");
        format!("{pid} {state} {} {line}", file("wchan"))
    });
    told.collect()
}

fn end(mut child: Child) -> Option<i32> {
    let until = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() > until {
            let _ = child.kill();
            panic!("it hangs");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The next run needs no help, and the restored files are those of the source.
fn assert_the_next_run_goes_on(pair: &ClientAndServer, source: &Path) {
    pair.connection().door(Door::Open);
    let shown = source.display().to_string();
    let arguments = [
        "--quiet-time",
        "1",
        "backup",
        pair.target(),
        "--name",
        "line",
        &shown,
    ];
    std::thread::sleep(Duration::from_millis(1100));
    pair.ok(&arguments, LIMIT);
    let restored = pair.restore("line", source);
    assert_same(&Manifest::of(source), &restored, "the next run's snapshot");
    std::fs::remove_dir_all(pair.path("restored/line")).unwrap();
    pair.assert_nothing_is_left();
}

#[test]
fn interrupt_without_a_connection_ends_the_backup() {
    sprat_testkit::requires!(client_and_server::missing());
    let (pair, source) = prepared(ClientAndServer::new());
    for (loss, door, interrupts) in [
        (Loss::Reset, Door::Refusing, 1),
        // Nothing has detected the loss yet.
        (Loss::Silent, Door::Silent, 1),
        (Loss::Silent, Door::Silent, 2),
    ] {
        let mut running = backup_under_way(&pair, &source, &["--quiet-time", "1"]);
        pair.connection().door(door);
        pair.connection().lose(loss);
        if loss == Loss::Reset {
            assert!(running.until(LIMIT, "the line is down", |seen| seen.away));
        }
        let asked = Instant::now();
        for _ in 0..interrupts {
            signal(running.child.id(), Signal::INT);
            std::thread::sleep(Duration::from_millis(300));
        }
        let exit = running.end(LIMIT);
        assert_eq!(exit, Some(130), "{loss:?}: {:#?}", running.said);
        assert!(asked.elapsed() < PROMISED, "{:?}", asked.elapsed());
        pair.assert_nothing_is_left();
        pair.connection().door(Door::Open);
    }
    assert_the_next_run_goes_on(&pair, &source);
}

#[test]
fn interrupt_without_a_connection_ends_a_restore() {
    sprat_testkit::requires!(client_and_server::missing());
    let (pair, source) = prepared(ClientAndServer::new());
    pair.backup("line", &source);
    let to = pair.path("restored/half").display().to_string();
    let arguments = ["restore", pair.target(), "line", "--to", &to];
    let told = ["--no-cache", "--json", "--progress-interval", "0.02"];
    let before = pair.connection().bytes().1;
    let mut running = Running::start(sprat(&pair, &told, &arguments).stdin(Stdio::null()));
    let line = pair.connection();
    assert!(running.until(LIMIT, "bytes on their way", |seen| {
        seen.phase == "working" && line.bytes().1 - before > 2 << 20
    }));
    line.door(Door::Refusing);
    line.lose(Loss::Reset);
    // rsync waits for the kernel, and the kernel for the connection: no signal reaches it there.
    assert!(running.until(LIMIT, "the line is down", |seen| seen.away));
    let asked = Instant::now();
    signal(running.child.id(), Signal::INT);
    assert_eq!(running.end(LIMIT), Some(130), "{:#?}", running.said);
    assert!(asked.elapsed() < PROMISED, "{:?}", asked.elapsed());
    pair.assert_nothing_is_left();
    assert_the_next_run_goes_on(&pair, &source);
}

#[test]
fn reconnect_timeout_ends_with_14_and_the_next_run_succeeds() {
    sprat_testkit::requires!(client_and_server::missing());
    let (pair, source) = prepared(ClientAndServer::new());
    for (loss, door) in [(Loss::Silent, Door::Silent), (Loss::Reset, Door::Refusing)] {
        let quick = ["--quiet-time", "1", "--reconnect-max", "3"];
        pair.connection().door(Door::Open);
        let mut running = backup_under_way(&pair, &source, &quick);
        pair.connection().door(door);
        pair.connection().lose(loss);
        let exit = running.end(LIMIT);
        assert_eq!(exit, Some(14), "{loss:?}: {:#?}", running.said);
        pair.assert_nothing_is_left();
    }
    assert_the_next_run_goes_on(&pair, &source);
}

#[test]
fn umount_ends_without_a_connection() {
    sprat_testkit::requires!(client_and_server::missing());
    let (pair, source) = prepared(ClientAndServer::new());
    pair.backup("line", &source);
    let dir = pair.path("mounted");
    std::fs::create_dir(&dir).unwrap();
    let shown = dir.display().to_string();
    let quick = ["--quiet-time", "1", "--reconnect-max", "4"];
    for by in ["sprat", "stock", "sprat, interrupted"] {
        let mount = ["mount", "--rw", pair.target(), &shown];
        pair.ok(&[&quick[..], &mount].concat(), LIMIT);
        std::fs::write(dir.join(by), vec![7; 3 << 20]).unwrap();
        pair.connection().door(Door::Refusing);
        pair.connection().lose(Loss::Reset);
        if by == "stock" {
            let stock = Command::new("umount").arg(&dir).spawn().unwrap();
            end(stock);
        } else {
            let child = sprat(&pair, &quick, &["umount", &shown]).spawn().unwrap();
            if by == "sprat" {
                assert_eq!(end(child), Some(14), "{by}");
            } else {
                until_it_handles(Signal::INT, child.id());
                std::thread::sleep(Duration::from_millis(1000));
                signal(child.id(), Signal::INT);
                assert_eq!(end(child), Some(130), "{by}");
            }
        }
        pair.assert_nothing_is_left();
        pair.connection().door(Door::Open);
    }
    assert_the_next_run_goes_on(&pair, &source);
}

#[test]
fn machine_that_slept_beyond_the_servers_timeout_continues() {
    sprat_testkit::requires!(client_and_server::missing());
    // A channel may be logging in when the machine falls asleep.
    let lines = [
        "ClientAliveInterval 1",
        "ClientAliveCountMax 2",
        "LoginGraceTime 20",
    ];
    let (pair, source) = prepared(ClientAndServer::with(OpenSshOptions {
        config_lines: lines.map(str::to_owned).to_vec(),
        ..OpenSshOptions::default()
    }));
    let mut running = backup_under_way(&pair, &source, &["--quiet-time", "1"]);
    for _ in 0..2 {
        let losses = running.reported.losses;
        let mut all: Vec<i32> = Vec::new();
        let until = Instant::now() + LIMIT;
        loop {
            // Again and again: an ssh that was just being started would answer for the others.
            let found = pair.processes();
            // In this order: a server that started meanwhile must not count as a client.
            let servers = pair.sshd.session_pids();
            for process in found {
                if servers.contains(&process.pid) || all.contains(&process.pid) {
                    continue;
                }
                // One may be gone: a channel that was not needed, or one whose server gave up.
                let asleep = Pid::from_raw(process.pid).unwrap();
                if kill_process(asleep, Signal::STOP).is_ok() {
                    all.push(process.pid);
                }
            }
            if servers.is_empty() {
                break;
            }
            assert!(
                Instant::now() < until,
                "the server does not give up: {:#?}\nof {:#?}",
                told(&servers),
                pair.processes()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(all.len() >= 3, "{all:?}");
        for pid in all.iter().rev() {
            // One may be gone: ended by another one before that one was stopped, too.
            let _ = kill_process(Pid::from_raw(*pid).unwrap(), Signal::CONT);
        }
        let noticed = running.until(LIMIT, "the loss is noticed", |seen| seen.losses > losses);
        assert!(noticed, "{:#?}", running.said);
        assert!(running.until(LIMIT, "the line is back", |seen| !seen.away));
    }
    assert_eq!(running.end(LIMIT), Some(0), "{:#?}", running.said);
    let restored = pair.restore("line", &source);
    assert_same(&Manifest::of(&source), &restored, "after two sleeps");
    pair.assert_nothing_is_left();
}

#[test]
fn late_writes_of_stopped_servers_do_no_harm() {
    sprat_testkit::requires!(client_and_server::missing());
    let (pair, source) = prepared(ClientAndServer::new());
    // Longer than the servers are stopped, on a busy machine too.
    let quiet = ["--quiet-time", "12"];
    let mut running = backup_under_way(&pair, &source, &quiet);
    let mut woken = 0;
    for _ in 0..3 {
        let losses = running.reported.losses;
        let old: Vec<u32> = pair
            .sshd
            .sftp_server_pids()
            .iter()
            .map(|pid| u32::try_from(*pid).unwrap())
            .collect();
        for pid in &old {
            // One may have ended meanwhile: a channel that was not needed.
            let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
            let _ = kill_process(pid, Signal::STOP);
        }
        // Their pipes fill.
        std::thread::sleep(Duration::from_millis(300));
        pair.connection().lose(Loss::Reset);
        let goes_on = running.until(LIMIT, "the line is back", |seen| {
            seen.losses > losses && !seen.away
        });
        assert!(goes_on, "{:#?}", running.said);
        std::thread::sleep(Duration::from_millis(1000));
        for pid in &old {
            let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
            woken += usize::from(kill_process(pid, Signal::CONT).is_ok());
        }
    }
    assert!(woken >= 3, "no old server was left");
    assert_eq!(running.end(LIMIT), Some(0), "{:#?}", running.said);
    pair.assert_nothing_is_left();
    let image = pair.path("plain");
    let plain = PlainVolume::export(&pair.container(), &pair.key_file(), &image);
    plain.assert_clean();
    drop(plain);
    let restored = pair.restore("line", &source);
    assert_same(&Manifest::of(&source), &restored, "with late writers");
}
