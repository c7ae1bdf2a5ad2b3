//! A source that changes at random each day, and what it was on each of them, read from the source alone.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, listxattr, mknodat};
use sprat_inside::{Change, Kind};
use sprat_testkit::dice::Dice;
use sprat_testkit::tree::{bytes, set_mode, set_owner, set_time, set_xattr};

/// What a path was on one day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    pub kind: Kind,
    pub bytes: u64,
    pub modified: (i64, i64),
    link: Option<PathBuf>,
    device: u64,
    pub mode: u32,
    owner: (u32, u32),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// All paths of one day, whole.
pub type Day = BTreeMap<PathBuf, State>;

impl State {
    fn of(path: &Path) -> Self {
        let about = fs::symlink_metadata(path).unwrap();
        let is = about.file_type();
        let kind = match () {
            () if is.is_dir() => Kind::Folder,
            () if is.is_symlink() => Kind::Link,
            () if is.is_fifo() => Kind::Fifo,
            () if is.is_socket() => Kind::Socket,
            () if is.is_block_device() => Kind::BlockDevice,
            () if is.is_char_device() => Kind::CharacterDevice,
            () => Kind::File,
        };
        let mut xattrs = Vec::new();
        if matches!(kind, Kind::File | Kind::Folder) {
            let mut names = vec![0_u8; 4096];
            let length = listxattr(path, &mut names[..]).unwrap();
            for name in names[..length].split(|byte| *byte == 0) {
                if !name.is_empty() {
                    let mut value = vec![0_u8; 4096];
                    let length = rustix::fs::getxattr(path, name, &mut value[..]).unwrap();
                    xattrs.push((name.to_vec(), value[..length].to_vec()));
                }
            }
            xattrs.sort();
        }
        Self {
            kind,
            bytes: if kind == Kind::File { about.len() } else { 0 },
            // The time of a folder follows its names.
            modified: match kind {
                Kind::Folder => (0, 0),
                _ => (about.mtime(), about.mtime_nsec()),
            },
            link: (kind == Kind::Link).then(|| fs::read_link(path).unwrap()),
            device: about.rdev(),
            mode: about.mode() & 0o7777,
            owner: (about.uid(), about.gid()),
            xattrs,
        }
    }

    /// How a later state differs.
    fn change(&self, later: &Self) -> Option<Change> {
        if self == later {
            return None;
        }
        let content = |state: &Self| {
            let file = (state.kind == Kind::File).then_some((state.bytes, state.modified));
            (file, state.link.clone(), state.device)
        };
        Some(match () {
            () if self.kind != later.kind => Change::Kind,
            () if content(self) != content(later) => Change::Content,
            () => Change::Attributes,
        })
    }
}

/// How the state of a path differs between two days.
pub fn change(before: Option<&State>, after: Option<&State>) -> Option<Change> {
    match (before, after) {
        (None, None) => None,
        (None, Some(_)) => Some(Change::New),
        (Some(_), None) => Some(Change::Gone),
        (Some(before), Some(after)) => before.change(after),
    }
}

/// Everything below a folder, and the folder.
pub fn read(root: &Path) -> Day {
    let mut day = Day::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let state = State::of(&path);
        if state.kind == Kind::Folder {
            let names = fs::read_dir(&path).unwrap();
            waiting.extend(names.map(|name| name.unwrap().path()));
        }
        day.insert(path, state);
    }
    day
}

/// Changes the source as people and programs do.
pub fn live_a_day(root: &Path, dice: &mut Dice) {
    for _ in 0..8 + dice.below(10) {
        act(root, dice);
    }
}

fn act(root: &Path, dice: &mut Dice) {
    let all: Vec<(PathBuf, State)> = read(root).into_iter().collect();
    let of = |kind: Kind| -> Vec<&PathBuf> {
        let those = all
            .iter()
            .filter(|(path, state)| state.kind == kind && path != root);
        those.map(|(path, _)| path).collect()
    };
    let pick = |dice: &mut Dice, from: &[&PathBuf]| -> Option<PathBuf> {
        let count = u64::try_from(from.len()).unwrap();
        (count > 0).then(|| from[usize::try_from(dice.below(count)).unwrap()].clone())
    };
    let mut folders = of(Kind::Folder);
    folders.push(&all[0].0);
    let files = of(Kind::File);
    let others: Vec<&PathBuf> = all[1..].iter().map(|(path, _)| path).collect();
    let into = pick(dice, &folders).unwrap();
    let new = into.join(odd_name(dice));
    if fs::symlink_metadata(&new).is_ok() {
        return;
    }
    match (dice.below(14), pick(dice, &files), pick(dice, &others)) {
        (0 | 1, ..) => write(&new, dice),
        (2, ..) => fs::create_dir(&new).unwrap(),
        (3, ..) => symlink(OsStr::from_bytes(&target(dice)), &new).unwrap(),
        (4, Some(file), _) => fs::hard_link(file, &new).unwrap(),
        (5 | 6, Some(file), _) => write(&file, dice),
        (7, Some(file), _) => {
            let file = File::options().append(true).open(file);
            file.unwrap().write_all(b"one line more\n").unwrap();
        }
        (8, _, Some(path)) => {
            // A folder can't move into itself.
            if !new.starts_with(&path) {
                fs::rename(path, new).unwrap();
            }
        }
        (9, _, Some(path)) => remove(&path),
        (10, _, Some(path)) => {
            // Another kind under the same name.
            remove(&path);
            match dice.below(4) {
                0 => write(&path, dice),
                1 => fs::create_dir(&path).unwrap(),
                2 => symlink(OsStr::from_bytes(&target(dice)), &path).unwrap(),
                _ => mknodat(CWD, &path, FileType::Fifo, Mode::from(0o600), 0).unwrap(),
            };
        }
        (11, Some(file), _) => {
            set_mode(&file, 0o600 + u32::try_from(dice.below(64)).unwrap()).unwrap();
        }
        (12, _, Some(path)) => set_owner(&path, u32::try_from(dice.below(5)).unwrap(), 7).unwrap(),
        (_, Some(file), _) => set_xattr(&file, "user.note", &target(dice)).unwrap(),
        _ => set_time(root, 1_000_000, 0).unwrap(),
    }
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path).unwrap().is_dir() {
        true => fs::remove_dir_all(path).unwrap(),
        false => fs::remove_file(path).unwrap(),
    }
}

/// New content, sometimes with a hole.
fn write(path: &Path, dice: &mut Dice) {
    let length = usize::try_from(dice.below(9000)).unwrap();
    let content = bytes(dice, length);
    let file = File::create(path).unwrap();
    if dice.percent(20) {
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&content, 600_000).unwrap();
    } else {
        file.write_all_at(&content, 0).unwrap();
    }
}

fn target(dice: &mut Dice) -> Vec<u8> {
    format!("../{}", dice.below(1000)).into_bytes()
}

fn odd_name(dice: &mut Dice) -> PathBuf {
    const ODD: [&[u8]; 12] = [
        b"plain.txt",
        b"two words",
        b"-dash",
        b"new\nline",
        b"caf\xe9",
        "\u{fc}ml\u{e4}ut".as_bytes(),
        b"back\\slash\\#012",
        b"*star?[x]{y}",
        b"trailing ",
        b"\x1b[31mred",
        b"..hidden",
        b"#hash:colon",
    ];
    let mut name = ODD[usize::try_from(dice.below(12)).unwrap()].to_vec();
    if dice.percent(60) {
        name.extend(dice.below(40).to_string().bytes());
    }
    PathBuf::from(OsStr::from_bytes(&name))
}
