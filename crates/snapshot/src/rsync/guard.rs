//! Prevents rsync from reading the files of older snapshots while it makes a new one.
//!
//! If an unchanged file has other attributes than before, rsync (generator.c, `copy_altdest_file`)
//! copies its content from the older snapshot. That has two faults: the copy has no holes (util1.c,
//! `copy_file`), and it spreads silent damage of the volume to a new inode. If the older file can't be
//! opened, rsync reads the source instead, with `--sparse`. rsync has no option for that. So the kernel
//! asks this thread about each file that is opened on the volume (fanotify(7), `FAN_OPEN_PERM`), and the
//! thread denies those. Hard links to older files need no open, and rsync opens nothing else on the
//! volume but its new files.

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

/// The thread that answers. When this is dropped, every open is allowed again.
#[derive(Debug)]
pub(crate) struct Guard {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// Starts to deny other processes the opening of files on the volume mounted at `volume_root`,
    /// except for empty files and files in `tree` (absolute).
    ///
    /// `None` if that is not possible: the volume is not a separate mount, or the kernel lacks
    /// `CONFIG_FANOTIFY_ACCESS_PERMISSIONS`.
    pub(crate) fn begin(volume_root: &Path, tree: &Path) -> Option<Self> {
        // Only for a mount of our own: opens by other programs must not wait for this thread.
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
        // The path as the kernel shows it in `/proc/self/fd`.
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

/// Answers until the other end of `stopped` is closed. When `fanotify` is closed, opens that wait are
/// allowed.
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
            // Nobody would answer any more. Closing `fanotify` allows all opens.
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

/// Whether rsync has just created the file: it is empty, and in `tree`.
fn is_allowed(event: &FanotifyEvent, tree: &Path) -> bool {
    use std::os::fd::AsRawFd;
    let Some(file) = event.fd() else { return true };
    if fstat(file.as_fd()).is_ok_and(|stat| stat.st_size == 0) {
        return true;
    }
    // Fails for a path longer than a page. A new file is empty then.
    let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    std::fs::read_link(link).is_ok_and(|path| path.starts_with(tree))
}
