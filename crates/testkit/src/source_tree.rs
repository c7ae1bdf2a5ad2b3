//! Source trees made from a seed: any number of plain files, and the odd ones of [`crate::tree`].

use std::fs;
use std::path::{Path, PathBuf};

use crate::dice::Dice;
use crate::tree::{bytes, make_odd_tree, set_mode, set_owner, set_time, set_xattr};

/// How many files of which size a tree holds, beside the odd ones.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Files of up to 6 KiB.
    pub small_files: u64,
    /// Files of 64 to 192 KiB.
    pub middle_files: u64,
    /// Files of 32 MiB.
    pub large_files: u64,
}

/// Fills `root` from `seed`: the files of `shape` in folders of some hundred, and one folder `odd`
/// with everything that is not a plain file.
///
/// # Panics
/// When a file can't be made.
pub fn make(root: &Path, shape: Shape, seed: u64) {
    let dice = &mut Dice::new(seed);
    for number in 0..shape.small_files {
        let path = place(root, "small", number, 400);
        let len = dice.below(6 << 10);
        write(&path, dice, len, number);
    }
    for number in 0..shape.middle_files {
        let path = place(root, "middle", number, 100);
        let len = (64 << 10) + dice.below(128 << 10);
        write(&path, dice, len, number);
    }
    for number in 0..shape.large_files {
        let path = place(root, "large", number, 100);
        write(&path, dice, 32 << 20, number);
    }
    let odd = root.join("odd");
    fs::create_dir(&odd).expect("a folder");
    make_odd_tree(&odd).expect("odd files can be made here");
    set_folder_times(root, 1_500_000_000);
}

/// Fills `root` from `seed` with `files` files in folders of uneven depth, as a source tree has
/// them: most are small, a few large (a log-normal of median 9 KB and mean 30 KB; the same as the
/// load `source` of `make bench`, which has 5,000).
///
/// # Panics
/// When a file can't be made.
pub fn make_source_like(root: &Path, files: u64, seed: u64) {
    let dice = &mut Dice::new(seed);
    let mut folders = vec![root.join("top")];
    for number in 1..(files / 12).max(2) {
        let above = &folders[usize::try_from(dice.below(number)).expect("small")];
        folders.push(above.join(format!("folder-{number}")));
    }
    for folder in &folders {
        fs::create_dir_all(folder).expect("a folder");
    }
    for number in 0..files {
        let folder = &folders[usize::try_from(dice.below(folders.len() as u64)).expect("small")];
        let len = source_file_len(dice);
        write(&folder.join(format!("file-{number}")), dice, len, number);
    }
    set_folder_times(root, 1_500_000_000);
}

fn source_file_len(dice: &mut Dice) -> u64 {
    // Of twelve even throws the sum is normal enough, with a variance of one.
    let sum: u64 = (0..12).map(|_| dice.below(1 << 20)).sum();
    #[expect(clippy::cast_precision_loss, reason = "a size by chance")]
    let normal = sum as f64 / f64::from(1 << 20) - 6.0;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive and below 8 MiB"
    )]
    let len = (9.1 + 1.55 * normal).exp().min(8e6) as u64;
    len
}

/// Gives about a third of the plain files below `root` new content, removes a few, adds a few.
///
/// # Panics
/// When a file can't be changed.
pub fn change_source_like(root: &Path, dice: &mut Dice, round: u64) {
    let mut waiting = vec![root.to_owned()];
    let mut folders = Vec::new();
    while let Some(folder) = waiting.pop() {
        let entries = fs::read_dir(&folder).expect("a folder").flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let kind = fs::symlink_metadata(&path).expect("an entry").file_type();
            if kind.is_dir() && path.file_name() != Some("odd".as_ref()) {
                waiting.push(path);
            } else if !kind.is_file() {
            } else if dice.percent(2) {
                fs::remove_file(&path).expect("a file");
            } else if dice.percent(33) {
                let len = source_file_len(dice);
                write(&path, dice, len, round);
            }
        }
        folders.push(folder);
    }
    for number in 0..20 {
        let folder = &folders[usize::try_from(dice.below(folders.len() as u64)).expect("small")];
        let len = source_file_len(dice);
        write(
            &folder.join(format!("new-{round}-{number}")),
            dice,
            len,
            round,
        );
    }
}

/// Bytes that don't compress.
#[must_use]
pub fn random(dice: &mut Dice, len: u64) -> Vec<u8> {
    bytes(dice, usize::try_from(len).expect("fits in memory"))
}

fn place(root: &Path, kind: &str, number: u64, in_one_folder: u64) -> PathBuf {
    let folder = root
        .join(kind)
        .join(format!("{:03}", number / in_one_folder));
    if number.is_multiple_of(in_one_folder) {
        fs::create_dir_all(&folder).expect("a folder");
    }
    folder.join(format!("{kind} file {number}"))
}

/// Some variety in everything that a copy must keep; nanoseconds included.
fn write(path: &Path, dice: &mut Dice, len: u64, number: u64) {
    fs::write(path, random(dice, len)).expect("a new file");
    let pick = u32::try_from(number).expect("a small number");
    if number.is_multiple_of(3) {
        set_owner(path, 1000 + pick % 7, 100 + pick % 5).expect("chown");
    }
    let modes = [0o644, 0o600, 0o755, 0o440, 0o4755];
    set_mode(path, modes[pick as usize % modes.len()]).expect("chmod");
    if number.is_multiple_of(50) {
        set_xattr(path, "user.sprat.test", &random(dice, 24)).expect("user xattrs work here");
    }
    let nanoseconds = i64::try_from(dice.below(1_000_000_000)).expect("below a second");
    set_time(path, 1_400_000_000 + i64::from(pick), nanoseconds).expect("utimensat");
}

/// Folders come last: making a file in one sets its time.
fn set_folder_times(folder: &Path, seconds: i64) {
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.file_name() != "odd" {
            set_folder_times(&entry.path(), seconds + 1);
        }
    }
    set_time(folder, seconds, 5).expect("utimensat");
}
