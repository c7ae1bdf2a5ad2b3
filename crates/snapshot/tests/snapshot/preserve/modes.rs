//! Random modes, owners and ACLs of files and folders, which change between the runs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sprat_snapshot::{RestoreSpec, SnapshotReport};
use sprat_testkit::compare::assert_same;
use sprat_testkit::dice::Dice;
use sprat_testkit::requires;
use sprat_testkit::tree::{set_mode, set_owner, set_xattr};

use super::next;
use crate::folder::{Bench, SmallExt4, below, job_name, loop_missing};

/// From this size on a run updates a file of a btrfs by blocks.
const LARGE_BYTES: u64 = 32 << 20;
/// In the short form and in the long one (`SPRAT_TORTURE_ROUNDS`).
const ROUNDS: [u64; 2] = [3, 30];
const FILES: [u64; 2] = [60, 600];
const LARGE_FILES: [u64; 2] = [4, 30];

pub(crate) struct RandomModes {
    source: PathBuf,
    dice: Dice,
    all: Vec<PathBuf>,
    long: usize,
}

impl RandomModes {
    pub(crate) fn new(source: PathBuf) -> Self {
        let seed = std::env::var("SPRAT_TORTURE_SEED").ok();
        let seed = seed.and_then(|seed| seed.parse().ok()).unwrap_or(1);
        println!("SPRAT_TORTURE_SEED={seed}");
        let mut this = Self {
            source,
            dice: Dice::new(seed),
            all: Vec::new(),
            long: usize::from(std::env::var_os("SPRAT_TORTURE_ROUNDS").is_some()),
        };
        for number in 0..FILES[this.long] {
            let folder = this.source.join(format!("{}/folder {number}", number % 4));
            fs::create_dir_all(&folder).unwrap();
            let file = folder.join("file");
            fs::write(&file, "content").unwrap();
            this.all.extend([file, folder]);
        }
        for number in 0..LARGE_FILES[this.long] {
            let path = this.source.join(format!("large {number}"));
            let file = File::create(&path).unwrap();
            file.set_len(LARGE_BYTES + number).unwrap();
            this.all.push(path);
        }
        for path in this.all.clone() {
            this.set_attributes(&path);
        }
        this
    }

    /// Calls `check` before any change, and after each of some rounds of changes.
    pub(crate) fn in_rounds(&mut self, mut check: impl FnMut(&Path)) {
        check(&self.source);
        for _ in 1..ROUNDS[self.long] {
            for path in self.all.clone() {
                let what = self.dice.below(4);
                if what & 1 == 1 && path.is_file() {
                    let file = File::options().write(true).open(&path).unwrap();
                    let at = self.dice.below(file.metadata().unwrap().len());
                    file.write_all_at(b"changed", at).unwrap();
                }
                if what & 2 == 2 {
                    self.set_attributes(&path);
                }
            }
            check(&self.source);
        }
    }

    fn set_attributes(&mut self, path: &Path) {
        let ids = [0, 1000, 1234];
        let user = ids[self.below(3)];
        set_owner(path, user, ids[self.below(3)]).unwrap();
        for name in ["system.posix_acl_access", "system.posix_acl_default"] {
            if name.ends_with("default") && !path.is_dir() {
                continue;
            }
            match self.below(3) {
                0 => drop(rustix::fs::lremovexattr(path, name)),
                1 => {}
                _ => {
                    let acl = self.acl();
                    set_xattr(path, name, &acl).unwrap();
                }
            }
        }
        // Also of an ACL that is there since before.
        let mode = u32::try_from(self.dice.below(0o10000)).unwrap();
        set_mode(path, mode).unwrap();
    }

    fn below(&mut self, most: u64) -> usize {
        usize::try_from(self.dice.below(most)).unwrap()
    }

    /// As the kernel keeps it (linux/posix_acl_xattr.h).
    fn acl(&mut self) -> Vec<u8> {
        let has_named = self.dice.below(4) > 0;
        let all = [
            (0x01, None, true),
            (0x02, Some(1000), has_named),
            (0x02, Some(2000), has_named),
            (0x04, None, true),
            (0x08, Some(1234), has_named),
            (0x10, None, has_named),
            (0x20, None, true),
        ];
        let mut bytes = 2_u32.to_le_bytes().to_vec();
        for (tag, id, _) in all.into_iter().filter(|(_, _, is_in)| *is_in) {
            let rights = u16::try_from(self.dice.below(8)).unwrap();
            bytes.extend(u16::to_le_bytes(tag));
            bytes.extend(u16::to_le_bytes(rights));
            bytes.extend(u32::to_le_bytes(id.unwrap_or(u32::MAX)));
        }
        bytes
    }
}

/// The snapshot, and what is restored of it, are equal to the source.
pub(crate) fn check(
    bench: &Bench,
    volume: &Path,
    source: &Path,
    report: &SnapshotReport,
    tree: &Path,
) {
    assert!(report.record.complete, "{:?}", report.record);
    assert_same(source, tree);
    let to = bench.path(&format!("restored {}", report.name));
    let spec = RestoreSpec::new(job_name(), to.clone());
    let cancel = sprat_snapshot::Cancel::new();
    sprat_snapshot::restore(volume, &spec, &mut |_| {}, &cancel).unwrap();
    assert_same(source, &below(&to, source));
    fs::remove_dir_all(to).unwrap();
}

#[test]
fn random_modes_owners_and_acls_are_equal() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "256M", &["-b", "4096"]);
    RandomModes::new(bench.source()).in_rounds(|source| {
        let (report, tree) = next(&bench, &disk);
        check(&bench, &disk.at, source, &report, &tree);
    });
}
