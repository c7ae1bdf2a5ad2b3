//! Keeps rsync from reading the files of older snapshots while it makes a new one.
//!
//! Where an unchanged file has other attributes than before, rsync (generator.c,
//! `copy_altdest_file`) copies its content out of the older snapshot. That copy has two faults: it
//! writes holes out in full (util1.c, `copy_file`), and it carries silent damage of the volume
//! into a new inode. If the older file can't be opened, rsync reads the source instead, with
//! `--sparse`. rsync has no option for that, so the kernel asks this thread about each file that is
//! opened on the volume (fanotify(7), `FAN_OPEN_PERM`), and it denies those. Hard links to older
//! files need no open. rsync itself opens nothing else than the new files that it makes.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use nix::sys::fanotify::{
    EventFFlags, Fanotify, FanotifyEvent, FanotifyResponse, InitFlags, MarkFlags, MaskFlags,
    Response,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, fstat, statx};
use rustix::pipe::{PipeFlags, pipe_with};

/// The thread that answers. Dropping it lets every open through again.
#[derive(Debug)]
pub(crate) struct Guard {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// Begins to deny other processes the opening of files on the volume mounted at `volume_root`,
    /// but for files in `tree` (absolute) and empty ones.
    ///
    /// `None` where that is not possible: the volume is no mount of its own, or the kernel lacks
    /// `CONFIG_FANOTIFY_ACCESS_PERMISSIONS`.
    pub(crate) fn begin(volume_root: &Path, tree: &Path) -> Option<Self> {
        // Only a mount of our own: nobody else's opens may wait for this thread.
        let about = statx(
            rustix::fs::CWD,
            volume_root,
            AtFlags::empty(),
            StatxFlags::BASIC_STATS,
        )
        .ok()?;
        let is_root = about
            .stx_attributes_mask
            .contains(StatxAttributes::MOUNT_ROOT)
            && about.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        if !is_root {
            return None;
        }
        // As the kernel names it in `/proc/self/fd`.
        let tree = std::fs::canonicalize(tree).ok()?;
        let fanotify = Fanotify::init(
            InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC | InitFlags::FAN_UNLIMITED_QUEUE,
            EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC | EventFFlags::O_LARGEFILE,
        )
        .ok()?;
        fanotify
            .mark(
                MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_MOUNT,
                MaskFlags::FAN_OPEN_PERM,
                rustix::fs::CWD,
                Some(volume_root),
            )
            .ok()?;
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC).ok()?;
        let thread = std::thread::Builder::new()
            .name("guard".to_owned())
            .spawn(move || answer(&fanotify, &stopped, &tree))
            .ok()?;
        Some(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Answers until the other end of `stopped` is closed. An open that waits when `fanotify` is closed
/// goes through.
fn answer(fanotify: &Fanotify, stopped: &OwnedFd, tree: &Path) {
    let me = std::process::id();
    loop {
        let mut ready = [
            PollFd::new(fanotify, PollFlags::IN),
            PollFd::new(stopped, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) => {}
        }
        if !ready[1].revents().is_empty() {
            return;
        }
        let events = match fanotify.read_events() {
            Ok(events) => events,
            Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => continue,
            // Nobody would be answered: closing it lets all of them through.
            Err(_) => return,
        };
        for event in &events {
            let Some(file) = event.fd() else { continue };
            let ours = u32::try_from(event.pid()).is_ok_and(|pid| pid == me);
            let response = if ours || is_allowed(event, tree) {
                Response::FAN_ALLOW
            } else {
                Response::FAN_DENY
            };
            if fanotify
                .write_response(FanotifyResponse::new(file, response))
                .is_err()
            {
                return;
            }
        }
    }
}

/// Whether the file is one that rsync makes: it is empty when rsync makes it, and in `tree`.
fn is_allowed(event: &FanotifyEvent, tree: &Path) -> bool {
    use std::os::fd::AsRawFd;
    let Some(file) = event.fd() else { return true };
    if fstat(file.as_fd()).is_ok_and(|stat| stat.st_size == 0) {
        return true;
    }
    // Fails for a path longer than a page; a new file is empty then.
    let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    std::fs::read_link(link).is_ok_and(|path| path.starts_with(tree))
}
