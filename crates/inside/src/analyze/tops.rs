//! The folders of all snapshots, and what lies beside them: examined at once, because each is a question to the server.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::Stat;
use sprat_snapshot::tree::Tree;
use sprat_snapshot::{Cancel, SnapshotError};

use crate::answer::go_on;

/// How many threads ask. More would wait for the server's disk.
const THREADS: usize = 24;

/// A snapshot from outside.
#[derive(Debug)]
pub(super) struct Top {
    /// Its folder.
    pub(super) stat: Option<Stat>,
    /// What lies beside it, and goes with it.
    pub(super) beside: Vec<Stat>,
}

/// Examines all of them, in their order.
pub(super) fn examine(trees: &[Tree], cancel: &Cancel) -> Result<Vec<Top>, SnapshotError> {
    let next = AtomicUsize::new(0);
    let found: Mutex<Vec<(usize, Result<Top, SnapshotError>)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..THREADS.min(trees.len()) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(tree) = trees.get(number).filter(|_| !cancel.is_cancelled()) else {
                        return;
                    };
                    let top = Top::of(tree);
                    if let Ok(mut found) = found.lock() {
                        found.push((number, top));
                    }
                }
            });
        }
    });
    go_on(cancel)?;
    let mut found = found.into_inner().unwrap_or_default();
    found.sort_unstable_by_key(|(number, _)| *number);
    found.into_iter().map(|(_, top)| top).collect()
}

impl Top {
    fn of(tree: &Tree) -> Result<Self, SnapshotError> {
        Ok(Self {
            stat: tree.stat(std::path::Path::new("/"))?,
            beside: tree.beside()?,
        })
    }
}
