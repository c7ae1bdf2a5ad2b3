//! The server's free space while a session writes: asked now and then, told when it becomes low,
//! and the session asked to stop in order before nothing is left.
//!
//! A container is sparse, so a session may need room on the server at any write, and others take
//! of the same disk. Asking is one request on the store's own channel, never on the data's way.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use sprat_volume::{Volume, VolumeStats};

use crate::protocol::messages::{VolumeReply, VolumeStart};
use crate::settings::{Access, Notice};
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::shutdown::EventSender;

/// Below this the user is told that the server's disk is nearly full.
pub const LOW_BYTES: u64 = 1 << 30;

/// How often is looked at what the session itself wrote. A local disk takes some 50 MiB in that time.
const TICK: Duration = Duration::from_millis(50);

/// The most that the page cache holds of what rsync has written: a session that stops in order has to
/// write that, too. The kernel lets a writer go beyond the limit before it makes it wait
/// (mm/page-writeback.c, `balance_dirty_pages`).
const CACHED_BYTES_MAX: u64 = 2 * sprat_attach::DIRTY_BYTES_MAX;

/// rsync fills the page cache some times faster than it is written.
const CACHED_PER_ACCEPTED: u64 = 4;

/// What is known of the room, and what follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SpaceMonitor {
    /// A session that began above this ends before it is below it.
    floor_bytes: u64,
    available_bytes: u64,
    /// The session began with more than the floor. Where it did not, what it writes may all lie in
    /// blocks that the container has already; it goes on until the server says that it is full.
    stops: bool,
    /// What the session had sent when this was asked.
    written_bytes: u64,
}

/// What a new figure means.
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

    /// Whether so little may be left by what was sent since that the session has to stop.
    fn may_be_gone(&self, written_bytes: u64, unsent_bytes: u64) -> bool {
        let sent = written_bytes.saturating_sub(self.written_bytes);
        self.stops
            && self.available_bytes.saturating_sub(sent)
                < self.floor_bytes.saturating_add(unsent_bytes)
    }

    /// Takes in an answer. What is not sent yet needs room, too: it counts as gone.
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

/// What is still to come: the volume's own, and what the page cache may hold, which the kernel reports only
/// for the whole machine (`cached_bytes`). It is no more than its limit, and in a session that has hardly
/// written anything it is hardly anything.
fn unsent_bytes(stats: &VolumeStats, cached_bytes: u64) -> u64 {
    let accepted = stats.wire_written_bytes.saturating_add(stats.dirty_bytes);
    let cached = accepted.saturating_mul(CACHED_PER_ACCEPTED);
    stats.dirty_bytes + cached.min(cached_bytes).min(CACHED_BYTES_MAX)
}

/// What the page cache of this machine has to write, of all file systems.
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

/// Watches for as long as volume and hold live. `available_bytes` is what the server told at the
/// beginning; one that doesn't tell is not asked again.
pub(crate) fn watch(
    start: &VolumeStart,
    available_bytes: Option<u64>,
    volume: &Arc<Volume>,
    lease: &Arc<ContainerLease>,
    events: &EventSender,
) {
    let (Access::ReadWrite, Some(available_bytes)) = (start.access, available_bytes) else {
        return;
    };
    // What makes room may use up the last of it.
    let floor_bytes = if start.may_use_reserve {
        0
    } else {
        start.reserve_bytes
    };
    let interval = Duration::from_millis(start.room_interval_ms);
    let (volume, lease, events) = (
        Arc::downgrade(volume),
        Arc::downgrade(lease),
        events.clone(),
    );
    let room = SpaceMonitor::new(available_bytes, floor_bytes);
    // Without this thread a full disk is found out by writing to it, which harms nothing either.
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
        // A line that is away is asked again once it is back.
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
    fn a_session_stops_once_when_less_than_the_reserve_would_be_left() {
        let mut room = SpaceMonitor::new(500 * MIB, 64 * MIB);
        assert_eq!(room.learn(100 * MIB, 0, 30 * MIB), Change::Nothing);
        assert_eq!(room.learn(90 * MIB, 0, 30 * MIB), Change::RunsOut);
        assert_eq!(room.learn(MIB, 0, 0), Change::Nothing);
    }

    #[test]
    fn one_that_began_with_less_may_still_use_blocks_that_are_there() {
        let mut room = SpaceMonitor::new(3 * MIB, 64 * MIB);
        assert_eq!(room.learn(MIB, 0, 0), Change::Nothing);
        assert!(!room.may_be_gone(u64::MAX, 0));
        let mut none = SpaceMonitor::new(500 * MIB, 0);
        assert_eq!(none.learn(0, 0, MIB), Change::Nothing);
    }

    #[test]
    fn a_disk_that_becomes_low_is_told_once() {
        let mut room = SpaceMonitor::new(LOW_BYTES, 64 * MIB);
        assert_eq!(room.learn(LOW_BYTES - 1, 0, 0), Change::Low);
        assert_eq!(room.learn(LOW_BYTES - 2, 0, 0), Change::Nothing);
    }

    #[test]
    fn it_asks_sooner_where_the_session_itself_takes_much() {
        let mut room = SpaceMonitor::new(264 * MIB, 64 * MIB);
        room.learn(264 * MIB, 1000 * MIB, 0);
        assert!(!room.may_be_gone(1050 * MIB, 150 * MIB));
        assert!(room.may_be_gone(1050 * MIB, 151 * MIB));
    }

    #[test]
    fn what_waits_in_the_page_cache_counts_where_much_was_written() {
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
