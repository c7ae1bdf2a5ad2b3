//! The test notice: whether a report arrives is found out before it matters.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sprat_session::Failure;

use super::Setup;
use super::progress::Progress;
use crate::notify::{Delivery, Network, Notifier, Sender, Wanted};

impl Setup<'_> {
    /// Sends a test notice by the channels that setup wrote, until it has arrived once.
    pub(super) fn test_notice(&mut self, progress: &mut Progress) -> Result<(), Failure> {
        self.host.check_interrupt()?;
        if !progress.read().untested {
            return Ok(());
        }
        let sent = Notifier::test(&self.delivery(), Timestamp::now());
        let mut arrived = true;
        for (channel, result) in sent {
            match result {
                Ok(()) => self.done(&format!("test notice: {channel} delivered it")),
                Err(why) => {
                    arrived = false;
                    let failure =
                        Failure::failed(format!("the test notice by {channel} was not delivered"));
                    self.fails(&failure.because(why).with_hint(
                        "Correct [notify] in the config, or repair the channel. The next setup \
                         tries it again",
                    ));
                }
            }
        }
        progress.note(|notes| notes.untested = !arrived);
        Ok(())
    }

    fn delivery(&self) -> Delivery {
        let zone = sprat_snapshot::time_zone(&self.config.time_zone).unwrap_or(TimeZone::UTC);
        Delivery {
            channels: self.config.notify.channels(),
            wanted: Wanted {
                on: Vec::new(),
                remind_after: None,
            },
            checks: std::collections::BTreeMap::new(),
            sender: Sender {
                host: self.machine.host.clone(),
                zone,
            },
            network: Network::default(),
        }
    }
}
