//! A wire over the pipes of a program, usually `ssh … -s host sftp`.

use std::ffi::OsString;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::FdFlags;
use rustix::process::{Pid, Signal};

use super::wire::{Dial, Ending, EndingKind, Wire, WireEnd};
use crate::text::printable;
use crate::{IgnorePoison, StoreError};

/// How much of the program's standard error is kept (the end of it).
const STDERR_BYTES_MAX: usize = 4096;
/// How long a program may take to exit after it was asked to, or killed.
const EXIT_PATIENCE: Duration = Duration::from_secs(2);
/// ssh's exit status for its own failures (ssh(1), EXIT STATUS).
const SSH_FAILED: i32 = 255;
/// A shell's exit status if it found no such program (POSIX, 2.8.2); ssh passes the server's on.
const SHELL_FOUND_NOTHING: i32 = 127;

/// Starts a program once per channel.
#[derive(Debug)]
pub(crate) struct Program {
    argv: Vec<OsString>,
    /// Its name in messages: the program itself, not a shell around it.
    name: String,
    host: String,
}

impl Program {
    /// With `hold_fds` the program runs below a shell that only waits for it, and for the end of
    /// this process. ssh closes every inherited descriptor beyond 2 when it starts (`closefrom` in
    /// ssh.c), so it can't keep a flock itself. The shell can, for exactly as long.
    pub(crate) fn new(argv: Vec<OsString>, host: &str, hold_fds: bool) -> Self {
        let name = argv.first().map_or_else(String::new, |program| {
            program.to_string_lossy().into_owned()
        });
        let mut whole: Vec<OsString> = Vec::new();
        if hold_fds {
            whole.extend(["/bin/sh", "-c", &shell_script()].map(OsString::from));
        }
        whole.extend(argv);
        Self {
            argv: whole,
            name,
            host: host.to_owned(),
        }
    }
}

impl Dial for Program {
    fn dial(&self) -> Result<Wire, StoreError> {
        let unreachable = |reason: String| StoreError::Unreachable {
            host: printable(self.host.as_bytes()),
            reason,
        };
        let (program, arguments) = self
            .argv
            .split_first()
            .ok_or_else(|| unreachable("no program to run".to_owned()))?;
        // The shell around it would report this only as text, and the server's shell may print the
        // same.
        if is_missing(&self.name) {
            return Err(StoreError::ProgramMissing {
                program: printable(self.name.as_bytes()),
            });
        }
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C in the terminal is for sprat, which ends its sessions cleanly. And the group
            // can be killed as a whole: ssh starts helpers (ProxyCommand, ProxyJump).
            .process_group(0)
            .spawn()
            .map_err(|error| {
                unreachable(format!("can't run {}: {error}", program.to_string_lossy()))
            })?;
        tracing::debug!(program = %self.name, pid = child.id(), "started");
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            unreachable_pipes(&mut child);
            return Err(unreachable("the program has no pipes".to_owned()));
        };
        let end = ProgramEnd::new(child, stderr, &self.name)
            .map_err(|error| unreachable(format!("can't watch the program: {error}")))?;
        Ok(Wire {
            reader: Box::new(stdout),
            writer: Box::new(stdin),
            end: Box::new(end),
        })
    }
}

/// Whether the search path has no file of this name. A file that can't be run for another reason is
/// not missing.
fn is_missing(program: &str) -> bool {
    let is_there = |path: &Path| path.symlink_metadata().is_ok();
    if program.contains('/') {
        return !is_there(Path::new(program));
    }
    let Some(folders) = std::env::var_os("PATH") else {
        return false;
    };
    !std::env::split_paths(&folders).any(|folder| is_there(&folder.join(program)))
}

/// A pipe that shows other processes the end of this one: it is the only writer. The reading end is
/// inherited by the programs that are started.
fn lifeline() -> Option<RawFd> {
    static PIPE: OnceLock<Option<(PipeReader, PipeWriter)>> = OnceLock::new();
    let made = PIPE.get_or_init(|| {
        let (reader, writer) = io::pipe().ok()?;
        rustix::io::fcntl_setfd(&reader, FdFlags::empty()).ok()?;
        Some((reader, writer))
    });
    made.as_ref().map(|(reader, _)| reader.as_raw_fd())
}

/// The shell's script: runs the program, and kills all of its group once this process has ended in
/// any way. An ssh that is still connecting, or whose server is stuck, would not notice the end of
/// its pipes and would keep the flock for that long.
fn shell_script() -> String {
    // There must be a command behind the program; otherwise the shell would replace itself by it.
    let Some(lifeline) = lifeline() else {
        return "\"$0\" \"$@\"; exit \"$?\"".to_owned();
    };
    let pipe = format!("/proc/self/fd/{lifeline}");
    format!(
        "{{ [ -p {pipe} ] && {{ read -r _ <{pipe}; kill -9 0; }}; }} </dev/null >/dev/null 2>&1 & \
         \"$0\" \"$@\"; e=$?; {{ kill -9 $!; wait $!; }} 2>/dev/null; exit $e"
    )
}

fn unreachable_pipes(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// The running program, and its output on standard error.
struct ProgramEnd {
    program: String,
    child: Mutex<(Child, Option<ExitStatus>)>,
    heard: Arc<Mutex<Vec<u8>>>,
    /// Closing it ends the listener even if an escaped descendant keeps standard error open.
    stop: Option<PipeWriter>,
    listener: Option<JoinHandle<()>>,
}

impl ProgramEnd {
    fn new(child: Child, stderr: ChildStderr, program: &str) -> io::Result<Self> {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let mut end = Self {
            program: program.to_owned(),
            child: Mutex::new((child, None)),
            heard: Arc::clone(&heard),
            stop: None,
            listener: None,
        };
        let (stopped, stop) = io::pipe()?;
        end.stop = Some(stop);
        let listener = std::thread::Builder::new()
            .name("sftp-stderr".to_owned())
            .spawn(move || listen(stderr, &stopped, &heard))?;
        end.listener = Some(listener);
        Ok(end)
    }

    fn kill_group(&self) {
        let child = self.child.lock().ignore_poison();
        // Not reaped yet, so the number is still this group's.
        if child.1.is_none()
            && let Some(pid) = i32::try_from(child.0.id()).ok().and_then(Pid::from_raw)
        {
            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        }
    }

    /// Waits up to `patience` for the exit status.
    fn exit_status(&self, patience: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + patience;
        loop {
            {
                let mut child = self.child.lock().ignore_poison();
                if child.1.is_none() {
                    // Helpers of a dead leader are killed before its process id becomes free.
                    child.1 = self.reap(&mut child.0);
                }
                if child.1.is_some() || Instant::now() >= until {
                    return child.1;
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn reap(&self, child: &mut Child) -> Option<ExitStatus> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw)?;
        let flags = rustix::process::WaitIdOptions::EXITED
            | rustix::process::WaitIdOptions::NOHANG
            | rustix::process::WaitIdOptions::NOWAIT;
        match rustix::process::waitid(rustix::process::WaitId::Pid(pid), flags) {
            Ok(Some(_)) => {
                let _ = rustix::process::kill_process_group(pid, Signal::KILL);
                child.try_wait().ok().flatten()
            }
            _ => None,
        }
    }
}

impl WireEnd for ProgramEnd {
    fn cut(&self) {
        self.kill_group();
        self.exit_status(EXIT_PATIENCE);
    }

    fn ending(&self, patience: Duration) -> Ending {
        let status = self.exit_status(patience);
        if status.is_some() {
            // Its last output may still be in the pipe.
            let until = Instant::now() + Duration::from_millis(200);
            while self
                .listener
                .as_ref()
                .is_some_and(|listener| !listener.is_finished())
                && Instant::now() < until
            {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        explain(&self.program, status, &self.heard.lock().ignore_poison())
    }
}

impl Drop for ProgramEnd {
    fn drop(&mut self) {
        // Its input is closed by now, so it is about to exit.
        if self.exit_status(EXIT_PATIENCE).is_none() {
            self.cut();
        }
        self.stop = None;
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

/// Keeps the end of the program's output, until it has ended or `stopped` is closed.
fn listen(mut stderr: ChildStderr, stopped: &PipeReader, heard: &Mutex<Vec<u8>>) {
    let mut chunk = [0; 1024];
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        }
        let (has_text, has_stopped) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if !has_text && has_stopped {
            return;
        }
        match stderr.read(&mut chunk) {
            Ok(0) => return,
            Ok(read) => {
                let mut heard = heard.lock().ignore_poison();
                heard.extend_from_slice(&chunk[..read]);
                let surplus = heard.len().saturating_sub(STDERR_BYTES_MAX);
                heard.drain(..surplus);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Translates an exit status and ssh's messages. The texts are those of OpenSSH 9.2's sshconnect.c,
/// sshconnect2.c and clientloop.c; an unknown one is shown as it is.
fn explain(program: &str, status: Option<ExitStatus>, heard: &[u8]) -> Ending {
    let text = String::from_utf8_lossy(heard).into_owned();
    let said = |needles: &[&str]| needles.iter().any(|needle| text.contains(needle));
    let last_lines = {
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && *line != "remove with:")
            .filter(|line| !line.starts_with("ssh-keygen "))
            .collect();
        printable(lines[lines.len().saturating_sub(3)..].join("; ").as_bytes())
    };
    let code = status.and_then(|status| status.code());
    let lacks_program = code == Some(SHELL_FOUND_NOTHING);
    let kind = if said(&[
        "Host key verification failed",
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "No matching host key",
    ]) {
        EndingKind::HostKey
    } else if said(&["Permission denied (", "Too many authentication failures"]) {
        EndingKind::LoginRefused
    } else if said(&["subsystem request failed"]) {
        return Ending {
            kind: EndingKind::Unreachable,
            reason: format!("the server offers no SFTP ({last_lines})"),
        };
    } else if said(&["exec request failed"]) {
        return Ending {
            kind: EndingKind::Lost,
            reason: format!("the server runs no commands ({last_lines})"),
        };
    } else if lacks_program || code == Some(SSH_FAILED) {
        EndingKind::Unreachable
    } else {
        EndingKind::Lost
    };
    let how = match status {
        None => format!("{program} closed its output"),
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("{program} ended with status {code}"),
            (None, Some(signal)) => format!("{program} was ended by signal {signal}"),
            (None, None) => format!("{program} ended"),
        },
    };
    let said = match kind {
        EndingKind::HostKey => changed_key(&text).unwrap_or(last_lines),
        _ => last_lines,
    };
    let reason = if lacks_program {
        let said = [said, how].join("; ");
        let said = said.trim_start_matches("; ");
        format!("the server does not have the program for SFTP ({said})")
    } else if said.is_empty() {
        how
    } else {
        format!("{said} ({how})")
    };
    Ending { kind, reason }
}

/// What ssh prints about a changed host key, without the command that would remove the known one.
/// That command is the first of ssh's last lines, and must not be followed before the new key was
/// compared. The texts are those of `warn_changed_key` and `check_host_key` (OpenSSH's
/// sshconnect.c).
fn changed_key(text: &str) -> Option<String> {
    if !text.contains("IDENTIFICATION HAS CHANGED") {
        return None;
    }
    let mut lines = text.lines().map(str::trim);
    let shown = lines.find_map(|line| {
        let kind = line.strip_prefix("The fingerprint for the ")?;
        kind.split_once(" key sent by the remote host is")
    });
    let fingerprint = lines.next().unwrap_or_default().trim_end_matches('.');
    let known = lines.find_map(|line| {
        let known = line.strip_prefix("Offending ")?;
        known.split_once(" in ")
    });
    let mut said = "it differs from the one that this machine knows".to_owned();
    if let Some((kind, _)) = shown {
        said.push_str(&format!(": the server shows the {kind} key {fingerprint}"));
    }
    if let Some((kind, place)) = known {
        said.push_str(&format!(", known is the {kind} of {place}"));
    }
    Some(printable(said.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_messages_are_distinguished() {
        let failed = Some(ExitStatus::from_raw(SSH_FAILED << 8));
        for (text, kind) in [
            ("Host key verification failed.\r\n", EndingKind::HostKey),
            (
                "root@h: Permission denied (publickey).\r\n",
                EndingKind::LoginRefused,
            ),
            (
                "ssh: connect to host h port 1: Connection refused",
                EndingKind::Unreachable,
            ),
            (
                "ssh: Could not resolve hostname h: Name or service not known",
                EndingKind::Unreachable,
            ),
            (
                "subsystem request failed on channel 0",
                EndingKind::Unreachable,
            ),
            ("exec request failed on channel 0", EndingKind::Lost),
        ] {
            let ending = explain("ssh", failed, text.as_bytes());
            assert_eq!(ending.kind, kind, "{text}");
            assert!(ending.reason.contains(text.trim()), "{}", ending.reason);
        }
        assert_eq!(
            explain("x", Some(ExitStatus::from_raw(0)), b"").kind,
            EndingKind::Lost
        );
    }

    #[test]
    fn changed_host_key_is_shown_without_the_command_that_removes_it() {
        // As OpenSSH 9.2 prints it.
        let text = "@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@\r\n\
            @    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\r\n\
            @@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@\r\n\
            IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!\r\n\
            Someone could be eavesdropping on you right now (man-in-the-middle attack)!\r\n\
            It is also possible that a host key has just been changed.\r\n\
            The fingerprint for the ED25519 key sent by the remote host is\nSHA256:abc/def.\r\n\
            Please contact your system administrator.\r\n\
            Add correct host key in /root/.ssh/known_hosts to get rid of this message.\r\n\
            Offending ECDSA key in /root/.ssh/known_hosts:7\r\n  remove with:\r\n  \
            ssh-keygen -f \"/root/.ssh/known_hosts\" -R \"h\"\r\n\
            Host key for h has changed and you have requested strict checking.\r\n\
            Host key verification failed.\r\n";
        let failed = Some(ExitStatus::from_raw(SSH_FAILED << 8));
        let ending = explain("ssh", failed, text.as_bytes());
        assert_eq!(ending.kind, EndingKind::HostKey);
        assert_eq!(
            ending.reason,
            "it differs from the one that this machine knows: the server shows the ED25519 key \
             SHA256:abc/def, known is the ECDSA key of /root/.ssh/known_hosts:7 (ssh ended with status 255)"
        );
        // With the wording of a later version the command does not come first either.
        let from = text.find("Offending").unwrap();
        let reason = explain("ssh", failed, &text.as_bytes()[from..]).reason;
        assert!(!reason.contains("ssh-keygen"), "{reason}");
    }

    #[test]
    fn server_text_is_escaped_and_bounded() {
        let ending = explain("ssh", None, &[b"\x1b[2Jevil", &[b'x'; 9000][..]].concat());
        assert!(!ending.reason.contains('\x1b'));
        assert!(ending.reason.chars().count() < 400);
    }

    #[test]
    fn missing_local_program_differs_from_one_missing_on_the_server() {
        for program in ["/nonexistent/ssh", "no-such-program-anywhere"] {
            for hold_fds in [false, true] {
                let dial = Program::new(vec![program.into()], "host", hold_fds);
                let error = dial.dial().map(|_| ()).unwrap_err();
                assert_eq!(error.kind(), crate::StoreErrorKind::ProgramMissing);
                assert!(error.to_string().contains(program), "{error}");
            }
        }
        let status = Some(ExitStatus::from_raw(SHELL_FOUND_NOTHING << 8));
        let said = b"bash: line 1: /usr/lib/sftp-server: No such file or directory\n";
        let ending = explain("ssh", status, said);
        assert_eq!(ending.kind, EndingKind::Unreachable);
        assert!(
            ending.reason.contains("server does not have the program"),
            "{}",
            ending.reason
        );
    }

    #[test]
    fn descendant_with_open_stderr_does_not_block_the_end() {
        let argv = [
            "/bin/sh",
            "-c",
            "setsid sleep 40 </dev/null >/dev/null & exec cat",
        ];
        let dial = Program::new(argv.map(OsString::from).to_vec(), "host", false);
        let wire = dial.dial().unwrap();
        let begun = Instant::now();
        drop((wire.writer, wire.reader, wire.end));
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
}
