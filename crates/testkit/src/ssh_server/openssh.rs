//! OpenSSH's own server, sshd.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use super::{SshServer, client_missing};
use crate::{agent_server, needs};

/// Runs the command below a root folder with another system, such as an old release. Temporary folders have the
/// same path there. The mounts go with the server's processes.
const IN_ROOT: &str = "set -e; root=$1; temporary=$2; shift 2; \
                       mount --bind \"$root\" \"$root\"; mkdir -p \"$root$temporary\" \"$root/run/sshd\"; \
                       mount --bind \"$temporary\" \"$root$temporary\"; mount --rbind /dev \"$root/dev\"; \
                       mount -t proc none \"$root/proc\"; exec chroot \"$root\" \"$@\"";

/// Runs the command where `/mnt` has nothing but the folder `$1`, at the same path. sshd demands that only root
/// can write to a chroot folder and to all folders above it; temporary folders are elsewhere.
const WITH_CHROOT: &str = "set -e; mount -t tmpfs -o mode=755 none /mnt; folder=$1; shift; \
                           mkdir -p \"/mnt$folder\"; mount --bind \"$folder\" \"/mnt$folder\"; exec \"$@\"";

/// Runs the command where `/etc` has the files `passwd` and `shadow` of the folder `$1`.
const WITH_ACCOUNTS: &str = "set -e; folder=$1; shift; \
                             for name in passwd shadow; do mount --bind \"$folder/$name\" \"/etc/$name\"; done; \
                             exec \"$@\"";

/// The root folder that `SPRAT_TEST_OPENSSH_ROOT` names, with the OpenSSH of another system.
#[must_use]
pub fn other_root() -> Option<PathBuf> {
    std::env::var_os("SPRAT_TEST_OPENSSH_ROOT").map(PathBuf::from)
}

/// Stands in the environment of every session, so that an orphaned one is found.
const MARK: &str = "SPRAT_TEST_SSHD";

/// How sshd runs the SFTP subsystem, and its other settings.
#[derive(Debug, Clone, Default)]
pub struct OpenSshOptions {
    /// sshd's own `internal-sftp` instead of the program.
    pub internal_sftp: bool,
    /// The only folder that the test uses there, see [`agent_server::sftp_server`].
    pub serves: Option<PathBuf>,
    /// Arguments for sftp-server, such as `-R` or `-P fsync`.
    pub sftp_arguments: Vec<String>,
    /// No SFTP subsystem at all.
    pub no_sftp: bool,
    /// Sessions see nothing but this folder (`ChrootDirectory`), and have no shell.
    pub chroot: Option<PathBuf>,
    /// More lines for sshd_config, before everything else (the first value of a key wins).
    pub config_lines: Vec<String>,
    /// More accounts, with `/bin/sh` and no password: their names and numbers. Only this server has them.
    pub accounts: Vec<(String, u32)>,
}

impl OpenSshOptions {
    /// The same for a test that uses only this folder there.
    #[must_use]
    pub fn serving(mut self, folder: &Path) -> Self {
        self.serves = Some(folder.to_owned());
        self
    }

    /// The agent for this folder, and nothing else.
    #[must_use]
    pub fn agent(folder: &Path) -> Self {
        Self::forced(&agent_server::launcher(folder).display().to_string())
    }

    /// Every login runs `command` and can do nothing else, as docs/agent.md sets a server up.
    #[must_use]
    pub fn forced(command: &str) -> Self {
        Self {
            config_lines: vec![
                format!("ForceCommand {command}"),
                "DisableForwarding yes".to_owned(),
                "PermitTTY no".to_owned(),
            ],
            ..Self::default()
        }
    }
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
    let program = match other_root() {
        Some(_) => "/usr/sbin/sshd".into(),
        None => needs::find_program("sshd").ok_or(io::ErrorKind::NotFound)?,
    };
    let config = server.path("sshd_config");
    let mut command = vec![
        program.into(),
        "-D".into(),
        "-e".into(),
        "-f".into(),
        config.into(),
    ];
    if let Some(folder) = &options.chroot {
        command = with_mounts(WITH_CHROOT, &[folder], command);
    }
    if !options.accounts.is_empty() {
        write_accounts(&server, &options.accounts)?;
        command = with_mounts(WITH_ACCOUNTS, &[server.folder()], command);
    }
    if let Some(root) = other_root() {
        command = with_mounts(IN_ROOT, &[&root, &std::env::temp_dir()], command);
    }
    server.serve(&host_key, command)?;
    Ok(server)
}

/// The accounts of this machine, and more of them.
fn write_accounts(server: &SshServer, accounts: &[(String, u32)]) -> io::Result<()> {
    let mut passwd = std::fs::read_to_string("/etc/passwd")?;
    let mut shadow = std::fs::read_to_string("/etc/shadow")?;
    for (name, number) in accounts {
        passwd += &format!("{name}:x:{number}:{number}::/:/bin/sh\n");
        shadow += &format!("{name}:*:20000::::::\n");
    }
    std::fs::write(server.path("passwd"), passwd)?;
    std::fs::write(server.path("shadow"), shadow)
}

/// The command in a mount namespace of its own, which `script` prepares.
fn with_mounts(script: &str, folders: &[&Path], command: Vec<OsString>) -> Vec<OsString> {
    let start = ["unshare", "--mount", "--", "sh", "-c", script, "sh"];
    let start = start.into_iter().map(OsString::from);
    let folders = folders.iter().map(|folder| OsString::from(*folder));
    start.chain(folders).chain(command).collect()
}

/// The variable that marks the sessions of the server with this folder.
pub(super) fn session_mark(folder: &Path) -> String {
    format!("{MARK}={}", folder.display())
}

fn config(server: &SshServer, options: &OpenSshOptions) -> String {
    let folder = options.serves.as_deref();
    let found = folder.map_or_else(needs::plain_sftp_server, agent_server::sftp_server);
    let program = match (options.internal_sftp, found) {
        (false, Some(_)) if other_root().is_some() => "/usr/lib/openssh/sftp-server".to_owned(),
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
    let chroot = match options.chroot {
        Some(_) => "ChrootDirectory /mnt\nForceCommand internal-sftp\n",
        None => "",
    };
    // bash reads ~/.bashrc when sshd started it, except in a nested shell (run_startup_files in
    // shell.c). A test must not depend on that file.
    format!(
        "{}\n{chroot}SetEnv SHLVL=5 {}\nListenAddress 127.0.0.1\nPort {}\nHostKey {folder}/host_key\n\
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
