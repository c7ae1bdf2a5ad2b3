//! Monitors the server's free space while a session writes: asks now and then, warns when it
//! becomes low, and asks the session to stop cleanly before nothing is left.
//!
//! A container is sparse, so each write may need space on the server, and others use the same disk.
//! The question is one request on the store's own channel, never on a data channel.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use sprat_volume::{Volume, VolumeStats};

use crate::protocol::messages::{VolumeReply, VolumeStart};
use crate::protocol::reports::Notice;
use crate::settings::Access;
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::shutdown::EventSender;

/// Below this the user gets a warning that the server's disk is nearly full.
pub const LOW_BYTES: u64 = 1 << 30;

/// How often the session's own writes are checked. A local disk takes some 50 MiB in that time.
const TICK: Duration = Duration::from_millis(50);

/// The most that the page cache keeps of what rsync has written: a session that stops cleanly has
/// to write that, too. The kernel lets a writer exceed the limit before it makes the writer wait
/// (mm/page-writeback.c, `balance_dirty_pages`).
const CACHED_BYTES_MAX: u64 = 2 * sprat_attach::DIRTY_BYTES_MAX;

/// rsync fills the page cache several times faster than it is written back.
const CACHED_PER_ACCEPTED: u64 = 4;

/// What is known of the free space, and what follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SpaceMonitor {
    /// A session that began with more than this ends before less is left.
    floor_bytes: u64,
    available_bytes: u64,
    /// The session began with more than the floor. If it did not, all its writes may go to blocks
    /// that the container has already; it continues until the server reports a full disk.
    stops: bool,
    /// What the session had sent when it asked.
    written_bytes: u64,
}

/// The consequence of a new figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Nothing,
    Low,
    RunsOut,
}

impl SpaceMonitor {
    fn new(available_bytes: u64, floor_bytes: u64) -> Self {
        Self {
            floor_bytes,
            available_bytes,
            stops: floor_bytes > 0 && available_bytes > floor_bytes,
            written_bytes: 0,
        }
    }

    /// Whether the writes since the last answer may leave so little that the session has to stop.
    fn may_be_gone(&self, written_bytes: u64, unsent_bytes: u64) -> bool {
        let sent = written_bytes.saturating_sub(self.written_bytes);
        self.stops
            && self.available_bytes.saturating_sub(sent)
                < self.floor_bytes.saturating_add(unsent_bytes)
    }

    /// Records an answer. What is not sent yet needs space, too, and counts as used.
    fn learn(&mut self, available_bytes: u64, written_bytes: u64, unsent_bytes: u64) -> Change {
        let before = std::mem::replace(&mut self.available_bytes, available_bytes);
        self.written_bytes = written_bytes;
        if self.stops && available_bytes < self.floor_bytes.saturating_add(unsent_bytes) {
            self.stops = false;
            return Change::RunsOut;
        }
        if before >= LOW_BYTES && available_bytes < LOW_BYTES {
            return Change::Low;
        }
        Change::Nothing
    }
}

/// What is still to be written: the volume's own buffer, and what the page cache may hold. The
/// kernel reports the page cache only for the whole machine (`cached_bytes`). Its share of this
/// session is at most its limit, and small in a session that has written little.
fn unsent_bytes(stats: &VolumeStats, cached_bytes: u64) -> u64 {
    let accepted = stats.wire_written_bytes.saturating_add(stats.dirty_bytes);
    let cached = accepted.saturating_mul(CACHED_PER_ACCEPTED);
    stats.dirty_bytes + cached.min(cached_bytes).min(CACHED_BYTES_MAX)
}

/// What the page cache of this machine has to write, for all file systems.
fn cached_bytes() -> u64 {
    std::fs::read_to_string("/proc/meminfo").map_or(u64::MAX, |text| cached_in(&text))
}

/// The sum of `Dirty` and `Writeback` in `/proc/meminfo` (Documentation/filesystems/proc.rst).
fn cached_in(meminfo: &str) -> u64 {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    match (kib("Dirty:"), kib("Writeback:")) {
        (Some(dirty), Some(writeback)) => (dirty + writeback) * 1024,
        _ => u64::MAX,
    }
}

/// Monitors the space while the volume and the lease exist. `available_bytes` is the server's
/// answer at the beginning; a server that does not report it is not asked again.
pub(crate) fn watch(
    start: &VolumeStart,
    available_bytes: Option<u64>,
    volume: &Arc<Volume>,
    lease: &Arc<ContainerLease>,
    events: &EventSender,
) {
    let (Access::ReadWrite, Some(available_bytes)) = (start.settings.access, available_bytes)
    else {
        return;
    };
    // A command that frees space may use the last of it.
    let floor_bytes = if start.settings.may_use_reserve {
        0
    } else {
        start.settings.reserve_bytes
    };
    let interval = start.settings.space_interval;
    let (volume, lease, events) = (
        Arc::downgrade(volume),
        Arc::downgrade(lease),
        events.clone(),
    );
    let room = SpaceMonitor::new(available_bytes, floor_bytes);
    // Without this thread a write finds out that the disk is full, which harms nothing either.
    let _ = std::thread::Builder::new()
        .name("room".to_owned())
        .spawn(move || keep_asking(room, interval, &volume, &lease, &events));
}

fn keep_asking(
    mut room: SpaceMonitor,
    interval: Duration,
    volume: &Weak<Volume>,
    lease: &Weak<ContainerLease>,
    events: &EventSender,
) {
    let mut asked = Instant::now();
    loop {
        std::thread::sleep(TICK.min(interval));
        let (Some(stats), Some(store)) = (
            volume.upgrade().map(|volume| volume.stats()),
            lease.upgrade().map(|lease| lease.store()),
        ) else {
            return;
        };
        let (written_bytes, unsent_bytes) = (
            stats.wire_written_bytes,
            unsent_bytes(&stats, cached_bytes()),
        );
        if asked.elapsed() < interval && !room.may_be_gone(written_bytes, unsent_bytes) {
            continue;
        }
        asked = Instant::now();
        // If the connection is lost, this asks again once it is back.
        let Ok(space) = store.free_space() else {
            continue;
        };
        drop(store);
        let available_bytes = space.available_bytes;
        match room.learn(available_bytes, written_bytes, unsent_bytes) {
            Change::Nothing => {}
            Change::Low => events.notice(Notice::ServerSpaceLow { available_bytes }),
            Change::RunsOut => events.reply(&VolumeReply::RoomRunsOut { available_bytes }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn session_stops_once_before_less_than_the_reserve_is_left() {
        let mut room = SpaceMonitor::new(500 * MIB, 64 * MIB);
        assert_eq!(room.learn(100 * MIB, 0, 30 * MIB), Change::Nothing);
        assert_eq!(room.learn(90 * MIB, 0, 30 * MIB), Change::RunsOut);
        assert_eq!(room.learn(MIB, 0, 0), Change::Nothing);
    }

    #[test]
    fn session_that_began_below_the_floor_may_use_its_blocks() {
        let mut room = SpaceMonitor::new(3 * MIB, 64 * MIB);
        assert_eq!(room.learn(MIB, 0, 0), Change::Nothing);
        assert!(!room.may_be_gone(u64::MAX, 0));
        let mut none = SpaceMonitor::new(500 * MIB, 0);
        assert_eq!(none.learn(0, 0, MIB), Change::Nothing);
    }

    #[test]
    fn low_disk_is_reported_once() {
        let mut room = SpaceMonitor::new(LOW_BYTES, 64 * MIB);
        assert_eq!(room.learn(LOW_BYTES - 1, 0, 0), Change::Low);
        assert_eq!(room.learn(LOW_BYTES - 2, 0, 0), Change::Nothing);
    }

    #[test]
    fn space_is_queried_sooner_if_the_session_writes_much() {
        let mut room = SpaceMonitor::new(264 * MIB, 64 * MIB);
        room.learn(264 * MIB, 1000 * MIB, 0);
        assert!(!room.may_be_gone(1050 * MIB, 150 * MIB));
        assert!(room.may_be_gone(1050 * MIB, 151 * MIB));
    }

    #[test]
    fn page_cache_counts_if_much_was_written() {
        let stats = |written: u64, dirty: u64| VolumeStats {
            wire_written_bytes: written * MIB,
            dirty_bytes: dirty * MIB,
            ..VolumeStats::default()
        };
        let unsent =
            |written, dirty, cached| unsent_bytes(&stats(written, dirty), cached * MIB) / MIB;
        assert_eq!(unsent(1, 2, 1000), 2 + 12, "hardly anything was written");
        assert_eq!(
            unsent(1000, 2, 20),
            2 + 20,
            "the machine has no more to write"
        );
        assert_eq!(unsent(1000, 2, 1000), 2 + 256);
        let meminfo =
            "MemFree: 7 kB\nDirty:               300 kB\nWriteback:     4 kB\nWritebackTmp: 9 kB\n";
        assert_eq!(cached_in(meminfo), 304 << 10);
        assert_eq!(cached_in(""), u64::MAX);
    }
}
