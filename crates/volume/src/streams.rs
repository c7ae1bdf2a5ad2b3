//! Detects sequential reading, and returns what to read ahead.
//!
//! A file system that reads sequentially rarely does so in one run: it reads several files at a
//! time, each from its own start, with gaps and a little out of order. So a stream is a moving
//! neighbourhood. A read close to its head belongs to it. As long as enough clusters behind the
//! head were read, those before it probably will be.

use std::collections::VecDeque;
use std::ops::Range;

use crate::fetch::{CLUSTER_BLOCKS, clusters_of};

/// Streams followed at one time; a restore reads in a few neighbourhoods at once.
const STREAMS_MAX: usize = 16;
/// How far before the head a read may start: 512 KiB, a few files of usual size.
const FORWARD_CLUSTERS: u64 = 8;
/// How far behind the head it may start: as many clusters as there are bits.
const BACK_CLUSTERS: u64 = 64;
/// How many clusters behind the head are counted.
const JUDGED: u32 = 32;
/// A stream is read ahead only after so many clusters.
const AGE_MIN: u64 = 3;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    recent: VecDeque<Stream>,
}

#[derive(Debug)]
struct Stream {
    /// The furthest cluster that was read.
    head: u64,
    /// Bit n: the cluster n behind the head was read.
    wanted: u64,
    /// Clusters from the stream's start to its head.
    age: u64,
    window: u64,
    asked_to: u64,
}

impl Streams {
    /// Records a read and returns the clusters to read ahead; empty if it belongs to no stream.
    /// `window_max` is in clusters.
    pub(crate) fn note(&mut self, blocks: &Range<u64>, window_max: u64) -> Range<u64> {
        let read = clusters_of(blocks);
        if read.is_empty() {
            return read;
        }
        let near = |stream: &Stream| {
            read.start <= stream.head + FORWARD_CLUSTERS && read.start + BACK_CLUSTERS > stream.head
        };
        let Some(known) = self.recent.iter().position(near) else {
            if self.recent.len() == STREAMS_MAX {
                self.recent.pop_front();
            }
            let mut stream = Stream {
                head: read.start,
                wanted: 0,
                age: 1,
                window: 1,
                asked_to: 0,
            };
            stream.take(&read);
            self.recent.push_back(stream);
            return 0..0;
        };
        let Some(mut stream) = self.recent.remove(known) else {
            return 0..0;
        };
        stream.take(&read);
        let ahead = stream.ahead(window_max);
        self.recent.push_back(stream);
        ahead
    }
}

impl Stream {
    fn take(&mut self, read: &Range<u64>) {
        for cluster in read.clone() {
            if cluster > self.head {
                let by = cluster - self.head;
                self.wanted = u32::try_from(by)
                    .ok()
                    .and_then(|by| self.wanted.checked_shl(by))
                    .unwrap_or(0);
                self.age += by;
                self.head = cluster;
            }
            let behind = self.head - cluster;
            self.wanted |= 1_u64
                .checked_shl(u32::try_from(behind).unwrap_or(u32::MAX))
                .unwrap_or(0);
        }
    }

    /// Whether three of eight clusters behind the head were read: if reads come out of order, some
    /// of the last ones are still to come.
    fn is_dense(&self) -> bool {
        let judged = u32::try_from(self.age).unwrap_or(JUDGED).min(JUDGED);
        let of = (1_u64 << judged) - 1;
        self.age >= AGE_MIN && (self.wanted & of).count_ones() * 8 >= judged * 3
    }

    fn ahead(&mut self, window_max: u64) -> Range<u64> {
        let from = self.asked_to.max(self.head + 1);
        if !self.is_dense() {
            return from..from;
        }
        // Only when half of the window is used up, so that requests stay long.
        if from - (self.head + 1) > self.window / 2 {
            return from..from;
        }
        self.window = (self.window * 2).min(window_max.max(1));
        self.asked_to = from.max(self.head + 1 + self.window);
        from..self.asked_to
    }
}

const _: () = assert!(CLUSTER_BLOCKS > 0 && BACK_CLUSTERS <= 64 && JUDGED < 64);

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads in this order; returns all that was read ahead, and how many reads caused it.
    fn read(streams: &mut Streams, reads: impl IntoIterator<Item = u64>) -> (Vec<u64>, usize) {
        let (mut ahead, mut asked) = (Vec::new(), 0);
        for block in reads {
            let more = streams.note(&(block..block + 4), 64);
            asked += usize::from(!more.is_empty());
            ahead.extend(more);
        }
        (ahead, asked)
    }

    fn clusters(count: u64) -> impl Iterator<Item = u64> {
        (0..count).map(|cluster| cluster * CLUSTER_BLOCKS)
    }

    #[test]
    fn sequential_reads_are_read_ahead_once_in_growing_steps() {
        let (ahead, asked) = read(&mut Streams::default(), clusters(200));
        assert!(ahead.is_sorted_by(|a, b| a < b), "{ahead:?}");
        assert!(ahead.first().is_some_and(|first| *first <= 4), "{ahead:?}");
        let furthest = *ahead.last().unwrap();
        assert!((200..=200 + 64).contains(&furthest), "{furthest}");
        assert!(asked < 20, "{asked} steps for 200 clusters");
    }

    #[test]
    fn reads_out_of_order_and_with_gaps_are_one_stream() {
        let mut order: Vec<u64> = clusters(200).filter(|block| block / 16 % 3 != 1).collect();
        for pair in order.chunks_mut(5) {
            pair.reverse();
        }
        let (ahead, asked) = read(&mut Streams::default(), order);
        assert!(ahead.is_sorted_by(|a, b| a < b), "{ahead:?}");
        assert!(ahead.len() > 180 && asked < 40, "{} {asked}", ahead.len());
    }

    #[test]
    fn scattered_reads_are_not_a_stream() {
        let scattered = (0..200_u64).map(|n| n * 7919 % 200 * 1000 * CLUSTER_BLOCKS);
        let (ahead, _) = read(&mut Streams::default(), scattered);
        assert!(ahead.is_empty(), "{ahead:?}");
        let sparse = (0..200).map(|n| n * 6 * CLUSTER_BLOCKS);
        let (ahead, _) = read(&mut Streams::default(), sparse);
        assert!(ahead.is_empty(), "one of six was wanted: {ahead:?}");
    }

    #[test]
    fn two_streams_at_once_are_kept_apart() {
        let far = 1 << 30;
        let both = clusters(100).flat_map(|block| [block, far + block]);
        let (ahead, _) = read(&mut Streams::default(), both);
        let near = ahead.iter().filter(|cluster| **cluster < 1 << 20).count();
        assert!(
            near > 90 && ahead.len() - near > 90,
            "{near} of {}",
            ahead.len()
        );
    }

    #[test]
    fn last_clusters_of_the_largest_device_do_not_overflow() {
        let mut streams = Streams::default();
        let last = u64::MAX / 4096 - 64;
        for block in 0..16 {
            streams.note(&(last + block * 4..last + block * 4 + 4), 1 << 20);
        }
        assert!(streams.recent.len() == 1);
    }
}
