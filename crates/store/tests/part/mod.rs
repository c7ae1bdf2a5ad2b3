//! What several of this crate's tests need: an sftp-server over a pipe.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use sprat_store::SftpOptions;
use sprat_testkit::needs;

/// An SFTP server program's options, impatient enough for tests.
pub fn options(program: Vec<OsString>, folder: &Path) -> SftpOptions {
    let mut options = SftpOptions::new(program, "test.host", folder.to_str().unwrap());
    options.answer_timeout = Duration::from_secs(30);
    options
}

/// sftp-server itself, without ssh.
pub fn piped(folder: &Path, arguments: &[&str]) -> SftpOptions {
    let mut program: Vec<OsString> = vec![needs::sftp_server().unwrap().into()];
    program.extend(arguments.iter().map(OsString::from));
    options(program, folder)
}
