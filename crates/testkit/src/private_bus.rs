//! A D-Bus daemon of a test's own, on a socket in a folder of its own.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A private message bus, on which everybody may do everything. It ends with the test.
#[derive(Debug)]
pub struct PrivateBus {
    folder: tempfile::TempDir,
    child: Child,
}

impl PrivateBus {
    /// Starts a bus and waits until it accepts connections. The test needs the program
    /// `dbus-daemon`.
    ///
    /// # Panics
    /// If the daemon does not start.
    #[must_use]
    #[expect(clippy::unwrap_used, reason = "a test fails by a panic")]
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().display();
        std::fs::write(
            folder.path().join("bus.conf"),
            format!(
                "<busconfig><type>system</type><listen>unix:path={at}/bus</listen>\
                 <auth>EXTERNAL</auth><policy context=\"default\"><allow send_destination=\"*\" \
                 eavesdrop=\"true\"/><allow eavesdrop=\"true\"/><allow own=\"*\"/>\
                 <allow user=\"*\"/></policy></busconfig>"
            ),
        )
        .unwrap();
        let child = Command::new("dbus-daemon")
            .arg(format!("--config-file={at}/bus.conf"))
            .arg("--nofork")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut bus = Self { folder, child };
        // The socket's file is there a moment before the daemon listens.
        while UnixStream::connect(bus.socket()).is_err() {
            assert!(bus.child.try_wait().unwrap().is_none(), "no dbus-daemon");
            std::thread::sleep(Duration::from_millis(10));
        }
        bus
    }

    /// The socket of the bus.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("bus")
    }
}

impl Drop for PrivateBus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
