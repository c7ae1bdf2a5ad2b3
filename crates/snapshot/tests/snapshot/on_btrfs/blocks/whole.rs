//! Large files that rsync sent whole: the next run knows their blocks.

use sprat_testkit::dice::{self, Dice};

use super::*;

impl WithLarge {
    /// A machine that knows what its kernel has in memory.
    fn with_page_cache() -> Self {
        let mut large = Self::new();
        large.spec.page_cache.ask(|_, _| Ok(true));
        large
    }

    /// Writes to the source until `run` is done.
    fn take_while_it_changes(&self, from: u64) -> SnapshotReport {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let written = (0..).take_while(|_| !stop.load(Ordering::Relaxed));
                for (block, byte) in written.zip((1..=u8::MAX).cycle()) {
                    let block = (from + block * 37) % BLOCKS;
                    self.change(std::iter::once(block), byte);
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            });
            let report = self.volume.try_take(&self.spec);
            stop.store(true, Ordering::Relaxed);
            report.unwrap()
        })
    }
}

#[test]
fn first_change_after_the_first_backup_needs_no_old_content() {
    requires!(missing());
    let large = WithLarge::with_page_cache();
    large.take();
    // A wrong hash shows that the index is used. Another fifth of the file are holes.
    let index = File::options().write(true).open(large.index()).unwrap();
    index.write_all_at(&[0; 16], 16 * 501).unwrap();
    large.change(100..110, 2);
    assert_eq!(
        large.take().record.stats.bytes_literal,
        (10 + 1) * BLOCK_BYTES
    );
    // So has a later file.
    let other = large.file.with_file_name("other.img");
    fs::write(&other, fs::read(&large.file).unwrap()).unwrap();
    large.take();
    fs::remove_file(&large.file).unwrap();
    fs::rename(&other, &large.file).unwrap();
    // With another path, its index is no longer known.
    large.take();
}

/// The index of what the source has after rsync has read it would hide the change for ever.
#[test]
fn what_changes_after_rsync_has_read_it_is_sent_by_the_next_run() {
    requires!(missing());
    let mut large = WithLarge::with_page_cache();
    let bench = &large.volume.bench;
    let source = large.file.display();
    let changes = format!(
        "case \"$*\" in *--delete*) rsync \"$@\"; code=$?; \
         printf changed | dd of={source} conv=notrunc bs=4096 seek=700 status=none; exit $code;; esac"
    );
    let changing = bench.rsync_script(&changes, "rsync");
    let rsync = std::mem::replace(&mut large.spec.rsync, changing);
    let first = large.volume.try_take(&large.spec).unwrap();
    assert!(first.record.complete, "{:?}", first.record);
    assert!(fs::read(&large.file).unwrap() != fs::read(large.kept(&first)).unwrap());
    large.index();
    large.spec.rsync = rsync;
    assert_eq!(large.take().record.stats.bytes_literal, BLOCK_BYTES);
}

#[test]
fn first_backup_of_a_file_that_changes_all_the_time_leaves_right_hashes() {
    requires!(missing());
    let dice = &mut Dice::new(dice::seed());
    let large = WithLarge::with_page_cache();
    fs::write(large.file.with_file_name("other"), "other").unwrap();
    for round in 0..4_u8 {
        let first = large.take_while_it_changes(dice.below(BLOCKS));
        assert!(first.record.complete, "{:?}", first.record);
        large.index();
        let begin = dice.below(BLOCKS - 20);
        large.change(begin..begin + 20, round);
        large.take();
        // rsync writes a new file.
        fs::remove_file(&large.file).unwrap();
        assert!(large.volume.try_take(&large.spec).unwrap().record.complete);
        let content: Vec<u8> = (0..BLOCKS)
            .flat_map(|block| [block.to_le_bytes()[0].wrapping_mul(round); BLOCK])
            .collect();
        fs::write(&large.file, content).unwrap();
    }
}

/// While rsync writes a large file, that has a second name at the top of `work`.
#[test]
fn file_that_took_long_has_an_index_and_one_name_in_the_list() {
    requires!(missing());
    let mut large = WithLarge::with_page_cache();
    let bench = &large.volume.bench;
    large.spec.rsync = bench.rsync_script("", "rsync --bwlimit=20000");
    let report = large.take();
    large.index();
    let list = lines(&list_of(&large.volume.bench.job(), report.name));
    let paths = list.iter().filter_map(|line| line["path"].as_str());
    let second: Vec<_> = paths.filter(|path| path.contains(".begun")).collect();
    assert_eq!(second, [""; 0]);
}

#[test]
fn file_that_is_not_all_in_memory_has_no_index() {
    requires!(missing());
    let mut large = WithLarge::new();
    large
        .spec
        .page_cache
        .ask(|_, range| Ok(range.start > 1 << 20));
    large.take();
    let indexes = large.volume.bench.path("blocks");
    assert_eq!(files_ending(&indexes, ".blocks"), Vec::<PathBuf>::new());
    large.change(100..110, 2);
    assert_eq!(large.take().record.stats.bytes_literal, 10 * BLOCK_BYTES);
}
