//! The thread that reports figures, a lost connection, and the volume's failure.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sprat_store::IgnorePoison;
use sprat_volume::Volume;

use crate::Failure;
use crate::protocol::messages::VolumeReply;
use crate::protocol::reports::{Notice, VolumeStats};
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::shutdown::EventSender;
use crate::volume_process::{failure_of, figures};

/// How often a failure below is checked for.
const FAILURE_INTERVAL: Duration = Duration::from_millis(50);

/// Reports figures now and then, a lost connection, and once the volume's failure.
pub(super) fn watch(
    volume: &Arc<Volume>,
    lease: &Arc<ContainerLease>,
    connection: &Arc<Mutex<ConnectionReport>>,
    events: &EventSender,
    stats_interval: Duration,
) -> Result<(), Failure> {
    let (volume, lease, connection, events) = (
        Arc::downgrade(volume),
        Arc::downgrade(lease),
        Arc::clone(connection),
        events.clone(),
    );
    std::thread::Builder::new()
        .name("watch".to_owned())
        .spawn(move || {
            let mut reported_at = Instant::now();
            let mut last = VolumeStats::default();
            while let (Some(volume), Some(lease)) = (volume.upgrade(), lease.upgrade()) {
                if let Some(failure) = failure_of(&volume, &lease) {
                    events.reply(&VolumeReply::Failed(failure));
                    return;
                }
                connection.lock().ignore_poison().report(&volume, &events);
                if reported_at.elapsed() >= stats_interval {
                    reported_at = Instant::now();
                    let now = figures(&volume);
                    if now != last {
                        events.reply(&VolumeReply::Figures(now));
                        last = now;
                    }
                }
                drop((volume, lease));
                std::thread::sleep(FAILURE_INTERVAL.min(stats_interval));
            }
        })
        .map(drop)
        .map_err(|error| Failure::failed("can't start a thread").caused_by(&error))
}

/// What was last reported about the connection.
pub(super) struct ConnectionReport {
    quiet_time: Duration,
    losses: u64,
    lost_since: Option<Instant>,
    /// The reasons that were reported for this loss.
    reasons: Vec<String>,
}

/// The most reasons that are reported for one loss.
const REASONS_MAX: usize = 5;

impl ConnectionReport {
    pub(super) fn new(quiet_time: Duration) -> Self {
        Self {
            quiet_time,
            losses: 0,
            lost_since: None,
            reasons: Vec::new(),
        }
    }

    /// Reports each loss, however short, and what is waited for.
    pub(super) fn report(&mut self, volume: &Volume, events: &EventSender) {
        let stats = volume.stats();
        if stats.losses > self.losses {
            self.losses = stats.losses;
            self.lost_since.get_or_insert_with(Instant::now);
            self.reasons.clear();
            if stats.lost_because.is_none() {
                let reason = "it is back already".to_owned();
                events.notice(Notice::LineLost { reason });
            }
        }
        if let Some(reason) = stats.lost_because
            && self.reasons.len() < REASONS_MAX
            && !self.reasons.contains(&reason)
        {
            self.reasons.push(reason.clone());
            events.notice(Notice::LineLost { reason });
        }
        if stats.reconnecting_since.is_none()
            && let Some(since) = self.lost_since.take()
        {
            events.notice(Notice::LineBack {
                away_s: since.elapsed().as_secs(),
            });
            if stats.in_doubt_blocks > 0 && !self.quiet_time.is_zero() {
                events.notice(Notice::LateWrites {
                    wait_s: self.quiet_time.as_secs(),
                });
            }
        }
    }
}
