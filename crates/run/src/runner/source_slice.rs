//! What a slice of the sources found, in words.

use sprat_session::{Exit, Failure, text};
use sprat_snapshot::NameList;

use super::named_files::{NAMES_SHOWN, naming};

/// Source files that were read again.
#[derive(Debug, Clone)]
pub struct SourceSlice {
    /// Their job.
    pub job: String,
    /// How many.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files that differ, and that the next slice reads again.
    pub in_doubt: u64,
    /// Files that changed silently, escaped. They were not reported before.
    pub silent: Vec<String>,
    /// Files that somebody has written to and whose time was set back, escaped.
    pub rewritten: NameList,
}

/// What is wrong, if anything is.
pub(super) fn failure(slice: &SourceSlice) -> Option<Failure> {
    if slice.silent.is_empty() {
        return None;
    }
    let files = text::counted(slice.silent.len() as u64, "source file", "source files");
    let failure = Failure::new(
        Exit::Damaged,
        format!("{}: the content of {files} changed silently", slice.job),
    );
    Some(naming(failure, slice.silent.iter()).with_hint(format!(
        "nobody has written to them, so the disk, its cable or the memory may be bad. The snapshots have the \
         content from before, and one of them is kept. Restore the files, then run `sprat accept {}`",
        slice.job
    )))
}

/// What the slices did, as text.
pub(super) fn sources_text(slices: &[SourceSlice]) -> String {
    let mut said = String::new();
    for slice in slices.iter().filter(|slice| slice.files > 0) {
        said.push_str(&format!(
            "{}: read {} ({}) again{}\n",
            slice.job,
            text::counted(slice.files, "source file", "source files"),
            text::bytes(slice.bytes),
            match slice.in_doubt {
                0 => String::new(),
                some => {
                    format!("; {some} differ from the backup, and the next slice reads them again")
                }
            }
        ));
    }
    for slice in slices.iter().filter(|slice| !slice.rewritten.is_empty()) {
        let names = slice.rewritten.names.iter().take(NAMES_SHOWN);
        let names: Vec<String> = names.map(|name| text::harmless(name)).collect();
        said.push_str(&format!(
            "{}: {} from the backup and kept the size and time, and somebody wrote to them or set their time: {}. \
             `sprat backup {} --checksum` stores them\n",
            slice.job,
            text::counted(slice.rewritten.count, "file differs", "files differ"),
            names.join(", "),
            slice.job,
        ));
    }
    said
}
