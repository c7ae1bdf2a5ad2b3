"""The other side: an sshd of the bench's own on loopback, and slow wires that lead to it."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
# What clients call the server, in their ssh config and in their targets.
HOST = "bench-server"
SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")


@dataclass(frozen=True)
class Line:
    """A line to the server: its round trip and, if limited, its rate each way."""

    name: str
    rtt_ms: float
    mbit_per_s: float | None = None


LINES = {
    line.name: line
    for line in (
        Line("loopback", 0),
        Line("20ms", 20),
        Line("50ms", 50),
        Line("100ms", 100),
        Line("50ms-100mbit", 50, 100),
    )
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what, ready, process, log):
    """Waits until `ready()`; fails with the log if the process ends or ten seconds pass."""
    until = time.monotonic() + 10
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{what} did not come up: {log.read_text(errors='replace')}")
        time.sleep(0.02)


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    except OSError:
        return False


def end(process):
    """Ends a process and waits for it."""
    if process and process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Sshd:
    """A real sshd with keys of its own; ended, with its sessions, by `close`.

    With `agent`, a built sprat-agent, it is the only program that a login runs, for the folder `srv`.
    """

    def __init__(self, folder, agent=None, policy=""):
        self.folder, self.process = folder, None
        folder.mkdir()
        self.srv = folder / "srv"
        self.srv.mkdir()
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        host_key = (folder / "host_key.pub").read_text().split()
        (folder / "known_hosts").write_text(f"{HOST} {host_key[0]} {host_key[1]}\n")
        os.makedirs("/run/sshd", exist_ok=True)
        self.port = free_port()
        # Without PAM sshd refuses an account whose password is locked, as root's is on Ubuntu.
        shadow = subprocess.run(["getent", "shadow", "root"], capture_output=True, text=True).stdout
        pam = "yes" if shadow.split(":")[1:2] and shadow.split(":")[1].startswith("!") else "no"
        sftp_server = next((path for path in SFTP_SERVERS if os.access(path, os.X_OK)), "internal-sftp")
        (folder / "sshd_config").write_text(
            # A nested shell (SHLVL) reads no start-up file: those may print or wait.
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM {pam}\nSetEnv SHLVL=5\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "PrintMotd no\nPrintLastLog no\nUseDNS no\nMaxStartups 200\nMaxSessions 200\nLogLevel ERROR\n"
            f"Subsystem sftp {sftp_server}\n"
        )
        if agent:
            subprocess.run([agent, "adopt", "--root", self.srv], check=True, stdout=subprocess.DEVNULL)
            (self.srv / ".sprat-agent" / "policy").write_text(policy)
            with (folder / "sshd_config").open("a") as config:
                config.write(f"ForceCommand {agent} serve --root {self.srv}\n")
        log = folder / "sshd.log"
        program = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        # A session of its own, so that all of it can be ended together.
        self.process = subprocess.Popen(
            [program, "-D", "-e", "-f", folder / "sshd_config"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log.open("w"), start_new_session=True,
        )
        wait_for("sshd", lambda: answers(self.port), self.process, log)

    def close(self):
        end(self.process)


class Wire:
    """A slow wire to the sshd, and an ssh config that goes through it."""

    def __init__(self, folder, sshd, line):
        folder.mkdir()
        self.line, self.socket, self.config = line, folder / "counts", folder / "ssh_config"
        port = free_port()
        log = folder / "wire.log"
        command = [sys.executable, HERE / "wire.py", port, sshd.port, line.rtt_ms, "--counts", self.socket]
        if line.mbit_per_s:
            command += ["--mbit-per-s", line.mbit_per_s]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log.open("w"), start_new_session=True,
            # The wire is the line, not a competitor: where the caller may, it goes before the others.
            preexec_fn=go_first,
        )
        wait_for("the wire", lambda: answers(port), self.process, log)
        self.config.write_text(
            f"Host {HOST}\n  HostName 127.0.0.1\n  HostKeyAlias {HOST}\n  Port {port}\n  User root\n"
            f"  IdentityFile {sshd.folder}/user_key\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {sshd.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n  BatchMode yes\n  ControlMaster no\n  ControlPath none\n  Compression no\n"
        )

    def counts(self):
        """What the wire has taken in since its start."""
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(str(self.socket))
            return json.loads(asked.makefile().read())

    def ssh(self, *words):
        return ["ssh", "-F", str(self.config), HOST, *words]

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
        end(self.process)


def go_first():
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    except OSError:
        pass


def stream_rate(wire, streams, seconds=4.0):
    """Bytes a second that so many parallel `ssh … cat > /dev/null` move on the wire, logins left out.

    Counted at the wire from the moment on when every stream has been flowing for a second.
    """
    started = []
    try:
        zeros = open("/dev/zero", "rb")
        for _ in range(streams):
            started.append(subprocess.Popen(wire.ssh("cat > /dev/null"), stdin=zeros, stdout=subprocess.DEVNULL))
        before = wire.counts()["up_bytes"]
        # All logged in: far more bytes than logins take.
        until = time.monotonic() + 60
        while wire.counts()["up_bytes"] - before < streams << 20:
            if time.monotonic() > until:
                raise RuntimeError("the plain ssh streams don't flow")
            time.sleep(0.05)
        time.sleep(1 + 10 * wire.line.rtt_ms / 1000)
        first, began = wire.counts()["up_bytes"], time.monotonic()
        time.sleep(seconds)
        return (wire.counts()["up_bytes"] - first) / (time.monotonic() - began)
    finally:
        for process in started:
            process.kill()
            process.wait()
