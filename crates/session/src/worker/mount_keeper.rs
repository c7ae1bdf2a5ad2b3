//! The hidden `mount-keeper` command, the keeper of a background mount: unmounts it if its volume process dies.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use sprat_attach::{MountState, mount_state, unmount_dead, volume_id};

use crate::Exit;
use crate::protocol::frames::Receiver;
use crate::protocol::messages::{BackgroundMount, VolumeReply};
use crate::supervisor::background::{self, OpenRecord};

/// How long the kernel may take to notice that the volume process is gone.
const NOTICE_LIMIT: Duration = Duration::from_secs(10);

/// Runs the keeper; its standard input is the control socket.
pub fn run() -> Exit {
    crate::worker::run_keeper()
}

/// Waits for the end of V, which is the end of its control socket.
pub(crate) fn keep(mount: &BackgroundMount, control: OwnedFd) -> Exit {
    background::leave_terminal();
    // Opened while V runs. Later an `umount` may remove it at any moment.
    let record = OpenRecord::open(Path::new(&mount.record));
    let mut receiver = Receiver::new(UnixStream::from(control));
    while let Ok(Some(_)) = receiver.receive::<VolumeReply>() {}
    let Some(record) = record else {
        return Exit::Failed;
    };
    let deadline = Instant::now() + NOTICE_LIMIT;
    let dir = Path::new(&mount.dir);
    while Instant::now() < deadline {
        // Another volume may be mounted at this folder by now. That volume has its own keeper.
        let is_ours = volume_id(dir).is_ok_and(|volume| volume == record.record.volume);
        if record.has_ended() {
            match mount_state(dir) {
                Ok(MountState::Dead) if is_ours => {
                    let _ = unmount_dead(dir);
                    break;
                }
                Ok(MountState::NotMounted) => break,
                _ => {}
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Exit::Done
}
