//! What a session process does for its volume and worker processes: starts them, passes the FUSE
//! descriptor between them, sends commands, and ends them. Used by the tests and by the role `session`.
#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub struct ChainOptions {
    /// The worker gets its own namespaces.
    pub private: bool,
    /// The volume process keeps writes in memory.
    pub overlay: bool,
}

impl Default for ChainOptions {
    fn default() -> Self {
        Self {
            private: true,
            overlay: false,
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Pids {
    pub volume: u32,
    pub outer: u32,
    pub inner: u32,
}

/// A volume process and a worker.
pub struct Chain {
    pub volume: Child,
    pub worker: Child,
    to_volume: UnixStream,
    to_worker: UnixStream,
    inner: u32,
}

/// The program with the roles.
pub fn roles() -> std::path::PathBuf {
    option_env!("CARGO_BIN_EXE_attach-test-roles")
        .map_or_else(|| std::env::current_exe().unwrap(), Into::into)
}

/// Reads a line byte by byte, because a descriptor may follow, which must not be read.
pub fn read_line(socket: &UnixStream) -> Option<String> {
    let mut socket = socket;
    let mut line = Vec::new();
    let mut byte = [0_u8; 1];
    loop {
        match socket.read(&mut byte) {
            Ok(1) if byte == *b"\n" => return Some(String::from_utf8(line).unwrap()),
            Ok(1) => line.extend(byte),
            _ => return None,
        }
    }
}

fn spawn(arguments: &[&str]) -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(roles());
    command
        .args(arguments)
        .stdin(Stdio::from(OwnedFd::from(theirs)));
    sprat_attach::bind_to_this_process(&mut command);
    (command.spawn().unwrap(), ours)
}

impl Chain {
    pub fn start(file: &Path, options: &ChainOptions) -> Self {
        let file = file.to_str().unwrap();
        let overlay = if options.overlay { "overlay" } else { "plain" };
        let private = if options.private { "private" } else { "shared" };
        let (volume, to_volume) = spawn(&["volume", file, overlay]);
        let (worker, to_worker) = spawn(&["worker", file, private]);
        // It is running by now: a session must list only living processes.
        let greeting = read_line(&to_worker).expect("the worker starts");
        let inner = greeting.strip_prefix("ok ").unwrap().parse().unwrap();
        Self {
            volume,
            worker,
            to_volume,
            to_worker,
            inner,
        }
    }

    pub fn pids(&self) -> Pids {
        Pids {
            volume: self.volume.id(),
            outer: self.worker.id(),
            inner: self.inner,
        }
    }

    /// Attaches FUSE file and loop device. Returns the device's path.
    pub fn attach(&mut self) -> Result<String, String> {
        self.begin()?;
        self.ask_worker("loop")
    }

    /// Mounts the FUSE file and lets the volume process serve it.
    pub fn begin(&mut self) -> Result<(), String> {
        self.tell_worker("begin");
        match read_line(&self.to_worker).as_deref() {
            Some("fuse") => {}
            other => return Err(format!("begin: {other:?}")),
        }
        let fuse = sprat_attach::receive_fd(&self.to_worker).map_err(|e| e.to_string())?;
        send(&self.to_volume, "serve");
        sprat_attach::send_fd(&self.to_volume, fuse.as_fd()).map_err(|e| e.to_string())?;
        drop(fuse);
        answer(&self.to_worker)?;
        answer(&self.to_volume).map(drop)
    }

    pub fn tell_worker(&mut self, command: &str) {
        send(&self.to_worker, command);
    }

    pub fn worker_answer(&mut self) -> Result<String, String> {
        answer(&self.to_worker)
    }

    pub fn ask_worker(&mut self, command: &str) -> Result<String, String> {
        self.tell_worker(command);
        answer(&self.to_worker)
    }

    /// Runs a shell command in the worker. Returns its output if it succeeded.
    pub fn sh(&mut self, script: &str) -> Result<String, String> {
        let said = self.ask_worker(&format!("sh {script}"))?;
        let (code, output) = said.split_once(' ').unwrap_or((&said, ""));
        if code == "0" {
            Ok(output.to_owned())
        } else {
            Err(format!("{code} {output}"))
        }
    }

    pub fn ask_volume(&mut self, command: &str) -> Result<String, String> {
        send(&self.to_volume, command);
        let said = read_line(&self.to_volume).ok_or("the volume process is gone")?;
        Ok(said)
    }

    /// A counter of the volume process.
    pub fn count(&mut self, name: &str) -> u64 {
        let said = self.ask_volume("stats").unwrap();
        said.split(' ')
            .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or_else(|| panic!("no {name} in {said}"))
            .parse()
            .unwrap()
    }

    pub fn worker_socket(&self) -> UnixStream {
        self.to_worker.try_clone().unwrap()
    }

    pub fn volume_socket(&self) -> UnixStream {
        self.to_volume.try_clone().unwrap()
    }

    /// Unmounts, and waits until both processes have ended by themselves. Returns the volume process's
    /// status.
    pub fn end(mut self) -> ExitStatus {
        self.ask_worker("end").unwrap();
        drop(self.to_worker);
        assert!(wait(&mut self.worker).success());
        wait(&mut self.volume)
    }
}

/// If the process is dead, the answer will be missing.
fn send(socket: &UnixStream, command: &str) {
    let mut socket = socket;
    let _ = socket.write_all(format!("{command}\n").as_bytes());
}

fn answer(socket: &UnixStream) -> Result<String, String> {
    let said = read_line(socket).ok_or("the process is gone")?;
    match said.split_once(' ').unwrap_or((&said, "")) {
        ("ok", rest) => Ok(rest.to_owned()),
        _ => Err(said),
    }
}

/// Waits for a child that must end soon.
pub fn wait(child: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "process {} doesn't end",
            child.id()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
