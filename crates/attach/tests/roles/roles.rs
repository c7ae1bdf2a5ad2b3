//! The processes of a session for tests: `volume`, `worker`, and `session`, which starts both.
//!
//! Each has its control socket as stdin and exchanges lines. A descriptor follows the line that
//! announces it.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]
#![allow(missing_docs)]

mod chain;
mod device;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use sprat_attach::{
    AttachError, AttachOptions, Attachment, MkfsOptions, MountOptions, ServeOptions,
};

use chain::{Chain, ChainOptions};
use device::FileDevice;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["volume", file, rest @ ..] => volume(Path::new(file), rest.contains(&"overlay")),
        ["worker", _tag, rest @ ..] => worker(rest.contains(&"private")),
        ["session", file, dir, slow, load] => session(Path::new(file), Path::new(dir), slow, load),
        other => panic!("no such role: {other:?}"),
    }
}

/// The control socket: this process's stdin.
fn control() -> UnixStream {
    let socket: OwnedFd = io::stdin().as_fd().try_clone_to_owned().unwrap();
    UnixStream::from(socket)
}

fn say(control: &UnixStream, line: &str) {
    let mut control = control;
    // If the session is gone, the next read fails.
    let _ = control.write_all(format!("{line}\n").as_bytes());
}

fn volume(file: &Path, overlay: bool) {
    // Best effort, as in the real volume process.
    let _ = sprat_attach::become_io_flusher();
    let _ = sprat_attach::lock_memory();
    sprat_attach::return_freed_memory();
    sprat_attach::hide_from_debuggers().unwrap();
    let control = control();
    let device = Arc::new(FileDevice::open(file, overlay));
    while let Some(line) = chain::read_line(&control) {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["serve"] => {
                let fuse = sprat_attach::receive_fd(&control).unwrap();
                let options = ServeOptions::default();
                let serving = sprat_attach::serve(fuse, device.clone(), &options).unwrap();
                std::thread::spawn(move || {
                    let ended = serving.wait();
                    if let Err(e) = &ended {
                        eprintln!("volume: {e:?}");
                    }
                    std::process::exit(i32::from(ended.is_err()));
                });
                say(&control, "ok");
            }
            ["stats"] => say(&control, &device.statistics()),
            ["slow", from, to, ms] => {
                let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
                device.slow_reads(from..to, Duration::from_millis(ms.parse().unwrap()));
                say(&control, "ok");
            }
            ["slow-writes", ms] => {
                device.slow_writes(Duration::from_millis(ms.parse().unwrap()));
                say(&control, "ok");
            }
            ["fail"] => {
                device.fail();
                say(&control, "ok");
            }
            ["panic"] => {
                device.panic_from_now_on();
                say(&control, "ok");
            }
            other => panic!("volume: no such command: {other:?}"),
        }
    }
    // The session is gone.
    std::process::exit(1);
}

fn worker(private: bool) {
    if private {
        sprat_attach::enter_private_namespaces().unwrap();
    }
    let control = control();
    let mut attachment: Option<Attachment> = None;
    // This process's number outside: /proc is still that of the outer namespace.
    let pid = std::fs::read_link("/proc/self").unwrap();
    say(&control, &format!("ok {}", pid.display()));
    while let Some(line) = chain::read_line(&control) {
        let (command, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let done = match command {
            "begin" => begin(&control).map(|begun| {
                attachment = Some(begun);
                String::new()
            }),
            "sh" => Ok(shell(rest)),
            "end" => attachment.take().unwrap().unmount().map(|()| String::new()),
            "leave" => attachment
                .take()
                .unwrap()
                .leave_mounted()
                .map(|()| String::new()),
            _ => act(attachment.as_mut().unwrap(), command, rest),
        };
        match done {
            Ok(said) => say(&control, &format!("ok {said}")),
            Err(e) => {
                let cause = std::error::Error::source(&e).map(ToString::to_string);
                say(
                    &control,
                    &format!("error {e}: {}", cause.unwrap_or_default()),
                );
            }
        }
    }
}

fn begin(control: &UnixStream) -> Result<Attachment, AttachError> {
    let fuse = sprat_attach::open_fuse()?;
    let attachment = Attachment::begin(fuse.as_fd(), AttachOptions::default())?;
    say(control, "fuse");
    sprat_attach::send_fd(control, fuse.as_fd())?;
    Ok(attachment)
}

fn act(attachment: &mut Attachment, command: &str, rest: &str) -> Result<String, AttachError> {
    match command {
        "loop" => {
            attachment.attach_loop()?;
            Ok(attachment.device().display().to_string())
        }
        "mkfs" => {
            let options = MkfsOptions::labelled(rest);
            sprat_attach::make_file_system(attachment.device(), &options)?;
            Ok(String::new())
        }
        "mkfs-btrfs" => {
            let options = MkfsOptions::labelled(rest);
            sprat_attach::make_btrfs(attachment.device(), &options)?;
            Ok(String::new())
        }
        "mount-btrfs" | "mount-btrfs-ro" => {
            let mut options = MountOptions::default();
            options.read_only = command == "mount-btrfs-ro";
            attachment.mount_btrfs(Path::new(rest), &options)?;
            Ok(String::new())
        }
        "grow-btrfs" => {
            attachment.resize_btrfs(rest.parse().unwrap())?;
            Ok(String::new())
        }
        "mount" | "mount-ro" | "mount-browse" => {
            let mut options = MountOptions::default();
            options.read_only = command == "mount-ro";
            options.browse = command == "mount-browse";
            attachment.mount(Path::new(rest), &options)?;
            Ok(String::new())
        }
        other => panic!("worker: no such command: {other:?}"),
    }
}

/// Runs a shell command. Returns exit status and output in one line.
fn shell(script: &str) -> String {
    let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let code = output.status.code().unwrap_or(-1);
    format!("{code} {}", text.trim().replace('\n', "; "))
}

/// A session that mounts `file` on `dir` and runs `load` there until a process dies. Prints the pids of
/// volume, outer and inner worker, and `mounted`.
fn session(file: &Path, dir: &Path, slow_writes_ms: &str, load: &str) {
    let mut chain = Chain::start(file, &ChainOptions::default());
    let pids = chain.pids();
    println!("{} {} {}", pids.volume, pids.outer, pids.inner);
    let volume = chain.volume_socket();
    let lived = run_load(&mut chain, dir, slow_writes_ms, load);
    if lived.is_ok() {
        // As in a real session: when one dies, the others are ended.
        std::thread::spawn(move || {
            let _ = (&volume).read(&mut [0_u8; 1]);
            std::process::exit(3);
        });
        let _ = chain.worker_answer();
    }
    std::process::exit(4);
}

fn run_load(chain: &mut Chain, dir: &Path, slow_writes_ms: &str, load: &str) -> Result<(), String> {
    chain.attach()?;
    chain.ask_worker(&format!("mount {}", dir.display()))?;
    chain.ask_volume(&format!("slow-writes {slow_writes_ms}"))?;
    println!("mounted");
    chain.tell_worker(&format!("sh {load}"));
    Ok(())
}
