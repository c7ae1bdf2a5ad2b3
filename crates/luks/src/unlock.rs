//! The budget of one opening over all key slots, and the order in which they are tried.
//!
//! The header comes from the server, and a wrong secret is tried with each slot. Without a common
//! budget, 32 slots at the limit of one slot would take half an hour in every run.

use std::collections::BTreeMap;

use crate::{LuksError, keyslot::Kdf};

/// The limit of memory times passes of all slots that are tried, in KiB: 512 GiB, about four minutes. 32
/// slots of 1 GiB with 16 passes, which is more than cryptsetup's benchmark selects, are within it.
const WORK_KIB_MAX: u64 = 512 << 20;

/// How to search for the slot that opens the volume key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnlockOptions {
    /// The key slot to try first: the one that opened the container last time. The others follow, the
    /// cheapest first.
    pub first: Option<u32>,
    /// The limit of work for all key slots that are tried: memory times passes, in KiB. Two rounds of
    /// PBKDF2 count as one KiB. The first slot is always tried.
    pub work_kib_max: u64,
    /// The limit of memory for the derivation of one key slot, in KiB.
    pub memory_kib_max: u64,
}

impl Default for UnlockOptions {
    /// 512 GiB of work, and the memory that this machine has available now (proc_meminfo(5):
    /// `MemAvailable` and `SwapFree`).
    fn default() -> Self {
        Self {
            first: None,
            work_kib_max: WORK_KIB_MAX,
            memory_kib_max: memory_kib_available().unwrap_or(u64::MAX),
        }
    }
}

impl UnlockOptions {
    /// The default, with this key slot first.
    #[must_use]
    pub fn beginning_with(first: Option<u32>) -> Self {
        Self {
            first,
            ..Self::default()
        }
    }
}

/// What is left of the budget.
pub(crate) struct Budget {
    options: UnlockOptions,
    spent_kib: u64,
    tried: usize,
    /// Slots that were skipped because of the budget.
    left_out: Vec<u32>,
    /// Why the first slot was skipped that is not usable by itself.
    objection: Option<LuksError>,
}

impl Budget {
    pub(crate) fn new(options: &UnlockOptions) -> Self {
        Self {
            options: *options,
            spent_kib: 0,
            tried: 0,
            left_out: Vec::new(),
            objection: None,
        }
    }

    /// Sorts slots into the order in which they are tried.
    pub(crate) fn order<T>(&self, slots: &mut [T], about: impl Fn(&T) -> (u32, u64)) {
        slots.sort_by_key(|slot| {
            let (number, cost) = about(slot);
            (Some(number) != self.options.first, cost, number)
        });
    }

    /// Whether the slot may be tried. If so, it is counted.
    pub(crate) fn allows(&mut self, slot: u32, kdf: &Kdf) -> bool {
        if kdf.memory_kib() > self.options.memory_kib_max {
            self.object(LuksError::NoMemory {
                slot,
                memory_kib: kdf.memory_kib(),
            });
            return false;
        }
        let spent_kib = self.spent_kib.saturating_add(kdf.cost());
        if self.tried > 0 && spent_kib > self.options.work_kib_max {
            self.left_out.push(slot);
            return false;
        }
        self.spent_kib = spent_kib;
        self.tried += 1;
        true
    }

    /// Records why a slot is skipped.
    pub(crate) fn object(&mut self, reason: LuksError) {
        self.objection.get_or_insert(reason);
    }

    /// The error if no slot opened.
    pub(crate) fn failed(self) -> LuksError {
        if let Some(objection) = self.objection {
            return objection;
        }
        match self.left_out.is_empty() {
            true => LuksError::WrongSecret {
                slots_tried: self.tried,
            },
            false => LuksError::KdfBudget {
                slots_tried: self.tried,
                left_out: self.left_out,
            },
        }
    }
}

/// The memory that can be allocated without taking it from a process that can't be swapped out.
fn memory_kib_available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    available_in(&text)
}

fn available_in(meminfo: &str) -> Option<u64> {
    let fields: BTreeMap<&str, u64> = meminfo
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name, value.trim().strip_suffix("kB")?.trim().parse().ok()?))
        })
        .collect();
    let swap = fields.get("SwapFree").copied().unwrap_or(0);
    Some(fields.get("MemAvailable")?.saturating_add(swap))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_includes_free_swap() {
        let text = "MemTotal:  100 kB\nMemFree:  1 kB\nMemAvailable:   40 kB\nSwapFree:  2 kB\n";
        assert_eq!(available_in(text), Some(42));
        assert_eq!(available_in("MemTotal: 100 kB\n"), None);
        assert!(memory_kib_available().is_some_and(|kib| kib > 1024));
    }
}
