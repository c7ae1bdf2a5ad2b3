//! The test notice: whether a report arrives is found out before it matters.

use jiff::Timestamp;
use sprat_session::Failure;

use super::Setup;
use super::progress::Progress;
use crate::notify::Notifier;
use crate::watch::delivery;

impl Setup<'_> {
    /// Sends a test notice by the channels that setup wrote, until it has arrived once.
    pub(super) fn test_notice(&mut self, progress: &mut Progress) -> Result<(), Failure> {
        self.host.check_interrupt()?;
        if !progress.read().untested {
            return Ok(());
        }
        let (config, machine) = (&self.config, self.machine);
        let delivery = delivery(
            config,
            &config.notify,
            &machine.host,
            machine.network.clone(),
        );
        let mut arrived = true;
        for (channel, result) in Notifier::test(&delivery, Timestamp::now()) {
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
}
