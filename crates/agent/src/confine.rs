//! Takes away what serving does not need, in case the parser has a fault.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Resource, Rlimit};

use crate::disk;

/// Landlock needs calls that only `unsafe` code can make, and its crate brings ten others with it: more than this
/// program may have. This program of util-linux 2.40 and later makes them.
const SETPRIV: &str = "/usr/bin/setpriv";
/// What serving does below the root. Nothing there is run or renamed into another folder, and no link is made.
const SERVES: &str =
    "read-file,read-dir,write-file,truncate,make-reg,make-dir,remove-file,remove-dir";
const RUNS: &str = "execute,read-file";
const READS: &str = "read-file";

/// Limits of this process.
pub fn limit() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let _ = rustix::thread::set_no_new_privs(true);
    for (resource, limit) in [
        (Resource::Nofile, 512),
        (Resource::Core, 0),
        (Resource::As, 1 << 30),
    ] {
        let limit = Rlimit {
            current: Some(limit),
            maximum: Some(limit),
        };
        let _ = rustix::process::setrlimit(resource, limit);
    }
}

/// This program with Landlock: the kernel lets it reach these files only, with these rights, and what its start needs.
fn confined(rules: &[(&str, &Path)]) -> io::Result<Command> {
    let mut command = Command::new(SETPRIV);
    command.args(["--no-new-privs", "--landlock-access", "fs"]);
    let own = own_files()?;
    let own = own.iter().map(|file| (RUNS, file.as_path()));
    for (rights, path) in own.chain(rules.iter().copied()) {
        let mut rule = OsString::from(format!("path-beneath:{rights}:"));
        rule.push(path);
        command.arg("--landlock-rule").arg(rule);
    }
    command.arg("--").arg(std::env::current_exe()?);
    Ok(command)
}

/// The files that this process runs: the program and, if it is not static, its libraries.
fn own_files() -> io::Result<BTreeSet<PathBuf>> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    // address, rights, offset, device, inode, path
    let runs = |line: &str| {
        let is_run = line.split_whitespace().nth(1)?.contains('x');
        let path = &line[line.find('/')?..];
        is_run.then(|| PathBuf::from(path))
    };
    Ok(maps.lines().filter_map(runs).collect())
}

/// Whether this machine can do that.
pub fn can_confine() -> io::Result<bool> {
    let mut trial = confined(&[])?;
    let ran = trial
        .arg("help")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Ok(ran.status().is_ok_and(|status| status.success()))
}

/// Goes on as `serve` of this root in the same process, confined. Returns only if that fails.
pub fn serve(root: &Path, policy: Option<&Path>, read_only: bool) -> io::Result<()> {
    let root = root.canonicalize()?;
    let mut rules = vec![
        (SERVES, root.as_path()),
        (READS, Path::new(crate::clock::BOOT_ID)),
    ];
    rules.extend(policy.map(|policy| (READS, policy)));
    let mut command = confined(&rules)?;
    command.args(["serve", "--root"]).arg(&root);
    if let Some(policy) = policy {
        command.arg("--policy").arg(policy);
    }
    if read_only {
        command.arg("--read-only");
    }
    Err(command.exec())
}

/// Whether the kernel refuses this process what its account may read: its own folder there.
pub fn is_confined() -> bool {
    disk::open_folder(Path::new("/proc/self"))
        .is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}
