//! A machine and a server.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part of it, and a test may panic"
)]

use sprat_testkit::ssh_server::{OpenSshOptions, SshServer};

use super::{Machine, Ran};

/// A machine whose container lies on an sshd of its own.
pub struct Remote {
    pub machine: Machine,
    pub sshd: SshServer,
    target: String,
    ssh: String,
}

impl Remote {
    pub fn start(options: &OpenSshOptions) -> Self {
        let machine = Machine::new();
        machine.write("src/a", "alpha\n");
        Self::with(machine, options)
    }

    /// A server for a machine that has a container already.
    pub fn with(machine: Machine, options: &OpenSshOptions) -> Self {
        let sshd = SshServer::start_with(options);
        let store = machine.path("store");
        let target = format!(
            "ssh://root@127.0.0.1:{}{}/x.luks",
            sshd.port(),
            store.display()
        );
        let ssh = format!("ssh -F {}", sshd.path("ssh_config").display());
        Self {
            machine,
            sshd,
            target,
            ssh,
        }
    }

    /// The container, as an argument.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// sprat with this machine's settings; `TARGET` stands for the container.
    pub fn command(&self, arguments: &[&str]) -> std::process::Command {
        self.command_of(&self.machine, arguments)
    }

    /// The same by another machine.
    pub fn command_of(&self, machine: &Machine, arguments: &[&str]) -> std::process::Command {
        let mut command = machine.command();
        command.args(["--ssh-command", &self.ssh]);
        command.args(arguments.iter().map(|word| {
            if *word == "TARGET" {
                &*self.target
            } else {
                word
            }
        }));
        command
    }

    pub fn sprat(&self, arguments: &[&str]) -> Ran {
        let mut ran = self.machine.run(&mut self.command(arguments));
        ran.stderr = ran.stderr.replace(&self.sshd.port().to_string(), "[PORT]");
        ran.stderr = ran
            .stderr
            .replace(&*self.sshd.folder().to_string_lossy(), "[SSHD]");
        ran
    }

    #[track_caller]
    pub fn init(&self) {
        let ran = self.sprat(&["init", "TARGET", "--size", "1G", "--cheap-kdf-for-tests"]);
        assert_eq!(ran.code, 0, "{}", ran.whole());
    }

    pub fn backup(&self) -> Ran {
        self.sprat(&["backup", "TARGET", "--name", "home", "src"])
    }
}
