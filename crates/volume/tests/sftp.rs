//! The volume over the real sftp-server, which is killed again and again.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use sprat_store::{Access, FileName, SftpOptions, SftpStore, Store, StoreFile};
use sprat_testkit::dice::Dice;
use sprat_testkit::watchdog::within;
use sprat_testkit::{needs, requires};
use sprat_volume::{Fenced, Flush, Geometry, ReconnectError, Session, Volume, VolumeOptions};
use support::{BLOCK, LIMIT, stamp_of, stamped};

const BLOCKS: usize = 4096;
const OFFSET: usize = 1 << 20;

struct SftpSession {
    folder: PathBuf,
}

impl SftpSession {
    /// Each server notes its process number before it becomes sftp-server.
    fn program(&self) -> Vec<OsString> {
        let server = needs::sftp_server().unwrap();
        let pids = self.folder.join("pids");
        let script = format!(
            "echo $$ >> '{}'; exec '{}'",
            pids.display(),
            server.display()
        );
        vec!["sh".into(), "-c".into(), script.into()]
    }

    fn open(&self) -> Result<Arc<dyn StoreFile>, sprat_store::StoreError> {
        let folder = self.folder.to_str().unwrap();
        let store = SftpStore::connect(SftpOptions::new(self.program(), "test", folder))?;
        store.open(&name(), Access::ReadWrite)
    }

    /// Kills one of the servers that were started since the last call, or all of them.
    fn kill(&self, all: bool) {
        let pids = std::fs::read_to_string(self.folder.join("pids")).unwrap_or_default();
        let live = pids.lines().filter(|pid| is_sftp_server(pid));
        for pid in live.take(if all { usize::MAX } else { 1 }) {
            let killed = Command::new("kill").args(["-9", pid]).status();
            assert!(killed.is_ok());
        }
    }
}

/// Whether this process is still there and ours: numbers are used again.
fn is_sftp_server(pid: &str) -> bool {
    std::fs::read_to_string(Path::new("/proc").join(pid).join("comm"))
        .is_ok_and(|comm| comm.trim() == "sftp-server")
}

impl Session for SftpSession {
    fn before_epoch(&self) -> Result<(), Fenced> {
        Ok(())
    }
    fn before_send(&self, _: &[Range<u64>]) -> Result<(), Fenced> {
        Ok(())
    }
    fn settled(&self) {}
    fn reconnect(&self, _: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        self.open().map_err(ReconnectError::Retry)
    }
}

fn name() -> FileName {
    FileName::new("x.luks").unwrap()
}

#[test]
fn a_killed_sftp_server_costs_time_only() {
    requires!(needs::sftp_server_missing());
    within(LIMIT, || {
        let dir = tempfile::tempdir().unwrap();
        let session = Arc::new(SftpSession {
            folder: dir.path().to_owned(),
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
                session.kill(round % 40 == 10);
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
