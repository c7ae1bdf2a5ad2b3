//! Shared by this crate's tests: an sftp-server over a pipe, small disks, processes.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses a part of it"
)]

pub mod scripted;

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use sprat_store::SftpOptions;
use sprat_testkit::agent_server;
use sprat_testkit::leftovers::LIMIT;

/// An SFTP server program's options, with time limits short enough for tests.
pub fn options(program: Vec<OsString>, folder: &Path) -> SftpOptions {
    let mut options = SftpOptions::new(program, "test.host", folder.to_str().unwrap());
    options.answer_timeout = Duration::from_secs(30);
    options
}

/// sftp-server itself, without ssh.
pub fn piped(folder: &Path, arguments: &[&str]) -> SftpOptions {
    let mut program: Vec<OsString> = vec![agent_server::sftp_server(folder).unwrap().into()];
    program.extend(arguments.iter().map(OsString::from));
    options(program, folder)
}

/// Asks until there is an answer, for at most [`LIMIT`].
pub fn eventually<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let until = std::time::Instant::now() + LIMIT;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(
            std::time::Instant::now() < until,
            "still not, after {LIMIT:?}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends a signal by its number.
pub fn kill(pid: i32, signal: i32) {
    let status = std::process::Command::new("kill")
        .args([format!("-{signal}"), pid.to_string()])
        .status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "kill -{signal} {pid}"
    );
}

/// The other programs that have `path` open.
pub fn holders(path: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let process = process.path();
        let fds = std::fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let holds = fds
            .into_iter()
            .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == path));
        if holds && !process.ends_with(std::process::id().to_string()) {
            let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
            found.push(name.trim().to_owned());
        }
    }
    found
}
