//! Tries whether this machine's rsync links unchanged files. Some distributions' back-ports of rsync's
//! fixes of 2026 ignore `--link-dest` without an error (RsyncProject/rsync issue 915), and a version
//! number does not show that.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::finding::{Finding, State};
use crate::text;

const WHAT: &str = "rsync --link-dest";

/// Makes two copies of a file, of which the second must be a link to the first.
pub(super) fn links() -> Finding {
    match try_links() {
        Ok(Outcome::Linked) => Finding::new(WHAT, State::Fine, "links what did not change"),
        Ok(Outcome::Copied) => Finding::new(
            WHAT,
            State::Missing,
            "is ignored: each backup would copy and store every file again",
        )
        .hint("install another release of rsync"),
        Ok(Outcome::Failed(why)) => {
            Finding::new(WHAT, State::Missing, format!("a copy fails: {why}"))
                .hint("install rsync again: it copies")
        }
        Err(error) => Finding::new(WHAT, State::Weak, format!("could not be tried: {error}")),
    }
}

enum Outcome {
    Linked,
    Copied,
    Failed(String),
}

/// A folder that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn make() -> io::Result<Self> {
        let name = format!("sprat-doctor-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        // Fails where somebody else was faster.
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn try_links() -> io::Result<Outcome> {
    let scratch = Scratch::make()?;
    let at = |name: &str| scratch.0.join(name);
    for folder in ["source", "1", "2"] {
        fs::create_dir(at(folder))?;
    }
    fs::write(at("source/file"), "unchanged\n")?;
    for (copy, link_dest) in [("1", None), ("2", Some("--link-dest=../1"))] {
        if let Some(why) = copied(&scratch.0, copy, link_dest)? {
            return Ok(Outcome::Failed(why));
        }
    }
    let below = at("source/file");
    let below = below.strip_prefix("/").unwrap_or(&below);
    let inode = |copy: &str| Ok::<_, io::Error>(fs::metadata(at(copy).join(below))?.ino());
    Ok(if inode("1")? == inode("2")? {
        Outcome::Linked
    } else {
        Outcome::Copied
    })
}

/// Runs rsync as a backup does, in short. Returns why it failed.
fn copied(scratch: &Path, copy: &str, link_dest: Option<&str>) -> io::Result<Option<String>> {
    let ran = Command::new("rsync")
        .args([
            "-aHAXXS",
            "--numeric-ids",
            "--relative",
            "--modify-window=-1",
        ])
        .args(link_dest)
        .arg("--")
        .arg(scratch.join("source"))
        .arg(format!("./{copy}/"))
        .current_dir(scratch)
        .stdin(Stdio::null())
        .output()?;
    if ran.status.success() {
        return Ok(None);
    }
    let said = String::from_utf8_lossy(&ran.stderr);
    let first = said.lines().next().unwrap_or_default();
    Ok(Some(format!(
        "{}: {}",
        ran.status,
        text::harmless_within(first, 200)
    )))
}
