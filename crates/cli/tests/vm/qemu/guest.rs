//! The guest: what is laid over its root, and scripts run in it to their end or to a power cut.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::{SERVER, repository, tool, write};
use sprat_testkit::client_and_server::ClientAndServer;
use sprat_testkit::program::{run_within, shown, sprat};

/// Puts a file into the guest.
pub fn give(pair: &ClientAndServer, path: &str, content: impl AsRef<[u8]>, mode: u32) {
    write(&pair.path("overlay").join(path), content, mode);
}

/// Copies the ssh key, the server's host key, its name's address, and `listing` to the guest.
pub fn give_keys(pair: &ClientAndServer) {
    let read = |name: &str| fs::read_to_string(pair.sshd.path(name)).expect("made by SshServer");
    let port = pair.sshd.port();
    let known = format!("[{SERVER}]:{port} {}", read("host_key.pub"));
    give(pair, "root/.ssh/known_hosts", known, 0o600);
    give(pair, "root/.ssh/id_ed25519", read("user_key"), 0o600);
    // Where the sheet names them: the person has brought the key, and has confirmed the server's.
    let at = |name: &str| {
        let path = pair.sshd.path(name).display().to_string();
        path.trim_start_matches('/').to_owned()
    };
    give(pair, &at("user_key"), read("user_key"), 0o600);
    let on_the_sheet = format!("[10.0.2.2]:{port} {}", read("host_key.pub"));
    give(pair, &at("known_hosts"), on_the_sheet, 0o600);
    // The recovery sheet names the address that the alias stands for on this machine, its loopback.
    // Each session makes several connections; the usual key exchange takes a second for each here.
    let config = format!(
        "Host 127.0.0.1\n  HostName 10.0.2.2\n  HostKeyAlias [{SERVER}]:{port}\n\
         Host *\n  Port {port}\n  KexAlgorithms ecdh-sha2-nistp256,curve25519-sha256\n"
    );
    give(pair, "root/.ssh/config", config, 0o600);
    let hosts = format!("127.0.0.1 localhost\n10.0.2.2 {SERVER}\n");
    give(pair, "etc/hosts", hosts, 0o644);
    give(pair, "usr/bin/listing", script("listing"), 0o755);
}

/// Copies sprat to the guest, with the libraries that the image does not have.
pub fn give_sprat(pair: &ClientAndServer) {
    give_command(pair, sprat());
}

/// The same for a program that was built beside it.
pub fn give_command(pair: &ClientAndServer, built: &Path) {
    let folder = pair.path("overlay/usr/bin");
    let program = folder.join(built.file_name().expect("a program"));
    fs::create_dir_all(folder).expect("a folder");
    fs::copy(built, &program).expect("it is copied");
    // Debug information is half of it; without `strip` the guest takes longer to boot.
    let _ = Command::new("strip").arg(&program).status();
    give_libraries(pair, built);
}

/// Copies a program of this machine to the same path.
pub fn give_program(pair: &ClientAndServer, program: &Path) {
    give_file(pair, program, 0o755);
    give_libraries(pair, program);
}

/// Where systemd lies on this machine, and in the guest.
const SYSTEMD: &str = "/usr/lib/systemd";

/// What is missing on this machine for [`give_systemd`].
pub fn systemd_missing() -> Option<String> {
    let programs = [format!("{SYSTEMD}/systemd"), "systemctl".to_owned()];
    let mut programs = programs.iter();
    programs.find_map(|program| sprat_testkit::needs::program(program))
}

/// Lets systemd be the guest's first process. Of its units only targets come along; the one that is
/// reached runs the script.
pub fn give_systemd(pair: &ClientAndServer) {
    let systemctl = sprat_testkit::needs::find_program("systemctl").expect("checked before");
    give_program(pair, &systemctl);
    for name in ["systemd", "systemd-executor"] {
        let program = Path::new(SYSTEMD).join(name);
        // An executor of its own came with systemd 254.
        if program.exists() {
            give_program(pair, &program);
        }
    }
    for entry in fs::read_dir(Path::new(SYSTEMD).join("system")).expect("systemd's units") {
        let path = entry.expect("systemd's units").path();
        let is_target = path.extension().is_some_and(|end| end == "target");
        if is_target && !path.is_symlink() {
            give_file(pair, &path, 0o644);
        }
    }
    let units = "etc/systemd/system";
    let target = "[Unit]\nRequires=basic.target\nAfter=basic.target\nWants=vm-script.service\nAllowIsolate=yes\n";
    give(pair, &format!("{units}/default.target"), target, 0o644);
    let service = "[Unit]\nAfter=timers.target\n[Service]\nExecStart=/bin/bash /init script\n";
    give(pair, &format!("{units}/vm-script.service"), service, 0o644);
    give(
        pair,
        "etc/machine-id",
        "3d1219c7c4c5404aaa1f6d2a48adfda4\n",
        0o444,
    );
}

/// Copies sshd to the guest, with the host key of the server and the user key that it accepts, in
/// `/server`. It listens on the server's port, and the server's name leads to the guest itself.
pub fn give_server(pair: &ClientAndServer) {
    let sshd = sprat_testkit::needs::find_program("sshd").expect("checked by missing()");
    give_program(pair, &sshd);
    // A program of its own came with OpenSSH 9.8.
    let session = Path::new("/usr/lib/openssh/sshd-session");
    if session.exists() {
        give_program(pair, session);
    }
    let read = |name: &str| fs::read(pair.sshd.path(name)).expect("made by SshServer");
    give(pair, "server/host_key", read("host_key"), 0o600);
    give(
        pair,
        "server/authorized_keys",
        read("authorized_keys"),
        0o600,
    );
    let config = format!(
        "Port {}\nListenAddress 127.0.0.1\nHostKey /server/host_key\nPidFile /server/pid\n\
         AuthorizedKeysFile /server/authorized_keys\nUsePAM no\nStrictModes no\nUseDNS no\n\
         PermitRootLogin yes\nSubsystem sftp internal-sftp\n",
        pair.sshd.port()
    );
    give(pair, "server/config", config, 0o600);
    let hosts = format!("127.0.0.1 localhost {SERVER}\n");
    give(pair, "etc/hosts", hosts, 0o644);
}

/// Copies what Python needs to run `script` with `-S`: itself as `python3`, and the imported modules.
pub fn give_python(pair: &ClientAndServer, script: &str) {
    let imports = script.lines().filter(|line| line.starts_with("import "));
    let mut ask: Vec<&str> = imports.collect();
    ask.push("import sys\nfor m in list(sys.modules.values()): print(getattr(m, '__file__', None) or '')");
    ask.push("print(os.path.realpath(sys.executable))");
    let python = sprat_testkit::needs::find_program("python3").expect("checked by missing()");
    let output = Command::new(python)
        .args(["-S", "-c", &ask.join("\n")])
        .output()
        .expect("python3 runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut paths = said.lines().filter(|path| path.starts_with('/'));
    let executable = paths.next_back().expect("its own path");
    give_program(pair, Path::new(executable));
    give(
        pair,
        "usr/bin/python3",
        format!("#!/bin/sh\nexec {executable} \"$@\"\n"),
        0o755,
    );
    for module in paths.map(Path::new) {
        match module.extension().is_some_and(|ending| ending == "so") {
            true => give_program(pair, module),
            false => give_file(pair, module, 0o644),
        }
    }
}

fn give_file(pair: &ClientAndServer, path: &Path, mode: u32) {
    let at = path.strip_prefix("/").expect("an absolute path");
    let content = fs::read(path).expect("a file of this machine");
    give(pair, &at.display().to_string(), content, mode);
}

fn give_libraries(pair: &ClientAndServer, program: &Path) {
    let there = libraries(Path::new("cryptsetup"));
    for library in libraries(program).difference(&there) {
        give_file(pair, library, 0o755);
    }
}

fn libraries(program: &Path) -> BTreeSet<PathBuf> {
    let program = sprat_testkit::needs::find_program(&program.display().to_string());
    let output = Command::new("ldd")
        .arg(program.expect("checked by missing()"))
        .output()
        .expect("ldd runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    paths.map(PathBuf::from).collect()
}

/// One of the scripts in `tests/vm`.
pub fn script(name: &str) -> String {
    fs::read_to_string(repository().join("tests/vm").join(name)).expect("tracked")
}

fn command(pair: &ClientAndServer, script: &str, limit: Duration, more: &[&OsStr]) -> Command {
    let path = pair.path("vm-script");
    write(&path, script, 0o600);
    let mut command = tool("vm");
    // Temporary files of a killed guest are removed with the client's folder.
    command.env("TMPDIR", pair.path(""));
    command.args(["run", "--with"]).arg(pair.path("overlay"));
    command.args(more);
    command.arg("--limit").arg(limit.as_secs().to_string());
    command.arg(path);
    command
}

/// Boots it and runs a script; anything but exit code 0 fails the test. Returns its output.
pub fn run(pair: &ClientAndServer, script: &str, limit: Duration) -> String {
    run_with(pair, script, limit, &[])
}

/// The same with any options of `tests/vm/vm`.
pub fn run_with(pair: &ClientAndServer, script: &str, limit: Duration, more: &[&OsStr]) -> String {
    let mut command = command(pair, script, limit, more);
    let output = run_within(&mut command, limit + Duration::from_secs(60));
    assert!(output.status.success(), "{}", shown(&command, &output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Where the server is, for scripts.
pub fn server(pair: &ClientAndServer) -> String {
    let folder = pair.server();
    format!("port={}\nfolder={}\n", pair.sshd.port(), folder.display())
}

/// Runs one of the scripts in `tests/vm` with these variables, and prints its headlines. The last word of
/// its output must be "done".
pub fn run_until_done(pair: &ClientAndServer, variables: &str, name: &str, limit: Duration) {
    is_done(&run(pair, &(variables.to_owned() + &script(name)), limit));
}

/// The same in a guest whose clocks leap ahead whenever it waits.
pub fn leap_until_done(pair: &ClientAndServer, variables: &str, name: &str, limit: Duration) {
    let script = variables.to_owned() + &script(name);
    is_done(&run_with(pair, &script, limit, &["--leap".as_ref()]));
}

/// Prints the headlines of a script's output, whose last word must be "done".
pub fn is_done(said: &str) {
    for line in said.lines().filter(|line| line.starts_with('=')) {
        println!("{line}");
    }
    assert!(said.trim_end().ends_with("done"), "{said}");
}

/// A guest that runs, and the output of its script.
pub struct Booted {
    child: Child,
    lines: Receiver<String>,
    pub said: Vec<String>,
}

impl Booted {
    /// Boots it with a disk of its own, `/dev/vdb`.
    pub fn start(pair: &ClientAndServer, script: &str, limit: Duration, disk: &Path) -> Self {
        Self::start_with(pair, script, limit, &["--disk".as_ref(), disk.as_os_str()])
    }

    /// The same with any options of `tests/vm/vm`.
    pub fn start_with(
        pair: &ClientAndServer,
        script: &str,
        limit: Duration,
        more: &[&OsStr],
    ) -> Self {
        let mut command = command(pair, script, limit, more);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .process_group(0);
        let mut child = command.spawn().expect("tests/vm/vm starts");
        let pipe = child.stdout.take().expect("a pipe");
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        Self {
            child,
            lines,
            said: Vec::new(),
        }
    }

    /// Waits for a line that begins with `word`; returns the rest of it.
    pub fn until(&mut self, word: &str, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let found = line.strip_prefix(word).map(|rest| rest.trim().to_owned());
                    self.said.push(line);
                    if let Some(found) = found {
                        return found;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no {word} in time: {:#?}", self.said),
                Err(RecvTimeoutError::Disconnected) => panic!("no {word}: {:#?}", self.said),
            }
        }
    }

    /// Whether it has printed a line that begins with `word` by now.
    pub fn has_said(&mut self, word: &str) -> bool {
        self.said.extend(self.lines.try_iter());
        self.said.iter().any(|line| line.starts_with(word))
    }

    /// The power is cut.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        self.end();
    }
}
