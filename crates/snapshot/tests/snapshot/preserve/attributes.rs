//! Random files of every kind whose attributes change many times.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sprat_snapshot::SnapshotError;
use sprat_testkit::compare::assert_same;
use sprat_testkit::dice::Dice;
use sprat_testkit::requires;
use sprat_testkit::tree::{acl, bytes, set_mode, set_owner, set_time, set_xattr};

use super::{free_bytes, next};
use crate::folder::{Bench, SmallExt4, loop_missing, take_into};

/// The number of files in the short form and in the long one (`SPRAT_TORTURE_ROUNDS`).
const FILES: [u64; 2] = [100, 10_000];
const ROUNDS: [u64; 2] = [3, 8];
const BLOCK_BYTES: u64 = 4096;
/// The length of the largest files, which are mostly a hole.
const HUGE_BYTES: [u64; 2] = [128 << 20, 512 << 20];

struct Files {
    root: PathBuf,
    dice: Dice,
    /// Each file with the number of its blocks that have data.
    blocks: BTreeMap<PathBuf, u64>,
    names: Vec<PathBuf>,
}

impl Files {
    fn make(root: PathBuf, seed: u64, count: u64, huge_bytes: u64) -> Self {
        let mut this = Self {
            root,
            dice: Dice::new(seed),
            blocks: BTreeMap::new(),
            names: Vec::new(),
        };
        for number in 0..count {
            let folder = this.root.join(format!("{}", number / 100));
            fs::create_dir_all(&folder).unwrap();
            let path = folder.join(format!("file {number}"));
            let huge = number % 1000 == 7;
            match this.dice.below(10) {
                _ if huge => this.sparse(&path, huge_bytes),
                0..=4 => this.dense(&path),
                5..=7 => {
                    let len = 1 + this.dice.below(1 << 20);
                    this.sparse(&path, len);
                }
                _ => this.link(&path),
            }
            this.attributes(&path);
            this.names.push(path);
        }
        this
    }

    fn dense(&mut self, path: &Path) {
        let len = usize::try_from(self.dice.below(40_000)).unwrap();
        fs::write(path, bytes(&mut self.dice, len)).unwrap();
        self.blocks
            .insert(path.to_owned(), (len as u64).div_ceil(BLOCK_BYTES));
    }

    /// Writes up to three pieces of content within `len` bytes.
    fn sparse(&mut self, path: &Path, len: u64) {
        let mut file = File::create(path).unwrap();
        file.set_len(len).unwrap();
        let mut held = std::collections::BTreeSet::new();
        for _ in 0..self.dice.below(4) {
            let at = self.dice.below(len);
            let piece = (1 + self.dice.below(9000)).min(len - at);
            file.seek(SeekFrom::Start(at)).unwrap();
            // No byte of it is 0.
            let piece_bytes = vec![1; usize::try_from(piece).unwrap()];
            file.write_all(&piece_bytes).unwrap();
            held.extend(at / BLOCK_BYTES..=(at + piece - 1) / BLOCK_BYTES);
        }
        self.blocks.insert(path.to_owned(), held.len() as u64);
    }

    fn link(&mut self, path: &Path) {
        let Some(other) = self.any() else {
            return self.dense(path);
        };
        fs::hard_link(&other, path).unwrap();
        self.blocks.insert(path.to_owned(), self.blocks[&other]);
    }

    fn any(&mut self) -> Option<PathBuf> {
        let count = self.names.len() as u64;
        (count > 0).then(|| self.names[usize::try_from(self.dice.below(count)).unwrap()].clone())
    }

    /// Changes one or more attributes, and never the content.
    fn attributes(&mut self, path: &Path) {
        let user = 1000 + u32::try_from(self.dice.below(50)).unwrap();
        match self.dice.below(5) {
            0 => set_owner(path, user, user + 1).unwrap(),
            1 => {
                let value = vec![b'x'; usize::try_from(self.dice.below(60)).unwrap()];
                set_xattr(path, "user.note", &value).unwrap();
            }
            2 => set_xattr(path, "system.posix_acl_access", &acl(user, 5)).unwrap(),
            3 => set_time(path, 1_500_000_000 + i64::from(user), 7).unwrap(),
            _ => {
                let mode = 0o400 + u32::try_from(self.dice.below(0o400)).unwrap();
                set_mode(path, mode).unwrap();
            }
        }
    }

    /// Changes attributes of a fifth of the files. Returns the size of their content.
    fn change(&mut self) -> u64 {
        let mut changed = BTreeMap::new();
        for _ in 0..self.names.len() / 5 {
            let path = self.any().unwrap();
            self.attributes(&path);
            changed.insert(fs::metadata(&path).unwrap().ino(), self.blocks[&path]);
        }
        changed.values().sum::<u64>() * BLOCK_BYTES
    }

    /// Checks that no file of the snapshot uses more than its content, rounded to whole blocks, and one
    /// block for attributes.
    fn holes_are_kept(&self, tree: &Path) {
        for (path, blocks) in &self.blocks {
            let kept = tree.join(path.strip_prefix(&self.root).unwrap());
            let taken = fs::metadata(&kept).unwrap().blocks() * 512 / BLOCK_BYTES;
            assert!(
                taken <= blocks + 1,
                "{}: {taken} blocks, not {blocks}",
                kept.display()
            );
        }
    }
}

/// A description of a tree, to compare with later: each name with inode, attributes and times.
fn sheet(tree: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut todo = vec![tree.to_owned()];
    while let Some(path) = todo.pop() {
        let about = fs::symlink_metadata(&path).unwrap();
        if about.is_dir() {
            todo.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        let attribute = |name: &str| {
            let mut value = vec![0; 256];
            let len = rustix::fs::lgetxattr(&path, name, &mut value).unwrap_or(0);
            value.truncate(len);
            value
        };
        lines.push(format!(
            "{} {} {:o} {}:{} {}.{} {} {:?} {:?}",
            path.display(),
            about.ino(),
            about.mode(),
            about.uid(),
            about.gid(),
            about.mtime(),
            about.mtime_nsec(),
            about.len(),
            attribute("user.note"),
            attribute("system.posix_acl_access"),
        ));
    }
    lines.sort();
    lines
}

#[test]
fn attributes_of_random_files_change_and_holes_and_older_snapshots_stay() {
    requires!(loop_missing());
    let long = usize::from(std::env::var_os("SPRAT_TORTURE_ROUNDS").is_some());
    let seed = std::env::var("SPRAT_TORTURE_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, ["64M", "4G"][long], &["-b", "4096"]);
    let mut files = Files::make(bench.source(), seed, FILES[long], HUGE_BYTES[long]);
    let mut older = Vec::new();
    for round in 0..ROUNDS[long] {
        let content = if round == 0 { 0 } else { files.change() };
        let before = free_bytes(&disk.at);
        let (report, tree) = next(&bench, &disk);
        assert!(report.record.complete, "{:?}", report.record.messages);
        assert_same(&bench.source(), &tree);
        files.holes_are_kept(&tree);
        if round > 0 {
            let grown = before - free_bytes(&disk.at);
            println!(
                "round {round}: {content} bytes of content had new attributes; {grown} bytes more"
            );
        }
        let state = sheet(&tree);
        older.push((tree, state));
    }
    // Without space for what must be written again, the run fails, and nothing else changes.
    let large = bench.source().join("large");
    let room = free_bytes(&disk.at) / 2 + (8 << 20);
    let content = bytes(
        &mut files.dice,
        usize::try_from(room.min(512 << 20)).unwrap(),
    );
    fs::write(&large, content).unwrap();
    next(&bench, &disk);
    let filler = disk.at.join("filler");
    let file = File::create(&filler).unwrap();
    let (mut at, mut piece) = (0, 1 << 30);
    while piece >= 1 << 20 {
        let none = rustix::fs::FallocateFlags::empty();
        let fits = free_bytes(&disk.at) > piece + (4 << 20);
        if fits && rustix::fs::fallocate(&file, none, at, piece).is_ok() {
            at += piece;
        } else {
            piece /= 2;
        }
    }
    set_mode(&large, 0o600).unwrap();
    let error = take_into(&disk.at, &bench.spec()).unwrap_err();
    assert!(matches!(error, SnapshotError::VolumeFull { .. }), "{error}");
    for (tree, state) in &older {
        assert_eq!(&sheet(tree), state, "{}", tree.display());
    }
    // With enough space the same run is complete.
    drop(file);
    fs::remove_file(&filler).unwrap();
    fs::write(&large, "small now").unwrap();
    let (report, tree) = next(&bench, &disk);
    assert!(report.record.complete);
    assert_same(&bench.source(), &tree);
    for (tree, state) in &older {
        assert_eq!(&sheet(tree), state, "{}", tree.display());
    }
}
