//! How one rsync is run.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use super::listed::Lists;
use super::output::ITEM_FORMAT;
use super::stillness::STILL_MAX;
use crate::census::Walk;
use crate::file_listener::FileListener;
use crate::long_path::lstat;
use crate::mounts::pattern_for;
use crate::scan_rules::ScanRules;

/// How long rsync may take to end after SIGTERM. It removes its temporary file in that time.
const TERM_PATIENCE: Duration = Duration::from_secs(10);

/// The options of every run of rsync that copies into a snapshot.
pub(crate) const TRANSFER_OPTIONS: [&str; 8] = [
    // What it preserves, including hard links.
    "-aHAXXS",
    "--numeric-ids",
    "--relative",
    // Without it times are compared by the second. A file that changed twice within one second would be
    // linked to its older content.
    "--modify-window=-1",
    "--no-human-readable",
    "--info=progress2,stats2,flist0,name0",
    ITEM_FORMAT,
    "--outbuf=L",
];

/// Which side of the run lies on the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// rsync writes to the volume. Unread source files make the snapshot incomplete.
    IntoVolume,
    /// rsync reads from the volume. An unread file is a failure.
    OutOfVolume,
}

/// The arguments and settings of one run.
#[derive(Debug, Clone)]
pub(crate) struct Invocation {
    pub(crate) arguments: Vec<OsString>,
    pub(crate) folder: PathBuf,
    /// The destination. Its free space is checked when rsync reports a full disk.
    pub(crate) written_to: PathBuf,
    pub(crate) side: Side,
    /// The source is on another host. No path of it is a path of this machine.
    pub(crate) remote: bool,
    pub(crate) term_patience: Duration,
    /// How long the run may make no progress before it is stopped.
    pub(crate) still_max: Duration,
    /// Files of this time or younger are listed in [`super::Outcome::recent`]. The time is in UTC, in
    /// the form of rsync's `%M`. Needs [`super::ITEM_FORMAT`].
    pub(crate) recent_from: Option<String>,
    /// Receives each regular file that is written, if `recent_from` is set.
    pub(crate) listener: FileListener,
    /// Whether a [`super::Guard`] watches the volume.
    pub(crate) guarded: bool,
    /// The mount of the volume, if no link on it need be followed (see [`super::no_links`]). Not together with
    /// `--files-from`.
    pub(crate) no_links_on: Option<PathBuf>,
    /// rsync's standard input, for `--files-from=-` or `--exclude-from=-`.
    pub(crate) input: Option<Vec<u8>>,
    /// Whether source files with several names are listed in [`super::Outcome::several_names`].
    pub(crate) lists_names: bool,
    /// The rules by which a dry run fills [`super::Outcome::met`].
    pub(crate) scan: Option<ScanRules>,
    /// Counts the files that such a dry run meets.
    pub(crate) census: Option<Walk>,
    /// With what a dry run fills [`super::Outcome::listed`].
    pub(crate) lists: Option<Lists>,
    /// Whether the lines of [`super::ITEM_FORMAT`] are listed in [`super::Outcome::changes`] as they
    /// are.
    pub(crate) lists_changes: bool,
}

impl Invocation {
    pub(crate) fn new(
        arguments: Vec<OsString>,
        folder: &Path,
        written_to: &Path,
        side: Side,
    ) -> Self {
        Self {
            arguments,
            folder: folder.to_owned(),
            written_to: written_to.to_owned(),
            side,
            remote: false,
            term_patience: TERM_PATIENCE,
            still_max: STILL_MAX,
            recent_from: None,
            listener: FileListener::default(),
            guarded: false,
            no_links_on: None,
            input: None,
            lists_names: false,
            scan: None,
            census: None,
            lists: None,
            lists_changes: false,
        }
    }

    /// Sets the input for `--files-from=-` with `--from0`. Each name gets the prefix `./`, because rsync
    /// treats a name that begins with `#` or `;` as a comment, even with `--from0` (io.c, read_line).
    pub(crate) fn names_from<'p>(&mut self, names: impl Iterator<Item = &'p Path>) {
        let mut list = Vec::new();
        for name in names {
            list.extend_from_slice(b"./");
            list.extend_from_slice(name.as_os_str().as_bytes());
            list.push(0);
        }
        self.input = Some(list);
    }

    /// Excludes the file `source` (absolute), whatever other patterns say.
    pub(crate) fn leave_out(&mut self, source: &Path) {
        let mut exclude = OsString::from("--exclude=");
        exclude.push(pattern_for(source, false));
        // The first matching rule counts.
        self.arguments.insert(0, exclude);
    }

    /// Whether something else than a folder is at `name`, which is relative to the destination.
    pub(super) fn is_no_folder(&self, name: &[u8]) -> bool {
        let Some(destination) = self.arguments.last() else {
            return false;
        };
        let at = self.folder.join(destination).join(OsStr::from_bytes(name));
        lstat(&at).is_ok_and(|about| !about.is_dir())
    }

    /// rsync's standard input.
    pub(super) fn stdin(&self) -> io::Result<Stdio> {
        let Some(input) = &self.input else {
            return Ok(Stdio::null());
        };
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut file = std::fs::File::from(rustix::fs::memfd_create("names", flags)?);
        io::Write::write_all(&mut file, input)?;
        io::Seek::rewind(&mut file)?;
        Ok(file.into())
    }
}
