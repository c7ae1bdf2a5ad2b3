//! What a server's disk may contain after a power cut at some moment of a recording.
//!
//! A write is sure when an fsync covered it: it was asked for before the fsync, on the same connection,
//! and answered before the fsync was. The server is OpenSSH's, which does one request after another.
//! Of all other writes any part may be there or not. Where a test asks for it, a block of 4096 bytes
//! may be torn between its sectors of 512.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::dice::Dice;

const BLOCK: usize = 4096;
const SECTOR: usize = 512;

/// One recorded event.
#[derive(Debug, Clone)]
pub enum Op {
    /// A write was asked for.
    Write {
        /// On which connection.
        connection: u32,
        /// Where in the file.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// The server said that the write at this place of the recording is done.
    Answered {
        /// Its index.
        write: usize,
    },
    /// The server said that an fsync is done.
    Synced {
        /// On which connection.
        connection: u32,
        /// How much was recorded when it was asked for.
        before: usize,
    },
    /// The power was cut here, and what was not sure was decided.
    PowerCut,
}

/// How writes that are not sure are torn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tear {
    /// A block is there or not.
    Blocks,
    /// Each of a block's eight sectors is there or not.
    Sectors,
    /// The same, but the block at this place of the file is there or not. A disk tears no more than the block that it
    /// writes when its power is cut: never a block and the copy of it that lies elsewhere.
    SectorsExcept(u64),
}

#[derive(Debug)]
struct Unsure {
    index: usize,
    connection: u32,
    offset: u64,
    data: Arc<[u8]>,
}

/// A disk that follows a recording.
#[derive(Debug)]
pub struct Power {
    /// A file with all sure writes.
    sure: PathBuf,
    at: usize,
    unsure: Vec<Unsure>,
    /// The newest sure write of each block: a page never returns to a version before the synced one.
    newest: BTreeMap<u64, usize>,
}

impl Power {
    /// Begins with the file as it is; `sure` is a new file of this disk's own.
    pub fn begin(file: &Path, sure: &Path) -> io::Result<Self> {
        copy(file, sure)?;
        Ok(Self {
            sure: sure.to_owned(),
            at: 0,
            unsure: Vec::new(),
            newest: BTreeMap::new(),
        })
    }

    /// Follows `log`, which begins as the one followed so far, to its end.
    pub fn advance(&mut self, log: &[Op]) -> io::Result<()> {
        let sure = OpenOptions::new().write(true).open(&self.sure)?;
        for (index, op) in log.iter().enumerate().skip(self.at) {
            match op {
                Op::Write {
                    connection,
                    offset,
                    data,
                } => self.unsure.push(Unsure {
                    index,
                    connection: *connection,
                    offset: *offset,
                    data: Arc::clone(data),
                }),
                // Counts where an fsync is asked for after it.
                Op::Answered { .. } => {}
                Op::Synced { connection, before } => {
                    let mut answered = answered_before(log, index, self.unsure.first());
                    answered.retain(|write| write < before);
                    self.sync(&sure, *connection, &answered)?;
                }
                Op::PowerCut => self.unsure.clear(),
            }
        }
        self.at = log.len();
        Ok(())
    }

    fn sync(&mut self, sure: &File, connection: u32, answered: &[usize]) -> io::Result<()> {
        let covered = |one: &Unsure| {
            one.connection == connection && answered.binary_search(&one.index).is_ok()
        };
        for one in self.unsure.iter().filter(|one| covered(one)) {
            for (block, part) in blocks(one.offset, &one.data) {
                if is_newest(&self.newest, block, one.index) {
                    sure.write_all_at(part, block * BLOCK as u64)?;
                    self.newest.insert(block, one.index);
                }
            }
        }
        self.unsure.retain(|one| !covered(one));
        Ok(())
    }

    /// Writes what the disk may contain now, by `seed`, to the new file `image`.
    pub fn image(&self, image: &Path, tear: Tear, seed: u64) -> io::Result<()> {
        copy(&self.sure, image)?;
        let image = OpenOptions::new().write(true).open(image)?;
        for (offset, bytes) in self.chosen(tear, seed) {
            image.write_all_at(bytes, offset)?;
        }
        Ok(())
    }

    /// How many writes are not sure now.
    #[must_use]
    pub fn unsure(&self) -> usize {
        self.unsure.len()
    }

    /// Decides by `seed` which unsynced writes `file`, which has every write, loses now. Returns the
    /// number of lost blocks.
    pub fn lose_unsynced(&mut self, file: &Path, seed: u64) -> io::Result<usize> {
        let sure = OpenOptions::new().read(true).write(true).open(&self.sure)?;
        let file = OpenOptions::new().write(true).open(file)?;
        for (offset, bytes) in self.chosen(Tear::Blocks, seed) {
            sure.write_all_at(bytes, offset)?;
        }
        let mut page = [0; BLOCK];
        let mut lost = 0;
        for one in &self.unsure {
            for (block, part) in blocks(one.offset, &one.data) {
                let offset = block * BLOCK as u64;
                sure.read_exact_at(&mut page, offset)?;
                lost += usize::from(part != page);
                file.write_all_at(&page, offset)?;
            }
        }
        self.unsure.clear();
        file.sync_all()?;
        Ok(lost)
    }

    /// The parts of unsure writes that the disk got, in their order.
    fn chosen(&self, tear: Tear, seed: u64) -> Vec<(u64, &[u8])> {
        let mut dice = Dice::new(seed);
        let keep_percent = kept_percent(&mut dice);
        let unit = |block: u64| match tear {
            Tear::Blocks => BLOCK,
            Tear::SectorsExcept(at) if block == at / BLOCK as u64 => BLOCK,
            Tear::Sectors | Tear::SectorsExcept(_) => SECTOR,
        };
        let mut chosen = Vec::new();
        for one in &self.unsure {
            for (block, part) in blocks(one.offset, &one.data) {
                let newest = is_newest(&self.newest, block, one.index);
                let unit = unit(block);
                for (at, sector) in part.chunks(unit).enumerate() {
                    if dice.percent(keep_percent) && newest {
                        chosen.push((block * BLOCK as u64 + (at * unit) as u64, sector));
                    }
                }
            }
        }
        chosen
    }
}

/// How much of what is not sure the disk keeps in the cut with this seed: 0 to 100 percent.
#[must_use]
pub fn keep_percent(seed: u64) -> u64 {
    kept_percent(&mut Dice::new(seed))
}

fn kept_percent(dice: &mut Dice) -> u64 {
    [0, 10, 50, 90, 100][usize::try_from(dice.below(5)).unwrap_or(0)]
}

fn is_newest(newest: &BTreeMap<u64, usize>, block: u64, index: usize) -> bool {
    newest.get(&block).is_none_or(|synced| *synced < index)
}

/// The writes, by index, from the first unsure one on, that were answered in the first `before`
/// events.
fn answered_before(log: &[Op], before: usize, first: Option<&Unsure>) -> Vec<usize> {
    let from = first.map_or(before, |first| first.index).min(before);
    let mut answered: Vec<usize> = log[from..before]
        .iter()
        .filter_map(|op| match op {
            Op::Answered { write } => Some(*write),
            _ => None,
        })
        .collect();
    answered.sort_unstable();
    answered
}

/// The blocks of a write; sprat writes whole ones.
fn blocks(offset: u64, data: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    assert!(offset.is_multiple_of(BLOCK as u64) && data.len().is_multiple_of(BLOCK));
    (offset / BLOCK as u64..).zip(data.chunks(BLOCK))
}

/// A copy with its holes.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let done = Command::new("cp")
        .arg("--sparse=always")
        .args([from, to])
        .status()?;
    done.success()
        .then_some(())
        .ok_or_else(|| io::Error::other(format!("cp {}", from.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(connection: u32, block: u64, byte: u8) -> Op {
        Op::Write {
            connection,
            offset: block * BLOCK as u64,
            data: vec![byte; BLOCK].into(),
        }
    }

    /// First bytes of the two blocks of all images of `log`.
    fn images(log: &[Op]) -> Vec<(u8, u8)> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, vec![0; 2 * BLOCK]).unwrap();
        let mut power = Power::begin(&file, &folder.path().join("sure")).unwrap();
        power.advance(log).unwrap();
        let image = folder.path().join("image");
        let mut found: Vec<_> = (0..40)
            .map(|seed| {
                power.image(&image, Tear::Blocks, seed).unwrap();
                let bytes = std::fs::read(&image).unwrap();
                (bytes[0], bytes[BLOCK])
            })
            .collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    #[test]
    fn fsync_covers_earlier_answers_on_its_own_connection() {
        let synced = |before| Op::Synced {
            connection: 1,
            before,
        };
        let both = [write(1, 0, 1), write(2, 1, 2)];
        let mut log = both.to_vec();
        assert_eq!(images(&log), [(0, 0), (0, 2), (1, 0), (1, 2)]);
        // Done before the write was, as far as anybody knows: covers nothing.
        log.extend([synced(2), Op::Answered { write: 0 }]);
        assert_eq!(images(&log).len(), 4);
        // Asked for before the write: covers nothing.
        log.push(synced(0));
        assert_eq!(images(&log).len(), 4);
        // Asked for right behind the write.
        log.push(synced(2));
        assert_eq!(images(&log), [(1, 0), (1, 2)]);
    }

    #[test]
    fn a_block_is_torn_where_that_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, vec![0; 2 * BLOCK]).unwrap();
        let mut power = Power::begin(&file, &folder.path().join("sure")).unwrap();
        power.advance(&[write(1, 0, 1), write(1, 1, 1)]).unwrap();
        let image = folder.path().join("image");
        let torn = |tear| {
            let mut torn = [false; 2];
            for seed in 0..40 {
                power.image(&image, tear, seed).unwrap();
                let bytes = std::fs::read(&image).unwrap();
                for (block, torn) in bytes.chunks(BLOCK).zip(&mut torn) {
                    *torn |= block.iter().any(|byte| *byte != block[0]);
                }
            }
            torn
        };
        assert_eq!(torn(Tear::Blocks), [false, false]);
        assert_eq!(torn(Tear::Sectors), [true, true]);
        assert_eq!(torn(Tear::SectorsExcept(BLOCK as u64)), [true, false]);
    }

    #[test]
    fn a_block_never_goes_back_behind_what_was_synced() {
        let log = [
            write(2, 0, 1),
            write(1, 0, 2),
            Op::Answered { write: 1 },
            Op::Synced {
                connection: 1,
                before: 3,
            },
        ];
        assert_eq!(images(&log), [(2, 0)]);
    }
}
