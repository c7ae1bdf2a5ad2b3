//! The files of a config: which there are, and how they are read.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use sprat_session::trusted_file;

use super::ConfigPlaces;
use super::mistake::{Mistake, Stops};
use super::reader::File;

/// A longer file is not a config.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// More files are not a config.
const FILES_MAX: usize = 1000;

/// The config file that a person names (absolute, and must exist), and no other. Else those of the default
/// config.
pub fn files_of(named: Option<&Path>, places: &ConfigPlaces) -> Vec<PathBuf> {
    match named {
        Some(path) => vec![path.to_owned()],
        None => default_files(places),
    }
}

/// The files of the default config, as far as they are there: `sprat.toml` and those beside it.
pub fn default_files(places: &ConfigPlaces) -> Vec<PathBuf> {
    let Some(folder) = &places.folder else {
        return Vec::new();
    };
    let mut files = files_beside(&folder.join("sprat.toml"));
    // Only one that surely isn't there is left out: what can't be read is a mistake.
    if let Err(error) = files[0].symlink_metadata()
        && error.kind() == io::ErrorKind::NotFound
    {
        files.remove(0);
    }
    files
}

/// The file, then `conf.d/*.toml` beside it in the order of their bytes.
fn files_beside(main: &Path) -> Vec<PathBuf> {
    let folder = main.parent().unwrap_or(Path::new("/")).join("conf.d");
    let is_config = |name: &OsStr| {
        let bytes = name.as_bytes();
        bytes.ends_with(b".toml") && !bytes.starts_with(b".")
    };
    let mut files = vec![main.to_owned()];
    match std::fs::read_dir(&folder) {
        Ok(entries) => {
            let names = entries.flatten().map(|entry| entry.file_name());
            let mut names: Vec<_> = names.filter(|name| is_config(name)).collect();
            names.sort();
            names.truncate(FILES_MAX);
            files.extend(names.iter().map(|name| folder.join(name)));
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) => {}
        // Reading it reports why it can't be read.
        Err(_) => files.push(folder),
    }
    files
}

/// Reads the files. One that can't be read is a mistake, and costs what stands in it.
pub(super) fn read(files: &[PathBuf], places: &ConfigPlaces) -> (Vec<File>, Vec<Mistake>) {
    let (mut read, mut unread) = (Vec::new(), Vec::new());
    for path in files {
        match read_one(path, places) {
            Ok(text) => read.push(File {
                path: path.clone(),
                text,
            }),
            Err(error) => unread.push(Mistake {
                file: path.clone(),
                line: None,
                what: error.to_string(),
                likely: None,
                stops: Stops::File,
            }),
        }
    }
    (read, unread)
}

/// If others can write to a file or replace it, it is refused for root: it names commands that root runs.
fn read_one(path: &Path, places: &ConfigPlaces) -> io::Result<String> {
    let file = trusted_file::open(path)?;
    let refuse = |why: &str| Err(io::Error::other(why.to_owned()));
    if places.root
        && let Some(why) = trusted_file::writable_by_others(path)?
    {
        return refuse(&format!(
            "other users than root can write to this file or replace it, and it contains commands that \
             root runs: {why} (chown root, chmod go-w)"
        ));
    }
    let mut text = String::new();
    file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return refuse("longer than 1 MiB");
    }
    Ok(text)
}
