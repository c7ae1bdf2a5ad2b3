//! What a test needs of its machine, and what happens where it is missing.

use std::path::{Path, PathBuf};

/// Ends the calling test where the check (an `Option<String>` with the reason) found something
/// missing: skipped with the reason at a desk, failed where `CI` is set.
#[macro_export]
macro_rules! requires {
    ($($missing:expr),+ $(,)?) => {
        $(if $crate::needs::skip($missing) { return; })+
    };
}

/// See [`requires!`](crate::requires); true means skip.
#[must_use]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
pub fn skip(missing: Option<String>) -> bool {
    let Some(reason) = missing else { return false };
    assert!(
        !nothing_may_be_missing(),
        "a test's need is missing here: {reason}"
    );
    eprintln!("SKIPPED: {reason}");
    true
}

/// Whether `CI` is set, and not to nothing: `scripts/test` hands it on to the tests as it is, or
/// empty where it is not set.
#[must_use]
pub fn nothing_may_be_missing() -> bool {
    is_set(std::env::var_os("CI"))
}

fn is_set(ci: Option<std::ffi::OsString>) -> bool {
    ci.is_some_and(|ci| !ci.is_empty())
}

/// What is missing if none of the folders of `PATH`, or the usual system folders, holds `program`.
#[must_use]
pub fn program(program: &str) -> Option<String> {
    find_program(program)
        .is_none()
        .then(|| format!("{program} is not installed"))
}

/// Where `program` lies. An absolute path is only checked.
#[must_use]
pub fn find_program(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// Where OpenSSH's sftp-server is: the one that `SPRAT_TEST_SFTP_SERVER` names, such as an old release, or in
/// Debian's place, or in those of other distributions.
#[must_use]
pub fn plain_sftp_server() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("SPRAT_TEST_SFTP_SERVER") {
        return Some(named.into());
    }
    [
        "/usr/lib/openssh/sftp-server",
        "/usr/libexec/openssh/sftp-server",
        "/usr/lib/ssh/sftp-server",
        "/usr/libexec/sftp-server",
    ]
    .into_iter()
    .map(PathBuf::from)
    .find(|path| path.is_file())
}

/// What is missing if there is no sftp-server.
#[must_use]
pub fn sftp_server_missing() -> Option<String> {
    plain_sftp_server()
        .is_none()
        .then(|| "sftp-server is not installed".to_owned())
}

/// What is missing if this program of the workspace was not built, as in a run of one other package.
#[must_use]
pub fn built(program: &Path) -> Option<String> {
    (!program.is_file()).then(|| {
        let path = program.display();
        format!("{path} is not built: run the tests of the whole workspace")
    })
}

/// What is missing if there is no FUSE or no loop device.
#[must_use]
pub fn devices() -> Option<String> {
    ["/dev/fuse", "/dev/loop-control"]
        .into_iter()
        .find(|path| !Path::new(path).exists())
        .map(|path| format!("there is no {path}"))
}

/// What is missing if this process is not root.
#[must_use]
pub fn root() -> Option<String> {
    (!rustix::process::geteuid().is_root()).then(|| "not root".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ci_of_nothing_is_none() {
        assert!(is_set(Some("1".into())) && is_set(Some("true".into())));
        assert!(!is_set(Some("".into())) && !is_set(None));
    }
}
