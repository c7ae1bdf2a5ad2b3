//! A machine whose container lies on an OpenSSH server.

use std::process::Command;

use super::{Ran, TestMachine};
use crate::ssh_server::{OpenSshOptions, SshServer};

/// A machine whose container lies on an sshd of its own.
#[derive(Debug)]
pub struct RemoteMachine {
    /// The client.
    pub machine: TestMachine,
    /// The server.
    pub sshd: SshServer,
    target: String,
    ssh: String,
}

impl RemoteMachine {
    /// A new machine with one file in `src`, and its server.
    ///
    /// # Panics
    /// When the server does not come up.
    #[must_use]
    pub fn start(options: &OpenSshOptions) -> Self {
        let machine = TestMachine::new();
        machine.write("src/a", "alpha\n");
        Self::with(machine, options)
    }

    /// A server for a machine that has a container already.
    ///
    /// # Panics
    /// When the server does not come up.
    #[must_use]
    pub fn with(machine: TestMachine, options: &OpenSshOptions) -> Self {
        let store = machine.path("store");
        let sshd = SshServer::start_with(&options.clone().serving(&store));
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
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }

    /// sprat with this machine's settings; `TARGET` stands for the container.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_of(&self.machine, arguments)
    }

    /// The same by another machine.
    pub fn command_of(&self, machine: &TestMachine, arguments: &[&str]) -> Command {
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

    /// Runs the same to its end. The server's port is shown as `[PORT]`, its folder as `[SSHD]`.
    pub fn sprat(&self, arguments: &[&str]) -> Ran {
        let mut ran = self.machine.run(&mut self.command(arguments));
        ran.stderr = ran.stderr.replace(&self.sshd.port().to_string(), "[PORT]");
        ran.stderr = ran
            .stderr
            .replace(&*self.sshd.folder().to_string_lossy(), "[SSHD]");
        ran
    }

    /// The same; the exit code must be 0.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> Ran {
        self.sprat(arguments).succeeded()
    }

    /// Makes the container, of 1 GiB.
    #[track_caller]
    pub fn init(&self) {
        self.ok(&["init", "TARGET", "--size", "1G", "--cheap-kdf-for-tests"]);
    }

    /// Backs `src` up as job `home`.
    pub fn backup(&self) -> Ran {
        self.sprat(&["backup", "TARGET", "--name", "home", "src"])
    }
}
