//! Dropbear, as on small machines: another ssh server in front of OpenSSH's sftp-server, with a
//! shell.

use std::io;
use std::process::Command;

use super::{SshServer, client_missing};
use crate::needs;

/// Dropbear reads only `~/.ssh/authorized_keys`: in its own mount namespace the home is another one.
const START: &str = "set -e; umask 077; keys=$(cat \"$1/user_key.pub\"); \
                     mount -t tmpfs -o mode=700 none ~root; mkdir ~root/.ssh; \
                     echo \"$keys\" > ~root/.ssh/authorized_keys; \
                     exec dropbear -F -E -s -r \"$1/host_key\" -p \"127.0.0.1:$2\" -P \"$1/pid\"";

/// What is missing for [`start`].
#[must_use]
pub fn missing() -> Option<String> {
    client_missing()
        .or_else(needs::sftp_server_missing)
        .or_else(|| needs::program("dropbear"))
        .or_else(|| needs::program("dropbearkey"))
        .or_else(|| needs::program("unshare"))
}

/// Starts a server for the account that runs the tests.
///
/// # Panics
/// When the server does not come up; check [`missing`] first.
#[must_use]
pub fn start() -> SshServer {
    SshServer::or_panic("dropbear", try_start())
}

fn try_start() -> io::Result<SshServer> {
    let mut server = SshServer::prepare("sprat-dropbear-")?;
    server.make_key("user_key", &["-t", "ed25519"])?;
    let made = Command::new("dropbearkey")
        .args(["-t", "ed25519", "-f"])
        .arg(server.path("host_key"))
        .output()?;
    let stdout = String::from_utf8_lossy(&made.stdout).into_owned();
    let host_key = stdout.lines().find(|line| line.starts_with("ssh-"));
    let host_key =
        host_key.ok_or_else(|| io::Error::other(format!("dropbearkey made no key: {stdout}")))?;
    let mut command = ["unshare", "--mount", "--", "sh", "-c", START, "sh"]
        .map(Into::into)
        .to_vec();
    command.push(server.folder().into());
    command.push(server.port().to_string().into());
    server.serve(host_key, command)?;
    Ok(server)
}
