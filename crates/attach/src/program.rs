//! Finds and runs system programs, and keeps their error messages.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::text::printable;
use crate::{AttachError, process, sys};

/// Where system programs are, even if a user's PATH lacks these folders.
const SYSTEM_FOLDERS: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";

/// The folders that the PATH of a user or of cron lacks.
const ADMIN_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// The PATH if there is none (as `execvp` uses it; the folders for admins are added).
const PATH_DEFAULT: &str = "/usr/local/bin:/usr/bin:/bin";

/// How much of a program's stderr is kept. The rest is read and dropped.
const STDERR_BYTES_MAX: u64 = 4096;

/// Appends the folders of system programs to this process's PATH, so that it and its children find every
/// program in the same way: cron has `/usr/bin:/bin`, and e2fsck is in `/usr/sbin`. To be called first
/// in a program. Does nothing if there are other threads.
pub fn find_system_programs() {
    if process::require_one_thread("set PATH").is_err() {
        return;
    }
    let path = std::env::var_os("PATH").filter(|path| !path.is_empty());
    let path = path.unwrap_or_else(|| PATH_DEFAULT.into());
    if let Some(path) = with_admin_folders(&path) {
        sys::set_variable("PATH", &path);
    }
}

/// `None` if no folder is missing.
fn with_admin_folders(path: &OsStr) -> Option<OsString> {
    let known: Vec<PathBuf> = std::env::split_paths(path).collect();
    let missing = ADMIN_FOLDERS
        .iter()
        .map(PathBuf::from)
        .filter(|folder| !known.contains(folder));
    let missing: Vec<PathBuf> = missing.collect();
    if missing.is_empty() {
        return None;
    }
    std::env::join_paths(known.iter().chain(&missing)).ok()
}

/// A command for `name`, found on PATH or in the system's folders.
pub(crate) fn command(name: &'static str) -> Result<Command, AttachError> {
    find(name)
        .map(Command::new)
        .ok_or_else(|| AttachError::ProgramMissing {
            program: name,
            searched_in: format!("PATH and {SYSTEM_FOLDERS}"),
        })
}

/// Runs `command` to its end, without input. Its stdout is dropped.
pub(crate) fn run(program: &'static str, mut command: Command) -> Result<(), AttachError> {
    let _span = tracing::debug_span!("child", program).entered();
    let mut child = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| AttachError::io("start", program, e))?;
    let mut kept = Vec::new();
    if let Some(mut stderr) = child.stderr.take() {
        // A failed read only shortens the message. The exit status decides.
        let _ = stderr
            .by_ref()
            .take(STDERR_BYTES_MAX)
            .read_to_end(&mut kept);
        let _ = std::io::copy(&mut stderr, &mut std::io::sink());
    }
    let status = child
        .wait()
        .map_err(|e| AttachError::io("wait for", program, e))?;
    tracing::debug!(%status, "ended");
    if status.success() {
        return Ok(());
    }
    Err(AttachError::ProgramFailed {
        program,
        status: status.to_string(),
        stderr: printable(&kept),
    })
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(std::env::split_paths(OsStr::new(SYSTEM_FOLDERS)))
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(|candidate| is_program(candidate))
}

fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_reported_with_the_folders_searched() {
        let error = command("no-such-program-anywhere").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("no-such-program-anywhere not found (searched in PATH")
        );
    }

    #[test]
    fn admin_folders_are_appended_to_the_path() {
        let path = with_admin_folders(OsStr::new("/usr/bin:/bin")).unwrap();
        assert_eq!(path, "/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin");
        assert_eq!(with_admin_folders(&path), None);
    }

    #[test]
    fn a_failed_program_is_reported_with_bounded_printable_stderr() {
        let mut command = command("sh").unwrap();
        command.args([
            "-c",
            "printf 'bad\\033[31m\\nworse\\n' >&2; yes x | head -c 1000000 >&2; exit 3",
        ]);
        let error = run("sh", command).unwrap_err();
        let AttachError::ProgramFailed { status, stderr, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(status, "exit status: 3");
        assert!(stderr.starts_with("bad[31m; worse; x; x"), "{stderr:?}");
        assert!(stderr.len() < 10_000);
    }
}
