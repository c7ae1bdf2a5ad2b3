//! What a removal of snapshots frees on a real btrfs, compared with what was computed before.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::statvfs;
use sprat_inside::{AnalyzeReport, AnalyzeSpec, analyze};
use sprat_snapshot::{Cancel, JobName, SnapshotChoice, Subvolumes as _};
use sprat_testkit::dice::{Dice, number, seed};
use sprat_testkit::tree::bytes;
use sprat_testkit::{needs, requires};

use super::tests::{image, run};
use super::{ByIoctl, make, shared_space};

/// So many volumes, unless the environment names another number.
const VOLUMES: u64 = 2;
const DAYS: usize = 6;
const FILES: u64 = 120;
/// The kernel's own trees of free space, extents and checksums may change by some nodes, each kept twice.
const NODES_BYTES: u64 = 2 * (16 << 10) * 2;

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[&self.0]);
    }
}

/// Writes, extends, overwrites parts of, renames and removes files at random.
fn live_a_day(work: &Path, dice: &mut Dice, is_first: bool) {
    for _ in 0..if is_first { FILES } else { FILES / 6 } {
        let folder = work.join(format!("folder {}", dice.below(8)));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("file {}", dice.below(FILES)));
        let len = usize::try_from(dice.below(1600 << 10)).unwrap();
        let content = match dice.percent(50) {
            true => bytes(dice, len),
            // It is compressed.
            false => format!("{} ", dice.any()).into_bytes().repeat(len / 8 + 1),
        };
        match dice.below(10) {
            0 => drop(fs::remove_file(&path)),
            1 => drop(fs::rename(
                &path,
                work.join(format!("moved {}", dice.below(FILES))),
            )),
            2 | 3 if path.exists() => {
                let file = File::options().write(true).open(&path).unwrap();
                file.write_all_at(&content, dice.below(1200 << 10)).unwrap();
            }
            _ => fs::write(&path, content).unwrap(),
        }
    }
}

fn costs(volume: &Path, removed: &[String]) -> AnalyzeReport {
    let spec = AnalyzeSpec {
        kept: None,
        job: None,
        removed: removed
            .iter()
            .map(|name| (job(), SnapshotChoice::Named(name.clone())))
            .collect(),
        paths_max: 5,
    };
    let cancel = Cancel::new();
    let space = shared_space(volume, &cancel).expect("the trees can be read");
    analyze(volume, &spec, false, Some(&space), &cancel).unwrap()
}

fn job() -> JobName {
    JobName::new("home").unwrap()
}

fn free_bytes(volume: &Path) -> u64 {
    ByIoctl.commit(volume).unwrap();
    let waiting_since = Instant::now();
    while ByIoctl.deletions_pending(volume).unwrap() {
        assert!(waiting_since.elapsed() < Duration::from_secs(120));
        std::thread::sleep(Duration::from_millis(50));
    }
    ByIoctl.commit(volume).unwrap();
    let about = statvfs(volume).unwrap();
    about.f_bfree * about.f_frsize
}

#[test]
fn removal_on_btrfs_frees_what_was_computed_within_2_percent() {
    requires!(needs::root(), needs::program("mkfs.btrfs"));
    let first = seed();
    for volume_number in 0..number("SPRAT_TORTURE_ROUNDS").unwrap_or(VOLUMES) {
        let mut dice = Dice::new(first.wrapping_add(volume_number));
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        fs::create_dir(&volume).unwrap();
        let image = image(dir.path(), 1 << 30);
        make(&image, None).unwrap();
        run(
            "mount",
            &[
                Path::new("-oloop,compress=zstd:3,nodiscard"),
                &image,
                &volume,
            ],
        );
        let mounted = Mounted(volume.clone());
        let work = volume.join("home/.sprat/work");
        fs::create_dir_all(work.parent().unwrap()).unwrap();
        ByIoctl.make(&work).unwrap();
        let mut left = BTreeMap::new();
        for day in 0..DAYS {
            live_a_day(&work, &mut dice, day == 0);
            let name = format!("2026-11-{:02}T01-30-00Z", day + 1);
            ByIoctl
                .snapshot(&work, &volume.join("home").join(&name), true)
                .unwrap();
            left.insert(name, ());
        }
        // The newest one shares all its content with the work folder.
        while left.len() > 1 {
            let count = 1 + usize::try_from(dice.below(2)).unwrap();
            let mut set = Vec::new();
            for _ in 0..count.min(left.len() - 1) {
                let at = usize::try_from(dice.below(left.len() as u64 - 1)).unwrap();
                let name = left.keys().nth(at).unwrap().clone();
                left.remove(&name);
                set.push(name);
            }
            let before = free_bytes(&volume);
            let report = costs(&volume, &set);
            assert!(report.measured && !report.exact);
            let expected = report.removal.unwrap().frees_bytes;
            for name in &set {
                ByIoctl.delete(&volume.join("home").join(name)).unwrap();
            }
            let freed = free_bytes(&volume) - before;
            let bound = expected / 50 + NODES_BYTES;
            assert!(
                freed.abs_diff(expected) <= bound,
                "volume {volume_number} of seed {first}: {set:?} frees {freed}, not {expected}"
            );
        }
        drop(mounted);
    }
}
