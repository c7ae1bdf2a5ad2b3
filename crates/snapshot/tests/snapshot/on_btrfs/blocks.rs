//! Large files of which only the blocks that differ are sent.

mod parts;
mod whole;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use sprat_snapshot::Phase;

use super::*;
use crate::interrupted::files_ending;

const BLOCK_BYTES: u64 = BLOCK as u64;
const BLOCK: usize = 4096;
const BLOCKS: u64 = 10_000;

/// A job with one large file.
struct WithLarge {
    volume: OnBtrfs,
    file: PathBuf,
    spec: SnapshotSpec,
}

impl WithLarge {
    fn new() -> Self {
        let volume = OnBtrfs::new();
        let file = volume.source("machines/vm.img");
        fs::create_dir(file.parent().unwrap()).unwrap();
        let content: Vec<u8> = (0..BLOCKS)
            .flat_map(|block| match block % 5 {
                0 => [0; BLOCK],
                _ => [block.to_le_bytes()[0] | 1; BLOCK],
            })
            .collect();
        fs::write(&file, content).unwrap();
        let mut spec = volume.bench.spec();
        spec.blocks = Some(volume.bench.path("blocks"));
        Self { volume, file, spec }
    }

    /// Fills some blocks with `byte`.
    fn change(&self, blocks: impl Iterator<Item = u64>, byte: u8) {
        let file = File::options().write(true).open(&self.file).unwrap();
        for block in blocks {
            let content = [byte; BLOCK];
            file.write_all_at(&content, block * BLOCK_BYTES).unwrap();
        }
    }

    /// Takes a snapshot, and compares it with the source.
    fn take(&self) -> SnapshotReport {
        let report = self.volume.try_take(&self.spec).unwrap();
        assert!(report.record.complete, "{:?}", report.record);
        let (source, kept) = (self.volume.bench.source(), self.kept(&report));
        assert_same(&source, &self.volume.bench.in_snapshot(report.name));
        assert!(fs::read(&self.file).unwrap() == fs::read(kept).unwrap());
        let tree = self.volume.bench.job().join(report.name.to_string());
        for ending in [".blocks", ".part"] {
            assert!(files_ending(&tree, ending).is_empty());
        }
        assert!(!self.volume.bench.job().join(".sprat/work.blocks").exists());
        report
    }

    fn kept(&self, report: &SnapshotReport) -> PathBuf {
        self.volume.kept(report, "machines/vm.img")
    }

    fn index(&self) -> PathBuf {
        let indexes = files_ending(&self.volume.bench.path("blocks"), ".blocks");
        assert_eq!(indexes.len(), 1);
        indexes[0].clone()
    }

    /// A run that is cancelled in the middle of the file.
    fn cancel(&self) {
        let cancel = Cancel::new();
        let root = self.volume.bench.volume();
        let mut progress = |now: sprat_snapshot::Progress| {
            if now.phase == Phase::Copying && now.bytes_done > 0 {
                cancel.cancel();
            }
        };
        let error = sprat_snapshot::take_into_subvolume(
            &root,
            &self.spec,
            now(),
            &ByProgs,
            &mut progress,
            &cancel,
        );
        assert!(matches!(error, Err(SnapshotError::Cancelled)));
        assert_eq!(files_ending(&self.volume.work(), ".blocks").len(), 1);
        assert_eq!(files_ending(&self.volume.work(), ".part").len(), 1);
    }
}

#[test]
fn only_changed_blocks_of_a_large_file_are_sent() {
    requires!(missing());
    let large = WithLarge::new();
    let first = large.take();
    assert_eq!(first.record.stats.bytes_literal, BLOCKS * BLOCK_BYTES);
    let before = fs::read(large.kept(&first)).unwrap();
    // Without an index, the file on the volume is read.
    large.change(100..110, 2);
    set_mode(&large.file, 0o640).unwrap();
    set_xattr(&large.file, "user.kind", b"disk").unwrap();
    std::os::unix::fs::chown(&large.file, Some(7), Some(8)).unwrap();
    let report = large.take();
    let stats = report.record.stats;
    assert_eq!(stats.bytes_literal, 10 * BLOCK_BYTES);
    assert_eq!(
        (stats.transferred, stats.files),
        (1, first.record.stats.files)
    );
    assert_eq!(stats.bytes_total, first.record.stats.bytes_total);
    // A block whose hash is another one is sent, though it is the same on the volume.
    large.change(std::iter::once(100), 3);
    let index = File::options().write(true).open(large.index()).unwrap();
    index.write_all_at(&[0; 16], 16 * 501).unwrap();
    assert_eq!(large.take().record.stats.bytes_literal, 2 * BLOCK_BYTES);
    // The file becomes shorter, and then longer than before.
    let file = File::options().write(true).open(&large.file).unwrap();
    file.set_len((BLOCKS - 7) * BLOCK_BYTES + 5).unwrap();
    assert_eq!(large.take().record.stats.bytes_literal, 5);
    file.set_len((BLOCKS + 7) * BLOCK_BYTES).unwrap();
    file.write_all_at(b"end", (BLOCKS + 6) * BLOCK_BYTES)
        .unwrap();
    let literal = large.take().record.stats.bytes_literal;
    // The short block is a whole one now.
    assert_eq!(literal, 2 * BLOCK_BYTES);
    assert_eq!(large.take().record.stats.bytes_literal, 0);
    assert!(fs::read(large.kept(&first)).unwrap() == before);
}

#[test]
fn interrupted_run_keeps_the_hashes_of_a_large_file() {
    requires!(missing());
    let mut large = WithLarge::new();
    large.take();
    large.change(100..110, 2);
    let bench = &large.volume.bench;
    // The large file is up to date before the run of rsync that fails.
    let fails = "case \"$*\" in *--delete*) exit 12;; esac";
    let failing = bench.rsync_script(fails, "rsync");
    let rsync = std::mem::replace(&mut large.spec.rsync, failing);
    large.volume.try_take(&large.spec).unwrap_err();
    // The first run made none.
    large.index();
    large.spec.rsync = rsync;
    assert_eq!(large.take().record.stats.bytes_literal, 0);
    // A wrong hash shows that the index is used.
    large.change(std::iter::once(100), 3);
    let index = File::options().write(true).open(large.index()).unwrap();
    index.write_all_at(&[0; 16], 16 * 501).unwrap();
    assert_eq!(large.take().record.stats.bytes_literal, 2 * BLOCK_BYTES);
}

#[test]
fn index_of_another_state_of_the_file_is_not_used() {
    requires!(missing());
    let large = WithLarge::new();
    large.take();
    large.change(100..110, 2);
    large.take();
    let (place, old) = (large.index(), fs::read(large.index()).unwrap());
    large.change(100..110, 3);
    large.take();
    fs::write(&place, old).unwrap();
    // By that index, these blocks are unchanged.
    large.change(100..110, 2);
    assert_eq!(large.take().record.stats.bytes_literal, 10 * BLOCK_BYTES);
    fs::write(&place, b"damaged").unwrap();
    large.change(100..110, 4);
    assert_eq!(large.take().record.stats.bytes_literal, 10 * BLOCK_BYTES);
}

/// Reading a file of very many small pieces takes very many requests.
#[test]
fn file_of_too_many_pieces_is_written_anew() {
    requires!(missing());
    let large = WithLarge::new();
    large.take();
    large.change(1..2, 2);
    let before = large.take();
    let inode = |report| fs::metadata(large.kept(report)).unwrap().ino();
    let index = fs::read(large.index()).unwrap();
    let (content, tail) = index.split_last_chunk::<12>().unwrap();
    let json_bytes = u32::from_le_bytes(*tail.first_chunk().unwrap());
    let json_at = content.len() - usize::try_from(json_bytes).unwrap();
    let mut end: serde_json::Value = serde_json::from_slice(&content[json_at..]).unwrap();
    end["pieces"] = (BLOCKS * BLOCK_BYTES / 8192 + 1).into();
    let end = serde_json::to_vec(&end).unwrap();
    let json_bytes = u32::try_from(end.len()).unwrap().to_le_bytes();
    let changed = [&content[..json_at], &end, &json_bytes, &tail[4..]].concat();
    fs::write(large.index(), changed).unwrap();
    large.change(1..2, 3);
    let report = large.take();
    // All but the zeros.
    let written = report.record.stats.bytes_literal;
    assert_eq!(written, BLOCKS / 5 * 4 * BLOCK_BYTES);
    assert_ne!(inode(&report), inode(&before));
    large.change(1..2, 4);
    assert_eq!(large.take().record.stats.bytes_literal, BLOCK_BYTES);
}

#[test]
fn changed_file_that_the_job_no_longer_includes_leaves_the_snapshot() {
    requires!(missing());
    let mut large = WithLarge::new();
    large.take();
    large.change(0..10, 2);
    large.spec.excludes = vec!["machines/*.i[m]g".to_owned()];
    let report = large.volume.try_take(&large.spec).unwrap();
    assert!(!large.kept(&report).exists());
}

#[test]
fn large_file_that_is_the_source_itself_is_updated() {
    requires!(missing());
    let mut large = WithLarge::new();
    large.spec.sources = vec![large.file.clone()];
    for changed in [BLOCKS, 10] {
        let report = large.volume.try_take(&large.spec).unwrap();
        assert!(report.record.complete, "{:?}", report.record);
        assert_eq!(report.record.stats.bytes_literal, changed * BLOCK_BYTES);
        assert!(fs::read(large.kept(&report)).unwrap() == fs::read(&large.file).unwrap());
        large.change(200..210, 2);
    }
}

/// rsync would send it whole, because its time differs again when rsync comes to it.
#[test]
fn file_that_changes_all_the_time_is_not_sent_whole() {
    requires!(missing());
    let large = WithLarge::new();
    large.take();
    let stop = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            for block in (0..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                large.change(std::iter::once(block % BLOCKS), 9);
                large.change(std::iter::once(BLOCKS + block), 9);
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        });
        let report = large.volume.try_take(&large.spec);
        stop.store(true, Ordering::Relaxed);
        report.unwrap()
    });
    assert!(report.record.complete, "{:?}", report.record);
    let literal = report.record.stats.bytes_literal;
    assert!(literal < BLOCKS * BLOCK_BYTES / 2, "{literal}");
    let kept = fs::metadata(large.kept(&report)).unwrap();
    assert!(kept.len() >= BLOCKS * BLOCK_BYTES);
    assert!(large.take().record.stats.bytes_literal < BLOCKS * BLOCK_BYTES / 2);
}

#[test]
fn interrupted_update_leaves_no_torn_file() {
    requires!(missing());
    let large = WithLarge::new();
    large.take();
    large.change(0..10, 2);
    let before = large.take();
    let content = fs::read(large.kept(&before)).unwrap();
    large.change(0..10, 3);
    large.change(9_000..9_010, 3);
    large.cancel();
    large.cancel();
    // The file of the last snapshot is taken back, and its index still counts. What was sent is not sent again.
    let report = large.take();
    assert_eq!(report.record.stats.bytes_literal, 10 * BLOCK_BYTES);
    assert!(fs::read(large.kept(&before)).unwrap() == content);
    // As after kill -9 between the last two steps: the file has its name, and the note is left.
    let note = large.volume.bench.job().join(".sprat/work.blocks");
    fs::write(note, large.file.to_str().unwrap()).unwrap();
    assert_eq!(large.take().record.stats.bytes_literal, 0);
    // The source has gone back to the state of the snapshot.
    large.change(0..10, 4);
    large.cancel();
    large.change(0..10, 3);
    large.take();
}

/// Checks know the content of a file by its inode, size and time.
#[test]
fn other_content_with_an_old_time_is_another_file() {
    requires!(missing());
    let large = WithLarge::new();
    let first = large.take();
    let about = |report: &SnapshotReport| fs::metadata(large.kept(report)).unwrap();
    let of_first = about(&first);
    let set_old_time = || set_time(&large.file, of_first.mtime(), of_first.mtime_nsec()).unwrap();
    large.change(3..4, 77);
    set_old_time();
    let mut spec = large.spec.clone();
    spec.checksum = true;
    let second = large.volume.try_take(&spec).unwrap();
    assert!(fs::read(&large.file).unwrap() == fs::read(large.kept(&second)).unwrap());
    assert_ne!(about(&second).ino(), of_first.ino());
    // The time goes on, and comes back.
    large.change(4..5, 78);
    let third = large.take();
    large.change(5..6, 79);
    set_old_time();
    let fourth = large.take();
    let inodes = [&first, &second, &third, &fourth].map(|report| about(report).ino());
    assert_eq!(inodes[1], inodes[2]);
    assert_ne!(inodes[3], inodes[1]);
}

/// A program may set the time of a file back after each change.
#[test]
fn same_content_with_an_earlier_time_is_another_file() {
    requires!(missing());
    let large = WithLarge::new();
    let inode = |report: &SnapshotReport| fs::metadata(large.kept(report)).unwrap().ino();
    let first = large.take();
    let of_first = fs::metadata(large.kept(&first)).unwrap();
    large.change(3..4, 77);
    let second = large.take();
    assert_eq!(inode(&second), inode(&first));
    // This content, with the time of the first one.
    set_time(&large.file, of_first.mtime(), of_first.mtime_nsec()).unwrap();
    let third = large.take();
    assert_ne!(inode(&third), inode(&first));
    assert_eq!(third.record.stats.bytes_literal, 0);
    large.change(4..5, 78);
    assert_eq!(large.take().record.stats.bytes_literal, BLOCK_BYTES);
}
