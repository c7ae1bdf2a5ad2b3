//! The volume over the real sftp-server, which is killed again and again.

use std::ffi::OsString;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::{BLOCK, LIMIT, stamp_of, stamped};
use sprat_store::{Access, FileName, SftpOptions, SftpStore, Store, StoreFile};
use sprat_testkit::dice::Dice;
use sprat_testkit::ssh_server::{SshServer, openssh};
use sprat_testkit::watchdog::within;
use sprat_testkit::wire::{Wire, WireOptions};
use sprat_testkit::{agent_server, needs, requires};
use sprat_volume::{Fenced, Flush, Geometry, ReconnectError, SessionHooks, Volume, VolumeOptions};

const BLOCKS: usize = 4096;
const OFFSET: usize = 1 << 20;

/// A server behind a connection with a long round trip.
struct Far {
    wire: Wire,
    sshd: SshServer,
    folder: PathBuf,
    progress: AtomicUsize,
}

impl Far {
    fn open(&self) -> Result<Arc<dyn StoreFile>, sprat_store::StoreError> {
        let mut program = self.sshd.ssh_command_through(self.wire.port());
        program.extend(["-s", "--", "test", "sftp"].map(OsString::from));
        let folder = self.folder.to_str().unwrap();
        SftpStore::connect(SftpOptions::new(program, "test", folder))?
            .open(&name(), Access::ReadWrite)
    }
}

impl SessionHooks for Far {
    fn before_epoch(&self) -> Result<(), Fenced> {
        Ok(())
    }
    fn before_send(&self, _: &[Range<u64>]) -> Result<(), Fenced> {
        Ok(())
    }
    fn resolved_in_part(&self, _: &[Range<u64>]) {}
    fn resolved(&self) {}
    fn recovering(&self, done: u64, whole: u64) {
        assert!(done <= whole);
        self.progress.fetch_add(1, Ordering::SeqCst);
    }
    fn reconnect(&self, _: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        self.open().map_err(ReconnectError::Retry)
    }
}

/// A takeover from a session with many blocks under way, scattered over the container. It measures
/// bytes, not time, which depends on the machine. The long form (`SPRAT_TORTURE_ROUNDS`) has 32,768
/// blocks, 128 MiB.
#[test]
fn takeover_of_scattered_blocks_moves_each_twice_until_it_is_open() {
    requires!(openssh::missing());
    let in_doubt = match std::env::var_os("SPRAT_TORTURE_ROUNDS") {
        Some(_) => 32_768,
        None => 2_000,
    };
    within(LIMIT * 6, move || {
        let dir = tempfile::tempdir().unwrap();
        let container = std::fs::File::create(dir.path().join("x.luks")).unwrap();
        let apart = 64 * BLOCK as u64;
        container.set_len(in_doubt * apart).unwrap();
        for nth in 0..in_doubt {
            container
                .write_all_at(&stamped(nth + 1), nth * apart)
                .unwrap();
        }
        let sshd = SshServer::start_for(dir.path());
        let far = WireOptions {
            round_trip: Duration::from_millis(50),
            bytes_per_s: None,
        };
        let session = Arc::new(Far {
            wire: Wire::start(sshd.port(), far).unwrap(),
            sshd,
            folder: dir.path().to_owned(),
            progress: AtomicUsize::new(0),
        });
        let lies = Geometry {
            offset_bytes: 0,
            len_bytes: in_doubt * apart,
        };
        let block = BLOCK as u64;
        let options = VolumeOptions {
            in_doubt: (0..in_doubt)
                .map(|nth| nth * apart..nth * apart + block)
                .collect(),
            old_server_dead: true,
            ..VolumeOptions::default()
        };
        let file = session.open().unwrap();
        let before = session.wire.bytes();
        let begun = Instant::now();
        let volume = Volume::open(file, lies, session.clone(), options).unwrap();
        let (opened, open) = (begun.elapsed(), session.wire.bytes());
        volume.close().unwrap();
        let (took, closed) = (begun.elapsed(), session.wire.bytes());
        let (up, down) = (open.0 - before.0, open.1 - before.1);
        let (later_up, later_down) = (closed.0 - open.0, closed.1 - open.1);
        let progress = session.progress.load(Ordering::SeqCst);
        println!(
            "{in_doubt} blocks: open for writing after {opened:?} with {up} bytes up and {down} down; all \
             read back after {took:?} with {later_up} more up and {later_down} down; progress reported \
             {progress} times"
        );
        let whole = in_doubt * block;
        // For requests, logins and ssh.
        let some = whole / 10 + (1 << 20);
        // Until it is open, each block is read and written once.
        assert!(
            (whole..whole + some).contains(&up) && (whole..whole + some).contains(&down),
            "{up} up, {down} down until it is open"
        );
        // At the close each is read once more: a write that was still under way may have arrived
        // meanwhile.
        assert!(
            later_up < some && (whole..whole + some).contains(&later_down),
            "{later_up} up, {later_down} down at the close"
        );
        assert!(progress as u64 >= in_doubt / 1000);
    });
}

struct SftpSession {
    folder: PathBuf,
    /// The server outlives the connection: it is behind a relay, as behind sshd.
    relayed: bool,
}

impl SftpSession {
    /// Each server writes down its process id before it becomes sftp-server.
    fn program(&self) -> Vec<OsString> {
        let server = agent_server::sftp_server(&self.folder).unwrap();
        let pids = self.folder.join("pids");
        let run = format!(
            "sh -c 'echo $$ >> {}; exec {}'",
            pids.display(),
            server.display()
        );
        let script = if self.relayed {
            format!("cat | setsid {run}")
        } else {
            format!("exec {run}")
        };
        vec!["sh".into(), "-c".into(), script.into()]
    }

    fn open(&self) -> Result<Arc<dyn StoreFile>, sprat_store::StoreError> {
        let folder = self.folder.to_str().unwrap();
        let mut options = SftpOptions::new(self.program(), "test", folder);
        if self.relayed {
            options.answer_timeout = Duration::from_millis(400);
            options.flush_timeout = Duration::from_millis(400);
        }
        SftpStore::connect(options)?.open(&name(), Access::ReadWrite)
    }

    fn live(&self) -> Vec<String> {
        let pids = std::fs::read_to_string(self.folder.join("pids")).unwrap_or_default();
        pids.lines()
            .filter(|pid| is_sftp_server(pid))
            .map(str::to_owned)
            .collect()
    }

    fn signal(&self, signal: &str, pids: &[String]) {
        for pid in pids {
            assert!(Command::new("kill").args([signal, pid]).status().is_ok());
        }
    }
}

/// Whether this process is still there and ours, as process ids are reused. A zombie has no command
/// line and counts as gone: the first process of a container may not reap orphans.
fn is_sftp_server(pid: &str) -> bool {
    std::fs::read_to_string(Path::new("/proc").join(pid).join("cmdline"))
        .is_ok_and(|line| line.contains("sftp-server"))
}

impl SessionHooks for SftpSession {
    fn before_epoch(&self) -> Result<(), Fenced> {
        Ok(())
    }
    fn before_send(&self, _: &[Range<u64>]) -> Result<(), Fenced> {
        Ok(())
    }
    fn resolved_in_part(&self, _: &[Range<u64>]) {}
    fn resolved(&self) {}
    fn reconnect(&self, _: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        self.open().map_err(ReconnectError::Retry)
    }
}

fn name() -> FileName {
    FileName::new("x.luks").unwrap()
}

#[test]
fn killed_sftp_server_only_costs_time() {
    requires!(needs::sftp_server_missing());
    within(LIMIT, || {
        let dir = tempfile::tempdir().unwrap();
        let session = Arc::new(SftpSession {
            folder: dir.path().to_owned(),
            relayed: false,
        });
        let path = dir.path().join("x.luks");
        let container = std::fs::File::create(&path).unwrap();
        let len = OFFSET + BLOCKS * BLOCK;
        container.set_len(len as u64).unwrap();
        let lies = Geometry {
            offset_bytes: OFFSET as u64,
            len_bytes: (BLOCKS * BLOCK) as u64,
        };
        let options = VolumeOptions {
            write_buffer_bytes_max: 4 << 20,
            early_send_bytes_min: 256 << 10,
            read_cache_bytes_max: 1 << 20,
            quiet_time: Duration::from_millis(300),
            reconnect_delay: Duration::from_millis(20),
            ..VolumeOptions::default()
        };
        let volume = Volume::open(session.open().unwrap(), lies, session.clone(), options).unwrap();
        let mut dice = Dice::new(11);
        let mut model = vec![0u64; BLOCKS];
        for round in 1..=160u64 {
            let blocks = usize::try_from(1 + dice.below(300)).unwrap();
            let first = usize::try_from(dice.below((BLOCKS - blocks) as u64)).unwrap();
            volume
                .write_at((first * BLOCK) as u64, &stamped(round).repeat(blocks))
                .unwrap();
            model[first..first + blocks].fill(round);
            if round % 20 == 10 {
                // One of them alone, or all.
                let live = session.live();
                let some = if round % 40 == 10 {
                    &live[..]
                } else {
                    &live[..1]
                };
                session.signal("-9", some);
            }
            let block = usize::try_from(dice.below(BLOCKS as u64)).unwrap();
            let mut found = vec![0; BLOCK];
            volume.read_at((block * BLOCK) as u64, &mut found).unwrap();
            assert_eq!(
                stamp_of(&found),
                model[block],
                "block {block} in round {round}"
            );
            if round % 7 == 0 {
                volume.flush(Flush::Ordered).unwrap();
            }
        }
        volume.close().unwrap();
        let stats = volume.stats();
        assert!(stats.losses >= 4, "{stats:?}");
        drop(volume);
        let bytes = std::fs::read(path).unwrap();
        assert!(bytes[..OFFSET].iter().all(|byte| *byte == 0));
        for (block, found) in bytes[OFFSET..].chunks_exact(BLOCK).enumerate() {
            assert_eq!(stamp_of(found), model[block], "block {block} at the end");
        }
        let pids = std::fs::read_to_string(dir.path().join("pids")).unwrap();
        assert!(
            !pids.lines().any(is_sftp_server),
            "a server was left behind"
        );
    });
}

#[test]
fn stopped_server_that_writes_late_changes_nothing() {
    requires!(needs::sftp_server_missing());
    within(LIMIT, || {
        let dir = tempfile::tempdir().unwrap();
        let session = Arc::new(SftpSession {
            folder: dir.path().to_owned(),
            relayed: true,
        });
        let path = dir.path().join("x.luks");
        let len = (BLOCKS * BLOCK) as u64;
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        let lies = Geometry {
            offset_bytes: 0,
            len_bytes: len,
        };
        let options = VolumeOptions {
            run_bytes_max: 2 * BLOCK,
            early_send_bytes_min: BLOCK,
            quiet_time: quiet_time(),
            reconnect_delay: Duration::from_millis(20),
            ..VolumeOptions::default()
        };
        let volume = Volume::open(session.open().unwrap(), lies, session.clone(), options).unwrap();
        let mut stamp = 0;
        for _ in 0..4 {
            let write_all = |stamp| {
                for block in 0..200 {
                    volume
                        .write_at(block * 2 * BLOCK as u64, &stamped(stamp))
                        .unwrap();
                }
                volume.flush(Flush::Ordered).unwrap();
            };
            stamp += 1;
            write_all(stamp);
            volume.flush(Flush::Durable).unwrap();
            let losses = volume.stats().losses;
            let stopped = session.live();
            session.signal("-STOP", &stopped);
            stamp += 1;
            write_all(stamp);
            while volume.stats().losses == losses || volume.stats().reconnecting_since.is_some() {
                std::thread::sleep(Duration::from_millis(5));
            }
            // Newer bytes for the blocks that the stopped servers have in their pipes.
            stamp += 1;
            write_all(stamp);
            std::thread::sleep(Duration::from_millis(300));
            session.signal("-CONT", &stopped);
        }
        volume.close().unwrap();
        drop(volume);
        while !session.live().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let bytes = std::fs::read(path).unwrap();
        for block in 0..200 {
            let found = stamp_of(&bytes[block * 2 * BLOCK..][..BLOCK]);
            assert_eq!(found, stamp, "block {}", block * 2);
        }
    });
}

/// Longer than the stop in the test, so that late writes arrive within it. Without a quiet time the
/// stopped servers would overwrite newer blocks here.
fn quiet_time() -> Duration {
    Duration::from_secs(3)
}
