//! Verifies that all channels lead to one folder.
//!
//! A name may stand for several machines (login nodes, a round-robin name), and each channel may
//! end at another one. If these share no disk, blocks of one container would go into several files.
//! If they share a network file system that shows old content, a lease proves nothing. So before a
//! further channel carries anything, it must show a file that was just written through the first
//! channel: the lease.

use std::thread::sleep;
use std::time::Duration;

use super::channel::Channel;
use super::codec::OpenFor;
use super::session::SftpSession;
use super::wire::{Ending, EndingKind};
use crate::{FileName, StoreError, StoreErrorKind};

/// A witness is small: a lease.
const WITNESS_BYTES_MAX: usize = 4096;
/// The witness may be renewed between two reads. And a network file system may show what was there
/// a moment ago.
const PAUSES: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(200),
    Duration::from_millis(800),
    Duration::from_secs(2),
];

impl SftpSession {
    /// From now on further connections are used only if they show this file as the first one does.
    pub(crate) fn set_witness(&self, name: &FileName) {
        *self.witness() = Some(name.clone());
    }

    /// Whether further connection `index` shows the witness as the first one does. If not, the
    /// whole session ends. If a read fails, this returns true: then the channel, or the lease, is
    /// lost anyway.
    pub(crate) fn leads_to_the_same_folder(&self, index: usize, channel: &Channel) -> bool {
        let Some(witness) = self.witness().clone() else {
            return true;
        };
        if self.was_checked(index, &witness) {
            return true;
        }
        let mut difference = "";
        for pause in PAUSES {
            sleep(pause);
            let expected = match self.read_witness(&self.first, &witness) {
                Ok(bytes) => bytes,
                Err(_) => return true,
            };
            difference = match self.read_witness(channel, &witness) {
                Ok(bytes) if bytes == expected => {
                    self.note_checked(index, &witness);
                    return true;
                }
                Ok(_) => "an older one",
                Err(error) if error.kind() == StoreErrorKind::NotFound => "none",
                Err(_) => return true,
            };
        }
        self.end(&Ending {
            kind: EndingKind::Elsewhere,
            reason: format!(
                "one connection shows the lease {witness}, another one {difference}: the two \
                 connections end at different machines"
            ),
        });
        false
    }

    fn read_witness(&self, channel: &Channel, name: &FileName) -> Result<Vec<u8>, StoreError> {
        let how = OpenFor::Reading;
        let (_, bytes) = self.read_small_on(channel, name, how, WITNESS_BYTES_MAX)?;
        Ok(bytes)
    }
}
