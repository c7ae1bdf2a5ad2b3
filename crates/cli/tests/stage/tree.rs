//! Source trees made from a seed: any number of plain files, and the testkit's odd ones.

use std::fs;
use std::path::{Path, PathBuf};

use sprat_testkit::dice::Dice;
use sprat_testkit::tree::{bytes, make_odd_tree, set_mode, set_owner, set_time, set_xattr};

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

/// Bytes that don't compress.
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
