//! The processes that write a container: each has a slot, so that they are counted and can be ended.
//!
//! A slot is an empty file. Its lock shows that the process still runs. The processes' numbers are in one file for all,
//! which takes its space once: on a full disk, too, a process gets a slot.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::disk::{self, Flock, bad, open_in};

/// Processes that may write a container at once.
const SLOTS: u32 = 32;

/// The numbers, a line for each slot.
const NUMBERS: &str = "numbers";
const LINE_BYTES: usize = 11;

/// A slot that this process has, until dropped.
#[derive(Debug)]
pub struct Slot {
    _lock: Flock,
}

/// Takes a free slot.
pub fn enter(container: &OwnedFd) -> io::Result<Slot> {
    let folder = disk::make_folder_in(container, "slots")?;
    for number in 0..SLOTS {
        let name = number.to_string();
        let lock = Flock::open(&folder, &name)?;
        let Some(locked) = lock.try_exclusive()? else {
            continue;
        };
        let text = format!("{:10}\n", rustix::process::getpid().as_raw_nonzero());
        let numbers = open_in(&folder, NUMBERS, OFlags::WRONLY | OFlags::CREATE)?;
        numbers.write_all_at(text.as_bytes(), u64::from(number) * LINE_BYTES as u64)?;
        locked.keep();
        return Ok(Slot { _lock: lock });
    }
    Err(bad(format!(
        "{SLOTS} processes write this container already"
    )))
}

/// Kills every process with a slot but this one. A stopped process ends, too. One that waits for a disk
/// may live on for a while.
pub fn kill_others(container: &OwnedFd) -> io::Result<()> {
    let folder = disk::make_folder_in(container, "slots")?;
    let numbers = open_in(&folder, NUMBERS, OFlags::RDWR | OFlags::CREATE)?;
    for number in 0..SLOTS {
        let name = number.to_string();
        if !disk::exists_in(&folder, &name)? {
            continue;
        }
        let lock = Flock::open(&folder, &name)?;
        let pid = || -> io::Result<Option<Pid>> {
            let mut line = [0; LINE_BYTES];
            let at = u64::from(number) * LINE_BYTES as u64;
            disk::read_padded(&numbers, &mut line, at)?;
            let text = String::from_utf8_lossy(&line).into_owned();
            Ok(text.trim().parse().ok().and_then(Pid::from_raw))
        };
        let Some(found) = pid()?.filter(|found| *found != rustix::process::getpid()) else {
            continue;
        };
        let process = match rustix::process::pidfd_open(found, PidfdFlags::empty()) {
            Ok(process) => Some(process),
            // Before Linux 5.3: its number may become another one's in the moment before the signal.
            Err(Errno::NOSYS) => None,
            Err(_) => continue,
        };
        // The lock is taken and the number is the same: so it is this process that has the slot.
        if lock.try_exclusive()?.is_none() && pid()? == Some(found) {
            let _ = match process {
                Some(process) => rustix::process::pidfd_send_signal(&process, Signal::KILL),
                None => rustix::process::kill_process(found, Signal::KILL),
            };
        }
    }
    Ok(())
}
