//! What one rsync is run with.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use super::stillness::STILL_MAX;
use crate::mounts::pattern_for;

/// How long rsync may take to end by itself after SIGTERM; it removes its temporary file meanwhile.
const TERM_PATIENCE: Duration = Duration::from_secs(10);

/// Which side of the run lies on the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// rsync writes to the volume; unread source files can be forgiven.
    IntoVolume,
    /// rsync reads from the volume; nothing can be forgiven.
    OutOfVolume,
}

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Invocation {
    pub(crate) arguments: Vec<OsString>,
    pub(crate) folder: PathBuf,
    /// The place written to, asked for free room when rsync says that it is full.
    pub(crate) written_to: PathBuf,
    pub(crate) side: Side,
    pub(crate) term_patience: Duration,
    /// A run in which nothing moves for so long is ended.
    pub(crate) still_max: Duration,
    /// The run has [`super::ITEM_FORMAT`]; files of this time and younger are listed in
    /// [`super::Outcome::recent`]. The time is UTC and has the form of rsync's `%M`.
    pub(crate) recent_from: Option<String>,
    /// A [`super::Guard`] watches the volume.
    pub(crate) guarded: bool,
    /// What it reads from its standard input, for `--files-from=-`.
    pub(crate) input: Option<Vec<u8>>,
    /// Files of the source that have several names are listed in [`super::Outcome::several_names`].
    pub(crate) lists_names: bool,
    /// The run has [`super::ITEM_FORMAT`], and its lines are listed in [`super::Outcome::changes`] as
    /// they are.
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
            term_patience: TERM_PATIENCE,
            still_max: STILL_MAX,
            recent_from: None,
            guarded: false,
            input: None,
            lists_names: false,
            lists_changes: false,
        }
    }

    /// Has `--files-from=-` with `--from0` read `names`. rsync takes one that begins with `#` or `;` for a
    /// comment, also with `--from0` (io.c, read_line), so each begins with `./`.
    pub(crate) fn names_from<'p>(&mut self, names: impl Iterator<Item = &'p Path>) {
        let mut list = Vec::new();
        for name in names {
            list.extend_from_slice(b"./");
            list.extend_from_slice(name.as_os_str().as_bytes());
            list.push(0);
        }
        self.input = Some(list);
    }

    /// Keeps rsync away from the file `source`, absolute, whatever other patterns say.
    pub(crate) fn leave_out(&mut self, source: &Path) {
        let mut exclude = OsString::from("--exclude=");
        exclude.push(pattern_for(source, false));
        // The first rule that matches counts.
        self.arguments.insert(0, exclude);
    }

    /// What rsync reads.
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
