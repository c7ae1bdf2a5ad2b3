//! The persistent cache returns the bytes that the store would return, or none, whatever happened
//! to it.
//!
//! `SPRAT_CACHE_SEEDS=FIRST..END` runs other seeds of the model; a failure prints its own.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{BLOCK, LIMIT, geometry, stamped, tiny};
use sprat_store::{FileStat, ReadClass, StoreError, StoreFile};
use sprat_testkit::dice::Dice;
use sprat_testkit::watchdog::within;
use sprat_volume::{
    CacheOptions, Fenced, Flush, ReadOnlyOptions, ReconnectError, SessionHooks, Volume,
    VolumeError, VolumeOptions, VolumeStats,
};

const BLOCKS: usize = 48;

/// A container on a server whose clock and bytes the test sets.
#[derive(Clone)]
struct Server {
    bytes: Arc<Mutex<Vec<u8>>>,
    modified_s: Arc<AtomicU64>,
    lose_a_line: Arc<AtomicBool>,
    lock_lost: Arc<AtomicBool>,
    /// Attributes come with each flush.
    tells_behind_flush: Arc<AtomicBool>,
    behind_flush: Arc<Mutex<Option<FileStat>>>,
}

impl Server {
    fn new() -> Self {
        let bytes = (0..BLOCKS as u64).flat_map(|block| stamped(1000 + block));
        Self {
            bytes: Arc::new(Mutex::new(bytes.collect())),
            modified_s: Arc::new(AtomicU64::new(1)),
            lose_a_line: Arc::default(),
            lock_lost: Arc::default(),
            tells_behind_flush: Arc::default(),
            behind_flush: Arc::default(),
        }
    }

    fn volume(&self, cache: &Path, bytes_max: usize) -> Volume {
        self.open(cache, bytes_max).unwrap()
    }

    fn open(&self, cache: &Path, bytes_max: usize) -> Result<Volume, VolumeError> {
        let options = VolumeOptions {
            cache: Some(cache_options(cache, bytes_max)),
            ..tiny()
        };
        let file = Arc::new(self.clone());
        Volume::open(
            file,
            geometry(BLOCKS * BLOCK),
            Arc::new(self.clone()),
            options,
        )
    }

    fn reader(&self, cache: &Path) -> Volume {
        self.open_reader(cache).unwrap()
    }

    fn open_reader(&self, cache: &Path) -> Result<Volume, VolumeError> {
        let options = ReadOnlyOptions {
            cache: Some(cache_options(cache, BLOCKS * BLOCK * 4)),
            ..ReadOnlyOptions::new(std::env::temp_dir())
        };
        let file = Arc::new(self.clone());
        Volume::open_read_only(
            file,
            geometry(BLOCKS * BLOCK),
            Arc::new(self.clone()),
            options,
        )
    }

    fn present(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    /// Another program writes and changes nothing but the bytes.
    fn put(&self, block: usize, stamp: u64) {
        self.bytes.lock().unwrap()[block * BLOCK..][..BLOCK].copy_from_slice(&stamped(stamp));
    }
}

impl StoreFile for Server {
    fn len(&self) -> Result<u64, StoreError> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }
    fn stat(&self) -> Result<FileStat, StoreError> {
        Ok(FileStat {
            len: self.len()?,
            modified_s: Some(self.modified_s.load(Ordering::SeqCst)),
            regular: true,
            allocated_bytes: None,
        })
    }
    fn read_at(&self, offset: u64, buf: &mut [u8], _: ReadClass) -> Result<(), StoreError> {
        let at = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        let at = usize::try_from(offset).unwrap();
        self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        self.modified_s.fetch_add(1, Ordering::SeqCst);
        if self.lose_a_line.swap(false, Ordering::SeqCst) {
            return Err(StoreError::Disconnected {
                op: "write",
                object: "test".to_owned(),
                reason: "cut".to_owned(),
            });
        }
        Ok(())
    }
    fn flush(&self) -> Result<(), StoreError> {
        if self.tells_behind_flush.load(Ordering::SeqCst) {
            *self.behind_flush.lock().unwrap() = Some(self.stat()?);
        }
        Ok(())
    }
    fn stat_behind_flush(&self) -> Option<FileStat> {
        *self.behind_flush.lock().unwrap()
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let (at, len) = (usize::try_from(offset), usize::try_from(len));
        let (at, len) = (at.unwrap(), len.unwrap());
        self.bytes.lock().unwrap()[at..at + len].fill(0);
        self.modified_s.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn resize(&self, _: u64) -> Result<(), StoreError> {
        panic!("not called here")
    }
}

impl SessionHooks for Server {
    fn before_epoch(&self) -> Result<(), Fenced> {
        match self.lock_lost.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err(Fenced::Lost("another session has it".into())),
        }
    }
    fn before_send(&self, _: &[Range<u64>]) -> Result<(), Fenced> {
        Ok(())
    }
    fn resolved_in_part(&self, _: &[Range<u64>]) {}
    fn resolved(&self) {}
    fn reconnect(&self, _: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        Ok(Arc::new(self.clone()))
    }
}

fn cache_options(dir: &Path, bytes_max: usize) -> CacheOptions {
    CacheOptions {
        seen: None,
        dir: dir.to_owned(),
        bytes_max: bytes_max as u64,
        only_compare: false,
        stamp_offset_bytes: 0,
    }
}

fn read_all(volume: &Volume) -> Vec<u8> {
    let mut bytes = vec![0; BLOCKS * BLOCK];
    for (block, piece) in bytes.chunks_exact_mut(BLOCK).enumerate() {
        volume.read_at((block * BLOCK) as u64, piece).unwrap();
    }
    bytes
}

/// A cache after a clean close, large enough for everything.
fn filled(server: &Server, dir: &Path) {
    let volume = server.volume(dir, BLOCKS * BLOCK * 4);
    for block in 0..BLOCKS as u64 / 2 {
        let at = block * BLOCK as u64;
        volume.write_at(at, &stamped(block + 1)).unwrap();
    }
    assert_eq!(read_all(&volume).len(), BLOCKS * BLOCK);
    volume.close().unwrap();
    assert!(dir.join("clean").exists());
}

/// What a read-only session reads, and from where.
fn reading(server: &Server, dir: &Path) -> VolumeStats {
    let volume = server.reader(dir);
    assert!(read_all(&volume) == server.present(), "a wrong byte");
    let stats = volume.stats();
    volume.close().unwrap();
    stats
}

fn files(dir: &Path) -> Vec<(std::ffi::OsString, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn next_session_reads_all_blocks_of_the_last_one_from_the_cache() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    let before = files(dir.path());
    let stats = reading(&server, dir.path());
    assert_eq!(
        (stats.wire_read_requests, stats.cache_read_blocks),
        (0, BLOCKS as u64)
    );
    assert!(files(dir.path()) == before, "a reader changes nothing");
}

#[test]
fn container_in_another_state_is_read_from_the_server() {
    type Change = fn(&Server);
    let changes: [Change; 3] = [
        |server| {
            server.modified_s.fetch_add(1, Ordering::SeqCst);
        },
        |server| server.bytes.lock().unwrap().extend(stamped(7)),
        |server| server.put(0, 7),
    ];
    for change in changes {
        let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
        filled(&server, dir.path());
        server.put(9, 8);
        change(&server);
        let volume = server.reader(dir.path());
        assert!(read_all(&volume)[..] == server.present()[..BLOCKS * BLOCK]);
        assert_eq!(volume.stats().cache_read_blocks, 0);
    }
}

#[test]
fn cache_is_not_used_without_a_clean_close() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    let volume = server.volume(dir.path(), BLOCKS * BLOCK * 4);
    assert!(
        !dir.path().join("clean").exists(),
        "gone before the first write"
    );
    volume.abort();
    drop(volume);
    server.put(9, 8);
    assert_eq!(reading(&server, dir.path()).cache_read_blocks, 0);
}

#[test]
fn writes_of_others_outdate_the_cache_and_are_reported_once() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    let reader = server.reader(dir.path());
    assert!(!reader.cache_was_outdated());
    drop(reader);
    // As other tools do it: a mount writes the super block.
    server.put(0, 8);
    let reader = server.reader(dir.path());
    assert!(reader.cache_was_outdated());
    drop(reader);
    let writer = server.volume(dir.path(), BLOCKS * BLOCK * 4);
    assert!(writer.cache_was_outdated());
    writer.close().unwrap();
    let writer = server.volume(dir.path(), BLOCKS * BLOCK * 4);
    assert!(!writer.cache_was_outdated());
}

/// The server goes back to an older state while a session runs that has written nothing yet.
#[test]
fn reconnect_detects_an_older_state_behind_a_cache() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    let volume = server.volume(dir.path(), BLOCKS * BLOCK * 4);
    assert_eq!(read_all(&volume), server.present());
    assert_eq!(volume.stats().wire_read_requests, 0);
    for block in 0..BLOCKS / 2 {
        server.put(block, 500);
    }
    server.lose_a_line.store(true, Ordering::SeqCst);
    volume.write_at(BLOCK as u64, &stamped(7)).unwrap();
    let Err(VolumeError::Failed(cause)) = volume.flush(Flush::Durable) else {
        panic!("new blocks were mixed with old ones");
    };
    assert!(
        matches!(*cause, VolumeError::LostDurable { .. }),
        "{cause:?}"
    );
}

#[test]
fn session_without_the_cache_outdates_it() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    server.volume(dir.path(), 0).close().unwrap();
    server.put(9, 8);
    assert_eq!(reading(&server, dir.path()).cache_read_blocks, 0);
}

#[test]
fn discarded_blocks_are_not_read_from_the_cache() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    let volume = server.volume(dir.path(), BLOCKS * BLOCK * 4);
    let (at, len) = (9 * BLOCK as u64, 3 * BLOCK as u64);
    volume.discard(at, len).unwrap();
    assert!(read_all(&volume) == server.present());
    volume.close().unwrap();
    drop(volume);
    assert!(reading(&server, dir.path()).cache_read_blocks > 0);
}

/// With the same time and super block, but damaged bytes or an older state.
#[test]
fn open_detects_a_server_that_differs_from_the_cache() {
    for writing in [true, false] {
        let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
        filled(&server, dir.path());
        (9..40).for_each(|block| server.put(block, 8));
        let opened = match writing {
            true => server.open(dir.path(), BLOCKS * BLOCK * 4),
            false => server.open_reader(dir.path()),
        };
        let differs = opened.map(drop).unwrap_err();
        assert!(
            matches!(differs, VolumeError::CacheDiffers { .. }),
            "{differs:?}"
        );
        assert!(!dir.path().join("clean").exists());
        assert_eq!(reading(&server, dir.path()).cache_read_blocks, 0);
    }
}

#[test]
fn comparing_reads_everything_and_drops_a_cache_that_differs() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    for differing in [0, 1] {
        let cache = CacheOptions {
            only_compare: true,
            ..cache_options(dir.path(), BLOCKS * BLOCK * 4)
        };
        let options = ReadOnlyOptions {
            cache: Some(cache),
            ..ReadOnlyOptions::new(std::env::temp_dir())
        };
        let (file, session) = (Arc::new(server.clone()), Arc::new(server.clone()));
        let geometry = geometry(BLOCKS * BLOCK);
        let volume = Volume::open_read_only(file, geometry, session, options).unwrap();
        let read = volume.stats().wire_read_bytes;
        assert_eq!(read, (BLOCKS * BLOCK) as u64, "all of it at once");
        assert!(read_all(&volume) == server.present(), "{differing}");
        assert_eq!(volume.stats().cache_read_blocks, 0);
        assert_eq!(volume.differing_blocks(), differing);
        volume.close().unwrap();
        assert_eq!(dir.path().join("clean").exists(), differing == 0);
        // Bytes are damaged on the server's disk.
        server.put(9, 8);
    }
}

#[test]
fn session_that_finds_the_cache_in_use_outdates_it() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    let reader = server.reader(dir.path());
    let writer = server.volume(dir.path(), BLOCKS * BLOCK * 4);
    writer.write_at(0, &stamped(5)).unwrap();
    writer.close().unwrap();
    drop((reader, writer));
    assert!(!dir.path().join("clean").exists());
    assert_eq!(reading(&server, dir.path()).cache_read_blocks, 0);
}

#[test]
fn only_unused_caches_are_removed() {
    let (server, parent) = (Server::new(), tempfile::tempdir().unwrap());
    let dir = |name: &str| parent.path().join(name);
    for name in ["gone", "more-in-it", "in-use"] {
        filled(&server, &dir(name));
    }
    fs::write(dir("more-in-it").join("notes"), "x").unwrap();
    fs::create_dir(dir("no-cache")).unwrap();
    std::os::unix::fs::symlink(dir("in-use"), dir("link")).unwrap();
    let user = server.reader(&dir("in-use"));
    sprat_volume::remove_unused_caches(parent.path(), Duration::from_secs(3600));
    assert!(dir("gone").exists(), "it was used a moment ago");
    sprat_volume::remove_unused_caches(parent.path(), Duration::ZERO);
    assert!(!dir("gone").exists());
    for name in ["in-use", "more-in-it"] {
        assert!(dir(name).join("clean").exists(), "{name}");
    }
    assert!(dir("no-cache").exists() && dir("link").exists());
    drop(user);
    assert!(reading(&server, &dir("in-use")).cache_read_blocks > 0);
    assert!(parent.path().exists());
}

#[test]
fn symbolic_link_in_place_of_the_marker_is_not_followed() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    let elsewhere = tempfile::tempdir().unwrap();
    filled(&server, dir.path());
    let target = elsewhere.path().join("target");
    fs::rename(dir.path().join("clean"), &target).unwrap();
    let before = fs::read(&target).unwrap();
    for name in ["clean", "clean.new"] {
        std::os::unix::fs::symlink(&target, dir.path().join(name)).unwrap();
    }
    assert_eq!(reading(&server, dir.path()).cache_read_blocks, 0);
    filled(&server, dir.path());
    assert_eq!(fs::read(&target).unwrap(), before);
    assert!(reading(&server, dir.path()).cache_read_blocks > 0);
}

#[test]
fn session_that_lost_its_connection_leaves_no_marker() {
    within(LIMIT, || {
        let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
        filled(&server, dir.path());
        let volume = server.volume(dir.path(), BLOCKS * BLOCK * 4);
        server.lose_a_line.store(true, Ordering::SeqCst);
        volume.write_at(0, &stamped(5)).unwrap();
        volume.flush(Flush::Durable).unwrap();
        assert!(read_all(&volume) == server.present());
        assert_eq!(volume.stats().cache_read_blocks, 0);
        volume.close().unwrap();
        drop(volume);
        assert!(!dir.path().join("clean").exists());
    });
}

#[test]
fn caller_decides_whether_a_closed_cache_is_kept() {
    for keep in [false, true] {
        let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
        filled(&server, dir.path());
        let volume = server.volume(dir.path(), BLOCKS * BLOCK * 4);
        volume.write_at(0, &stamped(77)).unwrap();
        // The check of the lock is the caller's.
        let cache = volume.close_without_cache().unwrap().unwrap();
        assert!(!dir.path().join("clean").exists());
        if keep {
            cache.keep();
        }
        let cached = reading(&server, dir.path()).cache_read_blocks;
        assert_eq!(cached, if keep { BLOCKS as u64 } else { 0 });
    }
}

/// The attributes that came with the last flush are those of the cache, and nothing later.
#[test]
fn closed_cache_belongs_to_the_state_behind_the_last_flush() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    server.tells_behind_flush.store(true, Ordering::SeqCst);
    let volume = server.volume(dir.path(), BLOCKS * BLOCK * 4);
    volume.write_at(0, &stamped(77)).unwrap();
    volume.flush(Flush::Durable).unwrap();
    let modified_s = server.modified_s.load(Ordering::SeqCst);
    // As after a session of another machine.
    server.modified_s.store(modified_s + 1, Ordering::SeqCst);
    server.put(9, 78);
    volume.close_without_cache().unwrap().unwrap().keep();
    assert_eq!(reading(&server, dir.path()).cache_read_blocks, 0);
}

#[test]
fn session_that_lost_its_lock_leaves_no_marker() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    let volume = server.volume(dir.path(), BLOCKS * BLOCK * 4);
    assert!(read_all(&volume) == server.present());
    server.lock_lost.store(true, Ordering::SeqCst);
    volume.close().unwrap();
    assert!(!dir.path().join("clean").exists());
}

#[test]
fn no_marker_if_another_session_mounted_the_volume_meanwhile() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    let volume = server.volume(dir.path(), BLOCKS * BLOCK * 4);
    assert!(read_all(&volume) == server.present());
    // Both as after a complete session of another machine that released the lock.
    server.put(0, 77);
    server.put(9, 78);
    volume.close().unwrap();
    assert!(!dir.path().join("clean").exists());
}

#[test]
fn in_doubt_writes_drop_the_cache() {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, dir.path());
    server.put(9, 8);
    let options = VolumeOptions {
        cache: Some(cache_options(dir.path(), BLOCKS * BLOCK * 4)),
        in_doubt: std::iter::once(0..BLOCK as u64).collect(),
        ..tiny()
    };
    let session = Arc::new(server.clone());
    let volume = Volume::open(session.clone(), geometry(BLOCKS * BLOCK), session, options).unwrap();
    assert!(read_all(&volume) == server.present());
    volume.close().unwrap();
    drop(volume);
    assert!(!dir.path().join("clean").exists());
}

#[test]
fn no_damaged_cache_file_causes_a_wrong_byte() {
    let (server, whole) = (Server::new(), tempfile::tempdir().unwrap());
    filled(&server, whole.path());
    let read = |name: &str| fs::read(whole.path().join(name)).unwrap();
    let mut damages: Vec<(&str, String, Option<Vec<u8>>)> = Vec::new();
    for name in ["clean", "blocks"] {
        let good = read(name);
        let step = if name == "clean" { 61 } else { 1531 };
        let entries = if name == "clean" {
            4120..good.len()
        } else {
            0..0
        };
        for at in (0..good.len()).step_by(step).chain(entries.step_by(7)) {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            damages.push((name, format!("a bit at {at}"), Some(bad)));
        }
        for len in [
            0,
            7,
            8,
            4096,
            4128,
            4135,
            4136,
            good.len() - 24,
            good.len() - 1,
        ] {
            damages.push((name, format!("cut to {len}"), Some(good[..len].to_vec())));
        }
        damages.push((name, "longer".to_owned(), Some([&good[..], b"x"].concat())));
        damages.push((name, "zeros".to_owned(), Some(vec![0; good.len()])));
        damages.push((name, "gone".to_owned(), None));
    }
    let mut swapped = read("blocks");
    swapped.rotate_left(BLOCK);
    damages.push(("blocks", "each in another's slot".to_owned(), Some(swapped)));
    for (name, what, bytes) in damages {
        let dir = tempfile::tempdir().unwrap();
        for (file, good) in files(whole.path()) {
            fs::write(dir.path().join(file), good).unwrap();
        }
        match bytes {
            Some(bytes) => fs::write(dir.path().join(name), bytes).unwrap(),
            None => fs::remove_file(dir.path().join(name)).unwrap(),
        }
        println!("{name}: {what}");
        let stats = reading(&server, dir.path());
        let untouched = stats.cache_read_blocks == BLOCKS as u64;
        assert!(!untouched || what == "longer" && name == "blocks" || what.contains("bit"));
        let volume = server.volume(dir.path(), BLOCKS * BLOCK * 4);
        assert!(read_all(&volume) == server.present(), "{name}: {what}");
        volume.close().unwrap();
    }
}

#[test]
fn sessions_behave_as_an_array_with_any_cache_and_any_end() {
    let seeds = match std::env::var("SPRAT_CACHE_SEEDS") {
        Ok(range) => {
            let (first, end) = range.split_once("..").unwrap();
            first.parse().unwrap()..end.parse().unwrap()
        }
        Err(_) => 0..24,
    };
    for seed in seeds {
        println!("SPRAT_CACHE_SEEDS={seed}..{}", seed + 1);
        within(LIMIT, move || one_life(seed));
    }
}

fn one_life(seed: u64) {
    let (server, dir) = (Server::new(), tempfile::tempdir().unwrap());
    let mut dice = Dice::new(seed);
    let slots = 1 + dice.below(2 * BLOCKS as u64);
    for session in 0..8 {
        let volume = server.volume(dir.path(), usize::try_from(slots).unwrap() * BLOCK);
        let mut model = server.present();
        for step in 0..60 {
            let block = usize::try_from(dice.below(BLOCKS as u64)).unwrap();
            let at = (block * BLOCK) as u64;
            match dice.below(8) {
                0..=2 => {
                    let bytes = stamped(dice.below(1 << 60));
                    volume.write_at(at, &bytes).unwrap();
                    model[block * BLOCK..][..BLOCK].copy_from_slice(&bytes);
                }
                3 => volume.flush(Flush::Ordered).unwrap(),
                4 if dice.below(4) == 0 => volume.flush(Flush::Durable).unwrap(),
                _ => {
                    let mut found = vec![0; BLOCK];
                    volume.read_at(at, &mut found).unwrap();
                    let right = found == model[block * BLOCK..][..BLOCK];
                    assert!(right, "session {session}, step {step}, block {block}");
                }
            }
        }
        if dice.below(4) > 0 {
            volume.close().unwrap();
            assert!(server.present() == model);
        }
    }
}
