//! Space that snapshots share in parts of files: on btrfs.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;

use super::sets::Sets;

/// Which parts of the volume each tree of files has. A part is freed with the last tree that has it.
#[derive(Debug, Default)]
pub struct SharedSpace {
    /// All trees.
    pub tops: Vec<SpaceTop>,
    /// By its address, what each part takes, and the addresses of what belongs to it: all that a tree has
    /// that has the part.
    pub parts: HashMap<u64, (u64, Vec<u64>)>,
    /// The same of parts to which nothing belongs.
    pub ends: HashMap<u64, u64>,
}

/// Where a tree of files begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpaceTop {
    /// Its folder, as [`sprat_snapshot::tree::Tree::place_in_volume`] has it.
    pub place: Option<(u64, OsString)>,
    /// Its first part.
    pub part: u64,
}

/// What is no snapshot that is analyzed. It stays.
const STAYS: u32 = u32::MAX;

/// What each set of snapshots has together, and no other tree.
#[derive(Debug, Default)]
pub(super) struct SharedSums {
    sets: Sets,
    bytes: Vec<u64>,
    /// What is no content of files.
    pub(super) tree_bytes: u64,
}

/// What one snapshot has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Each {
    pub(super) bytes: u64,
    /// Of it, what no older one has.
    pub(super) new_bytes: u64,
    /// Of it, what no other one has.
    pub(super) own_bytes: u64,
}

impl SharedSums {
    /// Sums up. `places`: where each snapshot is. `None`: one of them has no tree.
    pub(super) fn of(space: &SharedSpace, places: &[Option<(u64, OsString)>]) -> Option<Self> {
        let by_place: HashMap<_, _> = space
            .tops
            .iter()
            .filter_map(|top| Some((top.place.as_ref()?, top.part)))
            .collect();
        let snapshots: Option<Vec<u64>> = places
            .iter()
            .map(|place| by_place.get(place.as_ref()?).copied())
            .collect();
        let snapshots = snapshots?;
        let is_snapshot = |top: &&SpaceTop| {
            let mut its = places.iter().flatten();
            top.place
                .as_ref()
                .is_some_and(|own| its.any(|one| one == own))
        };
        let others = space.tops.iter().filter(|top| !is_snapshot(top));
        let numbered = (0..).zip(snapshots.iter().copied());
        let others = others.map(|top| (STAYS, top.part));
        let mut sums = Self::default();
        // What each part is in: the set, and the tree that was met last.
        let mut met: HashMap<u64, (u32, u32)> = HashMap::new();
        // `STAYS` is the greatest number: a set has it only as its last.
        for (tree, (number, top)) in (0_u32..).zip(numbered.chain(others)) {
            let mut waiting = vec![top];
            while let Some(address) = waiting.pop() {
                let known = met.get(&address).copied();
                if known.is_some_and(|(_, last)| last == tree) {
                    continue;
                }
                let set = known.map(|(set, _)| set);
                let stays = set.is_some_and(|set| sums.sets.all[set as usize].ends_with(&[STAYS]));
                let set = match set.filter(|_| stays) {
                    Some(set) => set,
                    None => sums.sets.with(set, number),
                };
                met.insert(address, (set, tree));
                if let Some((_, below)) = space.parts.get(&address) {
                    waiting.extend(below);
                }
            }
        }
        sums.bytes = vec![0; sums.sets.all.len()];
        for (address, (set, _)) in met {
            let part = space.parts.get(&address).map(|(bytes, _)| *bytes);
            let bytes = part.or_else(|| space.ends.get(&address).copied());
            let in_snapshot = sums.sets.all[set as usize].first() != Some(&STAYS);
            if in_snapshot && part.is_some() {
                sums.tree_bytes += part.unwrap_or(0);
            }
            sums.bytes[set as usize] += bytes.unwrap_or(0);
        }
        Some(sums)
    }

    /// What is in sets of snapshots for which `wanted` holds.
    pub(super) fn bytes(&self, wanted: impl Fn(&[u32]) -> bool) -> u64 {
        let all = self.sets.all.iter().zip(&self.bytes);
        all.filter(|(set, _)| wanted(set))
            .map(|(_, bytes)| bytes)
            .sum()
    }

    /// What each of so many snapshots has.
    pub(super) fn each(&self, snapshots: usize) -> Vec<Each> {
        let mut each = vec![Each::default(); snapshots];
        for (set, bytes) in self.sets.all.iter().zip(&self.bytes) {
            for (at, number) in set.iter().enumerate() {
                let Some(of) = each.get_mut(*number as usize) else {
                    continue;
                };
                of.bytes += bytes;
                if at == 0 {
                    of.new_bytes += bytes;
                }
                if set.len() == 1 {
                    of.own_bytes += bytes;
                }
            }
        }
        each
    }

    /// What a removal of these would free.
    pub(super) fn frees(&self, removed: &BTreeSet<u32>) -> u64 {
        self.bytes(|set| set.iter().all(|one| removed.contains(one)))
    }

    /// What any snapshot has.
    pub(super) fn all(&self) -> u64 {
        self.bytes(|set| set.first() != Some(&STAYS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_is_freed_with_the_last_tree_that_has_it() {
        let place = |name: &str| Some((257, OsString::from(name)));
        let top = |place, part| SpaceTop { place, part };
        // Trees of two snapshots (1, 2) and of the work folder (3); 4 and 5 are nodes, and 10 to 13 extents.
        let space = SharedSpace {
            tops: vec![top(None, 3), top(place("a"), 1), top(place("b"), 2)],
            parts: HashMap::from([
                (1, (100, vec![4, 10])),
                (2, (100, vec![4, 5])),
                (3, (100, vec![5, 13])),
                (4, (100, vec![11, 11])),
                (5, (100, vec![12])),
            ]),
            ends: (10..14).map(|number| (number, number)).collect(),
        };
        let sums = SharedSums::of(&space, &[place("a"), place("b")]).unwrap();
        let only = |of: &[u32]| sums.frees(&of.iter().copied().collect());
        assert_eq!(only(&[0]), 100 + 10);
        assert_eq!(only(&[1]), 100);
        assert_eq!(only(&[0, 1]), 200 + 10 + 100 + 11);
        assert_eq!(sums.bytes(|set| set.contains(&1)), 300 + 11 + 12);
        assert_eq!((sums.all(), sums.tree_bytes), (433, 400));
        let each = |bytes, new_bytes, own_bytes| Each {
            bytes,
            new_bytes,
            own_bytes,
        };
        let first = 200 + 10 + 11;
        assert_eq!(sums.each(2), [each(first, first, 110), each(323, 212, 100)]);
        assert!(SharedSums::of(&space, &[place("c")]).is_none());
        assert!(SharedSums::of(&space, &[None]).is_none());
    }
}
