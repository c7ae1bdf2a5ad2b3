//! How fast the senders may send: a limit that may change while they do.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use sprat_store::IgnorePoison;

use crate::options::{BLOCK_BYTES, UploadRate};

/// So much may be sent ahead: without it, many senders would wake for each small write.
const AHEAD: Duration = Duration::from_millis(50);
/// A sender that waits checks the limit again after this time: it may have changed.
const CHECK_AGAIN: Duration = Duration::from_secs(1);

/// What all senders of a volume share. No sender waits while it has something to send in its hands: so a lost
/// connection and the end of the volume are noticed as without a limit.
#[derive(Debug)]
pub(crate) struct UploadLimit {
    rate: Option<UploadRate>,
    /// Bytes that were sent and not paid for yet, and until when that is reckoned.
    debt: Mutex<Option<(f64, Instant)>>,
}

impl UploadLimit {
    pub(crate) fn new(rate: Option<UploadRate>) -> Self {
        Self {
            rate,
            debt: Mutex::new(None),
        }
    }

    /// How long nothing more may be sent; `None`: something may be sent now.
    pub(crate) fn wait(&self, now: Instant) -> Option<Duration> {
        let rate = self.rate_now()?;
        let debt = debt_at(*self.debt.lock().ignore_poison(), now, rate) / rate;
        let wait = debt - AHEAD.as_secs_f64();
        (wait > 0.0).then(|| Duration::from_secs_f64(wait.min(CHECK_AGAIN.as_secs_f64())))
    }

    /// Notes blocks that are about to be sent.
    pub(crate) fn send(&self, blocks: usize, now: Instant) {
        let Some(rate) = self.rate_now() else {
            *self.debt.lock().ignore_poison() = None;
            return;
        };
        #[allow(
            clippy::cast_precision_loss,
            reason = "a write is far below 2^52 bytes"
        )]
        let bytes = (blocks * BLOCK_BYTES) as f64;
        // Under one lock: several threads note what they send.
        let mut debt = self.debt.lock().ignore_poison();
        *debt = Some((debt_at(*debt, now, rate) + bytes, now));
    }

    fn rate_now(&self) -> Option<f64> {
        let rate = self.rate.as_ref()?.now()?;
        // A rate of nothing would stop the session for ever.
        #[allow(
            clippy::cast_precision_loss,
            reason = "an error of a byte in 2^52 is none"
        )]
        let rate = rate.max(1) as f64;
        Some(rate)
    }
}

fn debt_at(debt: Option<(f64, Instant)>, now: Instant, rate: f64) -> f64 {
    let Some((debt, since)) = debt else {
        return 0.0;
    };
    let paid = now.saturating_duration_since(since).as_secs_f64() * rate;
    (debt - paid).max(0.0)
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use sprat_store::{FileName, Store as _, StoreFile};
    use sprat_testkit::memory::MemoryStore;

    use super::*;
    use crate::{Fenced, Flush, Geometry, ReconnectError, SessionHooks, Volume, VolumeOptions};

    #[test]
    fn senders_keep_to_the_rate_and_to_a_rate_that_changes() {
        let rate = Arc::new(AtomicU64::new(100 * BLOCK_BYTES as u64));
        let asked = Arc::clone(&rate);
        let limit = UploadLimit::new(Some(UploadRate::new(move || {
            Some(asked.load(Ordering::Relaxed)).filter(|rate| *rate > 0)
        })));
        let begun = Instant::now();
        let mut now = begun;
        let mut sent = 0;
        let mut run = |seconds: u64, now: &mut Instant| {
            let (before, end) = (sent, *now + Duration::from_secs(seconds));
            while *now < end {
                match limit.wait(*now) {
                    Some(wait) => *now += wait.max(Duration::from_millis(1)),
                    None => {
                        limit.send(10, *now);
                        sent += 10;
                    }
                }
                if sent - before > 100_000 {
                    return None;
                }
            }
            Some(sent - before)
        };
        // 100 blocks a second; the first write and what may go ahead come on top.
        let first = run(10, &mut now).unwrap();
        assert!((1000..=1020).contains(&first), "{first}");
        // A tenth of it: within a second the new rate counts.
        rate.store(10 * BLOCK_BYTES as u64, Ordering::Relaxed);
        let second = run(10, &mut now).unwrap();
        assert!((90..=110).contains(&second), "{second}");
        // No limit any more.
        rate.store(0, Ordering::Relaxed);
        assert_eq!(run(1, &mut now), None);
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        let limit = UploadLimit::new(None);
        let now = Instant::now();
        limit.send(1 << 20, now);
        assert_eq!(limit.wait(now), None);
    }

    struct Nobody;

    impl SessionHooks for Nobody {
        fn before_epoch(&self) -> Result<(), Fenced> {
            Ok(())
        }
        fn before_send(&self, _: &[Range<u64>]) -> Result<(), Fenced> {
            Ok(())
        }
        fn resolved_in_part(&self, _: &[Range<u64>]) {}
        fn resolved(&self) {}
        fn reconnect(&self, _: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
            unreachable!("no connection is lost here")
        }
    }

    #[test]
    fn volume_sends_no_faster_than_its_rate() {
        let file = MemoryStore::new().create_new(&FileName::new("x").unwrap());
        let geometry = Geometry {
            offset_bytes: 0,
            len_bytes: 1 << 20,
        };
        let rate = 2 << 20;
        let options = VolumeOptions {
            upload_rate: Some(UploadRate::new(move || Some(rate))),
            batched_flush_bytes_max: 0,
            run_bytes_max: 16 << 10,
            ..VolumeOptions::default()
        };
        let file = file.unwrap();
        file.resize(1 << 20).unwrap();
        let volume = Volume::open(file, geometry, Arc::new(Nobody), options).unwrap();
        let begun = Instant::now();
        let bytes = vec![7; 512 << 10];
        volume.write_at(0, &bytes).unwrap();
        volume.flush(Flush::Durable).unwrap();
        // A quarter of a second, less what may go ahead and one run.
        assert!(
            begun.elapsed() >= Duration::from_millis(180),
            "{:?}",
            begun.elapsed()
        );
        volume.close().unwrap();
    }
}
