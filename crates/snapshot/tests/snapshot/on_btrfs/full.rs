//! A volume that is full: of data, or of metadata, which has chunks of its own.

use sprat_snapshot::SpaceKind;
use sprat_testkit::dice::Dice;
use sprat_testkit::tree::bytes;

use super::*;

/// How many of the files that need only metadata fill the volume.
const TOO_MANY: u64 = 16_000;

impl OnBtrfs {
    fn small() -> Self {
        Self::of("128M")
    }

    /// Files whose content is small enough to be kept in the metadata, with long names.
    fn write_many(&self, folder: &str, files: u64, seed: u64) {
        let folder = self.source(folder);
        fs::create_dir(&folder).unwrap();
        let dice = &mut Dice::new(seed);
        let long = "n".repeat(230);
        for number in 0..files {
            fs::write(folder.join(format!("{long}{number}")), bytes(dice, 2000)).unwrap();
        }
    }

    fn is_full(&self) {
        let error = self.try_take(&self.bench.spec()).unwrap_err();
        let SnapshotError::VolumeFull { kind, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(*kind, SpaceKind::Blocks);
    }

    fn is_exact(&self) -> SnapshotReport {
        let report = self.take();
        assert!(report.record.complete, "{:?}", report.record);
        assert_same(&self.bench.source(), &self.bench.in_snapshot(report.name));
        report
    }
}

#[test]
fn volume_full_of_metadata_takes_a_smaller_source_again() {
    requires!(missing());
    let volume = OnBtrfs::small();
    fs::write(volume.source("stays"), "content").unwrap();
    let first = volume.is_exact();
    volume.write_many("many", TOO_MANY, 1);
    for _ in 0..2 {
        volume.is_full();
    }
    fs::remove_dir_all(volume.source("many")).unwrap();
    fs::write(volume.source("new"), "content").unwrap();
    volume.is_exact();
    assert_eq!(fs::read(volume.kept(&first, "stays")).unwrap(), b"content");
}

#[test]
fn prune_works_on_a_volume_full_of_metadata() {
    requires!(missing());
    let volume = OnBtrfs::small();
    volume.write_many("old", 3000, 1);
    let first = volume.is_exact();
    fs::remove_dir_all(volume.source("old")).unwrap();
    volume.write_many("kept", 10, 2);
    let second = volume.is_exact();
    volume.write_many("many", TOO_MANY, 3);
    volume.is_full();
    let report = volume.prune(&keep_last(1));
    let removed = |name| !volume.bench.job().join(format!("{name}")).exists();
    assert!(removed(first.name) && !removed(second.name), "{report:?}");
    // The space is free, and the interrupted run goes on with less.
    let many = volume.source("many");
    for entry in fs::read_dir(&many).unwrap().skip(2000) {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    volume.is_exact();
}

#[test]
fn volume_full_of_data_is_pruned_and_takes_a_smaller_source_again() {
    requires!(missing());
    let volume = OnBtrfs::small();
    fs::write(volume.source("old"), bytes(&mut Dice::new(1), 20 << 20)).unwrap();
    let first = volume.is_exact();
    fs::remove_file(volume.source("old")).unwrap();
    fs::write(volume.source("new"), "content").unwrap();
    volume.is_exact();
    fs::write(volume.source("large"), bytes(&mut Dice::new(2), 150 << 20)).unwrap();
    volume.is_full();
    volume.prune(&keep_last(1));
    assert!(!volume.bench.job().join(first.name.to_string()).exists());
    fs::write(volume.source("large"), bytes(&mut Dice::new(3), 15 << 20)).unwrap();
    volume.is_exact();
}
