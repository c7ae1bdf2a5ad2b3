//! An SFTP server without any code of OpenSSH's: ProFTPD's `mod_sftp`, with the settings that a
//! hoster may have chosen.

use std::io;
use std::path::Path;
use std::process::Command;

use super::{SshServer, client_missing};
use crate::needs;

const MODULES: &str = "/usr/lib/proftpd";

/// What is missing for [`start`].
#[must_use]
pub fn missing() -> Option<String> {
    let module = Path::new(MODULES).join("mod_sftp.so");
    let lacks_module = || (!module.exists()).then(|| format!("there is no {}", module.display()));
    client_missing()
        .or_else(|| needs::program("proftpd"))
        .or_else(lacks_module)
}

/// Starts a server for the account that runs the tests. `settings` apply to all folders, such as
/// `AllowOverwrite off`.
///
/// # Panics
/// When the server does not come up; check [`missing`] first.
#[must_use]
pub fn start(settings: &[&str]) -> SshServer {
    SshServer::or_panic("proftpd", try_start(settings))
}

fn try_start(settings: &[&str]) -> io::Result<SshServer> {
    let mut server = SshServer::prepare("sprat-proftpd-")?;
    for key in ["host_key", "user_key"] {
        // A kind and a format that each release reads.
        server.make_key(key, &["-t", "rsa", "-m", "PEM"])?;
    }
    // RFC 4716, the only format that ProFTPD reads.
    let public = Command::new("ssh-keygen")
        .args(["-e", "-f"])
        .arg(server.path("user_key.pub"))
        .output()?;
    std::fs::write(server.path("authorized_keys"), public.stdout)?;
    std::fs::write(server.path("proftpd.conf"), config(&server, settings))?;
    let host_key = std::fs::read_to_string(server.path("host_key.pub"))?;
    let program = needs::find_program("proftpd").ok_or(io::ErrorKind::NotFound)?;
    let config = server.path("proftpd.conf");
    let command = vec![
        program.into(),
        "--nodaemon".into(),
        "--quiet".into(),
        "--config".into(),
        config.into(),
    ];
    server.serve(&host_key, command)?;
    Ok(server)
}

fn config(server: &SshServer, settings: &[&str]) -> String {
    let folder = server.folder().display();
    format!(
        "ModulePath {MODULES}\nLoadModule mod_sftp.c\nServerType standalone\nServerName tests\n\
         UseIPv6 off\nDefaultAddress 127.0.0.1\nPort {}\nUser root\nGroup root\nRootLogin on\n\
         RequireValidShell off\nUseFtpUsers off\nUseReverseDNS off\nAuthOrder mod_auth_unix.c\n\
         PidFile {folder}/pid\nScoreboardFile {folder}/scoreboard\nSystemLog {folder}/system.log\n\
         WtmpLog off\nTransferLog none\nUmask 077\nSFTPEngine on\nSFTPHostKey {folder}/host_key\n\
         SFTPAuthMethods publickey\nSFTPAuthorizedUserKeys file:{folder}/authorized_keys\n\
         SFTPLog {folder}/sftp.log\nAllowOverwrite on\n<Directory />\n{}\n</Directory>\n",
        server.port(),
        settings.join("\n"),
    )
}
