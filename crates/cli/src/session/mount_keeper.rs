//! The hidden `mount-keeper` command, the keeper of a background mount: takes the mount away if its volume process dies.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use sprat_attach::{MountState, mount_state, unmount_dead};

use super::background;
use super::link::Receiver;
use super::protocol::{BackgroundMount, VolumeReply};
use crate::Exit;

/// How long the kernel may take to notice that the server of the mount is gone.
const NOTICE_LIMIT: Duration = Duration::from_secs(10);

/// Runs the keeper; its standard input is the control socket.
pub fn run() -> Exit {
    super::worker::run_keeper()
}

/// Waits for the end of V, which is the end of its control socket.
pub(super) fn keep(mount: &BackgroundMount, control: OwnedFd) -> Exit {
    background::leave_terminal();
    let mut receiver = Receiver::new(UnixStream::from(control));
    while let Ok(Some(_)) = receiver.receive::<VolumeReply>() {}
    let deadline = Instant::now() + NOTICE_LIMIT;
    let record = Path::new(&mount.record);
    while Instant::now() < deadline {
        // Another mount may have come to this folder meanwhile; that one has its own keeper.
        if background::has_ended(record) {
            match mount_state(Path::new(&mount.dir)) {
                Ok(MountState::Dead) => {
                    let _ = unmount_dead(Path::new(&mount.dir));
                    break;
                }
                Ok(MountState::NotMounted) => break,
                _ => {}
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    if background::has_ended(record) && background::read_record(record).is_some() {
        background::report_death(mount);
    }
    Exit::Done
}
