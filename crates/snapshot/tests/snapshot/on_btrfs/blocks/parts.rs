//! Interrupted updates of a large file, which the next run goes on with.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use sprat_testkit::dice::{self, Dice};

use super::*;
use crate::folder::slow_source::SlowSource;

impl WithLarge {
    /// With an index, and a part after each MiB.
    fn with_parts() -> Self {
        let mut large = Self::new();
        large.take();
        large.change(0..1, 2);
        large.take();
        large.spec.parts_every = Some(Duration::ZERO);
        large
    }

    /// A run that ends without any clean-up once so many bytes of the file are done: as after kill -9.
    fn die(&self, bytes: u64) {
        let root = self.volume.bench.volume();
        let mut progress = |now: sprat_snapshot::Progress| {
            if now.phase == Phase::Copying && now.bytes_done >= bytes {
                std::panic::panic_any("dies");
            }
        };
        let died = catch_unwind(AssertUnwindSafe(|| {
            sprat_snapshot::take_into_subvolume(
                &root,
                &self.spec,
                now(),
                &ByProgs,
                &mut progress,
                &Cancel::new(),
            )
        }));
        assert!(died.is_err());
    }

    fn sent(&self) -> u64 {
        self.take().record.stats.bytes_literal / BLOCK_BYTES
    }

    /// Files of this machine that belong to interrupted updates.
    fn notes(&self) -> Vec<PathBuf> {
        let folder = self.volume.bench.path("blocks");
        let mut files = files_ending(&folder, ".part");
        files.extend(files_ending(&folder, ".draft"));
        files
    }
}

#[test]
fn update_goes_on_after_a_kill_and_the_source_may_have_changed() {
    requires!(missing());
    let large = WithLarge::with_parts();
    // All that was sent is in the part.
    large.change((0..3000).chain(9000..9010), 3);
    large.die(1);
    assert_eq!(files_ending(&large.volume.work(), ".part").len(), 1);
    // Nothing was sent before this one dies. It goes on with the same part.
    large.die(1);
    // What changed meanwhile is sent again.
    large.change((7..9).chain(9500..9503), 4);
    assert_eq!(large.sent(), 10 + 5);
    assert_eq!(large.notes(), Vec::<PathBuf>::new());
    // The hashes are those of the file.
    large.change(8..9, 5);
    assert_eq!(large.sent(), 1);
}

#[test]
fn part_of_another_file_or_with_other_hashes_is_not_used() {
    requires!(missing());
    let large = WithLarge::with_parts();
    for damage in 0..4_u8 {
        large.change((0..3000).chain(9000..9010), 10 + damage);
        large.die(1);
        let clone = files_ending(&large.volume.work(), ".part").remove(0);
        let notes = large.notes();
        let of = |ending: &str| {
            let mut notes = notes.iter();
            notes
                .find(|path| path.to_string_lossy().ends_with(ending))
                .unwrap()
        };
        match damage {
            // Somebody wrote to the clone.
            0 => {
                let clone = File::options().write(true).open(&clone).unwrap();
                clone.write_all_at(&[99; BLOCK], 5 * BLOCK_BYTES).unwrap();
            }
            // The hashes of this machine are other ones, or lost.
            1 => {
                let draft = File::options().write(true).open(of(".draft")).unwrap();
                draft.write_all_at(&[0; 16], 16 * 700).unwrap();
            }
            2 => fs::write(of(".draft"), "").unwrap(),
            _ => fs::write(of(".part"), "damaged").unwrap(),
        }
        assert_eq!(large.sent(), 3010, "{damage}");
    }
}

#[test]
fn part_of_a_file_that_the_job_no_longer_includes_leaves_the_snapshot() {
    requires!(missing());
    let mut large = WithLarge::with_parts();
    large.change(0..3000, 3);
    large.die(1);
    large.spec.excludes = vec!["machines".to_owned()];
    let report = large.volume.try_take(&large.spec).unwrap();
    let tree = large.volume.bench.job().join(report.name.to_string());
    assert!(files_ending(&tree, ".part").is_empty());
    assert!(files_ending(&large.volume.work(), ".part").is_empty());
}

#[test]
fn interruptions_at_random_moments_leave_the_right_content() {
    requires!(missing());
    let mut large = WithLarge::with_parts();
    let dice = &mut Dice::new(dice::seed());
    for round in 0..12_u8 {
        let begin = dice.below(BLOCKS);
        large.change((0..dice.below(300)).map(|_| dice.below(BLOCKS)), round);
        large.change(
            begin..(begin + dice.below(2000)).min(BLOCKS),
            round.wrapping_mul(31),
        );
        if dice.percent(20) {
            let file = File::options().write(true).open(&large.file).unwrap();
            let blocks = BLOCKS - 800 + dice.below(1000);
            file.set_len(blocks * BLOCK_BYTES + dice.below(2) * 77)
                .unwrap();
        }
        large.spec.parts_every = (!dice.percent(30)).then_some(Duration::ZERO);
        match dice.below(4) {
            0 => drop(large.take()),
            1 => large.cancel(),
            _ => large.die(1 + dice.below(2) * (17 << 20)),
        }
    }
    large.take();
    large.change(17..18, 100);
    large.spec.parts_every = Some(Duration::ZERO);
    large.take();
}

#[test]
fn source_that_does_not_answer_can_be_cancelled() {
    requires!(missing(), sprat_testkit::needs::devices());
    let volume = OnBtrfs::new();
    let folder = volume.source("mounted");
    fs::create_dir(&folder).unwrap();
    let (source, mounted) = SlowSource::mount(&folder);
    let mut spec = volume.bench.spec();
    spec.blocks = Some(volume.bench.path("blocks"));
    let first = volume.try_take(&spec).unwrap();
    source.change();
    source.answer_reads(false);
    let cancel = Cancel::new();
    let error = std::thread::scope(|scope| {
        let cancel = &cancel;
        let source = &source;
        scope.spawn(move || {
            source.wait_for_request();
            cancel.cancel();
        });
        let root = volume.bench.volume();
        sprat_snapshot::take_into_subvolume(&root, &spec, now(), &ByProgs, &mut |_| {}, cancel)
    });
    assert!(matches!(error, Err(SnapshotError::Cancelled)), "{error:?}");
    source.answer_reads(true);
    let report = volume.try_take(&spec).unwrap();
    let kept = |report| fs::read(volume.kept(report, "mounted/large")).unwrap();
    assert!(kept(&report) == fs::read(folder.join("large")).unwrap());
    assert!(kept(&report) != kept(&first));
    drop(mounted);
}

/// The file is taken back from the snapshot whose name is the newest. It was made first.
#[test]
fn file_that_is_taken_back_from_a_misdated_snapshot_has_not_the_index_of_the_latest() {
    requires!(missing());
    let large = WithLarge::new();
    let root = large.volume.bench.volume();
    let ahead = now() + jiff::SignedDuration::from_hours(24 * 400);
    let none = &mut |_| {};
    sprat_snapshot::take_into_subvolume(&root, &large.spec, ahead, &ByProgs, none, &Cancel::new())
        .unwrap();
    large.change(100..110, 2);
    large.take();
    // Dies before the first part.
    large.change(9_000..9_010, 3);
    large.die(16 << 20);
    large.take();
}

#[test]
fn source_that_answers_no_question_before_rsync_starts_can_be_cancelled() {
    requires!(missing(), sprat_testkit::needs::devices());
    let volume = OnBtrfs::new();
    let folder = volume.source("mounted");
    fs::create_dir(&folder).unwrap();
    let (source, mounted) = SlowSource::mount(&folder);
    let mut spec = volume.bench.spec();
    spec.sources = vec![folder.clone()];
    spec.one_file_system = true;
    volume.try_take(&spec).unwrap();
    source.answer_own(None);
    volume.try_take(&spec).unwrap();
    let questions = source.own_before_others();
    assert!(questions > 5, "{questions}");
    for answered in 0..questions {
        source.answer_own(Some(answered));
        let cancel = Cancel::new();
        let error = std::thread::scope(|scope| {
            let (cancel, source) = (&cancel, &source);
            scope.spawn(move || {
                source.wait_for_request();
                cancel.cancel();
            });
            let root = volume.bench.volume();
            sprat_snapshot::take_into_subvolume(&root, &spec, now(), &ByProgs, &mut |_| {}, cancel)
        });
        assert!(
            matches!(error, Err(SnapshotError::Cancelled)),
            "{answered} of {questions}: {error:?}"
        );
        source.answer_own(None);
    }
    let report = volume.try_take(&spec).unwrap();
    let kept = fs::read(volume.kept(&report, "mounted/large")).unwrap();
    assert!(kept == fs::read(folder.join("large")).unwrap());
    drop(mounted);
}
