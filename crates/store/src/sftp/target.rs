//! The command line of the system's `ssh` that provides an SFTP server on its pipes.

use std::ffi::OsString;
use std::time::Duration;

use crate::StoreError;
use crate::text::printable;

/// An account on an SSH server. Everything else (keys, jump hosts, known hosts, ciphers) comes from
/// ssh's own configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshTarget {
    /// User name; `None` leaves it to ssh.
    pub user: Option<String>,
    /// Host name, address or an alias in ssh's configuration; IPv6 addresses without brackets.
    pub host: String,
    /// TCP port; `None` leaves it to ssh.
    pub port: Option<u16>,
    /// How long one attempt to reach the server may take.
    pub connect_timeout: Duration,
}

impl SshTarget {
    /// An account on `host`, with ssh's defaults and 30 s to connect. Refuses a host or user that
    /// ssh could parse as an option, or that contains control characters or blanks.
    pub fn new(user: Option<&str>, host: &str, port: Option<u16>) -> Result<Self, StoreError> {
        let odd = |text: &str| {
            text.is_empty()
                || text.starts_with('-')
                || text.chars().any(|c| c.is_control() || c.is_whitespace())
        };
        if odd(host) || user.is_some_and(odd) {
            return Err(StoreError::Unreachable {
                host: printable(host.as_bytes()),
                reason: "not a valid host or user name for ssh".to_owned(),
            });
        }
        Ok(Self {
            user: user.map(str::to_owned),
            host: host.to_owned(),
            port,
            connect_timeout: Duration::from_secs(30),
        })
    }

    /// The complete command: `ssh_command` (usually just `ssh`) with the options that an unattended
    /// session needs, up to `… -s -- host sftp`.
    #[must_use]
    pub fn argv(&self, ssh_command: &[OsString]) -> Vec<OsString> {
        let mut argv = self.with_options(ssh_command);
        argv.extend(["-s".into(), "--".into(), (&self.host).into(), "sftp".into()]);
        argv
    }

    /// The same for an account with a shell: its login shell runs `sh -s`, which reads a script
    /// from standard input.
    #[must_use]
    pub fn shell_argv(&self, ssh_command: &[OsString]) -> Vec<OsString> {
        let mut argv = self.with_options(ssh_command);
        argv.extend(["--".into(), (&self.host).into(), "sh -s".into()]);
        argv
    }

    fn with_options(&self, ssh_command: &[OsString]) -> Vec<OsString> {
        let mut argv = unattended(ssh_command, self.connect_timeout);
        if let Some(port) = self.port {
            argv.extend(["-p".into(), port.to_string().into()]);
        }
        if let Some(user) = &self.user {
            argv.extend(["-l".into(), user.into()]);
        }
        argv
    }
}

/// `ssh_command` with the options that an unattended session needs.
#[must_use]
pub fn unattended(ssh_command: &[OsString], connect_timeout: Duration) -> Vec<OsString> {
    let mut argv = ssh_command.to_vec();
    let connect_timeout = format!("ConnectTimeout={}", connect_timeout.as_secs().max(1));
    for option in [
        // Never wait for a person: there may be none.
        "BatchMode=yes",
        // A dead connection is noticed within 45 s, even if nothing is being sent.
        "ServerAliveInterval=15",
        "ServerAliveCountMax=3",
        connect_timeout.as_str(),
        // The server is untrusted: it gets no agent, no port and no local command.
        "ForwardAgent=no",
        "ForwardX11=no",
        "ClearAllForwardings=yes",
        "PermitLocalCommand=no",
        "RequestTTY=no",
        // Ciphertext doesn't compress.
        "Compression=no",
        // A shared or persistent master would outlive us and go on sending what it holds. Then
        // it would be unknown when a killed session ends and its lock may be taken.
        "ControlMaster=no",
        "ControlPath=none",
        "ControlPersist=no",
        "ForkAfterAuthentication=no",
        "StdinNull=no",
        "RemoteCommand=none",
    ] {
        argv.extend(["-o".into(), option.into()]);
    }
    argv
}
