//! OpenSSH's own server, sshd.

use std::io;
use std::path::Path;

use super::{SshServer, client_missing};
use crate::needs;

/// Stands in the environment of every session, so that an orphaned one is found.
const MARK: &str = "SPRAT_TEST_SSHD";

/// How sshd runs the SFTP subsystem, and its other settings.
#[derive(Debug, Clone, Default)]
pub struct OpenSshOptions {
    /// sshd's own `internal-sftp` instead of the program.
    pub internal_sftp: bool,
    /// Arguments for sftp-server, such as `-R` or `-P fsync`.
    pub sftp_arguments: Vec<String>,
    /// No SFTP subsystem at all.
    pub no_sftp: bool,
    /// More lines for sshd_config, before everything else (the first value of a key wins).
    pub config_lines: Vec<String>,
}

/// What is missing for [`SshServer::start`].
#[must_use]
pub fn missing() -> Option<String> {
    client_missing()
        .or_else(|| needs::program("sshd"))
        .or_else(needs::sftp_server_missing)
}

pub(super) fn try_start(options: &OpenSshOptions) -> io::Result<SshServer> {
    let mut server = SshServer::prepare("sprat-sshd-")?;
    std::fs::create_dir_all("/run/sshd")?;
    for key in ["host_key", "user_key", "other_key"] {
        server.make_key(key, &["-t", "ed25519"])?;
    }
    std::fs::copy(server.path("user_key.pub"), server.path("authorized_keys"))?;
    std::fs::write(server.path("sshd_config"), config(&server, options))?;
    let host_key = std::fs::read_to_string(server.path("host_key.pub"))?;
    // An absolute path: sshd executes itself again for every connection.
    let program = needs::find_program("sshd").ok_or(io::ErrorKind::NotFound)?;
    let config = server.path("sshd_config");
    let command = vec![
        program.into(),
        "-D".into(),
        "-e".into(),
        "-f".into(),
        config.into(),
    ];
    server.serve(&host_key, command)?;
    Ok(server)
}

/// The variable that marks the sessions of the server with this folder.
pub(super) fn session_mark(folder: &Path) -> String {
    format!("{MARK}={}", folder.display())
}

fn config(server: &SshServer, options: &OpenSshOptions) -> String {
    let program = match (options.internal_sftp, needs::sftp_server()) {
        (false, Some(program)) => program.display().to_string(),
        _ => "internal-sftp".to_owned(),
    };
    let subsystem = if options.no_sftp {
        String::new()
    } else {
        format!(
            "Subsystem sftp {program} {}\n",
            options.sftp_arguments.join(" ")
        )
    };
    let folder = server.folder().display();
    let pam = if root_is_locked() { "yes" } else { "no" };
    // bash reads ~/.bashrc when sshd started it, except in a nested shell (run_startup_files in
    // shell.c). A test must not depend on that file.
    format!(
        "{}\nSetEnv SHLVL=5 {}\nListenAddress 127.0.0.1\nPort {}\nHostKey {folder}/host_key\n\
         PidFile {folder}/sshd.pid\nAuthorizedKeysFile {folder}/authorized_keys\n\
         UsePAM {pam}\nStrictModes no\nAuthenticationMethods publickey\n\
         PubkeyAuthentication yes\nPasswordAuthentication no\nPermitRootLogin yes\n\
         KbdInteractiveAuthentication no\nX11Forwarding no\nPrintMotd no\nUseDNS no\n\
         MaxStartups 100\nMaxSessions 100\nLogLevel ERROR\n{subsystem}",
        options.config_lines.join("\n"),
        session_mark(server.folder()),
        server.port(),
    )
}

/// Whether root's password is locked, as on Ubuntu: without PAM sshd then refuses every login
/// (openssh-portable: auth.c, `allowed_user`).
fn root_is_locked() -> bool {
    let shadow = std::fs::read_to_string("/etc/shadow").unwrap_or_default();
    shadow.lines().any(|line| line.starts_with("root:!"))
}
