//! Runs a program of the user: with a time limit, in a process group of its own, without a shell.

use std::ffi::OsStr;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process_group};

/// The search path of programs that sprat starts for the user.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Of its output only the end is kept.
pub const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// How often this checks whether it has ended.
const CHECK_INTERVAL: Duration = Duration::from_millis(10);
/// How long a program has between SIGTERM and SIGKILL.
const TERMINATION: Duration = Duration::from_secs(1);
/// How long to wait for the end of its output once it has ended: a child of it may keep that open.
const OUTPUT_PATIENCE: Duration = Duration::from_millis(500);

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// `None`: it was killed at the limit.
    pub status: Option<ExitStatus>,
    /// The end of its standard output.
    pub stdout: Vec<u8>,
    /// The end of its standard error.
    pub stderr: Vec<u8>,
}

/// Runs `words` with `input` on its standard input, in `/`, with nothing in its environment but `PATH`,
/// `HOME` and `LANG`. At the limit its process group gets SIGTERM, then SIGKILL. Only the exit of the
/// process counts, not whether a child of it keeps its output open.
///
/// # Errors
/// The program can't be started.
pub fn run(words: &[impl AsRef<OsStr>], input: &[u8], limit: Duration) -> io::Result<Ended> {
    use std::os::unix::process::CommandExt;

    let [program, arguments @ ..] = words else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no program"));
    };
    let home = if rustix::process::geteuid().is_root() {
        "/root"
    } else {
        "/"
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs([("PATH", PATH), ("HOME", home), ("LANG", "C.UTF-8")])
        .current_dir("/")
        .process_group(0)
        .stdin(in_memory(input)?)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().map(tail_of);
    let stderr = child.stderr.take().map(tail_of);
    let group = Pid::from_child(&child);
    let mut wait_until = |end: Instant| loop {
        if let Some(status) = child.try_wait()? {
            return Ok::<_, io::Error>(Some(status));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        std::thread::sleep(CHECK_INTERVAL);
    };
    let status = wait_until(Instant::now() + limit)?;
    if status.is_none() {
        let _ = kill_process_group(group, Signal::TERM);
        let _ = wait_until(Instant::now() + TERMINATION)?;
        let _ = kill_process_group(group, Signal::KILL);
        let _ = wait_until(Instant::now() + TERMINATION)?;
    }
    let take = |output: Option<mpsc::Receiver<Vec<u8>>>| {
        let output = output.and_then(|output| output.recv_timeout(OUTPUT_PATIENCE).ok());
        output.unwrap_or_default()
    };
    Ok(Ended {
        status,
        stdout: take(stdout),
        stderr: take(stderr),
    })
}

/// A file in memory, so that nobody has to write while the program reads.
fn in_memory(input: &[u8]) -> io::Result<Stdio> {
    let file = rustix::fs::memfd_create("sprat-input", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    file.write_all(input)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file.into())
}

/// Reads to the end on a thread, and sends what came last.
fn tail_of(mut output: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut tail = Vec::new();
        let mut piece = vec![0; OUTPUT_BYTES_MAX];
        while let Ok(count @ 1..) = output.read(&mut piece) {
            tail.extend_from_slice(&piece[..count]);
            let surplus = tail.len().saturating_sub(OUTPUT_BYTES_MAX);
            tail.drain(..surplus);
        }
        let _ = sender.send(tail);
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn shell(script: &str, limit: Duration) -> Ended {
        run(&["sh", "-c", script], b"input", limit).unwrap()
    }

    #[test]
    fn input_environment_and_status_arrive() {
        let ended = shell("cat; env | sort; pwd; echo bad >&2; exit 3", LIMIT);
        assert_eq!(ended.status.unwrap().code(), Some(3));
        let text = String::from_utf8(ended.stdout).unwrap();
        let lines: Vec<_> = text
            .lines()
            .filter(|line| !line.starts_with("PWD="))
            .collect();
        assert_eq!(lines[0].split('=').next(), Some("inputHOME"));
        assert_eq!(lines[1..], ["LANG=C.UTF-8", &format!("PATH={PATH}"), "/"]);
        assert_eq!(ended.stderr, b"bad\n");
    }

    #[test]
    fn program_that_hangs_is_killed_with_its_children() {
        let begun = Instant::now();
        let ended = shell(
            "trap '' TERM; sleep 1000 & wait; sleep 1000",
            Duration::from_millis(100),
        );
        assert!(ended.status.is_none());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_child_that_keeps_the_output_open_is_not_waited_for() {
        let begun = Instant::now();
        let ended = shell("sleep 20 & exit 0", LIMIT);
        assert!(ended.status.unwrap().success());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn only_the_end_of_much_output_is_kept() {
        let ended = shell("yes | head -c 1000000; echo end", LIMIT);
        assert_eq!(ended.stdout.len(), OUTPUT_BYTES_MAX);
        assert!(ended.stdout.ends_with(b"end\n"));
    }

    #[test]
    fn program_that_is_not_there_is_an_error() {
        assert!(run(&["/no/such/program"], b"", LIMIT).is_err());
        assert!(run(&[""; 0], b"", LIMIT).is_err());
    }
}
